"""Simple compounds of elements that few labels hold together, for DFT.

python scripts/draw_pairs.py --out pairs.extxyz
dosmatgen label pairs.extxyz --generated

Tight binding has parameters for every pair of elements, and a generated crystal may hold any pair. On binary metals of
val and test whose pair no training label holds, the predictor errs by a quarter more than on others. For each pair that
fewer than ``--fewer`` training labels hold, the cheapest crystals to compute are cubic ones without free positions:
CsCl, rocksalt, zincblende, and Cu3Au either way around, at the volume where CHGNet's energy is least. Of three
pairs in four (by a number made from seed and pair) the one of CsCl, rocksalt and zincblende that is lowest in energy is
taken, of the fourth the lower one of the two of Cu3Au, where an atom has none of its kind beside it. Known crystals are
passed over: their labels go by their own ids. A crystal is called pair-FORMULA-PROTOTYPE.
"""

from __future__ import annotations

import argparse
import itertools
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.data import chemical_symbols, covalent_radii
from ase.spacegroup import crystal
from tqdm import tqdm

from dosmatgen_ase.data import ORIGINS, SiteDOSLabels, load_site_dos
from dosmatgen_ase.files import write_extxyz
from dosmatgen_ase.judge.stability import chgnet_energies
from dosmatgen_ase.retrieval.index import default_index

ROOT = Path(__file__).parents[1]
SCALES = np.linspace(0.8, 1.3, 11)  # of the length at which two atoms touch by their covalent radii
NEAREST = {"cesiumchloride": 3**0.5 / 2, "rocksalt": 0.5, "zincblende": 3**0.5 / 4}  # distance of neighbours over a
DILUTED = 0.25  # share of pairs for which only Cu3Au counts


def training_pairs(labels: SiteDOSLabels) -> tuple[list[int], Counter[tuple[int, int]]]:
    """Elements of the training labels, and how many of these labels hold each pair."""
    sets = [sorted(set(labels.atoms(i).numbers.tolist())) for i in np.flatnonzero(labels.split == "train")]
    return sorted(set().union(*sets)), Counter(pair for one in sets for pair in itertools.combinations(one, 2))


def prototypes(a: str, b: str) -> dict[str, Atoms]:
    """Cubic crystals of two elements, nearest neighbours one Angstrom apart."""
    made = {name: bulk(a + b, name, a=1 / near) for name, near in NEAREST.items()}
    for one, other in ((a, b), (b, a)):  # an atom of the second among those of the first
        cell = [2**0.5] * 3 + [90] * 3
        made[f"Cu3Au-{one}3{other}"] = crystal((one, other), [(0, 0.5, 0.5), (0, 0, 0)], spacegroup=221, cellpar=cell)
    return made


def at_least_energy(start: Atoms) -> tuple[float, Atoms] | None:
    """Energy per atom by CHGNet and crystal at the best of `SCALES`, refined by a parabola; None at their ends."""
    touch = covalent_radii[start.numbers].max() + covalent_radii[start.numbers].min()

    def scaled(factor: float) -> Atoms:
        return Atoms(
            start.numbers, scaled_positions=start.get_scaled_positions(), cell=start.cell * touch * factor, pbc=True
        )

    energies = chgnet_energies([scaled(factor) for factor in SCALES])
    if not np.isfinite(energies).any():
        return None
    i = int(np.nanargmin(energies))
    if not 0 < i < len(SCALES) - 1 or not np.isfinite(energies[i - 1 : i + 2]).all():
        return None
    curve = np.polynomial.Polynomial.fit(SCALES[i - 1 : i + 2], energies[i - 1 : i + 2], 2)
    factor = float(curve.deriv().roots()[0].real)
    return float(curve(factor)), scaled(factor)


def simple_compound(pair: tuple[int, int], seed: int) -> Atoms | None:
    """The crystal for a pair, or None if every prototype is known or has no minimum."""
    a, b = (chemical_symbols[z] for z in pair)
    diluted = np.random.default_rng((seed, zlib.crc32(f"{a}{b}".encode()))).random() < DILUTED
    found = []
    for name, start in prototypes(a, b).items():
        best = at_least_energy(start) if name.startswith("Cu3Au") == diluted else None
        if best is not None and default_index().find(best[1]) is None:
            found.append((*best, name.split("-")[0]))
    if not found:
        return None
    _, atoms, prototype = min(found, key=lambda one: one[0])
    atoms.info = {"material_id": f"pair-{atoms.get_chemical_formula()}-{prototype}"}
    return atoms


def main(arguments: list[str] | None = None) -> None:
    """Make the crystals, those of the rarest pairs first."""
    parser = argparse.ArgumentParser(description="Simple compounds of elements that few labels hold together.")
    parser.add_argument("--fewer", type=int, default=3, help="pairs that fewer training labels hold")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labels", type=Path, default=ROOT / "data" / "site_dos", help="folder of shards")
    parser.add_argument("--out", type=Path, default=Path("pairs.extxyz"))
    options = parser.parse_args(arguments)
    elements, held = training_pairs(load_site_dos(options.labels, origins=ORIGINS))
    pairs = [pair for pair in itertools.combinations(elements, 2) if held[pair] < options.fewer]
    pairs.sort(key=lambda pair: held[pair])
    made = [atoms for pair in tqdm(pairs, unit="pair") if (atoms := simple_compound(pair, options.seed)) is not None]
    write_extxyz(options.out, made)
    print(f"{len(made)} crystals for {len(pairs)} pairs of {len(elements)} elements in {options.out}")


if __name__ == "__main__":
    main()
