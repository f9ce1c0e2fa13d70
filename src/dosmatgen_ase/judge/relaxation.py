"""Relax generated structures, cell and positions, with any ASE calculator; the default (CHGNet) works offline.

Structures come from a sampler, so every failure is expected: it is told in ``atoms.info["relaxation"]``, never raised,
and one bad structure does not cost the others. Only a calculator that cannot be loaded at all is an error.
"""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixScaled, FixSymmetry
from ase.filters import FrechetCellFilter
from ase.neighborlist import neighbor_list
from ase.optimize import BFGS
from ase.spacegroup.symmetrize import refine_symmetry
from spglib import SpglibError
from tqdm import tqdm

from dosmatgen_ase.crystals.checks import beyond_bounds
from dosmatgen_ase.crystals.screening import right_handed, screen_given
from dosmatgen_ase.files import set_aside
from dosmatgen_ase.parsing import site_numbers
from dosmatgen_ase.threads import cpu_threads, legacy_stream, one_blas_thread, without_warnings

_MAX_SYMMETRY = 1000  # atoms; spglib takes their number squared, 10 s for 2000 without any symmetry
_OF_GEOMETRY = ("energy_above_hull", "scores")  # entries of ours in info that hold for the geometry given only
_MOVE_WITH_CELL = (FixScaled, FixSymmetry)  # every other constraint of ASE holds something Cartesian


def relax(
    atoms: Atoms | Sequence[Atoms],
    calculator: Any = "chgnet",
    *,
    fixed_cell: bool = False,
    fixed_sites: Sequence[int] = (),
    fmax: float = 0.05,
    max_steps: int = 200,
    time_limit: float = 120.0,
    processes: int = 1,
    progress: bool = False,
    trust_model: bool = False,
) -> Atoms | list[Atoms]:
    """Relax cell and positions, or the positions alone in a cell that stays.

    BFGS on ASE's ``FrechetCellFilter``, or on the atoms themselves where the cell stays; no symmetry is imposed.
    Structures are screened first (`screening.screen`), as machine-learned potentials hang or return low energies on
    collapsed cells, and after every step.

    Parameters
    ----------
    atoms : Atoms or sequence of Atoms
        Left as they are; copies are returned.
    calculator : ASE calculator, "chgnet", or the path or name of a MACE model
        One for all structures. A local MACE model file works offline; a MACE-MP name such as "medium-mpa-0" is
        downloaded at first use.
    fixed_cell : bool
        The cell stays exactly as it is. It also stays where the atoms carry a constraint that holds Cartesian
        positions, as ``FixAtoms`` does, which is any but ``FixScaled`` and ``FixSymmetry``. A left-handed cell comes
        back right-handed all the same, its vectors negated.
    fixed_sites : sequence of int
        Sites that stay exactly where they are in every structure, counted from 0, and the cell with them.
    fmax : float
        Largest force on an atom, eV/A. ASE's measure for the cell is the same number for the virial over the number of
        atoms.
    max_steps : int
    time_limit : float
        Seconds per structure, looked at between steps.
    processes : int
        Structures relaxed at a time, each in a process of its own with one thread. More than one needs a calculator
        given by name, and a script that calls this under ``if __name__ == "__main__":``.
    progress : bool
        Show a progress bar.
    trust_model : bool
        Load the file of a MACE model. It is a pickle, which may run any code: say so only if you trust its maker.

    Returns
    -------
    Atoms or list of Atoms, as given
        With energy, forces and stress attached, and ``info["relaxation"]``: ``converged`` (bool), ``steps`` (int),
        ``energy`` and ``energy_start`` (eV/atom, None if not reached), ``rmsd`` (how far the atoms moved within the
        cell, Angstrom; homogeneous strain does not count, nor does a common shift where no site is held), ``reason``
        (None if converged). A structure whose relaxation broke down keeps its starting geometry; one that ran out of
        steps or time keeps the last. Energies, forces and other results that came in ``info`` or ``arrays``, an energy
        above the hull and the scores of a ranking belong to the geometry given: they are renamed "given_energy" and so
        on. A left-handed cell comes back as (-a, -b, -c), which is the same crystal.

    Raises
    ------
    TypeError
        If something is not an Atoms, or `fixed_sites` are not whole numbers.
    ValueError, OSError
        If a setting is senseless, a structure lacks a site that is to be fixed, or the calculator cannot be loaded or
        is not trusted.
    """
    single = isinstance(atoms, Atoms)
    structures = [atoms] if single else list(atoms)
    for item in structures:
        if not isinstance(item, Atoms):
            raise TypeError(f"relax takes ase.Atoms or a list of them, not {type(item).__name__}")
    structures = hold(structures, fixed_sites)
    each = relax_each(structures, calculator, fmax, max_steps, time_limit, processes, fixed_cell, trust_model)
    with contextlib.closing(each) as finished:
        relaxed = list(tqdm(finished, total=len(structures), disable=not progress, unit="structure", desc="relax"))
    return relaxed[0] if single else relaxed


