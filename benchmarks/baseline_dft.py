"""Who is nearer to a DOS under DFT: crystals that are generated for it, or known crystals of another formula?

    python benchmarks/baseline_dft.py          # 24 targets of `test`; Quantum ESPRESSO, two hours on one core
    python benchmarks/baseline_dft.py --methods generator     # a part; what is computed is kept

Each method has three tries per target, in its own order, and DFT judges the first of them and the best of three. The
generator draws 50 crystals of the target's size; the predictor that ships puts them in order, those of the target's own
formula are left out. The look-ups take whole labelled crystals of another formula, as many atoms as the target or a
whole number of times fewer: by their labels, or by the predicted DOS as if there were none. What is generated is
relaxed with CHGNet and its symmetry refined; known crystals stay as the Materials Project relaxed them. DFT is that of
the labels, which are taken as they are, also those of an earlier recipe (with ``--anew`` they are computed anew). A
crystal has no order of sites: its distance is that of the best assignment of targets to sites.

Everything is kept under `runs/baseline_dft/`, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy are loaded

import numpy as np
from _common import ROOT, add_split, results_folder, split_of
from _stats import interval, mean_of
from _tables import text, write_results
from _targets import Target, add_targets, drawn_rows, rng_for
from ase import Atoms
from ase.data import chemical_symbols
from dft_judge import TIME_LIMIT, kept, on_grid, settled
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from dosmatgen_ase.crystals.screening import reduced_formula
from dosmatgen_ase.data import SiteDOSLabels, load_site_dos
from dosmatgen_ase.dft.batch import compute_many
from dosmatgen_ase.dft.pseudopotentials import without_pseudopotential
from dosmatgen_ase.dft.result import ElectronicStructure
from dosmatgen_ase.dft.settings import COMPARABLE, EspressoSettings
from dosmatgen_ase.dos import TargetDOS
from dosmatgen_ase.forward.predictor import DEFAULT_PREDICTOR, DOSPredictor
from dosmatgen_ase.generate.generator import DOSGenerator, RejectedError
from dosmatgen_ase.judge.ranking import best, score
from dosmatgen_ase.judge.stability import energy_above_hull
from dosmatgen_ase.limits import MAX_ATOMIC_NUMBER
from dosmatgen_ase.retrieval.build import build_index, read_known
from dosmatgen_ase.retrieval.index import DOSIndex, default_index
from dosmatgen_ase.retrieval.query import search

GENERATOR, COMPUTED, PREDICTED = "generator", "look-up, computed", "look-up, predicted"
METHODS = (GENERATOR, COMPUTED, PREDICTED)
TRIES = 3  # crystals that a method may have computed, at most
NOT_COMPUTED = "not computed"
FEWEST = 8  # targets that are worth a table
HITS = 100  # of a look-up, before those of the target's own formula are left out


Tries = list[dict[str, Any] | str]  # what is told of each try in turn, or why there is nothing


@dataclass(frozen=True)
class Task:
    """What is handed over: the DOS of "all" sites or of one "site", on which energies, and if its elements are free."""

    dos: str
    new_elements: bool = False
    window: tuple[float, float] | None = None


TASKS = {
    "all sites": Task("all"),
    "all sites, its elements excluded": Task("all", new_elements=True),
    "one site": Task("site"),
    "all sites, -2 to 2 eV": Task("all", window=(-2.0, 2.0)),
}


@dataclass(frozen=True)
class Question:
    """A target with a task."""

    target: Target
    task: str

    @property
    def key(self) -> str:
        """Name of files about it."""
        return f"{self.target.key}-{list(TASKS).index(self.task)}"

    @property
    def wanted(self) -> dict[int, TargetDOS]:
        """The DOS asked for."""
        task = TASKS[self.task]
        whole = self.target.targets(task.dos)
        return {i: dos if task.window is None else dos.window(*task.window) for i, dos in whole.items()}

    @property
    def excluded(self) -> list[str]:
        """Elements that may not be used."""
        return sorted(set(self.target.atoms.symbols)) if TASKS[self.task].new_elements else []

    def own(self, atoms: Atoms) -> bool:
        """Whether a crystal has the formula of the target."""
        return reduced_formula(atoms) == reduced_formula(self.target.atoms)


# -- the tries of each method ------------------------------------------------------------------------------------------


def generated(
    question: Question, generator: DOSGenerator, predictor: DOSPredictor, draws: int, seed: int, unfit: Sequence[str]
) -> list[Atoms]:
    """The best tries of `draws` by the predictor; ``info["own"]`` counts those of the target's formula."""
    options: dict[str, Any] = {
        "num_atoms": len(question.target.atoms),
        "exclude_elements": sorted({*unfit, *question.excluded}),
        "seed": int(rng_for(seed, question.target.material_id, 0, 4).integers(2**31)),
    }
    try:
        made = generator.generate(question.wanted, draws, **options)
    except RejectedError as error:
        made = list(error.structures)
    others = [atoms for atoms in made if not question.own(atoms)]
    picks = best(score(others, question.wanted, predictor=predictor), TRIES)
    for atoms in picks:
        atoms.info |= {"own": len(made) - len(others), "draws": len(made)}
    return picks


