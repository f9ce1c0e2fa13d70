"""Files that are there whole or not at all: written beside, flushed to disk, then moved into place."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ase import Atoms


def write_atomic(path: Path, content: bytes) -> None:
    """Write beside ``path``, flush to disk, then replace: an interruption leaves the old file whole.

    Raises
    ------
    OSError
        If the file cannot be written; a file already there stays as it was.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(f"cannot write {path}: {error.strerror}; choose a folder that exists and has space") from error


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


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as a compressed npz, without pickle, making its folder if need be; as :func:`write_atomic`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_atomic(path, content.getvalue())


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
