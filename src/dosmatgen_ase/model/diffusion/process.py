"""The joint process: noisy crystals, their noise levels, and what a denoiser predicts from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dosmatgen_ase.crystals.batch import CrystalBatch, site_mask
from dosmatgen_ase.model.diffusion import coordinates, species
from dosmatgen_ase.model.diffusion.lattice import LatticeProcess


@dataclass(frozen=True)
class NoisyCrystals:
    """State of the diffusion and its noise levels. Species need no level: a site is masked (0) or known.

    Attributes
    ----------
    lattice : Tensor, shape (B, 6)
        Standardised six-vector.
    frac_coords : Tensor, shape (B, N, 3)
    species : Tensor of int64, shape (B, N)
        Atomic numbers; 0 where masked (and on padded sites).
    num_atoms : Tensor of int64, shape (B,)
    t_lattice : Tensor, shape (B,)
    t_coords : Tensor, shape (B, N)
        In [0, 1]; 0 marks a field or site that is clean and held.
    """

    lattice: Tensor
    frac_coords: Tensor
    species: Tensor
    num_atoms: Tensor
    t_lattice: Tensor
    t_coords: Tensor

    @property
    def mask(self) -> Tensor:
        """Real sites, shape (B, N) bool."""
        return site_mask(self.num_atoms, self.frac_coords.shape[1])


@dataclass(frozen=True)
class Prediction:
    """What a denoiser returns.

    Attributes
    ----------
    lattice : Tensor, shape (B, 6)
        Velocity ``noise - x0`` of the six-vector.
    coords : Tensor, shape (B, N, 3)
        Velocity of the fractional coordinates, without mean drift where all sites move.
    species : Tensor, shape (B, N, Z + 1)
        Logits over elements.
    site_dos : Tensor, shape (B, N, G), or None
        Predicted DOS of each site, states/eV.
    """

    lattice: Tensor
    coords: Tensor
    species: Tensor
    site_dos: Tensor | None = None


@dataclass(frozen=True)
class JointProcess:
    """One noise process per field."""

    lattice: LatticeProcess

    def noised(
        self, batch: CrystalBatch, t_lattice: Tensor, t_coords: Tensor, t_species: Tensor, generator: torch.Generator
    ) -> tuple[NoisyCrystals, Prediction]:
        """Noise clean crystals to given levels; return the state and the targets of the network.

        Parameters
        ----------
        batch : CrystalBatch
        t_lattice : Tensor, shape (B,)
        t_coords, t_species : Tensor, shape (B, N)
        generator : torch.Generator
            On the device of the batch.

        Returns
        -------
        NoisyCrystals, Prediction
            The targets: velocities; ``species`` holds the atomic numbers instead of logits.
        """
        size, device = batch.frac_coords.shape[:2], batch.cell.device

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=device)

        noise = torch.randn((size[0], 6), generator=generator, device=device)
        x0 = self.lattice.encode(batch.cell, batch.num_atoms)
        lattice, lattice_velocity = self.lattice.noised(x0, noise, t_lattice)
        frac, velocity = coordinates.noised(batch.frac_coords, uniform(*size, 3), t_coords, batch.mask)
        masked = species.noised(batch.atomic_numbers, uniform(*size), t_species)
        state = NoisyCrystals(lattice, frac, masked, batch.num_atoms, t_lattice, t_coords)
        return state, Prediction(lattice_velocity, velocity, batch.atomic_numbers)

    def clean(self, state: NoisyCrystals) -> CrystalBatch:
        """Read a finished state as crystals, in the canonical orientation."""
        cell = self.lattice.decode(state.lattice, state.num_atoms)
        return CrystalBatch(cell, state.frac_coords, state.species, state.num_atoms)
