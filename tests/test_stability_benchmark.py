"""benchmarks/stability.py: what its cache means, to it and to scripts/build_hull.py, and what has no energy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stability
import torch
from ase import Atoms
from ase.build import bulk

from dosmatgen_ase.files import read_records

torch.set_num_threads(1)
SALT = bulk("NaCl", "rocksalt", a=5.64)


def stand_in(energy: float | None, *, converged: bool) -> Any:
    def relax(atoms: Atoms) -> Atoms:
        made = atoms.copy()
        reason = None if converged else "not converged in 200 steps"
        made.info["relaxation"] = {"energy": energy, "steps": 3, "reason": reason, "converged": converged}
        return made

    return relax


def test_only_converged_energies_may_enter_the_hull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hull.jsonl"
    lines = [{"id": "done", "relaxed": -3.0}, {"id": "unconverged", "relaxed": None}, {"id": "new", "static": -2.0}]
    cache.write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(stability, "relax", stand_in(-2.5, converged=False))
    named = dict.fromkeys(("done", "unconverged", "new"), SALT)
    found = stability.relax_all(named, cache)
    assert {name: record["reached"] for name, record in found.items()} == {
        "done": -3.0, "unconverged": -2.5, "new": -2.5,
    }  # fmt: skip
    assert {name: record["relaxed"] for name, record in read_records(cache).items()} == {
        "done": -3.0, "unconverged": None, "new": None,
    }  # fmt: skip
    monkeypatch.delattr(stability, "relax")
    assert stability.relax_all(named, cache) == found, "and nothing is relaxed again"


def test_a_draw_is_not_paired_with_the_energy_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = SALT.copy()
    drawn.info["dosmatgen"] = {"weights": "0" * 64}
    monkeypatch.setattr(stability, "draw", lambda count, seed: [drawn])
    monkeypatch.setattr(stability, "relax", stand_in(-1.0, converged=True))
    arguments = ["--num-real", "1", "--num-draws", "1", "--cache", str(tmp_path), "--out", str(tmp_path)]
    stability.main(arguments)
    monkeypatch.setattr(stability, "relax", stand_in(-2.0, converged=True))
    same = stability.main(arguments)["rows"]["generated, relaxed"]["all"]
    drawn.set_cell(1.01 * drawn.cell, scale_atoms=True)
    other = stability.main(arguments)["rows"]["generated, relaxed"]["all"]
    assert other[0] == pytest.approx(same[0] - 1.0)


def test_a_held_out_crystal_that_is_found_again_is_not_new(tmp_path: Path) -> None:
    table = tmp_path / "structures.parquet"
    columns = {
        "material_id": ["mp-1"],
        "split": ["test"],
        "cell": [SALT.cell.array.ravel()],
        "atomic_numbers": [SALT.numbers],
        "frac_coords": [SALT.get_scaled_positions().ravel()],
    }
    pq.write_table(pa.table(columns), table)
    crystals = [SALT, bulk("MgO", "rocksalt", a=4.21)]
    records = [{"crystal": [a.numbers.tolist(), a.cell.array.tolist(), a.positions.tolist()]} for a in crystals]
    found = stability.counts(crystals, records, [0.0, 0.0], table)
    assert (found["known"], found["found_again"]) == (1, 0.5)
    assert (found["valid_unique_new"], found["valid_unique_new_metastable"]) == (0.5, 0.5)


def test_what_the_hull_lacks_is_counted_as_unknown() -> None:
    entries = [(np.array([11, 17]), -3.0), (np.array([84]), -3.0), ([11], math.nan), ([11], None)]
    found = stability.above(stability.load_hull(), entries)
    assert [math.isinf(value) for value in found] == [False, True, True, True]
    assert stability.figures(found)["unknown"] == 3
