"""Files of the command line: how structures are read, and which outputs may be written."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dosmatgen_ase.cli.application import tell

if TYPE_CHECKING:
    from ase import Atoms

PICTURES = (".png", ".pdf", ".svg")


def output(
    ctx: typer.Context,
    option: str,
    endings: Sequence[str],
    *,
    path: Path | None = None,
    count: int = 1,
    marks: Sequence[bytes] = (),
    ours: bool = True,
    continued: bool = False,
    exact: bool = False,
) -> None:
    """Check before the work that an output can be written and replaces no file of the user.

    Parameters
    ----------
    option : str
        Name of the parameter that holds the path.
    endings : sequence of str
        That its name may have.
    path : path, optional
        What is to be written, if it is only derived from that parameter.
    count : int
        Largest number of structures; several in POSCAR format become numbered files.
    marks : sequence of bytes
        By which a file is known as made by this command, beside the name of the package. Formats that keep no ``info``
        have that name only.
    ours : bool
        Whether the name of the package is enough. It is not where other commands write such files, too, and their work
        would be lost.
    continued : bool
        Whoever writes it looks at what it holds, and goes on from there.
    exact : bool
        Exactly `count` structures are written, not fewer.
    """
    from dosmatgen_ase import files

    path = path or ctx.params[option]
    if path is None:
        return
    outputs, known = [path], (files.MARK, *marks) if ours else tuple(marks)
    if endings == files.STRUCTURES:
        outputs = files.written_files(path, count) if exact else files.possible_files(path, count)
        outputs += files.numbered_files(path)  # they may be removed
        known = known if files.keeps_info(path) else (files.MARK,)  # "search" and the like stand in CIF of anybody
    elif path.suffix.lower() not in endings:
        raise ValueError(f"cannot write {path}: its name must end in {' or '.join(endings)}")
    others: list[Path] = []
    for name, value in ctx.params.items():
        given = value if isinstance(value, list | tuple) else [value]
        others += [Path(v) for v in given if name != option and isinstance(v, str | Path) and v]
    overwrite = continued or bool(ctx.params.get("overwrite"))
    for file in outputs:
        files.check_output(file, inputs=others, marks=known, overwrite=overwrite)


_FREE_MEMORY, _MEMORY = 2**30, 40  # bytes while a file is read; and so many times its size: an Atoms takes 2 kB
_UNPACKED = 10  # of a packed file, usually


@contextlib.contextmanager
def _bounded_memory(path: Path) -> Iterator[None]:
    """Bound what a reader takes: some make room for as many atoms as the head of a file tells. On Linux only.

    The bound is of the whole process, so it is for the command line, where nothing else runs meanwhile.
    """
    import resource

    pages = Path("/proc/self/statm")
    if not pages.exists():
        yield
        return
    size = path.stat().st_size * (_UNPACKED if path.suffix.lower() in (".gz", ".bz2", ".xz") else 1)
    wanted = int(pages.read_text().split()[0]) * resource.getpagesize() + _FREE_MEMORY + _MEMORY * size
    before = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *limits]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _frames(path: Path) -> Any:
    """Read the structures of a file; raise whatever ASE raises, and ValueError where that takes too much memory."""
    from dosmatgen_ase.files import read_structures as read

    try:
        with _bounded_memory(path):
            return read(path)
    except MemoryError:
        told = "it asks for more memory than a file of its size needs: does its head tell the right number of atoms?"
        raise ValueError(told) from None


def read_structure(path: Path) -> Any:
    """Read the template. Of several structures it is the last, as in ASE; a line says so."""
    from dosmatgen_ase.files import no_file, reason_of

    if not path.is_file():
        raise FileNotFoundError(f"{no_file(path, 'template')}: give a file that ASE reads (CIF, POSCAR, extxyz, ...)")
    try:
        frames = _frames(path)
        last = frames[-1]
    except Exception as error:
        raise ValueError(f"template {path} is not a structure that ASE reads: {reason_of(error)}") from error
    if len(frames) > 1:
        tell(f"template {path}: {last.get_chemical_formula()}, the last of {len(frames)} structures", err=True)
    return last


def single_table(paths: Sequence[Path]) -> Path | None:
    """The table among files of structures, which must come alone; None where there is none."""
    tables = [path for path in paths if path.suffix == ".parquet"]
    if tables and len(paths) > 1:
        raise ValueError(f"give {tables[0]} alone: a table and other files cannot be read in one run")
    return tables[0] if tables else None


def read_structures(files: Sequence[Path]) -> dict[str, Atoms]:
    """Every structure of the files, named ``STEM`` or, where a file has many, ``STEM-0000``, ``STEM-0001``, ..."""
    from dosmatgen_ase.files import no_file, reason_of

    found: dict[str, Atoms] = {}
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{no_file(path)}: give files that ASE reads (CIF, POSCAR, extxyz, ...)")
        try:
            frames = _frames(path)
        except Exception as error:
            raise ValueError(f"{path} holds no structures that ASE reads: {reason_of(error)}") from error
        stem = re.sub(r"[^\w+-]+", "_", path.stem)
        for i, atoms in enumerate(frames):
            name = stem if len(frames) == 1 else f"{stem}-{i:04d}"
            if name in found:
                raise ValueError(f"two structures would be named {name}: rename {path}")
            found[name] = atoms
    return found
