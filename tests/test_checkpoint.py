"""Checkpoints: whole or one clear error, and a failed write loses nothing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save, save_file

from dosmatgen_ase import files
from dosmatgen_ase.files.tensors import content_hash, load_tensors, save_tensors
from dosmatgen_ase.model.checkpoint import load_model, save_model
from dosmatgen_ase.model.conditioning import ConditionalDenoiser
from dosmatgen_ase.model.denoiser import SIZES, Layer

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, 2]), "empty": torch.zeros(0, 3)}


def test_tensors_and_metadata_round_trip(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", TENSORS, {"kind": "test", "lr": 0.1})
    tensors, header = load_tensors(tmp_path / "x")
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in TENSORS.items())
    assert (header["kind"], header["lr"]) == ("test", 0.1)
    assert header["sha256"] == content_hash(TENSORS)


def test_hash_knows_names_shapes_types_and_values() -> None:
    base = {"a": torch.zeros(2, 3)}
    others = [{"b": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}, {"a": torch.zeros(2, 3, dtype=torch.int32)}]
    others.append({"a": torch.tensor([[0, 0, 0], [0, 0, 1e-30]])})
    assert len({content_hash(t) for t in [base, *others]}) == 5
    assert content_hash(base) == content_hash({"a": torch.zeros(3, 2).T})  # not memory layout


def test_model_round_trip(tiny_model: ConditionalDenoiser, tiny_weights: Path) -> None:
    model, header = load_model(tiny_weights)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.denoiser.lattice == tiny_model.denoiser.lattice
    assert model.denoiser.config == tiny_model.denoiser.config
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert len(header["sha256"]) == 64


def rewrite(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Damage: the same tensors under a changed header (or, where `change` returns one, another header altogether)."""

    def damage(content: bytes) -> bytes:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["dosmatgen_ase"])
        replaced = change(header)
        header = header if replaced is None else replaced
        return save(load(content), {"dosmatgen_ase": json.dumps(header)})

    return damage


def flip_last_byte(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def without_a_tensor(content: bytes) -> bytes:
    tensors = load(content)
    tensors.pop("encoder.null_site")
    size = int.from_bytes(content[:8], "little")
    header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["dosmatgen_ase"])
    return save(tensors, {"dosmatgen_ase": json.dumps({**header, "sha256": content_hash(tensors)})})


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[bytes], bytes]:
    """Damage: another tensor under a header that belongs to it."""

    def damage(content: bytes) -> bytes:
        tensors = load(content)
        tensors[name] = change(tensors[name])
        return rewrite(lambda h: h.update(sha256=content_hash(tensors)))(
            save(tensors, {"dosmatgen_ase": metadata_of(content)})
        )

    return damage


def metadata_of(content: bytes) -> str:
    size = int.from_bytes(content[:8], "little")
    return str(json.loads(content[8 : 8 + size])["__metadata__"]["dosmatgen_ase"])


def with_value(value: float) -> Callable[[bytes], bytes]:
    def put(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0] = value
        return tensor

    return with_tensor("encoder.null_site", put)


