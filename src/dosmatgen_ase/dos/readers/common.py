"""What the readers share: what is asked of them, a file's bytes, the record of what was assumed, negative lobes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import IO, Any

import numpy as np

from dosmatgen_ase.dos.grid import Array
from dosmatgen_ase.files import no_file

MAX_BYTES = 2**30  # most bytes that a file may hold, unpacked
MAX_RATIO = 100  # most times that a packed file may grow: text of numbers packs to a third or a tenth
FREE_BYTES = 2**25  # unpacked bytes below which `MAX_RATIO` is not looked at
# Most negative area, as a share of the positive, that smearing can make: 0.102 of isolated levels at order 2.
MAX_NEGATIVE = 0.11

READ_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What libraries raise on a file that they cannot read; each becomes one ValueError that names the file."""


@dataclass(frozen=True)
class Request:
    """What the caller asks of a reader, and what he states that a file may not say; None where he does not.

    `read_file` puts the stated values into the target. A reader looks at them for two reasons: what is stated is not
    assumed, and a stated `sigma` tells how far the tail of a band reaches into the gap.
    """

    site: int | None = None
    reference: str | None = None
    sigma: float | None = None
    kind: str | None = None
    columns: Sequence[int | str] | None = None
    spin: str | None = None
    efermi: float | None = None
    units: str | None = None


TEXT_ALONE = ("columns", "spin", "efermi", "units")
"""Fields of `Request` that columns of text may need; a form of file that needs one, too, says so."""


@dataclass(frozen=True)
class Content:
    """A file: its name as the caller gave it, and its bytes, unpacked."""

    name: str
    data: bytes

    @classmethod
    def of(cls, path: str | PathLike[str]) -> Content:
        """Read it; errors as in `read_bytes`."""
        return cls(fspath(path), read_bytes(path))

    @cached_property
    def head(self) -> str:
        """The first 4,096 bytes as text, without byte-order mark and leading blanks: enough to tell a format."""
        return self.data[:4096].decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n")

    @property
    def basename(self) -> str:
        """Name without folders, for the provenance."""
        return Path(self.name).name


def record(source: str, steps: Sequence[str] = (), assumptions: Sequence[str] = ()) -> dict[str, Any]:
    """Provenance of a target that was read.

    ``provenance["steps"]`` tells what was done, ``provenance["assumed"]`` what the file did not say and was taken for
    granted (zero of energy, kind, units, spin), in short and complete sentences; the command line prints the second.
    No key where there is nothing.
    """
    return {"source": source, "steps": list(steps)} | ({"assumed": list(assumptions)} if assumptions else {})


@contextmanager
def naming(
    name: str, errors: type[Exception] | tuple[type[Exception], ...] = READ_ERRORS, what: str = ""
) -> Iterator[None]:
    """Turn what is raised inside, if it is one of `errors`, into one line that names the file and the reason."""
    try:
        yield
    except errors as error:
        raise unreadable(name, error, what) from None


def unreadable(name: str, error: BaseException, what: str = "") -> ValueError:
    """One line that names the file and the reason, whatever a library raised."""
    if isinstance(error, (TypeError, ValueError, MemoryError)) and str(error):
        told = str(error)
    else:  # the text of a KeyError alone says nothing
        told = f"{type(error).__name__} {error}".strip()
    return ValueError(f"{name}{what}: {' '.join(told.split())[:300]}")


def existing(
    path: str | PathLike[str], fix: str = "give the path of a vasprun.xml, JSON, .npz or two-column text file"
) -> Path:
    """The path of a file that can be read again and again.

    Raises
    ------
    FileNotFoundError
        If there is none; the `fix` is told.
    ValueError
        If it is a pipe or a device.
    """
    file = Path(path)
    if file.is_file():
        return file
    if file.exists() and not file.is_dir():  # as /dev/stdin, or <(...) of a shell
        raise ValueError(f"{path} is a pipe or a device: save what comes out of it to a file first")
    raise FileNotFoundError(f"{no_file(path)}: {fix}")


