"""CP2K's ``.pdos``: levels of one k-point and what each holds of a kind of atoms, broadened here."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dosmatgen_ase.dos.grid import MIN_GAP, MODEL_SIGMA, Array
from dosmatgen_ase.dos.readers.common import Content, Request, clip_negative_lobes, naming, read_bytes, record
from dosmatgen_ase.dos.readers.layouts import other_spin
from dosmatgen_ase.dos.readers.levels import broadened
from dosmatgen_ase.dos.readers.zeros import ENERGY_UNITS
from dosmatgen_ase.dos.target import TargetDOS

_TITLE = re.compile(
    r"# Projected DOS for (?:atomic kind (?P<kind>\S+)|list +\d+ +of +(?P<atoms>\d+) +atoms).*"
    r"E\(Fermi\) += +(?P<fermi>\S+) +(?P<unit>a\.u\.|eV)"
)
_HEADER = re.compile(r"#\s+MO\s+Eigenvalue \[(?P<unit>a\.u\.|eV)\]\s+Occupation\s+(?P<orbitals>.+)")
_UNITS = {"a.u.": ENERGY_UNITS["ha"], "eV": 1.0}
_FILLED = 0.5  # share of the electrons that a level can hold
_ROUNDING = 0.02  # of that share: farther from none and from all the level is partly filled


@dataclass(frozen=True)
class _File:
    """Kind (or None) and number of atoms (0: not told), Fermi level, levels, their electrons and projections."""

    kind: str | None
    atoms: int
    fermi: float
    levels: Array
    electrons: Array
    held: Array


def is_pdos(content: Content) -> bool:
    """The words of its first line."""
    return content.head.startswith("# Projected DOS for ")


def read_pdos(content: Content, request: Request) -> TargetDOS:
    """Read the DOS of one atom: the mean over the atoms of a list, or the sum over those of a kind."""
    if request.site is not None:
        raise ValueError(f"{content.name} holds the DOS of one kind or list of atoms: leave out site")
    with naming(content.name, what=" is not a .pdos file of CP2K that can be read"):
        return _target(content)


def _target(content: Content) -> TargetDOS:
    first = _parsed(content.data)
    steps: list[str] = []
    spins = [first]
    full = 2.0 if first.electrons.max() > 1 + _ROUNDING else 1.0
    if full == 1.0:
        other = other_spin(Path(content.name), (("ALPHA", "BETA"),))
        if other is None:
            one = "a level holds one electron at most, so it is of one spin"
            raise ValueError(f"{one}: name it as CP2K does, ...-ALPHA_k1-1.pdos")
        if not other.is_file():
            raise ValueError(f"it holds one spin: put {other.name} beside it")
        spins.append(_parsed(read_bytes(other)))
        steps.append(f"the other spin added from {other.name}")
    if any((file.kind, file.atoms) != (first.kind, first.atoms) for file in spins):
        raise ValueError("the file of the other spin is of other atoms")
    levels = np.concatenate([file.levels for file in spins])
    share = np.concatenate([file.electrons for file in spins]) / full
    zero, reference, assumed = _zero(levels, share, max(file.fermi for file in spins))
    states = full * np.concatenate([file.held for file in spins]) / max(first.atoms, 1)
    if not states.any():
        raise ValueError("its projections are zero everywhere")
    energies, values = broadened(levels, states, min(float(file.levels.max()) for file in spins))
    values, note = clip_negative_lobes(values)
    if first.kind is not None:
        assumed.append(f"one {first.kind} in the cell, as the file adds all {first.kind} atoms")
    elif first.atoms > 1:
        steps.append(f"mean over the {first.atoms} atoms of the list")
    steps += [f"{len(first.levels)} levels of one k-point, broadened", f"zero of energy at {zero:.4f} eV ({reference})"]
    told = record(f"CP2K {content.basename}", [*steps, *note], assumed)
    known = np.ones(energies.size, dtype=bool)
    return TargetDOS(energies - zero, values, known, reference, MODEL_SIGMA, "site", told)


def _parsed(data: bytes) -> _File:
    """What a file holds, in eV."""
    lines = data.decode("utf-8", errors="replace").strip("\ufeff \r\n").splitlines()
    title, header = _TITLE.match(lines[0]), _HEADER.match(lines[1]) if len(lines) > 1 else None
    if title is None or header is None or len(lines) < 3:
        raise ValueError("its first two lines lack the Fermi level or the names of the columns, or nothing follows")
    if sum(line.lstrip().startswith("#") for line in lines) > 2:
        raise ValueError("it holds several steps or k-points: keep the lines of one, with their two lines of header")
    rows = np.loadtxt(io.StringIO("\n".join(lines[2:])), ndmin=2)
    if rows.shape[1] != 3 + len(header["orbitals"].split()):
        raise ValueError(f"its rows have {rows.shape[1]} numbers: more or fewer than its columns")
    fermi = float(title["fermi"]) * _UNITS[title["unit"]]
    if not (np.isfinite(rows).all() and np.isfinite(fermi)):
        raise ValueError("its levels, occupations and projections must be finite numbers")
    atoms = int(title["atoms"] or 0)
    return _File(title["kind"], atoms, fermi, rows[:, 1] * _UNITS[header["unit"]], rows[:, 2], rows[:, 3:].sum(axis=1))


def _zero(levels: Array, share: Array, fermi: float) -> tuple[float, str, list[str]]:
    """Zero of energy, what it is, and what is assumed of it; `share` is how far each level is filled."""
    filled = share > _FILLED
    vbm = float(levels[filled].max()) if filled.any() else fermi
    if not filled.any() or ((share > _ROUNDING) & (share < 1 - _ROUNDING)).any():
        return fermi, "fermi", []
    if filled.all():
        return vbm, "vbm", ["zero of energy: the highest level, taken for the valence-band maximum, as none is empty"]
    gap = float(levels[~filled].min()) - vbm
    return (vbm, "vbm", []) if gap >= MIN_GAP else (fermi, "fermi", [])
