"""The shape of the package: one direction of imports, and nothing heavy loaded before it is needed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest

from dosmatgen_ase.moved import MOVED

PACKAGE = "dosmatgen_ase"
ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / PACKAGE

# Low to high. A file imports from its own folder and from lower ones only.
ORDER = [
    "moved",
    "threads",
    "limits",
    "provenance",
    "files",
    "dos",
    "parsing",
    "data",
    "crystals",
    "model",
    "dft",
    "train",
    "forward",
    "judge",
    "retrieval",
    "plotting",
    "generate",
    "flows",
    "report",
    "cli",
]


def imported_folders(node: ast.AST) -> set[str]:
    """Folders of the package that a file imports, wherever in the file, unless for the type checker."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return set().union(*map(imported_folders, node.orelse))
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "import by full names: dosmatgen_ase.FOLDER.FILE"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    own = {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")} - {"__version__"}
    return own.union(*map(imported_folders, ast.iter_child_nodes(node)))


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_folders_import_lower_ones_only(path: Path) -> None:
    folder = path.relative_to(SOURCE).with_suffix("").parts[0]
    allowed = ORDER if folder == "__init__" else ORDER[: ORDER.index(folder) + 1]
    assert imported_folders(ast.parse(path.read_text())) <= set(allowed)


@pytest.mark.parametrize(
    ("source", "folders"),
    [
        ("from dosmatgen_ase.dos import TargetDOS\nimport numpy", {"dos"}),
        ("def f():\n    from dosmatgen_ase.generate.sampler import sample", {"generate"}),
        ("import dosmatgen_ase.cli", {"cli"}),
        ("from dosmatgen_ase import cli", {"cli"}),
        ("from dosmatgen_ase import DOSGenerator", {"DOSGenerator"}),  # no folder, so allowed nowhere
        ("from dosmatgen_ase import __version__", set()),
        ("if TYPE_CHECKING:\n    from dosmatgen_ase.cli import main", set()),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from dosmatgen_ase.cli import main", {"cli"}),
    ],
)
def test_the_rule_finds_what_it_should(source: str, folders: set[str]) -> None:
    assert imported_folders(ast.parse(source)) == folders


MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 600, 60, 12  # lines, lines without the docstring, number


def size_of(function: ast.FunctionDef) -> tuple[int, int]:
    """Lines of a function without its docstring, and its parameters."""
    first, given = function.body[0], function.args
    docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(function, clean=False) is not None else 0
    names = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return function.end_lineno - function.lineno + 1 - docstring, sum(name is not None for name in names)


FOLDERS = ("src", "benchmarks", "scripts", "workflows")
CODE = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    sizes = {f"{function.name}, line {function.lineno}": size_of(function) for function in functions}
    assert {name: s for name, s in sizes.items() if s[0] > MAX_FUNCTION or s[1] > MAX_PARAMETERS} == {}


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ("def f(): pass", (1, 0)),
        ("def f(a, /, b, *c, d, **e):\n    '''One.\n\n    Two.'''\n    x = 1\n    return x", (3, 5)),
        ("@g\ndef f(\n    a,\n):\n    def h(b): pass", (4, 1)),
    ],
)
def test_the_size_of_a_function(source: str, size: tuple[int, int]) -> None:
    (function,) = ast.parse(source).body
    assert size_of(function) == size


def loaded_after(statement: str, candidates: list[str]) -> list[str]:
    """Which of the candidate modules a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*(m for m in {candidates!r} if m in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_probe_sees_a_loaded_module() -> None:
    assert loaded_after("import json", ["json", "torch"]) == ["json"]


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ["torch", "ase", "pymatgen", "numpy", "scipy", "matplotlib"]
    assert loaded_after(f"import {PACKAGE}", heavy) == []


def test_reading_a_dos_needs_neither_torch_nor_pymatgen() -> None:
    heavy = ["torch", "pymatgen", "chgnet", "matplotlib"]
    assert loaded_after(f"from {PACKAGE} import TargetDOS, EnergyGrid", heavy) == []


def test_the_generation_path_loads_no_training_or_workflow_library() -> None:
    heavy = ["torch_geometric", "mace", "atomate2", "jobflow", "chgnet", "pymatgen", "matplotlib"]
    assert loaded_after(f"from {PACKAGE} import DOSGenerator", heavy) == []


def test_unknown_names_are_refused_by_name() -> None:
    import dosmatgen_ase

    assert set(dir(dosmatgen_ase)) == set(dosmatgen_ase.__all__)
    assert all(getattr(dosmatgen_ase, name).__doc__ for name in dosmatgen_ase.__all__)
    with pytest.raises(AttributeError, match=r"DOSGenerater.*it has DOSGenerator"):
        _ = dosmatgen_ase.DOSGenerater


@pytest.mark.parametrize(("old", "new"), sorted(MOVED.items()))
def test_a_module_that_moved_is_found_by_its_old_name(old: str, new: tuple[str, ...]) -> None:
    sys.modules.pop(f"{PACKAGE}.{old}", None)
    homes = [import_module(f"{PACKAGE}.{name}") for name in new]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        moved = import_module(f"{PACKAGE}.{old}")
    assert any(f"{PACKAGE}.{old} is now {PACKAGE}.{new[0]}" in str(warning.message) for warning in told)
    for home in homes:
        own = [name for name, value in vars(home).items() if getattr(value, "__module__", None) == home.__name__]
        assert all(getattr(moved, name) is getattr(home, name) for name in own)
    with pytest.raises(AttributeError, match="nothing"):
        _ = moved.nothing
    sys.modules.pop(f"{PACKAGE}.{old}")
