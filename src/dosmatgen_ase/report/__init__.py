"""The result of a run as one HTML file that needs no other, and as files for further work.

``page.html`` is the template. Pictures are SVG inside the file, the table sorts itself by a few lines of JavaScript,
structures are downloads. A result file may come from anyone: jinja2 escapes its text, links are paths below or beside
the report, and a policy in the page lets a browser run no script but the one of this folder.
"""

from __future__ import annotations

import io
import json
import os
import re
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined

from dosmatgen_ase.crystals.convert import to_atoms
from dosmatgen_ase.dos import TargetDOS
from dosmatgen_ase.files import no_file, write_atomic, write_extxyz
from dosmatgen_ase.flows.schemas import FORWARD_MODEL, CandidateDoc, InverseDesignDoc
from dosmatgen_ase.plotting import draw_crystal, drawn_together, plot_dos

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Column(NamedTuple):
    """A figure of a candidate: what it means, the field that holds it, and how many decimals are shown."""

    meaning: str
    field: str
    decimals: int


COLUMNS = {
    "distance": Column("normalised L1 of its DOS to the target: 0 is equal", "distance", 3),
    "near gap": Column("the same on [-2, 2] eV", "near_gap_distance", 3),
    "MAE": Column("states/eV", "mae", 3),
    "predicted": Column("distance of the DOS predicted before relaxation", "predicted_distance", 3),
    "energy": Column("eV/atom, of the calculator that relaxed", "energy_per_atom", 3),
    "above hull": Column("eV/atom, atoms and hull by CHGNet", "energy_above_hull", 3),
    "gap": Column("eV", "band_gap", 2),
}

HERE = Path(__file__).parent
STYLE, SORT, PAGE = ((HERE / name).read_text(encoding="utf-8") for name in ("style.css", "sort.js", "page.html"))


def _policy() -> str:
    """Content-Security-Policy of the page: its one style and its one script, known by their digests, and pictures."""
    style, script = (b64encode(sha256(text.encode()).digest()).decode() for text in (STYLE, SORT))
    return (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def read_result(path: str | os.PathLike[str]) -> InverseDesignDoc:
    """Read the result.json of a run.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or it is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{no_file(path, 'result')}: give the result.json of an inverse-design run")
    try:
        return InverseDesignDoc.model_validate_json(path.read_bytes())
    except ValueError as error:  # pydantic's is one, of many lines
        made = "write_result (tutorial 6) and workflows/inverse_design_*.py write it, as result.json"
        raise ValueError(f"{path} is not the result of an inverse-design run: {made}") from error


def write_result(result: InverseDesignDoc, folder: str | os.PathLike[str]) -> Path:
    """Write result.json, candidates.extxyz (best first) and report.html into a folder; return the report's path.

    Raises
    ------
    OSError, ValueError
        If a file cannot be written; as `write_report`, after the other two.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "result.json", result.model_dump_json().encode())
    frames = []
    for candidate in result.candidates:
        atoms = to_atoms(candidate.structure or candidate.generated)
        kept = candidate.model_dump(include={"index", "distance", "energy_per_atom", "band_gap", "reason"})
        atoms.info = {"dosmatgen": candidate.record, **{key: value for key, value in kept.items() if value is not None}}
        frames.append(atoms)
    write_extxyz(folder / "candidates.extxyz", frames)
    return write_report(result, folder / "report.html")


def write_report(result: InverseDesignDoc, path: str | os.PathLike[str]) -> Path:
    """Write the report of a run as one HTML file.

    Parameters
    ----------
    result : InverseDesignDoc
    path : path
        Links to the files of the calculations are relative to it.

    Raises
    ------
    OSError
        If the file cannot be written.
    ValueError
        If a candidate with a distance lacks the DOS or the site of a target.
    """
    path = Path(path)
    good = [candidate for candidate in result.candidates if candidate.distance is not None]
    for candidate in good:
        _check(candidate, result.targets)
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(PAGE)
    text = page.render(
        count=len(result.candidates),
        engines=" and ".join(sorted({_by(c) for c in good})),
        good=[(c, _shown(c, result.targets, path.parent)) for c in good],
        lost=[c for c in result.candidates if c.reason is not None or c.distance is None],
        targets=[
            (_name(key), _picture(plot_dos(drawn_together(target, []), [_name(key)])))
            for key, target in result.targets.items()
        ],
        columns=COLUMNS,
        settings=json.dumps(result.generation, indent=1),
        version=result.version,
        policy=_policy(),
        style=STYLE,
        script=SORT,
    )
    write_atomic(path, text.encode())
    return path


