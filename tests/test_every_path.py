"""Every command with every path equal to every other: a file of the user changes only where the command says so."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, get_type_hints

import ase.io
import pytest
from ase.build import bulk
from typer.models import ArgumentInfo
from typer.testing import CliRunner

import dosmatgen_ase.retrieval.query
import dosmatgen_ase.train.recipe  # noqa: F401 -- both bind what is replaced below, which must not be the replacement
from dosmatgen_ase import TargetDOS
from dosmatgen_ase.cli import app

TARGET = TargetDOS.from_peaks([(-0.65, 6.0, 0.3)], window=(-3, 1))
TEXTS = {"weights", "calculator", "relax", "pseudo_labels", "order"}  # declared as text, and may be paths
COMMANDS: dict[str, Any] = {
    c.name or str(c.callback.__name__): c.callback for c in app.registered_commands if c.callback
}


def parameters(name: str) -> dict[str, tuple[Any, bool]]:
    """Type of each parameter of a command, and whether it stands without the name of an option."""
    found = {}
    for key, hint in get_type_hints(COMMANDS[name], include_extras=True).items():
        if key != "return":
            kinds = getattr(hint, "__metadata__", ())
            found[key] = hint, any(isinstance(kind, ArgumentInfo) for kind in kinds)
    return found


def paths_of(name: str) -> list[str]:
    """The parameters of a command that may hold a path."""
    return [key for key, (hint, _) in parameters(name).items() if "Path" in str(hint) or key in TEXTS]


CASES = [
    (name, first, second) for name in sorted(COMMANDS) for first, second in itertools.combinations(paths_of(name), 2)
]


def test_the_walk_knows_the_paths_of_every_command() -> None:
    assert {name for name, *_ in CASES} == set(COMMANDS)
    known = {(name, path) for name, *pair in CASES for path in pair}
    assert {("generate", "dos_file"), ("generate", "out"), ("generate", "template"), ("train", "init")} <= known
    assert {("label", "shards"), ("index", "parts"), ("dft", "pseudo_dir"), ("report", "result")} <= known


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of the user, in every format that a command takes, and an honest value of every path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no pw.x: a command that would compute ends there
    Path("dos.json").write_text(json.dumps(TARGET.to_dict()))
    ase.io.write("salt.extxyz", bulk("NaCl", "rocksalt", a=5.6))
    Path("config.json").write_text('{"steps": 1}')
    return tmp_path


HONEST = {"dos_file": "dos.json", "files": "salt.extxyz", "structures": "salt.extxyz", "template": "salt.extxyz"}
HONEST |= {"config": "config.json", "result": "dos.json"}
SHARED = {"dos_file": "dos.json", "files": "salt.extxyz", "structures": "salt.extxyz", "config": "config.json"}
SHARED |= {"template": "salt.extxyz", "result": "dos.json"}


def arguments(name: str, values: dict[str, str]) -> list[str]:
    """A command line that gives these values, and an honest one wherever one is needed."""
    line: list[str] = []
    for key, (_, positional) in parameters(name).items():
        value = values.get(key) or (HONEST.get(key) if positional or key == "config" else None)
        if value is not None:
            line += [value] if positional else [f"--{key.replace('_', '-')}", value]
    return line


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize(("name", "first", "second"), CASES, ids=lambda value: str(value))
def test_no_file_of_the_user_changes(
    name: str, first: str, second: str, overwrite: bool, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = next((SHARED[part] for part in (first, second) if part in SHARED), "notes.txt")
    if shared == "notes.txt":
        Path(shared).write_text("the only copy\n")
    line = arguments(name, {first: shared, second: shared})
    if overwrite and "overwrite" in parameters(name):
        line.append("--overwrite")
    before = {path: path.read_bytes() for path in home.iterdir() if path.is_file()}
    stop_before_the_work(monkeypatch)
    done = CliRunner().invoke(app, [name, *line])
    if not (overwrite and shared == "notes.txt"):  # which is told to go
        assert {path: path.read_bytes() for path in before} == before, line
    assert done.exit_code in (1, 2), (line, done.output)
    assert done.stderr.count("\n") <= 2, done.stderr
    assert "unexpected" not in done.stderr, done.stderr


class Reached(RuntimeError):
    """The checks are over and the work would begin, with a path that may be written."""


def stop_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the checks takes seconds each, and writes outputs alone."""

    def stop(*_: Any, **__: Any) -> Any:
        raise Reached("the work begins")

    for place in (
        "generate.generator.DOSGenerator.__init__", "judge.relaxed_file.relax_into", "forward.predictor.predict_dos",
        "retrieval.index.default_index", "retrieval.build.build_index", "train.trainer.train",
        "forward.predictor_training.train_predictors", "dft.batch.compute_many", "dft.labels.label",
    ):  # fmt: skip
        monkeypatch.setattr(f"dosmatgen_ase.{place}", stop)
