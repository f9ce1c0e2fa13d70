"""VASP's ``vasprun.xml``."""

from __future__ import annotations

import io
import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator

import numpy as np

from dosmatgen_ase.dos.grid import Array
from dosmatgen_ase.dos.readers.common import MAX_NEGATIVE, READ_ERRORS, Content, Request, naming, unreadable
from dosmatgen_ase.dos.readers.densities import Densities, even
from dosmatgen_ase.dos.target import TargetDOS

_HEAD = {"generator", "incar", "kpoints", "parameters", "atominfo"}
_MAX_ROWS = 2_000_000  # of one table
_MAX_DEPTH = 100
_FERMI = "i[@name='efermi']"

# Largest negative area of one level, as a share of the positive one, by Methfessel-Paxton order, with a tenth to spare
# for sampling.
_LOBES = {1: 0.0661 * 1.1, 2: 0.1018 * 1.1}


def is_xml(content: Content) -> bool:
    """Whether a file is XML of any kind."""
    return content.head.startswith("<")


def read_vasprun(content: Content, request: Request) -> TargetDOS:
    """Read the DOS of the last ionic step of a ``vasprun.xml``."""
    name = content.name
    _check_root(content)
    try:
        densities = _densities(content)
    except READ_ERRORS as error:
        told = ", it is cut off or damaged" if isinstance(error, ET.ParseError) else ""
        raise unreadable(name, error, f" is not a complete vasprun.xml with a DOS{told}") from None
    with naming(name, ValueError):
        return densities.target(request.site, request.sigma)


def _check_root(content: Content) -> None:
    """Tell what other XML a file is, where that is known."""
    head = content.head
    known = {
        "<PROJECTIONS": "is an atomic_proj.xml of Quantum ESPRESSO: read it with read_espresso",
        "qes:espresso": "is the XML output of pw.x, which holds no DOS: give projwfc.x's or dos.x's output",
        "<html": "is a web page: download the file itself",
        "<!DOCTYPE html": "is a web page: download the file itself",
    }
    for start, told in known.items():
        if start.lower() in head.lower():
            raise ValueError(f"{content.name} {told}; it is not a complete vasprun.xml with a DOS")


def _densities(content: Content) -> Densities:
    """Everything that the target needs; the message of an error goes on from "FILE is not a complete vasprun.xml"."""
    settings: dict[str, str] = {}
    symbols: list[str] = []
    levels: list[Array] = []
    dos: ET.Element | None = None
    last_has_dos, in_lines = False, False
    for element in _blocks(content.data):
        if element.tag in ("incar", "parameters"):
            settings |= {str(i.get("name")): (i.text or "").strip() for i in element.iter("i")}
        elif element.tag == "atominfo":
            atoms = element.find("array[@name='atoms']/set")
            symbols = [] if atoms is None else [(rc.findtext("c") or "").strip() for rc in atoms]
        elif element.tag == "kpoints":
            generation = element.find("generation")
            in_lines = generation is not None and generation.get("param") == "listgenerated"
        elif element.tag == "calculation":
            found = [block for block in element.findall("dos") if block.get("comment") != "kpoints_opt"]
            last_has_dos = bool(found)
            if found:
                dos, eigenvalues = found[-1], element.find("eigenvalues/array/set")
                levels = [] if eigenvalues is None else [_levels(spin) for spin in eigenvalues]
    if dos is None:
        raise ValueError("no ionic step of it holds one")
    noncollinear = _is_on(settings, "LNONCOLLINEAR") or _is_on(settings, "LSORBIT")
    total, ions, noncollinear = _tables(dos, symbols, noncollinear)
    assumptions = []
    if not last_has_dos:
        assumptions.append("structure: the DOS is that of an earlier ionic step, because the last one has none")
    if in_lines:
        assumptions.append("k-points: they lie along lines, so this is not the DOS of the crystal; use a mesh")
    ismear, width = _number(settings, "ISMEAR"), _number(settings, "SIGMA")
    sigma = 0.0 if ismear in (-4, -5, -14, -15) else None
    if ismear == 0 and width is not None:
        sigma = width / math.sqrt(2)
    return Densities(
        source=f"VASP {content.basename}",
        energies=even(total[0][:, 0], 4),
        total=np.array([table[:, 1] for table in total]),
        integrated=np.array([table[:, 2] for table in total]),
        sites=np.array([sum(t[:, 1:].sum(axis=1) for t in ion) for ion in ions]) if ions else None,
        fermi=float(dos.findtext(_FERMI, "")),
        symbols=symbols,
        levels=levels[:1] if noncollinear else levels,
        electrons=_number(settings, "NELECT"),
        sigma=sigma,
        negative_limit=_LOBES.get(int(ismear or 0), MAX_NEGATIVE),
        smearing="any smearing" if ismear is None else f"ISMEAR = {ismear:g}",
        steps=["noncollinear: one electron in a state"] if noncollinear else [],
        assumptions=assumptions,
    )


