"""Learned tight binding against closed forms, symmetries and limits; networks have random weights that are not zero."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dosmatgen_ase.forward.tight_binding.basis import (
    ELECTRONS,
    ORBITALS,
    SHELL_OF_ORBITAL,
    group,
    start_levels,
    valence_electrons,
)
from dosmatgen_ase.forward.tight_binding.graph import CrystalGraph, GraphBatch, collate, crystal_graph
from dosmatgen_ase.forward.tight_binding.integrals import INTEGRALS, blocks, directions
from dosmatgen_ase.forward.tight_binding.kpoints import mesh_size, offset_mesh, random_mesh, symmetric_mesh
from dosmatgen_ase.forward.tight_binding.model import (
    BAND_ENDS,
    MatrixElements,
    TightBinding,
    TightBindingConfig,
    _in_space,
    _spread,
    bloch,
    velocities,
)
from dosmatgen_ase.forward.tight_binding.spectrum import SMEARING, Spectrum, broadened, eigh, zero_and_gap

ENERGIES = torch.linspace(-10, 5, 151, dtype=torch.float64)
SIGMA = 0.2


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> TightBinding:
    """A small model whose every weight is random, in double precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        centres = np.tile([-6.0, -2.0, -1.0], (95, 1))
        net = TightBinding(TightBindingConfig(width=16, hidden=24, site_hidden=16), torch.tensor(start_levels(centres)))
        for weight in net.parameters():
            torch.nn.init.normal_(weight, std=0.15)
    return net.double().eval().requires_grad_(False)


def moved(made: CrystalGraph, positions: Tensor, cell: Tensor) -> CrystalGraph:
    """The same bonds between atoms that moved a little, differentiable."""
    bond = positions[made.second] - positions[made.first] + made.vectors[made.image].to(cell) @ cell
    return replace(made, bond=bond)


def graph(atoms: Atoms, cutoff: float = 6.0) -> CrystalGraph:
    made = crystal_graph(atoms, cutoff)
    return moved(made, torch.tensor(atoms.positions), torch.tensor(atoms.cell.array))


def levels(model: TightBinding, atoms: Atoms, kpoints: np.ndarray) -> Tensor:
    return model.spectrum(collate([graph(atoms)]), torch.tensor(kpoints)[None])[0].levels[0]


def dos(model: TightBinding, atoms: Atoms, kpoints: np.ndarray) -> Tensor:
    """(n, 3, 151)"""
    return model(collate([graph(atoms)]), torch.tensor(kpoints)[None], ENERGIES, SIGMA)[0][0]


def crystal(seed: int = 0) -> Atoms:
    """No symmetry, four elements with and without d shells."""
    places = [[0, 0, 0], [0.5, 0.5, 0.4], [0.5, 0, 0.1], [0, 0.45, 0.6]]
    cell = [[4.1, 0.1, 0], [0.3, 4.4, 0.2], [0, -0.2, 4.8]]
    atoms = Atoms("NaClTiO", scaled_positions=places, cell=cell, pbc=True)
    atoms.rattle(0.05, seed=seed)
    return atoms


# -- closed forms ------------------------------------------------------------------------------------------------------


def lattice(atoms: Atoms, cutoff: float, integrals: dict[int, float]) -> tuple[GraphBatch, MatrixElements]:
    """A crystal whose bonds all have the same integrals, its levels at zero."""
    batch = collate([graph(atoms, cutoff)])
    wanted = torch.zeros(len(batch.first), len(INTEGRALS), dtype=torch.float64)
    for k, value in integrals.items():
        wanted[:, k] = value
    unit = batch.bond / torch.linalg.vector_norm(batch.bond, dim=1, keepdim=True)
    atoms_zero = torch.zeros(len(batch.numbers), 9, 9, dtype=torch.float64)
    nothing = torch.zeros(len(batch.numbers), 3, dtype=torch.float64)
    return batch, MatrixElements(atoms_zero, blocks(wanted, directions(unit)), nothing[:, 0], nothing)


def test_a_chain_has_the_cosine_band() -> None:
    batch, elements = lattice(Atoms("H", cell=[2, 20, 20], pbc=True), 2.5, {0: -1.3})
    k = torch.rand(1, 9, 3, dtype=torch.float64)
    found = eigh(bloch(batch, elements, k))[0][0, 0, :, 0]
    torch.testing.assert_close(found, -2.6 * torch.cos(2 * math.pi * k[0, :, 0]))


