"""Changes to a file that a disk, a transfer, another program or an enemy might make; all of it from one generator.

`mutate` picks one change by the form of the file: of its bytes, of the values in its JSON, of the arrays in its npz, of
the header of its safetensors (whose hash is put right, so that the reader looks at what is inside), or of the numbers
in its text. The same seed gives the same bytes.
"""

from __future__ import annotations

import bz2
import copy
import gzip
import io
import json
import lzma
import pickle
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CANARY = "dosmatgen_fuzz_canary"
"""A module and a file that no honest reader imports or makes."""

HOSTILE_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 10**9, -(10**9), 2**63, 10**400, 0.5, -0.0, 1e-320, 1e308, -1e308, float("nan"),
    float("inf"), -float("inf"), "", "x", "1", "nan", "\x00", "\u202e", "a" * 5000, [], {}, [[]], [None], [0] * 1000,
    {"": 0}, {"@module": CANARY, "@class": "Run"}, {"@module": "os", "@class": "system"},
    {"@module": "subprocess", "@callable": "Popen"}, {"__ndarray__": [[10**9, 10**9], "float64", []]},
    {"__ase_objtype__": CANARY}, {"__complex__": [0, "x"]}, ["__class__"], "../../etc/passwd", "<script>", "$",
]  # fmt: skip

HOSTILE_NUMBERS = (
    b"0", b"-1", b"1e308", b"-1e308", b"1e999", b"nan", b"inf", b"1e-320", b"99999999999999999999", b"********",
    b"1d5", b"1.0.0", b"--1", b"0x10", b"1_000", b"64000000", b"1e12",
)  # fmt: skip


class Runs:
    """Touches the canary where somebody unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(CANARY),))


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return a changed copy."""
    changes: list[Callable[[bytes, random.Random], bytes]] = [of_bytes, of_bytes]
    if data[:2] == b"PK":
        changes += [of_npz] * 4
    elif _safetensors(data) is not None:
        changes += [of_safetensors] * 4
    elif data.lstrip()[:1] in (b"{", b"["):
        changes += [of_json] * 5
    else:
        changes += [of_numbers, of_numbers, of_lines, of_words]
    try:
        changed = rng.choice(changes)(data, rng)
    except RecursionError:  # nested so deep that we cannot read it either
        changed = of_bytes(data, rng)
    if rng.random() < 0.15:
        changed = of_bytes(changed, rng)
    if rng.random() < 0.04:
        changed = rng.choice([gzip.compress, bz2.compress, lzma.compress])(changed)
        changed = of_bytes(changed, rng) if rng.random() < 0.5 else changed
    return changed


# -- bytes -------------------------------------------------------------------------------------------------------------


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, remove, repeat, insert or move a piece."""
    if not data:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(64)))
    at, size = rng.randrange(len(data)), 1 + int(len(data) * rng.random() ** 4)
    piece = data[at : at + size]
    return rng.choice(
        [
            data[:at],
            data[at:],
            data[:at] + data[at + size :],
            data[:at] + piece * rng.choice([2, 3, 20]) + data[at + size :],
            data[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9))) + data[at:],
            data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :],
            data[:at] + b"\x00" * size + data[at + size :],
            data[:at] + b"\xff" * min(size, 64) + data[at + size :],
            data[:at] + b"[" * 20_000 + data[at:],
            piece + data,
            data + data,
            b"\xef\xbb\xbf" + data,
            b"",
            pickle.dumps(Runs()),
        ]
    )


def of_lines(data: bytes, rng: random.Random) -> bytes:
    """Remove, repeat, swap or empty lines."""
    lines = data.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        del lines[i : i + rng.randrange(1, 4)]
    elif kind == 1:
        lines[i:i] = [lines[j]] * rng.choice([1, 2, 500])
    elif kind == 2:
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == 3:
        lines[i] = rng.choice(
            [b"", b" ", b"#", lines[i] * 3, lines[i].replace(b" ", b""), lines[i].replace(b" ", b"\t")]
        )
    else:
        lines = [line.replace(b".", b",") for line in lines]
    return b"\n".join(lines)


def of_words(data: bytes, rng: random.Random) -> bytes:
    """Exchange a word for another of the file, or for markup."""
    words = list(re.finditer(rb"[A-Za-z_]{2,}", data))
    if not words:
        return of_bytes(data, rng)
    word, other = rng.choice(words), rng.choice(words)
    put = rng.choice(
        [other[0], b"", b"x", word[0].upper(), b"&amp;", b"<!ENTITY a SYSTEM 'file:///etc/passwd'>", b"\xc3\x28"]
    )
    return data[: word.start()] + put + data[word.end() :]


def of_numbers(data: bytes, rng: random.Random) -> bytes:
    """Exchange one to three numbers for those that hurt."""
    for _ in range(rng.randrange(1, 4)):
        numbers = list(re.finditer(rb"[-+]?\d+(?:\.\d*)?(?:[eEdD][-+]?\d+)?", data[:200_000]))
        if not numbers:
            return of_bytes(data, rng)
        # the first numbers of a file are its counts
        chosen = rng.choice(numbers[:30]) if rng.random() < 0.5 else rng.choice(numbers)
        data = data[: chosen.start()] + rng.choice(HOSTILE_NUMBERS) + data[chosen.end() :]
    return data


# -- JSON --------------------------------------------------------------------------------------------------------------


def of_json(data: bytes, rng: random.Random) -> bytes:
    """Exchange, remove, add or rename entries."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return of_bytes(data, rng)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        tree = _changed(tree, rng)
    text = json.dumps(tree)
    if rng.random() < 0.03:
        text = text.replace("{", '{"deep": ' + "[" * 3000 + "]" * 3000 + ", ", 1)
    return text.encode("utf-8", "surrogatepass")


