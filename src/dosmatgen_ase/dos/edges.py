"""Band edges of a DOS: where the states end below a gap and begin above it."""

from __future__ import annotations

import math

import numpy as np

from dosmatgen_ase.dos.grid import GAP_DOS, MIN_GAP, Array, Mask


def gap_around_zero(energies: Array, values: Array, known: Mask, sigma: float | None) -> tuple[float, float] | None:
    """Valence-band maximum and conduction-band minimum (eV) of the gap in which zero lies.

    States end where the DOS falls below `GAP_DOS`. Of a DOS of known broadening the Gaussian's tail is taken off: for
    ``g ~ exp(-d^2 / 2 sigma^2)`` the distance to the edge is ``d = sigma^2 |d ln g / dE|``, exact for a level and about
    0.3 sigma too long for a sharp band edge.

    Parameters
    ----------
    energies, values, known : arrays, shape (G,)
    sigma : float or None
        Standard deviation (eV) of the broadening; None is taken as none.

    Returns
    -------
    (float, float) or None
        The second is infinite where no state is known above. None if zero is not known, or lies in states, or the gap
        is narrower than `MIN_GAP` or than two steps of the energies.
    """
    states = known & (values >= GAP_DOS)
    below, above = np.flatnonzero(states & (energies <= 0)), np.flatnonzero(states & (energies > 0))
    if not below.size:
        return None
    last = int(below[-1])
    first = int(above[0]) if above.size else int(np.flatnonzero(known)[-1]) + 1  # without states above: the end
    if first <= last + 1 or not known[last:first].all() or energies[first - 1] < 0:
        return None
    vbm = energies[last] - _tail(energies, values, last, -1, sigma)
    cbm = energies[first] + _tail(energies, values, first, 1, sigma) if above.size else math.inf
    seen = energies[first if above.size else first - 1] - energies[last]
    return (float(vbm), float(cbm)) if seen >= MIN_GAP else None


def _tail(energies: Array, values: Array, edge: int, inwards: int, sigma: float | None) -> float:
    """Length (eV) of the Gaussian's tail at an edge, from the slope of the logarithm there."""
    before = edge + inwards
    if not sigma or not 0 <= before < energies.size or values[before] <= values[edge]:
        return 0.0
    slope = math.log(values[before] / values[edge]) / abs(energies[before] - energies[edge])
    middle = abs(energies[before] - energies[edge]) / 2  # the slope is that of half-way between the two
    return max(float(sigma**2 * slope - middle), 0.0)
