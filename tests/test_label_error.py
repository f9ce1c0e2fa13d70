"""The benchmark of the labels' error: its draw, what it compares, and that it goes on where it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import label_error as benchmark
import numpy as np
import pytest
from ase.build import bulk
from test_labels import computed, crystals, machine, stand_in_engine, tries

from dosmatgen_ase.data import SiteDOSLabels, load_site_dos
from dosmatgen_ase.dft.labels import label
from dosmatgen_ase.dft.settings import GRID, RECIPE

__all__ = ["machine"]  # a fixture, used by every test here


@pytest.fixture
def labels(tmp_path: Path) -> SiteDOSLabels:
    stand_in_engine(tmp_path / "making")
    label({n: a for n, a in crystals(14).items() if "Au" not in a.symbols}, tmp_path / "shards")
    return load_site_dos(tmp_path / "shards")


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict:
    folders = ["--labels", tmp_path / "shards", "--folder", tmp_path / "dense", "--out", tmp_path / "results"]
    monkeypatch.setattr("sys.argv", ["label_error.py", *map(str, folders), *options])
    benchmark.main()
    return json.loads((tmp_path / "results" / "label_error.json").read_text())


@pytest.mark.usefixtures("labels")
def test_labels_of_the_same_calculation_have_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_engine(tmp_path / "log")
    report = run(tmp_path, monkeypatch, "-n", "6", "--explain", "2")
    assert report["summary"]["all"]["structures"] == len(report["labels"]) == 6
    assert report["draw"]["strata"]["3"] == {"labels": 12, "drawn": 6, "passed_over": 0}
    assert max(r["l1"] for r in report["labels"]) < 1e-3
    assert {r["shift"] for r in report["labels"]} == {0.0}
    explained = [r for r in report["labels"] if "l1_ecutwfc" in r]
    assert len(explained) == 2
    assert all(r[f"l1_{name}"] < 1e-3 for r in explained for name in benchmark.SETTINGS)
    assert tries(tmp_path).total() == 6 + 2 * 3
    assert (tmp_path / "results" / "label_error.png").read_bytes()[:4] == b"\x89PNG"
    told = f"6 of 6 drawn labels are of recipe {RECIPE}, 6 of them computed"
    assert told in (tmp_path / "results" / "label_error.md").read_text()
    assert run(tmp_path, monkeypatch, "-n", "6", "--explain", "2") == report
    told = run(tmp_path, monkeypatch, "-n", "6", "--explain", "2", "--report")
    assert {**told, "made_by": report["made_by"]} == report, "but for the command"
    assert tries(tmp_path).total() == 6 + 2 * 3, "results are kept"
    assert len(run(tmp_path, monkeypatch, "-n", "8", "--report")["labels"]) == 6, "computes nothing"
    assert tries(tmp_path).total() == 6 + 2 * 3


def test_labels_of_an_earlier_recipe_are_told_apart(
    labels: SiteDOSLabels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five are of the recipe before and left out; all have one of recipe 1, too, a tenth too high."""
    stand_in_engine(tmp_path / "log")
    mixed = replace(labels, recipe=labels.recipe - (np.arange(len(labels)) < 5))

    def load(_: Path, recipe: int | None = None) -> SiteDOSLabels:
        if recipe == 1:
            return replace(labels, values=labels.values * 1.1)
        return mixed if recipe is None else mixed.select(np.flatnonzero(mixed.recipe == recipe))

    monkeypatch.setattr(benchmark, "load_site_dos", load)
    monkeypatch.setattr(benchmark, "recipes_in", lambda _: {1, RECIPE})
    report = run(tmp_path, monkeypatch, "-n", "12", "--explain", "0")
    assert (report["draw"]["drawn"], report["draw"]["of_earlier_recipes"], len(report["labels"])) == (12, 5, 7)
    assert not {r["id"] for r in report["labels"]} & set(labels.material_id[:5].tolist())
    assert report["recipes"]["1"]["structures"] == report["recipes"][str(RECIPE)]["structures"] == 7
    assert report["recipes"]["1"]["quartiles"] == pytest.approx([0.1] * 3, abs=2e-3)
    table = (tmp_path / "results" / "label_error.md").read_text()
    assert "| 1 | 0% | 7 | 0.100 | 0.100 to 0.100 |" in table
    assert "| 0.000 | 0.000 to 0.000 |" in table


