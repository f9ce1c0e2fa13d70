"""scripts/build_hull.py: when it writes the hull that ships."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.data import chemical_symbols

from dosmatgen_ase.judge.stability import Hull

ROOT = Path(__file__).parents[1]
METALS = ("Cu", "Ni", "Al")


def crystal(name: str, symbol: str, lattice: float | None = None) -> Atoms:
    atoms = bulk(symbol, a=lattice)
    atoms.info |= {"material_id": name, "split": "train"}
    return atoms


def in_table(*crystals: Atoms) -> Any:
    return lambda _: [atoms.copy() for atoms in crystals]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, and what stands in for its parts."""
    main = runpy.run_path(str(ROOT / "scripts" / "build_hull.py"))["main"]

    def run(arguments: list[str], **stand_ins: Any) -> None:
        for name, stand_in in stand_ins.items():
            monkeypatch.setitem(main.__globals__, name, stand_in)
        main(arguments)

    return run


def test_a_stop_leaves_the_hull_alone_until_all_energies_are_known(
    tmp_path: Path, script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hull.npz"
    out.write_bytes(b"the one that ships")
    calls: list[int] = []

    def energies(crystals: list[Atoms]) -> list[float]:
        calls.append(len(crystals))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [-1.0] * len(crystals)

    def stopped(*_: Any, **__: Any) -> Iterator[Atoms]:
        raise KeyboardInterrupt
        yield

    command = ["--cache", str(tmp_path / "hull.jsonl"), "--out", str(out)]
    table = in_table(*(crystal(symbol, symbol) for symbol in METALS))
    script(command, read_crystals=table, chgnet_energies=energies, relax_each=stopped, CHUNK=2)
    assert "goes on from here" in capsys.readouterr().out
    assert out.read_bytes() == b"the one that ships"
    script(command)
    assert "3 formulas, 0 of them relaxed" in capsys.readouterr().out
    assert calls == [2, 1, 1]
    assert sorted(Hull.load(out).name.tolist()) == sorted(METALS)


def test_a_table_enlarges_a_hull_and_what_lies_far_above_is_not_kept(tmp_path: Path, script: Any) -> None:
    start, out = tmp_path / "start.npz", tmp_path / "hull.npz"
    metals = [crystal(symbol, symbol) for symbol in METALS]
    Hull.lowest(metals, ["train"] * 3, [-1.0, -2.0, -3.0], [True] * 3, METALS).save(start)
    alloys = {"mp-1": ("CuNi", -1.9), "mp-2": ("CuAl", -1.0), "mp-3": ("NiAl", -2.45), "mp-4": ("Cu3Ni", -1.4)}
    crystals = [Atoms(formula, info={"material_id": name, "split": "val"}) for name, (formula, _) in alloys.items()]
    asked: list[str] = []

    def energies(chunk: list[Atoms]) -> list[float]:
        asked.extend(atoms.info["material_id"] for atoms in chunk)
        return [alloys[atoms.info["material_id"]][1] for atoms in chunk]

    def relaxed(chunk: list[Atoms], processes: int) -> Iterator[Atoms]:
        for atoms in chunk:
            energy = alloys[atoms.info["material_id"]][1] - 0.01
            atoms.info["relaxation"] = {"energy": energy, "converged": True}
            yield atoms

    command = ["--onto", str(start), "--cache", str(tmp_path / "hull.jsonl"), "--out", str(out), "--keep", "0.2"]
    table = in_table(*crystals, crystal("Cu", "Cu"))
    script(command, read_crystals=table, chgnet_energies=energies, relax_each=relaxed)
    assert sorted(asked) == ["mp-1", "mp-2", "mp-3", "mp-4"], "what the hull holds is not computed again"
    hull = Hull.load(out)
    held = dict(zip(hull.name.tolist(), zip(hull.energy.tolist(), hull.relaxed.tolist(), strict=True), strict=True))
    assert "mp-2" not in held, "1 eV/atom above Cu and Al"
    assert held["mp-1"] == (pytest.approx(-1.91), True)
    assert held["mp-3"] == (pytest.approx(-2.45), False), "0.05 above Ni and Al: kept, not relaxed"
    assert held["mp-4"] == (pytest.approx(-1.4), False)
    assert hull.energy_at([29, 28]) == pytest.approx(-1.91)
    script([*command, "--keep", "inf"])
    assert len(asked) == 4, "and nothing is computed again"
    assert "mp-2" in Hull.load(out).name


def test_an_energy_is_of_the_crystal_not_of_its_id(tmp_path: Path, script: Any) -> None:
    energies = {"Cu": -1.0, "Ni": -2.0, "Al": -3.0, "Au": -4.0}
    command = ["--cache", str(tmp_path / "hull.jsonl"), "--out", str(tmp_path / "hull.npz"), "--minutes", "0"]

    def static(crystals: list[Atoms]) -> list[float]:
        return [energies[str(atoms.symbols[0])] for atoms in crystals]

    def hull(*symbols: str) -> dict[str, float]:
        table = in_table(*(crystal(str(i), symbol) for i, symbol in enumerate(symbols)))
        script(command, read_crystals=table, chgnet_energies=static)
        found = Hull.load(tmp_path / "hull.npz")
        return {chemical_symbols[int(np.argmax(row))]: e for row, e in zip(found.counts, found.energy, strict=True)}

    assert hull("Cu", "Ni") == {"Cu": -1.0, "Ni": -2.0}
    assert hull("Al", "Au") == {"Al": -3.0, "Au": -4.0}, "the same ids in another table"
    both = in_table(crystal("1", "Cu"), crystal("1", "Ni"))
    with pytest.raises(SystemExit, match="two crystals have the id 1: give each an id of its own"):
        script(command, read_crystals=both, chgnet_energies=static)
    onto = ["--onto", str(tmp_path / "hull.npz"), *command[:3], str(tmp_path / "other.npz"), *command[4:]]
    with pytest.raises(SystemExit, match=r"1 is another formula in .*hull.npz: give it another id"):
        script(onto, read_crystals=in_table(crystal("1", "Cu")), chgnet_energies=static)


def test_crystals_of_any_size_are_read_right_handed(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    read = runpy.run_path(str(ROOT / "scripts" / "build_hull.py"))["read_crystals"]
    large = bulk("NaCl", "rocksalt", a=5.64, cubic=True).repeat(2)
    small = crystal("mp-2", "Cu")
    small.set_cell(-small.cell)
    columns = {
        "material_id": ["mp-1", "mp-2"],
        "split": ["train", "test"],
        "cell": [atoms.cell.array.ravel() for atoms in (large, small)],
        "atomic_numbers": [atoms.numbers for atoms in (large, small)],
        "frac_coords": [atoms.get_scaled_positions().ravel() for atoms in (large, small)],
    }
    pq.write_table(pa.table(columns), tmp_path / "large.parquet")
    one, other = read(tmp_path / "large.parquet")
    assert (len(one), one.info) == (64, {"material_id": "mp-1", "split": "train"})
    assert np.allclose(one.get_all_distances(mic=True), large.get_all_distances(mic=True))
    assert (np.linalg.det(other.cell) > 0, other.info["split"]) == (True, "test")


def test_cheap_crystals_of_few_elements_come_first_and_rare_elements_last() -> None:
    priority = runpy.run_path(str(ROOT / "scripts" / "build_hull.py"))["priority"]
    formulas = ["XeF2", "NaClO3", "Na20Cl20", "Cu4", "Na2Cl2O6", "KClO3"]
    numbers = [1, 2, 3, 1_200_000, 4, 1_200_001]
    crystals = [Atoms(f, info={"material_id": f"mp-{n}"}) for f, n in zip(formulas, numbers, strict=True)]
    assert [formulas[i] for i in priority(crystals)] == ["Cu4", "Na20Cl20", "NaClO3", "KClO3", "Na2Cl2O6", "XeF2"]


def test_an_element_without_a_crystal_is_told_with_the_way_out() -> None:
    references = runpy.run_path(str(ROOT / "scripts" / "build_hull.py"))["element_references"]
    assert [atoms.get_chemical_formula() for atoms in references([1, 29])] == ["H4", "Cu"]
    with pytest.raises(SystemExit, match=r"hold N, but no crystal of it alone.*add one"):
        references([29, 7])
