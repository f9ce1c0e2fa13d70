"""ASE's ``DOSData``, ``DOSCollection`` and ``ase.dft.dos.DOS``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dosmatgen_ase.dos.broadening import scale_sites_to_total
from dosmatgen_ase.dos.grid import MODEL_SIGMA, Array, Mask
from dosmatgen_ase.dos.readers.common import clip_negative_lobes, record
from dosmatgen_ase.dos.target import TargetDOS

_MAX_ENERGIES = 1_000_000
# Label of a row that holds a total, or one spin of it.
_TOTAL = re.compile(
    r"(?P<name>t(?:ot(?:al)?)?[\s_-]*dos|tot(?:al)?|sum)(?P<spin>[\s_,(-]*(?:spin)?[\s_-]*(?:up|down|dn|dw)\)?)?",
    re.IGNORECASE,
)


def read_ase(
    dos: Any, site: int | None, *, sigma: float | None, efermi: float, reference: str, kind: str | None
) -> TargetDOS:
    """What `TargetDOS.from_ase` does."""
    from ase.dft.dos import DOS
    from ase.spectrum.doscollection import DOSCollection
    from ase.spectrum.dosdata import DOSData

    name, steps = f"ASE {type(dos).__name__}", list[str]()
    if isinstance(dos, DOS):
        if site is not None or sigma is not None:
            raise ValueError("ase.dft.dos.DOS is a total DOS and knows its width: leave out site and sigma")
        energies, values, sigma = np.asarray(dos.get_energies()), np.asarray(dos.get_dos()), dos.width / math.sqrt(2)
        known = energies <= dos.e_skn.max(axis=-1).min()  # above the lowest maximum of the top band, bands are missing
        name, read_kind = "ase.dft.dos.DOS", "total"
    elif isinstance(dos, DOSData):
        if site is not None:
            raise ValueError("a single DOSData holds one DOS: leave out site")
        energies, (values,), sigma = _ase_table([dos], sigma)
        known = np.ones(energies.shape, dtype=bool)
        read_kind = "total" if _totals([dos], [0]) and "index" not in dos.info else "site"
    elif isinstance(dos, DOSCollection):
        rows = list(dos)
        energies, table, sigma = _ase_table(rows, sigma)
        values, known, steps = _ase_select(rows, table, energies, site)
        read_kind = "total" if site is None else "site"
    else:
        raise TypeError(f"from_ase reads ASE DOSData, DOSCollection or DOS objects, not {type(dos).__name__}")
    values, note = clip_negative_lobes(values)
    told = record(name, steps + note)
    return TargetDOS(energies - efermi, values, known, reference, sigma, kind or read_kind, told)


def _ase_table(rows: list[Any], sigma: float | None) -> tuple[Array, Array, float | None]:
    """Energies (G,), values (rows, G) and broadening of ASE's rows; raw rows are broadened onto a common grid."""
    from ase.spectrum.dosdata import GridDOSData

    if not rows:
        raise ValueError("this DOSCollection is empty: give one with at least one row")
    gridded = [isinstance(row, GridDOSData) for row in rows]
    if all(gridded):
        energies = rows[0].get_energies()
        if any(not np.array_equal(row.get_energies(), energies) for row in rows):
            raise ValueError("the rows of this DOSCollection have different energies: sample them on one grid")
        return energies, np.array([row.get_weights() for row in rows]), sigma
    if any(gridded):
        raise ValueError("this DOSCollection mixes raw and grid data: sample the raw ones first (sample_grid)")
    sigma = MODEL_SIGMA if sigma is None else sigma
    states = np.concatenate([row.get_energies() for row in rows])
    if not states.size or not sigma > 0:
        raise ValueError("raw DOS data need at least one state and sigma > 0 (eV)")
    if not np.isfinite(states).all():
        raise ValueError("the states of these raw DOS data must have finite energies")
    # Known up to the highest state: bands above it may be missing. Below the lowest there is nothing to miss.
    lo, hi = states.min() - 5 * sigma, states.max()
    size = math.ceil((hi - lo) / (sigma / 4)) + 1
    if size > _MAX_ENERGIES:
        raise ValueError(
            f"states over {hi - lo:.3g} eV at sigma {sigma:g} eV need {size:.3g} energies: take a larger sigma"
        )
    table = [row.sample_grid(size, xmin=lo, xmax=hi, width=sigma).get_weights() for row in rows]
    return np.linspace(lo, hi, size), np.array(table), sigma


def _totals(rows: list[Any], chosen: Sequence[int]) -> list[int]:
    """Those of the chosen rows that add up to their total, by their labels; empty if none is labelled so.

    Of several totals one counts: a sum of projections only for want of another, spins only if no row holds both.
    """
    ranks: dict[int, tuple[bool, bool, str]] = {}
    for i in chosen:
        if found := _TOTAL.fullmatch(str(rows[i].info.get("label", "")).strip()):
            name = found["name"].lower()
            ranks[i] = (name == "sum", bool(found["spin"]) or "spin" in rows[i].info, name)
    return [i for i, rank in ranks.items() if rank == min(ranks.values())]


def _ase_select(rows: list[Any], table: Array, energies: Array, site: int | None) -> tuple[Array, Mask, list[str]]:
    """Values, known mask and provenance of one site (or of the total) of a collection."""
    known = np.ones(energies.shape, dtype=bool)
    owners: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        owners.setdefault(f"site {row.info['index']}" if "index" in row.info else "", []).append(i)
    of_cell = owners.pop("", [])
    totals = _totals(rows, of_cell)
    # A row that is labelled as the total of a site holds its orbitals.
    parts = [i for group in owners.values() for i in _totals(rows, group) or group]
    parts = sorted([*parts, *(i for i in of_cell if not _totals(rows, [i]))])
    indexed = all("index" in rows[i].info for i in parts)
    groups: dict[str, list[int]] = {}
    for number, i in enumerate(parts):
        groups.setdefault(str(rows[i].info["index"]) if indexed else str(number), []).append(i)
    sites = np.array([table[group].sum(axis=0) for group in groups.values()])
    if site is None:
        return (table[totals] if totals else sites).sum(axis=0), known, []
    if str(site) not in groups:
        raise ValueError(f"site {site} does not exist: this DOSCollection has {', '.join(groups)}")
    chosen = list(groups).index(str(site))
    if not totals:
        return sites[chosen], known, [f"site {site}: raw projection, no total DOS to scale by"]
    scaled, known = scale_sites_to_total(sites, table[totals].sum(axis=0), energies=energies, min_coverage=0.0)
    return scaled[chosen], known, [f"site {site}, sites scaled to add up to the total"]
