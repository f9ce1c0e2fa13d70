"""Many DFT calculations side by side, each result in a JSON file of its own, so that a stopped run goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ase import Atoms
from tqdm import tqdm

from dosmatgen_ase.dft.errors import ElectronicStructureError, InterruptedCalculation, ProgramNotStarted
from dosmatgen_ase.dft.espresso import compute_in
from dosmatgen_ase.dft.programs import Programs
from dosmatgen_ase.dft.pseudopotentials import fingerprints, pseudo_directory, pseudopotentials
from dosmatgen_ase.dft.result import ElectronicStructure
from dosmatgen_ase.dft.settings import PHYSICS, RECIPE, EspressoSettings
from dosmatgen_ase.dos.readers.common import READ_ERRORS
from dosmatgen_ase.files import exclusive, output_folder, write_atomic
from dosmatgen_ase.threads import one_blas_thread


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
    tried again under the same settings; its files stay in ``OUT_DIR/NAME``. A missing pseudopotential is not recorded.

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
    BlockingIOError
        If another run computes one of the structures into the same folder.
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
    """Do what `compute_many` does, start in the order given, and yield each name and result as it comes.

    Close the iterator (`contextlib.closing`) to end the programs that run.
    """
    settings = settings or EspressoSettings()
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    for name in structures:
        if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
            raise ValueError(f"{name!r} cannot name a file: use letters, digits and . _ + -")
    stop = threading.Event()
    Programs.find(settings, stop)
    pseudo_directory(settings)
    out = Path(out_dir)
    output_folder(out)
    pool = ThreadPoolExecutor(workers)  # the work is done by other programs, so threads are enough
    failures = 0
    try:
        jobs = {
            pool.submit(_compute_or_read, name, atoms, out, settings, stop): name for name, atoms in structures.items()
        }
        # as_completed lets go of what it has yielded; a set of labels would not fit into memory.
        shown = progress and bool(jobs)
        with one_blas_thread(), tqdm(total=len(jobs), disable=not shown, unit="structure", desc="DFT") as bar:
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
    try:
        pseudos = pseudopotentials(atoms, settings)
    except ElectronicStructureError as error:
        return error  # not recorded, as a file may be added
    crystal = {"numbers": atoms.numbers.tolist(), "cell": atoms.cell.tolist(), "positions": atoms.positions.tolist()}
    given = json.loads(json.dumps({**asdict(settings), "recipe": RECIPE}))
    record = {
        "format": "dosmatgen_ase.compute_many", "structure": crystal, "settings": given,
        "pseudopotentials": fingerprints(pseudos),
    }  # fmt: skip
    file, folder = out / f"{name}.json", out / name
    with exclusive(file):
        if (found := _earlier(file, folder, record)) is not None:
            return found
        if folder.exists() and not is_calculation(folder):
            raise ValueError(f"{folder} is there and holds something else: choose another folder for the results")
        try:
            result = compute_in(atoms, settings, folder.resolve(), stop)
        except InterruptedCalculation as error:
            return error
        except MemoryError:
            return InterruptedCalculation("too little memory", folder)
        except (OSError, ProgramNotStarted):  # of this machine, not of the structure
            raise
        except Exception as error:  # noqa: BLE001 -- whatever a structure raises is its own failure, and ends no run
            if not isinstance(error, ElectronicStructureError):
                told = " ".join(str(error).split())[:300]
                error = ElectronicStructureError(f"{type(error).__name__}: {told}", folder)
            write_atomic(file, json.dumps({**record, "failed": str(error)}).encode())
            return error
        write_atomic(file, json.dumps({**record, "result": result.to_dict()}).encode())
        shutil.rmtree(folder, ignore_errors=True)
        return result


def _earlier(
    file: Path, folder: Path, record: Mapping[str, Any]
) -> ElectronicStructure | ElectronicStructureError | None:
    """What an earlier run found for this structure and these settings; None if nothing."""
    if (done := read_record(file)) is None:
        return None
    given, files = record["settings"], record["pseudopotentials"]
    same = done["structure"] == record["structure"]
    alike = done.get("pseudopotentials", files) == files  # of an old record they are not known
    if "failed" in done and same and done["settings"] == given and alike:
        return ElectronicStructureError(str(done["failed"]))
    if (result := recorded_result(file)) is not None:
        same = same and all(done["settings"].get(k) == given[k] for k in (*PHYSICS, "recipe"))
        used = result.total.provenance.get("pseudopotentials")  # of an old record it is not known
        if not same or (used is not None and used != files):
            told = "another structure, other settings or pseudopotentials, or an earlier version's recipe"
            raise ValueError(f"{file} holds the result of {told}: choose another folder, or remove it")
        if is_calculation(folder):  # of a run that was killed right after it wrote the result
            shutil.rmtree(folder, ignore_errors=True)
    return result


_FILES = re.compile(r"(scf|nscf|projwfc)\.(in|out|err)|o|CRASH|x\.\S+|input_tmp\.in|(core|fort)(\.\d+)?")


def is_calculation(folder: Path) -> bool:
    """Whether everything in a folder has a name that a calculation gives: whoever removes a folder asks here first."""
    return folder.is_dir() and all(_FILES.fullmatch(path.name) for path in folder.iterdir())


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
        parts = record["structure"], record["settings"], record["structure"]["numbers"], record["structure"]["cell"]
        if all(map(isinstance, parts, (dict, dict, list, list))) and ("failed" in record or "result" in record):
            return dict(record)
    except (LookupError, RecursionError, TypeError, ValueError):
        pass
    raise ValueError(f"{file} was not written by this command: choose another folder, or remove it")


def recorded_result(file: Path) -> ElectronicStructure | None:
    """Read the result in a file of `compute_many`, None if there is none.

    Raises
    ------
    ValueError
        If the file is something else, or damaged.
    """
    record = read_record(file)
    if record is None or "result" not in record:
        return None
    try:
        return ElectronicStructure.from_dict(record["result"])
    except READ_ERRORS as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}): remove it") from None
