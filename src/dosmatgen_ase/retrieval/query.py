"""`search`: the known crystals whose sites have a DOS.

The distance is that of the package, the normalised L1 over the bins known in both. With several targets every crystal
gets the assignment of targets to its sites that costs least (Kuhn's Hungarian method as in
``scipy.optimize.linear_sum_assignment``). Lower bounds, from sums over groups of bins and from each target on its best
site, spare most crystals the work.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from scipy.optimize import linear_sum_assignment

from dosmatgen_ase.dos import MIN_SHARED, MODEL_GRID, MODEL_SIGMA, Mask, TargetDOS, on_common_zero, resample
from dosmatgen_ase.parsing import (
    DOSInput,
    ElementLike,
    element_list,
    formula_counts,
    is_real,
    is_whole,
    split_targets,
    whole_number,
)
from dosmatgen_ase.retrieval.index import BLOCK, GROUP, DOSIndex, default_index, of_formula

MAX_CELLS = 20  # atoms in the cells of a small crystal that stand for a larger one of the target
_IN_CACHE = 512  # rows at a time
_CHUNK = 128  # crystals between two looks at the bound
_FORBIDDEN = 1e9  # cost of a site that cannot be compared; a sum that holds one is no assignment


class _Hit(NamedTuple):
    """A crystal and what it has for the targets; of two, the lesser is the nearer one, else that which comes first."""

    distance: float
    crystal: int
    sites: tuple[int, ...]  # of the crystal, one per target; none for a total
    cells: int = 1


def search(
    dos: DOSInput,
    n: int = 10,
    *,
    sites: Iterable[int] | None = None,
    elements: Iterable[ElementLike] | None = None,
    exclude_elements: Iterable[ElementLike] | None = None,
    composition: str | Mapping[Any, float] | None = None,
    num_atoms: int | Iterable[int] | None = None,
    max_above_hull: float | None = None,
    gap: tuple[float, float] | None = None,
    index: DOSIndex | None = None,
) -> list[Atoms]:
    """Find the known crystals whose DOS is nearest to a target.

    Parameters
    ----------
    dos : TargetDOS, sequence of TargetDOS or mapping {site: TargetDOS}
        One site target may be any site of a crystal. Several are assigned to different sites, in the way that costs
        least; a crystal whose cell has a whole number of times fewer sites is taken as a supercell. A total is compared
        with the sum over the sites, of as many cells as have most nearly as many states.
    n : int
        Most crystals to return.
    sites : sequence of int, optional
        As in ``DOSGenerator.generate``: one target on so many sites. Known crystals have an order of sites of their
        own, so that only their number counts.
    elements, exclude_elements : sequence of str, optional
        Crystals made of these elements only; crystals that hold none of these.
    composition : str or mapping, optional
        Crystals of this reduced formula.
    num_atoms : int or sequence of int, optional
        Atoms of the crystal's (primitive) cell.
    max_above_hull : float, optional
        Most energy above the hull, eV/atom. Crystals of which it is not known are left out.
    gap : (low, high), optional
        Band gap, eV, computed where the DOS is, else as given with the crystals. Crystals of which it is not known are
        left out.
    index : DOSIndex, optional
        Where to search; by default the index that ships.

    Returns
    -------
    list of ase.Atoms
        Nearest first, at most `n`. ``info["search"]`` tells ``material_id``; ``sites``, the site for each target in
        their order (none for a total); ``distance``, the normalised L1 over the bins known in both, mean over the
        targets (for a target without states the mean absolute difference, states/eV); ``source``, "computed" or
        "predicted"; ``expected_error``, the normalised L1 to be expected of what was predicted of it (0 where all that
        is compared was computed, None where it is not known); ``cells``, how many of its cells the targets fill;
        ``reference``, its zero of energy; ``band_gap`` (eV) and ``energy_above_hull`` (eV/atom), None where unknown.

    Raises
    ------
    TypeError, ValueError
        If there is no target, an argument is not understood, targets of several sites have different zeros, or no
        crystal knows 90 % of the bins and states of a target.
    FileNotFoundError
        If there is no index.

    Notes
    -----
    Energies count from each DOS's own zero: the Fermi level of a metal, the valence-band maximum of a gapped solid. A
    total of reference "fermi" that has a gap at zero is moved to its valence-band maximum, as in
    ``DOSGenerator.generate``.
    Sites that know less than 90 % of a target's bins or states are not considered: they would be near for what is not
    known of them.

    Examples
    --------
    >>> from dosmatgen_ase import TargetDOS, search
    >>> hits = search(TargetDOS.from_peaks([(-0.65, 6.0, 0.3)], window=(-3, 1)), n=3)  # doctest: +SKIP
    """
    total, by_site = split_targets(dos, sites)
    if total is None and not by_site:
        raise ValueError("a search needs a target DOS: give a TargetDOS, a list of them or a mapping {site: TargetDOS}")
    n = whole_number(n, "n", 1)
    given = on_common_zero(by_site if total is None else {0: total}).values()
    # At the model's broadening, or at its own where that is broader.
    targets = [target.on_grid(MODEL_GRID, max(MODEL_SIGMA, target.sigma or 0.0)) for target in given]
    index = default_index() if index is None else index
    kept = _filtered(index, elements, exclude_elements, composition, num_atoms, max_above_hull, gap)
    if not kept.any():
        return []
    hits = _nearest_sites(index, targets, kept, n) if total is None else _nearest_totals(index, targets[0], kept, n)
    return [_described(index, hit, targets) for hit in hits]


# -- which crystals ----------------------------------------------------------------------------------------------------


def _filtered(
    index: DOSIndex,
    elements: Any,
    exclude_elements: Any,
    composition: Any,
    num_atoms: Any,
    max_above_hull: float | None,
    gap: tuple[float, float] | None,
) -> Mask:
    """Crystals that may be returned, shape (n,)."""
    kept = np.ones(len(index), dtype=bool)
    allowed, forbidden = element_list(elements, "elements"), element_list(exclude_elements, "exclude_elements")
    if allowed is not None:
        kept &= ~np.delete(index.counts, [atomic_numbers[symbol] for symbol in allowed], axis=1).any(axis=1)
    if forbidden:
        kept &= ~index.counts[:, [atomic_numbers[symbol] for symbol in forbidden]].any(axis=1)
    if (formula := formula_counts(composition)) is not None:
        wanted = np.zeros(index.counts.shape[1], dtype=np.int64)
        wanted[[atomic_numbers[symbol] for symbol in formula]] = list(formula.values())
        kept &= of_formula(index, wanted)
    if num_atoms is not None:
        kept &= np.isin(index.num_atoms, _sizes(num_atoms))
    if max_above_hull is not None:
        if not is_real(max_above_hull) or math.isnan(max_above_hull):
            raise ValueError(f"max_above_hull={max_above_hull!r} must be a number in eV/atom")
        kept &= _known(index.energy_above_hull, "max_above_hull", "energies above the hull") <= max_above_hull
    if gap is not None:
        ends = list(gap) if isinstance(gap, Iterable) and not isinstance(gap, str) else []
        if len(ends) != 2 or not all(map(is_real, ends)) or not ends[0] <= ends[1]:
            raise ValueError(f"gap={gap!r} must be two numbers in eV, the lower first, such as (0.5, 2.0)")
        gaps = _known(index.band_gap, "gap", "band gaps")
        kept &= (gaps >= ends[0]) & (gaps <= ends[1])
    return kept


def _sizes(num_atoms: Any) -> list[int]:
    """Atoms per cell, one number or several; those of an index may be larger than what the generator makes."""
    sizes = list(num_atoms) if isinstance(num_atoms, Iterable) and not isinstance(num_atoms, str) else [num_atoms]
    if not sizes or not all(is_whole(size) and size > 0 for size in sizes):
        raise ValueError(f"num_atoms={num_atoms!r} must be a whole number above 0, or a list of them")
    return sizes


def _known(values: np.ndarray, name: str, what: str) -> np.ndarray:
    """The values, with which nan compares as false; ValueError if none is known."""
    if np.isnan(values).all():
        raise ValueError(f"this index has no {what}: leave {name} out, or build an index from crystals that have them")
    return values


# -- distances ---------------------------------------------------------------------------------------------------------


def _nearest_sites(index: DOSIndex, targets: Sequence[TargetDOS], kept: Mask, n: int) -> list[_Hit]:
    """The `n` crystals of least mean distance over the targets, each on a site of its own.

    Crystals come in the order of a lower bound, until the bound of the next ones is above the worst of the best.
    """
    size = len(targets)
    cells = np.where(index.num_atoms < size, size // index.num_atoms, 1)
    kept = kept & (cells * index.num_atoms >= size) & ((cells == 1) | (cells * index.num_atoms == size))
    if not kept.any():
        return []
    different = list(dict.fromkeys(targets))  # one curve for targets that are equal
    which = np.array([different.index(target) for target in targets])
    bounds, curves = zip(*(_bounded(index, target, kept) for target in different), strict=True)
    bound = _on_best_site(index, np.stack(bounds), which)
    order = np.flatnonzero(np.isfinite(bound) & kept)
    order = order[np.argsort(bound[order], kind="stable")]
    best: list[_Hit] = []  # so far
    for start in range(0, len(order), _CHUNK):
        some = order[start : start + _CHUNK]
        if len(best) == n and bound[some[0]] >= best[-1].distance:
            break
        rows = np.concatenate([np.arange(*index.row_start[i : i + 2]) for i in np.sort(some).tolist()])
        distance = np.full((len(curves), len(index.values)), np.inf, dtype=np.float32)
        distance[:, rows] = [distances(rows) for distances in curves]
        closer = _on_best_site(index, distance, which)
        for i in some[np.argsort(closer[some], kind="stable")].tolist():
            if not np.isfinite(closer[i]) or (len(best) == n and closer[i] >= best[-1].distance):
                break
            if (hit := _assigned(index, i, int(cells[i]), distance[which])) is not None:
                insort(best, hit)
                del best[n:]
    return best


def _on_best_site(index: DOSIndex, distance: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Mean over the targets of the distance (d, r) on the best site of each crystal, shape (n,): a lower bound."""
    return np.minimum.reduceat(distance, index.row_start[:-1], axis=1)[which].mean(axis=0)


