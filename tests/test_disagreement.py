"""Which crystals tight binding and networks disagree on, with tiny models of random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from test_bands import random_model
from typer.testing import CliRunner

from dosmatgen_ase.cli import app
from dosmatgen_ase.dos import normalised_l1_arrays
from dosmatgen_ase.forward import disagreement as module
from dosmatgen_ase.forward.disagreement import disagreement
from dosmatgen_ase.forward.predictor import DOSPredictor, PredictorConfig

CRYSTALS = {"al": bulk("Al"), "ni": bulk("Ni"), "cu": bulk("Cu")}


@pytest.fixture(autouse=True)
def features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that belong to the volume alone; CHGNet is not asked."""

    def stand_in(structures: list[Atoms], progress: bool = False) -> list[np.ndarray | str]:
        return [np.full((len(a), 385), a.get_volume() / 20, dtype=np.float32) for a in structures]

    monkeypatch.setattr("dosmatgen_ase.forward.predictor.site_features", stand_in)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tables = {
            "baseline": torch.ones(95, 151), "support": torch.full((95, 151), 9, dtype=torch.int16),
            "input_mean": torch.zeros(536), "input_std": torch.ones(536),
        }  # fmt: skip
        predictor = DOSPredictor(PredictorConfig(hidden=4, depth=1, members=1), tables, {}, [random_model()])
    path = tmp_path_factory.mktemp("weights") / "predictor.safetensors"
    predictor.save(path)
    return path


def test_it_is_the_distance_between_the_two_and_the_largest_comes_first(weights: Path) -> None:
    found = disagreement({**CRYSTALS, "collapsed": bulk("Cu", a=0.5)}, weights)
    assert set(found) == set(CRYSTALS), "what a model cannot read is left out"
    assert list(found.values()) == sorted(found.values(), reverse=True)
    predictor = DOSPredictor.load(weights)
    (a,), (b,) = (predictor.predict_arrays([CRYSTALS["ni"]], method=m) for m in ("tight-binding", "features"))
    by_hand = np.abs(a.mean - b.mean).sum() / b.mean.sum()
    assert found["ni"] == pytest.approx(float(by_hand), rel=1e-4)
    assert found["ni"] == pytest.approx(float(normalised_l1_arrays(a.mean, b.mean, a.known).mean()), rel=1e-6)


def test_nothing_is_predicted_twice(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    distances = module._distances

    def counted(predictor: DOSPredictor, atoms: list[Atoms]) -> list[float | None]:
        asked.append(len(atoms))
        return distances(predictor, atoms)

    monkeypatch.setattr(module, "_distances", counted)
    monkeypatch.setattr(module, "_BATCH", 2)
    cache = tmp_path / "cache.json"
    first = disagreement(CRYSTALS, weights, cache=cache)
    assert asked == [2, 1]
    assert disagreement(CRYSTALS, weights, cache=cache) == first
    assert asked == [2, 1]
    other = {**CRYSTALS, "cu": bulk("Cu", a=3.9)}
    assert disagreement(other, weights, cache=cache)["cu"] != first["cu"], "the id of another crystal"
    assert asked == [2, 1, 1]
    told = json.loads(cache.read_text())
    cache.write_text(json.dumps({**told, "predictor": "another"}))
    assert disagreement(CRYSTALS, weights, cache=cache) == first
    assert asked == [2, 1, 1, 2, 1]


def test_a_crystal_that_was_mended_is_looked_at_again(weights: Path, tmp_path: Path) -> None:
    molecule, disordered = bulk("Cu"), bulk("Cu")
    molecule.pbc = False
    disordered.info["occupancy"] = {"0": {"Cu": 0.5, "Ni": 0.5}}
    cache = tmp_path / "cache.json"
    for broken in (molecule, disordered):
        assert disagreement({"cu": broken}, weights, cache=cache) == {}
    assert set(disagreement({"cu": bulk("Cu")}, weights, cache=cache)) == {"cu"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"predictor": "x", "disagreement": {"a": "b"}}'])
def test_a_file_that_is_no_cache_is_not_replaced(weights: Path, tmp_path: Path, text: str) -> None:
    cache = tmp_path / "mine.json"
    cache.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.json is no cache of disagreements: remove it"):
        disagreement(CRYSTALS, weights, cache=cache)
    assert cache.read_text() == text


def test_one_kind_of_model_cannot_disagree(weights: Path, tmp_path: Path) -> None:
    both = DOSPredictor.load(weights)
    tables = {k: v for k, v in both.tables.items() if not k.startswith("input")}
    path = tmp_path / "alone.safetensors"
    DOSPredictor(PredictorConfig(members=0), tables, {}, both.tight_binding).save(path)
    with pytest.raises(ValueError, match=r"disagreement needs networks, too"):
        disagreement(CRYSTALS, path)


def test_the_command_labels_the_largest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dosmatgen_ase.dft import labels

    given: dict[str, Any] = {}

    def stand_in(structures: Any, shards: Path, *_: Any, order: Any, **__: Any) -> labels.LabelReport:
        given["order"] = order
        return labels.LabelReport([], 0, {}, {}, 0)

    monkeypatch.setattr(labels, "label", stand_in)
    monkeypatch.setattr(labels, "unlabelled", lambda structures, *_, limit: dict(list(structures.items())[:limit]))
    monkeypatch.setattr(module, "disagreement", lambda pool, cache, progress: dict.fromkeys(reversed(list(pool)), 1.0))
    for name in ("a", "b"):
        bulk("Cu").write(tmp_path / f"{name}.cif")
    files = [str(tmp_path / f"{name}.cif") for name in ("a", "b")]
    arguments = ["label", *files, "--shards", str(tmp_path / "shards"), "--order", "disagreement"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert given["order"] == ["b", "a"]
