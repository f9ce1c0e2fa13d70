"""``dosmatgen search`` and ``index``: find known crystals by their DOS, and make the index for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer import Option

from dosmatgen_ase.cli.application import app, resumable, show, tell
from dosmatgen_ase.cli.files import PICTURES, output, read_structures, single_table
from dosmatgen_ase.cli.options import DISTANCE, STRUCTURE_TABLES, Overwrite, Predictor, figure, with_options
from dosmatgen_ase.cli.target import DosFile, TargetOptions, on_told_zero, tell_doubts
from dosmatgen_ase.parsing import names_from_text, numbers_from_text

if TYPE_CHECKING:
    from ase import Atoms

    from dosmatgen_ase.dos import TargetDOS
    from dosmatgen_ase.retrieval.index import DOSIndex

DRAWN = 3  # crystals in the picture
filter_option = partial(Option, rich_help_panel="Which crystals")
FAR = 0.65
"""Median distance of a site from the mean DOS of its element (docs/benchmarks/predictor.md)."""


@dataclass(frozen=True)
class FilterOptions:
    """Which of the known crystals may be found."""

    elements: Annotated[str | None, filter_option(help="Crystals made of these elements only: Ni,Au.")] = None
    exclude_elements: Annotated[str | None, filter_option(help="Crystals that hold none of these: O,F.")] = None
    composition: Annotated[str | None, filter_option(help="Crystals of this reduced formula: NiAu3.")] = None
    num_atoms: Annotated[str | None, filter_option(help="Atoms of the primitive cell: 4, 4,6 or 4-7.")] = None
    max_above_hull: Annotated[
        float | None, filter_option(help="Highest energy above the hull, eV/atom, as given with the crystals.")
    ] = None
    gap: Annotated[
        tuple[float, float] | None, filter_option(metavar="LOW HIGH", help="Band gap, eV; 0 0 for metals.")
    ] = None

    def keywords(self) -> dict[str, Any]:
        """The filters as `dosmatgen_ase.search` takes them."""
        read = {"elements": names_from_text, "exclude_elements": names_from_text, "num_atoms": numbers_from_text}
        given = {name: value for name, value in vars(self).items() if value is not None}
        return {name: read[name](value) if name in read else value for name, value in given.items()}


@app.command()
@with_options(reading=TargetOptions, filters=FilterOptions)
def search(
    dos_file: DosFile,
    reading: TargetOptions,
    filters: FilterOptions,
    ctx: typer.Context,
    site: Annotated[
        str | None,
        Option(
            help="Take the DOS of this site of the file's structure, counted from 0, or of several: 3 or 0-3. "
            "Default: the total DOS."
        ),
    ] = None,
    n: Annotated[int, Option("-n", min=1, help="Number of crystals.")] = 10,
    overwrite: Overwrite = False,
    out: Annotated[
        Path | None,
        Option(
            "-o",
            "--out",
            help="Write the crystals into this file: .extxyz, .xyz, .cif, .vasp (one each), .traj, .db or .json.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, Option(help="Picture (.png, .pdf, .svg) of the nearest three: target and their DOS, crystal.")
    ] = None,
    index: Annotated[Path | None, Option(help="Index made by dosmatgen index. Default: the one that ships.")] = None,
    among: Annotated[
        list[Path] | None,
        Option(
            metavar="FILE",
            help="Look among the structures of this file instead, such as crystals that were generated or relaxed. "
            "May be given several times.",
        ),
    ] = None,
) -> None:
    """Find the known crystals, or those of your files, whose sites have the DOS of DOS_FILE.

    One site of the file may be any site of a crystal. Several are assigned to sites of one crystal, in the best way.
    The distance is the normalised L1 to the target, of the computed DOS where there is one and else of the predicted.
    """
    from dosmatgen_ase.files import STRUCTURES, write_structures

    output(ctx, "out", STRUCTURES, count=n, marks=(b"search",), ours=False)
    output(ctx, "plot", PICTURES)
    targets = _targets(dos_file, reading, [None] if site is None else numbers_from_text(site))
    from dosmatgen_ase.retrieval.query import search as run

    known, kind = _crystals(index, among), "known crystals" if not among else "crystals of these files"
    hits = run(targets[0] if len(targets) == 1 else targets, n, index=known, **filters.keywords())
    if not hits:
        raise ValueError(f"none of the {len(known)} {kind} passes the filters: loosen them")
    show(hit_table(hits, f"nearest of {len(known)} {kind}"))
    _tell_hits(hits, known, empty=not any(target.total_states() > 0 for target in targets))
    if out is not None:
        write_structures(out, hits)
        tell(f"crystals: {out}")
    if plot is not None:
        _draw(plot, targets[0], hits[:DRAWN], known)
        tell(f"picture: {plot}")


def _targets(dos_file: Path, reading: TargetOptions, sites: Sequence[int | None]) -> list[TargetDOS]:
    """Read the targets as `search` compares them, one for each site, and tell what is moved and what is doubtful."""
    targets = on_told_zero(dos_file, {site: replace(reading, site=site).read(dos_file) for site in sites})
    for target in dict.fromkeys(targets.values()):
        tell_doubts(target)
    return [targets[site] for site in sites]


def _crystals(index: Path | None, among: Sequence[Path] | None) -> DOSIndex:
    """The index that is searched: of a file, of structures whose DOS is predicted now, or the one that ships."""
    from dosmatgen_ase.retrieval.build import build_index
    from dosmatgen_ase.retrieval.index import DOSIndex, default_index

    if not among:
        return default_index() if index is None else DOSIndex.load(index)
    if index is not None:
        raise ValueError("give --index or --among: one of the two")
    made = build_index(_of_files(among), progress=True)
    _tell_failed(made)
    for row, name in enumerate(made.material_id.tolist()):
        if name not in made.info["without_prediction"] and None in made.site_dos(row):
            tell(f"no prediction for some sites of {name}: an element has too few labels")
    return made


def _tell_hits(hits: Sequence[Atoms], known: DOSIndex, empty: bool) -> None:
    """Tell what the columns are, whether even the nearest is far (unless all targets are empty), and the source."""
    typer.echo(f"distance: {DISTANCE}; error: its expected error, 0 where all of the DOS is computed")
    typer.echo("gap: eV; hull: eV/atom above the hull, as given with the crystals")
    nearest = hits[0].info["search"]["distance"]
    if nearest > FAR and not empty:
        told = f"even the nearest is no nearer than the mean DOS of an element usually is to one of its sites ({FAR})"
        typer.echo(f"none of these has this DOS: {told}. dosmatgen generate makes new crystals")
    if "source" in known.info:
        tell(f"structures: {attribution(known.info['source'])}")


def _tell_failed(made: DOSIndex) -> None:
    """Name the crystals whose DOS could not be predicted."""
    for name, reason in list(made.info["without_prediction"].items())[:10]:
        tell(f"no prediction for {name}: {reason}")


def hit_table(hits: Sequence[Atoms], title: str) -> Table:
    """A table of what `search` found."""
    table = Table(title=title)
    for name in ("material", "formula", "sites", "distance", "DOS", "error", "gap", "hull"):
        left = name in ("material", "formula", "sites", "DOS")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "sites", overflow="fold")
    for atoms in hits:
        told = atoms.info["search"]
        sites = ", ".join(f"{atoms[i].symbol} {i}" for i in told["sites"]) or "all"
        sites += f" of {told['cells']} cells" if told["cells"] > 1 else ""
        hull = None if told["energy_above_hull"] is None else round(told["energy_above_hull"], 2) + 0.0  # no -0.00
        figures = figure(told["expected_error"]), figure(told["band_gap"]), figure(hull)
        row = told["material_id"], atoms.get_chemical_formula(), sites, figure(told["distance"]), told["source"]
        table.add_row(*row, *figures)
    return table


def _draw(path: Path, target: TargetDOS, hits: Sequence[Atoms], index: DOSIndex) -> None:
    """Draw the first target beside what each crystal has for it."""
    from dosmatgen_ase.dos import TargetDOS
    from dosmatgen_ase.plotting import plot_candidates

    row_of = {name: i for i, name in enumerate(index.material_id.tolist())}
    shown = []
    for atoms in hits:
        told = atoms.info["search"]
        sites = index.site_dos(row_of[told["material_id"]])
        wanted = [sites[i] for i in told["sites"][:1]] or sites * told["cells"]
        curves = [dos for dos in wanted if dos is not None]
        if len(curves) < len(wanted):
            curves = []  # a sum over some of the sites is not the DOS of the cell
        elif not told["sites"]:
            curves = [TargetDOS.sum_of(curves)]
        title = f"{told['material_id']}: {atoms.get_chemical_formula()}, distance {figure(told['distance'])}"
        if len(told["sites"]) > 1:
            title += f"; DOS of {atoms[told['sites'][0]].symbol} {told['sites'][0]}"
        elif not told["sites"] and told["cells"] > 1:
            title += f"; DOS of {told['cells']} cells"
        shown.append((title, atoms, curves))
    ringed = [atoms.info["search"]["sites"] for atoms in hits]
    plot_candidates(target, shown, path, ringed, [atoms.info["search"]["source"] for atoms in hits])


@app.command("index")
def make_index(
    ctx: typer.Context,
    structures: Annotated[list[Path] | None, STRUCTURE_TABLES] = None,
    out: Annotated[Path, Option("-o", "--out", help="File of the index.")] = Path("dos_index.npz"),
    labels: Annotated[
        Path | None, Option(help="Folder of computed site DOS, such as data/site_dos. Default: none.")
    ] = None,
    limit: Annotated[
        int | None, Option(min=1, help="Take no more structures than this. Default: all; 1000 of a database.")
    ] = None,
    from_optimade: Annotated[
        str | None,
        Option(metavar="URL", help="Take the structures of this database, which speaks OPTIMADE, not of files."),
    ] = None,
    filter: Annotated[
        str, Option(metavar="FILTER", help="Which structures of the database: 'elements HAS \"Ni\" AND nsites<=8'.")
    ] = "",
    parts: Annotated[
        Path | None,
        Option(help="Folder of the predictions so far; it is kept. Default: OUT-parts, removed at the end."),
    ] = None,
    predictor: Predictor = None,
    overwrite: Overwrite = False,
) -> None:
    """Make the index of known crystals that dosmatgen search looks in: about 6 crystals a second on a core.

    The DOS of a crystal is the computed one where LABELS has it, and else predicted. A run that was stopped or killed
    goes on where it was: give the same command again.
    """
    from dosmatgen_ase.data import load_site_dos
    from dosmatgen_ase.forward.predictor import DEFAULT_PREDICTOR
    from dosmatgen_ase.retrieval.build import build_index, remove_parts

    output(ctx, "out", (".npz",), marks=(b"material_id.npy",))
    if (structures is None) == (from_optimade is None):
        raise ValueError("give STRUCTURES or --from-optimade URL: one of the two")
    if filter and from_optimade is None:
        raise ValueError("--filter is for a database: give --from-optimade URL, too")
    computed = None if labels is None else load_site_dos(labels)
    folder = parts or out.with_name(f"{out.stem}-parts")
    source = None
    with resumable(lambda: f"what is predicted is kept in {folder}"):
        if from_optimade is not None:
            crystals, source = _of_database(from_optimade, filter, limit, folder)
        else:
            crystals = _of_files(structures or [])[:limit]
        made = build_index(
            crystals, computed, predictor=predictor or DEFAULT_PREDICTOR, parts=folder, source=source, progress=True
        )
    made.save(out)
    if parts is None:
        remove_parts(folder)
    size = out.stat().st_size / 1e6
    tell(f"{out}: {len(made)} crystals, {int(made.computed.sum())} with a computed DOS, {size:.1f} MB")
    _tell_failed(made)


def _of_files(paths: Sequence[Path]) -> list[Atoms]:
    """Crystals of one table, or of files: their ``material_id`` is their own, or else the name of the file."""
    from dosmatgen_ase.retrieval.build import read_known

    if table := single_table(paths):
        return read_known(table)
    crystals = read_structures(paths)
    for name, atoms in crystals.items():
        atoms.info.setdefault("material_id", name)
    return list(crystals.values())


def _of_database(url: str, filter: str, limit: int | None, folder: Path) -> tuple[list[Atoms], dict[str, Any]]:
    """Crystals of a database and where they come from; tells what was found and what was left out."""
    from dosmatgen_ase.retrieval.optimade import DEFAULT_LIMIT, read_optimade

    found = read_optimade(url, filter, limit=limit or DEFAULT_LIMIT, parts=folder, progress=True)
    read, available = len(found.crystals) + len(found.skipped), found.source["available"]
    tell(f"{read} structures from {attribution(found.source)}")
    if available is not None and available > read:
        tell(f"{available} structures fit: raise --limit to read more of them")
    for reason, count in Counter(found.skipped.values()).most_common(10):
        tell(f"left out {count}: {reason}")
    if not found.crystals:
        raise ValueError("none of these structures is a crystal with all atoms in place: ask for others")
    return found.crystals, found.source


def attribution(source: Mapping[str, Any]) -> str:
    """Where the structures of an index come from, in one line."""
    more = [str(source[key]) for key in ("url", "homepage", "licence") if source.get(key)]
    return f"{source.get('provider') or 'a database without a name'} ({', '.join(dict.fromkeys(more))})"
