"""What the benchmarks count: distances of site DOS, nearest neighbours, structure matches, bootstrap intervals.

Arrays only: what is measured on what is the business of ``benchmarks/``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from .dos import MODEL_GRID, NEAR_GAP, mae_arrays, normalised_l1_arrays

if TYPE_CHECKING:
    from ase import Atoms

QUARTILES = (0.25, 0.5, 0.75)


def quantile(values: ArrayLike, q: ArrayLike) -> np.ndarray:
    """Empirical quantiles over the first axis; never interpolated, so that infinite values are allowed."""
    return np.quantile(np.asarray(values, dtype=float), q, axis=0, method="inverted_cdf")


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


def match_rms(candidate: Atoms, truth: Atoms) -> float:
    """RMS displacement between two crystals, in units of (volume per atom)^(1/3); NaN where they do not match.

    pymatgen's StructureMatcher with the tolerances usual for generated crystals (ltol 0.3, stol 0.5, angle_tol 10); it
    compares primitive cells scaled to one volume.
    """
    from pymatgen.analysis.structure_matcher import StructureMatcher
    from pymatgen.core import Structure

    pair = [Structure(a.cell.array, a.numbers, a.get_scaled_positions()) for a in (candidate, truth)]
    found = StructureMatcher(ltol=0.3, stol=0.5, angle_tol=10).get_rms_dist(*pair)
    return float("nan") if found is None else float(found[0])
