"""Feed every reader with damaged and hostile files, and tell what it should not have done.

    python tests/fuzz/run.py --count 20000 --jobs 2          # the whole, about half an hour of CPU time
    python tests/fuzz/run.py --only crystals --count 2000    # 200 hostile crystals into all that takes crystals
    python tests/fuzz/run.py --only dos --first 1234 --count 1 --debug   # one case again, with its traceback

A fault is an exception that is not documented or does not name its file, more than 5 s of CPU time, more than 1.5 GB,
or code that ran: a canary, an unpickled or imported class, a program, a connection, a file outside the case's folder.
The cases are numbered: a number and a seed give the same bytes everywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PATHS = [str(HERE), str(HERE.parent), *(str(HERE.parents[1] / name) for name in ("src", "scripts", "benchmarks"))]
MAX_SECONDS, MAX_BYTES, PATIENCE = 5.0, 1.5e9, 240.0  # CPU time; resident; by the clock, until a process counts as hung
RAN = {
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn",
    "pickle.find_class", "socket.connect", "urllib.Request", "ftplib.connect", "code.__new__", "ctypes.dlopen",
}  # fmt: skip
CHANGED = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink", "shutil.rmtree"}


LOG: list[Any] = []  # the file of --log


class Watch:
    """Hears of code that runs and files that change, by Python's audit events, while a case is read."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.heard: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in RAN and not (event == "ctypes.dlopen" and "site-packages" in str(arguments)):
            self.heard.append(f"{event} {str(arguments)[:200]}")
        elif event == "import" and "canary" in str(arguments[0]):
            self.heard.append(f"import {arguments[0]}")
        elif event == "open" and len(arguments) == 3 and isinstance(arguments[2], int):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR) and not self._inside(arguments[0]):
                self.heard.append(f"wrote {arguments[0]}")
        elif event in CHANGED and not self._inside(arguments[0]):
            self.heard.append(f"{event} {arguments[0]}")

    def _inside(self, path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return True  # a descriptor
        place = os.path.normpath(os.path.join(os.getcwd(), os.fsdecode(path)))  # noqa: PTH109, PTH118 -- it may not exist
        return place.startswith((str(self.folder), "/dev/", "/proc/")) or "__pycache__" in place


def chosen(names: list[str], index: int) -> str:
    """The reader of a case: in turn, by weight."""
    from readers import READERS

    wheel = [name for name in names for _ in range(max(READERS[name].weight, len(names) == 1))]
    return wheel[index % len(wheel)]


def run_case(names: list[str], seed: int, index: int, watch: Watch, debug: bool) -> dict[str, Any]:
    """Make the file of a case and read it."""
    from mutators import CANARY, mutate
    from readers import READERS

    name, rng = chosen(names, index), random.Random(f"{seed} {index}")
    seeds = READERS[name].seeds()
    make, file = READERS[name].make, rng.choice(sorted(seeds))
    if make is not None:  # each of them for every taker
        file, rng = sorted(seeds)[index % len(seeds)], random.Random(f"{seed} {index // len(seeds)}")
    folder = Path(tempfile.mkdtemp(prefix="case-", dir="."))
    path = (folder / file).resolve()
    path.write_bytes(mutate(seeds[file], rng) if make is None else make(rng))
    told: dict[str, Any] = {"index": index, "reader": name, "file": file}
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory from here on
    os.chdir(folder)
    begun = time.process_time()
    watch.heard.clear()
    watch.folder = str(path.parent)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[name].read(path)
        told["outcome"] = "read"
    except READERS[name].raises as error:
        told["outcome"] = type(error).__name__
        if re.search(r"llocate [\d.]+ [GT]iB", str(error)):  # what no machine has costs nothing
            told["fault"] = f"asks for memory: {str(error)[:200]}"
        if debug:
            traceback.print_exc()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        place = [frame for frame in traceback.extract_tb(error.__traceback__) if "dosmatgen_ase" in frame.filename]
        where = f"{Path(place[-1].filename).name}:{place[-1].lineno}" if place else "?"
        told["outcome"], told["fault"] = "fault", f"{type(error).__name__} at {where}: {str(error)[:200]}"
        if debug:
            traceback.print_exc()
    finally:
        watch.folder = None
        os.chdir("..")
    told["seconds"] = round(time.process_time() - begun, 3)
    told["megabytes"] = peak() // 10**6
    if watch.heard or (folder / CANARY).exists():
        told["fault"] = f"code: {'; '.join(watch.heard[:3]) or 'the canary is there'}"
    else:  # both, where both are: on a busy machine much memory also takes long
        costs = [f"slow: {told['seconds']} s"] if told["seconds"] > MAX_SECONDS else []
        costs += [f"memory: {told['megabytes']} MB"] if told["megabytes"] * 10**6 > MAX_BYTES else []
        if costs:
            told["fault"] = "; ".join(costs)
    shutil.rmtree(folder)
    return told


def peak() -> int:
    """Most resident bytes since the case began."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def work(names: list[str], seed: int, indices: range, debug: bool) -> None:
    """Run cases and print what became of each, one JSON object a line."""
    sys.path[:0] = PATHS
    import torch
    from readers import READERS

    os.environ["MPLCONFIGDIR"] = str(Path.cwd())
    import matplotlib.figure  # noqa: F401 -- it makes folders when it is loaded

    torch.set_num_threads(1)
    for name in names:
        READERS[name].seeds()
        for file, content in READERS[name].seeds().items():
            (honest := Path(tempfile.mkdtemp(prefix="honest-", dir=".")) / file).write_bytes(content)
            READERS[name].read(honest.resolve())  # it reads what is honest, and loads its libraries
            shutil.rmtree(honest.parent)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 10**9, -1))  # a bomb ends its case, not the machine
    watch = Watch()
    for index in indices:
        print(json.dumps({"begun": index}), flush=True)
        print(json.dumps(run_case(names, seed, index, watch, debug)), flush=True)


def results_of(names: list[str], seed: int, first: int, count: int, step: int, debug: bool) -> Iterator[dict[str, Any]]:
    """Run every step-th case in a process that is started anew where one ends or hangs."""
    index = first
    while index < count:
        arguments = ["--worker", "--seed", str(seed), "--first", str(index), "--count", str(count), "--step", str(step)]
        command = [sys.executable, __file__, *arguments, *(["--debug"] if debug else []), "--only", *names]
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
            begun = None
            for told in _lines(process):
                begun = told.get("begun")
                if begun is None:
                    if LOG:
                        print(json.dumps(told), file=LOG[0], flush=True)
                    yield told
                    index = told["index"] + step
        if process.returncode and begun is None:
            raise RuntimeError(f"the process of case {index} ended with {process.returncode} before it began")
        if begun is not None:
            yield {"index": begun, "reader": chosen(names, begun), "fault": f"ended by {process.returncode}, or hung"}
            index = begun + step


def _lines(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """What a process prints, until it ends; one that is silent for too long is killed."""
    lines: queue.Queue[str | None] = queue.Queue()

    def listen() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=PATIENCE)
        except queue.Empty:
            process.kill()
            continue
        if line is None:
            process.wait()
            return
        yield json.loads(line)


def fuzz(
    count: int, seed: int = 0, jobs: int = 1, only: list[str] | None = None, debug: bool = False
) -> dict[str, Any]:
    """Run cases 0 to `count` and return figures and faults."""
    sys.path[:0] = PATHS
    from concurrent.futures import ThreadPoolExecutor

    from readers import READERS

    names = only or [name for name, reader in READERS.items() if reader.weight]
    with ThreadPoolExecutor(jobs) as pool:
        parts = pool.map(lambda j: list(results_of(names, seed, j, count, jobs, debug)), range(jobs))
    return summary([told for part in parts for told in part], seed)


def summary(found: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Figures of all cases, and the faults."""
    return {
        "seed": seed,
        "cases": len(found),
        "cases_by_reader": dict(Counter(told["reader"] for told in found)),
        "read": sum(told.get("outcome") == "read" for told in found),
        "refused": sum(told.get("outcome") not in ("read", "fault", None) for told in found),
        "most_seconds": max(told.get("seconds", 0) for told in found),
        "most_megabytes": max(told.get("megabytes", 0) for told in found),
        "faults": [told for told in found if "fault" in told],
    }


def main() -> None:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--count", type=int, default=20_000, help="cases")
    options.add_argument("--first", type=int, default=0, help="number of the first case")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--jobs", type=int, default=1, help="processes")
    options.add_argument("--only", nargs="*", help="readers, by name; default: all")
    options.add_argument("--debug", action="store_true", help="show tracebacks")
    options.add_argument("--log", type=Path, help="file that gets what became of each case, one JSON object a line")
    options.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("--step", type=int, default=1, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.worker:
        work(given.only, given.seed, range(given.first, given.count, given.step), given.debug)
        return
    if given.log is not None:
        LOG.append(given.log.open("a"))
    if given.first:
        sys.path[:0] = PATHS
        from readers import READERS

        names = given.only or [name for name, reader in READERS.items() if reader.weight]
        last = given.first + given.count
        told = summary(list(results_of(names, given.seed, given.first, last, 1, given.debug)), given.seed)
    else:
        told = fuzz(given.count, given.seed, given.jobs, given.only, given.debug)
    print(json.dumps(told, indent=1))
    sys.exit(bool(told["faults"]))


if __name__ == "__main__":
    main()
