"""JSON: `TargetDOS.to_dict`, the dict of a pymatgen DOS, or a result of ``dosmatgen dft``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dosmatgen_ase.dos.readers.common import Content, Request, check_site, naming, record
from dosmatgen_ase.dos.readers.pymatgen import is_dict_of_dos, read_pymatgen
from dosmatgen_ase.dos.target import TargetDOS

_MAX_BRACKETS, _MAX_COMMAS = 5_000_000, 20_000_000  # a list or dict takes 60 bytes and more, a number 32
_DEFAULTS = {
    "reference": "zero of energy: taken as the Fermi level, because the file does not say (--reference)",
    "kind": "kind: taken as the DOS of one site, because the file does not say (--kind)",
}


def is_json(content: Content) -> bool:
    """Whether a file starts as a JSON object or list."""
    return content.head.startswith(("{", "["))


def read_json(content: Content, request: Request) -> TargetDOS:
    """Read any of them, also as the only entry of a list or dict (``{"mp-149": {...}}``)."""
    name, site = content.name, request.site
    if content.data.count(b"[") + content.data.count(b"{") > _MAX_BRACKETS:
        raise ValueError(f"{name} holds more than {_MAX_BRACKETS:,} lists and dicts: this is no DOS")
    if content.data.count(b",") > _MAX_COMMAS:
        raise ValueError(f"{name} holds more than {_MAX_COMMAS:,} numbers: this is no DOS")
    try:
        data = json.loads(content.data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON ({' '.join(str(error).split())})") from None
    data = _only_entry(data, name)
    if is_dict_of_dos(data):
        with naming(name):
            return read_pymatgen(data, site, request.sigma)
    if "failed" in data:
        raise ValueError(f"{name} tells of a calculation that failed: {' '.join(str(data['failed']).split())[:300]}")
    result = data.get("result", data)
    if isinstance(result, dict) and {"sites", "total"} <= set(result):  # what `dosmatgen dft` wrote
        if not isinstance(result["sites"], list):
            raise ValueError(f'{name}: "sites" must be a list with one DOS of each site')
        if site is not None:
            with naming(name, ValueError):
                check_site(site, len(result["sites"]))
        chosen = result["total"] if site is None else result["sites"][site]
        if chosen is None:  # `dosmatgen predict` writes it for an element without labels
            whose = "the total DOS" if site is None else f"the DOS of site {site}"
            raise ValueError(f"{name}: {whose} is unknown there; name a site whose DOS is known")
        with naming(name):
            return TargetDOS.from_dict(chosen)
    if site is not None:
        raise ValueError(f"{name} holds one DOS: leave out site")
    return _own(data, name, request)


def _own(data: Mapping[str, Any], name: str, request: Request) -> TargetDOS:
    """Read `TargetDOS.to_dict`; what it leaves out is assumed, and told."""
    with naming(name):
        target = TargetDOS.from_dict(data)
    left_out = {field: getattr(request, field) for field in _DEFAULTS if field not in data}
    target = replace(target, **{field: value for field, value in left_out.items() if value is not None})
    sentences = [_DEFAULTS[field] for field, value in left_out.items() if value is None]
    if not sentences:
        return target
    source = str(target.provenance.get("source", f"JSON {name}"))
    told = {**target.provenance, **record(source, target.provenance.get("steps", []), sentences)}
    with naming(name, ValueError):
        return replace(target, provenance=told)


def _only_entry(data: Any, name: str) -> dict[str, Any]:
    """The one DOS in a list, or under a key such as a material's number, unless it is the object itself."""
    for _ in range(3):
        if isinstance(data, dict):
            if is_dict_of_dos(data) or set(data) & {"energies", "values", "failed", "result", "sites", "total"}:
                return data
            entries = list(data.values())
        elif isinstance(data, list):
            entries = data
        else:
            break
        found = [entry for entry in entries if _holds_dos(entry)]
        if len(found) > 1:
            raise ValueError(f"{name} holds {len(found)} DOS: keep one of them")
        if not found:
            break
        data = found[0]
    if isinstance(data, dict):
        return data
    raise ValueError(f'{name} is JSON, but no DOS: it needs "energies" and "values" or "densities"')


def _holds_dos(entry: Any) -> bool:
    if isinstance(entry, dict):
        return is_dict_of_dos(entry) or {"energies", "values"} <= set(entry) or any(map(is_dict_of_dos, entry.values()))
    return isinstance(entry, list) and any(map(is_dict_of_dos, entry))
