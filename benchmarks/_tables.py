"""Results on disk: a JSON file that says what made it, and its table."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from dosmatgen_ase import __version__
from dosmatgen_ase.files import finite, write_atomic
from dosmatgen_ase.provenance import commit_of


def made_by() -> dict[str, Any]:
    """What made a result: version, commit (null outside a clone; ``-dirty`` with changes not committed), command."""
    script, *options = sys.argv
    command = shlex.join(["python", script, *options])
    return {"version": __version__, "commit": commit_of(Path(__file__)), "command": command}


def write_results(folder: Path, name: str, report: dict[str, Any], markdown: str) -> None:
    """Write ``name.json`` (infinite and undefined numbers as null; it says what made it) and ``name.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {**report, "made_by": made_by()}
    write_atomic(folder / f"{name}.json", (json.dumps(finite(report), indent=2) + "\n").encode())
    write_atomic(folder / f"{name}.md", markdown.encode())


def text(figure: dict[str, Any]) -> str:
    """``0.71 [0.65, 0.77]``."""
    if figure["value"] is None:
        return "-"
    low, high = figure["interval"]
    return f"{figure['value']:.2f} [{low:.2f}, {high:.2f}]"
