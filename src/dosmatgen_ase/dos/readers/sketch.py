"""A sketch: a sum of Gaussian peaks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dosmatgen_ase.dos.grid import MODEL_GRID, MODEL_SIGMA, check_window
from dosmatgen_ase.dos.target import TargetDOS


def read_peaks(
    peaks: Sequence[tuple[float, float, float]], window: tuple[float, float] | None, reference: str, kind: str
) -> TargetDOS:
    """What `TargetDOS.from_peaks` does."""
    expected = "peaks must be (energy, height, width) triples, finite, with height and width above 0"
    try:
        table = np.asarray(peaks, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(expected) from None
    if table.ndim != 2 or table.shape[1] != 3 or not np.isfinite(table).all() or (table[:, 1:] <= 0).any():
        raise ValueError(expected)
    margin = 5 * MODEL_SIGMA
    lo, hi = window or (MODEL_GRID.minimum - margin, MODEL_GRID.maximum + margin)
    check_window(lo, hi)
    for energy in table[:, 0]:
        if not lo <= energy <= hi:
            raise ValueError(f"the peak at {energy:g} eV lies outside [{lo:g}, {hi:g}] eV: move it or the window")
    energies = np.linspace(lo, hi, math.ceil((hi - lo) / (MODEL_SIGMA / 4)) + 1)
    centre, height, width = table.T[:, :, None]
    drawn = np.maximum(width, MODEL_SIGMA)
    values = (height * width / drawn * np.exp(-0.5 * ((energies - centre) / drawn) ** 2)).sum(axis=0)
    known = np.ones(energies.shape, dtype=bool)
    return TargetDOS(energies, values, known, reference, MODEL_SIGMA, kind, {"source": "peaks"})
