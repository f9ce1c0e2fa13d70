"""A recipe of several stages: training runs of one network, each from the weights of the one before.

A stage has a folder of its own with all that `trainer.train` keeps, so that a killed run goes on where it was.
``record.json`` tells of what the weights were made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import dosmatgen_ase
from dosmatgen_ase.data import CrystalDataset
from dosmatgen_ase.files import write_atomic
from dosmatgen_ase.files.tensors import load_tensors
from dosmatgen_ase.model.checkpoint import load_model, save_model
from dosmatgen_ase.provenance import commit_of
from dosmatgen_ase.train.trainer import TrainingConfig, train

TABLES = ("data", "wide")
CURVE = 100  # lines of a stage's log that the record keeps, at most


@dataclass(frozen=True)
class Stage:
    """One training run of a recipe.

    Attributes
    ----------
    training : TrainingConfig
    structures : "data" or "wide"
        The table of the data folder, or a wider one that the user names.
    predicted : bool
        Whether structures without a label get a predicted DOS.
    """

    training: TrainingConfig
    structures: str = "data"
    predicted: bool = True

    def __post_init__(self) -> None:
        if self.structures not in TABLES:
            raise ValueError(f"structures={self.structures!r} of a stage must be one of {', '.join(TABLES)}")
        if not isinstance(self.predicted, bool):
            raise ValueError(f"predicted={self.predicted!r} of a stage must be true or false")


@dataclass(frozen=True)
class Recipe:
    """Stages of one network, in order."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a recipe needs at least one stage")
        if len({repr(stage.training.network) for stage in self.stages}) > 1:
            raise ValueError("the stages have networks of different sizes: set 'network' in 'common'")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """From JSON: settings in "common", and of each of "stages" its "structures", "predicted" and other settings.

        Raises
        ------
        ValueError
            If it is not of that form, or as `TrainingConfig.from_dict`.
        """
        if unknown := sorted(values.keys() - {"common", "stages"}):
            raise ValueError(f"unknown parts {unknown} of a recipe: it has 'common' and 'stages'")
        common, stages = values.get("common", {}), values.get("stages")
        if not isinstance(common, dict) or not isinstance(stages, list) or not all(isinstance(s, dict) for s in stages):
            raise ValueError("a recipe needs an object 'common' and a list of objects 'stages'")
        made = []
        for stage in stages:
            own = {name: stage[name] for name in ("structures", "predicted") if name in stage}
            settings = {name: value for name, value in stage.items() if name not in own}
            made.append(Stage(TrainingConfig.from_dict({**common, **settings}), **own))
        return cls(tuple(made))

    def on_threads(self, threads: int | None) -> Recipe:
        """The same recipe on another number of CPU threads."""
        if threads is None:
            return self
        return Recipe(tuple(replace(s, training=replace(s.training, threads=threads)) for s in self.stages))


def train_stages(
    recipe: Recipe,
    dataset_of: Callable[[Stage], CrystalDataset],
    out: str | Path,
    *,
    init: str | Path | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> Path:
    """Train all stages, or go on with a run found in `out`.

    Parameters
    ----------
    recipe : Recipe
    dataset_of : gives the training structures of a stage; it is not asked for a stage that is done, whose data are thus
        not compared with those of today (the record tells their digest)
    out : path
        Folder for ``stage_1``, ``stage_2`` and so on, ``record.json`` and ``weights.safetensors``.
    init : path, optional
        Weights that the first stage starts from.
    device : str
    progress : bool

    Returns
    -------
    Path
        Of the weights.

    Raises
    ------
    ValueError, BlockingIOError, OSError
        As `trainer.train`; also if a stage in `out` began with other structures, or from other weights than it would
        begin with now.
    """
    out, told = Path(out), []
    for number, stage in enumerate(recipe.stages, start=1):
        folder = out / f"stage_{number}"
        weights = folder / "weights.safetensors"
        if not _is_done(folder, stage, init):
            _check_last(stage, weights, out / f"stage_{number + 1}" / "weights.safetensors")
            dataset = dataset_of(stage)
            metadata = {"structures": stage.structures, "predicted": stage.predicted, "data": counts_of(dataset)}
            train(stage.training, dataset, folder, init=init, device=device, metadata=metadata, progress=progress)
        told.append(_told(folder))
        init = weights
    model, header = load_model(weights)
    stages = [{k: v for k, v in one.items() if k != "curve"} for one in told]
    final = out / "weights.safetensors"
    save_model(final, model, {"training": header["training"], "data": header["data"], "stages": stages})
    commit, sha256 = commit_of(Path(__file__)), load_model(final)[1]["sha256"]
    record = {"version": dosmatgen_ase.__version__, "commit": commit, "device": device, "stages": told}
    record["weights"] = sha256
    write_atomic(out / "record.json", (json.dumps(record, indent=1) + "\n").encode())
    return final


def counts_of(dataset: CrystalDataset) -> dict[str, int]:
    """Number of structures, and of those with a computed and a predicted DOS."""
    return {
        "structures": len(dataset),
        "labelled": len(dataset.labelled),
        "predicted": int(dataset.pseudo.sum()),
    }


def _is_done(folder: Path, stage: Stage, init: str | Path | None) -> bool:
    """Whether the stage was trained to its end with these settings; else `train` goes on, or refuses the folder.

    Raises
    ------
    ValueError
        If it began with other structures, or from other weights than `init`.
    """
    if not ((folder / "state.safetensors").exists() and (folder / "weights.safetensors").exists()):
        return False
    header = load_model(folder / "weights.safetensors")[1]
    for name in ("structures", "predicted"):  # older versions do not tell the second
        if header.get(name, value := getattr(stage, name)) != value:
            fix = "restore it or choose a new folder"
            raise ValueError(f"the run in {folder} has {name}={header[name]!r}, the recipe {value!r}: {fix}")
    if init is not None and load_model(init)[1]["sha256"] != header.get("init"):
        raise ValueError(f"the run in {folder} did not start from {init}: choose a new folder")
    config = stage.training
    return bool(header.get("training", {}) == json.loads(json.dumps({"steps": config.steps, "config": asdict(config)})))


def _check_last(stage: Stage, weights: Path, after: Path) -> None:
    """Refuse more steps for a stage from whose weights another one began: before it is trained, not after."""
    if weights.exists() and after.exists():
        steps = load_model(weights)[1].get("training", {}).get("steps")
        if isinstance(steps, int) and steps < stage.training.steps:
            told = f"{after.parent} began from the {steps} steps of {weights.parent}, of which the recipe has"
            raise ValueError(f"{told} {stage.training.steps}: restore them or choose a new folder")


def _told(folder: Path) -> dict[str, Any]:
    """What the record tells of a stage."""
    header = load_model(folder / "weights.safetensors")[1]
    state = load_tensors(folder / "state.safetensors")[1]
    log = folder / "log.jsonl"  # which a user may have thrown away: it is not needed to go on
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    every = max(1, -(-len(lines) // CURVE))
    return {
        "structures": header["structures"],
        "data": {**header["data"], "digest": state["data"]},
        "init": state["init"],
        "weights": header["sha256"],
        "training": header["training"],
        "curve": lines[every - 1 :: every],
    }
