"""What a crystal is (`fault`); `screening` then judges whether it is a sensible one."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

from dosmatgen_ase.limits import MAX_ATOMIC_NUMBER, MAX_ATOMS, MAX_GIVEN_ATOMS

if TYPE_CHECKING:
    from ase import Atoms

MIN_VOLUME = 1e-3  # A^3; below, three vectors span no cell
MIN_VOLUME_PER_ATOM = 2.0  # A^3; below, atoms have collapsed, and potentials and neighbour lists mean nothing
MAX_CELLS_AWAY = 1000  # an atom may lie so many cells away from its own; beyond, single precision has lost its place
MAX_WIDTH = 1e5  # Angstrom, between the outer planes of a cell: neighbours are sought in boxes of the cutoff
_LONGEST = 8.0  # Angstrom: no list of neighbours reaches farther
_MAX_IMAGES = 30_000  # cells around one that such a list looks at, in seconds; 729 where lattice planes are 2 A apart


def beyond_bounds(atoms: Atoms) -> str | None:
    """Why a crystal is too large for a list of its neighbours, in one line; None if it is not.

    Whoever looks for neighbours, pairs or symmetry asks here first: the work grows with the atoms and with the cells
    that lie within reach, and both may be absurd in a file of a few bytes. Cell and positions must be finite.
    """
    return too_many_or_far(atoms) or too_skewed(atoms)


def too_many_or_far(atoms: Atoms) -> str | None:
    """The part of `beyond_bounds` that comes before any pair of atoms is looked at."""
    import numpy as np

    if len(atoms) > MAX_GIVEN_ATOMS:
        return f"{len(atoms)} atoms, more than {MAX_GIVEN_ATOMS}: take a smaller cell"
    reciprocal = _reciprocal(atoms)
    with np.errstate(all="ignore"):
        away = np.abs(np.asarray(atoms.positions) @ reciprocal.T).max(initial=0.0)
    if not away <= MAX_CELLS_AWAY:
        return f"an atom lies {away:.3g} cells away from its own, more than {MAX_CELLS_AWAY}: wrap the positions first"
    return None


def too_skewed(atoms: Atoms) -> str | None:
    """The part of `beyond_bounds` that looks at the cell."""
    import numpy as np

    with np.errstate(all="ignore"):
        inverse = np.linalg.norm(_reciprocal(atoms), axis=1)
        images, width = np.prod(2 * np.ceil(_LONGEST * inverse) + 1), 1 / inverse.min()
    if not width <= MAX_WIDTH:
        return f"the cell is {width:.3g} A wide, more than {MAX_WIDTH:g}: take a smaller one"
    return None if images <= _MAX_IMAGES else "the cell is too skewed to search its images: reduce it first"


def _reciprocal(atoms: Atoms) -> Any:
    """Reciprocal vectors as rows, 1/Angstrom, without 2 pi; not finite where an absurd cell overflows."""
    import numpy as np

    cell = np.asarray(atoms.cell, dtype=float)
    with np.errstate(all="ignore"):
        normals = np.cross(cell[[1, 2, 0]], cell[[2, 0, 1]])
        return normals / (cell[0] @ normals[0])


def is_disordered(atoms: Atoms) -> bool:
    """Whether sites are shared or partly empty: ASE reads one element there, and keeps the truth in ``info``.

    An ``occupancy`` that is no table of sites is not ASE's, and says nothing; a table that cannot be read counts as
    disorder.
    """
    occupancies = atoms.info.get("occupancy")
    if not isinstance(occupancies, Mapping):
        return False
    return not all(
        isinstance(kinds, Mapping)
        and len(kinds) == 1
        and all(isinstance(share, Real) and float(share) >= 1 for share in kinds.values())
        for kinds in occupancies.values()
    )


def fault(atoms: Atoms) -> str | None:
    """Say why atoms are no crystal: the one place that tells what a crystal is.

    It has atoms, each of one element from H to Pu, finite numbers, and a cell with a volume that is repeated in three
    directions. `check_atoms` adds how many atoms the network takes, `dosmatgen_ase.crystals.screening.screen` adds
    handedness, density and distances.

    Returns
    -------
    str or None
        What follows the name of the structure, with the fix: "is disordered: ...". None for a crystal.
    """
    import numpy as np

    cell, numbers = np.asarray(atoms.cell, dtype=float), atoms.numbers
    if len(numbers) == 0:
        return "has no atoms"
    if is_disordered(atoms):
        return "is disordered: sites are shared or partly empty, order it first"
    if not ((numbers >= 1) & (numbers <= MAX_ATOMIC_NUMBER)).all():
        return f"has an element outside H to Pu (1 to {MAX_ATOMIC_NUMBER}): replace it"
    if not (np.isfinite(cell).all() and np.isfinite(atoms.positions).all()):
        return "has a cell or positions that are not finite: repair it first"
    if not cell.any():
        return "has no cell, as a molecule has none: give a crystal, with three lattice vectors"
    if not atoms.pbc.all():
        return 'is not periodic in three directions: set atoms.pbc = True (pbc="T T T" in an extxyz file)'
    with np.errstate(over="ignore"):
        if abs(np.linalg.det(cell)) < MIN_VOLUME:
            return "has a cell without volume: set atoms.cell to three independent vectors"
    return None


def formula_of(atoms: Atoms) -> str:
    """Chemical formula for a message, also of what is no element."""
    try:
        return str(atoms.get_chemical_formula())
    except IndexError:
        return f"a structure of {len(atoms)} atoms"


def check_atoms(atoms: Any, name: str, max_atoms: int = MAX_ATOMS) -> None:
    """Refuse what is no crystal of at most ``max_atoms`` atoms.

    Raises
    ------
    TypeError
        If it is no ``ase.Atoms``.
    ValueError
        With the ``name`` and the `fault`.
    """
    from ase import Atoms

    if not isinstance(atoms, Atoms):
        raise TypeError(f"{name} must be an ase.Atoms, not {type(atoms).__name__}: convert it first")
    if told := fault(atoms):
        raise ValueError(f"{name} {told}")
    if len(atoms) > max_atoms:
        raise ValueError(f"{name} has {len(atoms)} atoms: use a (primitive) cell of 1 to {max_atoms}")
    if beyond := beyond_bounds(atoms):
        raise ValueError(f"{name} cannot be used: {beyond}")
