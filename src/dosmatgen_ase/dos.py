"""The density of states as a target: energy grid, values with a known mask, readers, broadening, distances.

Conventions, followed by every part of the package:

* energies in eV; zero is the Fermi level of a metal (``reference="fermi"``) or the valence-band maximum of a gapped
  solid (``"vbm"``);
* values in states/eV, both spins summed, of one site (``kind="site"``) or of the cell (``"total"``);
* ``sigma`` is the standard deviation of the Gaussian broadening in eV, ``None`` where it is not known;
* energies that were neither computed nor asked for are *unknown*, which is not the same as zero.

numpy is all that importing this file needs; scipy, ASE and pymatgen are imported by the functions that use them.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

KNOWN_WEIGHT = 0.84
"""Share of the broadening kernel that must lie on known input for a bin to be known. At an edge this means that the
input reaches one standard deviation of the *extra* broadening beyond the bin (the normal distribution holds 0.841
below +1 sigma)."""

GAP_DOS = 1e-3
"""Total DOS (states/eV) below which an energy counts as a gap: a known zero."""

MIN_COVERAGE = 0.7
"""Least share of the total DOS that Loewdin projections must cover for their split over the sites to be trusted."""

MIN_GAP = 0.1
"""Band gap (eV) below which a DOS read from elsewhere counts as metallic: narrower gaps drown in its grid spacing."""

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
        return _frozen(np.linspace(self.minimum, self.maximum, self.size))


MODEL_GRID = EnergyGrid(-10.0, 5.0, 0.1)
"""The grid on which networks see a DOS and on which distances are taken."""

MODEL_SIGMA = 0.2
"""Standard deviation (eV) of the broadening on `MODEL_GRID`."""


@dataclass(frozen=True, eq=False, repr=False)
class TargetDOS:
    """A density of states, wholly or partly known.

    Arrays are copied and made read-only; values at unknown energies are stored as 0. Two targets are equal if they say
    the same (`digest`); where they came from (`provenance`) does not count.

    Parameters
    ----------
    energies : array, shape (G,)
        eV, strictly increasing.
    values : array, shape (G,)
        states/eV, finite and non-negative where known.
    known : array of bool, shape (G,)
        Which energies are known.
    reference : {"fermi", "vbm"}
        Zero of the energies.
    sigma : float or None
        Standard deviation (eV) of the Gaussian that the values are broadened with; None if that is not known.
    kind : {"site", "total"}
        DOS of one site, or of the cell.
    provenance : dict or str
        JSON-able record: ``{"source": ..., "steps": [...]}``. A string becomes the source.

    Raises
    ------
    TypeError
        If an array is not made of real numbers.
    ValueError
        If anything contradicts the above, or nothing is known.
    """

    energies: Array
    values: Array
    known: Mask
    reference: str = "fermi"
    sigma: float | None = None
    kind: str = "site"
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        energies, values = _real_vector(self.energies, "energies"), _real_vector(self.values, "values")
        known = np.asarray(self.known)
        if known.dtype != np.bool_:
            raise TypeError("known must be an array of bool (True where the DOS is known)")
        if not energies.shape == values.shape == known.shape:
            raise ValueError(
                "energies, values and known must have one common length, not "
                f"{energies.shape}, {values.shape} and {known.shape}"
            )
        if energies.size < 2:
            raise ValueError(f"a DOS needs at least 2 energies, not {energies.size}")
        if not np.isfinite(energies).all() or (np.diff(energies) <= 0).any():
            raise ValueError("energies must be finite and strictly increasing: sort them and drop repeated ones")
        if not known.any():
            raise ValueError("nothing is known in this DOS: at least one energy must be known")
        if not np.isfinite(values[known]).all():
            raise ValueError("values are NaN or infinite: pass known=False for the energies where the DOS is unknown")
        if (values[known] < 0).any():
            raise ValueError(
                f"values must not be negative (lowest {values[known].min():g} states/eV): "
                "a spin-down channel drawn downwards must be added as positive"
            )
        if self.reference not in ("fermi", "vbm"):
            raise ValueError(f'reference must be "fermi" or "vbm", not {self.reference!r}')
        if self.kind not in ("site", "total"):
            raise ValueError(f'kind must be "site" or "total", not {self.kind!r}')
        sigma = None if self.sigma is None else float(self.sigma)
        if sigma is not None and not (math.isfinite(sigma) and sigma >= 0):
            raise ValueError(f"sigma must be a finite standard deviation >= 0 in eV, or None if unknown, not {sigma}")
        given: Any = self.provenance
        record = {"source": given} if isinstance(given, str) else dict(given)
        try:
            record = json.loads(json.dumps(record, allow_nan=False))
        except (TypeError, ValueError):
            raise ValueError("provenance must be JSON-able: strings, finite numbers, lists and dicts") from None
        set_field = object.__setattr__
        set_field(self, "energies", _frozen(energies))
        # + 0.0 turns -0.0 into 0.0, so that equal targets have equal bytes.
        set_field(self, "values", _frozen(np.where(known, values, 0.0) + 0.0))
        set_field(self, "known", _frozen(known))
        set_field(self, "sigma", sigma)
        set_field(self, "provenance", record)

    # -- identity ------------------------------------------------------------------------------------------------------

    def digest(self) -> str:
        """sha256 (hex) of everything but the provenance; the same on every machine."""
        head = json.dumps([self.reference, self.sigma, self.kind, self.energies.size])
        hasher = hashlib.sha256(head.encode())
        for array, dtype in ((self.energies, "<f8"), (self.values, "<f8"), (self.known, "u1")):
            hasher.update(array.astype(dtype).tobytes())
        return hasher.hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.digest() == other.digest() if isinstance(other, TargetDOS) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        inside = self.energies[self.known]
        sigma = "unknown" if self.sigma is None else f"{self.sigma:g} eV"
        return (
            f"TargetDOS({self.kind}, {self.energies.size} energies, {self.known.sum()} known in "
            f"[{inside[0]:.2f}, {inside[-1]:.2f}] eV, reference={self.reference}, sigma={sigma})"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict; `from_dict` is its inverse."""
        return {
            "format": "dosmatgen_ase.TargetDOS",
            "energies": self.energies.tolist(),
            "values": self.values.tolist(),
            "known": self.known.tolist(),
            "reference": self.reference,
            "sigma": self.sigma,
            "kind": self.kind,
            "provenance": self.provenance,
        }

    def as_dict(self) -> dict[str, Any]:
        """`to_dict` in the form by which monty finds the class again: so jobflow carries a target between machines."""
        return {"@module": type(self).__module__, "@class": type(self).__name__, **self.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TargetDOS:
        """Inverse of `to_dict`. ``energies`` and ``values`` must be there, the other fields have their defaults.

        Raises
        ------
        ValueError
            If a field is missing or wrong.
        """
        if not (isinstance(data, Mapping) and {"energies", "values"} <= set(data)):
            raise ValueError('this is not the dict of a TargetDOS: it needs "energies" and "values"')
        optional = {k: data[k] for k in ("reference", "sigma", "kind") if k in data}
        target = cls.from_arrays(data["energies"], data["values"], known=data.get("known"), **optional)
        return replace(target, provenance=data.get("provenance", {}))

    # -- changes -------------------------------------------------------------------------------------------------------

    def on_grid(self, grid: EnergyGrid = MODEL_GRID, sigma: float = MODEL_SIGMA) -> TargetDOS:
        """The same DOS on a uniform grid, at (at least) the broadening asked for.

        Broadening only widens: the variance grows from ``self.sigma**2`` to ``sigma**2``. A DOS of unknown broadening
        is taken as unbroadened, and one that is wider than asked for is left as wide as it is; `provenance` says so.
        Fine input is averaged by the kernel, so that no state is lost between grid points; coarse input is interpolated
        linearly first. Near unknown energies the kernel is normalised by its known part, so that an edge does not
        bend the values down; a bin is known where at least `KNOWN_WEIGHT` of the kernel lies on known input.

        Parameters
        ----------
        grid : EnergyGrid
        sigma : float
            Standard deviation, eV; at least the grid's step, as a narrower DOS does not fit the grid.

        Raises
        ------
        ValueError
            If sigma is below the grid's step, or what is known lies outside of the grid or is narrower than the kernel.
        """
        if sigma < grid.step:
            raise ValueError(f"sigma {sigma:g} eV does not fit a grid of step {grid.step:g} eV: take a smaller step")
        if self.sigma is not None and self.sigma >= sigma and np.array_equal(self.energies, grid.energies):
            return self
        if self.sigma is None:
            step = f"broadening unknown, taken as none; widened to sigma {sigma:g} eV"
        elif self.sigma >= sigma:
            step = f"already at sigma {self.sigma:g} eV, {sigma:g} eV asked for: interpolated only"
        else:
            step = f"widened from sigma {self.sigma:g} to {sigma:g} eV"
        values, known = resample(self.energies, self.values, self.known, self.sigma or 0.0, grid, sigma)
        if not known.any():
            if _inside(self.energies[self.known], (grid.minimum, grid.maximum)).any():
                raise ValueError(
                    f"what is known of {self!r} is too narrow for sigma {sigma:g} eV on a grid of step {grid.step:g} "
                    "eV: widen the window, or state sigma if the DOS is already that broad"
                )
            raise ValueError(
                f"no known energy of {self!r} falls on the grid [{grid.minimum:g}, {grid.maximum:g}] eV: "
                "shift the energies or choose another grid"
            )
        wider = max(sigma, self.sigma or 0.0)
        return replace(
            self, energies=grid.energies, values=values, known=known, sigma=wider, provenance=self._with_step(step)
        )

    def window(self, lo: float, hi: float) -> TargetDOS:
        """The same DOS, known on [lo, hi] (eV) only.

        Raises
        ------
        ValueError
            If lo >= hi or nothing in the window is known.
        """
        if not lo < hi:
            raise ValueError(f"a window needs lo < hi (eV), not {lo:g} and {hi:g}")
        known = self.known & _inside(self.energies, (lo, hi))
        if not known.any():
            raise ValueError(f"the window [{lo:g}, {hi:g}] eV holds no known energy of {self!r}")
        return replace(self, known=known, provenance=self._with_step(f"known on [{lo:g}, {hi:g}] eV only"))

    @classmethod
    def sum_of(cls, sites: Sequence[TargetDOS]) -> TargetDOS:
        """Total DOS of a cell from the DOS of its sites on one grid, known where all of them are.

        Raises
        ------
        ValueError
            If there is none, or they differ in energies, reference or broadening.
        """
        if not sites:
            raise ValueError("a sum needs the DOS of at least one site")
        first = sites[0]
        same = [np.array_equal(dos.energies, first.energies) for dos in sites]
        if not all(same) or len({(dos.reference, dos.sigma) for dos in sites}) > 1:
            raise ValueError("a sum needs the DOS of all sites on the same energies, with one reference and broadening")
        provenance = {"source": "sum over sites", "steps": []}
        values, known = np.sum([dos.values for dos in sites], axis=0), np.all([dos.known for dos in sites], axis=0)
        return replace(first, values=values, known=known, kind="total", provenance=provenance)

    def shift(self, energy: float) -> TargetDOS:
        """The same DOS with `energy` (eV) added to every energy."""
        return replace(self, energies=self.energies + energy, provenance=self._with_step(f"shifted by {energy:g} eV"))

    def _with_step(self, step: str) -> dict[str, Any]:
        return {**self.provenance, "steps": [*self.provenance.get("steps", []), step]}

    # -- figures -------------------------------------------------------------------------------------------------------

    def total_states(self, lo: float = -math.inf, hi: float = math.inf) -> float:
        """Number of states between lo and hi (eV): the integral over the known energies (trapezoidal)."""
        return float((_cell_widths(self.energies, lo, hi) * self.values).sum())

    def band_centre(self, lo: float = -10.0, hi: float = 0.0) -> float:
        """First moment (eV) of the known DOS between lo and hi; NaN where it holds no states.

        On the d-projected DOS this is the d-band centre of Hammer and Noerskov (Surf. Sci. 343, 211, 1995).
        """
        weights = _cell_widths(self.energies, lo, hi) * self.values
        return float(np.average(self.energies, weights=weights)) if weights.sum() > 0 else math.nan

    # -- readers -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_arrays(
        cls,
        energies: ArrayLike,
        values: ArrayLike,
        *,
        known: ArrayLike | None = None,
        reference: str = "fermi",
        sigma: float | None = None,
        kind: str = "site",
    ) -> TargetDOS:
        """A target from plain arrays.

        Parameters
        ----------
        energies, values : array_like, shape (G,)
            eV, strictly increasing; states/eV.
        known : array_like of bool, shape (G,), optional
            Everything by default. Where False, values may be NaN.
        reference, sigma, kind
            As in the class.

        Raises
        ------
        TypeError, ValueError
            As in the class.
        """
        energies = _real_vector(energies, "energies")
        mask = np.ones(energies.shape, dtype=bool) if known is None else np.asarray(known)
        return cls(energies, _real_vector(values, "values"), mask, reference, sigma, kind, {"source": "arrays"})

    @classmethod
    def from_peaks(
        cls,
        peaks: Sequence[tuple[float, float, float]],
        *,
        window: tuple[float, float] | None = None,
        reference: str = "fermi",
        kind: str = "site",
    ) -> TargetDOS:
        """A sketch: a sum of Gaussian peaks.

        Parameters
        ----------
        peaks : sequence of (energy, height, width)
            Centre (eV), value at the centre (states/eV) and standard deviation (eV). A peak holds
            ``height * width * sqrt(2 pi)`` states. The widths are those that the DOS shall have at the model's
            broadening: a peak narrower than `MODEL_SIGMA` is drawn at that width with as many states.
        window : (lo, hi), optional
            Energies (eV) outside are unknown; by default the sketch is known wherever the model looks.
        reference, kind
            As in the class.

        Raises
        ------
        ValueError
            If a peak is not three finite numbers with height and width above 0, or lies outside the window.
        """
        expected = "peaks must be (energy, height, width) triples, finite, with height and width above 0"
        try:
            table = np.asarray(peaks, dtype=float)
        except (TypeError, ValueError):
            raise ValueError(expected) from None
        if table.ndim != 2 or table.shape[1] != 3 or not np.isfinite(table).all() or (table[:, 1:] <= 0).any():
            raise ValueError(expected)
        margin = 5 * MODEL_SIGMA
        lo, hi = window or (MODEL_GRID.minimum - margin, MODEL_GRID.maximum + margin)
        if not lo < hi:
            raise ValueError(f"a window needs lo < hi (eV), not {lo:g} and {hi:g}")
        for energy in table[:, 0]:
            if not lo <= energy <= hi:
                raise ValueError(f"the peak at {energy:g} eV lies outside [{lo:g}, {hi:g}] eV: move it or the window")
        energies = np.linspace(lo, hi, math.ceil((hi - lo) / (MODEL_SIGMA / 4)) + 1)
        centre, height, width = table.T[:, :, None]
        drawn = np.maximum(width, MODEL_SIGMA)
        values = (height * width / drawn * np.exp(-0.5 * ((energies - centre) / drawn) ** 2)).sum(axis=0)
        known = np.ones(energies.shape, dtype=bool)
        return cls(energies, values, known, reference, MODEL_SIGMA, kind, {"source": "peaks"})

    @classmethod
    def from_pymatgen(cls, dos: Any, site: int | None = None) -> TargetDOS:
        """Read a pymatgen ``Dos`` or ``CompleteDos``, or the dict of one.

        Spins are summed. The zero of energy becomes the Fermi level, or the valence-band maximum where the DOS has a
        gap of at least `MIN_GAP`. Energies above the last state are unknown: bands are missing there. So is the first
        energy unless it is empty, as VASP piles the states below its window there.

        Parameters
        ----------
        dos : pymatgen.electronic_structure.dos.Dos or dict
        site : int, optional
            Site index in the structure: its projections, scaled at every energy so that all sites add up to the
            total (`scale_sites_to_total`). By default the total DOS of the cell.

        Raises
        ------
        TypeError
            If `dos` is something else.
        ValueError
            If the site does not exist or there are no projections.
        """
        from pymatgen.electronic_structure.dos import CompleteDos, Dos

        if isinstance(dos, Mapping):
            if not {"efermi", "energies", "densities"} <= set(dos):
                raise ValueError('this dict is not a pymatgen Dos: it needs "efermi", "energies" and "densities"')
            try:
                dos = (CompleteDos if dos.get("pdos") else Dos).from_dict(dict(dos))
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                told = f"{type(error).__name__}: {error}"
                raise ValueError(f"this dict is not a pymatgen Dos that pymatgen reads: {told}") from None
        if not isinstance(dos, Dos):
            raise TypeError(f"from_pymatgen reads a pymatgen Dos, CompleteDos or its dict, not {type(dos).__name__}")
        energies, occupied = np.asarray(dos.energies), np.asarray(dos.energies) <= dos.efermi
        states = np.asarray(dos.get_densities()) * (dos.norm_vol or 1.0) >= GAP_DOS
        below, above = np.flatnonzero(states & occupied), np.flatnonzero(states & ~occupied)
        # Neighbouring energies that both hold states are no gap, however coarse the grid is.
        vbm = None
        if below.size and above.size and above[0] > below[-1] + 1:
            vbm = energies[below[-1]] if energies[above[0]] - energies[below[-1]] >= MIN_GAP else None
        return _from_pymatgen(dos, site, vbm, math.inf, None, f"pymatgen {type(dos).__name__}")

    @classmethod
    def from_vasprun(cls, path: str | PathLike[str], site: int | None = None) -> TargetDOS:
        """Read a ``vasprun.xml`` (also gzipped); projections need LORBIT = 11.

        As `from_pymatgen`, but gap and valence-band maximum come from the eigenvalues, energies above the lowest
        maximum of the top band are unknown, and the broadening is taken from ISMEAR and SIGMA: Gaussian smearing
        (ISMEAR = 0) has the standard deviation SIGMA / sqrt(2), the tetrahedron method has none.

        Raises
        ------
        FileNotFoundError, ValueError
            If the file cannot be read, holds no DOS, or the site does not exist.
        """
        from pymatgen.io.vasp.outputs import Vasprun

        _existing(path)
        try:
            run = Vasprun(str(path), parse_potcar_file=False)
            dos = run.complete_dos
            gap, _, vbm, _ = run.eigenvalue_band_properties
        except (SyntaxError, ValueError, AttributeError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path} is not a complete vasprun.xml with a DOS: {error}") from error
        top = min(float(bands[..., -1, 0].min()) for bands in run.eigenvalues.values())
        ismear, sigma = run.parameters.get("ISMEAR"), run.parameters.get("SIGMA")
        if ismear == 0 and sigma is not None:
            broadening: float | None = sigma / math.sqrt(2)
        else:
            broadening = 0.0 if ismear in (-4, -5) else None
        return _from_pymatgen(dos, site, vbm if gap >= MIN_GAP else None, top, broadening, f"VASP {Path(path).name}")

    @classmethod
    def from_ase(
        cls,
        dos: Any,
        site: int | None = None,
        *,
        sigma: float | None = None,
        efermi: float = 0.0,
        reference: str = "fermi",
    ) -> TargetDOS:
        """Read ASE's ``GridDOSData``, ``RawDOSData``, a collection of them, or ``ase.dft.dos.DOS``.

        Parameters
        ----------
        dos : ase.spectrum.dosdata.DOSData, ase.spectrum.doscollection.DOSCollection or ase.dft.dos.DOS
        site : int, optional
            For a collection: the rows whose ``info["index"]`` is this number, summed; in a collection without indices,
            the row of this number. If there is a row labelled "Total", sites are scaled so that they add up to it,
            otherwise the projection is taken as it is. By default the total: that row, or the sum of all rows.
        sigma : float, optional
            Standard deviation (eV), which is what ``ase.spectrum`` calls width. For grid data: the broadening that they
            have (default unknown). For raw data: the broadening to give them (default `MODEL_SIGMA`). Not for
            ``ase.dft.dos.DOS``, which knows its own: its ``width`` is ``sqrt(2) * sigma``.
        efermi : float
            Zero of energy (eV) on the scale of `dos`; ``ase.dft.dos.DOS`` has it at 0 already.
        reference : {"fermi", "vbm"}
            What that zero is.

        Raises
        ------
        TypeError
            If `dos` is something else.
        ValueError
            If the site does not exist or the rows do not fit together.
        """
        from ase.dft.dos import DOS
        from ase.spectrum.doscollection import DOSCollection
        from ase.spectrum.dosdata import DOSData

        if isinstance(dos, DOS):
            if site is not None or sigma is not None:
                raise ValueError("ase.dft.dos.DOS is a total DOS and knows its width: leave out site and sigma")
            # Above the lowest maximum of the top band, bands are missing.
            e_max = dos.e_skn.max(axis=-1).min()
            energies = np.asarray(dos.get_energies())
            values, note = _clip_negative_lobes(np.asarray(dos.get_dos()))
            record = {"source": "ase.dft.dos.DOS", "steps": note}
            width = dos.width / math.sqrt(2)
            return cls(energies - efermi, values, energies <= e_max, reference, width, "total", record)
        if isinstance(dos, DOSData):
            if site is not None:
                raise ValueError("a single DOSData holds one DOS: leave out site")
            rows = [dos]
        elif isinstance(dos, DOSCollection):
            rows = list(dos)
        else:
            raise TypeError(f"from_ase reads ASE DOSData, DOSCollection or DOS objects, not {type(dos).__name__}")
        energies, table, sigma = _ase_table(rows, sigma)
        known, kind, steps = np.ones(energies.shape, dtype=bool), "site", list[str]()
        if isinstance(dos, DOSData):
            values = table[0]
        else:
            values, known, kind, steps = _ase_select(rows, table, energies, site)
        values, note = _clip_negative_lobes(values)
        record = {"source": f"ASE {type(dos).__name__}", "steps": steps + note}
        return cls(energies - efermi, values, known, reference, sigma, kind, record)

    @classmethod
    def from_text(
        cls, path: str | PathLike[str], *, columns: tuple[int, int] | None = None, kind: str = "site"
    ) -> TargetDOS:
        """Read energies (eV) and values (states/eV) from text or CSV.

        Columns are separated by blanks, commas or semicolons. Lines that start with ``#``, ``!``, ``%`` or ``@`` and
        header lines before the first numbers are skipped. A value written as ``nan`` is unknown.

        Parameters
        ----------
        path : path
        columns : (int, int), optional
            Which columns (from 0) hold energy and DOS; needed where a file has more than two.
        kind : {"site", "total"}

        Raises
        ------
        FileNotFoundError, ValueError
            If the file cannot be read as such; the message names the line.
        """
        return _parse_text(_read_bytes(path), str(path), columns, kind)

    @classmethod
    def from_file(
        cls,
        path: str | PathLike[str],
        site: int | None = None,
        *,
        reference: str | None = None,
        sigma: float | None = None,
        kind: str | None = None,
    ) -> TargetDOS:
        """Read a file of any known form, told by its content: vasprun.xml, JSON, .npz or two-column text.

        JSON is `to_dict`, a pymatgen ``Dos`` dict or what ``dosmatgen dft`` wrote; .npz holds ``energies``, ``total``,
        ``pdos`` (sites, l, G), ``emax`` and ``gap`` of one structure with Loewdin projections. XML, JSON and text may
        be gzipped.

        Parameters
        ----------
        path : path
        site : int, optional
            Site index, where the file holds site projections; by default the total DOS.
        reference, sigma, kind : optional
            State what the file does not say; they replace what was read (nothing is shifted or broadened).

        Raises
        ------
        FileNotFoundError, ValueError
            If the file cannot be read or the site does not exist.
        """
        content = _read_bytes(path)
        head = content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if content.startswith(b"PK"):
            target = _parse_npz(content, str(path), site)
        elif head == b"<":
            target = cls.from_vasprun(path, site)
        elif head == b"{":
            target = _parse_json(content, str(path), site)
        else:
            if site is not None:
                raise ValueError(f"{path} is a two-column file with one DOS: leave out site")
            target = _parse_text(content, str(path), None, "site")
        stated = {"reference": reference, "sigma": sigma, "kind": kind}
        return replace(target, **{k: v for k, v in stated.items() if v is not None})  # type: ignore[arg-type]


