"""Energy above the convex hull, with the atoms and the hull by the same potential (CHGNet 0.3.0).

The hull that ships (`references/hull.npz`, made by `scripts/build_hull.py`) has 57,666 entries, one of each formula:
the lowest energy that CHGNet gives to its crystals. They are

- all near-stable crystals of at most 20 atoms in the cell, which `data/structures.parquet` holds, and each of the 89
  elements; most that lie near the hull are relaxed with CHGNet, the others stand in the geometry of the data;
- 3,455 further binaries of at most 20 atoms in the cell, as their data have them;
- of 68,875 crystals with 21 to 120 atoms in the cell, as their data have them, 46,013: 95 % of the formulas of two
  elements, 94 % of three, 80 % of four, half of those of more. None with a noble gas or an actinide;
- 948 textbook compounds in 23 prototypes, relaxed: BN, HfO2, SrF2 and some others are in no table.

So it may lack a compound of four or more elements with a large cell, and what the data lack: no energy below it is a
merit, "below the known hull" is all that it tells. An entry that is not
relaxed stands too high, by a median of 0.0025 eV/atom and seldom more than 0.02. No energy of the Materials Project
enters. The hull's energy at a composition is a linear programme over the entries within its elements: the cheapest
mixture that adds up to it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import ArrayLike
from scipy.optimize import linprog
from tqdm import tqdm

from dosmatgen_ase.crystals.screening import reduced_formula, right_handed, screen_given
from dosmatgen_ase.files import read_npz, write_npz
from dosmatgen_ase.forward.features import chgnet_graph, load_chgnet
from dosmatgen_ase.judge.relaxation import quick_blas
from dosmatgen_ase.judge.relaxation import relax as relax_atoms
from dosmatgen_ase.limits import MAX_ATOMIC_NUMBER
from dosmatgen_ase.threads import once

DEFAULT_HULL = Path(__file__).parents[1] / "references" / "hull.npz"
RESOLUTION = 0.01  # eV/atom: what a relaxation to 0.05 eV/A and an entry that is not relaxed leave open
_BATCH_ATOMS = 160  # of one pass of CHGNet: larger ones leave the cache of a CPU and take half as long again per atom


@dataclass(frozen=True, eq=False)
class Hull:
    """Compositions and their lowest energies.

    Attributes
    ----------
    name : (n,) str
        Identifier of the structure that has this energy, for example "mp-149".
    split : (n,) str
        "train", "val" or "test", as in `data/structures.parquet`; "element" for the references that are not in it.
    counts : (n, 95) uint16
        Atoms of each atomic number in the reduced formula.
    energy : (n,) float64
        eV/atom.
    relaxed : (n,) bool
        Whether the structure was relaxed with the potential; False: its energy in the geometry of the data.
    """

    name: np.ndarray
    split: np.ndarray
    counts: np.ndarray
    energy: np.ndarray
    relaxed: np.ndarray

    @classmethod
    def lowest(
        cls, structures: Sequence[Atoms], split: ArrayLike, energy: ArrayLike, relaxed: ArrayLike, name: ArrayLike
    ) -> Self:
        """Keep the lowest energy (eV/atom) of every reduced formula."""
        counts = np.zeros((len(structures), MAX_ATOMIC_NUMBER + 1), dtype=np.uint16)
        for i, atoms in enumerate(structures):
            for z, count in reduced_formula(atoms):
                counts[i, z] = count
        energies = np.asarray(energy, dtype=float)
        return cls(np.asarray(name), np.asarray(split), counts, energies, np.asarray(relaxed))._lowest_of_each()

    def joined(self, other: Hull) -> Hull:
        """Return the hull of the entries of both, the lower one where both have a formula."""
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return Hull(*(np.concatenate(pair) for pair in pairs))._lowest_of_each()

    def _lowest_of_each(self) -> Self:
        """Keep the lowest entry of each formula, in their order."""
        order = np.argsort(self.energy, kind="stable")
        return self.take(np.sort(order[np.unique(self.counts[order], axis=0, return_index=True)[1]]))

    @classmethod
    def load(cls, path: str | Path = DEFAULT_HULL) -> Self:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such file, or it is no hull.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no hull at {path}: build one with scripts/build_hull.py")
        kinds = {"name": ("U", 1), "split": ("U", 1), "energy": ("f", 1), "relaxed": ("b", 1)}
        kinds |= {"row": ("iu", 1), "atomic_number": ("iu", 1), "count": ("iu", 1)}
        try:
            data = read_npz(Path(path), kinds)
            row, number, n = data["row"].astype(np.int64), data["atomic_number"], len(data["name"])
            if len({len(row), len(number), len(data["count"])} | {-1}) > 2 or not np.isin(row, np.arange(n)).all():
                raise ValueError("row, atomic_number and count do not fit")
            if {len(data[key]) for key in ("split", "energy", "relaxed")} != {n}:
                raise ValueError("name, split, energy and relaxed do not fit")
            if not np.isfinite(data["energy"]).all():
                raise ValueError("an energy is not finite")
            if not ((number >= 1) & (number <= MAX_ATOMIC_NUMBER)).all():
                raise ValueError(f"atomic_number must lie in 1 to {MAX_ATOMIC_NUMBER}")
            counts = np.zeros((n, MAX_ATOMIC_NUMBER + 1), dtype=np.uint16)
            counts[row, number] = data["count"]
            if not counts.any(1).all():
                raise ValueError("an entry has no atoms")
        except ValueError as error:
            raise ValueError(f"{path} is not a hull: build one with scripts/build_hull.py ({error})") from error
        return cls(data["name"], data["split"], counts, data["energy"].astype(float), data["relaxed"])

    def save(self, path: str | Path) -> None:
        """Write an npz: name, split, energy, relaxed, and the counts as (row, atomic_number, count)."""
        row, number = np.nonzero(self.counts)
        write_npz(
            Path(path),
            name=self.name,
            split=self.split,
            energy=self.energy.astype(np.float32),
            relaxed=self.relaxed,
            row=row.astype(np.uint32),
            atomic_number=number.astype(np.uint8),
            count=self.counts[row, number],
        )

    def without(self, rows: np.ndarray) -> Self:
        """Return the hull without these entries (a boolean mask)."""
        return self.take(~rows)

    def take(self, rows: np.ndarray) -> Self:
        """Return the hull of these entries (a boolean mask, or their numbers)."""
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))

    @cached_property
    def _elements(self) -> np.ndarray:
        """Which elements each entry holds, packed into bits, (n, 12) uint8."""
        return np.packbits(self.counts > 0, axis=1)

    @cached_property
    def elements(self) -> frozenset[int]:
        """Atomic numbers that have an entry of their own."""
        held = self.counts > 0
        return frozenset(np.nonzero(held[held.sum(1) == 1])[1].tolist())

    def energy_at(self, numbers: ArrayLike) -> float:
        """Energy of the hull at a composition, eV/atom.

        Parameters
        ----------
        numbers : (n,) int
            Atomic numbers of the atoms of a cell.

        Raises
        ------
        ValueError
            If an element has no entry of its own.
        """
        if not ((given := np.asarray(numbers)) >= 0).all() or (given >= len(chemical_symbols)).any():
            raise ValueError("the structure holds what is no element: the energy above the hull is unknown")
        wanted = np.bincount(given, minlength=self.counts.shape[1])
        elements = np.flatnonzero(wanted)
        if missing := [chemical_symbols[z] for z in elements.tolist() if z not in self.elements]:
            raise ValueError(f"the hull has no elemental {', '.join(missing)}: the energy above it is unknown")
        inside = np.flatnonzero(~(self._elements & ~np.packbits(wanted > 0)).any(1))
        counts = self.counts[np.ix_(inside, elements)].astype(float)
        fractions = counts / counts.sum(1, keepdims=True)
        result = linprog(self.energy[inside], A_eq=fractions.T, b_eq=wanted[elements] / wanted.sum(), method="highs")
        if result.status != 0:
            raise ValueError(f"no hull energy at {Atoms(numbers).get_chemical_formula()}: {result.message}")
        return float(result.fun)

    def above_itself(self, rows: ArrayLike | None = None) -> np.ndarray:
        """How far entries (all, or those of `rows`) lie above the hull of all, eV/atom: 0 for the stable ones."""
        chosen = np.arange(len(self.name)) if rows is None else np.asarray(rows)
        sites = [np.repeat(np.arange(len(row)), row) for row in self.counts[chosen]]
        at_hull = [self.energy_at(numbers) for numbers in tqdm(sites, desc="hull", disable=len(sites) < 1000)]
        return self.energy[chosen] - np.array(at_hull)

    def above(self, numbers: ArrayLike, energy: float | None) -> float | None:
        """How far an energy lies above the hull, eV/atom; None if it is not finite or the hull lacks an element.

        Negative below the hull: it then lacks a phase, or the structure is a new one. See `in_words`.
        """
        if energy is None or not math.isfinite(energy):
            return None
        try:
            return energy - self.energy_at(numbers)
        except ValueError:
            return None


def in_words(above: float | None, decimals: int = 3) -> str:
    """Energy above a hull for a reader: "0.250", "-0.120, below the known hull", or nothing where it is unknown.

    Below a hull of known phases is no merit: the hull may lack a phase there. Up to `RESOLUTION` is the hull itself.
    """
    if above is None or not math.isfinite(above):
        return ""
    shown = f"{above:.{decimals}f}"
    if above < -RESOLUTION:
        return f"{shown}, below the known hull"
    return shown.removeprefix("-") if not float(shown) else shown


@once
def load_hull() -> Hull:
    """Return the hull that ships, read once."""
    return Hull.load()


def energy_above_hull(
    atoms: Atoms | Sequence[Atoms], *, relax: bool = False, hull: Hull | None = None, progress: bool = False
) -> float | np.ndarray:
    """Energy above the convex hull, eV/atom, atoms and hull by CHGNet 0.3.0.

    Parameters
    ----------
    atoms : Atoms or sequence of Atoms
        Their energy is computed in the geometry given, whatever calculator they carry.
    relax : bool
        Relax copies of the atoms before, as the entries of the hull were: `relaxation.relax` with its defaults.
    hull : Hull
        By default the one that ships.
    progress : bool
        Show a progress bar.

    Returns
    -------
    float, or array (n,) for a sequence
        Negative where the atoms lie below every mixture of known phases. NaN for a structure that the potential cannot
        describe (collapsed, with isolated atoms, not finite, not periodic), or that broke down in `relax`.

    Raises
    ------
    TypeError
        If something is not an Atoms.
    ValueError
        If a structure holds an element that the hull has not.
    """
    single = isinstance(atoms, Atoms)
    structures: list[Atoms] = [atoms] if single else list(atoms)
    for item in structures:
        if not isinstance(item, Atoms):
            raise TypeError(f"energy_above_hull takes ase.Atoms or a list of them, not {type(item).__name__}")
    hull = hull or load_hull()
    at_hull = np.array([hull.energy_at(item.numbers) for item in structures])
    if relax:
        relaxed: list[Atoms] = relax_atoms(structures, progress=progress)
        energies = np.array([item.info["relaxation"]["energy"] for item in relaxed], dtype=float)  # None becomes NaN
    else:
        energies = chgnet_energies(structures, progress=progress)
    above = energies - at_hull
    return float(above[0]) if single else above


def _batches(sizes: Sequence[int]) -> list[range]:
    """Neighbours in the list, of at most `_BATCH_ATOMS` atoms together or one alone."""
    starts: list[int] = []
    atoms = 0
    for i, size in enumerate(sizes):
        if not starts or atoms + size > _BATCH_ATOMS:
            starts.append(i)
            atoms = 0
        atoms += size
    return [range(start, end) for start, end in pairwise([*starts, len(sizes)])]


def chgnet_energies(structures: Sequence[Atoms], progress: bool = False) -> np.ndarray:
    """CHGNet energies, shape (n,), eV/atom; NaN for what is screened out as `relax` does, and for isolated atoms."""
    energies = np.full(len(structures), np.nan)
    batches = _batches([len(atoms) for atoms in structures])
    for batch in tqdm(batches, disable=not progress, unit="batch", desc="CHGNet energies"):
        graphs, rows = [], []
        for i in batch:
            atoms = right_handed(structures[i])
            if screen_given(atoms).accepted:
                with contextlib.suppress(ValueError):  # as for isolated atoms
                    graphs.append(chgnet_graph(atoms))
                    rows.append(i)
        if graphs:
            with torch.no_grad(), quick_blas():
                energies[rows] = load_chgnet()(graphs, task="e")["e"].numpy()
    return np.where(np.isfinite(energies), energies, np.nan)
