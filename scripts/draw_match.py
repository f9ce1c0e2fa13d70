"""Draw the figure of the README: a held-out target, the crystal returned for it, and its DOS by DFT.

python scripts/draw_match.py            # draw docs/_static/match.png from match.json beside it
python scripts/draw_match.py mp-861951  # make match.json anew first (DFT: minutes)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ase.io.jsonio import decode, encode
from matplotlib.figure import Figure

from dosmatgen_ase import DOSGenerator, TargetDOS, compute_dos, relax
from dosmatgen_ase.data import load_site_dos
from dosmatgen_ase.dos.distances import mean_distance
from dosmatgen_ase.files import write_atomic
from dosmatgen_ase.plotting import draw_crystal, plot_dos

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "_static" / "match.json"


def make(material_id: str) -> None:
    """Generate for the site DOS of one label, and compute what comes out."""
    labels = load_site_dos(ROOT / "data" / "site_dos")
    row = labels.material_id.tolist().index(material_id)
    if labels.split[row] == "train":
        raise SystemExit(f"{material_id} is a training label: name one of val or test")
    targets = labels.targets(row)
    best = DOSGenerator().generate(targets, oversample=20, seed=0)
    best = relax(best)
    computed = compute_dos(best)
    record = {
        "target": material_id,
        "target_formula": labels.atoms(row).get_chemical_formula(),
        "command": f"python scripts/draw_match.py {material_id}",
        "made_by": best.info["dosmatgen"],
        "targets": [target.on_grid().to_dict() for target in targets],
        "computed": [site.on_grid().to_dict() for site in computed.sites],
        "atoms": json.loads(encode(best)),
    }
    write_atomic(RECORD, (json.dumps(record) + "\n").encode())


def draw() -> None:
    """Draw the record: each site's DOS beside the crystal."""
    record = json.loads(RECORD.read_text())
    targets, computed = ([TargetDOS.from_dict(d) for d in record[name]] for name in ("targets", "computed"))
    atoms = decode(json.dumps(record["atoms"]))
    mean = mean_distance(zip(computed, targets, strict=True))
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1.0))
    wanted, found = TargetDOS.sum_of(targets), TargetDOS.sum_of(computed)
    labels = [f"target ({record['target_formula']}, held out)", "DFT of the crystal returned"]
    plot_dos([wanted, found], labels, ax=left)
    left.set_ylim(0, 1.3 * float(wanted.values.max()))  # room for the legend
    left.set_title(f"sites differ by {mean:.2f} in the mean (normalised L1)", fontsize=10)
    draw_crystal(atoms, ax=right)
    right.set_title(f"returned: {atoms.get_chemical_formula()}", fontsize=10)
    figure.savefig(RECORD.with_suffix(".png"), dpi=150)


def main() -> None:
    """Make the record if an id is given, and draw it."""
    parser = argparse.ArgumentParser(description="Draw the figure of the README.")
    parser.add_argument("material_id", nargs="?", help="held-out label to make anew (default: draw what is there)")
    material_id = parser.parse_args().material_id
    if material_id is not None:
        make(material_id)
    draw()


if __name__ == "__main__":
    main()
