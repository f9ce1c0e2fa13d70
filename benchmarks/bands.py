"""How well tight binding predicts the bands of held-out formulas, at the k-points of their DFT calculation.

python benchmarks/bands.py

Labels since recipe 5 keep their eigenvalues. Beside the model stands the same Hamiltonian before training: universal
integrals (W. A. Harrison) and one level per shell of each element, the centre of its DOS in the labels.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy are loaded

import numpy as np
import torch
from _common import ROOT, add_split, results_folder, split_of
from _tables import write_results
from matplotlib.figure import Figure
from tqdm import tqdm

from dosmatgen_ase.data import MeshBands, load_bands, load_site_dos
from dosmatgen_ase.forward.bands import predict_levels
from dosmatgen_ase.forward.predictor import DOSPredictor
from dosmatgen_ase.forward.tight_binding.basis import ELECTRONS
from dosmatgen_ase.forward.tight_binding.model import TightBinding

FILLED_BANDS, EMPTY_BANDS = -10.0, 4.0  # eV, between which bands count: above, the basis lacks some


def untrained(predictor: DOSPredictor) -> DOSPredictor:
    """The predictor with one model as it was before training."""
    model = predictor.tight_binding[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = TightBinding(model.config, model.start).eval()
    return DOSPredictor(predictor.config, predictor.tables, predictor.info, [start])


def aligned(bands: MeshBands, electrons: float, size: int) -> np.ndarray:
    """Levels of a label (spins, k, size) in the places of those of a Hamiltonian; NaN where the label has none.

    Both are counted from the electrons: shells that the Hamiltonian leaves out are full and lie below all others.
    """
    left_out = (bands.num_electrons - electrons) / 2
    place = np.arange(bands.energies.shape[2]) + bands.below - round(left_out)
    there = (place >= 0) & (place < size)
    levels = np.full((*bands.energies.shape[:2], size), np.nan)
    levels[:, :, place[there]] = bands.energies[:, :, there]
    return levels


def errors(found: np.ndarray, levels: np.ndarray, shares: np.ndarray) -> dict[str, float]:
    """Mean absolute errors (eV) of one crystal, each point by its share of the mesh; NaN where there are no such bands.

    Parameters
    ----------
    found : (spins, k, bands), eV
    levels : the same of the label, `aligned`
    shares : (k,)
    """
    weight = np.broadcast_to(shares[:, None], levels.shape)
    windows = {
        "filled": (levels > FILLED_BANDS) & (levels <= 0),
        "empty": (levels > 0) & (levels < EMPTY_BANDS),
    }

    def mean(values: np.ndarray, mask: np.ndarray) -> float:
        return float(np.average(values[mask], weights=weight[mask])) if mask.any() else float("nan")

    off = found - levels
    told = {name: mean(np.abs(off), mask) for name, mask in windows.items()}
    shift = np.median(off[windows["filled"]]) if windows["filled"].any() else 0.0
    return {**told, "filled, shifted": mean(np.abs(off - shift), windows["filled"])}


def markdown(report: dict[str, Any]) -> str:
    """Table by kind of crystal."""
    names = ("filled", "filled, shifted", "empty")
    lines = [
        "| crystals | number | " + " | ".join(f"{name} | before training" for name in names) + " |",
        "|---" * (2 + 2 * len(names)) + "|",
    ]
    for kind, rows in report["kinds"].items():
        cells = [
            f"{np.mean(values):.2f} ({np.median(values):.2f})"
            for name in names
            for model in ("trained", "untrained")
            if len(values := [x for row in rows if np.isfinite(x := report[model][row][name])])
        ]
        lines.append(f"| {kind} | {len(rows)} | {' | '.join(cells)} |")
    lines += [
        "",
        "Mean (median) over held-out crystals of the mean absolute error of their eigenvalues, eV. *Filled*: bands "
        f"from {FILLED_BANDS:g} eV to the zero; *shifted*: after the best rigid shift of the crystal; *empty*: up to "
        f"{EMPTY_BANDS:g} eV above the zero. *Before training*: Harrison's universal integrals with one level for each "
        "shell of an element. Zero: Fermi level, or valence-band maximum.",
        "",
    ]
    return "\n".join(lines)


def plot(pairs: np.ndarray, report: dict[str, Any], path: Path) -> None:
    """Every predicted eigenvalue against the computed one, and the share of crystals by their error."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    low, high = FILLED_BANDS, EMPTY_BANDS
    drawn = left.hexbin(
        pairs[:, 0], pairs[:, 1], gridsize=90, bins="log", cmap="viridis", extent=(low, high, low, high), mincnt=1
    )
    left.plot([low, high], [low, high], "w-", lw=0.8)
    left.set(xlabel="eigenvalue by DFT, eV", ylabel="predicted, eV", xlim=(low, high), ylim=(low, high), aspect="equal")
    figure.colorbar(drawn, ax=left, label="eigenvalues")
    for kind, rows in report["kinds"].items():
        values = np.sort([x for row in rows if np.isfinite(x := report["trained"][row]["filled"])])
        right.step(values, np.arange(1, len(values) + 1) / len(values), where="post", label=kind)
    right.set(xlabel="mean absolute error of filled bands, eV", ylabel="share of crystals", xlim=(0, 1.2), ylim=(0, 1))
    right.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description="Errors of predicted bands.")
    parser.add_argument("--limit", type=int, help="so many crystals only")
    add_split(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    labels, kept = load_site_dos(ROOT / "data" / "site_dos"), load_bands(ROOT / "data" / "site_dos")
    rows = [i for i in np.flatnonzero(labels.split == split_of(options)) if str(labels.material_id[i]) in kept]
    rows = rows[: options.limit]
    predictor = DOSPredictor.load()
    models = {"trained": predictor, "untrained": untrained(predictor)}
    report: dict[str, Any] = {"trained_on": predictor.info, "test_ids": labels.material_id[rows].tolist()}
    report |= {name: [] for name in models}
    pairs = []
    for i in tqdm(rows, unit="crystal"):
        atoms, bands = labels.atoms(i), kept[str(labels.material_id[i])]
        for name, model in models.items():
            found = predict_levels(atoms, bands.kpoints, predictor=model)
            levels = aligned(bands, float(ELECTRONS[atoms.numbers].sum()), found.shape[2])
            report[name].append(errors(found, levels, bands.weights))
            if name == "trained":
                pairs.append(np.stack([levels.ravel(), found.ravel()], 1))
    gap, magnetic = labels.band_gap[rows], np.array([len(kept[n].energies) == 2 for n in report["test_ids"]])
    kinds = {
        "all": gap >= 0,
        "metals": (gap == 0) & ~magnetic,
        "with a gap": (gap > 0) & ~magnetic,
        "with V to Ni": magnetic,
    }
    report["kinds"] = {name: np.flatnonzero(mask).tolist() for name, mask in kinds.items() if mask.any()}
    table = markdown(report)
    print(table)
    folder = results_folder(options)
    write_results(folder, "bands", report, table)
    plot(np.concatenate(pairs), report, folder / "bands.png")
    return report


if __name__ == "__main__":
    main()
