"""Outputs: written in the format that their name says, and never over what is the user's."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.db import connect
from ase.db.jsondb import JSONDatabase
from ase.io.trajectory import TrajectoryReader
from ase.spacegroup import Spacegroup
from typer.testing import CliRunner, Result

from dosmatgen_ase import DOSGenerator, TargetDOS, files
from dosmatgen_ase.cli import app
from dosmatgen_ase.files import STRUCTURES, check_output, read_structures, stream_of, write_atomic, write_structures
from dosmatgen_ase.judge.relaxed_file import relax_into
from dosmatgen_ase.plotting import plot_dos

TARGET = TargetDOS.from_peaks([(-0.65, 6.0, 0.3)], window=(-3, 1))
SALT = bulk("NaCl", "rocksalt", a=5.6)
NOTES = b"the only copy of my notes\n"


@pytest.fixture(scope="module")
def generator(tiny_weights: Path) -> DOSGenerator:
    return DOSGenerator(tiny_weights, device="cpu")


def make(generator: DOSGenerator, out: Path, n: int = 3, **settings: Any) -> list[Atoms]:
    return generator.generate(TARGET, n, **{"num_atoms": 3, "num_steps": 2, "seed": 0, "out": out, **settings})


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def assert_same(first: Atoms, second: Atoms) -> None:
    assert (first.numbers == second.numbers).all()
    np.testing.assert_allclose(first.cell.cellpar(), second.cell.cellpar(), atol=1e-4)
    difference = first.get_scaled_positions() - second.get_scaled_positions()
    np.testing.assert_allclose(difference - np.round(difference), 0, atol=1e-4)


# -- two at once -------------------------------------------------------------------------------------------------------


def test_a_second_writer_of_a_file_is_told_and_spoils_nothing(generator: DOSGenerator, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_atoms": 3, "num_steps": 2, "seed": 0}
    alone = generator.generate(TARGET, 4, **settings)
    out = tmp_path / "out.extxyz"
    first = generator.generate_iter(TARGET, 4, out=out, **settings)
    next(first)
    with pytest.raises(BlockingIOError, match=r"cannot write .*out.extxyz: another run is writing it; wait"):
        make(generator, out, 4)
    with pytest.raises(BlockingIOError, match="another run is writing it"):
        relax_into(out, [SALT], "chgnet")
    (tmp_path / "link.extxyz").symlink_to(out)
    with pytest.raises(BlockingIOError, match="another run is writing it"):
        make(generator, tmp_path / "link.extxyz", 4)
    list(first)
    for atoms, frame in zip(alone, read_structures(out), strict=True):
        assert_same(atoms, frame)
    assert make(generator, out, 4) is not None, "once the first has ended, the file is free"
    assert {file.name for file in tmp_path.iterdir()} == {"out.extxyz", "link.extxyz"}


def test_an_abandoned_run_leaves_its_file_free(generator: DOSGenerator, tmp_path: Path) -> None:
    out = tmp_path / "out.extxyz"
    first = generator.generate_iter(TARGET, 4, out=out, num_atoms=3, num_steps=2, seed=0)
    next(first)
    del first
    assert len(make(generator, out, 4)) == 4


HOLD = """
import sys, time
from pathlib import Path
from dosmatgen_ase.files import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_holds_no_file(tmp_path: Path) -> None:
    out = tmp_path / "out.extxyz"
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match="another run"), files.exclusive(out):
            pass
        holder.kill()
    with files.exclusive(out):
        pass
    assert not list(tmp_path.iterdir())


def test_threads_hold_a_file_one_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> bool:
        try:
            with files.exclusive(tmp_path / "a"):
                inside.append(number)
                most.append(len(inside))
                time.sleep(1e-4)
                inside.remove(number)
        except BlockingIOError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        held = list(pool.map(work, range(400)))
    assert any(held)
    assert set(most) == {1}
    assert not list(tmp_path.iterdir())


def test_writers_of_one_file_share_no_part(tmp_path: Path) -> None:
    contents = [bytes([65 + i]) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(partial(write_atomic, tmp_path / "a"), contents * 4))
    assert (tmp_path / "a").read_bytes() in contents
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


