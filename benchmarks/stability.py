"""Energy above the hull of held-out real crystals (the control), of generated ones, and of prototypes; time to relax.

    python benchmarks/stability.py                      # the table of the README
    python benchmarks/stability.py --num-real 20 --num-draws 10 --out runs/quick

Real: near-stable structures of split `test`, relaxed as the hull is. "Hull" holds their own formulas too, as the one
that ships does; "other formulas" is the hull of `train`, `val` and the elements, where no entry has the formula that is
asked about, so that a stable crystal lies below it. Generated: one candidate of 4 to 7 atoms per draw, conditioned on
every site of a labelled `test` structure, as it comes from the generator and relaxed. Everything by CHGNet 0.3.0.

Stopped runs go on: what was relaxed is kept in `data/cache/` (real crystals beside those of `scripts/build_hull.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy are loaded

import numpy as np
import torch
from _common import RESULTS, ROOT
from _tables import write_results
from _targets import Target, in_random_order
from ase import Atoms
from ase.build import bulk
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from tqdm import tqdm

from dosmatgen_ase import DOSGenerator
from dosmatgen_ase.crystals.screening import KnownCrystals, charge_balanced, digest, screen_many
from dosmatgen_ase.data import load_site_dos, load_structures
from dosmatgen_ase.files import read_records
from dosmatgen_ase.judge.metrics import bootstrap_interval, median, quantile
from dosmatgen_ase.judge.relaxation import relax
from dosmatgen_ase.judge.stability import Hull, chgnet_energies, load_hull

BAR = {"real_median": 0.03, "seconds_for_50": 300.0}
STABLE = 0.1  # eV/atom above the hull: the usual bound for "metastable"
PROTOTYPES = {
    "NaCl, rock salt": bulk("NaCl", "rocksalt", a=5.64),
    "NaCl, CsCl type": bulk("NaCl", "cesiumchloride", a=3.4),
    "MgO, rock salt": bulk("MgO", "rocksalt", a=4.21),
    "MgO, zinc blende": bulk("MgO", "zincblende", a=4.6),
    "Cu, fcc": bulk("Cu", "fcc", a=3.61),
    "Cu, diamond": bulk("Cu", "diamond", a=5.4),
}


def relax_all(named: dict[str, Atoms], cache: Path) -> dict[str, dict[str, Any]]:
    """Relax one by one with the defaults; keep energies (eV/atom), outcome and CPU seconds in the cache; return them.

    "relaxed" is None unless it converged, as in `scripts/build_hull.py`, for only such energies may enter a hull.
    "reached" is where the relaxation ended, None if it broke down; a converged record of that script does without.
    """
    known = read_records(cache)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.open("a") as file:
        file.write("\n")  # after a line torn by an interruption
        for name, atoms in tqdm(named.items(), unit="structure", desc="relax"):
            if "reached" in known.get(name, {}) or known.get(name, {}).get("relaxed") is not None:
                continue
            start, wall = time.process_time(), time.perf_counter()
            relaxed = relax(atoms)
            report = relaxed.info["relaxation"]
            record = {
                "relaxed": report["energy"] if report["converged"] else None,
                "reached": report["energy"],
                "steps": report["steps"],
                "reason": report["reason"],
                "cpu": round(time.process_time() - start, 3),
                "wall": round(time.perf_counter() - wall, 3),
                "crystal": [relaxed.numbers.tolist(), relaxed.cell.array.tolist(), relaxed.positions.tolist()],
            }
            known.setdefault(name, {}).update(record)
            file.write(json.dumps({"id": name, **record}) + "\n")
            file.flush()
    return {name: {**known[name], "reached": known[name].get("reached", known[name]["relaxed"])} for name in named}


def draw(count: int, seed: int) -> list[Atoms]:
    """Candidates of 4 to 7 atoms, one per target, every site conditioned; targets are used again where they run out."""
    labels = load_site_dos(ROOT / "data" / "site_dos")
    rows = np.flatnonzero((labels.split == "test") & (labels.num_atoms >= 4) & (labels.num_atoms <= 7))
    rows = np.array(in_random_order(labels, rows, seed))
    generator, made = DOSGenerator(), []
    for k in range(count):
        i = int(rows[k % len(rows)])
        dos = Target.from_label(labels, i, seed).targets("all")
        made.append(generator.generate(list(dos.values()), seed=(seed << 16) + k))
    return made


def real_energies(options: argparse.Namespace) -> list[tuple[ArrayLike, float | None]]:
    """Atomic numbers and relaxed energies, eV/atom, of real crystals of split `test`."""
    data = load_structures(ROOT / "data" / "structures.parquet", split="test")
    rows = np.random.default_rng(options.seed).permutation(len(data))[: options.num_real].tolist()
    crystals = [data.atoms(i) for i in rows]
    # As `scripts/build_hull.py` names them; some left-handed cells get another name here, and are computed twice.
    real = {f"{data.material_id[i]}-{digest(atoms)[:12]}": atoms for i, atoms in zip(rows, crystals, strict=True)}
    energies = relax_all(real, options.cache / "hull.jsonl")
    return [(real[name].numbers, record["reached"]) for name, record in energies.items()]


def relaxed_draws(made: Sequence[Atoms], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Records of `relax_all`, one for each draw."""
    sha = made[0].info["dosmatgen"]["weights"][:12]
    # The targets change as labels are added, and with them what a seed draws: the atoms belong to the name.
    draws = {f"{options.seed}-{k}-{digest(atoms)[:12]}": atoms for k, atoms in enumerate(made)}
    return list(relax_all(draws, options.cache / f"stability_{sha}.jsonl").values())


