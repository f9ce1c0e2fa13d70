"""Search of known crystals: the index and its file, how it is built and resumed, queries against brute force."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pyarrow.parquet as pq
import pytest
from ase import Atoms
from ase.build import bulk
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

import dosmatgen_ase
from dosmatgen_ase.cli import app
from dosmatgen_ase.cli.search import _draw
from dosmatgen_ase.data import SiteDOSLabels, load_site_dos
from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA, TargetDOS, normalised_l1, normalised_l1_arrays
from dosmatgen_ase.forward.predictor import SitePrediction
from dosmatgen_ase.retrieval import build, query
from dosmatgen_ase.retrieval.build import build_index, read_known
from dosmatgen_ase.retrieval.index import DOSIndex, _decode, _differences, _encode, _undo_differences, default_index
from dosmatgen_ase.retrieval.query import search

ROOT = Path(__file__).parents[1]
SHARD = ROOT / "data" / "site_dos" / "20261122T021816.npz"
NICKEL = ROOT / "data" / "ni_in_au3ni.npz"
ENERGIES = MODEL_GRID.energies
UNKNOWN_Z = 57  # the element of which the stand-in knows nothing
PREDICTED_ERROR = 0.3


def curve(centre: float, height: float = 2.0, width: float = 0.4) -> np.ndarray:
    return height * np.exp(-0.5 * ((ENERGIES - centre) / width) ** 2)


class StandIn:
    """A forward model that costs nothing: one peak per site, whose place tells element and volume per atom."""

    calls: int = 0

    def predict_arrays(self, crystals: Sequence[Atoms], progress: bool = False) -> list[SitePrediction]:
        StandIn.calls += len(crystals)
        found = []
        for atoms in crystals:
            shift = atoms.get_volume() / len(atoms) / 20
            mean = np.array([curve(-9 + z / 12 + shift, 1 + z / 20) for z in atoms.numbers], dtype=np.float32)
            known = np.repeat(atoms.numbers[:, None] != UNKNOWN_Z, MODEL_GRID.size, axis=1)
            error = np.full(len(atoms), PREDICTED_ERROR)
            found.append(SitePrediction(mean, np.zeros_like(mean), known, error))
        return found


@pytest.fixture(autouse=True)
def predictor(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a stand-in, which the builder loads in place of any predictor."""
    path = tmp_path_factory.mktemp("predictor") / "stand_in.safetensors"
    path.write_bytes(b"stand-in")
    monkeypatch.setattr(build.DOSPredictor, "load", lambda _: StandIn())
    monkeypatch.setattr(StandIn, "calls", 0)
    return path


def named(atoms: Atoms, name: Any, **facts: Any) -> Atoms:
    atoms.info = {"material_id": name, **facts}
    return atoms


def crystals() -> list[Atoms]:
    return [
        named(bulk("Ni", "fcc", a=3.5), "ni", band_gap=0.0, energy_above_hull=0.0),
        named(bulk("NaCl", "rocksalt", a=5.6), "nacl", band_gap=5.0, energy_above_hull=0.0),
        named(bulk("MgO", "rocksalt", a=4.2), "mgo", band_gap=4.5, energy_above_hull=0.05),
        named(bulk("Si", "diamond", a=5.4), "si", band_gap=0.6),
        named(bulk("LaN", "rocksalt", a=5.3), "lan", band_gap=0.0, energy_above_hull=0.0),
        named(Atoms("AuAuAuNi", scaled_positions=[(0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0), (0, 0, 0)],
                    cell=[4.0] * 3, pbc=True), "au3ni", energy_above_hull=0.01),
    ]  # fmt: skip


@pytest.fixture
def index(predictor: Path) -> DOSIndex:
    return build_index(crystals(), predictor=predictor)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> SiteDOSLabels:
    """The computed DOS of one shard."""
    folder = tmp_path_factory.mktemp("labels")
    shutil.copy(SHARD, folder)
    return load_site_dos(folder)


def target(values: np.ndarray, known: np.ndarray | None = None, **more: Any) -> TargetDOS:
    return TargetDOS.from_arrays(ENERGIES, values, known=known, sigma=MODEL_SIGMA, **more)


def told(hits: Sequence[Atoms], field: str = "material_id") -> list[Any]:
    return [atoms.info["search"][field] for atoms in hits]


# -- the index ---------------------------------------------------------------------------------------------------------


def test_public_names_are_those_of_the_folder() -> None:
    assert dosmatgen_ase.search is search
    assert dosmatgen_ase.DOSIndex is DOSIndex


