"""What one structure costs: network calls and CPU seconds, beside the published sampler.

    python benchmarks/cost.py

Writes ``cost.json``, ``cost.md`` and ``cost_threads.md`` into ``results/`` beside this file. Both sides run in one
process on one thread and take turns, so that they meet the same machine; the time is CPU time
(:func:`time.process_time`), medians of repeats.

Ours is ``DOSGenerator().generate`` with its default settings, everything included: target, sampler, redraws, Atoms.
The published side is the network alone, timed for some calls and multiplied by the 4,000 calls that its sampler makes
(predictor and corrector, 1,000 steps each, with a conditional and an unconditional pass; arXiv 2504.06249). A pass
over a batch counts as one call of each of its structures, on both sides, so that a conditional and an unconditional
pass done together are two.

The threads are measured apart: the CPU time of ``generate(n=64, num_atoms=4)`` in processes with the environment's own
number of threads and with ``OMP_NUM_THREADS=1``, in turns. On two busy cores torch's default of two threads cost
twenty times as much before the generator chose one by itself.

    python benchmarks/cost.py --only-threads     # keeps the rest of the results
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and numpy are loaded

import torch
from _tables import write_results
from torch import Tensor, nn
from torch.nn import functional as F

from dosmatgen_ase.files import write_atomic

if TYPE_CHECKING:
    from dosmatgen_ase import DOSGenerator, TargetDOS

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PUBLISHED_CALLS = 4000
CASES = [(4, 1), (4, 16), (10, 1), (10, 16)]  # atoms, structures in the batch
TARGETS = {"calls": 80, "cpu": 800}


class PublishedNetwork(nn.Module):
    """The shape of the published denoiser (CSPNet, arXiv 2309.04475, as used in 2504.06249), for its cost only.

    512 channels, 6 layers, fully connected edges (an atom to itself included), 128 sine and cosine frequencies of the
    fractional difference in each direction, lattice inner products on the edges. Written from the papers; the weights
    are random, which does not change the cost. It has 12.55 M parameters where the published one has 12.76 M.
    """

    def __init__(
        self, hidden: int = 512, layers: int = 6, frequencies: int = 128, species: int = 100, dos: int = 400
    ) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * torch.pi * torch.arange(frequencies))
        time_size = 256
        self.register_buffer("time_frequencies", torch.logspace(0, -4, time_size // 2))
        self.embed_species = nn.Linear(species, hidden)
        self.embed_dos = nn.Linear(dos, hidden)
        self.embed_time = nn.Linear(hidden + time_size, hidden)
        edge_size = 2 * hidden + 9 + 3 * 2 * frequencies
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(layers))
        self.edge_mlps = nn.ModuleList(_two_layers(edge_size, hidden) for _ in range(layers))
        self.node_mlps = nn.ModuleList(_two_layers(2 * hidden, hidden) for _ in range(layers))
        self.last_norm = nn.LayerNorm(hidden)
        self.read_coords = nn.Linear(hidden, 3, bias=False)
        self.read_cell = nn.Linear(hidden, 9, bias=False)
        self.read_species = nn.Linear(hidden, species)

    def forward(
        self, species: Tensor, frac_coords: Tensor, cell: Tensor, dos: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One call for `B` structures of `N` atoms each.

        Parameters
        ----------
        species, frac_coords, cell, dos, t
            ``(B, N, 100)``, ``(B, N, 3)``, ``(B, 3, 3)``, ``(B, N, 400)`` and ``(B,)``.

        Returns
        -------
        tuple of Tensor
            Species logits ``(B, N, 100)``, coordinate field ``(B, N, 3)``, cell field ``(B, 3, 3)``.
        """
        batch, atoms = frac_coords.shape[:2]
        receiver, sender, structure = _full_edges(batch, atoms)
        coords = frac_coords.flatten(0, 1)
        phase = (t[:, None] * self.time_frequencies).repeat_interleave(atoms, 0)
        content = self.embed_species(species.flatten(0, 1)) + self.embed_dos(dos.flatten(0, 1))
        nodes = self.embed_time(torch.cat([content, phase.sin(), phase.cos()], -1))

        phase = (coords[sender] - coords[receiver])[..., None] * self.frequencies
        waves = torch.cat([phase.sin(), phase.cos()], -1).flatten(-2)
        metric = (cell @ cell.mT).flatten(-2)[structure]
        for norm, edge_mlp, node_mlp in zip(self.norms, self.edge_mlps, self.node_mlps, strict=True):
            h = norm(nodes)
            messages = edge_mlp(torch.cat([h[receiver], h[sender], metric, waves], -1))
            received = torch.zeros_like(h).index_add_(0, receiver, messages) / atoms
            nodes = nodes + node_mlp(torch.cat([h, received], -1))
        nodes = self.last_norm(nodes)
        cell_field = self.read_cell(nodes.view(batch, atoms, -1).mean(1)).view(batch, 3, 3) @ cell
        return (
            self.read_species(nodes).view(batch, atoms, -1),
            self.read_coords(nodes).view(batch, atoms, 3),
            cell_field,
        )


