"""Training of tight-binding models, and their use in predictors."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from torch.nn.functional import softplus

from dosmatgen_ase.data import SiteDOSLabels, formula_fold, load_shell_dos, load_site_dos
from dosmatgen_ase.forward.features import site_features, tight_binding_graph
from dosmatgen_ase.forward.predictor import DOSPredictor, PredictorConfig, inverse_softplus, network_inputs
from dosmatgen_ase.forward.predictor_training import evaluate, gap_line, train_predictor, unseen_dos
from dosmatgen_ase.forward.tight_binding import training
from dosmatgen_ase.forward.tight_binding.model import TightBinding, TightBindingConfig
from dosmatgen_ase.forward.tight_binding.predict import predict_crystals
from dosmatgen_ase.forward.tight_binding.training import (
    LabelledCrystal,
    TightBindingTraining,
    batches,
    fit,
    labelled_crystals,
    mean_error,
    new_model,
)

SITE_DOS = Path(__file__).parents[1] / "data" / "site_dos"
SMALL = TightBindingConfig(width=16, hidden=16, site_hidden=16)
QUICK = TightBindingTraining(epochs=4, points=4)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def labels() -> SiteDOSLabels:
    """Sixty small training crystals and the smallest for validation, magnetic ones among them."""
    everything = load_site_dos(SITE_DOS)
    everything = everything.select(np.argsort(everything.material_id))  # so that new labels change next to nothing
    small = everything.num_atoms <= 2
    train = np.flatnonzero(small & (everything.split == "train"))[:60]
    val = np.flatnonzero(small & (everything.split == "val"))[:12]
    return everything.select(np.concatenate([train, val]))


@pytest.fixture(scope="module")
def crystals(labels: SiteDOSLabels) -> list[LabelledCrystal]:
    moments = [np.zeros(n) for n in labels.num_atoms]
    return labelled_crystals(labels, load_shell_dos(SITE_DOS, labels), moments, SMALL.cutoff)


@pytest.fixture(scope="module")
def model(crystals: list[LabelledCrystal]) -> TightBinding:
    settings = replace(QUICK, epochs=20, elements=2000, learning_rate=6e-3)
    return fit(new_model(crystals, SMALL, 0), crystals[:60], crystals[60:], settings)


def test_shells_add_up_to_the_sites_whatever_the_order(labels: SiteDOSLabels) -> None:
    some = labels.select(np.array([7, 0, 0, 3]))
    for i, shells in enumerate(load_shell_dos(SITE_DOS, some)):
        assert shells.shape == (some.num_atoms[i], 3, 151)
        np.testing.assert_allclose(shells.sum(1), some.values[i, : some.num_atoms[i]], atol=0.02)
    with pytest.raises(ValueError, match="lacks 1 of the labels, the first is nothing"):
        load_shell_dos(SITE_DOS, replace(some, material_id=np.array(["nothing", *some.material_id[1:]])))


def test_batches_hold_every_crystal_once_and_keep_their_bound(crystals: list[LabelledCrystal]) -> None:
    made = batches(crystals, 3000, np.random.default_rng(0))
    assert sorted(id(c) for batch in made for c in batch) == sorted(map(id, crystals))
    assert any(batch[0].graph.magnetic for batch in made)
    for batch in made:
        assert len({c.graph.magnetic for c in batch}) == 1
        spins = 1 + batch[0].graph.magnetic
        assert len(batch) == 1 or len(batch) * max(c.graph.size for c in batch) ** 2 * spins <= 3000
    again = batches(crystals, 3000, np.random.default_rng(1))
    assert [[id(c) for c in batch] for batch in made] != [[id(c) for c in batch] for batch in again]


def test_training_lowers_the_error_of_crystals_it_saw_and_others(
    labels: SiteDOSLabels, crystals: list[LabelledCrystal], model: TightBinding
) -> None:
    seen = {z for crystal in crystals[:60] for z in crystal.graph.numbers.tolist()}
    everything = load_site_dos(SITE_DOS)
    rows = np.flatnonzero((everything.num_atoms <= 2) & ~np.isin(everything.material_id, labels.material_id))
    rows = rows[np.argsort(everything.material_id[rows])]
    same = everything.select(np.array([i for i in rows if seen.issuperset(everything.atoms(i).numbers.tolist())][:40]))
    moments = [np.zeros(n) for n in same.num_atoms]
    others = labelled_crystals(same, load_shell_dos(SITE_DOS, same), moments, SMALL.cutoff)
    untrained = new_model(crystals, SMALL, 0)
    # Sixty crystals teach nothing of other elements. Of five seeds the shares were 0.62 and 0.85 at most.
    for part, share in ((crystals[:60], 0.75), (others, 0.95)):
        assert mean_error(model, part, 8) < share * mean_error(untrained, part, 8)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    crystals: list[LabelledCrystal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, train, val = replace(QUICK, epochs=3), crystals[:12], crystals[60:62]
    whole = fit(new_model(crystals, SMALL, 1), train, val, settings, seed=1, directory=tmp_path / "whole")

    class Stopped(training._Run):
        def save(self, error: float) -> None:
            super().save(error)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_Run", Stopped)
        with pytest.raises(KeyboardInterrupt):
            fit(new_model(crystals, SMALL, 1), train, val, settings, seed=1, directory=tmp_path / "cut")
    resumed = fit(new_model(crystals, SMALL, 2), train, val, settings, seed=1, directory=tmp_path / "cut")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=0, rtol=0, msg=name)
    logs = [(tmp_path / run / "log.jsonl").read_text() for run in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["epochs"] for line in logs[0].splitlines()] == [1, 2, 3]
    with pytest.raises(ValueError, match="other settings: choose a new folder"):
        fit(new_model(crystals, SMALL, 1), train, val, QUICK, seed=1, directory=tmp_path / "cut")
    with pytest.raises(ValueError, match="on other labels: choose a new folder, or remove this one"):
        fit(new_model(crystals, SMALL, 1), crystals[12:24], val, settings, seed=1, directory=tmp_path / "cut")
    moved = [crystals[0]._replace(dos=crystals[0].dos + 1e-3), *crystals[1:12]]
    with pytest.raises(ValueError, match="on other labels"):
        fit(new_model(crystals, SMALL, 1), moved, val, settings, seed=1, directory=tmp_path / "cut")
    with pytest.raises(ValueError, match="0 validation"):
        fit(whole, train, [], settings)


def test_training_may_end_by_the_clock(crystals: list[LabelledCrystal]) -> None:
    settings = replace(QUICK, epochs=10**9, minutes=0.01)
    assert not fit(new_model(crystals, SMALL, 0), crystals[:12], crystals[60:62], settings).training


def test_crystals_are_predicted_alike_in_any_company(model: TightBinding) -> None:
    several = [bulk("MgO", "rocksalt", a=4.2), bulk("Cu"), bulk("Fe"), bulk("Si", cubic=True), bulk("Cu") * (2, 1, 4)]
    graphs = [tight_binding_graph(atoms, 6.0) for atoms in several]
    together = predict_crystals(model, graphs)
    for atoms, graph, found in zip(several, graphs, together, strict=True):
        assert found.dos.shape == (len(atoms), 3, 151)
        (alone,) = predict_crystals(model, [graph])
        np.testing.assert_allclose(found.dos, alone.dos, atol=2e-3)
        assert found.gap == pytest.approx(alone.gap, abs=1e-4)
        (again,) = predict_crystals(model, [graph])
        np.testing.assert_array_equal(alone.dos, again.dos)


def mixed(labels: SiteDOSLabels, model: TightBinding, members: int) -> DOSPredictor:
    config = PredictorConfig(hidden=16, depth=1, members=members, epochs=2)
    features = site_features([labels.atoms(i) for i in range(len(labels))])
    return train_predictor(labels, features, config=config, tight_binding=[model])


def test_a_predictor_joins_both_kinds_and_survives_the_disk(
    labels: SiteDOSLabels, model: TightBinding, tmp_path: Path
) -> None:
    both = mixed(labels, model, 2)
    atoms = [bulk("MgO", "rocksalt", a=4.2), bulk("Cu")]
    found = {method: both.predict_arrays(atoms, method=method) for method in both.methods}
    assert set(found) == {"all", "tight-binding", "features"}
    for i in range(2):
        one, two = found["tight-binding"][i].mean, found["features"][i].mean
        np.testing.assert_allclose(found["all"][i].mean, (one + two) / 2, atol=1e-5)
        assert np.abs(one - two).max() > 0.01
        # The spread is their disagreement, calibrated.
        factor = both.calibration()["spread"]
        np.testing.assert_allclose(found["all"][i].spread, factor * np.abs(one - two) / 2, atol=1e-4)
        assert found["all"][i].gap == found["tight-binding"][i].gap >= 0
        assert np.isnan(found["features"][i].gap)
    both.save(tmp_path / "p.safetensors")
    loaded = DOSPredictor.load(tmp_path / "p.safetensors")
    assert (loaded.methods, loaded.info, loaded.config) == (both.methods, both.info, both.config)
    for before, after in zip(found["all"], loaded.predict_arrays(atoms), strict=True):
        np.testing.assert_allclose(after.mean, before.mean, atol=0.05)
    with pytest.raises(ValueError, match="this predictor has all, tight-binding, features"):
        both.predict_arrays(atoms, method="magic")


def shifted(model: TightBinding) -> TightBinding:
    """A model that says something else."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.level.weight += 0.5
    return other


