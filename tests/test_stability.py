"""The hull: closed forms, pymatgen's as a second opinion, the one that ships, and what it cannot answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers, chemical_symbols
from ase.spacegroup import crystal
from hypothesis import given, settings
from hypothesis import strategies as st

from dosmatgen_ase import DOSGenerator, predict_dos
from dosmatgen_ase.judge import stability
from dosmatgen_ase.judge.relaxation import relax
from dosmatgen_ase.judge.stability import DEFAULT_HULL, Hull, energy_above_hull, in_words, load_hull

torch.set_num_threads(1)


def made(energies: dict[str, float]) -> Hull:
    structures = [Atoms(formula) for formula in energies]
    names = list(energies)
    return Hull.lowest(structures, ["train"] * len(names), list(energies.values()), [True] * len(names), names)


BINARY = {"Na": -1.0, "Cl2": -2.0, "NaCl": -3.5, "Na2Cl2": -3.4, "NaCl3": -2.5, "Na3Cl": -1.0}


@pytest.mark.parametrize(
    ("formula", "energy"),
    [
        ("Na4", -1.0),
        ("NaCl", -3.5),
        ("Na3Cl", (-1.0 + -3.5) / 2),  # its own entry lies above the line from Na to NaCl
        ("NaCl3", (-2.0 + -3.5) / 2),
        ("Na3Cl2", 1 / 5 * -1.0 + 4 / 5 * -3.5),
    ],
)
def test_two_elements_by_hand(formula: str, energy: float) -> None:
    assert made(BINARY).energy_at(Atoms(formula).numbers) == pytest.approx(energy)


def test_the_lowest_energy_of_a_formula_is_kept_with_its_name() -> None:
    hull = made(BINARY)
    row = hull.name.tolist().index("NaCl")
    assert "Na2Cl2" not in hull.name
    assert hull.energy[row] == -3.5
    assert hull.counts[row].sum() == 2


def test_large_formulas_keep_their_counts_on_disk(tmp_path: Path) -> None:
    hull = made({"Al": -3.0, "Ni": -5.0, "Al301Ni": -3.5})
    hull.save(tmp_path / "hull.npz")
    for one in (hull, Hull.load(tmp_path / "hull.npz")):
        assert one.counts.max() == 301
        assert one.above(Atoms("Al301Ni").numbers, -3.5) == pytest.approx(0)
        assert one.above(Atoms("Al45Ni").numbers, -3.1) > 0.1


def test_a_hull_without_an_entry_lies_higher_there() -> None:
    hull = made(BINARY)
    salt = Atoms("NaCl").numbers
    assert hull.without(hull.name == "NaCl").energy_at(salt) == pytest.approx(-2.5 * 2 / 3 - 1.0 / 3)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4), st.floats(-5, 0)), max_size=8))
def test_pymatgen_finds_the_same(rows: list[tuple[int, int, int, float]]) -> None:
    from pymatgen.analysis.phase_diagram import PDEntry, PhaseDiagram
    from pymatgen.core import Composition

    formulas = {"Li": -1.0, "O": -4.0, "Fe": -8.0}
    formulas |= {f"Li{a}Fe{b}O{c}": energy - 4 for a, b, c, energy in rows if a + b + c}
    hull = made(formulas)
    diagram = PhaseDiagram([PDEntry(c, e * Composition(c).num_atoms) for c, e in formulas.items()])
    for wanted in ("LiFeO2", "Fe3O4", "Li2O", "Li5FeO4"):
        theirs = diagram.get_hull_energy_per_atom(Composition(wanted))
        assert hull.energy_at(Atoms(wanted).numbers) == pytest.approx(theirs, abs=1e-6)


def test_of_two_hulls_the_lower_entry_of_a_formula_stays() -> None:
    other = made({"Na": -1.1, "NaCl": -3.4, "Na3Cl": -2.9})
    both = made(BINARY).joined(other)
    entries = dict(zip(both.name.tolist(), both.energy.tolist(), strict=True))
    assert entries == {"Na": -1.1, "Cl2": -2.0, "NaCl": -3.5, "NaCl3": -2.5, "Na3Cl": -2.9}
    assert both.elements == {11, 17}


def test_how_far_entries_lie_above_the_hull_that_they_make() -> None:
    hull = made(BINARY)
    above = dict(zip(hull.name.tolist(), hull.above_itself().tolist(), strict=True))
    assert above == pytest.approx({"Na": 0.0, "Cl2": 0.0, "NaCl": 0.0, "NaCl3": 0.25, "Na3Cl": 1.25}, abs=1e-9)


@pytest.mark.parametrize(
    ("above", "words"),
    [
        (0.25, "0.250"),
        (-0.0004, "0.000"),
        (-0.009, "-0.009"),
        (-0.12, "-0.120, below the known hull"),
        (None, ""),
        (float("nan"), ""),
    ],
)
def test_an_energy_below_the_hull_is_told_in_words(above: float | None, words: str) -> None:
    assert in_words(above) == words


@pytest.mark.parametrize(
    ("sizes", "batches"),
    [([], []), ([500], [1]), ([100, 60, 1], [2, 1]), ([500, 1, 159, 2], [1, 2, 1]), ([20] * 9, [8, 1])],
)
def test_batches_of_a_pass_have_few_atoms(sizes: list[int], batches: list[int]) -> None:
    found = stability._batches(sizes)
    assert [len(batch) for batch in found] == batches
    assert [i for batch in found for i in batch] == list(range(len(sizes)))


def test_above_is_none_where_it_is_unknown() -> None:
    hull = made(BINARY)
    assert hull.above([11, 17], -3.0) == pytest.approx(0.5)
    assert hull.above([11, 17], None) is None
    assert hull.above([11, 19], -3.0) is None
    assert hull.above([11, 17], float("nan")) is None


def test_a_hull_comes_back_from_its_file(tmp_path: Path) -> None:
    hull = made(BINARY)
    hull.save(tmp_path / "hull.npz")
    back = Hull.load(tmp_path / "hull.npz")
    for field in ("name", "split", "counts", "relaxed"):
        assert np.array_equal(getattr(back, field), getattr(hull, field))
    assert back.energy == pytest.approx(hull.energy, abs=1e-6)


def cut(folder: Path, size: int) -> Path:
    """The first bytes of the hull that ships."""
    path = folder / "cut.npz"
    path.write_bytes(DEFAULT_HULL.read_bytes()[:size])
    return path


@pytest.mark.parametrize(
    ("call", "error", "fragment"),
    [
        (lambda path: Hull.load(path / "none.npz"), FileNotFoundError, "build_hull.py"),
        (lambda path: Hull.load(Path(__file__)), ValueError, "is not a hull"),
        (lambda path: Hull.load(cut(path, 0)), ValueError, "is not a hull"),
        (lambda path: Hull.load(cut(path, 1000)), ValueError, "is not a hull"),
        (lambda path: energy_above_hull(bulk("Po", "sc", a=3.3)), ValueError, "no elemental Po"),
        (lambda path: energy_above_hull(bulk("Am", "fcc", a=4.9)), ValueError, "no elemental Am"),
        (lambda path: energy_above_hull("NaCl"), TypeError, "takes ase.Atoms"),  # type: ignore[arg-type]
        (lambda path: made({"Na": -1.0, "NaCl": -3.0}).energy_at([11, 17]), ValueError, "no elemental Cl"),
    ],
)
def test_what_cannot_be_answered_raises(call: Any, error: type[Exception], fragment: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=fragment):
        call(tmp_path)


@pytest.mark.parametrize("relax", [False, True])
def test_what_chgnet_cannot_read_is_not_a_number_and_does_not_cost_the_others(relax: bool) -> None:
    lost = bulk("NaCl", "rocksalt", a=5.6)
    lost.positions[0] = np.nan
    cluster = bulk("NaCl", "rocksalt", a=5.6)
    cluster.pbc = False
    broken = [*(bulk("NaCl", "rocksalt", a=a) for a in (0.5, 1.3, 25.0)), lost, cluster]
    above = energy_above_hull([*broken, bulk("NaCl", "rocksalt", a=5.6)], relax=relax)
    assert isinstance(above, np.ndarray)
    assert np.isnan(above[:-1]).all()
    assert abs(above[-1]) < 0.05


def test_a_relaxation_that_broke_down_has_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_down(structures: list[Atoms], progress: bool) -> list[Atoms]:
        for atoms in structures:
            atoms.info["relaxation"] = {"energy": None}
        return structures

    salt = bulk("NaCl", "rocksalt", a=5.6)
    assert np.isfinite(energy_above_hull(salt))
    monkeypatch.setattr(stability, "relax_atoms", broken_down)
    assert np.isnan(energy_above_hull(salt, relax=True))


def test_a_sparse_element_is_no_collapse() -> None:
    caesium = bulk("Cs", "bcc", a=6.1)
    assert caesium.get_volume() > 100
    assert abs(energy_above_hull(caesium)) < 0.1


def test_every_element_of_the_shipped_hull_has_a_reference() -> None:
    hull = load_hull()
    elements = np.flatnonzero(hull.counts.any(0))
    assert len(elements) == 89
    for z in elements.tolist():
        assert np.isfinite(hull.energy_at([z]))


@pytest.mark.parametrize(
    ("stable", "unstable"),
    [
        (bulk("NaCl", "rocksalt", a=5.64), bulk("NaCl", "cesiumchloride", a=3.4)),
        (bulk("MgO", "rocksalt", a=4.21), bulk("MgO", "zincblende", a=4.6)),
    ],
)
def test_known_prototypes(stable: Atoms, unstable: Atoms) -> None:
    low, high = energy_above_hull([stable, unstable], relax=True)  # type: ignore[misc]
    assert abs(low) < 0.02
    assert high > 0.02


LARGE_CELLS = ("Mg3P2", "Zn3P2", "Cd3As2", "Mg17Al12", "Cr23C6", "Mn2O3", "Y3Al5O12", "NdF3", "Mg2SiO4")


def magnesium_phosphide() -> Atoms:
    """Mg3P2, anti-bixbyite, 40 atoms in the primitive cell."""
    sites = [(0.8641, 0.1301, 0.3966), (0, 0, 0.5), (0.7738, 0.5, 0.75)]
    return crystal(["Mg", "P", "P"], sites, spacegroup=206, cellpar=[12.01] * 3 + [90] * 3, primitive_cell=True)


def entries_within(hull: Hull, elements: str) -> list[Any]:
    from pymatgen.analysis.phase_diagram import PDEntry
    from pymatgen.core import Composition

    inside = [atomic_numbers[symbol] for symbol in elements.split("-")]
    rows = np.flatnonzero(hull.counts[:, inside].sum(1) == hull.counts.sum(1))
    found = []
    for counts, energy in zip(hull.counts[rows].tolist(), hull.energy[rows].tolist(), strict=True):
        composition = Composition({chemical_symbols[z]: n for z, n in enumerate(counts) if n})
        found.append(PDEntry(composition, energy * composition.num_atoms))
    return found


def sites_of(formula: str) -> np.ndarray:
    return np.asarray(Atoms(formula).numbers)


def test_phases_with_large_cells_are_in_the_hull() -> None:
    hull = load_hull()
    for formula in LARGE_CELLS:
        counts = np.bincount(sites_of(formula), minlength=hull.counts.shape[1])
        rows = np.flatnonzero((hull.counts == counts).all(1))
        assert len(rows) == 1, formula
        assert hull.above_itself(rows)[0] < 0.1, f"{formula} is known to be stable"


def test_a_compound_is_measured_against_phases_with_large_cells() -> None:
    assert energy_above_hull(bulk("MgP", "rocksalt", a=5.4), relax=True) > 0.2
    assert energy_above_hull(magnesium_phosphide()) == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize("elements", ["Mg-P", "Al-Mg", "Nd-F", "Y-Al-O", "Li-Fe-O", "Ca-Ti-N-O"])
def test_pymatgen_finds_the_same_over_the_entries_that_ship(elements: str) -> None:
    from pymatgen.analysis.phase_diagram import PhaseDiagram

    hull = load_hull()
    entries = entries_within(hull, elements)
    assert len(entries) > len(elements.split("-"))
    diagram = PhaseDiagram(entries)
    for entry in entries:
        numbers = sites_of(entry.composition.formula.replace(" ", ""))
        assert hull.energy_at(numbers) == pytest.approx(diagram.get_hull_energy_per_atom(entry.composition), abs=1e-6)
        assert hull.above(numbers, entry.energy_per_atom) == pytest.approx(diagram.get_e_above_hull(entry), abs=1e-6)


def prototypes() -> list[Atoms]:
    lattices = {
        "rocksalt": {
            "NaCl": 5.64, "KCl": 6.29, "LiF": 4.03, "MgO": 4.21, "CaO": 4.81, "TiC": 4.33, "TiN": 4.24, "PbS": 5.94,
            "ScN": 4.5, "MgP": 5.4,
        },
        "zincblende": {"GaAs": 5.65, "ZnS": 5.41, "SiC": 4.36, "InP": 5.87, "AlP": 5.46, "BN": 3.62},
        "cesiumchloride": {"CsCl": 4.12, "NiAl": 2.88, "CuZn": 2.95},
        "fluorite": {"CaF2": 5.46, "ZrO2": 5.1},
        "diamond": {"Si": 5.43, "C": 3.57},
        "fcc": {"Cu": 3.61, "Al": 4.05},
        "bcc": {"Fe": 2.87, "W": 3.16},
    }  # fmt: skip
    found = [bulk(formula, kind, a=a) for kind, members in lattices.items() for formula, a in members.items()]
    found += [bulk("ZnO", "wurtzite", a=3.25, c=5.2), bulk("GaN", "wurtzite", a=3.19, c=5.19), bulk("Mg")]
    return found


@pytest.mark.slow
def test_nothing_lies_far_below_the_hull_that_pymatgen_does_not_put_there() -> None:
    """30 prototypes and 20 generated crystals, relaxed: what is below the hull is below a PhaseDiagram, too."""
    from pymatgen.analysis.phase_diagram import PDEntry, PhaseDiagram

    hull = load_hull()
    known = prototypes()
    assert len(known) == 30
    dos = predict_dos(bulk("Ni"))[0]
    structures = relax([*known, *DOSGenerator().generate(dos, 20, num_atoms=4, seed=1)])
    below = {}
    for atoms in structures:
        energy = atoms.info["relaxation"]["energy"]
        above = hull.above(atoms.numbers, energy)
        print(f"{atoms.get_chemical_formula():12s} {in_words(above)}")
        if above is not None and above < -0.02:
            diagram = PhaseDiagram(entries_within(hull, "-".join(sorted(set(atoms.symbols)))))
            entry = PDEntry(atoms.get_chemical_formula(), energy * len(atoms))
            theirs = entry.energy_per_atom - diagram.get_hull_energy_per_atom(entry.composition)
            below[atoms.get_chemical_formula()] = (above, theirs)
    assert all(theirs == pytest.approx(above, abs=1e-5) for above, theirs in below.values()), below


def test_relax_is_what_relax_does() -> None:
    salt = bulk("NaCl", "rocksalt", a=5.9)
    before, after = energy_above_hull(salt), energy_above_hull(salt, relax=True)
    assert before > after
    assert energy_above_hull(relax(salt)) == pytest.approx(after, abs=1e-5)
