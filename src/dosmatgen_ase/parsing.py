"""What a user may write for elements, sites, sizes, formulas and targets, and one error for each that is wrong.

Python, the Makers and the command line all read their arguments here. Whatever counts as a whole number, a list or an
element is taken as one: numpy integers and arrays, ``range``, sets, atomic numbers, pymatgen's Element, Species and
Composition, ASE's Formula. Text is never taken for a list in Python; the functions ``..._from_text`` are for the
command line.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from dosmatgen_ase.limits import MAX_ATOMIC_NUMBER, MAX_ATOMS

if TYPE_CHECKING:
    from dosmatgen_ase.dos import TargetDOS


class HasAtomicNumber(Protocol):
    """An element of another library, such as pymatgen's Element and Species."""

    @property
    def Z(self) -> int:
        """Atomic number."""
        ...


ElementLike = str | int | HasAtomicNumber
DOSInput: TypeAlias = "TargetDOS | Sequence[TargetDOS] | Mapping[int, TargetDOS] | None"


def _members(given: Any) -> list[Any] | None:
    """What is in a list, array, range, set and so on; None for text and for what is no list."""
    try:
        return None if isinstance(given, str) else list(given)
    except TypeError:
        return None


def _in_order(given: Any, read: tuple[Any, ...]) -> tuple[Any, ...]:
    """What was read of a list; that of a set is sorted, as its own order may be another in each process."""
    return tuple(sorted(read)) if isinstance(given, set | frozenset) else read


# -- numbers -----------------------------------------------------------------------------------------------------------


def is_whole(value: Any) -> bool:
    """Whether this is an integer of Python or numpy; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Whether this is a number of Python or numpy; True and False are not, nor is what no float can hold."""
    if is_whole(value):
        return bool(abs(value) < 2**1000)
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def whole_number(value: Any, name: str, low: int, high: int | None = None) -> int:
    """Return an integer within bounds.

    Raises
    ------
    ValueError
        If it is not one, or lies outside.
    """
    if not is_whole(value) or value < low or (high is not None and value > high):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}={value!r} must be a whole number {bounds}")
    return int(value)


def cell_sizes(num_atoms: Any) -> tuple[int, ...] | None:
    """Atoms per cell, one or several.

    Raises
    ------
    ValueError
        If one is no whole number from 1 to `MAX_ATOMS`.
    """
    if num_atoms is None:
        return None
    sizes = [num_atoms] if is_whole(num_atoms) else _members(num_atoms)
    if not sizes or not all(map(is_whole, sizes)):
        raise ValueError(f"num_atoms={num_atoms!r} must be a whole number or a list of them")
    if outside := [size for size in sizes if not 1 <= size <= MAX_ATOMS]:
        raise ValueError(f"num_atoms={outside[0]} must lie between 1 and {MAX_ATOMS}")
    return _in_order(num_atoms, tuple(int(size) for size in sizes))


def site_numbers(sites: Any, name: str) -> tuple[int, ...]:
    """Sites, counted from 0.

    Raises
    ------
    TypeError
        If this is no list of whole numbers.
    """
    chosen = _members(sites)
    if chosen is None:
        raise TypeError(f"{name} must be a list of sites such as [0], not {sites!r}")
    if not all(map(is_whole, chosen)):
        raise TypeError(f"{name} must name sites by whole numbers, counted from 0, not {chosen!r}")
    return _in_order(sites, tuple(int(i) for i in chosen))


# -- elements ----------------------------------------------------------------------------------------------------------


def element(value: Any, name: str) -> str:
    """Return the symbol of an element.

    Raises
    ------
    ValueError
        If it is none, or beyond `MAX_ATOMIC_NUMBER`.
    """
    from ase.data import atomic_numbers, chemical_symbols

    z = atomic_numbers.get(value, 0) if isinstance(value, str) else value
    # Not isinstance: from Python 3.12 on it does not see a Z that pymatgen's Species takes from its element.
    z = getattr(z, "Z", z)
    if not is_whole(z) or not 1 <= z <= MAX_ATOMIC_NUMBER:
        meant = value.strip().capitalize() if isinstance(value, str) else ""
        known = 1 <= atomic_numbers.get(meant, 0) <= MAX_ATOMIC_NUMBER
        fix = f"did you mean {meant!r}?" if known else "use a symbol such as 'Co'"
        raise ValueError(f"{name}={value!r} is not an element from H to Pu: {fix}")
    return str(chemical_symbols[int(z)])


def element_list(elements: Any, name: str) -> tuple[str, ...] | None:
    """Symbols of elements, each once.

    Raises
    ------
    TypeError
        If this is no list. The error shows the list that was meant.
    ValueError
        As `element`.
    """
    if elements is None:
        return None
    chosen = _members(elements)
    if chosen is None:
        meant = re.findall(r"[A-Z][a-z]?", elements) if isinstance(elements, str) else []
        raise TypeError(f"{name} must be a list such as {meant or ['Ni', 'Au']}, not {elements!r}")
    return _in_order(elements, tuple(dict.fromkeys(element(e, name) for e in chosen)))