# -- broadening and resampling -----------------------------------------------------------------------------------------


def resample(
    energies: Array,
    values: Array,
    known: Mask,
    sigma: float,
    grid: EnergyGrid = MODEL_GRID,
    grid_sigma: float = MODEL_SIGMA,
) -> tuple[Array, Mask]:
    """Widen and resample DOS arrays onto a uniform grid; the arithmetic of `TargetDOS.on_grid` for whole data sets.

    Parameters
    ----------
    energies : array, shape (G,)
        eV, strictly increasing, common to all.
    values, known : arrays, shape (..., G)
        states/eV and bool. Values at unknown energies are ignored (they must be finite).
    sigma, grid_sigma : float
        Standard deviations (eV) that the values have and shall have; `sigma` >= `grid_sigma` only interpolates.

    Returns
    -------
    values, known : arrays, shape (..., grid.size)
        Values are 0 where unknown.
    """
    extra = math.sqrt(max(grid_sigma**2 - sigma**2, 0.0))
    # Below a tenth of a step the extra broadening is not seen on the grid, and its kernel would need a very fine mesh.
    matrix = _resampling_matrix(energies, grid.energies, extra if extra > 0.1 * grid.step else 0.0)
    weight = known @ matrix.T
    sums = np.where(known, values, 0.0) @ matrix.T
    inside = weight >= KNOWN_WEIGHT
    return np.where(inside, sums / np.where(inside, weight, 1.0), 0.0), inside


