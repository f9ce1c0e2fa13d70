"""The benchmarks at toy size: they run, resume, count what they say, and do not hand the answer to the generator."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import _draws
import _stats
import _tables
import numpy as np
import pytest
import round_trip
import structure
import torch
from _draws import MODES, Candidates
from _targets import Target, drawn_rows, in_random_order
from ase import Atoms
from ase.build import bulk
from round_trip import Library
from test_training import CONFIG, bulk_dataset

from dosmatgen_ase import __version__
from dosmatgen_ase.data import SiteDOSLabels, load_site_dos
from dosmatgen_ase.dos import MODEL_GRID
from dosmatgen_ase.forward.predictor import DOSPredictor, PredictorConfig
from dosmatgen_ase.generate.sampler import SamplerConfig
from dosmatgen_ase.judge.metrics import bootstrap_interval
from dosmatgen_ase.model.checkpoint import load_model, save_model
from dosmatgen_ase.model.conditioning import ConditionalDenoiser
from dosmatgen_ase.model.denoiser import Denoiser, DenoiserConfig
from dosmatgen_ase.model.diffusion.lattice import LatticeProcess
from dosmatgen_ase.train.trainer import Trainer, epoch_batches

ROOT = Path(__file__).parents[1]
STEPS = SamplerConfig(num_steps=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained generator whose cells hold 20 A^3 per atom, and two predictors of different folds."""
    path = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lattice = LatticeProcess((0.0,) * 5 + (math.log(20.0) / math.sqrt(3.0),), (0.05,) * 6)
        config = DenoiserConfig(width=16, pair_width=16, vector_channels=4, num_layers=1, num_radial=8)
        save_model(path / "generator.safetensors", ConditionalDenoiser(Denoiser(config, lattice)), {})
        for fold, name in enumerate(("predictor", "judge")):
            tables = {
                "baseline": torch.rand(95, MODEL_GRID.size),
                "support": torch.full((95, MODEL_GRID.size), 5, dtype=torch.int16),
                "input_mean": torch.zeros(536),
                "input_std": torch.ones(536),
            }
            small = PredictorConfig(hidden=8, depth=1, members=1)
            DOSPredictor(small, tables, {"fold": fold, "train_structures": 3}).save(path / f"{name}.safetensors")
    return path


@pytest.fixture(scope="module")
def files(folder: Path) -> list[str]:
    """Options that name the weights in `folder`."""
    names = {"weights": "generator", "judge": "judge", "predictor": "predictor"}
    return [f"--{option}={folder}/{name}.safetensors" for option, name in names.items()]


@pytest.fixture(scope="module")
def model(folder: Path) -> ConditionalDenoiser:
    return load_model(folder / "generator.safetensors")[0]


LABELLED = (
    *("mp-1018104", "mp-11531", "mp-8093", "mp-1009581", "mp-1018129", "mp-1018138"),  # train
    *("mp-16522", "mp-1394"),  # val
)


@pytest.fixture(scope="module")
def labels() -> SiteDOSLabels:
    """Crystals of three atoms: six for training and two for validation; by name, as labels come and are replaced."""
    everything = load_site_dos(ROOT / "data" / "site_dos")
    names = everything.material_id.tolist()
    return everything.select(np.array([names.index(name) for name in LABELLED]))


def same(a: list[Atoms], b: list[Atoms]) -> list[bool]:
    return [
        np.array_equal(x.numbers, y.numbers)
        and np.array_equal(x.positions, y.positions)
        and np.array_equal(x.cell, y.cell)
        for x, y in zip(a, b, strict=True)
    ]


def named(atoms: Atoms, name: str) -> Atoms:
    atoms.info["material_id"] = name
    return atoms


def test_results_are_strict_json(tmp_path: Path) -> None:
    _tables.write_results(tmp_path, "a", {"x": [1.0, math.inf], "y": {"z": math.nan, "w": "inf"}}, "")
    kept = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    told = kept.pop("made_by")
    assert kept == {"x": [1.0, None], "y": {"z": None, "w": "inf"}}
    assert told["version"] == __version__
    assert told["command"].startswith("python ")


