"""From Hamiltonians to a DOS: levels with a stable gradient, the zero of energy by counting electrons, broadening."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

SMEARING = 0.1  # eV, Gaussian, of the electron count
MIN_GAP = 0.15  # eV: below, a crystal counts as a metal
EMPTY = 60.0  # eV, where padding lies
SPREADS = (0.0, 0.5, 1.0, 2.0, 4.0)  # of levels over their cells, in broadenings; wider ones count as the last
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
    spread : (b, c, k, n), eV, or None
        Standard deviation of each level over the cell of its point, as if it were a plane there (G. Gilat and L. J.
        Raubenheimer, Phys. Rev. 144, 390 (1966)).
    """

    levels: Tensor
    weights: Tensor
    kweights: Tensor
    zero: Tensor
    gap: Tensor
    opening: Tensor
    spread: Tensor | None = None


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n) and eigenvectors (..., n, n) of Hermitian matrices."""
    return _Eigh.apply(matrix)


class Zero(NamedTuple):
    """Zero of energy, gap and opening of b crystals, all (b,), see `Spectrum`."""

    zero: Tensor
    gap: Tensor
    opening: Tensor


def zero_and_gap(
    levels: Tensor, kweights: Tensor, electrons: Tensor, edges: Tensor | None = None, spread: Tensor | None = None
) -> Zero:
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
    spread : (b, c, k, n), eV, optional
        Standard deviation of the levels, in the electron count.
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
        rows, last = torch.arange(crystals, device=levels.device), channels * size - 1
        below = bands[rows, :, (filled - 1).clamp(0, last)]
        above = bands[rows, :, filled.clamp(0, last)]
        above = torch.where((filled >= channels * size)[:, None], torch.full_like(above, EMPTY), above)
        top, bottom = below.amax(1), above.amin(1)
        gap = torch.where(whole & (bottom - top > MIN_GAP), bottom - top, torch.zeros_like(top))
        # Where the mesh leaves a gap that the further points close, its electrons do not tell the Fermi level.
        untold = whole & (gap == 0) & (above[:, :points].amin(1) - below[:, :points].amax(1) > MIN_GAP)
        smearing = torch.full_like(flat, SMEARING)
        if spread is not None:
            smearing = (SMEARING**2 + spread.reshape(crystals, -1) ** 2).sqrt()
        low, high = flat.amin(1) - 1, bands.amax((1, 2)) + 1
        for _ in range(24):
            middle = (low + high) / 2
            many = (held * torch.special.ndtr((middle[:, None] - flat) / smearing)).sum(1) > electrons
            low, high = torch.where(many, low, middle), torch.where(many, middle, high)
        fermi = (low + high) / 2  # to 5e-6 eV; a step of Newton's does the rest
        away = (fermi[:, None] - flat) / smearing
        excess = (held * torch.special.ndtr(away)).sum(1) - electrons
        slope = (held * torch.exp(-0.5 * away**2) / smearing).sum(1) / math.sqrt(2 * math.pi)
        fermi = fermi - (excess / slope.clamp(min=1e-6)).clamp(-1e-5, 1e-5)
        # A Fermi level follows the levels within the smearing, as the count says.
        near = held * (torch.exp(-0.5 * ((flat - fermi[:, None]) / smearing) ** 2) + 1e-8 * (flat < EMPTY / 2))
        near = near / smearing
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
    factors = (0.0,) if spectrum.spread is None else SPREADS
    step, margin = sigma / 8, (5 + 2.5 * factors[-1]) * sigma
    low, high = float(energies.min()) - margin, float(energies.max()) + margin
    bins = math.ceil((high - low) / step) + 2
    place = ((levels - low) / step).reshape(crystals, -1)
    inside = (place >= 1) & (place < bins - 2)
    place = place.clamp(1, bins - 2)
    cell = place.detach().round()
    off = place - cell
    held = (spectrum.kweights * (2 / channels))[:, None, :, None].expand_as(levels).reshape(crystals, -1) * inside
    shells = spectrum.weights.shape[-1]
    weights = spectrum.weights.reshape(-1, shells)
    row = cell.long() + bins * len(factors) * torch.arange(crystals, device=levels.device)[:, None]
    histogram = weights.new_zeros(crystals * len(factors) * bins, shells)
    for width, part in _shared_out(spectrum.spread, sigma, held):
        for neighbour, share in ((-1, 0.5 * (0.5 - off) ** 2), (0, 0.75 - off**2), (1, 0.5 * (0.5 + off) ** 2)):
            rows = (row + neighbour + bins * width).flatten()
            histogram = histogram.index_add(0, rows, weights * (part * share).flatten()[:, None])
    bumps = _bumps(tuple(energies.tolist()), sigma, factors, low, bins).to(levels)
    return (bumps @ histogram.view(crystals, len(factors) * bins, shells)).transpose(1, 2)


@lru_cache(maxsize=4)
def _bumps(energies: tuple[float, ...], sigma: float, factors: tuple[float, ...], low: float, bins: int) -> Tensor:
    """Gaussians (energies, widths * bins) by which `broadened` smears its histogram of each width."""
    step = sigma / 8
    away = torch.tensor(energies, dtype=torch.float64)[:, None] - low - step * torch.arange(bins, dtype=torch.float64)
    made = []
    for factor in factors:
        width = math.sqrt(sigma**2 * (1 + factor**2) - step**2 / 4)
        exponent = 0.5 * (away / width) ** 2
        made.append(torch.exp(-exponent) * (exponent < 40) / (width * math.sqrt(2 * math.pi)))
    return torch.cat(made, 1).float()


def _shared_out(spread: Tensor | None, sigma: float, held: Tensor) -> list[tuple[Tensor | int, Tensor]]:
    """Electrons (b, m) of levels, shared out among the next wider and the next narrower of `SPREADS`.

    Returns the number of the width of each level, and how many electrons it gets. The mean variance stays.
    """
    if spread is None:
        return [(0, held)]
    squares = (sigma * held.new_tensor(SPREADS)) ** 2
    wanted = (spread.reshape(held.shape) ** 2).clamp(max=float(squares[-1]))
    lower = (torch.searchsorted(squares, wanted, right=True) - 1).clamp(max=len(SPREADS) - 2)
    wider = (wanted - squares[lower]) / (squares[lower + 1] - squares[lower])
    return [(lower, held * (1 - wider)), (lower + 1, held * wider)]
