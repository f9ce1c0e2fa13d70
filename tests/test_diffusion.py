"""The noise processes in closed form: lattice, coordinates, species."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from scipy.stats import chisquare, kstest

from dosmatgen_ase.crystals.batch import CrystalBatch, minimum_image, wrap
from dosmatgen_ase.model.diffusion import coordinates, species
from dosmatgen_ase.model.diffusion.lattice import (
    BASIS,
    LOG_EIGENVALUE_LIMIT,
    LatticeProcess,
    symmetric_exp,
    symmetric_log,
)
from dosmatgen_ase.model.diffusion.process import JointProcess
from dosmatgen_ase.model.running_sum import doubling_sum, running_sum

UNIT = LatticeProcess((0.0,) * 6, (1.0,) * 6)
PROCESS = LatticeProcess((0.1, -0.2, 0.0, 0.3, 0.0, 1.5), (0.5, 0.4, 0.3, 0.2, 0.6, 0.7))


def random_cells(n: int, seed: int = 0) -> torch.Tensor:
    """Cells of alternating handedness, no two alike, in float64."""
    sign = np.where(np.arange(n) % 2, -1.0, 1.0)[:, None, None]
    cells = 4 * np.eye(3) + np.random.default_rng(seed).uniform(-1, 1, size=(n, 3, 3))
    return torch.tensor(sign * cells)


def atoms_per_cell(n: int) -> torch.Tensor:
    return torch.arange(n) % 7 + 1


# -- lattice -----------------------------------------------------------------------------------------------------------


def test_basis_is_orthonormal_and_symmetric() -> None:
    gram = torch.einsum("kab,lab->kl", BASIS, BASIS)
    torch.testing.assert_close(gram, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(BASIS, BASIS.mT)


def test_decode_returns_the_metric_and_a_right_handed_cell() -> None:
    cell, n = random_cells(50), atoms_per_cell(50)
    assert (torch.linalg.det(cell) < 0).any()
    decoded = PROCESS.decode(PROCESS.encode(cell, n), n).double()
    torch.testing.assert_close(decoded @ decoded.mT, cell @ cell.mT, rtol=1e-4, atol=1e-4)
    assert (torch.linalg.det(decoded) > 0).all()
    torch.testing.assert_close(decoded, decoded.mT)


def test_encode_after_decode_is_the_identity() -> None:
    vector, n = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)), atoms_per_cell(50)
    torch.testing.assert_close(PROCESS.encode(PROCESS.decode(vector, n), n), vector, rtol=1e-4, atol=1e-5)


def test_encode_knows_neither_orientation_nor_handedness() -> None:
    cell, n = random_cells(20), atoms_per_cell(20)
    rotation = torch.tensor(Rotation.random(20, rng=np.random.default_rng(1)).as_matrix())
    mirror = torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))
    for turned in (cell @ rotation, cell @ mirror, -cell):
        torch.testing.assert_close(PROCESS.encode(turned, n), PROCESS.encode(cell, n), rtol=0, atol=1e-5)


def test_encode_does_know_the_choice_of_lattice_basis() -> None:
    """Negative control: the same lattice in another basis, or its axes in another order, is another six-vector."""
    cell, n = random_cells(1), atoms_per_cell(1)
    sheared = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.float64) @ cell
    for other in (sheared, cell[:, [1, 2, 0]]):
        assert (PROCESS.encode(other, n) - PROCESS.encode(cell, n)).abs().max() > 0.01


def test_the_trace_is_the_volume_per_atom() -> None:
    cell, n = random_cells(10), atoms_per_cell(10)
    volume = torch.linalg.det(cell).abs() / n
    torch.testing.assert_close(UNIT.encode(cell, n)[:, 5].double(), volume.log() / math.sqrt(3), rtol=0, atol=1e-5)
    supercell = torch.diag(torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64)) @ cell
    torch.testing.assert_close(UNIT.encode(supercell, 8 * n), UNIT.encode(cell, n), rtol=0, atol=1e-5)


def test_exponential_inverts_the_logarithm_and_agrees_with_torch() -> None:
    log = symmetric_log(random_cells(10))
    torch.testing.assert_close(symmetric_exp(log), torch.linalg.matrix_exp(log))
    torch.testing.assert_close(symmetric_log(symmetric_exp(log)), log)


def test_exponential_is_finite_for_any_input() -> None:
    huge = 1e6 * torch.randn(10, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cell = symmetric_exp(huge + huge.mT)
    assert torch.isfinite(cell).all()
    assert (torch.linalg.eigvalsh(cell) <= math.exp(LOG_EIGENVALUE_LIMIT) * 1.001).all()


def test_a_matrix_that_is_not_finite_gives_no_cell_and_spoils_no_other() -> None:
    good = 0.1 * torch.eye(3, dtype=torch.float64)
    absurd = torch.stack([good, good * torch.nan, good * torch.inf])
    cell = symmetric_exp(absurd)
    torch.testing.assert_close(cell[0], symmetric_exp(good[None])[0])
    assert cell[1:].isnan().all()


def test_fit_standardises() -> None:
    cell, n = random_cells(200), atoms_per_cell(200)
    vector = LatticeProcess.fit(cell, n).encode(cell, n)
    torch.testing.assert_close(vector.mean(0), torch.zeros(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(vector.std(0), torch.ones(6), rtol=0, atol=1e-4)


def test_fit_of_cells_that_do_not_vary_stays_finite() -> None:
    cell = torch.eye(3, dtype=torch.float64) * torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64)[:, None, None]
    n = torch.ones(3, dtype=torch.int64)
    process = LatticeProcess.fit(cell, n)
    vector = process.encode(cell, n)
    assert torch.isfinite(vector).all()
    torch.testing.assert_close(process.decode(vector, n).double(), cell, rtol=1e-5, atol=1e-5)


def test_lattice_noise_has_the_moments_of_the_path() -> None:
    x0 = torch.tensor([[1.0, -2.0, 0.5, 0.0, 3.0, -1.0]]).expand(40_000, 6)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    for t in (0.0, 0.3, 1.0):
        x, _ = LatticeProcess.noised(x0, noise, torch.full((len(x0),), t))
        torch.testing.assert_close(x.mean(0), (1 - t) * x0[0], rtol=0, atol=0.025)
        torch.testing.assert_close(x.std(0), torch.full((6,), t), rtol=0, atol=0.015)


def test_lattice_velocity_is_the_derivative_of_the_path() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64).unbind(0)
    t = torch.rand(5, generator=generator, dtype=torch.float64)
    (ahead, velocity), (behind, _) = (LatticeProcess.noised(x0, noise, t + h) for h in (1e-4, -1e-4))
    torch.testing.assert_close((ahead - behind) / 2e-4, velocity)


# -- coordinates -------------------------------------------------------------------------------------------------------


def random_sites(batch: int = 6, size: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean positions, uniform draws, and a mask with padding."""
    f0, uniform = torch.rand(2, batch, size, 3, generator=torch.Generator().manual_seed(0)).unbind(0)
    mask = torch.arange(size) < (torch.arange(batch) % size + 1)[:, None]
    return f0, uniform, mask