def test_crystals_come_back_as_they_were(index: DOSIndex) -> None:
    for i, atoms in enumerate(crystals()):
        again = index.atoms(i)
        assert again.info["material_id"] == atoms.info["material_id"]
        assert again.numbers.tolist() == atoms.numbers.tolist()
        assert again.cell.array == pytest.approx(atoms.cell.array, abs=1e-6)
        assert again.get_scaled_positions() == pytest.approx(atoms.get_scaled_positions(), abs=1e-6)


def test_equal_sites_share_a_row_and_others_do_not(index: DOSIndex) -> None:
    rows = index.site_row[index.site_start[5] :].tolist()
    assert rows[0] == rows[1] == rows[2] != rows[3]
    assert len(index.values) == 1 + 2 + 2 + 1 + 2 + 2


def test_a_file_holds_the_index(index: DOSIndex, tmp_path: Path) -> None:
    index.save(tmp_path / "index.npz")
    again = DOSIndex.load(tmp_path / "index.npz")
    for name in ("material_id", "site_start", "row_start", "site_row", "masks", "row_mask", "gapped", "atomic_numbers"):
        assert np.array_equal(getattr(again, name), getattr(index, name)), name
    assert again.info == index.info
    assert again.values == pytest.approx(index.values, abs=0.01)
    assert np.array_equal(again.energy_above_hull, index.energy_above_hull, equal_nan=True), "a bound holds in both"
    assert [path.name for path in tmp_path.iterdir()] == ["index.npz"]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-9, 4), st.floats(0.01, 30), st.floats(0.2, 3)), min_size=1, max_size=6),
)
def test_the_code_keeps_a_dos(peaks: list[tuple[float, float, float]]) -> None:
    values = sum(curve(*peak) for peak in peaks)[None].astype(np.float32)
    code, scale = _encode(values)
    assert np.array_equal(_undo_differences(*_differences(code)), code)
    again = _decode(code, scale)
    assert normalised_l1_arrays(again, values, np.ones(values.shape, dtype=bool))[0] < 0.01


def test_computed_dos_lose_less_than_a_hundredth_of_the_predictors_error(
    labels: SiteDOSLabels, predictor: Path, tmp_path: Path
) -> None:
    """The shipped predictor is off by more than 0.2 (normalised L1), so that 0.002 is allowed on the average."""
    build_index([], labels, predictor=predictor).save(tmp_path / "index.npz")
    index = DOSIndex.load(tmp_path / "index.npz")
    row_of = {name: i for i, name in enumerate(index.material_id.tolist())}
    errors = []
    for i in range(len(labels)):
        for wanted, made in zip(labels.targets(i), index.site_dos(row_of[labels.material_id[i]]), strict=True):
            if wanted.values.sum() > 0.5:
                assert made is not None
                errors.append(normalised_l1(made, wanted))
    assert len(errors) > 20
    assert np.mean(errors) < 0.002
    assert np.max(errors) < 0.01


def test_labels_come_before_predictions_which_fill_what_they_lack(labels: SiteDOSLabels, predictor: Path) -> None:
    index = build_index([], labels, predictor=predictor)
    assert index.computed.all()
    partly = next(i for i in range(len(labels)) if not labels.known[i].all())
    row = index.site_row[index.site_start[partly]]
    known = labels.known[partly]
    assert index.values[row, known] == pytest.approx(labels.values[partly, 0, known], rel=1e-3, abs=1e-3)
    assert index.masks[index.row_mask[row]].all()
    expected = StandIn().predict_arrays([labels.atoms(partly)])[0].mean[0]
    assert index.values[row, ~known] == pytest.approx(expected[~known], rel=1e-2, abs=1e-3)
    wanted = labels.targets(partly)[0]
    (hit,) = search(wanted, 1, index=index)
    assert hit.info["search"]["expected_error"] == 0.0  # what is compared was all computed
    reaching = target(np.where(known, wanted.values, 1.0))
    share = (~known).sum() / reaching.values.sum()
    near = search(reaching, 1, composition=index.atoms(partly).get_chemical_formula(), index=index)[0]
    assert near.info["search"]["expected_error"] == pytest.approx(share * PREDICTED_ERROR, rel=1e-3)


