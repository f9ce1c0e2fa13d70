"""Two-centre integrals of s, p and d orbitals and how they turn with the bond.

J. C. Slater and G. F. Koster, Phys. Rev. 94, 1498 (1954): a block between two atoms is a sum of 14 integrals times
fixed functions of the bond's direction. Here these functions come from Cartesian tensors: with the unit vector u along
the bond, an orbital of the axis (sigma) is y = (1, u, Y2(u)), and the pi and delta parts follow from what is normal to
u. All are polynomials of u, so they have smooth derivatives and need no frame around the bond.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from dosmatgen_ase.forward.tight_binding.basis import SHELL_OF_ORBITAL

# The integrals, in this order: l of the first atom, l of the second, sigma (0), pi (1) or delta (2).
INTEGRALS = (
    (0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 2, 0), (2, 0, 0), (1, 1, 0), (1, 1, 1), (1, 2, 0), (1, 2, 1), (2, 1, 0),
    (2, 1, 1), (2, 2, 0), (2, 2, 1), (2, 2, 2),
)  # fmt: skip
NUM_INTEGRALS = len(INTEGRALS)
DELTA = NUM_INTEGRALS - 1
# Universal coefficients (W. A. Harrison, 1980); those of d with two powers of the d radii. His dd delta is zero.
COEFFICIENTS = (-1.32, 1.42, -1.42, -3.16, -3.16, 2.22, -0.63, -2.95, 1.36, 2.95, -1.36, -16.2, 8.75, 0.0)
H2_M = 7.62  # hbar^2 / m, eV Angstrom^2


def _spread(channel: int, first: int) -> Tensor:
    """(14, n * n): puts each integral of a channel on the elements of a block of orbitals from `first` on."""
    table = {(a, b): k for k, (a, b, c) in enumerate(INTEGRALS) if c == channel}
    shells = SHELL_OF_ORBITAL[first:]
    matrix = torch.zeros(NUM_INTEGRALS, len(shells), len(shells))
    for row, a in enumerate(shells):
        for column, b in enumerate(shells):
            matrix[table[a, b], row, column] = 1.0
    return matrix.flatten(1)


_SIGMA, _PI = _spread(0, 0), _spread(1, 1)
_HALF, _SIXTH = math.sqrt(0.5), math.sqrt(1 / 6)
# d orbitals (z2, xz, yz, x2-y2, xy) as traceless symmetric tensors of norm 1.
D_TENSORS = torch.tensor(
    [
        [[-_SIXTH, 0, 0], [0, -_SIXTH, 0], [0, 0, 2 * _SIXTH]],
        [[0, 0, _HALF], [0, 0, 0], [_HALF, 0, 0]],
        [[0, 0, 0], [0, 0, _HALF], [0, _HALF, 0]],
        [[_HALF, 0, 0], [0, -_HALF, 0], [0, 0, 0]],
        [[0, _HALF, 0], [_HALF, 0, 0], [0, 0, 0]],
    ],
    dtype=torch.float64,
)


def directions(unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Angular parts of the blocks.

    Parameters
    ----------
    unit : (e, 3)
        Unit vectors from the first atom to the second.

    Returns
    -------
    sigma : (e, 81), of all orbitals
    pi : (e, 64), of p and d orbitals
    delta : (e, 25), of d orbitals
    """
    image = (unit @ D_TENSORS.to(unit).permute(1, 0, 2).reshape(3, 15)).view(-1, 5, 3)  # each tensor times the axis
    along = (image * unit[:, None]).sum(-1)
    axis = torch.cat([torch.ones_like(unit[:, :1]), unit, math.sqrt(1.5) * along], 1)
    across = torch.eye(3).to(unit) - unit[:, :, None] * unit[:, None]
    normal = torch.cat([across, math.sqrt(2) * (image - along[..., None] * unit[:, None])], 1)
    sigma = axis[:, :, None] * axis[:, None]
    pi = (normal[:, :, None] * normal[:, None]).sum(-1)
    delta = torch.eye(5).to(unit) - sigma[:, 4:, 4:] - pi[:, 3:, 3:]
    return sigma.flatten(1), pi.flatten(1), delta.flatten(1)


def blocks(integrals: Tensor, angular: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Hamiltonian blocks (e, 9, 9) of integrals (e, 14) along bonds with these `directions`."""
    sigma, pi, delta = angular
    result = ((integrals @ _SIGMA.to(integrals)) * sigma).view(-1, 9, 9)
    side = ((integrals @ _PI.to(integrals)) * pi).view(-1, 8, 8)
    side = side + pad((integrals[:, DELTA:] * delta).view(-1, 5, 5), (3, 0, 3, 0))
    return result + pad(side, (1, 0, 1, 0))


def harrison_scale(r: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Distance dependence (e, 14) of the integrals, eV: hbar^2/m times 1/r^2, r_d^1.5 / r^3.5 and r_d^3 / r^5.

    Parameters
    ----------
    r : (e,), Angstrom
    first, second : (e,)
        Radii of the d shells of both atoms, Angstrom.
    """
    powers = H2_M / r**2, H2_M * first**1.5 / r**3.5, H2_M * second**1.5 / r**3.5, H2_M * (first * second) ** 1.5 / r**5
    return torch.stack([powers[2 * (b == 2) + (a == 2) if a != b else 3 * (a == 2)] for a, b, _ in INTEGRALS], -1)
