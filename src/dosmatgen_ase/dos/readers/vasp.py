"""VASP's ``vasprun.xml``."""

from __future__ import annotations

import math
from os import PathLike
from pathlib import Path

from dosmatgen_ase.dos.grid import MIN_GAP
from dosmatgen_ase.dos.readers.common import existing
from dosmatgen_ase.dos.readers.pymatgen import from_densities
from dosmatgen_ase.dos.target import TargetDOS


def read_vasprun(path: str | PathLike[str], site: int | None) -> TargetDOS:
    """What `TargetDOS.from_vasprun` does."""
    from pymatgen.io.vasp.outputs import Vasprun

    existing(path)
    try:
        run = Vasprun(str(path), parse_potcar_file=False)
        dos = run.complete_dos
        gap, _, vbm, _ = run.eigenvalue_band_properties
    except (SyntaxError, ValueError, AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is not a complete vasprun.xml with a DOS: {error}") from error
    top = min(float(bands[..., -1, 0].min()) for bands in run.eigenvalues.values())
    ismear, sigma = run.parameters.get("ISMEAR"), run.parameters.get("SIGMA")
    if ismear == 0 and sigma is not None:
        broadening: float | None = sigma / math.sqrt(2)
    else:
        broadening = 0.0 if ismear in (-4, -5) else None
    return from_densities(dos, site, vbm if gap >= MIN_GAP else None, top, broadening, f"VASP {Path(path).name}")