def test_correctors_start_from_what_tight_binding_says_and_count_half(
    labels: SiteDOSLabels, model: TightBinding, tmp_path: Path
) -> None:
    config = PredictorConfig(hidden=16, depth=1, members=2, correctors=2, epochs=2)
    features = site_features([labels.atoms(i) for i in range(len(labels))])
    halves = [model, shifted(model)]
    unseen = unseen_dos(labels, features, halves)
    made = train_predictor(labels, features, config=config, tight_binding=[model], unseen=unseen)
    atoms = [bulk("MgO", "rocksalt", a=4.2), bulk("Cu")]
    found = {method: made.predict_arrays(atoms, method=method) for method in made.methods}
    given = site_features(atoms)
    with torch.no_grad():
        for i, one in enumerate(atoms):
            bound, plain = (found[m][i].mean for m in ("tight-binding", "features"))
            inputs = network_inputs(made.tables["baseline"], [given[i]], [one.numbers])
            seen = made.standardised(inputs, torch.from_numpy(bound))
            start = inverse_softplus(torch.from_numpy(bound))
            corrected = torch.stack([softplus(net(seen) + start) for net in made.correctors]).mean(0).numpy()
            voices = np.stack([bound, plain, corrected])
            mean = np.average(voices, axis=0, weights=[1, 1, 2])
            np.testing.assert_allclose(found["all"][i].mean, mean, atol=1e-5)
            spread = np.sqrt(np.average((voices - mean) ** 2, axis=0, weights=[1, 1, 2]))
            np.testing.assert_allclose(found["all"][i].spread, made.calibration()["spread"] * spread, atol=1e-4)
    made.save(tmp_path / "p.safetensors")
    loaded = DOSPredictor.load(tmp_path / "p.safetensors")
    assert loaded.config == config
    for before, after in zip(found["all"], loaded.predict_arrays(atoms), strict=True):
        np.testing.assert_allclose(after.mean, before.mean, atol=0.05)
    with pytest.raises(ValueError, match="the unseen DOS of all training labels: 60 are missing"):
        train_predictor(labels, features, config=config, tight_binding=[model])
    with pytest.raises(ValueError, match="need a tight-binding model to correct"):
        DOSPredictor(config, made.tables, {})