# -- structure.py ------------------------------------------------------------------------------------------------------


def test_the_structure_benchmark_writes_its_table(folder: Path, tmp_path: Path) -> None:
    arguments = f"--weights {folder}/generator.safetensors --num-structures 3 --num-large 1 --num-steps 2"
    report = structure.main([*arguments.split(), "--val", "--out", str(tmp_path), "--cache", str(tmp_path)])
    assert [(row["atoms"], row["cell"]) for row in report["rows"]] == [
        (list(sizes), cell) for sizes in structure.SIZE_CLASSES for cell in ("generated", "given")
    ]
    assert report["rows"][0]["energy_median"] > 0.1  # an untrained generator must not look good
    assert json.loads((tmp_path / "structure.json").read_text())["sampler"]["num_steps"] == 2
    assert (tmp_path / "structure.md").read_text().count("\n| ") == len(report["rows"])
    assert len(json.loads((tmp_path / "chgnet_energy_val.json").read_text())) == 6


def test_the_true_structure_scores_zero_and_a_collapsed_one_infinity(tmp_path: Path) -> None:
    truths = [named(bulk("NaCl", "rocksalt", a=5.64), "salt"), named(bulk("Cu"), "copper")]
    reference = structure.true_energies(truths, tmp_path / "energies.json")
    perfect = structure.measure(truths, truths, reference)
    assert perfect["energy_quartiles"] == pytest.approx([0.0] * 3, abs=1e-5)
    assert (perfect["match_rate"], perfect["accepted"]) == (1.0, 1.0)
    collapsed = truths[0].copy()
    collapsed.set_cell(0.3 * collapsed.cell, scale_atoms=True)
    spoilt = structure.measure([collapsed, truths[1]], truths, reference)
    assert (spoilt["match_rate"], spoilt["accepted"]) == (0.5, 0.5)
    assert spoilt["energy_quartiles"][2] == math.inf


def test_true_energies_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truths = [named(bulk("Cu"), "copper")]
    first = structure.true_energies(truths, tmp_path / "energies.json")
    monkeypatch.delattr(structure, "chgnet_energies")
    assert structure.true_energies(truths, tmp_path / "energies.json") == pytest.approx(first)


def test_of_the_true_structure_only_the_species_reach_the_generator(model: ConditionalDenoiser) -> None:
    truths = [bulk("NaCl", "rocksalt", a=5.64), bulk("Fe"), bulk("CsCl", "cesiumchloride", a=4.1)]
    truths = [named(atoms, str(atoms.symbols)) for atoms in truths]
    disguised = [a.copy() for a in truths]
    for a in disguised:
        a.set_cell(1.3 * a.cell, scale_atoms=True)
        a.rattle(0.3, seed=1)
    made = structure.draw_like(model, truths, STEPS, 0, cell_given=False)
    assert [a.numbers.tolist() for a in made] == [a.numbers.tolist() for a in truths]
    assert all(same(made, structure.draw_like(model, disguised, STEPS, 0, cell_given=False)))
    given = structure.draw_like(model, truths, STEPS, 0, cell_given=True)
    for a, truth in zip(given, truths, strict=True):
        np.testing.assert_allclose(a.cell, truth.cell, atol=1e-6)
    assert not any(same(made, given))


# -- round_trip.py -----------------------------------------------------------------------------------------------------


def by_mode(made: list[Atoms]) -> dict[str, list[Atoms]]:
    count = len(made) // len(MODES)
    return {name: made[i * count : (i + 1) * count] for i, name in enumerate(MODES)}