def _tables(dos: ET.Element, symbols: list[str], noncollinear: bool) -> tuple[list[Array], list[list[Array]], bool]:
    """Tables of each spin of the total and of each ion, which fit each other, and whether they are noncollinear."""
    total = [_table(spin) for spin in dos.findall("total/array/set/set")]
    ions = [[_table(spin) for spin in ion] for ion in dos.findall("partial/array/set/set")]
    if dos.find(_FERMI) is None or not total:
        raise ValueError("its <dos> lacks the Fermi level or the total DOS")
    noncollinear |= any(len(ion) > 2 for ion in ions)
    if noncollinear:  # the other "spins" are the magnetisation along x, y and z
        total, ions = total[:1], [ion[:1] for ion in ions]
    if any(table.shape != total[0].shape or table.shape[1] < 3 for table in total):
        raise ValueError("the columns of its total DOS do not fit together")
    if ions and symbols and len(ions) != len(symbols):
        raise ValueError(f"it has projections of {len(ions)} ions and {len(symbols)} atoms")
    if any(len(ion) != len(total) or any(t.shape[0] != total[0].shape[0] for t in ion) for ion in ions):
        raise ValueError("its projections do not fit its total DOS")
    return total, ions, noncollinear


def _blocks(data: bytes) -> Iterator[ET.Element]:
    """The parts of a vasprun.xml that matter, one after the other; everything else is dropped as it is read."""
    path: list[ET.Element] = []
    for event, element in ET.iterparse(io.BytesIO(data), events=("start", "end")):
        if event == "start":
            path.append(element)
            if len(path) == 1 and element.tag != "modeling":
                raise ValueError(f"its first tag is <{element.tag}>, not <modeling>")
            if len(path) > _MAX_DEPTH:
                raise ValueError(f"its tags are nested more than {_MAX_DEPTH} deep")
            continue
        path.pop()
        if not path:
            return
        tags = [part.tag for part in path[1:3]] + [element.tag]
        kept = tags[0] in _HEAD or (tags[0] == "calculation" and (len(tags) == 1 or tags[1] in ("eigenvalues", "dos")))
        if kept and len(path) == 1:
            yield element
        if not kept or len(path) == 1:
            path[-1].remove(element)
        elif len(path[-1]) > _MAX_ROWS:
            raise ValueError(f"it has a table of more than {_MAX_ROWS:,} rows")
        elif element.tag == "set" and len(element) and element[0].tag == "r":
            texts = [(row.text or "").strip() for row in element]
            if not all(texts):
                raise ValueError("one of its tables has an empty row")
            element.text = "\n".join(texts)
            del element[:]


def _table(rows: ET.Element) -> Array:
    """The numbers of a ``<set>`` of rows."""
    text = (rows.text or "").strip()
    if not text:
        raise ValueError("one of its tables is empty")
    try:
        return np.loadtxt(io.StringIO(text), ndmin=2, comments=None)
    except ValueError as error:
        reason = "a number overflowed its field (****)" if "*" in text else str(error)
        raise ValueError(f"one of its tables is not made of numbers: {reason}") from None


def _levels(spin: ET.Element) -> Array:
    """Eigenvalues (k, bands) of one spin."""
    bands = np.array([_table(point)[:, 0] for point in spin])
    if bands.ndim != 2 or not np.isfinite(bands).all():
        raise ValueError("its eigenvalues are not finite numbers, or not as many at each k-point")
    return np.sort(bands, axis=1)


def _number(settings: dict[str, str], name: str) -> float | None:
    try:
        value = float(settings[name])
    except (KeyError, ValueError):  # absent, or overflowed
        return None
    return value if math.isfinite(value) else None


def _is_on(settings: dict[str, str], name: str) -> bool:
    return settings.get(name, "").strip(". ").upper().startswith("T")
