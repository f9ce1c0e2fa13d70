"""README, constraints and metadata agree with the code and with each other."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dosmatgen_ase
from dosmatgen_ase.forward.predictor import DOSPredictor
from dosmatgen_ase.model.checkpoint import DEFAULT_WEIGHTS, load_model

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "dosmatgen_ase"
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GROUPS = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
SUPPORTED = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
DECLARED = [Requirement(line) for group in GROUPS for line in group]


def test_readme_is_short() -> None:
    assert README.count("\n") <= 150


DOCS = ROOT / "docs"
PAGES = [path for path in DOCS.rglob("*.md") if "_build" not in path.parts]


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / link).exists() or (page.parent / f"{link}.md").exists(), link


def test_every_benchmark_table_is_in_the_documentation() -> None:
    included = "".join(path.read_text() for path in (DOCS / "benchmarks").glob("*.md"))
    for script in (ROOT / "benchmarks").glob("[!_]*.py"):
        assert f"{{include}} ../../benchmarks/results/{script.stem}.md" in included


def test_the_numbers_of_the_readme_are_those_of_the_tables() -> None:
    results = {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    dft = results["dft_judge"]["tables"]["all sites"]
    (cost,) = (r for r in results["cost"]["rows"] if (r["num_atoms"], r["batch"]) == (4, 16))
    told = re.findall(r"^\|.*\| ([\d.]+)(?: %)? \| \[", README, re.MULTILINE)
    assert told == [
        f"{dft['conditional, ranked']['l1']['value']:.2f}",
        f"{dft['per-element mean']['l1']['value']:.2f}",
        f"{100 * results['round_trip']['elements']['conditional']['value']:.0f}",
        f"{100 * results['stability']['rows']['generated, relaxed']['metastable']:.0f}",
        f"{cost['ours_cpu_s']:.3f}",
    ]


def test_the_numbers_of_the_overview_are_those_of_the_tables() -> None:
    lines = [x for x in (DOCS / "benchmarks" / "index.md").read_text().splitlines() if x.endswith(".md) |")]
    assert len(lines) > 5
    for line in lines:
        page = line.rpartition("](")[2].removesuffix(".md) |")
        table = (ROOT / "benchmarks" / "results" / f"{page}.md").read_text()
        cells = " ".join(line.split("|")[3:6])
        numbers = re.findall(r"-?\d+\.\d+(?: \[[^]]*\])?", cells)
        assert numbers, line
        assert [number for number in numbers if number not in table] == [], line


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "reference" / "api.md").read_text()
    for name in set(dosmatgen_ase.__all__) - {"__version__"}:
        assert re.search(rf"^\.\. auto(?:class|function):: {name}$", text, re.MULTILINE), name
        assert re.search(rf"^   {name}$", text, re.MULTILINE), name


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


@pytest.mark.parametrize("page", ["reference/api", "howto/potentials", "howto/pyg"])
def test_python_of_the_documentation_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})


@pytest.mark.parametrize("script", ["test", "docs", "package", "test_dft"])
def test_continuous_integration_runs_what_contributors_are_told(script: str) -> None:
    assert f"bash scripts/{script}.sh" in (ROOT / "CONTRIBUTING.md").read_text()
    assert f"bash scripts/{script}.sh" in (ROOT / ".ci" / "run").read_text()


def pins_on(python: str) -> dict[str, str]:
    """Pinned version of each package on a Python version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [p for p in pinned if p.marker is None or p.marker.evaluate({"python_version": python})]
    assert len({p.name for p in here}) == len(here), "a package is pinned twice"
    return {p.name: str(p.specifier).removeprefix("==") for p in here}


def test_constraints_differ_by_python_only_where_a_package_does() -> None:
    old, middle, new = map(pins_on, SUPPORTED)
    assert middle == new
    assert {name for name in old | new if old.get(name) != new.get(name)} == {"atomate2"}


@pytest.mark.parametrize("python", SUPPORTED)
def test_constraints_pin_every_requirement_within_its_range(python: str) -> None:
    pins = pins_on(python)
    assert pins["torch"] == "2.13.0"
    for requirement in DECLARED:
        name = canonicalize_name(requirement.name)
        if name != PROJECT["name"]:
            assert name in pins, f"{name} is not pinned"
            assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} is outside {requirement}"


def test_citation_and_recipe_follow_the_package() -> None:
    version = re.search(r'__version__ = "(.+)"', (SOURCE / "__init__.py").read_text())
    assert version is not None
    assert f"\nversion: {version[1]}\n" in (ROOT / "CITATION.cff").read_text()
    run = (ROOT / "recipe" / "meta.yaml").read_text().partition("  run:\n")[2].partition("\n\n")[0]
    recipe = {Requirement(line.strip().removeprefix("- ")) for line in run.splitlines()}
    conda_names = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
    wanted = {Requirement(line) for line in PROJECT["dependencies"]}
    assert {(r.name, str(r.specifier)) for r in recipe} == {
        ("python", PROJECT["requires-python"]),
        *((conda_names.get(r.name, r.name), str(r.specifier)) for r in wanted),
    }