def above(hull: Hull, energies: Iterable[tuple[ArrayLike, float | None]]) -> list[float]:
    """Energies above a hull, eV/atom, of (atomic numbers, eV/atom); infinite where unknown."""
    return [np.inf if (value := hull.above(*entry)) is None else value for entry in energies]


def figures(above: Sequence[float]) -> dict[str, Any]:
    """Median with its interval, quartiles, and shares; one without an energy or an element of the hull is infinite."""
    values = np.where(np.isfinite(above), above, np.inf)
    return {
        "structures": len(values),
        "unknown": int(np.isinf(values).sum()),
        "median": median(values),
        "median_interval": bootstrap_interval(values, median),
        "quartiles": quantile(values, (0.25, 0.75)).tolist(),
        "below_0.03": float((values <= BAR["real_median"]).mean()),
        "metastable": float((values <= STABLE).mean()),
        "all": values.tolist(),
    }


def counts(
    made: Sequence[Atoms], done: Sequence[dict[str, Any]], after: Sequence[float], structures: Path
) -> dict[str, Any]:
    """How many candidates are valid, unique and new, and metastable too once relaxed, and balance common charges.

    New is what no split of the table holds: a crystal of `test` that is found again is no new crystal.
    """
    known, held_out = (KnownCrystals.from_file(structures, split=split) for split in (None, "test"))
    relaxed = [Atoms(z, cell=cell, positions=x, pbc=True) for z, cell, x in (record["crystal"] for record in done)]
    new = np.array([outcome.accepted for outcome in screen_many(relaxed, known=known)])
    balance = [charge_balanced(atoms) for atoms in made]
    return {
        "known": len(known),
        "found_again": float(np.mean([held_out.find(atoms) is not None for atoms in relaxed])),
        "valid_unique_new": float(new.mean()),
        "valid_unique_new_metastable": float((new & (np.array(after) <= STABLE)).mean()),
        "with_charges": sum(b is not None for b in balance),
        "balanced": sum(b is True for b in balance),
    }


def cost(done: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Time of the first 50 relaxations, and why any at all did not converge."""
    first = done[:50]
    return {
        "structures": len(first),
        "cpu_seconds": sum(r["cpu"] for r in first),
        "wall_seconds": sum(r["wall"] for r in first),
        "median": float(np.median([r["cpu"] for r in first])),
        "slowest": max(r["cpu"] for r in first),
        "converged": sum(r["reason"] is None for r in first),
        "reasons": sorted({r["reason"] for r in done if r["reason"]}),
    }


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Cumulative distributions."""
    figure = Figure(figsize=(6.0, 3.4), layout="constrained")
    axes = figure.subplots()
    for (name, row), colour in zip(rows.items(), ("black", "tab:gray", "tab:orange", "tab:blue"), strict=True):
        axes.ecdf([min(value, 10.0) for value in row["all"]], label=name, color=colour)
    axes.axvline(0.0, color="black", linewidth=0.5)
    axes.set(xlim=(-0.3, 1.0), xlabel="energy above the hull, eV/atom", ylabel="share of structures")
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=150)