def _full_edges(batch: int, atoms: int) -> tuple[Tensor, Tensor, Tensor]:
    """Receiver, sender and structure of every ordered pair of atoms within a structure, self-pairs included."""
    structure, receiver, sender = torch.cartesian_prod(
        torch.arange(batch), torch.arange(atoms), torch.arange(atoms)
    ).unbind(-1)
    return structure * atoms + receiver, structure * atoms + sender, structure


def _two_layers(size_in: int, size_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size_in, size_out), nn.SiLU(), nn.Linear(size_out, size_out), nn.SiLU())


def num_parameters(module: nn.Module) -> int:
    """Number of scalar parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Row:
    """One case, per structure: the mean number of calls, redraws included, and the median CPU time."""

    num_atoms: int
    batch: int
    ours_calls: float
    ours_cpu_s: float
    published_calls: int
    published_cpu_s: float

    @property
    def ratio_calls(self) -> float:
        """How many times fewer network calls."""
        return self.published_calls / self.ours_calls

    @property
    def ratio_cpu(self) -> float:
        """How many times less CPU time."""
        return self.published_cpu_s / self.ours_cpu_s


def cpu_seconds(job: Callable[[], object]) -> float:
    """CPU time of one run of `job`, all threads of the process."""
    start = time.process_time()
    job()
    return time.process_time() - start


def published_call(num_atoms: int, batch: int, network: nn.Module) -> Callable[[], object]:
    """One call of the published network on random input."""
    rng = torch.Generator().manual_seed(num_atoms)
    species = F.one_hot(torch.randint(100, (batch, num_atoms), generator=rng), 100).float()
    frac_coords = torch.rand(batch, num_atoms, 3, generator=rng)
    cell = 4.0 * torch.eye(3).expand(batch, 3, 3)
    dos = torch.rand(batch, num_atoms, 400, generator=rng)
    t = torch.full((batch,), 500.0)

    def call() -> object:
        with torch.inference_mode():
            return network(species, frac_coords, cell, dos, t)

    return call


def measure(
    generator: DOSGenerator, dos: TargetDOS, network: nn.Module, num_atoms: int, batch: int, repeats: int, calls: int
) -> Row:
    """Both sides of one case, taking turns."""
    call = published_call(num_atoms, batch, network)
    call()
    generator.generate(dos, n=batch, num_atoms=num_atoms, seed=0)
    ours_calls: list[int] = []
    ours: list[float] = []
    published: list[float] = []

    for seed in range(1, repeats + 1):

        def generate(seed: int = seed) -> None:
            for atoms in generator.generate(dos, n=batch, num_atoms=num_atoms, seed=seed):
                info = atoms.info["dosmatgen"]
                ours_calls.append(info["network_calls"] * (1 + info["attempt"]))

        ours.append(cpu_seconds(generate) / batch)
        published += [cpu_seconds(call) * PUBLISHED_CALLS / batch for _ in range(calls)]
    return Row(
        num_atoms=num_atoms,
        batch=batch,
        ours_calls=statistics.mean(ours_calls),
        ours_cpu_s=statistics.median(ours),
        published_calls=PUBLISHED_CALLS,
        published_cpu_s=statistics.median(published),
    )


IN_A_PROCESS = """
import sys, time
import torch
from dosmatgen_ase import DOSGenerator, TargetDOS
generator = DOSGenerator(sys.argv[1], device="cpu")
dos = TargetDOS.from_file(sys.argv[2], site=int(sys.argv[3]))
generator.generate(dos, n=4, num_atoms=4, seed=0)
start = time.process_time()
generator.generate(dos, n=64, num_atoms=4, seed=1)
print(torch.get_num_threads(), time.process_time() - start)
"""


def cost_of_threads(weights: str, target: Path, site: int, repeats: int) -> dict[str, Any]:
    """CPU time of 64 crystals with the default number of threads and with one, each in processes of its own."""
    seconds: dict[str, list[float]] = {"default": [], "one": []}
    threads: dict[str, int] = {}
    for _ in range(repeats):
        for name in seconds:
            environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
            if name == "one":
                environment["OMP_NUM_THREADS"] = "1"
            command = [sys.executable, "-c", IN_A_PROCESS, weights, str(target), str(site)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            count, took = done.stdout.split()
            threads[name] = int(count)
            seconds[name].append(float(took))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "n": 64, "num_atoms": 4, "repeats": repeats, "threads_of_the_caller": threads, "cpu_s": seconds,
        "median_cpu_s": median, "ratio": median["default"] / median["one"],
    }  # fmt: skip


def markdown(rows: list[Row], report: dict[str, Any]) -> str:
    """The table that the README includes."""
    lines = [
        "| atoms | batch | network calls: ours | published | ratio | CPU s per structure: ours | published | ratio |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.num_atoms} | {row.batch} | {row.ours_calls:.4g} | {row.published_calls} | {row.ratio_calls:.0f}x "
        f"| {row.ours_cpu_s:.3g} | {row.published_cpu_s:.3g} | {row.ratio_cpu:.0f}x |"
        for row in rows
    ]
    lines += [
        "",
        f"CPU time on one thread, torch {report['torch']}, medians of {report['repeats']} runs. Published: the network "
        f"of arXiv 2504.06249 rebuilt for its cost ({report['published_parameters'] / 1e6:.2f} M parameters), "
        f"{PUBLISHED_CALLS:,} calls per structure, its sampler's own arithmetic not counted. Ours: "
        "`DOSGenerator().generate` at its default settings, everything included.",
    ]
    return "\n".join(lines) + "\n"


def threads_markdown(told: dict[str, Any]) -> str:
    """One sentence on the cost of the machine's default number of threads."""
    median, callers = told["median_cpu_s"], told["threads_of_the_caller"]
    return (
        f"{told['n']} crystals of {told['num_atoms']} atoms cost {median['default']:.2f} CPU s where torch has its "
        f"default of {callers['default']} threads, and {median['one']:.2f} with `OMP_NUM_THREADS=1`: "
        f"{told['ratio']:.2f}x (medians of {told['repeats']} processes each, in turns; the bar is 1.2x).\n"
    )


