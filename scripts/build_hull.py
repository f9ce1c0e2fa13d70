"""Rebuild or enlarge the hull that `energy_above_hull` uses, all of it with CHGNet 0.3.0.

    python scripts/build_hull.py                  # from data/structures.parquet alone: hours of one core
    python scripts/build_hull.py --minutes 30     # goes on where it was, and writes the hull as far as it got
    python scripts/build_hull.py --onto src/dosmatgen_ase/references/hull.npz --structures LARGE.parquet --minutes 0

    python scripts/build_hull.py --onto src/dosmatgen_ase/references/hull.npz --structures --prototypes

The hull that ships was made by the first command, enlarged by the third, with a table of cells of 21 to 120 atoms
(the same columns, from the same source), and by the last, as these tables lack some well-known compounds.

1. The energy of every crystal of the tables as it stands, and of a reference crystal for each element that they lack.
2. Those within `--margin` of the hull of these energies are relaxed with the defaults of `dosmatgen_ase.relax`.
3. The lowest energy of every formula is written, as far as it lies within `--keep` of the hull. A hull from nothing is
   written if step 1 is complete, else it would lack formulas; with `--onto`, what is known by then comes to the entries
   of that hull.

Both steps begin where an energy is cheap and bounds most: see `priority`. The energies on the way are kept in
`--cache`, where `benchmarks/stability.py` adds its own: "relaxed" is None where the relaxation did not converge, for
both.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy are loaded

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from ase import Atoms
from ase.build import bulk
from ase.data import chemical_symbols
from prototypes import prototypes
from tqdm import tqdm

from dosmatgen_ase.crystals.screening import digest, reduced_formula, right_handed
from dosmatgen_ase.files import read_records
from dosmatgen_ase.judge.relaxation import relax_each
from dosmatgen_ase.judge.stability import DEFAULT_HULL, Hull, chgnet_energies

ROOT = Path(__file__).parents[1]
CHUNK = 32
RARE = {2, 10, 18, 36, 54, 86, *range(89, 95)}  # noble gases and actinides: little asked for, so they come last
MOSTLY_MEASURED = 700_000  # numbers of the Materials Project below this are mostly of crystals that were made


def read_crystals(path: Path) -> list[Atoms]:
    """Read a table laid out as `data/structures.parquet`, of cells of any size; id and split stand in ``info``."""
    table = pq.read_table(path, columns=["material_id", "split", "cell", "atomic_numbers", "frac_coords"])
    cells, numbers, frac_coords = (
        pc.list_flatten(table[name]).to_numpy() for name in ("cell", "atomic_numbers", "frac_coords")
    )
    ends = np.cumsum(pc.list_value_length(table["atomic_numbers"]).to_numpy())[:-1]
    crystals = []
    for name, split, cell, z, frac in zip(
        table["material_id"].to_pylist(),
        table["split"].to_pylist(),
        cells.reshape(-1, 3, 3),
        np.split(numbers, ends),
        np.split(frac_coords.reshape(-1, 3), ends),
        strict=True,
    ):
        info = {"material_id": name, "split": split}
        crystals.append(right_handed(Atoms(numbers=z, scaled_positions=frac, cell=cell, pbc=True, info=info)))
    return crystals


def element_references(missing: Iterable[int]) -> list[Atoms]:
    """Crystals of these elements: ASE's reference states, and molecules on a hexagonal lattice for hydrogen.

    Raises
    ------
    SystemExit
        For an element of which ASE builds none, such as nitrogen.
    """
    found = []
    for z in missing:
        symbol = chemical_symbols[z]
        if symbol == "H":
            a, c, half = 3.77, 6.16, 0.37  # solid hydrogen at zero pressure, Angstrom
            sites = [(1 / 3, 2 / 3, 0.25), (2 / 3, 1 / 3, 0.75)]
            frac_coords = [(x, y, z + sign * half / c) for x, y, z in sites for sign in (-1, 1)]
            atoms = Atoms("H4", scaled_positions=frac_coords, cell=[a, a, c, 90, 90, 120], pbc=True)
        else:
            try:
                atoms = bulk(symbol)
            except ValueError:
                told = f"the structures hold {symbol}, but no crystal of it alone, and ASE builds none"
                raise SystemExit(f"{told}: add one to the structures, or build --onto a hull that has it") from None
        atoms.info = {"material_id": f"reference-{symbol}", "split": "element"}
        found.append(atoms)
    return found


def priority(crystals: Sequence[Atoms]) -> list[int]:
    """Order in which energies are computed: what is cheap, and likely to lie on the hull of many systems, first.

    Elements and binaries come before all else, rare elements last. Among the others small cells come first; the size
    counts more if there are many elements, if a smaller crystal has the formula, or if it was probably never made.
    """
    seen: set[tuple[tuple[int, int], ...]] = set()
    cost = np.zeros((len(crystals), 3))
    for i in sorted(range(len(crystals)), key=lambda i: len(crystals[i])):
        formula = reduced_formula(crystals[i])
        elements = {z for z, _ in formula}
        number = crystals[i].info["material_id"].rpartition("-")[2]
        weight = 1.0 + 0.4 * (len(elements) - 3)
        weight *= 2.5 if formula in seen else 1.0
        weight *= 1.0 if number.isdigit() and int(number) < MOSTLY_MEASURED else 2.0
        seen.add(formula)
        small = min(len(elements), 3)
        cost[i] = bool(elements & RARE), small, len(crystals[i]) * (weight if small == 3 else 1.0)
    return np.lexsort(cost.T[::-1]).tolist()


def name_of(atoms: Atoms) -> str:
    """Its id."""
    return str(atoms.info["material_id"])


def key_of(atoms: Atoms) -> str:
    """Under which its energies are kept: tables may give one id to unlike crystals."""
    return f"{name_of(atoms)}-{digest(atoms)[:12]}"


@dataclass(frozen=True)
class Energies:
    """What is known of the crystals that are no entries of `base`, and a file that is told what is found.

    Attributes
    ----------
    crystals : list of Atoms
    base : Hull, optional
        The hull that they come to.
    known : dict
        By `key_of` a crystal: its energy as it stands ("static") and relaxed, eV/atom, or None where there is none.
    file : text file
        Open at its end.
    """

    crystals: list[Atoms]
    base: Hull | None
    known: dict[str, dict[str, float | None]]
    file: TextIO

    def of(self, i: int) -> dict[str, float | None]:
        """What is known of one crystal."""
        return self.known.get(key_of(self.crystals[i]), {})

    def keep(self, i: int, kind: str, energy: float | None) -> None:
        """Note an energy, or that there is none."""
        name = key_of(self.crystals[i])
        energy = None if energy is None or not np.isfinite(energy) else round(float(energy), 6)
        self.known.setdefault(name, {})[kind] = energy
        self.file.write(json.dumps({"id": name, kind: energy}) + "\n")

    def complete(self) -> bool:
        """Whether every crystal was asked for its energy as it stands."""
        return all("static" in self.of(i) for i in range(len(self.crystals)))

    def hull(self) -> Hull:
        """The lowest energies that are known by now."""
        both = np.array(
            [[self.of(i).get(kind) for kind in ("static", "relaxed")] for i in range(len(self.crystals))], dtype=float
        )
        static, after = both.reshape(-1, 2).T
        relaxed = np.isfinite(after)
        energy = np.where(relaxed, after, static)
        rows = np.flatnonzero(np.isfinite(energy))
        found = [self.crystals[i] for i in rows]
        split = [atoms.info["split"] for atoms in found]
        made = Hull.lowest(found, split, energy[rows], relaxed[rows], [name_of(atoms) for atoms in found])
        return made if self.base is None else self.base.joined(made)


def crystals_of(options: argparse.Namespace, base: Hull | None) -> list[Atoms]:
    """Crystals of the tables that are no entries of the hull, and references of the elements that both lack.

    Raises
    ------
    SystemExit
        If an id stands for two crystals, or in the hull for another formula; as `element_references`.
    """
    given = [atoms for path in options.structures for atoms in read_crystals(path)]
    given += prototypes() if options.prototypes else []
    named = {name_of(atoms): atoms for atoms in given}
    rows = [] if base is None else zip(base.name.tolist(), base.counts, strict=True)
    held = {name: {int(z): int(counts[z]) for z in np.flatnonzero(counts)} for name, counts in rows}
    for atoms in given:
        name = name_of(atoms)
        if key_of(atoms) != key_of(named[name]):
            raise SystemExit(f"two crystals have the id {name}: give each an id of its own")
        if name in held and held[name] != dict(reduced_formula(atoms)):
            raise SystemExit(f"{name} is another formula in {options.onto}: give it another id")
    crystals = [atoms for name, atoms in named.items() if name not in held]
    present = {z for atoms in crystals for z in atoms.numbers.tolist()}
    own = {int(atoms.numbers[0]) for atoms in crystals if len(set(atoms.numbers)) == 1}
    own |= set() if base is None else base.elements
    return crystals + element_references(sorted(present - own))


def compute_as_they_stand(energies: Energies, order: Sequence[int], minutes: float) -> None:
    """Step 1, until it is complete or the time is over."""
    end = time.monotonic() + 60 * minutes
    todo = [i for i in order if "static" not in energies.of(i)]
    for start in tqdm(range(0, len(todo), CHUNK), desc="energies", unit="chunk"):
        if time.monotonic() > end:
            return
        rows = todo[start : start + CHUNK]
        for i, energy in zip(rows, chgnet_energies([energies.crystals[i] for i in rows]), strict=True):
            energies.keep(i, "static", energy)
        energies.file.flush()


def relax_near_hull(energies: Energies, order: Sequence[int], options: argparse.Namespace) -> None:
    """Step 2, until it is complete or the time is over."""
    crystals, bound = energies.crystals, energies.hull()
    end = time.monotonic() + 60 * options.minutes

    def near(i: int) -> bool:
        above = bound.above(crystals[i].numbers, energies.of(i)["static"])
        # The cell of a prototype is a guess.
        return above is not None and (above <= options.margin or crystals[i].info["split"] == "prototype")

    todo = [i for i in order if to_relax(energies.of(i))]
    for start in tqdm(range(0, len(todo), CHUNK), desc="relaxations", unit="chunk"):
        if time.monotonic() > end:
            return
        rows = [i for i in todo[start : start + CHUNK] if near(i)]
        finished = relax_each([crystals[i] for i in rows], processes=options.processes)
        for i, atoms in zip(rows, finished, strict=True):
            report = atoms.info["relaxation"]
            energies.keep(i, "relaxed", report["energy"] if report["converged"] else None)
            energies.file.flush()
            if time.monotonic() > end:
                return


def write(energies: Energies, out: Path, keep: float) -> None:
    """Step 3: the hull, without what is new and lies further above it than `keep`, eV/atom."""
    made = energies.hull()
    if math.isfinite(keep):
        held = [] if energies.base is None else energies.base.name.tolist()
        new = np.flatnonzero(~np.isin(made.name, held))
        made = made.without(np.isin(np.arange(len(made.name)), new[made.above_itself(new) > keep]))
    made.save(out)
    print(f"{out}: {len(made.name)} formulas, {made.relaxed.sum()} of them relaxed")


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Rebuild or enlarge the CHGNet hull; resumable.")
    parser.add_argument("--structures", type=Path, nargs="*", default=[ROOT / "data" / "structures.parquet"])
    parser.add_argument("--prototypes", action="store_true", help="textbook compounds as well (prototypes.py)")
    parser.add_argument("--onto", type=Path, help="a hull whose entries are taken as they are; the result holds them")
    parser.add_argument("--cache", type=Path, default=ROOT / "data" / "cache" / "hull.jsonl")
    parser.add_argument("--out", type=Path, default=DEFAULT_HULL)
    parser.add_argument("--margin", type=float, default=0.03, help="relax what lies this close, eV/atom (default 0.03)")
    parser.add_argument("--keep", type=float, default=math.inf, help="write what is this close, eV/atom (default: all)")
    parser.add_argument("--energy-minutes", type=float, default=float("inf"), help="step 1 no longer than this")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="step 2 no longer than this")
    parser.add_argument("--processes", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Find what is missing, and write the hull."""
    options = options_of(arguments)
    torch.set_num_threads(1)
    base = None if options.onto is None else Hull.load(options.onto)
    crystals = crystals_of(options, base)
    order = priority(crystals)
    options.cache.parent.mkdir(parents=True, exist_ok=True)
    known = read_records(options.cache)
    with options.cache.open("a") as file:
        file.write("\n")  # after a torn line
        energies = Energies(crystals, base, known, file)
        try:
            compute_as_they_stand(energies, order, options.energy_minutes)
            relax_near_hull(energies, order, options)
        except KeyboardInterrupt:
            print("stopped: the same command goes on from here")
        finally:
            if base is not None or energies.complete():  # else it would lack formulas
                write(energies, options.out, options.keep)


def to_relax(record: dict[str, float | None]) -> bool:
    """Whether a crystal has an energy and was not relaxed yet."""
    return record.get("static") is not None and "relaxed" not in record


if __name__ == "__main__":
    main()
