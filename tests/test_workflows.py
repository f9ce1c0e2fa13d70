"""The scripts of ``workflows/`` at toy size: they run as a user runs them, go on after a stop, and count right."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from dosmatgen_ase import DOSGenerator, TargetDOS
from dosmatgen_ase.crystals.screening import KnownCrystals
from dosmatgen_ase.dft.errors import ElectronicStructureError
from dosmatgen_ase.dft.settings import EspressoSettings
from dosmatgen_ase.dos import MODEL_GRID
from dosmatgen_ase.forward.predictor import SitePrediction

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def nickel() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "workflows" / "free_atom_like_nickel.py"))


def test_the_readme_lists_every_script_and_who_has_a_demo() -> None:
    rows = {
        row.split("`")[1]: row.split("|")[3].strip()
        for row in (ROOT / "workflows" / "README.md").read_text().splitlines()
        if row.startswith("| `")
    }
    scripts = {path.name: path.read_text() for path in (ROOT / "workflows").glob("*.py")}
    assert rows.keys() == scripts.keys()
    for name, text in scripts.items():
        assert ('"--demo"' in text) == (rows[name] != "none"), name
        assert '"--out"' in text


def test_the_nickel_experiment_runs_and_goes_on(
    nickel: dict[str, Any], tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--out", str(tmp_path), "--weights", str(tiny_weights), "--candidates", "2", "--num-steps", "2"]
    report = nickel["main"](command)
    assert report["masked_seconds"] > 0
    assert json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail) == report
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    made = {task.name: ase.io.read(tmp_path / f"{task.name}.extxyz", ":") for task in nickel["TASKS"]}
    assert {name: [len(a) for a in frames] for name, frames in made.items()} == {
        **{f"masked_{size}": [size] * 2 for size in (4, 5, 6, 7)},
        "template_Cu": [4, 4],
        "template_MgO": [8, 8],
        "template_SrTiO3": [5, 5],
        "cobalt": [4, 5],
        "cobalt_free": [4, 5],
    }
    for name, site in (("masked_4", "0"), ("template_SrTiO3", "1"), ("cobalt", "0")):
        assert list(made[name][0].info["dosmatgen"]["targets"]) == [site]
    assert made["cobalt_free"][0].info["dosmatgen"]["targets"] == {}
    for name in ("cobalt", "cobalt_free"):
        assert {a.symbols[0] for a in made[name]} == {"Co"}
        assert report["tasks"][name]["elements"] == {"Co": 2}

    monkeypatch.setattr(DOSGenerator, "_draw", None)  # nothing is left to draw
    again = nickel["main"](command)
    assert again == report | {"masked_seconds": None}


def test_computed_curves_replace_predicted_ones_and_failures_are_told(
    nickel: dict[str, Any],
    tiny_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: dict[str, Atoms] = {}
    target = TargetDOS.from_file(ROOT / "data" / "ni_in_au3ni.npz", site=3)

    def engine(structures: dict[str, Atoms], folder: Path, settings: EspressoSettings, **_: Any) -> dict[str, Any]:
        seen.update(structures)
        assert (folder, settings.time_limit, settings.ecutwfc) == (tmp_path / "dft", 77.0, 60.0)  # as the target's
        near, far = (replace(target, values=factor * target.values) for factor in (1.5, 3.0))
        results: dict[str, Any] = {  # two of each task
            name: SimpleNamespace(sites=[near if i % 2 else far] * len(a))
            for i, (name, a) in enumerate(structures.items())
        }
        failed = {name: ElectronicStructureError("no pseudopotential for Pu") for name in seen if "masked_5" in name}
        return results | failed

    def converge(structures: list[Atoms], **_: Any) -> list[Atoms]:
        copies = [atoms.copy() for atoms in structures]
        for i, atoms in enumerate(copies):
            atoms.info["relaxation"] = {"converged": i != 1, "rmsd": 0.1}
        return copies

    drawn: list[list[str]] = []
    main_globals = nickel["main"].__globals__
    monkeypatch.setitem(main_globals, "compute_many", engine)
    monkeypatch.setitem(main_globals, "relax", converge)
    monkeypatch.setitem(main_globals, "plot_dos", lambda _, labels, ax: drawn.append(labels[1:]))
    command = ["--out", str(tmp_path), "--weights", str(tiny_weights), "--candidates", "4", "--num-steps", "1"]
    command += ["--dense", "--dft", "2", "--time-limit", "77"]
    report = nickel["main"](command)
    assert "masked, 5 atoms: no DFT of " in capsys.readouterr().out
    tasks = [task.name for task in nickel["TASKS"] if task.with_dos]
    names = list(seen)
    assert [name.rpartition("-")[0] for name in names] == [name for name in tasks for _ in range(2)]
    second = dict(zip(tasks, names[1::2], strict=True))
    picked = {name: report["tasks"][name]["representative"] for name in tasks}
    assert set(picked.pop("masked_5")) == {"index", "formula"}  # nothing could be computed: the predictor's choice
    for name, chosen in picked.items():
        assert chosen["formula"] == seen[second[name]].get_chemical_formula()
        assert chosen["dft_distance"] == pytest.approx(0.5)  # the nearer of the two, the second by the predictor
        (pool,) = (tmp_path / "relaxed").glob(f"{name}-*.extxyz")
        assert len(ase.io.read(pool, ":")) == 3  # of 4, one did not converge
    assert drawn.count(["DFT"]) == 7

    monkeypatch.setitem(main_globals, "relax", None)  # the relaxed ones are kept
    again = nickel["main"](command)["tasks"]
    assert {name: again[name]["representative"] for name in picked} == picked


def test_a_pool_of_other_structures_is_relaxed_anew(
    nickel: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def converge(structures: list[Atoms], **_: Any) -> list[Atoms]:
        calls.append([str(atoms.symbols) for atoms in structures])
        copies = [atoms.copy() for atoms in structures]
        for atoms in copies:
            atoms.info["relaxation"] = {"converged": True, "rmsd": 0.1}
        return copies

    relaxed = nickel["relaxed"]
    monkeypatch.setitem(relaxed.__globals__, "relax", converge)
    structures = [bulk("Cu"), bulk("Ni"), bulk("Al")]
    outcome = nickel["Outcome"](structures, np.zeros((3, 1)), np.array([1, 0, 2]), {}, structures[1])

    def pool(outcome: Any, count: int) -> list[str]:
        return [str(atoms.symbols) for atoms in relaxed(outcome, count, tmp_path, "masked_4")]

    for _ in range(2):
        assert pool(outcome, 2) == ["Ni", "Cu"]
    assert calls == [["Ni", "Cu"]]
    assert pool(outcome, 3) == ["Ni", "Cu", "Al"]
    assert pool(replace(outcome, order=np.array([2, 0, 1])), 2) == ["Al", "Cu"]
    moved = replace(outcome, structures=[bulk("Cu", a=3.7), *structures[1:]])
    assert pool(moved, 2) == ["Ni", "Cu"]
    assert len(calls) == 4
    for atoms in outcome.structures:
        atoms.positions += 1e-12  # as those that a file brings back
    assert pool(outcome, 2) == ["Ni", "Cu"]
    assert len(calls) == 4, "the first is still there"


class _Fixed:
    """A predictor that says what it was told, whatever the crystal; it does not know all elements of some."""

    def __init__(self, values: list[np.ndarray | None], strange: tuple[int, ...] = ()) -> None:
        self.values, self.strange = values, strange

    def predict_arrays(self, structures: list[Atoms]) -> list[SitePrediction]:
        known, nothing = np.ones((4, MODEL_GRID.size), dtype=bool), np.full((4, MODEL_GRID.size), np.nan)
        partly = known & (np.arange(4) > 0)[:, None]
        return [
            SitePrediction(nothing, nothing, known, np.zeros(4), "isolated atoms")
            if v is None
            else SitePrediction(np.tile(v, (4, 1)), nothing, partly if i in self.strange else known, np.zeros(4))
            for i, v in enumerate(self.values[: len(structures)])
        ]


def test_what_it_counts(nickel: dict[str, Any]) -> None:
    au3ni = nickel["AU3NI"]
    stretched = au3ni.copy()
    stretched.set_cell(1.04 * stretched.cell, scale_atoms=True)
    reversed_order = au3ni[::-1]
    layered = Atoms("AuAuAuNi", cell=[2.6, 2.6, 10.0], pbc=True)
    layered.set_scaled_positions([[0, 0, 0], [0.5, 0.5, 0.25], [0, 0, 0.5], [0.5, 0.5, 0.75]])
    copper = bulk("Cu", cubic=True)
    structures = [au3ni, stretched, reversed_order, layered, copper]
    for i, atoms in enumerate(structures):
        atoms.info["dosmatgen"] = {"attempt": int(i == 4)}
    wanted = np.exp(-(MODEL_GRID.energies**2))
    target = TargetDOS.from_arrays(MODEL_GRID.energies, wanted, sigma=0.2)
    judge = _Fixed([1.1 * wanted, 1.2 * wanted, 1.3 * wanted, 1.4 * wanted, None])
    ranker = _Fixed([None, 3 * wanted, 2 * wanted, 4 * wanted, wanted], strange=(4,))
    known = KnownCrystals([bulk("Cu"), bulk("Ag")])
    task = nickel["Task"]("masked_4", "", 3, {})
    figures = nickel["evaluate"](task, structures, target, ranker, judge, known).figures
    assert figures["valid"] == pytest.approx(5 / 6)
    assert figures["nickel"] == pytest.approx(3 / 5)
    assert figures["elements"] == {"Ni": 3, "Au": 1, "Cu": 1}
    assert figures["representative"]["index"] == 2  # the ranker's choice, not the judge's
    distance = figures["distance"]
    assert distance["all"] == [*(pytest.approx(x, abs=1e-6) for x in (0.1, 0.2, 0.3, 0.4)), None]
    assert (distance["judged"], distance["picked"]) == (4, pytest.approx(0.3))
    assert (distance["mean"], distance["best"]) == (pytest.approx(0.25), pytest.approx(0.1))
    assert figures["au3ni"] == pytest.approx(3 / 5)
    assert figures["au3ni_formula"] == pytest.approx(4 / 5)
    assert figures["unique"] == pytest.approx(3 / 5)
    assert figures["new"] == pytest.approx(4 / 5)  # four-atom copper is the one-atom copper of the library
    assert figures["new_formula"] == pytest.approx(4 / 5)
