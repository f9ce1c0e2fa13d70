"""Niggli reduction: the same lattice, the same hand, and nothing done where nothing is to do."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.geometry import is_minkowski_reduced
from hypothesis import given
from hypothesis import strategies as st

from dosmatgen_ase.crystals.reduction import niggli_operation, plane_spacings

CRYSTALS = [bulk("Cu"), bulk("Fe"), bulk("Mg"), bulk("NaCl", "rocksalt", a=5.64), bulk("Cu", cubic=True)]


@pytest.mark.parametrize("handed", [1, -1])
@pytest.mark.parametrize("atoms", CRYSTALS, ids=lambda a: str(a.symbols))
def test_a_reduced_cell_is_left_alone(atoms: Atoms, handed: int) -> None:
    assert (niggli_operation(handed * np.asarray(atoms.cell)) == np.eye(3)).all()


@given(
    seed=st.integers(0, 1000),
    steps=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 2), st.integers(-6, 6)), max_size=5),
)
def test_any_basis_comes_back_to_the_same_metric(seed: int, steps: list[tuple[int, int, int]]) -> None:
    cell = 4 * np.eye(3) + np.random.default_rng(seed).uniform(-1.5, 1.5, (3, 3))
    sheared = cell.copy()
    for i, other, times in steps:
        sheared[i] += times * sheared[(i + other) % 3]
    first, second = niggli_operation(cell), niggli_operation(sheared)
    for operation in (first, second):
        assert operation.dtype == int
        assert round(np.linalg.det(operation)) == 1
    a, b = first @ cell, second @ sheared
    np.testing.assert_allclose(a @ a.T, b @ b.T, atol=1e-6)
    assert is_minkowski_reduced(b[np.argsort(np.linalg.norm(b, axis=1))] * (1 + 1e-9 * np.arange(3))[:, None])


def test_a_cell_that_is_sheared_a_thousandfold() -> None:
    cell = 3.6 * np.array([[1, 0, 0], [1000, 1, 0], [100000, 1000, 1]])
    np.testing.assert_allclose(np.linalg.norm(niggli_operation(cell) @ cell, axis=1), 3.6)


@pytest.mark.parametrize(
    "cell", [np.zeros((3, 3)), np.diag([3.0, 3.0, 0.0]), np.full((3, 3), np.nan)], ids=["zero", "flat", "nan"]
)
def test_a_cell_without_volume_is_refused(cell: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"cannot be reduced: set atoms\.cell"):
        niggli_operation(cell)


def test_distances_of_lattice_planes() -> None:
    np.testing.assert_allclose(plane_spacings(np.diag([2.0, 3.0, 4.0])), [2, 3, 4])
    np.testing.assert_allclose(plane_spacings(np.asarray(bulk("Cu", a=4.0).cell)), 4 / np.sqrt(3))  # (111)
