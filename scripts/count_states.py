"""Count the states below zero of the labelled sites of each element, for the warnings about targets that fit none.

    python scripts/count_states.py          # writes src/dosmatgen_ase/references/states_below_zero.json in seconds

For every lower bound (eV) the fewest and the most states up to zero, over the sites of the training split that are
known there, at sigma 0.2 eV.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols

from dosmatgen_ase.data import load_site_dos
from dosmatgen_ase.dos import MODEL_GRID
from dosmatgen_ase.dos.checks import STATES
from dosmatgen_ase.dos.grid import cell_widths
from dosmatgen_ase.files import write_atomic

ROOT = Path(__file__).parents[1]
BOUNDS = [*np.arange(MODEL_GRID.minimum, 0.0, 0.5).tolist(), 0.0]


def count(shards: Path) -> dict[str, dict[str, list[list[float]]]]:
    """Fewest and most states from each of `BOUNDS` to zero, by element."""
    labels = load_site_dos(shards)
    weights = np.array([cell_widths(MODEL_GRID.energies, lo, 0.0) for lo in BOUNDS])
    below = MODEL_GRID.energies <= 0
    counted: dict[int, list[np.ndarray]] = {}
    for i in np.flatnonzero((labels.split == "train") & labels.known[:, below].all(axis=1)):
        for z, values in zip(labels.atomic_numbers[i], labels.values[i], strict=True):
            if z:
                counted.setdefault(int(z), []).append(weights @ values)
    told = {}
    for z in sorted(counted):
        states = np.array(counted[z])
        told[chemical_symbols[z]] = [np.round(s, 2).tolist() for s in (states.min(axis=0), states.max(axis=0))]
    return told


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, default=ROOT / "data" / "site_dos")
    parser.add_argument("--out", type=Path, default=STATES)
    args = parser.parse_args()
    made_by = "scripts/count_states.py, training split of data/site_dos"
    rows = ",\n".join(f'  "{symbol}": {json.dumps(rows)}' for symbol, rows in count(args.shards).items())
    text = f'{{"made_by": "{made_by}",\n"lo": {json.dumps(BOUNDS)},\n"elements": {{\n{rows}\n}}}}\n'
    write_atomic(args.out, text.encode())
    print(f"{args.out}: {len(text)} bytes")


if __name__ == "__main__":
    main()
