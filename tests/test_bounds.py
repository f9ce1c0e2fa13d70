"""What is too large, too far or too skewed is told in one line, before any work that grows with it."""

from __future__ import annotations

import re
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from typer.testing import CliRunner

from dosmatgen_ase import energy_above_hull, predict_bands, predict_dos, relax, screen_many
from dosmatgen_ase.cli import app
from dosmatgen_ase.crystals.checks import beyond_bounds, check_atoms
from dosmatgen_ase.dft.errors import ElectronicStructureError
from dosmatgen_ase.dft.espresso import compute_dos
from dosmatgen_ase.files import check_extxyz
from dosmatgen_ase.judge.relaxation import symmetrized


def far() -> Atoms:
    atoms = bulk("NaCl", "rocksalt", a=5.6)
    atoms.positions[0, 0] = 1e12
    return atoms


HOSTILE: dict[str, tuple[Atoms, str]] = {
    "many": (bulk("Cu", cubic=True) * (25, 25, 25), "62500 atoms, more than 2000: take a smaller cell"),
    "far": (far(), r"an atom lies 1.79e\+11 cells away from its own, more than 1000: wrap the positions first"),
    "wide": (Atoms("H", cell=[1e12] * 3, pbc=True), r"1e\+36 A\^3 per atom, more than 100|the cell is 1e\+12 A wide"),
    "skewed": (
        Atoms("Cu", cell=[[3, 0, 0], [3e4, 3, 0], [0, 0, 3]], pbc=True),
        "the cell is too skewed to search its images: reduce it first",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_every_function_names_the_bound(name: str) -> None:
    atoms, told = HOSTILE[name]
    assert re.search(told, beyond_bounds(atoms) or "")
    assert re.search(told, screen_many([atoms])[0].reason or "")
    assert re.search(told, relax([atoms, bulk("Cu")], max_steps=0)[0].info["relaxation"]["reason"])
    for refuse in (predict_dos, predict_bands, symmetrized):
        with pytest.raises(ValueError, match=told):
            refuse(atoms)
    with pytest.raises(ElectronicStructureError, match=told):
        compute_dos(atoms)
    with pytest.raises(ValueError, match=told):
        check_atoms(atoms, "template", 10**6)
    if name != "skewed":  # 25 copper atoms above a hull cost nothing
        assert np.isnan(energy_above_hull(atoms))


def test_what_is_honest_passes() -> None:
    for atoms in (
        bulk("Cu"),
        bulk("Cu", cubic=True) * (7, 7, 7),
        Atoms("Cu", cell=[0.6, 0.6, 40.0], pbc=True),
        Atoms("Bi2Te3", cell=[10.5, 10.5, 10.5, 24, 24, 24], scaled_positions=np.eye(5)[:, :3], pbc=True),
        Atoms("Cu", positions=[[100.0, -70, 3]], cell=[3, 3, 3], pbc=True),
    ):
        assert beyond_bounds(atoms) is None


def test_one_of_many_costs_no_other(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "all.extxyz", [bulk("Cu"), *(atoms for atoms, _ in HOSTILE.values())])
    done = CliRunner().invoke(app, ["predict", str(tmp_path / "all.extxyz"), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["all-0000.json"]


@pytest.mark.parametrize("kind", ["species:S:99999999999999999999:pos:R:3", "species:S:1:pos:R:100000"])
def test_columns_without_end_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.extxyz"
    path.write_text(f'1\nLattice="3 0 0 0 3 0 0 0 3" Properties={kind}\nCu 0 0 0\n')
    done = CliRunner().invoke(app, ["predict", str(path), "-o", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "a.extxyz holds no structures that ASE reads: its Properties tell more than 9,999 columns" in done.stderr
    check_extxyz([b"Properties=species:S:1:pos:R:3:forces:R:3 energy=12345678"])


HEAD = b'Lattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3'


@pytest.mark.parametrize(
    "lines", [[b"999999999999\n", b"a comment\n"], [b"1\n", HEAD, b"Cu 0 0 0\n", b" 100000000\n", HEAD]]
)
def test_a_frame_of_more_atoms_than_any_file_holds_is_refused(lines: list[bytes], tmp_path: Path) -> None:
    """ASE reads as many lines as the head tells, at the end of the file too: hours."""
    with pytest.raises(ValueError, match="a frame tells 10 million atoms or more"):
        check_extxyz(lines)
    check_extxyz([b"2\n", HEAD, b"Cu 0 0 0\n", b"99999999\n"])  # a last line is no head