def looked_up(question: Question, index: DOSIndex) -> list[Atoms]:
    """The nearest whole crystals of another formula."""
    size = len(question.target.atoms)
    hits = search(
        list(question.wanted.values()),
        HITS,
        num_atoms=[n for n in range(1, size + 1) if size % n == 0],
        exclude_elements=question.excluded or None,
        index=index,
    )
    return [hit for hit in hits if not question.own(hit)][:TRIES]


def indexes(labels: SiteDOSLabels, unfit: Sequence[str], largest: int, cache: Path) -> dict[str, DOSIndex]:
    """The labelled crystals that are small enough and can be computed, with their labels and as they are predicted."""
    names = set(labels.material_id.tolist())
    pool = [
        atoms
        for atoms in read_known(ROOT / "data" / "structures.parquet")
        if len(atoms) <= largest and atoms.info["material_id"] in names and not set(atoms.symbols) & set(unfit)
    ]
    of_pool = labels.select(np.isin(labels.material_id, [atoms.info["material_id"] for atoms in pool]))
    parts = cache / "parts"
    predicted = build_index(pool, None, parts=parts, progress=True)
    return {COMPUTED: build_index(pool, of_pool, parts=parts), PREDICTED: predicted}


# -- their distance ----------------------------------------------------------------------------------------------------