def hold(structures: Sequence[Atoms], sites: Sequence[int]) -> list[Atoms]:
    """Return copies with ``FixAtoms`` on these sites, beside the constraints that they have.

    Raises
    ------
    TypeError, ValueError
        As :func:`relax`.
    """
    wanted = site_numbers(sites, "fixed_sites")
    if not wanted:
        return list(structures)
    held = []
    for atoms in structures:
        if missing := [i for i in wanted if not 0 <= i < len(atoms)]:
            named = f"{atoms.get_chemical_formula()} has the sites 0 to {len(atoms) - 1}"
            raise ValueError(f"fixed_sites={missing}: {named}; leave the others out")
        copy = atoms.copy()
        copy.set_constraint([*copy.constraints, FixAtoms(sorted(set(wanted)))])
        held.append(copy)
    return held


def symmetrized(atoms: Atoms, tolerance: float = 0.1) -> Atoms:
    """Return a copy in which the symmetry found within a tolerance is exact; the order of the sites stays.

    A relaxation leaves displacements of a few hundredths of an Angstrom, and DFT of a crystal without symmetry costs
    ten times the k-points.

    Parameters
    ----------
    atoms : Atoms
    tolerance : float
        Angstrom, as spglib's ``symprec``.

    Raises
    ------
    ValueError
        If atoms are closer to each other than that, or the cell is too large.
    """
    if (beyond := beyond_bounds(atoms)) is not None:
        raise ValueError(f"no symmetry to be found: {beyond}")
    if len(atoms) > _MAX_SYMMETRY:
        raise ValueError(f"no symmetry to be found: {len(atoms)} atoms, more than {_MAX_SYMMETRY}: take a smaller cell")
    if len(neighbor_list("i", atoms, tolerance)):
        raise ValueError(f"cannot search for symmetry within {tolerance:g} A: two atoms are closer to each other")
    copy = atoms.copy()
    try:
        refine_symmetry(copy, tolerance)
    except (SpglibError, TypeError) as error:  # spglib's own, or ASE's of what spglib did not return
        raise ValueError(f"no symmetry to be found within {tolerance:g} A: spglib fails ({error})") from None
    return copy


def relax_each(
    structures: Sequence[Atoms],
    calculator: Any = "chgnet",
    fmax: float = 0.05,
    max_steps: int = 200,
    time_limit: float = 120.0,
    processes: int = 1,
    fixed_cell: bool = False,
    trust_model: bool = False,
) -> Generator[Atoms, None, None]:
    """Yield what :func:`relax` returns, in order and as it comes, so that a long run can keep what it has."""
    if not (fmax > 0 and max_steps >= 0 and time_limit > 0 and processes > 0):
        given = f"fmax={fmax}, time_limit={time_limit}, processes={processes}"
        raise ValueError(f"{given} must be above 0, and max_steps={max_steps} must not be negative")
    check_trust(calculator, trust_model)
    work = _Relaxation(fmax, max_steps, time_limit, fixed_cell)
    if min(processes, len(structures)) <= 1:
        engine = load_calculator(calculator, trust_model)
        yield from (work(item, engine) for item in structures)
        return
    if not isinstance(calculator, str | Path):
        raise TypeError("several processes need a calculator given by name: each loads its own")
    yield from in_processes(partial(_relax_by_name, calculator, trust_model, work), structures, processes)