def test_each_mode_is_told_what_it_says_and_no_more(model: ConditionalDenoiser, labels: SiteDOSLabels) -> None:
    target = Target.from_label(labels, 0, seed=0)

    def draws(t: Target) -> dict[str, list[Atoms]]:
        return by_mode(_draws.generate(model, t, 2, STEPS, 1.0, 0))

    first = draws(target)
    site, elsewhere = target.sites("site"), ~target.sites("site")

    geometry = target.atoms.copy()
    geometry.set_cell(1.2 * geometry.cell, scale_atoms=True)
    geometry.rattle(0.3, seed=0)
    again = draws(replace(target, atoms=geometry))
    assert all(all(same(first[name], again[name])) for name in MODES)

    other = target.atoms.copy()
    other.numbers[elsewhere] = 8
    again = draws(replace(target, atoms=other))
    unmoved = {name for name in MODES if all(same(first[name], again[name]))}
    assert unmoved == {name for name, mode in MODES.items() if mode.species != "all"}

    dos = target.dos.copy()
    dos[elsewhere] += 1.0
    again = draws(replace(target, dos=dos))
    unmoved = {name for name in MODES if all(same(first[name], again[name]))}
    assert unmoved == {name for name, mode in MODES.items() if mode.dos != "all"}
    dos[site] += 1.0
    again = draws(replace(target, dos=dos))
    unmoved = {name for name in MODES if all(same(first[name], again[name]))}
    assert unmoved == {name for name, mode in MODES.items() if mode.dos == "none"}

    for name, mode in MODES.items():
        pinned = target.sites(mode.species)
        assert all((a.numbers[pinned] == target.atoms.numbers[pinned]).all() for a in first[name])


def perfect_candidates(target: Target, count: int = 3) -> Candidates:
    """Every candidate is the target, except that the k-th is judged k times too high, and ranked the other way."""
    shape = (len(MODES), count, len(target.atoms))
    high = np.arange(count)[:, None, None]
    spread = lambda values: np.broadcast_to(values, (*shape, MODEL_GRID.size)).copy()  # noqa: E731
    return Candidates(
        numbers=np.broadcast_to(target.atoms.numbers, shape).copy(),
        accepted=np.ones(shape[:2], dtype=bool),
        judged=spread(target.dos * (1 + high)),
        ranked=spread(target.dos * (1 + high[::-1])),
        supported=np.ones(shape, dtype=bool),
    )


@pytest.mark.parametrize("name", ["conditional", "site with DOS"])
def test_mean_best_and_pick_of_known_candidates(labels: SiteDOSLabels, name: str) -> None:
    target = Target.from_label(labels, 1, seed=0)
    candidates = perfect_candidates(target)
    figures = round_trip.mode_figures(target, candidates, name)
    assert [figures[f"l1 {which}"] for which in ("mean", "best", "picked")] == pytest.approx([1.0, 0.0, 2.0], abs=1e-6)
    candidates.accepted[:, 0] = False
    candidates.judged[:, 0] = np.nan
    figures = round_trip.mode_figures(target, candidates, name)
    assert [figures[f"pooled {which}"] for which in ("mean", "best")] == pytest.approx([1.5, 1.0], abs=1e-6)
    candidates.accepted[:] = False
    assert np.isnan(list(round_trip.mode_figures(target, candidates, name).values())).all()


def test_what_a_ranked_pick_gains_is_told_beside_the_oracle() -> None:
    def rows(mean: float, picked: float, best: float) -> list[dict[str, float]]:
        return [{"l1 mean": f * mean, "l1 picked": f * picked, "l1 best": f * best} for f in (1.0, 2.0)]

    table = {"on": rows(0.8, 0.6, 0.4), "off": rows(1.2, 0.7, 0.5), "per-element mean": rows(1.0, 1.0, 1.0)}
    table["on"].append(dict.fromkeys(table["on"][0], np.nan))  # a target of which all candidates were rejected
    table["off"].append(table["off"][0])
    table["per-element mean"].append(table["off"][0])
    found = {name: figure["value"] for name, figure in round_trip.ranked_picks(table, "on", "off").items()}
    assert found == pytest.approx(
        {
            "pick / mean": 0.75,
            "share of the oracle's gain": 0.5,
            "pick / mean without DOS": 0.5,
            "pick / per-element mean": 0.6,
        }
    )
    assert _stats.share_of_gain(np.ones((3, 3))) == 0.0


