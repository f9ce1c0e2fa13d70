"""Damaged and hostile files: a small share on every run, ten minutes of it with ``pytest -m fuzz``.

It runs in a process of its own, which hears of code that runs and files that change. `run.py` runs one case again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).with_name("run.py")


def told_by(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(RUN), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_a_share_of_damaged_files(tmp_path: Path) -> None:
    told = told_by(tmp_path, "--count", 300)
    assert told["faults"] == []
    assert told["cases"] == 300
    assert told["read"] > 30, "changes that no reader survives tell nothing"
    assert told["refused"] > 100


@pytest.mark.fuzz
def test_damaged_files(tmp_path: Path) -> None:
    assert told_by(tmp_path, "--count", 12_000, "--seed", 1, "--jobs", 2)["faults"] == []


@pytest.mark.fuzz
def test_hostile_crystals(tmp_path: Path) -> None:
    assert told_by(tmp_path, "--only", "crystals", "--count", 2000, "--jobs", 2)["faults"] == []


BODIES = {
    "KeyError": "raise KeyError(path)",
    "code: pickle.find_class": "__import__('pickle').loads(__import__('pickle').dumps(Path()))",
    "code: os.system": "__import__('os').system('true')",
    "code: wrote": "Path('../probe').open('a').close()",
    "memory: ": "bytearray(2 * 10**9)",
    "asks for memory": "raise ValueError('Unable to allocate 7.45 GiB for an array')",
    "ended by 3": "__import__('os')._exit(3)",
}


def test_the_tool_finds_what_it_looks_for(tmp_path: Path) -> None:
    """With readers that are at fault in one way each."""
    (tmp_path / "mutators.py").write_text("CANARY = 'canary'\ndef mutate(data, rng):\n    return data + b'x'\n")
    lines = ["from pathlib import Path", "from types import SimpleNamespace", "READERS = {}"]
    for i, body in enumerate(BODIES.values()):
        lines += [f"def read(path):\n    if path.read_bytes() != b'a': {body}"]
        made = "seeds=lambda: {'a': b'a'}, read=read, raises=(ValueError,), weight=1, make=None"
        lines += [f"READERS['{i}'] = SimpleNamespace({made})"]
    (tmp_path / "readers.py").write_text("\n".join(lines))
    (tmp_path / "run.py").write_text(RUN.read_text())
    command = [sys.executable, "run.py", "--count", str(len(BODIES))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    found = json.loads(done.stdout)["faults"]
    assert len(found) == len(BODIES)
    for told, fault in zip(found, BODIES, strict=True):
        assert fault in told["fault"]