def in_processes(
    work: Callable[[Atoms], Atoms], structures: Sequence[Atoms], processes: int
) -> Generator[Atoms, None, None]:
    """Yield what ``work`` makes of each structure, in order; a structure that ends its process is its own failure.

    Raises
    ------
    RuntimeError
        If processes cannot be started at all.
    """
    waiting, running, done = deque(range(len(structures))), dict[Future[Atoms], int](), dict[int, Atoms]()
    pool, turn = WorkerPool(processes), 0
    try:
        while turn < len(structures):
            died: set[int] = set()
            while waiting and len(running) < processes and not died:  # what is in hand when a process dies is known
                i = waiting.popleft()
                try:
                    running[pool.submit(work, structures[i])] = i
                except BrokenProcessPool:
                    died |= {i}
            for job in wait(running, return_when=ALL_COMPLETED if died else FIRST_COMPLETED).done:
                i = running.pop(job)
                try:
                    done[i] = job.result()
                except BrokenProcessPool:
                    died |= {i}
            if died:
                pool.shutdown()
                waiting.extendleft(sorted(running.values(), reverse=True))  # they broke, too, while we looked
                running.clear()
                done |= {i: _in_its_own_process(work, structures[i]) for i in sorted(died)}
                pool = WorkerPool(processes)
            while turn in done:
                yield done.pop(turn)
                turn += 1
    finally:
        if turn < len(structures):  # an error or Ctrl-C: nobody waits for what is in hand
            pool.end()
        pool.shutdown(cancel_futures=True)


def _in_its_own_process(work: Callable[[Atoms], Atoms], given: Atoms) -> Atoms:
    with WorkerPool(1) as pool:
        try:
            pool.submit(os.getpid).result()
        except BrokenProcessPool:
            fix = 'call this under if __name__ == "__main__":, or with processes=1'
            raise RuntimeError(f"the processes that were to relax do not start: {fix}") from None
        try:
            return pool.submit(work, given).result()
        except BrokenProcessPool:
            told = "its process was killed, as by a system that is short of memory"
            return _unrelaxed(given, f"{told}: take a smaller cell, or fewer processes")


