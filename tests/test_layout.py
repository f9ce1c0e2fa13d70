"""The shape of the package: one direction of imports, and nothing heavy loaded before it is needed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "dosmatgen_ase"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

# Low to high; a file imports lower ones only. A folder is one layer, within which process.py joins the others.
ORDER = [
    "files", "dos", "data", "screening", "crystal", "diffusion", "denoiser", "conditioning", "constraints",
    "checkpoint", "sampler", "training", "predictor", "relaxation", "stability", "interpolation", "electronic",
    "labels", "coverage", "metrics", "plotting", "ranking", "generator", "flows", "report", "cli",
]


def is_type_checking(test: ast.expr) -> bool:
    """Whether an ``if`` guards imports for the type checker."""
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imported_modules(source: str, module: str, *, is_package: bool) -> set[str]:
    """Dotted names of the package's modules that a file imports, wherever in the file."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and is_type_checking(node.test):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{parent}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return {name for name in found if name.split(".")[0] == PACKAGE}


def violation(module: str, imported: str) -> str | None:
    """What is wrong with `module` importing `imported`, if anything."""
    importer, target = (name.split(".")[1:] for name in (module, imported))
    if not target or target[0].startswith("__"):
        return None  # the package itself: __version__
    if target[0] not in ORDER:
        return f"{imported} has no place in ORDER (import names from their modules, not from the package)"
    if target[0] != importer[0]:
        lower = ORDER.index(target[0]) < ORDER.index(importer[0])
        return None if lower else f"{target[0]} is higher than {importer[0]}"
    if importer[0] == "diffusion" and target[1:2] == ["process"] and importer[1:2] != ["process"]:
        return f"{imported} is the top of diffusion" if len(importer) > 1 else None
    return None


def source_files() -> list[Path]:
    """Every file of the package that has a place in the order."""
    free = {SOURCE / "__init__.py", SOURCE / "__main__.py", SOURCE / "testing.py"}
    return sorted(set(SOURCE.rglob("*.py")) - free)


def module_name(path: Path) -> str:
    """Dotted name of a file of the package."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join([PACKAGE, *(part for part in parts if part != "__init__")])


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_import_lower_ones_only(path: Path) -> None:
    module = module_name(path)
    assert module.split(".")[1] in ORDER, f"give {module} a place in ORDER"
    imports = imported_modules(path.read_text(), module, is_package=path.name == "__init__.py")
    problems = [problem for name in sorted(imports) if (problem := violation(module, name))]
    assert not problems


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("crystal", "from dosmatgen_ase.dos import TargetDOS", True),
        ("crystal", "def f():\n    from dosmatgen_ase.sampler import sample", False),
        ("crystal", "from .sampler import sample", False),
        ("crystal", "from . import sampler", False),
        ("crystal", "import dosmatgen_ase.cli", False),
        ("crystal", "from dosmatgen_ase import DOSGenerator", False),
        ("crystal", "from dosmatgen_ase import __version__", True),
        ("crystal", "if TYPE_CHECKING:\n    from dosmatgen_ase.sampler import sample", True),
        ("crystal", "if TYPE_CHECKING:\n    pass\nelse:\n    from dosmatgen_ase.sampler import sample", False),
        ("diffusion.process", "from dosmatgen_ase.diffusion.lattice import x", True),
        ("diffusion.lattice", "from dosmatgen_ase.diffusion.process import x", False),
        ("diffusion.lattice", "from .process import x", False),
        ("diffusion.lattice", "from ..cli import main", False),
        ("cli", "from dosmatgen_ase.flows.jobs import x\nimport numpy", True),
    ],
)
def test_the_rule_finds_what_it_should(module: str, source: str, allowed: bool) -> None:
    module = f"{PACKAGE}.{module}"
    problems = [violation(module, name) for name in imported_modules(source, module, is_package=False)]
    assert (not any(problems)) == allowed


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


@pytest.mark.skipif(not (SOURCE / "dos.py").exists(), reason="dos.py is not written yet")
def test_reading_a_dos_needs_neither_torch_nor_pymatgen() -> None:
    heavy = ["torch", "pymatgen", "chgnet", "matplotlib"]
    assert loaded_after(f"from {PACKAGE} import TargetDOS, EnergyGrid", heavy) == []


@pytest.mark.skipif(not (SOURCE / "generator.py").exists(), reason="generator.py is not written yet")
def test_the_generation_path_loads_no_training_or_workflow_library() -> None:
    heavy = ["torch_geometric", "mace", "atomate2", "jobflow", "chgnet", "pymatgen", "matplotlib"]
    assert loaded_after(f"from {PACKAGE} import DOSGenerator", heavy) == []


def test_unknown_names_are_refused_by_name() -> None:
    import dosmatgen_ase

    assert set(dir(dosmatgen_ase)) == set(dosmatgen_ase.__all__)
    assert all(getattr(dosmatgen_ase, name).__doc__ for name in dosmatgen_ase.__all__)
    with pytest.raises(AttributeError, match=r"DOSGenerater.*it has DOSGenerator"):
        _ = dosmatgen_ase.DOSGenerater
