"""Count the labels and write the counts into data/README.md, between its coverage markers.

    python scripts/update_datasheet.py
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers

from dosmatgen_ase.data import SiteDOSLabels, load_site_dos
from dosmatgen_ase.dos import MODEL_GRID

DATA = Path(__file__).parents[1] / "data"
BLOCK = re.compile(r"(?<=<!-- coverage -->\n).*?(?=<!-- /coverage -->)", re.DOTALL)


def coverage(labels: SiteDOSLabels) -> str:
    """Counts of the labels as Markdown: per split, per energy, per element."""
    lines = ["| split | structures | sites | with a gap |", "|---|---|---|---|"]
    for split in ("train", "val", "test"):
        rows = labels.split == split
        lines.append(
            f"| {split} | {rows.sum()} | {labels.num_atoms[rows].sum()} | {(labels.band_gap[rows] > 0).sum()} |"
        )
    shares = ", ".join(
        f"{e:+d} eV {labels.known[:, int(np.argmin(np.abs(MODEL_GRID.energies - e)))].mean():.0%}" for e in range(-1, 6)
    )
    elements: Counter[str] = Counter()
    for i in range(len(labels)):
        elements.update(set(labels.atoms(i).symbols))
    counts = ", ".join(f"{s} {elements[s]}" for s in sorted(elements, key=atomic_numbers.__getitem__))
    return "\n".join(
        [*lines, "", f"Share of the structures known at: {shares}.", ""]
        + [f"Structures per element ({len(elements)} elements): {counts}.", ""]
    )


def main() -> None:
    """Rewrite the block in data/README.md."""
    readme = DATA / "README.md"
    readme.write_text(BLOCK.sub(coverage(load_site_dos(DATA / "site_dos")), readme.read_text()))


if __name__ == "__main__":
    main()