def site_elements(pins: Any, name: str = "fixed_species") -> dict[int, str]:
    """Elements of single sites.

    Raises
    ------
    TypeError
        If this is no mapping of whole numbers.
    ValueError
        As `element`.
    """
    if not isinstance(pins, Mapping):
        raise TypeError(f"{name} must name the element of each site, such as {{0: 'Co'}}, not {pins!r}")
    sites = site_numbers(pins, name)
    return {i: element(value, f"{name}[{i}]") for i, value in zip(sites, pins.values(), strict=True)}


def formula_counts(composition: Any) -> dict[str, int] | None:
    """Atoms of each element in a formula.

    Raises
    ------
    ValueError
        If it is no formula of whole numbers.
    """
    from ase.formula import Formula

    if composition is None:
        return None
    try:
        counts = composition if isinstance(composition, Mapping) else Formula(str(composition).strip()).count()
    except ValueError as error:
        raise ValueError(f"composition={composition!r} is not a formula: write it as 'NiAu3'") from error
    whole = (is_real(c) and c > 0 and c % 1 == 0 for c in counts.values())
    if not counts or not all(whole):
        raise ValueError(
            f"composition={composition!r} must count at least one atom of each element it names, in whole numbers"
        )
    found: dict[str, int] = {}
    for key, count in counts.items():  # Fe2+ and Fe3+ are one element
        symbol = element(key, "composition")
        found[symbol] = found.get(symbol, 0) + int(count)
    return found


# -- targets -----------------------------------------------------------------------------------------------------------


def split_targets(dos: Any, sites: Any = None) -> tuple[TargetDOS | None, dict[int, TargetDOS]]:
    """Split what was given as ``dos`` into a target for the total of the cell and targets by site.

    Raises
    ------
    TypeError, ValueError
        If it is neither a target, nor several, nor None, or contradicts ``sites``.
    """
    from dosmatgen_ase.dos import TargetDOS

    if sites is not None and not isinstance(dos, TargetDOS):
        raise ValueError("sites goes with one target: with a list or a mapping of targets, leave it out")
    if isinstance(dos, set | frozenset):
        raise TypeError("dos is a set, which has no order: give a list, or a mapping {site: TargetDOS}")
    if dos is None:
        return None, {}
    if isinstance(dos, TargetDOS):
        if dos.kind == "total":
            if sites is not None:
                raise ValueError(
                    "sites contradicts a target of kind 'total', which belongs to the cell: drop one of them"
                )
            return dos, {}
        chosen = (0,) if sites is None else site_numbers(sites, "sites")
        if not chosen:
            raise ValueError("sites is empty: name at least one site, or leave it out for site 0")
        return None, dict.fromkeys(chosen, dos)
    pairs = dict(dos) if isinstance(dos, Mapping) else dict(enumerate(dos)) if is_list(dos) else {}
    if not pairs or not all(isinstance(target, TargetDOS) for target in pairs.values()):
        raise TypeError(
            "dos must be a TargetDOS, a list of them, a mapping {site: TargetDOS}, or None: see TargetDOS.from_*"
        )
    if any(target.kind == "total" for target in pairs.values()):
        raise ValueError("a target of kind 'total' belongs to the cell: give it alone, not in a list or mapping")
    return None, dict(zip(site_numbers(pairs, "dos"), pairs.values(), strict=True))


def is_list(dos: Any) -> bool:
    """Whether several targets were given without their sites: then the list has every site of the cell."""
    from dosmatgen_ase.dos import TargetDOS

    return isinstance(dos, Iterable) and not isinstance(dos, TargetDOS | Mapping | str)


# -- text of the command line ------------------------------------------------------------------------------------------


def numbers_from_text(text: str) -> list[int]:
    """``"4-7"``, ``"4,6"`` or ``"4"`` as a list; ``ValueError`` for another text."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,3})(?:-(\d{1,3}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ValueError(f"{text!r} must be like 4, 4,6 or 4-7")
        found += range(first, last + 1)
    return found


def names_from_text(text: str) -> list[str]:
    """``"Ni,Au"`` as ``["Ni", "Au"]``."""
    return [name.strip() for name in text.split(",")]


def pins_from_text(texts: Iterable[str]) -> dict[int, str]:
    """``["0=Co"]`` as ``{0: "Co"}``; ``ValueError`` for another text."""
    found: dict[int, str] = {}
    for text in texts:
        match = re.fullmatch(r"\s*(\d{1,3})\s*=\s*([A-Za-z]{1,2})\s*", text)
        if match is None:
            raise ValueError(f"{text!r} must be like 0=Co")
        if int(match[1]) in found:
            raise ValueError(f"site {int(match[1])} is named twice")
        found[int(match[1])] = match[2]
    return found
