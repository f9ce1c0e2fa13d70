"""The sampler with exact denoisers, no network: a known density goes in as its exact prediction and must come back.

Lattice: Gaussians and a mixture, closed-form E[noise - x0 | x_t]. Coordinates: data concentrated at weighted points
(the formula is in diffusion/coordinates.py); beside a held site no drift is removed. Species: a correlated joint table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest, norm
from torch import Tensor

from dosmatgen_ase.crystals.batch import minimum_image
from dosmatgen_ase.generate.constraints import Constraints
from dosmatgen_ase.generate.sampler import Randomness, Sample, SamplerConfig, sample
from dosmatgen_ase.limits import MAX_ATOMIC_NUMBER
from dosmatgen_ase.model.diffusion.lattice import LatticeProcess
from dosmatgen_ase.model.diffusion.process import NoisyCrystals, Prediction

EULER = SamplerConfig(
    num_steps=30, coords_annealing=0.0, lattice_annealing=0.0, species_end=0.0, species_temperature=1.0
)  # what alone keeps an exact density
LATTICE = LatticeProcess((0.0, 0.0, 0.0, 0.0, 0.0, 1.5), (0.1,) * 6)
Field = Callable[[NoisyCrystals], Tensor]


def denoiser(lattice: Field | None = None, coords: Field | None = None, species: Field | None = None):  # noqa: ANN201
    """Denoise callable from the fields under test; the others are held still, or drawn evenly."""

    def denoise(state: NoisyCrystals, t: float) -> tuple[Prediction, int]:
        batch, size = state.species.shape
        return Prediction(
            lattice(state) if lattice else torch.zeros(batch, 6),
            coords(state) if coords else torch.zeros(batch, size, 3),
            species(state) if species else torch.zeros(batch, size, MAX_ATOMIC_NUMBER + 1),
        ), 1

    return denoise


def draw(num: int, size: int, seed: int = 0) -> tuple[Constraints, Randomness]:
    """`num` crystals of `size` atoms without constraints, one generator each."""
    num_atoms = torch.full((num,), size)
    generators = [np.random.default_rng((seed, i)) for i in range(num)]
    return Constraints.none(num_atoms), Randomness.draw(num_atoms, generators)


# -- lattice: Gaussians ------------------------------------------------------------------------------------------------

MEAN = torch.tensor([0.5, -1.0, 0.0, 0.3, -0.2, 0.8])
STD = torch.tensor([0.3, 0.6, 1.0, 0.2, 1.5, 0.5])


def gaussian_velocity(x: Tensor, t: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """E[e - x0 | x_t] for x0 ~ N(mean, std^2), e ~ N(0, 1), x_t = (1 - t) x0 + t e, by the joint Gaussian."""
    variance = (1 - t) ** 2 * std**2 + t**2
    covariance = t - (1 - t) * std**2
    return -mean + covariance / variance * (x - (1 - t) * mean)


def lattice_sample(velocity: Field, num: int, num_steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Six-vectors that the sampler returns, shape (num, 6), and the noise that it started from."""
    constraints, randomness = draw(num, 2, seed)
    result = sample(denoiser(lattice=velocity), LATTICE, constraints, randomness, replace(EULER, num_steps=num_steps))
    return LATTICE.encode(result.crystals.cell, result.crystals.num_atoms), randomness.lattice


def of_gaussian(state: NoisyCrystals) -> Tensor:
    return gaussian_velocity(state.lattice, state.t_lattice[:, None], MEAN, STD)


