"""The one place where a crystal passes between ASE and pymatgen; `batch` is the one for tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dosmatgen_ase.crystals.checks import is_disordered

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import Structure


def to_atoms(structure: Structure) -> Atoms:
    """Return the same crystal for ASE, sites in the same order.

    Raises
    ------
    ValueError
        If sites are disordered.
    """
    from ase import Atoms

    if not structure.is_ordered:
        raise ValueError(f"{structure.formula} has disordered sites: order them first (pymatgen's transformations do)")
    numbers = [site.specie.Z for site in structure]
    return Atoms(numbers, cell=structure.lattice.matrix, scaled_positions=structure.frac_coords, pbc=True)


def to_structure(atoms: Atoms, *, wrap: bool = False) -> Structure:
    """Return the same crystal for pymatgen, sites in the same order; ``wrap`` moves all into the cell.

    Raises
    ------
    ValueError
        If sites are disordered, which ``Atoms`` do not show.
    """
    from pymatgen.core import Structure

    if is_disordered(atoms):
        raise ValueError(f"{atoms.get_chemical_formula()} is disordered: order it first")
    return Structure(atoms.cell.array, atoms.numbers, atoms.get_scaled_positions(wrap=wrap))
