"""The network: symmetries with their negative controls, batching, and pair features against ASE's neighbour list."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch import Tensor

from dosmatgen_ase.crystals.batch import CrystalBatch
from dosmatgen_ase.crystals.checks import check_atoms
from dosmatgen_ase.model import denoiser
from dosmatgen_ase.model.checkpoint import DEFAULT_WEIGHTS, load_model
from dosmatgen_ase.model.conditioning import ConditionalDenoiser, DOSCondition
from dosmatgen_ase.model.denoiser import DenoiserConfig, Layer, pair_features
from dosmatgen_ase.model.diffusion.lattice import LatticeProcess
from dosmatgen_ase.model.diffusion.process import NoisyCrystals, Prediction

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32 through a few layers


def random_crystal(size: int, seed: int) -> Atoms:
    """Triclinic, right-handed, without any symmetry."""
    rng = np.random.default_rng(seed)
    cell = (15 * size) ** (1 / 3) * (np.eye(3) + rng.uniform(-0.2, 0.2, (3, 3)))
    return Atoms(rng.integers(1, 90, size), cell=cell, scaled_positions=rng.random((size, 3)), pbc=True)


def state_of(structures: Sequence[Atoms], lattice: LatticeProcess, t: float = 0.3) -> NoisyCrystals:
    """Read crystals as a noisy state; the second site of each is masked."""
    batch = CrystalBatch.from_atoms(structures)
    species = batch.atomic_numbers.clone()
    species[:, 1:2] = 0
    level = torch.full((len(batch),), t)
    return NoisyCrystals(
        lattice.encode(batch.cell, batch.num_atoms), batch.frac_coords, species, batch.num_atoms, level,
        level[:, None] * batch.mask,
    )  # fmt: skip


def condition_of(structures: Sequence[Atoms], bins: int = 151, seed: int = 0) -> DOSCondition:
    """Another random DOS for each site."""
    size = max(map(len, structures))
    site = torch.rand(len(structures), size, bins, generator=torch.Generator().manual_seed(seed))
    total = site.sum(1)
    return DOSCondition(site, site > 0.2, total, total < 0)


def assert_same(a: Prediction, b: Prediction) -> None:
    for name in ("lattice", "coords", "species", "site_dos"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def differs(a: Tensor, b: Tensor) -> bool:
    """By far more than the tolerance of the symmetry tests."""
    return float((a - b).abs().max()) > 50 * TOLERANCE["atol"]


@pytest.fixture(scope="module")
def crystal() -> Atoms:
    return random_crystal(4, 0)


# -- symmetries --------------------------------------------------------------------------------------------------------


def test_prediction_is_not_trivial(tiny_model: ConditionalDenoiser, lattice: LatticeProcess, crystal: Atoms) -> None:
    prediction = tiny_model(state_of([crystal], lattice), condition_of([crystal]))
    assert prediction.species.std() > 0.01
    assert prediction.lattice.abs().min() > 1e-4
    assert (prediction.coords.abs().amax(-1) > 1e-3).all()
    torch.testing.assert_close(prediction.coords.sum(1), torch.zeros(1, 3), rtol=0, atol=1e-6)


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), size=st.integers(1, 6))
def test_rotation_and_mirror_of_atoms(
    seed: int, size: int, tiny_model: ConditionalDenoiser, lattice: LatticeProcess
) -> None:
    crystal = random_crystal(size, seed)
    expected = tiny_model(state_of([crystal], lattice), condition_of([crystal]))
    rotation = Rotation.random(rng=np.random.default_rng(seed)).as_matrix()
    for matrix in (rotation, np.diag([1.0, -1.0, 1.0]) @ rotation):
        turned = crystal.copy()
        turned.set_cell(np.asarray(crystal.cell) @ matrix, scale_atoms=True)
        assert_same(tiny_model(state_of([turned], lattice), condition_of([turned])), expected)


def test_mirror_at_the_same_metric_turns_the_velocity(
    tiny_model: ConditionalDenoiser, lattice: LatticeProcess, crystal: Atoms
) -> None:
    """The six-vector loses handedness, so the enantiomorph is x -> -x in the same cell: scalars stay, vectors turn."""
    mirror = crystal.copy()
    mirror.set_scaled_positions(-crystal.get_scaled_positions())
    a, b = (tiny_model(state_of([x], lattice), condition_of([x])) for x in (crystal, mirror))
    assert_same(b, Prediction(a.lattice, -a.coords, a.species, a.site_dos))


def test_rigid_translation(tiny_model: ConditionalDenoiser, lattice: LatticeProcess, crystal: Atoms) -> None:
    moved = crystal.copy()
    moved.translate([0.7, 3.1, -5.3])
    a, b = (tiny_model(state_of([x], lattice), condition_of([x])) for x in (crystal, moved))
    assert_same(a, b)


def test_integer_shifts(tiny_model: ConditionalDenoiser, lattice: LatticeProcess, crystal: Atoms) -> None:
    shifted = crystal.copy()
    shifts = np.array([[1, 0, 0], [0, -2, 0], [0, 0, 3], [5, -1, 1]])
    shifted.set_scaled_positions(crystal.get_scaled_positions() + shifts)
    a, b = (tiny_model(state_of([x], lattice), condition_of([x])) for x in (crystal, shifted))
    assert_same(a, b)


def test_permutation_of_sites(tiny_model: ConditionalDenoiser, lattice: LatticeProcess, crystal: Atoms) -> None:
    state, condition = state_of([crystal], lattice), condition_of([crystal])
    order = torch.tensor([2, 0, 3, 1])
    permuted = NoisyCrystals(
        state.lattice, state.frac_coords[:, order], state.species[:, order], state.num_atoms, state.t_lattice,
        state.t_coords[:, order],
    )  # fmt: skip
    condition_permuted = DOSCondition(
        condition.site[:, order], condition.site_known[:, order], condition.total, condition.total_known
    )
    a, b = tiny_model(state, condition), tiny_model(permuted, condition_permuted)
    assert a.site_dos is not None
    assert_same(b, Prediction(a.lattice, a.coords[:, order], a.species[:, order], a.site_dos[:, order]))
    # Negative control: without the condition permuted along, the sites are told apart.
    assert differs(tiny_model(permuted, condition).species, a.species[:, order])


def test_what_must_change_the_prediction(
    tiny_model: ConditionalDenoiser, lattice: LatticeProcess, crystal: Atoms
) -> None:
    """Negative controls: none of these is a symmetry."""
    expected = tiny_model(state_of([crystal], lattice), condition_of([crystal]))
    swapped, moved, strained = crystal.copy(), crystal.copy(), crystal.copy()
    swapped.numbers[[0, 2]] = crystal.numbers[[2, 0]]
    moved.positions[3] += 0.3
    strained.set_cell(np.asarray(crystal.cell) @ np.diag([1.1, 1.0, 1.0]), scale_atoms=True)
    other_basis = crystal.copy()
    other_basis.set_cell(np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]]) @ np.asarray(crystal.cell))
    for other in (swapped, moved, strained, other_basis):
        prediction = tiny_model(state_of([other], lattice), condition_of([other]))
        assert differs(prediction.coords, expected.coords)
        assert differs(prediction.lattice, expected.lattice)
    assert differs(tiny_model(state_of([crystal], lattice, t=0.6), condition_of([crystal])).coords, expected.coords)


# -- batches -----------------------------------------------------------------------------------------------------------


def with_random_biases(model: ConditionalDenoiser) -> ConditionalDenoiser:
    """A copy in which nothing is zero by its initialisation, as in no trained network."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def trained_model() -> ConditionalDenoiser:
    return load_model(DEFAULT_WEIGHTS)[0]


