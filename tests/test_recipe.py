"""Training in several stages: each goes on from the one before, a killed run where it was, and a record tells all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import CONFIG, bulk_dataset

from dosmatgen_ase.data import CrystalDataset
from dosmatgen_ase.files.tensors import load_tensors, save_tensors
from dosmatgen_ase.model.checkpoint import DEFAULT_WEIGHTS, load_model
from dosmatgen_ase.train.recipe import Recipe, Stage, train_stages
from dosmatgen_ase.train.trainer import Trainer, TrainingConfig, train

ROOT = Path(__file__).parents[1]
SMALL = Recipe((Stage(replace(CONFIG, steps=12), "wide"), Stage(replace(CONFIG, steps=8, seed=1, save_every=4))))


def datasets(asked: list[str]) -> Callable[[Stage], CrystalDataset]:
    """Another number of predicted DOS in each table; `asked` gets the names of those that were needed."""

    def dataset_of(stage: Stage) -> CrystalDataset:
        asked.append(stage.structures)
        return bulk_dataset(pseudo=5 if stage.structures == "wide" else 3)

    return dataset_of


def same(first: Path, second: Path) -> bool:
    one, other = (load_model(path)[0].state_dict() for path in (first, second))
    return all(torch.equal(one[k], other[k]) for k in one)


def test_a_stage_starts_from_the_weights_of_the_one_before(tmp_path: Path) -> None:
    asked: list[str] = []
    final = train_stages(SMALL, datasets(asked), tmp_path, progress=False)
    assert asked == ["wide", "data"]
    assert same(final, tmp_path / "stage_2" / "weights.safetensors")
    assert not same(final, tmp_path / "stage_1" / "weights.safetensors")
    record, header = json.loads((tmp_path / "record.json").read_text()), load_model(final)[1]
    first, second = record["stages"]
    assert second["init"] == first["weights"] == load_model(tmp_path / "stage_1" / "weights.safetensors")[1]["sha256"]
    assert record["weights"] == header["sha256"]
    assert first["data"] == {"structures": 10, "labelled": 4, "predicted": 5, "digest": first["data"]["digest"]}
    assert first["data"]["digest"] != second["data"]["digest"]
    assert [line["step"] for line in second["curve"]] == [4, 8]
    assert header["stages"] == [{k: v for k, v in one.items() if k != "curve"} for one in record["stages"]]
    again = train_stages(SMALL, datasets(asked), tmp_path, progress=False)  # all is done: nothing is read or trained
    assert asked == ["wide", "data"]
    assert load_model(again)[1]["sha256"] == header["sha256"]


@pytest.mark.parametrize("died_in", [7, 13, 17])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, died_in: int
) -> None:
    whole = train_stages(SMALL, datasets([]), tmp_path / "whole", progress=False)
    steps, train_one = [0], Trainer._train

    def dies(self: Trainer, rows: Any) -> dict[str, float]:
        steps[0] += 1
        if steps[0] == died_in:
            raise KeyboardInterrupt
        return train_one(self, rows)

    monkeypatch.setattr(Trainer, "_train", dies)
    with pytest.raises(KeyboardInterrupt):
        train_stages(SMALL, datasets([]), tmp_path / "killed", progress=False)
    assert not (tmp_path / "killed" / "weights.safetensors").exists()
    asked: list[str] = []
    resumed = train_stages(SMALL, datasets(asked), tmp_path / "killed", progress=False)
    assert asked == (["wide", "data"] if died_in <= 12 else ["data"])
    assert same(whole, resumed)


def test_other_settings_need_another_folder(tmp_path: Path) -> None:
    train_stages(SMALL, datasets([]), tmp_path, progress=False)
    other = Recipe((replace(SMALL.stages[0], training=replace(SMALL.stages[0].training, seed=5)), SMALL.stages[1]))
    with pytest.raises(ValueError, match=r"was started with other settings of \['seed'\]"):
        train_stages(other, datasets([]), tmp_path, progress=False)


def test_what_a_stage_began_with_must_be_the_same(tmp_path: Path) -> None:
    first, second = SMALL.stages
    final = train_stages(SMALL, datasets([]), tmp_path / "run", progress=False)
    other = train(replace(CONFIG, steps=3, seed=9), bulk_dataset(), tmp_path / "other", progress=False)
    longer = replace(first, training=replace(first.training, steps=16))
    shorter = replace(first, training=replace(first.training, steps=8))
    kept = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}
    for stages, init, told in (
        ((first, second), other, r"stage_1 did not start from .*: choose a new folder"),
        ((replace(first, structures="data"), second), None, r"stage_1 has structures='wide', the recipe 'data'"),
        ((first, replace(second, predicted=False)), None, r"stage_2 has predicted=True, the recipe False"),
        ((longer, second), None, r"stage_2 began from the 12 steps of .*stage_1, of which the recipe has 16"),
        ((shorter, second), None, r"stage_1 has 12 steps already, more than steps=8: ask for as many, or choose"),
    ):
        with pytest.raises(ValueError, match=told) as error:
            train_stages(Recipe(stages), datasets([]), tmp_path / "run", init=init, progress=False)
        assert "choose a new folder" in str(error.value)
    (tmp_path / "run" / "stage_1" / "log.jsonl").unlink()  # a curve is lost, nothing else
    assert train_stages(SMALL, datasets([]), tmp_path / "run", progress=False).read_bytes() == kept[final]
    assert kept == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}
    shutil.copy(other, tmp_path / "run" / "stage_1" / "weights.safetensors")  # trained again elsewhere
    with pytest.raises(ValueError, match="choose a new folder"):
        train_stages(SMALL, datasets([]), tmp_path / "run", progress=False)
    assert final.read_bytes() == kept[final]


def test_a_stage_of_an_older_version_is_still_done(tmp_path: Path) -> None:
    final = train_stages(SMALL, datasets([]), tmp_path, progress=False)
    for weights in tmp_path.glob("stage_*/weights.safetensors"):
        tensors, header = load_tensors(weights)
        assert header.pop("predicted") is True
        save_tensors(weights, tensors, header)
    asked: list[str] = []
    assert train_stages(SMALL, datasets(asked), tmp_path, progress=False) == final
    assert asked == []


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"stages": []}, "at least one stage"),
        ({"stages": {}}, "a list of objects 'stages'"),
        ({"stages": [3]}, "a list of objects 'stages'"),
        ({"common": [], "stages": [{}]}, "an object 'common'"),
        ({"stage": [], "stages": [{}]}, r"unknown parts \['stage'\]"),
        ({"stages": [{"structures": "all"}]}, "structures='all' of a stage must be one of data, wide"),
        ({"stages": [{"predicted": 1}]}, "predicted=1 of a stage must be true or false"),
        ({"stages": [{"step": 3}]}, r"unknown training settings \['step'\]"),
        ({"stages": [{}, {"network": {"width": 32}}]}, "networks of different sizes"),
    ],
)
def test_what_is_no_recipe_is_told(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Recipe.from_dict(values)


def test_the_shipped_weights_are_of_the_shipped_recipe() -> None:
    """Header, config and the account in docs say the same; the last stage ended five steps before its schedule."""
    recipe = Recipe.from_dict(json.loads((ROOT / "configs" / "shipped.json").read_text()))
    model, header = load_model(DEFAULT_WEIGHTS)
    assert model.denoiser.config == recipe.stages[0].training.network
    assert [s.structures for s in recipe.stages] == ["wide", "data"]
    assert [s.training.steps for s in recipe.stages] == header["training"]["steps_of_stages"]
    trained = TrainingConfig.from_dict(header["training"]["config"])
    assert trained == replace(recipe.stages[-1].training, steps=trained.steps)
    assert header["data"]["structures"] < header["data"]["first_stage"]["structures"]
    account = (ROOT / "docs" / "decisions.md").read_text() + (ROOT / "docs" / "model_card.md").read_text()
    for number in (*header["training"]["steps_of_stages"], header["data"]["first_stage"]["structures"]):
        assert f"{number:,}" in account