def spoilt(change: str, content: bytes, path: Path) -> None:
    """Write an index that is damaged in one way."""
    if change == "empty":
        path.write_bytes(b"")
    elif change == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif change == "text":
        path.write_text("not an index")
    elif change == "a flipped byte":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            part = archive.getinfo("code_low.npy")
        place = part.header_offset + 100 + part.compress_size // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
    else:
        path.write_bytes(content)
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        if change == "another npz":
            arrays = {"energies": np.zeros(3)}
        elif change == "newer":
            arrays["format"] = np.array(json.dumps({"format": "dosmatgen_ase.DOSIndex", "version": 99}))
        elif change == "rows out of range":
            arrays["row_of_crystal"] = arrays["row_of_crystal"] + 9
        elif change == "masks out of range":
            arrays["row_mask"] = arrays["row_mask"] + 99
        elif change == "fewer cells":
            arrays["cell"] = arrays["cell"][1:]
        np.savez_compressed(path, **arrays)


@pytest.mark.parametrize(
    "change",
    ["empty", "truncated", "text", "a flipped byte", "another npz", "newer", "rows out of range", "masks out of range",
     "fewer cells"],
)  # fmt: skip
def test_a_damaged_file_is_one_clear_error(change: str, index: DOSIndex, tmp_path: Path) -> None:
    index.save(tmp_path / "index.npz")
    spoilt(change, (tmp_path / "index.npz").read_bytes(), tmp_path / "bad.npz")
    with pytest.raises(ValueError, match=r"bad\.npz is not a readable index") as caught:
        DOSIndex.load(tmp_path / "bad.npz")
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dosmatgen index"):
        DOSIndex.load(tmp_path / "none.npz")


def test_a_known_crystal_is_found_in_another_setting(index: DOSIndex) -> None:
    turned = bulk("NaCl", "rocksalt", a=5.7, cubic=True)
    turned.rotate(30, "z", rotate_cell=True)
    assert index.find(turned) == "nacl"
    assert index.find(bulk("NaCl", "cesiumchloride", a=3.5)) is None
    assert index.find(bulk("Cu")) is None


# -- building ----------------------------------------------------------------------------------------------------------


