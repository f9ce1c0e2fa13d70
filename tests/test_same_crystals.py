"""The same seeds give the same crystals as in earlier versions: by the weights that ship, against recorded ones.

A change that is meant to alter what is drawn records them anew, and says so: ``python tests/test_same_crystals.py``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.constraints import FixAtoms

from dosmatgen_ase import DOSGenerator, TargetDOS
from dosmatgen_ase.crystals.screening import digest

RECORDED = Path(__file__).parent / "recorded" / "crystals.json"
ENERGIES = np.linspace(-9.0, 4.0, 131)
WINDOW = TargetDOS.from_peaks([(-0.65, 6.0, 0.3)], window=(-3, 1))
CURVE = TargetDOS.from_arrays(ENERGIES, 2.0 * np.exp(-((ENERGIES + 2.0) ** 2)), sigma=0.3)
TOTAL = TargetDOS.from_arrays(ENERGIES, 8.0 * np.exp(-((ENERGIES + 3.0) ** 2) / 4.0), sigma=0.3, kind="total")
SALT = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
SLAB = bulk("Cu", cubic=True)
SLAB.set_constraint(FixAtoms([0, 3]))

REQUESTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "nothing": (None, {"num_atoms": 4}),
    "window": (WINDOW, {"num_atoms": [2, 5]}),
    "drawn size": (CURVE, {}),
    "sites": (CURVE, {"num_atoms": 4, "sites": [1, 3]}),
    "list": ([CURVE, WINDOW, CURVE], {}),
    "mapping, guided": ({2: CURVE, 0: WINDOW}, {"num_atoms": 3, "guidance_scale": 2.0}),
    "total, many steps": (TOTAL, {"num_atoms": 2, "num_steps": 25}),
    "scale 0": (CURVE, {"num_atoms": 3, "guidance_scale": 0.0}),
    "pins": (CURVE, {"num_atoms": 4, "fixed_species": {0: "Co"}, "exclude_elements": ["O", "F"]}),
    "composition": (CURVE, {"composition": "NiAu3", "num_atoms": [4, 8]}),
    "elements": (None, {"elements": ["Ni", "Au", "O"], "num_atoms": 6}),
    "template": (CURVE, {"template": SALT, "strength": 0.3}),
    "held template": (CURVE, {"template": SALT, "strength": 0.8, "fixed_sites": [0, 5], "fixed_cell": True}),
    "FixAtoms": (WINDOW, {"template": SLAB, "fixed_species": {1: "Zn"}}),
    "strength 0": (None, {"template": SALT, "strength": 0.0}),
}


def drawn(name: str, generator: DOSGenerator) -> list[Atoms]:
    dos, settings = REQUESTS[name]
    return generator.generate(dos, 3, seed=11, **settings)


def to_json(atoms: Atoms) -> dict[str, Any]:
    """Species exactly, the rest to 1e-4 A: a rounding differs between processors."""
    cell, positions = np.asarray(atoms.cell).round(4).tolist(), atoms.positions.round(4).tolist()
    return {"numbers": atoms.numbers.tolist(), "cell": cell, "positions": positions}


@pytest.fixture(scope="module")
def generator() -> DOSGenerator:
    return DOSGenerator(device="cpu")


@pytest.mark.parametrize("name", REQUESTS)
def test_the_same_seeds_give_the_crystals_of_earlier_versions(name: str, generator: DOSGenerator) -> None:
    for atoms, before in zip(drawn(name, generator), json.loads(RECORDED.read_text())[name], strict=True):
        assert atoms.numbers.tolist() == before["numbers"]
        np.testing.assert_allclose(np.asarray(atoms.cell), before["cell"], atol=2e-3)
        np.testing.assert_allclose(atoms.positions, before["positions"], atol=5e-3)


if __name__ == "__main__":
    shipped = DOSGenerator(device="cpu")
    made = {name: drawn(name, shipped) for name in REQUESTS}
    lines = [f'"{name}": {json.dumps([to_json(a) for a in several])}' for name, several in made.items()]
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    exact = "".join(digest(atoms) for several in made.values() for atoms in several)
    print(hashlib.sha256(exact.encode()).hexdigest(), "on this machine")
