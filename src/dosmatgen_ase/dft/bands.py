"""From bands to a DOS: Fermi level, gap, broadening, and the targets made of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.optimize import brentq
from scipy.special import expit

from dosmatgen_ase.data.bands import BAND_WINDOW, MeshBands
from dosmatgen_ase.dft.errors import ElectronicStructureError
from dosmatgen_ase.dft.interpolation import IrreducibleMesh
from dosmatgen_ase.dft.settings import GRID
from dosmatgen_ase.dos import Array, TargetDOS, scale_sites_to_total

_FERMI_WIDTH = 0.02  # eV, Fermi-Dirac broadening under which the Fermi level is found
_LEAST_GAP = 0.05  # eV, smaller gaps between full and empty bands are within the error of the interpolation
_WHOLE = 0.01  # electrons by which full bands may differ from those of the cell
_STEP = 0.02  # eV, bins that states are gathered in before they are broadened


@dataclass(frozen=True, eq=False)
class Bands:
    """Eigenvalues (eV) and projections as they are sampled for the DOS; spins have the same k-points."""

    eigenvalues: Array  # (spins, k, bands)
    projections: Array  # (spins, k, sites, 4, bands)
    weights: Array  # (k,), sum 1
    num_electrons: float
    noncollinear: bool = False  # spinors: one electron in a state

    @property
    def electrons_per_state(self) -> float:
        """2 where both spins share a state, else 1."""
        return 1.0 if self.noncollinear else 2.0 / len(self.eigenvalues)


@dataclass(frozen=True, eq=False)
class BandDOS:
    """DOS on `GRID` and what its zero of energy is."""

    total: Array  # (G,)
    orbital: Array  # (sites, 4, G)
    band_gap: float
    zero: float
    e_max: float
    sigma: float

    def targets(self, record: dict[str, Any]) -> tuple[tuple[TargetDOS, ...], TargetDOS]:
        """One target per site, scaled to add up to the total, and the total."""
        energies, reference = GRID.energies, "vbm" if self.band_gap else "fermi"
        zero = f"zero of energy at {self.zero:.4f} eV ({reference})"
        scaled, known = scale_sites_to_total(self.orbital.sum(1), self.total, energies=energies, e_max=self.e_max)

        def target(values: Array, mask: Any, kind: str, *steps: str) -> TargetDOS:
            told = {**record, "steps": [*steps, zero]}
            return TargetDOS(energies, values, mask, reference, self.sigma, kind, told)

        sites = (
            target(values, known, "site", f"site {i}, sites scaled to add up to the total")
            for i, values in enumerate(scaled)
        )
        return tuple(sites), target(self.total, energies <= self.e_max, "total")


def broadened_dos(bands: Bands, equivalent_sites: np.ndarray, sigma: float) -> BandDOS:
    """Broadened DOS of bands, projections averaged over equivalent sites."""
    num_spins, _, num_sites, _, num_bands = bands.projections.shape
    electrons_per_state = bands.electrons_per_state
    if bands.num_electrons > electrons_per_state * num_spins * num_bands - 0.01:
        raise ElectronicStructureError(f"no empty bands for {bands.num_electrons:g} electrons: compute more (nbnd)")
    fermi = fermi_level(list(bands.eigenvalues), bands.weights, bands.num_electrons / electrons_per_state)
    band_gap, vbm = gap_and_vbm(list(bands.eigenvalues), fermi)
    filled = electrons_per_state * sum(float(bands.weights @ (e <= fermi).sum(1)) for e in bands.eigenvalues)
    if abs(filled - bands.num_electrons) > _WHOLE:  # the level lies in the tail beside a flat band, partly filled
        band_gap = 0.0
    zero = vbm if band_gap else fermi

    margin = max(1.0, 5 * sigma)  # so that states outside of the window count as far as they reach into it
    edges = np.arange(GRID.minimum - margin, GRID.maximum + margin + 1e-9, _STEP)
    averaged = {i: bands.projections[:, :, equivalent_sites == i].mean(2) for i in set(equivalent_sites.tolist())}
    total, parts = np.zeros(edges.size), np.zeros((num_sites, 4, edges.size))
    for spin, energies in enumerate(bands.eigenvalues):
        place = (energies - zero - edges[0]) / _STEP
        inside = (place > 0) & (place < edges.size - 2)
        state_weight = np.broadcast_to(bands.weights[:, None], energies.shape)[inside] * electrons_per_state / _STEP
        total += _histogram(place[inside], state_weight, edges.size)
        for i, shell in itertools.product(averaged, range(4)):
            if averaged[i][:, :, shell].any():
                share = averaged[i][spin, :, shell][inside]
                parts[equivalent_sites == i, shell] += _histogram(place[inside], state_weight * share, edges.size)

    def broadened(values: Array) -> Array:
        return np.interp(GRID.energies, edges, gaussian_filter1d(values, sigma / _STEP, mode="constant"))

    e_max = float(bands.eigenvalues[..., exact_bands(num_bands) - 1].min() - zero)
    return BandDOS(broadened(total), np.apply_along_axis(broadened, -1, parts), band_gap, zero, e_max, sigma)


def exact_bands(num_bands: int) -> int:
    """How many bands count: the topmost of an iterative diagonalisation are not reliable."""
    return num_bands - max(2, num_bands // 12)


def kept_bands(mesh: IrreducibleMesh, eigenvalues: Array, num_electrons: float, dos: BandDOS) -> MeshBands:
    """The exact bands of a mesh, (spins, k, bands), that come into the window of a label."""
    levels = eigenvalues[..., : exact_bands(eigenvalues.shape[-1])] - dos.zero
    low, high = BAND_WINDOW
    below = int((levels.max((0, 1)) < low).sum())
    inside = int((levels.min((0, 1)) <= high).sum())
    return MeshBands(
        energies=levels[..., below:inside],
        mesh=mesh.size,
        points=np.rint(mesh.points * mesh.size).astype(int),
        counts=np.rint(mesh.weights * mesh.size.prod()).astype(int),
        below=below,
        reference="vbm" if dos.band_gap else "fermi",
        fermi_level=dos.zero,
        num_electrons=num_electrons,
    )


def _histogram(place: Array, weights: Array, size: int) -> Array:
    """Gather states at fractional bin numbers, each shared linearly by its two neighbours."""
    left = place.astype(int)
    share = place - left
    counts = np.bincount(left, weights * (1 - share), size) + np.bincount(left + 1, weights * share, size)
    return counts.astype(float)


def fermi_level(levels: Sequence[Array], weights: Array, num_states: float) -> float:
    """Energy (eV) up to which the levels of all spins, each (k, bands), hold `num_states` states per cell."""

    def excess(level: float) -> float:
        return sum(float(weights @ expit((level - e) / _FERMI_WIDTH).sum(1)) for e in levels) - num_states

    return float(brentq(excess, min(e.min() for e in levels) - 1, max(e.max() for e in levels) + 1, xtol=1e-4))


def gap_and_vbm(levels: Sequence[Array], fermi: float) -> tuple[float, float]:
    """Band gap (eV, 0 for a metal) and the highest filled level."""
    vbm = max(float(e[e <= fermi].max()) for e in levels if (e <= fermi).any())
    cbm = min(float(e[e > fermi].min()) for e in levels if (e > fermi).any())
    full_bands = all(len(set((e <= fermi).sum(1).tolist())) == 1 for e in levels)
    return (cbm - vbm if full_bands and cbm - vbm > _LEAST_GAP else 0.0), vbm