def test_gaussian_velocity_is_the_regression_of_the_target() -> None:
    """The closed form against a Monte Carlo regression of noise - x0 on x_t."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(200_000, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    x0 = MEAN + STD * x0
    x, velocity = LatticeProcess.noised(x0, noise, torch.full((len(x0),), 0.4, dtype=torch.float64))
    slope = ((x - x.mean(0)) * velocity).mean(0) / x.var(0)
    expected = gaussian_velocity(torch.tensor([[0.0], [1.0]]), torch.tensor(0.4), MEAN, STD).double()
    torch.testing.assert_close(slope, expected[1] - expected[0], rtol=0, atol=0.02)
    torch.testing.assert_close(velocity.mean(0) - slope * x.mean(0), expected[0], rtol=0, atol=0.02)


def test_lattice_gaussian_comes_back() -> None:
    """The exact flow is the linear map noise -> mean + std noise: compared sample by sample, and in its moments."""
    x, noise = lattice_sample(of_gaussian, 2000, 200)
    torch.testing.assert_close(x, MEAN + STD * noise, rtol=0, atol=0.06)
    torch.testing.assert_close(x.mean(0), MEAN, rtol=0, atol=4 * float(STD.max()) / 2000**0.5)
    torch.testing.assert_close(x.std(0), STD, rtol=0.06, atol=0)
    for k in range(6):
        assert kstest(x[:, k].double().numpy(), norm(float(MEAN[k]), float(STD[k])).cdf).pvalue > 0.001


def test_a_velocity_that_is_wrong_is_noticed() -> None:
    """Negative control: a tenth too slow, and the moments are off by far more than the tolerance above."""
    x, _ = lattice_sample(lambda state: 0.9 * of_gaussian(state), 2000, 200)
    assert (x.mean(0) - MEAN).abs().max() > 0.09
    assert (x.std(0) - STD).abs().max() > 0.09


def test_the_error_falls_as_one_over_the_steps() -> None:
    """Plain Euler is of first order."""
    errors = []
    for num_steps in (20, 40, 80, 160):
        x, noise = lattice_sample(of_gaussian, 32, num_steps)
        errors.append(float((x - MEAN - STD * noise).abs().mean()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([1.0, 1.0, 1.0], abs=0.25), errors


CENTRES, WEIGHTS, WIDTH = torch.tensor([-1.5, 0.0, 2.0]), torch.tensor([0.25, 0.5, 0.25]), 0.25


def of_mixture(state: NoisyCrystals) -> Tensor:
    """Component 0 is a mixture of three Gaussians, the others are standard normal."""
    t, x = state.t_lattice[:, None], state.lattice
    velocity = gaussian_velocity(x, t, torch.zeros(6), torch.ones(6))
    variance = (1 - t) ** 2 * WIDTH**2 + t**2
    log_weight = WEIGHTS.log() - (x[:, :1] - (1 - t) * CENTRES) ** 2 / (2 * variance)
    parts = gaussian_velocity(x[:, :1], t, CENTRES, torch.tensor(WIDTH))
    velocity[:, 0] = (torch.softmax(log_weight, -1) * parts).sum(-1)
    return velocity


def check_mixture(num: int, num_steps: int) -> None:
    x = lattice_sample(of_mixture, num, num_steps)[0][:, 0]
    nearest = (x[:, None] - CENTRES).abs().argmin(1)
    counts = torch.bincount(nearest, minlength=3).numpy()
    assert chisquare(counts, num * WEIGHTS.double().numpy()).pvalue > 0.01
    for k, centre in enumerate(CENTRES):
        part = x[nearest == k]
        assert float(part.mean()) == pytest.approx(float(centre), abs=0.05)
        assert float(part.std()) == pytest.approx(WIDTH, rel=0.15)


def test_lattice_mixture_comes_back() -> None:
    check_mixture(1500, 100)


@pytest.mark.slow
def test_lattice_mixture_comes_back_from_many_samples() -> None:
    check_mixture(20_000, 400)


def test_annealing_on_the_lattice_collapses_the_density() -> None:
    """Negative control for "plain Euler alone keeps the density": anti-annealing must not pass for exact."""
    constraints, randomness = draw(500, 2)
    narrow = torch.full((6,), 0.3)

    def velocity(state: NoisyCrystals) -> Tensor:
        return gaussian_velocity(state.lattice, state.t_lattice[:, None], MEAN, narrow)

    for annealing, factor in ((0.0, 1.0), (10.0, 0.0)):
        config = replace(EULER, num_steps=100, lattice_annealing=annealing)
        result = sample(denoiser(lattice=velocity), LATTICE, constraints, randomness, config)
        x = LATTICE.encode(result.crystals.cell, result.crystals.num_atoms)
        torch.testing.assert_close(x.std(0), factor * narrow, rtol=0, atol=0.1 * 0.3)


# -- coordinates: weighted points --------------------------------------------------------------------------------------

POINTS = torch.tensor([[0.1, 0.2, 0.9], [0.6, 0.5, 0.5], [0.95, 0.7, 0.3]])
POINT_WEIGHTS = torch.tensor([0.5, 0.375, 0.125])  # exact in binary


def to_points(x: Tensor, t: Tensor) -> Tensor:
    """Exact velocity of one site, shape (B, 3), at level t, shape (B,), for clean data at POINTS with POINT_WEIGHTS."""
    displacement = minimum_image(x[:, None] - POINTS)  # (B, K, 3)
    distance = displacement.abs().amax(-1)
    weight = POINT_WEIGHTS * (distance < t[:, None] / 2)
    # Rounding and finite steps may leave every box: then the nearest point is the only one that can be meant.
    nearest = torch.nn.functional.one_hot(distance.argmin(1), len(POINTS)).to(weight.dtype)
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, nearest)
    weight = weight / weight.sum(1, keepdim=True)
    return (weight[..., None] * displacement).sum(1) / t[:, None]


def of_points(state: NoisyCrystals) -> Tensor:
    """Site 0 is held at the origin, site 1 goes to one of the points."""
    velocity = torch.zeros_like(state.frac_coords)
    velocity[:, 1] = to_points(state.frac_coords[:, 1], state.t_coords[:, 1])
    return velocity


def point_sample(num: int, config: SamplerConfig, seed: int = 0) -> Tensor:
    """Positions of the free site, shape (num, 3)."""
    constraints, randomness = draw(num, 2, seed)
    constraints.fixed_coords[:, 0] = True
    result = sample(denoiser(coords=of_points), LATTICE, constraints, randomness, config)
    assert not result.crystals.frac_coords[:, 0].any()
    return result.crystals.frac_coords[:, 1]


def occupation(frac: Tensor, tolerance: float = 1e-4) -> np.ndarray:
    """How many positions lie at each point; every one must lie at one."""
    distance = minimum_image(frac[:, None] - POINTS).abs().amax(-1)
    assert float(distance.amin(1).max()) < tolerance
    return torch.bincount(distance.argmin(1), minlength=len(POINTS)).numpy()


def test_point_velocity_is_the_regression_of_the_target() -> None:
    """At t = 0.9 the boxes overlap: mean target over the draws that land in a small cube, against the closed form."""
    n, t = 400_000, 0.9
    generator = torch.Generator().manual_seed(0)
    which = torch.multinomial(POINT_WEIGHTS, n, replacement=True, generator=generator)
    velocity = minimum_image(torch.rand(n, 3, generator=generator) - POINTS[which])
    x = (POINTS[which] + t * velocity) % 1.0
    here = torch.tensor([0.42, 0.3, 0.72])
    inside = minimum_image(x - here).abs().amax(1) < 0.03
    assert int(inside.sum()) > 60
    at = x[inside]
    exact = to_points(at, torch.full((len(at),), t))
    error = (velocity[inside] - exact).mean(0).abs()
    assert (error < 4 * velocity[inside].std(0) / len(at) ** 0.5).all()
    assert velocity[inside].std(0).max() > 0.2  # the target does vary here, so that its mean is not trivial


def test_point_weights_come_back() -> None:
    counts = occupation(point_sample(2000, replace(EULER, num_steps=120)))
    assert chisquare(counts, 2000 * POINT_WEIGHTS.double().numpy()).pvalue > 0.01


@pytest.mark.slow
def test_point_weights_come_back_from_many_samples() -> None:
    counts = occupation(point_sample(20_000, replace(EULER, num_steps=600)))
    assert chisquare(counts, 20_000 * POINT_WEIGHTS.double().numpy()).pvalue > 0.01


def test_equal_weights_in_the_velocity_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the same points with other weights fail the test above."""
    monkeypatch.setattr(f"{__name__}.POINT_WEIGHTS", torch.full((3,), 1 / 3))
    counts = occupation(point_sample(2000, replace(EULER, num_steps=120)))
    assert chisquare(counts, [1000, 750, 250]).pvalue < 1e-6


