"""How well the forward models predict the site DOS of held-out formulas, beside each element's mean DOS.

python benchmarks/predictor.py                                    # measures the weights in the repository
python benchmarks/predictor.py --train                            # trains all three anew first, and replaces them
python benchmarks/predictor.py --curve                            # and with 1/4, 1/2 and all labels, in two orders
python benchmarks/predictor.py --vasp PATH/dos_mp_elements.npz    # and elements that VASP computed

Figures that are not asked for again are kept from the last results of the same models.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy are loaded

import numpy as np
import torch
from _common import JUDGE, RANKER, RESULTS, ROOT
from _tables import write_results
from ase.build import bulk
from ase.spacegroup import crystal
from electronic import SHIFTS, in_shape, vasp_elements
from matplotlib.figure import Figure

from dosmatgen_ase.data import SiteDOSLabels, Structures, load_site_dos, load_structures
from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA, TargetDOS, normalised_l1_arrays
from dosmatgen_ase.forward.features import site_features
from dosmatgen_ase.forward.predictor import DEFAULT_PREDICTOR, DOSPredictor
from dosmatgen_ase.forward.predictor_training import evaluate, train_predictor, train_predictors
from dosmatgen_ase.forward.tight_binding.basis import MAGNETIC

PATHS = {"predictor": DEFAULT_PREDICTOR, "ranker": RANKER, "judge": JUDGE}
HALOGENS, ALKALI, POST_TRANSITION = {9, 17, 35, 53}, {3, 11, 19, 37, 55}, {13, 31, 49, 50, 81, 82, 83}
AU3NI = crystal(("Au", "Ni"), [(0, 0.5, 0.5), (0, 0, 0)], spacegroup=221, cellpar=[4.03] * 3 + [90] * 3)
LIMIT = 0.75  # a judge's error may be at most this part of the per-element mean's for ratios to its floor to count
FRACTIONS = (0.25, 0.5, 1.0)
Features = list[np.ndarray | str]


def milliseconds(predictor: DOSPredictor, labels: SiteDOSLabels, count: int = 32) -> dict[str, float]:
    """CPU time per structure, features included, alone and in a batch; the labels' own mix of sizes."""
    atoms = [labels.atoms(i) for i in np.linspace(0, len(labels) - 1, count).astype(int)]
    predictor.predict_arrays(atoms[:2])  # loads CHGNet
    start = time.process_time()
    predictor.predict_arrays(atoms)
    middle = time.process_time()
    for one in atoms:
        predictor.predict_arrays([one])
    return {"batch": (middle - start) / count * 1e3, "alone": (time.process_time() - middle) / count * 1e3}


def cost_by_size(predictor: DOSPredictor, repeats: int = 5) -> dict[str, dict[str, float]]:
    """CPU milliseconds for one crystal of 4 and of 10 atoms by each method, neighbours or features included."""
    crystals = {"4 atoms": AU3NI, "10 atoms": bulk("MgO", "rocksalt", a=4.2) * (5, 1, 1)}
    found: dict[str, dict[str, float]] = {}
    for method in predictor.methods:
        for size, atoms in crystals.items():
            predictor.predict_arrays([atoms], method=method)
            start = time.process_time()
            for _ in range(repeats):
                predictor.predict_arrays([atoms], method=method)
            found.setdefault(method, {})[size] = (time.process_time() - start) / repeats * 1e3
    return found


