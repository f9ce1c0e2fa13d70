"""scripts/draw_pairs.py: rare pairs first, cubic prototypes at the volume of least energy, no known crystals."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ase.io
import numpy as np
import pytest
from ase.build import bulk
from ase.data import covalent_radii

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with an energy that is least at 1.07 times the touching distance; nothing is known."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import draw_pairs

    def energies(crystals: Any) -> Any:
        found = []
        for atoms in crystals:
            near = atoms.get_all_distances(mic=True)[atoms.numbers[:, None] != atoms.numbers].min()
            factor = near / (covalent_radii[atoms.numbers].max() + covalent_radii[atoms.numbers].min())
            found.append(3 * (factor - 1.07) ** 2 - (0.1 if len(atoms) == 2 and _coordination(atoms) == 6 else 0.0))
        return np.array(found)

    monkeypatch.setattr(draw_pairs, "chgnet_energies", energies)
    monkeypatch.setattr(draw_pairs, "default_index", lambda: SimpleNamespace(find=lambda atoms: None))
    return draw_pairs


def _coordination(atoms: Any) -> int:
    distances = np.sort((atoms * (5, 5, 5)).get_distances(2 * 62, range(250), mic=True).round(4))
    return int((distances == distances[1]).sum())


def test_the_nearest_neighbours_of_the_prototypes_are_one_apart(pairs: Any) -> None:
    made = pairs.prototypes("Na", "Cl")
    assert list(made) == ["cesiumchloride", "rocksalt", "zincblende", "Cu3Au-Na3Cl", "Cu3Au-Cl3Na"]
    for atoms in made.values():
        distances = (atoms * (3, 3, 3)).get_all_distances(mic=True)
        assert distances[distances > 0].min() == pytest.approx(1.0)
    assert [made[f"Cu3Au-{name}"].get_chemical_formula() for name in ("Na3Cl", "Cl3Na")] == ["ClNa3", "Cl3Na"]
    assert [_coordination(made[name]) for name in ("cesiumchloride", "rocksalt", "zincblende")] == [8, 6, 4]


def test_the_volume_is_that_of_least_energy(pairs: Any) -> None:
    energy, atoms = pairs.at_least_energy(pairs.prototypes("Na", "Cl")["rocksalt"])
    touch = covalent_radii[11] + covalent_radii[17]
    assert atoms.cell.lengths() == pytest.approx(1.07 * touch * np.sqrt(2) * np.ones(3), rel=1e-4)
    assert energy == pytest.approx(-0.1, abs=1e-6)


@pytest.mark.parametrize("curve", [np.arange(11.0), -np.arange(11.0), np.full(11, np.nan)])
def test_no_minimum_is_no_crystal(pairs: Any, monkeypatch: pytest.MonkeyPatch, curve: Any) -> None:
    monkeypatch.setattr(pairs, "chgnet_energies", lambda crystals: curve)
    assert pairs.at_least_energy(bulk("NaCl", "rocksalt", a=1.0)) is None
    assert pairs.simple_compound((11, 17), 0) is None


def test_the_lowest_prototype_is_taken_and_a_quarter_is_diluted(pairs: Any) -> None:
    made = [pairs.simple_compound(pair, 0) for pair in itertools.combinations(range(20, 31), 2)]
    names = [atoms.info["material_id"].split("-")[-1] for atoms in made]
    assert set(names) == {"rocksalt", "Cu3Au"}
    assert 0.1 < names.count("Cu3Au") / len(names) < 0.4
    assert [len(atoms) for atoms in made] == [4 if name == "Cu3Au" else 2 for name in names]


def test_known_crystals_are_passed_over(pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = SimpleNamespace(find=lambda atoms: "mp-1" if _coordination(atoms) == 6 else None)
    monkeypatch.setattr(pairs, "default_index", lambda: known)
    monkeypatch.setattr(pairs, "DILUTED", 0.0)
    assert pairs.simple_compound((11, 17), 0).info["material_id"] in (
        "pair-ClNa-cesiumchloride",
        "pair-ClNa-zincblende",
    )


def test_pairs_that_few_training_labels_hold_come_first(
    pairs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    crystals = [bulk("NaCl", "rocksalt", a=5.6)] * 2 + [bulk("MgO", "rocksalt", a=4.2), bulk("CuZn", "rocksalt", a=4.2)]
    split = np.array(["train", "train", "train", "test"])
    labels = SimpleNamespace(split=split, atoms=lambda i: crystals[i])
    monkeypatch.setattr(pairs, "load_site_dos", lambda folder, origins: labels)
    elements, held = pairs.training_pairs(labels)
    assert elements == [8, 11, 12, 17]
    assert held == {(11, 17): 2, (8, 12): 1}
    out = tmp_path / "pairs.extxyz"
    pairs.main(["--fewer", "2", "--out", str(out)])
    made = ase.io.read(out, ":")
    assert [set(atoms.numbers.tolist()) for atoms in made][-1] == {8, 12}  # it has a label, the four before none
    assert len(made) == 5
    assert {11, 17} not in [set(atoms.numbers.tolist()) for atoms in made]
