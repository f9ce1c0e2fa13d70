"""What guidance and the temperature of the species buy and cost: the curve on `val` that the defaults come from.

    python benchmarks/guidance.py    # 60 targets of `val`, 10 draws per setting: a quarter of an hour on one core

Of a window: the DOS of every site on [-2, 2] eV only, inside it, by scale, against the whole range at scale 1.
Else, per setting: share of right elements and distance with the DOS of every site; control beyond the element (one
site, its element pinned, with its DOS against without); accepted draws, different compositions, energy above the hull
of the raw crystals.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy are loaded

import numpy as np
import torch
from _common import RESULTS, ROOT, add_options, add_predictors, load_predictors, sampler_config
from _draws import MODES, candidate_figures, generate, judge_candidates
from _stats import interval, ratio_of_means, ratios
from _tables import text, write_results
from _targets import Target, in_random_order
from constraints import CONDITIONS, diversity, judged_draws, request, site_targets
from matplotlib.figure import Figure
from tqdm import tqdm

from dosmatgen_ase import DOSGenerator
from dosmatgen_ase.data import load_site_dos
from dosmatgen_ase.forward.predictor import DOSPredictor
from dosmatgen_ase.generate.request import WINDOW_GUIDANCE, WINDOW_TEMPERATURE
from dosmatgen_ase.judge.stability import chgnet_energies, load_hull
from dosmatgen_ase.model.conditioning import ConditionalDenoiser, Guidance

USED = ("conditional", "site with DOS", "site without DOS")
SCALES = (0.5, 1.0, 1.5, 2.0, 3.0)
TEMPERATURES = (0.7, 0.5, 0.35)
SETTINGS = [*((g, TEMPERATURES[0]) for g in SCALES), *((g, t) for t in TEMPERATURES[1:] for g in (1.0, 1.5))]
WINDOW_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
WINDOW_DRAWS = 20
WHOLE, WINDOW = "every site", "every site, [-2, 2] eV"  # of `CONDITIONS`


def measure_window(
    targets: list[Target],
    generator: DOSGenerator,
    judge: DOSPredictor,
    ranker: DOSPredictor,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Distances inside the window by scale, their ratio to those with the whole range given, and what it costs."""

    def row(name: str, guidance: Guidance) -> tuple[list[dict[str, float]], float, float]:
        figures, accepted, different = [], [], []
        for t in tqdm(targets, unit="target", desc=f"{name}, guidance {guidance.scale:g}"):
            wanted = request(site_targets(t, CONDITIONS[name]), num_atoms=len(t.atoms))
            found = judged_draws(generator, wanted, t, WINDOW_DRAWS, judge, ranker, options, guidance)
            figures.append(candidate_figures(t, found, 0, t.sites("all")))
            accepted.append(found.accepted[0].mean())
            different.append(diversity(found))
        return figures, float(np.mean(accepted)), float(np.nanmean(different))

    whole, rows = row(WHOLE, Guidance())[0], []
    for scale in WINDOW_SCALES:
        figures, accepted, different = row(WINDOW, replace(WINDOW_GUIDANCE, scale=scale))
        against = ratios({WINDOW: figures, WHOLE: whole}, WINDOW, WHOLE)
        rows.append(
            {
                "guidance_scale": scale,
                "inside": float(np.nanmean([f["near_gap mean"] for f in figures])),
                "ratio": against["near_gap mean"],
                "ratio of the best": against["near_gap best"],
                "accepted": accepted,
                "compositions": different,
            }
        )
    return rows


def measure(
    targets: list[Target],
    model: ConditionalDenoiser,
    judge: DOSPredictor,
    ranker: DOSPredictor,
    options: argparse.Namespace,
    scale: float,
    temperature: float,
) -> dict[str, Any]:
    """Figures of one setting."""
    config, hull = replace(sampler_config(options), species_temperature=temperature), load_hull()
    right, sites, accepted, different, above = [], [], [], [], []
    table: dict[str, list[dict[str, float]]] = {name: [] for name in USED}
    for t in tqdm(targets, unit="target", desc=f"guidance {scale:g}, temperature {temperature:g}"):
        made = generate(model, t, options.candidates, config, scale, options.seed, USED)
        found = judge_candidates(made, judge, ranker, len(USED))
        for i, name in enumerate(USED):
            table[name].append(candidate_figures(t, found, i, t.sites(MODES[name].judged)))
        right.append((found.numbers[0] == t.atoms.numbers).mean())
        sites.append(len(t.atoms))
        accepted.append(found.accepted[0].mean())
        different.append(diversity(found))
        raw = made[: options.candidates]
        energies = (hull.above(a.numbers, e) for a, e in zip(raw, chgnet_energies(raw), strict=True))
        above += [np.inf if e is None else e for e in energies]
    pairs = np.array(
        [[a["l1 mean"], b["l1 mean"]] for a, b in zip(table["site with DOS"], table["site without DOS"], strict=True)]
    )
    return {
        "guidance_scale": scale,
        "temperature": temperature,
        "elements": float(np.average(right, weights=sites)),
        "distance": float(np.nanmean([f["l1 mean"] for f in table["conditional"]])),
        "picked": float(np.nanmean([f["l1 picked"] for f in table["conditional"]])),
        "control": interval(pairs, ratio_of_means),
        "accepted": float(np.mean(accepted)),
        "compositions": float(np.nanmean(different)),
        "above_hull": float(np.median(above)),
    }


