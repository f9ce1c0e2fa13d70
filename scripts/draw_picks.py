"""Crystals that generator and ranking choose for the DOS of training labels, relaxed and made symmetric, for DFT.

python scripts/draw_picks.py --targets 150 --out picks.extxyz   # goes on where it was
dosmatgen label picks.extxyz --generated

A forward model must be right on the crystals that it is asked about, and those are generated. Targets are labels of the
split `train` alone, in an order that belongs to seed and id. The generator is shown the site DOS and their number; of
the candidates the one ranked best is relaxed with CHGNet, and the symmetry found within 0.1 A is made exact. Known
crystals are refused: those of the training set come out first otherwise, and have a label. A pick is called pick-ID,
with the target's id as its parent. Targets whose pick fails are passed over and counted.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from tqdm import tqdm

from dosmatgen_ase import DOSGenerator, relax
from dosmatgen_ase.data import SiteDOSLabels, load_site_dos
from dosmatgen_ase.data.coverage import UNLABELLED
from dosmatgen_ase.files import read_structures, write_extxyz
from dosmatgen_ase.generate.generator import RejectedError
from dosmatgen_ase.judge.relaxation import symmetrized
from dosmatgen_ase.retrieval.index import default_index

ROOT = Path(__file__).parents[1]


def target_rows(labels: SiteDOSLabels, max_atoms: int, seed: int) -> list[int]:
    """Training labels of two atoms or more, in the order of a number made from seed and id."""
    fits = np.flatnonzero((labels.split == "train") & (labels.num_atoms > 1) & (labels.num_atoms <= max_atoms))

    def drawn(row: int) -> float:
        name = str(labels.material_id[row]).encode()
        return float(np.random.default_rng((seed, zlib.crc32(name))).random())

    return sorted(fits.tolist(), key=drawn)


def pick(labels: SiteDOSLabels, row: int, generator: Any, candidates: int, seed: int) -> Atoms | str:
    """The crystal chosen for one label, or why there is none."""
    name = str(labels.material_id[row])
    own = zlib.crc32(f"{seed} {name}".encode())
    try:
        best = generator.generate(labels.targets(row), oversample=candidates, seed=own, new_only=True)
    except RejectedError as error:
        return str(error)
    if set(best.numbers.tolist()) & UNLABELLED.keys():
        return "it holds an element without labels"
    relaxed = relax(best)
    if not relaxed.info["relaxation"]["converged"]:
        return "its relaxation did not converge"
    try:
        made = symmetrized(relaxed)
    except ValueError as error:
        return str(error)
    if (twin := default_index().find(made)) is not None:
        return f"it relaxed into {twin}"
    made.calc = None
    made.set_constraint()
    made.info = {"material_id": f"pick-{name}", "parent": name, "dosmatgen": best.info["dosmatgen"]}
    return made


def picks(
    labels: SiteDOSLabels, rows: Sequence[int], generator: Any, options: argparse.Namespace
) -> Iterator[Atoms | str]:
    """One by one, for rows that have none yet."""
    for row in rows:
        yield pick(labels, row, generator, options.candidates, options.seed)


def main(arguments: list[str] | None = None) -> None:
    """Draw, rank, relax and keep picks until there are enough."""
    parser = argparse.ArgumentParser(description="Generated crystals for the DOS of training labels.")
    parser.add_argument("--targets", type=int, default=150, help="picks wanted in the file")
    parser.add_argument("--max-atoms", type=int, default=8, help="largest target: what DFT costs")
    parser.add_argument("--candidates", type=int, default=10, help="draws for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labels", type=Path, default=ROOT / "data" / "site_dos", help="folder of shards")
    parser.add_argument("--out", type=Path, default=Path("picks.extxyz"))
    options = parser.parse_args(arguments)
    if options.targets < 1 or options.candidates < 1:
        parser.error("--targets and --candidates must be at least 1")
    labels = load_site_dos(options.labels)
    made: list[Atoms] = list(read_structures(options.out)) if options.out.exists() else []
    if any("parent" not in atoms.info for atoms in made):
        parser.error(f"{options.out} holds other crystals than picks: name another file")
    done = {atoms.info["parent"] for atoms in made}
    rows = [i for i in target_rows(labels, options.max_atoms, options.seed) if str(labels.material_id[i]) not in done]
    failed: dict[str, str] = {}
    found = zip(rows, picks(labels, rows, DOSGenerator(), options), strict=True)
    with tqdm(total=options.targets, initial=len(made), unit="pick") as bar:
        while len(made) < options.targets and (next_one := next(found, None)) is not None:
            row, result = next_one
            if isinstance(result, str):
                failed[str(labels.material_id[row])] = result
            else:
                made.append(result)
                write_extxyz(options.out, made)
                bar.update()
    print(f"{len(made)} picks in {options.out}, {len(failed)} targets passed over")
    for name, reason in failed.items():
        print(f"  {name}: {reason}")


if __name__ == "__main__":
    main()
