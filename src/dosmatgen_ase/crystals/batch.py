"""Batches of periodic crystals as dense, padded tensors: ``Atoms -> CrystalBatch -> Atoms``.

Conventions: rows of a cell are lattice vectors in Angstrom, fractional coordinates lie in [0, 1), a padded site has
atomic number 0. Cells are small (at most 20 atoms), so dense padding wastes little and keeps the network simple.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dosmatgen_ase.crystals.checks import check_atoms
from dosmatgen_ase.limits import MAX_ATOMS

if TYPE_CHECKING:
    from ase import Atoms


def wrap(frac_coords: Tensor) -> Tensor:
    """Wrap fractional coordinates into [0, 1).

    ``x % 1.0`` alone returns exactly 1.0 for tiny negative ``x`` in float32, so that value is mapped to 0.
    """
    wrapped = frac_coords % 1.0
    return torch.where(wrapped >= 1.0, torch.zeros_like(wrapped), wrapped)


def minimum_image(frac_difference: Tensor) -> Tensor:
    """Component-wise minimum image of a fractional difference, in [-0.5, 0.5]."""
    return frac_difference - torch.round(frac_difference)


@dataclass(frozen=True)
class OnDevice:
    """Tensors, and batches of them, that move together."""

    def to(self, device: torch.device | str) -> Self:
        """Move every tensor to ``device``."""
        return replace(self, **{k: v.to(device) for k, v in self.__dict__.items()})


@dataclass(frozen=True)
class CrystalBatch(OnDevice):
    """Crystals of at most N atoms, padded.

    Attributes
    ----------
    cell : Tensor, shape (B, 3, 3)
        Lattice vectors as rows, Angstrom.
    frac_coords : Tensor, shape (B, N, 3)
        Fractional coordinates; zero on padded sites.
    atomic_numbers : Tensor of int64, shape (B, N)
        Zero on padded sites.
    num_atoms : Tensor of int64, shape (B,)
    """

    cell: Tensor
    frac_coords: Tensor
    atomic_numbers: Tensor
    num_atoms: Tensor

    @property
    def mask(self) -> Tensor:
        """Real sites, shape (B, N) bool."""
        return site_mask(self.num_atoms, self.frac_coords.shape[1])

    def __len__(self) -> int:
        return self.cell.shape[0]

    @classmethod
    def from_atoms(cls, structures: Sequence[Atoms], max_atoms: int = MAX_ATOMS) -> CrystalBatch:
        """Collect ASE structures; site order, cell and orientation are kept.

        Raises
        ------
        ValueError
            If a structure is empty, larger than ``max_atoms``, not periodic in three directions, not finite, has a
            cell without volume or an element beyond atomic number 94.
        """
        for i, atoms in enumerate(structures):
            check_atoms(atoms, f"structure {i}", max_atoms)
        cell = np.stack([np.asarray(a.cell) for a in structures])
        frac = [torch.tensor(a.get_scaled_positions(wrap=True), dtype=torch.float32) for a in structures]
        numbers = [torch.tensor(a.numbers, dtype=torch.int64) for a in structures]
        return cls(
            torch.tensor(cell, dtype=torch.float32),
            wrap(pad_sequence(frac, batch_first=True)),
            pad_sequence(numbers, batch_first=True),
            torch.tensor([len(a) for a in structures]),
        )

    def to_atoms(self) -> list[Atoms]:
        """Convert to ASE, ``pbc=True``, positions wrapped into the cell."""
        from ase import Atoms

        cell, frac = self.cell.double().cpu().numpy(), wrap(self.frac_coords).double().cpu().numpy()
        numbers = self.atomic_numbers.cpu().numpy()
        return [
            Atoms(numbers=numbers[i, :n], cell=cell[i], scaled_positions=frac[i, :n], pbc=True)
            for i, n in enumerate(self.num_atoms.tolist())
        ]


def site_mask(num_atoms: Tensor, size: int) -> Tensor:
    """Mask of real sites, shape (B, size) bool, from the number of atoms, shape (B,)."""
    return torch.arange(size, device=num_atoms.device) < num_atoms[:, None]
