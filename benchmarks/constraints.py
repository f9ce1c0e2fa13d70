"""Constraints: are the exact promises exact, what do they cost, and do the statistical ones hold?

    python benchmarks/constraints.py                                   # the table of the README, on `test`
    python benchmarks/constraints.py --val --num-targets 10            # quickly, on `val`

Candidates are first draws by the path that users take (`Request` and `DOSGenerator`), neither screened nor drawn again.
*Conditions*: the DOS of one random site given, of every site, of every site on [-2, 2] eV only, and of none; the
number of atoms is always given. *Pins*: parts of the true crystal are held (or its composition), without a DOS, and
the outputs that pass the screen and respect every pin are counted. *Cobalt*: the DOS of Ni in Au3Ni asked of a site
held as Co, against no DOS there. *Templates*: how far the output lies from a template, by strength.

Judged candidates are kept under `runs/constraints/`, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from _draws import Candidates, cache_folder, cached, candidate_figures, judge_candidates
from _stats import interval, mean_of, ratio_of_means, ratios, summarise
from _tables import text, write_results
from _targets import Target, add_targets, drawn_rows, rng_for
from ase import Atoms
from ase.spacegroup import crystal
from matplotlib.figure import Figure
from tqdm import tqdm

from dosmatgen_ase import DOSGenerator, TargetDOS
from dosmatgen_ase.crystals.batch import minimum_image
from dosmatgen_ase.crystals.screening import screen
from dosmatgen_ase.data import load_site_dos
from dosmatgen_ase.dos import MODEL_GRID, NEAR_GAP, normalised_l1_arrays
from dosmatgen_ase.forward.predictor import DOSPredictor
from dosmatgen_ase.generate.generator import BATCH_PAIRS
from dosmatgen_ase.generate.request import WINDOW_GUIDANCE, WINDOW_TEMPERATURE, Request
from dosmatgen_ase.generate.sampler import SamplerConfig
from dosmatgen_ase.generate.settings import GenerationSettings
from dosmatgen_ase.model.conditioning import Guidance


@dataclass(frozen=True)
class Condition:
    """Which sites' DOS is given ("all", "none", or the "site" drawn for the target), where, and to how many draws."""

    sites: str
    window: tuple[float, float] | None
    count: int


CONDITIONS = {
    "every site": Condition("all", None, 20),
    "one site": Condition("site", None, 50),
    "every site, [-2, 2] eV": Condition("all", NEAR_GAP, 20),
    "nothing": Condition("none", None, 20),
}
PINS = ("nothing", "half of the species", "half of the sites", "cell", "composition", "elements", "all of these")
STRENGTHS = tuple(np.linspace(0, 1, 11).round(1).tolist())
COBALT_SIZES = (4, 5, 6, 7)
COBALT_COUNT = 50
BAR = {
    "one site, best of 50 / every site, best of 20": 1.1,
    "window / whole range, inside the window, mean": 1.2,
    "window / whole range, inside the window, best of 20": 1.2,
    "valid with pins / without": 0.9,
    "cobalt with DOS / without": 1.0,
}
Judged = Callable[[str, Request, Target, int], Candidates]  # from name, request, target and number of draws


def request(dos: Any = None, **settings: Any) -> Request:
    """A checked request, by the names of `DOSGenerator.generate`; a template gives what is held, and nothing else."""
    return Request.of(dos, GenerationSettings(**{"strength": 1.0, **settings}))


