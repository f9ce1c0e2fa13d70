"""The benchmark of the constraints: it runs at toy size, and what counts a broken pin finds one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import constraints
import numpy as np
import pytest
import torch
from _draws import Candidates
from _targets import Target
from ase import Atoms
from ase.build import bulk
from constraints import CONDITIONS, PINS, displacement, diversity, pinned, respected, site_targets

from dosmatgen_ase.dos import MODEL_GRID


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_it_runs_resumes_and_finds_every_pin_respected(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = ["--num-targets", "2", "--draws", "2", "--num-steps", "2"]
    command = ["--val", "--weights", str(tiny_weights), "--out", str(tmp_path), "--cache", str(tmp_path), *size]
    report = constraints.main(command)
    assert {pin: row["respected"] for pin, row in report["pins"].items()} == dict.fromkeys(PINS, 1.0)
    assert report["templates"]["strength 0 is the template"]
    assert report["templates"]["strengths"]["1.0"]["species mean"] < 1
    assert [row["share"] for row in report["cobalt"]["rows"].values()] == [1.0, 1.0]
    assert set(report["ratios"]) == set(report["bar"])
    json.loads((tmp_path / "constraints.json").read_text(), parse_constant=pytest.fail)
    assert (tmp_path / "constraints.md").read_text().count("\n| ") == 4 + len(PINS) + 2 + 5 + 3
    assert (tmp_path / "constraints_strength.png").stat().st_size > 0
    monkeypatch.setattr(constraints, "judge_candidates", None)  # everything judged is read back
    again = constraints.main(command)
    assert again["all sites"] == report["all sites"]
    assert again["cobalt"] == report["cobalt"]


@pytest.fixture
def target() -> Target:
    atoms = Atoms(
        "CuZnO", cell=[3.1, 4.2, 5.3], scaled_positions=[[0, 0, 0], [0.5, 0.4, 0.5], [0.1, 0.7, 0.8]], pbc=True
    )
    dos = np.random.default_rng(0).random((3, MODEL_GRID.size))
    return Target("x", atoms, dos, MODEL_GRID.energies < 3, "fermi", 1)


def test_a_broken_pin_is_found(target: Target) -> None:
    truth = target.atoms
    everything = pinned(truth, "all of these", np.random.default_rng(0))
    held = sorted(everything.fixed_sites)
    assert len(held) == 2
    assert respected(truth, truth, everything)

    def broken(change: str) -> Atoms:
        atoms = truth.copy()
        if change == "cell":
            atoms.cell[0, 0] += 1e-4
        elif change == "position":
            atoms.positions[held[1]] += 1e-4
        elif change == "species":
            atoms.numbers[held[0]] = 47
        elif change == "composition":
            free = next(i for i in range(3) if i not in held)
            atoms.numbers[free] = atoms.numbers[held[0]]
        return atoms

    for change in ("cell", "position", "species", "composition"):
        assert not respected(broken(change), truth, everything), change
        assert respected(broken(change), truth, pinned(truth, "nothing", np.random.default_rng(0))), change
    assert not respected(broken("species"), truth, pinned(truth, "elements", np.random.default_rng(0)))
    free = next(i for i in range(3) if i not in held)
    moved = truth.copy()
    moved.positions[free] += 0.3
    assert respected(moved, truth, everything)


@pytest.mark.parametrize(
    ("name", "sites", "low", "high"),
    [("every site", [0, 1, 2], -10, 3), ("one site", [1], -10, 3), ("every site, [-2, 2] eV", [0, 1, 2], -2, 2)],
)
def test_a_condition_gives_what_it_says(name: str, sites: list[int], low: float, high: float, target: Target) -> None:
    given = site_targets(target, CONDITIONS[name])
    assert sorted(given) == sites
    for i, dos in given.items():
        shown = dos.energies[dos.known]
        assert shown.min() == pytest.approx(low)
        assert high - 0.11 <= shown.max() <= high + 1e-9
        assert np.array_equal(dos.values[dos.known], target.dos[i][dos.known])
    assert site_targets(target, CONDITIONS["nothing"]) is None


def test_a_displacement_ignores_translations_and_periods() -> None:
    template = bulk("NaCl", "rocksalt", a=5.0, cubic=True)
    shifted = template.copy()
    shifted.positions += [1.3, -0.4, 7.0]
    shifted.wrap()
    assert displacement(shifted, template) == pytest.approx(0.0, abs=1e-9)
    apart = template.copy()
    apart.positions[:4] += [0.1, 0, 0]
    apart.positions[4:] -= [0.1, 0, 0]
    assert displacement(apart, template) == pytest.approx(0.1)


def test_compositions_are_counted_among_the_accepted(target: Target) -> None:
    numbers = np.array([[[1, 8, 8], [8, 1, 8], [8, 8, 8], [3, 3, 3]]])
    shape = (1, 4, 3, MODEL_GRID.size)
    candidates = Candidates(numbers, np.array([[True, True, True, False]]), *np.zeros((2, *shape)), numbers > 0)
    assert diversity(candidates) == pytest.approx(2 / 3)
    assert np.isnan(diversity(replace(candidates, accepted=np.zeros((1, 4), dtype=bool))))


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_strength_1_is_compared_with_noise_within_targets(shift: float) -> None:
    """A shift as large as the spread within a target is found beside a larger spread between targets; none is not."""
    rng = np.random.default_rng(0)
    rows = []
    for target in range(20):
        centre = rng.normal(5.0)
        for strength in (*constraints.STRENGTHS, None):
            for value in centre + rng.normal(size=5) * 0.3 + (shift if strength == 1 else 0.0):
                names = ("rmsd", "species", "volume", "distance")
                rows.append({"target": str(target), "strength": strength, **dict.fromkeys(names, value)})
    p = constraints.template_table(rows)["strength 1 against noise, p"]["rmsd"]
    assert p < 0.001 if shift else p > 0.05
