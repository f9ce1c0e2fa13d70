"""Check the Quantum ESPRESSO engine against the label set, and against site DOS that VASP computed.

python benchmarks/electronic.py                                    # 5 labels of data/site_dos, a minute
python benchmarks/electronic.py --vasp PATH/dos_mp_elements.npz    # and 5 elements

Results of single structures are kept in runs/electronic, so that a second call only compares.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from _common import RESULTS, ROOT
from _tables import write_results
from ase import Atoms

from dosmatgen_ase.data import load_site_dos
from dosmatgen_ase.dft.batch import compute_many
from dosmatgen_ase.dft.result import ElectronicStructure
from dosmatgen_ase.dos import MODEL_GRID, TargetDOS, normalised_l1_arrays

LABELS = ("mp-1550", "mp-2647", "mp-1105", "mp-1023924", "mp-23")  # semiconductor, metals, oxide, layers, magnet
ELEMENTS = ("mp-1010136", "mp-1056004", "mp-11", "mp-78", "mp-166")  # Cu, Mo, As, Ge, Ca
SHIFTS = np.arange(-50, 51, 2) / 100  # eV
OCCUPIED = MODEL_GRID.energies <= 0


def computed(structures: dict[str, Atoms]) -> dict[str, ElectronicStructure]:
    """DOS of every structure; a failure of any ends the benchmark."""
    results = compute_many(structures, ROOT / "runs" / "electronic", progress=True)
    for name, result in results.items():
        if not isinstance(result, ElectronicStructure):
            raise RuntimeError(f"{name}: {result}")
    return results  # type: ignore[return-value]


def against_labels(directory: Path) -> list[dict[str, Any]]:
    """Normalised L1 of each site to its label, mean over sites, at sigma 0.2 eV."""
    labels = load_site_dos(directory)
    rows = {name: labels.material_id.tolist().index(name) for name in LABELS}
    results = computed({name: labels.atoms(i) for name, i in rows.items()})
    table = []
    for name, i in rows.items():
        atoms, ours = labels.atoms(i), [site.on_grid() for site in results[name].sites]
        n = len(atoms)
        known = np.array([dos.known for dos in ours]) & labels.known[i]
        distance = normalised_l1_arrays(np.array([dos.values for dos in ours]), labels.values[i, :n], known)
        table.append(
            {
                "id": name,
                "formula": atoms.get_chemical_formula(),
                "l1": float(distance.mean()),
                "gap": results[name].band_gap,
                "label_gap": float(labels.band_gap[i]),
                "magnetic_moment": results[name].magnetic_moment,
            }
        )
    return table


def in_shape(dos: TargetDOS, other: TargetDOS, window: np.ndarray) -> float:
    """Normalised L1 over the bins known in both, `dos` scaled to as many states there as `other` has."""
    a, b = dos.on_grid(), other.on_grid()
    known = a.known & b.known & window
    scale = b.values[known].sum() / a.values[known].sum()
    return float(normalised_l1_arrays(a.values * scale, b.values, known))


def vasp_elements(path: Path) -> dict[str, tuple[Atoms, TargetDOS]]:
    """Structure of every entry of the file, and the DOS of its first site."""
    with np.load(path, allow_pickle=False) as data:
        vasp = {key: data[key] for key in data.files}
    entries = {}
    for i, name in enumerate(vasp["material_id"].tolist()):
        part = slice(*vasp["offset"][i : i + 2])
        symbols, places = vasp["symbols"][part].tolist(), vasp["frac"][part]
        # The tetrahedron method does not broaden; tiny negative values are rounding.
        values = np.maximum(vasp["spd_dos"][part][0].sum(0), 0.0)
        entries[name] = (
            Atoms(symbols, scaled_positions=places, cell=vasp["cell"][i], pbc=True),
            TargetDOS.from_arrays(vasp["energies"][i], values, sigma=0.0),
        )
    return entries


def against_vasp(path: Path) -> list[dict[str, Any]]:
    """Distance in shape of the first site to VASP's, as it is and after the best rigid shift."""
    entries = vasp_elements(path)
    structures, theirs = ({name: entries[name][part] for name in ELEMENTS} for part in (0, 1))
    everywhere = np.ones_like(OCCUPIED)
    table = []
    for name, result in computed(structures).items():
        ours = result.sites[0]
        shifted = [in_shape(ours.shift(float(s)), theirs[name], everywhere) for s in SHIFTS]
        best = float(SHIFTS[int(np.argmin(shifted))])
        table.append(
            {
                "id": name,
                "formula": structures[name].get_chemical_formula(),
                "l1": in_shape(ours, theirs[name], everywhere),
                "l1_shifted": min(shifted),
                "shift": best,
                "l1_occupied": in_shape(ours, theirs[name], OCCUPIED),
                "l1_occupied_shifted": in_shape(ours.shift(best), theirs[name], OCCUPIED),
            }
        )
    return table


def markdown(report: dict[str, Any]) -> str:
    """Both tables."""
    lines = ["| label | | normalised L1 | gap, eV (label) | moment, mu_B |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['id']} | {r['formula']} | {r['l1']:.4f} | {r['gap']:.2f} ({r['label_gap']:.2f}) | "
        f"{r['magnetic_moment']:.2f} |"
        for r in report["labels"]
    ]
    lines += ["", "Sites against the label set at sigma 0.2 eV, mean over the sites.", ""]
    if report["vasp"]:
        lines += ["| element | | all known energies | occupied | shift, eV |", "|---|---|---|---|---|"]
        lines += [
            f"| {r['id']} | {r['formula']} | {r['l1']:.3f}, shifted {r['l1_shifted']:.3f} | "
            f"{r['l1_occupied']:.3f}, shifted {r['l1_occupied_shifted']:.3f} | {r['shift']:+.2f} |"
            for r in report["vasp"]
        ]
        means = [np.mean([r[key] for r in report["vasp"]]) for key in ("l1", "l1_shifted", "l1_occupied_shifted")]
        lines += [
            "",
            "Shape against VASP (Materials Project; projections on spheres that miss charge, unevenly over energy, "
            "without a total to scale them by; another Fermi level): normalised L1 at sigma 0.2 eV, "
            f"both with as many states in the energies compared. Mean {means[0]:.3f}; {means[1]:.3f} after the best "
            f"rigid shift, {means[2]:.3f} of it in the occupied states alone.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """Compute, compare and write the results."""
    parser = argparse.ArgumentParser(description="Quantum ESPRESSO engine against the label set and VASP.")
    parser.add_argument("--vasp", type=Path, help="dos_mp_elements.npz")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    report = {
        "labels": against_labels(ROOT / "data" / "site_dos"),
        "vasp": against_vasp(options.vasp) if options.vasp else [],
    }
    table = markdown(report)
    print(table)
    write_results(options.out, "electronic", report, table)


if __name__ == "__main__":
    main()
