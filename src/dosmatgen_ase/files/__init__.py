"""Files that are there whole or not at all: written beside, flushed to disk, then moved into place."""

from __future__ import annotations

import bz2
import contextlib
import fcntl
import gzip
import io
import json
import lzma
import math
import os
import re
import struct
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dosmatgen_ase.files.contents import BY_US, STREAMS, cif, database, infos, json_database, poscar, trajectory
from dosmatgen_ase.files.contents import MARK as MARK  # and who imports it finds it here

if TYPE_CHECKING:
    from ase import Atoms


def write_atomic(path: Path, content: bytes) -> None:
    """Write beside ``path``, flush to disk, then replace: an interruption leaves the old file whole.

    Who may read and write a file that is replaced stays as it was.

    Raises
    ------
    OSError
        If the file cannot be written; a file already there stays as it was.
    """
    target = Path(os.path.realpath(path))  # a link stays, and what it points to is replaced
    part = target.with_name(f".{target.name}.part")  # hidden: a name without the dot may be that of a download
    try:
        while True:
            if part.is_symlink():
                part.unlink()  # and what it points to stays
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666), "wb") as file:
                with contextlib.suppress(OSError):  # some file systems have no locks
                    fcntl.flock(file, fcntl.LOCK_EX)  # one writer at a time
                if not _is_at(file.fileno(), part):
                    continue  # another writer has moved it into place
                with contextlib.suppress(OSError):  # nothing is replaced; or some file systems know no such modes
                    # Before the content is there. The owner may write, else the next writer could not.
                    os.fchmod(file.fileno(), (target.stat().st_mode & 0o777) | 0o200)
                file.truncate(0)  # what a kill left
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.replace(part, target)
                return
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(f"cannot write {path}: {error.strerror}; choose a folder that exists and has space") from error


def remove_parts(folder: Path) -> None:
    """Remove what killed runs of `write_atomic` left in a folder; what is being written stays."""
    for part in folder.glob(".*.part"):
        with contextlib.suppress(OSError):  # it has gone meanwhile, or is no file of ours
            descriptor = os.open(part, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()  # a writer that has opened it meanwhile sees that it is gone
            finally:
                os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Be the only one, of all threads and processes, that adds to a file inside of this block.

    The lock is a hidden file beside it, which is free again when the process that holds it ends, however that comes.
    A file system without locks (Lustre may be mounted so) gives no protection.

    Raises
    ------
    BlockingIOError
        If another one writes it.
    OSError
        If nothing can be written there.
    """
    target = Path(os.path.realpath(path))
    lock = target.with_name(f".{target.name}.lock")
    descriptor = _locked(lock, path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if not os.fstat(descriptor).st_size:  # else it is no file of ours
                lock.unlink()  # before it is free: whoever has opened it meanwhile sees that it is gone
        os.close(descriptor)


def _locked(lock: Path, path: Path) -> int:
    """Return the descriptor of the locked file."""
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            fix = "choose a folder that exists and has space"
            raise OSError(f"cannot write {path}: {error.strerror}; {fix}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            told = f"cannot write {path}: another run is writing it; wait for its end, or choose another name"
            raise BlockingIOError(told) from None
        except OSError:  # some file systems have no locks, and there it is as before
            pass
        if _is_at(descriptor, lock):
            return descriptor
        os.close(descriptor)  # its holder has just ended


def set_aside(atoms: Atoms, names: Iterable[str]) -> None:
    """Rename entries of ``info`` and ``arrays`` in place: "energy" becomes "given_energy".

    Files of other programs bring the energy, forces or stress of the geometry they hold. ASE writes such an entry and
    the result of a calculator under one name, so that only one of the two can keep it.
    """
    for place in (atoms.info, atoms.arrays):
        for name in place.keys() & set(names):
            place[f"given_{name}"] = place.pop(name)


def extxyz(structures: Sequence[Atoms]) -> bytes:
    """Content of an extended XYZ file of structures; none for none, which ASE refuses.

    Where ``info`` or ``arrays`` hold an entry of the same name as a result of the calculator, the result is written and
    the entry keeps its value as "given_NAME" (`set_aside`).
    """
    import ase.io

    frames = [atoms.copy() for atoms in structures]
    for frame, atoms in zip(frames, structures, strict=True):
        frame.calc = atoms.calc
        set_aside(frame, () if atoms.calc is None else getattr(atoms.calc, "results", ()))
        if "stress" in frame.info:  # ASE looks at its shape
            frame.info["stress"] = np.asarray(frame.info["stress"])
    text = io.StringIO()
    if frames:
        ase.io.write(text, frames, format="extxyz")
    return text.getvalue().encode()


def write_extxyz(path: Path, structures: Sequence[Atoms]) -> None:
    """Write structures as extended XYZ; as :func:`write_atomic`."""
    write_atomic(path, extxyz(structures))


def finite(value: Any) -> Any:
    """Return the same with None for each NaN and infinity in it, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- structures in any format ------------------------------------------------------------------------------------------

STRUCTURES = (*STREAMS, ".cif", ".vasp", ".traj", ".db", ".json")
"""Endings of files of structures that `write_structures` writes; a name without may begin with POSCAR or CONTCAR."""


def structure_format(path: Path) -> str:
    """Ending of a file of structures, one of `STRUCTURES`; of POSCAR and CONTCAR without such an ending, ".vasp".

    Raises
    ------
    ValueError
        If it is none.
    """
    if path.suffix.lower() in STRUCTURES:
        return path.suffix.lower()
    if path.name.upper().startswith(("POSCAR", "CONTCAR")):
        return ".vasp"
    raise ValueError(f"cannot write {path}: its name must end in {', '.join(STRUCTURES[:-1])} or {STRUCTURES[-1]}")


def keeps_info(path: Path) -> bool:
    """Whether a file of structures keeps their ``info``, and so tells which command made it."""
    return structure_format(path) not in (".cif", ".vasp")


def stream_of(path: Path) -> Path:
    """Return the extxyz file that grows while structures are made: the file itself, or the one beside it."""
    return path if structure_format(path) in STREAMS else path.with_name(f"{path.stem or path.name}.extxyz")


def written_files(path: Path, count: int) -> list[Path]:
    """Return what `write_structures` makes: one file, or one for each of several structures in POSCAR format."""
    if structure_format(path) != ".vasp" or count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i:04d}{path.suffix}") for i in range(count)]