with_integers = with_tensor("encoder.null_site", lambda t: t.to(torch.int32))


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (lambda c: c[: len(c) // 2], "truncated"),
        (lambda c: c[:-1], "truncated"),
        (lambda c: c[:4], "truncated"),
        (lambda c: b"", "truncated"),
        (lambda c: b"not a safetensors file at all", "truncated"),
        (flip_last_byte, "own hash: it was altered"),
        (lambda c: save(load(c)), "no dosmatgen-ase header"),
        (lambda c: save(load(c), {"dosmatgen_ase": "{not json"}), "truncated"),
        (rewrite(lambda h: h.update(format_version=99)), r"format 99, this version reads \d+: upgrade"),
        (rewrite(lambda h: ["a list"]), "no dosmatgen-ase header"),
        (rewrite(lambda h: h.pop("format_version") and None), "no dosmatgen-ase header"),
        (rewrite(lambda h: h.update(kind="predictor")), "holds a predictor, not a generator"),
        (rewrite(lambda h: h["config"].update(widht=3)), "does not describe its own tensors"),
        (rewrite(lambda h: h["config"].update(width=32)), "does not describe its own tensors"),
        (rewrite(lambda h: h.pop("lattice") and None), "does not describe its own tensors"),
        (without_a_tensor, r"does not describe its own tensors \(encoder.null_site is missing\)"),
        (rewrite(lambda h: h["config"].update(num_layers=10**9)), "num_layers=1000000000 must be a whole number"),
        (rewrite(lambda h: h["config"].update(width=30000)), "width=30000 must be a whole number from 1 to 4096"),
        (rewrite(lambda h: h["config"].update(width=4096)), r"has shape \(16,\), not \(4096,\)"),
        (rewrite(lambda h: h["config"].update(num_layers=64)), "layers.*is missing"),
        (rewrite(lambda h: h["config"].update(cutoff=1e9)), "cutoff=1000000000.0 must be a number above 1"),
        (rewrite(lambda h: h["config"].update(cutoff=float("nan"))), "cutoff=nan must be a number"),
        (rewrite(lambda h: h["config"].update(num_radial=1)), "num_radial=1 must be a whole number from 2"),
        (rewrite(lambda h: h["config"].update(width="16")), "width='16' must be a whole number"),
        (rewrite(lambda h: h.update(config=[1])), "does not describe its own tensors"),
        (rewrite(lambda h: h["lattice"].update(std=[0.0] * 6)), "std above 0"),
        (rewrite(lambda h: h["lattice"].update(mean=[float("nan")] * 6)), "six finite numbers"),
        (rewrite(lambda h: h["lattice"].update(mean=[1.0])), "six finite numbers"),
        (rewrite(lambda h: h["lattice"].update(mean=["a"] * 6)), "six finite numbers"),
        (rewrite(lambda h: h["lattice"].update(mean=None)), "does not describe its own tensors"),
        (rewrite(lambda h: h.update(format_version="1")), "no dosmatgen-ase header"),
        (lambda c: save(load(c), {"dosmatgen_ase": "[" * 10**5}), "truncated"),
        (with_value(float("nan")), r"holds a NaN or an infinity in encoder\.null_site: fetch or train it again"),
        (with_value(float("-inf")), r"holds a NaN or an infinity in encoder\.null_site"),
        (with_integers, "null_site has shape .* or no floats"),
    ],
)
def test_a_damaged_file_gives_one_clear_error(
    damage: Callable[[bytes], bytes], fragment: str, tiny_weights: Path, tmp_path: Path
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(damage(tiny_weights.read_bytes()))
    with pytest.raises(ValueError, match=fragment) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["num_layers", "width"])
def test_a_header_is_compared_before_anything_is_built(
    name: str, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its largest network takes no memory: 4096 channels in 64 layers would be 100 GB."""
    path = tmp_path / "weights"
    path.write_bytes(rewrite(lambda h: h["config"].update({name: SIZES[name][1]}))(tiny_weights.read_bytes()))
    devices = set()
    whole = Layer.__init__

    def watched(self: Layer, *arguments: Any) -> None:
        whole(self, *arguments)
        devices.update(p.device.type for p in self.parameters())

    monkeypatch.setattr(Layer, "__init__", watched)
    with pytest.raises(ValueError, match="does not describe its own tensors"):
        load_model(path)
    assert devices == {"meta"}


@pytest.mark.parametrize("path", ["absent.safetensors", "."])
def test_an_absent_file_is_named(path: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights at .*give the path"):
        load_model(tmp_path / path)


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "x", {"format": "pt"})
    with pytest.raises(ValueError, match="made by another program"):
        load_tensors(tmp_path / "x")


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_rest(
    function: str, monkeypatch: pytest.MonkeyPatch, tiny_model: ConditionalDenoiser, tmp_path: Path
) -> None:
    path = tmp_path / "weights"
    save_model(path, tiny_model, {})
    before = path.read_bytes()
    monkeypatch.setattr(files.os, function, full_disk)
    with pytest.raises(OSError, match=r"cannot write .*No space left.*has space"):
        save_model(path, tiny_model, {"note": "second"})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]
