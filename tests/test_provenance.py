"""Results say which state of the code made them, and never that of somebody else's repository."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dosmatgen_ase.provenance import commit_of


def git(folder: Path, *command: str) -> str:
    who = ("-c", "user.name=x", "-c", "user.email=x@x")
    return subprocess.run(["git", "-C", folder, *who, *command], check=True, capture_output=True, text=True).stdout


def test_the_commit_is_that_of_the_clone_that_tracks_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, beside = tmp_path / "module.py", tmp_path / "installed.py"
    file.write_text("x = 1")
    beside.write_text("y = 1")
    assert commit_of(file) is None, "no repository"
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "module.py")
    git(tmp_path, "commit", "-qm", "x")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    git(tmp_path, "tag", "-am", "x", "v1")
    assert commit_of(file) == commit
    assert commit_of(beside) is None, "a package in an environment inside of a user's repository"
    file.write_text("x = 2")
    assert commit_of(file) == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert commit_of(file) is None, "no git"