def test_an_interrupted_build_goes_on(predictor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PIECE", 2)
    whole = build_index(crystals(), predictor=predictor)
    parts = tmp_path / "parts"
    monkeypatch.setattr(StandIn, "calls", 0)
    plain = StandIn.predict_arrays

    def killed(self: StandIn, some: Sequence[Atoms], progress: bool = False) -> list[SitePrediction]:
        if StandIn.calls == 4:
            raise KeyboardInterrupt
        return plain(self, some, progress)

    monkeypatch.setattr(StandIn, "predict_arrays", killed)
    with pytest.raises(KeyboardInterrupt):
        build_index(crystals(), predictor=predictor, parts=parts)
    monkeypatch.setattr(StandIn, "predict_arrays", plain)
    kept = sorted(parts.iterdir())
    assert len(kept) == 2
    (parts / f".{kept[0].name}.part").write_bytes(b"what a kill left")
    resumed = build_index(crystals(), predictor=predictor, parts=parts)
    assert StandIn.calls == len(crystals())
    assert np.array_equal(resumed.values, whole.values)
    kept[1].write_bytes(kept[1].read_bytes()[:200])  # a damaged piece is made again
    again = build_index(crystals(), predictor=predictor, parts=parts)
    assert StandIn.calls == len(crystals()) + 2
    assert np.array_equal(again.values, whole.values)
    predictor.write_bytes(b"another predictor")  # of which no piece tells anything
    build_index(crystals(), predictor=predictor, parts=parts)
    assert StandIn.calls == 2 * len(crystals()) + 2


def test_left_handed_cells_are_turned(predictor: Path) -> None:
    atoms = crystals()[1]
    atoms.set_cell(-atoms.cell.array)
    made = build_index([atoms], predictor=predictor).atoms(0)
    assert np.linalg.det(made.cell.array) > 0
    assert made.get_all_distances(mic=True) == pytest.approx(atoms.get_all_distances(mic=True), abs=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no crystal"),
        ([bulk("Cu")], "has no name"),
        ([named(bulk("Cu"), "x"), named(bulk("Ag"), "x")], "two crystals are named x"),
        ([named(Atoms("Cu"), "alone")], "alone cannot be indexed: it has no cell"),
        ([named(bulk("Cu"), "x", band_gap="n/a")], "band_gap='n/a' of x is no number: mend it"),
        ([named(bulk("Cu"), "x", energy_above_hull=np.inf)], "energy_above_hull='inf' of x is no number: mend it"),
        ([named(bulk("Cu"), "x", energy_above_hull="1\n2")], r"energy_above_hull='1\\n2' of x is no number"),
        ([named(bulk("Cu"), 7), named(bulk("Ag"), "7")], "two crystals are named 7"),
        ([named(Atoms("Cu2", positions=[(0, 0, 0), (0, 0, 0.1)], cell=[4] * 3, pbc=True), "two")], "two cannot be"),
    ],
)
def test_what_is_no_crystal_is_refused(given: list[Atoms], message: str, predictor: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build_index(given, predictor=predictor)


def test_names_of_digits_and_facts_that_are_not_there(predictor: Path) -> None:
    given = [named(bulk("Cu"), 1234, band_gap=None, energy_above_hull=np.float32(0.07)), named(bulk("Ag"), "ag")]
    index = build_index(given, predictor=predictor)
    assert index.material_id.tolist() == ["1234", "ag"]
    assert np.isnan(index.band_gap).all()
    assert told(search(target(curve(-5.0)), max_above_hull=0.07, index=index)) == ["1234"]
    assert given[0].info["material_id"] == 1234, "what is given stays"


def other_element(atoms: Atoms) -> None:
    atoms.numbers[0] = 79 if atoms.numbers[0] != 79 else 78


def two_changed_places(atoms: Atoms) -> None:
    z = max(set(atoms.numbers.tolist()), key=atoms.numbers.tolist().count)
    one, other = np.flatnonzero(atoms.numbers == z)[:2]
    atoms.positions[[one, other]] = atoms.positions[[other, one]]


@pytest.mark.parametrize(
    "change",
    [other_element, two_changed_places, lambda atoms: atoms.set_cell(1.02 * atoms.cell.array, scale_atoms=True)],
    ids=["element", "order", "strain"],
)
def test_a_label_of_another_crystal_is_refused_before_the_work(
    change: Callable[[Atoms], None], labels: SiteDOSLabels, predictor: Path
) -> None:
    sites = [np.unique(row, return_counts=True) for row in labels.atomic_numbers]
    i = next(i for i, (z, n) in enumerate(sites) if (n[z > 0] > 1).any())
    atoms = labels.atoms(i)
    assert build_index([atoms], labels, predictor=predictor).computed.all()
    StandIn.calls = 0
    change(atoms)
    with pytest.raises(ValueError, match=f"{labels.material_id[i]} list different sites or cells: use the structures"):
        build_index([atoms], labels, predictor=predictor)
    assert StandIn.calls == 0


def test_a_table_gives_gap_and_energy(tmp_path: Path) -> None:
    table = pq.read_table(ROOT / "data" / "structures.parquet").slice(0, 5)
    pq.write_table(table, tmp_path / "few.parquet")
    known = read_known(tmp_path / "few.parquet")
    facts = [(atoms.info["band_gap"], atoms.info["energy_above_hull"]) for atoms in known]
    wanted = [table[name].to_pylist() for name in ("band_gap", "energy_above_hull_lower_bound")]
    assert facts == list(zip(*wanted, strict=True))
    pq.write_table(table.drop_columns(["band_gap"]), tmp_path / "fewer.parquet")
    assert "band_gap" not in read_known(tmp_path / "fewer.parquet")[0].info


# -- queries -----------------------------------------------------------------------------------------------------------


def test_every_label_finds_itself(labels: SiteDOSLabels, predictor: Path, tmp_path: Path) -> None:
    build_index(crystals(), labels, predictor=predictor).save(tmp_path / "index.npz")
    index = DOSIndex.load(tmp_path / "index.npz")
    for i in range(len(labels)):
        sites = labels.targets(i)
        hits = search(sites, 3, index=index)
        assert told(hits)[0] == labels.material_id[i]
        assert told(hits, "source")[0] == "computed"
        assert hits[0].info["search"]["distance"] < 0.01
        for dos, site in zip(sites, hits[0].info["search"]["sites"], strict=True):
            made = index.site_dos(index.material_id.tolist().index(labels.material_id[i]))[site]
            assert made is not None
            assert normalised_l1(made, dos) < 0.02
        assert told(search(max(sites, key=lambda dos: dos.values.sum()), 1, index=index)) == [labels.material_id[i]]


@pytest.mark.parametrize("window", [None, (-3.0, 1.0)])
@pytest.mark.parametrize("sigma", [MODEL_SIGMA, 0.5])
def test_distances_are_those_of_the_package(
    labels: SiteDOSLabels, predictor: Path, window: tuple[float, float] | None, sigma: float
) -> None:
    index = build_index(crystals(), labels, predictor=predictor)
    wanted = TargetDOS.from_peaks([(-2.0, 3.0, 0.6), (0.5, 1.0, 0.7)])
    wanted = TargetDOS(wanted.energies, wanted.values, wanted.known, sigma=sigma)
    wanted = wanted if window is None else wanted.window(*window)
    best = []
    for i in range(len(index)):
        shared = [dos for dos in index.site_dos(i) if dos is not None]
        if shared:
            best.append((min(normalised_l1(dos, wanted) for dos in shared), index.material_id[i]))
    best.sort()
    hits = search(wanted, 5, index=index)
    assert told(hits, "distance") == pytest.approx([distance for distance, _ in best[:5]], abs=1e-5)
    assert told(hits) == [name for _, name in best[:5]]


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 0), st.floats(0.5, 5)), min_size=2, max_size=3))
def test_several_targets_get_the_cheapest_assignment(peaks: list[tuple[float, float]]) -> None:
    index = INDEX
    wanted = [target(curve(*peak)) for peak in peaks]
    expected = {}
    for i in range(len(index)):
        sites = index.site_dos(i)
        places: list[Any] = [k for k, dos in enumerate(sites) if dos is not None]
        if len(sites) < len(wanted):
            if len(wanted) % len(sites):
                continue
            places *= len(wanted) // len(sites)
        costs = [
            np.mean([normalised_l1(sites[k], dos) for k, dos in zip(order, wanted, strict=True)])
            for order in itertools.permutations(places, len(wanted))
        ]
        if costs:
            expected[index.material_id[i]] = min(costs)
    hits = search(wanted, 20, index=index)
    assert dict(zip(told(hits), told(hits, "distance"), strict=True)) == pytest.approx(expected, abs=1e-4)
    assert told(hits, "distance") == sorted(told(hits, "distance"))
    assert told(search(wanted, 2, index=index)) == told(hits)[:2]
    assert all(len(set(sites)) == len(sites) for sites, cells in zip(told(hits, "sites"), told(hits, "cells"),
                                                                     strict=True) if cells == 1)  # fmt: skip