def _resampling_matrix(energies: Array, centres: Array, width: float) -> Array:
    """Weights (O, G) that turn values at `energies` into Gaussian averages of standard deviation `width` at `centres`.

    The input is read as piecewise linear, zero outside its range. Rows sum to the share of the kernel inside the range.
    """
    if width == 0.0:
        points, kernel = centres, np.eye(centres.size)
    else:
        # Split coarse intervals so that the sum over points is the integral: half a width for the Gaussian's shape.
        parts = np.maximum(np.ceil(np.diff(energies) / (0.5 * width) - 1e-9), 1).astype(int)
        outside = (energies[1:] < centres[0] - 6 * width) | (energies[:-1] > centres[-1] + 6 * width)
        parts[outside] = 1
        starts = np.concatenate([[0], np.cumsum(parts)])
        points = np.interp(np.arange(starts[-1] + 1), starts, energies)
        kernel = np.exp(-0.5 * ((centres[:, None] - points) / width) ** 2) / (math.sqrt(2 * math.pi) * width)
        kernel *= _cell_widths(points)
    # Each point takes its value from its two neighbours in the input (hat functions).
    left = np.clip(np.searchsorted(energies, points, side="right") - 1, 0, energies.size - 2)
    share = (points - energies[left]) / (energies[left + 1] - energies[left])
    inside = (share > -1e-9) & (share < 1 + 1e-9)
    share = np.clip(share, 0.0, 1.0)
    columns = np.zeros((energies.size, centres.size))
    np.add.at(columns, left, (kernel * (inside * (1 - share))).T)
    np.add.at(columns, left + 1, (kernel * (inside * share)).T)
    return columns.T


