"""A total DOS with the projections of its sites, as VASP, LOBSTER and pymatgen have them, and the target made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dosmatgen_ase.dos.broadening import scale_sites_to_total
from dosmatgen_ase.dos.edges import gap_around_zero
from dosmatgen_ase.dos.grid import GAP_DOS, MIN_GAP, Array, Mask, cell_widths
from dosmatgen_ase.dos.readers.common import MAX_NEGATIVE, check_site, clip_negative_lobes, drawn_down, record
from dosmatgen_ase.dos.target import TargetDOS

HIGHEST = 1000.0  # eV; no DOS reaches so far above its zero of energy, and one that does is in meV
MOST_HELD = 1.5  # most states that overlapping spheres may hold, as a share of the total DOS, before it is told

_LEVEL_ERROR = 0.005  # eV: the Fermi level may be printed as the band edge itself, rounded to another digit
_TAIL = (
    "zero of energy: the end of the smearing's tail, up to about 2.5 SIGMA above the valence-band maximum; give sigma= "
    "(--sigma) of a Gaussian smearing, or a vasprun.xml, which has the bands"
)
_GAUSSIAN = 0.9  # share of a Gaussian's rise, in logarithms, that steps and printed digits may leave of it
_LOST = 0.005  # share of all states that the density column may lack before it is given up for the integrated one


@dataclass(frozen=True, eq=False)
class Densities:
    """What a file holds, on its own scale of energy.

    Attributes
    ----------
    source : str
        Of the provenance.
    energies : array, shape (G,)
        eV.
    total : array, shape (spins, G)
        states/eV of the cell.
    fermi : float
        Fermi level, eV.
    integrated : array, shape (spins, G), optional
        States up to each energy.
    sites : array, shape (sites, G), optional
        Projections summed over orbitals and spins, states/eV.
    symbols : sequence of str
        Elements of the sites, for the provenance; may be empty.
    levels : sequence of arrays, shape (k, bands)
        Eigenvalues (eV) of each spin; empty where the file has none.
    electrons : float, optional
        Valence electrons of the cell.
    sigma : float, optional
        Standard deviation of the broadening, eV.
    negative_limit, smearing : float, str
        Most negative area, as a share of the positive, and what makes it.
    no_sites : str
        What to do where there are no projections.
    steps, assumptions : sequence of str
        Of the provenance.
    """

    source: str
    energies: Array
    total: Array
    fermi: float
    integrated: Array | None = None
    sites: Array | None = None
    symbols: Sequence[str] = ()
    levels: Sequence[Array] = ()
    electrons: float | None = None
    sigma: float | None = None
    negative_limit: float = MAX_NEGATIVE
    smearing: str = "smearing"
    no_sites: str = "leave out site, or run VASP with LORBIT = 11"
    steps: Sequence[str] = ()
    assumptions: Sequence[str] = ()

    def target(self, site: int | None, sigma: float | None = None) -> TargetDOS:
        """The DOS of the cell, or of one site; `sigma` (eV) is what the caller states in place of the file's.

        Raises
        ------
        TypeError, ValueError
            If the site does not exist, or the file contradicts itself.
        """
        if sigma is not None:
            return replace(self, sigma=sigma).target(site)
        self._check()
        if site is not None:
            if self.sites is None:
                raise ValueError(f"{self.source} holds no site projections: {self.no_sites}")
            check_site(site, len(self.sites))
        assumptions = list(self.assumptions)
        spins, steps = self.total, list(self.steps)
        if len(spins) == 2 and drawn_down(spins[1]):
            spins = np.stack([spins[0], -spins[1]])
            steps.append("spin down is negative in the file: taken as positive")
        energies, total, first, note = self._representation(spins.sum(axis=0))
        steps += note
        total, lobes = clip_negative_lobes(total, self.negative_limit)
        steps += lobes
        self._check_sign(total)
        if not (total >= GAP_DOS).any():
            raise ValueError(f"the DOS of {self.source} is zero everywhere")
        if self.levels:
            gap, vbm = gap_of(self.levels, self.fermi)
        else:
            gaussian = None if lobes else self.sigma  # no Gaussian has lobes, nor the tail of one next to them
            gap, vbm = _gap_of_density(energies, total, self.fermi, gaussian)
            assumptions += [_TAIL] if gap and gaussian is None else []
        zero, reference = (vbm, "vbm") if gap >= MIN_GAP else (self.fermi, "fermi")
        if energies[-1] - zero > HIGHEST:
            raise ValueError(f"energies reach {energies[-1] - zero:.0f} eV above the zero: are they in meV?")
        if len(spins) == 2:
            steps.append("both spins summed")
        counted, doubt = self._count(energies, total, zero + 0.5 * gap)
        steps.append(counted)
        assumptions += doubt
        top = min([*(float(bands[:, -1].min()) for bands in self.levels), energies[total >= GAP_DOS][-1]])
        known = energies <= top
        values, kind = total, "total"
        if site is not None:
            values, known, note, doubt = self._share(site, energies, total, top)
            steps, assumptions = steps + note, assumptions + doubt
            kind = "site"
        known[0] &= first or total[0] < GAP_DOS
        steps.append(f"zero of energy at {zero:.4f} eV ({reference})")
        told = record(self.source, steps, assumptions)
        return TargetDOS(energies - zero, values, known, reference, self.sigma, kind, told)

    def _check(self) -> None:
        size = self.energies.size
        if self.energies.ndim != 1 or size < 2:
            raise ValueError(f"a DOS needs one row of at least 2 energies, not {self.energies.shape}")
        shapes = {"total": self.total, "integrated": self.integrated, "site projections": self.sites}
        for name, array in shapes.items():
            if array is None:
                continue
            if array.ndim != 2 or array.shape[1] != size:
                raise ValueError(f"the {name} DOS has shape {array.shape}: the file has {size} energies")
            if not np.isfinite(array).all():
                raise ValueError(f"the {name} DOS holds NaN or infinite numbers: the file is damaged, or overflowed")
        if len(self.total) not in (1, 2):
            raise ValueError(f"a DOS has one spin or two, not {len(self.total)}")
        if not np.isfinite(self.energies).all() or (np.diff(self.energies) <= 0).any():
            raise ValueError("energies must be finite and strictly increasing: sort them and drop repeated ones")
        if not math.isfinite(self.fermi):
            raise ValueError(f"the Fermi level is {self.fermi}: the zero of energy is not known")
        sigma: Any = self.sigma
        if sigma is not None and not (
            isinstance(sigma, (int, float, np.integer, np.floating)) and 0 <= sigma < math.inf
        ):
            raise ValueError(f"sigma must be a finite standard deviation >= 0 in eV, not {sigma!r}")

    def _check_sign(self, total: Array) -> None:
        if (total < 0).any():
            share = -total[total < 0].sum() / max(total[total > 0].sum(), 1e-9)
            raise ValueError(
                f"values must not be negative: {share:.0%} of the area lies below zero, but {self.smearing} makes "
                f"{self.negative_limit:.1%} at most"
            )

    def _representation(self, density: Array) -> tuple[Array, Array, bool, list[str]]:
        """Energies, states/eV at them, whether the first is to be trusted, and a note.

        The density column is taken where its integral follows the integrated column. It does not where peaks are
        narrower than the step, as VASP samples some smearings at points: then the states between two energies, the
        difference of the integrated column, stand at their middle.
        """
        if self.integrated is None:
            return self.energies, density, False, []
        states, steps = self.integrated.sum(axis=0), np.diff(self.energies)
        found = states - states[0]
        # The first density may hold the states below the window.
        filled = np.concatenate([density[1:2], density[1:]])
        sums = np.concatenate([[0.0], np.cumsum(0.5 * steps * (filled[1:] + filled[:-1]))])
        whole = max(abs(found).max(), 1e-9)
        slack = _LOST * whole + 0.5 * np.concatenate([steps[:1], steps]) * abs(filled)
        if (abs(sums - found) <= slack).all():
            return self.energies, density, False, []
        if found[-1] <= GAP_DOS:
            return self.energies, density, False, ["the integrated column holds no states and is not used"]
        told = f"states taken from the integrated column ({found[-1]:.2f}): the density holds {sums[-1]:.2f}"
        return 0.5 * (self.energies[1:] + self.energies[:-1]), np.diff(states) / steps, True, [told]

    def _count(self, energies: Array, total: Array, level: float) -> tuple[str, list[str]]:
        """How many states the file has up to a level, and a sentence if that is not what its electrons need."""
        if self.integrated is not None and self.integrated.any():
            states = float(np.interp(level, self.energies, self.integrated.sum(axis=0)))
        else:
            states = float((cell_widths(energies, -math.inf, level) * total).sum())
        told = f"{states:.2f} states up to the Fermi level in the file"
        if self.electrons is None:
            return told, []
        told += f", {self.electrons:g} electrons (NELECT)"
        if abs(states - self.electrons) <= max(0.1, 0.02 * self.electrons):
            return told, []
        doubt = f"states up to the Fermi level: {states:.2f} in the file where NELECT is {self.electrons:g}"
        return told, [f"{doubt}; is the window too narrow or the grid too coarse (EMIN, NEDOS, SIGMA)?"]

    def _share(self, site: int, energies: Array, total: Array, top: float) -> tuple[Array, Mask, list[str], list[str]]:
        """The DOS of one site, scaled so that all sites add up to the total, where it is known, notes and doubts."""
        assert self.sites is not None
        projections = self.sites
        if energies.size < self.energies.size:  # between two energies
            projections = 0.5 * (projections[:, 1:] + projections[:, :-1])
        if len(projections) == 1:
            projections = total[None]
        projections = np.array([clip_negative_lobes(row, self.negative_limit)[0] for row in projections])
        if (projections < 0).any():
            raise ValueError(f"the projections of {self.source} are negative: {projections.min():.3g} states/eV")
        scaled, known = scale_sites_to_total(projections, total, energies=energies, e_max=top, min_coverage=0.0)
        held = float(projections.sum() / max(total.sum(), GAP_DOS))
        doubts = []
        if held > MOST_HELD:
            doubts.append(f"scale: the sites hold {held:.1f} times the total DOS; the total is taken as right")
        name = f" ({self.symbols[site]})" if len(self.symbols) > site else ""
        notes = [f"site {site}{name}, sites scaled to add up to the total"]
        lost = float((cell_widths(energies) * total)[~known & (energies <= top)].sum())
        if lost > GAP_DOS:
            notes.append(f"unknown where no site has a projection: {lost:.2f} states of the cell")
        return scaled[site], known, notes, doubts


def gap_of(levels: Sequence[Array], fermi: float) -> tuple[float, float]:
    """Band gap (eV, 0 for a metal) and the highest filled level of eigenvalues, each spin's (k, bands).

    A solid has a gap only if every k-point has as many bands below the Fermi level, spin by spin. A Fermi level that
    was printed as the band edge itself counts on either side of it.
    """
    for level in (fermi, fermi + _LEVEL_ERROR, fermi - _LEVEL_ERROR):
        filled = [(bands <= level).sum(axis=1) for bands in levels]
        if any(len(set(counts.tolist())) > 1 for counts in filled):
            continue
        below = [bands[bands <= level] for bands in levels]
        above = [bands[bands > level] for bands in levels]
        vbm = max((float(e.max()) for e in below if e.size), default=-math.inf)
        cbm = min((float(e.min()) for e in above if e.size), default=math.inf)
        if math.isfinite(vbm) and math.isfinite(cbm) and cbm - vbm >= MIN_GAP:
            return cbm - vbm, vbm
    return 0.0, fermi


def _gap_of_density(energies: Array, total: Array, fermi: float, sigma: float | None) -> tuple[float, float]:
    """Gap (eV, 0 for a metal) and the valence-band maximum as the density of a broadening (eV) tells them."""
    states, occupied = total >= GAP_DOS, energies <= fermi
    below, above = np.flatnonzero(states & occupied), np.flatnonzero(states & ~occupied)
    # Neighbouring energies that both hold states are no gap, however coarse the grid is.
    if below.size and above.size and above[0] > below[-1] + 1:
        inside = float(energies[above[0] - 1])
        scale, known = energies - inside, np.ones(total.size, dtype=bool)
        edges = gap_around_zero(scale, total, known, sigma)
        ends = (int(below[-1]), int(above[0]))
        if edges and sigma and not all(_is_tail(scale, total, *pair, sigma) for pair in zip(ends, edges, strict=True)):
            edges = gap_around_zero(scale, total, known, None)
        if edges:
            return edges[1] - edges[0], edges[0] + inside
    return 0.0, fermi


def _is_tail(energies: Array, total: Array, end: int, edge: float, sigma: float) -> bool:
    """Whether the DOS rises from its end to the edge as a Gaussian does, or more.

    No sum of Gaussians rises by less than ``exp(d^2 / 2 sigma^2)`` over a distance d so estimated: where the DOS does,
    its edge is sharper than sigma, as the tetrahedron method makes it, whatever was stated.
    """
    rise = math.log(max(float(np.interp(edge, energies, total)), 1e-99) / total[end])
    return bool(2 * sigma**2 * rise >= _GAUSSIAN * (energies[end] - edge) ** 2)


def even(energies: Array, digits: int) -> Array:
    """Energies that were printed with few digits, as the uniform grid that they are; others as they are."""
    grid = np.linspace(energies[0], energies[-1], energies.size) if energies.size > 1 else energies
    return grid if np.abs(grid - energies).max(initial=0.0) <= 1.1 * 10.0**-digits else energies


def real_rows(data: Any, name: str) -> Array:
    """Real numbers of any shape as floats; ValueError that says `name` for anything else."""
    try:
        array = np.asarray(data)
    except ValueError:
        raise ValueError(f"{name} must be numbers in rows of one length") from None
    if array.size and array.dtype.kind not in "iuf":
        told = {"b": "true and false", "U": "strings", "c": "complex numbers"}.get(array.dtype.kind, "something else")
        raise ValueError(f"{name} must be numbers, not {told}")
    return array.astype(float)
