"""CHGNet features and the forward model on top of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.data import chemical_symbols

from dosmatgen_ase.cli.train import _predict_once
from dosmatgen_ase.data import SiteDOSLabels, load_pseudo_labels, load_site_dos, load_structures
from dosmatgen_ase.dos import MODEL_GRID
from dosmatgen_ase.dos.checks import labelled_elements
from dosmatgen_ase.files.tensors import load_tensors, save_tensors
from dosmatgen_ase.forward.features import cached_site_features, site_features
from dosmatgen_ase.forward.predictor import (
    DEFAULT_PREDICTOR,
    MIN_LABELS,
    DOSCalculator,
    DOSPredictor,
    PredictorConfig,
    default_predictor,
    predict_dos,
)
from dosmatgen_ase.forward.predictor_training import evaluate, train_predictor
from dosmatgen_ase.forward.pseudo_labels import check_pseudo_labels, pseudo_labels, write_pseudo_labels

ROOT = Path(__file__).parents[1]
SMALL = PredictorConfig(hidden=64, depth=1, dropout=0.0, members=2, epochs=40, batch_size=16)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def labels() -> SiteDOSLabels:
    """A hundred small training crystals, every validation crystal of at most three atoms."""
    everything = load_site_dos(ROOT / "data" / "site_dos")
    everything = everything.select(np.argsort(everything.material_id))  # so that new labels change next to nothing
    small = everything.num_atoms <= 3
    train = np.flatnonzero(small & (everything.split == "train"))[:100]
    val = np.flatnonzero(small & (everything.split == "val"))
    return everything.select(np.concatenate([train, val]))


@pytest.fixture(scope="module")
def features(labels: SiteDOSLabels) -> list[np.ndarray | str]:
    return site_features([labels.atoms(i) for i in range(len(labels))])


def salt() -> Atoms:
    return bulk("NaCl", "rocksalt", a=5.64)


def test_features_belong_to_the_site_not_to_its_place_in_the_list() -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.symbols[0] = "Au"
    order = [2, 0, 3, 1]
    one, permuted = site_features([atoms, atoms[order]])
    np.testing.assert_allclose(permuted, one[order], atol=1e-4)
    np.testing.assert_allclose(one[1], one[2], atol=1e-4)  # equivalent by symmetry
    assert np.abs(one[0] - one[1]).max() > 0.1


def test_features_do_not_depend_on_the_batch_rotation_or_supercell() -> None:
    atoms, other = salt(), bulk("Fe", cubic=True)
    turned = atoms.copy()
    turned.rotate(40, (1, 2, 3), rotate_cell=True)
    alone = site_features([atoms])[0]
    for changed in (site_features([other, atoms], batch_size=2)[1], site_features([turned])[0]):
        np.testing.assert_allclose(changed, alone, atol=1e-3)
    np.testing.assert_allclose(site_features([atoms * (2, 1, 1)])[0][:2], alone, atol=1e-3)
    assert alone.shape == (2, 385)


@pytest.mark.parametrize(
    ("atoms", "fragment"),
    [
        (Atoms("H", cell=[30, 30, 30], pbc=True), "isolated"),
        (Atoms("Cu4", positions=np.zeros((4, 3)), cell=[1, 1, 1], pbc=True), "collapsed"),
        (Atoms("Cu", cell=[0, 0, 0], pbc=True), "has no cell"),
        (Atoms("Cu", positions=[[np.nan] * 3], cell=[3, 3, 3], pbc=True), "not finite"),
        (Atoms("Cu", cell=[3, 3, 3]), "not periodic"),
        (Atoms(cell=[3, 3, 3], pbc=True), "no atoms"),
        (Atoms("Cm", cell=[3, 3, 3], pbc=True), "outside H to Pu"),
    ],
)
def test_an_unreadable_structure_is_told_and_spoils_no_other(atoms: Atoms, fragment: str) -> None:
    bad, good = site_features([atoms, salt()])
    assert isinstance(bad, str)
    assert fragment in bad
    np.testing.assert_allclose(good, site_features([salt()])[0], atol=1e-4)
    prediction, fine = default_predictor().predict_arrays([atoms, salt()])
    assert fragment in prediction.reason
    assert prediction.mean.shape == (len(atoms), 151)
    assert not prediction.known.any()
    assert fine.known.any()


def test_training_beats_the_element_mean_and_a_shuffle_is_worse(
    labels: SiteDOSLabels, features: list[np.ndarray | str]
) -> None:
    """What was learned is the pairing of surroundings and DOS: it fails on targets that belong to other crystals."""
    predictor = train_predictor(labels, features, config=SMALL)
    right = evaluate(predictor, labels, features, "val")
    assert right["ratio"] < 0.9
    values, known = labels.values.copy(), labels.known.copy()
    for n in (1, 2, 3):
        rows = np.flatnonzero((labels.num_atoms == n) & (labels.split == "val"))
        values[rows], known[rows] = values[np.roll(rows, 1)], known[np.roll(rows, 1)]
    wrong = evaluate(predictor, replace(labels, values=values, known=known), features, "val")
    assert right["mean"] < 0.7 * wrong["mean"]


def test_training_repeats_itself_and_leaves_the_global_generator_alone(
    labels: SiteDOSLabels, features: list[np.ndarray | str]
) -> None:
    state = torch.random.get_rng_state()
    config = replace(SMALL, epochs=2)
    one, two, other = (train_predictor(labels, features, config=config, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    given = [labels.atoms(0)]
    mean, again, different = (p.predict_arrays(given, features=features[:1])[0].mean for p in (one, two, other))
    np.testing.assert_array_equal(mean, again)
    assert np.abs(mean - different).max() > 0


def test_folds_share_no_formula_and_test_is_never_read(labels: SiteDOSLabels, features: list[np.ndarray | str]) -> None:
    config = replace(SMALL, epochs=1)
    halves = [train_predictor(labels, features, fold=f, config=config).info["train_structures"] for f in (0, 1)]
    assert sum(halves) == int((labels.split == "train").sum())
    assert min(halves) > 0
    as_test = replace(labels, split=np.where(labels.split == "train", "test", labels.split))
    with pytest.raises(ValueError, match="0 training"):
        train_predictor(as_test, features, config=config)


def test_features_must_match_labels(labels: SiteDOSLabels, features: list[np.ndarray | str]) -> None:
    with pytest.raises(ValueError, match="features for"):
        train_predictor(labels, features[:-1])


def test_save_and_load_give_the_same_prediction(
    labels: SiteDOSLabels, features: list[np.ndarray | str], tmp_path: Path
) -> None:
    predictor = train_predictor(labels, features, config=replace(SMALL, epochs=2))
    predictor.save(tmp_path / "p.safetensors")
    loaded = DOSPredictor.load(tmp_path / "p.safetensors")
    assert loaded.info == predictor.info
    for i in range(3):
        one, two = (p.predict_arrays([labels.atoms(i)], features=[features[i]])[0] for p in (predictor, loaded))
        np.testing.assert_allclose(one.mean, two.mean, atol=0.02)
        np.testing.assert_array_equal(one.known, two.known)


def test_load_refuses_what_is_no_predictor(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights"):
        DOSPredictor.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a readable"):
        DOSPredictor.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"members": 10**9}, "members=1000000000 must be a whole number from 0 to 64"),
        ({"hidden": 10**6}, "hidden=1000000 must be a whole number from 1 to 8192"),
        ({"depth": 0}, "depth=0 must be a whole number"),
        ({"depth": 32}, "is missing"),
        ({"hidden": 8192}, r"has shape .*, not \(8192"),
        ({"hiden": 3}, "hiden"),
        ({"correctors": 65}, "correctors=65 must be a whole number from 0 to 64"),
        ({"correctors": 4}, "correctors.*is missing|is missing"),
        ({"members": 0}, "correctors=3 need members"),
    ],
    ids=str,
)
def test_a_predictor_that_contradicts_itself_is_one_clear_error(
    change: dict[str, int], fragment: str, tmp_path: Path
) -> None:
    tensors, header = load_tensors(DEFAULT_PREDICTOR)
    del header["sha256"]
    save_tensors(tmp_path / "bad.safetensors", tensors, {**header, "config": {**header["config"], **change}})
    with pytest.raises(ValueError, match=rf"does not describe its own tensors \(.*{fragment}"):
        DOSPredictor.load(tmp_path / "bad.safetensors")
    del tensors["support"]
    save_tensors(tmp_path / "bad.safetensors", tensors, header)
    with pytest.raises(ValueError, match="it has the tables"):
        DOSPredictor.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("gap", [[1.0], [1.0, 0.1, 0.2], [1.0, None], [1.0, "0.1"], [True, 0.0], 3, None], ids=str)
def test_a_calibration_of_the_gap_is_two_numbers(gap: object, tmp_path: Path) -> None:
    tensors, header = load_tensors(DEFAULT_PREDICTOR)
    del header["sha256"]
    save_tensors(tmp_path / "bad.safetensors", tensors, {**header, "info": {**header["info"], "gap": gap}})
    with pytest.raises(ValueError, match="does not describe its own tensors"):
        DOSPredictor.load(tmp_path / "bad.safetensors")


def test_rare_elements_are_unknown_rather_than_invented() -> None:
    predictor = default_predictor()
    rare = int(np.flatnonzero(predictor.tables["support"].numpy().max(axis=1)[1:90] == 0)[-1]) + 1
    atoms = bulk("NaCl", "rocksalt", a=6.0)
    atoms.numbers[0] = rare
    prediction = predictor.predict_arrays([atoms])[0]
    assert not prediction.known[0].any()
    assert prediction.known[1].any()
    unknown, known = predict_dos(atoms)
    assert unknown is None
    assert known is not None
    assert known.provenance["expected_distance"] > 0
    with pytest.raises(ValueError, match=f"fewer than 3 labelled structures hold {chemical_symbols[rare]}"):
        predict_dos(atoms, [0])
    calculator = DOSCalculator()
    dos = calculator.get_property("site_dos", atoms)
    assert np.isnan(dos[0]).all()
    np.testing.assert_allclose(dos[1], known.values)
    assert np.isnan(calculator.get_property("site_dos_error", atoms)).tolist() == [True, False]
    assert np.isnan(calculator.get_property("site_dos_spread", atoms)).any(axis=1).tolist() == [True, False]


def test_many_crystals_are_predicted_as_one_by_one_and_a_bad_one_costs_no_other() -> None:
    oxide, squeezed = bulk("MgO", "rocksalt", a=4.21), bulk("Cu", a=0.5)
    alone = predict_dos(oxide)
    assert predict_dos([]) == []
    both = predict_dos([bulk("Cu"), oxide])
    assert [len(found) for found in both] == [1, 2]
    for one, other in zip(both[1], alone, strict=True):
        np.testing.assert_allclose(one.values, other.values, atol=1e-4)
    with pytest.warns(UserWarning, match="no DOS for 1 of 2 structures: structure 0, Cu: it has collapsed"):
        lost, found = predict_dos([squeezed, oxide])
    assert lost == [None]
    assert len(found) == 2
    assert None not in found
    second = predict_dos([oxide], [1])[0]
    assert len(second) == 1


def test_what_one_kind_of_model_says_alone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    copper, predictor = bulk("Cu"), default_predictor()
    (alone,) = predictor.predict_arrays([copper], features=["too many bonds"])
    assert alone.lacking == "predicted by tight binding alone: too many bonds"
    assert predictor.predict_arrays([copper])[0].lacking == ""
    monkeypatch.setattr("dosmatgen_ase.forward.features.MAX_ORBITALS", 8)
    refused = "predicted by the networks alone: it has 9 orbitals, more than 8: use a smaller cell"
    with pytest.warns(UserWarning, match=f"a less certain DOS for 1 of 1 structures: Cu: {refused}") as told:
        (dos,) = predict_dos(copper)
    assert len(told) == 1
    assert dos.provenance["assumed"] == [refused]
    assert predictor.predict_arrays([copper], method="features")[0].lacking == ""
    assert "orbitals" in predictor.predict_arrays([copper], method="tight-binding")[0].reason


@pytest.mark.parametrize("apart", [0.0, 0.05])
def test_atoms_in_one_place_are_refused_by_every_model(apart: float) -> None:
    atoms = salt() + Atoms("Cl", positions=[salt().positions[1] + [apart, 0, 0]])
    for method in ("all", "tight-binding", "features"):
        (found,) = default_predictor().predict_arrays([atoms], method=method)
        assert found.reason == "two atoms are closer than 0.1 A: move them apart"


@pytest.mark.parametrize("skew", [[[1, 0, 0], [3, 1, 0], [0, 4, 1]], [[-1, 0, 0], [0, -1, 0], [3, 0, -1]]])
def test_the_dos_does_not_depend_on_the_choice_of_lattice_vectors(skew: list[list[int]]) -> None:
    oxide = bulk("MgO", "rocksalt", a=4.21)
    skewed = oxide.copy()
    skewed.set_cell(np.array(skew) @ oxide.cell.array)
    before = skewed.copy()
    one, other = default_predictor().predict_arrays([oxide, skewed], method="tight-binding")
    np.testing.assert_allclose(other.mean, one.mean, atol=1e-3)
    assert other.gap == pytest.approx(one.gap, abs=1e-3)
    assert skewed == before


def test_a_calculator_without_atoms_says_so() -> None:
    with pytest.raises(ValueError, match="DOSCalculator has no atoms"):
        DOSCalculator().calculate()


@pytest.mark.parametrize(
    ("arguments", "error", "fragment"),
    [
        (("MgO",), TypeError, "takes ase.Atoms or a list of them, not str"),
        ((bulk("Cu"), [1]), ValueError, r"sites=\[1\] do not exist: Cu has the sites 0 to 0"),
        ((bulk("Cu"), [-1]), ValueError, r"sites=\[-1\]"),
        ((bulk("Cu"), ["Cu"]), TypeError, "whole numbers"),
    ],
)
def test_what_cannot_be_predicted_is_told_before_the_work(
    arguments: Any, error: type[Exception], fragment: str
) -> None:
    with pytest.raises(error, match=fragment):
        predict_dos(*arguments)


def test_predicted_dos_of_familiar_crystals() -> None:
    """Physics that the shipped weights must know: filled valence bands, a gap in MgO, none in Cu, Cu's d band."""
    copper, oxide = predict_dos(bulk("Cu"))[0], predict_dos(bulk("MgO", "rocksalt", a=4.21))
    assert (copper.sigma, copper.kind, copper.reference) == (0.2, "site", "fermi")
    assert {dos.reference for dos in oxide} == {"vbm"}
    assert 9.0 < copper.total_states(hi=0.0) < 12.0
    assert -4.0 < copper.band_centre() < -2.0
    assert 4.5 < sum(dos.total_states(lo=-7.0, hi=0.4) for dos in oxide) < 7.5
    assert len(oxide) == 2
    with pytest.raises(ValueError, match="collapsed"):
        predict_dos(bulk("Cu", a=0.5))


