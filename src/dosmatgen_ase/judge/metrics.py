"""What the benchmarks count: distances of site DOS, nearest neighbours, structure matches, bootstrap intervals.

Arrays only: what is measured on what is the business of ``benchmarks/``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from dosmatgen_ase.crystals.convert import to_structure
from dosmatgen_ase.dos import MIN_SHARED, MODEL_GRID, NEAR_GAP, mae_arrays, normalised_l1_arrays

if TYPE_CHECKING:
    from ase import Atoms

QUARTILES = (0.25, 0.5, 0.75)


def quantile(values: ArrayLike, q: ArrayLike) -> np.ndarray:
    """Empirical quantiles over the first axis; never interpolated, so that infinite values are allowed."""
    levels = np.asarray(q, dtype=float)
    return np.asarray(np.quantile(np.asarray(values, dtype=float), levels, axis=0, method="inverted_cdf"))


def median(values: ArrayLike) -> float:
    """Lower median of a sample that may hold infinities."""
    return float(quantile(values, 0.5))


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[[np.ndarray], float],
    *,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic.

    Parameters
    ----------
    values : array, shape (n, ...)
        One row per independent unit; rows are drawn with replacement, so that columns stay paired.
    statistic : callable
        From resampled rows to a number.
    confidence : float
        Between 0 and 1.
    samples : int
        Number of resamples.
    seed : int
        Of the resampling.

    Raises
    ------
    ValueError
        If there is no row, or ``confidence`` is not between 0 and 1.
    """
    rows = np.asarray(values, dtype=float)
    if rows.ndim == 0 or len(rows) == 0:
        raise ValueError("a bootstrap needs at least one value")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, e.g. 0.95")
    drawn = np.random.default_rng(seed).integers(len(rows), size=(samples, len(rows)))
    low, high = quantile([statistic(rows[d]) for d in drawn], [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def site_distances(values: np.ndarray, target: np.ndarray, known: np.ndarray) -> dict[str, np.ndarray]:
    """Distances between the site DOS of crystals and those of one target, site by site.

    Parameters
    ----------
    values : array, shape (..., N, G)
        On `dos.MODEL_GRID`, states/eV; NaN throughout for a crystal that has none.
    target : array, shape (N, G)
    known : array of bool, shape (N, G) or (G,)
        Bins of the target that are known.

    Returns
    -------
    dict of array, shape (...)
        ``l1``: normalised L1 of each site, averaged over the sites; ``pooled``: absolute errors of all sites over all
        states; ``near_gap``: as pooled, on [-2, 2] eV (a single site may have next to no states there); ``mae`` in
        states/eV. NaN where ``values`` is; ``near_gap`` also where the target has no states there.

    Raises
    ------
    ValueError
        If the target holds no states at all.
    """
    known = np.broadcast_to(known, target.shape)
    near = known & (np.abs(MODEL_GRID.energies) <= NEAR_GAP[1] + 1e-9)
    filled = np.where(known, target, 0.0).sum(-1) > 0  # a site without states has no ratio
    if not filled.any():
        raise ValueError("the target holds no states in its known bins: nothing to normalise by")

    def pooled(mask: np.ndarray) -> np.ndarray:
        return normalised_l1_arrays(values.reshape(*values.shape[:-2], -1), target.ravel(), mask.ravel())

    return {
        "l1": normalised_l1_arrays(values, target, known)[..., filled].mean(-1),
        "pooled": pooled(known),
        "near_gap": pooled(near),
        "mae": mae_arrays(values, target, known).mean(-1),
    }


def nearest_sites(
    queries: np.ndarray, known: np.ndarray, library: np.ndarray, library_known: np.ndarray, *, power: float = 1.0
) -> np.ndarray:
    """Row of ``library`` (L, G) nearest to each query (Q, G) by the mean of ``|a - b|^power`` over bins known in both.

    Parameters
    ----------
    known, library_known : arrays of bool, shapes (Q, G) and (L, G)
        Rows of the library that know less than 90 % of a query's known bins, or of the states in them, are not
        considered: a site would be nearest for what is not known of it.

    Returns
    -------
    array of int, shape (Q,)

    Raises
    ------
    ValueError
        If a query shares too little with every row.
    """
    found = np.empty(len(queries), dtype=np.int64)
    for i, (query, mask) in enumerate(zip(queries, known, strict=True)):
        both = library_known & mask
        shared = both.sum(-1)
        states = np.where(mask, np.abs(query), 0.0)
        usable = (shared >= max(1, MIN_SHARED * mask.sum())) & (both @ states >= MIN_SHARED * states.sum())
        if not usable.any():
            share = f"less than {MIN_SHARED:.0%} of its known bins or states"
            raise ValueError(f"query {i} shares {share} with every row: widen its window")
        distance = (np.abs(library - query) ** power * both).sum(-1) / np.maximum(shared, 1)
        found[i] = np.where(usable, distance, np.inf).argmin()
    return found


def match_rms(candidate: Atoms, truth: Atoms) -> float:
    """RMS displacement between two crystals, in units of (volume per atom)^(1/3); NaN where they do not match.

    pymatgen's StructureMatcher with the tolerances usual for generated crystals (ltol 0.3, stol 0.5, angle_tol 10); it
    compares primitive cells scaled to one volume. These are lenient: zinc blende matches rock salt, at an RMS of 0.43.
    """
    from pymatgen.analysis.structure_matcher import StructureMatcher

    pair = to_structure(candidate), to_structure(truth)
    found = StructureMatcher(ltol=0.3, stol=0.5, angle_tol=10).get_rms_dist(*pair)
    return float("nan") if found is None else float(found[0])
