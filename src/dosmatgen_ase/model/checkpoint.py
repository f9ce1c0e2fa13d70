"""Weights of a generator: one file with its network, its settings and the statistics of its cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from dosmatgen_ase.files.tensors import fill, load_tensors, save_tensors, without_values
from dosmatgen_ase.model.conditioning import ConditionalDenoiser
from dosmatgen_ase.model.denoiser import Denoiser, DenoiserConfig
from dosmatgen_ase.model.diffusion.lattice import LatticeProcess

DEFAULT_WEIGHTS = Path(__file__).parents[1] / "weights" / "default.safetensors"


def filled_model(config: DenoiserConfig, lattice: LatticeProcess, tensors: Mapping[str, Tensor]) -> ConditionalDenoiser:
    """Build a generator's network from its values; ``ValueError`` as `fill`."""
    with without_values():
        model = ConditionalDenoiser(Denoiser(config, lattice))
    fill(model, tensors)
    return model


def save_model(path: str | Path, model: ConditionalDenoiser, metadata: Mapping[str, Any]) -> None:
    """Save a generator's weights, in the model's precision, with all that is needed to rebuild it."""
    config, lattice = model.denoiser.config.to_dict(), asdict(model.denoiser.lattice)
    save_tensors(path, model.state_dict(), {"kind": "generator", "config": config, "lattice": lattice, **metadata})


def load_model(path: str | Path) -> tuple[ConditionalDenoiser, dict[str, Any]]:
    """Rebuild a generator from :func:`save_model`, in evaluation mode.

    Raises
    ------
    FileNotFoundError, ValueError
        As `load_tensors`; also if the file holds something else than a generator.
    """
    tensors, header = load_tensors(path)
    if header.get("kind") != "generator":
        raise ValueError(f"{path} holds a {header.get('kind')}, not a generator: give the generator's weights")
    try:
        lattice = LatticeProcess(tuple(header["lattice"]["mean"]), tuple(header["lattice"]["std"]))
        model = filled_model(DenoiserConfig(**header["config"]), lattice, tensors)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        told = f"the header of {path} does not describe its own tensors ({error}): fetch or train it again"
        raise ValueError(told) from error
    return model.eval().requires_grad_(False), header