def scale_sites_to_total(
    site_dos: Array, total: Array, *, energies: Array, e_max: float = math.inf, min_coverage: float = MIN_COVERAGE
) -> tuple[Array, Mask]:
    """Scale site projections at every energy so that they add up to the total DOS.

    This takes out most of the dependence on projection spheres. An energy is known where it does not exceed `e_max` and
    either the total is below `GAP_DOS` (a gap: a known zero) or the projections cover at least `min_coverage` of it.

    Parameters
    ----------
    site_dos : array, shape (sites, G)
        Projections summed over l, states/eV.
    total : array, shape (G,)
        Total DOS of the cell, states/eV.
    energies : array, shape (G,)
        eV.
    e_max : float
        Energy (eV) above which bands are missing.
    min_coverage : float
        0.7 for Loewdin projections, whose missing part is missing shells; 0 for PAW spheres, which never cover it all.

    Returns
    -------
    scaled : array, shape (sites, G)
        0 where unknown.
    known : array of bool, shape (G,)
    """
    covered = site_dos.sum(axis=0)
    split = covered > 0
    enough = split & (covered >= min_coverage * total)
    known = (energies <= e_max) & ((total < GAP_DOS) | enough)
    factor = np.where(split & known, total / np.where(split, covered, 1.0), 0.0)
    return site_dos * factor, known


