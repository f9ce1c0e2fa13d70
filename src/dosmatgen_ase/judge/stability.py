"""Energy above the convex hull, with the atoms and the hull by the same potential (CHGNet 0.3.0).

The hull that ships (`references/hull.npz`) holds, for every composition among the near-stable structures of
`data/structures.parquet` and for every element, the lowest energy found by CHGNet; `scripts/build_hull.py` rebuilds it.
No energy of the Materials Project enters. The hull's energy at a composition is a linear programme over the entries
within its elements: the cheapest mixture that adds up to it.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from ase.formula import Formula
from numpy.typing import ArrayLike
from scipy.optimize import linprog
from tqdm import tqdm

from dosmatgen_ase.crystals.screening import screen_given
from dosmatgen_ase.files import write_npz
from dosmatgen_ase.forward.predictor import MAX_ATOMIC_NUMBER, chgnet_graph, load_chgnet
from dosmatgen_ase.judge.relaxation import quick_blas
from dosmatgen_ase.judge.relaxation import relax as relax_atoms

DEFAULT_HULL = Path(__file__).parents[1] / "references" / "hull.npz"


@dataclass(frozen=True, eq=False)
class Hull:
    """Compositions and their lowest energies.

    Attributes
    ----------
    name : (n,) str
        Identifier of the structure that has this energy, for example "mp-149".
    split : (n,) str
        "train", "val" or "test", as in `data/structures.parquet`; "element" for the references that are not in it.
    counts : (n, 95) uint8
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
        formulas = [Formula(atoms.get_chemical_formula()).reduce()[0].format("hill") for atoms in structures]
        energies = np.asarray(energy, dtype=float)
        order = np.lexsort((energies, formulas))
        kinds, first = np.unique(np.array(formulas)[order], return_index=True)
        rows = order[first]
        counts = np.zeros((len(rows), MAX_ATOMIC_NUMBER + 1), dtype=np.uint8)
        for i, formula in enumerate(kinds.tolist()):
            for symbol, count in Formula(formula).count().items():
                counts[i, chemical_symbols.index(symbol)] = count
        return cls(np.asarray(name)[rows], np.asarray(split)[rows], counts, energies[rows], np.asarray(relaxed)[rows])

    @classmethod
    def load(cls, path: str | Path = DEFAULT_HULL) -> Self:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such file, or it is none.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no hull at {path}: build one with scripts/build_hull.py")
        try:
            with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                counts = np.zeros((len(file["name"]), MAX_ATOMIC_NUMBER + 1), dtype=np.uint8)
                counts[file["row"], file["atomic_number"]] = file["count"]
                return cls(file["name"], file["split"], counts, file["energy"].astype(float), file["relaxed"])
        except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is not a hull: build one with scripts/build_hull.py ({error})") from error

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

    def without(self, rows: np.ndarray) -> Hull:
        """Return the hull without these entries (a boolean mask)."""
        keep = ~rows
        return Hull(self.name[keep], self.split[keep], self.counts[keep], self.energy[keep], self.relaxed[keep])

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
        wanted = np.bincount(np.asarray(numbers), minlength=self.counts.shape[1])
        elements = np.flatnonzero(wanted)
        held = self.counts > 0
        pure = np.isin(elements, np.nonzero(held[held.sum(1) == 1])[1])
        if not pure.all():
            missing = ", ".join(chemical_symbols[z] for z in elements[~pure])
            raise ValueError(f"the hull has no elemental {missing}: the energy above it is unknown")
        inside = self.counts[:, elements].sum(1) == self.counts.sum(1)
        counts = self.counts[np.ix_(inside, elements)].astype(float)
        fractions = counts / counts.sum(1, keepdims=True)
        result = linprog(self.energy[inside], A_eq=fractions.T, b_eq=wanted[elements] / wanted.sum(), method="highs")
        if result.status != 0:
            raise ValueError(f"no hull energy at {Atoms(numbers).get_chemical_formula()}: {result.message}")
        return float(result.fun)

    def above(self, numbers: ArrayLike, energy: float | None) -> float | None:
        """How far an energy lies above the hull, eV/atom; None if it is not finite or the hull lacks an element."""
        if energy is None or not math.isfinite(energy):
            return None
        try:
            return energy - self.energy_at(numbers)
        except ValueError:
            return None


@lru_cache(maxsize=1)
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
        describe (collapsed, with isolated atoms, not finite, not periodic, left-handed), or that broke down in `relax`.

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


def chgnet_energies(structures: Sequence[Atoms], batch_size: int = 16, progress: bool = False) -> np.ndarray:
    """CHGNet energies, shape (n,), eV/atom; NaN for what is screened out as `relax` does, and for isolated atoms."""
    energies = np.full(len(structures), np.nan)
    starts = range(0, len(structures), batch_size)
    for start in tqdm(starts, disable=not progress, unit="batch", desc="CHGNet energies"):
        graphs, rows = [], []
        for i in range(start, min(start + batch_size, len(structures))):
            if not screen_given(structures[i]).accepted:
                continue
            try:
                graphs.append(chgnet_graph(structures[i]))
                rows.append(i)
            except ValueError:
                continue
        if graphs:
            with torch.no_grad(), quick_blas():
                energies[rows] = load_chgnet()(graphs, task="e")["e"].numpy()
    return np.where(np.isfinite(energies), energies, np.nan)
