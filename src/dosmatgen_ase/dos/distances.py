"""Distances between two DOS: normalised L1 (the one of this package), mean absolute error, and others."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from dosmatgen_ase.dos.checks import pair_on_common_zero
from dosmatgen_ase.dos.grid import MODEL_GRID, MODEL_SIGMA, Array, Mask, cell_widths, inside_window
from dosmatgen_ase.dos.target import TargetDOS

MIN_SHARED = 0.9
"""Share of the bins and of the states of a query that another DOS must know to be called near it."""


def normalised_l1_arrays(values: Array, target: Array, known: Mask) -> Array:
    """``sum |g - g*| / sum g*`` over known bins.

    Parameters
    ----------
    values, target, known : arrays, shape (..., G), broadcast against each other
        On one uniform grid at one broadening.

    Returns
    -------
    array, shape (...)
        NaN where the target holds no states in the known bins (nothing to normalise by), or nothing is known.
    """
    scale = np.where(known, target, 0.0).sum(axis=-1)
    error = np.where(known, np.abs(values - target), 0.0).sum(axis=-1)
    distance: Array = error / np.where(scale > 0, scale, math.nan)
    return distance


def mae_arrays(values: Array, target: Array, known: Mask) -> Array:
    """Mean of ``|g - g*|`` (states/eV) over known bins; shapes as in `normalised_l1_arrays`, NaN if none is known."""
    error = np.where(known, np.abs(values - target), 0.0).sum(axis=-1)
    count = np.sum(known, axis=-1)
    mean: Array = error / np.where(count > 0, count, math.nan)
    return mean


def normalised_l1(dos: TargetDOS, target: TargetDOS, *, window: tuple[float, float] | None = None) -> float:
    """Normalised L1 distance ``sum |g - g*| / sum g*`` of `dos` to `target`: the distance of this package.

    Both are put on `MODEL_GRID` at sigma 0.2 eV (at the broader of the two where one is broader) and compared over the
    bins known in both. It is not symmetric: the target normalises.

    Parameters
    ----------
    dos, target : TargetDOS
        Of the same kind. Zero is the highest occupied level of each: a total whose Fermi level lies in a gap is moved
        to its valence-band maximum, a site's DOS is taken as it is (`checks.pair_on_common_zero`).
    window : (lo, hi), optional
        eV; the whole grid by default, `NEAR_GAP` for the near-gap figure.

    Returns
    -------
    float
        0 for equal DOS, 2 for disjoint ones of equal area; NaN if the target holds no states in the bins compared.

    Raises
    ------
    ValueError
        If one is a site's and the other a total, or no bin is known in both.
    """
    return float(normalised_l1_arrays(*_on_common_grid(dos, target, window)))


def mae(dos: TargetDOS, target: TargetDOS, *, window: tuple[float, float] | None = None) -> float:
    """Mean absolute difference in states/eV; arguments and errors as in `normalised_l1`."""
    return float(mae_arrays(*_on_common_grid(dos, target, window)))


def mean_distance(
    pairs: Iterable[tuple[TargetDOS, TargetDOS]], *, window: tuple[float, float] | None = None
) -> float | None:
    """Mean of `normalised_l1` over pairs of (dos, target): what candidates are ordered by.

    A target that holds no states, such as a gap, has no ratio: its `mae`, in states/eV, takes the place. None if there
    is no pair, or a target holds states but none where they can be compared. Errors as in `normalised_l1`.
    """

    def distance(dos: TargetDOS, target: TargetDOS) -> float:
        ratio = normalised_l1(dos, target, window=window)
        stateless = math.isnan(ratio) and math.isnan(normalised_l1(target, target, window=window))
        return mae(dos, target, window=window) if stateless else ratio

    distances = [distance(*pair) for pair in pairs]
    return float(np.mean(distances)) if distances and np.isfinite(distances).all() else None


def wasserstein(dos: TargetDOS, target: TargetDOS, *, window: tuple[float, float] | None = None) -> float:
    """Earth mover's distance in eV between the two DOS, each normalised over the bins known in both.

    NaN if either holds no states there; arguments and errors as in `normalised_l1`.
    """
    from scipy.stats import wasserstein_distance

    values, wanted, known = _on_common_grid(dos, target, window)
    values, wanted, energies = values[known], wanted[known], MODEL_GRID.energies[known]
    if not (values.any() and wanted.any()):
        return math.nan
    return float(wasserstein_distance(energies, energies, values, wanted))


def fingerprint_similarity(dos: TargetDOS, target: TargetDOS, *, window: tuple[float, float] | None = None) -> float:
    """Tanimoto similarity ``a.b / (|a|^2 + |b|^2 - a.b)`` of the two DOS, each normalised to one state.

    This is the definition of pymatgen's ``CompleteDos.get_dos_fp_similarity`` (after Knoop et al., JOSS 5, 2671, 2020,
    and Kuban et al., Digital Discovery 3, 2448, 2024), on all bins known in both; pymatgen 2026.10 itself compares a
    single row of its fingerprint arrays.

    1 for equal shapes, 0 for disjoint ones; NaN if either holds no states. Arguments and errors as in `normalised_l1`.
    """
    values, wanted, known = _on_common_grid(dos, target, window)
    a, b = np.where(known, values, 0.0), np.where(known, wanted, 0.0)
    if not (a.any() and b.any()):
        return math.nan
    a, b = a / a.sum(), b / b.sum()
    return float(a @ b / (a @ a + b @ b - a @ b))


def band_centre_difference(dos: TargetDOS, target: TargetDOS, *, lo: float = -10.0, hi: float = 0.0) -> float:
    """Difference (eV) of the band centres between lo and hi over the bins known in both; NaN if either is empty."""
    values, wanted, known = _on_common_grid(dos, target, (lo, hi))
    energies = MODEL_GRID.energies
    weights = known * cell_widths(energies, lo, hi)
    if not ((weights * values).any() and (weights * wanted).any()):
        return math.nan
    return float(np.average(energies, weights=weights * values) - np.average(energies, weights=weights * wanted))


def as_compared(dos: TargetDOS, target: TargetDOS) -> tuple[TargetDOS, TargetDOS]:
    """The two DOS as distances compare them: the highest occupied level of each at zero, on one grid, equally broad.

    Raises
    ------
    ValueError
        If one is a site's and the other a total.
    """
    if dos.kind != target.kind:
        raise ValueError(f"a {dos.kind} DOS cannot be compared with a {target.kind} DOS: give two of one kind")
    dos, target = pair_on_common_zero(dos, target)
    sigma = max(MODEL_SIGMA, dos.sigma or 0.0, target.sigma or 0.0)
    return dos.on_grid(MODEL_GRID, sigma), target.on_grid(MODEL_GRID, sigma)


def _on_common_grid(dos: TargetDOS, target: TargetDOS, window: tuple[float, float] | None) -> tuple[Array, Array, Mask]:
    """Values of both on `MODEL_GRID`, and where these are to be compared."""
    first, second = as_compared(dos, target)
    known = first.known & second.known
    if window is not None:
        known = known & inside_window(MODEL_GRID.energies, window)
    if not known.any():
        raise ValueError("no energy is known in both DOS within the window: widen the window or the known ranges")
    return first.values, second.values, known