def _name(key: str) -> str:
    return "target of the cell" if key == "total" else f"target of site {key}"


def _check(candidate: CandidateDoc, targets: Mapping[str, TargetDOS]) -> None:
    """Refuse a candidate whose distance cannot be of these targets."""
    sites = {str(i) for i in range(len(candidate.structure or candidate.generated))}
    for key, target in targets.items():
        made, fault = candidate.achieved.get(key), None
        if key != "total" and key not in sites:
            fault = f"has no site {key}, for which there is a target"
        elif made is None:
            fault = f"has a distance, but no DOS for the {_name(key)}"
        elif made.kind != target.kind:
            fault = f"has a {made.kind} DOS for the {_name(key)}, which is a {target.kind} DOS"
        if fault:
            raise ValueError(
                f"candidate {candidate.index} ({candidate.formula}) {fault}: compute it again, or leave it out"
            )


def _shown(candidate: CandidateDoc, targets: dict[str, TargetDOS], home: Path) -> dict[str, Any]:
    """What the page shows of a candidate with a DOS beside its own fields, in its row of the table and on its card."""
    structure = candidate.structure or candidate.generated
    lengths = ", ".join(f"{x:.2f}" for x in structure.lattice.abc)
    angles = ", ".join(f"{x:.1f}" for x in structure.lattice.angles)
    return {
        "atoms": len(structure),
        "figures": [_figure(candidate, column) for column in COLUMNS.values()],
        "cif": f"data:chemical/x-cif;base64,{b64encode(structure.to(fmt='cif').encode()).decode()}",
        "folder": _link(candidate.directory, home),
        "cell": f"a, b, c = {lengths} Å; α, β, γ = {angles}°; {structure.volume / len(structure):.1f} Å³/atom",
        "pictures": _pictures(candidate, targets),
    }


def _figure(candidate: CandidateDoc, column: Column) -> dict[str, Any]:
    """A number to sort by, and how it is shown."""
    from dosmatgen_ase.judge.stability import in_words  # brings torch

    value = getattr(candidate, column.field)
    if value is None:
        return {"value": "", "shown": "–"}
    words = in_words(value, column.decimals) if column.field == "energy_above_hull" else ""
    return {"value": value, "shown": words or f"{value:.{column.decimals}f}"}


def _by(candidate: CandidateDoc) -> str:
    """What the DOS of a candidate is by, in words: a prediction is no computation."""
    engine = candidate.engine or "an engine that is not told"
    return f"the {engine} (predicted, not computed)" if engine == FORWARD_MODEL else engine


def _link(directory: str | None, home: Path) -> str | None:
    """Link from the page to the folder of a calculation."""
    if directory is None:
        return None
    folder = re.sub("^[^/]*:", "", directory)  # atomate2 writes HOST:/PATH
    # "./" and quoting: whatever the folder is called, a browser takes it for a path and for no scheme or host.
    return f"./{quote(os.path.relpath(folder, home.resolve()))}"


def _pictures(candidate: CandidateDoc, targets: dict[str, TargetDOS]) -> list[tuple[str, str]]:
    """DOS over target, as their distance compares them, for every site that has one, and the crystal."""
    pictures = []
    for key, target in targets.items():
        labels = [_name(key), f"{candidate.formula}, {candidate.engine}"]
        pictures.append(("DOS", _picture(plot_dos(drawn_together(target, [candidate.achieved[key]]), labels))))
    sites = [int(key) for key in targets if key != "total"]
    crystal = draw_crystal(to_atoms(candidate.structure or candidate.generated), sites=sites)
    return [*pictures, (f"unit cell of {candidate.formula}", _picture(crystal))]


def _picture(axes: Axes) -> str:
    """A picture as the source of an image."""
    from matplotlib import rc_context

    figure: Any = axes.get_figure(root=True)
    svg = io.BytesIO()
    with rc_context({"svg.hashsalt": "dosmatgen"}):  # the same result gives the same file
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{b64encode(svg.getvalue()).decode()}"