def markdown(report: dict[str, Any]) -> str:
    """One row per setting."""
    head = ["guidance", "temperature", "right elements", "distance, mean", "ranked pick", "control beyond the element"]
    head += ["accepted", "compositions", "eV/atom above the hull"]
    lines = ["| " + " | ".join(head) + " |", "|" + "--:|" * len(head)]
    for r in report["rows"]:
        lines.append(
            f"| {r['guidance_scale']:g} | {r['temperature']:g} | {r['elements']:.2f} | {r['distance']:.2f} | "
            f"{r['picked']:.2f} | {text(r['control'])} | {r['accepted']:.3f} | {r['compositions']:.2f} | "
            f"{r['above_hull']:.2f} |"
        )
    lines += [
        "",
        "| a window: guidance | distance inside, mean | over that of the whole range: mean | best | accepted | "
        "compositions |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for r in report["window"]:
        cells = [f"{r['inside']:.2f}", text(r["ratio"]), text(r["ratio of the best"])]
        cells += [f"{r['accepted']:.3f}", f"{r['compositions']:.2f}"]
        lines.append(f"| {r['guidance_scale']:g} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{report['targets']} targets of split `val`, {report['candidates']} draws each. Distances: normalised L1 by "
        "the judge, the DOS of every site given. Control: one site, its element pinned, the rest free, with its DOS "
        "against without, at one temperature. A window: the DOS of every site on [-2, 2] eV only, against that on "
        f"[-10, 5] eV at guidance 1, {report['window_targets']} targets, {WINDOW_DRAWS} draws, both "
        "inside the window; guided until the species are settled, which are drawn at a temperature of "
        f"{WINDOW_TEMPERATURE:g}. Compositions: different ones, as a share. Above the hull: median of the raw "
        "crystals. A scale other than 1 takes two network passes per step.",
    ]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Validity and alignment against the scale."""
    rows = [r for r in report["rows"] if r["temperature"] == TEMPERATURES[0]]
    scales = [r["guidance_scale"] for r in rows]
    figure = Figure(figsize=(8.4, 2.8), layout="constrained")
    panels = {"distance": "distance, mean", "elements": "right elements", "above_hull": "eV/atom above the hull"}
    for ax, (name, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        ax.plot(scales, [r[name] for r in rows], "o-", ms=4)
        ax.set_xlabel("guidance_scale")
        ax.set_ylabel(label)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure every setting on `val`."""
    parser = argparse.ArgumentParser(description="Guidance and temperature, on val.")
    add_options(parser)
    add_predictors(parser)
    parser.add_argument("--num-targets", type=int, default=60)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--window-targets", type=int, default=200, help="at most, of the second table")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results folder (default: results/)")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    generator = DOSGenerator(options.weights, device="cpu")
    model, header = generator.model, generator.header
    judge, ranker = load_predictors(parser, options)
    labels = load_site_dos(ROOT / "data" / "site_dos")
    rows = in_random_order(labels, np.flatnonzero(labels.split == "val"), options.seed)
    all_targets = [Target.from_label(labels, row, options.seed) for row in rows]
    targets, window_targets = all_targets[: options.num_targets], all_targets[: options.window_targets]
    report = {
        "weights": header["sha256"],
        "targets": len(targets),
        "candidates": options.candidates,
        "seed": options.seed,
        "window_targets": len(window_targets),
        "window": measure_window(window_targets, generator, judge, ranker, options),
        "rows": [measure(targets, model, judge, ranker, options, g, t) for g, t in SETTINGS],
    }
    table = markdown(report)
    print(table)
    write_results(options.out, "guidance", report, table)
    plot(report, options.out / "guidance.png")
    return report


if __name__ == "__main__":
    main()
