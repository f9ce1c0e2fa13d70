"""Crystals away from equilibrium: atoms displaced at random, cells strained at random."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from scipy.spatial.transform import Rotation

from dosmatgen_ase.crystals.screening import right_handed, screen_given

RATTLE = (0.05, 0.15)  # Angstrom
STRAIN = 0.05
_TRIES = 50


def perturbed(
    atoms: Atoms,
    generator: np.random.Generator,
    *,
    rattle: tuple[float, float] = RATTLE,
    strain: float = STRAIN,
) -> Atoms:
    """Rattle and strain a copy of a crystal.

    The three principal strains are uniform in -strain to strain, along axes of a random orientation, and carry the
    atoms along. Then each atom moves by a Gaussian vector; their root mean square length is uniform in `rattle`, their
    sum is zero. A draw that the screen of structures refuses (atoms too near) is drawn again.

    Parameters
    ----------
    atoms : Atoms
        Periodic in three directions.
    generator : numpy Generator
    rattle : pair of float
        Angstrom. A single atom in a cell stays where it is.
    strain : float
        The largest strain; below 1.

    Returns
    -------
    Atoms
        In the cell of the crystal, strained; of a left-handed one, its vectors are negated. Without its calculator,
        ``info`` and constraints.

    Raises
    ------
    ValueError
        If the bounds are none, or no draw is accepted.
    """
    low, high = rattle
    if not (0 <= low <= high < np.inf and 0 <= strain < 1):
        raise ValueError(f"rattle={rattle} must rise from 0 or more, strain={strain} lie in 0 to below 1")
    given, reason = right_handed(atoms), None
    for _ in range(_TRIES):
        axes = Rotation.random(rng=generator).as_matrix()
        stretch = np.eye(3) + axes @ np.diag(generator.uniform(-strain, strain, 3)) @ axes.T
        made = Atoms(given.numbers, positions=given.positions, cell=given.cell, pbc=True)
        made.set_cell(given.cell.array @ stretch, scale_atoms=True)
        moves = generator.normal(size=(len(atoms), 3))
        moves -= moves.mean(0)
        length = np.sqrt((moves**2).sum(1).mean())
        made.positions += moves * (generator.uniform(low, high) / length if length > 0 else 0.0)
        made.wrap()
        reason = screen_given(made).reason
        if reason is None:
            return made
    told = f"{_TRIES} perturbed copies of {atoms.get_chemical_formula()} were refused as no crystals"
    raise ValueError(f"{told}, the last because: {reason}; perturb it less")
