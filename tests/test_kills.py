"""Commands that are killed lose and double nothing, and what they started ends with them, whatever ends them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ase.io
import kills
import pytest
from ase.build import bulk

KILLS = int(os.environ.get("DOSMATGEN_KILLS", "100"))
"""Of each command; a tenth of it where another case of the same command has the whole."""


def killed(name: str, count: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(kills.__file__)), name, "--kills", str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generate", "generate-cif", "relax", "relax-j2", "dft", "label", "train"])
def test_a_command_that_is_killed_loses_and_doubles_nothing(name: str) -> None:
    count = max(1, KILLS // 10) if "-" in name else KILLS
    told = killed(name, count)
    assert told["faults"] == []
    assert told["kills"] == count


@pytest.mark.dft
def test_dft_that_is_killed_loses_and_doubles_nothing() -> None:
    assert killed("dft-real", max(1, KILLS // 20))["faults"] == []


def careful(arguments: list[str]) -> None:
    """Write ten files, each in one piece, and go on where it was."""
    for i in range(10):
        path = Path(arguments[0]) / f"{i}"
        if not path.exists():
            path.with_suffix(".part").write_text(f"{i}")
            path.with_suffix(".part").rename(path)


def careless(arguments: list[str]) -> None:
    """Note what is done before it is."""
    for i in range(10):
        path = Path(arguments[0]) / f"{i}"
        if not path.exists():
            path.touch()
            path.write_text(f"{i}")


@pytest.mark.parametrize(("command", "sound"), [(careful, True), (careless, False)])
def test_the_tool_finds_what_is_lost(command: Any, sound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: list[str]) -> None:
        command(arguments)
        raise SystemExit(0)

    case = kills.Case(lambda _: None, lambda folder: [folder], kills.every_file)
    monkeypatch.setitem(kills.CASES, "made up", case)
    monkeypatch.setattr(kills, "warm", lambda *_: None)
    monkeypatch.setattr("dosmatgen_ase.cli.app", run, raising=False)
    told = kills.kill_often("made up", 30, 0)  # of ten, now and then none hits the careless one between two steps
    assert told["kills"] == 30 or len(told["faults"]) == 10
    assert (told["faults"] == []) == sound, told


# -- orphans -----------------------------------------------------------------------------------------------------------


def default_signals() -> None:
    """A job in the background of a shell ignores Ctrl-C, and one under nohup the end of its terminal."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("command", ["relax", "dft", "label"])
def test_nothing_outlives_a_command(command: str, end: signal.Signals, tmp_path: Path) -> None:
    kills.programs_in(tmp_path)
    for name in ("pw.x", "projwfc.x"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\nexec sleep 600\n")
    ase.io.write(tmp_path / "given.extxyz", [bulk("Cu", cubic=True) * 2, bulk("Al", cubic=True) * 2] * 20)
    arguments = {
        "relax": ["--fmax", "1e-9", "--max-steps", "100000", "-j", "2", "-o", str(tmp_path / "relaxed.extxyz")],
        "dft": ["-j", "2", "-o", str(tmp_path / "dft")],
        "label": ["--jobs", "2", "--shards", str(tmp_path / "shards")],
    }
    if command == "label":  # crystals of 20 atoms at most
        ase.io.write(tmp_path / "given.extxyz", [bulk("Cu"), bulk("Al"), bulk("Ni")])
    environment = {**os.environ, kills.MARK: tmp_path.name, "PYTHONPATH": str(kills.ROOT / "src")}
    environment |= {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"ESPRESSO_PSEUDO": str(tmp_path / "upf")}
    line = [sys.executable, "-m", "dosmatgen_ase.cli", command, str(tmp_path / "given.extxyz"), *arguments[command]]
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(line, stdout=err, stderr=err, env=environment, preexec_fn=default_signals)
    try:
        deadline = time.monotonic() + 120
        while len(busy(tmp_path, process.pid)) < 2:
            assert process.poll() is None, (tmp_path / "err").read_text()
            assert time.monotonic() < deadline, kills.orphans(tmp_path)
            time.sleep(0.1)
        process.send_signal(end)
        process.wait(60)
        assert kills.ended(tmp_path) == []
    finally:
        process.kill()
        process.wait()
    said = (tmp_path / "err").read_text()
    assert "Traceback" not in said
    assert process.returncode == (130 if end == signal.SIGINT else -end)


def busy(folder: Path, parent: int) -> list[int]:
    """Processes at work for a command: those that sleep for the programs, and others that have computed for a while."""
    found = []
    for process in kills.orphans(folder):
        try:
            told = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            program = Path(f"/proc/{process}/cmdline").read_bytes()
        except OSError:
            continue
        ticks = int(told[11]) + int(told[12])
        if process != parent and (program.startswith(b"sleep") or (b"spawn_main" in program and ticks > 300)):
            found.append(process)
    return found
