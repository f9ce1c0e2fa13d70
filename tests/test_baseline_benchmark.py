"""The benchmark of generated against known crystals: distances of whole crystals, and what is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import baseline_dft
import numpy as np
import pytest
from ase import Atoms
from baseline_dft import COMPUTED, GENERATOR, NOT_COMPUTED, PREDICTED, Question, distance, summary
from round_trip import Target

from dosmatgen_ase.dft.result import ElectronicStructure
from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA, TargetDOS

E = MODEL_GRID.energies


def peak(centre: float, height: float = 1.0) -> np.ndarray:
    return height * np.exp(-0.5 * ((E - centre) / 0.5) ** 2)


def wanted(*curves: np.ndarray, known: np.ndarray | None = None) -> list[TargetDOS]:
    mask = np.ones(E.size, dtype=bool) if known is None else known
    return [TargetDOS(E, values, mask, "fermi", MODEL_SIGMA) for values in curves]


def test_a_crystal_has_no_order_of_sites() -> None:
    values = np.array([peak(-2), peak(-4, 2.0), peak(-6)])
    everything = np.ones(values.shape, dtype=bool)
    assert distance(wanted(peak(-6), peak(-2), peak(-4, 2.0)), values, everything)["l1"] == pytest.approx(0)
    found = distance(wanted(peak(-6), peak(-2), peak(-4, 1.0)), values, everything)
    assert found["l1"] == pytest.approx(1 / 3)  # one site has twice what was wanted
    assert found["pooled"] == pytest.approx(1 / 3)
    assert distance(wanted(peak(-4, 4.0)), values, everything)["l1"] == pytest.approx(0.5)  # any one site


def test_a_small_cell_stands_for_two() -> None:
    values = np.array([peak(-2)])
    assert distance(wanted(peak(-2), peak(-2)), values, np.ones((1, E.size), bool))["l1"] == pytest.approx(0)


def test_what_is_unknown_does_not_count() -> None:
    below = E <= 0
    values = np.where(below, peak(-3), 7.0)[None]
    found = distance(wanted(peak(-3) + peak(3)), values, below[None])
    assert found["l1"] == pytest.approx(0, abs=1e-6)
    assert found["share"] == pytest.approx(0.5, abs=0.01)
    empty = distance(wanted(peak(-3), np.zeros(E.size)), np.array([peak(-3), peak(3)]), np.ones((2, E.size), bool))
    assert empty["l1"] == pytest.approx(0)  # a site without states has no ratio
    assert empty["pooled"] == pytest.approx(1, abs=1e-4)


def test_only_targets_with_all_tries_count() -> None:
    def tries(*l1: float | str) -> list[dict[str, Any] | str]:
        return [x if isinstance(x, str) else {"l1": x, "pooled": 2 * x} for x in l1]

    rows = {
        "one": [tries(0.5, 0.1, 0.9), tries(0.2, NOT_COMPUTED), tries("failed", 0.4), tries("failed"), []],
        "other": [tries(0.3, 0.3, 0.3), tries(0.6), tries(0.1, 0.1), tries(0.1), tries(0.1)],
    }
    figures = summary(rows, 3)
    assert figures["1"]["targets"] == 2
    assert figures["1"]["methods"]["one"]["mean"]["value"] == pytest.approx(0.35)
    assert figures["1"]["pairs"]["one - other"]["first_nearer"] == 1
    assert figures["3"]["targets"] == 2  # the second target is not done, the fourth and fifth have nothing
    assert figures["3"]["methods"]["one"]["mean"]["value"] == pytest.approx((0.1 + 0.4) / 2)
    assert figures["3"]["methods"]["one"]["pooled"]["value"] == pytest.approx(0.1 + 0.4)
    assert figures["3"]["pairs"]["one - other"]["mean"]["value"] == pytest.approx((-0.2 + 0.3) / 2)


def test_the_formula_of_the_target_is_its_own() -> None:
    atoms = Atoms("Cu2O", cell=np.eye(3) * 4, pbc=True)
    dos = np.array([peak(-2), peak(-2), peak(-6)])
    target = Target("mp-1", atoms, dos, np.ones(E.size, bool), "fermi", 2)
    whole, new, one, near = (Question(target, task) for task in baseline_dft.TASKS)
    assert whole.own(Atoms("Cu4O2"))
    assert not whole.own(Atoms("CuO"))
    assert (whole.excluded, new.excluded, one.excluded) == ([], ["Cu", "O"], [])
    assert (list(whole.wanted), list(one.wanted)) == ([0, 1, 2], [2])
    assert len({q.key for q in (whole, new, one, near)}) == 4
    assert list(near.wanted) == [0, 1, 2]
    assert near.wanted[0].energies[near.wanted[0].known].tolist() == pytest.approx(E[np.abs(E) <= 2.001])


def test_known_crystals_are_judged_by_their_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two targets of the repository; the predictor is a stand-in and nothing is computed."""
    from test_retrieval import StandIn

    stand_in = StandIn()
    stand_in.info = {}  # type: ignore[attr-defined]
    monkeypatch.setattr("dosmatgen_ase.retrieval.build.DOSPredictor.load", lambda path: stand_in)
    monkeypatch.setattr(baseline_dft, "without_pseudopotential", lambda *_: ["Ce", "Xe"])
    asked: list[str] = []

    def nothing(structures: dict[str, Atoms], *_: Any, **__: Any) -> dict[str, ElectronicStructure]:
        asked.extend(structures)
        return {}

    monkeypatch.setattr(baseline_dft, "compute_many", nothing)
    names = ["look-up, computed", "look-up, predicted"]
    arguments = ["--num-targets", "2", "--max-atoms", "2", "--tasks", "all sites", "--methods", *names]
    report = baseline_dft.main([*arguments, "--out", str(tmp_path), "--cache", str(tmp_path / "kept")])
    assert report["tables"]["all sites"]["1"]["methods"].keys() == {COMPUTED, PREDICTED}
    for name, row in report["per_target"]["all sites"].items():
        assert name in report["target_ids"]
        tries = row[COMPUTED]
        assert len(tries) == 3
        assert all(t["material_id"] != name for t in tries)
        blind = [t["l1"] for t in row[PREDICTED]]  # of a predictor that knows nothing
        assert min(t["l1"] for t in tries) < min(blind)
    assert asked == []  # all have labels
    assert report["not_computed"] == {COMPUTED: 0, PREDICTED: 0}
    assert json.loads((tmp_path / "baseline_dft.json").read_text())["tries"] == 3
    assert GENERATOR not in (tmp_path / "baseline_dft.md").read_text()
