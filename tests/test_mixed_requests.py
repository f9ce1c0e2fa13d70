"""Whatever a user combines, every promise is kept: a thousand random requests through `DOSGenerator`.

First draws are looked at, before the screen, which rejects for other reasons.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.constraints import FixAtoms
from ase.data import chemical_symbols
from hypothesis import event, given, settings
from hypothesis import strategies as st

from dosmatgen_ase import DOSGenerator, TargetDOS
from dosmatgen_ase.generate.request import Request
from dosmatgen_ase.generate.sampler import SamplerConfig
from dosmatgen_ase.generate.settings import GenerationSettings
from dosmatgen_ase.limits import MAX_ATOMIC_NUMBER
from dosmatgen_ase.model.conditioning import Guidance

ENERGIES = np.linspace(-8, 4, 61)
CURVE = TargetDOS.from_arrays(ENERGIES, 3 * np.exp(-(ENERGIES**2)))
TARGETS = [CURVE, CURVE.window(-2, 2), TargetDOS.from_peaks([(-0.65, 6.0, 0.3)], window=(-3, 1))]
TOTAL = TargetDOS.from_arrays(ENERGIES, np.ones_like(ENERGIES), kind="total")


@pytest.fixture(scope="module")
def generator(tiny_weights: Path) -> DOSGenerator:
    return DOSGenerator(tiny_weights, device="cpu")


@dataclass(frozen=True)
class Asked:
    """The arguments of `DOSGenerator.generate`, and what they promise."""

    arguments: dict[str, Any]
    size: int
    template: Atoms | None
    cell: bool
    positions: list[int]
    species: dict[int, str]
    allowed: set[str]
    composition: Counter[str] | None


def random_template(size: int, rng: np.random.Generator) -> Atoms:
    """Either handedness, turned in space, positions outside of the cell."""
    cell = (3.0 + size) * np.eye(3)[[1, 2, 0]] * rng.choice([-1, 1]) + rng.uniform(-0.9, 0.9, (3, 3))
    numbers = rng.integers(1, MAX_ATOMIC_NUMBER + 1, size)
    return Atoms(numbers, cell=cell, scaled_positions=rng.uniform(-1, 2, (size, 3)), pbc=True)


@st.composite
def requests(draw: st.DrawFn) -> Asked:
    """A request without a contradiction."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.integers(1, 7))
    some = lambda share: sorted(np.flatnonzero(rng.random(size) < share).tolist())  # noqa: E731
    arguments: dict[str, Any] = {}
    template, cell, positions, species = None, False, [], {}
    if draw(st.booleans()):
        template = random_template(size, rng)
        arguments |= {"template": template, "strength": draw(st.sampled_from([0.0, 0.3, 1.0]))}
        held = draw(st.sampled_from(["nothing", "some sites", "all but two", "the cell", "FixAtoms"]))
        if held == "some sites":
            positions = arguments["fixed_sites"] = some(0.4)
        if held == "all but two":
            positions = arguments["fixed_sites"] = sorted(rng.permutation(size)[2:].tolist())
        if held == "FixAtoms":
            positions = some(0.4)
            template.set_constraint(FixAtoms(positions))
        if held in ("the cell", "all but two"):
            arguments["fixed_cell"] = True
        cell = held in ("the cell", "all but two") or (held == "FixAtoms" and len(positions) > 0)
        if arguments["strength"] == 0:
            cell, positions = True, list(range(size))
        if draw(st.booleans()):
            arguments["free_species"] = some(0.4)
        species = {i: template.symbols[i] for i in positions if i not in arguments.get("free_species", ())}
    else:
        arguments["num_atoms"] = size
    if draw(st.booleans()):
        pins = {i: chemical_symbols[rng.integers(1, MAX_ATOMIC_NUMBER + 1)] for i in some(0.4)}
        pins = {i: symbol for i, symbol in pins.items() if i not in arguments.get("free_species", ())}
        arguments["fixed_species"] = pins
        species = species | pins
    allowed = set(chemical_symbols[1 : MAX_ATOMIC_NUMBER + 1])
    kind = draw(st.sampled_from(["any", "allowed", "excluded"]))
    extra = {chemical_symbols[z] for z in rng.integers(1, MAX_ATOMIC_NUMBER + 1, draw(st.integers(1, 4)))}
    if kind == "allowed":
        allowed = set(species.values()) | extra
        arguments["elements"] = sorted(allowed)
    if kind == "excluded":
        allowed -= extra - set(species.values())
        arguments["exclude_elements"] = sorted(extra - set(species.values()))
    composition = None
    if draw(st.booleans()):
        composition = Counter(species.values()) + Counter(rng.choice(sorted(allowed), size - len(species)).tolist())
        arguments["composition"] = dict(composition)
    sites = some(0.5)
    target = draw(st.sampled_from(["none", "sites", "mapping", "total"]))
    arguments["dos"] = {
        "none": None,
        "sites": TARGETS[0] if sites else None,
        "mapping": {i: TARGETS[i % len(TARGETS)] for i in sites} or None,
        "total": TOTAL,
    }[target]
    if target == "sites" and sites:
        arguments["sites"] = sites
    event(f"template {template is not None}, composition {composition is not None}, elements {kind}, target {target}")
    return Asked(arguments, size, template, cell, positions, species, allowed, composition)


