"""`DOSIndex`: known crystals with the DOS of their sites, in a few megabytes.

Sites of one crystal with the same element and the same DOS share a row. Rows are stored as the square root of the DOS
over that of its maximum, in 600 steps, as second differences along the energies, which the compression of the file
makes small: the DOS comes back with an error of 0.1 to 0.3 % (normalised L1).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from dosmatgen_ase.crystals.screening import KnownCrystals, reduced_formula
from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA, TargetDOS
from dosmatgen_ase.files import DAMAGE, read_npz, write_npz
from dosmatgen_ase.threads import once

DEFAULT_INDEX = Path(__file__).parents[1] / "references" / "dos_index.npz"
FORMAT_VERSION = 1
_FORM: dict[str, tuple[Any, int]] = {  # arrays of a file, in its order: type and number of axes
    "format": (str, 0), "info": (str, 0), "material_id": (str, 1), "cell": (np.float32, 3), "band_gap": (np.float32, 1),
    "energy_above_hull": (np.float32, 1),  # a bound of it holds to the last digit
    "gapped": (bool, 1), "sites": (np.uint16, 1), "frac_coords": (np.float32, 2), "atomic_numbers": (np.uint8, 1),
    "row_of_crystal": (np.uint16, 1), "rows": (np.uint16, 1), "code_low": (np.uint8, 2), "code_high": (np.uint8, 2),
    "scale": (np.float32, 1), "error": (np.float16, 1), "masks": (np.uint8, 2), "row_mask": (np.uint16, 1),
    "computed_mask": (np.uint16, 1),
}  # fmt: skip
LEVELS = 600  # steps between zero and the maximum of a row, in the square root
BLOCK = 4096  # crystals or rows at a time: bounds memory
GROUP = 4  # bins whose sums are looked at first


@dataclass(frozen=True, eq=False, kw_only=True)
class DOSIndex:
    """Known crystals and the DOS of their sites on `dos.MODEL_GRID` at sigma 0.2 eV.

    n crystals have s sites in all, r different ones, whose DOS are the rows. Build one with `build.build_index` or
    ``dosmatgen index``, read one with `load`.

    Attributes
    ----------
    material_id : (n,) str
    cell : (n, 3, 3) float32
        Rows are lattice vectors, Angstrom, right-handed.
    band_gap, energy_above_hull : (n,) float32
        eV and eV/atom; NaN where it is not known. Whose they are is told in `info`.
    gapped : (n,) bool
        Zero energy is the valence-band maximum, else the Fermi level.
    site_start : (n + 1,) int64
        Sites of crystal i are ``site_start[i]:site_start[i + 1]``.
    frac_coords : (s, 3) float32
    atomic_numbers : (s,) uint8
    site_row : (s,) int64
        Row of each site.
    row_start : (n + 1,) int64
        Rows of crystal i are ``row_start[i]:row_start[i + 1]``; there is at least one.
    values : (r, 151) float32
        states/eV; zero where nothing is known.
    error : (r,) float32
        Normalised L1 to be expected of what was predicted; NaN where there is no prediction.
    masks : (m, 151) bool
        Known bins, each pattern once.
    row_mask : (r,) int64
        Pattern of the bins that are known of a row.
    computed_mask : (n,) int64
        Pattern of the bins that were computed; the other known ones were predicted.
    info : dict
        How it was made.
    """

    material_id: np.ndarray
    cell: np.ndarray
    band_gap: np.ndarray
    energy_above_hull: np.ndarray
    gapped: np.ndarray
    site_start: np.ndarray
    frac_coords: np.ndarray
    atomic_numbers: np.ndarray
    site_row: np.ndarray
    row_start: np.ndarray
    values: np.ndarray
    error: np.ndarray
    masks: np.ndarray
    row_mask: np.ndarray
    computed_mask: np.ndarray
    info: dict[str, Any]

    def __len__(self) -> int:
        return len(self.material_id)

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a compressed npz, atomically; `load` reads it."""
        code, scale = _encode(self.values)
        low, high = _differences(code)
        given = vars(self) | {
            "format": json.dumps({"format": "dosmatgen_ase.DOSIndex", "version": FORMAT_VERSION}),
            "info": json.dumps(self.info),
            "sites": self.num_atoms,
            "row_of_crystal": self.site_row - np.repeat(self.row_start[:-1], self.num_atoms),
            "rows": np.diff(self.row_start),
            "code_low": low,
            "code_high": high,
            "scale": scale,
            "masks": np.packbits(self.masks, axis=1),
        }
        write_npz(Path(path), **{name: np.asarray(given[name], dtype) for name, (dtype, _) in _FORM.items()})

    @classmethod
    def load(cls, path: str | Path = DEFAULT_INDEX) -> Self:
        """Read what `save` wrote; by default the index that ships.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is damaged, none, or of a newer version.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no index at {path}: build one with dosmatgen index STRUCTURES -o {path}")
        try:
            data = read_npz(path, {name: (np.dtype(dtype).kind, axes) for name, (dtype, axes) in _FORM.items()})
            head = json.loads(str(data["format"]))
            if head["version"] > FORMAT_VERSION:
                raise ValueError(f"it has version {head['version']}, this package reads {FORMAT_VERSION}: upgrade it")
            index = cls(**_arrays(data))
            index._check()
        except DAMAGE as error:
            raise ValueError(f"{path} is not a readable index: make it by dosmatgen index ({error})") from error
        return index

    def _check(self) -> None:
        """Raise ValueError unless the arrays fit together."""
        n, sites, rows = len(self), len(self.atomic_numbers), len(self.values)
        lengths = {
            "cell": n, "band_gap": n, "energy_above_hull": n, "gapped": n, "computed_mask": n, "site_start": n + 1,
            "row_start": n + 1, "frac_coords": sites, "site_row": sites, "error": rows, "row_mask": rows,
        }  # fmt: skip
        wrong = [name for name, length in lengths.items() if len(getattr(self, name)) != length]
        if not wrong:
            patterns = max(self.row_mask.max(initial=0), self.computed_mask.max(initial=0))
            owner = np.repeat(np.arange(n), np.diff(self.site_start))
            inside = (self.site_row >= self.row_start[owner]) & (self.site_row < self.row_start[owner + 1])
            ends = (self.site_start[-1] == sites, self.row_start[-1] == rows, patterns < len(self.masks), inside.all())
            starts = (np.diff(self.site_start) > 0).all(), (np.diff(self.row_start) > 0).all()
            shapes = self.cell.shape[1:] == (3, 3), self.frac_coords.shape[1:] == (3,)
            grids = (self.values.shape[1:] == (MODEL_GRID.size,), self.masks.shape[1:] == (MODEL_GRID.size,))
            wrong = [] if all((n > 0, *ends, *starts, *shapes, *grids)) else ["sites and rows"]
        if not wrong:
            numbers = {"cell": self.cell, "frac_coords": self.frac_coords, "values": self.values}
            wrong = [name for name, values in numbers.items() if not np.isfinite(values).all()]
            known = (self.atomic_numbers >= 1) & (self.atomic_numbers < len(chemical_symbols))
            wrong += [] if known.all() else ["atomic_numbers"]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} do not fit the rest")

    # -- crystals ------------------------------------------------------------------------------------------------------

    @property
    def num_atoms(self) -> np.ndarray:
        """Atoms of each crystal's cell, shape (n,)."""
        return np.diff(self.site_start)

    @cached_property
    def counts(self) -> np.ndarray:
        """Atoms of each atomic number in each crystal, shape (n, 119), uint16."""
        place = np.repeat(np.arange(len(self)) * 119, self.num_atoms) + self.atomic_numbers
        counts = np.bincount(place, minlength=len(self) * 119).reshape(-1, 119)
        return counts.astype(np.uint16)  # no cell has more than MAX_GIVEN_ATOMS

    @cached_property
    def computed(self) -> np.ndarray:
        """Whether the DOS of a crystal was computed, at least in part, shape (n,)."""
        return np.asarray(self.masks.any(axis=1))[self.computed_mask]

    @cached_property
    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """DOS of each crystal's cell, (n, 151) float32, states/eV, and the bins known of all its sites."""
        values = np.empty((len(self), MODEL_GRID.size), dtype=np.float32)
        known = np.empty(values.shape, dtype=bool)
        for start in range(0, len(self), BLOCK):
            bounds = self.site_start[start : start + BLOCK + 1]
            rows = self.site_row[bounds[0] : bounds[-1]]
            first = bounds[:-1] - bounds[0]
            block = slice(start, start + len(first))
            np.add.reduceat(self.values[rows], first, axis=0, out=values[block])
            np.logical_and.reduceat(self.masks[self.row_mask[rows]], first, axis=0, out=known[block])
        return values, known

    @cached_property
    def grouped(self) -> np.ndarray:
        """Sums of the values over `GROUP` neighbouring bins, (r, 38) float32; the last group is of fewer."""
        return np.add.reduceat(self.values, np.arange(0, MODEL_GRID.size, GROUP), axis=1)

    def atoms(self, i: int) -> Atoms:
        """Crystal `i`, with its ``material_id`` in ``info``."""
        sites = slice(*self.site_start[i : i + 2])
        return Atoms(
            numbers=self.atomic_numbers[sites],
            scaled_positions=self.frac_coords[sites].astype(float),
            cell=self.cell[i].astype(float),
            pbc=True,
            info={"material_id": str(self.material_id[i])},
        )

    def site_dos(self, i: int) -> list[TargetDOS | None]:
        """DOS of each site of crystal `i`; None where nothing is known.

        ``provenance`` tells the source, "computed" or "predicted", and the energies of the bins that were predicted.
        """
        reference = "vbm" if self.gapped[i] else "fermi"
        computed = self.masks[self.computed_mask[i]]
        found: list[TargetDOS | None] = []
        for row in self.site_row[slice(*self.site_start[i : i + 2])].tolist():
            known = self.masks[self.row_mask[row]]
            if not known.any():
                found.append(None)
                continue
            told = {
                "source": "computed" if self.computed[i] else "predicted",
                "material_id": str(self.material_id[i]),
                "predicted_energies": MODEL_GRID.energies[known & ~computed].tolist(),
                "steps": [],
            }
            values = self.values[row].astype(float)
            found.append(TargetDOS(MODEL_GRID.energies, values, known, reference, MODEL_SIGMA, provenance=told))
        return found

    def find(self, atoms: Atoms) -> str | None:
        """``material_id`` of the first crystal that is the same by `screening.KnownCrystals`, None if there is none."""
        formula = reduced_formula(atoms)
        rows = self._of_formula.get(formula, [])
        if formula not in self._known:  # pymatgen reads those of the formulas asked for only
            self._known[formula] = KnownCrystals(map(self.atoms, rows))
        return self._known[formula].find(atoms)

    @cached_property
    def _of_formula(self) -> dict[tuple[tuple[int, int], ...], list[int]]:
        unit = np.gcd.reduce(self.counts.astype(np.int64), axis=1, keepdims=True)
        row, number = np.nonzero(self.counts)
        share = (self.counts[row, number] // unit[row, 0]).tolist()
        formulas: list[list[tuple[int, int]]] = [[] for _ in range(len(self))]
        for i, z, count in zip(row.tolist(), number.tolist(), share, strict=True):
            formulas[i].append((z, count))
        found: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for i, formula in enumerate(formulas):
            found.setdefault(tuple(formula), []).append(i)
        return found

    @cached_property
    def _known(self) -> dict[tuple[tuple[int, int], ...], KnownCrystals]:
        return {}


@once
def default_index() -> DOSIndex:
    """Return the index that ships with the package, read once per process."""
    return DOSIndex.load()


def of_formula(index: DOSIndex, counts: np.ndarray) -> np.ndarray:
    """Whether the reduced formula of a crystal is that of `counts`, atoms of each atomic number; shape (n,)."""
    return (index.counts * counts.sum() == counts * index.num_atoms[:, None]).all(axis=1)


# -- the form of the file ----------------------------------------------------------------------------------------------


def _arrays(data: dict[str, np.ndarray]) -> dict[str, Any]:
    """Fields of a `DOSIndex` from the arrays of its file."""
    site_start, row_start = (np.concatenate([[0], np.cumsum(data[name], dtype=np.int64)]) for name in ("sites", "rows"))
    kept = {field.name: data[field.name] for field in fields(DOSIndex) if field.name in data}
    return kept | {
        "info": json.loads(str(data["info"])),
        "energy_above_hull": data["energy_above_hull"].astype(np.float32),
        "site_start": site_start,
        "row_start": row_start,
        "site_row": np.repeat(row_start[:-1], data["sites"]) + data["row_of_crystal"],
        "values": _decode(_undo_differences(data["code_low"], data["code_high"]), data["scale"]),
        "error": data["error"].astype(np.float32),
        "masks": np.unpackbits(data["masks"], axis=1, count=MODEL_GRID.size).astype(bool),
        "row_mask": data["row_mask"].astype(np.int64),
        "computed_mask": data["computed_mask"].astype(np.int64),
    }


def _encode(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (r, G) from 0 to `LEVELS` and the maximum of each row: values are ``scale (code / LEVELS)^2``."""
    scale = values.max(axis=1, initial=0.0).astype(np.float32)
    shape = values / np.where(scale > 0, scale, 1.0)[:, None]
    return np.rint(LEVELS * np.sqrt(shape)).astype(np.int16), scale


def _decode(code: np.ndarray, scale: np.ndarray) -> np.ndarray:
    values = code.astype(np.float32)
    values *= np.sqrt(scale)[:, None] / np.float32(LEVELS)
    np.square(values, out=values)
    return values


def _differences(code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Second differences along a row, small numbers for a smooth DOS, as low and high bytes (r, G)."""
    change = np.diff(np.diff(code, axis=1, prepend=0), axis=1, prepend=0)
    folded = ((change << 1) ^ (change >> 15)).astype(np.uint16)  # 0, -1, 1, -2, ... as 0, 1, 2, 3, ...
    return (folded & 255).astype(np.uint8), (folded >> 8).astype(np.uint8)


def _undo_differences(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    folded = low.astype(np.uint16) | (high.astype(np.uint16) << 8)
    change = (folded >> 1).astype(np.int16) ^ -(folded & 1).astype(np.int16)
    np.cumsum(change, axis=1, out=change)
    return np.cumsum(change, axis=1, out=change)
