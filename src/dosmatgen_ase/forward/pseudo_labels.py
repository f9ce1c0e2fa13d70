"""The predicted DOS of crystals without a label, for the training of the generator."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dosmatgen_ase.data import Structures
from dosmatgen_ase.dos import MODEL_GRID
from dosmatgen_ase.files import write_npz
from dosmatgen_ase.forward.features import cached_site_features
from dosmatgen_ase.forward.predictor import DOSPredictor
from dosmatgen_ase.limits import MAX_ATOMS


def pseudo_labels(
    structures: Structures, predictor: DOSPredictor, cache: str | Path | None = None, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Predict the site DOS of structures that have no label.

    Parameters
    ----------
    structures : n structures
    predictor : the ranking predictor, so that the judge stays independent of what the generator learns
    cache : folder that keeps the CHGNet features, so that an interrupted run resumes; none by default
    progress : show a progress bar

    Returns
    -------
    values : (n, 20, 151) float16, states/eV
    known : (n, 20, 151) bool
        All false on padding and for structures that cannot be read.
    """
    crystals = [structures.atoms(i) for i in range(len(structures))]
    features = None
    if cache is not None and predictor.members:
        features = cached_site_features(structures, cache, progress=progress)
    values = np.zeros((len(structures), MAX_ATOMS, MODEL_GRID.size), dtype=np.float16)
    known = np.zeros(values.shape, dtype=bool)
    for i, prediction in enumerate(predictor.predict_arrays(crystals, progress, features=features)):
        n = len(prediction.mean)
        known[i, :n] = prediction.known
        values[i, :n] = np.where(prediction.known, prediction.mean, 0.0)
    return values, known


def write_pseudo_labels(
    path: str | Path,
    structures: Structures,
    predictor: DOSPredictor,
    cache: str | Path | None = None,
    progress: bool = False,
) -> None:
    """Write `pseudo_labels` as an npz (material_id, values, known) that `data.load_pseudo_labels` reads, atomically."""
    values, known = pseudo_labels(structures, predictor, cache, progress)
    write_npz(Path(path), material_id=structures.material_id, values=values, known=known)