@pytest.fixture(params=["untrained", "random biases", "trained"])
def any_model(
    request: pytest.FixtureRequest, tiny_model: ConditionalDenoiser, trained_model: ConditionalDenoiser
) -> ConditionalDenoiser:
    return {"untrained": tiny_model, "random biases": with_random_biases(tiny_model), "trained": trained_model}[
        request.param
    ]


def cut(condition: DOSCondition, i: int, n: int) -> DOSCondition:
    """The condition of one structure alone."""
    return DOSCondition(*(v[i : i + 1, :n] if v.ndim == 3 else v[i : i + 1] for v in condition.__dict__.values()))


def test_batched_is_single(any_model: ConditionalDenoiser, lattice: LatticeProcess) -> None:
    structures = [random_crystal(n, n) for n in (1, 6, 3, 2)]
    structures.append(bulk("Cu"))
    condition = condition_of(structures)
    batched = any_model(state_of(structures, lattice), condition)
    assert batched.site_dos is not None
    for i, atoms in enumerate(structures):
        n = len(atoms)
        single = any_model(state_of([atoms], lattice), cut(condition, i, n))
        part = Prediction(*(v[i : i + 1] for v in (batched.lattice,)), batched.coords[i : i + 1, :n],
                          batched.species[i : i + 1, :n], batched.site_dos[i : i + 1, :n])  # fmt: skip
        assert_same(part, single)
        assert not batched.coords[i, n:].any()


