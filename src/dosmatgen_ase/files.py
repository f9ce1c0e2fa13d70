"""Files that are there whole or not at all: written beside, flushed to disk, then moved into place."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import numpy as np


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


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as a compressed npz, without pickle, making its folder if need be; as :func:`write_atomic`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_atomic(path, content.getvalue())
