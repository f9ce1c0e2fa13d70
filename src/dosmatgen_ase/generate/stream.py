"""The file of results: it grows structure by structure, survives a kill, and is continued."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ase.io

from dosmatgen_ase.files import (
    DAMAGE,
    check_extxyz,
    check_output,
    extxyz,
    possible_files,
    stream_of,
    write_atomic,
    write_structures,
)
from dosmatgen_ase.generate.request import completed
from dosmatgen_ase.parsing import is_whole

if TYPE_CHECKING:
    from ase import Atoms


class Stream:
    """An extxyz file that grows structure by structure and survives a kill.

    Parameters
    ----------
    out : path
        In another format, it is written at the end.
    count : int
        How many structures are wanted. The extxyz file may hold more, of a longer run before.
    overwrite : bool
        Replace what is not ours, or of another request.

    Raises
    ------
    FileExistsError
        If anything else would be lost; and as `check_output`.
    """

    def __init__(self, out: Path, count: int = 1, overwrite: bool = False) -> None:
        self.out, self.path, self.count, self.overwrite = out, stream_of(out), count, overwrite
        for file in possible_files(out, count) if self.out != self.path else ():
            check_output(file, overwrite=overwrite)
        check_output(self.path, overwrite=True)  # what it holds is looked at in full below

    def seed(self) -> int | None:
        """Seed of the structures already there, None if there are none; ``ValueError`` as :meth:`resume`."""
        frames, _, _ = self._begun()
        return int(frames[0].info["dosmatgen"]["seed"]) if frames else None

    def resume(self, record: dict[str, Any]) -> list[Atoms]:
        """Structures already there; a frame cut short by a kill is dropped from the file.

        Raises
        ------
        ValueError
            If the file holds structures of another request.
        """
        frames, whole, rest = self._begun()
        wanted = json.loads(json.dumps(record))
        told = [completed(atoms.info["dosmatgen"]) for atoms in frames]
        if any(record.get(k) != v for record in told for k, v in wanted.items()):
            if not self.overwrite:
                raise self._another()
            frames, whole, rest = [], "", "other structures"
        if rest:
            write_atomic(self.path, whole.encode())
        return frames

    def finish(self) -> None:
        """Write what was made, if anything, in the format that was asked for, if that is not the stream's own."""
        if self.out == self.path:
            return
        frames = {int(atoms.info["dosmatgen"]["index"]): atoms for atoms in self._read()[0]}
        if wanted := [frames[i] for i in sorted(frames) if i < self.count]:
            write_structures(self.out, wanted)

    def _begun(self) -> tuple[list[Atoms], str, str]:
        """As `_read`, but a file that is not ours counts as empty where it may be overwritten."""
        try:
            return self._read()
        except ValueError:
            if not self.overwrite:
                raise
            return [], "", "what is not ours"

    def _read(self) -> tuple[list[Atoms], str, str]:
        """Whole frames, their text, and what follows; ``ValueError`` if any of it was not written here."""
        if not self.path.exists():
            return [], "", ""
        try:
            lines = self.path.read_text().splitlines(keepends=True)
        except UnicodeDecodeError:
            raise self._another() from None
        end = 0
        while end < len(lines) and lines[end].strip().isdecimal():
            after = end + 2 + int(lines[end])
            if after > len(lines) or not lines[after - 1].endswith("\n"):
                break
            end = after
        try:
            check_extxyz(line.encode() for line in lines[:end])
            frames = ase.io.read(io.StringIO("".join(lines[:end])), index=":", format="extxyz") if end else []
        except DAMAGE:
            raise self._another() from None
        told = [atoms.info.get("dosmatgen") for atoms in frames]
        if not all(isinstance(record, dict) and is_whole(record.get(k)) for record in told for k in ("seed", "index")):
            raise self._another()
        rest = lines[end:]
        if rest and not _torn(rest):
            raise self._another()  # it is not ours to drop
        return frames, "".join(lines[:end]), "".join(rest)

    def _another(self) -> ValueError:
        return ValueError(
            f"{self.path} holds structures of another request: choose another file, or overwrite it (--overwrite)"
        )

    def append(self, atoms: Atoms) -> None:
        """Add one structure and flush it."""
        try:
            with self.path.open("a") as file:
                file.write(extxyz([atoms]).decode())
        except OSError as error:
            fix = "make room, then ask for the same again: what it holds is kept"
            raise OSError(f"cannot continue writing {self.path}: {error.strerror}; {fix}") from error


def _torn(lines: Sequence[str]) -> bool:
    """Whether these are the beginning of a frame of ours, as a kill or a full disk leaves it."""
    count, comment, opening = lines[0].strip(), "".join(lines[1:2]), 'Lattice="'
    if not (count.isdecimal() and len(count) <= 2 and opening.startswith(comment[: len(opening)])):
        return False
    return len(lines) <= 2 or "dosmatgen" in comment
