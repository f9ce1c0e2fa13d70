"""The only loop over time: from noise (t = 1, or a template noised to t = strength) to crystals (t = 0)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dosmatgen_ase.crystals.batch import CrystalBatch, OnDevice, wrap
from dosmatgen_ase.generate.constraints import Constraints
from dosmatgen_ase.generate.settings import GenerationSettings
from dosmatgen_ase.model.diffusion import coordinates, species
from dosmatgen_ase.model.diffusion.lattice import LatticeProcess
from dosmatgen_ase.model.diffusion.process import JointProcess, NoisyCrystals, Prediction

Denoise = Callable[[NoisyCrystals, float], tuple[Prediction, int]]


@dataclass(frozen=True)
class SamplerConfig:
    """How to walk from noise to data.

    Attributes
    ----------
    num_steps : int
        Steps from t = 1 to t = 0; a template at ``strength`` takes ``ceil(strength * num_steps)``.
    coords_annealing, lattice_annealing : float
        Anti-annealing, see :func:`~dosmatgen_ase.model.diffusion.coordinates.step_factor`. Zero is plain Euler, which
        alone keeps the density of an exact velocity field.
    species_end : float
        Level at which every species is revealed; the geometry then settles around known atoms.
    species_temperature : float
        Divides the logits at the reveal; below 1 favours the likely elements.
    """

    num_steps: int = GenerationSettings.num_steps
    coords_annealing: float = 10.0
    lattice_annealing: float = 0.0
    species_end: float = 0.4
    species_temperature: float = 0.7


@dataclass(frozen=True)
class Randomness(OnDevice):
    """All random numbers of a batch, drawn per structure so that results do not depend on the batch.

    ``lattice`` (B, 6) normal; ``coords`` (B, N, 3), ``reveal_time`` (B, N) and ``element`` (B, N) uniform in [0, 1).
    """

    lattice: Tensor
    coords: Tensor
    reveal_time: Tensor
    element: Tensor

    @classmethod
    def draw(cls, num_atoms: Tensor, generators: list[np.random.Generator]) -> Randomness:
        """One generator per structure; ``num_atoms`` of shape (B,).

        Reveal times are stratified, a random permutation of one uniform draw per 1/n-th of the trajectory: every site
        alone is uniform, and as few sites as possible are revealed in the same step, where they could not see each
        other.
        """
        batch, size = len(num_atoms), int(num_atoms.max())
        lattice = np.zeros((batch, 6), dtype=np.float32)
        sites = np.zeros((batch, size, 5))
        for i, (n, rng) in enumerate(zip(num_atoms.tolist(), generators, strict=True)):
            lattice[i] = rng.standard_normal(6)
            sites[i, :n, :3] = rng.random((n, 3))
            sites[i, :n, 3] = (rng.permutation(n) + rng.random(n)) / n
            sites[i, :n, 4] = rng.random(n)
        values = torch.tensor(sites)
        return cls(torch.tensor(lattice), values[..., :3].float(), values[..., 3], values[..., 4])


@dataclass(frozen=True)
class Sample:
    """Result of a run: the crystals, and how many network passes they took."""

    crystals: CrystalBatch
    network_calls: int


@torch.inference_mode()
def sample(
    denoise: Denoise,
    lattice: LatticeProcess,
    constraints: Constraints,
    randomness: Randomness,
    config: SamplerConfig,
    *,
    strength: float = 1.0,
    on_step: Callable[[], None] | None = None,
) -> Sample:
    """Run the sampler on one batch.

    Parameters
    ----------
    denoise : callable
        (state, t) -> (prediction, network passes).
    lattice : LatticeProcess
    constraints : Constraints
    randomness : Randomness
    config : SamplerConfig
    strength : float
        Level to which ``constraints.start`` is noised before the first step: 1 forgets it, 0 returns it.
    on_step : callable, optional
        Called after every step.
    """
    start, mask = constraints.start, constraints.start.mask
    steps = max(int(np.ceil(strength * config.num_steps - 1e-9)), int(strength > 0))  # only 0 returns the start
    levels = np.linspace(strength, 0.0, steps + 1)
    free_cell, free_sites = ~constraints.fixed_cell, mask & ~constraints.fixed_coords

    def level(t: float, free: Tensor) -> Tensor:
        return free.to(torch.float32) * t

    t_coords = level(strength, free_sites)
    x0 = lattice.encode(start.cell, start.num_atoms)
    x, _ = lattice.noised(x0, randomness.lattice, level(strength, free_cell))
    frac, _ = coordinates.noised(start.frac_coords, randomness.coords, t_coords, mask)
    hidden = mask & ~constraints.fixed_species
    tau = randomness.reveal_time
    species_level = _species_level(strength, config)
    numbers = species.noised(start.atomic_numbers, tau, species_level * hidden)
    numbers = constraints.admit(numbers) if steps else numbers
    calls = 0
    for t, s in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        state = NoisyCrystals(x, frac, numbers, start.num_atoms, level(t, free_cell), level(t, free_sites))
        prediction, passes = denoise(state, t)
        calls += passes
        move = coordinates.step_factor(t, s, config.coords_annealing) * t
        frac = wrap(frac - move * coordinates.remove_mean(prediction.coords, free_sites, mask))
        move = coordinates.step_factor(t, s, config.lattice_annealing) * t
        x = torch.where(free_cell[:, None], x - move * prediction.lattice, x)
        now = (numbers == species.MASKED) & hidden & (tau >= _species_level(s, config))
        logits = prediction.species / config.species_temperature
        numbers = constraints.reveal(numbers, logits, randomness.element, now, tau)
        if on_step is not None:
            on_step()
    state = NoisyCrystals(x, frac, numbers, start.num_atoms, level(0, free_cell), level(0, free_sites))
    crystals = JointProcess(lattice).clean(state)
    # What was held or never noised comes back bit by bit, not through the six-vector.
    held = constraints.fixed_cell | (steps == 0)
    frac = torch.where((constraints.fixed_coords | (steps == 0))[..., None], start.frac_coords, crystals.frac_coords)
    cell = torch.where(held[:, None, None], start.cell, crystals.cell)
    return Sample(replace(crystals, cell=cell, frac_coords=frac), calls)


def _species_level(t: float, config: SamplerConfig) -> float:
    """Share of the species still masked at level ``t``: 1 at t = 1, 0 from ``species_end`` on."""
    return max(0.0, (t - config.species_end) / (1.0 - config.species_end))
