"""The published network of the cost benchmark has the published shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cost
import pytest
import torch
from ase import Atoms
from cost import PublishedNetwork, Row, markdown, measure, num_parameters


@pytest.fixture(scope="module")
def network() -> PublishedNetwork:
    torch.manual_seed(0)
    return PublishedNetwork(hidden=32, layers=2, frequencies=8).eval()


def inputs(batch: int, atoms: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(7)
    shapes = [(batch, atoms, 100), (batch, atoms, 3), (batch, 3, 3), (batch, atoms, 400), (batch,)]
    return [torch.rand(shape, generator=rng) for shape in shapes]


def test_it_is_not_larger_than_the_published_one() -> None:
    parameters = num_parameters(PublishedNetwork())
    assert 0.98 * 12.76e6 < parameters <= 12.76e6


@torch.inference_mode()
def test_structures_of_a_batch_do_not_see_each_other(network: PublishedNetwork) -> None:
    arguments = inputs(3, 4)
    together = network(*arguments)
    for index in range(3):
        alone = network(*(argument[index : index + 1] for argument in arguments))
        for many, one in zip(together, alone, strict=True):
            torch.testing.assert_close(many[index : index + 1], one)


@torch.inference_mode()
def test_every_pair_of_atoms_is_an_edge(network: PublishedNetwork) -> None:
    species, frac_coords, cell, dos, t = inputs(1, 5)
    logits, coords, _ = network(species, frac_coords, cell, dos, t)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted_logits, permuted_coords, _ = network(species[:, order], frac_coords[:, order], cell, dos[:, order], t)
    torch.testing.assert_close(permuted_logits, logits[:, order])
    torch.testing.assert_close(permuted_coords, coords[:, order])
    changed = dos.clone()
    changed[0, 4] += 1
    assert (network(species, frac_coords, cell, changed, t)[0] != logits).any(-1).all()


@torch.inference_mode()
def test_it_sees_differences_of_fractional_coordinates_only(network: PublishedNetwork) -> None:
    species, frac_coords, cell, dos, t = inputs(2, 4)
    shifted = (frac_coords + torch.tensor([0.3, -0.1, 2.0])) % 1.0
    torch.testing.assert_close(
        network(species, shifted, cell, dos, t)[0], network(species, frac_coords, cell, dos, t)[0], atol=1e-4, rtol=1e-3
    )


def test_the_table_shows_the_ratios() -> None:
    row = Row(num_atoms=4, batch=16, ours_calls=50, ours_cpu_s=0.02, published_calls=4000, published_cpu_s=16.0)
    table = markdown([row], {"torch": "2", "repeats": 1, "published_parameters": 12_551_780})
    assert "| 4 | 16 | 50 | 4000 | 80x | 0.02 | 16 | 800x |" in table


class _FakeGenerator:
    """Counts what it is asked for and burns no time worth measuring."""

    def __init__(self) -> None:
        self.asked: list[dict[str, int]] = []

    def generate(self, dos: object, **request: int) -> list[Atoms]:
        self.asked.append(request)
        made = [Atoms() for _ in range(request["n"])]
        for index, atoms in enumerate(made):
            atoms.info["dosmatgen"] = {"network_calls": 50, "attempt": index % 2}
        return made


def test_a_case_counts_per_structure(network: PublishedNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "cpu_seconds", lambda job: (job(), 2.0)[1])
    generator = _FakeGenerator()
    row = measure(generator, None, network, num_atoms=4, batch=16, repeats=3, calls=2)
    assert generator.asked == [{"n": 16, "num_atoms": 4, "seed": seed} for seed in range(4)]  # the first one warms up
    assert row.ours_calls == 75  # every other structure was drawn twice
    assert row.ours_cpu_s == 2.0 / 16
    assert row.published_cpu_s == 2.0 * 4000 / 16


def test_threads_are_compared_in_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str | None] = []

    def run(command: list[str], *, env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(env.get("OMP_NUM_THREADS"))
        answer = "1 0.5" if env.get("OMP_NUM_THREADS") == "1" else "8 0.55"
        return subprocess.CompletedProcess(command, 0, answer, "")

    with monkeypatch.context() as patch:
        patch.setattr(cost.subprocess, "run", run)
        told = cost.cost_of_threads("default", Path("target.npz"), 3, repeats=2)
    assert asked == [None, "1", None, "1"]
    assert told["threads_of_the_caller"] == {"default": 8, "one": 1}
    assert told["ratio"] == pytest.approx(1.1)
    rows = json.loads((cost.RESULTS / "cost.json").read_text())
    cost.write({**rows, "threads": told}, tmp_path)
    assert (
        "its default of 8 threads, and 0.50 with `OMP_NUM_THREADS=1`: 1.10x"
        in (tmp_path / "cost_threads.md").read_text()
    )
    assert (tmp_path / "cost.md").read_text() == (cost.RESULTS / "cost.md").read_text()


def test_what_is_timed_in_a_process_runs(tiny_weights: Path) -> None:
    program = cost.IN_A_PROCESS.replace("n=64", "n=1").replace("n=4", "n=1")
    command = [sys.executable, "-c", program, str(tiny_weights), str(cost.ROOT / "data" / "ni_in_au3ni.npz"), "3"]
    environment = {**os.environ, "PYTHONPATH": str(cost.ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    threads, seconds = done.stdout.split()
    assert (threads, float(seconds) > 0) == ("1", True)