# -- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.cif", "a.traj", "a.db", "a.json", "a.extxyz", "a.XYZ", "a@1.cif", "a@1.extxyz"])
def test_every_format_is_what_its_name_says(name: str, generator: DOSGenerator, tmp_path: Path) -> None:
    out = tmp_path / name
    made = make(generator, out)
    kind = {".XYZ": "extxyz"}.get(out.suffix, out.suffix.lstrip("."))
    frames = read_structures(out, format=kind)
    assert len(frames) == 3
    told = [frame.info for frame in frames]
    if kind in ("db", "json"):
        with connect(out) as database:  # without, ASE leaves its connection open
            told = [row.data for row in database.select()]
    for atoms, frame, info in zip(made, frames, told, strict=True):
        assert_same(atoms, frame)
        assert kind == "cif" or info["dosmatgen"]["index"] == atoms.info["dosmatgen"]["index"]
    assert stream_of(out).exists()
    assert set(tmp_path.iterdir()) == {out, stream_of(out)}


def test_numbered_files_of_a_longer_run_do_not_stay(generator: DOSGenerator, tmp_path: Path) -> None:
    out = tmp_path / "run.vasp"
    make(generator, out, n=4, num_atoms=2)
    (tmp_path / "run-0007.vasp").write_text("by hand\n")
    (tmp_path / "run-5.vasp").write_bytes((tmp_path / "run-0003.vasp").read_bytes())
    make(generator, out, n=2, num_atoms=3, overwrite=True)
    kept = sorted(file.name for file in tmp_path.glob("*.vasp"))
    assert kept == ["run-0000.vasp", "run-0001.vasp", "run-0007.vasp", "run-5.vasp"]
    assert [len(ase.io.read(tmp_path / name)) for name in kept[:2]] == [3, 3]


def test_one_structure_is_not_mixed_with_those_of_a_longer_run(tmp_path: Path) -> None:
    """A plain file may be of another run, so it stays."""
    out = tmp_path / "run.vasp"
    write_structures(out, [SALT] * 3)
    (tmp_path / "run-0007.vasp").write_text("by hand\n")
    write_structures(out, [SALT])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run-0007.vasp", "run.vasp"]
    write_structures(out, [SALT] * 2)
    kept = sorted(file.name for file in tmp_path.iterdir())
    assert kept == ["run-0000.vasp", "run-0001.vasp", "run-0007.vasp", "run.vasp"]


@pytest.mark.parametrize("inputs", [["run-0000.vasp"], ["run-0002.vasp", "run-0003.vasp"]])
def test_no_input_is_removed_as_a_file_of_a_longer_run(inputs: list[str], tmp_path: Path) -> None:
    write_structures(tmp_path / "run.vasp", [SALT] * 4)
    result = run("relax", *[tmp_path / name for name in inputs], "-o", tmp_path / "run.vasp", "--overwrite")
    assert result.exit_code == 1
    assert f"{inputs[0]}: this command reads it; choose another name" in result.stderr
    assert len(list(tmp_path.glob("run-*.vasp"))) == 4