def by_kind(predictor: DOSPredictor, labels: SiteDOSLabels, features: Features, split: str) -> dict[str, Any]:
    """Errors by kind of crystal or site and by method, and those of the gap."""
    rows = np.flatnonzero(labels.split == split)
    chosen = labels.select(rows)
    owner, site = np.nonzero(chosen.atomic_numbers)
    numbers, target, known = chosen.atomic_numbers[owner, site], chosen.values[owner, site], chosen.known[owner]
    elements = [set(chosen.atoms(i).numbers.tolist()) for i in range(len(chosen))]

    def holds(wanted: Iterable[int]) -> np.ndarray:
        return np.array([bool(found & set(wanted)) for found in elements])[owner]

    gap, magnetic = chosen.band_gap[owner], holds(MAGNETIC)
    kinds = {
        "all": gap >= 0,
        "up to 6 atoms": chosen.num_atoms[owner] <= 6,
        "metals, none of V to Ni": (gap == 0) & ~magnetic,
        "gap up to 2 eV": (gap > 0) & (gap <= 2),
        "gap above 2 eV": gap > 2,
        "with V to Ni": magnetic,
        "halides": holds(HALOGENS),
        "hydrides": holds([1]),
        "alkali metal sites": np.isin(numbers, list(ALKALI)),
        "post-transition metal sites": np.isin(numbers, list(POST_TRANSITION)),
    }
    report: dict[str, Any] = {name: {"sites": int(mask.sum())} for name, mask in kinds.items()}
    atoms, some = [labels.atoms(i) for i in rows], [features[i] for i in rows]
    for method in (*predictor.methods, "element's mean"):
        if method == "element's mean":
            values = predictor.baseline[numbers]
        else:
            found = predictor.predict_arrays(atoms, method=method, features=some)
            values = np.concatenate([p.mean for p in found])
            if method == "all" and predictor.tight_binding:
                report["gap"] = gap_figures(np.array([p.gap for p in found]), chosen.band_gap)
        error = normalised_l1_arrays(values.astype(float), target.astype(float), known)
        for name, mask in kinds.items():
            if np.isfinite(error[mask]).any():
                told = [float(np.nanmean(error[mask])), float(np.nanmedian(error[mask]))]
                report[name][method] = dict(zip(("mean", "median"), told, strict=True))
    return report


def gap_figures(predicted: np.ndarray, computed: np.ndarray) -> dict[str, float]:
    """Mean and median absolute error of gaps (eV), over crystals that have one, and how often metal or not is right."""
    gapped = computed > 0
    error = np.abs(predicted - computed)[gapped]
    return {
        "gapped crystals": int(gapped.sum()),
        "mean absolute error": float(error.mean()),
        "median absolute error": float(np.median(error)),
        "all crystals": float(np.abs(predicted - computed).mean()),
        "metal or not right": float(((predicted > 0) == gapped).mean()),
    }


def nickel(predictor: DOSPredictor) -> dict[str, float]:
    """Normalised L1 of Ni in Au3Ni to the dense calculation of data/ni_in_au3ni.npz, by each method."""
    seen = TargetDOS.from_file(ROOT / "data" / "ni_in_au3ni.npz", site=3).on_grid(MODEL_GRID, MODEL_SIGMA)
    return {
        method: float(
            normalised_l1_arrays(
                predictor.predict_arrays([AU3NI], method=method)[0].mean[3].astype(float), seen.values, seen.known
            )
        )
        for method in predictor.methods
    }


def learning_curve(labels: SiteDOSLabels, features: Features, seed: int) -> dict[str, Any]:
    """Error on `test` with part of the training labels, taken at random or where the ensemble is least sure.

    The second order starts with the same random quarter; what is added up to one half has the largest expected error of
    the predictor trained on the quarter.
    """
    rng = np.random.default_rng(seed)
    train = rng.permutation(np.flatnonzero(labels.split == "train"))
    rest = np.flatnonzero(labels.split != "train")

    def trained(rows: np.ndarray) -> tuple[DOSPredictor, dict[str, Any]]:
        kept = np.concatenate([rows, rest])
        part, some = labels.select(kept), [features[i] for i in kept]
        predictor = train_predictor(part, some, seed=seed, progress=True)
        figures = evaluate(predictor, part, some, "test")
        return predictor, {"labels": len(rows), **{k: figures[k] for k in ("mean", "pooled", "ratio")}}

    count = [round(f * len(train)) for f in FRACTIONS]
    first, quarter = trained(train[: count[0]])
    others = train[count[0] :]
    found = first.predict_arrays([labels.atoms(i) for i in others], features=[features[i] for i in others])
    doubt = np.array([np.nanmean(p.error) if not p.reason else -np.inf for p in found])
    unsure = others[np.argsort(-doubt, kind="stable")][: count[1] - count[0]]
    return {
        "random": [quarter, trained(train[: count[1]])[1], trained(train)[1]],
        "by uncertainty": [quarter, trained(np.concatenate([train[: count[0]], unsure]))[1]],
    }


