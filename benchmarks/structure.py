"""Geometry of the raw output: its CHGNet energy above the true structure, and how often it is the true structure.

    python benchmarks/structure.py            # the table of the README, on `test`
    python benchmarks/structure.py --val --num-steps 50 --coords-annealing 5     # tuning, on `val`

Held-out near-stable structures of `data/structures.parquet`; the species of every site are pinned, no DOS is given, one
first draw per structure from pure noise, neither screened nor redrawn nor relaxed. A draw that the screen rejects or
that CHGNet cannot read counts as infinitely high in energy and as no match. The rows "cell given" hold the true cell:
they show where quality is lost, and are not generation.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy are loaded

import numpy as np
import torch
from _common import ROOT, add_options, add_split, chgnet_energies, results_folder, sampler_config, split_of
from _draws import draw
from _tables import write_results
from _targets import rng_for
from ase import Atoms
from tqdm import tqdm

from dosmatgen_ase.crystals.batch import CrystalBatch
from dosmatgen_ase.crystals.screening import digest, screen
from dosmatgen_ase.data import Structures, load_structures
from dosmatgen_ase.files import write_atomic
from dosmatgen_ase.generate.constraints import Constraints
from dosmatgen_ase.generate.generator import BATCH_PAIRS
from dosmatgen_ase.generate.sampler import SamplerConfig
from dosmatgen_ase.judge.metrics import QUARTILES, bootstrap_interval, match_rms, median, quantile
from dosmatgen_ase.model.checkpoint import load_model
from dosmatgen_ase.model.conditioning import ConditionalDenoiser

SIZE_CLASSES = [(1, 8), (9, 12), (13, 16), (17, 20)]
BAR = {"energy_median": 0.25, "match_rate": 0.40}


def choose(structures: Structures, low: int, high: int, count: int, seed: int) -> list[Atoms]:
    """At most ``count`` random structures of ``low`` to ``high`` atoms."""
    rows = np.flatnonzero((structures.num_atoms >= low) & (structures.num_atoms <= high))
    rng = np.random.default_rng((seed, low))
    return [structures.atoms(i) for i in rng.permutation(rows)[:count].tolist()]


def draw_like(
    model: ConditionalDenoiser, truths: list[Atoms], config: SamplerConfig, seed: int, *, cell_given: bool
) -> list[Atoms]:
    """One first draw with the species of each structure, in the same order; with ``cell_given`` also its cell."""
    made: dict[int, Atoms] = {}
    for size in sorted({len(a) for a in truths}):
        rows = [i for i, a in enumerate(truths) if len(a) == size]
        room = max(1, BATCH_PAIRS // size**2)
        for start in range(0, len(rows), room):
            chunk = rows[start : start + room]
            truth = CrystalBatch.from_atoms([truths[i] for i in chunk])
            free = Constraints.none(truth.num_atoms)
            known = replace(free.start, atomic_numbers=truth.atomic_numbers)
            if cell_given:
                known = replace(known, cell=truth.cell)
            pins = replace(
                free, start=known, fixed_species=truth.mask, fixed_cell=torch.full_like(free.fixed_cell, cell_given)
            )
            rngs = [rng_for(seed, truths[i].info["material_id"]) for i in chunk]
            made.update(zip(chunk, draw(model, pins, None, rngs, config), strict=True))
    return [made[i] for i in range(len(truths))]


def true_energies(truths: list[Atoms], cache: Path) -> np.ndarray:
    """CHGNet energies (eV/atom) of the true structures, kept in a file from run to run."""
    known: dict[str, float] = json.loads(cache.read_text()) if cache.exists() else {}
    named = {digest(atoms): atoms for atoms in truths}
    missing = {name: atoms for name, atoms in named.items() if name not in known}
    if missing:
        known.update(zip(missing, chgnet_energies(list(missing.values())).tolist(), strict=True))
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cache, json.dumps(known).encode())
    return np.array([known[digest(atoms)] for atoms in truths])


def measure(made: list[Atoms], truths: list[Atoms], reference: np.ndarray) -> dict[str, Any]:
    """Figures of one row of the table.

    Raises
    ------
    ValueError
        If a true structure has no energy: whatever were drawn would count as infinitely low.
    """
    if not np.isfinite(reference).all():
        raise ValueError("CHGNet gives no energy for a true structure: leave it out")
    accepted = np.array([screen(a).accepted for a in made])
    above = np.full(len(made), np.inf)
    above[accepted] = chgnet_energies([a for a, ok in zip(made, accepted, strict=True) if ok]) - reference[accepted]
    rms = np.array([match_rms(a, b) if ok else np.nan for a, b, ok in zip(made, truths, accepted, strict=True)])
    matched = np.isfinite(rms)
    quartiles = quantile(above, QUARTILES)
    return {
        "structures": len(made),
        "accepted": float(accepted.mean()),
        "energy_quartiles": quartiles.tolist(),
        "energy_median": float(quartiles[1]),
        "energy_median_interval": bootstrap_interval(above, median),
        "match_rate": float(matched.mean()),
        "match_rate_interval": bootstrap_interval(matched, np.mean),
        "rms_mean": float(rms[matched].mean()) if matched.any() else None,
    }


def markdown(rows: list[dict[str, Any]], report: dict[str, Any]) -> str:
    """The table that the README includes."""
    lines = [
        "| atoms | cell | structures | eV/atom above the true structure: median [95 %] | quartiles | match rate [95 %] "
        "| RMS of matches | pass the screen |",
        "|--:|--|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        (low, high), (worse, better) = r["energy_median_interval"], r["match_rate_interval"]
        rms = "-" if r["rms_mean"] is None else f"{r['rms_mean']:.3f}"
        lines.append(
            f"| {r['atoms'][0]}-{r['atoms'][1]} | {r['cell']} | {r['structures']} "
            f"| {r['energy_median']:.3f} [{low:.3f}, {high:.3f}] "
            f"| {r['energy_quartiles'][0]:.3f}, {r['energy_quartiles'][2]:.3f} "
            f"| {r['match_rate']:.2f} [{worse:.2f}, {better:.2f}] | {rms} | {r['accepted']:.2f} |"
        )
    lines += [
        "",
        f"Near-stable structures of split `{report['split']}`, species pinned, no DOS, one raw draw each, "
        f"{report['sampler']['num_steps']} steps. *Given*: the true cell is handed over, so this is not generation. "
        "Rejected draws count as infinitely high in energy and as no match. Energies: CHGNet 0.3.0. Match: pymatgen "
        "StructureMatcher, ltol 0.3, stol 0.5, angle_tol 10; RMS in units of (volume per atom)^(1/3).",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure every row and write the results."""
    parser = argparse.ArgumentParser(description="Geometry of the raw output, species pinned, no DOS.")
    add_options(parser)
    add_split(parser)
    parser.add_argument("--num-structures", type=int, default=150, help="structures of 1-8 atoms (default 150)")
    parser.add_argument("--num-large", type=int, default=40, help="per larger class of sizes (default 40; 0: none)")
    parser.add_argument("--cache", type=Path, default=ROOT / "data" / "cache", help="true energies are kept there")
    options = parser.parse_args(arguments)
    if options.num_structures < 1 or options.num_large < 0:
        parser.error("--num-structures must be at least 1 and --num-large at least 0")

    torch.set_num_threads(1)
    model, header = load_model(options.weights)
    config = sampler_config(options)
    split = split_of(options)
    structures = load_structures(ROOT / "data" / "structures.parquet", split=split)
    cache = options.cache / f"chgnet_energy_{split}.json"
    rows: list[dict[str, Any]] = []
    classes = SIZE_CLASSES if options.num_large else SIZE_CLASSES[:1]
    for (low, high), cell_given in tqdm([(c, g) for c in classes for g in (False, True)], unit="row"):
        truths = choose(structures, low, high, options.num_structures if low == 1 else options.num_large, options.seed)
        made = draw_like(model, truths, config, options.seed, cell_given=cell_given)
        figures = measure(made, truths, true_energies(truths, cache))
        rows.append({"atoms": [low, high], "cell": "given" if cell_given else "generated", **figures})
    report = {
        "weights": header["sha256"],
        "split": split,
        "seed": options.seed,
        "sampler": asdict(config),
        "bar": BAR,
        "rows": rows,
    }
    table = markdown(rows, report)
    print(table)
    write_results(results_folder(options), "structure", report, table)
    return report


if __name__ == "__main__":
    main()
