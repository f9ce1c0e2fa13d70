"""One-file checkpoints: safetensors with a JSON header, written atomically, versioned and hashed. Never pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dosmatgen_ase.files import write_atomic
from dosmatgen_ase.model.conditioning import ConditionalDenoiser
from dosmatgen_ase.model.denoiser import Denoiser, DenoiserConfig
from dosmatgen_ase.model.diffusion.lattice import LatticeProcess

FORMAT_VERSION = 1
DEFAULT_WEIGHTS = Path(__file__).parents[1] / "weights" / "default.safetensors"


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and values, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Save tensors and JSON-able metadata in one file.

    Raises
    ------
    OSError
        If the file cannot be written; a file already there stays as it was.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    header = {"format_version": FORMAT_VERSION, "sha256": content_hash(tensors), **metadata}
    write_atomic(Path(path), save(tensors, {"dosmatgen_ase": json.dumps(header)}))


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load what :func:`save_tensors` wrote.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file is absent, truncated, altered, not ours, or from a newer version; the message names the fix.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: give the path of a .safetensors file, or 'default'")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("dosmatgen_ase", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file (truncated?): fetch or train it again") from error
    if not isinstance(header, dict) or not {"format_version", "sha256"} <= header.keys():
        raise ValueError(f"{path} holds no dosmatgen-ase header: it was made by another program")
    if header["format_version"] > FORMAT_VERSION:
        raise ValueError(f"{path} has format {header['format_version']}, this version reads {FORMAT_VERSION}: upgrade")
    if header["sha256"] != content_hash(tensors):
        raise ValueError(f"{path} does not match its own hash: it was altered, fetch or train it again")
    return tensors, header


def save_model(path: str | Path, model: ConditionalDenoiser, metadata: Mapping[str, Any]) -> None:
    """Save a generator's weights, in the model's precision, with all that is needed to rebuild it."""
    lattice = model.denoiser.lattice
    described = {
        "kind": "generator",
        "config": model.denoiser.config.to_dict(),
        "lattice": {"mean": lattice.mean, "std": lattice.std},
    }
    save_tensors(path, model.state_dict(), {**described, **metadata})


def load_model(path: str | Path) -> tuple[ConditionalDenoiser, dict[str, Any]]:
    """Rebuild a generator from :func:`save_model`, in evaluation mode.

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`load_tensors`; also if the file holds something else than a generator.
    """
    tensors, header = load_tensors(path)
    if header.get("kind") != "generator":
        raise ValueError(f"{path} holds a {header.get('kind')}, not a generator: give the generator's weights")
    try:
        lattice = LatticeProcess(tuple(header["lattice"]["mean"]), tuple(header["lattice"]["std"]))
        model = ConditionalDenoiser(Denoiser(DenoiserConfig(**header["config"]), lattice))
        model.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"the header of {path} does not describe its own tensors: fetch or train it again") from error
    return model.eval().requires_grad_(False), header