# -- distances ---------------------------------------------------------------------------------------------------------


def normalised_l1_arrays(values: Array, target: Array, known: Mask) -> Array:
    """``sum |g - g*| / sum g*`` over known bins.

    Parameters
    ----------
    values, target, known : arrays, shape (..., G), broadcast against each other
        On one uniform grid at one broadening.

    Returns
    -------
    array, shape (...)
        NaN where the target holds no states in the known bins (nothing to normalise by), or nothing is known.
    """
    scale = np.where(known, target, 0.0).sum(axis=-1)
    error = np.where(known, np.abs(values - target), 0.0).sum(axis=-1)
    return error / np.where(scale > 0, scale, math.nan)


def mae_arrays(values: Array, target: Array, known: Mask) -> Array:
    """Mean of ``|g - g*|`` (states/eV) over known bins; shapes as in `normalised_l1_arrays`, NaN if none is known."""
    error = np.where(known, np.abs(values - target), 0.0).sum(axis=-1)
    count = np.sum(known, axis=-1)
    return error / np.where(count > 0, count, math.nan)


def normalised_l1(dos: TargetDOS, target: TargetDOS, *, window: tuple[float, float] | None = None) -> float:
    """Normalised L1 distance ``sum |g - g*| / sum g*`` of `dos` to `target`: the distance of this package.

    Both are put on `MODEL_GRID` at sigma 0.2 eV (at the broader of the two where one is broader) and compared over the
    bins known in both. It is not symmetric: the target normalises.

    Parameters
    ----------
    dos, target : TargetDOS
        Of the same kind.
    window : (lo, hi), optional
        eV; the whole grid by default, `NEAR_GAP` for the near-gap figure.

    Returns
    -------
    float
        0 for equal DOS, 2 for disjoint ones of equal area; NaN if the target holds no states in the bins compared.

    Raises
    ------
    ValueError
        If one is a site's and the other a total, or no bin is known in both.
    """
    values, wanted, known, _ = _on_common_grid(dos, target, window)
    return float(normalised_l1_arrays(values, wanted, known))


