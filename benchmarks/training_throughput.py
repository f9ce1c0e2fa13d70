"""How fast the generator trains: structures per second, and the share of the matrix rate that this is.

    python benchmarks/training_throughput.py                 # on the CPU, one thread and two
    python benchmarks/training_throughput.py --device cuda

Each row is a run of `Trainer` on the structures of `data/`: a few steps to warm up, then steps by the clock. What is
counted are matrix products, forward and backward (`torch.utils.flop_counter`); the matrix rate is that of a product of
two square matrices, in the precision of the training, measured in turns with the steps on the same threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded; each row sets its own

import numpy as np
import torch
from _common import RESULTS, ROOT
from _tables import write_results
from torch.utils.flop_counter import FlopCounterMode

from dosmatgen_ase.data import CrystalDataset, load_site_dos, load_structures
from dosmatgen_ase.threads import cpu_threads
from dosmatgen_ase.train.recipe import Recipe
from dosmatgen_ase.train.trainer import Trainer, TrainingConfig, epoch_batches

MATRIX = 2048  # rows of the square matrices
WARM = 3  # steps before the clock, for allocations and compilation


def seconds(work: Callable[[], object], device: str) -> float:
    """Time of a piece of work by the clock, until the device has finished."""
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_rate(device: str, bf16: bool) -> float:
    """Operations per second of one matrix product."""
    one = torch.ones(MATRIX, MATRIX, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * MATRIX**3 / seconds(lambda: one @ one, device)


def measured(config: TrainingConfig, dataset: CrystalDataset, device: str, steps: int) -> dict[str, Any]:
    """Rates of one configuration: products counted in some steps, time taken of as many others, of all sizes."""
    trainer = Trainer(config, dataset, device)
    sizes = np.array([len(rows) for rows in epoch_batches(trainer.data, config, epoch=0)])
    if len(sizes) < WARM + 2 * steps:
        raise SystemExit(f"an epoch has {len(sizes)} batches, too few for {steps} steps: give fewer")
    run = trainer.run(until=WARM + 2 * steps)
    for _ in range(WARM):
        next(run)
    with FlopCounterMode(display=False) as counter:
        for _ in range(steps):
            next(run)
    counted, timed = sizes[WARM : WARM + steps], sizes[WARM + steps : WARM + 2 * steps]
    flops = counter.get_total_flops() / int(counted.sum())
    spent, matrix = 0.0, []
    for _ in timed:
        spent += seconds(lambda: next(run), device)
        matrix.append(matrix_rate(device, config.bf16))
    rate, fastest = int(timed.sum()) / spent, statistics.median(matrix)
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "structures_per_second": rate,
        "gflop_per_structure": flops / 1e9,
        "matrix_gflops": fastest / 1e9,
        "share": rate * flops / fastest,
    }


def configurations() -> dict[str, TrainingConfig]:
    """The small network that starts from nothing on a CPU, and the one that ships."""
    small, shipped = (json.loads((ROOT / "configs" / f"{name}.json").read_text()) for name in ("default", "shipped"))
    return {"default": TrainingConfig.from_dict(small), "shipped": Recipe.from_dict(shipped).stages[-1].training}


def markdown(report: dict[str, Any]) -> str:
    """The table and how to read it."""
    lines = [
        "| config | device | threads | parameters | structures/s | GFLOP/structure | matrix rate, GFLOP/s | share |",
        "|--|--|--:|--:|--:|--:|--:|--:|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['config']} | {row['device']} | {row['threads']} | {row['parameters'] / 1e6:.1f} M | "
            f"{row['structures_per_second']:.0f} | {row['gflop_per_structure']:.2f} | {row['matrix_gflops']:.0f} | "
            f"{row['share']:.0%} |"
        )
    lines += [
        "",
        f"{report['steps']} training steps by the clock, on structures of `data/` as the training draws them. *Share*: "
        "matrix products of the training per second, forward and backward, over the rate of one product of two "
        f"matrices of {MATRIX} rows in the same precision, measured in turns.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Structures per second of the generator's training.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads (default 1 and 2)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each row (default %(default)s)")
    parser.add_argument("--max-pairs", type=int, help="size of a batch, in place of that of the configuration")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    structures = load_structures(options.data / "structures.parquet", split="train")
    dataset = CrystalDataset.join(structures, load_site_dos(options.data / "site_dos"))
    rows = []
    for name, config in configurations().items():
        if options.device == "cpu":  # where the batches of a GPU take minutes
            config = replace(config, compile=False, max_pairs=4096)
        if options.max_pairs:
            config = replace(config, max_pairs=options.max_pairs)
        for threads in options.threads if options.device == "cpu" else [1]:
            with cpu_threads(threads):
                figures = measured(config, dataset, options.device, options.steps)
            rows.append({"config": name, "device": options.device, "threads": threads, **figures})
    report = {"steps": options.steps, "seed": config.seed, "rows": rows}
    written = markdown(report)
    print(written)
    write_results(options.out, "training_throughput", report, written)
    return report


if __name__ == "__main__":
    main()
