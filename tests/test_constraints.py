"""Pins, lists and compositions hold exactly, in any mixture, for any network."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dosmatgen_ase.crystals.batch import CrystalBatch
from dosmatgen_ase.generate.constraints import Constraints
from dosmatgen_ase.generate.sampler import Randomness, Sample, SamplerConfig, sample
from dosmatgen_ase.limits import MAX_ATOMIC_NUMBER
from dosmatgen_ase.model.conditioning import ConditionalDenoiser, Guidance
from dosmatgen_ase.model.diffusion.lattice import LatticeProcess

CONFIG = SamplerConfig(num_steps=5)
PALETTE = [1, 8, 29, 94]  # few, so that pins, templates and compositions overlap


def randomness(num_atoms: torch.Tensor, seed: int = 0) -> Randomness:
    return Randomness.draw(num_atoms, [np.random.default_rng((seed, i)) for i in range(len(num_atoms))])


def run(
    model: ConditionalDenoiser,
    lattice: LatticeProcess,
    constraints: Constraints,
    *,
    seed: int = 0,
    strength: float = 1.0,
) -> Sample:
    denoise = Guidance().wrap(model, None)
    noise = randomness(constraints.start.num_atoms, seed)
    return sample(denoise, lattice, constraints, noise, CONFIG, strength=strength)


def random_start(num_atoms: torch.Tensor, seed: int = 0) -> CrystalBatch:
    """Crystals to pin: right-handed cells in any orientation."""
    rng = np.random.default_rng(seed)
    batch, size = len(num_atoms), int(num_atoms.max())
    mask = np.arange(size) < num_atoms.numpy()[:, None]
    cell = 4 * np.eye(3)[[1, 2, 0]] + rng.uniform(-0.8, 0.8, (batch, 3, 3))
    return CrystalBatch(
        torch.tensor(cell, dtype=torch.float32),
        torch.tensor(rng.random((batch, size, 3)) * mask[..., None], dtype=torch.float32),
        torch.tensor(rng.choice(PALETTE, (batch, size)) * mask),
        num_atoms,
    )


@st.composite
def requests(draw: st.DrawFn) -> tuple[Constraints, list[Counter[int] | None], int]:
    """Random pins, lists and compositions of a mixed batch; the composition of each crystal, if any; a seed."""
    num_atoms = torch.tensor(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    seed = draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    constraints = replace(Constraints.none(num_atoms), start=random_start(num_atoms, seed))
    mask = constraints.start.mask
    for name in ("fixed_coords", "fixed_species"):
        share = draw(st.sampled_from([0.0, 0.3, 1.0]))
        getattr(constraints, name)[:] = torch.tensor(rng.random(mask.shape) < share) & mask
    constraints.fixed_cell[:] = torch.tensor(rng.random(len(num_atoms)) < draw(st.sampled_from([0.0, 0.5, 1.0])))
    compositions: list[Counter[int] | None] = []
    for i, n in enumerate(num_atoms.tolist()):
        kind = draw(st.sampled_from(["free", "list", "composition"]))
        compositions.append(None)
        if kind == "list":
            allowed = rng.integers(1, MAX_ATOMIC_NUMBER + 1, draw(st.integers(1, 3)))
            constraints.allowed[i] = False
            constraints.allowed[i, allowed] = True
        if kind == "composition":
            pinned = Counter(constraints.start.atomic_numbers[i][constraints.fixed_species[i]].tolist())
            free = Counter(rng.choice(PALETTE, n - pinned.total()).tolist())
            constraints.remaining[i] = 0
            for z, count in free.items():
                constraints.remaining[i, z] = count
            compositions[-1] = pinned + free
    return constraints, compositions, seed


@settings(max_examples=40)
@given(request=requests(), strength=st.sampled_from([1.0, 0.5]))
def test_every_promise_is_kept_bit_for_bit(
    request: tuple[Constraints, list[Counter[int] | None], int],
    strength: float,
    tiny_model: ConditionalDenoiser,
    lattice: LatticeProcess,
) -> None:
    constraints, compositions, seed = request
    made = run(tiny_model, lattice, constraints, seed=seed, strength=strength).crystals
    start, mask = constraints.start, constraints.start.mask
    assert torch.equal(made.cell[constraints.fixed_cell], start.cell[constraints.fixed_cell])
    assert torch.equal(made.frac_coords[constraints.fixed_coords], start.frac_coords[constraints.fixed_coords])
    assert torch.equal(made.atomic_numbers[constraints.fixed_species], start.atomic_numbers[constraints.fixed_species])
    free = mask & ~constraints.fixed_species
    assert constraints.allowed.gather(1, made.atomic_numbers)[free].all()
    for i, composition in enumerate(compositions):
        if composition is not None:
            assert Counter(made.atomic_numbers[i][mask[i]].tolist()) == composition
    assert (made.atomic_numbers[mask] > 0).all()
    assert not made.atomic_numbers[~mask].any()
    assert torch.isfinite(made.cell).all()
    assert ((made.frac_coords >= 0) & (made.frac_coords < 1)).all()
    assert (torch.linalg.det(made.cell[~constraints.fixed_cell]) > 0).all()


def test_without_pins_everything_moves(tiny_model: ConditionalDenoiser, lattice: LatticeProcess) -> None:
    """Negative control for the test above: what is not pinned is not the start."""
    num_atoms = torch.tensor([3, 5])
    constraints = replace(Constraints.none(num_atoms), start=random_start(num_atoms))
    made = run(tiny_model, lattice, constraints).crystals
    mask = constraints.start.mask
    assert not torch.isclose(made.cell, constraints.start.cell).all(-1).all(-1).any()
    assert not torch.isclose(made.frac_coords, constraints.start.frac_coords).all(-1)[mask].any()
    assert float((made.atomic_numbers == constraints.start.atomic_numbers)[mask].float().mean()) < 0.5


def test_strength_zero_returns_the_start(tiny_model: ConditionalDenoiser, lattice: LatticeProcess) -> None:
    num_atoms = torch.tensor([2, 6, 1])
    constraints = replace(Constraints.none(num_atoms), start=random_start(num_atoms))
    result = run(tiny_model, lattice, constraints, strength=0.0)
    for name, value in constraints.start.__dict__.items():
        assert torch.equal(getattr(result.crystals, name), value), name
    assert result.network_calls == 0


def test_a_crystal_does_not_depend_on_its_batch(tiny_model: ConditionalDenoiser, lattice: LatticeProcess) -> None:
    num_atoms = torch.tensor([1 + i % 6 for i in range(64)])
    together = run(tiny_model, lattice, Constraints.none(num_atoms)).crystals
    for i in (0, 5, 37, 62):
        n = int(num_atoms[i])
        constraints = Constraints.none(num_atoms[i : i + 1])
        noise = Randomness.draw(num_atoms[i : i + 1], [np.random.default_rng((0, i))])
        alone = sample(Guidance().wrap(tiny_model, None), lattice, constraints, noise, CONFIG).crystals
        assert torch.equal(alone.atomic_numbers[0], together.atomic_numbers[i, :n])
        torch.testing.assert_close(alone.cell[0], together.cell[i], rtol=0, atol=1e-3)
        difference = alone.frac_coords[0] - together.frac_coords[i, :n]
        torch.testing.assert_close(difference - difference.round(), torch.zeros(n, 3), rtol=0, atol=1e-3)


def test_what_a_template_brings_along_is_held_to_the_lists(
    tiny_model: ConditionalDenoiser, lattice: LatticeProcess
) -> None:
    num_atoms = torch.tensor([4, 4])
    constraints = replace(Constraints.none(num_atoms), start=random_start(num_atoms))
    constraints.start.atomic_numbers[:] = 29
    constraints.allowed[0] = False
    constraints.allowed[0, [28, 79]] = True
    constraints.remaining[1] = 0
    constraints.remaining[1, 29], constraints.remaining[1, 79] = 3, 1
    for seed in range(5):
        made = run(tiny_model, lattice, constraints, seed=seed, strength=0.2).crystals.atomic_numbers
        assert set(made[0].tolist()) <= {28, 79}
        assert sorted(made[1].tolist()) == [29, 29, 29, 79]


def test_admit_masks_the_least_it_must() -> None:
    constraints = Constraints.none(torch.tensor([4]))
    constraints.remaining[0, 29] = 2
    constraints.allowed[0, 8] = False
    constraints.fixed_species[0, 0] = True
    numbers = torch.tensor([[29, 29, 8, 29]])
    assert constraints.admit(numbers).tolist() == [[29, 29, 0, 29]]  # the fixed copper does not count against the two
    constraints.remaining[0, 29] = 1
    assert constraints.admit(numbers).tolist() == [[29, 29, 0, 0]]


def test_reveal_takes_sites_in_order_and_counts_down() -> None:
    """Every site wants copper; two may have it: the two with the largest order get it."""
    constraints = Constraints.none(torch.tensor([4]))
    constraints.allowed[0] = False
    constraints.allowed[0, [29, 79]] = True
    constraints.remaining[0, 29] = 2
    logits = torch.zeros(1, 4, MAX_ATOMIC_NUMBER + 1)
    logits[..., 29] = 50.0
    order = torch.tensor([[0.1, 0.9, 0.3, 0.7]])
    all_sites = torch.ones(1, 4, dtype=torch.bool)
    masked = torch.zeros(1, 4, dtype=torch.int64)
    assert constraints.reveal(masked, logits, torch.full((1, 4), 0.5), all_sites, order).tolist() == [[79, 29, 79, 29]]
    only = torch.tensor([[True, False, False, True]])
    assert constraints.reveal(masked, logits, torch.full((1, 4), 0.5), only, order).tolist() == [[29, 0, 0, 29]]


@pytest.mark.parametrize("field", ["fixed_cell", "fixed_coords"])
def test_the_network_is_told_what_is_held(field: str, tiny_model: ConditionalDenoiser, lattice: LatticeProcess) -> None:
    num_atoms = torch.tensor([3])
    constraints = replace(Constraints.none(num_atoms), start=random_start(num_atoms))
    getattr(constraints, field)[:] = True
    levels: list[tuple[float, float]] = []
    inner = Guidance().wrap(tiny_model, None)

    def denoise(state, t):  # noqa: ANN001, ANN202
        levels.append((float(state.t_lattice.max()), float(state.t_coords.max())))
        return inner(state, t)

    sample(denoise, lattice, constraints, randomness(num_atoms), CONFIG)
    held, free = zip(*(pair if field == "fixed_cell" else pair[::-1] for pair in levels), strict=True)
    assert set(held) == {0.0}
    assert list(free) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
