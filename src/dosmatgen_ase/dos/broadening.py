"""Gaussian broadening onto another grid, and the scaling of site projections to the total DOS."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from dosmatgen_ase.dos.grid import GAP_DOS, MODEL_GRID, MODEL_SIGMA, Array, EnergyGrid, Mask, cell_widths

KNOWN_WEIGHT = 0.84
"""Share of the broadening kernel that must lie on known input for a bin to be known. At an edge this means that the
input reaches one standard deviation of the *extra* broadening beyond the bin (the normal distribution holds 0.841
below +1 sigma)."""

PIECE = 4096
"""Energies whose weights are in memory at a time."""

MIN_COVERAGE = 0.7
"""Least share of the total DOS that Loewdin projections must cover for their split over the sites to be trusted."""


def resample(
    energies: Array,
    values: Array,
    known: Mask,
    sigma: float,
    grid: EnergyGrid = MODEL_GRID,
    grid_sigma: float = MODEL_SIGMA,
) -> tuple[Array, Mask]:
    """Widen and resample DOS arrays onto a uniform grid; the arithmetic of `TargetDOS.on_grid` for whole data sets.

    Parameters
    ----------
    energies : array, shape (G,)
        eV, strictly increasing, common to all.
    values, known : arrays, shape (..., G)
        states/eV and bool. Values at unknown energies are ignored (they must be finite).
    sigma, grid_sigma : float
        Standard deviations (eV) that the values have and shall have; `sigma` >= `grid_sigma` only interpolates.

    Returns
    -------
    values, known : arrays, shape (..., grid.size)
        Values are 0 where unknown.
    """
    extra = math.sqrt(max((grid_sigma - sigma) * (grid_sigma + sigma), 0.0))
    # Below a tenth of a step the extra broadening is not seen on the grid, and its kernel would need a very fine mesh.
    shape = (*np.broadcast_shapes(np.shape(values), known.shape)[:-1], grid.size)
    weight: Array = np.zeros(shape)
    sums: Array = np.zeros(shape)
    for part, bins, matrix in _resampling_matrix(energies, grid.energies, extra if extra > 0.1 * grid.step else 0.0):
        weight[..., bins] += known[..., part] @ matrix.T
        sums[..., bins] += np.where(known[..., part], values[..., part], 0.0) @ matrix.T
    inside = weight >= KNOWN_WEIGHT
    return np.where(inside, sums / np.where(inside, weight, 1.0), 0.0), inside


def _resampling_matrix(energies: Array, centres: Array, width: float) -> Iterator[tuple[slice, slice, Array]]:
    """Weights (O, G) that turn values at `energies` into Gaussian averages of standard deviation `width` at `centres`.

    The input is read as piecewise linear, zero outside its range. Rows sum to the share of the kernel inside the range.
    It comes in pieces, each with the slices of energies and of centres that it is for, so that a million energies fit
    memory: what they give is to be added.
    """
    if width == 0.0:
        points, lengths = centres, np.ones_like(centres)
    else:
        # Split coarse intervals so that the sum over points is the integral: half a width for the Gaussian's shape.
        parts = np.maximum(np.ceil(np.diff(energies) / (0.5 * width) - 1e-9), 1).astype(int)
        outside = (energies[1:] < centres[0] - 6 * width) | (energies[:-1] > centres[-1] + 6 * width)
        parts[outside] = 1
        starts = np.concatenate([[0], np.cumsum(parts)])
        points = np.interp(np.arange(starts[-1] + 1), starts, energies)
        lengths = cell_widths(points)
    # Each point takes its value from its two neighbours in the input (hat functions).
    left = np.clip(np.searchsorted(energies, points, side="right") - 1, 0, energies.size - 2)
    share = (points - energies[left]) / (energies[left + 1] - energies[left])
    inside = (share > -1e-9) & (share < 1 + 1e-9)
    share = np.clip(share, 0.0, 1.0)
    for start in range(0, points.size, PIECE):
        piece = slice(start, start + PIECE)
        whole = points.size <= PIECE
        first, end = (0, energies.size) if whole else (int(left[piece][0]), int(left[piece][-1]) + 2)
        near = slice(0, centres.size)
        if width == 0.0:  # the points are the centres
            near = slice(start, start + points[piece].size)
            kernel = np.eye(points[piece].size)
        else:
            if not whole:  # beyond 8 widths the kernel is 1e-14
                reach = (points[piece][0] - 8 * width, points[piece][-1] + 8 * width)
                near = slice(*np.searchsorted(centres, reach).tolist())
            distance = (centres[near, None] - points[piece]) / width
            kernel = np.exp(-0.5 * distance**2) / (math.sqrt(2 * math.pi) * width) * lengths[piece]
        columns = np.zeros((end - first, kernel.shape[0]))
        for neighbour, weight in ((left, inside * (1 - share)), (left + 1, inside * share)):
            np.add.at(columns, neighbour[piece] - first, (kernel * weight[piece]).T)
        yield slice(first, end), near, columns.T


def scale_sites_to_total(
    site_dos: Array, total: Array, *, energies: Array, e_max: float = math.inf, min_coverage: float = MIN_COVERAGE
) -> tuple[Array, Mask]:
    """Scale site projections at every energy so that they add up to the total DOS.

    This takes out most of the dependence on projection spheres. An energy is known where it does not exceed `e_max` and
    either the total is below `GAP_DOS` (a gap: a known zero) or the projections cover at least `min_coverage` of it.

    Parameters
    ----------
    site_dos : array, shape (sites, G)
        Projections summed over l, states/eV.
    total : array, shape (G,)
        Total DOS of the cell, states/eV.
    energies : array, shape (G,)
        eV.
    e_max : float
        Energy (eV) above which bands are missing.
    min_coverage : float
        0.7 for Loewdin projections, whose missing part is missing shells; 0 for PAW spheres, which never cover it all.

    Returns
    -------
    scaled : array, shape (sites, G)
        0 where unknown.
    known : array of bool, shape (G,)
    """
    covered = site_dos.sum(axis=0)
    split = covered > 0
    enough = split & (covered >= min_coverage * total)
    known = (energies <= e_max) & ((total < GAP_DOS) | enough)
    factor = np.where(split & known, total / np.where(split, covered, 1.0), 0.0)
    return site_dos * factor, known
