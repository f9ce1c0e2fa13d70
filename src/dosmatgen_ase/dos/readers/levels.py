"""A DOS from single levels, as programs print that leave the broadening to the reader."""

from __future__ import annotations

import math

import numpy as np

from dosmatgen_ase.dos.grid import MODEL_SIGMA, Array

_MAX_POINTS = 200_000


def broadened(levels: Array, states: Array, top: float) -> tuple[Array, Array]:
    """Sum of Gaussians of `MODEL_SIGMA`.

    Parameters
    ----------
    levels, states : array, of one shape
        Energies (eV), and how many states stand at each.
    top : float
        Highest energy (eV) at which all levels are known.

    Returns
    -------
    energies, values : array, shape (G,)
        From below the first level up to `top`, eV and states/eV.

    Raises
    ------
    ValueError
        If the levels span nothing, or more than a solid's.
    """
    low = float(levels.min()) - 5 * MODEL_SIGMA
    size = math.ceil((top - low) / (MODEL_SIGMA / 4)) + 1
    if not 2 <= size <= _MAX_POINTS:
        raise ValueError(f"its eigenvalues span {top - low:.3g} eV")
    # Each state is shared by the two nearest energies of a fine mesh, which is broadened as a whole.
    fine = (top + 6 * MODEL_SIGMA - low) / (MODEL_SIGMA / 20)
    edges = np.arange(low, top + 6 * MODEL_SIGMA, MODEL_SIGMA / 20)
    places = (levels - low) / (MODEL_SIGMA / 20)
    inside = places < fine - 2
    left, shares, states = places[inside].astype(int), (places % 1)[inside], states[inside]
    counts = np.bincount(left, states * (1 - shares), edges.size) + np.bincount(left + 1, states * shares, edges.size)
    from scipy.ndimage import gaussian_filter1d

    energies = np.linspace(low, top, size)
    return energies, np.interp(energies, edges, gaussian_filter1d(counts, 20.0, mode="constant") / (MODEL_SIGMA / 20))