INDEX: DOSIndex


@pytest.fixture(autouse=True, scope="module")
def shared_index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One index for the property test, which no fixture of a function may serve."""
    global INDEX
    path = tmp_path_factory.mktemp("shared") / "predictor"
    path.write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build.DOSPredictor, "load", lambda _: StandIn())
        INDEX = build_index(crystals(), predictor=path)


def test_a_small_cell_stands_for_a_larger_one(index: DOSIndex) -> None:
    (nickel,) = [dos for dos in index.site_dos(0) if dos is not None]
    hit = search([nickel] * 4, 1, index=index)[0].info["search"]
    assert (hit["material_id"], hit["cells"], hit["sites"]) == ("ni", 4, [0, 0, 0, 0])
    assert hit["distance"] == pytest.approx(0, abs=1e-6)
    assert told(search(nickel, 1, sites=[0, 3], index=index), "cells") == [2]


def test_totals_are_sums_over_the_sites_of_as_many_cells_as_fit(index: DOSIndex) -> None:
    sites = [dos for dos in index.site_dos(1) if dos is not None]
    total = TargetDOS.sum_of(sites)
    hit = search(total, 1, index=index)[0].info["search"]
    assert (hit["material_id"], hit["sites"], hit["cells"]) == ("nacl", [], 1)
    assert hit["distance"] == pytest.approx(0, abs=1e-5)
    fourfold = target(4 * total.values, kind="total")
    hit = search(fourfold, 1, index=index)[0].info["search"]
    assert (hit["material_id"], hit["cells"]) == ("nacl", 4)
    assert hit["distance"] == pytest.approx(0, abs=1e-5)
    assert "lan" not in told(search(total, 20, index=index))  # one of its sites is not known


ROCK_SALT = "mp-22862"  # NaCl, whose computed gap is 5.2 eV


def with_zero_in_the_gap() -> TargetDOS:
    """The total DOS of rock salt as a code writes it that puts the Fermi level into the middle of the gap."""
    known = default_index()
    row = known.material_id.tolist().index(ROCK_SALT)
    total = TargetDOS.sum_of([dos for dos in known.site_dos(row) if dos is not None])
    assert total.reference == "vbm"
    return replace(total.shift(-float(known.band_gap[row]) / 2), reference="fermi")


def test_a_total_whose_zero_lies_in_its_gap_is_moved_as_where_crystals_are_generated() -> None:
    (hit,) = search(with_zero_in_the_gap(), 1)
    assert (hit.info["search"]["material_id"], hit.info["search"]["reference"]) == (ROCK_SALT, "vbm")
    assert hit.info["search"]["distance"] < 0.1


def test_sites_of_one_crystal_have_one_zero(index: DOSIndex) -> None:
    with pytest.raises(ValueError, match="One crystal has one zero"):
        search([target(curve(-5.0)), target(curve(-5.0), reference="vbm")], index=index)


def test_a_target_without_states_is_compared_by_the_mean_difference(index: DOSIndex) -> None:
    empty = target(np.zeros(MODEL_GRID.size), known=(ENERGIES > -8) & (ENERGIES < -5))
    hits = search(empty, 3, index=index)
    assert told(hits, "distance") == sorted(told(hits, "distance"))
    first = index.site_dos(index.material_id.tolist().index(told(hits)[0]))[told(hits, "sites")[0][0]]
    assert first is not None
    assert told(hits, "distance")[0] == pytest.approx(first.values[empty.known].mean(), abs=1e-6)


def test_sites_that_know_too_little_are_not_considered(labels: SiteDOSLabels, predictor: Path) -> None:
    class Nothing(StandIn):
        def predict_arrays(self, crystals: Sequence[Atoms], progress: bool = False) -> list[SitePrediction]:
            return [p._replace(known=np.zeros_like(p.known)) for p in super().predict_arrays(crystals, progress)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build.DOSPredictor, "load", lambda _: Nothing())
        index = build_index([], labels, predictor=predictor)
    wide = target(curve(3.0, 2.0, 1.0))
    enough = labels.known[:, wide.known] @ wide.values / wide.values.sum() >= 0.9
    enough &= labels.known.mean(axis=1) >= 0.9
    if enough.any():
        assert set(told(search(wide, 999, index=index))) == set(labels.material_id[enough])
    with pytest.raises(ValueError, match="no crystal searched knows 90% of the bins and states"):
        search(wide, index=index, composition=labels.atoms(int(np.flatnonzero(~enough)[0])).get_chemical_formula())


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"elements": ["Ni", "Au"]}, {"ni", "au3ni"}),
        ({"elements": ["Ni"]}, {"ni"}),
        ({"elements": ["Na"]}, set()),
        ({"exclude_elements": ["Ni", "O", "Si"]}, {"nacl", "lan"}),
        ({"composition": "NiAu3"}, {"au3ni"}),
        ({"composition": "Ni2Au6"}, {"au3ni"}),
        ({"composition": {"Si": 2}}, {"si"}),
        ({"num_atoms": 4}, {"au3ni"}),
        ({"num_atoms": range(1, 2)}, {"ni"}),
        ({"max_above_hull": 0.02}, {"ni", "nacl", "lan", "au3ni"}),
        ({"gap": (0.5, 1.0)}, {"si"}),
        ({"gap": (0, 0)}, {"ni", "lan"}),
        ({"gap": (1, float("inf")), "max_above_hull": 0.0}, {"nacl"}),
    ],
)
def test_filters(filters: dict[str, Any], expected: set[str], index: DOSIndex) -> None:
    assert set(told(search(target(curve(-5.0)), 99, index=index, **filters))) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dos": None}, "needs a target DOS"),
        ({"dos": []}, "dos must be a TargetDOS"),
        ({"dos": "ni.dat"}, "dos must be a TargetDOS"),
        ({"n": 0}, "n=0 must be a whole number"),
        ({"n": True}, "n=True must be a whole number"),
        ({"elements": "Ni"}, "elements must be a list such as"),
        ({"elements": ["Xx"]}, "is not an element"),
        ({"composition": "Ni("}, "is not a formula"),
        ({"num_atoms": 0}, "num_atoms=0 must be a whole number above 0"),
        ({"num_atoms": "4"}, "num_atoms='4' must be a whole number above 0"),
        ({"max_above_hull": "low"}, "max_above_hull='low' must be a number"),
        ({"gap": (2, 1)}, "gap=(2, 1) must be two numbers"),
        ({"gap": 1.0}, "gap=1.0 must be two numbers"),
        ({"sites": [0, 1], "dos": [target(curve(-5.0))]}, "sites goes with one target"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str, index: DOSIndex) -> None:
    arguments = {"dos": target(curve(-5.0)), "index": index, **change}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        search(**arguments)


def test_filters_count_the_atoms_of_large_cells(predictor: Path, tmp_path: Path) -> None:
    aluminium, few, many = (
        bulk("Al", cubic=True) * (4, 4, 4),
        bulk("Al", cubic=True) * (4, 4, 4),
        bulk("Al") * (4, 8, 10),
    )
    few.numbers[0], many.numbers[:63] = 28, 28
    given = [named(aluminium, "Al256"), named(few, "Al255Ni"), named(many, "Al257Ni63")]
    build_index(given, predictor=predictor).save(tmp_path / "large.npz")
    large = DOSIndex.load(tmp_path / "large.npz")
    assert large.counts[:, [13, 28]].tolist() == [[256, 0], [255, 1], [257, 63]]
    for filters, expected in (
        ({"elements": ["Ni"]}, set()),
        ({"elements": ["Al"]}, {"Al256"}),
        ({"exclude_elements": ["Al"]}, set()),
        ({"composition": "Al"}, {"Al256"}),
        ({"composition": "Al257Ni63"}, {"Al257Ni63"}),
    ):
        assert set(told(search(target(curve(-5.0)), 9, index=large, **filters))) == expected, filters


def test_a_filter_of_what_an_index_does_not_know_is_refused(predictor: Path) -> None:
    index = build_index([named(bulk("Cu"), "cu")], predictor=predictor)
    with pytest.raises(ValueError, match="has no band gaps"):
        search(target(curve(-5.0)), gap=(0, 1), index=index)
    with pytest.raises(ValueError, match="has no energies above the hull"):
        search(target(curve(-5.0)), max_above_hull=0.1, index=index)


def test_blocks_do_not_change_the_result(labels: SiteDOSLabels, predictor: Path) -> None:
    index = build_index(crystals(), labels, predictor=predictor)
    wanted = labels.targets(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(query, "_IN_CACHE", 3)
        patch.setattr(query, "BLOCK", 5)
        patch.setattr(query, "_CHUNK", 2)
        small = search(wanted, 9, index=index), search(wanted[0], 9, elements=index.atoms(0).symbols, index=index)
    large = search(wanted, 9, index=index), search(wanted[0], 9, elements=index.atoms(0).symbols, index=index)
    for some, others in zip(small, large, strict=True):
        assert told(some) == told(others)
        assert told(some, "distance") == pytest.approx(told(others, "distance"), abs=1e-6)


# -- the command line --------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def index_file(index: DOSIndex, tmp_path: Path) -> Path:
    index.save(tmp_path / "index.npz")
    return tmp_path / "index.npz"


def test_search_prints_writes_and_draws(index_file: Path, tmp_path: Path) -> None:
    command = ["search", NICKEL, "--site", 3, "--index", index_file, "-n", 2]
    result = run(*command, "-o", tmp_path / "hits.extxyz", "--plot", tmp_path / "hits.png")
    assert result.exit_code == 0, result.output
    frames = ase.io.read(tmp_path / "hits.extxyz", ":")
    hits = search(TargetDOS.from_file(NICKEL, site=3), 2, index=DOSIndex.load(index_file))
    assert told(frames) == told(hits)
    rows = re.findall(r"│ (\w+) +│ (\w+) +│ (\w+) (\d+) +│ +([\d.]+) │ predicted │ +0\.30", result.output)
    assert [row[0] for row in rows] == told(hits)
    assert [float(row[4]) for row in rows] == pytest.approx(told(hits, "distance"), abs=0.006)
    assert (tmp_path / "hits.png").read_bytes()[:4] == b"\x89PNG"
    assert run(*command, "-o", tmp_path / "hits.cif").exit_code == 0
    read = ase.io.read(tmp_path / "hits.cif", ":")
    assert [atoms.get_chemical_formula() for atoms in read] == [atoms.get_chemical_formula() for atoms in hits]
    assert f"data_{told(hits)[0]}" in (tmp_path / "hits.cif").read_text()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TargetDOS, list[tuple[str, Atoms, list[TargetDOS]]]]]:
    """What pictures of candidates were asked for."""
    pictures: list[Any] = []
    monkeypatch.setattr("dosmatgen_ase.plotting.plot_candidates", lambda dos, shown, *_: pictures.append((dos, shown)))
    return pictures


def test_the_picture_has_the_target_that_was_searched(drawn: list[Any], tmp_path: Path) -> None:
    given = with_zero_in_the_gap()
    (tmp_path / "mid.json").write_text(json.dumps(given.to_dict()))
    result = run("search", tmp_path / "mid.json", "-n", 1, "--plot", tmp_path / "mid.png")
    assert result.exit_code == 0, result.output
    assert "mid.json: zero moved by -2.569 eV to the valence-band maximum" in result.stderr
    ((searched, ((_, _, (found,)),)),) = drawn
    assert searched == given.aligned()
    assert normalised_l1(found, searched) < 0.1


def test_the_picture_of_a_total_has_as_many_cells_as_the_target(
    drawn: list[Any], index: DOSIndex, index_file: Path, tmp_path: Path
) -> None:
    total = TargetDOS.sum_of([dos for dos in index.site_dos(1) if dos is not None] * 4)
    (tmp_path / "four.json").write_text(json.dumps(total.to_dict()))
    result = run("search", tmp_path / "four.json", "-n", 1, "--index", index_file, "--plot", tmp_path / "four.png")
    assert result.exit_code == 0, result.output
    ((searched, ((title, atoms, (found,)),)),) = drawn
    assert (atoms.info["search"]["cells"], len(atoms)) == (4, 2)
    assert title.endswith("; DOS of 4 cells")
    assert normalised_l1(found, searched) < 0.01


def test_the_picture_has_no_total_of_a_crystal_of_which_a_site_is_unknown(
    drawn: list[Any], index: DOSIndex, tmp_path: Path
) -> None:
    atoms = index.atoms(4)
    atoms.info["search"] = {"material_id": "lan", "sites": [], "cells": 1, "distance": 0.5, "source": "predicted"}
    _draw(tmp_path / "lan.png", target(curve(-5.0), kind="total"), [atoms], index)
    assert [curves for _, shown in drawn for *_, curves in shown] == [[]]


def test_search_among_structures_of_files(predictor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_index, "__kwdefaults__", {**build_index.__kwdefaults__, "predictor": predictor})
    ase.io.write(tmp_path / "ni.cif", crystals()[0])
    ase.io.write(tmp_path / "others.extxyz", crystals()[1:3])
    files = ["--among", tmp_path / "ni.cif", "--among", tmp_path / "others.extxyz"]
    result = run("search", NICKEL, "--site", 3, *files, "-o", tmp_path / "hits.extxyz")
    assert result.exit_code == 0, result.output
    assert "nearest of 3 crystals of these files" in result.output
    expected = search(TargetDOS.from_file(NICKEL, site=3), index=build_index(crystals()[:3], predictor=predictor))
    frames = ase.io.read(tmp_path / "hits.extxyz", ":")
    assert told(frames, "distance") == pytest.approx(told(expected, "distance"))
    nothing = run("search", NICKEL, "--site", 3, *files, "--elements", "Au")
    assert "none of the 3 crystals of these files passes" in " ".join(nothing.output.split())
    own = run("search", NICKEL, *files, "-o", tmp_path / "others.extxyz")
    assert own.exit_code == 1
    assert len(ase.io.read(tmp_path / "others.extxyz", ":")) == 2
    ase.io.write(tmp_path / "lan.cif", crystals()[4])
    unknown = run("search", NICKEL, "--site", 3, *files, "--among", tmp_path / "lan.cif")
    assert "no prediction for some sites of lan: an element has too few labels" in unknown.output


def test_search_takes_several_sites_and_totals(index_file: Path, tmp_path: Path) -> None:
    several = run("search", NICKEL, "--site", "0-3", "--index", index_file, "-n", 1, "--plot", tmp_path / "a.png")
    assert several.exit_code == 0, several.output
    total = run("search", NICKEL, "--index", index_file, "--window", -6, 1, "-n", 1, "--plot", tmp_path / "b.png")
    assert total.exit_code == 0, total.output
    assert re.search(r"│ all", total.output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exclude-elements", "Ni,Na,Mg,Si,La"], "none of the 6 known crystals passes"),
        (["--site", "x"], "must be like 4, 4,6 or 4-7"),
        (["-o", "hits.poscar"], "its name must end in .extxyz, .xyz, .cif, .vasp"),
        (["--index", "none.npz"], "no index at none.npz"),
        (["--gap", "2", "1"], "must be two numbers in eV"),
        (["--among", "none.cif"], "give --index or --among: one of the two"),
    ],
)
def test_search_errors_are_one_line(arguments: list[str], message: str, index_file: Path) -> None:
    result = run("search", NICKEL, "--site", 3, "--index", index_file, *arguments)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_index_is_made_of_files(predictor: Path, tmp_path: Path) -> None:
    for atoms in crystals()[:3]:
        ase.io.write(tmp_path / f"{atoms.get_chemical_formula()}.cif", atoms)
    out = tmp_path / "own.npz"
    result = run("index", *sorted(tmp_path.glob("*.cif")), "-o", out, "--predictor", predictor)
    assert result.exit_code == 0, result.output
    assert "3 crystals, 0 with a computed DOS" in result.output
    assert set(DOSIndex.load(out).material_id.tolist()) == {"ClNa", "MgO", "Ni"}
    assert not (tmp_path / "own-parts").exists()


def test_index_that_is_interrupted_says_where_it_goes_on(
    predictor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    ase.io.write(tmp_path / "ni.cif", crystals()[0])
    monkeypatch.setattr(StandIn, "predict_arrays", stopped)
    result = run("index", tmp_path / "ni.cif", "-o", tmp_path / "own.npz", "--predictor", predictor)
    assert result.exit_code == 130
    assert "the same command goes on from there" in " ".join(result.output.split())
    assert not (tmp_path / "own.npz").exists()
