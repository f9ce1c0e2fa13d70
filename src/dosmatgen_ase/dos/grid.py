"""Energies: the uniform grid, the constants of the package, and small helpers on arrays over energies."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

GAP_DOS = 1e-3
"""Total DOS (states/eV) below which an energy counts as a gap: a known zero."""

MIN_GAP = 0.1
"""Band gap (eV) below which a DOS read from elsewhere counts as metallic: narrower gaps drown in its grid spacing."""

MAX_STEP = 100.0
"""Largest distance (eV) of neighbouring energies: farther apart they are no DOS in eV."""

NEAR_GAP = (-2.0, 2.0)
"""Energy window (eV) of the near-gap figures."""


@dataclass(frozen=True)
class EnergyGrid:
    """Uniform energies ``minimum, minimum + step, ..., maximum`` in eV, both ends included.

    Raises
    ------
    ValueError
        If the range is empty, not finite, or not a whole number of steps.
    """

    minimum: float
    maximum: float
    step: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(x) for x in (self.minimum, self.maximum, self.step)):
            raise ValueError("an EnergyGrid needs finite minimum, maximum and step in eV")
        if self.step <= 0 or self.maximum <= self.minimum:
            raise ValueError("an EnergyGrid needs maximum > minimum and step > 0 (eV)")
        steps = (self.maximum - self.minimum) / self.step
        if abs(steps - round(steps)) > 1e-6 * steps:
            raise ValueError(f"the range of an EnergyGrid must be a whole number of steps, not {steps:g}: change step")

    @property
    def size(self) -> int:
        """Number of energies."""
        return round((self.maximum - self.minimum) / self.step) + 1

    @cached_property
    def energies(self) -> Array:
        """The energies, shape (size,), eV, read-only."""
        return frozen(np.linspace(self.minimum, self.maximum, self.size))


MODEL_GRID = EnergyGrid(-10.0, 5.0, 0.1)
"""The grid on which networks see a DOS and on which distances are taken."""

MODEL_SIGMA = 0.2
"""Standard deviation (eV) of the broadening on `MODEL_GRID`."""


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only copy."""
    copy = np.array(array)
    copy.flags.writeable = False
    return copy


def real_vector(data: ArrayLike, name: str) -> Array:
    """One row of real numbers as floats; TypeError or ValueError that says `name` otherwise."""
    try:
        array = np.asarray(data)
    except ValueError:
        raise ValueError(f"{name} must be one row of numbers, not a ragged list") from None
    if array.size and array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be real numbers, not {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape (G,), not {array.shape}")
    return array.astype(float)


def inside_window(energies: Array, window: tuple[float, float]) -> Mask:
    """Which energies lie in [lo, hi], both ends included."""
    # The slack keeps bins at the ends of the window, which rounding puts a hair outside.
    return (energies >= window[0] - 1e-9) & (energies <= window[1] + 1e-9)


def cell_widths(energies: Array, lo: float = -math.inf, hi: float = math.inf) -> Array:
    """Width of each energy's share of [lo, hi], its borders half-way to the neighbours: trapezoidal weights."""
    borders = np.concatenate([energies[:1], 0.5 * (energies[1:] + energies[:-1]), energies[-1:]])
    return np.diff(np.clip(borders, lo, hi))