@pytest.mark.parametrize("padded", [1, 18])
def test_padding_changes_nothing(padded: int, any_model: ConditionalDenoiser, lattice: LatticeProcess) -> None:
    """One padded site moved the shipped network's species logits by 1.4, and 18 moved them by 32."""
    structures = [random_crystal(2, 0), random_crystal(2 + padded, 1)]
    condition = condition_of(structures)
    alone = any_model(state_of(structures[:1], lattice), cut(condition, 0, 2))
    together = any_model(state_of(structures, lattice), condition)
    assert alone.site_dos is not None
    assert together.site_dos is not None
    assert_same(
        Prediction(together.lattice[:1], together.coords[:1, :2], together.species[:1, :2], together.site_dos[:1, :2]),
        alone,
    )


def test_without_padding_the_mask_of_sites_changes_no_bit(
    any_model: ConditionalDenoiser, lattice: LatticeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crystals are generated in batches of one size: they stay what they were before padded sites were masked."""
    structures = [random_crystal(4, seed) for seed in range(3)]
    state, condition = state_of(structures, lattice), condition_of(structures)
    masked = any_model(state, condition)
    whole = Layer.forward

    def without_mask(self: Layer, h: Tensor, u: Tensor, pair: Tensor, features: Any, site: Tensor, *rest: Any) -> Any:
        return whole(self, h, u, pair, features, torch.tensor(1.0), *rest)

    monkeypatch.setattr(Layer, "forward", without_mask)
    unmasked = any_model(state, condition)
    assert all(torch.equal(a, b) for a, b in zip(masked.__dict__.values(), unmasked.__dict__.values(), strict=True))


# -- precision ---------------------------------------------------------------------------------------------------------


def test_the_geometry_stays_in_float32_under_autocast(
    any_model: ConditionalDenoiser, lattice: LatticeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    structures = [random_crystal(n, n) for n in (4, 2)]
    state, condition = state_of(structures, lattice), condition_of(structures)
    seen: list[denoiser.PairFeatures] = []
    kinds: list[torch.dtype] = []
    whole, layer = denoiser.pair_features, Layer.forward

    def features(*arguments: Any) -> denoiser.PairFeatures:
        seen.append(found := whole(*arguments))
        return found

    def forward(self: Layer, *arguments: Any) -> Any:
        kinds.append(self.pair_out(arguments[2]).dtype)
        return layer(self, *arguments)

    monkeypatch.setattr(denoiser, "pair_features", features)
    monkeypatch.setattr(Layer, "forward", forward)
    exact = any_model(state, condition)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = any_model(state, condition)
    for name in ("scalar", "vector", "tensor"):
        assert torch.equal(getattr(seen[0], name), getattr(seen[1], name))
    layers = len(any_model.denoiser.layers)
    assert kinds == [torch.float32] * layers + [torch.bfloat16] * layers
    for name in ("lattice", "coords", "species", "site_dos"):
        a, b = getattr(exact, name), getattr(coarse, name)
        assert b.dtype == torch.float32
        assert (a - b).norm() < 0.05 * a.norm()


def test_no_gradient_crosses_structures(tiny_model: ConditionalDenoiser, lattice: LatticeProcess) -> None:
    structures = [random_crystal(n, n) for n in (3, 5)]
    condition = condition_of(structures)
    condition.site.requires_grad_(True)
    state = state_of(structures, lattice)
    state.lattice.requires_grad_(True)
    prediction = tiny_model(state, condition)
    assert prediction.site_dos is not None
    out = sum(v[0].square().sum() for v in prediction.__dict__.values())
    site, cell = torch.autograd.grad(out, [condition.site, state.lattice])
    assert not site[1].any()
    assert not cell[1].any()
    assert site[0].any()
    assert cell[0].any()
    assert not site[0, 3:].any()  # padding


def test_a_held_site_does_not_move(tiny_model: ConditionalDenoiser, lattice: LatticeProcess, crystal: Atoms) -> None:
    state = state_of([crystal], lattice)
    state.t_coords[0, 2] = 0.0
    velocity = tiny_model(state, None).coords
    assert not velocity[0, 2].any()
    assert velocity[0, [0, 1, 3]].abs().amax(1).min() > 0


# -- pair features -----------------------------------------------------------------------------------------------------


def reference_features(atoms: Atoms, num_radial: int, cutoff: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over ASE's neighbour list, in float64, before compression."""
    n = len(atoms)
    scalar, vector, tensor = (np.zeros((n, n, *components, num_radial)) for components in ((), (3,), (6,)))
    centres = np.linspace(0.5, cutoff - 0.5, num_radial)
    for i, j, d, v in zip(*neighbor_list("ijdD", atoms, cutoff), strict=True):
        radial = np.exp(-(((d - centres) / (centres[1] - centres[0])) ** 2)) * 0.5 * (1 + np.cos(np.pi * d / cutoff))
        x, y, z = v / d
        scalar[i, j] += radial
        vector[i, j] += np.outer([x, y, z], radial)
        tensor[i, j] += np.outer([x * x, y * y, z * z, x * y, x * z, y * z], radial)
    return scalar, vector, tensor


@pytest.mark.parametrize(
    "atoms",
    [bulk("Cu"), bulk("NaCl", "rocksalt", a=5.64), random_crystal(1, 1), random_crystal(4, 2), random_crystal(7, 3)],
    ids=lambda a: str(a.symbols),
)
def test_pair_features_are_sums_over_the_neighbour_list(atoms: Atoms) -> None:
    batch = CrystalBatch.from_atoms([atoms])
    features = pair_features(batch.cell, batch.frac_coords, batch.mask, 8, 6.5)
    scalar, vector, tensor = reference_features(atoms, 8, 6.5)
    damping = 1 + 0.3 * scalar[:, :, None]
    for found, expected in (
        (features.scalar, np.log1p(scalar)),
        (features.vector, vector / damping),
        (features.tensor, tensor / damping),
    ):
        np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-3, atol=2e-4)
    assert scalar.max() > 0.1


