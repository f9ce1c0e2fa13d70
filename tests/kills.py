"""Kill a command at random moments, start it again until it is done, and compare with a run that nobody disturbed.

    python tests/kills.py generate --kills 100 --seed 0

The command's own code runs in a process that is forked from one which has loaded the libraries. Half of the kills come
by the clock, half right before the command changes a file for the n-th time. Each round begins in an empty folder.
`relax` keeps its work every 0.1 s here, not every 5 s. `dft` and `label` run stand-ins, `dft-real` pw.x.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
MARK = "DOSMATGEN_TEST_KILLS"  # in the environment of all that a command starts
PATIENCE = 20.0  # seconds until what a dead command has started counts as an orphan


@dataclass(frozen=True)
class Case:
    """A command: what it needs in the folder `home`, how it is called in the folder of a round, what must come out."""

    prepare: Callable[[Path], None]
    arguments: Callable[[Path], list[object]]
    results: Callable[[Path], dict[str, Any]]


def every_file(folder: Path) -> dict[str, Any]:
    """Content of all files: nothing may be left over, either."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- generate ----------------------------------------------------------------------------------------------------------


def tiny_models(home: Path) -> None:
    """A generator with random weights in roomy cells, and a predictor that is one small network."""
    import torch

    from dosmatgen_ase.forward.predictor import DOSPredictor, PredictorConfig
    from dosmatgen_ase.model.checkpoint import save_model
    from dosmatgen_ase.model.conditioning import ConditionalDenoiser
    from dosmatgen_ase.model.denoiser import Denoiser, DenoiserConfig
    from dosmatgen_ase.model.diffusion.lattice import LatticeProcess

    torch.manual_seed(0)
    tiny = DenoiserConfig(width=16, pair_width=16, vector_channels=4, num_layers=1, num_radial=8)
    model = ConditionalDenoiser(Denoiser(tiny, LatticeProcess((0.0,) * 5 + (2.2,), (0.1,) * 6)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
    save_model(home / "tiny.safetensors", model, {})
    tables = {"baseline": torch.rand(95, 151), "support": torch.full((95, 151), 9, dtype=torch.int16)}
    tables |= {"input_mean": torch.zeros(536), "input_std": torch.ones(536)}
    DOSPredictor(PredictorConfig(hidden=4, depth=1, members=1), tables, {}).save(home / "predictor.safetensors")


def generate_in(folder: Path, out: str) -> list[object]:
    home = folder.parent
    models = ["--weights", home / "tiny.safetensors", "--predictor", home / "predictor.safetensors", "--device", "cpu"]
    drawn = ["-n", 8, "--oversample", 3, "--num-atoms", "2-4", "--num-steps", 10, "--seed", 1]
    return ["generate", ROOT / "data" / "ni_in_au3ni.npz", "--site", 3, *models, *drawn, "-o", folder / out]


# -- relax -------------------------------------------------------------------------------------------------------------


def crystals_in(home: Path) -> None:
    import ase.io
    from ase.build import bulk

    kinds = [bulk("Cu", a=3.7), bulk("Al", a=4.2), bulk("NaCl", "rocksalt", a=0.8), bulk("Ag"), bulk("Si"), bulk("Au")]
    ase.io.write(home / "given.extxyz", [*kinds, bulk("NaCl", "rocksalt", a=5.8), bulk("Ni"), bulk("Pd"), bulk("Pt")])


def relax_in(folder: Path, jobs: int) -> list[object]:
    limits = ["--max-steps", 4, "--time-limit", 1e6, "-j", jobs]
    return ["relax", folder.parent / "given.extxyz", *limits, "-o", folder / "relaxed.extxyz"]


# -- dft and label -----------------------------------------------------------------------------------------------------


def real_crystals_in(home: Path) -> None:
    """Crystals that Quantum ESPRESSO computes in seconds."""
    import ase.io
    from ase.build import bulk

    ase.io.write(home / "given.extxyz", [bulk("Si"), bulk("Al"), bulk("Na")])


def programs_in(home: Path) -> None:
    """Programs that write files as Quantum ESPRESSO does, pseudopotentials, and crystals, of which gold fails."""
    import ase.io
    from ase.build import bulk

    kinds = ("Cu", "Ni", "Al", "Cu", "Ni", "Al", "Au")
    ase.io.write(home / "given.extxyz", [bulk(kinds[i % 7], "fcc", a=3.6 + 0.001 * i) for i in range(20)])
    for name, title in (("pw.x", "PWSCF"), ("projwfc.x", "PROJWFC")):
        path = home / "bin" / name
        path.parent.mkdir(exist_ok=True)
        told = f"#!/bin/sh\necho Program {title} v.7\nmkdir -p o/x.save\necho data > o/x.save/wfc1\nsleep 0.02\n"
        path.write_text(f"{told}echo JOB DONE\n")
        path.chmod(0o755)
    for symbol in ("Cu", "Ni", "Al", "Au"):
        path = home / "upf" / f"{symbol}.upf"
        path.parent.mkdir(exist_ok=True)
        path.touch()


def stand_in(home: Path) -> None:
    """Let these programs be found, and what they compute be made up."""
    import threading

    from ase import Atoms
    from test_labels import computed

    from dosmatgen_ase.dft import batch, labels
    from dosmatgen_ase.dft.errors import ElectronicStructureError
    from dosmatgen_ase.dft.programs import Programs

    def compute(atoms: Atoms, settings: Any, directory: Path, stop: threading.Event) -> Any:
        programs = Programs.find(dataclasses.replace(settings, nice=0), stop)  # for the sake of a busy machine
        directory.mkdir(exist_ok=True)
        (directory / "scf.in").write_text("&control /")
        for name in ("pw.x", "projwfc.x"):
            programs.run(name, directory, "scf" if name == "pw.x" else "projwfc")
        if "Au" in atoms.symbols:
            raise ElectronicStructureError("the SCF calculation did not converge", directory / "scf.out")
        return computed(atoms)

    batch.compute_in = compute
    labels.SHARD_SIZE = 5
    os.environ["PATH"] = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    os.environ["ESPRESSO_PSEUDO"] = str(home / "upf")


def dft_in(folder: Path) -> list[object]:
    return ["dft", folder.parent / "given.extxyz", "-j", 2, "-o", folder / "dft"]


def records(folder: Path) -> dict[str, Any]:
    """Each structure's result, and the logs of what failed, whose places are told."""
    return {name: content.replace(str(folder).encode(), b"") for name, content in every_file(folder).items()}


def labelled(folder: Path) -> dict[str, Any]:
    """Labels and failures by id, however they are packed; each must be there once."""
    import numpy as np

    from dosmatgen_ase.data import load_site_dos

    found: Counter[str] = Counter()
    for path in (folder / "shards").glob("*.npz"):
        with np.load(path) as shard:
            found.update(shard["material_id"].tolist())
            found.update(f"failed {name}" for name in shard["failed_id"].tolist())
    left = (folder / "shards" / "unpacked").iterdir()
    found.update(f"failed {path.stem}" for path in left if path.name != ".lock")
    read = load_site_dos(folder / "shards")
    values = {name: read.values[i].tobytes() for i, name in enumerate(read.material_id.tolist())}
    others = [path.name for path in folder.rglob("*") if path.is_file() and path.suffix not in (".npz", ".json")]
    return {"times": dict(sorted(found.items())), "others": sorted(others), **values}


# -- train -------------------------------------------------------------------------------------------------------------


def data_in(home: Path) -> None:
    """Some rows of the repository's data: 30 labelled structures, and 6 without a label."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from dosmatgen_ase.data import SHARD_KEYS

    tiny_models(home)
    (home / "data" / "site_dos").mkdir(parents=True)
    with np.load(min((ROOT / "data" / "site_dos").glob("*.npz"))) as shard:
        full = {key: shard[key] for key in SHARD_KEYS}
    rows = np.flatnonzero(full["split"] == "train")[:30]
    starts, ends = full["atom_offset"][rows], full["atom_offset"][rows + 1]
    sites = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
    per_site = ("atomic_numbers", "frac_coords", "site_dos")
    kept = {
        k: v if k == "energies" else v[sites] if k in per_site else v[rows] for k, v in full.items() if "off" not in k
    }
    offset = np.concatenate([[0], np.cumsum(ends - starts)])
    np.savez(home / "data" / "site_dos" / "a.npz", atom_offset=offset, **kept)
    table = pq.read_table(ROOT / "data" / "structures.parquet")
    some = pc.is_in(table["material_id"], pa.array(kept["material_id"].tolist()))
    bare = table.filter(pc.and_(pc.equal(table["split"], "train"), pc.invert(some))).slice(0, 6)
    pq.write_table(pa.concat_tables([table.filter(some), bare]), home / "data" / "structures.parquet")
    network = {"width": 16, "pair_width": 16, "vector_channels": 4, "num_layers": 1, "num_radial": 8}
    config = {"steps": 120, "warmup_steps": 3, "max_pairs": 64, "draws_per_epoch": 32, "save_every": 7}
    (home / "config.json").write_text(json.dumps({**config, "network": network}))


def train_in(folder: Path) -> list[object]:
    home = folder.parent
    predicted = ["--pseudo-labels", "auto", "--predictor", home / "predictor.safetensors"]
    where = ["--data", home / "data", "--out", folder / "run", "--device", "cpu"]
    return ["train", "--config", home / "config.json", *where, *predicted]


def trained(folder: Path) -> dict[str, Any]:
    """All files to the last bit; of the log the steps, as its means and seconds are of what one process did."""
    found = every_file(folder)
    log = found.pop("run/log.jsonl").decode()
    return {**found, "steps": [json.loads(line)["step"] for line in log.splitlines()]}


CASES = {
    "generate": Case(tiny_models, lambda folder: generate_in(folder, "out.extxyz"), every_file),
    "generate-cif": Case(tiny_models, lambda folder: generate_in(folder, "out.cif"), every_file),
    "relax": Case(crystals_in, lambda folder: relax_in(folder, 1), every_file),
    "relax-j2": Case(crystals_in, lambda folder: relax_in(folder, 2), every_file),
    "dft": Case(programs_in, dft_in, records),
    "dft-real": Case(real_crystals_in, dft_in, records),
    "label": Case(
        programs_in,
        lambda folder: ["label", folder.parent / "given.extxyz", "--jobs", 2, "--shards", folder / "shards"],
        labelled,
    ),
    "train": Case(data_in, train_in, trained),
}


# -- runs --------------------------------------------------------------------------------------------------------------


def warm(name: str, home: Path) -> None:
    """Load what the command will need."""
    import torch

    import dosmatgen_ase.cli.commands
    from dosmatgen_ase.forward.features import _observed_chgnet
    from dosmatgen_ase.judge import relaxed_file
    from dosmatgen_ase.judge.stability import load_hull
    from dosmatgen_ase.retrieval.index import default_index

    torch.set_num_threads(1)
    relaxed_file._SAVE_EVERY = 0.1
    if name in ("dft", "label"):
        stand_in(home)
    elif name != "dft-real":
        _observed_chgnet()
    if name.startswith("generate"):
        default_index()
    if name.startswith("relax"):
        load_hull()
    assert dosmatgen_ase.cli.commands.app


class Changes:
    """Counts the changes of files in a folder by this process, and ends it right before one of them."""

    def __init__(self, folder: Path, last: int | None) -> None:
        self.folder, self.last, self.count = str(folder), last, 0
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event in CHANGES) or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        if os.fsdecode(arguments[0]).startswith(self.folder):
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)


def start(arguments: list[object], folder: Path, last: int | None = None) -> int:
    """Fork a process that runs a command; it is killed before it changes a file for the `last` time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which wait for work
        process = os.fork()
    if process:
        return process
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ[MARK] = folder.name
    changes, code = Changes(folder, last), 99
    try:
        from dosmatgen_ase.cli import app

        app([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        folder.with_suffix(".count").write_text(str(changes.count))
        sys.stdout.flush()
        os._exit(code)


def orphans(folder: Path) -> list[int]:
    """Processes that a command of this folder has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={folder.name}\0".encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def ended(folder: Path) -> list[int]:
    """Wait until all that a command started has ended; what does not is killed, and returned."""
    deadline = time.monotonic() + PATIENCE
    while left := orphans(folder):
        if time.monotonic() > deadline:
            for process in left:
                os.kill(process, signal.SIGKILL)
            return left
        time.sleep(0.01)
    return []


def finished(process: int, seconds: float | None) -> int | None:
    """Exit code of a process; None if it was killed, after so many seconds or by itself."""
    deadline = time.monotonic() + (seconds if seconds is not None else 600)
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of what is lost, left over, or other."""
    told = [f"lost: {name}" for name in expected.keys() - found.keys()]
    told += [f"left over: {name}" for name in found.keys() - expected.keys()]
    return told + [f"other: {name}" for name in expected.keys() & found.keys() if found[name] != expected[name]]


def kill_often(name: str, kills: int, seed: int) -> dict[str, Any]:
    """Return how often a command was killed and started, and what was wrong."""
    case, rng = CASES[name], random.Random(seed)
    home = Path(tempfile.mkdtemp(prefix=f"kills-{name}-"))
    case.prepare(home)
    warm(name, home)
    alone = home / "alone"
    alone.mkdir()
    begun = time.monotonic()
    if finished(start(case.arguments(alone), alone), None) != 0:
        raise RuntimeError((home / "alone.log").read_text())
    length, changes = time.monotonic() - begun, int((home / "alone.count").read_text())
    expected, faults = case.results(alone), []
    killed = rounds = runs = 0
    while killed < kills and len(faults) < 10:
        folder = home / f"round-{rounds}"
        folder.mkdir()
        code, rounds = None, rounds + 1
        while code is None:
            last = rng.randint(1, changes) if rng.random() < 0.5 else None
            moment = rng.uniform(0, length) if last is None else None
            if killed >= kills:
                last = moment = None
            code, runs = finished(start(case.arguments(folder), folder, last), moment), runs + 1
            killed += code is None
            if left := ended(folder):
                faults.append(f"{folder.name}: {len(left)} orphans")
            if code is None and killed > 2 * kills:
                raise RuntimeError(f"it does not end: {folder.with_suffix('.log').read_text()}")
        if code != 0:
            faults.append(f"{folder.name}: exit code {code}: {folder.with_suffix('.log').read_text()[-500:]}")
        else:
            faults += [f"{folder.name}: {told}" for told in differences(case.results(folder), expected)]
        if not faults:
            shutil.rmtree(folder)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    if not faults:
        shutil.rmtree(home)
    return {
        "command": name,
        "kills": killed,
        "runs": runs,
        "rounds": rounds,
        "seconds_alone": round(length, 2),
        "changes_alone": changes,
        "cpu_seconds": round(sum(u.ru_utime + u.ru_stime for u in used), 1),
        "faults": faults,
        "folder": str(home) if faults else None,
    }


def main() -> None:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("command", choices=CASES)
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    told = kill_often(given.command, given.kills, given.seed)
    print(json.dumps(told, indent=1))
    sys.exit(bool(told["faults"]))


if __name__ == "__main__":
    main()
