"""``DOSCAR`` of VASP, and ``DOSCAR.lobster`` of LOBSTER, which has the same layout."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import numpy as np

from dosmatgen_ase.dos.grid import Array
from dosmatgen_ase.dos.readers.common import Content, Request, naming
from dosmatgen_ase.dos.readers.densities import Densities, even
from dosmatgen_ase.dos.target import TargetDOS

# Fortran leaves out the E of an exponent with three digits, and the blank before a minus.
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[EeDd][+-]?\d+|[+-]\d{3}(?![\d.]))?"
# Ends of the window, number of energies, Fermi level, weight; LOBSTER adds element and orbitals of an atom.
_SECTION = re.compile(rf"^\s*({_NUMBER})\s*({_NUMBER})\s+(\d+)\s*({_NUMBER})\s+({_NUMBER})\s*(;.*)?$")
# "DOS and projected DOS file by LOBSTER. Energy is shifted such that the Fermi level lies at 0 eV."
_BY_LOBSTER = re.compile(r"\bby\s+LOBSTER\b.*\bFermi level\b", re.IGNORECASE)
_MAX_ENERGIES, _MAX_LINES = 2_000_000, 10_000_000


def is_doscar(content: Content) -> bool:
    """Four whole numbers in the first line, five numbers in the second, and the window in the sixth."""
    lines = content.head.splitlines()[:6]
    if len(lines) < 6 or not re.fullmatch(r"\s*\d+(?:\s+\d+){3}\s*", lines[0]):
        return False
    return len(re.findall(_NUMBER, lines[1])) >= 4 and _SECTION.match(lines[5]) is not None


def read_doscar(content: Content, request: Request) -> TargetDOS:
    """Read the total DOS or one site's."""
    with naming(content.name, (IndexError, ValueError)):
        return _densities(content).target(request.site, request.sigma)


def _densities(content: Content) -> Densities:
    if content.data.count(b"\n") > _MAX_LINES:
        raise ValueError(f"it has more than {_MAX_LINES:,} lines")
    lines = content.data.decode("utf-8", errors="replace").lstrip().splitlines()  # an editor may leave blank lines
    num_ions, sections, headers = int(lines[0].split()[1]), [], list[re.Match[str]]()
    start = 5
    while start < len(lines) and lines[start].strip():
        header = _SECTION.match(lines[start])
        if header is None:
            raise ValueError(f"line {start + 1}: expected the window of a DOS, found {lines[start].strip()[:40]!r}")
        size = int(header[3])
        if not 2 <= size <= _MAX_ENERGIES:
            raise ValueError(f"line {start + 1}: a DOS of {size} energies")
        headers.append(header)
        sections.append(_rows(lines, start + 1, size))
        start += 1 + size
    total, ions = sections[0], sections[1:]
    spins = {3: 1, 5: 2}.get(total.shape[1])
    if spins is None:
        raise ValueError(f"its total DOS has {total.shape[1]} columns: expected 3, or 5 with two spins")
    if ions and len(ions) != num_ions and len(ions) != int(lines[0].split()[0]):
        raise ValueError(f"it has projections of {len(ions)} ions and {num_ions} atoms: it is cut off")
    if any(len(ion) != len(total) for ion in ions):
        raise ValueError("its projections and its total DOS have different energies")
    low, high, fermi = (_float(headers[0][i]) for i in (2, 1, 4))
    low, high = min(low, high), max(low, high)
    lobster = any(header[6] for header in headers) or _is_shifted(lines[4], total[0, 0], low, fermi)
    energies = even(total[:, 0], 3)
    if not lobster and abs(total[[0, -1], 0] - [low, high]).max() <= 0.011:
        energies = np.linspace(low, high, len(total))  # the column has fewer digits
    steps = []
    if noncollinear := not lobster and spins == 1 and any(_is_noncollinear(lines[0], ion) for ion in ions):
        steps.append("noncollinear: one electron in a state")
    return Densities(
        source=f"{'LOBSTER' if lobster else 'VASP'} {content.basename}",
        energies=energies,
        total=total[:, 1 : 1 + spins].T,
        integrated=total[:, 1 + spins :].T,
        sites=np.array([ion[:, 1 :: 4 if noncollinear else 1].sum(axis=1) for ion in ions]) if ions else None,
        fermi=0.0 if lobster else fermi,
        no_sites="leave out site, or run LOBSTER / VASP with LORBIT = 11",
        steps=steps,
    )


def _is_shifted(title: str, first: float, low: float, fermi: float) -> bool:
    """Whether the energies start from the Fermi level, as LOBSTER's do; the window in its header is on VASP's scale.

    Where the energies start with the window, they are not shifted, whatever the title says. LOBSTER's name alone is no
    sign: it may stand in any title.
    """
    if abs(first - low) <= 0.01 < abs(fermi):
        return False
    return _BY_LOBSTER.search(title) is not None or abs(first + fermi - low) + 0.01 < abs(first - low)


def _is_noncollinear(header: str, ion: Array) -> bool:
    """Four columns an orbital, the last three the magnetisation; the first line ends with the number of components."""
    return header.split()[3] == "4" or ion.shape[1] - 1 in (12, 36, 64)


def _rows(lines: Sequence[str], start: int, size: int) -> Array:
    text = lines[start : start + size]
    if len(text) < size:
        raise ValueError(f"it is cut off: {len(text)} of {size} energies from line {start + 1} on")
    if any("*" in line for line in text):
        number = next(i for i, line in enumerate(text) if "*" in line)
        raise ValueError(f"line {start + number + 1}: a number overflowed its field (****)")
    try:
        return np.loadtxt(io.StringIO("\n".join(text)), ndmin=2, comments=None)
    except ValueError:
        return np.array([_numbers(line, start + i + 1) for i, line in enumerate(text)])


def _numbers(line: str, number: int) -> list[float]:
    """Numbers of a line that Fortran wrote: without E in 0.1-100, without a blank before a minus."""
    words = re.findall(_NUMBER, line)
    if re.sub(_NUMBER, "", line).strip():
        raise ValueError(f"line {number}: expected numbers, found {line.strip()[:40]!r}")
    return [_float(word) for word in words]


def _float(word: str) -> float:
    word = re.sub("[Dd]", "E", word)
    return float(word if "E" in word.upper() else re.sub(r"(?<=[\d.])([+-])", r"E\1", word))
