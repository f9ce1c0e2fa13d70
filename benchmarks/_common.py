"""What the benchmarks share: options, one batch through the sampler, CHGNet energies, writing results."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from dosmatgen_ase import __version__
from dosmatgen_ase.data import SiteDOSLabels
from dosmatgen_ase.files import write_atomic
from dosmatgen_ase.forward.predictor import DOSPredictor
from dosmatgen_ase.generate.constraints import Constraints
from dosmatgen_ase.generate.sampler import Randomness, SamplerConfig, sample
from dosmatgen_ase.judge import stability
from dosmatgen_ase.model.checkpoint import DEFAULT_WEIGHTS
from dosmatgen_ase.model.conditioning import ConditionalDenoiser, DOSCondition, Guidance

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
RANKER, JUDGE = (Path(__file__).parent / f"{name}.safetensors" for name in ("ranker", "judge"))


def add_predictors(parser: argparse.ArgumentParser) -> None:
    """Options of the two forward models; `load_predictors` reads them."""
    parser.add_argument("--judge", type=Path, default=JUDGE, help="judges")
    parser.add_argument("--predictor", type=Path, default=RANKER, help="picks; trained on other formulas")


def load_predictors(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[DOSPredictor, DOSPredictor]:
    """Judge and ranker, which must not share a formula, or the command line is wrong."""
    judge, ranker = DOSPredictor.load(options.judge), DOSPredictor.load(options.predictor)
    folds = judge.info["fold"], ranker.info["fold"]
    if folds != (1, 0):
        parser.error(
            f"judge and predictor are of the folds {folds}: the judge must be of fold 1, and what picks of fold 0, "
            "which made the generator's predicted labels"
        )
    return judge, ranker


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark that draws structures: weights, seed, and each sampler setting."""
    parser.add_argument("--weights", type=Path, default=DEFAULT_WEIGHTS, help="generator (default: the one that ships)")
    parser.add_argument("--seed", type=int, default=0)
    for f in fields(SamplerConfig):
        option = "--" + f.name.replace("_", "-")
        parser.add_argument(option, type=type(f.default), default=f.default, help="sampler (default %(default)s)")


def add_split(parser: argparse.ArgumentParser) -> None:
    """Options that say what is measured on and where results go; `split_of` and `results_folder` read them."""
    parser.add_argument("--val", action="store_true", help="measure on `val` (for tuning) instead of `test`")
    parser.add_argument("--out", type=Path, help="results folder (default: results/, with --val runs/)")


def add_targets(parser: argparse.ArgumentParser, count: int) -> None:
    """Options that say which labels are targets; `drawn_rows` reads them."""
    parser.add_argument("--num-targets", type=int, default=count, help="at most this many (default %(default)s)")
    parser.add_argument(
        "--targets", type=Path, metavar="RESULT.json", help="those of an earlier result, in place of a draw"
    )


def in_random_order(labels: SiteDOSLabels, rows: np.ndarray, seed: int) -> list[int]:
    """Rows by a random number made from the seed and the id, so that new labels hardly change the first ones."""
    names = labels.material_id.tolist()  # 0, 3: a stream of which no draw takes numbers, or it would be chosen by them
    return sorted(rows.tolist(), key=lambda i: rng_for(seed, names[i], 0, 3).random())


def drawn_rows(labels: SiteDOSLabels, fitting: np.ndarray, options: argparse.Namespace) -> list[int]:
    """Rows of the targets among those that fit: of an earlier result, or drawn.

    Raises
    ------
    SystemExit
        If an earlier result names none, or a label that is not there or does not fit.
    """
    if options.targets is None:
        return in_random_order(labels, fitting, options.seed)[: options.num_targets]
    wanted = json.loads(options.targets.read_text()).get("target_ids")
    row_of = {str(labels.material_id[i]): i for i in fitting.tolist()}
    if not wanted or set(wanted) - row_of.keys():
        raise SystemExit(f"{options.targets} names no targets, or labels that are not there: draw them")
    return [row_of[name] for name in wanted]


def split_of(options: argparse.Namespace) -> str:
    """Split that is measured."""
    return "val" if options.val else "test"


def results_folder(options: argparse.Namespace) -> Path:
    """Where results go: trials on `val` do not replace published ones."""
    return options.out or (ROOT / "runs" if options.val else RESULTS)


def sampler_config(options: argparse.Namespace) -> SamplerConfig:
    """Sampler settings from the command line."""
    return SamplerConfig(**{f.name: getattr(options, f.name) for f in fields(SamplerConfig)})


def rng_for(seed: int, material_id: str, *more: int) -> np.random.Generator:
    """Random numbers of one structure, whatever else is drawn beside it."""
    return np.random.default_rng((seed, zlib.crc32(material_id.encode()), *more))


def draw(
    model: ConditionalDenoiser,
    constraints: Constraints,
    condition: DOSCondition | None,
    rngs: list[np.random.Generator],
    config: SamplerConfig,
    guidance_scale: float = 1.0,
) -> list[Atoms]:
    """First draws of one batch from pure noise, neither screened nor drawn again."""
    randomness = Randomness.draw(constraints.start.num_atoms, rngs)
    denoise = Guidance(guidance_scale).wrap(model, condition)
    return sample(denoise, model.denoiser.lattice, constraints, randomness, config).crystals.to_atoms()


def chgnet_energies(structures: Sequence[Atoms]) -> np.ndarray:
    """CHGNet energies, shape (n,), eV/atom; infinite where it cannot read a structure (collapsed, isolated atoms)."""
    return np.nan_to_num(stability.chgnet_energies(structures), nan=np.inf)


def made_by() -> dict[str, Any]:
    """What made a result: version, commit (null outside a clone; ``-dirty`` with changes not committed), command."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    script, *options = sys.argv
    return {"version": __version__, "commit": commit, "command": shlex.join(["python", script, *options])}


def write_results(folder: Path, name: str, report: dict[str, Any], markdown: str) -> None:
    """Write ``name.json`` (infinite and undefined numbers as null; it says what made it) and ``name.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {**report, "made_by": made_by()}
    write_atomic(folder / f"{name}.json", (json.dumps(_strict(report), indent=2) + "\n").encode())
    write_atomic(folder / f"{name}.md", markdown.encode())


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
