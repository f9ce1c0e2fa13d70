"""What a public call leaves behind in the process of its caller: nothing."""

from __future__ import annotations

import gc
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl
import torch
import torch._dynamo  # torch's optimisers import it, and with it sympy, which adds a warning filter
from ase.build import bulk
from conftest import in_a_new_thread
from test_training import NETWORK, bulk_dataset

from dosmatgen_ase import DOSGenerator, Ranking, TargetDOS, energy_above_hull, predict_dos, relax
from dosmatgen_ase.data import load_site_dos
from dosmatgen_ase.forward.features import site_features
from dosmatgen_ase.forward.predictor import DOSPredictor, PredictorConfig
from dosmatgen_ase.forward.predictor_training import train_predictor
from dosmatgen_ase.train.trainer import TrainingConfig, train

TARGET = TargetDOS.from_peaks([(-0.65, 6.0, 0.3)], window=(-3, 1))
ROOT = Path(__file__).parents[1]


def flushes_denormals() -> bool:
    return bool(torch.tensor(1e-40).mul(1.0) == 0)


def umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


GLOBALS: dict[str, Callable[[], Any]] = {
    "torch's random numbers": lambda: torch.random.get_rng_state().numpy().tobytes(),
    "numpy's legacy stream": lambda: [
        v.tobytes() if isinstance(v, np.ndarray) else v
        for v in np.random.get_state()  # noqa: NPY002
    ],
    "python's random numbers": random.getstate,
    "torch's threads": torch.get_num_threads,
    "threads of a new thread": lambda: in_a_new_thread(torch.get_num_threads),
    "other threads": lambda: sorted((p["prefix"], p["num_threads"]) for p in threadpoolctl.threadpool_info()),
    "torch's default type": torch.get_default_dtype,
    "torch's default device": torch.get_default_device,
    "gradients": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "autocast": lambda: torch.is_autocast_enabled("cpu"),
    "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "denormal numbers": flushes_denormals,
    "numpy's errors": np.geterr,
    "numpy's print options": lambda: str(np.get_printoptions()),
    "warning filters": lambda: list(warnings.filters),
    "environment": lambda: dict(os.environ),
    "folder": os.getcwd,
    "umask": umask,
    "signal handlers": lambda: [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
    "locale": lambda: locale.setlocale(locale.LC_ALL),
    "import path": lambda: list(sys.path),
    "logging": lambda: (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
    "garbage collection": gc.isenabled,
    "threads that run": lambda: [t for t in threading.enumerate() if t.name != "tqdm_monitor"],
}


@pytest.fixture(autouse=True)
def unusual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A caller with settings of their own, which no default would restore."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.random.default_generator.manual_seed(11)
    np.random.seed(12)  # noqa: NPY002
    random.seed(13)
    yield
    torch.set_num_threads(threads)


def train_a_predictor() -> DOSPredictor:
    labels = load_site_dos(ROOT / "data" / "site_dos")
    labels = labels.select(np.argsort(labels.material_id))  # so that new labels change next to nothing
    rows = np.concatenate([np.flatnonzero(labels.split == split)[:12] for split in ("train", "val")])
    labels = labels.select(rows)
    features = site_features([labels.atoms(i) for i in range(len(labels))])
    return train_predictor(labels, features, config=PredictorConfig(hidden=8, depth=1, members=2, epochs=1))


def stop_between_two(weights: Path) -> None:
    """A caller that looks at its globals, and goes away, while structures are still to come."""
    before = {name: state() for name, state in GLOBALS.items()}
    made = DOSGenerator(weights).generate_iter(TARGET, 40, num_atoms=2, num_steps=2, seed=0)
    next(made)
    assert {name: state() for name, state in GLOBALS.items()} == before


CALLS: dict[str, Callable[[Path], Any]] = {
    "DOSGenerator()": lambda _: DOSGenerator(),
    "generate": lambda weights: DOSGenerator(weights).generate(TARGET, 3, num_atoms=2, num_steps=2),
    "generate, ranked": lambda weights: DOSGenerator(weights).generate(
        TARGET, 1, num_atoms=2, num_steps=2, seed=1, oversample=2, ranking=Ranking(energy=1.0), out="made.extxyz"
    ),
    "generate_iter": stop_between_two,
    "regenerate": lambda weights: (g := DOSGenerator(weights)).regenerate(
        g.generate(TARGET, num_atoms=2, num_steps=2), TARGET
    ),
    "train": lambda _: train(
        TrainingConfig(steps=2, max_pairs=64, draws_per_epoch=8, save_every=1, network=NETWORK),
        bulk_dataset(), "run", progress=False,
    ),
    "train_predictor": lambda _: train_a_predictor(),
    "DOSPredictor.load": lambda _: DOSPredictor.load(),
    "predict_dos": lambda _: predict_dos(bulk("Cu")),
    "relax": lambda _: relax(bulk("Cu", a=3.7)),
    "energy_above_hull": lambda _: energy_above_hull(bulk("Cu")),
    "TargetDOS": lambda _: TargetDOS.from_file(ROOT / "data" / "ni_in_au3ni.npz", site=3),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_every_global_as_it_found_it(name: str, tiny_weights: Path) -> None:
    before = {key: state() for key, state in GLOBALS.items()}
    CALLS[name](tiny_weights)
    after = {key: state() for key, state in GLOBALS.items()}
    # A library may bring threads, variables, and filters of its own warnings when it is first imported.
    known = before["warning filters"]
    after["warning filters"] = [f for f in after["warning filters"] if f in known or f[2].__module__ == "builtins"]
    for key in ("other threads", "environment"):
        new = set(dict(after[key])) - set(dict(before[key]))
        after[key] = [item for item in dict(after[key]).items() if item[0] not in new]
        before[key] = list(dict(before[key]).items())
    assert [key for key in GLOBALS if after[key] != before[key]] == []


def test_the_comparison_sees_a_change() -> None:
    before = {key: state() for key, state in GLOBALS.items()}
    torch.rand(1)
    np.random.random()  # noqa: NPY002
    random.random()
    torch.set_num_threads(2)
    after = {key: state() for key, state in GLOBALS.items()}
    changed = [key for key in GLOBALS if after[key] != before[key]]
    assert {"torch's random numbers", "numpy's legacy stream", "python's random numbers"} < set(changed)
    assert {"torch's threads", "threads of a new thread"} < set(changed)


def test_relaxing_in_several_threads_gives_the_legacy_stream_back() -> None:
    before = GLOBALS["numpy's legacy stream"]()
    copper, silver = bulk("Cu", a=3.7), bulk("Ag", a=4.3)
    threads = [threading.Thread(target=relax, args=(a,), kwargs={"max_steps": 3}) for a in (copper, silver, copper)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert GLOBALS["numpy's legacy stream"]() == before