def interpreter(folder: Path, name: str, answer: str) -> None:
    """A stand-in for an interpreter: it answers setup.sh's question, and names itself where it is to make .venv."""
    (folder / name).write_text(f'#!/bin/sh\nif [ "$1" = - ]; then {answer}; else echo "made by {name}"; exit 3; fi\n')
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("answers", "made_by"),
    [
        ({"python3.13": "true", "python3.11": "true"}, "python3.13"),  # the newest
        ({"python3.13": "echo needs a C compiler", "python3.12": "true"}, "python3.12"),  # the newest that is complete
        ({"python3.12": "exit 127", "python3.11": "true"}, "python3.11"),  # a shim without an interpreter behind it
        ({"python3": "true"}, "python3"),
    ],
)
def test_setup_takes_the_newest_fit_python(tmp_path: Path, answers: dict[str, str], made_by: str) -> None:
    done = run_setup(tmp_path, answers)
    assert (done.returncode, done.stdout) == (3, f"made by {made_by}\n")


def test_setup_says_why_no_python_is_fit(tmp_path: Path) -> None:
    done = run_setup(tmp_path, {"python3.12": "echo has no venv module: sudo apt install python3.12-venv"})
    assert done.returncode == 1
    assert "python3.13 not found\n" in done.stderr
    assert "python3.12 has no venv module: sudo apt install python3.12-venv\n" in done.stderr
    assert "sudo apt install python3-venv python3-dev gcc" in done.stderr


def test_setup_takes_the_python_that_is_named_or_none(tmp_path: Path) -> None:
    done = run_setup(tmp_path, {"python3.11": "true", "python3.10": "echo is Python 3.10"}, PYTHON="python3.10")
    assert done.returncode == 1
    assert "  python3.10 is Python 3.10\nInstall" in done.stderr


def test_setup_finds_this_python_fit() -> None:
    program = re.search(r"<<'PYTHON'.*?\n(.*?)^PYTHON", (ROOT / "scripts" / "setup.sh").read_text(), re.M | re.S)
    assert program is not None
    done = subprocess.run([sys.executable, "-"], input=program[1], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def run_setup(folder: Path, answers: dict[str, str], **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.sh of an otherwise empty clone, on a machine that has these interpreters."""
    (folder / "bin").mkdir()
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
    for tool in ("bash", "dirname"):
        (folder / "bin" / tool).symlink_to(str(shutil.which(tool)))
    for name, answer in answers.items():
        interpreter(folder / "bin", name, answer)
    return subprocess.run(
        ["bash", "scripts/setup.sh"],
        cwd=folder,
        env={"PATH": str(folder / "bin"), **environment},
        capture_output=True,
        text=True,
    )


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


RESULTS = {path.stem: path for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))}
# Of the readers of DFT output, of the labels, of the predictors, and of the search: no generator has a part in them.
WITHOUT_GENERATOR = {"bands", "electronic", "label_error", "predictor", "search", "training_throughput"}
JUDGED = {"candidates", "constraints", "round_trip"}  # by the predictor that judges


def what_is_not_of_this_version(name: str, report: dict[str, Any]) -> list[str]:
    """Models that a result names not, or names others than ship."""
    wanted: dict[str, Any] = {}
    if name not in WITHOUT_GENERATOR:
        wanted["weights"] = load_model(DEFAULT_WEIGHTS)[1]["sha256"]
    if name in JUDGED:
        wanted["judge"] = DOSPredictor.load(ROOT / "benchmarks" / "judge.safetensors").info
    found = {key: wanted[key] if report.get(key) == "default" else report.get(key) for key in wanted}
    return [key for key in wanted if found[key] != wanted[key]]


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_of_the_models_that_ship(name: str) -> None:
    told = "measure it again, or name it in WITHOUT_GENERATOR if no generator has a part in it"
    assert what_is_not_of_this_version(name, json.loads(RESULTS[name].read_text())) == [], told


def test_the_errors_of_the_predictor_are_of_the_one_that_ships() -> None:
    shipped = DOSPredictor.load().info
    assert json.loads(RESULTS["bands"].read_text())["trained_on"] == shipped
    assert json.loads(RESULTS["predictor"].read_text())["trained_on"]["predictor"] == shipped


def test_every_exception_is_of_a_result_that_exists() -> None:
    assert RESULTS.keys() >= WITHOUT_GENERATOR | JUDGED


@pytest.mark.parametrize("name", sorted(JUDGED))
def test_a_result_that_names_no_model_or_another_is_found(name: str) -> None:
    report = json.loads(RESULTS[name].read_text())
    assert what_is_not_of_this_version(name, {**report, "weights": "0" * 64, "judge": {}}) == ["weights", "judge"]
    del report["weights"], report["judge"]
    assert what_is_not_of_this_version(name, report) == ["weights", "judge"]


# These were measured before a result said what made it.
OLDER = {"cost"}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").rglob("*.json")), ids=lambda path: path.stem)
def test_results_say_what_made_them(path: Path) -> None:
    report = json.loads(path.read_text())
    told = report.get("made_by")
    if told is None:
        assert path.stem in OLDER
        return
    assert told["version"]
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", told["commit"])
    assert re.match(r"python (benchmarks|workflows)/\w+\.py", told["command"])
    assert {"target_ids", "labels", "target", "seed", "trained_on"} & set(report), "it does not tell its targets"
