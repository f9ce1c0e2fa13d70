"""In which order structures are labelled: cheap ones more often first, and more of what models lack."""

from __future__ import annotations

import contextlib
import itertools
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import spglib
from ase import Atoms
from ase.utils import atoms_to_spglib_cell

from dosmatgen_ase.crystals.checks import beyond_bounds, fault
from dosmatgen_ase.data.coverage import ENOUGH
from dosmatgen_ase.dft.settings import MAGNETIC
from dosmatgen_ase.limits import MAX_ATOMS

ORDERS = ("need", "cost", "coverage")

_LATE = {"Fe", "Co", "Ni", "Cu", "Ru", "Rh", "Pd", "Ag"}
_SP_HOSTS = {  # without a partly filled d shell
    *("Li", "Na", "K", "Rb", "Cs", "Be", "Mg", "Ca", "Sr", "Ba", "Cu", "Ag", "Au", "Zn", "Cd", "Hg"),
    *("Al", "Ga", "In", "Tl", "Si", "Ge", "Sn", "Pb", "Sb", "Bi"),
}
_HALOGENS, _SEMICORE = {"F", "Cl", "Br", "I"}, {"Rb", "Cs", "Tl", "Ba"}
_DILUTE = 1 / 3  # share of the late metal up to which its d levels hardly meet
_LARGE = 9  # atoms
_PREFERENCE_LARGE, _PREFERENCE_KIND = 1.5, 2.0  # how much earlier they come
_CLASSES = (1, 3)  # last recipes of those that are replaced first, second and third: off by 13, 9 and 3 %
_NEW_FOR_OLD = 2  # structures without a label for each whose label is outdated


@dataclass(frozen=True, eq=False)
class Candidate:
    """A structure that may be labelled."""

    name: str
    atoms: Atoms
    split: str
    spacegroup: int

    @property
    def cost(self) -> float:
        """Roughly, in units of a cubic cell of 4 atoms and 70 A^3."""
        volume, number = self.atoms.get_volume(), self.spacegroup
        symmetry = 1.0 if number >= 195 else 1.4 if number >= 75 else 2.5 if number >= 16 else 5.0
        magnetic = 1.4 if set(self.atoms.symbols) & set(MAGNETIC) else 1.0
        return float((len(self.atoms) / 4) ** 1.2 * (volume / 70) ** 0.9 * symmetry * magnetic)

    def rank(self, need: bool = False) -> float:
        """Sort by this: a random number that belongs to the name, times a power of the cost; less where in need."""
        drawn = float(np.random.default_rng(zlib.crc32(self.name.encode())).random()) * self.cost**1.25
        if not need:
            return drawn
        large = _PREFERENCE_LARGE if len(self.atoms) >= _LARGE else 1.0
        return drawn / large / (_PREFERENCE_KIND if hard_kinds(self.atoms) else 1.0)


def hard_kinds(atoms: Atoms) -> set[str]:
    """What of a crystal the forward models get wrong more often than the average: names of kinds, or none."""
    symbols = set(atoms.symbols)
    late = symbols & _LATE
    few = sum(symbol in late for symbol in atoms.symbols) <= _DILUTE * len(atoms)
    kinds = {
        "late metal diluted in an sp host": late and symbols - late and few and symbols - late <= _SP_HOSTS,
        "hydride": "H" in symbols and "O" not in symbols,
        "halide": symbols & _HALOGENS,
        "magnetic oxide": "O" in symbols and symbols & set(MAGNETIC),
        "semicore cation": symbols & _SEMICORE,
    }
    return {kind for kind, found in kinds.items() if found}


def spacegroup(atoms: Atoms) -> int:
    """Number of the space group, 1 where spglib finds none; and of a cell that is not labelled anyway."""
    if len(atoms) > MAX_ATOMS or fault(atoms) or beyond_bounds(atoms):  # on some of which spglib ends the process
        return 1
    with contextlib.suppress(spglib.SpglibError):  # or it returns None: a setting of the process
        if (found := spglib.get_symmetry_dataset(atoms_to_spglib_cell(atoms), symprec=1e-3)) is not None:
            return int(found.number)
    return 1


def in_order(
    waiting: Mapping[str, Candidate],
    order: Sequence[str] | str,
    *,
    elements: Mapping[str, int],
    recipes: Mapping[str, int],
    known: Collection[str],
) -> list[str]:
    """Ids of the structures that wait, in the order in which they are computed.

    Parameters
    ----------
    waiting : mapping of id to candidate
    order : one of `ORDERS`, or ids that come first, in this order; then as "need"
    elements : labels that hold each element
    recipes : recipe of the label that a structure has; without one it is new
    known : ids that may be named in `order`

    Raises
    ------
    ValueError
        If the order is none of these, or names an unknown id.
    """
    names = sorted(waiting, key=lambda name: waiting[name].rank(need=order != "cost"))
    first: list[str] = []
    if not isinstance(order, str):
        if unknown := [name for name in order if name not in known]:
            raise ValueError(f"order names {len(unknown)} ids that are not among the structures, such as {unknown[0]}")
        first = [name for name in dict.fromkeys(order) if name in waiting]
    elif order not in ORDERS:
        raise ValueError(f"order={order!r} must be {', '.join(map(repr, ORDERS))} or a list of ids")
    elif order == "coverage":
        counts = Counter(elements)
        for name in names:
            held = set(waiting[name].atoms.symbols)
            if min(counts[symbol] for symbol in held) < ENOUGH:
                first.append(name)
                counts.update(held)
    ahead = set(first)
    rest = [name for name in names if name not in ahead]
    new = [name for name in rest if name not in recipes]
    old = sorted((name for name in rest if name in recipes), key=lambda name: bisect_left(_CLASSES, recipes[name]))
    turns = itertools.zip_longest(*(new[k::_NEW_FOR_OLD] for k in range(_NEW_FOR_OLD)), old)
    return [*first, *(name for turn in turns for name in turn if name is not None)]