def _assigned(index: DOSIndex, crystal: int, cells: int, distance: np.ndarray) -> _Hit | None:
    """The cheapest assignment of the targets to the sites of a crystal, by distances (t, r); None if there is none."""
    rows = np.tile(index.site_row[slice(*index.site_start[crystal : crystal + 2])], cells)
    cost = np.where(np.isfinite(distance[:, rows]), distance[:, rows], _FORBIDDEN)
    chosen = linear_sum_assignment(cost)[1]
    mean = float(cost[np.arange(len(cost)), chosen].mean())
    if mean >= _FORBIDDEN / len(cost):
        return None
    return _Hit(mean, crystal, tuple((chosen % index.num_atoms[crystal]).tolist()), cells)


def _bounded(index: DOSIndex, target: TargetDOS, kept: Mask) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """A target against the rows of the crystals kept: a lower bound (r,) of every distance, and what gives distances.

    The bound is infinite where a row cannot be compared. Distances (k,) are of rows (k,), rising.
    ``sum |v - g*|`` over the bins of a group is at least ``|sum v - sum g*|``, which takes a quarter of the work.
    """
    rows = np.flatnonzero(np.repeat(kept, np.diff(index.row_start)))
    bound = np.full(len(index.values), np.inf, dtype=np.float32)
    if target.sigma == MODEL_SIGMA:
        fine = _Metric(target, index.masks)
        bound[rows] = _Metric(target, index.masks, GROUP).distances(index.grouped, rows, index.row_mask[rows])
        _require_comparable(bound[rows], target)
        return bound, lambda some: fine.distances(index.values, some, index.row_mask[some])
    for part in np.split(rows, range(BLOCK, len(rows), BLOCK)):  # rows must be broadened first, all of them
        values, known = _broadened(index.values[part], index.masks[index.row_mask[part]], target)
        whole = np.arange(len(part))
        bound[part] = _Metric(target, known).distances(values, whole, whole)
    _require_comparable(bound[rows], target)
    return bound, lambda some: bound[some]


