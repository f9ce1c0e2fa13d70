"""Bands of a label: eigenvalues on the irreducible points of a k-mesh, and how a shard holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA, Array

BAND_UNIT = 1e-3  # eV: shards store integers of 16 bits, so 32 eV to both sides of zero
BAND_WINDOW = (-12.0, 8.0)  # eV; bands are kept that come into it, whole
BAND_KEYS = {  # kinds of number and axes
    "bands": ("i", 1), "bands_shape": ("iu", 2), "bands_below": ("iu", 1), "kmesh": ("iu", 2), "kpoints": ("iu", 2),
    "kpoint_counts": ("iu", 1), "num_electrons": ("f", 1), "efermi": ("f", 1),
}  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class MeshBands:
    """Eigenvalues on the irreducible points of a Gamma-centred mesh, named as in `ase.spectrum.band_structure`.

    Attributes
    ----------
    energies : array, shape (spins, kpoints, bands)
        eV from the zero of the label's DOS, ascending; two spins where the calculation is spin-polarised. The bands
        that come into -12 to 8 eV, without the topmost ones, which the diagonalisation leaves inexact.
    mesh : int array, shape (3,)
        Points along each reciprocal vector.
    points : int array, shape (kpoints, 3)
        Irreducible points in units of 1/mesh.
    counts : int array, shape (kpoints,)
        Points of the mesh that each stands for.
    below : int
        Number of bands of each spin that lie below those here.
    reference : str
        What the zero is: "vbm" or "fermi". It is found on a denser mesh than this one, so in an insulator the highest
        filled level here may lie below it.
    fermi_level : float
        The zero on the scale of the calculation, eV.
    num_electrons : float
        Valence electrons of the cell.
    """

    energies: Array
    mesh: np.ndarray
    points: np.ndarray
    counts: np.ndarray
    below: int
    reference: str
    fermi_level: float
    num_electrons: float

    def __repr__(self) -> str:
        spins, points, bands = self.energies.shape
        return f"MeshBands({spins} spins, {points} of {self.counts.sum()} k-points, {bands} bands)"

    @property
    def kpoints(self) -> Array:
        """Fractional coordinates, (kpoints, 3)."""
        return self.points / self.mesh

    @property
    def weights(self) -> Array:
        """Shares of the Brillouin zone, (kpoints,), sum 1."""
        return self.counts / self.counts.sum()

    def dos(self, energies: Array = MODEL_GRID.energies, sigma: float = MODEL_SIGMA) -> Array:
        """Broaden the levels as they are, without interpolation between k-points.

        Parameters
        ----------
        energies : array, shape (G,)
            eV, by default those of `dos.MODEL_GRID`.
        sigma : float
            Standard deviation of the Gaussian, eV.

        Returns
        -------
        array, shape (G,)
            states/eV per cell.

        Raises
        ------
        ValueError
            If sigma is not a finite number above 0.
        """
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"sigma must be a finite standard deviation above 0 in eV, not {sigma}")
        apart = (np.asarray(energies)[:, None] - self.energies.reshape(1, -1)) / sigma
        states = np.broadcast_to(self.weights[:, None], self.energies.shape).ravel() * 2 / len(self.energies)
        return np.asarray(np.exp(-(apart**2) / 2) @ states / (np.sqrt(2 * np.pi) * sigma))

    def electrons_below(self, energy: float) -> float:
        """Electrons of the cell in the levels below an energy (eV), whose edge is blurred by 0.02 eV.

        Below zero, or the middle of a gap, they differ from `num_electrons` by what the mesh is too coarse.
        """
        filled = 1 / (1 + np.exp(np.clip((self.energies - energy) / 0.02, -60, 60)))
        return float(self.weights @ filled.sum((0, 2))) * 2 / len(self.energies) + 2 * self.below

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict; `from_dict` is its inverse."""
        return {field.name: np.asarray(getattr(self, field.name)).tolist() for field in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MeshBands:
        """Inverse of `to_dict`."""
        told: dict[str, Any] = {field.name: data[field.name] for field in fields(cls)}
        kinds = {"energies": float, "mesh": int, "points": int, "counts": int}
        return cls(**told | {name: np.array(told[name], dtype=kind) for name, kind in kinds.items()})


def pack_bands(bands: Sequence[MeshBands | None]) -> dict[str, np.ndarray]:
    """Arrays of a shard; none if there are no bands at all."""
    there = [b for b in bands if b is not None]
    if not there:
        return {}
    limits = np.iinfo(np.int16)
    levels = np.concatenate([b.energies.ravel() for b in there]) / BAND_UNIT
    return {
        "bands": np.round(levels).clip(limits.min, limits.max).astype(np.int16),
        "bands_shape": np.array([(0, 0, 0) if b is None else b.energies.shape for b in bands], np.int16),
        "bands_below": np.array([0 if b is None else b.below for b in bands], np.int16),
        "kmesh": np.array([(0, 0, 0) if b is None else b.mesh for b in bands], np.int16),
        "kpoints": np.concatenate([b.points for b in there]).astype(np.int16),
        "kpoint_counts": np.concatenate([b.counts for b in there]).astype(np.uint16),
    }


def unpack_bands(data: Mapping[str, np.ndarray], gapped: np.ndarray) -> list[MeshBands | None]:
    """Inverse of `pack_bands`, with the electrons and the Fermi level that a shard holds anyway."""
    shapes = data["bands_shape"].astype(int)
    starts = np.cumsum([0, *shapes.prod(1)])
    rows = np.cumsum([0, *shapes[:, 1]])
    read: list[MeshBands | None] = []
    for i, shape in enumerate(shapes):
        levels, points = data["bands"][starts[i] : starts[i + 1]], slice(*rows[i : i + 2])
        bands = MeshBands(
            energies=levels.reshape(shape) * BAND_UNIT,
            mesh=data["kmesh"][i].astype(int),
            points=data["kpoints"][points].astype(int),
            counts=data["kpoint_counts"][points].astype(int),
            below=int(data["bands_below"][i]),
            reference="vbm" if gapped[i] else "fermi",
            fermi_level=float(data["efermi"][i]),
            num_electrons=float(data["num_electrons"][i]),
        )
        read.append(bands if levels.size else None)
    return read


def misfit_of_bands(data: Mapping[str, np.ndarray], n: int) -> str | None:
    """What does not fit in the arrays of the bands of `n` labels."""
    if missing := BAND_KEYS.keys() - data.keys():
        return f"it lacks {', '.join(sorted(missing))}"
    shapes = data["bands_shape"].astype(np.int64)
    if shapes.shape != (n, 3) or not ((shapes >= 0).all() and np.isin(shapes[:, 0], (0, 1, 2)).all()):
        return "bands_shape does not tell one or two spins, k-points and bands of each label"
    rows = int(shapes[:, 1].sum())
    wanted = {
        "bands": (int(shapes.prod(1).sum()),), "bands_below": (n,), "kmesh": (n, 3), "kpoints": (rows, 3),
        "kpoint_counts": (rows,), "num_electrons": (n,), "efermi": (n,),
    }  # fmt: skip
    if wrong := [name for name, shape in wanted.items() if data[name].shape != shape]:
        return f"{', '.join(wrong)} do not fit bands_shape"
    mesh = np.repeat(data["kmesh"].astype(np.int64), shapes[:, 1], axis=0)
    if (mesh < 1).any() or (data["kpoint_counts"] < 1).any() or (data["bands_below"] < 0).any():
        return "kmesh and kpoint_counts must be at least 1, bands_below at least 0"
    if not (np.isfinite(data["num_electrons"]).all() and np.isfinite(data["efermi"]).all()):
        return "num_electrons or efermi hold numbers that are not finite"
    return None
