"""Many threads and several processes on one machine: the results of one alone, and nothing changed for the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import at_once
import pytest


def started(threads: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}  # a number that could change
    command = [sys.executable, at_once.__file__, str(threads)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def told_by(process: subprocess.Popen[str]) -> dict[str, Any]:
    said, _ = process.communicate()
    return json.loads(said)


@pytest.fixture(scope="module")
def alone() -> dict[str, str]:
    found = told_by(started(1))["found"]
    assert len(set(found.values())) == 12, "four are asked for twice"
    assert all(len(digest) == 16 and " " not in digest for digest in found.values()), found
    return found


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(3))
def test_sixteen_threads_get_what_one_gets(alone: dict[str, str], turn: int) -> None:
    told = told_by(started(16))
    assert told["found"] == alone
    assert told["changed"] == []
    assert told["megabytes"] < 1500


@pytest.mark.slow
def test_four_processes_of_four_threads_get_what_one_gets(alone: dict[str, str]) -> None:
    processes = [started(4) for _ in range(4)]
    for told in map(told_by, processes):
        assert told["found"] == alone
        assert told["changed"] == []