def main() -> None:
    """Measure every case and write the results."""
    parser = argparse.ArgumentParser(description="Cost of one structure, beside the published sampler.")
    parser.add_argument("--repeats", type=int, default=5, help="runs of ours per case (default 5)")
    parser.add_argument("--calls", type=int, default=5, help="calls of the published network per run (default 5)")
    parser.add_argument("--target", type=Path, default=ROOT / "data" / "ni_in_au3ni.npz", help="file with a DOS")
    parser.add_argument("--site", type=int, default=3, help="its site (default 3)")
    parser.add_argument("--weights", default="default", help="weights of DOSGenerator (default: the ones that ship)")
    parser.add_argument("--only-threads", action="store_true", help="measure the threads, keep the rest of the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for cost.json, cost.md and cost_threads.md")
    options = parser.parse_args()
    if options.repeats < 1 or options.calls < 1:
        parser.error("--repeats and --calls must be at least 1")

    from dosmatgen_ase import DOSGenerator, TargetDOS, __version__

    threads = cost_of_threads(options.weights, options.target, options.site, options.repeats)
    print(threads, flush=True)
    if options.only_threads:
        report = json.loads((options.out / "cost.json").read_text()) | {"threads": threads}
        write(report, options.out)
        return
    torch.set_num_threads(1)
    generator = DOSGenerator(options.weights, device="cpu")
    dos = TargetDOS.from_file(options.target, site=options.site)
    network = PublishedNetwork().eval()
    rows = []
    for num_atoms, batch in CASES:
        rows.append(measure(generator, dos, network, num_atoms, batch, options.repeats, options.calls))
        print(rows[-1], flush=True)

    report = {
        "weights": generator.header["sha256"],
        "version": __version__,
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": threads,
        "repeats": options.repeats,
        "published_parameters": num_parameters(network),
        "targets": TARGETS,
        "rows": [asdict(row) | {"ratio_calls": row.ratio_calls, "ratio_cpu": row.ratio_cpu} for row in rows],
    }
    write(report, options.out)


def write(report: dict[str, Any], folder: Path) -> None:
    """Write ``cost.json``, ``cost.md`` and ``cost_threads.md``."""
    names = Row.__dataclass_fields__
    rows = [Row(**{k: v for k, v in row.items() if k in names}) for row in report["rows"]]
    write_results(folder, "cost", report, markdown(rows, report))
    write_atomic(folder / "cost_threads.md", threads_markdown(report["threads"]).encode())


if __name__ == "__main__":
    main()
