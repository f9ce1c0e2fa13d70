"""Accept or reject a generated structure by its geometry alone, with a reason.

The checks run from cheap to dear, and each one makes the next safe: numbers are finite, then the cell has a volume,
then the distances are searched, with a bound on the images. Passing says nothing about the energy of a structure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ase import Atoms
    from numpy.typing import NDArray

_MAX_DISTANCES = 2_000_000  # about 0.2 s; a Niggli-reduced cell of 20 atoms needs 10,000


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


def screen(
    atoms: Atoms,
    *,
    min_distance: float = 0.5,
    min_volume_per_atom: float = 2.0,
    max_volume_per_atom: float = 100.0,
) -> Screening:
    """Screen one structure: finite, periodic, right-handed, of sensible density, no two atoms on top of each other.

    A structure is never an error, however broken: it is rejected with a reason.

    Parameters
    ----------
    atoms
        The structure, as it comes from the sampler.
    min_distance
        Smallest distance allowed, Angstrom; periodic images, an atom's own included, count.
    min_volume_per_atom, max_volume_per_atom
        Density window, Angstrom^3 per atom.

    Returns
    -------
    Screening

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
    positions = np.asarray(atoms.positions, dtype=float)
    if len(positions) == 0:
        return Screening(False, "no atoms", None, None)
    if not (np.isfinite(cell).all() and np.isfinite(positions).all()):
        return Screening(False, "cell or positions are not finite", None, None)
    if not np.all(atoms.pbc):
        return Screening(False, "not periodic in all three directions", None, None)

    with np.errstate(over="ignore", invalid="ignore"):  # an absurd cell may overflow: inf and NaN fail the checks below
        normals = np.cross(cell[[1, 2, 0]], cell[[2, 0, 1]])
        volume = float(cell[0] @ normals[0])
        per_atom = volume / len(positions)
    if volume < 0:
        return Screening(False, "left-handed cell", None, abs(per_atom))
    if not per_atom >= min_volume_per_atom:
        reason = f"{per_atom:.3g} A^3 per atom, less than {min_volume_per_atom:g}"
        return Screening(False, reason, None, per_atom)
    if not per_atom <= max_volume_per_atom:
        reason = f"{per_atom:.3g} A^3 per atom, more than {max_volume_per_atom:g}"
        return Screening(False, reason, None, per_atom)

    frac_coords = positions @ (normals / volume).T  # the normals over the volume are the reciprocal vectors
    heights = volume / np.linalg.norm(normals, axis=1)
    shortest = _shortest_distance(cell, heights, frac_coords)
    if shortest is None:
        return Screening(False, "cell too skewed to search its images: reduce it first", None, per_atom)
    if not shortest >= min_distance:
        return Screening(False, f"atoms {shortest:.3f} A apart, less than {min_distance:g}", shortest, per_atom)
    return Screening(True, None, shortest, per_atom)


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
