"""A file of any known form, told by its content: vasprun.xml, JSON, .npz or two-column text."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from os import PathLike
from pathlib import Path

import numpy as np

from dosmatgen_ase.dos.broadening import scale_sites_to_total
from dosmatgen_ase.dos.readers.common import check_site, named, read_bytes
from dosmatgen_ase.dos.readers.text import parse_text
from dosmatgen_ase.dos.target import TargetDOS


def read_file(
    path: str | PathLike[str], site: int | None, *, reference: str | None, sigma: float | None, kind: str | None
) -> TargetDOS:
    """What `TargetDOS.from_file` does."""
    content = read_bytes(path)
    head = content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if content.startswith(b"PK"):
        target = parse_npz(content, str(path), site)
    elif head == b"<":
        target = TargetDOS.from_vasprun(path, site)
    elif head == b"{":
        target = parse_json(content, str(path), site)
    else:
        if site is not None:
            raise ValueError(f"{path} is a two-column file with one DOS: leave out site")
        target = parse_text(content, str(path), None, "site")
    stated = {"reference": reference, "sigma": sigma, "kind": kind}
    return replace(target, **{k: v for k, v in stated.items() if v is not None})  # type: ignore[arg-type]


def parse_json(content: bytes, name: str, site: int | None) -> TargetDOS:
    """Read `TargetDOS.to_dict`, a pymatgen dict or a result of ``dosmatgen dft``."""
    try:
        data = json.loads(content)
    except ValueError as error:
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
        return named(name, TargetDOS.from_dict, result["total"] if site is None else result["sites"][site])
    if site is not None:
        raise ValueError(f"{name} holds one DOS: leave out site")
    return named(name, TargetDOS.from_dict, data)


def parse_npz(content: bytes, name: str, site: int | None) -> TargetDOS:
    """Read the projections of one structure in the layout of the label set."""
    wanted = ("energies", "total", "pdos", "emax", "gap")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            energies, total, pdos, e_max, gap = (np.asarray(arrays[key], dtype=float) for key in wanted)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name} is not an .npz with {', '.join(wanted)} ({error})") from None
    # The layout is that of the label set, whose broadening is 0.1 eV.
    reference, sigma, record = "vbm" if gap > 0 else "fermi", 0.1, {"source": f"npz {Path(name).name}"}
    if site is None:
        return named(name, TargetDOS, energies, total, energies <= e_max, reference, sigma, "total", record)
    check_site(site, len(pdos))
    scaled, known = scale_sites_to_total(pdos.sum(axis=1), total, energies=energies, e_max=float(e_max))
    steps = {"steps": [f"site {site}, sites scaled to add up to the total"]}
    return named(name, TargetDOS, energies, scaled[site], known, reference, sigma, "site", record | steps)
