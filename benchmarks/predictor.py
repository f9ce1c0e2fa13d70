"""How well the two forward models predict the site DOS of held-out formulas, beside each element's mean DOS.

python benchmarks/predictor.py               # measures the weights in the repository
python benchmarks/predictor.py --train       # trains both anew first, and replaces them
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, ROOT, write_results

from dosmatgen_ase.data import load_site_dos
from dosmatgen_ase.predictor import DEFAULT_PREDICTOR, DOSPredictor, evaluate, site_features, train_ranker_and_judge

JUDGE = Path(__file__).parent / "judge.safetensors"
LIMIT = 0.75  # a judge's error may be at most this part of the per-element mean's for ratios to its floor to count


def measure(label_directory: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Figures of both predictors on `val` and `test`."""
    labels = load_site_dos(label_directory)
    features = site_features([labels.atoms(i) for i in range(len(labels))])
    pair = {"ranker": DOSPredictor.load(DEFAULT_PREDICTOR), "judge": DOSPredictor.load(JUDGE)}
    return {name: {s: evaluate(p, labels, features, s) for s in ("val", "test")} for name, p in pair.items()}


def markdown(report: dict[str, Any]) -> str:
    """Table of the test split."""
    lines = [
        "| predictor | trained on | mean over sites | median | pooled | element's mean: mean, median, pooled | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("ranker", "judge"):
        f, info = report["figures"][name]["test"], report["trained_on"][name]
        lines.append(
            f"| {name} | {info['train_structures']} structures | **{f['mean']:.3f}** | {f['median']:.3f} | "
            f"{f['pooled']:.3f} | {f['element_mean']:.3f}, {f['element_median']:.3f}, {f['element_pooled']:.3f} | "
            f"{f['ratio']:.2f} |"
        )
    test = report["figures"]["judge"]["test"]
    rank = report["figures"]["ranker"]["test"]["rank_correlation"]
    return "\n".join(
        [
            *lines,
            "",
            f"Normalised L1 on [-10, 5] eV at sigma 0.2 eV, {test['structures']} held-out structures "
            f"({test['sites']} sites). `ratio` is of the means over sites; a judge must stay below {LIMIT}. "
            f"The ranker's ensemble spread orders its errors with rank correlation {rank:.2f}. "
            "The features come from CHGNet, which was trained on energies, forces, stresses and moments of most "
            "Materials Project crystals, held-out ones included, but never on a DOS.",
            "",
        ]
    )


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description="Error of the ranking and the judging forward model.")
    parser.add_argument("--train", action="store_true", help="train both first and replace the weights")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    directory = ROOT / "data" / "site_dos"
    if options.train:
        figures = train_ranker_and_judge(directory, DEFAULT_PREDICTOR, JUDGE, seed=options.seed, progress=True)
    else:
        figures = measure(directory)
    report = {
        "figures": figures,
        "trained_on": {"ranker": DOSPredictor.load(DEFAULT_PREDICTOR).info, "judge": DOSPredictor.load(JUDGE).info},
    }
    table = markdown(report)
    print(table)
    write_results(RESULTS, "predictor", report, table)


if __name__ == "__main__":
    main()