def check(made: Atoms, asked: Asked) -> None:
    """Every promise of a request, on one structure."""
    assert len(made) == asked.size
    assert made.pbc.all()
    assert np.isfinite(made.cell.array).all()
    assert np.isfinite(made.positions).all()
    assert np.linalg.det(made.cell.array) > 0
    if asked.cell:
        given = asked.template.cell.array
        assert np.array_equal(made.cell.array, np.sign(np.linalg.det(given)) * given)
        assert np.array_equal(made.positions[asked.positions], asked.template.positions[asked.positions])
    elif asked.positions:
        sign = np.sign(np.linalg.det(asked.template.cell.array))
        difference = made.get_scaled_positions() - sign * asked.template.get_scaled_positions()
        difference = difference[asked.positions]
        np.testing.assert_allclose(difference, np.round(difference), atol=1e-6)
    assert {i: made.symbols[i] for i in asked.species} == asked.species
    assert set(made.symbols) <= asked.allowed
    if asked.composition is not None:
        assert Counter(made.symbols) == asked.composition


@settings(max_examples=1000)
@given(asked=requests(), seed=st.integers(0, 2**32))
def test_every_promise_is_kept_in_any_combination(asked: Asked, seed: int, generator: DOSGenerator) -> None:
    options = {name: value for name, value in asked.arguments.items() if name != "dos"}
    request = Request.of(asked.arguments["dos"], GenerationSettings(**options))
    rngs = [np.random.default_rng((seed, 0))]
    for made in generator._draw(request, [asked.size], rngs, SamplerConfig(num_steps=2), Guidance())[0]:
        check(made, asked)


def test_the_check_finds_what_is_broken(generator: DOSGenerator) -> None:
    """Negative control: each promise, broken by hand."""
    rng = np.random.default_rng(0)
    template = random_template(4, rng)
    species = {i: template.symbols[i] for i in (0, 1)}
    asked = Asked({}, 4, template, True, [0, 1], species, set(template.symbols), Counter(template.symbols))
    sound = template.copy()
    if np.linalg.det(template.cell.array) < 0:
        sound.set_cell(-template.cell.array)
    check(sound, asked)
    moved, stretched, swapped, foreign = (sound.copy() for _ in range(4))
    moved.positions[1, 0] += 1e-9
    stretched.set_cell(sound.cell.array * (1 + 1e-9))
    swapped.numbers[[0, 3]] = swapped.numbers[[3, 0]]
    foreign.symbols[3] = "He"
    for broken in (moved, stretched, swapped, foreign, sound[:3]):
        with pytest.raises(AssertionError):
            check(broken, asked)