@pytest.mark.parametrize("x", [-1e-9, -1e-20, -0.0, 0.0, 1.0, 1.0 - 1e-9, -1.0, 5.25, -7.75, 1e6 + 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrap_lands_below_one(x: float, dtype: torch.dtype) -> None:
    wrapped = wrap(torch.tensor([x], dtype=dtype))
    assert 0.0 <= float(wrapped) < 1.0
    assert abs(float(minimum_image(wrapped - torch.tensor([x], dtype=dtype)))) < 1e-6


def test_wrap_is_needed() -> None:
    """Negative control: the plain remainder of a tiny negative float32 is 1."""
    assert float(torch.tensor(-1e-9) % 1.0) == 1.0


@given(st.floats(-20, 20), st.integers(-5, 5))
def test_minimum_image_ignores_integer_shifts(x: float, shift: int) -> None:
    near, far = (float(minimum_image(torch.tensor(v, dtype=torch.float64))) for v in (x, x + shift))
    assert -0.5 <= near <= 0.5
    difference = abs(near - far)
    assert min(difference, 1 - difference) < 1e-9  # at exactly half a cell either sign is right


def test_path_ends() -> None:
    f0, uniform, mask = random_sites()
    at_zero, velocity = coordinates.noised(f0, uniform, torch.zeros(mask.shape), mask)
    torch.testing.assert_close(at_zero, f0)
    assert not velocity.any()
    at_one, velocity = coordinates.noised(f0, uniform, torch.ones(mask.shape), mask)
    # The end is the uniform draw up to one rigid translation of the crystal.
    shift = minimum_image(at_one - uniform)
    relative = minimum_image(shift - shift[:, :1])[mask]
    torch.testing.assert_close(relative, torch.zeros_like(relative), rtol=0, atol=1e-6)
    assert velocity[mask].abs().max() <= 1.0


def test_mean_drift_is_removed_where_all_sites_move() -> None:
    f0, uniform, mask = random_sites()
    _, velocity = coordinates.noised(f0, uniform, 0.7 * mask, mask)
    torch.testing.assert_close(velocity.sum(1), torch.zeros(len(mask), 3), rtol=0, atol=1e-6)
    assert not velocity[~mask].any()


def test_a_held_site_defines_the_origin() -> None:
    f0, uniform, mask = random_sites()
    t = 0.7 * mask
    t[:, 0] = 0.0
    frac, velocity = coordinates.noised(f0, uniform, t, mask)
    assert not velocity[:, 0].any()
    torch.testing.assert_close(frac[:, 0], f0[:, 0])
    moving = mask & (t > 0)
    torch.testing.assert_close(velocity[moving], minimum_image(uniform - f0)[moving])


def test_a_single_atom_does_not_move() -> None:
    f0 = torch.tensor([[[0.25, 0.5, 0.0]]])
    uniform, mask = torch.tensor([[[0.9, 0.1, 0.3]]]), torch.ones(1, 1, dtype=torch.bool)
    frac, velocity = coordinates.noised(f0, uniform, torch.ones(1, 1), mask)
    torch.testing.assert_close(frac, f0)
    assert not velocity.any()


def test_coordinate_velocity_is_the_derivative_of_the_path() -> None:
    f0, uniform, mask = random_sites()
    f0, uniform = f0.double(), uniform.double()
    t = torch.where(mask, 0.2 + 0.5 * torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)), 0.0).double()
    (ahead, velocity), (behind, _) = (coordinates.noised(f0, uniform, (t + h) * mask, mask) for h in (1e-4, -1e-4))
    torch.testing.assert_close(minimum_image(ahead - behind) / 2e-4, velocity)


