"""What more candidates buy: distance of the ranked pick against the number drawn, and what they cost.

    python benchmarks/candidates.py            # 24 targets of `test`, 1,000 draws each: ten minutes on one core

The DOS of every site is given and compared, and then that of one site alone. The ranker picks, the judge measures; they
share no label. What is picked of k draws on average is exact: of N draws sorted by the ranker, the r-th is first of a
random k with a probability in closed form.
Draws and predictions are kept per target under `runs/candidates/`, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy are loaded

import numpy as np
import torch
from _common import (
    ROOT,
    add_options,
    add_predictors,
    add_split,
    load_predictors,
    results_folder,
    sampler_config,
    split_of,
)
from _draws import Candidates, cache_folder, cached
from _stats import interval, mean_of, ratio_of_means
from _tables import text, write_results
from _targets import Target, add_targets, drawn_rows
from constraints import judged_draws, request
from cost import PUBLISHED_CALLS, PublishedNetwork, cpu_seconds, published_call
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from dosmatgen_ase.data import load_site_dos
from dosmatgen_ase.files import write_atomic
from dosmatgen_ase.forward.predictor import DOSPredictor, SitePrediction
from dosmatgen_ase.generate.generator import DOSGenerator
from dosmatgen_ase.judge.metrics import site_distances

NUMBERS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
GIVEN = {"all": "every site given", "site": "one site given"}


def first_of(order: np.ndarray, values: np.ndarray, k: int) -> float:
    """Expected value of what comes first by `order` (lowest) among k of the N drawn at random.

    The r-th of N (from 0) is first with probability C(N - 1 - r, k - 1) / C(N, k).
    """
    ranked, n = values[np.argsort(order, kind="stable")], len(values)
    logs = [math.lgamma(n - r) - math.lgamma(k) - math.lgamma(n - r - k + 1) for r in range(n - k + 1)]
    whole = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return float(np.exp(np.array(logs) - whole) @ ranked[: n - k + 1])


def curves(target: Target, found: Candidates, which: str, numbers: list[int]) -> dict[str, list[float]]:
    """Expected distance, by the judge, of the ranker's pick and of the oracle's, for each number of draws."""
    keep, sites = found.accepted[0], target.sites(which)
    if not keep.any():
        return {name: [math.nan] * len(numbers) for name in ("picked", "oracle")}
    judged, ranked = (
        site_distances(a[0, keep][:, sites].astype(float), target.dos[sites], target.known)["l1"]
        for a in (found.judged, found.ranked)
    )
    numbers = [min(k, int(keep.sum())) for k in numbers]
    return {
        "picked": [first_of(ranked, judged, k) for k in numbers],
        "oracle": [first_of(judged, judged, k) for k in numbers],
    }


def published_seconds(network: nn.Module, calls: int = 5) -> float:
    """CPU seconds of one 4-atom structure by the published sampler in a batch of 16: its network calls alone."""
    call = published_call(4, 16, network)
    call()
    return float(np.median([cpu_seconds(call) for _ in range(calls)])) * PUBLISHED_CALLS / 16


def drawn_and_timed(
    targets: list[Target],
    generator: DOSGenerator,
    judge: DOSPredictor,
    ranker: DOSPredictor,
    options: argparse.Namespace,
) -> tuple[dict[str, list[Candidates]], list[float]]:
    """Candidates of each target for each of `GIVEN`; mean CPU seconds of them, and of one by the published sampler."""
    network = PublishedNetwork().eval()
    folder = cache_folder(options, repr((asdict(sampler_config(options)), options.candidates, options.seed)))
    kept = folder / "seconds.json"  # what the draws cost when they were made, for those that are read back

    def timed(target: Target, which: str) -> Candidates:
        start = time.process_time()
        wanted = request(target.targets(which), num_atoms=len(target.atoms))
        found = judged_draws(generator, wanted, target, options.candidates, judge, ranker, options)
        spent = json.loads(kept.read_text()) if kept.exists() else {}
        # Side by side, as the speed of a machine changes with what else it does.
        spent[f"{target.key} {which}"] = [time.process_time() - start, published_seconds(network)]
        write_atomic(kept, json.dumps(spent).encode())
        return found

    found = {
        which: [
            cached(folder / f"{t.key}-{which}.npz", partial(timed, t, which))
            for t in tqdm(targets, unit="target", desc=title)
        ]
        for which, title in GIVEN.items()
    }
    spent = json.loads(kept.read_text())
    return found, np.mean([spent[f"{t.key} {which}"] for t in targets for which in GIVEN], axis=0).tolist()


def figures(
    targets: list[Target], found: list[Candidates], floors: list[SitePrediction], which: str, numbers: list[int]
) -> dict[str, Any]:
    """Means over targets of `curves`, of the judge's floor on the true structures, and of the gain; one of `GIVEN`."""
    table = [curves(t, c, which, numbers) for t, c in zip(targets, found, strict=True)]
    values = {name: np.array([row[name] for row in table]) for name in ("picked", "oracle")}
    floor = []
    for t, true in zip(targets, floors, strict=True):
        sites = t.sites(which)
        floor.append(float(site_distances(true.mean[sites], t.dos[sites], t.known)["l1"]))
    twenty = numbers.index(min(20, numbers[-1]))
    gain = {name: v[:, 0].mean() - v[:, twenty].mean() for name, v in values.items()}
    return {
        **{name: [interval(v[:, i], mean_of) for i in range(len(numbers))] for name, v in values.items()},
        "floor": interval(np.array(floor), mean_of),
        "of": numbers[twenty],
        "gain": interval(values["picked"][:, [twenty, 0]], ratio_of_means),
        "share_of_oracle": float(gain["picked"] / gain["oracle"]) if gain["oracle"] else 0.0,
    }


