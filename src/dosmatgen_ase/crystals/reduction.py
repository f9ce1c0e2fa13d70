"""The reduced cell of a lattice, as the network knows it from training."""

from __future__ import annotations

import numpy as np
from ase.geometry import minkowski_reduce

from dosmatgen_ase.threads import without_warnings

TOLERANCE = 1e-5  # of the metric, relative: a cell that is reduced to this is left as it is


def niggli_operation(cell: np.ndarray) -> np.ndarray:
    """Integer matrix ``P``, shape (3, 3), of determinant 1, such that ``P @ cell`` is Niggli-reduced.

    The identity where ``cell`` (rows are lattice vectors) is reduced already. Fractional coordinates ``f`` become
    ``f @ inv(P)``.

    Raises
    ------
    ValueError
        If the cell cannot be reduced.
    """
    reduced = None
    if np.isfinite(cell).all() and abs(np.linalg.det(cell)) > 1e-6:
        reduced = _niggli(cell)
        if reduced is None:  # sheared so much that its number of steps does not suffice
            reduced = _niggli(minkowski_reduce(cell)[0])
    if reduced is None:
        raise ValueError("the cell cannot be reduced: set atoms.cell to three independent vectors")
    before, after = cell @ cell.T, reduced @ reduced.T
    if np.abs(after - before).max() <= TOLERANCE * np.abs(before).max():
        return np.eye(3, dtype=int)
    combinations: np.ndarray = np.rint(reduced @ np.linalg.inv(cell)).astype(int)
    return combinations


def _niggli(cell: np.ndarray) -> np.ndarray | None:
    import spglib

    with without_warnings():  # of its future handling of errors
        try:
            reduced: np.ndarray | None = spglib.niggli_reduce(cell)
        except spglib.SpglibError:  # instead of None, where the process has asked for its new errors
            return None
    return reduced


def plane_spacings(cell: np.ndarray) -> np.ndarray:
    """Distances between neighbouring lattice planes along the three axes, shape (3,), Angstrom."""
    spacings: np.ndarray = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    return spacings
