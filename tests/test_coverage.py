"""Counts of what the labels cover, their table and their picture, on a handful of crystals."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import update_datasheet
from typer.testing import CliRunner

from dosmatgen_ase.cli import app
from dosmatgen_ase.data import SiteDOSLabels, Structures, load_site_dos
from dosmatgen_ase.data.coverage import COMMON, Coverage
from dosmatgen_ase.dos import MODEL_GRID
from dosmatgen_ase.limits import MAX_ATOMS
from dosmatgen_ase.plotting import plot_coverage

ROOT = Path(__file__).parents[1]


def crystals(sites: list[list[int]], edge: float = 3.5) -> dict[str, np.ndarray]:
    """Columns that structures and labels share, of cubic cells that hold these elements."""
    numbers = np.zeros((len(sites), MAX_ATOMS), dtype=np.int64)
    for row, held in zip(numbers, sites, strict=True):
        row[: len(held)] = held
    return {
        "material_id": np.array([f"x-{i}" for i in range(len(sites))]),
        "split": np.array((["train", "val", "test"] * len(sites))[: len(sites)]),
        "num_atoms": np.array([len(held) for held in sites]),
        "cell": np.tile(edge * np.eye(3), (len(sites), 1, 1)),
        "frac_coords": np.zeros((len(sites), MAX_ATOMS, 3)),
        "atomic_numbers": numbers,
    }


@pytest.fixture
def coverage() -> Coverage:
    # Two labels of silicon carbide, one of iron; besides, copper in many structures, and what no label can hold.
    sites = [[14, 6], [14, 14, 6, 6], [26]]
    more = [*sites, *[[29]] * COMMON, *[[58, 8]] * COMMON, *[[2]] * COMMON]
    known = np.tile(MODEL_GRID.energies < 2.05, (3, 1))
    known[0] = True
    labels = SiteDOSLabels(
        **crystals(sites), values=np.zeros((3, MAX_ATOMS, MODEL_GRID.size), np.float32), known=known,
        band_gap=np.array([1.0, 4.0, 0.0]), recipe=np.array([1, 2, 2]),
        origin=np.array(["given", "given", "perturbed"]), parent=np.array(["", "", "b"]),
    )  # fmt: skip
    groups = np.full(len(more), 225)
    groups[:3] = 216, 194, 2
    return Coverage.of(
        labels, Structures(**crystals(more), reduced_formula=np.array(["X"] * len(more)), spacegroup=groups)
    )


def test_what_is_counted(coverage: Coverage) -> None:
    assert coverage.splits == {"train": (1, 2, 1), "val": (1, 4, 1), "test": (1, 1, 0)}
    assert coverage.recipes == {1: 1, 2: 2}
    assert coverage.facts()["crystals"] == "given: 2, perturbed: 1, generated: 0"
    assert coverage.elements == {"Si": 2, "C": 2, "Fe": 1}, "an element counts once per structure"
    assert coverage.usable == {"Si": 2, "C": 2, "Fe": 1, "Cu": COMMON}, "neither lanthanides nor noble gases"
    assert coverage.scarce == {"Cu": 0}
    assert coverage.num_atoms == {2: 1, 4: 1, 1: 1}
    assert {k: n for k, n in coverage.crystal_systems.items() if n} == {"cubic": 1, "hexagonal": 1, "triclinic": 1}
    assert coverage.num_spacegroups == 3
    assert coverage.gaps == {"metal": 1, "up to 1 eV": 1, "1 to 3 eV": 0, "above 3 eV": 1}
    assert coverage.known == {e: 1.0 if e <= 2 else pytest.approx(1 / 3) for e in range(-1, 6)}


def test_the_datasheet_says_so(coverage: Coverage) -> None:
    text = update_datasheet.markdown(coverage)
    assert "| val | 1 | 4 | 1 |" in text
    assert "Labels per element (3 elements): C 2, Si 2, Fe 1." in text
    assert "Fewer than 15 labels, though in 40 structures or more: Cu 0." in text


def test_the_picture_is_drawn(coverage: Coverage, tmp_path: Path) -> None:
    plot_coverage(coverage, tmp_path / "coverage.svg")
    text = (tmp_path / "coverage.svg").read_text()
    assert len(set(re.findall(r"<!-- ([A-Z][a-z]?) -->", text))) == 103, "every element up to lawrencium"
    with pytest.raises(ValueError, match="abc"):
        plot_coverage(coverage, tmp_path / "coverage.abc")


@pytest.mark.skipif(not (ROOT / "data").is_dir(), reason="no data/: the labels are in clones of the repository only")
def test_the_command_shows_and_draws_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "site_dos").mkdir()
    shard = min((ROOT / "data" / "site_dos").glob("*.npz"))
    (tmp_path / "site_dos" / shard.name).symlink_to(shard)
    (tmp_path / "structures.parquet").symlink_to(ROOT / "data" / "structures.parquet")
    command = ["data", "--data", str(tmp_path), "--plot", str(tmp_path / "coverage.png")]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert (tmp_path / "coverage.png").read_bytes()[:4] == b"\x89PNG"
    rows = re.findall(r"│ (train|val|test) +│ (\d+) ", result.output)
    assert {name for name, _ in rows} == {"train", "val", "test"}
    assert sum(int(n) for _, n in rows) == len(load_site_dos(tmp_path / "site_dos"))
    assert (ROOT / "data" / "coverage.png").is_file()
    assert "](coverage.png)" in (ROOT / "data" / "README.md").read_text()


def test_missing_data_is_told_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["data", "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "no structures at" in result.output