def test_the_ranker_of_the_benchmarks_is_not_their_judge() -> None:
    """They must not share a label, or ranking by one and judging by the other would be circular."""
    ranker, judge = (DOSPredictor.load(ROOT / "benchmarks" / f"{name}.safetensors") for name in ("ranker", "judge"))
    assert {ranker.info["fold"], judge.info["fold"]} == {0, 1}
    assert judge.config != ranker.config
    assert default_predictor().info["fold"] is None


def test_predicted_uncertainty_is_calibrated_and_told() -> None:
    sites = predict_dos(bulk("MgO", "rocksalt", a=4.21))
    for dos in sites:
        assert 0 < dos.provenance["expected_distance"] < 2
        assert len(dos.provenance["spread"]) == MODEL_GRID.size
    atoms = bulk("MgO", "rocksalt", a=4.21)
    calculator = DOSCalculator()
    np.testing.assert_allclose(calculator.get_property("site_dos", atoms), [dos.values for dos in sites])
    assert calculator.get_property("site_dos_spread", atoms).shape == (2, MODEL_GRID.size)
    before = calculator.get_property("site_dos_error", atoms)
    atoms.positions[1] += 0.4
    assert not np.allclose(calculator.get_property("site_dos_error", atoms), before)  # moved atoms: computed anew
    atoms.cell *= 0.2
    with pytest.raises(ValueError, match="collapsed"):
        calculator.get_property("site_dos", atoms)


