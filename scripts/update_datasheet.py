"""Count the labels, write the counts into data/README.md between its coverage markers, and draw data/coverage.png.

python scripts/update_datasheet.py
"""

from __future__ import annotations

import re
from pathlib import Path

from dosmatgen_ase.data import ORIGINS, load_site_dos, load_structures
from dosmatgen_ase.data.coverage import Coverage
from dosmatgen_ase.plotting import plot_coverage

DATA = Path(__file__).parents[1] / "data"
BLOCK = re.compile(r"(?<=<!-- coverage -->\n).*?(?=<!-- /coverage -->)", re.DOTALL)


def markdown(coverage: Coverage) -> str:
    """The counts as they stand in the datasheet."""
    lines = ["| split | structures | sites | with a gap |", "|---|---|---|---|"]
    lines += [f"| {split} | {n} | {sites} | {gapped} |" for split, (n, sites, gapped) in coverage.splits.items()]
    for heading, text in coverage.facts().items():
        lines += ["", f"{heading[0].upper()}{heading[1:]}: {text}."]
    return "\n".join([*lines, ""])


def main() -> None:
    """Rewrite the block in data/README.md and the picture beside it."""
    readme = DATA / "README.md"
    coverage = Coverage.of(
        load_site_dos(DATA / "site_dos", origins=ORIGINS), load_structures(DATA / "structures.parquet")
    )
    readme.write_text(BLOCK.sub(lambda _: markdown(coverage), readme.read_text()))
    plot_coverage(coverage, DATA / "coverage.png")


if __name__ == "__main__":
    main()