def test_a_library_that_holds_the_target_retrieves_it(labels: SiteDOSLabels) -> None:
    targets = [Target.from_label(labels, i, seed=0) for i in range(len(labels))]
    library = Library(labels)
    assert all(library.retrieve(t)["l1 mean"] == pytest.approx(0.0, abs=1e-6) for t in targets)
    assert library.retrieve(replace(targets[0], dos=targets[0].dos + 0.5))["l1 mean"] > 0.1
    found = [perfect_candidates(t) for t in targets]
    for c in found:
        c.numbers[1] = 1
    shares = round_trip.element_shares(targets, found, library)
    assert shares["conditional"]["value"] == shares["nearest neighbour, L1"]["value"] == 1.0
    assert shares["unconditional"]["value"] == (labels.atomic_numbers == 1).sum() / labels.num_atoms.sum()
    assert shares["conditional - nearest neighbour, L1"]["value"] == 0.0


def test_rejected_candidates_have_no_dos(folder: Path) -> None:
    made = [bulk("NaCl", "rocksalt", a=5.64) for _ in MODES for _ in range(2)]
    made[1].set_cell(0.2 * made[1].cell, scale_atoms=True)
    judge, ranker = (DOSPredictor.load(folder / f"{name}.safetensors") for name in ("judge", "predictor"))
    candidates = _draws.judge_candidates(made, judge, ranker)
    assert candidates.accepted.tolist() == [[True, False]] + [[True, True]] * (len(MODES) - 1)
    assert np.isnan(candidates.judged).all((-2, -1)).tolist() == (~candidates.accepted).tolist()
    assert not np.array_equal(candidates.judged[1], candidates.ranked[1])


def test_the_round_trip_runs_and_resumes(
    files: list[str], labels: SiteDOSLabels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_trip, "load_site_dos", lambda path: labels)
    monkeypatch.setattr(_stats, "bootstrap_interval", partial(bootstrap_interval, samples=20))
    small = ["--val", "--num-targets=2", "--candidates=2", "--num-steps=2", f"--cache={tmp_path}/kept"]
    report = round_trip.main([*files, *small, f"--out={tmp_path}"])
    assert report["targets"] == len(list((tmp_path / "kept").glob("*/*.npz"))) == 2
    assert set(report["tables"]) == {"all sites", "one site, its element pinned", "all sites, all elements pinned"}
    assert {p.name for p in tmp_path.glob("round_trip*")} == {
        "round_trip.json", "round_trip.md", "round_trip_distances.png", "round_trip_overlays.png",
    }  # fmt: skip
    table = (tmp_path / "round_trip.md").read_text()
    assert all(f"| {name} |" in table for name in (*MODES, "retrieval", "per-element mean"))

    monkeypatch.delattr(_draws, "draw")
    assert round_trip.main([*files, *small, f"--out={tmp_path}"]) == report
    with pytest.raises(NameError):  # other settings, other candidates
        round_trip.main([*files, *small, "--guidance-scale=2", f"--out={tmp_path}"])


@pytest.mark.parametrize("swapped", [("judge", "judge"), ("predictor", "judge")])
def test_the_ranking_predictor_cannot_be_the_judge(
    swapped: tuple[str, str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [f"--{o}={folder}/{name}.safetensors" for o, name in zip(("judge", "predictor"), swapped, strict=True)]
    with pytest.raises(SystemExit):
        round_trip.main([f"--weights={folder}/generator.safetensors", *files])
    assert "the judge must be of fold 1" in capsys.readouterr().err


def test_new_labels_hardly_change_the_draw_and_a_result_repeats_its_own(labels: SiteDOSLabels, tmp_path: Path) -> None:
    everything, half = np.arange(len(labels)), np.arange(0, len(labels), 2)
    options = argparse.Namespace(seed=3, num_targets=3, targets=None)
    drawn, before = drawn_rows(labels, everything, options), drawn_rows(labels, half, options)
    assert [i for i in in_random_order(labels, everything, 3) if i in half][:3] == before
    assert drawn != drawn_rows(labels, everything, argparse.Namespace(**{**vars(options), "seed": 4}))
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"target_ids": labels.material_id[[5, 2]].tolist()}))
    repeated = argparse.Namespace(**{**vars(options), "targets": result})
    assert drawn_rows(labels, everything, repeated) == [5, 2]
    with pytest.raises(SystemExit, match="names no targets, or labels that are not there"):
        drawn_rows(labels, np.arange(3), repeated)


