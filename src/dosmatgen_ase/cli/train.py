"""``dosmatgen train`` and ``train-predictor``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dosmatgen_ase.cli.application import app, show, tell
from dosmatgen_ase.cli.options import Data, Device, Overwrite, Predictor, figure, output

if TYPE_CHECKING:
    from dosmatgen_ase.data import Structures


@app.command()
def train(
    ctx: typer.Context,
    config: Annotated[
        Path, typer.Option(help="JSON with fields of TrainingConfig, such as configs/default.json.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the run: state, log.jsonl, weights.safetensors; continued if it exists.")
    ] = Path("runs/default"),
    data: Data = Path("data"),
    pseudo_labels: Annotated[
        str | None,
        typer.Option(
            help="File of predicted DOS for structures without a label, or 'auto' to make it once in OUT. For the "
            "judge of the benchmarks to stay independent, --predictor must be benchmarks/ranker.safetensors."
        ),
    ] = None,
    predictor: Predictor = None,
    init: Annotated[
        Path | None, typer.Option(help="Weights to start from (fine-tuning); same 'network' in the config.")
    ] = None,
    device: Device = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; replaces the config's.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a generator on the training split. A run that was killed goes on where its last state was saved."""
    from dosmatgen_ase.train.trainer import TrainingConfig
    from dosmatgen_ase.train.trainer import train as run

    settings = TrainingConfig.from_dict(_read_json(config))
    if threads is not None:
        settings = replace(settings, threads=threads)
    from dosmatgen_ase.data import CrystalDataset, load_pseudo_labels, load_site_dos, load_structures
    from dosmatgen_ase.generate.generator import select_device

    chosen = str(select_device(device))
    structures = load_structures(data / "structures.parquet", split="train")
    labels = load_site_dos(data / "site_dos")
    _check_folder(ctx, out)
    dataset = CrystalDataset.join(structures, labels)
    if pseudo_labels is not None:
        path = Path(pseudo_labels)
        if pseudo_labels == "auto":
            path = out / "pseudo_labels.npz"
            _predict_once(path, structures.select(dataset.dos_index < 0), predictor)
        if not path.is_file():
            raise FileNotFoundError(f"no pseudo-labels at {path}: give a file, or 'auto' to make it")
        dataset = CrystalDataset.join(structures, labels, load_pseudo_labels(path))
    real, predicted = len(dataset.labelled), int(dataset.pseudo.sum())
    counts = {"structures": len(dataset), "labelled": real, "predicted": predicted}
    told = f"{len(dataset)} structures, {real} with a computed and {predicted} with a predicted DOS, on {chosen}"
    typer.echo(told, err=True)
    try:
        weights = run(settings, dataset, out, init=init, device=chosen, metadata={"data": counts})
    except KeyboardInterrupt:
        kept = (out / "state.safetensors").exists()
        what = f"the last state is kept in {out}; the same command goes on" if kept else "no state was saved yet"
        raise KeyboardInterrupt(f": {what}") from None
    tell(f"weights: {weights}")


def _check_folder(ctx: typer.Context, out: Path) -> None:
    """Make the folder of a run, and refuse what a run would replace and has not made."""
    from dosmatgen_ase.files import output_folder

    output_folder(out)
    for name in ("state.safetensors", "weights.safetensors", "log.jsonl", "pseudo_labels.npz"):
        if not (name == "pseudo_labels.npz" and (out / name).is_file()):  # one that is there is used as it is
            output(ctx, "out", (Path(name).suffix,), path=out / name, marks=(b'"gradient_norm": ',))


def _predict_once(path: Path, structures: Structures, predictor: Path | None) -> None:
    """Write the predicted DOS of structures, unless they are there."""
    from dosmatgen_ase.files import exclusive
    from dosmatgen_ase.forward.predictor import DEFAULT_PREDICTOR, DOSPredictor
    from dosmatgen_ase.forward.pseudo_labels import write_pseudo_labels

    with exclusive(path):
        if not path.exists():
            forward = DOSPredictor.load(predictor or DEFAULT_PREDICTOR)
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
        Path, typer.Option(help="Folder for predictor.safetensors (generate --predictor), ranker and judge.")
    ] = Path("runs/predictor"),
    epochs: Annotated[
        int, typer.Option(min=1, help="Epochs of each tight-binding model; 40 take about half an hour on a CPU core.")
    ] = 40,
    device: Device = None,
    overwrite: Overwrite = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the initial weights, dropout and order.")] = 0,
) -> None:
    """Train the forward models (structure to site DOS): one on all labels, two on the halves of the formulas.

    The first is for use. In benchmarks the ranker picks, and makes pseudo-labels; the judge only measures. A run that
    was killed goes on with the tight-binding model that it was at.
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