def mae(dos: TargetDOS, target: TargetDOS, *, window: tuple[float, float] | None = None) -> float:
    """Mean absolute difference in states/eV; arguments and errors as in `normalised_l1`."""
    values, wanted, known, _ = _on_common_grid(dos, target, window)
    return float(mae_arrays(values, wanted, known))


def mean_distance(
    pairs: Iterable[tuple[TargetDOS, TargetDOS]], *, window: tuple[float, float] | None = None
) -> float | None:
    """Mean of `normalised_l1` over pairs of (dos, target): what candidates are ordered by.

    A target that holds no states, such as a gap, has no ratio: its `mae`, in states/eV, takes the place. None if there
    is no pair, or a target holds states but none where they can be compared. Errors as in `normalised_l1`.
    """

    def distance(dos: TargetDOS, target: TargetDOS) -> float:
        ratio = normalised_l1(dos, target, window=window)
        stateless = math.isnan(ratio) and math.isnan(normalised_l1(target, target, window=window))
        return mae(dos, target, window=window) if stateless else ratio

    distances = [distance(*pair) for pair in pairs]
    return float(np.mean(distances)) if distances and np.isfinite(distances).all() else None


def wasserstein(dos: TargetDOS, target: TargetDOS, *, window: tuple[float, float] | None = None) -> float:
    """Earth mover's distance in eV between the two DOS, each normalised over the bins known in both.

    NaN if either holds no states there; arguments and errors as in `normalised_l1`.
    """
    from scipy.stats import wasserstein_distance

    values, wanted, known, energies = _on_common_grid(dos, target, window)
    values, wanted, energies = values[known], wanted[known], energies[known]
    if not (values.any() and wanted.any()):
        return math.nan
    return float(wasserstein_distance(energies, energies, values, wanted))


def fingerprint_similarity(dos: TargetDOS, target: TargetDOS, *, window: tuple[float, float] | None = None) -> float:
    """Tanimoto similarity ``a.b / (|a|^2 + |b|^2 - a.b)`` of the two DOS, each normalised to one state.

    This is the definition of pymatgen's ``CompleteDos.get_dos_fp_similarity`` (after Knoop et al., JOSS 5, 2671, 2020,
    and Kuban et al., Digital Discovery 3, 2448, 2024), on all bins known in both; pymatgen 2026.10 itself compares a
    single row of its fingerprint arrays.

    1 for equal shapes, 0 for disjoint ones; NaN if either holds no states. Arguments and errors as in `normalised_l1`.
    """
    values, wanted, known, _ = _on_common_grid(dos, target, window)
    a, b = np.where(known, values, 0.0), np.where(known, wanted, 0.0)
    if not (a.any() and b.any()):
        return math.nan
    a, b = a / a.sum(), b / b.sum()
    return float(a @ b / (a @ a + b @ b - a @ b))