def _nearest_totals(index: DOSIndex, target: TargetDOS, kept: Mask, n: int) -> list[_Hit]:
    """The `n` crystals whose sites add up to the total, in as many cells as have most nearly as many states."""
    values, known = index.totals
    rows = np.flatnonzero(kept)
    values, known = values[rows], known[rows]
    if target.sigma != MODEL_SIGMA:
        values, known = _broadened(values, known, target)
    states = values[:, target.known].sum(axis=1)
    ratio = known.astype(np.float32) @ target.values.astype(np.float32) / np.where(states > 0, states, np.inf)
    most = np.maximum(1, MAX_CELLS // index.num_atoms[rows])
    cells = np.clip(np.rint(ratio), 1, most).astype(np.int64)
    whole = np.arange(len(rows))
    found = _Metric(target, known).distances(values * cells[:, None].astype(np.float32), whole, whole)
    _require_comparable(found, target)
    order = np.argsort(found, kind="stable")[:n]
    order = order[np.isfinite(found[order])]
    return [_Hit(float(found[k]), int(rows[k]), (), int(cells[k])) for k in order.tolist()]


def _broadened(values: np.ndarray, known: Mask, target: TargetDOS) -> tuple[np.ndarray, Mask]:
    """Rows at the broadening of a target that is broader than they are."""
    sigma = target.sigma or MODEL_SIGMA
    wider, inside = resample(MODEL_GRID.energies, values, known, MODEL_SIGMA, MODEL_GRID, sigma)
    return wider.astype(np.float32), inside


class _Metric:
    """The normalised L1 of rows to a target on the same grid, or its lower bound from sums over groups of bins.

    Values are zero at unknown bins, where ``|0 - g*|`` is the target itself: what those bins add to the sum over all
    of them is subtracted, which is cheaper than a mask for every row.
    """

    def __init__(self, target: TargetDOS, masks: Mask, group: int = 1) -> None:
        """Prepare for rows of these masks (m, 151); with `group` > 1 for sums over so many bins."""
        values = target.values.astype(np.float32)
        inside = (masks & target.known).astype(np.float32)
        shared, states, whole = inside.sum(axis=1), inside @ values, values.sum()
        usable = (shared >= max(1.0, MIN_SHARED * target.known.sum())) & (states >= MIN_SHARED * whole * (1 - 1e-6))
        scale = states if whole > 0 else shared  # without states: the mean absolute difference
        starts = np.arange(0, len(values), group)
        full = np.logical_and.reduceat(target.known, starts)  # groups of which a part is not asked for tell nothing
        bins = np.repeat(full, group)[: len(values)]
        columns = np.flatnonzero(full)
        together = len(columns) > 0 and columns[-1] - columns[0] + 1 == len(columns)
        # The target's known bins or groups (b,), and their columns.
        self.wanted = np.add.reduceat(values, starts)[full]
        self.span: Any = slice(columns[0], columns[-1] + 1) if together else columns
        # Of each mask (m,): states x bin that a row does not know; and what the sum is divided by, 0 if not comparable.
        self.absent = (~masks[:, bins]).astype(np.float32) @ values[bins]
        self.scale = np.where(usable, scale, 0)

    def distances(self, values: np.ndarray, rows: np.ndarray, pattern: np.ndarray) -> np.ndarray:
        """Distances (k,) of rows (k,), rising, of values (r, 151 or groups); `pattern` (k,) is the mask of each."""
        ones = np.ones(len(self.wanted), dtype=np.float32)
        total = np.empty(len(rows), dtype=np.float32)
        for start in range(0, len(rows), _IN_CACHE):
            part = rows[start : start + _IN_CACHE]
            whole = part[-1] - part[0] + 1 == len(part)  # without a filter, no copy is needed
            block = values[part[0] : part[-1] + 1, self.span] if whole else values[part][:, self.span]
            error = np.subtract(block, self.wanted)
            np.abs(error, out=error)
            total[start : start + _IN_CACHE] = error @ ones
        scale = self.scale[pattern]
        distance = np.maximum(total - self.absent[pattern], 0) / np.where(scale > 0, scale, 1)
        return np.where(scale > 0, distance, np.inf).astype(np.float32)


def _require_comparable(distance: np.ndarray, target: TargetDOS) -> None:
    if not np.isfinite(distance).any():
        share = f"{MIN_SHARED:.0%} of the bins and states of {target.in_words()}"
        raise ValueError(f"no crystal searched knows {share}: widen the window, or ask for other elements")


# -- what is told ------------------------------------------------------------------------------------------------------


def _described(index: DOSIndex, hit: _Hit, targets: Sequence[TargetDOS]) -> Atoms:
    """The crystal with ``info["search"]``."""
    i = hit.crystal
    atoms = index.atoms(i)
    rows = index.site_row[slice(*index.site_start[i : i + 2])]
    parts = [rows[[site]] for site in hit.sites] or [rows]  # a total rests on all sites
    errors = [_expected_error(index, i, target, part) for target, part in zip(targets, parts, strict=True)]
    error = float(np.mean(errors))
    facts = {"band_gap": float(index.band_gap[i]), "energy_above_hull": float(index.energy_above_hull[i])}
    atoms.info["search"] = {
        "material_id": str(index.material_id[i]),
        "sites": list(hit.sites),
        "distance": hit.distance,
        "source": "computed" if index.computed[i] else "predicted",
        "expected_error": None if math.isnan(error) else error,
        "cells": hit.cells,
        "reference": "vbm" if index.gapped[i] else "fermi",
        **{name: None if math.isnan(value) else value for name, value in facts.items()},
    }
    return atoms


def _expected_error(index: DOSIndex, crystal: int, target: TargetDOS, rows: np.ndarray) -> float:
    """Error to be expected of what was predicted, times the share of the target's states that it is compared with."""
    computed = index.masks[index.computed_mask[crystal]]
    weight = target.values if target.values.any() else target.known.astype(float)
    share = float(np.average(~computed, weights=weight))
    return share * float(np.mean(index.error[rows])) if share else 0.0
