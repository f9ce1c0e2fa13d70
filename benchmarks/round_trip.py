"""DOS round trip: does a crystal generated from a site DOS have that site DOS?

    python benchmarks/round_trip.py                        # the table of the README, on `test`
    python benchmarks/round_trip.py --val --num-targets 30 --guidance-scale 1.5       # tuning, on `val`

Targets are computed DOS of formulas that no network has seen. Candidates are first draws from pure noise with the
number of atoms given; those that the screen rejects are left out and counted. The judge is a forward model trained on
labels that the ranking predictor has not seen; where an element has too few labels it gives its best guess, and that is
counted too. All modes (`MODES`) share their noise. Every site with its DOS against none; control beyond the element,
with the true element of one random site pinned and all else free, that site with its DOS against without; control by
geometry alone, with every species pinned.

Candidates and predictions are kept per target under `runs/round_trip/`, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
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
from _draws import (
    MODES,
    Candidates,
    cache_folder,
    cached,
    candidate_figures,
    crystal_figures,
    generate,
    judge_candidates,
)
from _stats import interval, ratio_of_means, ratios, share_of_gain, summarise
from _tables import text, write_results
from _targets import Target, add_targets, drawn_rows
from matplotlib.figure import Figure
from tqdm import tqdm

from dosmatgen_ase.data import SiteDOSLabels, load_site_dos
from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA, TargetDOS
from dosmatgen_ase.forward.predictor import DOSPredictor
from dosmatgen_ase.forward.predictor_training import element_tables
from dosmatgen_ase.judge.metrics import nearest_sites
from dosmatgen_ase.model.checkpoint import load_model
from dosmatgen_ase.model.conditioning import ConditionalDenoiser
from dosmatgen_ase.plotting import plot_dos

TABLES = {  # by what is judged: modes with the DOS and without
    "all sites": ("conditional", "unconditional"),
    "one site, its element pinned": ("site with DOS", "site without DOS"),
    "all sites, all elements pinned": ("species with DOS", "species without DOS"),
}
BAR = {"conditional / unconditional": 0.40, "true element": 0.50, "judge / per-element mean": 0.75}


def mode_figures(target: Target, candidates: Candidates, name: str) -> dict[str, float]:
    """Figures of one of the `MODES`, on the sites that it is judged by."""
    return candidate_figures(target, candidates, list(MODES).index(name), target.sites(MODES[name].judged))


class Library:
    """Training sites, for the nearest-neighbour look-up and the mean of each element."""

    def __init__(self, train: SiteDOSLabels) -> None:
        site = train.atomic_numbers > 0
        self.values = train.values[site].astype(float)
        self.known = np.repeat(train.known, train.num_atoms, axis=0)
        self.numbers = train.atomic_numbers[site]
        self.element_mean = element_tables(train, np.arange(len(train)))[0].numpy().astype(float)

    def nearest(self, target: Target, power: float) -> np.ndarray:
        """Row of the training site nearest to each site of the target."""
        known = np.broadcast_to(target.known, target.dos.shape)
        return nearest_sites(target.dos, known, self.values, self.known, power=power)

    def retrieve(self, target: Target) -> dict[str, float]:
        """Distances of the nearest sites' own DOS, over the bins known in both."""
        rows = self.nearest(target, 1.0)
        return crystal_figures(self.values[rows], target, known=self.known[rows])


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """How candidates are drawn."""
    return {
        "sampler": asdict(sampler_config(options)),
        "guidance_scale": options.guidance_scale,
        "seed": options.seed,
    }


def drawn_and_judged(
    targets: Sequence[Target],
    model: ConditionalDenoiser,
    judge: DOSPredictor,
    ranker: DOSPredictor,
    options: argparse.Namespace,
) -> list[Candidates]:
    """Candidates of each target in all modes."""
    config = sampler_config(options)
    folder = cache_folder(options, json.dumps([settings_of(options), options.candidates, list(MODES)]))

    def judged(target: Target) -> Candidates:
        made = generate(model, target, options.candidates, config, options.guidance_scale, options.seed)
        return judge_candidates(made, judge, ranker)

    return [cached(folder / f"{t.key}.npz", partial(judged, t)) for t in tqdm(targets, unit="target")]