def test_a_square_lattice_has_the_sum_of_two_and_its_dos_peaks_in_the_middle() -> None:
    batch, elements = lattice(Atoms("H", cell=[2, 2, 20], pbc=True), 2.5, {0: -1.0})
    mesh, weights = symmetric_mesh(np.array([0.5, 0.5, 0.05]), 40_000)
    k = torch.tensor(mesh)[None]
    band = eigh(bloch(batch, elements, k))[0]
    exact = -2 * (torch.cos(2 * math.pi * k[0, :, 0]) + torch.cos(2 * math.pi * k[0, :, 1]))
    torch.testing.assert_close(band[0, 0, :, 0], exact)
    share = torch.zeros(*band.shape, 3, dtype=torch.float64)
    share[..., 0] = 1
    zero, gap, opening = zero_and_gap(band, torch.tensor(weights)[None], torch.tensor([1.0], dtype=torch.float64))
    assert abs(float(zero)) < 1e-3  # half filled
    assert float(gap) == 0
    found = broadened(Spectrum(band, share, torch.tensor(weights)[None], zero, gap, opening), ENERGIES, SIGMA)[
        0, 0
    ].numpy()
    assert abs(ENERGIES[found.argmax()]) < 0.06  # the van Hove singularity
    # rho(E) = 2 K(1 - E^2 / 16) / (2 pi^2), two spins; far from the singularity smearing changes little
    from scipy.special import ellipk

    at = torch.argmin((ENERGIES + 2.5).abs())
    assert found[at] == pytest.approx(ellipk(1 - 2.5**2 / 16) / math.pi**2, rel=0.02)
    assert found[ENERGIES.abs() > 5].max() < 1e-6  # the band ends at 4


@pytest.mark.parametrize("axis", [(1, 0, 0), (1, 1, 1), (0.3, -1.2, 0.7)])
def test_chains_of_p_and_d_orbitals_split_into_sigma_pi_and_delta(axis: tuple[float, ...]) -> None:
    cell = np.eye(3) * 20.0
    cell[0] = 2 * np.array(axis) / np.linalg.norm(axis)
    cell[1:] = np.linalg.svd(cell[:1])[2][1:] * 20
    values = {5: 1.0, 6: -0.4, 11: -2.0, 12: 0.9, 13: -0.15}
    batch, elements = lattice(Atoms("Cu", cell=cell, pbc=True), 2.5, values)
    found = eigh(bloch(batch, elements, torch.tensor([[[0.1, 0.3, 0.8]]], dtype=torch.float64)))[0].flatten()
    cosine = 2 * math.cos(0.2 * math.pi)
    exact = sorted([0, *(cosine * v for v in (1.0, -0.4, -0.4, -2.0, 0.9, 0.9, -0.15, -0.15))])
    np.testing.assert_allclose(found, exact, atol=1e-12)


