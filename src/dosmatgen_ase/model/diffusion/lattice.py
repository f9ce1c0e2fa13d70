"""Lattice: a linear Gaussian path on a rotation-invariant six-vector.

The metric ``G = L L^T`` of a cell ``L`` (rows are lattice vectors) does not know the orientation of the crystal. Its
matrix logarithm ``S = log(G) / 2`` is a free symmetric matrix with ``tr S = log(volume)``; the volume per atom replaces
the volume. ``expm(S)`` is a symmetric, right-handed cell with the same metric: the canonical orientation of the
network. The idea of diffusing in this space is that of DiffCSP++ (arXiv 2402.03992); the standardisation and path are
ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_S2, _S3, _S6 = math.sqrt(2.0), math.sqrt(3.0), math.sqrt(6.0)
# Orthonormal basis (Frobenius) of symmetric 3x3 matrices: three shears, two deviators, the trace.
BASIS = torch.tensor(
    [
        [[0, 1 / _S2, 0], [1 / _S2, 0, 0], [0, 0, 0]],
        [[0, 0, 1 / _S2], [0, 0, 0], [1 / _S2, 0, 0]],
        [[0, 0, 0], [0, 0, 1 / _S2], [0, 1 / _S2, 0]],
        [[1 / _S2, 0, 0], [0, -1 / _S2, 0], [0, 0, 0]],
        [[1 / _S6, 0, 0], [0, 1 / _S6, 0], [0, 0, -2 / _S6]],
        [[1 / _S3, 0, 0], [0, 1 / _S3, 0], [0, 0, 1 / _S3]],
    ],
    dtype=torch.float64,
)
LARGEST = 100.0  # of means and deviations, logarithms of Angstrom: those of any crystals are below 10
LOG_EIGENVALUE_LIMIT = 4.5  # e^4.5 = 90 Angstrom: keeps the exponential finite for any network output


def symmetric_log(cell: Tensor) -> Tensor:
    """``log(L L^T) / 2`` of cells, shape (B, 3, 3), by eigendecomposition in float64."""
    cell = cell.double()
    eigenvalues, vectors = torch.linalg.eigh(cell @ cell.mT)
    return (vectors * (0.5 * eigenvalues.log())[:, None, :]) @ vectors.mT


def symmetric_exp(matrix: Tensor) -> Tensor:
    """Matrix exponential of symmetric matrices, shape (B, 3, 3); bounded eigenvalues keep it finite.

    NaN for a matrix that is not finite, as damaged weights make it: the screen rejects such a cell.
    """
    matrix = matrix.double()
    sound = torch.isfinite(matrix).all(-1).all(-1)[:, None, None]
    eigenvalues, vectors = torch.linalg.eigh(torch.where(sound, matrix, torch.zeros_like(matrix)))
    eigenvalues = eigenvalues.clamp(-LOG_EIGENVALUE_LIMIT, LOG_EIGENVALUE_LIMIT)
    cell = (vectors * eigenvalues.exp()[:, None, :]) @ vectors.mT
    return torch.where(sound, cell, torch.full_like(cell, torch.nan))


@dataclass(frozen=True)
class LatticeProcess:
    """Gaussian path ``x_t = (1 - t) x_0 + t e`` on the standardised six-vector.

    Attributes
    ----------
    mean, std : tuple of six floats
        Of the six-vector (volume per atom) over the training set.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        sound = all(isinstance(v, int | float) and abs(v) < LARGEST for v in (*self.mean, *self.std))
        if not (len(self.mean) == len(self.std) == 6 and sound and min(self.std) > 0):
            raise ValueError(f"{self}: mean and std must be six finite numbers each, below {LARGEST:g}, std above 0")

    @classmethod
    def fit(cls, cell: Tensor, num_atoms: Tensor) -> LatticeProcess:
        """Standardisation from two or more cells, shape (n, 3, 3); a component that never varies gets 0.01."""
        raw = cls((0.0,) * 6, (1.0,) * 6).encode(cell, num_atoms)
        return cls(tuple(raw.mean(0).tolist()), tuple(raw.std(0).clamp(min=0.01).tolist()))

    def encode(self, cell: Tensor, num_atoms: Tensor) -> Tensor:
        """Cells, shape (B, 3, 3), to standardised six-vectors, shape (B, 6) float32."""
        vector = torch.einsum("kab,nab->nk", BASIS.to(cell.device), symmetric_log(cell))
        vector[:, 5] -= num_atoms.double().log() / _S3
        mean, std = (torch.tensor(v, dtype=torch.float64, device=cell.device) for v in (self.mean, self.std))
        return ((vector - mean) / std).float()

    def decode(self, vector: Tensor, num_atoms: Tensor) -> Tensor:
        """Six-vectors, shape (B, 6), to symmetric right-handed cells, shape (B, 3, 3) float32, Angstrom."""
        mean, std = (torch.tensor(v, dtype=torch.float64, device=vector.device) for v in (self.mean, self.std))
        raw = vector.double() * std + mean
        raw[:, 5] += num_atoms.double().log() / _S3
        return symmetric_exp(torch.einsum("nk,kab->nab", raw, BASIS.to(vector.device))).float()

    @staticmethod
    def noised(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """State at level ``t``, shape (B,), and the velocity ``dx/dt = noise - x0`` that the network learns."""
        return (1 - t[:, None]) * x0 + t[:, None] * noise, noise - x0
