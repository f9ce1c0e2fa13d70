"""`TargetDOS`: a density of states with a known mask, its zero of energy, its broadening and where it came from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dosmatgen_ase.dos.broadening import resample
from dosmatgen_ase.dos.edges import gap_around_zero
from dosmatgen_ase.dos.grid import (
    MODEL_GRID,
    MODEL_SIGMA,
    Array,
    EnergyGrid,
    Mask,
    cell_widths,
    checked_curve,
    frozen,
    inside_window,
    real_vector,
)


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
        JSON-able record: ``{"source": ..., "steps": [...]}``, and ``"assumed"`` where a reader took for granted what
        the file did not say: a list of sentences. A string becomes the source.

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
        energies, values, known = checked_curve(self.energies, self.values, self.known)
        if self.reference not in ("fermi", "vbm"):
            fix = "move any other zero to one of these first: dos.shift(-fermi_level), --efermi for columns of text"
            raise ValueError(f'reference must be "fermi" or "vbm", not {self.reference!r}: {fix}')
        if self.kind not in ("site", "total"):
            raise ValueError(f'kind must be "site" or "total", not {self.kind!r}')
        sigma: Any = self.sigma
        is_number = isinstance(sigma, int | float | np.integer | np.floating) and not isinstance(sigma, bool)
        if sigma is not None and not (is_number and math.isfinite(sigma) and sigma >= 0):
            raise ValueError(f"sigma must be a finite standard deviation >= 0 in eV, or None if unknown, not {sigma!r}")
        set_field = object.__setattr__
        set_field(self, "energies", frozen(energies))
        # + 0.0 turns -0.0 into 0.0, so that equal targets have equal bytes.
        set_field(self, "values", frozen(np.where(known, values, 0.0) + 0.0))
        set_field(self, "known", frozen(known))
        set_field(self, "sigma", None if sigma is None else float(sigma))
        set_field(self, "provenance", _record(self.provenance))

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

    def in_words(self) -> str:
        """For a message: where the DOS is from, and the energies that are known."""
        inside, source = self.energies[self.known], self.provenance.get("source")
        place = f" of {source[:80]}" if isinstance(source, str) else ""
        return f"the DOS{place} (known from {inside[0]:.2f} to {inside[-1]:.2f} eV)"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict; `from_dict` is its inverse."""
        own = {name: data.tolist() if isinstance(data, np.ndarray) else data for name, data in vars(self).items()}
        return {"format": "dosmatgen_ase.TargetDOS", **own}

    def as_dict(self) -> dict[str, Any]:
        """`to_dict` in the form by which monty finds the class again: so jobflow carries a target between machines."""
        return {"@module": type(self).__module__, "@class": type(self).__name__, **self.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TargetDOS:
        """Inverse of `to_dict`. ``energies`` and ``values`` must be there, the other fields have their defaults.

        Raises
        ------
        ValueError
            If a field is missing or wrong, or there is one more, which might have told another zero of energy.
        """
        if not (isinstance(data, Mapping) and {"energies", "values"} <= set(data)):
            raise ValueError('this is not the dict of a TargetDOS: it needs "energies" and "values"')
        own = [field.name for field in fields(cls)]
        if unknown := sorted(str(k) for k in data if k not in (*own, "format") and not str(k).startswith("@")):
            raise ValueError(f"unknown fields {unknown} of a TargetDOS: it has {', '.join(own)}")
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
            if inside_window(self.energies[self.known], (grid.minimum, grid.maximum)).any():
                raise ValueError(
                    f"the known part of {self.in_words()} is too narrow for sigma {sigma:g} eV on a grid of step "
                    f"{grid.step:g} eV: widen the window, or state sigma if the DOS is already that broad"
                )
            raise ValueError(
                f"no known energy of {self.in_words()} falls on the grid [{grid.minimum:g}, {grid.maximum:g}] eV: "
                "is zero the Fermi level or the valence-band maximum? Move it (dos.shift; --efermi for columns of text)"
            )
        wider = max(sigma, self.sigma or 0.0)
        return self._changed(step, energies=grid.energies, values=values, known=known, sigma=wider)

    def window(self, lo: float, hi: float) -> TargetDOS:
        """The same DOS, known on [lo, hi] (eV) only.

        Raises
        ------
        ValueError
            If lo >= hi or nothing in the window is known.
        """
        known = self.known & inside_window(self.energies, (lo, hi))
        if not known.any():
            raise ValueError(f"the window [{lo:g}, {hi:g}] eV holds no known energy of {self.in_words()}")
        return self._changed(f"known on [{lo:g}, {hi:g}] eV only", known=known)

    @classmethod
    def sum_of(cls, sites: Sequence[TargetDOS]) -> TargetDOS:
        """Total DOS of a cell from the DOS of its sites on one grid, known where all of them are.

        Raises
        ------
        ValueError
            If there is none, one is None, or they differ in energies, reference or broadening.
        """
        if not sites:
            raise ValueError("a sum needs the DOS of at least one site")
        if unknown := [i for i, dos in enumerate(sites) if dos is None]:  # as `predict_dos` returns them
            raise ValueError(f"a sum needs the DOS of all sites, and that of {unknown} is unknown")
        first = sites[0]
        same = [np.array_equal(dos.energies, first.energies) for dos in sites]
        if not all(same) or len({(dos.reference, dos.sigma) for dos in sites}) > 1:
            raise ValueError("a sum needs the DOS of all sites on the same energies, with one reference and broadening")
        provenance = {"source": "sum over sites", "steps": []}
        values, known = np.sum([dos.values for dos in sites], axis=0), np.all([dos.known for dos in sites], axis=0)
        return replace(first, values=values, known=known, kind="total", provenance=provenance)

    def shift(self, energy: float) -> TargetDOS:
        """The same DOS with `energy` (eV) added to every energy."""
        return self._changed(f"shifted by {energy:g} eV", energies=self.energies + energy)

    def aligned(self, vbm: float | None = None) -> TargetDOS:
        """The same DOS with the zero of this package: a gap's lower end, the valence-band maximum, or the Fermi level.

        A code that puts the Fermi level somewhere into the gap, and calls it zero, gives a DOS of reference "fermi"
        that cannot be compared with one of reference "vbm". Here its zero is moved to the valence-band maximum. A
        metal, and a DOS of reference "vbm", is returned as it is.

        Parameters
        ----------
        vbm : float, optional
            The valence-band maximum (eV) on the present scale. By default the highest state below the gap in which zero
            lies; for the DOS of one site it is that site's, which may lie below the crystal's.

        Raises
        ------
        ValueError
            If it is not known at zero and so does not show whether there is a gap: give `vbm`, or set `reference`.
        """
        if vbm is None:
            if self.reference == "vbm":
                return self
            if not self.known[np.argmin(np.abs(self.energies))] or not self.energies[0] <= 0 <= self.energies[-1]:
                raise ValueError(
                    f"{self.in_words()} is not known at 0 eV, so its gap cannot be seen: "
                    "give aligned(vbm=...), or reference="
                )
            gap = gap_around_zero(self.energies, self.values, self.known, self.sigma)
            if gap is None:
                return self
            vbm = gap[0]
        if not math.isfinite(vbm):
            raise ValueError(f"vbm must be an energy in eV, not {vbm}")
        step = f"zero moved by {vbm:.3f} eV to the valence-band maximum"
        return self._changed(step, energies=self.energies - vbm, reference="vbm")

    def scaled(
        self, factor: float | None = None, *, electrons: float | None = None, lo: float = -math.inf, hi: float = 0.0
    ) -> TargetDOS:
        """The same DOS times a factor, or with a given number of states: for values in arbitrary units.

        Parameters
        ----------
        factor : float, optional
            ``2 * dos`` is the same as ``dos.scaled(2)``.
        electrons : float, optional
            Number of states that the known energies between `lo` and `hi` (eV) shall hold.

        Raises
        ------
        TypeError
            If not exactly one of `factor` and `electrons` is given.
        ValueError
            If it is not a finite number above 0, lo >= hi, or there are no states between `lo` and `hi`.
        """
        if (factor is None) == (electrons is None):
            raise TypeError("scaled() takes either a factor or electrons=")
        given = factor if electrons is None else electrons
        if isinstance(given, bool) or not isinstance(given, int | float | np.number):
            raise TypeError(f"a DOS is scaled by a number, not by {given!r}")
        if not (math.isfinite(given) and given > 0):
            raise ValueError(f"a DOS is scaled by a finite number above 0, not by {given}")
        if electrons is not None:
            states = self.total_states(lo, hi)
            if not states > 0:
                raise ValueError(
                    f"{self.in_words()} holds no states between {lo:g} and {hi:g} eV: choose other lo and hi"
                )
            factor = electrons / states
        values = self.values * float(factor)  # type: ignore[arg-type]
        return self._changed(f"values times {factor:.6g}", values=values)

    def __mul__(self, factor: float) -> TargetDOS:
        if isinstance(factor, bool) or not isinstance(factor, int | float | np.number):
            return NotImplemented
        return self.scaled(float(factor))

    __rmul__ = __mul__
    __array_ufunc__ = None  # so that numpy's numbers leave the product to this class

    def _changed(self, step: str, **changes: Any) -> TargetDOS:
        provenance = {**self.provenance, "steps": [*self.provenance.get("steps", []), step]}
        return replace(self, provenance=provenance, **changes)

    # -- figures -------------------------------------------------------------------------------------------------------

    def total_states(self, lo: float = -math.inf, hi: float = math.inf) -> float:
        """Number of states between lo < hi (eV): the integral over the known energies (trapezoidal)."""
        return float((cell_widths(self.energies, lo, hi) * self.values).sum())

    def band_centre(self, lo: float = -10.0, hi: float = 0.0) -> float:
        """First moment (eV) of the known DOS between lo < hi; NaN where it holds no states.

        On the d-projected DOS this is the d-band centre of Hammer and Noerskov (Surf. Sci. 343, 211, 1995).
        """
        weights = cell_widths(self.energies, lo, hi) * self.values
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
        energies = real_vector(energies, "energies")
        mask = np.ones(energies.shape, dtype=bool) if known is None else np.asarray(known)
        return cls(energies, real_vector(values, "values"), mask, reference, sigma, kind, {"source": "arrays"})

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
        from dosmatgen_ase.dos.readers.sketch import read_peaks

        return read_peaks(peaks, window, reference, kind)

    @classmethod
    def from_pymatgen(cls, dos: Any, site: int | None = None, sigma: float | None = None) -> TargetDOS:
        """Read a pymatgen ``Dos`` or ``CompleteDos``, or the dict of one.

        Spins are summed. The zero of energy becomes the Fermi level, or the valence-band maximum where the DOS has a
        gap of at least `MIN_GAP`. Energies above the last state are unknown: bands are missing there. So is the first
        energy unless it is empty, as VASP piles the states below its window there. A dict is read by hand: no class
        or module that it names is imported.

        Parameters
        ----------
        dos : pymatgen ``Dos``, ``CompleteDos`` or ``LobsterCompleteDos``, or the dict of one
        site : int, optional
            Site index in the structure: its projections, scaled at every energy so that all sites add up to the
            total (`scale_sites_to_total`). By default the total DOS of the cell.
        sigma : float, optional
            Standard deviation (eV) of its broadening, where it is known: the tail at the edge of a gap is taken off.

        Raises
        ------
        TypeError, ValueError
            If `dos` is something else, the site does not exist, or there are no projections.
        """
        from dosmatgen_ase.dos.readers.pymatgen import read_pymatgen

        return read_pymatgen(dos, site, sigma)

    @classmethod
    def from_vasprun(cls, path: str | PathLike[str], site: int | None = None) -> TargetDOS:
        """Read a ``vasprun.xml``, its last ionic step; projections need LORBIT = 11.

        As `from_pymatgen`, but the gap comes from the eigenvalues: there is one only if every k-point has as many
        bands below the Fermi level, spin by spin. Energies above the lowest maximum of the top band are unknown. The
        broadening is taken from ISMEAR and SIGMA: Gaussian smearing (ISMEAR = 0) has the standard deviation
        SIGMA / sqrt(2), the tetrahedron method has none. Where the density column has lost states, as of peaks
        narrower than its step, they come from the integrated column. `provenance` tells how many states lie below the
        Fermi level, and NELECT. Negative lobes of Methfessel-Paxton smearing are set to 0 and the rest scaled so that
        the number of states stays. The file may be packed with gzip, bzip2 or xz, whatever its name.

        Raises
        ------
        FileNotFoundError, ValueError
            If the file cannot be read, holds no DOS, or the site does not exist.
        """
        from dosmatgen_ase.dos.readers.common import Content, Request
        from dosmatgen_ase.dos.readers.vasp import read_vasprun

        return read_vasprun(Content.of(path), Request(site))

    @classmethod
    def from_ase(
        cls,
        dos: Any,
        site: int | None = None,
        *,
        sigma: float | None = None,
        efermi: float = 0.0,
        reference: str = "fermi",
        kind: str | None = None,
    ) -> TargetDOS:
        """Read ASE's ``GridDOSData``, ``RawDOSData``, a collection of them, or ``ase.dft.dos.DOS``.

        Parameters
        ----------
        dos : ase.spectrum.dosdata.DOSData, ase.spectrum.doscollection.DOSCollection or ase.dft.dos.DOS
        site : int, optional
            For a collection: the rows whose ``info["index"]`` is this number, summed; in a collection without indices,
            the row of this number. If there is a row labelled "Total" (or "TDOS", "sum"), sites are scaled so that they
            add up to it, otherwise the projection is taken as it is. By default the total: that row, or the sum of all.
        sigma : float, optional
            Standard deviation (eV), the width of ``ase.spectrum``: what grid data have (default unknown), raw data get
            (default `MODEL_SIGMA`). Not for ``ase.dft.dos.DOS``, which knows its own: ``width`` is ``sqrt(2) * sigma``.
        efermi : float
            Zero of energy (eV) on the scale of `dos`; ``ase.dft.dos.DOS`` has it at 0 already.
        reference : {"fermi", "vbm"}
            What that zero is.
        kind : {"site", "total"}, optional
            By default what a collection is asked for; a lone row is a site's unless it is labelled as a total.

        Raises
        ------
        TypeError, ValueError
            If `dos` is something else, the site does not exist, or the rows do not fit together.
        """
        from dosmatgen_ase.dos.readers.ase import read_ase

        return read_ase(dos, site, sigma=sigma, efermi=efermi, reference=reference, kind=kind)

    @classmethod
    def from_text(
        cls,
        path: str | PathLike[str],
        *,
        columns: Sequence[int | str] | None = None,
        kind: str | None = None,
        reference: str | None = None,
        spin: str | None = None,
        efermi: float | None = None,
        units: str | None = None,
        sigma: float | None = None,
    ) -> TargetDOS:
        """Read energies and values from columns of text or CSV.

        Known by their headers are the files of Quantum ESPRESSO (``.dos``, ``.pdos_tot``, ``.pdos_atm#``, whose other
        orbitals are added), ABINIT, FHI-aims, OptaDOS, VASPKIT, sumo and pyprocar. Of another file the reader takes
        what header and names of columns say (energies relative to the Fermi level or the valence-band maximum, units,
        spins, integrals); the rest is assumed: ``provenance["assumed"]`` lists it.

        Columns are separated by blanks, commas or semicolons; decimal commas and Fortran's exponents are understood.
        Lines that start with ``#``, ``!``, ``%``, ``@`` or ``&``, comments after the numbers, and lines of words before
        the first numbers are no rows. A value written as ``nan`` is unknown. Spins are added, also where down is drawn
        downwards, or stands in a second block, in a second row at each energy, or in the file beside this one.

        Parameters
        ----------
        path : path
        columns : sequence of int or str, optional
            Numbers (from 0) or names of the column of the energy and of those that add up to the DOS.
        kind : {"site", "total"}, optional
        reference : {"fermi", "vbm"}, optional
            What zero energy is in the file; with `efermi`, what that is.
        spin : {"summed", "one", "separate"}, optional
            The DOS holds both spins; or one of two that are alike, to be doubled; or both, in columns or rows of their
            own.
        efermi : float, optional
            Energy (eV) on the scale of the file that becomes zero.
        units : {"eV", "meV", "Ry", "Ha"}, optional
            Unit of the energies; the DOS is then in states per that unit.
        sigma : float, optional
            Broadening, as in the class.

        Raises
        ------
        FileNotFoundError, ValueError
            If the file cannot be read as such, or does not tell its zero; the message names the line, or the option.
        """
        from dosmatgen_ase.dos.readers.common import Content, Request
        from dosmatgen_ase.dos.readers.text import read_text

        return read_text(Content.of(path), Request(None, reference, sigma, kind, columns, spin, efermi, units))

    @classmethod
    def from_file(
        cls,
        path: str | PathLike[str],
        site: int | None = None,
        *,
        reference: str | None = None,
        sigma: float | None = None,
        kind: str | None = None,
        columns: Sequence[int | str] | None = None,
        spin: str | None = None,
        efermi: float | None = None,
        units: str | None = None,
    ) -> TargetDOS:
        """Read a file of any known form, told by its content.

        These are ``vasprun.xml``, ``DOSCAR`` of VASP and LOBSTER, ``.bands`` of CASTEP, ``.pdos`` of CP2K, ``PDOS`` of
        SIESTA and ABACUS, JSON, ``.npz`` and columns of text. JSON is `to_dict`, a pymatgen ``Dos``, ``CompleteDos`` or
        ``LobsterCompleteDos``, or what ``dosmatgen dft`` wrote; .npz holds ``energies``, ``total``, ``pdos`` (sites, l,
        G), ``emax`` and ``gap`` of one structure with Loewdin projections. A file may be packed with gzip, bzip2 or xz;
        one that unpacks to 1 GiB, or to 100 times its size and more than 32 MiB, is refused.

        Parameters
        ----------
        path : path
        site : int, optional
            Site index, where the file holds site projections; by default the total DOS.
        reference, sigma, kind : optional
            State what the file does not say. They replace what was read, with a `DOSWarning` if that was something
            else; nothing is shifted or broadened.
        columns, spin, efermi, units : optional
            For columns of text, as in `from_text`; `efermi` also for a ``PDOS`` without a Fermi level.

        Raises
        ------
        FileNotFoundError, ValueError
            If the file cannot be read or the site does not exist.
        """
        from dosmatgen_ase.dos.readers.common import Request
        from dosmatgen_ase.dos.readers.file import read_file

        return read_file(path, Request(site, reference, sigma, kind, columns, spin, efermi, units))


def _record(provenance: Any) -> dict[str, Any]:
    """A copy of a provenance that JSON can hold."""
    if not isinstance(provenance, (str, Mapping)):
        raise ValueError(f"provenance must be a dict or a string, not {type(provenance).__name__}")
    record = {"source": provenance} if isinstance(provenance, str) else dict(provenance)
    try:
        copy: dict[str, Any] = json.loads(json.dumps(record, allow_nan=False))
    except (TypeError, ValueError):
        raise ValueError("provenance must be JSON-able: strings, finite numbers, lists and dicts") from None
    return copy
