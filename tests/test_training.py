"""Training: exact resume, what is drawn, and a loss that falls. The data are a few bulk metals made here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk

from dosmatgen_ase.crystals.batch import CrystalBatch
from dosmatgen_ase.data import CrystalDataset, Structures
from dosmatgen_ase.dos import MODEL_GRID
from dosmatgen_ase.files.tensors import load_tensors, save_tensors
from dosmatgen_ase.limits import MAX_ATOMS
from dosmatgen_ase.model.checkpoint import load_model
from dosmatgen_ase.model.denoiser import DenoiserConfig
from dosmatgen_ase.model.diffusion.lattice import LatticeProcess
from dosmatgen_ase.model.diffusion.process import JointProcess, Prediction
from dosmatgen_ase.train.trainer import (
    DenseData,
    Trainer,
    TrainingConfig,
    draw_levels,
    draw_probability,
    epoch_batches,
    field_losses,
    losses,
    train,
)

NETWORK = DenoiserConfig(width=16, pair_width=16, vector_channels=4, num_layers=2, num_radial=6)
# Epochs of a few batches, so that 20 steps cross several of them.
CONFIG = TrainingConfig(steps=20, warmup_steps=3, max_pairs=64, draws_per_epoch=24, save_every=10, network=NETWORK)


def bulk_dataset(labelled: int = 4, pseudo: int = 3) -> CrystalDataset:
    """Ten small crystals; the first ones have a computed DOS, the next ones a predicted one, the rest none."""
    crystals = [bulk(s) for s in ("Cu", "Ag", "Al", "Fe", "Na", "Mg", "Ti", "Si")]
    crystals += [bulk("NaCl", "rocksalt", a=5.64), bulk("Cu", cubic=True)]
    n = len(crystals)
    cell, frac = np.zeros((n, 3, 3)), np.zeros((n, MAX_ATOMS, 3))
    numbers = np.zeros((n, MAX_ATOMS), dtype=np.int64)
    for i, atoms in enumerate(crystals):
        cell[i] = np.asarray(atoms.cell)
        frac[i, : len(atoms)] = atoms.get_scaled_positions()
        numbers[i, : len(atoms)] = atoms.numbers
    structures = Structures(
        material_id=np.array([f"mp-{i}" for i in range(n)]),
        split=np.array(["train"] * n),
        reduced_formula=np.array([str(a.symbols) for a in crystals]),
        spacegroup=np.ones(n, dtype=np.int64),
        num_atoms=np.array([len(a) for a in crystals]),
        cell=cell,
        frac_coords=frac,
        atomic_numbers=numbers,
    )
    rows = labelled + pseudo
    site = numbers[:rows, :, None] > 0
    # One Gaussian band per element, wider with the atomic number.
    centre, width = -numbers[:rows, :, None] / 20, 0.5 + numbers[:rows, :, None] / 50
    dos = (np.exp(-(((MODEL_GRID.energies - centre) / width) ** 2)) * site).astype(np.float16)
    known = np.broadcast_to(site & (MODEL_GRID.energies < 3), dos.shape)
    index = np.where(np.arange(n) < rows, np.arange(n), -1)
    return CrystalDataset(structures, dos, known, index, np.arange(rows) >= labelled)


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All tensors of a run."""
    tensors = {f"model.{k}": v.clone() for k, v in trainer.model.state_dict().items()}
    tensors |= {f"ema.{k}": v.clone() for k, v in trainer.ema.items()}
    for i, values in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v.clone() for k, v in values.items()}
    return tensors | {"generator": trainer.generator.get_state()}


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


# -- exact resume ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted() -> Trainer:
    trainer = Trainer(CONFIG, bulk_dataset())
    assert len(list(trainer.run(20))) == 20
    return trainer


def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(uninterrupted: Trainer, tmp_path: Path) -> None:
    first = Trainer(CONFIG, bulk_dataset())
    list(first.run(10))
    first.save(tmp_path / "state")
    second = Trainer(CONFIG, bulk_dataset())
    second.restore(tmp_path / "state")
    assert differing(state(first), state(second)) == []
    assert differing(state(second), state(uninterrupted))  # negative control: ten steps do change everything
    list(second.run(20))
    assert differing(state(second), state(uninterrupted)) == []
    assert (second.step, second.epoch, second.position) == (20, uninterrupted.epoch, uninterrupted.position)
    assert second.epoch > 1


