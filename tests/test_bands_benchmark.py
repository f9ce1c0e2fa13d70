"""The benchmark of bands: levels meet those that they belong to, and errors are counted as told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from bands import aligned, errors, main

from dosmatgen_ase.data import MeshBands
from dosmatgen_ase.forward.bands import predict_levels
from dosmatgen_ase.forward.predictor import DOSPredictor
from dosmatgen_ase.forward.tight_binding.basis import ELECTRONS

POINTS = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0]])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("deep", [0, 3])
@pytest.mark.parametrize("atoms", [bulk("Cu"), bulk("Fe"), bulk("GaAs", "zincblende", a=5.65)], ids=str)
def test_bands_by_the_model_itself_are_right_whatever_lies_below_them(atoms: Atoms, deep: int) -> None:
    """With so many full bands of shells that tight binding leaves out, and without the lowest and the highest."""
    electrons = float(ELECTRONS[atoms.numbers].sum())
    found = predict_levels(atoms, POINTS / 2)
    bands = MeshBands(
        found[..., 1:-1], np.array([2, 2, 2]), POINTS, np.array([1, 4, 3]), 1 + deep, "fermi", 0.0, electrons + 2 * deep
    )
    levels = aligned(bands, electrons, found.shape[2])
    assert np.isnan(levels[..., [0, -1]]).all()
    told = errors(found, levels, bands.weights)
    assert all(abs(value) < 1e-9 for value in told.values())
    moved = errors(found + 0.1, levels, bands.weights)
    assert (moved["filled"], moved["empty"]) == pytest.approx((0.1, 0.1))
    assert moved["filled, shifted"] == pytest.approx(0.0, abs=1e-9)


def test_errors_count_each_point_by_its_share() -> None:
    levels = np.array([[[-11.0, -1.0, 1.0, 5.0, np.nan], [-11.0, -2.0, 2.0, 5.0, np.nan]]])
    found = levels + np.array([[[9.0, 1.0, -2.0, 9.0, 0.0], [9.0, 3.0, 4.0, 9.0, 0.0]]])
    told = errors(found, levels, np.array([0.75, 0.25]))
    assert told == pytest.approx({"filled": 1.5, "empty": 2.5, "filled, shifted": 1.0})
    assert np.isnan(errors(levels, np.full_like(levels, np.nan), np.array([0.75, 0.25]))["empty"])


def test_the_benchmark_runs_and_is_better_than_before_training(tmp_path: Path) -> None:
    report = main(["--limit", "6", "--val", "--out", str(tmp_path)])
    filled = {name: np.mean([row["filled"] for row in report[name]]) for name in ("trained", "untrained")}
    assert filled["trained"] < 0.5 * filled["untrained"]
    assert report["trained_on"] == DOSPredictor.load().info
    table = (tmp_path / "bands.md").read_text()
    assert "| all | 6 |" in table
    assert (tmp_path / "bands.png").stat().st_size > 10_000
