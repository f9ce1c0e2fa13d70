"""Geometry checks on generated structures."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from hypothesis import given, settings
from hypothesis import strategies as st

from dosmatgen_ase.crystals.checks import beyond_bounds, check_atoms, fault, is_disordered
from dosmatgen_ase.crystals.screening import KnownCrystals, charge_balanced, screen, screen_many
from dosmatgen_ase.data import load_structures

CUBE = 3.0 * np.eye(3)


def crystal(cell: Any, frac_coords: Any) -> Atoms:
    cell = np.asarray(cell, dtype=float)
    return Atoms("H" * len(frac_coords), positions=np.asarray(frac_coords, dtype=float) @ cell, cell=cell, pbc=True)


@pytest.mark.parametrize(
    ("atoms", "distance", "volume"),
    [
        (bulk("Cu", "fcc", a=3.61), 3.61 / np.sqrt(2), 3.61**3 / 4),
        (bulk("Cu", "fcc", a=3.61, cubic=True), 3.61 / np.sqrt(2), 3.61**3 / 4),
        (bulk("Fe", "bcc", a=2.87), 2.87 * np.sqrt(3) / 2, 2.87**3 / 2),
        (bulk("NaCl", "rocksalt", a=5.64), 2.82, 5.64**3 / 8),
    ],
)
def test_known_crystals_pass_with_their_distance_and_volume(atoms: Atoms, distance: float, volume: float) -> None:
    result = screen(atoms)
    assert result.accepted
    assert result.reason is None
    assert result.min_distance == pytest.approx(distance)
    assert result.volume_per_atom == pytest.approx(volume)


def test_an_atom_too_close_to_its_own_image_is_seen() -> None:
    result = screen(crystal(np.diag([0.4, 10.0, 10.0]), [[0, 0, 0]]))
    assert not result.accepted
    assert result.min_distance == pytest.approx(0.4)


def test_two_atoms_across_the_border_are_seen() -> None:
    result = screen(crystal(CUBE, [[0.01, 0, 0], [0.99, 0, 0]]))
    assert not result.accepted
    assert result.min_distance == pytest.approx(0.06)


def test_a_skewed_basis_of_the_same_lattice_has_the_same_distances() -> None:
    cell = np.array([[3.0, 0, 0], [0, 4, 0], [0, 0, 5]])
    frac_coords = np.array([[0.1, 0.2, 0.3], [0.4, 0.9, 0.7]])
    shear = np.array([[1, 0, 0], [5, 1, 0], [-3, 4, 1]])
    straight = screen(crystal(cell, frac_coords))
    skewed = screen(crystal(shear @ cell, frac_coords @ np.linalg.inv(shear)))
    assert skewed.min_distance == pytest.approx(straight.min_distance)
    nearest_image_only = frac_coords @ np.linalg.inv(shear)
    difference = nearest_image_only[0] - nearest_image_only[1]
    naive = np.linalg.norm((difference - np.round(difference)) @ shear @ cell)
    assert naive > 1.01 * straight.min_distance, "the example must need more than the component-wise minimum image"


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 10**6))
def test_distance_agrees_with_the_neighbour_list_of_ase(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cell = rng.normal(size=(3, 3)) * 3 + 3 * np.eye(3)
    cell[2] *= np.sign(np.linalg.det(cell))
    atoms = crystal(cell, rng.random((rng.integers(1, 6), 3)))
    result = screen(atoms, min_distance=0.0, min_volume_per_atom=0.5, max_volume_per_atom=1e6)
    if result.accepted:
        assert result.min_distance is not None
        assert neighbor_list("d", atoms, result.min_distance + 1e-6).min() == pytest.approx(result.min_distance)
    else:
        assert result.reason is not None
        assert "per atom" in result.reason or "too skewed" in result.reason


def alloy() -> Atoms:
    """As ASE reads a CIF with a mixed site."""
    atoms = crystal(CUBE, [[0, 0, 0]])
    atoms.info["occupancy"] = {"0": {"Cu": 0.5, "Au": 0.5}}
    return atoms


BROKEN: dict[str, tuple[Atoms, str]] = {
    "no atoms": (Atoms(cell=CUBE, pbc=True), "no atoms"),
    "NaN cell": (crystal(CUBE * np.nan, [[0, 0, 0]]), "not finite"),
    "infinite position": (Atoms("H", positions=[[np.inf, 0, 0]], cell=CUBE, pbc=True), "not finite"),
    "molecule": (Atoms("H", cell=CUBE), "not periodic"),
    "slab": (Atoms("H", cell=CUBE, pbc=(True, True, False)), "not periodic"),
    "no cell": (Atoms("H", pbc=True), "has no cell, as a molecule"),
    "flat cell": (crystal([[3, 0, 0], [0, 3, 0], [3, 3, 0]], [[0, 0, 0]]), "without volume"),
    "disordered": (alloy(), "disordered"),
    "no element": (Atoms("X", cell=CUBE, pbc=True), "outside H to Pu"),
    "left-handed": (crystal(np.diag([3.0, 3, -3]), [[0, 0, 0]]), "left-handed"),
    "collapsed": (crystal(0.2 * np.eye(3), [[0, 0, 0]] * 20), "less than 2"),
    "dilute": (crystal(30 * np.eye(3), [[0, 0, 0]]), "more than 100"),
    "overflowing cell": (crystal(1e200 * np.eye(3), [[0, 0, 0]]), "per atom"),
    "two atoms on one site": (crystal(CUBE, [[0.2, 0.2, 0.2]] * 2), "apart"),
    "needle": (crystal([[1e-9, 0, 0], [0, 1e6, 0], [0, 0, 1e4]], [[0, 0, 0]]), "apart"),
    "sheared beyond search": (crystal([[3, 0, 0], [1e7, 3, 0], [1e7, 1e7, 3]], [[0, 0, 0]]), "skewed"),
}


@pytest.mark.parametrize(("atoms", "fragment"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_structures_are_rejected_with_a_reason(atoms: Atoms, fragment: str) -> None:
    result = screen(atoms)
    assert not result.accepted
    assert result.reason is not None
    assert fragment in result.reason


@pytest.mark.parametrize("atoms", [atoms for atoms, _ in BROKEN.values()], ids=BROKEN.keys())
def test_one_function_says_what_a_crystal_is(atoms: Atoms) -> None:
    from dosmatgen_ase.forward.features import check_crystal

    told = fault(atoms)
    if told is None:  # a crystal, though not a sensible one
        beyond = beyond_bounds(atoms)
        with (
            nullcontext()
            if beyond is None
            else pytest.raises(ValueError, match=re.escape(f"this cannot be used: {beyond}"))
        ):
            check_atoms(atoms, "this")
        return
    assert screen(atoms).reason == f"it {told}"
    with pytest.raises(ValueError, match=re.escape(f"this {told}")):
        check_atoms(atoms, "this")
    with pytest.raises(ValueError, match=re.escape(f"it {told}")):
        check_crystal(atoms)


@pytest.mark.parametrize(
    ("limits", "fragment"),
    [
        ({"min_distance": -1.0}, "not negative"),
        ({"min_distance": float("nan")}, "finite"),
        ({"max_volume_per_atom": float("inf")}, "finite"),
        ({"min_volume_per_atom": 50.0, "max_volume_per_atom": 20.0}, "must lie below"),
    ],
)
def test_impossible_limits_raise(limits: dict[str, float], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        screen(bulk("Cu"), **limits)


def test_the_limits_are_the_ones_given() -> None:
    copper = bulk("Cu", "fcc", a=3.61)
    assert not screen(copper, min_distance=2.6).accepted
    assert not screen(copper, min_volume_per_atom=12.0).accepted
    assert not screen(copper, max_volume_per_atom=11.0).accepted


# -- against other crystals --------------------------------------------------------------------------------------------


def salt(a: float, kind: str = "rocksalt") -> Atoms:
    return bulk("NaCl", kind, a=a)


def test_another_cell_another_order_and_another_volume_are_the_same_crystal() -> None:
    known = KnownCrystals([salt(5.64)])
    cubic = bulk("NaCl", "rocksalt", a=5.0, cubic=True)[::-1]
    cubic.rattle(0.01, seed=0)
    assert known.find(cubic) == "0"
    assert known.find(salt(3.4, "cesiumchloride")) is None
    assert known.has_formula(salt(3.4, "cesiumchloride"))
    assert not known.has_formula(bulk("Cu"))


def test_duplicates_and_known_crystals_are_rejected_by_name_and_the_first_is_kept() -> None:
    copper = bulk("Cu")
    copper.info["material_id"] = "mp-30"
    many = [salt(5.64), bulk("Cu", cubic=True), salt(1.0), salt(5.3), salt(3.4, "cesiumchloride")]
    outcomes = screen_many(many, known=KnownCrystals([copper]))
    assert [o.accepted for o in outcomes] == [True, False, False, False, True]
    assert outcomes[1].reason == "not new: the same crystal as mp-30"
    assert "A^3 per atom" in str(outcomes[2].reason)
    assert outcomes[3].reason == "the same crystal as candidate 0"
    assert [o.accepted for o in screen_many(many, drop_duplicates=False)] == [True, True, False, True, True]
    assert not any(o.accepted for o in screen_many(many, min_distance=3.0))


def test_sites_that_count_must_be_equivalent_too() -> None:
    """NiAl as [Ni, Al] and [Al, Ni]; layers of Al whose second and third are equivalent, the first is not."""
    alloy = bulk("NiAl", "cesiumchloride", a=2.88)
    known = KnownCrystals([alloy])
    assert known.find(alloy[[1, 0]]) == "0"
    assert known.find(alloy[[1, 0]], [0]) is None
    larger = alloy.repeat((2, 1, 1))[[3, 0, 2, 1]]  # Al, Ni, Ni, Al
    larger.rattle(0.02, seed=0)
    assert known.find(larger, [0]) is None
    assert known.find(larger[[2, 0, 1, 3]], [0, 1]) == "0"  # of another cell each, and not the first of its element
    assert known.find(larger, [3]) is None  # it has no such site
    layers = crystal([[3, 0, 0], [0, 3, 0], [0, 0, 7.5]], [[0, 0, 0], [0.5, 0.5, 0.28], [0.5, 0.5, 0.72]])
    layers.numbers[:] = 13
    known = KnownCrystals([layers])
    assert known.find(layers[[0, 2, 1]], [0, 1]) == "0"
    assert known.find(layers[[1, 0, 2]]) == "0"
    assert known.find(layers[[1, 0, 2]], [0]) is None


def test_generated_twins_have_their_targets_on_equivalent_sites() -> None:
    alloy = bulk("NiAl", "cesiumchloride", a=2.88)
    for record, twins in (({"targets": {"0": "a digest"}}, False), ({"targets": {}}, True), ("text", True)):
        pair = [alloy.copy(), alloy[[1, 0]]]
        for atoms in pair:
            atoms.info["dosmatgen"] = record
        assert [outcome.accepted for outcome in screen_many(pair)] == [True, not twins]
    pair[0].info = pair[1].info = {"dosmatgen": {"targets": {0: "a digest"}}}  # a file of ASE made it a number
    assert screen_many(pair)[1].accepted


def test_known_crystals_are_read_from_the_training_split() -> None:
    path = Path(__file__).parents[1] / "data" / "structures.parquet"
    known = KnownCrystals.from_file(path)
    held_out = load_structures(path, "test")
    assert known.find(salt(5.6)) == "mp-22862"
    assert not any(known.has_formula(held_out.atoms(i)) for i in range(len(held_out)))


def test_known_crystals_may_be_large_and_come_from_any_file(tmp_path: Path) -> None:
    large = salt(5.6).repeat((2, 2, 3))
    del large[0]  # no smaller cell is the same crystal
    columns = {
        "material_id": ["mp-1", "mp-2"],
        "split": ["train", "val"],
        "cell": [large.cell.array.ravel(), -bulk("Cu").cell.array.ravel()],
        "atomic_numbers": [large.numbers, [29]],
        "frac_coords": [large.get_scaled_positions().ravel(), np.zeros(3)],
    }
    table = pa.table({name: [np.asarray(value).tolist() for value in column] for name, column in columns.items()})
    pq.write_table(table, tmp_path / "large.parquet")
    known = KnownCrystals.from_file(tmp_path / "large.parquet")
    assert known.find(large) == "mp-1"
    assert known.find(bulk("Cu")) is None  # of another split
    assert KnownCrystals.from_file(tmp_path / "large.parquet", None).find(bulk("Cu", cubic=True)) == "mp-2"
    ase.io.write(tmp_path / "two.extxyz", [large, bulk("Cu")])
    assert len(KnownCrystals.from_file(tmp_path / "two.extxyz")) == 2


@pytest.mark.parametrize(
    ("formula", "balanced"),
    [("NaCl", True), ("Fe2O3", True), ("LiFePO4", True), ("Na2Cl", False), ("NiAu3", None), ("C4", None)],
)
def test_charge_balance(formula: str, balanced: bool | None) -> None:
    assert charge_balanced(Atoms(formula)) is balanced


@pytest.mark.parametrize(
    ("occupancy", "disordered"),
    [
        (None, False),
        (5, False),  # of another program
        ("half", False),
        (np.array([1.0, 0.5]), False),
        ({}, False),
        ({"0": {"Cu": 1.0}}, False),
        ({0: {"Cu": 1}}, False),
        ({"0": {"Cu": 0.5, "Au": 0.5}}, True),
        ({"0": {"Cu": 0.9}}, True),
        ({"0": {}}, True),
        ({"0": 5}, True),
        ({"0": {"Cu": "much"}}, True),
        ({"0": {"Cu": float("nan")}}, True),
    ],
)
def test_whatever_occupancy_is_raises_nothing(occupancy: Any, disordered: bool) -> None:
    atoms = bulk("Cu")
    atoms.info["occupancy"] = occupancy
    assert is_disordered(atoms) is disordered
    assert screen(atoms).accepted is not disordered
