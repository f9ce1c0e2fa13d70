"""`GenerationSettings`: one place for each default, check and word; whatever counts as a list or element is taken."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk
from ase.constraints import FixAtoms
from ase.formula import Formula
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.core import Composition, Element, Species

from dosmatgen_ase import DOSGenerator, TargetDOS
from dosmatgen_ase.generate.generator import _Keywords
from dosmatgen_ase.generate.request import Request
from dosmatgen_ase.generate.settings import GenerationOptions, GenerationSettings, described

TARGET = TargetDOS.from_peaks([(-0.65, 6.0, 0.3)], window=(-3, 1))
OTHER = TargetDOS.from_peaks([(-2.0, 3.0, 1.0)], window=(-9, 4))
NAMES = [field.name for field in fields(GenerationSettings)]


@pytest.fixture(scope="module")
def generator(tiny_weights: Path) -> DOSGenerator:
    return DOSGenerator(tiny_weights, device="cpu")


def test_the_keywords_for_editors_are_the_fields() -> None:
    spelled = {name: hint.__forward_arg__ for name, hint in GenerationOptions.__annotations__.items()}
    assert spelled == {field.name: field.type for field in fields(GenerationSettings)}
    assert list(described()) == NAMES


def test_the_keywords_of_the_overloads_are_those_of_generate() -> None:
    own = set(inspect.signature(DOSGenerator.generate).parameters) - {"self", "dos", "n"}
    assert _Keywords.__optional_keys__ == own


@pytest.mark.parametrize("method", [DOSGenerator.generate, DOSGenerator.generate_iter])
def test_the_signature_shows_every_setting_with_its_default(method: Any) -> None:
    parameters = inspect.signature(method).parameters
    for field in fields(GenerationSettings):
        assert parameters[field.name].default == field.default
    assert "options" not in parameters


def test_nothing_is_held_or_left_out_by_default() -> None:
    settings = GenerationSettings()
    empty = {name: getattr(settings, name) for name in NAMES if name not in ("strength", "num_steps")}
    assert not any(empty.values())
    assert settings.seed is None


# -- what counts as a list, an element, a formula ----------------------------------------------------------------------

ALIKE: list[tuple[str, Any, list[Any]]] = [
    ("num_atoms", (4,), [4, [4], np.int64(4), np.array([4]), range(4, 5), {4}]),
    ("num_atoms", (4, 5), [[4, 5], (4, 5), np.array([4, 5], dtype=np.uint8), range(4, 6)]),
    ("num_atoms", (1, 8), [[1, 8], {8, 1}, frozenset([8, 1])]),
    ("sites", (0, 1), [[0, 1], np.array([0, 1]), range(2), (np.int32(0), 1), {0: "a", 1: "b"}.keys()]),
    ("sites", (1, 8), [{8, 1}]),
    ("elements", ("Ni", "Au"), [["Ni", "Au"], (28, 79), np.array(["Ni", "Au"]), np.array([28, 79])]),
    ("elements", ("Ni", "Au"), [[Element("Ni"), Species("Au", 3)], Composition("NiAu3"), ["Ni", "Au", "Ni"]]),
    ("elements", ("Au", "Cu", "Ni"), [{"Ni", "Cu", "Au"}, frozenset([28, 79, 29])]),
    ("exclude_elements", ("O",), [["O"], {"O"}, [Species("O2-")], np.array([8])]),
    ("fixed_species", {0: "Co"}, [{0: "Co"}, {np.int64(0): 27}, {0: Element("Co")}, {0: Species("Co2+")}]),
    ("composition", {"Ni": 1, "Au": 3}, ["NiAu3", {"Ni": 1, "Au": 3.0}, Composition("NiAu3"), Formula("NiAu3")]),
    ("composition", {"Fe": 3, "O": 4}, ["Fe3O4", Composition({"Fe2+": 1, "Fe3+": 2, "O2-": 4}), {26: 3, 8: 4}]),
    ("composition", {"H": 2, "O": 1}, ["H2O", "H2O ", " H2O"]),
    ("seed", 7, [7, np.int64(7), np.uint32(7)]),
    ("strength", 0.5, [0.5, np.float32(0.5)]),
    ("guidance_scale", 2.0, [2, 2.0, np.float64(2)]),
    ("num_steps", 5, [5, np.int16(5)]),
]


@pytest.mark.parametrize(("name", "expected", "given_values"), ALIKE, ids=[f"{a[0]} {i}" for i, a in enumerate(ALIKE)])
def test_what_means_the_same_is_the_same(name: str, expected: Any, given_values: list[Any]) -> None:
    for value in given_values:
        read = getattr(GenerationSettings(**{name: value}), name)
        assert read == expected
        assert json.dumps(read) == json.dumps(expected)  # Python's own types


@pytest.mark.parametrize("sites", [[0, 1], np.array([0, 1]), range(2), (np.int64(0), np.int64(1))], ids=str)
def test_sites_are_read_alike_by_generator_maker_and_flow(sites: Any, generator: DOSGenerator) -> None:
    from dosmatgen_ase.flows import InverseDesignMaker
    from dosmatgen_ase.flows.jobs import targets_by_site

    assert targets_by_site(TARGET, sites) == {"0": TARGET, "1": TARGET}
    generation = InverseDesignMaker().make(TARGET, sites=sites).jobs[0]
    assert generation.function_kwargs["sites"] == [0, 1]
    assert all(type(i) is int for i in generation.function_kwargs["sites"])
    atoms = generator.generate(TARGET, sites=sites, num_atoms=np.int64(3), num_steps=2, seed=0)
    assert set(atoms.info["dosmatgen"]["targets"]) == {"0", "1"}


@pytest.mark.parametrize(
    ("dos", "sites", "fragment"),
    [
        (TARGET, "0", r"sites must be a list of sites such as \[0\], not '0'"),
        (TARGET, [], "sites is empty: name at least one site"),
        ([TARGET, TARGET], [0], "sites goes with one target"),
        ([TARGET, 3], None, "dos must be a TargetDOS, a list of them"),
        ({TARGET, OTHER}, None, "dos is a set, which has no order: give a list, or a mapping"),
    ],
)
def test_generator_maker_and_flow_refuse_alike(dos: Any, sites: Any, fragment: str) -> None:
    from dosmatgen_ase.flows import InverseDesignMaker
    from dosmatgen_ase.flows.jobs import targets_by_site

    for call in (
        lambda: Request.of(dos, GenerationSettings(sites=sites)),
        lambda: targets_by_site(dos, sites),
        lambda: InverseDesignMaker().make(dos, sites=sites),
    ):
        with pytest.raises((TypeError, ValueError), match=fragment):
            call()


# -- JSON, copies ------------------------------------------------------------------------------------------------------

HELD = bulk("NaCl", "rocksalt", a=5.6)
HELD.set_constraint(FixAtoms([1]))
HELD.info["note"] = object()  # no JSON


@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "num_atoms": st.lists(st.integers(1, 20), min_size=1, max_size=3),
            "template": st.just(HELD),
            "strength": st.floats(0, 1),
            "fixed_species": st.dictionaries(st.integers(0, 19), st.sampled_from(["H", "Pu", "Co"]), max_size=3),
            "composition": st.sampled_from(["NiAu3", {"Fe": 2}]),
            "elements": st.sets(st.sampled_from(["Ni", "Au", "Fe"]), min_size=1),
            "exclude_elements": st.sets(st.sampled_from(["O", "F"])),
            "guidance_scale": st.floats(0, 10),
            "num_steps": st.integers(1, 100),
            "seed": st.integers(0, 2**63),
        },
    )
)
def test_settings_survive_json(options: dict[str, Any]) -> None:
    settings = GenerationSettings(**options)
    copy = GenerationSettings.from_dict(json.loads(json.dumps(settings.to_dict(), allow_nan=False)))
    assert copy == settings
    assert copy.to_dict() == settings.to_dict()
    if settings.template is not None:
        assert (copy.template.positions == HELD.positions).all()
        assert copy.template.constraints[0].get_indices().tolist() == [1]


def test_the_template_of_the_settings_is_a_copy() -> None:
    template = bulk("Cu")
    settings = GenerationSettings(template=template, fixed_cell=True)
    template.positions += 1.0
    assert not settings.template.positions.any()
    assert GenerationSettings(seed=1).replace(seed=None) == GenerationSettings()


def test_settings_and_keywords_give_the_same_crystals(generator: DOSGenerator) -> None:
    settings = GenerationSettings(num_atoms=3, num_steps=2, seed=5, elements=["Ni", "Au"])
    first = generator.generate(TARGET, 2, settings=settings)
    second = generator.generate(TARGET, 2, num_atoms=3, num_steps=2, seed=5, elements=["Ni", "Au"])
    changed = generator.generate(TARGET, 2, settings=settings, seed=6)
    assert [a.info["dosmatgen"] for a in first] == [a.info["dosmatgen"] for a in second]
    assert all((a.positions == b.positions).all() for a, b in zip(first, second, strict=True))
    assert [a.info["dosmatgen"]["seed"] for a in changed] == [6, 6]
    assert list(generator.generate_iter(TARGET, 2, settings=settings))[1].positions == pytest.approx(first[1].positions)


def test_a_maker_takes_settings_or_their_fields_as_before() -> None:
    from dosmatgen_ase.flows import GenerateMaker

    maker = GenerateMaker(n=3, num_atoms=[4, 5], seed=2, fixed_species={"0": "Co"})
    assert maker.settings == GenerationSettings(num_atoms=[4, 5], seed=2, fixed_species={0: "Co"})
    assert maker == GenerateMaker(n=3, settings=maker.settings)
    assert GenerateMaker.from_dict(json.loads(json.dumps(maker.as_dict()))) == maker
    assert maker.update_kwargs({"num_atoms": 6}).settings.num_atoms == (6,)
    with pytest.raises(ValueError, match=r"sites and template belong to make\(dos, sites, template\)"):
        GenerateMaker(sites=[0])
    with pytest.raises(TypeError, match="no setting 'num_atom': did you mean num_atoms"):
        GenerateMaker(num_atom=3)


def test_each_target_is_put_on_the_grid_once(monkeypatch: pytest.MonkeyPatch, generator: DOSGenerator) -> None:
    whole, calls = TargetDOS.on_grid, []

    def counted(self: TargetDOS, *arguments: Any) -> TargetDOS:
        calls.append(self)
        return whole(self, *arguments)

    monkeypatch.setattr(TargetDOS, "on_grid", counted)
    generator.generate({0: TARGET, 2: OTHER}, 4, num_atoms=[3, 4, 5], num_steps=2, seed=0)
    assert len(calls) == 2


def test_a_relaxation_leaves_what_is_fixed(generator: DOSGenerator) -> None:
    from ase.calculators.emt import EMT

    template = bulk("Cu", cubic=True)
    template.positions[2] += 0.3
    settings = GenerationSettings(template=template, strength=0.0, fixed_sites=[0, 2], fixed_cell=True, seed=0)
    relaxed = generator.generate(TARGET, 1, settings=settings, relax=EMT())[0]
    assert relaxed.info["relaxation"]["steps"] > 0
    assert (relaxed.cell.array == template.cell.array).all()
    assert (relaxed.positions[[0, 2]] == template.positions[[0, 2]]).all()
    assert np.abs(relaxed.positions[[1, 3]] - template.positions[[1, 3]]).max() > 0.01


@pytest.mark.parametrize("data", ["settings.json", None, [1]])
def test_settings_are_read_from_a_mapping_alone(data: Any) -> None:
    with pytest.raises(TypeError, match="settings are read from a mapping, as to_dict"):
        GenerationSettings.from_dict(data)