class WorkerPool(ProcessPoolExecutor):
    """Processes with one thread each, which end with this one, whatever ends it, or when they are told to.

    They leave Ctrl-C, which a terminal sends to all of them, to this process.
    """

    def __init__(self, processes: int) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would copy torch's locks
        self._hears, self._alive = spawn.Pipe(duplex=False)
        super().__init__(processes, spawn, _begin_worker, (self._hears,))

    def submit(self, *job: Any, **settings: Any) -> Future[Any]:
        """As that of the base class; a process that it starts is deaf to Ctrl-C from the beginning."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(*job, **settings)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def end(self) -> None:
        """End the processes in the middle of their work."""
        self._alive.close()


def _begin_worker(parent: Connection) -> None:
    import torch

    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)


def _end_with(parent: Connection) -> None:
    """A parent that is killed closes no queue, and its workers would wait for work for ever; but this it closes."""
    parent.poll(None)
    os._exit(1)


def _relax_by_name(calculator: str | Path, trust_model: bool, work: _Relaxation, start: Atoms) -> Atoms:
    return work(start, _kept_calculator(calculator, trust_model))


@contextlib.contextmanager
def quick_blas() -> Iterator[None]:
    """One thread and no denormal numbers, which makes CHGNet on small cells quicker; numpy's legacy stream is kept.

    With more threads, the 3x3 matrix functions of the cell filter take most of the time on a busy machine; the tails of
    CHGNet's radial functions are denormal, on which a CPU is slow: a gradient takes 1.5 times as long. The logarithm of
    a matrix, as the cell filter takes it from scipy, draws from numpy's legacy stream.
    """
    import torch

    was = bool(torch.tensor(1e-40).mul(1.0) == 0)
    torch.set_flush_denormal(True)
    try:
        with one_blas_thread(), cpu_threads(1), legacy_stream():
            yield
    finally:
        torch.set_flush_denormal(was)


def _unrelaxed(given: Atoms, reason: str | None) -> Atoms:
    """A copy with the report of a relaxation that has not begun, or never will."""
    start = given.copy()
    set_aside(start, (*all_properties, *_OF_GEOMETRY))
    start.info["relaxation"] = {
        "converged": False, "steps": 0, "energy": None, "energy_start": None, "rmsd": 0.0, "reason": reason,
    }  # fmt: skip
    return start


@dataclass(frozen=True)
class _Relaxation:
    """How one structure is relaxed; its call is the work of a process."""

    fmax: float
    max_steps: int
    time_limit: float
    fixed_cell: bool

    def __call__(self, given: Atoms, calculator: Any) -> Atoms:
        start = _unrelaxed(given, None)
        report = start.info["relaxation"]
        try:
            return self._relaxed(start, report, calculator)
        except _BrokenDown as error:
            report.update(energy=None, reason=str(error))
        except Exception as error:  # noqa: BLE001 -- whatever a structure raises is its own failure, and ends no run
            report.update(energy=None, reason=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return start

    def _relaxed(self, start: Atoms, report: dict[str, Any], calculator: Any) -> Atoms:
        start.set_cell(right_handed(start).cell, apply_constraint=False)
        screening = screen_given(start)
        if not screening.accepted:
            raise _BrokenDown(f"rejected before relaxation: {screening.reason}")
        atoms = start.copy()
        atoms.info["relaxation"] = report
        atoms.calc = calculator
        held = [constraint for constraint in atoms.constraints if _holds(constraint)]
        fixed_cell = self.fixed_cell or any(not isinstance(constraint, _MOVE_WITH_CELL) for constraint in held)
        optimiser = BFGS(atoms if fixed_cell else FrechetCellFilter(atoms), logfile=None)
        with quick_blas():
            report["reason"] = self._optimise(optimiser, atoms, report)
        report["converged"] = report["reason"] is None
        results = {name: np.array(value) for name, value in calculator.results.items() if name in ("forces", "stress")}
        atoms.calc = SinglePointCalculator(atoms, energy=report["energy"] * len(atoms), **results)
        moved = atoms.get_scaled_positions(wrap=False) - start.get_scaled_positions(wrap=False)
        if all(isinstance(constraint, FixSymmetry) for constraint in held):  # no site is held
            moved -= moved.mean(0)
        report["rmsd"] = float(np.sqrt(((moved @ atoms.cell) ** 2).sum(1).mean()))
        return atoms

    def _optimise(self, optimiser: BFGS, atoms: Atoms, report: dict[str, Any]) -> str | None:
        """Relax in place, keep the report's steps and energies, and return why it stopped early, if it did."""
        deadline = time.perf_counter() + self.time_limit
        # A calculator is foreign code, and whatever it raises is the failure of this structure only.
        try:
            for converged in optimiser.irun(fmax=self.fmax, steps=self.max_steps):
                energy = float(atoms.get_potential_energy()) / len(atoms)
                if not (math.isfinite(energy) and np.isfinite(atoms.get_forces()).all()):
                    raise _BrokenDown("energy or forces are not finite")
                screening = screen_given(atoms)
                if not screening.accepted:
                    raise _BrokenDown(f"broke down in step {optimiser.nsteps}: {screening.reason}")
                report["energy"], report["steps"] = energy, int(optimiser.nsteps)
                if report["energy_start"] is None:
                    report["energy_start"] = energy
                if converged:
                    return None
                if time.perf_counter() > deadline:
                    return "time limit reached"
        except _BrokenDown:
            raise
        except Exception as error:
            told = " ".join(str(error).split())[:200]
            raise _BrokenDown(f"the calculator failed: {type(error).__name__}: {told}") from error
        return f"not converged in {self.max_steps} steps"