def tables_of(
    targets: Sequence[Target], found: Sequence[Candidates], library: Library, judge: DOSPredictor
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Figures of the modes and of the baselines, target by target, for each of `TABLES`."""
    floor = judge.predict_arrays([t.atoms for t in targets])

    def baselines(which: str) -> dict[str, list[dict[str, float]]]:
        means = [crystal_figures(library.element_mean[t.atoms.numbers], t, which) for t in targets]
        true = [crystal_figures(p.mean, t, which) for t, p in zip(targets, floor, strict=True)]
        return {"per-element mean": means, "judge on the true structure": true}

    everywhere = {"retrieval": [library.retrieve(t) for t in targets], **baselines("all")}
    return {
        title: {name: [mode_figures(t, c, name) for t, c in zip(targets, found, strict=True)] for name in pair} | others
        for (title, pair), others in zip(TABLES.items(), (everywhere, baselines("site"), baselines("all")), strict=True)
    }


def supported_share(found: Sequence[Candidates], mode: int) -> float:
    """Share of the sites of accepted candidates whose element the judge knows."""
    return float(np.concatenate([np.ravel(c.supported[mode][c.accepted[mode]]) for c in found]).mean())


def ranked_picks(table: dict[str, list[dict[str, float]]], on: str, off: str) -> dict[str, Any]:
    """What the ranked pick with DOS gains: over its mean, beside the oracle, over no DOS, over the element's mean."""

    def columns(*cells: tuple[str, str]) -> np.ndarray:
        return np.array([[f[name] for f in table[row]] for row, name in cells]).T

    picked, mean, best = ((on, f"l1 {name}") for name in ("picked", "mean", "best"))
    return {
        "pick / mean": interval(columns(picked, mean), ratio_of_means),
        "share of the oracle's gain": interval(columns(mean, picked, best), share_of_gain),
        "pick / mean without DOS": interval(columns(picked, (off, "l1 mean")), ratio_of_means),
        "pick / per-element mean": interval(columns(picked, ("per-element mean", "l1 mean")), ratio_of_means),
    }


def element_shares(targets: list[Target], found: list[Candidates], library: Library) -> dict[str, Any]:
    """Share of sites that come out as their true element, over all sites of all targets, whatever the screen says."""
    sites = np.array([len(t.atoms) for t in targets], dtype=float)
    right = {
        "conditional": [(c.numbers[0] == t.atoms.numbers).mean() for t, c in zip(targets, found, strict=True)],
        "unconditional": [(c.numbers[1] == t.atoms.numbers).mean() for t, c in zip(targets, found, strict=True)],
    }
    for name, power in (("nearest neighbour, L1", 1.0), ("nearest neighbour, L2", 2.0)):
        right[name] = [(library.numbers[library.nearest(t, power)] == t.atoms.numbers).mean() for t in targets]

    def weighted(rows: np.ndarray) -> float:
        return float((rows[:, 0] * rows[:, 1]).sum() / rows[:, 1].sum())

    shares = {k: interval(np.stack([np.array(v), sites], 1), weighted) for k, v in right.items()}
    for name in ("nearest neighbour, L1", "nearest neighbour, L2"):
        gain = np.array(right["conditional"]) - np.array(right[name])
        shares[f"conditional - {name}"] = interval(np.stack([gain, sites], 1), weighted)
    return shares


def markdown(report: dict[str, Any]) -> str:
    """The tables that the README includes."""
    count = report["candidates"]
    head = [f"mean of {count}", f"best of {count}", "ranked pick", "pooled, mean", "near gap, mean", "MAE, mean"]
    columns = ["l1 mean", "l1 best", "l1 picked", "pooled mean", "near_gap mean", "mae mean"]
    lines: list[str] = []
    for (title, rows), width in zip(report["tables"].items(), (6, 3, 3), strict=True):
        lines += [f"| {title} | {' | '.join(head[:width])} |", "|--|" + "--:|" * width]
        for name, row in rows.items():
            # A baseline is one answer: it has no best and no pick.
            cells = [text(row[c]) if name in MODES or " / " in name or "mean" in c else "" for c in columns[:width]]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    picks = report["ranked_picks"]
    names = list(next(iter(picks.values())))
    lines += [f"| ranked pick of {count}, with DOS | {' | '.join(names)} |", "|--|" + "--:|" * len(names)]
    lines += [f"| {title} | {' | '.join(text(row[name]) for name in names)} |" for title, row in picks.items()]
    lines += ["", "| sites that come out as their true element | share |", "|--|--:|"]
    lines += [f"| {name} | {text(figure)} |" for name, figure in report["elements"].items()]
    judge = report["judge"]

    def shares(name: str) -> str:
        return ", ".join(f"{mode} {share:.3f}" for mode, share in report[name].items())

    lines += [
        "",
        f"{report['targets']} targets of split `{report['split']}`, {count} candidates from pure noise each, number of "
        f"atoms given, guidance_scale {report['guidance_scale']:g}, {report['sampler']['num_steps']} steps. Mean over "
        "targets [95 % bootstrap interval over targets]. Normalised L1 averaged over sites on [-10, 5] eV; *pooled*: "
        "errors of all sites over all states; *near gap*: pooled on [-2, 2] eV; MAE: states/eV. *Best* is the judge's "
        "choice, *ranked pick* that of a predictor trained on the other half of the formulas. "
        "Retrieval (the nearest training DOS to each site's target) and the per-element mean compare computed DOS with "
        "computed DOS, without a judge.",
        "",
        f"The judge ({judge['train_structures']} labelled structures, CHGNet features; CHGNet saw energies, forces and "
        "moments of most of these crystals, never a DOS) was trained on other formulas than the ranking predictor; its "
        f"error is {text(report['judge_ratio'])} of the per-element mean's (ratios to its floor count up to "
        f"{report['bar']['judge / per-element mean']}). Accepted: {shares('accepted')}. Sites whose element the judge "
        f"knows: {shares('supported')}.",
    ]
    return "\n".join(lines) + "\n"


def plot_distances(table: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Cumulative distribution over targets of the mean distance, one line per row of the table."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    ax = figure.add_subplot()
    for name, rows in table.items():
        values = np.sort([r["l1 mean"] for r in rows if np.isfinite(r["l1 mean"])])
        ax.step(values, np.arange(1, len(values) + 1) / len(values), where="post", label=name)
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.set_xticks(ticks := [0.2, 0.3, 0.5, 1.0, 2.0, 5.0], labels=[f"{x:g}" for x in ticks])
    ax.set_xlabel("site-DOS distance (normalised L1)")
    ax.set_ylabel("share of targets below")
    ax.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def plot_overlays(targets: list[Target], found: list[Candidates], distances: Sequence[float], path: Path) -> None:
    """Target and candidates, site by site, for the median and the worst target."""
    order = [int(i) for i in np.argsort(distances) if np.isfinite(distances[i])]
    chosen = {"median": order[len(order) // 2], "worst": order[-1]}
    columns = min(4, max(len(targets[i].atoms) for i in chosen.values()))
    figure = Figure(figsize=(3.4 * columns, 5.2), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for line, (name, i) in zip(axes, chosen.items(), strict=True):
        target, accepted = targets[i], np.flatnonzero(found[i].accepted[0])[:5]
        for ax in line[len(target.atoms) :]:
            ax.set_axis_off()
        for site, ax in enumerate(line[: len(target.atoms)]):
            made = [found[i].judged[0, k, site].astype(float) for k in accepted]
            curves = [target.dos[site], *made]
            masks = [target.known] + [np.ones_like(target.known)] * len(made)
            plot_dos(
                [
                    TargetDOS(MODEL_GRID.energies, v, m, target.reference, MODEL_SIGMA, "site")
                    for v, m in zip(curves, masks, strict=True)
                ],
                ax=ax,
            )
            ax.set_title(
                f"{name}: {target.atoms.symbols[site]} of {target.atoms.get_chemical_formula()}", fontsize="small"
            )
    figure.savefig(path, dpi=150)


def options_of(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, Any]:
    """The command line."""
    parser = argparse.ArgumentParser(description="DOS round trip on held-out formulas.")
    add_options(parser)
    add_split(parser)
    add_predictors(parser)
    add_targets(parser, 200)
    parser.add_argument("--candidates", type=int, default=20, help="per target and mode (default 20)")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "round_trip", help="candidates are kept there")
    options = parser.parse_args(arguments)
    if options.num_targets < 1 or options.candidates < 1:
        parser.error("--num-targets and --candidates must be at least 1")
    return parser, options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Generate, judge, compare and write the results."""
    parser, options = options_of(arguments)
    torch.set_num_threads(1)
    model, header = load_model(options.weights)
    judge, ranker = load_predictors(parser, options)
    labels, split = load_site_dos(ROOT / "data" / "site_dos"), split_of(options)
    library = Library(labels.select(labels.split == "train"))
    rows = drawn_rows(labels, np.flatnonzero(labels.split == split), options)
    targets = [Target.from_label(labels, row, options.seed) for row in rows]
    found = drawn_and_judged(targets, model, judge, ranker, options)
    tables = tables_of(targets, found, library, judge)
    whole = tables["all sites"]
    report = {
        "weights": header["sha256"],
        "judge": judge.info,
        "predictor": ranker.info,
        "split": split,
        "targets": len(targets),
        "target_ids": [t.material_id for t in targets],
        "candidates": options.candidates,
        **settings_of(options),
        "bar": BAR,
        "judge_ratio": ratios(whole, "judge on the true structure", "per-element mean")["l1 mean"],
        "accepted": {m: float(np.mean([c.accepted[i] for c in found])) for i, m in enumerate(MODES)},
        "supported": {m: supported_share(found, i) for i, m in enumerate(MODES)},
        "tables": {
            title: summarise(tables[title]) | {f"{on} / {off}": ratios(tables[title], on, off)}
            for title, (on, off) in TABLES.items()
        },
        "ranked_picks": {title: ranked_picks(tables[title], *pair) for title, pair in TABLES.items()},
        "elements": element_shares(targets, found, library),
        "per_target": {
            t.material_id: {"formula": t.atoms.get_chemical_formula(), **{k: v[i]["l1 mean"] for k, v in whole.items()}}
            for i, t in enumerate(targets)
        },
    }
    out = results_folder(options)
    table = markdown(report)
    print(table)
    write_results(out, "round_trip", report, table)
    plot_distances(whole, out / "round_trip_distances.png")
    plot_overlays(targets, found, [f["l1 mean"] for f in whole["conditional"]], out / "round_trip_overlays.png")
    return report


if __name__ == "__main__":
    main()
