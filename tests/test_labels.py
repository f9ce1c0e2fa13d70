"""Making labels: what is tried and when, kill -9 at any moment, the layout of shards; one real structure (dft)."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from typer.testing import CliRunner

from dosmatgen_ase.cli import app
from dosmatgen_ase.data import SHARD_KEYS, MeshBands, load_bands, load_site_dos, load_structures
from dosmatgen_ase.data.bands import BAND_KEYS
from dosmatgen_ase.dft import batch, labels, pseudopotentials
from dosmatgen_ase.dft import order as label_order
from dosmatgen_ase.dft.errors import ElectronicStructureError, InterruptedCalculation
from dosmatgen_ase.dft.interpolation import symmetry_of
from dosmatgen_ase.dft.labels import LabelReport, label, unlabelled, unsound
from dosmatgen_ase.dft.result import ElectronicStructure
from dosmatgen_ase.dft.settings import GRID, RECIPE, EspressoSettings
from dosmatgen_ase.dos import TargetDOS

ROOT = Path(__file__).parents[1]


def computed(atoms: Atoms) -> ElectronicStructure:
    """What Quantum ESPRESSO might say: one d level per atom, a metal."""
    level = 10 * np.exp(-((GRID.energies + 1) ** 2) / 0.02) / np.sqrt(0.02 * np.pi)
    orbital = np.zeros((len(atoms), 4, GRID.size))
    orbital[:, 2] = level
    known = GRID.energies < 4
    sites = tuple(TargetDOS(GRID.energies, level, known, sigma=0.1) for _ in atoms)
    total = TargetDOS(GRID.energies, len(atoms) * level, known, sigma=0.1, kind="total")
    electrons = 10.0 * len(atoms)
    point, mesh = np.zeros((1, 3), dtype=int), np.ones(3, dtype=int)
    bands = MeshBands(np.full((1, 1, 5 * len(atoms)), -1.0), mesh, point, np.array([1]), 0, "fermi", 9.5, electrons)
    made = ElectronicStructure(sites, total, orbital, GRID.energies, 0.0, 9.5, 4.0, -50.0, electrons, 0.0, 8, False)
    return replace(made, bands=bands)


def stand_in_engine(log: Path, seconds: float = 0.0) -> None:
    """Replace the calculation: gold fails, everything else is computed; `log` gets a line for every try."""

    def compute(atoms: Atoms, settings: Any, directory: Path, stop: Any) -> ElectronicStructure:
        with log.open("a") as file:
            file.write(f"{directory.name}\n")
        directory.mkdir(exist_ok=True)
        (directory / "scf.in").touch()
        time.sleep(seconds)
        if "Au" in atoms.symbols:
            raise ElectronicStructureError("the SCF calculation did not converge", directory / "scf.out")
        return computed(atoms)

    batch.compute_in = compute


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that do nothing and empty pseudopotentials, where they will be found."""
    binaries, upf = tmp_path / "bin", tmp_path / "upf"
    for path in (
        binaries / "pw.x",
        binaries / "projwfc.x",
        *(upf / f"{s}.upf" for s in ("Cu", "Ni", "Au", "Al", "Ce")),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("ESPRESSO_PSEUDO", str(upf))
    monkeypatch.setattr(batch, "compute_in", batch.compute_in)  # put back afterwards
    monkeypatch.setattr(labels, "has_recipe_pseudopotentials", lambda *_: True)


def tries(tmp_path: Path) -> Counter[str]:
    log = tmp_path / "log"
    return Counter(log.read_text().split() if log.exists() else [])


def crystals(n: int) -> dict[str, Atoms]:
    """Copper, nickel and aluminium of many lattice constants; every seventh is gold."""
    kinds = ("Cu", "Ni", "Al", "Cu", "Ni", "Al", "Au")
    return {f"x-{i}": bulk(kinds[i % 7], "fcc", a=3.6 + 0.001 * i) for i in range(n)}


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_bar_is_shown_where_there_is_something_to_do(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stand_in_engine(tmp_path / "log")
    for shown in (True, False):  # the second time nothing is left
        label(crystals(1), tmp_path / "shards", progress=True)
        assert ("DFT" in capfd.readouterr().err) is shown


def test_labels_are_packed_with_what_failed_and_nothing_is_done_twice(tmp_path: Path) -> None:
    stand_in_engine(tmp_path / "log")
    given = {**crystals(8), "he": bulk("Au", a=4.1), "ce": bulk("Ce"), "zn": bulk("Zn"), "thin": bulk("Cu", a=8.0)}
    given["gas"] = Atoms("Cu")
    given["he"].symbols[:] = "He"
    report = label(given, tmp_path / "shards", workers=2)
    assert report.skipped == {
        "he": "He is a noble gas",
        "ce": "Ce is a lanthanide",
        "zn": f"no pseudopotential for Zn in {tmp_path}/upf: it must hold one UPF file per element",
        "thin": "more than 60 A^3 per atom",
        "gas": "it has no cell, as a molecule has none: give a crystal, with three lattice vectors",
    }
    assert report.failed == {"x-6": "the SCF calculation did not converge"}
    assert (report.labels, report.done_before, len(report.shards)) == (7, 0, 1)
    with (
        np.load(report.shards[0], allow_pickle=False) as shard,
        np.load(max((ROOT / "data" / "site_dos").glob("*.npz"))) as other,
    ):
        assert set(SHARD_KEYS) | set(BAND_KEYS) <= set(shard.files)
        assert shard["recipe"] == RECIPE
        for key in SHARD_KEYS:
            assert shard[key].dtype.kind == other[key].dtype.kind
            assert shard[key].dtype == other[key].dtype or shard[key].dtype.kind == "U"
            assert shard[key].shape[1:] == other[key].shape[1:]
        assert shard["failed_id"].tolist() == ["x-6"]
        assert shard["failed_reason"].tolist() == ["the SCF calculation did not converge"]
    read = load_site_dos(tmp_path / "shards")
    i = read.material_id.tolist().index("x-1")
    assert read.atoms(i).symbols == given["x-1"].symbols
    np.testing.assert_allclose(read.atoms(i).cell, given["x-1"].cell, atol=1e-6)
    expected = computed(given["x-1"]).sites[0].on_grid()
    np.testing.assert_allclose(read.values[i, 0], np.where(expected.known, expected.values, 0), atol=0.01)
    bands = load_bands(tmp_path / "shards")
    assert set(bands) == set(read.material_id.tolist())
    np.testing.assert_allclose(bands["x-1"].energies, -1.0)
    assert bands["x-1"].num_electrons == 10.0
    assert sorted(p.name for p in (tmp_path / "shards" / "unpacked").iterdir()) == [".lock"]

    again = label(given, tmp_path / "shards")
    assert again == LabelReport([], 0, {}, report.skipped, 8)
    more = label({**given, **crystals(9)}, tmp_path / "shards", EspressoSettings(time_limit=5.0))
    assert (more.labels, more.done_before) == (1, 8)
    assert set(tries(tmp_path).values()) == {1}


def test_labels_of_an_earlier_recipe_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_engine(tmp_path / "log")
    given, shards = crystals(9), tmp_path / "shards"
    label(given, shards)
    given = crystals(10)
    left = EspressoSettings(time_limit=600.0, nice=19)
    batch.compute_many({"x-9": given["x-9"]}, shards / "unpacked", left)
    for module in (labels, batch):
        monkeypatch.setattr(module, "RECIPE", RECIPE + 1)
    first = label(given, shards, limit=3)
    assert (first.labels, first.done_before) == (3, 1), "what failed once is not tried again"
    half = load_site_dos(shards)
    assert Counter(half.recipe.tolist())[RECIPE + 1] == 3
    label(given, shards)
    assert set(load_site_dos(shards).recipe.tolist()) == {RECIPE + 1}
    assert label(given, shards) == LabelReport([], 0, {}, {}, 10)
    assert tries(tmp_path) == {**dict.fromkeys(given, 2), "x-6": 1}, "and no result of the old recipe was packed"


def test_labels_by_other_settings_replace_none_and_are_replaced(tmp_path: Path) -> None:
    stand_in_engine(tmp_path / "log")
    coarse, shards = EspressoSettings(ecutwfc=30.0), tmp_path / "shards"
    label({"x-0": crystals(1)["x-0"]}, shards)
    assert label(crystals(2), shards, coarse).labels == 1
    assert label(crystals(2), shards, coarse).done_before == 2
    assert sorted(load_site_dos(shards).recipe.tolist()) == [0, RECIPE]
    assert label(crystals(2), shards).labels == 1
    assert load_site_dos(shards).recipe.tolist() == [RECIPE, RECIPE]
    assert tries(tmp_path) == {"x-0": 1, "x-1": 2}


def test_failures_alone_make_no_shard_and_are_remembered(tmp_path: Path) -> None:
    stand_in_engine(tmp_path / "log")
    gold = {"gold": bulk("Au")}
    for _ in range(2):
        report = label(gold, tmp_path / "shards", EspressoSettings(time_limit=float(3 + _)))
        assert report.shards == []
        assert report.failed == {"gold": "the SCF calculation did not converge"}
    assert tries(tmp_path) == {"gold": 1}
    assert not (tmp_path / "shards" / "unpacked" / "gold").exists()
    report = label({**gold, "cu": bulk("Cu")}, tmp_path / "shards")
    with np.load(report.shards[0]) as shard:
        assert shard["failed_id"].tolist() == ["gold"]


def test_what_was_interrupted_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> ElectronicStructure:
        raise InterruptedCalculation("pw.x (scf) was stopped by signal 9")

    monkeypatch.setattr(batch, "compute_in", stopped)
    report = label({"cu": bulk("Cu")}, tmp_path / "shards")
    assert report == LabelReport([], 0, {}, {}, 0)
    stand_in_engine(tmp_path / "log")
    assert label({"cu": bulk("Cu")}, tmp_path / "shards").labels == 1


DRIVER = """
import sys
sys.path[:0] = [{tests!r}, {source!r}]
from pathlib import Path
from dosmatgen_ase.dft import labels
from test_labels import crystals, label, stand_in_engine
labels.SHARD_SIZE = 5
stand_in_engine(Path({log!r}), 0.02)
label(crystals(40), {shards!r}, workers=2)
print("done")
"""


def test_kill_9_loses_no_more_than_what_was_being_computed(tmp_path: Path) -> None:
    paths = {"tests": ROOT / "tests", "source": ROOT / "src", "log": tmp_path / "log", "shards": tmp_path / "shards"}
    code = DRIVER.format(**{key: str(path) for key, path in paths.items()})
    kills = 0
    for goal in (8, 29):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            while process.poll() is None and tries(tmp_path).total() < goal:
                time.sleep(0.005)
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            kills += 1
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
    read = load_site_dos(tmp_path / "shards")
    good = [name for name, atoms in crystals(40).items() if "Au" not in atoms.symbols]
    assert sorted(read.material_id.tolist()) == sorted(good)
    failed, names = [], []
    for path in (tmp_path / "shards").glob("*.npz"):
        with np.load(path) as shard:
            failed += shard["failed_id"].tolist()
            names += shard["material_id"].tolist()
    left = [p.stem for p in (tmp_path / "shards" / "unpacked").glob("*.json")]  # failures since the last label
    assert sorted(failed + left) == sorted(set(crystals(40)) - set(good))
    assert len(names) == len(set(names))
    assert tries(tmp_path).total() <= 40 + 2 * kills  # two workers
    assert max(tries(tmp_path).values()) <= 1 + kills


def test_a_run_killed_between_packing_and_clearing_makes_no_doubles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_engine(tmp_path / "log")

    unlink = Path.unlink

    def killed(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".json":
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            label(crystals(3), tmp_path / "shards")
    assert len(list((tmp_path / "shards" / "unpacked").glob("*.json"))) == 3
    (tmp_path / "shards" / ".20260101T000000-00000000.npz.part").write_bytes(b"half a shard")
    with (tmp_path / "shards" / ".another.npz.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # a run with another folder of work writes it
        assert label(crystals(3), tmp_path / "shards") == LabelReport([], 0, {}, {}, 3)
    assert [path.name for path in (tmp_path / "shards").glob(".*.part")] == [".another.npz.part"]
    assert not list((tmp_path / "shards" / "unpacked").glob("*.json"))


# -- which and when ----------------------------------------------------------------------------------------------------


def queue(tmp_path: Path, structures: Any, **options: Any) -> list[str]:
    """Ids in the order in which a run begins them."""
    log = tmp_path / "log"
    log.unlink(missing_ok=True)
    stand_in_engine(log)
    folder = tmp_path / f"shards-{len(list(tmp_path.iterdir()))}"
    label(structures, folder, **options)
    return log.read_text().split()


def test_cheap_structures_come_first_more_often_in_one_order(tmp_path: Path) -> None:
    small = {f"s-{i}": bulk("Cu", a=3.6) for i in range(30)}
    large = {f"l-{i}": bulk("Cu", a=3.6) * (2, 2, 2) for i in range(30)}
    order = queue(tmp_path, {**small, **large})
    assert sum(name.startswith("s") for name in order[:30]) > 25
    half = dict(list(reversed({**small, **large}.items()))[::2])
    assert queue(tmp_path, half) == [name for name in order if name in half], "whatever else is in the file"


def test_ids_that_come_first_and_the_limit(tmp_path: Path) -> None:
    given = crystals(6)
    default = queue(tmp_path, given)
    wanted = [default[4], default[2], default[4]]
    assert queue(tmp_path, given, order=wanted) == [default[4], default[2], *(default[i] for i in (0, 1, 3, 5))]
    assert queue(tmp_path, given, order=wanted, limit=1) == [default[4]]


def test_large_cells_and_hard_kinds_come_earlier_than_by_cost_alone(tmp_path: Path) -> None:
    dilute = bulk("Al") * (3, 1, 1)
    dilute.symbols[0] = "Ni"
    given = {"plain": bulk("Al") * (3, 1, 1), "large": bulk("Al") * (3, 3, 1), "hard": dilute}
    earlier = {}
    for name, atoms in given.items():
        candidate = label_order.Candidate(name, atoms, "train", 1)
        earlier[name] = candidate.rank() / candidate.rank(need=True)
    assert earlier == pytest.approx({"plain": 1.0, "large": 1.5, "hard": 2.0})
    many = {f"{kind}-{i}": atoms for kind, atoms in given.items() for i in range(10)}
    place = {order: queue(tmp_path, many, order=order) for order in ("cost", "need")}
    assert sum(n[0] == "h" for n in place["need"][:10]) > sum(n[0] == "h" for n in place["cost"][:10])
    assert queue(tmp_path, many) == place["need"]


@pytest.mark.parametrize(
    ("formula", "kinds"),
    [
        ("NiAl3", {"late metal diluted in an sp host"}),
        ("NiAl", set()),
        ("Cu", set()),
        ("Au3Ni", {"late metal diluted in an sp host"}),
        ("NiTi3", set()),
        ("MgH2", {"hydride"}),
        ("MgO2H2", set()),
        ("TiF3", {"halide"}),
        ("FeO", {"magnetic oxide"}),
        ("CsFeBr3", {"halide", "semicore cation"}),
    ],
)
def test_kinds_that_models_get_wrong(formula: str, kinds: set[str]) -> None:
    assert label_order.hard_kinds(Atoms(formula)) == kinds


def test_two_new_ones_come_for_each_outdated_one_and_recipe_1_first(tmp_path: Path) -> None:
    stand_in_engine(tmp_path / "log")
    given = {f"x-{i}": bulk("Cu", a=3.6 + 0.001 * i) for i in range(12)}
    shards = tmp_path / "shards"
    for number, names in ((3, ("x-0", "x-1", "x-2")), (1, ("x-3", "x-4"))):
        report = label({name: given[name] for name in names}, shards, EspressoSettings(ecutwfc=30.0))
        (path,) = report.shards
        with np.load(path) as shard:
            arrays = {**shard, "recipe": np.array(number)}
        np.savez(path, **arrays)
    (tmp_path / "log").unlink()
    label(given, shards)
    began = (tmp_path / "log").read_text().split()
    old = [name in {f"x-{i}" for i in range(5)} for name in began]
    assert old == [False, False, True] * 3 + [False, True, True]
    assert set([name for name, is_old in zip(began, old, strict=True) if is_old][:2]) == {"x-3", "x-4"}


def test_the_worse_a_recipe_the_earlier_it_is_replaced() -> None:
    recipes = {"a": 4, "b": 3, "c": 1, "d": 2, "e": 0, "f": 4}
    waiting = {name: label_order.Candidate(name, bulk("Cu"), "train", 225) for name in recipes}
    for order in ("need", "cost", "coverage"):
        found = label_order.in_order(waiting, order, elements={"Cu": 99}, recipes=recipes, known=waiting)
        assert set(found[:2]) == {"c", "e"}
        assert set(found[2:4]) == {"b", "d"}
        assert set(found[4:]) == {"a", "f"}


def test_coverage_prefers_elements_with_few_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_order, "ENOUGH", 2)
    copper = {f"cu-{i}": bulk("Cu") for i in range(20)}
    nickel = {f"ni-{i}": bulk("Ni") * (2, 2, 2) for i in range(4)}
    order = queue(tmp_path, {**copper, **nickel}, order="coverage")
    assert sorted(name[:2] for name in order[:4]) == ["cu", "cu", "ni", "ni"]
    assert {name[:2] for name in order[4:15]} == {"cu"}


def test_a_formula_stays_in_its_split(tmp_path: Path) -> None:
    stand_in_engine(tmp_path / "log")
    shards = tmp_path / "shards"
    label({"a": bulk("Cu")}, shards, split={"a": "test"})
    label({"b": bulk("Cu", cubic=True), "c": bulk("Ni")}, shards)
    read = load_site_dos(shards)
    assert dict(zip(read.material_id.tolist(), read.split.tolist(), strict=True)) == {
        "a": "test",
        "b": "test",
        "c": "train",
    }
    with pytest.raises(ValueError, match=r"d cannot be in the split 'train': .* are in 'test'"):
        label({"d": bulk("Cu")}, shards, split={"d": "train"})
    with pytest.raises(ValueError, match=r"f cannot be in the split 'test': .* are in 'val'"):
        label({"e": bulk("Al"), "f": bulk("Al", cubic=True)}, shards, split={"e": "val", "f": "test"})


def test_a_split_that_is_given_holds_for_the_others_of_the_formula_in_any_order(tmp_path: Path) -> None:
    stand_in_engine(tmp_path / "log")
    given = {"a": bulk("Cu"), "b": bulk("Cu", cubic=True)}
    for name in given:
        label(given, tmp_path / name, split={name: "test"})
        assert load_site_dos(tmp_path / name).split.tolist() == ["test", "test"]


def test_a_formula_of_the_table_without_a_label_stays_in_its_split(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    table = load_structures(ROOT / "data" / "structures.parquet", split="val")
    row = table.reduced_formula.tolist().index("AlNi3")
    stand_in_engine(tmp_path / "log")
    label({"mine": table.atoms(row), "al": bulk("Al")}, tmp_path, table=table)
    read = load_site_dos(tmp_path)
    assert dict(zip(read.material_id.tolist(), read.split.tolist(), strict=True)) == {"mine": "val", "al": "train"}
    with pytest.raises(ValueError, match="are in 'val'"):
        label({"other": table.atoms(row)}, tmp_path / "more", table=table, split={"other": "train"})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of spglib's old error handling
@pytest.mark.parametrize("returns_none", [True, False])
def test_without_a_symmetry_there_is_one_error_however_spglib_is_set(
    returns_none: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spglib.error.OLD_ERROR_HANDLING", returns_none)  # other packages change it
    assert label_order.spacegroup(Atoms("Cu")) == 1
    assert label_order.spacegroup(bulk("Cu")) == 225
    with pytest.raises(ValueError, match="spglib finds no symmetry"):
        symmetry_of(Atoms("Cu2", positions=np.zeros((2, 3)), cell=3 * np.eye(3), pbc=True))


def test_labels_by_other_pseudopotentials_are_of_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "has_recipe_pseudopotentials", pseudopotentials.has_recipe_pseudopotentials)
    stand_in_engine(tmp_path / "log")
    report = label({"a": bulk("Cu"), "he": Atoms("He", cell=np.eye(3) * 3, pbc=True)}, tmp_path / "shards")
    assert load_site_dos(tmp_path / "shards").recipe.tolist() == [0]
    assert report.labels == 1


def test_a_failure_is_that_of_a_crystal_and_not_of_its_id(tmp_path: Path) -> None:
    stand_in_engine(tmp_path / "log")
    label({"a-0": bulk("Cu"), "a-1": bulk("Au")}, tmp_path / "shards")
    (shard,) = (tmp_path / "shards").glob("*.npz")
    with np.load(shard) as arrays:
        assert arrays["failed_crystal"].tolist() == ["Au, 1 atoms, 16.98 A^3"]
    label({"a-1": bulk("Au")}, tmp_path / "shards")
    assert tries(tmp_path)["a-1"] == 1
    assert list(unlabelled({"a-1": bulk("Ni")}, tmp_path / "shards")) == ["a-1"]
    assert label({"a-1": bulk("Ni")}, tmp_path / "shards").labels == 1
    with np.load(shard) as arrays:  # an older shard does not tell the crystal: its failures block the id
        older = {key: value for key, value in arrays.items() if key != "failed_crystal"}
    (tmp_path / "older").mkdir()
    np.savez(tmp_path / "older" / shard.name, **older)
    assert unlabelled({"a-1": bulk("Ni")}, tmp_path / "older") == {}


def test_a_failure_is_tried_again_with_other_pseudopotentials(tmp_path: Path) -> None:
    stand_in_engine(tmp_path / "log")
    for _ in range(2):
        batch.compute_many({"a": bulk("Au")}, tmp_path / "out")
    assert tries(tmp_path)["a"] == 1
    (tmp_path / "upf" / "Au.upf").write_text("mended")
    batch.compute_many({"a": bulk("Au")}, tmp_path / "out")
    assert tries(tmp_path)["a"] == 2


def test_an_id_is_that_of_one_crystal(tmp_path: Path) -> None:
    stand_in_engine(tmp_path / "log")
    label({"POSCAR": bulk("Cu"), "lock": bulk("Ni")}, tmp_path / "shards")
    assert label({"POSCAR": bulk("Cu")}, tmp_path / "shards").done_before == 1
    with pytest.raises(ValueError, match=r"POSCAR \(Al, .*\) has the id of another crystal in .*, Cu, 1 atoms, 11.76"):
        label({"POSCAR": bulk("Al")}, tmp_path / "shards")
    for other in (bulk("Cu", cubic=True), bulk("Cu", a=3.7), bulk("Cu", "bcc", a=2.87)):
        with pytest.raises(ValueError, match="has the id of another crystal"):
            label({"POSCAR": other}, tmp_path / "shards")
    label({"POSCAR": bulk("Au")}, tmp_path / "failed")
    with pytest.raises(ValueError, match=r"POSCAR \(Al, .*\) .*, Au, .*: rename it"):
        label({"POSCAR": bulk("Al")}, tmp_path / "failed")


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"energies": 0}, None),
        ({"e_max": 1.0}, "too few bands"),
        ({"num_electrons": 5.0}, "states below zero, but 5 electrons"),
        ({"orbital_dos": np.full((1, 4, 401), 70.0)}, "peak is too high"),
        ({"orbital_dos": np.full((1, 4, 401), np.nan)}, "not finite"),
        ({"num_electrons": 9.7}, None),
        ({"num_electrons": 9.5}, "too coarse a k-mesh: 10.00 electrons below zero, but the cell has 9.5"),
        ({"num_electrons": 10.5}, "too coarse a k-mesh: 10.00 electrons below zero, but the cell has 10.5"),
        ({"num_electrons": 9.5, "bands": None}, None),
    ],
)
def test_results_that_no_label_can_be_made_of(changes: dict[str, Any], fragment: str | None) -> None:
    result = computed(bulk("Cu"))
    changes = {key: value for key, value in changes.items() if key != "energies"}
    reason = unsound(replace(result, **changes))
    assert reason is None if fragment is None else fragment in str(reason)


