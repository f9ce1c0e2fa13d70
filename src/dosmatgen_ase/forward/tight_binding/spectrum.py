"""From Hamiltonians to a DOS: levels with a stable gradient, the zero of energy by counting electrons, broadening."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

SMEARING = 0.1  # eV, Gaussian, of the electron count
MIN_GAP = 0.15  # eV: below, a crystal counts as a metal
EMPTY = 60.0  # eV, where padding lies
SAME_LEVEL = 1e-3  # eV: levels this near to each other count as one


class _Eigh(torch.autograd.Function):
    """`torch.linalg.eigh` with a gradient that stays finite where levels meet; exact for the density of states."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        ctx.save_for_backward(values, vectors)
        return values, vectors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        apart = values[..., None, :] - values[..., :, None]
        inner = (vectors.mH @ grads[1]) * (apart / (apart**2 + 1e-6)) + torch.diag_embed(grads[0]).to(vectors.dtype)
        grad = vectors @ inner @ vectors.mH
        return (grad + grad.mH) / 2


class Spectrum(NamedTuple):
    """Levels of b crystals at k points, in c spin channels (1 or 2).

    Attributes
    ----------
    levels : (b, c, k, n), eV
    weights : (b, c, k, n, s)
        Share of each of the s = sites x 3 shells in each level.
    kweights : (b, k)
        Of the points, sum 1.
    zero : (b,), eV
        Fermi level, or valence-band maximum where there is a gap.
    gap : (b,), eV
        0 for a metal.
    opening : (b,), eV
        Bottom of the bands above the electrons minus top of those below, negative where they overlap; NaN where the
        electrons do not fill whole bands.
    """

    levels: Tensor
    weights: Tensor
    kweights: Tensor
    zero: Tensor
    gap: Tensor
    opening: Tensor


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n) and eigenvectors (..., n, n) of Hermitian matrices."""
    return _Eigh.apply(matrix)


class Zero(NamedTuple):
    """Zero of energy, gap and opening of b crystals, all (b,), see `Spectrum`."""

    zero: Tensor
    gap: Tensor
    opening: Tensor


def zero_and_gap(levels: Tensor, kweights: Tensor, electrons: Tensor, edges: Tensor | None = None) -> Zero:
    """Fermi level, or valence-band maximum where the bands leave a gap; and that gap, 0 for a metal.

    The zero carries the gradient of the levels near it, the opening that of the levels that bound it.

    Parameters
    ----------
    levels : (b, c, k, n), eV
        Of one channel (each level holds two electrons) or two (one each); padding lies above all else.
    kweights : (b, k)
    electrons : (b,)
    edges : (b, c, p, n), eV, optional
        Levels at further points. They hold no electrons, but bands may end there: a mesh hardly meets the ends.
    """
    crystals, channels, points, size = levels.shape
    every = levels if edges is None else torch.cat([levels, edges], 2)
    ends = every.reshape(crystals, -1)
    with torch.no_grad():
        flat = levels.reshape(crystals, -1)
        held = (kweights * (2 / channels))[:, None, :, None].expand_as(levels).reshape(crystals, -1)  # electrons
        bands = every.transpose(1, 2).reshape(crystals, -1, channels * size).sort(-1).values
        filled = (electrons * channels / 2).round().long()
        whole = (electrons * channels / 2 - filled).abs() < 1e-3
        before = (filled - 1).clamp(0, channels * size - 1)[:, None, None].expand(-1, bands.shape[1], 1)
        after = filled.clamp(0, channels * size - 1)[:, None, None].expand(-1, bands.shape[1], 1)
        below, above = bands.gather(2, before)[..., 0], bands.gather(2, after)[..., 0]
        above = torch.where((filled >= channels * size)[:, None], torch.full_like(above, EMPTY), above)
        top, bottom = below.amax(1), above.amin(1)
        gap = torch.where(whole & (bottom - top > MIN_GAP), bottom - top, torch.zeros_like(top))
        # Where the mesh leaves a gap that the further points close, its electrons do not tell the Fermi level.
        untold = whole & (gap == 0) & (above[:, :points].amin(1) - below[:, :points].amax(1) > MIN_GAP)
        low, high = flat.amin(1) - 1, bands.amax((1, 2)) + 1
        for _ in range(24):
            middle = (low + high) / 2
            many = (held * torch.special.ndtr((middle[:, None] - flat) / SMEARING)).sum(1) > electrons
            low, high = torch.where(many, low, middle), torch.where(many, middle, high)
        fermi = (low + high) / 2  # to 5e-6 eV; a step of Newton's does the rest
        away = (fermi[:, None] - flat) / SMEARING
        excess = (held * torch.special.ndtr(away)).sum(1) - electrons
        slope = (held * torch.exp(-0.5 * away**2)).sum(1) / (SMEARING * math.sqrt(2 * math.pi))
        fermi = fermi - (excess / slope.clamp(min=1e-6)).clamp(-1e-5, 1e-5)
        # A Fermi level follows the levels within the smearing, as the count says.
        near = held * (torch.exp(-0.5 * ((flat - fermi[:, None]) / SMEARING) ** 2) + 1e-8 * (flat < EMPTY / 2))
        near = near / near.sum(1, keepdim=True)
    follows = (near * (levels.reshape(crystals, -1) - flat)).sum(1)
    valence, conduction = _following(top, ends), _following(bottom, ends)
    opening = torch.where(whole, conduction - valence, torch.full_like(top, math.nan))
    fermi = torch.where(untold, (valence + conduction) / 2, fermi + follows)
    return Zero(torch.where(gap > 0, valence, fermi), gap, opening)


def _following(level: Tensor, ends: Tensor) -> Tensor:
    """Give a level (b,) the gradient of those of `ends` (b, m) that are the same: their mean, so symmetry stays."""
    same = ((ends - level[:, None]).abs() < SAME_LEVEL).to(ends)
    share = same / same.sum(1, keepdim=True).clamp(min=1)
    return level + (share * (ends - ends.detach())).sum(1)


def broadened(spectrum: Spectrum, energies: Tensor, sigma: float) -> Tensor:
    """Density of states of every shell, (b, s, energies), states/eV, both spins together.

    Weights are shared out among the three nearest points of a grid eight times finer than `sigma` by a quadratic
    B-spline, which keeps their first two moments, then smeared by a Gaussian that is narrower by the spline's width.

    Parameters
    ----------
    spectrum : Spectrum
    energies : (g,)
        From the zero, eV.
    sigma : eV
    """
    levels = spectrum.levels - spectrum.zero[:, None, None, None]
    crystals, channels = levels.shape[:2]
    step = sigma / 8
    low, high = float(energies.min()) - 5 * sigma, float(energies.max()) + 5 * sigma
    bins = math.ceil((high - low) / step) + 2
    place = ((levels - low) / step).reshape(crystals, -1)
    inside = (place >= 1) & (place < bins - 2)
    place = place.clamp(1, bins - 2)
    cell = place.detach().round()
    off = place - cell
    held = (spectrum.kweights * (2 / channels))[:, None, :, None].expand_as(levels).reshape(crystals, -1) * inside
    shells = spectrum.weights.shape[-1]
    weights = spectrum.weights.reshape(-1, shells)
    row = (cell.long() + bins * torch.arange(crystals, device=levels.device)[:, None]).flatten()
    histogram = weights.new_zeros(crystals * bins, shells)
    for neighbour, share in ((-1, 0.5 * (0.5 - off) ** 2), (0, 0.75 - off**2), (1, 0.5 * (0.5 + off) ** 2)):
        histogram = histogram.index_add(0, row + neighbour, weights * (held * share).flatten()[:, None])
    centres = low + step * torch.arange(bins, device=levels.device, dtype=levels.dtype)
    width = math.sqrt(sigma**2 - step**2 / 4)
    exponent = 0.5 * ((energies.to(levels)[:, None] - centres) / width) ** 2
    bump = torch.exp(-exponent) * (exponent < 40) / (width * math.sqrt(2 * math.pi))
    return (bump @ histogram.view(crystals, bins, shells)).transpose(1, 2)