def test_a_state_saved_inside_the_loop_is_exact_at_every_step(uninterrupted: Trainer, tmp_path: Path) -> None:
    """`train` saves between two steps of `run`, also on the last batch of an epoch."""
    batches = len(list(epoch_batches(uninterrupted.data, CONFIG, 0)))
    assert 2 <= batches <= 10
    first = Trainer(CONFIG, bulk_dataset())
    for _ in first.run(20):
        if first.step in (1, batches, batches + 1):
            first.save(tmp_path / str(first.step))
    for step in (1, batches, batches + 1):
        second = Trainer(CONFIG, bulk_dataset())
        second.restore(tmp_path / str(step))
        list(second.run(20))
        assert differing(state(second), state(uninterrupted)) == [], f"resumed at step {step}"


def test_train_killed_and_started_again_loses_nothing(uninterrupted: Trainer, tmp_path: Path) -> None:
    code = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import dosmatgen_ase.train.trainer as training
        from test_training import CONFIG, bulk_dataset
        whole = training.Trainer._train
        def slow(self, rows):
            if self.step == 13:  # after the save at step 10, before the next
                print("ready", flush=True)
                time.sleep(600)
            return whole(self, rows)
        training.Trainer._train = slow
        training.train(CONFIG, bulk_dataset(), {str(tmp_path)!r}, progress=False)
    """
    source = str(Path(__file__).parents[1] / "src")
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": source},
    )
    with run:
        assert run.stdout is not None
        assert run.stdout.readline().strip() == "ready"
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob(".*.part"))

    weights = train(CONFIG, bulk_dataset(), tmp_path, progress=False)
    model, header = load_model(weights)
    assert header["training"]["steps"] == 20
    for name, value in model.state_dict().items():
        assert torch.equal(value, uninterrupted.ema[name]), name
    resumed = Trainer(CONFIG, bulk_dataset())
    resumed.restore(tmp_path / "state.safetensors")
    assert differing(state(resumed), state(uninterrupted)) == []


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=4, save_every=2)
    weights = train(config, bulk_dataset(), tmp_path, progress=False)
    before = weights.read_bytes(), (tmp_path / "log.jsonl").read_text()
    assert train(config, bulk_dataset(), tmp_path, progress=False) == weights
    assert (weights.read_bytes(), (tmp_path / "log.jsonl").read_text()) == before


def test_a_run_killed_before_its_last_export_gets_its_weights(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=4, save_every=2)
    weights = train(config, bulk_dataset(), tmp_path, progress=False)
    wanted = weights.read_bytes()
    early = Trainer(config, bulk_dataset())
    list(early.run(2))
    early.export(weights, {})
    assert train(config, bulk_dataset(), tmp_path, progress=False).read_bytes() == wanted
    weights.unlink()
    assert train(config, bulk_dataset(), tmp_path, progress=False).read_bytes() == wanted


def test_the_log_tells_no_step_twice(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=4, save_every=2)
    later = json.dumps({"step": 50, "loss": 1.0})
    train(config, bulk_dataset(), tmp_path, progress=False)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + later + "\n" + later[:10])  # after the saved state; the last line cut by a kill
    train(config, bulk_dataset(), tmp_path, progress=False)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["step"] for r in records] == [2, 4]
    (tmp_path / "state.safetensors").unlink()  # killed before the first state was saved: all is logged anew
    train(config, bulk_dataset(), tmp_path, progress=False)
    assert len(log.read_text().splitlines()) == 2
    assert {"coords", "lattice", "species", "dos", "size", "loss", "seconds"} <= set(records[0])


def test_a_resumed_run_logs_what_a_whole_one_does(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=6, save_every=4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, bulk_dataset(), whole, progress=False)
    early = Trainer(config, bulk_dataset())
    list(early.run(4))
    parts.mkdir()
    shutil.copy(whole / "log.jsonl", parts / "log.jsonl")
    early.save(parts / "state.safetensors")
    train(config, bulk_dataset(), parts, progress=False)
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (whole, parts)]
    assert [{**line, "seconds": 0} for line in logs[0]] == [{**line, "seconds": 0} for line in logs[1]]
    assert [line["step"] for line in logs[0]] == [4, 6]


def test_fewer_steps_than_a_run_has_are_refused(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=4, save_every=2)
    before = train(config, bulk_dataset(), tmp_path, progress=False).read_bytes()
    with pytest.raises(ValueError, match="has 4 steps already, more than steps=3: ask for as many, or choose a new"):
        train(replace(config, steps=3), bulk_dataset(), tmp_path, progress=False)
    assert (tmp_path / "weights.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-3},
        {"seed": 1},
        {"network": replace(NETWORK, width=24)},
        {"dropout": replace(CONFIG.dropout, window=0.9)},
    ],
    ids=lambda c: next(iter(c)),
)
def test_changed_settings_refuse_to_resume(change: dict, tmp_path: Path) -> None:
    trainer = Trainer(CONFIG, bulk_dataset())
    trainer.save(tmp_path / "state")
    with pytest.raises(ValueError, match=rf"other settings of \['{next(iter(change))}'\].*new folder"):
        Trainer(replace(CONFIG, **change), bulk_dataset()).restore(tmp_path / "state")


def test_another_type_of_device_refuses_to_resume(tmp_path: Path) -> None:
    Trainer(CONFIG, bulk_dataset()).save(tmp_path / "state")
    tensors, header = load_tensors(tmp_path / "state")
    assert header["device"] == "cpu"
    save_tensors(tmp_path / "state", tensors, {**header, "device": "cuda"})
    with pytest.raises(ValueError, match=r"made on cuda, this run is on cpu.*new folder"):
        Trainer(CONFIG, bulk_dataset()).restore(tmp_path / "state")
    del header["device"]
    save_tensors(tmp_path / "state", tensors, header)
    with pytest.raises(ValueError, match=r"does not tell what the run started from.*new folder"):
        Trainer(CONFIG, bulk_dataset()).restore(tmp_path / "state")


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, header: header.pop("config"),
        lambda tensors, header: header.update(config=[1]),
        lambda tensors, header: header.update(lattice=None),
        lambda tensors, header: header["lattice"].update(std=[0.0] * 6),
        lambda tensors, header: tensors.pop("generator"),
        lambda tensors, header: tensors.update(generator=torch.zeros(3)),
        lambda tensors, header: tensors.update(odd=torch.zeros(3)),
        lambda tensors, header: tensors.pop("model.encoder.null_site"),
        lambda tensors, header: tensors.update({"model.encoder.null_site": torch.zeros(2)}),
        lambda tensors, header: tensors.update({"optimizer.x.step": torch.zeros(())}),
    ],
)
def test_a_state_that_contradicts_itself_is_one_clear_error(change: Any, tmp_path: Path) -> None:
    Trainer(CONFIG, bulk_dataset()).save(tmp_path / "state")
    tensors, header = load_tensors(tmp_path / "state")
    change(tensors, header)
    save_tensors(tmp_path / "state", tensors, {k: v for k, v in header.items() if k != "sha256"})
    with pytest.raises(ValueError, match=r"(does not describe its own tensors|does not tell).*choose a new folder"):
        Trainer(CONFIG, bulk_dataset()).restore(tmp_path / "state")


def test_a_state_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    Trainer(CONFIG, bulk_dataset()).save(tmp_path / "state")
    tensors, header = load_tensors(tmp_path / "state")
    tensors["ema.encoder.null_site"][0] = torch.nan
    save_tensors(tmp_path / "state", tensors, {k: v for k, v in header.items() if k != "sha256"})
    with pytest.raises(ValueError, match=r"holds a NaN or an infinity in ema\.encoder\.null_site"):
        Trainer(CONFIG, bulk_dataset()).restore(tmp_path / "state")


def test_other_data_than_before_is_warned_of(tmp_path: Path) -> None:
    Trainer(CONFIG, bulk_dataset()).save(tmp_path / "state")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(CONFIG, bulk_dataset()).restore(tmp_path / "state")
    with pytest.warns(UserWarning, match="the data differ from those that the run began with"):
        Trainer(CONFIG, bulk_dataset(labelled=5)).restore(tmp_path / "state")


def test_weights_are_not_a_state_to_resume(tmp_path: Path) -> None:
    trainer = Trainer(CONFIG, bulk_dataset())
    trainer.export(tmp_path / "weights", {})
    with pytest.raises(ValueError, match="generator, not the state of a training run"):
        trainer.restore(tmp_path / "weights")


def test_a_run_may_be_made_longer(tmp_path: Path) -> None:
    Trainer(CONFIG, bulk_dataset()).save(tmp_path / "state")
    Trainer(replace(CONFIG, steps=40, save_every=7), bulk_dataset()).restore(tmp_path / "state")


def test_config_round_trips_through_json_and_refuses_unknown_names() -> None:
    assert TrainingConfig.from_dict(json.loads(json.dumps(asdict(CONFIG)))) == CONFIG
    with pytest.raises(ValueError, match=r"unknown training settings \['learning_rte'\].*learning_rate"):
        TrainingConfig.from_dict({"learning_rte": 1e-3})


# -- what is drawn -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labelled", "pseudo", "shares"),
    [
        (4, 3, (0.2, 0.55, 0.25)),
        (4, 0, (0.2 / 0.45, 0.0, 0.25 / 0.45)),
        (0, 10, (0.0, 1.0, 0.0)),
        (0, 0, (0.0, 0.0, 1.0)),
    ],
)
def test_shares_of_labelled_predicted_and_bare(labelled: int, pseudo: int, shares: tuple[float, ...]) -> None:
    probability = draw_probability(bulk_dataset(labelled, pseudo), CONFIG)
    parts = [probability[:labelled], probability[labelled : labelled + pseudo], probability[labelled + pseudo :]]
    assert [float(p.sum()) for p in parts] == pytest.approx(shares)


def test_large_cells_are_drawn_less_often() -> None:
    dataset = bulk_dataset(0, 0)
    dataset.structures.num_atoms[:2] = (16, 8)
    probability = draw_probability(dataset, CONFIG)
    assert probability[0] / probability[1] == pytest.approx(0.5**CONFIG.size_exponent)  # (8 / 16)^a
    assert probability[1] == pytest.approx(probability[5])  # up to 8 atoms all weigh the same


def test_epochs_are_reproducible_and_differ() -> None:
    data = DenseData(bulk_dataset(), CONFIG, torch.device("cpu"))
    first, again, other = ([b.tolist() for b in epoch_batches(data, CONFIG, e)] for e in (0, 0, 1))
    assert first == again
    assert first != other
    assert sum(map(len, first)) == CONFIG.draws_per_epoch


def test_dense_batches_hold_the_structures_and_their_dos() -> None:
    dataset = bulk_dataset()
    data = DenseData(dataset, CONFIG, torch.device("cpu"))
    rows = np.array([8, 0, 5])  # NaCl has no DOS; Cu a computed, Mg a predicted one
    crystals, dos = data.batch(rows)
    for atoms, i in zip(crystals.to_atoms(), rows, strict=True):
        expected = dataset.structures.atoms(int(i))
        assert (atoms.numbers == expected.numbers).all()
        np.testing.assert_allclose(atoms.positions, expected.positions, atol=1e-5)
    assert dos.site_known.any(-1).tolist() == [[False, False], [True, False], [True, True]]
    assert not dos.site[0].any()
    torch.testing.assert_close(dos.site[1, 0] * dos.site_known[1, 0], dos.total[1])  # one atom: its DOS is the total
    torch.testing.assert_close(dos.total[2], dos.site[2].sum(0))
    assert torch.equal(dos.total_known[2], dos.site_known[2, 0])
    assert not dos.total_known[0].any()


def test_a_dataset_without_any_dos_trains() -> None:
    trainer = Trainer(CONFIG, bulk_dataset(0, 0))
    record = next(iter(trainer.run(1)))
    assert record["dos"] == 0.0
    assert np.isfinite(record["loss"])


def test_statistics_of_the_noise_levels() -> None:
    n = 20_000
    mask = torch.ones(n, 3, dtype=torch.bool)
    mask[:, 2] = False
    lattice, coords, species = draw_levels(mask, CONFIG, torch.Generator().manual_seed(0))
    assert lattice.shape == (n,)
    assert coords.shape == species.shape == (n, 3)
    assert not coords[:, 2].any()  # padding
    for level in (lattice, coords, species):
        assert 0 <= float(level.min()) <= float(level.max()) <= 1
    for level in (lattice, coords):
        assert not ((level > 0) & (level < 1e-3)).any()
    c, tolerance = CONFIG, 4 * 0.5 / n**0.5
    clean = c.independent * c.clean
    held_cell = clean + (1 - clean) * c.fixed_sites / 2
    assert float((lattice == 0).float().mean()) == pytest.approx(held_cell, abs=tolerance)
    # A site is also clean where it was picked as fixed, at a rate that is itself uniform: half of fixed_sites.
    fixed = clean + (1 - clean) * c.fixed_sites / 2
    assert float((coords[:, 0] == 0).float().mean()) == pytest.approx(fixed, abs=tolerance)
    mixed = (coords[:, 0] == 0) != (coords[:, 1] == 0)
    assert float(mixed.float().mean()) == pytest.approx((1 - clean) * c.fixed_sites / 3, abs=tolerance)
    shared = lattice == coords[:, 0]
    both_clean = c.independent * c.clean**2
    expected = both_clean + (1 - c.independent) * (1 - c.fixed_sites / 2)
    assert float(shared.float().mean()) == pytest.approx(expected, abs=0.02)
    # The same of the species, at every level of the others.
    differ = float(((species[:, 0] == 0) != (species[:, 1] == 0)).float().mean())
    masked = float((species[:, 0] > 0).float().mean()) / (1 - c.fixed_species / 2)
    assert differ == pytest.approx(masked * c.fixed_species / 3, abs=tolerance)
    # Species are masked at a level that is never above that of the geometry, but where they have their own.
    masked_more = (species[:, 0] > coords[:, 0]) & (coords[:, 0] > 0)
    assert 0.03 < float(masked_more.float().mean()) < c.species_independent
    known = float((species[:, 0] == 0).float().mean())
    assert c.species_clean < known < c.species_clean + (1 - c.species_clean - c.species_independent)
    noisy = lattice[lattice > 0]
    assert float(noisy.mean()) == pytest.approx(1 / (1 + c.noise_exponent), abs=0.01)  # E[u^a] = 1 / (1 + a)


# -- learning ----------------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_decays() -> None:
    trainer = Trainer(replace(CONFIG, steps=100, warmup_steps=10, learning_rate=1.0), bulk_dataset())
    rates = []
    for step in range(101):
        trainer.step = step
        rates.append(trainer.learning_rate())
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.01)


def test_losses_of_the_truth_are_zero_and_of_all_clean_fields_too() -> None:
    dataset = bulk_dataset(10, 0)
    trainer = Trainer(CONFIG, dataset)
    crystals, full = trainer.data.batch(np.array([0, 8, 5]))
    generator = torch.Generator().manual_seed(0)
    process = JointProcess(trainer.model.denoiser.lattice)
    ones = torch.ones(crystals.mask.shape)
    noisy, target = process.noised(crystals, ones[:, 0] * 0.5, 0.5 * ones, ones, generator)
    logits = 50.0 * torch.nn.functional.one_hot(crystals.atomic_numbers, 95)
    truth = Prediction(target.lattice, target.coords, logits, full.site)
    for name, value in field_losses(noisy, truth, target, crystals, full).items():
        assert float(value) == pytest.approx(0.0, abs=1e-5), name
    wrong = Prediction(target.lattice + 1, target.coords + 0.2, logits.roll(1, -1), full.site + 1)
    for name, value in field_losses(noisy, wrong, target, crystals, full).items():
        assert float(value) > 0.1, name
    clean, target = process.noised(crystals, 0 * ones[:, 0], 0 * ones, 0 * ones, generator)
    parts = field_losses(clean, wrong, target, crystals, full)
    assert [float(parts[k]) for k in ("coords", "lattice", "species")] == [0.0, 0.0, 0.0]
    assert float(parts["dos"]) > 0.1  # the DOS of a clean crystal is still to be learned


def test_a_mirror_crystal_is_shown_half_of_the_time() -> None:
    """The six-vector does not know handedness, so both mirror images must be trained on."""
    dataset = bulk_dataset()
    trainer = Trainer(CONFIG, dataset)
    crystals, full = trainer.data.batch(np.zeros(200, dtype=int))
    crystals = CrystalBatch(crystals.cell, crystals.frac_coords + 0.25, crystals.atomic_numbers, crystals.num_atoms)
    seen: list[torch.Tensor] = []

    class Spy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.denoiser, self.encoder = trainer.model.denoiser, trainer.model.encoder

        def forward(self, state, condition):  # noqa: ANN001, ANN202
            seen.append(state.frac_coords)
            return trainer.model(state, condition)

    losses(Spy(), crystals, full, CONFIG, torch.Generator().manual_seed(0))
    first = seen[0][:, 0, 0]  # one atom does not move, so its position tells the mirror: 0.25 or 0.75
    assert set(first.tolist()) == {0.25, 0.75}
    assert float((first == 0.75).float().mean()) == pytest.approx(0.5, abs=0.15)


def test_loss_falls_on_a_few_structures() -> None:
    config = replace(
        CONFIG, steps=150, warmup_steps=10, learning_rate=5e-3, max_pairs=256, draws_per_epoch=256, real_share=1.0,
        pseudo_share=0.0,
    )  # fmt: skip
    records = list(Trainer(config, bulk_dataset(10, 0)).run(150))
    for name in ("loss", "species", "dos", "lattice", "size"):
        start, end = (np.mean([r[name] for r in part]) for part in (records[:15], records[-15:]))
        assert end < 0.7 * start, (name, start, end)


def test_bfloat16_gives_the_same_first_losses() -> None:
    exact, rounded = (next(iter(Trainer(replace(CONFIG, bf16=b), bulk_dataset()).run(1))) for b in (False, True))
    assert exact != rounded  # it was used
    for name in ("coords", "lattice", "species", "dos", "size"):
        assert rounded[name] == pytest.approx(exact[name], rel=0.03), name


def test_a_loss_that_is_not_finite_stops_the_run_with_advice() -> None:
    trainer = Trainer(CONFIG, bulk_dataset())
    with torch.no_grad():
        trainer.model.denoiser.species_out[0].weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite at step 0: lower learning_rate"):
        next(iter(trainer.run(1)))


def test_weights_to_start_from(tmp_path: Path) -> None:
    parent = Trainer(CONFIG, bulk_dataset())
    list(parent.run(3))
    parent.export(tmp_path / "parent.safetensors", {})
    child = Trainer(replace(CONFIG, seed=5), bulk_dataset())
    digest = child.start_from(tmp_path / "parent.safetensors")
    assert digest == load_model(tmp_path / "parent.safetensors")[1]["sha256"]
    assert all(torch.equal(value, parent.ema[name]) for name, value in child.model.state_dict().items())
    assert child.step == 0
    other = Trainer(replace(CONFIG, network=replace(CONFIG.network, num_layers=1)), bulk_dataset())
    with pytest.raises(ValueError, match="another network"):
        other.start_from(tmp_path / "parent.safetensors")


def test_a_fine_tune_goes_on_from_what_it_started_from(tmp_path: Path) -> None:
    config, dataset = replace(CONFIG, steps=4, save_every=2), bulk_dataset()
    parent = Trainer(CONFIG, dataset)
    parent.model.denoiser.lattice = LatticeProcess((0.5,) * 6, (2.0,) * 6)  # of other data
    parent.export(tmp_path / "parent", {})
    list(parent.run(1))
    parent.export(tmp_path / "other", {})
    whole = train(config, dataset, tmp_path / "whole", init=tmp_path / "parent", progress=False)
    part = Trainer(config, dataset)
    digest = part.start_from(tmp_path / "parent")
    list(part.run(2))
    for name, init in (("with", tmp_path / "parent"), ("without", None)):
        (tmp_path / name).mkdir()
        part.save(tmp_path / name / "state.safetensors")
        resumed = train(config, dataset, tmp_path / name, init=init, progress=False)
        assert resumed.read_bytes() == whole.read_bytes(), name
        assert load_model(resumed)[1]["init"] == digest
        with pytest.raises(ValueError, match=r"did not start from .*other: leave init out or choose"):
            train(config, dataset, tmp_path / name, init=tmp_path / "other", progress=False)
