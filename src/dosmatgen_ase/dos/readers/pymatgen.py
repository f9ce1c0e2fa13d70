"""A pymatgen ``Dos``, ``CompleteDos`` or ``LobsterCompleteDos``, or the dict of one.

A dict is read by hand: what it says in ``@module`` is never imported, so that a file from elsewhere runs no code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dosmatgen_ase.dos.grid import Array
from dosmatgen_ase.dos.readers.common import naming
from dosmatgen_ase.dos.readers.densities import Densities, real_rows
from dosmatgen_ase.dos.target import TargetDOS

_MODULE = "pymatgen.electronic_structure.dos"
_CLASSES = ("Dos", "CompleteDos", "LobsterCompleteDos", "FermiDos")


def read_pymatgen(dos: Any, site: int | None, sigma: float | None = None) -> TargetDOS:
    """What `TargetDOS.from_pymatgen` does; `sigma` (eV) is the broadening where it is known."""
    if isinstance(dos, Mapping):
        return of_dict(dos).target(site, sigma)
    from pymatgen.electronic_structure.dos import Dos

    if not isinstance(dos, Dos):
        raise TypeError(f"from_pymatgen reads a pymatgen Dos, CompleteDos or its dict, not {type(dos).__name__}")
    source = f"pymatgen {type(dos).__name__}"
    with naming(f"this {source} is incomplete"):
        densities = _of_object(dos, source)
    return densities.target(site, sigma)


def _of_object(dos: Any, source: str) -> Densities:
    # A CompleteDos "normalised" by the volume is in states/eV/A^3.
    volume = dos.norm_vol or 1.0
    by_spin = {int(spin): np.asarray(values) * volume for spin, values in dos.densities.items()}
    sites, symbols = None, list[str]()
    if getattr(dos, "pdos", None):
        projected = [dos.pdos[site] for site in dos.structure]
        spins = [{int(s): values for s, values in o.items()} for orbitals in projected for o in orbitals.values()]
        _check_spins(spins, set(by_spin))
        sites = np.array([sum(np.asarray(v) for o in orbitals.values() for v in o.values()) for orbitals in projected])
        symbols = [site.species_string for site in dos.structure]
    energies = real_rows(dos.energies, "energies")
    return Densities(source, energies, _spins(by_spin), float(dos.efermi), sites=sites, symbols=symbols)


def is_dict_of_dos(data: Any) -> bool:
    """Whether a decoded JSON object looks like the dict of a pymatgen DOS."""
    if not isinstance(data, Mapping):
        return False
    return "densities" in data or (data.get("@module") == _MODULE and data.get("@class") in _CLASSES)


def of_dict(data: Mapping[str, Any]) -> Densities:
    """What the dict of a pymatgen DOS holds.

    Raises
    ------
    ValueError
        If a part is missing or wrong; the message says which.
    """
    if "frequencies" in data:
        raise ValueError("this dict is a phonon DOS, not an electronic one")
    if lacking := [key for key in ("efermi", "energies", "densities") if key not in data]:
        raise ValueError(f"this dict is not a pymatgen Dos: it lacks {', '.join(lacking)}")
    fermi, name = data["efermi"], str(data.get("@class", "Dos"))
    if isinstance(fermi, bool) or not isinstance(fermi, (int, float)):
        raise ValueError(f'"efermi" is {_short(fermi)}, so the zero of energy is not known: put the Fermi level there')
    if name not in _CLASSES:
        raise ValueError(f'"@class" is {_short(name)}: an electronic DOS of pymatgen is {", ".join(_CLASSES)}')
    energies = _row(data["energies"], '"energies"')
    by_spin = _by_spin(data["densities"], '"densities"')
    total = _spins(by_spin)
    sites, symbols = None, list[str]()
    if data.get("pdos"):
        symbols = _symbols(data.get("structure"))
        sites = _sites(data["pdos"], len(symbols), set(by_spin), energies.size)
    return Densities(f"pymatgen {name}", energies, total, float(fermi), sites=sites, symbols=symbols)


def _sites(projections: Any, count: int, spins: set[int], size: int) -> Array:
    """Projections (sites, G) of a list with one dict of orbitals for each site."""
    if not isinstance(projections, Sequence) or isinstance(projections, str):
        raise ValueError('"pdos" must be a list with one entry for each site')
    if len(projections) != count:
        raise ValueError(f'"pdos" has {len(projections)} entries, and the structure {count} sites')
    sites = np.zeros((count, size))
    for number, orbitals in enumerate(projections):
        if not isinstance(orbitals, Mapping) or not orbitals:
            raise ValueError(f'"pdos" of site {number} is missing: it is {_short(orbitals)}')
        for orbital, dos in orbitals.items():
            what = f'"pdos" of site {number}, orbital {_short(orbital)}'
            by_spin = _by_spin(dos.get("densities") if isinstance(dos, Mapping) else None, what)
            _check_spins([by_spin], spins)
            for row in by_spin.values():
                if row.size != size:
                    raise ValueError(f"{what} has {row.size} values and the DOS {size} energies")
                sites[number] += row
    return sites


def _by_spin(densities: Any, what: str) -> dict[int, Array]:
    if not isinstance(densities, Mapping) or not densities:
        raise ValueError(f'{what} must be a dict of spins, {{"1": [...], "-1": [...]}}, not {_short(densities)}')
    if unknown := [key for key in densities if str(key) not in ("1", "-1")]:
        raise ValueError(f'{what} has a spin {_short(unknown[0])}: spins are "1" and "-1"')
    return {int(key): _row(row, f"{what}, spin {key}") for key, row in densities.items()}


def _check_spins(found: Sequence[Mapping[int, Any]], spins: set[int]) -> None:
    if any(set(by_spin) != spins for by_spin in found):
        raise ValueError("the projections have other spins than the total DOS")


def _spins(by_spin: Mapping[int, Any]) -> Array:
    """(spins, G), spin up first."""
    if 1 not in by_spin:
        raise ValueError("only spin -1 is there: add spin 1, or call it 1 if it holds both spins")
    rows = [real_rows(by_spin[spin], f"densities of spin {spin}") for spin in (1, -1) if spin in by_spin]
    if len({row.shape for row in rows}) > 1:
        raise ValueError(f"the two spins have {' and '.join(str(row.size) for row in rows)} values, not as many")
    return np.array(rows)


def _row(data: Any, name: str) -> Array:
    """One row of numbers; monty writes a numpy array as a dict with "data"."""
    if isinstance(data, Mapping) and data.get("@class") == "array":
        data = data.get("data")
    array = real_rows(data, name)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one row of numbers, not of shape {array.shape}")
    return array


def _symbols(structure: Any) -> list[str]:
    """Element of each site of the dict of a structure."""
    sites = structure.get("sites") if isinstance(structure, Mapping) else None
    if not isinstance(sites, Sequence) or isinstance(sites, str) or not sites:
        raise ValueError('"structure" must be the dict of a Structure with its "sites", as "pdos" needs it')
    labels = []
    for site in sites:
        species = site.get("species") if isinstance(site, Mapping) else None
        first = species[0] if isinstance(species, Sequence) and species else None
        labels.append(str(first.get("element", "?"))[:3] if isinstance(first, Mapping) else "?")
    return labels


def _short(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 40 else f"{text[:37]}..."