def test_pseudo_labels_resume_and_survive_the_disk(tmp_path: Path) -> None:
    structures = load_structures(ROOT / "data" / "structures.parquet", split="train", max_atoms=2).select(np.arange(6))
    fresh = site_features([structures.atoms(i) for i in range(6)])
    for _ in range(2):  # written, then read
        cached = cached_site_features(structures, tmp_path, piece=4)
        for one, two in zip(fresh, cached, strict=True):
            np.testing.assert_allclose(two, one, atol=0.05)
    pieces = sorted(tmp_path.glob("*.npz"))
    assert len(pieces) == 2
    pieces[1].unlink()  # as after an interruption
    values, known = pseudo_labels(structures, default_predictor(), tmp_path)
    assert values.shape == known.shape == (6, 20, MODEL_GRID.size)
    assert not known[structures.atomic_numbers == 0].any()
    write_pseudo_labels(tmp_path / "pseudo" / "p.npz", structures, default_predictor())
    stored = load_pseudo_labels(tmp_path / "pseudo" / "p.npz")
    assert stored["material_id"].tolist() == structures.material_id.tolist()
    np.testing.assert_allclose(stored["values"], values, atol=0.05)
    # Another selection reads the same pieces: were 5 and 1 computed anew, a piece would be added.
    for feature, i in zip(cached_site_features(structures.select(np.array([5, 1])), tmp_path), (5, 1), strict=True):
        np.testing.assert_allclose(feature, fresh[i], atol=0.05)
    assert len(list(tmp_path.glob("*.npz"))) == 2


