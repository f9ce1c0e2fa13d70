"""``dosmatgen train`` and ``train-predictor``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer import Option

from dosmatgen_ase.cli.application import app, show, tell
from dosmatgen_ase.cli.files import output
from dosmatgen_ase.cli.options import Data, Device, Overwrite, Predictor, figure

if TYPE_CHECKING:
    from dosmatgen_ase.data import CrystalDataset, Structures
    from dosmatgen_ase.train.recipe import Recipe, Stage

PREDICTED = {"data": "pseudo_labels", "wide": "pseudo_labels_wide"}  # file in OUT of each table of structures


@app.command()
def train(
    ctx: typer.Context,
    config: Annotated[
        Path,
        Option(
            help="JSON with fields of TrainingConfig, such as configs/default.json, or with several stages, such as "
            "configs/shipped.json.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, Option(help="Folder of the run: state, log.jsonl, weights.safetensors; continued if it exists.")
    ] = Path("runs/default"),
    data: Data = Path("data"),
    wide: Annotated[
        Path | None,
        Option(
            help="Larger table of structures (.parquet) to train on. In a config of several stages, the stages with "
            '\'"structures": "wide"\' use it.'
        ),
    ] = None,
    pseudo_labels: Annotated[
        str | None,
        Option(
            help="File of predicted DOS for structures without a label, or 'auto': predict them once and keep the file "
            "in OUT. A config of several stages always does this. For the judge of the benchmarks to stay independent, "
            "--predictor must be benchmarks/ranker.safetensors."
        ),
    ] = None,
    predictor: Predictor = None,
    init: Annotated[
        Path | None, Option(help="Weights to start from (fine-tuning); same 'network' in the config.")
    ] = None,
    device: Device = None,
    threads: Annotated[int | None, Option(min=1, help="CPU threads; replaces the config's.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a generator on the training split. A run that was killed goes on where its last state was saved."""
    from dosmatgen_ase.generate.generator import select_device

    recipe, several = _recipe(config, threads)
    chosen = str(select_device(device))
    if several and wide is None and any(stage.structures == "wide" for stage in recipe.stages):
        raise ValueError(f"a stage of {config} trains on a wider table of structures: name it with --wide FILE.parquet")
    _check_folder(ctx, out)

    def dataset_of(stage: Stage) -> CrystalDataset:
        table = wide if stage.structures == "wide" or not several else None
        predicted = pseudo_labels or ("auto" if several and stage.predicted else None)
        return _dataset(out, data, table, predicted, predictor, chosen)

    try:
        weights = _trained(recipe, several, dataset_of, out, init=init, device=chosen)
    except KeyboardInterrupt:
        kept = any(out.glob("**/state.safetensors"))
        what = f"the last state is kept in {out}; the same command goes on" if kept else "no state was saved yet"
        raise KeyboardInterrupt(f": {what}") from None
    tell(f"weights: {weights}")


def _recipe(config: Path, threads: int | None) -> tuple[Recipe, bool]:
    """Read a config, and whether it has stages: one without is trained in OUT itself."""
    from dosmatgen_ase.train.recipe import Recipe, Stage
    from dosmatgen_ase.train.trainer import TrainingConfig

    values = _read_json(config)
    several = "stages" in values
    recipe = Recipe.from_dict(values) if several else Recipe((Stage(TrainingConfig.from_dict(values)),))
    return recipe.on_threads(threads), several


def _trained(
    recipe: Recipe, several: bool, dataset_of: Callable[[Stage], CrystalDataset], out: Path, **how: Any
) -> Path:
    from dosmatgen_ase.train.recipe import counts_of, train_stages
    from dosmatgen_ase.train.trainer import train

    if several:
        return train_stages(recipe, dataset_of, out, **how)
    dataset = dataset_of(recipe.stages[0])
    return train(recipe.stages[0].training, dataset, out, metadata={"data": counts_of(dataset)}, **how)


