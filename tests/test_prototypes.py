"""The textbook compounds that `scripts/build_hull.py --prototypes` adds: formulas, symmetry, distances."""

from __future__ import annotations

import pytest
import spglib
from ase import Atoms
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list
from prototypes import PROTOTYPES, prototypes

# Prototype: space group and a compound with its cell's atoms, as every crystal database has them.
TOLD = {
    "zincblende": (216, "GaAs", 2), "wurtzite": (186, "ZnO", 4), "rocksalt": (225, "MgO", 2),
    "cesiumchloride": (221, "CsCl", 2),
    "fluorite": (225, "CaF2", 3), "Cu3Au": (221, "AuCu3", 4), "AuCu": (123, "AuCu", 2), "NiAs": (194, "AsNi", 4),
    "AlB2": (191, "MgB2", 3), "rutile": (136, "TiO2", 6), "CdI2": (164, "TiS2", 3), "CdCl2": (166, "MgCl2", 3),
    "MoS2": (194, "MoS2", 6), "pyrite": (205, "FeS2", 12), "Cr3Si": (223, "Nb3Sn", 8), "MgCu2": (227, "Cu2Mg", 6),
    "BiF3": (225, "AlFe3", 4), "Al2O3": (167, "Al2O3", 10), "ReO3": (221, "ReO3", 4), "perovskite": (221, "SrTiO3", 5),
    "antiperovskite": (221, "GaMn3N", 5), "half-Heusler": (216, "NiSnTi", 3), "Heusler": (225, "MnNi2Ga", 4),
}  # fmt: skip


@pytest.fixture(scope="module")
def every() -> list[Atoms]:
    """All of them; to make them takes seconds."""
    return list(prototypes())


def test_every_prototype_has_its_space_group_formula_and_cell(every: list[Atoms]) -> None:
    found = {}
    for atoms in every:
        prototype, _, formula = str(atoms.info["material_id"]).rpartition("-")
        found.setdefault(prototype, {})[frozenset(atoms.symbols.formula.reduce()[0].count().items())] = atoms
    assert found.keys() == PROTOTYPES.keys() == TOLD.keys()
    from ase.formula import Formula

    for prototype, (group, formula, number) in TOLD.items():
        atoms = found[prototype][frozenset(Formula(formula).count().items())]
        cell = (atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)
        assert len(atoms) == number, prototype
        i, j, distance = neighbor_list("ijd", atoms, 5.0)
        ratio = (distance / (covalent_radii[atoms.numbers[i]] + covalent_radii[atoms.numbers[j]])).min()
        assert ratio == pytest.approx(0.8 if prototype == "Cr3Si" else 1.0, abs=1e-6), prototype
        assert spglib.get_symmetry_dataset(cell, symprec=1e-3).number == group, prototype


def test_no_compound_stands_twice_in_a_prototype(every: list[Atoms]) -> None:
    names = [atoms.info["material_id"] for atoms in every]
    assert len(names) == len(set(names))