def test_blocks_are_those_of_slater_and_koster() -> None:
    """Entries of their table I, for a bond with direction cosines l, m, n."""
    l, m, n = 0.48, -0.6, 0.64  # noqa: E741
    v = np.array([0.7, 1.1, -1.2, 0.9, -0.8, 2.0, -0.6, -1.5, 0.8, 1.4, -0.7, -1.6, 0.9, -0.2])
    block = blocks(torch.tensor(v)[None], directions(torch.tensor([[l, m, n]], dtype=torch.float64)))[0].numpy()
    s, x, y, z, z2, xz, yz, x2, xy = range(9)
    r3 = math.sqrt(3)
    (sps, sds, pps, ppp, pds, pdp), (dds, ddp, ddd) = v[[1, 3, 5, 6, 7, 8]], v[11:]
    table = {
        (s, x): l * sps,
        (x, x): l**2 * pps + (1 - l**2) * ppp,
        (x, z): l * n * (pps - ppp),
        (s, xy): r3 * l * m * sds,
        (s, z2): (n**2 - (l**2 + m**2) / 2) * sds,
        (x, xy): r3 * l**2 * m * pds + m * (1 - 2 * l**2) * pdp,
        (x, yz): r3 * l * m * n * pds - 2 * l * m * n * pdp,
        (z, z2): n * (n**2 - (l**2 + m**2) / 2) * pds + r3 * n * (l**2 + m**2) * pdp,
        (y, x2): r3 / 2 * m * (l**2 - m**2) * pds - m * (1 + l**2 - m**2) * pdp,
        (xy, xy): 3 * l**2 * m**2 * dds + (l**2 + m**2 - 4 * l**2 * m**2) * ddp + (n**2 + l**2 * m**2) * ddd,
        (xy, yz): 3 * l * m**2 * n * dds + l * n * (1 - 4 * m**2) * ddp + l * n * (m**2 - 1) * ddd,
        (z2, z2): (n**2 - (l**2 + m**2) / 2) ** 2 * dds
        + 3 * n**2 * (l**2 + m**2) * ddp
        + 0.75 * (l**2 + m**2) ** 2 * ddd,
        (x2, xz): 1.5 * n * l * (l**2 - m**2) * dds
        + n * l * (1 - 2 * (l**2 - m**2)) * ddp
        - n * l * (1 - (l**2 - m**2) / 2) * ddd,
    }
    for (row, column), value in table.items():
        assert block[row, column] == pytest.approx(value, abs=1e-12), (row, column)


# -- symmetries --------------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=10, deadline=None)
@given(angle=st.floats(1, 359), axis=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: np.linalg.norm(v) > 0.1))
def test_rotation_changes_no_level_and_a_strain_does(
    model: TightBinding, angle: float, axis: tuple[float, ...]
) -> None:
    atoms, k = crystal(), np.random.default_rng(0).random((3, 3))
    turned = atoms.copy()
    turned.rotate(angle, axis, rotate_cell=True)
    before = levels(model, atoms, k)
    torch.testing.assert_close(levels(model, turned, k), before, atol=1e-9, rtol=0)
    strained = atoms.copy()
    strained.set_cell(atoms.cell * 1.02, scale_atoms=True)
    assert (levels(model, strained, k) - before).abs().max() > 0.01


def test_translation_permutation_and_wrapping_change_nothing(model: TightBinding) -> None:
    atoms, k = crystal(), np.random.default_rng(0).random((3, 3))
    before = dos(model, atoms, k)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(dos(model, atoms[order], k), before[order], atol=1e-8, rtol=0)
    moved = atoms.copy()
    moved.positions += [0.7, -0.4, 1.3]
    moved.wrap()
    torch.testing.assert_close(dos(model, moved, k), before, atol=1e-8, rtol=0)
    assert (before[0] - before[1]).abs().max() > 0.1


