"""A pymatgen ``Dos`` or ``CompleteDos``, or the dict of one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dosmatgen_ase.dos.broadening import scale_sites_to_total
from dosmatgen_ase.dos.grid import GAP_DOS, MIN_GAP
from dosmatgen_ase.dos.readers.common import check_site, clip_negative_lobes
from dosmatgen_ase.dos.target import TargetDOS


def read_pymatgen(dos: Any, site: int | None) -> TargetDOS:
    """What `TargetDOS.from_pymatgen` does."""
    from pymatgen.electronic_structure.dos import CompleteDos, Dos

    if isinstance(dos, Mapping):
        if not {"efermi", "energies", "densities"} <= set(dos):
            raise ValueError('this dict is not a pymatgen Dos: it needs "efermi", "energies" and "densities"')
        try:
            dos = (CompleteDos if dos.get("pdos") else Dos).from_dict(dict(dos))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            told = f"{type(error).__name__}: {error}"
            raise ValueError(f"this dict is not a pymatgen Dos that pymatgen reads: {told}") from None
    if not isinstance(dos, Dos):
        raise TypeError(f"from_pymatgen reads a pymatgen Dos, CompleteDos or its dict, not {type(dos).__name__}")
    energies, occupied = np.asarray(dos.energies), np.asarray(dos.energies) <= dos.efermi
    states = np.asarray(dos.get_densities()) * (dos.norm_vol or 1.0) >= GAP_DOS
    below, above = np.flatnonzero(states & occupied), np.flatnonzero(states & ~occupied)
    # Neighbouring energies that both hold states are no gap, however coarse the grid is.
    vbm = None
    if below.size and above.size and above[0] > below[-1] + 1:
        vbm = energies[below[-1]] if energies[above[0]] - energies[below[-1]] >= MIN_GAP else None
    return from_densities(dos, site, vbm, math.inf, None, f"pymatgen {type(dos).__name__}")


def from_densities(
    dos: Any, site: int | None, vbm: float | None, top: float, sigma: float | None, source: str
) -> TargetDOS:
    """`vbm` is None for a metal; `vbm` and `top`, above which bands are missing, are on the energy scale of `dos`."""
    energies = np.asarray(dos.energies, dtype=float)
    # A CompleteDos "normalised" by the volume is in states/eV/A^3.
    total, steps = clip_negative_lobes(np.asarray(dos.get_densities()) * (dos.norm_vol or 1.0))
    if not (total >= GAP_DOS).any():
        raise ValueError(f"the DOS of {source} is zero everywhere")
    top = min(top, energies[total >= GAP_DOS][-1])
    values, kind = total, "total"
    known = energies <= top
    if site is not None:
        if not getattr(dos, "pdos", None):
            raise ValueError(f"{source} holds no site projections: leave out site, or run VASP with LORBIT = 11")
        sites = dos.structure.sites
        check_site(site, len(sites))
        projections = np.array([clip_negative_lobes(dos.get_site_dos(s).get_densities())[0] for s in sites])
        scaled, known = scale_sites_to_total(projections, total, energies=energies, e_max=top, min_coverage=0.0)
        values, kind = scaled[site], "site"
        steps = [*steps, f"site {site} of {dos.structure.formula}, sites scaled to add up to the total"]
    known[0] &= total[0] < GAP_DOS
    zero, reference = (dos.efermi, "fermi") if vbm is None else (vbm, "vbm")
    record = {"source": source, "steps": [*steps, f"zero of energy at {zero:.4f} eV ({reference})"]}
    return TargetDOS(energies - zero, values, known, reference, sigma, kind, record)