def test_noised_positions_commute_with_translation() -> None:
    f0, uniform, mask = random_sites()
    shift = torch.tensor([0.3, 0.8, 0.55])
    frac, velocity = coordinates.noised(f0, uniform, 0.6 * mask, mask)
    moved, same = coordinates.noised(wrap(f0 + shift), wrap(uniform + shift), 0.6 * mask, mask)
    torch.testing.assert_close(same, velocity, rtol=0, atol=1e-5)
    difference = minimum_image(moved - frac - shift)[mask]
    torch.testing.assert_close(difference, torch.zeros_like(difference), rtol=0, atol=1e-5)


def test_a_lone_moving_site_spreads_evenly_over_its_box() -> None:
    """Beside a held site no drift is removed: at level t the site is uniform in a cube of edge t around its origin."""
    n, t = 4000, 0.4
    f0 = torch.zeros(n, 2, 3)
    uniform = torch.rand(f0.shape, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([0.0, t]).expand(n, 2)
    frac, _ = coordinates.noised(f0, uniform, level, torch.ones(n, 2, dtype=torch.bool))
    displacement = minimum_image(frac[:, 1]).numpy().ravel()
    assert kstest(displacement, "uniform", args=(-t / 2, t)).pvalue > 0.01


@pytest.mark.parametrize("annealing", [0.0, 3.0, 10.0, 1e6])
def test_step_factor(annealing: float) -> None:
    assert coordinates.step_factor(1.0, 0.9, annealing) == pytest.approx(0.1)  # no annealing where all is noise
    assert coordinates.step_factor(0.1, 0.0, annealing) == 1.0  # the last step arrives
    for t in np.linspace(0.05, 1, 20):
        factor = coordinates.step_factor(t, t - 0.05, annealing)
        assert 0.0 <= factor <= 1.0
        assert factor >= coordinates.step_factor(t, t - 0.05, 0.0)


def test_plain_euler_factor_reproduces_a_straight_path() -> None:
    x, t = 0.8, 1.0
    for s in (0.7, 0.35, 0.1, 0.0):
        x -= coordinates.step_factor(t, s, 0.0) * t * 0.5  # velocity 0.5, clean value 0.3
        t = s
        assert x == pytest.approx(0.3 + 0.5 * t)


# -- species -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.25, 0.8, 1.0])
def test_sites_are_masked_with_probability_t(t: float) -> None:
    n = 20_000
    tau = torch.rand(1, n, generator=torch.Generator().manual_seed(0))
    numbers = torch.full((1, n), 29)
    masked = species.noised(numbers, tau, torch.full((1, n), t)) == species.MASKED
    assert float(masked.float().mean()) == pytest.approx(t, abs=4 * math.sqrt(t * (1 - t) / n))
    assert (species.noised(numbers, tau, torch.full((1, n), t))[~masked] == 29).all()


def test_masking_is_monotone_in_the_level() -> None:
    tau = torch.rand(1, 100, generator=torch.Generator().manual_seed(0))
    numbers = torch.full((1, 100), 8)
    few, many = (species.noised(numbers, tau, torch.full((1, 100), t)) == 0 for t in (0.3, 0.6))
    assert (many | ~few).all()


def test_draw_follows_the_probabilities() -> None:
    weights = {1: 0.1, 8: 0.4, 29: 0.3, 94: 0.2}
    logits = torch.full((95,), -torch.inf)
    for z, w in weights.items():
        logits[z] = math.log(w) + 3.0  # a constant does not matter
    logits[0] = 5.0  # nor does the entry of the mask, however likely
    n = 20_000
    drawn = species.draw(logits.expand(1, n, -1), torch.rand(1, n, generator=torch.Generator().manual_seed(0)))
    counts = torch.bincount(drawn[0], minlength=95).numpy()
    assert counts.sum() == counts[list(weights)].sum()
    assert chisquare(counts[list(weights)], n * np.array(list(weights.values()))).pvalue > 0.01


def test_draw_inverts_the_cumulative_distribution() -> None:
    logits = torch.full((1, 1, 95), -torch.inf)
    logits[..., [5, 7]] = torch.tensor([0.25, 0.75]).log()
    for u, z in ((0.0, 5), (0.2499, 5), (0.2501, 7), (math.nextafter(1.0, 0.0), 7)):
        assert species.draw(logits, torch.tensor([[u]], dtype=torch.float64)).item() == z


@given(st.sets(st.integers(1, 94), min_size=1, max_size=6), st.floats(0, 1, exclude_max=True), st.integers(0, 2**31))
def test_draw_stays_within_the_allowed(allowed: set[int], u: float, seed: int) -> None:
    logits = 20 * torch.randn(1, 1, 95, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(95, dtype=torch.bool)
    mask[list(allowed)] = False
    drawn = species.draw(logits.masked_fill(mask, -torch.inf), torch.tensor([[u]], dtype=torch.float64))
    assert drawn.item() in allowed


# -- joint -------------------------------------------------------------------------------------------------------------


def test_joint_process_noises_each_field_at_its_own_level() -> None:
    batch, size = 4, 3
    generator = torch.Generator().manual_seed(0)
    crystals = CrystalBatch(
        random_cells(batch).float(),
        torch.rand(batch, size, 3, generator=generator),
        torch.randint(1, 95, (batch, size), generator=generator),
        torch.full((batch,), size),
    )
    levels = torch.zeros(batch), torch.zeros(batch, size), torch.zeros(batch, size)
    levels[0][0], levels[1][1], levels[2][2] = 0.5, 0.5, 1.0
    state, target = JointProcess(PROCESS).noised(crystals, *levels, generator)
    clean = PROCESS.encode(crystals.cell, crystals.num_atoms)
    assert [bool((state.lattice[i] != clean[i]).any()) for i in range(batch)] == [True, False, False, False]
    moved = minimum_image(state.frac_coords - crystals.frac_coords).abs().amax((1, 2)) > 1e-6
    assert moved.tolist() == [False, True, False, False]
    assert [bool((row == 0).all()) for row in state.species] == [False, False, True, False]
    torch.testing.assert_close(state.lattice, clean + levels[0][:, None] * target.lattice, rtol=1e-5, atol=1e-5)
    assert torch.equal(target.species, crystals.atomic_numbers)


def test_clean_reads_a_noiseless_state_back() -> None:
    frac = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(0))
    frac[1, 1] = 0.0
    numbers = torch.tensor([[1, 8], [29, 0], [6, 7]])
    crystals = CrystalBatch(random_cells(3).float(), frac, numbers, torch.tensor([2, 1, 2]))
    zeros = torch.zeros(3, 2)
    process = JointProcess(PROCESS)
    state, _ = process.noised(crystals, zeros[:, 0], zeros, zeros, torch.Generator().manual_seed(0))
    back = process.clean(state)
    assert torch.equal(back.atomic_numbers, crystals.atomic_numbers)
    assert torch.equal(back.frac_coords, crystals.frac_coords)
    torch.testing.assert_close(back.cell @ back.cell.mT, crystals.cell @ crystals.cell.mT, rtol=1e-4, atol=1e-4)


# -- running sums ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 8, 95, 151])
def test_the_sum_in_doubling_steps_is_the_cumulative_sum(size: int) -> None:
    values = torch.rand(2, 3, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(doubling_sum(values), values.cumsum(-1))
    assert torch.equal(running_sum(values), values.cumsum(-1))  # on a CPU