def test_what_has_no_label_yet_is_told_in_the_order_of_a_run(tmp_path: Path) -> None:
    stand_in_engine(tmp_path / "log")
    given = {**crystals(6), "he": Atoms("He", cell=np.eye(3) * 3, pbc=True)}
    label(given, tmp_path / "shards", limit=2)
    rest = unlabelled(given, tmp_path / "shards")
    assert list(unlabelled(given, tmp_path / "shards", limit=2)) == list(rest)[:2]
    (tmp_path / "log").unlink()
    label(given, tmp_path / "shards")
    assert (tmp_path / "log").read_text().split() == list(rest)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"settings": EspressoSettings(sigma=0.2)}, "sigma=0.2: labels are broadened by 0.1 eV"),
        ({"order": "random"}, "order='random' must be"),
        ({"order": ["x-1", "nowhere"]}, "1 ids that are not among the structures, such as nowhere"),
        ({"split": {"x-0": "dev"}}, "choose among train, val and test"),
        ({"workers": 0}, "workers must be at least 1"),
    ],
)
def test_hostile_inputs(tmp_path: Path, options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        label(crystals(2), tmp_path / "shards", **options)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    work = tmp_path / "shards" / "unpacked"
    work.mkdir(parents=True)
    with labels._alone_in(work), pytest.raises(ValueError, match="another run works in"):
        label(crystals(2), tmp_path / "shards")


# -- the command -------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_takes_files_and_an_order(tmp_path: Path) -> None:
    stand_in_engine(tmp_path / "log")
    for name in ("Cu", "Ni", "Au"):
        ase.io.write(tmp_path / f"{name}.cif", bulk(name))
    (tmp_path / "ids.csv").write_text("material_id,spread\nNi,0.3\n\nCu,0.2\n")
    files = [tmp_path / f"{name}.cif" for name in ("Cu", "Ni", "Au")]
    command = ["label", *files, "--shards", tmp_path / "shards", "--order", tmp_path / "ids.csv"]
    result = run(*command, "--limit", 2)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "log").read_text().split() == ["Ni", "Cu"]
    assert len(load_site_dos(tmp_path / "shards")) == 2
    result = run(*command)
    assert "failed: Au: the SCF calculation did not converge" in " ".join(result.output.split())
    result = run("label", files[0], "--shards", tmp_path / "shards", "--order", "nowhere.txt")
    assert result.exit_code == 1
    assert "no file nowhere.txt" in result.output


