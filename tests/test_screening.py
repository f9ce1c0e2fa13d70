"""Geometry checks on generated structures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from hypothesis import given, settings
from hypothesis import strategies as st

from dosmatgen_ase.screening import screen

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
        assert "per atom" in result.reason


BROKEN: dict[str, tuple[Atoms, str]] = {
    "no atoms": (Atoms(cell=CUBE, pbc=True), "no atoms"),
    "NaN cell": (crystal(CUBE * np.nan, [[0, 0, 0]]), "not finite"),
    "infinite position": (Atoms("H", positions=[[np.inf, 0, 0]], cell=CUBE, pbc=True), "not finite"),
    "molecule": (Atoms("H", cell=CUBE), "not periodic"),
    "slab": (Atoms("H", cell=CUBE, pbc=(True, True, False)), "not periodic"),
    "no cell": (Atoms("H", pbc=True), "less than 2"),
    "flat cell": (crystal([[3, 0, 0], [0, 3, 0], [3, 3, 0]], [[0, 0, 0]]), "less than 2"),
    "left-handed": (crystal(np.diag([3.0, 3, -3]), [[0, 0, 0]]), "left-handed"),
    "collapsed": (crystal(0.01 * np.eye(3), [[0, 0, 0]] * 20), "less than 2"),
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