def test_the_only_atom_of_a_cell_sees_its_images() -> None:
    batch = CrystalBatch.from_atoms([bulk("Cu")])
    features = pair_features(batch.cell, batch.frac_coords, batch.mask, 8, 6.5)
    assert features.scalar.max() > 0.5
    torch.testing.assert_close(features.vector, torch.zeros_like(features.vector), rtol=0, atol=1e-5)  # inversion


def test_a_lonely_atom_has_no_neighbours(tiny_model: ConditionalDenoiser, lattice: LatticeProcess) -> None:
    atoms = Atoms("H", cell=[30.0, 30, 30], pbc=True)
    batch = CrystalBatch.from_atoms([atoms])
    features = pair_features(batch.cell, batch.frac_coords, batch.mask, 8, 6.5)
    assert not any(v.any() for v in features.__dict__.values())
    prediction = tiny_model(state_of([atoms], lattice), None)
    assert all(torch.isfinite(v).all() for v in prediction.__dict__.values())


@pytest.mark.parametrize("vector", [[-1e4] * 6, [1e4] * 6, [80, -80, 80, -80, 80, -80], [0, 0, 0, 0, 0, -30]])
def test_collapsed_and_absurd_cells_stay_finite(
    vector: list[float], tiny_model: ConditionalDenoiser, lattice: LatticeProcess
) -> None:
    state = state_of([random_crystal(3, 0)], lattice)
    state = NoisyCrystals(torch.tensor([vector]).float(), *list(state.__dict__.values())[1:])
    prediction = tiny_model(state, None)
    assert all(torch.isfinite(v).all() for v in prediction.__dict__.values())


