"""What a DFT calculation of one structure yields, as it is kept in a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from dosmatgen_ase.data.bands import MeshBands
from dosmatgen_ase.dos import Array, TargetDOS


@dataclass(frozen=True, eq=False, repr=False)
class ElectronicStructure:
    """Site-projected DOS of one structure.

    Attributes
    ----------
    sites : tuple of TargetDOS
        One per atom, scaled at every energy so that they add up to the total; known where the projections cover it.
    total : TargetDOS
        DOS of the cell, known below `e_max`.
    orbital_dos : array, shape (sites, 4, G)
        The projections as they are, by l = s, p, d, f, states/eV.
    energies : array, shape (G,)
        eV from the Fermi level of a metal or the valence-band maximum of a gapped solid.
    band_gap : float
        eV; 0 for a metal.
    fermi_level : float
        The zero of `energies` on the scale of the calculation, eV.
    e_max : float
        Energy (eV) above which bands are missing.
    energy : float
        Total energy of the cell with these pseudopotentials, eV.
    num_electrons : float
        Valence electrons of the cell.
    magnetic_moment : float
        Of the cell, mu_B.
    num_kpoints : int
        Irreducible points that the DOS was computed on.
    spin_polarised : bool
    bands : MeshBands, optional
        Eigenvalues on those points; None in results made before recipe 5.
    """

    sites: tuple[TargetDOS, ...]
    total: TargetDOS
    orbital_dos: Array
    energies: Array
    band_gap: float
    fermi_level: float
    e_max: float
    energy: float
    num_electrons: float
    magnetic_moment: float
    num_kpoints: int
    spin_polarised: bool
    bands: MeshBands | None = None

    def __repr__(self) -> str:
        kind = f"gap {self.band_gap:.2f} eV" if self.band_gap else "metal"
        return f"ElectronicStructure({len(self.sites)} sites, {self.num_electrons:g} electrons, {kind})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict; `from_dict` is its inverse."""
        return {
            "format": "dosmatgen_ase.ElectronicStructure",
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "sites": [site.to_dict() for site in self.sites],
            "total": self.total.to_dict(),
            "orbital_dos": self.orbital_dos.tolist(),
            "energies": self.energies.tolist(),
            "bands": None if self.bands is None else self.bands.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ElectronicStructure:
        """Inverse of `to_dict`.

        Raises
        ------
        ValueError
            If a field is missing.
        """
        names = {field.name for field in fields(cls)} - {"bands"}
        if missing := names - set(data):
            raise ValueError(f"this dict is not an ElectronicStructure: it lacks {', '.join(sorted(missing))}")
        read = {name: np.asarray(data[name], dtype=float) for name in ("orbital_dos", "energies")}
        sites, total = tuple(map(TargetDOS.from_dict, data["sites"])), TargetDOS.from_dict(data["total"])
        bands = MeshBands.from_dict(data["bands"]) if data.get("bands") is not None else None
        given = {name: data[name] for name in names}
        return cls(**{**given, **read, "sites": sites, "total": total, "bands": bands})
