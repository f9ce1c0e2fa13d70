"""Rebuild the hull that `energy_above_hull` uses, from `data/structures.parquet`, all of it with CHGNet 0.3.0.

    python scripts/build_hull.py                  # hours of CPU time on one core; every energy found is kept
    python scripts/build_hull.py --minutes 30     # goes on where it was, and writes the hull as far as it got

1. The energy of every near-stable structure as it stands, and of a reference crystal for each element that they lack.
2. Those within `--margin` of the hull of these energies are relaxed with the defaults of `dosmatgen_ase.relax`:
   elements first, then small cells before large ones, as these are the cheapest and bound the hulls of many systems.
3. The lowest energy of every formula is written, if step 1 is complete. The energies on the way are kept in
   `data/cache/hull.jsonl`, where `benchmarks/stability.py` adds its own: "relaxed" is None where the relaxation did not
   converge, for both.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy are loaded

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.data import chemical_symbols
from tqdm import tqdm

from dosmatgen_ase.data import load_structures
from dosmatgen_ase.files import read_records
from dosmatgen_ase.judge.relaxation import relax_each
from dosmatgen_ase.judge.stability import DEFAULT_HULL, Hull, chgnet_energies

ROOT = Path(__file__).parents[1]
CHUNK = 256


def element_references(missing: Iterable[int]) -> list[Atoms]:
    """Crystals of these elements: ASE's reference states, and molecules on a hexagonal lattice for hydrogen."""
    found = []
    for z in missing:
        symbol = chemical_symbols[z]
        if symbol == "H":
            a, c, half = 3.77, 6.16, 0.37  # solid hydrogen at zero pressure, Angstrom
            sites = [(1 / 3, 2 / 3, 0.25), (2 / 3, 1 / 3, 0.75)]
            frac_coords = [(x, y, z + sign * half / c) for x, y, z in sites for sign in (-1, 1)]
            atoms = Atoms("H4", scaled_positions=frac_coords, cell=[a, a, c, 90, 90, 120], pbc=True)
        else:
            atoms = bulk(symbol)
        atoms.info = {"material_id": f"reference-{symbol}"}
        found.append(atoms)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Find what is missing, and write the hull."""
    parser = argparse.ArgumentParser(description="Rebuild the CHGNet hull; resumable.")
    parser.add_argument("--structures", type=Path, default=ROOT / "data" / "structures.parquet")
    parser.add_argument("--cache", type=Path, default=ROOT / "data" / "cache" / "hull.jsonl")
    parser.add_argument("--out", type=Path, default=DEFAULT_HULL)
    parser.add_argument("--margin", type=float, default=0.03, help="relax what lies this close, eV/atom (default 0.03)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="relax no longer than this")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    data = load_structures(options.structures)
    crystals = [data.atoms(i) for i in range(len(data))]
    present = set(data.atomic_numbers[data.atomic_numbers > 0].tolist())
    own = {int(atoms.numbers[0]) for atoms in crystals if len(set(atoms.numbers)) == 1}
    references = element_references(sorted(present - own))
    crystals += references
    split = np.array([*data.split.tolist(), *["element"] * len(references)])
    name = [str(atoms.info["material_id"]) for atoms in crystals]

    options.cache.parent.mkdir(parents=True, exist_ok=True)
    known = read_records(options.cache)
    order = sorted(range(len(crystals)), key=lambda i: (len(set(crystals[i].numbers)) > 1, len(crystals[i])))
    with options.cache.open("a") as cache:

        def keep(i: int, kind: str, energy: float | None) -> None:
            energy = None if energy is None or not np.isfinite(energy) else round(float(energy), 6)
            known.setdefault(name[i], {})[kind] = energy
            cache.write(json.dumps({"id": name[i], kind: energy}) + "\n")

        def hull() -> Hull:
            both = np.array([[known.get(n, {}).get(k) for k in ("static", "relaxed")] for n in name], dtype=float)
            static, after = both.T
            relaxed = np.isfinite(after)
            energy = np.where(relaxed, after, static)
            rows = np.flatnonzero(np.isfinite(energy))
            named = np.array(name)[rows]
            return Hull.lowest([crystals[i] for i in rows], split[rows], energy[rows], relaxed[rows], named)

        cache.write("\n")  # after a torn line
        try:
            todo = [i for i in order if "static" not in known.get(name[i], {})]
            for start in tqdm(range(0, len(todo), CHUNK), desc="energies", unit="chunk"):
                rows = todo[start : start + CHUNK]
                for i, energy in zip(rows, chgnet_energies([crystals[i] for i in rows]), strict=True):
                    keep(i, "static", energy)
                cache.flush()

            bound, end = hull(), time.monotonic() + 60 * options.minutes
            todo = [i for i in order if "relaxed" not in known[name[i]] and known[name[i]]["static"] is not None]
            for start in tqdm(range(0, len(todo), CHUNK), desc="relaxations", unit="chunk"):
                chunk = todo[start : start + CHUNK]
                low = [known[name[i]]["static"] - bound.energy_at(crystals[i].numbers) <= options.margin for i in chunk]
                rows = [i for i, below in zip(chunk, low, strict=True) if below]
                finished = relax_each([crystals[i] for i in rows], processes=options.processes)
                for i, atoms in zip(rows, finished, strict=True):
                    report = atoms.info["relaxation"]
                    keep(i, "relaxed", report["energy"] if report["converged"] else None)
                    cache.flush()
                    if time.monotonic() > end:
                        return
        except KeyboardInterrupt:
            print("stopped: the same command goes on from here")
        finally:
            if all("static" in known.get(n, {}) for n in name):  # else it would lack formulas
                made = hull()
                made.save(options.out)
                print(f"{options.out}: {len(made.name)} formulas, {made.relaxed.sum()} of them relaxed")


if __name__ == "__main__":
    main()
