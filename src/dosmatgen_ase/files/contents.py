"""What files of structures hold: how it is written, and what each structure of a file tells of itself."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ase import Atoms

MARK = b"dosmatgen"
"""Stands in every file that this package writes; `check_output` knows them by it."""

BY_US = f" by {MARK.decode()}-ase"
"""At the end of the first line of a POSCAR, and in a comment of each block of a CIF."""

STREAMS = (".extxyz", ".xyz")


# -- how it is written -------------------------------------------------------------------------------------------------


def cif(structures: Sequence[Atoms]) -> bytes:
    """Content of a CIF with a block for each structure, which says whose it is."""
    from ase.io.cif import write_cif

    blocks = []
    for i, atoms in enumerate(structures):
        text = io.BytesIO()
        write_cif(text, atoms)
        name = re.sub(r"[^\w+-]", "_", str(atoms.info.get("material_id", f"{atoms.get_chemical_formula()}_{i}")))
        blocks.append(text.getvalue().replace(b"data_image0", f"data_{name}\n#{BY_US}".encode(), 1))
    return b"\n".join(blocks)


def poscar(atoms: Atoms) -> bytes:
    """Content of a POSCAR, which says in its comment whose it is."""
    import ase.io

    text = io.StringIO()
    ase.io.write(text, atoms, format="vasp", direct=True)
    _, rest = text.getvalue().split("\n", 1)  # the first line is a comment
    return f"{atoms.get_chemical_formula()}{BY_US}\n{rest}".encode()


def json_database(structures: Sequence[Atoms]) -> bytes:
    """Content of a JSON database of ASE; its ``data`` is ``info``.

    Each row is written by ASE, as a database of its own: into one, ASE would write all rows again with each new one.
    """
    from ase.db import connect

    rows = []
    for i, atoms in enumerate(structures, 1):
        text = io.StringIO()
        connect(text, type="json").write(atoms, data=_storable(atoms.info))
        rows.append(f'"{i}": {json.dumps(json.loads(text.getvalue())["1"])},\n')
    return f'{{{"".join(rows)}"ids": {[*range(1, len(rows) + 1)]},\n"nextid": {len(rows) + 1}}}\n'.encode()


def database(structures: Sequence[Atoms]) -> bytes:
    """Content of a SQLite database of ASE; its ``data`` is ``info``."""
    from ase.db import connect

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "structures.db"
        with connect(path, use_lock_file=False) as rows:
            for atoms in structures:
                rows.write(atoms, data=_storable(atoms.info))
        return path.read_bytes()


def trajectory(structures: Sequence[Atoms]) -> bytes:
    """Content of a trajectory of ASE."""
    import ase.io

    content = io.BytesIO()
    ase.io.write(content, list(structures), format="traj")
    return content.getvalue()


def _storable(value: Any) -> Any:
    """Return a value of ``info`` as both databases of ASE write and read it; what they do not know becomes text."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int | float | complex) or hasattr(value, "ase_objtype"):
        return value
    if isinstance(value, np.ndarray):
        return value if value.dtype.kind in "biufc" else _storable(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _storable(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(held) for held in value]
    if hasattr(value, "todict"):  # the space group that ASE's reader of CIF leaves
        return _storable(value.todict())
    return str(value)


# -- whose it is -------------------------------------------------------------------------------------------------------


def infos(path: Path) -> list[bytes]:
    """What each structure of a file tells of itself; none for files of other formats.

    Raises
    ------
    ValueError
        If a database is unreadable; of other files, also what is in `DAMAGE`.
    """
    kind = path.suffix.lower()
    if kind == ".db":
        return _data_of_rows(path)
    if kind == ".json":
        held = json.loads(path.read_bytes())
        ids = held.get("ids", []) if isinstance(held, dict) else []  # else it is no database
        return [json.dumps(held[str(i)].get("data")).encode() for i in ids]
    if kind == ".traj":
        return _infos_of_frames(path)
    if kind == ".cif":
        return _blocks(path.read_bytes())
    return _heads(path.read_bytes().splitlines()) if kind in STREAMS else []


def _data_of_rows(path: Path) -> list[bytes]:
    """The ``data`` of each row of a SQLite database; not by ASE, which makes a database of what is none."""
    import sqlite3

    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            rows = database.execute("SELECT data FROM systems").fetchall()
    except sqlite3.Error as error:
        raise ValueError(str(error)) from error
    return [data if isinstance(data, bytes) else str(data).encode() for (data,) in rows]


def _infos_of_frames(path: Path) -> list[bytes]:
    """The ``info`` of each frame of a trajectory; without the rest of them, which takes ten times as long to read."""
    from ase.io import ulm

    found = []
    with path.open("rb") as file:
        *_, offsets = ulm.read_header(file)
        for offset in offsets.tolist():
            file.seek(offset)
            told = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            found.append(json.dumps(told.get("info")).encode())
    return found


def _blocks(content: bytes) -> list[bytes]:
    """The blocks of a CIF.

    We once wrote the mark only above the first block. Such a file tells it of a single block, and of blocks that have
    the names that we gave: formula and number.
    """
    above, *blocks = re.split(rb"(?mi)^\s*data_", content)
    if MARK not in above:
        return blocks
    named = [re.match(rb"([A-Z][a-z]?\d*)+_%d\s" % i, block) for i, block in enumerate(blocks)]
    return [block + MARK if found or len(blocks) == 1 else block for found, block in zip(named, blocks, strict=True)]


def _heads(lines: Sequence[bytes]) -> list[bytes]:
    """The second line of each frame of an extended XYZ file."""
    heads, start = [], 0
    while start + 1 < len(lines) and lines[start].strip().isdigit():
        heads.append(lines[start + 1])
        start += 2 + int(lines[start])
    return heads