def test_anti_annealing_keeps_the_support() -> None:
    """It favours the likely points, but every sample must still end at one of them, and at each of them some."""
    for num_steps in (10, 25):
        counts = occupation(point_sample(500, SamplerConfig(num_steps=num_steps)))
        assert (counts > 0).all()
        assert counts.argmax() == 0


def test_two_free_sites_keep_their_separation_and_do_not_drift() -> None:
    """Sites at x0 and x0 + POINTS[k], x0 uniform: only the separation can be known, and the mean drift is removed.

    With v_i = minimum_image(u_i - f_i) the separation d moves by v_1 - v_0, a triangular variable on (-1, 1) per axis;
    half of it goes to each site. Weighted by its density, the exact velocity is a mixture over points and images.
    """
    images = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)))

    def of_pairs(state: NoisyCrystals) -> Tensor:
        t = state.t_coords[:, :1]
        d = state.frac_coords[:, 1] - state.frac_coords[:, 0]
        move = (minimum_image(d[:, None] - POINTS)[:, :, None] + images) / t[..., None, None]  # (B, K, M, 3)
        weight = POINT_WEIGHTS[:, None] * (1 - move.abs()).clamp(min=0).prod(-1)
        weight = weight / weight.sum((1, 2), keepdim=True).clamp(min=1e-30)
        separation = (weight[..., None] * move).sum((1, 2))
        return torch.stack([-separation / 2, separation / 2], 1)

    constraints, randomness = draw(2000, 2)
    config = replace(EULER, num_steps=120)
    frac = sample(denoiser(coords=of_pairs), LATTICE, constraints, randomness, config).crystals.frac_coords
    counts = occupation((frac[:, 1] - frac[:, 0]) % 1.0, tolerance=1e-3)
    assert chisquare(counts, 2000 * POINT_WEIGHTS.double().numpy()).pvalue > 0.01


