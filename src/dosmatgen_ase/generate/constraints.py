"""What a generated crystal must respect exactly: pinned fields and sites, allowed elements, a composition.

Pins are fields or sites that are held clean from the first step to the last, with the network told so; lists and
compositions mask the species logits when a site is revealed. Neither touches the network or its guidance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dosmatgen_ase.crystals.batch import CrystalBatch, OnDevice
from dosmatgen_ase.limits import MAX_ATOMIC_NUMBER
from dosmatgen_ase.model.diffusion import species


@dataclass(frozen=True)
class Constraints(OnDevice):
    """Constraints of a batch.

    Attributes
    ----------
    start : CrystalBatch
        Holds the values of pinned fields, and the template where there is one; elsewhere its values do not matter.
    fixed_cell : Tensor of bool, shape (B,)
    fixed_coords : Tensor of bool, shape (B, N)
    fixed_species : Tensor of bool, shape (B, N)
    allowed : Tensor of bool, shape (B, Z + 1)
        Elements that a free site may become.
    remaining : Tensor of int64, shape (B, Z + 1)
        How often each element may still be used on free sites; a number above 20 means without limit.
    """

    start: CrystalBatch
    fixed_cell: Tensor
    fixed_coords: Tensor
    fixed_species: Tensor
    allowed: Tensor
    remaining: Tensor

    @classmethod
    def none(cls, num_atoms: Tensor) -> Constraints:
        """Only the number of atoms is given, shape (B,)."""
        batch, size = len(num_atoms), int(num_atoms.max())
        masked = torch.zeros(batch, size, dtype=torch.int64)
        start = CrystalBatch(torch.eye(3).repeat(batch, 1, 1), torch.zeros(batch, size, 3), masked, num_atoms)
        allowed = torch.ones(batch, MAX_ATOMIC_NUMBER + 1, dtype=torch.bool)
        allowed[:, species.MASKED] = False
        free = torch.zeros(batch, size, dtype=torch.bool)
        return cls(start, free[:, 0].clone(), free, free.clone(), allowed, 10**6 * allowed.long())

    def admit(self, atomic_numbers: Tensor) -> Tensor:
        """Mask the free sites, shape (B, N), whose element (from a template) is not allowed or used too often."""
        free = (atomic_numbers > 0) & ~self.fixed_species
        same = (atomic_numbers[:, :, None] == atomic_numbers[:, None]) & free[:, None]
        used_before = same.tril(-1).sum(-1)
        refused = ~self.allowed.gather(1, atomic_numbers) | (used_before >= self.remaining.gather(1, atomic_numbers))
        return atomic_numbers.masked_fill(free & refused, species.MASKED)

    def reveal(self, revealed: Tensor, logits: Tensor, uniform: Tensor, now: Tensor, order: Tensor) -> Tensor:
        """Draw the elements of the sites revealed in one step, one after the other where a composition couples them.

        Parameters
        ----------
        revealed : Tensor of int64, shape (B, N)
            Species so far, 0 where masked.
        logits : Tensor, shape (B, N, Z + 1)
        uniform : Tensor, shape (B, N)
        now : Tensor of bool, shape (B, N)
            Sites to reveal.
        order : Tensor, shape (B, N)
            Sites with a larger value come first.

        Returns
        -------
        Tensor of int64, shape (B, N)
        """
        now = now.clone()
        while bool(now.any()):
            candidate = order.masked_fill(~now, -1.0)
            first = now & (candidate == candidate.amax(1, keepdim=True))
            counts = ((revealed > 0) & ~self.fixed_species).to(self.remaining.dtype)
            used = torch.zeros_like(self.remaining).scatter_add_(1, revealed, counts)
            possible = self.allowed & (used < self.remaining)
            drawn = species.draw(logits.masked_fill(~possible[:, None], -torch.inf), uniform)
            revealed = torch.where(first, drawn, revealed)
            now &= ~first
        return revealed
