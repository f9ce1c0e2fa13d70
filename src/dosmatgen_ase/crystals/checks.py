"""Whether an ``ase.Atoms`` can be a crystal of this package at all; `screening` judges those that can."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

from dosmatgen_ase.limits import MAX_ATOMIC_NUMBER, MAX_ATOMS

if TYPE_CHECKING:
    from ase import Atoms


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


def check_atoms(atoms: Any, name: str, max_atoms: int = MAX_ATOMS) -> None:
    """Raise ``ValueError`` or ``TypeError`` with the fix named if ``atoms`` cannot be a crystal of this package."""
    import numpy as np
    from ase import Atoms

    if not isinstance(atoms, Atoms):
        raise TypeError(f"{name} must be an ase.Atoms, not {type(atoms).__name__}: convert it first")
    if not 1 <= len(atoms) <= max_atoms:
        raise ValueError(f"{name} has {len(atoms)} atoms: use a (primitive) cell of 1 to {max_atoms}")
    if not atoms.pbc.all():
        raise ValueError(f"{name} is not periodic in three directions: set atoms.pbc = True")
    if is_disordered(atoms):
        raise ValueError(f"{name} is disordered: sites are shared or partly empty, order it first")
    if not (np.isfinite(atoms.cell).all() and np.isfinite(atoms.positions).all()):
        raise ValueError(f"{name} has a cell or positions that are not finite: repair it first")
    if abs(atoms.cell.volume) < 1e-3:
        raise ValueError(f"{name} has a cell without volume: set atoms.cell to three independent vectors")
    if not ((atoms.numbers >= 1) & (atoms.numbers <= MAX_ATOMIC_NUMBER)).all():
        raise ValueError(f"{name} holds an element outside H to Pu (1-{MAX_ATOMIC_NUMBER}): replace it")
