"""What more candidates buy: distance of the ranked pick against the number drawn, and what they cost.

    python benchmarks/candidates.py            # 24 targets of `test`, 1,000 draws each: ten minutes on one core

The DOS of every site is given. The ranker picks, the judge measures; they share no label. What is picked of k draws on
average is exact: of N draws sorted by the ranker, the r-th is first of a random k with a probability in closed form.
Draws and predictions are kept per target under `runs/candidates/`, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy are loaded

import numpy as np
import torch
from _common import (
    RESULTS,
    ROOT,
    add_options,
    add_predictors,
    load_predictors,
    rng_for,
    sampler_config,
    split_of,
    write_results,
)
from constraints import draws, request
from matplotlib.figure import Figure
from round_trip import Candidates, Target, cached, interval, judge_candidates, mean_of, ratio_of_means, text
from tqdm import tqdm

from dosmatgen_ase.data import load_site_dos
from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA, TargetDOS
from dosmatgen_ase.files import write_atomic
from dosmatgen_ase.generator import DOSGenerator
from dosmatgen_ase.metrics import site_distances

NUMBERS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def first_of(order: np.ndarray, values: np.ndarray, k: int) -> float:
    """Expected value of what comes first by `order` (lowest) among k of the N drawn at random.

    The r-th of N (from 0) is first with probability C(N - 1 - r, k - 1) / C(N, k).
    """
    ranked, n = values[np.argsort(order, kind="stable")], len(values)
    logs = [math.lgamma(n - r) - math.lgamma(k) - math.lgamma(n - r - k + 1) for r in range(n - k + 1)]
    whole = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return float(np.exp(np.array(logs) - whole) @ ranked[: n - k + 1])


def curves(target: Target, found: Candidates, numbers: list[int]) -> dict[str, list[float]]:
    """Expected distance, by the judge, of the ranker's pick and of the oracle's, for each number of draws."""
    keep = found.accepted[0]
    judged, ranked = (
        site_distances(a[0, keep].astype(float), target.dos, target.known)["l1"] for a in (found.judged, found.ranked)
    )
    numbers = [min(k, int(keep.sum())) for k in numbers]
    return {
        "picked": [first_of(ranked, judged, k) for k in numbers],
        "oracle": [first_of(judged, judged, k) for k in numbers],
    }


def published_seconds() -> float:
    """CPU seconds of one 4-atom structure by the published sampler in a batch of 16 (`results/cost.json`)."""
    rows = json.loads((RESULTS / "cost.json").read_text())["rows"]
    return next(float(r["published_cpu_s"]) for r in rows if r["num_atoms"] == 4 and r["batch"] == 16)


def plot(report: dict[str, Any], path: Path) -> None:
    """Distance against the number of draws; the cost above."""
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    ax = figure.add_subplot()
    numbers = report["numbers"]
    for name, style in (("picked", "o-"), ("oracle", "o:")):
        figures = report["curves"][name]
        low, high = np.array([f["interval"] for f in figures]).T
        (line,) = ax.plot(numbers, [f["value"] for f in figures], style, ms=4, label=name)
        ax.fill_between(numbers, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    ax.axhline(report["floor"]["value"], color="0.4", linestyle="--", label="judge on the true structure")
    ax.set_xscale("log")
    ax.set_xlabel("candidates")
    ax.set_ylabel("site-DOS distance (normalised L1)")
    cost = report["seconds_per_candidate"]
    above = ax.secondary_xaxis("top", functions=(lambda k: k * cost, lambda s: s / cost))
    above.set_xlabel("CPU seconds, ranking included")
    if report["affordable"]:
        ax.axvline(report["affordable"], color="0.7", linewidth=1)
        told = " one structure,\n published sampler"
        ax.text(report["affordable"], ax.get_ylim()[1], told, va="top", fontsize="x-small")
    ax.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def markdown(report: dict[str, Any]) -> str:
    """One row per number of candidates."""
    lines = ["| candidates | ranked pick | oracle | CPU seconds |", "|--:|--:|--:|--:|"]
    rows = zip(report["numbers"], report["curves"]["picked"], report["curves"]["oracle"], strict=True)
    for k, picked, oracle in rows:
        lines.append(f"| {k} | {text(picked)} | {text(oracle)} | {k * report['seconds_per_candidate']:.2f} |")
    affordable = report["affordable"]
    lines += [
        "",
        f"{report['targets']} targets of split `{report['split']}` with at most {report['max_atoms']} atoms, the DOS "
        "of every site given; normalised L1 by the judge, mean over targets [95 % bootstrap interval]; the judge's "
        f"error on the true structures is {text(report['floor'])}. Picked of 20 over the mean: {text(report['gain'])}, "
        f"{100 * report['share_of_oracle']:.0f} % of the oracle's gain. CPU time on one thread: drawing, screening, "
        "features and both predictors; the CPU time of one 4-atom structure by the published sampler in a batch of 16 "
        f"({report['published_seconds']:.1f} s) pays for {affordable:.0f} candidates.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Draw, rank, judge, draw the curve."""
    parser = argparse.ArgumentParser(description="Match against the number of candidates.")
    add_options(parser)
    add_predictors(parser)
    parser.add_argument("--num-targets", type=int, default=24)
    parser.add_argument("--max-atoms", type=int, default=8)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "candidates")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    generator = DOSGenerator(options.weights, device="cpu")
    judge, ranker = load_predictors(parser, options)
    config, split = sampler_config(options), split_of(options)
    labels = load_site_dos(ROOT / "data" / "site_dos")
    small = np.flatnonzero((labels.split == split) & (labels.num_atoms <= options.max_atoms))
    rows = np.random.default_rng(options.seed).permutation(small)[: options.num_targets].tolist()
    targets = [Target.from_label(labels, row, options.seed) for row in rows]
    key = hashlib.sha256(repr((asdict(config), options.candidates, options.seed)).encode())
    for path in (options.weights, options.judge, options.predictor):
        key.update(path.read_bytes())
    folder = options.cache / key.hexdigest()[:16]
    cost = folder / "seconds.json"  # CPU time of the draws, told apart from what is read back

    def draw_and_judge(target: Target) -> Candidates:
        start = time.process_time()
        dos = [
            TargetDOS(MODEL_GRID.energies, values, target.known, target.reference, MODEL_SIGMA) for values in target.dos
        ]
        rngs = [rng_for(options.seed, target.material_id, k) for k in range(options.candidates)]
        made = draws(generator, request(dos), len(target.atoms), rngs, config)
        found = judge_candidates(made, judge, ranker, 1)
        spent = json.loads(cost.read_text()) if cost.exists() else {}
        spent[target.material_id] = time.process_time() - start
        write_atomic(cost, json.dumps(spent).encode())
        return found

    numbers = [k for k in NUMBERS if k <= options.candidates]
    table = []
    for t in tqdm(targets, unit="target"):
        table.append(curves(t, cached(folder / f"{t.material_id}.npz", lambda t=t: draw_and_judge(t)), numbers))
    floor = [
        float(site_distances(p.mean, t.dos, t.known)["l1"])
        for t, p in zip(targets, judge.predict_arrays([t.atoms for t in targets]), strict=True)
    ]
    values = {name: np.array([row[name] for row in table]) for name in ("picked", "oracle")}
    twenty = numbers.index(min(20, numbers[-1]))
    gain = {name: v[:, 0].mean() - v[:, twenty].mean() for name, v in values.items()}
    seconds = float(np.mean(list(json.loads(cost.read_text()).values()))) / options.candidates
    published = published_seconds()
    report = {
        "weights": generator.header["sha256"],
        "split": split,
        "targets": len(targets),
        "max_atoms": options.max_atoms,
        "seed": options.seed,
        "sampler": asdict(config),
        "numbers": numbers,
        "curves": {name: [interval(v[:, i], mean_of) for i in range(len(numbers))] for name, v in values.items()},
        "floor": interval(np.array(floor), mean_of),
        "gain": interval(values["picked"][:, [twenty, 0]], ratio_of_means),
        "share_of_oracle": float(gain["picked"] / gain["oracle"]) if gain["oracle"] else 0.0,
        "seconds_per_candidate": seconds,
        "published_seconds": published,
        "affordable": published / seconds,
    }
    out = options.out or (ROOT / "runs" if options.val else RESULTS)
    written = markdown(report)
    print(written)
    write_results(out, "candidates", report, written)
    plot(report, out / "candidates.png")
    return report


if __name__ == "__main__":
    main()