def _dataset(
    out: Path, data: Path, wide: Path | None, pseudo_labels: str | None, predictor: Path | None, device: str
) -> CrystalDataset:
    """Join a table of structures with the labels and, if wanted, predicted DOS; tell what it holds."""
    from dosmatgen_ase.data import CrystalDataset, load_pseudo_labels, load_site_dos, load_structures

    kind, table = ("data", data / "structures.parquet") if wide is None else ("wide", wide)
    structures, labels = load_structures(table, split="train"), load_site_dos(data / "site_dos")
    dataset = CrystalDataset.join(structures, labels)
    if pseudo_labels is not None:
        path = Path(pseudo_labels)
        if pseudo_labels == "auto":
            path = out / f"{PREDICTED[kind]}.npz"
            _predict_once(path, structures.select(dataset.dos_index < 0), predictor, device)
        if not path.is_file():
            raise FileNotFoundError(f"no pseudo-labels at {path}: give a file, or 'auto' to make it")
        dataset = CrystalDataset.join(structures, labels, load_pseudo_labels(path))
    real, predicted = len(dataset.labelled), int(dataset.pseudo.sum())
    told = f"{len(dataset)} structures, {real} with a computed and {predicted} with a predicted DOS, on {device}"
    typer.echo(told, err=True)
    return dataset


def _check_folder(ctx: typer.Context, out: Path) -> None:
    """Make the folder of a run, and refuse what a run would replace and has not made."""
    from dosmatgen_ase.files import output_folder

    output_folder(out)
    written = [out / name for name in ("state.safetensors", "weights.safetensors", "log.jsonl", "record.json")]
    predicted = [out / f"{name}.npz" for name in PREDICTED.values()]
    for path in [*written, *(p for p in predicted if not p.is_file())]:  # one that is there is used as it is
        output(ctx, "out", (path.suffix,), path=path, marks=(b'"gradient_norm": ', b'"stages": ['))


def _predict_once(path: Path, structures: Structures, predictor: Path | None, device: str) -> None:
    """Write the predicted DOS of structures, unless they are there; tight binding on the device.

    Others in their place are refused, not replaced: they took hours, and the run may have begun with them.
    """
    from dosmatgen_ase.files import exclusive
    from dosmatgen_ase.forward.predictor import DEFAULT_PREDICTOR, DOSPredictor
    from dosmatgen_ase.forward.pseudo_labels import check_pseudo_labels, write_pseudo_labels

    with exclusive(path):
        forward = DOSPredictor.load(predictor or DEFAULT_PREDICTOR).to(device)
        if path.exists():
            if not check_pseudo_labels(path, structures, forward):
                tell(f"{path} does not tell its predictor (an older version): it is used as it is", err=True)
        else:
            tell(f"predicting the DOS of {len(structures)} structures (once; kept in {path})", err=True)
            write_pseudo_labels(path, structures, forward, cache=path.with_name("chgnet_features"))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no config {path}: start from configs/default.json")
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object with the fields of TrainingConfig")
    return values


@app.command("train-predictor")
def train_predictor(
    ctx: typer.Context,
    data: Data = Path("data"),
    out: Annotated[
        Path, Option(help="Folder for predictor.safetensors (generate --predictor), ranker and judge.")
    ] = Path("runs/predictor"),
    epochs: Annotated[
        int, Option(min=1, help="Epochs of each tight-binding model; 40 take about half an hour on a CPU core.")
    ] = 40,
    device: Device = None,
    overwrite: Overwrite = False,
    seed: Annotated[int, Option(min=0, help="Seed of the initial weights, dropout and order.")] = 0,
) -> None:
    """Train the forward models (structure to site DOS): one on all labels, two on the halves of the formulas.

    The first is for use. In benchmarks the ranker picks, and makes pseudo-labels; the judge only measures. A killed run
    goes on with the tight-binding model that was in training.
    """
    from dosmatgen_ase.files import output_folder
    from dosmatgen_ase.forward.predictor_training import ROLES, train_predictors
    from dosmatgen_ase.forward.tight_binding.training import TightBindingTraining
    from dosmatgen_ase.generate.generator import select_device

    output_folder(out)
    paths = {name: out / f"{name}.safetensors" for name in ROLES}
    for path in paths.values():
        output(ctx, "out", (".safetensors",), path=path)
    figures = train_predictors(
        data / "site_dos",
        paths,
        settings=TightBindingTraining(epochs=epochs),
        runs=out / "tight_binding",
        device=str(select_device(device)),
        seed=seed,
        progress=True,
    )
    table = Table(title="error on the test split (val if there is none): normalised L1, mean over sites")
    for column in ("predictor", "error", "per-element mean", "structures", "weights"):
        table.add_column(column, overflow="fold")
    for name, path in paths.items():
        test = figures[name].get("test", figures[name]["val"])
        error, element = figure(test["mean"]), figure(test["element_mean"])
        table.add_row(name, error, element, f"{test['structures']:.0f}", str(path))
    show(table)