def against_vasp(predictor: DOSPredictor, structures: Structures, path: Path) -> dict[str, dict[str, float]]:
    """Medians of the normalised L1 in shape to the first site of elemental solids, held out by formula or not."""
    trained = set(structures.reduced_formula[structures.split == "train"].tolist())
    entries = vasp_elements(path)
    groups: dict[str, dict[str, list[float]]] = {"held out": {}, "of training formulas": {}}
    everywhere = np.ones(MODEL_GRID.size, dtype=bool)
    for (atoms, reference), prediction in zip(
        entries.values(), predictor.predict_arrays([a for a, _ in entries.values()]), strict=True
    ):
        if prediction.reason or not prediction.known[0].any():
            continue
        z, known = int(atoms.numbers[0]), prediction.known[0]
        group = groups["of training formulas" if atoms.symbols[0] in trained else "held out"]
        for what, values in (("predictor", prediction.mean[0]), ("element mean", predictor.baseline[z])):
            ours = TargetDOS(MODEL_GRID.energies, values, known, "fermi", MODEL_SIGMA)
            tried = [in_shape(ours.shift(float(s)), reference, everywhere) for s in SHIFTS]
            group.setdefault(what, []).append(tried[int(np.abs(SHIFTS).argmin())])
            group.setdefault(f"{what}, shifted", []).append(min(tried))
    return {
        name: {"structures": len(group["predictor"]), **{k: float(np.median(v)) for k, v in group.items()}}
        for name, group in groups.items()
        if group
    }