def test_sites_on_top_of_each_other_stay_finite(tiny_model: ConditionalDenoiser, lattice: LatticeProcess) -> None:
    state = state_of([random_crystal(3, 0)], lattice)
    state.frac_coords[:] = 0.5
    assert all(torch.isfinite(v).all() for v in tiny_model(state, None).__dict__.values())


def test_config_round_trips_through_its_dictionary() -> None:
    config = DenoiserConfig(width=24, num_layers=3)
    assert DenoiserConfig(**config.to_dict()) == config


# -- Atoms at the border -----------------------------------------------------------------------------------------------


def test_atoms_survive_the_batch() -> None:
    structures = [random_crystal(3, 5), bulk("Fe"), random_crystal(20, 6)]
    for before, after in zip(structures, CrystalBatch.from_atoms(structures).to_atoms(), strict=True):
        assert (after.numbers == before.numbers).all()
        assert after.pbc.all()
        np.testing.assert_allclose(after.cell, before.cell, atol=1e-5)
        np.testing.assert_allclose(after.positions, before.positions, atol=1e-5)
        assert ((after.get_scaled_positions(wrap=False) >= 0) & (after.get_scaled_positions(wrap=False) < 1)).all()


def broken(**changes: object) -> Atoms:
    atoms = bulk("Cu")
    for name, value in changes.items():
        setattr(atoms, name, value)
    return atoms


@pytest.mark.parametrize(
    ("atoms", "error", "fragment"),
    [
        ("Cu", TypeError, "must be an ase.Atoms, not str"),
        (Atoms(cell=[3, 3, 3], pbc=True), ValueError, "has no atoms"),
        (bulk("Cu", cubic=True) * (2, 2, 2), ValueError, "has 32 atoms"),
        (broken(pbc=(True, True, False)), ValueError, r"atoms\.pbc = True"),
        (broken(positions=[[np.nan, 0, 0]]), ValueError, "not finite"),
        (broken(cell=np.diag([3.0, 3.0, 0.0])), ValueError, "without volume"),
        (broken(info={"occupancy": {"0": {"Cu": 0.5, "Au": 0.5}}}), ValueError, "disordered"),
        (broken(numbers=[95]), ValueError, "outside H to Pu"),
        (broken(numbers=[0]), ValueError, "outside H to Pu"),
    ],
)
def test_what_is_not_a_crystal_is_refused(atoms: object, error: type[Exception], fragment: str) -> None:
    with pytest.raises(error, match=fragment):
        check_atoms(atoms, "template")


def test_a_cell_that_is_not_finite_is_no_error_of_the_network(tiny_config: DenoiserConfig) -> None:
    """As weights may make one that are finite and absurd: the screen then rejects the crystal."""
    cell = torch.eye(3)[None] * 3
    cell[0, 0, 0] = torch.nan
    mask = torch.ones(1, 2, dtype=torch.bool)
    pair_features(cell, torch.tensor([[[0.0, 0, 0], [0.5, 0.5, 0.5]]]), mask, tiny_config.num_radial, 6.0)