@pytest.mark.parametrize("ending", STRUCTURES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("of_cif", Spacegroup(225)),
        ("of_numpy", np.float32(1.5)),
        ("names", np.array(["a", "bcd"])),
        ("objects", np.array([None, {}], dtype=object)),
        ("several", {1, 2}),
        ("nested", {"place": [Path("x")], (1, 2): 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:Skipping")  # a .traj leaves out what it cannot hold
def test_no_info_of_another_program_spoils_a_file(key: str, value: Any, ending: str, tmp_path: Path) -> None:
    atoms = SALT.copy()
    atoms.info = {key: value, "dosmatgen": {"index": 3}}
    path = tmp_path / f"a{ending}"
    write_structures(path, [atoms])
    assert_same(read_structures(path)[0], SALT)
    check_output(path)
    if ending in (".db", ".json"):
        with connect(path) as database:
            data = database.get(1).data
        assert data["dosmatgen"] == {"index": 3}
        assert key in data


def test_a_json_database_is_as_ase_writes_it(tmp_path: Path) -> None:
    atoms = SALT.copy()
    atoms.info, atoms.calc = {"a": np.eye(2), "b": {"c": 2}}, SinglePointCalculator(atoms, energy=-1.5)
    atoms.set_constraint(FixAtoms([0]))
    with connect(tmp_path / "ase.json") as database:
        for one in (atoms, SALT):
            database.write(one, data=one.info)
    write_structures(tmp_path / "ours.json", [atoms, SALT])
    theirs, ours = (json.loads((tmp_path / name).read_text()) for name in ("ase.json", "ours.json"))
    assert list(ours) == list(theirs)
    for rows in (theirs, ours):
        for i in ("1", "2"):
            for changing in ("unique_id", "ctime", "mtime"):
                assert rows[i].pop(changing)
    assert ours == theirs
    with connect(tmp_path / "ours.json") as database:
        assert database.write(SALT) == 3


def test_a_json_database_is_written_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ASE itself reads all rows again to add one."""
    monkeypatch.setattr(JSONDatabase, "_read_json", None)
    write_structures(tmp_path / "a.json", [SALT] * 3)
    monkeypatch.undo()
    assert len(read_structures(tmp_path / "a.json")) == 3


@pytest.mark.parametrize("ending", STRUCTURES)
def test_a_run_without_a_crystal_says_why_in_every_format(generator: DOSGenerator, tmp_path: Path, ending: str) -> None:
    collapsed = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 0.3]], cell=[3, 3, 3], pbc=True)
    with pytest.raises(RuntimeError, match="rejected"):
        generator.generate(None, 2, template=collapsed, strength=0, seed=0, out=tmp_path / f"bad{ending}")
    if ending not in (".extxyz", ".xyz"):
        assert not (tmp_path / f"bad{ending}").exists()


@pytest.mark.parametrize("ending", [".extxyz", ".traj", ".json", ".db"])
def test_a_structure_of_any_file_that_keeps_its_record_is_made_again(
    generator: DOSGenerator, tmp_path: Path, ending: str
) -> None:
    target = TargetDOS.from_peaks([(-1.0, 3.0, 0.5)], window=(-3, 1))
    out = tmp_path / f"some{ending}"
    generator.generate(target, 2, num_atoms=2, fixed_species={1: "Cu"}, num_steps=3, seed=0, out=out)
    if ending in (".json", ".db"):
        with connect(out) as database:
            made = [row.toatoms(add_additional_information=True) for row in database.select()]
        for atoms in made:
            atoms.info |= atoms.info.pop("data")
    else:
        made = ase.io.read(out, ":")
    for atoms in made:
        again = generator.regenerate(atoms, target)
        assert again.symbols.get_chemical_formula() == atoms.symbols.get_chemical_formula()
        np.testing.assert_allclose(again.positions, atoms.positions, atol=1e-5)


@pytest.mark.parametrize(("name", "files"), [("a.vasp", "a-000{}.vasp"), ("POSCAR", "POSCAR-000{}")])
def test_several_structures_in_poscar_format_are_numbered_files(
    name: str, files: str, generator: DOSGenerator, tmp_path: Path
) -> None:
    made = make(generator, tmp_path / name)
    for i, atoms in enumerate(made):
        assert_same(atoms, ase.io.read(tmp_path / files.format(i), format="vasp"))
    one = make(generator, tmp_path / f"one-{name}.vasp", n=1)
    assert_same(one[0], ase.io.read(tmp_path / f"one-{name}.vasp", format="vasp"))


@pytest.mark.parametrize("ending", [".cif", ".db", ".traj", ".json"])
def test_a_killed_run_is_continued_in_any_format(
    ending: str, generator: DOSGenerator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / f"a{ending}"
    whole = make(generator, out, n=4)
    stream = stream_of(out)
    text = stream.read_bytes()
    stream.write_bytes(text[: len(text) // 2])
    out.unlink()
    again = make(generator, out, n=4)
    assert stream.read_bytes() == text
    for atoms, frame in zip(whole, read_structures(out), strict=True):
        assert_same(atoms, frame)
    monkeypatch.setattr(DOSGenerator, "_draw", None)  # nothing is left to draw
    assert len(make(generator, out, n=4)) == len(again)


@pytest.mark.parametrize("name", ["POSCAR_a.cif", "CONTCARs.db", "my_POSCAR.traj", "OUTCAR.json", "POSCAR.extxyz"])
def test_a_known_ending_says_more_than_the_name_before_it(name: str, tmp_path: Path) -> None:
    """ASE takes all of these for the files of VASP."""
    write_structures(tmp_path / name, [SALT, SALT])
    kind = name.rpartition(".")[2]
    assert len(ase.io.read(tmp_path / name, ":", format=kind)) == 2
    for atoms in read_structures(tmp_path / name):
        assert_same(atoms, SALT)
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_the_stream_beside_a_poscar_is_read_by_every_command(generator: DOSGenerator, tmp_path: Path) -> None:
    made = make(generator, tmp_path / "POSCAR_g")
    with_record = read_structures(tmp_path / "POSCAR_g.extxyz")
    assert [atoms.info["dosmatgen"] for atoms in with_record] == [atoms.info["dosmatgen"] for atoms in made]
    (tmp_path / "POSCAR_g.extxyz.gz").write_bytes(gzip.compress((tmp_path / "POSCAR_g.extxyz").read_bytes()))
    assert len(read_structures(tmp_path / "POSCAR_g.extxyz.gz")) == len(made)
    result = run("predict", tmp_path / "POSCAR_g.extxyz", "--out", tmp_path)
    assert "holds no structures" not in result.output


def test_fewer_structures_than_before_are_those_that_were_asked_for(generator: DOSGenerator, tmp_path: Path) -> None:
    out = tmp_path / "a.cif"
    make(generator, out)
    make(generator, out, n=1)
    assert len(read_structures(out)) == 1
    assert len(read_structures(stream_of(out))) == 3
    make(generator, out)
    assert len(read_structures(out)) == 3


def test_who_takes_just_as_many_as_were_asked_for_has_the_file(generator: DOSGenerator, tmp_path: Path) -> None:
    made = generator.generate_iter(TARGET, 2, num_atoms=3, num_steps=2, seed=0, out=tmp_path / "a.cif")
    for _ in range(2):
        next(made)
    assert len(read_structures(tmp_path / "a.cif")) == 2
    assert list(made) == []


@pytest.mark.parametrize("name", ["a.xsf", "a", "a.extxyz.gz", ".cif"])
def test_a_name_without_a_known_ending_is_refused(name: str, generator: DOSGenerator, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"its name must end in \.extxyz, \.xyz, \.cif, \.vasp, \.traj, \.db or"):
        make(generator, tmp_path / name)
    assert not list(tmp_path.iterdir())


# -- what is there already ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", STRUCTURES)
def test_a_foreign_file_is_replaced_only_if_told(ending: str, generator: DOSGenerator, tmp_path: Path) -> None:
    out = tmp_path / f"a{ending}"
    out.write_bytes(NOTES)
    with pytest.raises((ValueError, FileExistsError), match=r"choose another"):
        make(generator, out, n=1)
    assert out.read_bytes() == NOTES
    make(generator, out, n=1, overwrite=True)
    assert out.read_bytes() != NOTES
    make(generator, out, n=1)  # ours now


@pytest.mark.parametrize("name", ["a.vasp", "a-0001.vasp"])
def test_a_numbered_file_of_the_user_is_seen_before_the_work(
    name: str, generator: DOSGenerator, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(NOTES)
    with pytest.raises(FileExistsError, match=f"{name} exists and holds something else"):
        make(generator, tmp_path / "a.vasp", n=2)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {name: NOTES}


@pytest.mark.parametrize("ending", [".db", ".json", ".traj", ".extxyz"])
def test_a_collection_that_holds_ours_among_others_is_not_ours(ending: str, tmp_path: Path) -> None:
    ours = SALT.copy()
    ours.info["dosmatgen"] = {"seed": 1}
    for structures, whose in (([ours, ours], "ours"), ([SALT, ours], "of the user")):
        path = tmp_path / f"{len(whose)}{ending}"
        write_structures(path, structures)
        if whose == "ours":
            check_output(path)
        else:
            with pytest.raises(FileExistsError, match="holds something else"):
                check_output(path)


def test_whose_a_trajectory_is_takes_no_atoms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = SALT.copy()
    ours.info["dosmatgen"] = {"seed": 1}
    write_structures(tmp_path / "a.traj", [ours, bulk("Cu"), ours])
    with pytest.raises(FileExistsError):
        check_output(tmp_path / "a.traj")
    write_structures(tmp_path / "a.traj", [ours] * 50)  # more than one table of places
    monkeypatch.setattr(TrajectoryReader, "__getitem__", None)
    check_output(tmp_path / "a.traj")


BLOCK = b"data_%s\n_cell_length_a 1\n"


@pytest.mark.parametrize(
    ("content", "ours"),
    [
        (b"# by dosmatgen-ase\n" + BLOCK % b"mp-1", True),
        (b"# by dosmatgen-ase\n" + BLOCK % b"ClNa_0" + BLOCK % b"Cu2_1", True),
        (b"# by dosmatgen-ase\n" + BLOCK % b"ClNa_0" + BLOCK % b"mine", False),
        (b"# by dosmatgen-ase\n" + BLOCK % b"ClNa_0" + BLOCK % b"image0", False),
        (BLOCK % b"mine\n# drawn again by dosmatgen" + BLOCK % b"mine", False),
        (BLOCK % b"mine" + b"_title 'research, relaxation='\n", False),
    ],
    ids=["old, one", "old, several", "old, added", "old, added by ASE", "one block", "another word"],
)
def test_a_cif_is_ours_if_each_block_is(content: bytes, ours: bool, tmp_path: Path) -> None:
    (tmp_path / "a.cif").write_bytes(content)
    if ours:
        check_output(tmp_path / "a.cif")
    else:
        with pytest.raises(FileExistsError, match="holds something else"):
            check_output(tmp_path / "a.cif")


def test_a_block_that_is_added_to_our_cif_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.cif"
    known = SALT.copy()
    known.info["material_id"] = "mp-22862"
    write_structures(path, [SALT, known, bulk("Cu")])
    check_output(path)
    ase.io.write(tmp_path / "mine.cif", SALT)
    path.write_bytes(path.read_bytes() + (tmp_path / "mine.cif").read_bytes())
    with pytest.raises(FileExistsError, match="holds something else"):
        check_output(path)


@pytest.mark.parametrize("command", ["relax", "search"])
@pytest.mark.parametrize("name", ["a.cif", "POSCAR"])
def test_a_word_in_a_file_without_info_makes_it_nobodys(command: str, name: str, tmp_path: Path) -> None:
    given, out = tmp_path / "given.cif", tmp_path / name
    content = b"from the research on relaxation\n"
    ase.io.write(given, SALT)
    (tmp_path / "dos.json").write_text(json.dumps(TARGET.to_dict()))
    out.write_bytes(content)
    result = run(command, given if command == "relax" else tmp_path / "dos.json", "-o", out)
    assert result.exit_code == 1
    assert f"{name} exists and holds something else" in result.stderr
    assert out.read_bytes() == content


def test_relax_asks_for_no_file_that_it_does_not_write(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.cif", SALT)
    ase.io.write(tmp_path / "b.cif", bulk("Cu"))
    (tmp_path / "POSCAR").write_bytes(NOTES)
    result = run("relax", tmp_path / "a.cif", tmp_path / "b.cif", "--max-steps", 0, "-o", tmp_path / "POSCAR")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "POSCAR").read_bytes() == NOTES
    assert len(list(tmp_path.glob("POSCAR-000[01]"))) == 2


def test_a_run_of_ours_is_continued_though_it_may_be_overwritten(generator: DOSGenerator, tmp_path: Path) -> None:
    out = tmp_path / "a.extxyz"
    make(generator, out)
    before = out.read_bytes()
    make(generator, out, n=4, overwrite=True)
    assert out.read_bytes().startswith(before)
    make(generator, out, n=2, seed=1, overwrite=True)
    assert {atoms.info["dosmatgen"]["seed"] for atoms in ase.io.read(out, ":")} == {1}


def test_links_are_written_through(generator: DOSGenerator, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for name, ending in (("dangling", ".extxyz"), ("ours", ".cif")):
        target, link = tmp_path / "real" / f"{name}{ending}", tmp_path / f"{name}{ending}"
        if name == "ours":
            write_structures(target, [SALT])
        link.symlink_to(target)
        make(generator, link)
        assert link.is_symlink()
        assert len(read_structures(target)) == 3
    write_atomic(tmp_path / "dangling.extxyz", b"x")
    assert (tmp_path / "dangling.extxyz").is_symlink()
    assert (tmp_path / "real" / "dangling.extxyz").read_bytes() == b"x"


def fifo(path: Path) -> None:
    os.mkfifo(path)


def linked_to_notes(path: Path) -> None:
    path.with_name("notes.txt").write_bytes(NOTES)
    path.symlink_to(path.with_name("notes.txt"))


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (Path.mkdir, "it is a folder; choose another place"),
    "fifo": (fifo, "it is no file; choose another place"),
    "notes": (lambda path: path.write_bytes(NOTES), "choose another"),
    "link to notes": (linked_to_notes, "choose another"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["generate", "{dos}", "-o"], "a.extxyz"),
        (["generate", "{dos}", "-o"], "a.cif"),
        (["generate", "{dos}", "-o", "new.extxyz", "--plot"], "a.png"),
        (["dos", "{dos}", "--plot"], "a.png"),
        (["relax", "{salt}", "-o"], "a.extxyz"),
        (["relax", "{salt}", "-o"], "a.cif"),
        (["predict", "{salt}", "--plot"], "a.svg"),
        (["search", "{dos}", "-o"], "a.cif"),
        (["search", "{dos}", "-o"], "a.vasp"),
        (["report", "{dos}", "-o"], "a.html"),
        (["data", "--plot"], "a.png"),
    ],
    ids=lambda value: str(value[0] if isinstance(value, list) else value),
)
def test_no_command_touches_what_is_not_its_own(command: list[str], name: str, place: str, tmp_path: Path) -> None:
    dos, salt, out = tmp_path / "dos.json", tmp_path / "salt.cif", tmp_path / name
    dos.write_text(json.dumps(TARGET.to_dict()))
    ase.io.write(salt, SALT)
    lay, fragment = PLACES[place]
    lay(out)
    result = run(*[part.format(dos=dos, salt=salt).replace("new", str(tmp_path / "new")) for part in command], out)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1
    assert re.search(fragment, result.stderr)
    if place in ("notes", "link to notes"):
        assert out.read_bytes() == NOTES
        assert out.is_symlink() == (place == "link to notes")


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "{same}", "-o", "{same}"],
        ["generate", "{same}", "-o", "{other}.extxyz", "--plot", "{other}.extxyz"],
        ["generate", "{same}", "--template", "{salt}", "-o", "{salt}"],
        ["generate", "{same}", "--template", "{best}", "-o", "a.extxyz", "--oversample", "2"],
        ["dos", "{picture}", "--plot", "{picture}"],
        ["relax", "{salt}", "-o", "{salt}"],
        ["relax", "{link}", "-o", "{salt}"],
        ["predict", "{predicted}", "--out", "{folder}"],
        ["report", "{page}", "-o", "{page}"],
        ["search", "{same}", "-o", "{same}"],
    ],
    ids=" ".join,
)
def test_no_command_overwrites_its_input(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"same": "dos.json", "salt": "salt.extxyz", "best": "a-best.extxyz", "picture": "f.svg", "page": "R.html"}
    names |= {"predicted": "x.json", "link": "link.extxyz", "other": "new", "folder": "."}
    Path("dos.json").write_text(json.dumps(TARGET.to_dict()))
    for name in ("salt", "best"):
        ase.io.write(names[name], SALT)
    write_structures(Path("x.json"), [SALT])
    Path("link.extxyz").symlink_to("salt.extxyz")
    plot_dos(TARGET, path="f.svg")
    Path("R.html").write_text("<!-- by dosmatgen -->")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = run(*[part.format(**names) for part in command], "--overwrite")
    assert result.exit_code == 1, result.output
    assert "this command reads it" in result.stderr or "its name must end in" in result.stderr, result.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


DRAWN, RELAXED = b'2\nLattice="1" dosmatgen="{}"\n', b'2\nLattice="1" dosmatgen="{}" relaxation="{}"\n'
COMPUTED = b'{"format": "dosmatgen_ase.compute_many", "result": {"sites": []}}'


@pytest.mark.parametrize(
    ("command", "name", "content"),
    [
        (["relax", "{salt}", "-o", "{out}"], "a.extxyz", DRAWN),
        (["search", "{dos}", "-o", "{out}"], "a.extxyz", DRAWN),
        (["search", "{dos}", "-o", "{out}"], "a.extxyz", RELAXED),
        (["search", "{dos}", "-o", "{out}"], "a.json", DRAWN),
        (["predict", "{salt}", "--out", "{folder}"], "salt.json", COMPUTED),
    ],
    ids=["relax drawn", "search drawn", "search relaxed", "search database", "predict computed"],
)
def test_no_command_replaces_the_work_of_another(command: list[str], name: str, content: bytes, tmp_path: Path) -> None:
    names = {"dos": tmp_path / "dos.json", "salt": tmp_path / "salt.cif", "out": tmp_path / name, "folder": tmp_path}
    names["dos"].write_text(json.dumps(TARGET.to_dict()))
    ase.io.write(names["salt"], SALT)
    names["out"].write_bytes(content)
    result = run(*[part.format(**names) for part in command])
    assert result.exit_code == 1, result.output
    assert f"{name} exists and holds something else: choose another name, or give --overwrite" in result.stderr
    assert names["out"].read_bytes() == content


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("new-best.vasp", NOTES),
        ("new-best-0001.vasp", NOTES),
        ("new-0003.vasp", NOTES),
        ("new-relaxed.extxyz", RELAXED),
    ],
)
def test_generate_sees_first_what_it_would_replace_last(name: str, content: bytes, tmp_path: Path) -> None:
    dos, out = tmp_path / "dos.json", tmp_path / "new.vasp"
    dos.write_text(json.dumps(TARGET.to_dict()))
    (tmp_path / name).write_bytes(content)
    result = run("generate", dos, "-n", 2, "--oversample", 2, "--relax", "chgnet", "-o", out)
    assert result.exit_code == 1, result.output
    assert f"{name} exists and holds something else" in result.stderr
    assert (tmp_path / name).read_bytes() == content
    assert {file.name for file in tmp_path.iterdir()} == {"dos.json", name}


def test_pictures_are_known_again(tmp_path: Path) -> None:
    for name in ("a.png", "a.pdf", "a.svg", "a.PNG"):
        plot_dos(TARGET, path=tmp_path / name)
        check_output(tmp_path / name)
    ase.io.write(tmp_path / "mine.png", SALT)
    with pytest.raises(FileExistsError, match="give --overwrite"):
        check_output(tmp_path / "mine.png")
    (tmp_path / "empty.png").touch()
    check_output(tmp_path / "empty.png")


def test_large_files_are_known_by_their_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.extxyz"
    path.write_bytes(b"\0" * (9 << 20) + b"dosmatgen")
    check_output(path)
    path.write_bytes(b"\0" * (9 << 20))
    with pytest.raises(FileExistsError):
        check_output(path)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a[/b].json", "[/bold]x.json", "a\x1b[31mb.json", ":smile:.json", "host@1.json", "µ 1.json"]
)
def test_any_name_is_shown_as_it_is_and_read_as_it_is(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(TARGET.to_dict()))
    result = run("dos", path)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    absent = run("dos", tmp_path / f"absent{name}")
    assert absent.exit_code == 1
    assert f"no file {tmp_path}/absent{name}".replace("\x1b", "\N{REPLACEMENT CHARACTER}") in absent.stderr


def test_a_sign_that_the_terminal_lacks_costs_no_work(tmp_path: Path) -> None:
    (tmp_path / "µ.json").write_text(json.dumps(TARGET.to_dict()))
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2]), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "dosmatgen_ase.cli", "dos", "µ.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "?.json" in done.stdout


def test_an_at_sign_in_a_name_is_no_frame_number(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "host.cif", bulk("Cu"))
    write_structures(tmp_path / "host@1.extxyz", [SALT, SALT])
    assert [atoms.get_chemical_formula() for atoms in read_structures(tmp_path / "host@1.extxyz")] == ["ClNa", "ClNa"]
    result = run("predict", tmp_path / "host@1.extxyz", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["host_1-0000.json", "host_1-0001.json"]
