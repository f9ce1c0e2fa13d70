"""What the readers share: bytes of a file, site numbers, negative lobes, errors that name the file."""

from __future__ import annotations

import gzip
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from dosmatgen_ase.dos.grid import Array
from dosmatgen_ase.dos.target import TargetDOS


def named(name: str, make: Any, *arguments: Any) -> TargetDOS:
    """Call a constructor so that its complaint names the file."""
    try:
        return make(*arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def existing(path: str | PathLike[str]) -> Path:
    """The path of a file that exists; FileNotFoundError otherwise."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {path}: give the path of a vasprun.xml, JSON, .npz or two-column text file")
    return file


def read_bytes(path: str | PathLike[str]) -> bytes:
    """What the file holds, unpacked if it is gzipped; ValueError if it is empty or damaged."""
    content = existing(path).read_bytes()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} is a damaged gzip file ({error}): copy it again") from None
    if not content.strip():
        raise ValueError(f"{path} is empty")
    return content


def check_site(site: int, count: int) -> None:
    """Raise TypeError or ValueError unless `site` is one of `count` sites."""
    if isinstance(site, bool) or not isinstance(site, (int, np.integer)):
        raise TypeError(f"site must be an int, not {type(site).__name__}")
    if not 0 <= site < count:
        raise ValueError(f"site {site} does not exist: there are {count}, numbered from 0")


def clip_negative_lobes(values: Array) -> tuple[Array, list[str]]:
    """Zero the negative lobes of Methfessel-Paxton smearing (at most 5 % of the area) and say so."""
    values = np.array(values, dtype=float)
    negative = values < 0
    if not negative.any() or -values[negative].sum() > 0.05 * values[values > 0].sum():
        return values, []
    note = f"negative values down to {values[negative].min():.2g} states/eV set to 0"
    values[negative] = 0.0
    return values, [note]
