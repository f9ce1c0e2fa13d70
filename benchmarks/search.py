"""How well `search` finds a known crystal again, what it finds where that crystal is taken away, and what it costs.

python benchmarks/search.py                # on `test`; --val for `val`

Self-retrieval: targets are the computed site DOS of held-out crystals. Their own label must come first; then the labels
of the split are hidden, so that the index holds what the predictor says of these crystals, and the question is at which
place of all the crystal itself comes. Baseline: the nearest *whole crystals* of another formula among those with a
computed DOS, picked by the predicted or by the computed DOS, and judged by the computed one: what a look-up is worth
without any new calculation. Figures of the baseline are for the pool of labelled crystals, a fifth of all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is loaded

import numpy as np
from _common import ROOT, add_split, results_folder, split_of
from _tables import write_results
from _targets import in_random_order, rng_for
from ase import Atoms

from dosmatgen_ase import TargetDOS
from dosmatgen_ase.crystals.screening import reduced_formula
from dosmatgen_ase.data import SiteDOSLabels, load_site_dos
from dosmatgen_ase.dos import MIN_SHARED, mean_distance
from dosmatgen_ase.judge.metrics import bootstrap_interval
from dosmatgen_ase.retrieval.build import build_index, read_known
from dosmatgen_ase.retrieval.index import DOSIndex
from dosmatgen_ase.retrieval.query import search

WINDOW = (-3.0, 1.0)
PLACES = (1, 10, 100)
COSTS = """
import re, sys, time
start = time.perf_counter()
from dosmatgen_ase import TargetDOS, search
from dosmatgen_ase.retrieval.index import DOSIndex
imported = time.perf_counter()
index = DOSIndex.load(sys.argv[1])
loaded = time.perf_counter()
target = TargetDOS.from_file(sys.argv[2], site=3)
search(target, index=index)
search(TargetDOS.from_file(sys.argv[2]), index=index)
peak = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())  # rusage would tell the parent's
print(imported - start, loaded - imported, int(peak[1]) / 1024)
"""


def place(sites: Any, name: str, index: DOSIndex) -> int | None:
    """Place of a crystal among what a search finds, from 1; None beyond the last of `PLACES`."""
    found = [atoms.info["material_id"] for atoms in search(sites, PLACES[-1], index=index)]
    return found.index(name) + 1 if name in found else None


def one_site(sites: Sequence[TargetDOS], name: str, seed: int) -> TargetDOS:
    """A site drawn among those that hold states."""
    filled = [dos for dos in sites if dos.values.sum() > 0.5] or list(sites)
    return filled[int(rng_for(seed, name).integers(len(filled)))]


def self_retrieval(labels: SiteDOSLabels, rows: Sequence[int], whole: DOSIndex, hidden: DOSIndex, seed: int) -> Any:
    """Places of the crystals themselves, by their own label and by their prediction."""
    found: dict[str, list[int | None]] = {}
    for i in rows:
        sites, name = labels.targets(i), str(labels.material_id[i])
        one = one_site(sites, name, seed)
        for what, target in (("all sites", sites), ("one site", one)):
            for which, index in (("label", whole), ("predicted", hidden)):
                found.setdefault(f"{which}, {what}", []).append(place(target, name, index))
    return found


def shares(places: Sequence[int | None]) -> dict[str, Any]:
    """Shares of the targets that come within each of `PLACES`, with an interval."""
    figures = {}
    for last in PLACES:
        inside = np.array([p is not None and p <= last for p in places], dtype=float)
        figures[str(last)] = [float(inside.mean()), *bootstrap_interval(inside, lambda x: float(x.mean()))]
    return figures


def baseline(labels: SiteDOSLabels, rows: Sequence[int], by: dict[str, DOSIndex], seed: int) -> dict[str, Any]:
    """Computed distance of the nearest labelled crystals of another formula: the first, and the best of three."""
    row_of = {name: i for i, name in enumerate(labels.material_id.tolist())}
    found: dict[str, dict[str, list[list[float]]]] = {}
    for i in rows:
        atoms, sites = labels.atoms(i), labels.targets(i)
        one = one_site(sites, str(labels.material_id[i]), seed)
        cases: dict[str, tuple[list[TargetDOS], dict[str, Any]]] = {
            "all sites": (sites, {}),
            "one site": ([one], {}),
            "one site, window": ([one.window(*WINDOW)], {}),
            "one site, elements excluded": ([one], {"exclude_elements": sorted(set(atoms.symbols))}),
        }
        for case, (targets, filters) in cases.items():
            for name, index in by.items():
                hits = [hit for hit in search(targets, 40, index=index, **filters) if not same(hit, atoms)]
                judge = (judged(hit, targets, labels.targets(row_of[hit.info["material_id"]])) for hit in hits)
                distances = [distance for distance in judge if distance is not None][:3]
                if distances:
                    found.setdefault(case, {}).setdefault(name, []).append([distances[0], min(distances)])
    return {case: {name: summary(values) for name, values in rows_.items()} for case, rows_ in found.items()}


def same(hit: Atoms, atoms: Atoms) -> bool:
    """Whether two crystals have one formula."""
    return reduced_formula(hit) == reduced_formula(atoms)


def judged(hit: Atoms, targets: Sequence[TargetDOS], computed: Sequence[TargetDOS]) -> float | None:
    """Distance to the targets of the computed DOS of a hit, on the sites that the search chose.

    None where less than 90 % of the states of a target lie at energies that were computed.
    """
    pairs = [(computed[k], target) for k, target in zip(hit.info["search"]["sites"], targets, strict=True)]
    shared = [target.values[dos.known].sum() / max(target.values.sum(), 1e-9) for dos, target in pairs]
    return mean_distance(pairs) if min(shared) >= MIN_SHARED else None


def summary(values: list[list[float]]) -> dict[str, Any]:
    """Mean and median, with intervals of the mean, for the first and the best of three."""
    array = np.array(values)
    figures: dict[str, Any] = {"targets": len(array)}
    for k, column in (("1", 0), ("3", 1)):
        x = array[:, column]
        figures[k] = {"mean": float(x.mean()), "median": float(np.median(x)),
                      "interval": bootstrap_interval(x, lambda y: float(y.mean()))}  # fmt: skip
    return figures


def compression(made: DOSIndex, again: DOSIndex) -> dict[str, float]:
    """Normalised L1 between what was put into a file and what came out, mean over rows with states."""
    scale = made.values.sum(axis=1)
    error = np.abs(made.values - again.values).sum(axis=1)[scale > 0.5] / scale[scale > 0.5]
    return {"mean": float(error.mean()), "largest": float(error.max())}


def timed(run: Callable[[], object], repeats: int = 3) -> float:
    """Least CPU time of a call, ms."""
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        spent.append((time.process_time() - start) * 1e3)
    return min(spent)


def costs(path: Path, index: DOSIndex, labels: SiteDOSLabels, rows: Sequence[int], seed: int) -> dict[str, Any]:
    """CPU time of queries, import and load time, peak memory of a process that searches."""
    queries: dict[str, list[float]] = {}
    for i in rows[:40]:
        sites = labels.targets(i)
        one = one_site(sites, str(labels.material_id[i]), seed)
        kinds: dict[str, Any] = {
            "one site": one,
            "one site, window": one.window(*WINDOW),
            "all sites": sites,
            "total": TargetDOS.sum_of(sites),
        }
        for kind, target in kinds.items():
            queries.setdefault(kind, []).append(timed(lambda target=target: search(target, index=index)))
    command = [sys.executable, "-c", COSTS, str(path), str(ROOT / "data" / "ni_in_au3ni.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported, loaded, memory = map(float, done.stdout.split())
    milliseconds = {k: {"median": float(np.median(v)), "largest": max(v)} for k, v in queries.items()}
    return {"query_ms": milliseconds, "import_s": imported, "load_s": loaded, "memory_MB": memory,
            "file_MB": path.stat().st_size / 1e6}  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        f"{report['targets']} targets of split `{report['split']}`, {report['crystals']} crystals in the index, "
        f"{report['computed']} of them with a computed DOS.",
        "",
        "| the crystal itself, by | first | within 10 | within 100 |",
        "|---|--:|--:|--:|",
    ]
    for name, figures in report["self_retrieval"].items():
        cells = " | ".join(f"{m:.0%} [{lo:.0%}, {hi:.0%}]" for m, lo, hi in figures.values())
        lines.append(f"| {name} | {cells} |")
    lines += [
        "",
        "*label*: its computed DOS is in the index. *predicted*: the labels of the split are hidden.",
        "",
        "Nearest whole crystals of another formula, among those with a computed DOS; normalised L1 by the computed "
        "DOS, mean [95 %] (median):",
        "",
        "| target | picked by | targets | the first | best of three |",
        "|---|---|--:|--:|--:|",
    ]
    for case, rows in report["baseline"].items():
        for name, figures in rows.items():
            cells = [
                f"{f['mean']:.3f} [{f['interval'][0]:.3f}, {f['interval'][1]:.3f}] ({f['median']:.3f})"
                for f in (figures["1"], figures["3"])
            ]
            lines.append(f"| {case} | {name} | {figures['targets']} | {' | '.join(cells)} |")
    cost = report["costs"]
    spent = cost["query_ms"].items()
    times = ", ".join(f"{kind} {t['median']:.0f} ms (at most {t['largest']:.0f})" for kind, t in spent)
    lines += [
        "",
        f"CPU time of a query on one thread, median of 40 targets: {times}. Loading the index: {cost['load_s']:.1f} s; "
        f"peak memory of a process that searches: {cost['memory_MB']:.0f} MB; file: {cost['file_MB']:.1f} MB. "
        f"What the compression loses: {report['compression']['mean']:.4f} (normalised L1, mean over rows; "
        f"at most {report['compression']['largest']:.3f}).",
        "",
        "Nearest to Ni in Au3Ni (one site): "
        + "; ".join(f"{h['material_id']} {h['formula']} {h['distance']:.2f} ({h['source']})" for h in report["nickel"])
        + ".",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Build both indexes from one set of predictions, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_split(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-targets", type=int, default=10_000, help="at most this many")
    parser.add_argument("--num-baseline", type=int, default=150, help="targets of the baseline (default %(default)s)")
    parser.add_argument("--parts", type=Path, default=ROOT / "runs" / "search" / "parts", help="predictions, kept")
    parser.add_argument("--index", type=Path, default=ROOT / "runs" / "search" / "dos_index.npz", help="written")
    options = parser.parse_args()
    split = split_of(options)
    labels = load_site_dos(ROOT / "data" / "site_dos")
    known = read_known(ROOT / "data" / "structures.parquet")
    made = build_index(known, labels, parts=options.parts, progress=True)
    made.save(options.index)
    whole = DOSIndex.load(options.index)
    hidden = build_index(known, labels.select(labels.split != split), parts=options.parts)
    names = set(labels.material_id.tolist())
    some = [atoms for atoms in known if atoms.info["material_id"] in names]
    by = {
        "predicted": build_index(some, None, parts=options.parts),
        "computed": build_index(some, labels, parts=options.parts),
    }
    there = np.isin(labels.material_id, [atoms.info["material_id"] for atoms in known])
    rows = in_random_order(labels, np.flatnonzero(there & (labels.split == split)), options.seed)[: options.num_targets]
    nickel = search(TargetDOS.from_file(ROOT / "data" / "ni_in_au3ni.npz", site=3), 5, index=whole)
    places = self_retrieval(labels, rows, whole, hidden, options.seed)
    report = {
        "split": split,
        "targets": len(rows),
        "target_ids": labels.material_id[rows].tolist(),
        "crystals": len(whole),
        "computed": int(whole.computed.sum()),
        "predictor_sha256": whole.info["predictor_sha256"],
        "self_retrieval": {name: shares(found) for name, found in places.items()},
        "not_first": [
            str(labels.material_id[i]) for i, p in zip(rows, places["label, all sites"], strict=True) if p != 1
        ],
        "baseline": baseline(labels, rows[: options.num_baseline], by, options.seed),
        "costs": costs(options.index, whole, labels, rows, options.seed),
        "compression": compression(made, whole),
        "nickel": [{"formula": a.get_chemical_formula(), **a.info["search"]} for a in nickel],
    }
    write_results(results_folder(options), "search", report, markdown(report))
    print(json.dumps(report["self_retrieval"], indent=1))


if __name__ == "__main__":
    main()
