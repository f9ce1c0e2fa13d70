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


def checked_curve(energies: ArrayLike, values: ArrayLike, known: ArrayLike) -> tuple[Array, Array, Mask]:
    """Energies (eV), values (states/eV) and mask of a DOS, each of shape (G,).

    Raises
    ------
    TypeError
        If they are not real numbers, or the mask is not of bool.
    ValueError
        If they do not fit together, or cannot be a DOS.
    """
    energies, values = real_vector(energies, "energies"), real_vector(values, "values")
    known = np.asarray(known)
    if known.dtype != np.bool_:
        raise TypeError("known must be an array of bool (True where the DOS is known)")
    if not energies.shape == values.shape == known.shape:
        raise ValueError(
            "energies, values and known must have one common length, not "
            f"{energies.shape}, {values.shape} and {known.shape}"
        )
    if energies.size < 2:
        raise ValueError(f"a DOS needs at least 2 energies, not {energies.size}")
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.diff(energies)
    if not np.isfinite(energies).all() or (steps <= 0).any():
        raise ValueError("energies must be finite and strictly increasing: sort them and drop repeated ones")
    if (widest := float(steps.max())) > MAX_STEP:
        told = f"neighbouring energies are {widest:g} eV apart, more than {MAX_STEP:g}"
        raise ValueError(f"{told}: are the energies in eV?")
    if not known.any():
        raise ValueError("nothing is known in this DOS: at least one energy must be known")
    if not np.isfinite(values[known]).all():
        raise ValueError("values are NaN or infinite: pass known=False for the energies where the DOS is unknown")
    if (values[known] < 0).any():
        raise ValueError(
            f"values must not be negative (lowest {values[known].min():g} states/eV): "
            "a spin-down channel drawn downwards must be added as positive"
        )
    return energies, values, known


def check_window(lo: float, hi: float) -> None:
    """Raise ValueError unless lo < hi (eV)."""
    if not lo < hi:
        raise ValueError(f"a window needs lo < hi (eV), not {lo:g} and {hi:g}")


def inside_window(energies: Array, window: tuple[float, float]) -> Mask:
    """Which energies lie in [lo, hi], both ends included; ``ValueError`` unless lo < hi."""
    check_window(*window)
    # The slack keeps bins at the ends of the window, which rounding puts a hair outside.
    return (energies >= window[0] - 1e-9) & (energies <= window[1] + 1e-9)


def cell_widths(energies: Array, lo: float = -math.inf, hi: float = math.inf) -> Array:
    """Width of each energy's share of [lo, hi], its borders half-way to the neighbours: trapezoidal weights.

    Raises
    ------
    ValueError
        If lo > hi.
    """
    if lo != hi:  # where nothing lies between, the widths are 0
        check_window(lo, hi)
    borders = np.concatenate([energies[:1], 0.5 * (energies[1:] + energies[:-1]), energies[-1:]])
    return np.diff(np.clip(borders, lo, hi))