def possible_files(path: Path, count: int) -> list[Path]:
    """Return every file that `write_structures` may make of at most so many structures: fewer may be found."""
    return list(dict.fromkeys([path, *written_files(path, count)]))


def write_structures(path: Path, structures: Sequence[Atoms]) -> None:
    """Write structures in the format that the ending names; as :func:`write_atomic`.

    ``info`` is kept by all but CIF and POSCAR; a database of ASE (.db, .json) has it as ``data`` of its rows. Several
    structures in POSCAR format are numbered files: x-0000.vasp, x-0001.vasp and so on. Numbered files of a longer run
    before are removed, so that no two runs are mixed; x.vasp of a single structure stays beside them.
    """
    content = {".cif": cif, ".traj": trajectory, ".db": database, ".json": json_database}
    kind = structure_format(path)
    if kind != ".vasp":
        write_atomic(path, content.get(kind, extxyz)(structures))
        return
    files = written_files(path, len(structures))
    for file, atoms in zip(files, structures, strict=True):
        write_atomic(file, poscar(atoms))
    for file in numbered_files(path) if files else ():
        if file not in files:
            file.unlink()


def numbered_files(path: Path) -> list[Path]:
    """Return the numbered POSCAR files that this package has written under a name; `write_structures` removes them."""
    if structure_format(path) != ".vasp" or not path.parent.is_dir():
        return []
    name = re.compile(re.escape(path.stem) + r"-\d{4,}" + re.escape(path.suffix))
    found = []
    for file in path.parent.iterdir():
        if name.fullmatch(file.name) and file.is_file():
            with contextlib.suppress(PermissionError), file.open("rb") as opened:
                if opened.readline(4096).rstrip().endswith(BY_US.encode()):
                    found.append(file)
    return sorted(found)


def read_structures(path: Path, index: Any = ":", format: str | None = None) -> Any:
    """Read structures as ``ase.io.read`` does, but take ``@`` in a name, and an ending that we write, for what it is.

    Raises whatever ASE raises, and ``ValueError`` for a file that unpacks to many times its size, an extended XYZ file
    that asks for millions of columns or atoms, and for numbers of elements that do not exist.
    """
    import ase.io
    from ase.data import chemical_symbols

    with _opened(path) as file:
        check_extxyz(file)
    with _opened(path) as file:
        _check_poscar(file)
    found = ase.io.read(path, index, format=format or _format_by_ending(path), do_not_split_by_at_sign=True)
    for atoms in [found] if isinstance(found, ase.Atoms) else found:
        if len(atoms) and not 0 <= atoms.numbers.min() <= atoms.numbers.max() < len(chemical_symbols):
            raise ValueError("it holds an atom that is no element")
    return found


