"""Which crystals two unlike forward models disagree on: there a label teaches most."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ase import Atoms
from tqdm import tqdm

from dosmatgen_ase.crystals.checks import fault
from dosmatgen_ase.dos import normalised_l1_arrays
from dosmatgen_ase.files import write_atomic
from dosmatgen_ase.forward.predictor import DEFAULT_PREDICTOR, DOSPredictor

_BATCH = 16  # crystals; after each the cache is written


def disagreement(
    structures: Mapping[str, Atoms],
    weights: str | Path = DEFAULT_PREDICTOR,
    *,
    cache: str | Path | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """How far the DOS by tight binding lies from that by the networks on CHGNet's features.

    Parameters
    ----------
    structures : mapping of id to Atoms
    weights : path
        A predictor that has both; the one that ships by default.
    cache : path, optional
        File of what was computed before with the same weights, which grows.
    progress : bool
        Show a bar.

    Returns
    -------
    dict
        Normalised L1 by id, mean over the sites; the largest first. Crystals that a model cannot read are left out.

    Raises
    ------
    FileNotFoundError, ValueError
        If the weights are absent, damaged, or lack one of the two; or the cache is something else.
    """
    predictor = DOSPredictor.load(weights)
    if len(predictor.methods) < 3:
        raise ValueError(f"{weights} holds {', '.join(predictor.methods)}: disagreement needs networks, too")
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:12]
    known = {} if cache is None else _read_cache(Path(cache), digest)
    keys = {name: f"{name} {_fingerprint(atoms):08x}" for name, atoms in structures.items()}
    new = [name for name in structures if keys[name] not in known]
    with tqdm(total=len(new), disable=not progress, unit="structure", desc="disagreement") as bar:
        for start in range(0, len(new), _BATCH):
            names = new[start : start + _BATCH]
            atoms = [structures[name] for name in names]
            for name, distance in zip(names, _distances(predictor, atoms), strict=True):
                known[keys[name]] = distance
            if cache is not None:
                write_atomic(Path(cache), json.dumps({"predictor": digest, "disagreement": known}).encode())
            bar.update(len(names))
    found = {name: distance for name in structures if (distance := known[keys[name]]) is not None}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _distances(predictor: DOSPredictor, atoms: list[Atoms]) -> list[float | None]:
    """Mean distance over the sites of each crystal; None where a model says nothing."""
    by_bonds, by_networks = (predictor.predict_arrays(atoms, method=m) for m in ("tight-binding", "features"))
    found: list[float | None] = []
    for a, b in zip(by_bonds, by_networks, strict=True):
        distance = normalised_l1_arrays(a.mean.astype(float), b.mean.astype(float), a.known & b.known)
        found.append(float(np.nanmean(distance)) if np.isfinite(distance).any() else None)
    return found


def _fingerprint(atoms: Atoms) -> int:
    """Of the crystal, so that an id that was given to another one, or that was mended, is not taken for it."""
    parts = (atoms.numbers.astype(np.int64), np.round(atoms.cell.array, 4), np.round(atoms.positions, 4))
    fault_there = (fault(atoms) or "").encode()  # a failure that cell, sites and elements do not tell
    return zlib.crc32(b"".join([*(np.ascontiguousarray(part).tobytes() for part in parts), fault_there]))


def _read_cache(path: Path, digest: str) -> dict[str, float | None]:
    """What a cache holds, nothing if it is of other weights."""
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text())
        same, values = data["predictor"] == digest, dict(data["disagreement"])
        if all(value is None or isinstance(value, float) for value in values.values()):
            return values if same else {}
    except (LookupError, RecursionError, TypeError, ValueError):
        pass
    raise ValueError(f"{path} is no cache of disagreements: remove it, or name another file")
