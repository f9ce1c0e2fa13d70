"""The predicted DOS of crystals without a label, for the training of the generator."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import nn

from dosmatgen_ase.data import Structures
from dosmatgen_ase.dos import MODEL_GRID
from dosmatgen_ase.files import read_npz, write_npz
from dosmatgen_ase.files.tensors import content_hash
from dosmatgen_ase.forward.features import cached_site_features
from dosmatgen_ase.forward.predictor import DOSPredictor
from dosmatgen_ase.limits import MAX_ATOMS


def pseudo_labels(
    structures: Structures, predictor: DOSPredictor, cache: str | Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Predict the site DOS of structures that have no label.

    Parameters
    ----------
    structures : n structures
    predictor : the ranking predictor, so that the judge stays independent of what the generator learns
    cache : folder that keeps the CHGNet features, so that an interrupted run resumes; none by default

    Returns
    -------
    values : (n, 20, 151) float16, states/eV
    known : (n, 20, 151) bool
        All false on padding and for structures that cannot be read.
    """
    crystals = [structures.atoms(i) for i in range(len(structures))]
    features = None
    if cache is not None and predictor.members:
        features = cached_site_features(structures, cache)
    values = np.zeros((len(structures), MAX_ATOMS, MODEL_GRID.size), dtype=np.float16)
    known = np.zeros(values.shape, dtype=bool)
    for i, prediction in enumerate(predictor.predict_arrays(crystals, features=features)):
        n = len(prediction.mean)
        known[i, :n] = prediction.known
        values[i, :n] = np.where(prediction.known, prediction.mean, 0.0)
    return values, known


def write_pseudo_labels(
    path: str | Path, structures: Structures, predictor: DOSPredictor, cache: str | Path | None = None
) -> None:
    """Write `pseudo_labels` as an npz (material_id, values, known) that `data.load_pseudo_labels` reads, atomically.

    It tells of what structures they are (structure), and by what predictor.
    """
    values, known = pseudo_labels(structures, predictor, cache)
    origin = {"structure": structures.fingerprints(), "predictor": np.array(predictor_digest(predictor))}
    write_npz(Path(path), material_id=structures.material_id, values=values, known=known, **origin)


def check_pseudo_labels(path: str | Path, structures: Structures, predictor: DOSPredictor) -> bool:
    """Refuse a file that `write_pseudo_labels` would write otherwise now; false where an older one does not tell.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or it is damaged, of another predictor, or lacks some of the structures.
    """
    fix = "move it away or choose a new folder"
    try:
        data = read_npz(Path(path), {"material_id": ("U", 1)}, {"structure": ("U", 1), "predictor": ("U", 0)})
    except ValueError as error:
        raise ValueError(f"{path} holds no pseudo-labels ({error}): {fix}") from None
    tells = {"structure", "predictor"} <= data.keys()
    if tells and str(data["predictor"]) != predictor_digest(predictor):
        raise ValueError(f"{path} is of another predictor: name that one (--predictor), {fix}")
    of = [structures.material_id, *([structures.fingerprints()] if tells else [])]
    held = [data["material_id"], *([data["structure"]] if tells else [])]
    there = set(zip(*(array.tolist() for array in held), strict=False))
    lacking = [key[0] for key in zip(*(array.tolist() for array in of), strict=True) if key not in there]
    if lacking:
        raise ValueError(f"{path} lacks {len(lacking)} of the structures, the first is {lacking[0]}: {fix}")
    return tells


def predictor_digest(predictor: DOSPredictor) -> str:
    """Of its weights, settings and calibration: the same before and after it was on the disk, in half precision."""
    parts: dict[str, nn.Module] = {"members": predictor.members, "correctors": predictor.correctors}
    parts |= {f"tight_binding.{i}": model for i, model in enumerate(predictor.tight_binding)}
    tensors = {f"{part}.{k}": v.half() for part, model in parts.items() for k, v in model.state_dict().items()}
    tensors |= {k: v.float() for k, v in predictor.tables.items()}
    told = [asdict(predictor.config), predictor.info, [asdict(model.config) for model in predictor.tight_binding]]
    return hashlib.sha256((content_hash(tensors) + json.dumps(told, sort_keys=True)).encode()).hexdigest()[:16]
