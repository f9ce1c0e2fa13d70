"""Options and places that the benchmarks share, and CHGNet energies."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
from ase import Atoms

from dosmatgen_ase.forward.predictor import DOSPredictor
from dosmatgen_ase.generate.sampler import SamplerConfig
from dosmatgen_ase.judge import stability
from dosmatgen_ase.model.checkpoint import DEFAULT_WEIGHTS

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


def split_of(options: argparse.Namespace) -> str:
    """Split that is measured."""
    return "val" if options.val else "test"


def results_folder(options: argparse.Namespace) -> Path:
    """Where results go: trials on `val` do not replace published ones."""
    return options.out or (ROOT / "runs" if options.val else RESULTS)


def sampler_config(options: argparse.Namespace) -> SamplerConfig:
    """Sampler settings from the command line."""
    return SamplerConfig(**{f.name: getattr(options, f.name) for f in fields(SamplerConfig)})


def chgnet_energies(structures: Sequence[Atoms]) -> np.ndarray:
    """CHGNet energies, shape (n,), eV/atom; infinite where it cannot read a structure (collapsed, isolated atoms)."""
    return np.nan_to_num(stability.chgnet_energies(structures), nan=np.inf)