def read_bytes(path: str | PathLike[str]) -> bytes:
    """What the file holds, unpacked if its first bytes tell of gzip, bzip2 or xz, whatever its name.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is a pipe, empty, damaged, or unpacks to more than `MAX_BYTES` or `MAX_RATIO` times its size.
    """
    file = existing(path)
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            limit = f"{MAX_BYTES / 2**30:g} GiB"
            raise ValueError(f"{path} holds {size / 2**30:.1f} GiB: a file above {limit} is refused")
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    for _ in range(2):  # a file may have been packed twice
        content = _unpacked(content, str(path))
    if not content.strip():
        raise ValueError(f"{path} is empty")
    return content


_PACKED: dict[bytes, tuple[str, Callable[[IO[bytes]], Any]]] = {
    b"\x1f\x8b": ("gzip", lambda file: gzip.GzipFile(fileobj=file)),
    b"BZh": ("bzip2", bz2.BZ2File),
    b"\xfd7zXZ\x00": ("xz", lzma.LZMAFile),
}
_NOT_UNPACKED = {
    b"\x28\xb5\x2f\xfd": "zstd: unpack it with `zstd -d`",
    b"\x1f\x9d": "compress: unpack it with `uncompress`",
    b"7z\xbc\xaf\x27\x1c": "7-Zip: unpack it",
    b"Rar!": "RAR: unpack it",
}


def most_unpacked(packed: int) -> int:
    """Bytes that so many packed ones may become."""
    return min(MAX_BYTES, max(FREE_BYTES, MAX_RATIO * packed))


def _unpacked(content: bytes, name: str) -> bytes:
    for start, advice in _NOT_UNPACKED.items():
        if content.startswith(start):
            raise ValueError(f"{name} is packed with {advice} first")
    for start, (packer, opened) in _PACKED.items():
        if not content.startswith(start):
            continue
        limit = most_unpacked(len(content))
        try:
            with opened(io.BytesIO(content)) as stream:
                unpacked: bytes = stream.read(limit + 1)
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"{name} is a damaged {packer} file ({error}): copy it again") from None
        if len(unpacked) > limit:
            told = f"unpacks to more than {limit / 2**20:.0f} MiB from {len(content) / 2**20:.2g} MiB"
            raise ValueError(
                f"{name} {told}: it is refused, because no DOS file does so; if it is one, unpack it yourself"
            )
        return unpacked
    return content


def check_site(site: int, count: int) -> None:
    """Raise TypeError or ValueError unless `site` is one of `count` sites."""
    if isinstance(site, bool) or not isinstance(site, (int, np.integer)):
        raise TypeError(f"site must be an int, not {type(site).__name__}")
    if not 0 <= site < count:
        raise ValueError(f"site {site} does not exist: there are {count}, numbered from 0")


def drawn_down(values: Array) -> bool:
    """Whether values are those of a spin drawn downwards: what smearing makes negative is far less than the rest."""
    values = values[np.isfinite(values)]
    return bool(-values[values < 0].sum() > 5 * values[values > 0].sum())


def clip_negative_lobes(values: Array, limit: float = MAX_NEGATIVE) -> tuple[Array, list[str]]:
    """Zero the negative lobes of Methfessel-Paxton smearing and say so; larger ones are left as they are.

    The rest is scaled so that the number of states stays: each isolated level then holds what it should. `limit` is the
    most negative area as a share of the positive one.
    """
    values = np.array(values, dtype=float)
    negative = values < 0
    positive = values[values > 0].sum()
    if not negative.any() or -values[negative].sum() > limit * positive:
        return values, []
    kept = 1 + values[negative].sum() / positive if positive else 1.0
    note = f"negative values down to {values[negative].min():.2g} states/eV set to 0, the rest scaled by {kept:.3f}"
    return np.where(negative, 0.0, values * kept), [note]