def test_features_are_kept_of_a_crystal_not_of_its_name(tmp_path: Path) -> None:
    structures = load_structures(ROOT / "data" / "structures.parquet", split="train", max_atoms=2).select(np.arange(2))
    cached_site_features(structures, tmp_path)
    wider = replace(structures, cell=structures.cell * 1.15)
    fresh = site_features([wider.atoms(i) for i in range(2)])
    for _ in range(2):  # computed, then read
        for one, two in zip(cached_site_features(wider, tmp_path), fresh, strict=True):
            np.testing.assert_allclose(one, two, atol=0.05)
    assert len(list(tmp_path.glob("*.npz"))) == 2, "those of the first crystals stay"
    piece = min(tmp_path.glob("*.npz"))
    with np.load(piece) as file:
        older = {name: file[name] for name in file.files if name != "structure"}
    np.savez(piece, **older)
    assert len(cached_site_features(structures, tmp_path)) == len(cached_site_features(wider, tmp_path)) == 2


def test_pseudo_labels_tell_what_they_are_of(tmp_path: Path) -> None:
    structures = load_structures(ROOT / "data" / "structures.parquet", split="train", max_atoms=2).select(np.arange(4))
    ranker, judge = (DOSPredictor.load(ROOT / "benchmarks" / f"{name}.safetensors") for name in ("ranker", "judge"))
    path, some = tmp_path / "p.npz", structures.select(np.arange(3))
    write_pseudo_labels(path, some, judge)
    judge.save(tmp_path / "copy.safetensors")
    for predictor in (judge, DOSPredictor.load(tmp_path / "copy.safetensors")):
        assert check_pseudo_labels(path, some.select(np.array([2, 0])), predictor)
    with pytest.raises(ValueError, match="is of another predictor"):
        check_pseudo_labels(path, some, ranker)
    for other in (structures, replace(some, cell=some.cell * np.array([1, 1, 1.1])[:, None, None])):
        with pytest.raises(ValueError, match=r"lacks 1 of the structures, the first is .*: move it away"):
            check_pseudo_labels(path, other, judge)
    with np.load(path) as file:
        older = {name: file[name] for name in ("material_id", "values", "known")}
    np.savez(path, **older)
    assert not check_pseudo_labels(path, some, ranker)
    assert load_pseudo_labels(path).keys() == older.keys()
    with pytest.raises(ValueError, match="lacks 1 of the structures"):
        check_pseudo_labels(path, structures, judge)


