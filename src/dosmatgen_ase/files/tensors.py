"""Tensors in one file: safetensors with a JSON header, written atomically, versioned and hashed. Never pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dosmatgen_ase.files import write_atomic

FORMAT_VERSION = 1


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
        If the file is absent, truncated, altered, not ours, from a newer version, or holds a NaN or an infinity; the
        message names the fix.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: give the path of a .safetensors file, or 'default'")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("dosmatgen_ase", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable safetensors file (truncated?): fetch or train it again") from error
    known = isinstance(header, dict) and {"format_version", "sha256"} <= header.keys()
    if not known or not isinstance(header["format_version"], int):
        raise ValueError(f"{path} holds no dosmatgen-ase header: it was made by another program")
    if header["format_version"] > FORMAT_VERSION:
        raise ValueError(f"{path} has format {header['format_version']}, this version reads {FORMAT_VERSION}: upgrade")
    if header["sha256"] != content_hash(tensors):
        raise ValueError(f"{path} does not match its own hash: it was altered, fetch or train it again")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ValueError(f"{path} holds a NaN or an infinity in {name}: fetch or train it again")
    return tensors, header


class _WithoutValues(TorchFunctionMode):
    """Initialises nothing: what comes from torch.nn.init is passed over, which on "meta" takes seconds of imports."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Build networks that take no memory and draw no random numbers, for :func:`fill`."""
    with torch.device("meta"), _WithoutValues():
        yield


def fill(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a network that was built by :func:`without_values` its values, on the CPU.

    Raises
    ------
    ValueError
        If names, shapes or types are not those of the network.
    """
    wanted = network.state_dict()
    if other := sorted(wanted.keys() ^ tensors.keys()):
        raise ValueError(f"{other[0]} is {'missing' if other[0] in wanted else 'not known'}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape or not tensor.is_floating_point():
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}, or no floats")
    network.load_state_dict({k: v.to("cpu", torch.float32, copy=True) for k, v in tensors.items()}, assign=True)