def test_a_supercell_is_the_folded_primitive_cell(model: TightBinding) -> None:
    atoms, k = crystal(), np.random.default_rng(0).random((4, 3))
    folded = np.concatenate([k * [0.5, 1, 1], (k + [1, 0, 0]) * [0.5, 1, 1]])
    found, expected = dos(model, atoms * (2, 1, 1), k), dos(model, atoms, folded)
    torch.testing.assert_close(found[:4], expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(found[4:], expected, atol=1e-7, rtol=0)
    assert (dos(model, atoms, k) - expected).abs().max() > 0.01  # without folding it is another


def test_hamiltonians_are_hermitian_and_time_reversal_conjugates_them(model: TightBinding) -> None:
    batch = collate([graph(crystal())])
    elements = model.matrix_elements(batch)
    k = torch.rand(1, 5, 3, dtype=torch.float64)
    one, other = bloch(batch, elements, k), bloch(batch, elements, -k)
    torch.testing.assert_close(one, one.mH)
    torch.testing.assert_close(other, one.conj())
    assert one.imag.abs().max() > 0.1


def test_a_batch_is_its_crystals(model: TightBinding) -> None:
    crystals = [bulk("Si"), crystal(), bulk("Cu"), crystal(1)]
    k = torch.rand(4, 5, 3, dtype=torch.float64)
    together, _ = model(collate([graph(a) for a in crystals]), k, ENERGIES, SIGMA)
    for i, atoms in enumerate(crystals):
        alone, _ = model(collate([graph(atoms)]), k[i : i + 1], ENERGIES, SIGMA)
        torch.testing.assert_close(together[i, : len(atoms)], alone[0], atol=1e-6, rtol=0)
        assert together[i, len(atoms) :].abs().sum() == 0
    with pytest.raises(ValueError, match="magnetic"):
        collate([graph(bulk("Cu")), graph(bulk("Fe"))])


# -- limits ------------------------------------------------------------------------------------------------------------


def test_atoms_far_apart_have_their_own_levels(model: TightBinding) -> None:
    both = Atoms("TiO", positions=[[0, 0, 0], [15, 0, 0]], cell=[30, 30, 30], pbc=True)
    k = np.random.default_rng(0).random((3, 3))
    assert len(graph(both).first) == 0
    flat = levels(model, both, k)[0]
    torch.testing.assert_close(flat, flat[:1].expand_as(flat))
    alone = torch.cat([levels(model, both[[i]], k)[0, 0] for i in (0, 1)]).sort().values
    torch.testing.assert_close(flat[0], alone)
    near = both.copy()
    near.positions[1] = [1.9, 0, 0]
    assert (levels(model, near, k)[0, 0] - alone).abs().max() > 0.05


def test_bonds_fade_out_at_the_cutoff(model: TightBinding) -> None:
    """Nothing jumps when a bond leaves the cutoff."""
    k = np.zeros((1, 3))
    found = [
        levels(model, Atoms("Cs2", positions=[[0, 0, 0], [r, 0, 0]], cell=[30, 30, 30], pbc=True), k)
        for r in (5.5, 5.9999, 6.0001)
    ]
    torch.testing.assert_close(found[1], found[2], atol=1e-5, rtol=0)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_two_equal_spins_are_one(model: TightBinding) -> None:
    k = torch.rand(1, 4, 3, dtype=torch.float64)
    batch = collate([graph(bulk("Fe"))])
    found: dict[float, tuple[Tensor, Tensor]] = {}
    original = model.matrix_elements(batch)
    for scale in (0.0, 10.0):
        elements = original._replace(splitting=original.splitting * scale)
        spins = [bloch(replace(batch, magnetic=m), elements, k) for m in (False, True)]
        assert [h.shape[1] for h in spins] == [1, 2]
        zeros = []
        for h in spins:
            values = eigh(h)[0]
            weights = torch.full((1, 4), 0.25, dtype=torch.float64)
            zeros.append(zero_and_gap(values, weights, batch.electrons.double()).zero)
        found[scale] = (eigh(spins[1])[0] - eigh(spins[0])[0], zeros[1] - zeros[0])
    torch.testing.assert_close(found[0.0][0], torch.zeros_like(found[0.0][0]))
    assert abs(float(found[0.0][1])) < 1e-5
    assert found[10.0][0].abs().max() > 0.01


# -- counting electrons ------------------------------------------------------------------------------------------------


HYDROGEN = Atoms("H2", positions=[[0, 0, 0], [0.8, 0, 0]], cell=[3, 3, 3], pbc=True)


@pytest.mark.parametrize("atoms", [crystal(), bulk("Cu"), bulk("Fe"), bulk("Al", cubic=True), HYDROGEN])
def test_the_states_below_the_fermi_level_hold_the_electrons(model: TightBinding, atoms: Atoms) -> None:
    k, weights = symmetric_mesh(graph(atoms).reciprocal, 30)
    batch = collate([graph(atoms)])
    spectrum, _ = model.spectrum(batch, torch.tensor(k)[None], torch.tensor(weights)[None])
    torch.testing.assert_close(spectrum.weights.sum(-1), torch.ones_like(spectrum.levels))
    channels = spectrum.levels.shape[1]
    occupied = torch.special.ndtr((spectrum.zero - spectrum.levels) / 0.1)
    if spectrum.gap > 0:
        occupied = (spectrum.levels <= spectrum.zero + 1e-9).double()
    count = (occupied * torch.tensor(weights)[:, None] * 2 / channels).sum()
    assert float(count) == pytest.approx(ELECTRONS[atoms.numbers].sum(), abs=2e-4)


def test_zero_is_the_top_of_the_valence_band_where_there_is_a_gap() -> None:
    k = torch.full((1, 2), 0.5, dtype=torch.float64)
    bands = torch.tensor([[[[-3.0, -1.0, 2.0], [-2.5, -0.5, 1.5]]]], dtype=torch.float64)
    told = ((4.0, -0.5, 2.0, 2.0), (2.0, -2.5, 1.5, 1.5), (3.0, -0.75, 0.0, math.nan), (6.0, 2.0, 58.0, 58.0))
    for electrons, *expected in told:
        found = zero_and_gap(bands, k, torch.tensor([electrons], dtype=torch.float64))
        assert [float(f) for f in found] == pytest.approx(expected, abs=2e-3, nan_ok=True)
    # Further points hold no electrons but bound the gap, or close it.
    for levels, zero, gap, opening in (((-2.5, -0.3, 1.3), -0.3, 1.6, 1.6), ((-2.5, 1.7, 1.8), 1.6, 0.0, -0.2)):
        edges = torch.tensor(levels, dtype=torch.float64)[None, None, None]
        found = zero_and_gap(bands, k, torch.tensor([4.0], dtype=torch.float64), edges)
        assert [float(f) for f in found] == pytest.approx([zero, gap, opening], abs=2e-3)
    # A magnetic insulator: three electrons, two of one spin and one of the other.
    spins = torch.cat([bands, bands + torch.tensor([0.0, 4.0, 4.0])], 1)
    assert [float(f) for f in zero_and_gap(spins, k, torch.tensor([3.0]))] == pytest.approx([-0.5, 2.0, 2.0])


def test_bands_end_at_gamma_or_at_face_centres_even_off_the_mesh(model: TightBinding) -> None:
    """A mesh off the special points misses the ends; there the Hamiltonian is real."""
    made = graph(bulk("MgO", "rocksalt", a=4.2))
    batch, ends = collate([made]), torch.tensor(BAND_ENDS, dtype=torch.float64)[None]
    elements = model.matrix_elements(batch)
    torch.testing.assert_close(bloch(batch, elements, ends).imag, torch.zeros_like(bloch(batch, elements, ends).real))
    torch.testing.assert_close(bloch(batch, elements, ends).real, bloch(batch, elements, ends, real=True))
    coarse, with_ends = (
        torch.tensor(offset_mesh(mesh_size(made.reciprocal, 8)))[None],
        torch.tensor(BAND_ENDS).double()[None],
    )
    off, on = (model.spectrum(batch, k)[0] for k in (coarse, torch.cat([coarse, with_ends], 1)))
    torch.testing.assert_close(off.opening, on.opening)
    filled = int(batch.electrons) // 2
    alone = zero_and_gap(off.levels, off.kweights, batch.electrons.double())
    assert float(alone.opening) > float(off.opening) + 1e-3  # the negative control: the mesh alone sees a larger gap
    assert float(off.opening) == pytest.approx(
        float(on.levels[..., filled].min() - on.levels[..., filled - 1].max()), abs=1e-9
    )


def test_elements_have_the_electrons_of_their_group() -> None:
    told = "H 1 He 2 Li 1 O 6 Na 1 Si 4 K 7 Ti 4 Cu 11 Zn 12 Ga 3 Br 7 Rb 7 Ba 8 La 3 Gd 3 Hf 4 Au 11 Tl 13 Bi 5 Ac 3"
    for symbol, electrons in zip(told.split()[::2], told.split()[1::2], strict=True):
        z = atomic_numbers[symbol]
        assert valence_electrons(z) == int(electrons), symbol
    assert [group(z) for z in (2, 5, 10, 13, 18, 21, 36, 54, 86, 87, 88)] == [18, 13, 18, 13, 18, 3, 18, 18, 18, 1, 2]
    capacity = ORBITALS.sum(1) * 2
    assert (ELECTRONS[1:] <= capacity[1:]).all()
    assert len(SHELL_OF_ORBITAL) == ORBITALS.shape[1]


# -- gradients ---------------------------------------------------------------------------------------------------------


def strained() -> Atoms:
    """MgO with no symmetry: where levels meet, the top of the valence band has a kink."""
    atoms = bulk("MgO", "rocksalt", a=4.2)
    atoms.set_cell(atoms.cell.array @ np.array([[1.0, 0.04, -0.02], [0.01, 1.05, 0.03], [0.02, 0.0, 0.96]]), True)
    atoms.positions[1] += [0.1, -0.05, 0.07]
    return atoms


@pytest.mark.parametrize("atoms", [crystal(), bulk("Al", cubic=True), strained()])
def test_gradients_to_positions_and_cell_are_those_of_finite_differences(model: TightBinding, atoms: Atoms) -> None:
    rng = np.random.default_rng(1)
    k = torch.tensor(rng.random((1, 4, 3)))
    made, pull = crystal_graph(atoms, 5.0), torch.tensor(rng.standard_normal((len(atoms), 3, 151)))
    positions, cell = torch.tensor(atoms.positions), torch.tensor(atoms.cell.array)
    step = torch.tensor(rng.standard_normal(positions.shape)), torch.tensor(rng.standard_normal((3, 3)))

    def value(t: Tensor) -> Tensor:
        batch = collate([moved(made, positions + t * step[0], cell + t * step[1])])
        return (model(batch, k, ENERGIES, SIGMA)[0][0] * pull).sum()

    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    gradient = float(torch.autograd.grad(value(zero), zero)[0])
    h = 1e-5
    expected = float(value(torch.tensor(h)) - value(torch.tensor(-h))) / (2 * h)
    assert gradient == pytest.approx(expected, rel=1e-3)
    assert abs(gradient) > 1


def test_gradients_stay_finite_where_levels_meet(model: TightBinding) -> None:
    made = crystal_graph(bulk("Cu", cubic=True), 5.0)
    positions = torch.tensor(bulk("Cu", cubic=True).positions, requires_grad=True)
    batch = collate([moved(made, positions, torch.tensor(bulk("Cu", cubic=True).cell.array))])
    k = torch.zeros(1, 1, 3, dtype=torch.float64)  # Gamma: d levels are three- and twofold
    spectrum, _ = model.spectrum(batch, k)
    assert spectrum.levels.diff(dim=-1).abs().min() < 1e-8
    (found,) = torch.autograd.grad(broadened(spectrum, ENERGIES, SIGMA)[0, 0].square().sum(), positions)
    assert torch.isfinite(found).all()


# -- meshes and broadening ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [(3, 3, 3), (3, 3, 40), (2.5, 12, 4), (3, 90, 90)])
def test_meshes_follow_the_reciprocal_lengths_and_keep_their_bound(cell: tuple[float, ...]) -> None:
    reciprocal = 1 / np.array(cell)
    for number in (1, 7, 64, 500):
        mesh = mesh_size(reciprocal, number)
        assert 1 <= mesh.prod() <= number
        assert (np.diff(mesh[np.argsort(reciprocal)]) >= 0).all()
        assert random_mesh(reciprocal, number, np.random.default_rng(0)).shape == (number, 3)
        np.testing.assert_array_equal(offset_mesh(mesh), offset_mesh(mesh))
        assert len(offset_mesh(mesh)) == mesh.prod()
        points, weights = symmetric_mesh(reciprocal, number)
        assert weights.sum() == pytest.approx(1)
        assert len(points) <= mesh.prod() // 2 + 4
        again, _ = symmetric_mesh(reciprocal, number)
        np.testing.assert_array_equal(points, again)


def test_half_of_a_mesh_stands_for_the_whole(model: TightBinding) -> None:
    atoms = crystal()
    points, weights = symmetric_mesh(graph(atoms).reciprocal, 27)
    assert len(points) == 14
    whole = np.array([[i, j, k] for i in range(3) for j in range(3) for k in range(3)]) / 3
    half, _ = model(collate([graph(atoms)]), torch.tensor(points)[None], ENERGIES, SIGMA, torch.tensor(weights)[None])
    torch.testing.assert_close(half[0], dos(model, atoms, whole), atol=1e-8, rtol=0)


@pytest.mark.parametrize("energies", [ENERGIES, torch.linspace(-3.03, 1.91, 777, dtype=torch.float64)])
def test_a_level_becomes_a_gaussian_on_any_grid(energies: Tensor) -> None:
    level = torch.tensor([[[[-1.2345]]]], dtype=torch.float64)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    found = broadened(Spectrum(level, torch.ones(1, 1, 1, 1, 1).double(), one, zero, zero, zero), energies, SIGMA)[0, 0]
    exact = 2 * torch.exp(-0.5 * ((energies + 1.2345) / SIGMA) ** 2) / (SIGMA * math.sqrt(2 * math.pi))
    torch.testing.assert_close(found, exact, atol=2e-4, rtol=0)


@pytest.mark.parametrize("spread", [0.0, 0.03, 0.13, 0.5, 0.8])
def test_a_level_that_is_spread_out_keeps_its_place_and_adds_its_variance(spread: float) -> None:
    energies = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    level = torch.tensor([[[[-1.2345]]]], dtype=torch.float64)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    shares, width = torch.ones(1, 1, 1, 1, 1).double(), torch.full_like(level, spread)
    found = broadened(Spectrum(level, shares, one, zero, zero, zero, width), energies, SIGMA)[0, 0] * 0.01 / 2
    assert float(found.sum()) == pytest.approx(1, abs=1e-4)
    assert float(found @ energies) == pytest.approx(-1.2345, abs=1e-3)
    assert float(found @ (energies + 1.2345) ** 2) == pytest.approx(SIGMA**2 + spread**2, rel=5e-3)


def test_velocities_are_the_slopes_of_the_bands(model: TightBinding) -> None:
    batch, elements = lattice(Atoms("H", cell=[2, 20, 20], pbc=True), 2.5, {0: -1.3})
    k = torch.rand(1, 9, 3, dtype=torch.float64)
    unit = torch.ones(1, 1, 9, 1, 1, dtype=torch.complex128)
    found = velocities(batch, _in_space(batch, elements), k, unit)[0, 0, :, 0]
    torch.testing.assert_close(found[:, 0], 5.2 * math.pi * torch.sin(2 * math.pi * k[0, :, 0]))
    assert not found[:, 1:].any()
    for atoms in (crystal(), bulk("Fe") * (2, 1, 1)):  # the second has two spins
        batch = collate([graph(atoms)])
        elements = model.matrix_elements(batch)
        k = torch.tensor([[[0.13, 0.32, -0.21], [0.4, 0.07, 0.29]]], dtype=torch.float64)
        vectors = eigh(bloch(batch, elements, k))[1]
        found = velocities(batch, _in_space(batch, elements), k, vectors)
        for axis in range(3):
            off = torch.eye(3, dtype=torch.float64)[axis] * 1e-5
            up, down = (eigh(bloch(batch, elements, k + sign * off))[0] for sign in (1, -1))
            torch.testing.assert_close(found[..., axis], (up - down) / 2e-5, atol=1e-5, rtol=1e-5)


def test_spread_levels_need_fewer_points(model: TightBinding) -> None:
    batch, elements = lattice(Atoms("H", cell=[2, 2, 20], pbc=True), 2.5, {0: -1.0})
    reciprocal = np.array([0.5, 0.5, 0.05])

    def dos_of(points: int, spread: bool) -> Tensor:
        mesh = mesh_size(reciprocal, points)
        k = torch.tensor(offset_mesh(mesh))[None]
        levels, vectors = eigh(bloch(batch, elements, k))
        steps = torch.tensor(1 / mesh)[None]
        width = _spread(batch, _in_space(batch, elements), k, vectors, steps) if spread else None
        share = torch.zeros(*levels.shape, 3, dtype=torch.float64)
        share[..., 0] = 1
        weights = torch.full((1, k.shape[1]), 1 / k.shape[1], dtype=torch.float64)
        found = zero_and_gap(levels, weights, torch.tensor([0.7], dtype=torch.float64), None, width)
        held = torch.special.ndtr((found.zero - levels) / (SMEARING**2 + (0.0 if width is None else width**2)) ** 0.5)
        assert float(2 * held.mean()) == pytest.approx(0.7, abs=1e-4)  # electrons
        return broadened(Spectrum(levels, share, weights, *found, width), ENERGIES, SIGMA)[0, 0]

    exact = dos_of(40_000, False)
    for points in (36, 64, 144):
        plain, spread = ((dos_of(points, s) - exact).abs().sum() / exact.sum() for s in (False, True))
        assert spread < 0.7 * plain


def test_atoms_in_one_place_are_refused() -> None:
    with pytest.raises(ValueError, match="closer than"):
        crystal_graph(Atoms("Cu2", positions=[[0, 0, 0], [0.01, 0, 0]], cell=[4, 4, 4], pbc=True), 6.0)