def test_predictions_in_a_folder_are_not_taken_for_others(tmp_path: Path) -> None:
    structures = load_structures(ROOT / "data" / "structures.parquet", split="train", max_atoms=2).select(np.arange(3))
    path, judge = tmp_path / "pseudo_labels.npz", ROOT / "benchmarks" / "judge.safetensors"
    some = structures.select(np.arange(2))
    _predict_once(path, some, judge, "cpu")
    before = path.read_bytes()
    _predict_once(path, some, judge, "cpu")
    with pytest.raises(ValueError, match="is of another predictor: name that one"):
        _predict_once(path, some, ROOT / "benchmarks" / "ranker.safetensors", "cpu")
    with pytest.raises(ValueError, match="lacks 1 of the structures"):
        _predict_once(path, structures, judge, "cpu")
    assert path.read_bytes() == before


def test_threads_predict_what_one_does() -> None:
    crystals = [bulk("Cu"), bulk("NaCl", "rocksalt", a=5.6), bulk("Si"), bulk("Fe", cubic=True)]
    alone = [site_features([atoms])[0] for atoms in crystals]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: site_features([crystals[i % 4]])[0], range(64)))
    for i, features in enumerate(found):
        assert not isinstance(features, str)
        np.testing.assert_allclose(features, alone[i % 4], atol=1e-5)


def test_the_elements_that_count_as_labelled_are_those_that_the_predictor_knows() -> None:
    support = default_predictor().tables["support"].numpy().max(axis=1)
    known = {chemical_symbols[z] for z in range(1, 95) if support[z] >= MIN_LABELS}
    assert labelled_elements() == known
    assert {"Ni", "O"} <= known
    assert not {"Ac", "La"} & known
