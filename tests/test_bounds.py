"""What is too large, too far or too skewed is told in one line, before any work that grows with it."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io.jsonio import encode
from typer.testing import CliRunner

from dosmatgen_ase import energy_above_hull, predict_bands, predict_dos, relax, screen_many
from dosmatgen_ase.cli import app
from dosmatgen_ase.crystals.checks import beyond_bounds, check_atoms
from dosmatgen_ase.data import load_structures
from dosmatgen_ase.dft.errors import ElectronicStructureError
from dosmatgen_ase.dft.espresso import compute_dos
from dosmatgen_ase.files import check_extxyz, read_structures
from dosmatgen_ase.forward.features import tight_binding_graph
from dosmatgen_ase.judge.relaxation import symmetrized

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}


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
    "lines", [[b"999999999999\n", b"a comment\n"], [b"1\n", HEAD, b"Cu 0 0 0\n", b" 2776141\n", HEAD]]
)
def test_a_frame_of_more_atoms_than_any_file_holds_is_refused(lines: list[bytes], tmp_path: Path) -> None:
    """ASE reads as many lines as the head tells, at the end of the file too: hours."""
    with pytest.raises(ValueError, match="a frame tells a million atoms or more"):
        check_extxyz(lines)
    check_extxyz([b"2\n", HEAD, b"Cu 0 0 0\n", b"99999999\n"])  # a last line is no head


def strange(number: int) -> Atoms:
    atoms = bulk("NaCl", "rocksalt", a=5.6)
    atoms.numbers[0] = number
    return atoms


@pytest.mark.parametrize("number", [-1, 119, 200])
def test_what_is_no_element_is_told(number: int, tmp_path: Path) -> None:
    atoms = strange(number)
    for refuse in (predict_dos, predict_bands):
        with pytest.raises(ValueError, match="has an element outside H to Pu"):
            refuse(atoms)
    with pytest.raises(ValueError, match="holds what is no element"):
        energy_above_hull(atoms)
    assert relax([atoms], max_steps=0)[0].info["relaxation"]["energy"] is None
    row = {"numbers": atoms.numbers, "positions": atoms.positions, "cell": atoms.cell.array, "pbc": atoms.pbc}
    (tmp_path / "a.json").write_text(str(encode({"1": row, "ids": [1], "nextid": 2})))
    with pytest.raises(ValueError, match="it holds an atom that is no element"):
        read_structures(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("cell", "place"), [(np.inf, 0.0), (np.nan, 0.0), (5.6, np.inf), (1e-2, 0.0), (5.6, np.nan)], ids=str
)
def test_no_symmetry_of_what_is_no_crystal_is_sought(cell: float, place: float) -> None:
    """Of cells that are not finite spglib ends the process, not the search."""
    code = f"""
import numpy as np
from ase import Atoms
from dosmatgen_ase.dft.order import spacegroup
nan, inf = np.nan, np.inf
atoms = Atoms("NaCl", positions=[[{place}, 0, 0], [2, 2, 2]], pbc=True)
atoms.cell[:] = [[{cell}, 0, 0], [0, 1.5, 0], [0, 0, 4e4]]
print(spacegroup(atoms))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_symmetry_of_many_atoms_is_not_sought() -> None:
    with pytest.raises(ValueError, match="1372 atoms, more than 1000: take a smaller cell"):
        symmetrized(bulk("Cu", cubic=True) * (7, 7, 7))


def test_tight_binding_takes_a_thousand_orbitals() -> None:
    tight_binding_graph(bulk("Cu") * (4, 5, 5), 3.0)
    with pytest.raises(ValueError, match="it has 1125 orbitals, more than 1000: use a smaller cell"):
        tight_binding_graph(bulk("Cu") * (5, 5, 5), 3.0)


@pytest.mark.parametrize(("name", "packer"), [("a.xyz.gz", gzip), ("a.cif.bz2", bz2), ("a.xyz.xz", lzma)])
def test_a_packed_file_that_grows_beyond_reason_is_refused(name: str, packer: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(packer.compress(b"0" * (17 << 20)))
    with pytest.raises(ValueError, match="it unpacks to more than 16 MiB"):
        read_structures(path)
    text = io.StringIO()
    ase.io.write(text, [bulk("Cu"), bulk("Al")], format="extxyz")
    path.write_bytes(packer.compress(text.getvalue().encode()))
    assert len(read_structures(path, format="extxyz")) == 2
    path.write_bytes(packer.compress(b'1\nProperties=species:S:99999999999 Lattice="3 0 0 0 3 0 0 0 3"\nCu\n'))
    with pytest.raises(ValueError, match="more than 9,999 columns"):
        read_structures(path, format="extxyz")


def test_a_poscar_of_many_atoms_is_refused(tmp_path: Path) -> None:
    for species in ("Cu Al\n", ""):
        (tmp_path / "POSCAR").write_text(f"x\n1\n3 0 0\n0 3 0\n0 0 3\n{species}99999999 1\nDirect\n0 0 0\n")
        with pytest.raises(ValueError, match="it tells 10 million atoms or more"):
            read_structures(tmp_path / "POSCAR")


def test_a_table_of_more_values_than_bytes_can_hold_is_refused(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    table = pq.read_table(Path(__file__).parents[1] / "data" / "structures.parquet").slice(0, 1)
    with pq.ParquetWriter(tmp_path / "structures.parquet", table.schema) as file:
        file.write_table(table.take([0] * 300_000))
    with pytest.raises(ValueError, match=r"holds 6900000 values in .* bytes, which no table of structures does"):
        load_structures(tmp_path / "structures.parquet")


def test_a_head_that_tells_many_atoms_takes_no_memory(tmp_path: Path) -> None:
    """Readers of some formats make room for as many."""
    cell = "".join(f"H0({i},{i}) = 3 A\n" for i in (1, 2, 3))
    head = "Number of particles = {}\nA = 1.0 Angstrom\n" + cell + ".NO_VELOCITY.\nentry_count = 3\n63.5\nCu\n0 0 0\n"
    for count, told in ((99_999_999, "it asks for more memory than a file of its size needs"), (1, "")):
        (tmp_path / "a.cfg").write_text(head.format(count))
        before = resource.getrlimit(resource.RLIMIT_AS)
        done = CliRunner().invoke(
            app, ["relax", str(tmp_path / "a.cfg"), "--fmax", "-1", "-o", str(tmp_path / "o.xyz")]
        )
        assert (told or "must be above 0") in done.stderr
        assert resource.getrlimit(resource.RLIMIT_AS) == before