def _holds(constraint: Any) -> bool:
    """Whether a constraint holds anything: one of no site, or of no direction, does not."""
    return np.size(getattr(constraint, "index", 0)) > 0 and bool(np.any(getattr(constraint, "mask", True)))


class _BrokenDown(Exception):
    """The calculator failed, or the structure left what it can describe."""


# -- calculators -------------------------------------------------------------------------------------------------------


def check_trust(calculator: Any, trusted: bool) -> None:
    """Refuse the file of a model that the user does not vouch for: a pickle runs what code is in it.

    Raises
    ------
    ValueError
        If this is a file, and not trusted; or "chgnet" with capitals, which is told before the models are loaded.
    """
    if not isinstance(calculator, str | Path) or calculator == "chgnet":
        return
    if str(calculator).lower() == "chgnet" and not Path(calculator).exists():
        raise ValueError(f"calculator {str(calculator)!r} is not known: write it as chgnet")
    if Path(calculator).is_file() and not trusted:
        told = "a MACE model file is a pickle, which may run any code when it is loaded"
        raise ValueError(f"{calculator}: {told}; if you trust its maker, add trust_model=True (--trust-model)")


def load_calculator(calculator: Any, trust_model: bool = False) -> Any:
    """An ASE calculator as it is; "chgnet", or the path or name of a MACE model, loaded on the CPU or CUDA.

    Raises
    ------
    TypeError, ValueError
        If it is neither, or the file is not a MACE model, or not trusted.
    OSError
        If the named model is not on this machine and cannot be downloaded.
    """
    if not isinstance(calculator, str | Path):
        if not hasattr(calculator, "get_property"):
            raise TypeError(f'calculator must be an ASE calculator, "chgnet" or a MACE model, not {calculator!r}')
        return calculator
    if calculator == "chgnet":
        from dosmatgen_ase.judge.chgnet import CHGNetForces

        return CHGNetForces()
    check_trust(calculator, trust_model)
    return _mace(calculator)


_kept_calculator = lru_cache(maxsize=1)(load_calculator)  # of a process that relaxes one structure after the other


def _mace(model: str | Path) -> Any:
    name, local = str(model), Path(model).is_file()
    with _mace_environment():
        try:
            import torch
            from mace.calculators import MACECalculator
            from mace.calculators.foundations_models import download_mace_mp_checkpoint, mace_mp_names
        except ImportError as error:
            raise ValueError(f"calculator {name!r} needs mace-torch: pip install dosmatgen-ase[workflows]") from error
        if not local and name not in mace_mp_names:
            names = ", ".join(n for n in mace_mp_names if n)
            raise ValueError(f'calculator {name!r} is neither "chgnet", a file, nor one of the MACE models {names}')
        try:
            path = name if local else download_mace_mp_checkpoint(name)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"cannot download MACE model {name!r} ({error}): give the path of a local model file instead"
            ) from error
        try:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            return MACECalculator(model_paths=path, device=device, default_dtype="float64")
        except Exception as error:  # unpickling fails in every possible way
            raise ValueError(f"{path} is not a MACE model that this version of mace-torch reads: {error}") from error


@contextlib.contextmanager
def _mace_environment() -> Iterator[None]:
    """Load MACE quietly, and take back the environment variable by which it lifts torch's ban on pickles everywhere."""
    variable = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with without_warnings(), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if before is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = before
