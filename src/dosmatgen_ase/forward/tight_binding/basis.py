"""Orbitals of each element: which shells it has here, where their levels start, how many electrons fill them.

An atom has up to nine orthogonal orbitals, in this order: s; p (x, y, z); d (z2, xz, yz, x2-y2, xy). Where a semicore
shell lies in the window of the labels it takes the place of the empty shell of the same l: 3p of K, 4p of Rb, 5p of Cs
and Ba, 5d of Tl; their electrons are counted. Light and p-block elements have no d shell, H and He s alone.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

NUM_ELEMENTS = 95  # rows of tables by atomic number, 0 unused
NUM_ORBITALS = 9
SHELL_OF_ORBITAL = (0, 1, 1, 1, 2, 2, 2, 2, 2)  # l
MAGNETIC = frozenset(range(23, 29))  # V to Ni: crystals with one of these get two spin channels
SEMICORE_P = {19: -12.5, 37: -11.0, 55: -8.0, 56: -11.0}  # start level, eV from the zero of the labels
TL = 81
NOBLE = (0, 2, 10, 18, 36, 54, 86, 118)  # gases: each ends a row of the periodic table

# s-p splitting of the free atoms, eV, a little smaller than Hartree-Fock's, as semilocal DFT has it.
SPLITTING = {
    5: 4.5, 6: 7.5, 7: 10.8, 8: 14.5, 9: 18.8, 13: 4.3, 14: 6.2, 15: 8.3, 16: 10.4, 17: 12.8, 31: 5.0, 32: 6.8, 33: 8.7,
    34: 10.7, 35: 12.6, 49: 4.2, 50: 5.8, 51: 7.1, 52: 8.5, 53: 10.0, 82: 5.5, 83: 6.9,
}  # fmt: skip

# Radii of the d shells, Angstrom: W. A. Harrison, Electronic Structure and the Properties of Solids, solid state table.
_D_RADII = {
    **dict(zip(range(21, 31), (1.24, 1.08, 0.98, 0.90, 0.86, 0.80, 0.76, 0.71, 0.67, 0.64), strict=True)),
    **dict(zip(range(39, 49), (1.58, 1.41, 1.28, 1.20, 1.11, 1.05, 0.99, 0.94, 0.89, 0.85), strict=True)),
    **dict(zip((57, *range(72, 81)), (1.59, 1.44, 1.34, 1.27, 1.20, 1.13, 1.08, 1.04, 1.01, 0.98), strict=True)),
}
D_RADIUS = np.array([_D_RADII.get(z, 0.9) for z in range(NUM_ELEMENTS)], dtype=np.float32)


def group(z: int) -> int:
    """Return the group of the periodic table, 1 to 18; f elements count as group 3."""
    row = bisect_left(NOBLE, z)
    from_left, from_right = z - NOBLE[row - 1], 18 - (NOBLE[row] - z)
    return from_left if from_left <= 2 and z != 2 else max(3, from_right)


def shells(z: int) -> tuple[bool, bool, bool]:
    """Tell which of s, p and d the element has."""
    return z > 0, z > 2, z == TL or (z >= 19 and group(z) <= 12)


def valence_electrons(z: int) -> int:
    """Return the electrons of the neutral atom in its shells, semicore ones included."""
    if z == 2:
        return 2
    semicore = 6 if z in SEMICORE_P else 10 if z == TL else 0
    return semicore + (group(z) if group(z) <= 12 else group(z) - 10)


def start_levels(centres: np.ndarray) -> np.ndarray:
    """Return the levels (95, 3) of s, p and d, in eV from the zero of the labels, from which training starts.

    Parameters
    ----------
    centres : (95, 3)
        Centre of each element's s, p and d DOS in the labels; zero where there is none.
    """
    levels = np.zeros((NUM_ELEMENTS, 3), dtype=np.float32)
    for z in range(1, NUM_ELEMENTS):
        s, p, d = centres[z]
        if z <= 2:
            levels[z] = s, 8.0, 12.0
        elif z == TL:
            levels[z] = -6.0, 2.0, -9.5
        elif group(z) >= 13:
            levels[z] = p - SPLITTING.get(z, 6.0), p, p + 12.0
        elif z in SEMICORE_P:
            levels[z] = max(s, 0.0) + 1.0, SEMICORE_P[z], 4.0
        else:
            levels[z] = (1.5, 4.5, 5.5) if group(z) <= 2 else (1.0, 5.0, d)
    return levels


ORBITALS = np.array([[shells(z)[shell] for shell in SHELL_OF_ORBITAL] for z in range(NUM_ELEMENTS)])  # (95, 9)
ELECTRONS = np.array([valence_electrons(z) if z else 0 for z in range(NUM_ELEMENTS)], dtype=np.float32)
