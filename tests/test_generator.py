"""`DOSGenerator` as a user meets it. The weights are an untrained tiny network: no test depends on their quality."""

from __future__ import annotations

import errno
import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms, FixBondLength
from ase.neighborlist import neighbor_list

import dosmatgen_ase
from dosmatgen_ase import DOSGenerator, TargetDOS
from dosmatgen_ase.crystals.batch import CrystalBatch
from dosmatgen_ase.crystals.reduction import niggli_operation
from dosmatgen_ase.crystals.screening import Screening, screen
from dosmatgen_ase.files import extxyz
from dosmatgen_ase.generate.generator import MAX_ATTEMPTS, RejectedError, batches
from dosmatgen_ase.judge.ranking import Ranking
from dosmatgen_ase.judge.relaxation import relax
from dosmatgen_ase.model import denoiser
from dosmatgen_ase.model.conditioning import DOSCondition

STEPS = 4  # of the sampler, everywhere in this file
TARGET = TargetDOS.from_peaks([(-0.65, 6.0, 0.3)], window=(-3, 1))
OTHER = TargetDOS.from_peaks([(-5.0, 3.0, 1.0)], window=(-9, 4))
TOTAL = TargetDOS.from_arrays(np.linspace(-8, 4, 121), np.ones(121), kind="total")


@pytest.fixture(scope="module")
def generator(tiny_weights: Path) -> DOSGenerator:
    return DOSGenerator(tiny_weights, device="cpu")


def make(generator: DOSGenerator, dos: Any = TARGET, n: int | None = 3, **settings: Any) -> Any:
    return generator.generate(dos, n, **{"num_atoms": 3, "num_steps": STEPS, "seed": 0, **settings})


def record(atoms: Atoms) -> dict[str, Any]:
    return atoms.info["dosmatgen"]


def assert_same(first: Atoms, second: Atoms, tolerance: float = 1e-3) -> None:
    assert (first.numbers == second.numbers).all()
    np.testing.assert_allclose(first.cell, second.cell, atol=tolerance)
    difference = first.get_scaled_positions() - second.get_scaled_positions()
    np.testing.assert_allclose(difference - np.round(difference), 0, atol=tolerance)


def differ(first: Atoms, second: Atoms) -> bool:
    return (first.numbers != second.numbers).any() or np.abs(first.cell - second.cell).max() > 0.01


# -- what comes back ---------------------------------------------------------------------------------------------------


def test_none_gives_one_structure_and_a_number_gives_a_list(generator: DOSGenerator) -> None:
    one, several = make(generator, n=None), make(generator, n=1)
    assert isinstance(one, Atoms)
    assert isinstance(several, list)
    assert len(several) == 1
    assert_same(one, several[0])


def test_every_structure_is_a_periodic_right_handed_crystal(generator: DOSGenerator) -> None:
    made = make(generator, n=12, num_atoms=[1, 2, 5])
    assert len(made) == 12
    for atoms in made:
        assert atoms.pbc.all()
        assert atoms.cell.volume > 0
        assert np.linalg.det(atoms.cell) > 0
        assert np.isfinite(atoms.positions).all()
        assert screen(atoms).accepted
        np.testing.assert_allclose(np.asarray(atoms.cell)[np.triu_indices(3, 1)], 0, atol=1e-6)  # a along x


def test_sizes_are_taken_in_turn(generator: DOSGenerator) -> None:
    made = make(generator, n=7, num_atoms=[2, 5, 3])
    assert [len(a) for a in made] == [2, 5, 3, 2, 5, 3, 2]
    assert [record(a)["index"] for a in made] == list(range(7))


def test_sizes_are_drawn_where_none_is_given(generator: DOSGenerator) -> None:
    made = generator.generate({9: TARGET}, 30, num_steps=1, seed=0)
    sizes = {len(a) for a in made}
    assert min(sizes) >= 10  # site 9 must exist
    assert max(sizes) <= 20
    assert len(sizes) > 3


@pytest.mark.parametrize("dos", [None, TARGET, [TARGET, OTHER, TARGET], {0: OTHER, 2: TARGET}, TOTAL])
def test_every_form_of_target(dos: Any, generator: DOSGenerator) -> None:
    assert [len(a) for a in make(generator, dos, n=2)] == [3, 3]


def test_a_list_of_targets_gives_the_number_of_atoms(generator: DOSGenerator) -> None:
    assert len(make(generator, [TARGET, OTHER], n=None, num_atoms=None)) == 2


def test_sites_place_the_target(generator: DOSGenerator) -> None:
    by_sites = make(generator, TARGET, n=2, sites=[1, 2])
    by_mapping = make(generator, {1: TARGET, 2: TARGET}, n=2)
    for a, b in zip(by_sites, by_mapping, strict=True):
        assert_same(a, b)
    assert any(differ(a, b) for a, b in zip(by_sites, make(generator, TARGET, n=2), strict=True))


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_the_seed_decides(generator: DOSGenerator) -> None:
    first, again, other = make(generator), make(generator), make(generator, seed=1)
    for a, b in zip(first, again, strict=True):
        assert (a.positions == b.positions).all()
        assert (a.numbers == b.numbers).all()
    assert all(differ(a, b) for a, b in zip(first, other, strict=True))
    assert all(differ(a, b) for i, a in enumerate(first) for b in first[:i])


def test_without_a_seed_every_call_differs(generator: DOSGenerator) -> None:
    first, second = make(generator, n=None, seed=None), make(generator, n=None, seed=None)
    assert record(first)["seed"] != record(second)["seed"]
    assert differ(first, second)