def distance(wanted: Sequence[TargetDOS], values: np.ndarray, known: np.ndarray) -> dict[str, float]:
    """Normalised L1 of a crystal (n, 151) to the targets, mean over them, by the assignment that costs least.

    ``pooled``: absolute errors of all sites over all states. ``share``: of the states wanted that could be compared.
    """
    cells = max(1, len(wanted) // len(values))
    values, known = np.tile(values, (cells, 1)), np.tile(known, (cells, 1))
    mask = np.array([t.known for t in wanted])[:, None] & known[None]
    goal = np.array([t.values for t in wanted])[:, None]
    error, states = (np.abs(values - goal) * mask).sum(-1), (goal * mask).sum(-1)
    cost = error / np.maximum(states, 1e-9)
    filled = np.array([t.values[t.known].sum() > 0 for t in wanted])  # a site without states has no ratio
    rows, columns = linear_sum_assignment(np.where(filled[:, None], cost, 0.0))
    error, states, cost = error[rows, columns], states[rows, columns], cost[rows, columns]
    whole = sum(float(t.values[t.known].sum()) for t in wanted)
    return {
        "l1": float(cost[filled].mean()),
        "pooled": float(error.sum() / states.sum()),
        "share": states.sum() / whole,
    }


def label_of(labels: SiteDOSLabels, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and known bins of all sites of a label, (n, 151)."""
    n = int(labels.num_atoms[row])
    return labels.values[row, :n].astype(float), np.tile(labels.known[row], (n, 1))


# -- tables ------------------------------------------------------------------------------------------------------------


def summary(rows: Mapping[str, Sequence[Tries]], tries: int) -> dict[str, Any]:
    """Per number of tries the methods' mean and median; per pair of them the difference and who is nearer.

    Over the targets of which every method has all these tries behind it, and one of them gave a DOS.
    """
    count = len(next(iter(rows.values())))
    names = [name for name, some in rows.items() if any(isinstance(row, dict) for found in some for row in found)]

    def done(found: Tries) -> bool:
        return NOT_COMPUTED not in found and any(isinstance(row, dict) for row in found)

    def figures_of(k: int) -> dict[str, Any]:
        whole = [i for i in range(count) if all(done(rows[name][i][:k]) for name in names)]

        def best_of(name: str, metric: str) -> np.ndarray:
            # The best is chosen by l1, so that both figures are of one crystal.
            found = [[row for row in rows[name][i][:k] if isinstance(row, dict)] for i in whole]
            return np.array([min(some, key=lambda row: row["l1"])[metric] for some in found])

        l1 = {name: best_of(name, "l1") for name in names}
        pairs = {f"{one} - {other}": l1[one] - l1[other] for one, other in combinations(names, 2)}
        return {
            "targets": len(whole),
            "methods": {n: both(x) | {"pooled": interval(best_of(n, "pooled"), mean_of)} for n, x in l1.items()},
            "pairs": {pair: both(x) | {"first_nearer": int((x < 0).sum())} for pair, x in pairs.items()},
        }

    return {str(k): figures_of(k) for k in sorted({1, tries})}


def both(x: np.ndarray) -> dict[str, Any]:
    """Mean and median with their intervals."""
    return {
        "mean": interval(x, mean_of),
        "median": interval(x, lambda rows: float(np.median(rows))),
    }


def markdown(report: dict[str, Any]) -> str:
    """The tables."""
    lines = []
    for task, by_tries in report["tables"].items():
        for k, figures in by_tries.items():
            if figures["targets"] < FEWEST:
                continue
            name = "the first" if k == "1" else f"best of {k}"
            lines += [f"| {task}, {name}, {figures['targets']} targets | mean | median | pooled |", "|--|" + "--:|" * 3]
            for method, row in figures["methods"].items():
                lines.append(f"| {method} | {text(row['mean'])} | {text(row['median'])} | {text(row['pooled'])} |")
            for pair, row in figures["pairs"].items():
                lines.append(f"| {pair} | {text(row['mean'])} | {text(row['median'])} | |")
            near = [
                f"{pair.replace(' - ', ' before ')} for {row['first_nearer']}" for pair, row in figures["pairs"].items()
            ]
            lines += ["", f"Nearer: {'; '.join(near)}.", ""]
    told = report["facts"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in told["share"].items())
    lines.append(
        f"Targets of split `{report['split']}` with 2 to {report['max_atoms']} atoms, labels of recipe {COMPARABLE} "
        "or later. "
        "Normalised L1 by DFT over the energies known in both, mean over the sites by the best assignment; mean and "
        "median over targets [95 % bootstrap interval]; *pooled*: errors of all sites over all states. No crystal has "
        f"the formula of its target. States of the targets that could be compared: {shares}."
    )
    if made := told.get("generated"):
        lines.append(
            f"Generated: {made['crystals']} crystals, of which {made['new']} are not among the known ones; energy "
            f"above the hull (CHGNet) {made['above_hull']:.2f} eV/atom in the median. Where elements are free, "
            f"{made['own']:.0%} of the draws had the formula of the target and were left out; for {made['none']} "
            "targets no other draw was fit."
        )
    if known := told.get("known"):
        lines.append(
            f"Known crystals found: {known['crystals']} of {known['pool']} that have labels; the label of "
            f"{known['earlier']} is of an earlier recipe (off by some 10 %). Of the {known['by_prediction']} found by "
            f"prediction, the predictor had been trained on the labels of {known['seen']}."
        )
    missing = ", ".join(f"{method} {n}" for method, n in report["not_computed"].items() if n) or "none"
    lines.append(f"Failed: {', '.join(report['failed']) or 'none'}. Not computed yet: {missing}.")
    return "\n".join(lines) + "\n"


def of_generated(questions: Sequence[Question], picks: Mapping[tuple[str, str], list[Atoms]]) -> dict[str, Any]:
    """What the text tells of what was generated."""
    made = [atoms for (_, method), some in picks.items() if method == GENERATOR for atoms in some]
    free = [picks[q.key, GENERATOR] for q in questions if not q.excluded and (q.key, GENERATOR) in picks]
    above = [x for x in energy_above_hull(made) if x is not None]
    return {
        "crystals": len(made),
        "new": sum(default_index().find(atoms) is None for atoms in made),
        "above_hull": float(np.median(above)),
        "own": sum(some[0].info["own"] for some in free if some) / sum(some[0].info["draws"] for some in free if some),
        "none": sum(not some for some in free),
    }


def of_known(name_of: Mapping[tuple[str, str, int], str], labels: SiteDOSLabels, computed: set[str]) -> dict[str, Any]:
    """What the text tells of what was found."""
    found = {name for (_, method, _), name in name_of.items() if method != GENERATOR}
    predicted = {name for (_, method, _), name in name_of.items() if method == PREDICTED}
    trained = set(labels.material_id[labels.split == "train"].tolist())
    earlier = set(labels.material_id[labels.recipe < COMPARABLE].tolist()) - computed
    return {
        "crystals": len(found),
        "earlier": len(found & earlier),
        "by_prediction": len(predicted),
        "seen": len(predicted & trained),
    }


@dataclass
class Tried:
    """What each method tries for each question.

    Attributes
    ----------
    picks : by question and method, first tries first
    to_compute : by number of the try, crystals by the name of their DFT
    name_of : that name, or the material whose label serves, of a question, method and number of the try
    """

    picks: dict[tuple[str, str], list[Atoms]] = field(default_factory=dict)
    to_compute: dict[int, dict[str, Atoms]] = field(default_factory=dict)
    name_of: dict[tuple[str, str, int], str] = field(default_factory=dict)

    def in_order(self) -> dict[str, Atoms]:
        """All that has to be computed, first tries first."""
        return {name: atoms for k in sorted(self.to_compute) for name, atoms in self.to_compute[k].items()}


def try_generator(
    tried: Tried,
    questions: Sequence[Question],
    generator: DOSGenerator,
    predictor: DOSPredictor,
    unfit: Sequence[str],
    options: argparse.Namespace,
) -> None:
    """Generate and relax for each question, or take what is kept."""
    settings = (generator.header["sha256"], predictor.info, options.draws, options.seed)
    folder = options.cache / f"generated-{hashlib.sha256(repr(settings).encode()).hexdigest()[:16]}"
    for q in tqdm(questions, unit="target", desc="generate and relax"):
        after = folder / f"{q.key}-relaxed.extxyz"
        if options.kept_only and not after.exists():
            continue
        make = partial(generated, q, generator, predictor, options.draws, options.seed, unfit)
        relaxed = kept(after, partial(settled, kept(folder / f"{q.key}.extxyz", make)))
        tried.picks[q.key, GENERATOR] = relaxed[: options.tries]
        for k, atoms in enumerate(relaxed[: options.tries]):
            tried.name_of[q.key, GENERATOR, k] = name = f"{folder.name}-{q.key}-{k}"
            tried.to_compute.setdefault(k, {})[name] = atoms


def try_look_ups(
    tried: Tried,
    questions: Sequence[Question],
    by: Mapping[str, DOSIndex],
    labels: SiteDOSLabels,
    options: argparse.Namespace,
) -> None:
    """Look each question up in the index of each method."""
    outdated = set(labels.material_id[labels.recipe < COMPARABLE].tolist()) if options.anew else set()
    for method in [m for m in options.methods if m in by]:
        for q in tqdm(questions, unit="target", desc=method):
            tried.picks[q.key, method] = looked_up(q, by[method])[: options.tries]
            for k, hit in enumerate(tried.picks[q.key, method]):
                tried.name_of[q.key, method, k] = material = hit.info["material_id"]
                if material in outdated:
                    tried.to_compute.setdefault(k, {})[material] = hit


def judge(
    q: Question,
    method: str,
    tried: Tried,
    results: Mapping[str, Any],
    labels: SiteDOSLabels,
    row_of: Mapping[str, int],
) -> Tries:
    """Tell the distance of each try, or that it failed or is not computed."""
    if (q.key, method) not in tried.picks:
        return [NOT_COMPUTED]
    tries: Tries = []
    for k, atoms in enumerate(tried.picks[q.key, method]):
        name = tried.name_of[q.key, method, k]
        result = results.get(name)
        if isinstance(result, ElectronicStructure):
            values, known = on_grid(result)
        elif result is None and name in row_of:
            values, known = label_of(labels, row_of[name])
        else:
            tries.append(NOT_COMPUTED if result is None else "failed")
            continue
        told = {"formula": atoms.get_chemical_formula(), **distance(list(q.wanted.values()), values, known)}
        tries.append(told if method == GENERATOR else {"material_id": name, **told})
    return tries


def per_target(targets: Sequence[Target], rows: Mapping[str, Sequence[Tries]]) -> dict[str, Any]:
    """All tries of each target, by method."""
    return {
        t.material_id: {
            "formula": t.atoms.get_chemical_formula(),
            **{method: tries[i] for method, tries in rows.items()},
        }
        for i, t in enumerate(targets)
    }


def facts(
    table: Mapping[str, Mapping[str, Sequence[Tries]]],
    tried: Tried,
    questions: Sequence[Question],
    by: Mapping[str, DOSIndex],
    labels: SiteDOSLabels,
    computed: set[str],
) -> dict[str, Any]:
    """What the text below the tables tells."""
    found: dict[str, list[float]] = {}
    for rows in table.values():
        for method, some in rows.items():
            shares = [row["share"] for tries in some for row in tries if isinstance(row, dict)]
            found.setdefault(method, []).extend(shares)
    told: dict[str, Any] = {"share": {method: float(np.mean(shares)) for method, shares in found.items()}}
    if GENERATOR in found:
        told["generated"] = of_generated(questions, tried.picks)
    if by:
        told["known"] = {"pool": len(by[COMPUTED]), **of_known(tried.name_of, labels, computed)}
    return told


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_split(parser)
    add_targets(parser, 24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-atoms", type=int, default=4, help="largest target: what DFT costs")
    parser.add_argument("--draws", type=int, default=50, help="crystals that the generator draws (default %(default)s)")
    parser.add_argument("--tries", type=int, choices=range(1, TRIES + 1), default=TRIES, help="computed per target")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--predictor", type=Path, default=DEFAULT_PREDICTOR, help="orders what is generated")
    parser.add_argument("--anew", action="store_true", help="compute what has a label of an earlier recipe, too")
    parser.add_argument("--kept-only", action="store_true", help="make nothing: take what an earlier run left")
    parser.add_argument("--jobs", type=int, default=1, help="structures computed at a time")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "baseline_dft")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Generate, look up, compute, compare, write."""
    options = options_of(arguments)
    labels, split, cache = load_site_dos(ROOT / "data" / "site_dos"), split_of(options), options.cache
    row_of = {str(name): i for i, name in enumerate(labels.material_id.tolist())}
    fitting = (labels.split == split) & (labels.num_atoms >= 2) & (labels.num_atoms <= options.max_atoms)
    rows = drawn_rows(labels, np.flatnonzero(fitting & (labels.recipe >= COMPARABLE)), options)
    targets = [Target.from_label(labels, row, options.seed) for row in rows]
    questions = [Question(target, task) for task in options.tasks for target in targets]
    unfit = sorted(without_pseudopotential(chemical_symbols[1 : MAX_ATOMIC_NUMBER + 1], EspressoSettings()))
    generator, predictor = DOSGenerator(), DOSPredictor.load(options.predictor)

    tried, by = Tried(), {}
    if GENERATOR in options.methods:
        try_generator(tried, questions, generator, predictor, unfit, options)
    if set(options.methods) - {GENERATOR}:
        by = indexes(labels, unfit, options.max_atoms, cache)
        try_look_ups(tried, questions, by, labels, options)
    to_compute = tried.in_order()
    if options.kept_only:
        to_compute = {name: atoms for name, atoms in to_compute.items() if (cache / "dft" / f"{name}.json").exists()}
    settings = EspressoSettings(time_limit=TIME_LIMIT)
    results = compute_many(to_compute, cache / "dft", settings, workers=options.jobs, progress=True)

    table: dict[str, dict[str, list[Tries]]] = {}
    failed: list[str] = []
    missing = dict.fromkeys(options.methods, 0)
    for q in questions:
        for method in options.methods:
            tries = judge(q, method, tried, results, labels, row_of)
            table.setdefault(q.task, {}).setdefault(method, []).append(tries)
            missing[method] += tries.count(NOT_COMPUTED)
            told = f"of {q.target.material_id}, {q.task}"
            failed += [f"{method} {k} {told}" for k, row in enumerate(tries, start=1) if row == "failed"]
    report = {
        "weights": generator.header["sha256"],
        "predictor": predictor.info,
        "split": split,
        "target_ids": [t.material_id for t in targets],
        "max_atoms": options.max_atoms,
        "draws": options.draws,
        "tries": options.tries,
        "seed": options.seed,
        "tables": {task: summary(rows, options.tries) for task, rows in table.items()},
        "facts": facts(table, tried, questions, by, labels, set(results)),
        "failed": failed,
        "not_computed": missing,
        "per_target": {task: per_target(targets, rows) for task, rows in table.items()},
    }
    out = results_folder(options)
    tables = markdown(report)
    print(tables)
    write_results(out, "baseline_dft", json.loads(json.dumps(report, default=float)), tables)
    return report


if __name__ == "__main__":
    main()
