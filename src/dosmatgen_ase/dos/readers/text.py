"""Energies and values in columns of text or CSV."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np

from dosmatgen_ase.dos.readers.common import clip_negative_lobes, named, read_bytes
from dosmatgen_ase.dos.target import TargetDOS


def read_text(path: str | PathLike[str], columns: tuple[int, int] | None, kind: str) -> TargetDOS:
    """What `TargetDOS.from_text` does."""
    return parse_text(read_bytes(path), str(path), columns, kind)


def parse_text(content: bytes, name: str, columns: tuple[int, int] | None, kind: str) -> TargetDOS:
    """Read columns from the bytes of a file called `name`."""
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{name} is neither vasprun.xml, JSON, .npz nor two-column text") from None
    rows: list[list[float]] = []
    for number, line in enumerate(lines, start=1):
        words = line.replace(",", " ").replace(";", " ").split()
        if not words or words[0][0] in "#!%@":
            continue
        try:
            row = [float(word) for word in words]
        except ValueError:
            if rows:
                raise ValueError(f"{name}, line {number}: expected numbers, found {line.strip()[:40]!r}") from None
            continue
        if columns is None and len(row) != 2:
            raise ValueError(f"{name}, line {number}: {len(row)} columns; keep two, or use from_text(columns=)")
        if len(row) <= max(columns or (1,)):
            raise ValueError(f"{name}, line {number}: only {len(row)} columns")
        rows.append([row[i] for i in columns or (0, 1)])
    if not rows:
        raise ValueError(f"{name} holds no numbers: expected two columns, energy (eV) and DOS (states/eV)")
    energies, values = np.array(rows).T
    values, note = clip_negative_lobes(values)
    record = {"source": f"text {Path(name).name}", "steps": note}
    return named(name, TargetDOS, energies, values, ~np.isnan(values), "fermi", None, kind, record)