def test_the_first_structures_do_not_depend_on_how_many_follow(generator: DOSGenerator) -> None:
    few, many = make(generator, n=2, num_atoms=[3, 4]), make(generator, n=64, num_atoms=[3, 4])
    for a, b in zip(few, many, strict=False):
        assert_same(a, b)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_network_runs_on_its_own_number_of_threads(
    threads: int, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = DOSGenerator(tiny_weights, device="cpu", threads=threads)
    whole, seen = own.model.denoiser.forward, []

    def forward(*arguments: Any) -> Any:
        seen.append(torch.get_num_threads())
        return whole(*arguments)

    monkeypatch.setattr(own.model.denoiser, "forward", forward)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in own.generate_iter(TARGET, 2, num_atoms=3, num_steps=STEPS, seed=0):
            assert torch.get_num_threads() == 3  # the caller's code between two structures runs as it did
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {threads}


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_threads_are_counted(threads: Any, tiny_weights: Path) -> None:
    with pytest.raises(ValueError, match=r"threads=.* must be a whole number of at least 1"):
        DOSGenerator(tiny_weights, threads=threads)


def test_no_global_random_state_is_used(generator: DOSGenerator) -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.random.get_rng_state(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    make(generator)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tobytes() == before[1]  # noqa: NPY002


# -- the record --------------------------------------------------------------------------------------------------------


def test_the_record_says_how_a_structure_was_made(generator: DOSGenerator) -> None:
    atoms = make(generator, n=2, guidance_scale=1.5, exclude_elements=["Pu"])[1]
    info = json.loads(json.dumps(record(atoms), allow_nan=False))
    assert info == record(atoms)
    assert info["version"] == dosmatgen_ase.__version__
    assert len(info["weights"]) == 64
    assert (info["seed"], info["index"], info["num_steps"], info["guidance_scale"]) == (0, 1, STEPS, 1.5)
    assert info["targets"] == {"0": TARGET.digest()}
    assert info["network_calls"] == 2 * STEPS  # conditional and unconditional
    assert info["forbidden_elements"] == ["Pu"]


def test_a_window_is_guided_more_unless_told(generator: DOSGenerator) -> None:
    whole = TargetDOS.from_peaks([(-0.65, 6.0, 0.3)], window=(-9, 3))
    window, other = whole.window(-2, 2), whole.window(-1, 1)

    def scale(dos: Any, **settings: Any) -> float:
        return float(record(make(generator, dos, n=1, **settings)[0])["guidance_scale"])

    assert [scale(dos) for dos in (whole, window, None)] == [1.0, 3.0, 1.0]
    assert [scale({0: whole, 1: window}), scale({0: other, 1: window})] == [1.0, 3.0]
    assert scale(window, guidance_scale=1.0) == 1.0
    guided = make(generator, window, n=1, num_steps=10)[0]
    assert 10 < record(guided)["network_calls"] < 20  # not after the species are settled
    assert np.allclose(generator.regenerate(guided, window).positions, guided.positions)


TEMPLATE = bulk("Cu", cubic=True)
REQUESTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "site": (TARGET, {}),
    "sites": (TARGET, {"sites": [1, 2]}),
    "total": (TOTAL, {}),
    "list": ([TARGET, OTHER, OTHER], {}),
    "mapping": ({2: TARGET}, {"guidance_scale": 2.0}),
    "nothing": (None, {"elements": ["Cu", "O"]}),
    "composition": (TARGET, {"composition": "CuAu2", "fixed_species": {0: "Cu"}}),
    "template": (TARGET, {"template": TEMPLATE, "strength": 0.5, "num_atoms": None, "fixed_sites": [1]}),
    "strength 0": (TARGET, {"template": TEMPLATE, "strength": 0.0, "num_atoms": None, "fixed_species": {0: "Co"}}),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_structure_is_made_again_from_its_record(name: str, generator: DOSGenerator, tmp_path: Path) -> None:
    dos, settings = REQUESTS[name]
    atoms = make(generator, dos, n=3, **settings)[2]
    ase.io.write(tmp_path / "one.extxyz", atoms)
    stored = ase.io.read(tmp_path / "one.extxyz")
    again = generator.regenerate(stored, dos, template=settings.get("template"))
    assert_same(again, atoms)
    assert record(again) == record(atoms)


def test_regeneration_refuses_what_is_not_the_same(generator: DOSGenerator) -> None:
    atoms = make(generator, n=None)
    with pytest.raises(ValueError, match=r"not those of the record: give the same"):
        generator.regenerate(atoms, OTHER)
    with pytest.raises(ValueError, match="it was not made by DOSGenerator"):
        generator.regenerate(bulk("Cu"), TARGET)
    near = make(generator, n=None, num_atoms=None, template=TEMPLATE)
    stretched = TEMPLATE.copy()
    stretched.set_cell(1.1 * stretched.cell, scale_atoms=True)  # the formula is the same
    with pytest.raises(ValueError, match="not those of the record"):
        generator.regenerate(near, TARGET, template=stretched)


# -- never the answer --------------------------------------------------------------------------------------------------


def test_where_a_target_came_from_does_not_matter(generator: DOSGenerator) -> None:
    """The same arrays give the same structure, whatever the provenance tells of the crystal they were computed for."""
    structure = {"structure": TEMPLATE.todict()["positions"].tolist(), "formula": "Cu4", "source": "vasprun.xml"}
    told = replace(TARGET, provenance=structure)
    assert told.provenance != TARGET.provenance
    a, b = make(generator, TARGET), make(generator, told)
    for first, second in zip(a, b, strict=True):
        assert (first.positions == second.positions).all()
        assert (first.numbers == second.numbers).all()
        assert (np.asarray(first.cell) == np.asarray(second.cell)).all()


def test_nothing_starts_warm_by_default() -> None:
    parameters = inspect.signature(DOSGenerator.generate_iter).parameters
    for name in ("template", "fixed_species", "fixed_sites", "composition", "elements", "num_atoms"):
        assert parameters[name].default is None
    assert parameters["fixed_cell"].default is False


def test_a_target_changes_the_structure_and_scale_zero_ignores_it(generator: DOSGenerator) -> None:
    with_dos, other = make(generator, TARGET), make(generator, OTHER)
    assert any((a.positions != b.positions).any() for a, b in zip(with_dos, other, strict=True))
    for a, b in zip(make(generator, TARGET, guidance_scale=0), make(generator, None), strict=True):
        assert (a.positions == b.positions).all()
        assert (a.numbers == b.numbers).all()


def test_scale_zero_ignores_the_target_in_the_number_of_atoms(
    generator: DOSGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def three_where_a_target_is_seen(condition: DOSCondition) -> torch.Tensor:
        wanted = torch.tensor([3 if condition.site_known.any() else 2])
        return 1e4 * torch.nn.functional.one_hot(wanted, 21) + 100.0 * torch.arange(21)

    monkeypatch.setattr(generator.model.encoder, "size_logits", three_where_a_target_is_seen)
    for dos, scale, size in ((TARGET, 1, 3), (TARGET, 0, 2), (None, 1, 2), ({9: TARGET}, 0, 20)):  # site 9 must exist
        assert len(make(generator, dos, n=None, num_atoms=None, guidance_scale=scale)) == size


def test_values_at_unknown_energies_are_not_read(generator: DOSGenerator) -> None:
    energies = np.linspace(-8, 4, 121)
    known = energies < 0
    values = np.exp(-(energies**2))
    a = TargetDOS.from_arrays(energies, values, known=known)
    b = TargetDOS.from_arrays(energies, np.where(known, values, np.nan), known=known)
    assert (make(generator, a, n=None).positions == make(generator, b, n=None).positions).all()


# -- templates ---------------------------------------------------------------------------------------------------------


def skewed_template(handed: float = 1.0) -> Atoms:
    """Triclinic, turned in space, with positions outside of the cell."""
    cell = np.array([[0.3, 4.1, 0.2], [0.1, 0.4, handed * 5.0], [4.4, -0.5, 0.3]])
    frac = [[0.05, 0.1, 0.2], [0.6, 0.55, 1.4], [-0.3, 0.8, 0.75]]
    return Atoms("CuZnO", cell=cell, scaled_positions=frac, pbc=True)


@pytest.mark.parametrize("handed", [1.0, -1.0], ids=["right", "left"])
def test_strength_zero_returns_the_template(handed: float, generator: DOSGenerator) -> None:
    template = skewed_template(handed)
    atoms = make(generator, n=None, num_atoms=None, template=template, strength=0.0)
    assert (atoms.numbers == template.numbers).all()
    assert (atoms.positions == template.positions).all()
    sign = np.sign(np.linalg.det(np.asarray(template.cell)))
    assert (np.asarray(atoms.cell) == sign * np.asarray(template.cell)).all()  # the same lattice, right-handed
    assert record(atoms)["network_calls"] == 0


@pytest.mark.parametrize("handed", [1.0, -1.0], ids=["right", "left"])
def test_a_small_strength_stays_near_in_the_orientation_of_the_template(handed: float, generator: DOSGenerator) -> None:
    template = skewed_template(handed)
    atoms = make(generator, n=None, num_atoms=None, template=template, strength=0.02, num_steps=100)
    sign = np.sign(np.linalg.det(np.asarray(template.cell)))
    np.testing.assert_allclose(np.asarray(atoms.cell), sign * np.asarray(template.cell), atol=0.4)
    difference = np.linalg.solve(np.asarray(atoms.cell).T, (atoms.positions - template.positions).T).T
    difference -= np.round(difference)
    assert np.abs(difference).max() < 0.1
    assert (atoms.positions != template.positions).any()


def test_fixed_cell_and_sites_are_exact(generator: DOSGenerator) -> None:
    template = skewed_template()
    template.set_constraint(FixAtoms([0, 2]))
    for atoms in make(generator, n=3, num_atoms=None, template=template, strength=1.0):
        assert (np.asarray(atoms.cell) == np.asarray(template.cell)).all()
        assert (atoms.positions[[0, 2]] == template.positions[[0, 2]]).all()
        assert (atoms.numbers[[0, 2]] == template.numbers[[0, 2]]).all()
        assert (atoms.positions[1] != template.positions[1]).any()


def test_fixatoms_may_count_from_the_end_and_holds_the_species_unless_told_otherwise(generator: DOSGenerator) -> None:
    template = skewed_template()
    template.set_constraint(FixAtoms([-1, 0]))
    for atoms in make(generator, n=3, num_atoms=None, template=template, strength=1.0, fixed_species={0: "Co"}):
        assert (atoms.positions[[0, 2]] == template.positions[[0, 2]]).all()
        assert (atoms.symbols[0], atoms.symbols[2]) == ("Co", "O")


def test_a_fixatoms_of_no_atom_holds_nothing(generator: DOSGenerator) -> None:
    template, alike = skewed_template(), skewed_template()
    template.set_constraint([FixAtoms([]), FixAtoms(mask=[False] * 3)])
    atoms, other = (make(generator, n=None, num_atoms=None, template=given) for given in (template, alike))
    assert not record(atoms)["fixed_cell"]
    assert (atoms.cell.array == other.cell.array).all()


@pytest.mark.parametrize("settings", [{"strength": 0.0}, {"fixed_cell": True}], ids=str)
def test_a_cell_that_was_asked_for_is_not_too_sparse(settings: dict[str, Any], generator: DOSGenerator) -> None:
    slab = bulk("Cu", cubic=True)
    slab.center(vacuum=20.0, axis=2)
    assert slab.get_volume() / len(slab) > 100
    atoms = make(generator, n=None, num_atoms=None, template=slab, **settings)
    assert (np.asarray(atoms.cell) == np.asarray(slab.cell)).all()


@pytest.mark.parametrize("strength", [1e-12, 1e-3])
def test_a_strength_above_zero_takes_a_step_that_holds_the_lists(strength: float, generator: DOSGenerator) -> None:
    atoms = make(generator, n=None, num_atoms=None, template=TEMPLATE, strength=strength, elements=["Au"])
    assert set(atoms.symbols) == {"Au"}


def test_the_template_is_left_as_it_is(generator: DOSGenerator) -> None:
    template = skewed_template(-1.0)
    before = template.copy()
    make(generator, num_atoms=None, template=template)
    assert template == before
    assert template.info == before.info


@pytest.mark.parametrize(
    "held",
    [{"strength": 0.0}, {"strength": 0.7, "fixed_cell": True, "fixed_sites": range(3)}],
    ids=["strength 0", "held"],
)
@pytest.mark.parametrize("handed", [1.0, -1.0], ids=["right", "left"])
def test_a_free_species_is_drawn_at_a_held_position(
    handed: float, held: dict[str, Any], generator: DOSGenerator, tmp_path: Path
) -> None:
    template = skewed_template(handed)
    wanted = {"template": template, "num_atoms": None, "free_species": np.array([1])}
    wanted["elements"] = ["Cu", "Ni", "O", "Au"]
    out = tmp_path / "made.extxyz"
    made = make(generator, n=12, out=out, **wanted, **held)
    for atoms in made:
        assert (atoms.cell.array == np.sign(np.linalg.det(template.cell)) * template.cell.array).all()
        assert (atoms.positions == template.positions).all()
        assert (atoms.symbols[0], atoms.symbols[2]) == ("Cu", "O")
        assert record(atoms)["free_species"] == [1]
        assert record(atoms)["network_calls"] > 0
    assert {atoms.symbols[1] for atoms in made} > {"Ni"}  # Zn, which the template has there, is not allowed
    again = generator.regenerate(made[3], TARGET, template=template)
    assert (again.numbers == made[3].numbers).all()
    with pytest.raises(ValueError, match="structures of another request"):
        make(generator, n=13, out=out, **{**wanted, **held, "free_species": None, "elements": None})
    text = out.read_text()
    for atoms in make(generator, n=4, **{**wanted, **held, "elements": None, "composition": "CuOAu"}):
        assert atoms.get_chemical_symbols() == ["Cu", "Au", "O"]
    assert out.read_text() == text


def test_a_free_species_forgets_the_template_at_any_strength(generator: DOSGenerator) -> None:
    made = make(generator, n=16, num_atoms=None, template=TEMPLATE, strength=0.1, free_species=[3])
    assert all((atoms.symbols[:3] == "Cu").all() for atoms in made)
    assert len({atoms.symbols[3] for atoms in made}) > 8


def test_files_and_records_of_before_free_species_are_read(generator: DOSGenerator, tmp_path: Path) -> None:
    out = tmp_path / "made.extxyz"
    atoms = make(generator, n=2, out=out)[0]
    del atoms.info["dosmatgen"]["free_species"], atoms.info["dosmatgen"]["new_only"]
    assert_same(generator.regenerate(atoms, TARGET), atoms)
    text = out.read_text().replace('\\"free_species\\": [], ', "").replace('\\"new_only\\": false, ', "")
    assert "free_species" not in text
    assert "new_only" not in text
    out.write_text(text)
    assert len(make(generator, n=3, out=out)) == 3
    assert out.read_text().startswith(text)


def test_lists_and_compositions_hold_for_what_a_template_brings_along(generator: DOSGenerator) -> None:
    for atoms in make(generator, n=8, num_atoms=None, template=TEMPLATE, strength=0.3, elements=["Ni", "Au"]):
        assert set(atoms.symbols) <= {"Ni", "Au"}
    for atoms in make(generator, n=8, num_atoms=None, template=TEMPLATE, strength=0.3, composition="CuAu3"):
        assert sorted(atoms.symbols) == ["Au", "Au", "Au", "Cu"]


def test_fixed_species_and_composition(generator: DOSGenerator) -> None:
    for atoms in make(generator, n=4, num_atoms=[3, 6], composition="CuAu2", fixed_species={1: "Cu"}):
        assert atoms.symbols[1] == "Cu"
        assert list(atoms.symbols).count("Au") == 2 * len(atoms) / 3
    for atoms in make(generator, n=4, exclude_elements=["Cu"], fixed_species={0: 27}):
        assert atoms.symbols[0] == "Co"
        assert "Cu" not in atoms.symbols


SHEARS = [[[1, 0, 0], [1, 1, 0], [0, 0, 1]], [[1, 0, 0], [5, 1, 0], [-7, 3, 1]], [[0, 0, 1], [1, 0, 0], [0, 1, 0]]]


def in_another_basis(atoms: Atoms, shear: list[list[int]]) -> Atoms:
    """The same crystal: no atom moves, only the lattice vectors are others."""
    other = atoms.copy()
    other.set_cell(np.array(shear) @ np.asarray(atoms.cell))
    return other


@pytest.mark.parametrize("shear", SHEARS, ids=["little", "much", "order"])
@pytest.mark.parametrize("held", [{}, {"fixed_cell": True}, {"fixed_sites": [1]}], ids=str)
def test_the_result_does_not_depend_on_the_choice_of_lattice_vectors(
    held: dict[str, Any], shear: list[list[int]], generator: DOSGenerator
) -> None:
    template = skewed_template()
    assert (niggli_operation(np.asarray(template.cell)) != np.eye(3)).any()
    settings = {"num_atoms": None, "strength": 0.4, "n": 2, **held}
    expected = make(generator, template=template, **settings)
    found = make(generator, template=in_another_basis(template, shear), **settings)
    for a, b in zip(expected, found, strict=True):
        assert_same(in_another_basis(a, shear), b)
        # In the same place and orientation, too.
        np.testing.assert_allclose(np.array(shear) @ np.asarray(a.cell), np.asarray(b.cell), atol=1e-3)


def test_what_is_held_is_exact_in_any_basis(generator: DOSGenerator) -> None:
    template = in_another_basis(skewed_template(), SHEARS[1])
    template.set_constraint(FixAtoms([0, 2]))
    for atoms in make(generator, n=3, num_atoms=None, template=template, strength=1.0):
        assert (np.asarray(atoms.cell) == np.asarray(template.cell)).all()
        assert (atoms.positions[[0, 2]] == template.positions[[0, 2]]).all()
        assert (atoms.positions[1] != template.positions[1]).any()
        frac = atoms.get_scaled_positions(wrap=False)[1]
        assert ((frac >= 0) & (frac < 1)).all()
    atoms = make(generator, n=1, num_atoms=None, template=template, strength=0.0)[0]
    assert (atoms.positions == template.positions).all()


def test_the_network_sees_all_neighbours_of_a_skewed_template(
    generator: DOSGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sheared by five vectors, it saw under half of them."""
    template = in_another_basis(TEMPLATE, SHEARS[1])
    seen: list[torch.Tensor] = []
    whole = denoiser.pair_features

    def features(*arguments: Any) -> Any:
        seen.append((found := whole(*arguments)).scalar.exp().sub(1).sum())
        return found

    monkeypatch.setattr(denoiser, "pair_features", features)
    make(generator, n=1, num_atoms=None, template=template, strength=1e-6, num_steps=1, fixed_cell=True)
    batch = CrystalBatch.from_atoms([template])
    network = generator.model.denoiser.config
    lost = whole(batch.cell, batch.frac_coords, batch.mask, network.num_radial, network.cutoff).scalar.exp().sub(1)
    distances = neighbor_list("d", TEMPLATE, network.cutoff)
    centres = np.linspace(0.5, network.cutoff - 0.5, network.num_radial)
    width = centres[1] - centres[0]
    radial = np.exp(-(((distances[:, None] - centres) / width) ** 2)) * 0.5
    expected = (radial * (1 + np.cos(np.pi * distances / network.cutoff))[:, None]).sum()
    assert float(seen[0]) == pytest.approx(expected, rel=1e-3)
    assert float(lost.sum()) < 0.5 * expected


@pytest.mark.parametrize("factor", [0.3, 0.6])
def test_a_collapsed_template_is_refused(factor: float, generator: DOSGenerator) -> None:
    template = bulk("Cu", "sc", a=2.5)
    template.set_cell([2.5 * factor, 2.5, 2.5])
    with pytest.raises(ValueError, match=r"template is collapsed: its lattice repeats every .* use a crystal"):
        make(generator, num_atoms=None, template=template)


# -- streaming ---------------------------------------------------------------------------------------------------------


def test_generate_iter_yields_before_the_end(generator: DOSGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dosmatgen_ase.generate.generator.BATCH_PAIRS", 18)  # two structures of three atoms
    calls: list[int] = []
    whole = DOSGenerator._draw

    def counted(self: DOSGenerator, *arguments: Any) -> Any:
        calls.append(1)
        return whole(self, *arguments)

    monkeypatch.setattr(DOSGenerator, "_draw", counted)
    made = generator.generate_iter(TARGET, 6, num_atoms=3, num_steps=STEPS, seed=0)
    next(made)
    assert len(calls) == 1
    assert len(list(made)) == 5
    assert len(calls) == 3


def test_rejected_draws_are_drawn_again_within_a_bound(
    generator: DOSGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def first_is_bad(atoms: Atoms, **_: float) -> Screening:
        seen.append(1)
        return Screening(len(seen) != 1, None if len(seen) != 1 else "too dense", 1.0, 10.0)

    monkeypatch.setattr("dosmatgen_ase.generate.generator.screen", first_is_bad)
    made = make(generator, n=2)
    assert [record(a)["attempt"] for a in made] == [1, 0]
    assert_same(generator.regenerate(made[0], TARGET), made[0])
    too_dense = Screening(False, "too dense", 1.0, 10.0)
    monkeypatch.setattr("dosmatgen_ase.generate.generator.screen", lambda _, **__: too_dense)
    with pytest.raises(RuntimeError, match=rf"rejected {MAX_ATTEMPTS} times, last because: too dense; loosen"):
        make(generator, n=1)


def test_a_structure_that_is_always_rejected_does_not_cost_the_others(
    generator: DOSGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Atoms] = []

    def not_the_first(atoms: Atoms, **_: float) -> Screening:
        drawn.append(atoms)
        bad = len(drawn) in (1, 4, 5, 6, 7)  # the attempts of the first of three
        return Screening(not bad, "too dense" if bad else None, 1.0, 10.0)

    monkeypatch.setattr("dosmatgen_ase.generate.generator.screen", not_the_first)
    made: list[Atoms] = []
    with pytest.raises(RuntimeError, match=rf"structure 0 was rejected {MAX_ATTEMPTS} times"):
        made.extend(generator.generate_iter(TARGET, 3, num_atoms=3, num_steps=STEPS, seed=0))  # keeps what came before
    assert [record(a)["index"] for a in made] == [1, 2]


def rejects_some(atoms: Atoms, **_: float) -> Screening:
    """A screen that depends on the structure alone, and turns down a third of them."""
    bad = int(1000 * atoms.cell.volume) % 3 == 0
    return Screening(not bad, "unlucky" if bad else None, 1.0, 10.0)


def test_structures_come_by_index_with_many_sizes_and_rejections(
    generator: DOSGenerator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dosmatgen_ase.generate.generator.BATCH_PAIRS", 27)  # 3 of three atoms, 6 of two
    monkeypatch.setattr("dosmatgen_ase.generate.generator.screen", rejects_some)
    out = tmp_path / "made.extxyz"
    made = list(generator.generate_iter(TARGET, 20, num_atoms=[3, 2, 2], num_steps=STEPS, seed=0, out=out))
    assert [record(a)["index"] for a in made] == list(range(20))
    assert [record(a)["index"] for a in ase.io.read(out, ":")] == list(range(20))
    assert len({record(a)["attempt"] for a in made}) > 2  # some were drawn again


def test_a_run_that_is_continued_writes_the_same_bytes(
    generator: DOSGenerator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Cut after any byte: here after each frame, and within each."""
    monkeypatch.setattr("dosmatgen_ase.generate.generator.BATCH_PAIRS", 36)  # 4 of three atoms, 9 of two
    monkeypatch.setattr("dosmatgen_ase.generate.generator.screen", rejects_some)
    out = tmp_path / "made.extxyz"

    def run() -> bytes:
        make(generator, n=12, num_atoms=[2, 3], num_steps=2, out=out)
        return out.read_bytes()

    whole = run()
    ends = [whole.index(frame) for frame in whole.split(b"\n") if frame.startswith(b"Lattice")]
    assert len(ends) == 12
    for end in ends:
        for cut in (end - 2, end + 40):  # before the number of atoms, and within the comment
            out.write_bytes(whole[:cut])
            assert run() == whole


def test_what_is_given_up_does_not_change_a_continued_file(
    generator: DOSGenerator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "made.extxyz"
    monkeypatch.setattr("dosmatgen_ase.generate.generator.screen", rejects_some)
    monkeypatch.setattr("dosmatgen_ase.generate.generator.MAX_ATTEMPTS", 2)

    def run() -> bytes:
        with pytest.raises(RejectedError, match="rejected 2 times, last because: unlucky"):
            make(generator, n=16, out=out)
        return out.read_bytes()

    whole = run()
    assert 0 < len(ase.io.read(out, ":")) < 16
    out.write_bytes(whole[: len(whole) // 2])
    assert run() == whole
    assert run() == whole


@pytest.mark.parametrize("batch", [1, 2, 5, 7, 32])
def test_batches_are_of_one_size_and_miss_nothing(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dosmatgen_ase.generate.generator.BATCH_PAIRS", 9 * batch)
    sizes = [int(s) for s in np.random.default_rng(batch).integers(1, 5, 50)]
    planned = batches(sizes)
    assert sorted(i for b in planned for i in b) == list(range(50))
    for b in planned:
        assert len({sizes[i] for i in b}) == 1
        assert b == sorted(b)
        assert len(b) == 1 or len(b) * sizes[b[0]] ** 2 <= 9 * batch
    assert [b[0] for b in planned] == sorted(b[0] for b in planned)
    assert batches([3] * (batch + 1)) == [list(range(batch)), [batch]]


def reject(indices: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the screen reject every attempt at these structures of a run with one size."""
    calls: list[int] = []
    whole = DOSGenerator._complete

    def complete(self: DOSGenerator, request: Any, batch: list[int], *rest: Any) -> Any:
        made, reasons = whole(self, request, batch, *rest)
        calls.append(1)
        lost = {i: "too dense" for i in batch if i in indices}
        return {i: atoms for i, atoms in made.items() if i not in lost}, reasons | lost

    monkeypatch.setattr(DOSGenerator, "_complete", complete)


def test_the_error_has_the_structures_that_were_made(generator: DOSGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    reject({3}, monkeypatch)
    with pytest.raises(RejectedError, match="structure 3 was rejected 5 times, last because: too dense") as caught:
        make(generator, n=4)
    assert [record(a)["index"] for a in caught.value.structures] == [0, 1, 2]


def test_a_hopeless_wish_ends_early(generator: DOSGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dosmatgen_ase.generate.generator.BATCH_PAIRS", 18)
    reject(set(range(100)), monkeypatch)
    with pytest.raises(RejectedError, match="3 of 100 structures were rejected"):
        make(generator, n=100, num_atoms=[3, 4])  # two of three atoms and one of four


def cut_inside_the_last_frame(text: str) -> str:
    return text[: text.rstrip().rfind("\n") + 5]


def cut_inside_the_last_comment(text: str) -> str:
    return text[: text.rfind("Properties")]


@pytest.mark.parametrize(
    "cut",
    [
        cut_inside_the_last_frame,
        cut_inside_the_last_comment,
        lambda t: t[:-1],
        lambda t: t + "1",
        lambda t: t + "12\n",
        lambda t: t + "12\nLatt",
        lambda t: "",
    ],
    ids=["atoms", "comment", "newline", "count", "count line", "first word", "all"],
)
def test_a_file_that_was_cut_is_continued(cut: Callable[[str], str], generator: DOSGenerator, tmp_path: Path) -> None:
    out = tmp_path / "made.extxyz"
    whole = make(generator, n=5, num_atoms=[2, 3], out=out)
    text = out.read_text()
    out.write_text(cut(text))
    resumed = make(generator, n=5, num_atoms=[2, 3], out=out)
    for a, b in zip(whole, resumed, strict=True):
        assert_same(a, b)
    frames = ase.io.read(out, ":")
    assert sorted(record(a)["index"] for a in frames) == list(range(5))
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_grows_with_a_larger_n_and_is_not_drawn_again(
    generator: DOSGenerator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "made.extxyz"
    make(generator, n=2, out=out)
    make(generator, n=5, out=out)
    assert len(ase.io.read(out, ":")) == 5
    monkeypatch.setattr(DOSGenerator, "_draw", None)  # nothing is left to draw
    assert len(make(generator, n=5, out=out)) == 5
    assert len(make(generator, n=2, out=out)) == 2


def test_a_file_is_continued_without_a_seed(generator: DOSGenerator, tmp_path: Path) -> None:
    out = tmp_path / "made.extxyz"
    first = make(generator, n=2, seed=None, out=out)
    out.write_text(cut_inside_the_last_frame(out.read_text()))
    more = make(generator, n=4, seed=None, out=out)
    for a, b in zip(first, more, strict=False):
        assert_same(a, b)
    assert len({record(a)["seed"] for a in [*first, *more]}) == 1
    assert sorted(record(a)["index"] for a in ase.io.read(out, ":")) == [0, 1, 2, 3]


FOREIGN = {
    "text": "the only copy of my notes\n",
    "xyz": "1\ncopper\nCu 0 0 0",
    "whole xyz": "1\ncopper\nCu 0 0 0\n",
    "junk": "2\nx\ny\nz\n",
    "year": "2024",
    "year and notes": "2024\nmy notes",
    "number and notes": "12\nmy notes",
    "number and our name": "12\ntry dosmatgen\non nickel\n",
    "number and blank": "12\n\n",
    "no number": "²\nmy notes\n",
    "binary": b"\xff\xfe\x00\x01",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_not_ours_is_left_as_it_is(name: str, generator: DOSGenerator, tmp_path: Path) -> None:
    out = tmp_path / "notes.extxyz"
    content = FOREIGN[name].encode() if isinstance(FOREIGN[name], str) else FOREIGN[name]
    out.write_bytes(content)
    for seed in (0, None):
        with pytest.raises(ValueError, match="structures of another request: choose another file"):
            make(generator, out=out, seed=seed)
    assert out.read_bytes() == content
    made = make(generator, out=out, overwrite=True)
    assert len(ase.io.read(out, ":")) == len(made)
    assert not out.read_bytes().startswith(content)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"num_steps": 5},
        {"dos": OTHER},
        {"elements": ["Cu"]},
        {"new_only": True},
        {"num_atoms": 4},
        {"num_atoms": None},
        {"dos": OTHER, "seed": None},
    ],
    ids=str,
)
def test_a_file_of_another_request_is_refused(
    change: Mapping[str, Any], generator: DOSGenerator, tmp_path: Path
) -> None:
    out = tmp_path / "made.extxyz"
    make(generator, n=1, out=out)
    before = out.read_bytes()
    with pytest.raises(ValueError, match="structures of another request"):
        make(generator, **{"n": 2, "out": out, **change})
    assert out.read_bytes() == before


# -- hostile input -----------------------------------------------------------------------------------------------------

CU, CU4 = bulk("Cu"), bulk("Cu", cubic=True)
HOSTILE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dos": "dos.dat"}, TypeError, r"must be a TargetDOS"),
    ({"dos": 3}, TypeError, r"must be a TargetDOS"),
    ({"dos": []}, TypeError, r"must be a TargetDOS"),
    ({"dos": {}}, TypeError, r"must be a TargetDOS"),
    ({"dos": [TARGET, None, TARGET]}, TypeError, r"must be a TargetDOS"),
    ({"dos": {"0": TARGET}}, TypeError, r"dos must name sites by whole numbers"),
    ({"dos": {-1: TARGET}}, ValueError, r"dos names site -1"),
    ({"dos": {3: TARGET}}, ValueError, r"dos names site 3, but .* sites 0 to 2 only"),
    ({"dos": [TARGET] * 2}, ValueError, r"num_atoms=\[3\] contradicts the list of targets, which has 2"),
    ({"dos": [TARGET] * 21, "num_atoms": None}, ValueError, r"has 21 atoms: a cell has at most 20"),
    ({"dos": [TOTAL] * 3}, ValueError, r"kind 'total' belongs to the cell"),
    ({"dos": TOTAL, "sites": [0]}, ValueError, r"sites contradicts a target of kind 'total'"),
    ({"dos": [TARGET] * 3, "sites": [0]}, ValueError, r"sites goes with one target"),
    ({"dos": None, "sites": [0]}, ValueError, r"sites goes with one target"),
    ({"dos": TARGET.shift(100.0)}, ValueError, r"falls on the grid \[-10, 5\] eV: is zero the Fermi level"),
    ({"sites": []}, ValueError, r"sites is empty"),
    ({"sites": [5]}, ValueError, r"sites \(--on-sites\) names site 5"),
    ({"sites": [0.5]}, TypeError, r"sites must name sites by whole numbers"),
    ({"sites": 0}, TypeError, r"sites must be a list of sites such as \[0\], not 0"),
    ({"fixed_sites": 0}, TypeError, r"fixed_sites must be a list of sites such as \[0\], not 0"),
    ({"fixed_sites": np.array([0])}, ValueError, r"fixed_sites needs a template"),
    ({"fixed_sites": np.array([1, 2])}, ValueError, r"fixed_sites needs a template"),
    ({"fixed_sites": np.array(1)}, TypeError, r"fixed_sites must be a list of sites"),
    ({"n": 0}, ValueError, r"n=0 must be a whole number of at least 1"),
    ({"n": -3}, ValueError, r"n=-3"),
    ({"n": 2.0}, ValueError, r"n=2\.0"),
    ({"n": True}, ValueError, r"n=True"),
    ({"num_atoms": 0}, ValueError, r"num_atoms=0 must lie between 1 and 20"),
    ({"num_atoms": 500}, ValueError, r"num_atoms=500 must lie between 1 and 20"),
    ({"num_atoms": [4, 21]}, ValueError, r"must lie between 1 and 20"),
    ({"num_atoms": []}, ValueError, r"must be a whole number or a list of them"),
    ({"num_atoms": 4.0}, ValueError, r"must be a whole number or a list of them"),
    ({"num_atoms": "4"}, ValueError, r"must be a whole number or a list of them"),
    ({"num_atoms": True}, ValueError, r"must be a whole number or a list of them"),
    ({"guidance_scale": float("nan")}, ValueError, r"guidance_scale=nan must be a finite number"),
    ({"guidance_scale": float("inf")}, ValueError, r"guidance_scale=inf"),
    ({"guidance_scale": -1}, ValueError, r"guidance_scale=-1"),
    ({"num_steps": 0}, ValueError, r"num_steps=0 must be a whole number from 1"),
    ({"num_steps": 2.5}, ValueError, r"num_steps=2\.5"),
    ({"seed": -1}, ValueError, r"seed=-1 must be a whole number of at least 0"),
    ({"seed": "a"}, ValueError, r"seed='a'"),
    ({"composition": "CuAu"}, ValueError, r"num_atoms=\[3\] contradicts composition, which has 2 atoms"),
    ({"composition": "Qq2"}, ValueError, r"composition"),
    ({"composition": "not a formula"}, ValueError, r"composition='not a formula' is not a formula"),
    ({"composition": ""}, ValueError, r"must count at least one atom"),
    ({"composition": {"Cu": 0}}, ValueError, r"must count at least one atom"),
    ({"composition": {"Cu": 1.5}}, ValueError, r"must count at least one atom"),
    ({"composition": "Cu30", "num_atoms": None}, ValueError, r"composition has 30 atoms: a cell has at most 20"),
    ({"composition": "CuAu2", "elements": ["Cu"]}, ValueError, r"contradicts elements/exclude_elements: Au"),
    ({"composition": "CuAu2", "fixed_species": {0: "Co"}}, ValueError, r"must be Co, which contradicts composition"),
    (
        {"composition": "CuAu2", "fixed_species": {0: "Cu", 1: "Cu"}},
        ValueError,
        r"fewer Cu than the sites \[0, 1\], where",
    ),
    (
        {"composition": "CuAu3", "template": TEMPLATE, "num_atoms": None, "strength": 0},
        ValueError,
        r"fewer Cu than the sites",
    ),
    ({"elements": []}, ValueError, r"leave no element"),
    ({"elements": "Cu"}, TypeError, r"must be a list such as \['Cu'\]"),
    ({"elements": "Ni,Au"}, TypeError, r"elements must be a list such as \['Ni', 'Au'\], not 'Ni,Au'"),
    ({"exclude_elements": "Ni Au"}, TypeError, r"exclude_elements must be a list such as \['Ni', 'Au'\]"),
    ({"elements": 28}, TypeError, r"elements must be a list such as \['Ni', 'Au'\], not 28"),
    ({"sites": "0"}, TypeError, r"sites must be a list of sites such as \[0\], not '0'"),
    ({"sites": np.array([0.0])}, TypeError, r"sites must name sites by whole numbers"),
    ({"sites": np.array([True, False])}, TypeError, r"sites must name sites by whole numbers"),
    ({"num_atoms": np.array(4)}, ValueError, r"must be a whole number or a list of them"),
    ({"num_atoms": np.array([4.0])}, ValueError, r"must be a whole number or a list of them"),
    ({"fixed_species": "Co"}, TypeError, r"fixed_species must name the element of each site, such as \{0: 'Co'\}"),
    ({"fixed_species": ["Co"]}, TypeError, r"fixed_species must name the element of each site"),
    ({"fixed_cell": "no"}, TypeError, r"fixed_cell='no' must be True or False"),
    ({"composition": {"Cu": float("inf")}}, ValueError, r"must count at least one atom"),
    ({"composition": 5}, ValueError, r"composition=5 must count at least one atom"),
    ({"strength": "0.5"}, ValueError, r"strength='0.5' must lie between 0"),
    ({"guidance_scale": "1"}, ValueError, r"guidance_scale='1' must be a finite number"),
    ({"settings": {"seed": 1}}, TypeError, r"settings must be a GenerationSettings, not dict"),
    ({"elements": ["Xx"]}, ValueError, r"'Xx' is not an element"),
    ({"elements": ["Am"]}, ValueError, r"'Am' is not an element from H to Pu: use a symbol"),
    ({"elements": ["ni"]}, ValueError, r"'ni' is not an element from H to Pu: did you mean 'Ni'\?"),
    ({"fixed_species": {0: "CO"}}, ValueError, r"did you mean 'Co'\?"),
    ({"elements": ["am"]}, ValueError, r"'am' is not an element from H to Pu: use a symbol"),
    ({"elements": ["Cu"], "exclude_elements": ["Cu"]}, ValueError, r"leave no element"),
    ({"elements": ["Cu"], "fixed_species": {0: "Co"}}, ValueError, r"must be Co, which contradicts elements"),
    ({"fixed_species": {0: "Xx"}}, ValueError, r"fixed_species\[0\]='Xx' is not an element"),
    ({"fixed_species": {0: None}}, ValueError, r"fixed_species\[0\]=None is not an element"),
    ({"fixed_species": {7: "Co"}}, ValueError, r"fixed_species names site 7, but num_atoms.* allows sites 0 to 2 only"),
    (
        {"sites": [4], "template": TEMPLATE, "num_atoms": None},
        ValueError,
        r"names site 4, but template allows sites 0 to 3 only",
    ),
    ({"fixed_species": {"0": "Co"}}, TypeError, r"fixed_species must name sites by whole numbers"),
    ({"fixed_cell": True}, ValueError, r"fixed_cell needs a template"),
    ({"fixed_sites": [0]}, ValueError, r"fixed_sites needs a template"),
    ({"free_species": [0]}, ValueError, r"free_species needs a template"),
    (
        {"template": CU, "num_atoms": 1, "free_species": [1]},
        ValueError,
        r"free_species names site 1, but num_atoms allows site 0 only",
    ),
    (
        {"template": CU, "num_atoms": 1, "free_species": [0], "fixed_species": {0: "Co"}},
        ValueError,
        r"free_species and fixed_species both name site 0: leave it out of one",
    ),
    ({"template": "Cu"}, TypeError, r"template must be an ase\.Atoms, not str"),
    ({"template": CU}, ValueError, r"num_atoms=\[3\] contradicts template, which has 1"),
    ({"template": Atoms("Cu"), "num_atoms": 1}, ValueError, r"has no cell"),
    ({"template": CU, "num_atoms": 1, "strength": 1.5}, ValueError, r"strength=1\.5 must lie between 0"),
    ({"template": CU, "num_atoms": 1, "strength": float("nan")}, ValueError, r"strength=nan"),
    ({"strength": 7}, ValueError, r"strength=7 must lie between 0"),
    ({"template": CU, "num_atoms": 1, "fixed_sites": [1]}, ValueError, r"fixed_sites names site 1"),
    ({"template": CU, "num_atoms": 1, "fixed_sites": [0], "elements": ["Au"]}, ValueError, r"must be Cu, which contra"),
    ({"template": CU, "num_atoms": 1, "strength": 0, "elements": ["Au"]}, ValueError, r"must be Cu, which contradicts"),
    (
        {"template": CU, "num_atoms": 1, "strength": 0, "composition": "Au"},
        ValueError,
        r"must be Cu, which contradicts",
    ),
    ({"num_atom": 3}, TypeError, r"no setting 'num_atom': did you mean num_atoms\?"),
]


FIXED = bulk("Cu", cubic=True)
FIXED.set_constraint(FixAtoms([1]))


@pytest.mark.parametrize(
    ("held", "sites"),
    [
        ({"template": TEMPLATE, "fixed_cell": True}, []),
        ({"template": TEMPLATE, "fixed_sites": np.array([2])}, [2]),
        ({"template": FIXED}, [1]),
    ],
)
def test_a_relaxation_holds_what_generation_is_to_keep(
    held: dict[str, Any], sites: list[int], generator: DOSGenerator, tmp_path: Path
) -> None:
    out = tmp_path / "drawn.extxyz"
    wish = {"num_atoms": None, "strength": 0.2, "elements": ["Cu", "Au"], "seed": 1, **held}
    (relaxed,) = make(generator, n=1, **wish, relax=EMT(), ranking=Ranking(distance=0, energy=1), out=out)
    drawn = ase.io.read(out)
    assert relaxed.info["relaxation"]["steps"] > 0
    assert np.allclose(relaxed.cell, drawn.cell, atol=1e-7)
    moved = np.abs(relaxed.positions - drawn.positions).max(axis=1)
    assert (moved[sites] < 1e-7).all()
    assert moved.max() > 0.01


@pytest.mark.parametrize("name", ["made.extxyz", "made.vasp", "made.traj"])
def test_a_later_relaxation_of_the_file_leaves_the_host_where_it_was(
    name: str, generator: DOSGenerator, tmp_path: Path
) -> None:
    wish = {"num_atoms": None, "template": FIXED, "strength": 0.2, "elements": ["Cu", "Au"], "seed": 1}
    made = make(generator, n=1, **wish, out=tmp_path / name)[0]
    assert made.constraints[0].get_indices().tolist() == [1]
    read = ase.io.read(tmp_path / name)
    relaxed = relax(read, EMT())
    assert relaxed.info["relaxation"]["steps"] > 0
    assert (relaxed.cell == read.cell).all()
    (host,) = (i for i in range(4) if np.allclose(read.positions[i], FIXED.positions[1], atol=1e-6))  # POSCAR sorts
    assert (relaxed.positions[host] == read.positions[host]).all()
    free = make(generator, n=1, num_atoms=None, template=TEMPLATE, fixed_sites=[2], strength=0.2)[0]
    assert free.constraints == []  # its cell may change, which moves what is held


@pytest.mark.parametrize(("arguments", "error", "fragment"), HOSTILE, ids=[str(i) for i in range(len(HOSTILE))])
def test_hostile_input(
    arguments: dict[str, Any], error: type[Exception], fragment: str, generator: DOSGenerator
) -> None:
    with pytest.raises(error, match=fragment) as caught:
        make(generator, **arguments)
    assert "\n" not in str(caught.value)


def test_errors_come_before_the_first_structure_is_asked_for(generator: DOSGenerator, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n=0"):
        generator.generate_iter(TARGET, 0)  # not only at next()
    out = tmp_path / "made.extxyz"
    with pytest.raises(ValueError, match="no known energy"):
        generator.generate_iter(TARGET.shift(100.0), out=out)
    assert not out.exists()


def test_a_template_with_another_constraint_is_refused(generator: DOSGenerator) -> None:
    template = bulk("Cu", cubic=True)
    template.set_constraint(FixBondLength(0, 1))
    with pytest.raises(ValueError, match="only FixAtoms is understood"):
        make(generator, template=template, num_atoms=None)


def test_an_output_that_cannot_be_written_is_told_at_once(generator: DOSGenerator, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent does not exist, create it"):
        make(generator, out=tmp_path / "absent" / "x.extxyz")
    (tmp_path / "folder.extxyz").mkdir()
    with pytest.raises(OSError, match="choose another place"):
        make(generator, out=tmp_path / "folder.extxyz")


def test_a_disk_that_fills_up_loses_nothing(
    generator: DOSGenerator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "made.extxyz"
    written: list[Atoms] = []

    def fills_up(structures: list[Atoms]) -> bytes:
        if len(written) == 2:
            with out.open("a") as file:
                file.write("3\nLattice=")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.extend(structures)
        return extxyz(structures)

    with monkeypatch.context() as patched:
        patched.setattr("dosmatgen_ase.generate.stream.extxyz", fills_up)
        with pytest.raises(OSError, match=r"cannot continue writing .*No space left.*; make room"):
            make(generator, n=4, out=out)
    whole = make(generator, n=4, out=out)
    for kept, atoms in zip(written, ase.io.read(out, ":"), strict=False):
        assert_same(kept, atoms)
    assert len(whole) == len(ase.io.read(out, ":")) == 4


def test_absent_and_damaged_weights(tiny_weights: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights at"):
        DOSGenerator(tmp_path / "absent", device="cpu")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tiny_weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="truncated"):
        DOSGenerator(cut, device="cpu")


@pytest.mark.parametrize("device", ["cuda:99", "banana", ""])
def test_an_absent_device_is_named(device: str, tiny_weights: Path) -> None:
    with pytest.raises(ValueError, match=rf"device='{device}' cannot be used here"):
        DOSGenerator(tiny_weights, device=device)
