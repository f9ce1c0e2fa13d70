"""What a crystal is (`fault`); `screening` then judges whether it is a sensible one."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

from dosmatgen_ase.limits import MAX_ATOMIC_NUMBER, MAX_ATOMS

if TYPE_CHECKING:
    from ase import Atoms

MIN_VOLUME = 1e-3  # A^3; below, three vectors span no cell
MIN_VOLUME_PER_ATOM = 2.0  # A^3; below, atoms have collapsed, and potentials and neighbour lists mean nothing


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
    if not atoms.pbc.all():
        return "is not periodic in three directions: set atoms.pbc = True"
    with np.errstate(over="ignore"):
        if abs(np.linalg.det(cell)) < MIN_VOLUME:
            return "has a cell without volume: set atoms.cell to three independent vectors"
    return None


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