def draws(
    generator: DOSGenerator,
    wanted: Request,
    size: int,
    rngs: list[np.random.Generator],
    config: SamplerConfig,
    guidance: Guidance | None = None,
) -> list[Atoms]:
    """One first draw per generator of random numbers, guided as by default if not told."""
    default, config = wanted.sampling(config)
    guidance = guidance or default
    room = max(1, BATCH_PAIRS // size**2)
    parts = (rngs[i : i + room] for i in range(0, len(rngs), room))
    return [atoms for part in parts for atoms in generator._draw(wanted, [size] * len(part), part, config, guidance)[0]]


def judged_draws(
    generator: DOSGenerator,
    wanted: Request,
    target: Target,
    count: int,
    judge: DOSPredictor,
    ranker: DOSPredictor,
    options: argparse.Namespace,
    guidance: Guidance | None = None,
) -> Candidates:
    """First draws for a target, as the one mode of its candidates."""
    rngs = [rng_for(options.seed, target.material_id, k) for k in range(count)]
    made = draws(generator, wanted, len(target.atoms), rngs, sampler_config(options), guidance)
    return judge_candidates(made, judge, ranker, 1)


def site_targets(target: Target, condition: Condition) -> dict[int, TargetDOS] | None:
    """What is given of a target's DOS."""
    whole = target.targets(condition.sites)
    return {i: t if condition.window is None else t.window(*condition.window) for i, t in whole.items()} or None


def by_condition(targets: list[Target], judged: Judged) -> dict[str, list[Candidates]]:
    """Candidates of each target under each of `CONDITIONS`."""
    found: dict[str, list[Candidates]] = {name: [] for name in CONDITIONS}
    for target in tqdm(targets, desc="conditions", unit="target"):
        for i, (name, condition) in enumerate(CONDITIONS.items()):
            wanted = request(site_targets(target, condition), num_atoms=len(target.atoms))
            found[name].append(judged(f"condition{i}", wanted, target, condition.count))
    return found


def figures(targets: list[Target], found: dict[str, list[Candidates]], which: str) -> dict[str, list[dict[str, float]]]:
    """Figures of each condition, target by target, on "all" sites or on the "site" drawn."""
    return {
        name: [candidate_figures(t, c, 0, t.sites(which)) for t, c in zip(targets, candidates, strict=True)]
        for name, candidates in found.items()
    }


def accepted(candidates: list[Candidates]) -> str:
    """How many of the draws of a condition are accepted."""
    kept = np.concatenate([c.accepted[0] for c in candidates])
    return f"{kept.sum()} of {kept.size}"


def diversity(candidates: Candidates) -> float:
    """Different compositions among the accepted candidates, as a share of them."""
    made = np.sort(candidates.numbers[0, candidates.accepted[0]], axis=-1)
    return len(np.unique(made, axis=0)) / len(made) if len(made) else np.nan


# -- pins --------------------------------------------------------------------------------------------------------------


def pinned(atoms: Atoms, pin: str, rng: np.random.Generator) -> Request:
    """A request that holds some of a crystal (`PINS`)."""
    half = sorted(rng.choice(len(atoms), (len(atoms) + 1) // 2, replace=False).tolist())
    species: dict[str, Any] = {"fixed_species": {i: atoms.symbols[i] for i in half}}
    sites = {"template": atoms, "fixed_sites": half, "fixed_cell": True}
    composition = {"composition": atoms.get_chemical_formula()}
    elements = {"elements": sorted(set(atoms.symbols))}
    settings = {
        "nothing": {},
        "half of the species": species,
        "half of the sites": sites,
        "cell": {"template": atoms, "fixed_cell": True},
        "composition": composition,
        "elements": elements,
        "all of these": species | sites | composition | elements,
    }[pin]
    return request(num_atoms=len(atoms), **settings)


def respected(made: Atoms, truth: Atoms, wanted: Request) -> bool:
    """Whether an output has what the request holds, to 1e-6 A."""
    held = wanted.held_sites()
    return bool(
        (not wanted.fixed_cell or np.abs(made.cell - truth.cell).max() < 1e-6)
        and np.abs(made.positions[held] - truth.positions[held]).max(initial=0.0) < 1e-6
        and all(made.numbers[i] == z for i, z in wanted.pinned_species().items())
        and set(made.numbers.tolist()) <= wanted.allowed
        and (not wanted.composition or sorted(made.numbers) == sorted(truth.numbers))
    )


def pin_table(
    generator: DOSGenerator, targets: list[Target], count: int, config: SamplerConfig, seed: int
) -> dict[str, dict[str, Any]]:
    """Share that passes the screen, with its interval, and share that respects what is held, for each of `PINS`."""
    valid: dict[str, list[float]] = {pin: [] for pin in PINS}
    kept: dict[str, list[bool]] = {pin: [] for pin in PINS}
    for target in tqdm(targets, desc="pins", unit="target"):
        for pin in PINS:
            rngs = [rng_for(seed, target.material_id, k) for k in range(count)]
            wanted = pinned(target.atoms, pin, rng_for(seed, target.material_id, 0, 1))
            made = draws(generator, wanted, len(target.atoms), rngs, config)
            valid[pin].append(float(np.mean([screen(a).accepted for a in made])))
            kept[pin] += [respected(a, target.atoms, wanted) for a in made]
    return {
        pin: {"respected": float(np.mean(kept[pin])), "valid": interval(np.array(valid[pin]), mean_of)} for pin in PINS
    }


# -- templates ---------------------------------------------------------------------------------------------------------


def displacement(made: Atoms, template: Atoms) -> float:
    """RMSD of the sites to those of the template, Angstrom, in the template's cell, their mean displacement removed."""
    difference = made.get_scaled_positions() - template.get_scaled_positions()
    difference = minimum_image(torch.tensor(difference - difference[0]))  # relative to a site: no jump at the border
    moved = minimum_image(difference - difference.mean(0)).numpy() @ template.cell.array
    return float(np.sqrt((moved**2).sum(-1).mean()))


def template_rows(
    generator: DOSGenerator, targets: list[Target], count: int, config: SamplerConfig, seed: int
) -> list[dict[str, Any]]:
    """One row per draw: strength ("noise" without a template), RMSD, species kept, volume ratio, shortest distance."""
    rows = []
    for target in tqdm(targets, desc="templates", unit="target"):
        atoms, size = target.atoms, len(target.atoms)
        for strength in (*STRENGTHS, None):
            settings = {"num_atoms": size} if strength is None else {"template": atoms, "strength": strength}
            # Noise of its own where there is no template: the two samples are compared as distributions.
            rngs = [rng_for(seed, target.material_id, k, 2 if strength is None else 1) for k in range(count)]
            for made in draws(generator, request(**settings), size, rngs, config):
                shortest = screen(made).min_distance
                rows.append(
                    {
                        "target": target.material_id,
                        "strength": strength,
                        "rmsd": displacement(made, atoms),
                        "species": float((made.numbers == atoms.numbers).mean()),
                        "volume": made.get_volume() / atoms.get_volume(),
                        "distance": np.nan if shortest is None else shortest,
                    }
                )
    return rows


def template_table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians by strength; strength 1 against noise by a permutation test of the difference within targets."""
    names = ("rmsd", "species", "volume", "distance")

    def column(strength: float | None, name: str) -> np.ndarray:
        values = np.array([r[name] for r in rows if r["strength"] == strength])
        return values[np.isfinite(values)]

    table = {
        str(strength): {name: np.quantile(column(strength, name), [0.25, 0.5, 0.75]).tolist() for name in names}
        | {"species mean": float(column(strength, "species").mean())}
        for strength in (*STRENGTHS, None)
    }
    exact = all(r["rmsd"] < 1e-6 and r["species"] == 1 for r in rows if r["strength"] == 0)

    def by_target(strength: float | None, name: str) -> np.ndarray:
        """(draws, targets)."""
        found: dict[str, list[float]] = {r["target"]: [] for r in rows}
        for r in rows:
            if r["strength"] == strength:
                found[r["target"]].append(r[name])
        return np.array(list(found.values())).T

    def p_value(name: str) -> float:
        """Draws of one target are alike, so its draws are exchanged among themselves only."""
        rng = np.random.default_rng(0)
        pooled = np.concatenate([by_target(1.0, name), by_target(None, name)])
        pooled = pooled[:, np.isfinite(pooled).all(0)]
        half = len(pooled) // 2
        seen = pooled[:half].mean() - pooled[half:].mean()
        shuffled = [rng.permuted(pooled, axis=0) for _ in range(9999)]
        differences = np.array([s[:half].mean() - s[half:].mean() for s in shuffled])
        return float((1 + (np.abs(differences) >= abs(seen) - 1e-12).sum()) / (1 + len(differences)))

    tests = {name: p_value(name) for name in names}
    return {"strengths": table, "strength 0 is the template": exact, "strength 1 against noise, p": tests}


def plot_strengths(table: dict[str, Any], path: Path) -> None:
    """RMSD and species kept, by strength; medians and quartiles, noise as a line."""
    figure = Figure(figsize=(7.5, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows, noise = table["strengths"], table["strengths"]["None"]
    quartiles = np.array([rows[str(s)]["rmsd"] for s in STRENGTHS])
    left.fill_between(STRENGTHS, quartiles[:, 0], quartiles[:, 2], color="#3b75af", alpha=0.25, linewidth=0)
    left.plot(
        STRENGTHS, quartiles[:, 1], color="#3b75af", marker="o", markersize=3, label="template (median, quartiles)"
    )
    left.axhline(noise["rmsd"][1], color="0.4", linestyle=":", label="from noise")
    left.set_ylabel("RMSD to the template (Å)")
    right.plot(STRENGTHS, [rows[str(s)]["species mean"] for s in STRENGTHS], color="#3b75af", marker="o", markersize=3)
    right.axhline(noise["species mean"], color="0.4", linestyle=":")
    right.set_ylabel("share of species kept")
    for ax in (left, right):
        ax.set_xlabel("strength")
        ax.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


# -- cobalt ------------------------------------------------------------------------------------------------------------


def cobalt_table(judge: DOSPredictor, judged: Judged) -> tuple[dict[str, Any], dict[str, Any]]:
    """A site held as cobalt with and without the DOS of Ni in Au3Ni; the ratio of their mean distances."""
    dos = TargetDOS.from_file(ROOT / "data" / "ni_in_au3ni.npz", site=3)
    seen = dos.on_grid()
    distances: dict[str, list[np.ndarray]] = {"with DOS": [], "without": []}
    species: dict[str, list[np.ndarray]] = {"with DOS": [], "without": []}
    for size in COBALT_SIZES:
        whole = np.tile(seen.values, (size, 1))
        target = Target(f"cobalt{size}", Atoms(f"Co{size}"), whole, seen.known, seen.reference, 0)
        for name, given in (("with DOS", dos), ("without", None)):
            wanted = request(given, num_atoms=size, fixed_species={0: "Co"})
            candidates = judged(name.replace(" ", "-"), wanted, target, COBALT_COUNT)
            values = candidates.judged[0, :, 0].astype(float)
            distances[name].append(normalised_l1_arrays(values, seen.values, seen.known))
            species[name].append(candidates.numbers[0, :, 0])
    pairs = np.stack([np.concatenate(d) for d in distances.values()], axis=1)
    rows = {
        name: {
            "mean": interval(pairs[:, i : i + 1], mean_of),
            "best": float(np.nanmin(pairs[:, i])),
            "share": float((np.concatenate(species[name]) == 27).mean()),
        }
        for i, name in enumerate(distances)
    }
    au3ni = crystal(("Au", "Ni"), [(0, 0.5, 0.5), (0, 0, 0)], spacegroup=221, cellpar=[4.03] * 3 + [90] * 3)
    floor = normalised_l1_arrays(judge.predict_arrays([au3ni])[0].mean[3], seen.values, seen.known)
    return {"rows": rows, "draws": len(pairs), "judge on Au3Ni": float(floor)}, interval(pairs, ratio_of_means)


# -- report ------------------------------------------------------------------------------------------------------------


def bar_ratios(
    one: dict[str, list[dict[str, float]]], everywhere: dict[str, list[dict[str, float]]], pins: dict[str, Any]
) -> dict[str, Any]:
    """Ratios that `BAR` is set for, but that of cobalt, from the figures of one site, of all sites, and of the pins."""
    windowed = ratios(everywhere, "every site, [-2, 2] eV", "every site")
    valid = {pin: row["valid"] for pin, row in pins.items()}
    worst = min(PINS[1:], key=lambda pin: valid[pin]["value"])
    return {
        "one site, best of 50 / every site, best of 20": ratios(one, "one site", "every site")["l1 best"],
        "window / whole range, inside the window, mean": windowed["near_gap mean"],
        "window / whole range, inside the window, best of 20": windowed["near_gap best"],
        "valid with pins / without": {
            "value": valid[worst]["value"] / valid["nothing"]["value"],
            "interval": [x / valid["nothing"]["value"] for x in valid[worst]["interval"]],
            "worst": worst,
        },
    }


def markdown(report: dict[str, Any]) -> str:
    """The tables that the README includes."""
    lines = ["| DOS given | accepted | that site: mean | best | all sites on [-2, 2] eV: mean | best | compositions |"]
    lines += ["|--|--:|--:|--:|--:|--:|--:|"]
    for name in CONDITIONS:
        site, everywhere = report["one site"][name], report["all sites"][name]
        figures = [site["l1 mean"], site["l1 best"], everywhere["near_gap mean"], everywhere["near_gap best"]]
        cells = [text(f) for f in figures] + [f"{report['diversity'][name]:.2f}"]
        lines.append(f"| {name} | {report['accepted'][name]} | {' | '.join(cells)} |")
    lines += ["", "| held | respected | valid |", "|--|--:|--:|"]
    lines += [f"| {pin} | {row['respected']:.3f} | {text(row['valid'])} |" for pin, row in report["pins"].items()]
    lines += ["", "| a cobalt site, DOS of Ni in Au3Ni | mean | best | Co |", "|--|--:|--:|--:|"]
    for name, row in report["cobalt"]["rows"].items():
        lines.append(f"| {name} | {text(row['mean'])} | {row['best']:.2f} | {row['share']:.3f} |")
    lines += ["", "| bar | value | wanted |", "|--|--:|--:|"]
    lines += [f"| {name} | {text(report['ratios'][name])} | {bar} |" for name, bar in report["bar"].items()]
    templates = report["templates"]
    tests = ", ".join(f"{name} {p:.2f}" for name, p in templates["strength 1 against noise, p"].items())
    lines += [
        "",
        f"{report['targets']} targets of split `{report['split']}`, {report['sampler']['num_steps']} steps, "
        f"guidance_scale 1 (as by default, {WINDOW_GUIDANCE.scale:g} until the species are settled for the window, and "
        f"species at a temperature of {WINDOW_TEMPERATURE:g} instead of {report['sampler']['species_temperature']:g}); "
        "mean over targets [95 % bootstrap interval]. Normalised L1 by the judge; *compositions*: "
        "different ones, as a share of the accepted candidates. Strength 0 "
        f"{'returns' if templates['strength 0 is the template'] else 'DOES NOT RETURN'} the template; strength 1 "
        f"against noise, p of a permutation within targets: {tests}. The cobalt rows are over "
        f"{report['cobalt']['draws']} draws for one target, *best* is the best of them all. For the judge the nickel "
        f"site of Au3Ni itself lies at {report['cobalt']['judge on Au3Ni']:.2f} from its DOS, so these rows compare "
        "with each other only.",
    ]
    return "\n".join(lines) + "\n"


def options_of(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, Any]:
    """The command line."""
    parser = argparse.ArgumentParser(description="Constraints on held-out formulas.")
    add_options(parser)
    add_split(parser)
    add_predictors(parser)
    add_targets(parser, 200)
    parser.add_argument("--draws", type=int, default=None, help="at most this many per target and row of a table")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "constraints", help="candidates are kept there")
    options = parser.parse_args(arguments)
    if options.num_targets < 1 or (options.draws is not None and options.draws < 1):
        parser.error("--num-targets and --draws must be at least 1")
    return parser, options


def targets_of(options: argparse.Namespace) -> list[Target]:
    """Labels of the split that are known near the gap: else there is nothing to ask for there."""
    labels = load_site_dos(ROOT / "data" / "site_dos")
    near = (MODEL_GRID.energies >= NEAR_GAP[0]) & (MODEL_GRID.energies <= NEAR_GAP[1])
    usable = (labels.split == split_of(options)) & labels.known[:, near].any(axis=1)
    rows = drawn_rows(labels, np.flatnonzero(usable), options)
    return [Target.from_label(labels, row, options.seed) for row in rows]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure everything and write the results."""
    parser, options = options_of(arguments)
    torch.set_num_threads(1)
    generator = DOSGenerator(options.weights, device="cpu")
    judge, ranker = load_predictors(parser, options)
    config, seed = sampler_config(options), options.seed
    targets = targets_of(options)
    defaults = [asdict(WINDOW_GUIDANCE), WINDOW_TEMPERATURE]
    folder = cache_folder(options, json.dumps([asdict(config), seed, options.draws, *defaults]))

    def at_most(count: int) -> int:
        return min(count, options.draws or count)

    def judged(name: str, wanted: Request, target: Target, count: int) -> Candidates:
        make = partial(judged_draws, generator, wanted, target, at_most(count), judge, ranker, options)
        return cached(folder / f"{target.key}-{name}.npz", make)

    found = by_condition(targets, judged)
    one, everywhere = figures(targets, found, "site"), figures(targets, found, "all")
    pins = pin_table(generator, targets, at_most(10), config, seed)
    templates = template_table(template_rows(generator, targets[:20], at_most(5), config, seed))
    cobalt, cobalt_ratio = cobalt_table(judge, judged)
    report = {
        "weights": generator.header["sha256"],
        "judge": judge.info,
        "predictor": ranker.info,
        "split": split_of(options),
        "targets": len(targets),
        "target_ids": [t.material_id for t in targets],
        "seed": seed,
        "sampler": asdict(config),
        "bar": BAR,
        "accepted": {name: accepted(candidates) for name, candidates in found.items()},
        "diversity": {name: float(np.nanmean([diversity(c) for c in cs])) for name, cs in found.items()},
        "one site": summarise(one),
        "all sites": summarise(everywhere),
        "pins": pins,
        "cobalt": cobalt,
        "templates": templates,
        "ratios": bar_ratios(one, everywhere, pins) | {"cobalt with DOS / without": cobalt_ratio},
    }
    out = results_folder(options)
    table = markdown(report)
    print(table)
    write_results(out, "constraints", report, table)
    plot_strengths(templates, out / "constraints_strength.png")
    return report


if __name__ == "__main__":
    main()
