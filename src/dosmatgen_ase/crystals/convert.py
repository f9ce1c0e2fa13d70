"""The one place where a crystal passes between ASE and pymatgen; `batch` is the one for tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dosmatgen_ase.crystals.checks import is_disordered

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import Structure


def to_atoms(structure: Structure) -> Atoms:
    """Return the same crystal for ASE, sites in the same order.

    Coordinates that ``selective_dynamics`` holds become constraints.

    Raises
    ------
    ValueError
        If sites are disordered.
    """
    from ase import Atoms
    from ase.constraints import FixAtoms, FixCartesian

    if not structure.is_ordered:
        raise ValueError(f"{structure.formula} has disordered sites: order them first (pymatgen's transformations do)")
    numbers = [site.specie.Z for site in structure]
    atoms = Atoms(numbers, cell=structure.lattice.matrix, scaled_positions=structure.frac_coords, pbc=True)
    free = structure.site_properties.get("selective_dynamics", [None] * len(atoms))  # three truth values of each site
    held = {i: [not moves for moves in site] for i, site in enumerate(free) if site is not None and not all(site)}
    whole = [i for i, mask in held.items() if all(mask)]
    partly = [FixCartesian(i, mask) for i, mask in held.items() if not all(mask)]
    atoms.set_constraint([*([FixAtoms(whole)] if whole else []), *partly])
    return atoms


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