def plot(figures: dict[str, Any], curve: dict[str, Any] | None, path: Path) -> None:
    """Median error per element, and the learning curve where there is one."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, *rest = np.atleast_1d(figure.subplots(1, 2, width_ratios=(2.4, 1)) if curve else figure.subplots())
    errors = {s: e for s, (e, count) in figures["per_element"].items() if count >= 3}
    order = sorted(errors, key=lambda s: errors[s])
    left.bar(range(len(order)), [errors[s] for s in order], width=0.8)
    left.set_xticks(range(len(order)), order, fontsize=6, rotation=90)
    left.set_xlim(-1, len(order))
    left.set_ylabel("median normalised L1")
    left.set_title(f"test, elements with 3 sites or more, {len(order)} of them", fontsize="small")
    for right in rest:
        for name, points in (curve or {}).items():
            right.plot([p["labels"] for p in points], [p["mean"] for p in points], "o-", label=name, ms=4)
        right.set_xlabel("labelled training structures")
        right.set_ylabel("normalised L1, mean over sites")
        right.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def markdown(report: dict[str, Any]) -> str:
    """Table of the test split."""
    lines = [
        "| model | trained on | mean over sites | median | pooled | element's mean: mean, median, pooled | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, info in report["trained_on"].items():
        f = report["figures"][name]["test"]
        lines.append(
            f"| {name} | {info['train_structures']} structures | **{f['mean']:.3f}** | {f['median']:.3f} | "
            f"{f['pooled']:.3f} | {f['element_mean']:.3f}, {f['element_median']:.3f}, {f['element_pooled']:.3f} | "
            f"{f['ratio']:.2f} |"
        )
    test, cost = report["figures"]["predictor"]["test"], report["milliseconds"]
    text = (
        f"Normalised L1 on [-10, 5] eV at sigma 0.2 eV, {test['structures']} held-out structures ({test['sites']} "
        f"sites). `ratio` is of the means over sites; a judge must stay below {LIMIT}. *predictor* ships and is "
        "trained on all training labels; *ranker* and *judge* on the two halves of the formulas, for the benchmarks. "
        "The error that the predictor expects of a site orders the errors with rank correlation "
        f"{test['rank_correlation']:.2f} (mean {test['expected_error']:.2f}); {100 * test['coverage']:.0f} % of the "
        f"computed values lie within its 68 % interval. {cost['batch']:.0f} ms of CPU per structure in a batch, "
        f"{cost['alone']:.0f} ms alone. "
    )
    if "nickel" in report:
        nickel = ", ".join(f"{value:.2f} by {method}" for method, value in report["nickel"].items())
        cost_text = "; ".join(
            f"{method}: " + ", ".join(f"{ms:.0f} ms for {size}" for size, ms in sizes.items())
            for method, sizes in report["cost"].items()
        )
        text += f"Ni in Au3Ni against the dense DFT: {nickel}. CPU, one crystal alone: {cost_text}. "
    if report.get("vasp"):
        told = [
            f"{v['structures']:.0f} {name}: {v['predictor']:.2f} (element's mean {v['element mean']:.2f}), after a "
            f"rigid shift {v['predictor, shifted']:.2f} ({v['element mean, shifted']:.2f})"
            for name, v in report["vasp"].items()
        ]
        text += (
            "Against elemental solids computed with VASP, median in shape, scaled to the same number of states; "
            f"{'; '.join(told)}. "
        )
    if report.get("curve"):
        points = [f"{p['mean']:.3f} with {p['labels']}" for p in report["curve"]["random"]]
        chosen = report["curve"]["by uncertainty"][1]
        text += (
            f"Learning curve, of models trained for it: {', '.join(points)} labels; {chosen['mean']:.3f} with "
            f"{chosen['labels']} of which the second half was chosen for its expected error (pooled "
            f"{chosen['pooled']:.3f} instead of {report['curve']['random'][1]['pooled']:.3f}). "
        )
    text += (
        "The features come from CHGNet, which was trained on energies, forces, stresses and moments of most Materials "
        "Project crystals, held-out ones included, but never on a DOS."
    )
    return "\n".join([*lines, "", *kind_table(report), text, ""])


def kind_table(report: dict[str, Any]) -> list[str]:
    """Lines of the table by kind of crystal and by method, and of the gap."""
    if "kinds" not in report:
        return []
    kinds = {name: figures for name, figures in report["kinds"].items() if name != "gap"}
    methods = [name for name in kinds["all"] if name != "sites"]
    lines = [
        f"| `predictor` on test: mean (median) | sites | {' | '.join(methods)} |",
        "|---" * (len(methods) + 2) + "|",
    ]
    for name, figures in kinds.items():
        cells = [f"{f['mean']:.3f} ({f['median']:.3f})" if (f := figures.get(m)) else "" for m in methods]
        lines.append(f"| {name} | {figures['sites']} | {' | '.join(cells)} |")
    lines.append("")
    if gap := report["kinds"].get("gap"):
        lines += [
            f"Gap by tight binding: mean absolute error {gap['mean absolute error']:.2f} eV, median "
            f"{gap['median absolute error']:.2f} eV over {gap['gapped crystals']} crystals that have one; metal or not "
            f"right in {100 * gap['metal or not right']:.0f} % of all.",
            "",
        ]
    return lines


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description="Errors of the forward models.")
    parser.add_argument("--train", action="store_true", help="train all three first and replace the weights")
    parser.add_argument("--curve", action="store_true", help="train with part of the labels, too")
    parser.add_argument("--vasp", type=Path, help="dos_mp_elements.npz")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    labels = load_site_dos(ROOT / "data" / "site_dos")
    if options.train:
        runs = ROOT / "runs" / "predictor"
        train_predictors(ROOT / "data" / "site_dos", PATHS, runs=runs, seed=options.seed, progress=True)
    needed = np.flatnonzero((labels.split != "train") | options.curve)
    features: Features = ["not needed"] * len(labels)
    for i, found in zip(needed, site_features([labels.atoms(i) for i in needed], progress=True), strict=True):
        features[i] = found
    models = {name: DOSPredictor.load(path) for name, path in PATHS.items()}
    last = RESULTS / "predictor.json"
    report: dict[str, Any] = json.loads(last.read_text()) if last.exists() else {}
    trained_on = {name: model.info for name, model in models.items()}
    ids = labels.material_id[labels.split == "test"].tolist()
    if (report.get("trained_on"), report.get("test_ids")) != (trained_on, ids):
        report = {}  # what was measured of other models, or on other structures, does not stand beside these
    report |= {"trained_on": trained_on, "test_ids": ids}
    report["figures"] = {n: {s: evaluate(p, labels, features, s) for s in ("val", "test")} for n, p in models.items()}
    report["kinds"] = by_kind(models["predictor"], labels, features, "test")
    report["nickel"] = nickel(models["predictor"])
    report["milliseconds"] = milliseconds(models["predictor"], labels)
    report["cost"] = cost_by_size(models["predictor"])
    if options.curve:
        report["curve"] = learning_curve(labels, features, options.seed)
    if options.vasp:
        report["vasp"] = against_vasp(
            models["predictor"], load_structures(ROOT / "data" / "structures.parquet"), options.vasp
        )
    table = markdown(report)
    print(table)
    write_results(RESULTS, "predictor", report, table)
    plot(report["figures"]["predictor"]["test"], report.get("curve"), RESULTS / "predictor.png")


if __name__ == "__main__":
    main()
