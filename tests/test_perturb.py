"""Crystals off equilibrium, and their labels, which count as known nowhere."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from hypothesis import given
from hypothesis import strategies as st
from test_labels import machine, run, stand_in_engine  # noqa: F401

from dosmatgen_ase.crystals.perturb import perturbed
from dosmatgen_ase.data import ORIGINS, CrystalDataset, load_site_dos, load_structures
from dosmatgen_ase.dft.labels import label
from dosmatgen_ase.dft.perturbed import perturbed_copies

SALT = bulk("NaCl", "rocksalt", a=5.6)


@given(seed=st.integers(0, 2**32), cubic=st.booleans())
def test_strain_and_moves_stay_in_their_bounds(seed: int, cubic: bool) -> None:
    atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=cubic)
    made = perturbed(atoms, np.random.default_rng(seed))
    assert (made.numbers == atoms.numbers).all()
    stretch = np.linalg.solve(atoms.cell.array, made.cell.array)
    np.testing.assert_allclose(stretch, stretch.T, atol=1e-12)
    assert np.abs(np.linalg.eigvalsh(stretch) - 1).max() <= 0.05
    fractional = made.get_scaled_positions() - atoms.get_scaled_positions()
    moves = (fractional - np.round(fractional)) @ made.cell.array
    assert 0.05 <= np.sqrt((moves**2).sum(1).mean()) <= 0.15
    np.testing.assert_allclose(moves.mean(0), 0, atol=1e-9)


def test_a_draw_belongs_to_its_generator() -> None:
    a, b, c = (perturbed(SALT, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert a == b
    assert a != c
    still = perturbed(SALT, np.random.default_rng(0), rattle=(0, 0), strain=0)
    np.testing.assert_allclose(still.cell, SALT.cell)
    apart = still.get_scaled_positions() - SALT.get_scaled_positions()
    np.testing.assert_allclose(apart - np.round(apart), 0, atol=1e-12)
    alone = perturbed(bulk("Cu"), np.random.default_rng(0))
    assert alone.get_volume() != pytest.approx(bulk("Cu").get_volume(), rel=1e-4)
    with pytest.raises(ValueError, match="must rise from 0"):
        perturbed(SALT, np.random.default_rng(0), rattle=(0.2, 0.1))
    with pytest.raises(ValueError, match=r"were refused as no crystals, the last because: .* A\^3 per atom, less than"):
        perturbed(bulk("Cu", a=0.9), np.random.default_rng(0))


def test_a_left_handed_cell_is_turned_over() -> None:
    left = SALT.copy()
    left.set_cell(SALT.cell[[1, 0, 2]])
    made = perturbed(left, np.random.default_rng(0), rattle=(0, 0), strain=0)
    np.testing.assert_allclose(made.cell, -left.cell)
    assert made.get_distance(0, 1, mic=True) == pytest.approx(SALT.get_distance(0, 1, mic=True))
    assert perturbed(left, np.random.default_rng(0)).get_volume() > 0


def few() -> dict[str, Atoms]:
    """Small crystals of elements that have stand-ins of pseudopotentials."""
    return {
        "alloy": bulk("CuAl", "cesiumchloride", a=2.9),
        "other": bulk("NiAl", "cesiumchloride", a=2.9),
        "single": bulk("Cu"),
        "rare": bulk("CeAl", "cesiumchloride", a=3.8),
    }


def test_copies_are_of_what_can_be_labelled_and_more_of_them_begin_alike(tmp_path: Path) -> None:
    copies, parents = perturbed_copies(few(), 5)
    assert parents == {name: name.rsplit("-", 1)[0] for name in copies}
    assert sorted(copies) == ["alloy-r1", "alloy-r2", "alloy-r3", "other-r1", "other-r2"] or sorted(copies) == [
        "alloy-r1",
        "alloy-r2",
        "other-r1",
        "other-r2",
        "other-r3",
    ]
    first, _ = perturbed_copies(few(), 2)
    assert first == dict(list(copies.items())[:2])
    assert first != perturbed_copies(few(), 2, seed=1)[0]
    with pytest.raises(ValueError, match="give at least 1"):
        perturbed_copies(few(), 0)
    with pytest.raises(ValueError, match="no structure of two atoms or more"):
        perturbed_copies({"single": bulk("Cu")}, 1)


def test_their_labels_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    stand_in_engine(tmp_path / "log")
    shards = tmp_path / "shards"
    label({"alloy": few()["alloy"]}, shards, split={"alloy": "val"})
    copies, parents = perturbed_copies({"alloy": few()["alloy"]}, 2)
    label(copies, shards, origin="perturbed", parents=parents)
    label({"pick-1": few()["other"]}, shards, origin="generated", parents={"pick-1": "alloy"})
    assert load_site_dos(shards).material_id.tolist() == ["alloy"]
    everything = load_site_dos(shards, origins=ORIGINS)
    told = dict(zip(everything.material_id.tolist(), everything.split.tolist(), strict=True))
    assert told == {"alloy": "val", "alloy-r1": "val", "alloy-r2": "val", "pick-1": "train"}
    some = load_site_dos(shards, origins=["perturbed"])
    assert (some.parent == "alloy").all()
    i = some.material_id.tolist().index("alloy-r1")
    np.testing.assert_allclose(some.atoms(i).cell, copies["alloy-r1"].cell, atol=1e-5)
    apart = some.atoms(i).get_scaled_positions() - copies["alloy-r1"].get_scaled_positions()
    np.testing.assert_allclose(apart - np.round(apart), 0, atol=1e-5)
    assert label(copies, shards, origin="perturbed", parents=parents).done_before == 2
    with pytest.raises(ValueError, match="origins=given must be some of"):
        load_site_dos(shards, origins="given")
    with pytest.raises(ValueError, match=r"alloy-r1 is perturbed in .*, and given here"):
        label(copies, shards)


def test_no_copy_joins_the_structures(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    table = load_structures(Path(__file__).parents[1] / "data" / "structures.parquet", split="val")
    row = table.reduced_formula.tolist().index("AlNi3")
    name = str(table.material_id[row])
    stand_in_engine(tmp_path / "log")
    copies, parents = perturbed_copies({name: table.atoms(row)}, 2)
    label(copies, tmp_path, table=table, origin="perturbed", parents=parents)
    labels = load_site_dos(tmp_path, origins=ORIGINS)
    assert set(labels.split.tolist()) == {"val"}, "that of the formula in the table"
    assert (CrystalDataset.join(table, labels).dos_index == -1).all()
    with pytest.raises(ValueError, match="hold no label"):
        load_site_dos(tmp_path)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"origin": "found"}, "origin='found' must be 'given', 'perturbed', 'generated'"),
        ({"origin": "perturbed"}, "1 perturbed copies have no parent, such as a"),
        ({"parents": {"a": "b"}}, "crystals that are given have no parents"),
    ],
)
def test_an_origin_that_is_none_is_refused(tmp_path: Path, options: dict[str, object], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        label({"a": bulk("Cu")}, tmp_path / "shards", **options)  # type: ignore[arg-type]


def test_the_command_labels_copies_and_generated_crystals(tmp_path: Path) -> None:
    stand_in_engine(tmp_path / "log")
    ase.io.write(tmp_path / "alloy.cif", few()["alloy"])
    shards = tmp_path / "shards"
    result = run("label", tmp_path / "alloy.cif", "--shards", shards, "--perturbed", 3)
    assert result.exit_code == 0, result.output
    picks = [few()["other"], bulk("NiCu", "cesiumchloride", a=2.8)]
    for i, atoms in enumerate(picks):
        atoms.info = {"material_id": f"pick-mp-1-{i}", "parent": "mp-1"}
    ase.io.write(tmp_path / "picks.extxyz", picks)
    result = run("label", tmp_path / "picks.extxyz", "--shards", shards, "--generated")
    assert result.exit_code == 0, result.output
    made = load_site_dos(shards, origins=ORIGINS)
    told = dict(zip(made.material_id.tolist(), zip(made.origin, made.parent, strict=True), strict=True))
    assert told == {
        **{f"alloy-r{i}": ("perturbed", "alloy") for i in (1, 2, 3)},
        **{f"pick-mp-1-{i}": ("generated", "mp-1") for i in (0, 1)},
    }
    for i in (0, 1):
        picks[i].info["material_id"] = "same"
    ase.io.write(tmp_path / "picks.extxyz", picks)
    result = run("label", tmp_path / "picks.extxyz", "--shards", shards, "--generated")
    assert "two crystals have the same material_id" in " ".join(result.output.split())
    result = run("label", tmp_path / "alloy.cif", "--shards", shards, "--generated", "--perturbed", 1)
    assert result.exit_code == 1
    assert "--generated is of files" in " ".join(result.output.split())
