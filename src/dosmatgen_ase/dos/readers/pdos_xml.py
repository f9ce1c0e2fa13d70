"""The ``<pdos>`` of SIESTA (``.PDOS``, ``.PDOS.xml``) and ABACUS (``PDOS``): one curve for each atomic orbital."""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

import numpy as np

from dosmatgen_ase.dos.grid import Array
from dosmatgen_ase.dos.readers.common import Content, Request, naming
from dosmatgen_ase.dos.readers.densities import Densities, even
from dosmatgen_ase.dos.target import TargetDOS

_MAX_NUMBERS = 50_000_000


def is_pdos_xml(content: Content) -> bool:
    """Its first tag."""
    return re.match(r"(?:<\?xml[^>]*\?>\s*)?<pdos\b", content.head) is not None


def read_pdos_xml(content: Content, request: Request) -> TargetDOS:
    """Read the DOS of a site, or the total: that of all orbitals, which are a basis."""
    what = " is not a complete PDOS of SIESTA or ABACUS"
    with naming(content.name, what=what), naming("it is cut off or damaged", ET.ParseError):
        densities = _densities(content, request)
    with naming(content.name, ValueError):
        return densities.target(request.site, request.sigma)


def _densities(content: Content, request: Request) -> Densities:
    energies: Array | None = None
    fermi, spins, siesta = request.efermi, 1, False
    sites: dict[int, Array] = {}
    symbols: dict[int, str] = {}
    for element in _elements(content.data):
        if element.tag == "nspin":
            spins = int(element.text or "")
            if spins not in (1, 2):
                raise ValueError(f"nspin is {spins}: a noncollinear DOS is not read from this file")
        elif element.tag == "fermi_energy" and fermi is None:
            fermi = float(element.text or "")
        elif element.tag == "energy_values":
            if (unit := element.get("units", "eV")) != "eV":
                raise ValueError(f"its energies are in {unit!r}")
            energies = _numbers(element.text)
        elif element.tag == "orbital":
            if energies is None:
                raise ValueError("its energies are missing")
            atom = int(element.get("atom_index", ""))
            values = _numbers(element.findtext("data"))
            if values.size != spins * energies.size or (sites and atom not in sites and atom != len(sites) + 1):
                raise ValueError(f"the values of atom {atom} do not fit its energies, or an atom before is missing")
            if (len(sites) + 1) * values.size > _MAX_NUMBERS:
                raise ValueError(f"it holds more than {_MAX_NUMBERS:,} numbers")
            sites[atom] = sites.get(atom, 0.0) + values.reshape(-1, spins).T
            symbols.setdefault(atom, element.get("species", ""))
            siesta |= "n" in element.attrib  # the shell, which ABACUS does not tell
    if energies is None or not sites or min(sites) != 1:
        raise ValueError("it holds no orbitals, or not those of the first atom")
    if fermi is None or not math.isfinite(fermi):
        raise ValueError("its energies are absolute, and it has no Fermi level: give it as efermi= (--efermi)")
    curves = np.stack(list(sites.values()))  # (sites, spins, G)
    steps = []
    if siesta and spins == 1:
        curves = 2 * curves
        steps.append("doubled: SIESTA counts the states of one spin where it computes one")
    return Densities(
        source=f"{'SIESTA' if siesta else 'ABACUS'} {content.basename}",
        energies=even(energies, 5),
        total=curves.sum(axis=0),
        fermi=fermi,
        sites=curves.sum(axis=1),
        symbols=list(symbols.values()),
        steps=steps,
    )


def _elements(data: bytes) -> Iterator[ET.Element]:
    """The children of ``<pdos>``, one after the other; each is dropped once it is read."""
    root: ET.Element | None = None
    depth = 0
    for event, element in ET.iterparse(io.BytesIO(data), events=("start", "end")):
        depth += 1 if event == "start" else -1
        if depth > 4:
            raise ValueError("its tags are nested too deep")
        root = element if root is None else root
        if event == "end" and depth == 1:
            yield element
            root.clear()


def _numbers(text: str | None) -> Array:
    """Numbers with blanks between them."""
    words = (text or "").split()
    if len(words) > _MAX_NUMBERS:
        raise ValueError(f"it holds more than {_MAX_NUMBERS:,} numbers")
    try:
        return np.array(words, dtype=float)
    except ValueError:
        reason = "a number overflowed its field (****)" if any("*" in word for word in words) else "a word is no number"
        raise ValueError(f"one of its tables cannot be read: {reason}") from None