def test_the_unseen_dos_is_of_the_model_of_the_other_half(labels: SiteDOSLabels, model: TightBinding) -> None:
    other = shifted(model)
    features: list[np.ndarray | str] = [np.zeros((n, 385), dtype=np.float32) for n in labels.num_atoms]
    found = unseen_dos(labels, features, [model, other])
    train = np.flatnonzero(labels.split == "train").tolist()
    assert sorted(found) == train
    folds = {i: formula_fold(labels.atoms(i).get_chemical_formula(), 2) for i in train}
    assert set(folds.values()) == {0, 1}
    for i in train[:12]:
        teacher = [other, model][folds[i]]  # fold 0 was seen by the first, so the second tells it
        (expected,) = predict_crystals(teacher, [tight_binding_graph(labels.atoms(i), 6.0)])
        np.testing.assert_allclose(found[i], expected.dos.sum(1), atol=2e-3)


def test_tight_binding_alone_needs_no_chgnet_and_tells_one_error(
    labels: SiteDOSLabels, model: TightBinding, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = mixed(labels, model, 0)
    features = site_features([labels.atoms(i) for i in range(len(labels))])
    figures = evaluate(alone, labels, features, "val")
    monkeypatch.setattr("dosmatgen_ase.forward.features.load_chgnet", None)
    (found,) = alone.predict_arrays([bulk("Cu")])
    assert alone.methods == ("all", "tight-binding")
    assert found.error[0] == pytest.approx(alone.calibration()["error"][1])
    assert figures["rank_correlation"] == 0
    assert figures["coverage"] == pytest.approx(0.68, abs=0.05)
    with pytest.raises(ValueError, match="needs networks or tight-binding models"):
        DOSPredictor(PredictorConfig(members=0), alone.tables, {})


def slab() -> Atoms:
    atoms = fcc111("Al", (1, 1, 3), vacuum=12.0)
    atoms.pbc = True
    return atoms


@pytest.mark.parametrize(
    "atoms",
    [
        slab(),
        bulk("Cu") * (1, 1, 9),
        bulk("NaCl", "rocksalt", a=5.6, cubic=True) * (3, 1, 1),
        Atoms("H", cell=[2.5, 2.5, 2.5], pbc=True),
        Atoms("Ne", cell=[3, 3, 3], pbc=True),
        Atoms("NO", positions=[[0, 0, 0], [1.15, 0, 0]], cell=[4, 4, 4], pbc=True),
        bulk("U", "bcc", a=3.5),
        bulk("Fe", cubic=True),
    ],
    ids=str,
)
def test_any_crystal_is_read(model: TightBinding, atoms: Atoms) -> None:
    (found,) = predict_crystals(model, [tight_binding_graph(atoms, 6.0)])
    assert found.dos.shape == (len(atoms), 3, 151)
    assert np.isfinite(found.dos).all()
    assert found.dos.min() >= -1e-6
    assert found.gap >= 0


@pytest.mark.parametrize(
    ("atoms", "fragment"),
    [
        (Atoms("Cu", cell=[20, 20, 20], pbc=True), "isolated"),
        (Atoms("Cu2", positions=[[0, 0, 0], [0.01, 0, 0]], cell=[4, 4, 4], pbc=True), "closer than"),
        (bulk("Cu") * (7, 6, 6), "it has 2268 orbitals"),
        (bulk("Cu", a=0.5), "collapsed"),
    ],
)
def test_what_cannot_be_read_is_told(atoms: Atoms, fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        tight_binding_graph(atoms, 6.0)


def test_the_line_of_gaps_is_that_of_least_absolute_error() -> None:
    computed = np.concatenate([np.linspace(0.5, 8, 31), np.zeros(40)])
    predicted = np.where(computed > 0, 1.25 * computed + 0.25, 0.0)
    predicted[3] = 30.0  # one that is lost moves nothing
    assert gap_line(predicted, computed) == pytest.approx([0.8, -0.2], abs=1e-3)
    assert gap_line(predicted[:15], computed[:15]) is None


def test_a_predictor_gives_the_calibrated_gap_and_calls_small_ones_metals(model: TightBinding) -> None:
    tables = {name: torch.ones(95, 151) for name in ("baseline", "support")}
    predictor = DOSPredictor(PredictorConfig(members=0), tables, {"gap": [0.9, -0.3]}, [model])
    assert predictor._gap([2.0, 1.0]) == pytest.approx(1.05)
    assert predictor._gap([0.2, 0.0]) == 0.0  # less than 0.15 eV
    assert predictor._gap([0.32, 0.32]) == 0.0  # never negative
    assert np.isnan(predictor._gap([]))
    predictor.info.pop("gap")
    assert predictor._gap([2.0, 1.0]) == pytest.approx(1.5)