def test_a_predicted_drift_moves_no_crystal_and_no_held_site() -> None:
    """The sampler itself removes the mean and holds sites, whatever the denoiser says of them."""
    constraints, randomness = draw(4, 3)
    constraints.fixed_coords[2:, 0] = True
    seen: list[Tensor] = []

    def drift(state: NoisyCrystals) -> Tensor:
        seen.append(state.frac_coords)
        return torch.full_like(state.frac_coords, 0.5)

    end = sample(denoiser(coords=drift), LATTICE, constraints, randomness, EULER).crystals.frac_coords
    for frac in [*seen, end]:
        displacement = minimum_image(frac - seen[0])
        torch.testing.assert_close(displacement[:2], torch.zeros(2, 3, 3), rtol=0, atol=1e-5)
        assert not displacement[2:, 0].any()
    assert minimum_image(end - seen[0])[2:, 1:].abs().min() > 0.4  # beside a held site a drift is a motion


# -- species: a correlated joint ---------------------------------------------------------------------------------------

# Atomic numbers of three sites: like charges avoid each other, and no site is independent of the others.
JOINT = {(11, 17, 11): 0.35, (17, 11, 17): 0.3, (11, 17, 19): 0.15, (19, 17, 19): 0.1, (11, 11, 11): 0.1}


def of_joint(joint: Mapping[tuple[int, ...], float]) -> Field:
    """Exact conditional distribution of each masked site given the revealed ones."""
    table, weight = torch.tensor(list(joint)), torch.tensor(list(joint.values()))

    def logits(state: NoisyCrystals) -> Tensor:
        agrees = ((state.species[:, None] == table) | (state.species[:, None] == 0)).all(-1)  # (B, K)
        one_hot = torch.nn.functional.one_hot(table, MAX_ATOMIC_NUMBER + 1).float()
        return torch.einsum("bk,kiz->biz", weight * agrees, one_hot).log()

    return logits


def independent(state: NoisyCrystals) -> Tensor:
    """The marginals of the joint, whatever is revealed."""
    return of_joint(JOINT)(replace(state, species=torch.zeros_like(state.species)))


def table_of(result: Sample) -> dict[tuple[int, ...], int]:
    rows, counts = result.crystals.atomic_numbers.unique(dim=0, return_counts=True)
    return {tuple(row): n for row, n in zip(rows.tolist(), counts.tolist(), strict=True)}


def species_sample(field: Field, num: int, num_steps: int, seed: int = 0) -> dict[tuple[int, ...], int]:
    constraints, randomness = draw(num, 3, seed)
    config = replace(EULER, num_steps=num_steps)
    return table_of(sample(denoiser(species=field), LATTICE, constraints, randomness, config))


