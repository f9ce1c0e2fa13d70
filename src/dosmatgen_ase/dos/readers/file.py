"""A file of any known form, told by its content: one table of formats, asked in order."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dosmatgen_ase.dos.broadening import scale_sites_to_total
from dosmatgen_ase.dos.readers.common import Content, Request, check_site, named, read_bytes, record
from dosmatgen_ase.dos.readers.text import parse_text
from dosmatgen_ase.dos.target import TargetDOS


class Format(NamedTuple):
    """A form of file: `recognises` looks at its content, `read` makes the target."""

    name: str
    recognises: Callable[[Content], bool]
    read: Callable[[Content, Request], TargetDOS]


def read_file(path: str | PathLike[str], request: Request) -> TargetDOS:
    """What `TargetDOS.from_file` does: the first format of `FORMATS` that recognises the content reads it."""
    content = Content(str(path), read_bytes(path))
    chosen = next(form for form in FORMATS if form.recognises(content))
    target = chosen.read(content, request)
    stated = {name: getattr(request, name) for name in ("reference", "sigma", "kind")}
    return replace(target, **{name: value for name, value in stated.items() if value is not None})


def _read_vasprun(content: Content, request: Request) -> TargetDOS:
    return TargetDOS.from_vasprun(content.name, request.site)


def _read_columns(content: Content, request: Request) -> TargetDOS:
    if request.site is not None:
        raise ValueError(f"{content.name} is a two-column file with one DOS: leave out site")
    return parse_text(content.data, content.name, None, "site")


def read_json(content: Content, request: Request) -> TargetDOS:
    """Read `TargetDOS.to_dict`, a pymatgen dict or a result of ``dosmatgen dft``."""
    name, site = content.name, request.site
    try:
        data = json.loads(content.data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON ({error})") from None
    if "densities" in data:
        return named(name, TargetDOS.from_pymatgen, data, site)
    if "failed" in data:
        raise ValueError(f"{name} tells of a calculation that failed: {data['failed']}")
    result = data.get("result", data)
    if isinstance(result, dict) and {"sites", "total"} <= set(result):  # what `dosmatgen dft` wrote
        if not isinstance(result["sites"], list):
            raise ValueError(f'{name}: "sites" must be a list with one DOS of each site')
        if site is not None:
            check_site(site, len(result["sites"]))
        chosen = result["total"] if site is None else result["sites"][site]
        if chosen is None:  # `dosmatgen predict` writes it for an element without labels
            whose = "the total DOS" if site is None else f"the DOS of site {site}"
            raise ValueError(f"{name}: {whose} is unknown there; name a site whose DOS is known")
        return named(name, TargetDOS.from_dict, chosen)
    if site is not None:
        raise ValueError(f"{name} holds one DOS: leave out site")
    return named(name, TargetDOS.from_dict, data)


def read_npz(content: Content, request: Request) -> TargetDOS:
    """Read the projections of one structure in the layout of the label set."""
    name, site = content.name, request.site
    wanted = ("energies", "total", "pdos", "emax", "gap")
    try:
        with np.load(io.BytesIO(content.data), allow_pickle=False) as arrays:
            energies, total, pdos, e_max, gap = (np.asarray(arrays[key], dtype=float) for key in wanted)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name} is not an .npz with {', '.join(wanted)} ({error})") from None
    # The layout is that of the label set, whose broadening is 0.1 eV.
    reference, sigma, source = "vbm" if gap > 0 else "fermi", 0.1, f"npz {Path(name).name}"
    if site is None:
        return named(name, TargetDOS, energies, total, energies <= e_max, reference, sigma, "total", record(source))
    check_site(site, len(pdos))
    scaled, known = scale_sites_to_total(pdos.sum(axis=1), total, energies=energies, e_max=float(e_max))
    told = record(source, [f"site {site}, sites scaled to add up to the total"])
    return named(name, TargetDOS, energies, scaled[site], known, reference, sigma, "site", told)


# To add a format: one line here, before the last, which takes what nothing else knows.
FORMATS = (
    Format(".npz", lambda content: content.data.startswith(b"PK"), read_npz),
    Format("vasprun.xml", lambda content: content.head.startswith("<"), _read_vasprun),
    Format("JSON", lambda content: content.head.startswith("{"), read_json),
    Format("columns of text", lambda _: True, _read_columns),
)