def plot(report: dict[str, Any], path: Path) -> None:
    """Distance against the number of draws; the cost above."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    numbers, cost = report["numbers"], report["seconds_per_candidate"]
    for ax, (title, part) in zip(figure.subplots(1, 2), report["given"].items(), strict=True):
        for name, style in (("picked", "o-"), ("oracle", "o:")):
            low, high = np.array([f["interval"] for f in part[name]]).T
            (line,) = ax.plot(numbers, [f["value"] for f in part[name]], style, ms=4, label=name)
            ax.fill_between(numbers, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        ax.axhline(part["floor"]["value"], color="0.4", linestyle="--", label="judge on the true structure")
        ax.set_xscale("log")
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel("candidates")
        ax.set_ylabel("site-DOS distance (normalised L1)")
        above = ax.secondary_xaxis("top", functions=(lambda k: k * cost, lambda s: s / cost))
        above.set_xlabel("CPU seconds, ranking included")
        ax.axvline(report["affordable"], color="0.7", linewidth=1, label="one structure, published sampler")
        ax.legend(frameon=False, fontsize="x-small")
    figure.savefig(path, dpi=150)


def markdown(report: dict[str, Any]) -> str:
    """One row per number of candidates."""
    titles = list(report["given"])
    lines = [
        "| candidates | " + " | ".join(f"{title}: ranked pick | oracle" for title in titles) + " | CPU seconds |",
        "|--:|" + "--:|" * (2 * len(titles) + 1),
    ]
    for i, k in enumerate(report["numbers"]):
        cells = [text(report["given"][title][name][i]) for title in titles for name in ("picked", "oracle")]
        lines.append(f"| {k} | {' | '.join(cells)} | {k * report['seconds_per_candidate']:.2f} |")
    told = [
        f"{title}: {text(part['floor'])} on the true structures, picked of {part['of']} over the mean "
        f"{text(part['gain'])}, {100 * part['share_of_oracle']:.0f} % of the oracle's gain"
        for title, part in report["given"].items()
    ]
    lines += [
        "",
        f"{report['targets']} targets of split `{report['split']}` with at most {report['max_atoms']} atoms; "
        "normalised L1 by the judge on the sites given, mean over targets [95 % bootstrap interval]. By the judge, "
        f"{'; '.join(told)}. "
        "CPU time on one thread: drawing, screening, features and both predictors; that of one 4-atom structure by the "
        f"published sampler in a batch of 16 ({report['published_seconds']:.1f} s) pays for "
        f"{report['affordable']:.0f} candidates.",
    ]
    return "\n".join(lines) + "\n"


def options_of(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, Any]:
    """The command line."""
    parser = argparse.ArgumentParser(description="Match against the number of candidates.")
    add_options(parser)
    add_split(parser)
    add_predictors(parser)
    add_targets(parser, 24)
    parser.add_argument("--max-atoms", type=int, default=8)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "candidates")
    return parser, parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Draw, rank, judge, draw the curve."""
    parser, options = options_of(arguments)
    torch.set_num_threads(1)
    generator = DOSGenerator(options.weights, device="cpu")
    judge, ranker = load_predictors(parser, options)
    labels, split = load_site_dos(ROOT / "data" / "site_dos"), split_of(options)
    small = np.flatnonzero((labels.split == split) & (labels.num_atoms <= options.max_atoms))
    targets = [Target.from_label(labels, row, options.seed) for row in drawn_rows(labels, small, options)]
    found, (spent, published) = drawn_and_timed(targets, generator, judge, ranker, options)
    floors = judge.predict_arrays([t.atoms for t in targets])
    numbers = [k for k in NUMBERS if k <= options.candidates]
    seconds = spent / options.candidates
    report = {
        "weights": generator.header["sha256"],
        "judge": judge.info,
        "predictor": ranker.info,
        "split": split,
        "targets": len(targets),
        "target_ids": [t.material_id for t in targets],
        "max_atoms": options.max_atoms,
        "seed": options.seed,
        "sampler": asdict(sampler_config(options)),
        "numbers": numbers,
        "given": {title: figures(targets, found[which], floors, which, numbers) for which, title in GIVEN.items()},
        "seconds_per_candidate": seconds,
        "published_seconds": published,
        "affordable": published / seconds,
    }
    out = results_folder(options)
    written = markdown(report)
    print(written)
    write_results(out, "candidates", report, written)
    plot(report, out / "candidates.png")
    return report


if __name__ == "__main__":
    main()