def _format_by_ending(path: Path) -> str | None:
    """ASE's name for the format of an ending that we write, where ASE would go by the rest of the name: POSCAR.cif."""
    from ase.io.formats import ioformats

    name = path.stem if path.suffix.lower() in _PACKERS else path.name
    kind = Path(name).suffix.lower()
    if kind not in STRUCTURES or not any(known.match_name(name) for known in ioformats.values()):
        return None
    return "extxyz" if kind in STREAMS else kind[1:]


ACCIDENTS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError)
"""What a library raises where it did not think of such a file."""

_PACKERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}  # that ASE unpacks
FREE_STRUCTURES, MAX_STRUCTURES = 2**24, 50
"""Bytes that a packed file of structures may have when it is unpacked; or so many times its size (of text: 3 to 10)."""


def _opened(path: Path) -> Any:
    """The bytes that ASE will see, of a file that does not grow beyond reason."""
    packer = _PACKERS.get(path.suffix.lower())
    if packer is None:
        return path.open("rb")
    limit, size = max(FREE_STRUCTURES, MAX_STRUCTURES * path.stat().st_size), 0
    with packer(path) as file:
        while part := file.read(1 << 20):
            size += len(part)
            if size > limit:
                raise ValueError(f"it unpacks to more than {limit >> 20} MiB: unpack it yourself if it is honest")
    return packer(path)


def _check_poscar(lines: Iterable[bytes]) -> None:
    """Refuse numbers of atoms that ASE would make room for: they stand in the sixth or seventh line of a POSCAR."""
    for line in list(islice(lines, 7))[5:]:
        words = line.split()
        if words and all(word.isdigit() for word in words) and max(map(len, words)) > 7:
            raise ValueError("it tells 10 million atoms or more")


_COLUMNS = re.compile(rb"Properties\s*=\s*[^\n]*?:[A-Za-z]:\d{5,}")


_MANY = re.compile(rb"\s*[+-]?[\d_]{7,}\s*")


def check_extxyz(lines: Iterable[bytes]) -> None:
    """Refuse the head of a frame whose columns or atoms ASE would count one by one.

    Raises
    ------
    ValueError
        If it tells more than 9,999 columns of one property, or a million atoms.
    """
    before: bytes | None = None
    for line in lines:
        head = b"Properties" in line or b"Lattice" in line
        if head and _COLUMNS.search(line):
            raise ValueError("its Properties tell more than 9,999 columns")
        counted = line if before is None else before if head else b""  # the first line, or that above a head
        if _MANY.fullmatch(counted):
            raise ValueError("a frame tells a million atoms or more")
        before = line


def no_file(path: str | os.PathLike[str], what: str = "file") -> str:
    """How a message begins where a file is wanted: that there is none, or that this is a folder."""
    return f"{path} is a folder, not a {what}" if Path(path).is_dir() else f"no {what} {path}"


def reason_of(error: BaseException) -> str:
    """One line on why a library did not read a file; the text of an accident inside of it tells nobody anything."""
    if isinstance(error, ACCIDENTS) or not str(error):
        return f"its reader fails with {type(error).__name__}"
    return " ".join(str(error).split())[:300]


def check_output(
    path: Path, *, inputs: Iterable[Path] = (), marks: Sequence[bytes] = (MARK,), overwrite: bool = False
) -> None:
    """Find out before the work that a file may be written: for every output of every command.

    Parameters
    ----------
    path : path
        A link counts as what it points to.
    inputs : paths
        Of the same command, which must survive.
    marks : sequence of bytes
        A file that holds one of them was made by such a command before, so it may be replaced. Each structure of a
        collection must hold one: others may have been added.
    overwrite : bool
        Replace any other file, too.

    Raises
    ------
    OSError
        If there is no folder for it, it is no file, or it cannot be written.
    ValueError
        If it is one of the inputs.
    FileExistsError
        If something else would be lost.
    """
    target = Path(os.path.realpath(path))
    if any(target == Path(os.path.realpath(file)) for file in inputs):
        raise ValueError(f"cannot write {path}: this command reads it; choose another name")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {target.parent} does not exist, create it")
    if target.exists() and not target.is_file():
        raise OSError(
            f"cannot write {path}: it is {'a folder' if target.is_dir() else 'no file'}; choose another place"
        )
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: permission denied; choose another place")
    if target.exists() and not overwrite and not _holds(target, marks):
        raise FileExistsError(f"{path} exists and holds something else: choose another name, or give --overwrite")