def band_centre_difference(dos: TargetDOS, target: TargetDOS, *, lo: float = -10.0, hi: float = 0.0) -> float:
    """Difference (eV) of the band centres between lo and hi over the bins known in both; NaN if either is empty."""
    values, wanted, known, energies = _on_common_grid(dos, target, (lo, hi))
    weights = known * _cell_widths(energies, lo, hi)
    if not ((weights * values).any() and (weights * wanted).any()):
        return math.nan
    return float(np.average(energies, weights=weights * values) - np.average(energies, weights=weights * wanted))


def _on_common_grid(
    dos: TargetDOS, target: TargetDOS, window: tuple[float, float] | None
) -> tuple[Array, Array, Mask, Array]:
    if dos.kind != target.kind:
        raise ValueError(f"a {dos.kind} DOS cannot be compared with a {target.kind} DOS: give two of one kind")
    sigma = max(MODEL_SIGMA, dos.sigma or 0.0, target.sigma or 0.0)
    first, second = dos.on_grid(MODEL_GRID, sigma), target.on_grid(MODEL_GRID, sigma)
    known = first.known & second.known
    if window is not None:
        known = known & _inside(MODEL_GRID.energies, window)
    if not known.any():
        raise ValueError("no energy is known in both DOS within the window: widen the window or the known ranges")
    return first.values, second.values, known, MODEL_GRID.energies


# -- what the readers share --------------------------------------------------------------------------------------------


def _from_pymatgen(
    dos: Any, site: int | None, vbm: float | None, top: float, sigma: float | None, source: str
) -> TargetDOS:
    """`vbm` is None for a metal; `vbm` and `top`, above which bands are missing, are on the energy scale of `dos`."""
    energies = np.asarray(dos.energies, dtype=float)
    # A CompleteDos "normalised" by the volume is in states/eV/A^3.
    total, steps = _clip_negative_lobes(np.asarray(dos.get_densities()) * (dos.norm_vol or 1.0))
    if not (total >= GAP_DOS).any():
        raise ValueError(f"the DOS of {source} is zero everywhere")
    top = min(top, energies[total >= GAP_DOS][-1])
    values, kind = total, "total"
    known = energies <= top
    if site is not None:
        if not getattr(dos, "pdos", None):
            raise ValueError(f"{source} holds no site projections: leave out site, or run VASP with LORBIT = 11")
        sites = dos.structure.sites
        _check_site(site, len(sites))
        projections = np.array([_clip_negative_lobes(dos.get_site_dos(s).get_densities())[0] for s in sites])
        scaled, known = scale_sites_to_total(projections, total, energies=energies, e_max=top, min_coverage=0.0)
        values, kind = scaled[site], "site"
        steps = [*steps, f"site {site} of {dos.structure.formula}, sites scaled to add up to the total"]
    known[0] &= total[0] < GAP_DOS
    zero, reference = (dos.efermi, "fermi") if vbm is None else (vbm, "vbm")
    record = {"source": source, "steps": [*steps, f"zero of energy at {zero:.4f} eV ({reference})"]}
    return TargetDOS(energies - zero, values, known, reference, sigma, kind, record)


def _ase_table(rows: list[Any], sigma: float | None) -> tuple[Array, Array, float | None]:
    """Energies (G,), values (rows, G) and broadening of ASE's rows; raw rows are broadened onto a common grid."""
    from ase.spectrum.dosdata import GridDOSData

    if not rows:
        raise ValueError("this DOSCollection is empty: give one with at least one row")
    gridded = [isinstance(row, GridDOSData) for row in rows]
    if all(gridded):
        energies = rows[0].get_energies()
        if any(not np.array_equal(row.get_energies(), energies) for row in rows):
            raise ValueError("the rows of this DOSCollection have different energies: sample them on one grid")
        return energies, np.array([row.get_weights() for row in rows]), sigma
    if any(gridded):
        raise ValueError("this DOSCollection mixes raw and grid data: sample the raw ones first (sample_grid)")
    sigma = MODEL_SIGMA if sigma is None else sigma
    states = np.concatenate([row.get_energies() for row in rows])
    if not states.size or sigma <= 0:
        raise ValueError("raw DOS data need at least one state and sigma > 0 (eV)")
    # Known up to the highest state: bands above it may be missing. Below the lowest there is nothing to miss.
    lo, hi = states.min() - 5 * sigma, states.max()
    size = math.ceil((hi - lo) / (sigma / 4)) + 1
    table = [row.sample_grid(size, xmin=lo, xmax=hi, width=sigma).get_weights() for row in rows]
    return np.linspace(lo, hi, size), np.array(table), sigma


def _ase_select(rows: list[Any], table: Array, energies: Array, site: int | None) -> tuple[Array, Mask, str, list[str]]:
    """Values, known mask, kind and provenance of one site (or of the total) of a collection."""
    is_total = np.array([row.info.get("label", "").lower() == "total" for row in rows])
    known = np.ones(energies.shape, dtype=bool)
    if site is None:
        return table[is_total if is_total.any() else slice(None)].sum(axis=0), known, "total", []
    parts = [i for i in range(len(rows)) if not is_total[i]]
    indexed = all("index" in rows[i].info for i in parts)
    names = [str(rows[i].info["index"]) if indexed else str(number) for number, i in enumerate(parts)]
    if str(site) not in names:
        raise ValueError(f"site {site} does not exist: this DOSCollection has {', '.join(dict.fromkeys(names))}")
    order = list(dict.fromkeys(names))
    sites = np.array([sum(table[i] for i, n in zip(parts, names, strict=True) if n == name) for name in order])
    chosen = order.index(str(site))
    if not is_total.any():
        return sites[chosen], known, "site", [f"site {site}: raw projection, no total DOS to scale by"]
    scaled, known = scale_sites_to_total(sites, table[is_total].sum(axis=0), energies=energies, min_coverage=0.0)
    return scaled[chosen], known, "site", [f"site {site}, sites scaled to add up to the total"]


