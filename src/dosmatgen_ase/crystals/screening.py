"""Accept or reject generated structures, with a reason: by geometry, as duplicates, as known crystals.

The checks run from cheap to dear, and each one makes the next safe: numbers are finite, then the cell has a volume,
then the distances are searched, with a bound on the images; only what passes is compared with other crystals. Passing
says nothing about the energy of a structure.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from dosmatgen_ase.crystals.checks import MIN_VOLUME_PER_ATOM, fault, too_many_or_far, too_skewed
from dosmatgen_ase.crystals.convert import to_structure

if TYPE_CHECKING:
    from ase import Atoms
    from numpy.typing import NDArray
    from pymatgen.core import Structure

MAX_DRAWN_VOLUME_PER_ATOM = 100.0  # A^3; of what a model draws freely
MAX_GIVEN_VOLUME_PER_ATOM = 1000.0  # A^3; of a cell that was given: a slab has vacuum, caesium alone has 111
_MAX_DISTANCES = 2_000_000  # about 0.2 s: all pairs of 2,000 atoms; a Niggli-reduced cell of 20 atoms needs 10,000


@dataclass(frozen=True)
class Screening:
    """Outcome of :func:`screen`.

    Attributes
    ----------
    accepted
        Whether every check passed.
    reason
        One line naming the first check that failed, None if accepted.
    min_distance
        Smallest distance between two atoms or an atom and its own image, Angstrom; None if not reached.
    volume_per_atom
        Angstrom^3 per atom; None if not reached.
    """

    accepted: bool
    reason: str | None
    min_distance: float | None
    volume_per_atom: float | None


def right_handed(atoms: Atoms) -> Atoms:
    """Return a copy whose cell is right-handed: (a, b, c) -> (-a, -b, -c) is the same lattice and moves no atom."""
    copy = atoms.copy()
    if np.linalg.det(np.asarray(atoms.cell)) < 0:
        copy.set_cell(-np.asarray(atoms.cell), apply_constraint=False)
    return copy


def digest(atoms: Atoms) -> str:
    """SHA-256 of cell, positions and species: that of the very same numbers, not of the same crystal."""
    parts = (np.asarray(atoms.cell), atoms.positions, atoms.numbers.astype(np.int64))
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


def screen(
    atoms: Atoms,
    *,
    min_distance: float = 0.5,
    min_volume_per_atom: float = MIN_VOLUME_PER_ATOM,
    max_volume_per_atom: float = MAX_DRAWN_VOLUME_PER_ATOM,
) -> Screening:
    """Screen one structure: a crystal (`fault`), right-handed, of sensible density, no atoms on top of others.

    A structure is never an error, however broken: it is rejected with a reason.

    Parameters
    ----------
    atoms
        The structure, as it comes from the sampler.
    min_distance
        Smallest distance allowed, Angstrom; periodic images, an atom's own included, count.
    min_volume_per_atom, max_volume_per_atom
        Density window, Angstrom^3 per atom.

    Raises
    ------
    ValueError
        If a limit is negative or not finite, or the window is empty.
    """
    limits = (min_distance, min_volume_per_atom, max_volume_per_atom)
    if not all(math.isfinite(limit) and limit >= 0 for limit in limits):
        raise ValueError(f"screening limits must be finite and not negative, got {limits}")
    if min_volume_per_atom >= max_volume_per_atom:
        raise ValueError(
            f"min_volume_per_atom {min_volume_per_atom} must lie below max_volume_per_atom {max_volume_per_atom}"
        )

    cell = np.asarray(atoms.cell, dtype=float)
    if told := fault(atoms):
        return Screening(False, f"it {told}", None, None)

    with np.errstate(over="ignore", invalid="ignore"):  # an absurd cell may overflow: inf and NaN fail the checks below
        normals = np.cross(cell[[1, 2, 0]], cell[[2, 0, 1]])
        volume = float(cell[0] @ normals[0])
        per_atom = volume / len(atoms)
    if volume < 0:
        return Screening(False, "left-handed cell", None, abs(per_atom))
    if not per_atom >= min_volume_per_atom:
        return Screening(False, f"{per_atom:.3g} A^3 per atom, less than {min_volume_per_atom:g}", None, per_atom)
    if not per_atom <= max_volume_per_atom:
        return Screening(False, f"{per_atom:.3g} A^3 per atom, more than {max_volume_per_atom:g}", None, per_atom)

    if (beyond := too_many_or_far(atoms)) is not None:
        return Screening(False, beyond, None, per_atom)

    frac_coords = atoms.positions @ (normals / volume).T  # the normals over the volume are the reciprocal vectors
    heights = volume / np.linalg.norm(normals, axis=1)
    shortest = _shortest_distance(cell, heights, frac_coords)
    if shortest is None:
        return Screening(False, "the cell is too skewed to search its images: reduce it first", None, per_atom)
    if not shortest >= min_distance:
        return Screening(False, f"atoms {shortest:.3f} A apart, less than {min_distance:g}", shortest, per_atom)
    if (beyond := too_skewed(atoms)) is not None:
        return Screening(False, beyond, shortest, per_atom)
    return Screening(True, None, shortest, per_atom)


def screen_given(atoms: Atoms) -> Screening:
    """Screen a structure whose cell was given, or comes from one that was: it may be as sparse as a slab."""
    return screen(atoms, max_volume_per_atom=MAX_GIVEN_VOLUME_PER_ATOM)


def _shortest_distance(
    cell: NDArray[np.float64], heights: NDArray[np.float64], frac_coords: NDArray[np.float64]
) -> float | None:
    """Shortest interatomic distance, images included; None where more than `_MAX_DISTANCES` would have to be looked at.

    A displacement with fractional components f is at least ``|f_i| heights_i`` long, so that an upper bound on the
    shortest distance (the cell rows, the component-wise minimum images) bounds the images that can beat it.
    """
    first, second = np.triu_indices(len(frac_coords), k=1)
    difference = frac_coords[first] - frac_coords[second]
    difference -= np.round(difference)
    bound = np.linalg.norm(np.vstack([cell, difference @ cell]), axis=1).min()

    reach = np.floor(bound / heights + 0.5)
    if np.prod(2 * reach + 1) * (len(difference) + 1) > _MAX_DISTANCES:
        return None
    axes = [np.arange(-n, n + 1) for n in reach]
    images = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    own = np.linalg.norm(images[images.any(axis=1)] @ cell, axis=1)
    others = np.linalg.norm((difference @ cell)[:, None] + images @ cell, axis=-1)
    return float(min(bound, own.min(initial=np.inf), others.min(initial=np.inf)))


# -- against other crystals --------------------------------------------------------------------------------------------


class KnownCrystals:
    """Crystals to compare with, looked up by reduced formula.

    Two are the same where pymatgen's StructureMatcher says so at its defaults: primitive cells, scaled to one volume.

    Parameters
    ----------
    structures : iterable of Atoms
        Named by ``info["material_id"]`` where that is there, else by their number.
    """

    def __init__(self, structures: Iterable[Atoms] = ()) -> None:
        from pymatgen.analysis.structure_matcher import StructureMatcher

        self._matcher = StructureMatcher()
        self._named: dict[tuple[tuple[int, int], ...], list[tuple[str, Atoms]]] = {}
        for i, atoms in enumerate(structures):
            self.add(atoms, str(atoms.info.get("material_id", i)))

    @classmethod
    def from_file(cls, path: str | Path, split: str | None = "train") -> Self:
        """Read those of a table such as `data/structures.parquet`, by default of its training split; of any size.

        Other files are read by ASE, all structures of them, as these know no split.

        Raises
        ------
        FileNotFoundError, ImportError, ValueError
            As `data.read_crystals`.
        """
        from dosmatgen_ase.data import read_crystals

        return cls(read_crystals(path, split))

    def __len__(self) -> int:
        return sum(map(len, self._named.values()))

    def add(self, atoms: Atoms, name: str) -> None:
        """Take one more crystal in."""
        self._named.setdefault(reduced_formula(atoms), []).append((name, atoms))

    def has_formula(self, atoms: Atoms) -> bool:
        """Whether a crystal of this reduced formula is known."""
        return reduced_formula(atoms) in self._named

    def find(self, atoms: Atoms, sites: Iterable[int] = ()) -> str | None:
        """Return the name of the first known crystal that is the same, None if there is none.

        Where ``sites`` are given, such as those with a target DOS, a crystal is the same only if these of its sites, by
        their numbers, are equivalent to those of ``atoms``, too.
        """
        sites, same = list(sites), self._named.get(reduced_formula(atoms), [])
        return next((name for name, other in same if self._are_same(atoms, other, sites)), None)

    def _are_same(self, one: Atoms, other: Atoms, sites: Sequence[int]) -> bool:
        if not sites:
            return bool(self._matcher.fit(to_structure(one), to_structure(other)))
        if max(sites) >= min(len(one), len(other)):
            return False
        # One site at a time: in a larger cell, equivalent ones may lie in different copies of the primitive cell.
        return all(self._matcher.fit(_marked(one, i), _marked(other, i)) for i in sites)


def _marked(atoms: Atoms, site: int) -> Structure:
    """The primitive cell with an X on the site; of two of one formula, it is on one element where the rest agrees."""
    from pymatgen.core import DummySpecies

    order = [site, *(i for i in range(len(atoms)) if i != site)]  # of sites that become one, the first gives properties
    structure = to_structure(atoms[order])
    structure.add_site_property("marked", [True] + [False] * (len(atoms) - 1))
    structure = structure.get_primitive_structure()
    place = structure.site_properties["marked"].index(True)
    structure.remove_site_property("marked")
    structure[place] = DummySpecies("X")
    return structure


def reduced_formula(atoms: Atoms) -> tuple[tuple[int, int], ...]:
    """Atomic numbers and their smallest whole counts, sorted."""
    counts = Counter(atoms.numbers.tolist())
    unit = math.gcd(*counts.values())
    return tuple(sorted((z, count // unit) for z, count in counts.items()))


def screen_many(
    structures: Sequence[Atoms], *, drop_duplicates: bool = True, known: KnownCrystals | None = None, **limits: float
) -> list[Screening]:
    """Screen each structure; reject also those earlier in the list and, if asked, known ones. One outcome each.

    Parameters
    ----------
    structures : sequence of Atoms
    drop_duplicates : bool
        Keep the first of several structures that are the same crystal. Of generated ones, the sites that had a target,
        as ``info["dosmatgen"]`` tells, must be equivalent, too: else only one of the two has the DOS asked for.
    known : KnownCrystals
        Reject these.
    **limits : float
        Of :func:`screen`.

    Examples
    --------
    >>> known = KnownCrystals.from_file("data/structures.parquet")  # doctest: +SKIP
    >>> new = [a for a, s in zip(found, screen_many(found, known=known)) if s.accepted]  # doctest: +SKIP
    """
    before, outcomes = KnownCrystals(), []
    for i, atoms in enumerate(structures):
        outcome = screen(atoms, **limits)
        if outcome.accepted and drop_duplicates and (twin := before.find(atoms, _conditioned(atoms))) is not None:
            outcome = replace(outcome, accepted=False, reason=f"the same crystal as candidate {twin}")
        if outcome.accepted and known is not None and (twin := known.find(atoms)) is not None:
            outcome = replace(outcome, accepted=False, reason=f"not new: the same crystal as {twin}")
        if outcome.accepted:
            before.add(atoms, str(i))
        outcomes.append(outcome)
    return outcomes


def _conditioned(atoms: Atoms) -> list[int]:
    """Numbers of the sites that had a target when the structure was generated."""
    record = atoms.info.get("dosmatgen")
    return [int(i) for i in record.get("targets", ())] if isinstance(record, Mapping) else []


def charge_balanced(atoms: Atoms) -> bool | None:
    """Whether common oxidation states, one per element, add up to zero. Information, never a reason to reject.

    Mixed valence (Fe3O4) is not found, and intermetallics need no balance. None where the question is void: metals
    only, or one element alone.
    """
    from pymatgen.core import Element

    formula = [(Element.from_Z(z), count) for z, count in reduced_formula(atoms)]
    if len(formula) == 1 or all(element.is_metal for element, _ in formula):
        return None
    states = [element.icsd_oxidation_states or element.common_oxidation_states for element, _ in formula]
    counts = [count for _, count in formula]
    return any(sum(map(int.__mul__, choice, counts)) == 0 for choice in itertools.product(*states))