@pytest.mark.parametrize("num_steps", [3, 30])
def test_correlated_species_come_back(num_steps: int) -> None:
    """Reveal times are stratified: with a step for every third of the trajectory no two sites are revealed at once."""
    counts = species_sample(of_joint(JOINT), 3000, num_steps)
    assert set(counts) <= set(JOINT)
    assert chisquare([counts.get(k, 0) for k in JOINT], [3000 * p for p in JOINT.values()]).pvalue > 0.01


@pytest.mark.slow
def test_correlated_species_come_back_from_many_samples() -> None:
    counts = species_sample(of_joint(JOINT), 50_000, 30)
    assert set(counts) <= set(JOINT)
    assert chisquare([counts.get(k, 0) for k in JOINT], [50_000 * p for p in JOINT.values()]).pvalue > 0.01


def test_independent_marginals_are_noticed() -> None:
    """Negative control: right marginals, wrong joint."""
    counts = species_sample(independent, 3000, 30)
    assert not set(counts) <= set(JOINT)
    first = sum(n for k, n in counts.items() if k[0] == 11) / 3000
    assert first == pytest.approx(0.6, abs=0.04)


def test_revealing_all_sites_at_once_is_noticed() -> None:
    """Negative control: in a single step the sites cannot see each other."""
    assert not set(species_sample(of_joint(JOINT), 500, 1)) <= set(JOINT)


def test_a_fixed_species_conditions_the_others() -> None:
    constraints, randomness = draw(2000, 3)
    constraints.start.atomic_numbers[:, 0] = 11
    constraints.fixed_species[:, 0] = True
    counts = table_of(sample(denoiser(species=of_joint(JOINT)), LATTICE, constraints, randomness, EULER))
    posterior = {k: p / 0.6 for k, p in JOINT.items() if k[0] == 11}
    assert set(counts) <= set(posterior)
    assert chisquare([counts.get(k, 0) for k in posterior], [2000 * p for p in posterior.values()]).pvalue > 0.01


def test_low_temperature_favours_the_likely() -> None:
    constraints, randomness = draw(300, 3)
    config = replace(EULER, species_temperature=0.05)
    counts = table_of(sample(denoiser(species=of_joint(JOINT)), LATTICE, constraints, randomness, config))
    assert counts.get((11, 17, 11), 0) > 0.9 * 300


# -- bookkeeping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "calls"), [(1.0, 30), (0.6, 18), (0.5001, 16), (0.0, 0)])
def test_a_template_takes_its_share_of_the_steps(strength: float, calls: int) -> None:
    constraints, randomness = draw(2, 3)
    constraints.start.atomic_numbers[:] = 29
    seen: list[float] = []
    steps: list[None] = []
    inner = denoiser()

    def denoise(state: NoisyCrystals, t: float) -> tuple[Prediction, int]:
        seen.append(t)
        assert float(state.t_coords.max()) == pytest.approx(t)
        return inner(state, t)

    result = sample(
        denoise, LATTICE, constraints, randomness, EULER, strength=strength, on_step=lambda: steps.append(None)
    )
    assert result.network_calls == calls == len(seen) == len(steps)
    assert seen == sorted(seen, reverse=True)
    if seen:
        assert seen[0] == pytest.approx(strength)


def test_randomness_of_a_structure_does_not_depend_on_its_batch() -> None:
    alone = Randomness.draw(torch.tensor([3]), [np.random.default_rng(7)])
    batch = Randomness.draw(torch.tensor([5, 3]), [np.random.default_rng(1), np.random.default_rng(7)])
    for name in ("coords", "reveal_time", "element"):
        assert torch.equal(getattr(alone, name)[0], getattr(batch, name)[1, :3])
    assert torch.equal(alone.lattice[0], batch.lattice[1])


def test_reveal_times_are_stratified_and_uniform() -> None:
    _, randomness = draw(2000, 4)
    tau = randomness.reveal_time
    assert torch.equal((tau * 4).floor().long().sort(1).values, torch.arange(4).expand(2000, 4))
    assert kstest(tau[:, 0].numpy(), "uniform").pvalue > 0.01