def test_recipes_count_by_their_share_of_the_set(
    labels: SiteDOSLabels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two thirds of the set are of recipe 1 and off by a tenth; of the structures computed all have both."""
    higher = replace(labels, values=labels.values * 1.1, recipe=np.ones_like(labels.recipe))
    monkeypatch.setattr(benchmark, "load_site_dos", lambda _, recipe: higher if recipe == 1 else labels)
    monkeypatch.setattr(benchmark, "recipes_in", lambda _: {1, RECIPE})
    mixed = replace(labels, recipe=np.where(np.arange(len(labels)) % 3, 1, RECIPE))
    results = {str(name): computed(labels.atoms(i)) for i, name in enumerate(labels.material_id)}
    whole = benchmark.by_recipe(tmp_path, mixed, results)["all"]
    assert whole["share"] == pytest.approx(1)
    assert whole["quartiles"] == pytest.approx([0.0, 0.1, 0.1], abs=2e-3)


def test_a_shift_of_the_zero_is_told_from_an_error_of_the_shape(labels: SiteDOSLabels) -> None:
    row = int(np.flatnonzero(labels.atomic_numbers[:, 0] == 29)[0])
    same = computed(labels.atoms(row))
    moved = type(same)(
        **{
            **same.__dict__,
            "sites": tuple(site.shift(0.1).on_grid(GRID, sigma=site.sigma) for site in same.sites),
        }
    )
    told = benchmark.compare(labels, row, moved)
    assert told["l1"] > 0.3
    assert told["shift"] == pytest.approx(0.1)
    assert told["l1_shifted"] < 0.02
    assert told["worst_energy"] == pytest.approx(-1, abs=0.4)


def test_the_draw_hardly_changes_with_new_labels(labels: SiteDOSLabels) -> None:
    electrons = dict.fromkeys(labels.material_id.tolist(), 10.0)
    drawn, _ = benchmark.draw(labels, electrons, 6, 0, 1e9)
    fewer = labels.select(np.arange(len(labels) - 2))
    before, _ = benchmark.draw(fewer, electrons, 6, 0, 1e9)
    kept = set(labels.material_id[drawn]) & set(fewer.material_id[before])
    assert len(kept) >= 4
    cheap = np.median([benchmark.cost(labels.atoms(i), 10.0) for i in range(len(labels))])
    rows, how = benchmark.draw(labels, electrons, 6, 0, float(cheap))
    assert how["strata"]["3"]["passed_over"] > 0
    assert all(benchmark.cost(labels.atoms(i), 10.0) <= cheap for i in rows)


def test_the_draw_is_shared_out_in_full() -> None:
    assert benchmark._quotas(40, {3.0: 1659, 2.5: 631, 2.0: 133}) == {3.0: 27, 2.5: 11, 2.0: 2}
    assert benchmark._quotas(40, {3.0: 1000, 2.5: 10, 2.0: 1}) == {3.0: 39, 2.5: 2, 2.0: 1}
    assert benchmark._quotas(6, {3.0: 12, 2.5: 0, 2.0: 0}) == {3.0: 6, 2.5: 0, 2.0: 0}
    assert benchmark._quotas(9, {3.0: 4, 2.5: 2, 2.0: 1}) == {3.0: 4, 2.5: 2, 2.0: 1}


def test_more_electrons_symmetry_and_spin_set_the_cost() -> None:
    copper, nickel = bulk("Cu", a=3.6), bulk("Ni", a=3.6)
    assert benchmark.cost(nickel, 10.0) == pytest.approx(2 * benchmark.cost(copper, 10.0)), "two spins, the same meshes"
    assert benchmark.cost(copper, 30.0) > 1.5 * benchmark.cost(copper, 10.0)
