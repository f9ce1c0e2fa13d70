"""The result of a run for the eye: one HTML file that needs no other, and the files to go on with.

Pictures are SVG inside the file, the table sorts itself by a few lines of JavaScript, structures are downloads. A
result file may come from anyone: its text is escaped, links are paths below or beside the report, and a policy in the
page lets a browser run no script but the one of this module.
"""

from __future__ import annotations

import io
import json
import os
import re
from base64 import b64encode
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from dosmatgen_ase.crystals.convert import to_atoms
from dosmatgen_ase.dos import TargetDOS
from dosmatgen_ase.files import write_atomic, write_extxyz
from dosmatgen_ase.flows.schemas import CandidateDoc, InverseDesignDoc
from dosmatgen_ase.plotting import draw_crystal, plot_dos

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = {  # heading: (what it means, field of the candidate, decimals)
    "distance": ("normalised L1 of the computed DOS to the target: 0 is equal", "distance", 3),
    "near gap": ("the same on [-2, 2] eV", "near_gap_distance", 3),
    "MAE": ("states/eV", "mae", 3),
    "predicted": ("distance of the DOS predicted before relaxation", "predicted_distance", 3),
    "energy": ("eV/atom, of the calculator that relaxed", "energy_per_atom", 3),
    "above hull": ("eV/atom, atoms and hull by CHGNet", "energy_above_hull", 3),
    "gap": ("eV", "band_gap", 2),
}

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } h3 { font-size: 1rem; margin: 0 0 .3rem }
table { border-collapse: collapse; width: 100% } td, th { padding: .35rem .6rem; border-bottom: 1px solid #ddd }
th { text-align: left; background: #f5f6f8 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
th button { font: inherit; font-weight: 600; border: 0; background: none; padding: 0; cursor: pointer }
th[aria-sort=ascending] button::after { content: " ▲" } th[aria-sort=descending] button::after { content: " ▼" }
section.card { border: 1px solid #ddd; border-radius: 6px; padding: .8rem 1rem; margin: 1rem 0 }
section.card div { display: flex; flex-wrap: wrap; gap: 1rem; align-items: center }
section.card img { max-width: 100% } .note { color: #666; font-size: .9rem } pre { overflow: auto; background: #f5f6f8 }
"""

SORT = """
document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
  const head = button.parentElement, table = head.closest("table"), place = head.cellIndex
  const up = head.getAttribute("aria-sort") !== "ascending"
  const key = row => { const cell = row.cells[place], value = cell.dataset.value
    return value === undefined ? cell.textContent : value === "" ? Infinity : Number(value) }
  const order = (a, b) => a === b ? 0 : (a < b ? -1 : 1)
  const rows = [...table.tBodies[0].rows].sort((a, b) => key(b) === Infinity || key(a) === Infinity
    ? order(key(a), key(b)) : (up ? 1 : -1) * order(key(a), key(b)))
  table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"))
  head.setAttribute("aria-sort", up ? "ascending" : "descending")
  table.tBodies[0].append(...rows)
}))
"""


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
        raise FileNotFoundError(f"no result {path}: give the result.json of an inverse-design run")
    try:
        return InverseDesignDoc.model_validate_json(path.read_bytes())
    except ValueError as error:  # pydantic's is one, of many lines
        told = str(error).splitlines()[0]
        raise ValueError(f"{path} is not the result of an inverse-design run: {told}") from error


def write_result(result: InverseDesignDoc, folder: str | os.PathLike[str]) -> Path:
    """Write result.json, candidates.extxyz (best first) and report.html into a folder; return the report's path.

    Raises
    ------
    OSError
        If a file cannot be written.
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
    """
    path = Path(path)
    good = [candidate for candidate in result.candidates if candidate.distance is not None]
    lost = [candidate for candidate in result.candidates if candidate.reason is not None]
    best = f"; the best is {escape(good[0].formula)} at a distance of {good[0].distance:.3f}" if good else ""
    settings = json.dumps(result.generation, indent=1)
    body = [
        "<h1>Crystals for a target density of states</h1>",
        f"<p>{len(result.candidates)} candidates, {len(good)} with a computed DOS{best}.</p>",
        "<h2>Target</h2>",
        *(_picture(plot_dos(target.on_grid(), [_name(key)]), _name(key)) for key, target in result.targets.items()),
        "<h2>Candidates, best match first</h2>",
        _table(good, path.parent) if good else "<p>None has a computed DOS.</p>",
        *(_card(candidate, result.targets) for candidate in good),
        *(["<h2>Fallen out</h2>", _reasons(lost)] if lost else []),
        f"<h2>Provenance</h2><details><summary>dosmatgen-ase {escape(result.version)}: settings of the generation"
        f"</summary><pre>{escape(settings)}</pre></details>",
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy()}"><title>Crystals for a target DOS</title>'
        f"<style>{STYLE}</style></head><body>{''.join(body)}<script>{SORT}</script></body></html>\n"
    )
    write_atomic(path, page.encode())
    return path


def _name(key: str) -> str:
    return "target of the cell" if key == "total" else f"target of site {key}"


def _table(candidates: list[CandidateDoc], home: Path) -> str:
    heads = [("formula", "", ""), ("atoms", "", ' class="n"')]
    heads += [(name, meaning, ' class="n"') for name, (meaning, _, _) in COLUMNS.items()]
    cells = "".join(
        f'<th{kind}{" aria-sort=ascending" if name == "distance" else ""}><button title="{escape(meaning)}">'
        f"{name}</button></th>"
        for name, meaning, kind in heads
    )
    rows = "".join(_row(candidate, home) for candidate in candidates)
    return (
        f"<table><thead><tr>{cells}<th>files</th></tr></thead><tbody>{rows}</tbody></table>"
        '<p class="note">Click a heading to sort; hold the pointer over it to see what it means.</p>'
    )


def _row(candidate: CandidateDoc, home: Path) -> str:
    from dosmatgen_ase.judge.stability import in_words  # brings torch

    atoms = len(candidate.structure or candidate.generated)
    cells = [
        f'<td><a href="#c{candidate.index}">{escape(candidate.formula)}</a> {_number(candidate)}</td>',
        f'<td class="n" data-value="{atoms}">{atoms}</td>',
    ]
    for _, field, decimals in COLUMNS.values():
        value = getattr(candidate, field)
        shown = "–" if value is None else f"{value:.{decimals}f}"
        if field == "energy_above_hull":
            shown = in_words(value, decimals) or "–"
        cells.append(f'<td class="n" data-value="{"" if value is None else value}">{shown}</td>')
    cif = b64encode((candidate.structure or candidate.generated).to(fmt="cif").encode()).decode()
    name = f"{candidate.index}_{candidate.formula}.cif"
    files = f'<a download="{escape(name)}" href="data:chemical/x-cif;base64,{cif}">CIF</a>'
    if candidate.directory is not None:
        folder = re.sub("^[^/]*:", "", candidate.directory)  # atomate2 writes HOST:/PATH
        # "./" and quoting: whatever the folder is called, a browser takes it for a path and for no scheme or host.
        files += f' <a href="./{quote(os.path.relpath(folder, home.resolve()))}">calculation</a>'
    return f"<tr>{''.join(cells)}<td>{files}</td></tr>"


def _card(candidate: CandidateDoc, targets: dict[str, TargetDOS]) -> str:
    """DOS over target for every site that has one, and the crystal."""
    structure = candidate.structure or candidate.generated
    sites = [int(key) for key in targets if key != "total"]
    pictures = []
    for key, target in targets.items():
        curves = [target.on_grid(), candidate.achieved[key].on_grid()]
        pictures.append(_picture(plot_dos(curves, [_name(key), f"{candidate.formula}, {candidate.engine}"]), "DOS"))
    pictures.append(_picture(draw_crystal(to_atoms(structure), sites=sites), f"unit cell of {candidate.formula}"))
    lengths = ", ".join(f"{x:.2f}" for x in structure.lattice.abc)
    angles = ", ".join(f"{x:.1f}" for x in structure.lattice.angles)
    cell = f"a, b, c = {lengths} Å; α, β, γ = {angles}°; {structure.volume / len(structure):.1f} Å³/atom"
    relaxed = f"; relaxation {candidate.relaxation}" if candidate.relaxation else ""
    title = f"<h3>{escape(candidate.formula)} {_number(candidate)}, distance {candidate.distance:.3f}</h3>"
    note = f'<p class="note">{escape(cell + relaxed)}</p>'
    return f'<section class="card" id="c{candidate.index}">{title}<div>{"".join(pictures)}</div>{note}</section>'


def _reasons(candidates: list[CandidateDoc]) -> str:
    rows = "".join(
        f"<tr><td>{escape(c.formula)} {_number(c)}</td><td>{escape(c.reason or '')}</td></tr>" for c in candidates
    )
    return f"<table><thead><tr><th>formula</th><th>reason</th></tr></thead><tbody>{rows}</tbody></table>"


def _number(candidate: CandidateDoc) -> str:
    told = "" if candidate.known_as is None else f", known as {candidate.known_as}"
    told += ", found by search" if "search" in candidate.record else ""
    return f'<span class="note">#{candidate.index}{escape(told)}</span>'


def _picture(axes: Axes, meaning: str) -> str:
    from matplotlib import rc_context

    figure: Any = axes.get_figure(root=True)
    svg = io.BytesIO()
    with rc_context({"svg.hashsalt": "dosmatgen"}):  # the same result gives the same file
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return f'<img alt="{escape(meaning)}" src="data:image/svg+xml;base64,{b64encode(svg.getvalue()).decode()}">'