def _parse_text(content: bytes, name: str, columns: tuple[int, int] | None, kind: str) -> TargetDOS:
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{name} is neither vasprun.xml, JSON, .npz nor two-column text") from None
    rows: list[list[float]] = []
    for number, line in enumerate(lines, start=1):
        words = line.replace(",", " ").replace(";", " ").split()
        if not words or words[0][0] in "#!%@":
            continue
        try:
            row = [float(word) for word in words]
        except ValueError:
            if rows:
                raise ValueError(f"{name}, line {number}: expected numbers, found {line.strip()[:40]!r}") from None
            continue
        if columns is None and len(row) != 2:
            raise ValueError(f"{name}, line {number}: {len(row)} columns; keep two, or use from_text(columns=)")
        if len(row) <= max(columns or (1,)):
            raise ValueError(f"{name}, line {number}: only {len(row)} columns")
        rows.append([row[i] for i in columns or (0, 1)])
    if not rows:
        raise ValueError(f"{name} holds no numbers: expected two columns, energy (eV) and DOS (states/eV)")
    energies, values = np.array(rows).T
    values, note = _clip_negative_lobes(values)
    record = {"source": f"text {Path(name).name}", "steps": note}
    return _named(name, TargetDOS, energies, values, ~np.isnan(values), "fermi", None, kind, record)


def _parse_json(content: bytes, name: str, site: int | None) -> TargetDOS:
    try:
        data = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON ({error})") from None
    if "densities" in data:
        return _named(name, TargetDOS.from_pymatgen, data, site)
    if "failed" in data:
        raise ValueError(f"{name} tells of a calculation that failed: {data['failed']}")
    result = data.get("result", data)
    if isinstance(result, dict) and {"sites", "total"} <= set(result):  # what `dosmatgen dft` wrote
        if not isinstance(result["sites"], list):
            raise ValueError(f'{name}: "sites" must be a list with one DOS of each site')
        if site is not None:
            _check_site(site, len(result["sites"]))
        return _named(name, TargetDOS.from_dict, result["total"] if site is None else result["sites"][site])
    if site is not None:
        raise ValueError(f"{name} holds one DOS: leave out site")
    return _named(name, TargetDOS.from_dict, data)


def _parse_npz(content: bytes, name: str, site: int | None) -> TargetDOS:
    wanted = ("energies", "total", "pdos", "emax", "gap")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            energies, total, pdos, e_max, gap = (np.asarray(arrays[key], dtype=float) for key in wanted)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name} is not an .npz with {', '.join(wanted)} ({error})") from None
    # The layout is that of the label set, whose broadening is 0.1 eV.
    reference, sigma, record = "vbm" if gap > 0 else "fermi", 0.1, {"source": f"npz {Path(name).name}"}
    if site is None:
        return _named(name, TargetDOS, energies, total, energies <= e_max, reference, sigma, "total", record)
    _check_site(site, len(pdos))
    scaled, known = scale_sites_to_total(pdos.sum(axis=1), total, energies=energies, e_max=float(e_max))
    steps = {"steps": [f"site {site}, sites scaled to add up to the total"]}
    return _named(name, TargetDOS, energies, scaled[site], known, reference, sigma, "site", record | steps)


def _named(name: str, make: Any, *arguments: Any) -> TargetDOS:
    """Call a constructor so that its complaint names the file."""
    try:
        return make(*arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def _existing(path: str | PathLike[str]) -> Path:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {path}: give the path of a vasprun.xml, JSON, .npz or two-column text file")
    return file


def _read_bytes(path: str | PathLike[str]) -> bytes:
    content = _existing(path).read_bytes()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} is a damaged gzip file ({error}): copy it again") from None
    if not content.strip():
        raise ValueError(f"{path} is empty")
    return content


def _check_site(site: int, count: int) -> None:
    if isinstance(site, bool) or not isinstance(site, (int, np.integer)):
        raise TypeError(f"site must be an int, not {type(site).__name__}")
    if not 0 <= site < count:
        raise ValueError(f"site {site} does not exist: there are {count}, numbered from 0")


def _clip_negative_lobes(values: Array) -> tuple[Array, list[str]]:
    """Zero the negative lobes of Methfessel-Paxton smearing (at most 5 % of the area) and say so."""
    values = np.array(values, dtype=float)
    negative = values < 0
    if not negative.any() or -values[negative].sum() > 0.05 * values[values > 0].sum():
        return values, []
    note = f"negative values down to {values[negative].min():.2g} states/eV set to 0"
    values[negative] = 0.0
    return values, [note]


# -- small helpers -----------------------------------------------------------------------------------------------------


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    copy = np.array(array)
    copy.flags.writeable = False
    return copy


def _real_vector(data: ArrayLike, name: str) -> Array:
    try:
        array = np.asarray(data)
    except ValueError:
        raise ValueError(f"{name} must be one row of numbers, not a ragged list") from None
    if array.size and array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be real numbers, not {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape (G,), not {array.shape}")
    return array.astype(float)


def _inside(energies: Array, window: tuple[float, float]) -> Mask:
    # The slack keeps bins at the ends of the window, which rounding puts a hair outside.
    return (energies >= window[0] - 1e-9) & (energies <= window[1] + 1e-9)


def _cell_widths(energies: Array, lo: float = -math.inf, hi: float = math.inf) -> Array:
    """Width of each energy's share of [lo, hi], its borders half-way to the neighbours: trapezoidal weights."""
    borders = np.concatenate([energies[:1], 0.5 * (energies[1:] + energies[:-1]), energies[-1:]])
    return np.diff(np.clip(borders, lo, hi))