def test_the_command_takes_the_table_with_its_splits(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    table = pq.read_table(ROOT / "data" / "structures.parquet")
    metals = [
        i
        for i, f in enumerate(table["reduced_formula"].to_pylist())
        if f in ("CuNi", "AlCu3", "AlNi", "AlNi3", "Al2Cu")
    ]
    assert len(metals) > 2
    pq.write_table(table.take(metals), tmp_path / "few.parquet")
    stand_in_engine(tmp_path / "log")
    result = run("label", tmp_path / "few.parquet", "--shards", tmp_path / "shards", "--jobs", 2)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.output
    given, made = load_structures(tmp_path / "few.parquet"), load_site_dos(tmp_path / "shards")
    split = dict(zip(given.material_id.tolist(), given.split.tolist(), strict=True))
    assert split == dict(zip(made.material_id.tolist(), made.split.tolist(), strict=True))
    assert run("label", tmp_path / "few.parquet", tmp_path / "x.cif").exit_code == 1

    data = tmp_path / "data"  # files go where the table beside the label set says
    data.mkdir()
    (tmp_path / "few.parquet").rename(data / "structures.parquet")
    row = given.split.tolist().index("val")
    ase.io.write(tmp_path / "mine.cif", given.atoms(row))
    result = run("label", tmp_path / "mine.cif", "--shards", data / "site_dos", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "warning: --workers is called --jobs now" in result.stderr
    assert load_site_dos(data / "site_dos").split.tolist() == ["val"]


# -- FireWorks ---------------------------------------------------------------------------------------------------------

ROCKETS = """
import os, sys
sys.path[:0] = [{tests!r}, {source!r}]
os.environ["MONGOMOCK_SERVERSTORE_FILE"] = {database!r}  # read when fireworks is imported
from pathlib import Path
from fireworks import FWorker, LaunchPad
from fireworks.core.rocket_launcher import rapidfire
from jobflow import JobStore
from jobflow.managers.fireworks import flow_to_workflow
from maggma.stores import MemoryStore
from test_labels import crystals, stand_in_engine
from dosmatgen_ase.flows import LabelMaker
from dosmatgen_ase.flows.jobs import to_structure
stand_in_engine(Path({log!r}))
given = {{name: to_structure(atoms) for name, atoms in crystals(8).items()}}
flow = LabelMaker(batch_size=3).make(given, {shards!r})
launchpad = LaunchPad()
launchpad.reset("", require_password=False)
launchpad.add_wf(flow_to_workflow(flow, JobStore(MemoryStore())))
rapidfire(launchpad, FWorker(), strm_lvl="ERROR")
print(*(launchpad.get_fw_by_id(i).state for i in launchpad.get_fw_ids()))
"""


def test_fireworks_makes_labels(tmp_path: Path) -> None:
    pytest.importorskip("mongomock_persistence")
    paths = {"tests": ROOT / "tests", "source": ROOT / "src", "log": tmp_path / "log", "shards": tmp_path / "shards"}
    (tmp_path / "launchpad.json").write_text("{}")
    code = ROCKETS.format(**{key: str(path) for key, path in paths.items()}, database=str(tmp_path / "launchpad.json"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split()[-4:] == ["COMPLETED"] * 4, done.stderr
    assert len(load_site_dos(tmp_path / "shards")) == 7
    assert tries(tmp_path) == dict.fromkeys(crystals(8), 1)


# -- real runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.dft
def test_a_label_made_again_agrees_with_its_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real programs and pseudopotentials
    stored = load_site_dos(ROOT / "data" / "site_dos")
    latest = np.flatnonzero(stored.recipe == RECIPE)
    if not latest.size:
        pytest.skip("no label of the latest recipe yet")
    row = int(min(latest, key=lambda i: stored.num_atoms[i] * np.linalg.det(stored.cell[i])))
    name = str(stored.material_id[row])
    report = label({name: stored.atoms(row)}, tmp_path, EspressoSettings(time_limit=600.0))
    assert (report.labels, report.failed, report.skipped) == (1, {}, {})
    made = load_site_dos(tmp_path)
    known = made.known[0] & stored.known[row]
    assert known.sum() > 100
    difference = np.abs(made.values[0] - stored.values[row])[:, known].sum()
    assert difference / stored.values[row][:, known].sum() < 0.01
