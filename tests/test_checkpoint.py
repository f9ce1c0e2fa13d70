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
from dosmatgen_ase.model.checkpoint import content_hash, load_model, load_tensors, save_model, save_tensors
from dosmatgen_ase.model.conditioning import ConditionalDenoiser

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
        (without_a_tensor, "does not describe its own tensors"),
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