def _changed(tree: Any, rng: random.Random) -> Any:
    """The tree with one change at a place that is reached by a random walk, so that large lists are not preferred."""
    if rng.random() < 0.03 or not isinstance(tree, dict | list) or not tree:
        return copy.deepcopy(rng.choice(HOSTILE_VALUES))
    node, parent, key = tree, tree, None
    while isinstance(node, dict | list) and node and (key is None or rng.random() < 0.75):
        parent = node
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        node = node[key]
    kind = rng.randrange(6)
    if kind <= 2:
        parent[key] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
    elif kind == 3:
        del parent[key]
    elif isinstance(parent, dict):
        new = rng.choice(["", "x", "@module", "@class", "-1", "1e9", str(key) + " "])
        parent[new] = copy.deepcopy(node if kind == 4 else rng.choice(HOSTILE_VALUES))
    else:
        parent.insert(int(key or 0), copy.deepcopy(node if kind == 4 else rng.choice(HOSTILE_VALUES)))
    return tree


# -- npz ---------------------------------------------------------------------------------------------------------------


def of_npz(data: bytes, rng: random.Random) -> bytes:
    """Exchange arrays for those of another type, shape or content; forged headers and pickles among them."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError):
        return of_bytes(data, rng)
    if not members:
        return of_bytes(data, rng)
    name = rng.choice(list(members))
    kind = rng.randrange(7)
    if kind == 0:
        del members[name]
    elif kind == 1:
        members[name] = of_bytes(members[name], rng)
    elif kind == 2:
        members[rng.choice([*members, "x.npy", "../x.npy"])] = members[name]
    elif kind == 3:
        members[name] = _forged_header(rng)
    else:
        members[name] = _saved(_another_array(members[name], rng))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(member, (2020, 1, 1, 0, 0, 0)), content)
    return out.getvalue()


def _forged_header(rng: random.Random) -> bytes:
    """A header that asks for more than there is."""
    shape = rng.choice(["(1000000000,)", "(100000, 100000)", "(-1,)", "(2**40,)", "(0, 10000000000)", "()", "[" * 500])
    kind = rng.choice(["<f8", "|O", "<U1000000", "|V8", "<M8[s]", "x", "<f2", "<i8"])
    head = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head) % 65536) + head + bytes(64)


def _another_array(content: bytes, rng: random.Random) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, OSError, EOFError):
        array = np.zeros(3)
    kind = rng.randrange(12)
    if kind == 0:
        return np.array([Runs()], dtype=object)
    if kind == 1:
        return array[..., :-1] if array.ndim else array.reshape(1)
    if kind == 2:
        return array[:0] if array.ndim else array
    if kind == 3:
        return np.concatenate([array, array]) if array.ndim else np.stack([array, array])
    if kind == 4:
        return array.astype(rng.choice(["U5", "S3", "c16", "f2", "i1", "?"])) if array.dtype.kind in "fiub" else array
    if kind == 5:
        return array[None]
    if kind == 6:
        return array.reshape(-1)
    if kind == 7:
        return rng.choice([np.array("x"), np.array(0), np.array([]), np.array(["2000-01-01"], dtype="M8[s]")])
    if array.dtype.kind == "U" and array.ndim:
        return np.array(
            [rng.choice(["", "x" * 100, "\x00", "a/b", str(array.flat[0])]) for _ in array.flat][: len(array)]
        )
    if not array.size or array.dtype.kind not in "fiub":
        return array
    changed = array.copy()
    bad = [np.nan, np.inf, -np.inf, 1e300, -1.0] if array.dtype.kind == "f" else [0, 1, -1, 255, 2**15 - 1, -(2**31)]
    with np.errstate(all="ignore"):
        value = np.array(rng.choice(bad)).astype(array.dtype)
    if kind == 8:
        changed[...] = value
    else:
        changed.flat[rng.randrange(array.size)] = value
    return changed


def _saved(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


# -- safetensors -------------------------------------------------------------------------------------------------------


def _safetensors(data: bytes) -> tuple[dict[str, Any], bytes] | None:
    if len(data) < 10 or (size := struct.unpack("<Q", data[:8])[0]) > len(data) - 8 or data[8:9] != b"{":
        return None
    try:
        return json.loads(data[8 : 8 + size]), data[8 + size :]
    except ValueError:
        return None


def of_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the header of the package, or a tensor, and put the hash right; or the header of safetensors itself."""
    found = _safetensors(data)
    if found is None:
        return of_bytes(data, rng)
    header, values = found
    if rng.random() < 0.2:
        return _packed(json.loads(of_json(json.dumps(header).encode(), rng)), values)
    import torch
    from safetensors.torch import load, save

    from dosmatgen_ase.files.tensors import content_hash

    try:
        tensors = load(data)
        told = json.loads(header["__metadata__"]["dosmatgen_ase"])
    except Exception:  # noqa: BLE001 -- it was damaged before
        return of_bytes(data, rng)
    name = rng.choice(list(tensors))
    kind = rng.randrange(8)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[rng.choice([name, "x", ""])] = torch.full((rng.choice([0, 1, 7]),), rng.choice([0.0, float("nan")]))
    elif kind == 2 and tensors[name].numel():
        tensors[name].view(-1)[0] = rng.choice([1, 0])
    elif kind == 3:
        tensors[name] = tensors[name].to(rng.choice([torch.float16, torch.int64, torch.bool, torch.float64]))
    else:
        told = json.loads(of_json(json.dumps(told).encode(), rng))
    if isinstance(told, dict) and "sha256" in told:
        told["sha256"] = content_hash(tensors)
    return save({k: v.contiguous() for k, v in tensors.items()}, {"dosmatgen_ase": json.dumps(told)})


def _packed(header: Any, values: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values