def test_candidates_are_kept_for_a_label_not_for_its_id_alone(labels: SiteDOSLabels) -> None:
    target = Target.from_label(labels, 0, 0)
    assert Target.from_label(labels, 0, 5).key == target.key
    assert replace(target, dos=1.1 * target.dos).key != target.key
    assert target.key.startswith(f"{target.material_id}-")


def test_what_is_kept_is_found_by_settings_and_content_of_the_models(tmp_path: Path) -> None:
    """By the SHA-256 of "sabc", as of old: candidates that were drawn before are not drawn again."""
    files = {name: tmp_path / name for name in ("weights", "judge", "predictor")}
    for path, content in zip(files.values(), "abc", strict=True):
        path.write_text(content)
    options = argparse.Namespace(cache=tmp_path, **files)
    assert _draws.cache_folder(options, "s") == tmp_path / "cf0bbce2b0833f47"
    assert _draws.cache_folder(options, "t") != tmp_path / "cf0bbce2b0833f47"
    files["judge"].write_text("d")
    assert _draws.cache_folder(options, "s") != tmp_path / "cf0bbce2b0833f47"


def test_the_dft_judge_runs_and_counts(
    folder: Path, labels: SiteDOSLabels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that gives the sites of the first arm 1.1 times their target, of the second 2.1 times, and so on."""
    import dft_judge

    from dosmatgen_ase.dft.result import ElectronicStructure
    from dosmatgen_ase.dft.settings import RECIPE
    from dosmatgen_ase.dos import TargetDOS

    labels = replace(labels, recipe=np.full(len(labels), RECIPE))

    def engine(structures: dict[str, Atoms], *_: object, **__: object) -> dict[str, ElectronicStructure]:
        found = {}
        for name, atoms in structures.items():
            material_id, _, arm = name.rsplit("-", 2)
            row = labels.material_id.tolist().index(material_id)
            sites = tuple(
                TargetDOS(MODEL_GRID.energies, (1.1 + int(arm)) * values, labels.known[row], "fermi", 0.2)
                for values in labels.values[row, : len(atoms)]
            )
            found[name] = ElectronicStructure(
                sites, sites[0], np.zeros((3, 4, 2)), np.zeros(2), 0.0, 0.0, 5.0, 0.0, 1.0, 0.0, 1, False
            )
        return found

    predictor = DOSPredictor.load(folder / "predictor.safetensors")
    monkeypatch.setattr(dft_judge, "load_site_dos", lambda path: labels)
    monkeypatch.setattr(dft_judge, "default_predictor", lambda: predictor)
    monkeypatch.setattr(dft_judge, "compute_many", engine)
    monkeypatch.setattr(dft_judge, "relax", lambda atoms: atoms.copy())
    monkeypatch.setattr(_stats, "bootstrap_interval", partial(bootstrap_interval, samples=20))
    files = [f"--weights={folder}/generator.safetensors"]
    small = ["--val", "--num-targets=2", "--pinned-targets=1", "--control-targets=1", "--candidates=2"]
    small += ["--num-steps=2", f"--cache={tmp_path}/kept"]
    report = dft_judge.main([*files, *small, f"--out={tmp_path}"])
    assert report["targets"] == 2
    found = {title: {r: f["l1"]["value"] for r, f in rows.items()} for title, rows in report["tables"].items()}
    beside = {title.removesuffix(", beside a draw without DOS"): rows for title, rows in found.items()}
    everywhere, one_site = beside["all sites"], beside["one site, its element pinned"]
    assert everywhere["conditional, ranked"] == pytest.approx(0.1, abs=1e-3)
    assert everywhere["unconditional"] == pytest.approx(1.1, abs=1e-3)
    assert found["one site, its element pinned"]["site with DOS, ranked"] == pytest.approx(2.1, abs=1e-3)
    assert one_site["site with DOS, ranked"] == pytest.approx(2.1, abs=1e-3)
    assert one_site["site with DOS, ranked / site without DOS"] == pytest.approx(2.1 / 3.1, abs=1e-3)
    pinned = found["all sites, their elements pinned"]
    assert pinned["species with DOS, ranked / species with DOS, one draw"] == pytest.approx(4.1 / 5.1, abs=1e-3)
    assert {title: len(rows) for title, rows in report["per_target"].items()} == dict(
        zip(found, (2, 1, 2, 1, 1), strict=True)
    )
    promised = report["promises"]["site with DOS, ranked"]
    assert promised["DFT"]["value"] == pytest.approx(2.1, abs=1e-3)
    assert len(promised["per_target"]) == 2
    assert sum(sum(row.values()) for row in report["gap_classes"].values()) == 2
    assert "| unconditional |" in (tmp_path / "dft_judge.md").read_text()

    # The targets of a result are all ranked, however many are drawn otherwise, and no arm is owed to any.
    again = [
        "--val",
        f"--targets={tmp_path}/dft_judge.json",
        "--num-targets=1",
        "--pinned-targets=0",
        "--control-targets=0",
    ]
    again += ["--candidates=2", "--num-steps=2", f"--cache={tmp_path}/kept", f"--out={tmp_path}/again"]
    bare = dft_judge.main([*files, *again])
    assert {title: len(rows) for title, rows in bare["per_target"].items()} == dict.fromkeys(
        ("all sites", "one site, its element pinned"), 2
    )
    assert bare["per_target"]["all sites"] == report["per_target"]["all sites"]
    assert "species with DOS, ranked" not in bare["promises"]

    collapsed = bulk("Cu", a=0.5)
    target = Target.from_label(labels, 0, seed=0)
    for arm in dft_judge.ARMS.values():
        assert dft_judge.pick(arm, target, [collapsed], predictor) == []
    # What looks best only until it is relaxed is not picked.
    mode, draws = dft_judge.ARMS["species with DOS, ranked"], [target.atoms.copy(), target.atoms.copy()]
    draws[1].set_cell(1.2 * draws[1].cell, scale_atoms=True)
    first, after = dft_judge.pick(mode, target, draws, predictor)
    assert first.info["draw"] == after.info["draw"]

    def exchanged(found: list[Atoms]) -> list[Atoms]:
        new = [draws[1 - atoms.info["draw"]].copy() for atoms in found]
        for atoms, old in zip(new, found, strict=True):
            atoms.info = dict(old.info)
        return new

    monkeypatch.setattr(dft_judge, "settled", exchanged)
    assert dft_judge.pick(mode, target, draws, predictor)[0].info["draw"] == 1 - first.info["draw"]
    assert dft_judge.kept(tmp_path / "none.extxyz", list) == []
    assert dft_judge.kept(tmp_path / "none.extxyz", lambda: [collapsed]) == []  # it was made once

    monkeypatch.delattr(dft_judge, "generate")  # what was made is kept
    assert dft_judge.main([*files, *small, f"--out={tmp_path}"])["per_target"] == report["per_target"]


def test_the_training_throughput_counts_structures_and_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock by which all takes half a second."""
    import training_throughput as throughput

    def half_a_second(work: Callable[[], object], device: str) -> float:
        work()
        return 0.5

    config = replace(CONFIG, max_pairs=16, draws_per_epoch=96)
    monkeypatch.setattr(throughput, "seconds", half_a_second)
    monkeypatch.setattr(throughput, "configurations", lambda: {"tiny": config})
    monkeypatch.setattr(throughput, "MATRIX", 8)
    monkeypatch.setattr(throughput, "WARM", 1)
    monkeypatch.setattr(throughput.CrystalDataset, "join", lambda *_: bulk_dataset())
    monkeypatch.setattr(throughput, "load_site_dos", lambda path: None)
    options = ["--threads", "1", "--max-pairs=16", f"--out={tmp_path}"]
    with pytest.raises(SystemExit, match=r"an epoch has \d+ batches, too few for 99 steps"):
        throughput.main(["--steps=99", *options])
    (row,) = throughput.main(["--steps=2", *options])["rows"]
    trainer = Trainer(config, bulk_dataset())
    sizes = [len(rows) for rows in epoch_batches(trainer.data, config, 0)][3:5]
    assert row["structures_per_second"] == sum(sizes) / (2 * 0.5)
    assert row["matrix_gflops"] == pytest.approx(2 * 8**3 / 0.5 / 1e9)
    assert row["parameters"] == sum(p.numel() for p in trainer.model.parameters())
    assert row["gflop_per_structure"] * 1e9 > 6 * 2 * row["parameters"] / 10  # each weight serves a site or a pair
    assert "| tiny | cpu | 1 |" in (tmp_path / "training_throughput.md").read_text()


def test_the_pick_of_k_draws_is_exact() -> None:
    """Against all subsets, and for one and for all draws."""
    import candidates

    rng = np.random.default_rng(0)
    order, values = rng.random(7), rng.random(7)
    for k in (1, 3, 6, 7):
        subsets = [list(s) for s in itertools.combinations(range(7), k)]
        brute = np.mean([values[s][order[s].argmin()] for s in subsets])
        assert candidates.first_of(order, values, k) == pytest.approx(brute)
    assert candidates.first_of(values, values, 3) < values.mean()  # the oracle gains


def test_the_curve_of_candidates_runs_and_resumes(
    files: list[str], labels: SiteDOSLabels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import candidates

    monkeypatch.setattr(candidates, "load_site_dos", lambda path: labels)
    monkeypatch.setattr(_stats, "bootstrap_interval", partial(bootstrap_interval, samples=20))
    small = ["--val", "--num-targets=2", "--candidates=5", "--num-steps=2", f"--cache={tmp_path}/kept"]
    report = candidates.main([*files, *small, f"--out={tmp_path}"])
    assert report["numbers"] == [1, 2, 5]
    for part in report["given"].values():
        oracle = [f["value"] for f in part["oracle"]]
        assert oracle == sorted(oracle, reverse=True)
        assert len(part["picked"]) == 3
    assert report["affordable"] > 1
    monkeypatch.delattr(candidates, "judged_draws")
    assert candidates.main([*files, *small, f"--out={tmp_path}"]) == report


def test_the_guidance_curve_runs(
    files: list[str], labels: SiteDOSLabels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import guidance

    monkeypatch.setattr(guidance, "load_site_dos", lambda path: labels)
    monkeypatch.setattr(guidance, "SETTINGS", [(1.0, 0.7), (2.0, 0.7)])
    monkeypatch.setattr(guidance, "WINDOW_SCALES", (1.0, 3.0))
    monkeypatch.setattr(guidance, "WINDOW_DRAWS", 2)
    monkeypatch.setattr(_stats, "bootstrap_interval", partial(bootstrap_interval, samples=20))
    report = guidance.main(
        [*files, "--num-targets=2", "--window-targets=2", "--candidates=2", "--num-steps=2", f"--out={tmp_path}"]
    )
    assert [row["guidance_scale"] for row in report["rows"]] == [1.0, 2.0]
    assert all(0 <= row["elements"] <= 1 and row["accepted"] > 0 for row in report["rows"])
    one, three = report["window"]
    assert one["ratio"]["value"] > 0
    assert one["inside"] != three["inside"]
    assert (tmp_path / "guidance.png").stat().st_size > 5000


def test_the_guidance_curve_takes_no_split(capsys: pytest.CaptureFixture[str]) -> None:
    import guidance

    with pytest.raises(SystemExit):
        guidance.main(["--val"])
    assert "unrecognized arguments: --val" in capsys.readouterr().err
