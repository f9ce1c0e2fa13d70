"""Sixteen requests of one user, in one process: one after another, or each in a thread and all at the same moment.

    python tests/at_once.py 1        # or 16; prints a digest of each result, and what it changed for the process

Nothing is loaded before: the first request of a thread meets the first of the others.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import sys
import threading
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def state() -> dict[str, str]:
    """What threads might change for each other, and for the caller."""
    import numpy as np
    import torch
    from threadpoolctl import threadpool_info

    with warnings.catch_warnings():
        told = [f"{action} {kind.__name__} {module}" for action, _, kind, module, _ in warnings.filters]
    return {
        "threads of torch": str(torch.get_num_threads()),
        "threads of BLAS": str([pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]),
        "torch's stream": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "numpy's stream": hashlib.sha256(np.random.get_state()[1].tobytes()).hexdigest(),  # noqa: NPY002
        "Python's stream": hashlib.sha256(repr(random.getstate()).encode()).hexdigest(),
        "filters of warnings": json.dumps(told),
        "output": str(sys.stdout is sys.__stdout__),
    }


def requests() -> dict[str, Callable[[], Any]]:
    """What is asked for, by name."""
    import numpy as np
    from ase.build import bulk

    from dosmatgen_ase import DOSGenerator, TargetDOS, energy_above_hull, predict_bands, predict_dos, relax, search

    target = TargetDOS.from_peaks([(-0.65, 6.0, 0.3)], window=(-3, 1))
    salt, silicon, iron = bulk("NaCl", "rocksalt", a=5.6), bulk("Si"), bulk("Fe")

    def predicted(atoms: Any) -> Any:
        return [dos and dos.values.tolist() for dos in predict_dos(atoms)]

    def relaxed(atoms: Any) -> Any:
        found = relax(atoms, max_steps=3, time_limit=1e6)
        return found.positions.tolist(), np.asarray(found.cell).tolist(), found.info["relaxation"]["energy"]

    def made(seed: int, **more: Any) -> Any:
        found = DOSGenerator(device="cpu").generate(target, 2, num_atoms=2, num_steps=8, seed=seed, **more)
        return [(str(atoms.symbols), atoms.positions.tolist(), np.asarray(atoms.cell).tolist()) for atoms in found]

    def like(**more: Any) -> Any:
        return [[str(atoms.symbols), atoms.positions.tolist()] for atoms in search(target, **more)]

    jobs: dict[str, Callable[[], Any]] = {
        "predict salt": lambda: predicted(salt), "predict silicon": lambda: predicted(silicon),
        "predict iron": lambda: predicted(iron), "predict iron again": lambda: predicted(iron),
        "relax salt": lambda: relaxed(salt), "relax silicon": lambda: relaxed(silicon),
        "relax iron": lambda: relaxed(iron), "relax salt again": lambda: relaxed(salt),
        "generate": lambda: made(1), "generate again": lambda: made(1), "generate others": lambda: made(2),
        "generate and rank": lambda: made(3, oversample=2),
        "search": lambda: like(), "search again": lambda: like(),
        "bands": lambda: predict_bands(silicon, npoints=20).energies.tolist(),
        "hull": lambda: float(energy_above_hull(salt)),
    }  # fmt: skip
    return jobs


def rounded(value: Any) -> Any:
    """Numbers to seven digits: the last ones depend on who shares a batch, and on the code that a CPU takes."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) > 1e-4 else 0.0
    return [rounded(part) for part in value] if isinstance(value, list | tuple) else value


def main() -> None:
    """The command line."""
    count = int(sys.argv[1])
    sys.path.insert(0, str(ROOT / "src"))
    jobs = requests()
    for module in ("chgnet.model", "dosmatgen_ase.judge.ranking", "dosmatgen_ase.retrieval.query", "scipy.linalg"):
        import_module(module)  # some add filters of warnings
    sys.setswitchinterval(1e-4)  # so that threads meet more often
    before, found = state(), dict[str, str]()
    together, waiting = threading.Barrier(count), list(jobs.items())

    def work() -> None:
        together.wait()
        while waiting:
            name, job = waiting.pop(0)
            try:
                found[name] = hashlib.sha256(json.dumps(rounded(job())).encode()).hexdigest()[:16]
            except Exception as error:  # noqa: BLE001 -- it is what is looked for
                found[name] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = state()
    told = {"changed": [key for key in before if before[key] != after[key]]}
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"found": found, **told, "megabytes": megabytes}))


if __name__ == "__main__":
    main()