def markdown(report: dict[str, Any]) -> str:
    """The table that the README includes."""
    lines = [
        "| structures | number | eV/atom above the hull: median [95 %] | quartiles | up to 0.03 | up to 0.1 |",
        "|--|--:|--:|--:|--:|--:|",
    ]
    for name, row in report["rows"].items():
        (low, high), (first, third) = row["median_interval"], row["quartiles"]
        lines.append(
            f"| {name} | {row['structures']} | {row['median']:.3f} [{low:.3f}, {high:.3f}] | {first:.3f}, {third:.3f} "
            f"| {row['below_0.03']:.2f} | {row['metastable']:.2f} |"
        )
    lines += ["", "| prototype, relaxed | eV/atom above the hull |", "|--|--:|"]
    lines += [f"| {name} | {above:.3f} |" for name, above in report["prototypes"].items()]
    cost, candidates, hull = report["relaxation"], report["candidates"], report["hull"]
    unknown = ", ".join(str(row["unknown"]) for row in report["rows"].values())
    lines += [
        "",
        f"Real crystals are of split `test`. Energies of atoms and hull: CHGNet 0.3.0; of the hull's "
        f"{hull['formulas']} formulas {hull['relaxed']} are relaxed with it, the others stand in the geometry of the "
        f"data. Of the rows, {unknown} structures have no energy or an element that the hull lacks, and count as "
        f"infinitely high. Generated: one draw per target, every site conditioned; "
        f"{candidates['valid_unique_new']:.2f} of them are valid, unique and new (against {candidates['known']} "
        f"crystals; {candidates['found_again']:.2f} are known crystals of `test`, found again), "
        f"{candidates['valid_unique_new_metastable']:.2f} are so and at most 0.1 eV/atom "
        f"above the hull once relaxed; of {candidates['with_charges']} that are not all metal "
        f"{candidates['balanced']} balance common charges.",
        "",
        f"Relaxing {cost['structures']} of the candidates took {cost['cpu_seconds']:.0f} s of CPU time on one core "
        f"(median {cost['median']:.1f} s, slowest {cost['slowest']:.1f} s); {cost['converged']} converged within 200 "
        "steps.",
    ]
    return "\n".join(lines) + "\n"


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Energy above the hull of real, generated and prototype crystals.")
    parser.add_argument("--num-real", type=int, default=200)
    parser.add_argument("--num-draws", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hull", type=Path, default=None, help="default: the one that ships")
    near_stable = ROOT / "data" / "structures.parquet"
    parser.add_argument("--structures", type=Path, default=near_stable, help="crystals that are not new")
    parser.add_argument("--cache", type=Path, default=ROOT / "data" / "cache", help="relaxed energies are kept there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.num_real < 1 or options.num_draws < 1:
        parser.error("--num-real and --num-draws must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and write the results."""
    options = options_of(arguments)
    torch.set_num_threads(1)
    hull = Hull.load(options.hull) if options.hull else load_hull()
    elemental = (hull.counts > 0).sum(1) == 1  # they say nothing of a compound, and without them there is no hull
    others = hull.without((hull.split == "test") & ~elemental)
    real = real_energies(options)
    made = draw(options.num_draws, options.seed)
    raw = above(hull, zip((atoms.numbers for atoms in made), chgnet_energies(made, progress=True), strict=True))
    done = relaxed_draws(made, options)
    after = above(hull, [(record["crystal"][0], record["reached"]) for record in done])
    prototypes = [(atoms.numbers, relax(atoms).info["relaxation"]["energy"]) for atoms in PROTOTYPES.values()]
    report = {
        "seed": options.seed,
        "weights": made[0].info["dosmatgen"]["weights"],
        "hull": {"formulas": len(hull.name), "relaxed": int(hull.relaxed.sum())},
        "bar": BAR,
        "rows": {
            "real, hull": figures(above(hull, real)),
            "real, hull of other formulas": figures(above(others, real)),
            "generated": figures(raw),
            "generated, relaxed": figures(after),
        },
        "prototypes": dict(zip(PROTOTYPES, above(hull, prototypes), strict=True)),
        "candidates": counts(made, done, after, options.structures),
        "relaxation": cost(done),
    }
    table = markdown(report)
    print(table)
    write_results(options.out, "stability", report, table)
    plot(report["rows"], options.out / "stability.png")
    return report


if __name__ == "__main__":
    main()
