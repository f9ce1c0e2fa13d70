"""A file of any known form, told by its content: one table of formats, asked in order."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from typing import NamedTuple

from dosmatgen_ase.dos.checks import DOSWarning
from dosmatgen_ase.dos.readers.castep import is_bands, read_bands
from dosmatgen_ase.dos.readers.common import TEXT_ALONE, Content, Request
from dosmatgen_ase.dos.readers.cp2k import is_pdos, read_pdos
from dosmatgen_ase.dos.readers.doscar import is_doscar, read_doscar
from dosmatgen_ase.dos.readers.json import is_json, read_json
from dosmatgen_ase.dos.readers.npz import is_npz, read_npz
from dosmatgen_ase.dos.readers.pdos_xml import is_pdos_xml, read_pdos_xml
from dosmatgen_ase.dos.readers.text import read_text
from dosmatgen_ase.dos.readers.vasp import is_xml, read_vasprun
from dosmatgen_ase.dos.target import TargetDOS


class Format(NamedTuple):
    """A form of file: `recognises` looks at its content, `read` makes the target.

    `uses` names the stated facts of `TEXT_ALONE` that the file may lack, too.
    """

    name: str
    recognises: Callable[[Content], bool]
    read: Callable[[Content, Request], TargetDOS]
    uses: tuple[str, ...] = ()


def read_file(path: str | PathLike[str], request: Request) -> TargetDOS:
    """What `TargetDOS.from_file` does: the first format of `FORMATS` that recognises the content reads it."""
    content = Content.of(path)
    chosen = next(form for form in FORMATS if form.recognises(content))
    if unused := [name for name in TEXT_ALONE if name not in chosen.uses and getattr(request, name) is not None]:
        raise ValueError(f"{path} is {chosen.name}, not columns of text: leave out {unused[0]} (--{unused[0]})")
    target = chosen.read(content, request)
    stated = {name: getattr(request, name) for name in ("reference", "sigma", "kind")}
    stated = {name: value for name, value in stated.items() if value is not None}
    made = replace(target, **stated)
    for name, value in stated.items():
        if (own := getattr(target, name)) not in (value, None):
            moves = ": nothing is moved, as aligned() (--align) would" if name == "reference" else ""
            told = f"{path}: {name} {value!r} is stated in place of {own!r}, which was read{moves}"
            warnings.warn(told, DOSWarning, stacklevel=3)
    return made


# To add a format: one line here, before the last, which takes what nothing else knows.
FORMATS = (
    Format(".npz", is_npz, read_npz),
    Format("PDOS of SIESTA or ABACUS", is_pdos_xml, read_pdos_xml, uses=("efermi",)),
    Format("vasprun.xml", is_xml, read_vasprun),
    Format("JSON", is_json, read_json),
    Format("DOSCAR of VASP or LOBSTER", is_doscar, read_doscar),
    Format(".bands of CASTEP", is_bands, read_bands),
    Format(".pdos of CP2K", is_pdos, read_pdos),
    Format("columns of text", lambda _: True, read_text, uses=TEXT_ALONE),
)