def output_folder(path: Path) -> None:
    """Make a folder for outputs, with those above it; one that is there stays as it is.

    Raises
    ------
    OSError
        If something else has its name, or it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise FileExistsError(f"cannot write into {path}: it is no folder; choose another name") from None
    except OSError as error:
        raise OSError(f"cannot make the folder {path}: {error.strerror}; choose another place") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write into {path}: permission denied; choose another place")


def _holds(path: Path, marks: Sequence[bytes]) -> bool:
    """Whether a file is empty, or holds a mark in its first or last megabytes, and in what each structure tells."""
    size, part = path.stat().st_size, 4 << 20
    with path.open("rb") as file:
        content = file.read(part)
        if size > part:
            file.seek(max(part, size - part))
            content += file.read()
    if not any(mark in content for mark in marks):
        return not size
    try:
        return all(any(mark in info for mark in marks) for info in infos(path))
    except DAMAGE:
        return False


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as a compressed npz, without pickle, making its folder if need be; as :func:`write_atomic`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_atomic(path, content.getvalue())


MAX_UNPACKED, FREE_UNPACKED, MAX_RATIO = 2**32, 2**26, 200
"""Most bytes of the arrays of an npz; below the second, the third (unpacked over packed) is not looked at."""

DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, NotImplementedError, OSError,
    RecursionError, RuntimeError, SyntaxError, TypeError, ValueError, struct.error, tokenize.TokenError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What libraries raise on a file that they cannot read."""


def read_npz(
    path: Path, wanted: Mapping[str, tuple[str, int]], optional: Mapping[str, tuple[str, int]] | None = None
) -> dict[str, np.ndarray]:
    """Read arrays of an npz that may be damaged, or made to hurt: no pickle, and no more memory than they take.

    Parameters
    ----------
    path : path
    wanted : mapping of name to (kinds of dtype, number of axes)
        As ``{"values": ("f", 2)}``.
    optional : mapping, likewise
        Left out of the result where the file has them not.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        With the reason alone, for a caller who knows what file this should be.
    """
    optional = optional or {}
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if lacking := [name for name in wanted if name not in members]:
                raise ValueError(f"it lacks {', '.join(lacking)}")
            chosen = {name: told for name, told in {**wanted, **optional}.items() if name in members}
            size, packed = sum(members[name].file_size for name in chosen), path.stat().st_size
            if size > min(MAX_UNPACKED, max(FREE_UNPACKED, MAX_RATIO * packed)):
                raise ValueError(f"it unpacks to {size / 2**20:.0f} MiB from {packed / 2**20:.2g} MiB")
            return {name: _array(archive, members[name], name, *told) for name, told in chosen.items()}
    except FileNotFoundError:
        raise
    except DAMAGE as error:
        told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise ValueError(" ".join(told.split())[:300]) from None


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, kinds: str, axes: int) -> np.ndarray:
    array = read_member(archive, member, name)
    if array.dtype.kind not in kinds or array.ndim != axes:
        raise ValueError(f"{name} has the shape {array.shape} and the type {array.dtype}")
    return array


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> np.ndarray:
    """Read one array of an npz, whose header is looked at before memory is taken for it.

    Raises
    ------
    ValueError
        With the ``name``, if it has named columns or Python objects, or promises more than the file holds.
    """
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version > (2, 0):
            raise ValueError(f"{name} has named columns: expected plain numbers")
        head = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = head(stream)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize > member.file_size or min(shape, default=0) < 0:
        raise ValueError(f"{name} is damaged or holds Python objects: its header says {shape} of {dtype}")
    with archive.open(member) as stream:
        array = np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
    if array.dtype.kind == "U" and array.dtype.itemsize:
        codes = np.ascontiguousarray(array).view(np.dtype("u4").newbyteorder(array.dtype.byteorder))
        if codes.max(initial=0) > sys.maxunicode:
            raise ValueError(f"{name} is damaged: it holds what is no character")
    return array


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Read what long runs append, one JSON object with an ``id`` per line.

    Objects of one id are joined, later ones win. A line torn by an interruption is passed over, and a file that is not
    there holds nothing.
    """
    known: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            known.setdefault(record.pop("id"), {}).update(record)
    return known
