"""README, constraints and metadata agree with the code and with each other."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from update_readme import with_includes

from dosmatgen_ase.forward.predictor import DOSPredictor
from dosmatgen_ase.model.checkpoint import DEFAULT_WEIGHTS, load_model

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "dosmatgen_ase"
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GROUPS = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
DECLARED = [Requirement(line) for group in GROUPS for line in group]


def test_readme_holds_the_benchmark_tables_as_they_are() -> None:
    assert "<!-- include:" in README
    assert with_includes(README) == README, "run python scripts/update_readme.py"


def test_includes_are_replaced_and_unclosed_ones_refused(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("new\n")
    text = "x\n<!-- include: a.md -->\nold\n<!-- /include -->\ny <!-- include: b.md -->\n<!-- /include -->\n"
    replaced = with_includes(text, tmp_path)
    assert replaced.startswith("x\n<!-- include: a.md -->\nnew\n<!-- /include -->\ny")
    assert "old" not in replaced
    assert "`b.md` is missing" in replaced
    assert with_includes(replaced, tmp_path) == replaced
    for broken in ("<!-- include: a.md -->\n", "<!-- /include -->", "<!-- include: a.md -->x<!-- /include -->"):
        with pytest.raises(ValueError, match="not closed"):
            with_includes(broken, tmp_path)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^bash (\S+)$", README, re.MULTILINE))))
def test_readme_commands_are_valid_shell(command: str) -> None:
    subprocess.run(["bash", "-n", command], cwd=ROOT, check=True)


@pytest.mark.skipif(not (SOURCE / "weights" / "default.safetensors").exists(), reason="no weights yet")
def test_readme_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert blocks
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(block, namespace)
    assert len(namespace["many"]) == 8


def test_continuous_integration_runs_what_the_readme_says() -> None:
    assert "bash scripts/test.sh" in README
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_constraints_pin_every_requirement_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    for requirement in DECLARED:
        name = canonicalize_name(requirement.name)
        if name != PROJECT["name"]:
            assert name in pins, f"{name} is not pinned"
            assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} is outside {requirement}"


def test_every_library_that_the_source_imports_is_declared() -> None:
    distributions = packages_distributions()
    declared = {canonicalize_name(requirement.name) for requirement in DECLARED}
    imported = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                imported.add(node.module.split(".")[0])
    outside = imported - set(sys.stdlib_module_names) - {"dosmatgen_ase"}
    undeclared = {
        name for name in outside if not declared & {canonicalize_name(owner) for owner in distributions.get(name, [])}
    }
    assert not undeclared


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_results_are_of_the_models_that_ship(path: Path) -> None:
    report = json.loads(path.read_text())
    if "weights" in report:
        assert report["weights"] in ("default", load_model(DEFAULT_WEIGHTS)[1]["sha256"])
    if "judge" in report and isinstance(report["judge"], dict):
        assert report["judge"] == DOSPredictor.load(ROOT / "benchmarks" / "judge.safetensors").info
