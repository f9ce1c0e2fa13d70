"""``dosmatgen generate``: crystals for a DOS, ranked and drawn."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer import Option

from dosmatgen_ase.cli.application import app, busy, printable, resumable, show, tell
from dosmatgen_ase.cli.files import PICTURES, output
from dosmatgen_ase.cli.options import DISTANCE, Device, Overwrite, figure, generation_settings, with_options
from dosmatgen_ase.cli.target import DosFile, TargetOptions, on_told_zero
from dosmatgen_ase.generate.settings import DEFAULT_COUNT, GenerationSettings

if TYPE_CHECKING:
    from ase import Atoms

    from dosmatgen_ase.forward.predictor import DOSPredictor
    from dosmatgen_ase.generate.request import Request

ranking_option = partial(Option, rich_help_panel="Relax and rank")
MANY = 200  # candidates whose ranking takes seconds, and shows a bar


@dataclass(frozen=True)
class RankingOptions:
    """What becomes of the structures drawn."""

    oversample: Annotated[
        int, ranking_option(min=1, help="Draw this many times -n. The -n best by predicted DOS go to OUT-best.")
    ] = 1
    relax: Annotated[
        str | None,
        ranking_option(
            metavar="CALCULATOR",
            help="Rank, relax the best four for each of -n, and rank again: chgnet, or the path or name of a MACE "
            "model. The relaxed go to OUT-relaxed.extxyz, the best to OUT-best. A fixed cell and fixed sites stay.",
        ),
    ] = None
    trust_model: Annotated[
        bool,
        ranking_option(
            "--trust-model", help="Load a MACE model file for --relax, which may run any code: trust its maker."
        ),
    ] = False
    energy_weight: Annotated[
        float,
        ranking_option(help="Weight of the energy above the hull (per eV/atom) in the ranking, beside the distance."),
    ] = 0.0
    predictor: Annotated[
        Path | None, ranking_option(help="Forward model made by train-predictor. Default: the shipped one.")
    ] = None


@app.command()
@with_options(target=TargetOptions, settings=generation_settings, best=RankingOptions)
def generate(
    dos_file: DosFile,
    settings: GenerationSettings,
    best: RankingOptions,
    target: TargetOptions,
    ctx: typer.Context,
    n: Annotated[int, Option("-n", help="Number of structures.")] = DEFAULT_COUNT,
    out: Annotated[
        Path,
        Option(
            "-o",
            "--out",
            help="File of the structures: .extxyz or .xyz, which grows; or .cif, .vasp (one each), .traj, .db, .json, "
            "written at the end from an extxyz file beside it. The same command continues a stopped run.",
        ),
    ] = Path("out.extxyz"),
    overwrite: Overwrite = False,
    plot: Annotated[
        Path | None, Option(help="Picture (.png, .pdf, .svg) of the best four: target and predicted DOS, crystal.")
    ] = None,
    weights: Annotated[
        str, Option(help="'default' for the shipped generator, or weights made by dosmatgen train.")
    ] = "default",
    device: Device = None,
) -> None:
    """Generate crystals whose sites have the DOS of DOS_FILE, and rank them by the DOS predicted for them.

    A run that was killed goes on where it stopped: give the same command again.
    """
    start = time.perf_counter()
    _check_calculator(best)
    dos = target.read(dos_file)
    on_told_zero(dos_file, {0: dos})
    files = _Files.of(out, best)
    _check_before(ctx, files, n, best)

    with busy("loading the models"):
        from dosmatgen_ase.forward.predictor import DEFAULT_PREDICTOR, DOSPredictor
        from dosmatgen_ase.generate.generator import DOSGenerator
        from dosmatgen_ase.generate.request import Request
        from dosmatgen_ase.judge.ranking import Ranking

        request, ranking = Request.of(dos, settings), Ranking(energy=best.energy_weight)
        generator = DOSGenerator(weights, device=device)
        forward = DOSPredictor.load(best.predictor or DEFAULT_PREDICTOR)
    made, draws = 0, n * best.oversample
    failed: RuntimeError | None = None
    drawn = generator.generate_iter(dos, draws, settings=settings, progress=True, out=out, overwrite=overwrite)
    with resumable(lambda: f"{made} of {draws} structures are kept in {files.stream}"):
        try:
            for _ in drawn:
                made += 1
        except RuntimeError as error:  # some were rejected too often, which must not cost the others
            if not made:
                raise
            failed = error
        found = _ranked(files, n, request, best, overwrite, predictor=forward, ranking=ranking)
    _show(found, files, request)
    if plot is not None:
        _draw(found[:4], plot, request, forward)
    tell(f"{time.perf_counter() - start:.1f} s")
    if failed is not None:
        raise failed


def _check_calculator(options: RankingOptions) -> None:
    """Refuse a model file that is not trusted, before anything is read."""
    if options.relax is not None:
        from dosmatgen_ase.judge.relaxation import check_trust

        check_trust(options.relax, options.trust_model)


@dataclass(frozen=True)
class _Files:
    """Files of one run: all draws, the stream that they grow in, what is relaxed, and the best."""

    out: Path
    stream: Path
    relaxed: Path | None
    best: Path

    @classmethod
    def of(cls, out: Path, options: RankingOptions) -> _Files:
        """Derive the names from that of OUT."""
        from dosmatgen_ase.files import stream_of

        stream = stream_of(out)
        relaxed = None if options.relax is None else stream.with_name(f"{stream.stem}-relaxed{stream.suffix}")
        picked = options.oversample > 1 or options.relax is not None
        return cls(out, stream, relaxed, out.with_name(f"{out.stem}-best{out.suffix}") if picked else out)


def _check_before(ctx: typer.Context, files: _Files, n: int, options: RankingOptions) -> None:
    """Raise now what would end the run late. What the stream of structures holds is looked at by the generator."""
    from dosmatgen_ase.files import STRUCTURES
    from dosmatgen_ase.judge.relaxation import load_calculator

    output(ctx, "out", STRUCTURES, path=files.stream, continued=True)
    if files.out != files.stream:
        output(ctx, "out", STRUCTURES, count=n * options.oversample)
    if files.best != files.out:
        output(ctx, "out", STRUCTURES, path=files.best, count=n)
    if files.relaxed is not None:
        begun = files.stream.exists() and files.stream.stat().st_size  # else nothing of this run can be relaxed
        output(ctx, "out", STRUCTURES, path=files.relaxed, marks=(b"relaxation=",) if begun else (), ours=False)
    output(ctx, "plot", PICTURES)
    if options.relax is not None:
        load_calculator(options.relax, options.trust_model)


def _ranked(
    files: _Files, n: int, request: Request, options: RankingOptions, overwrite: bool, **how: Any
) -> list[Atoms]:
    """Relax, if asked, and rank the structures drawn into `out`, as `score` is told; return the best."""
    from dosmatgen_ase.files import read_structures
    from dosmatgen_ase.generate.generator import not_new
    from dosmatgen_ase.judge.ranking import best, score_and_relax
    from dosmatgen_ase.judge.relaxed_file import relax_into
    from dosmatgen_ase.judge.stability import load_hull

    drawn = read_structures(files.stream, format="extxyz")
    for frame, atoms in enumerate(drawn):
        atoms.info["frame"] = frame
    held = len(drawn)
    drawn = [atoms for atoms in drawn if atoms.info["dosmatgen"]["index"] < n * options.oversample]
    if held > len(drawn):
        tell(f"{files.stream} holds {held - len(drawn)} more, of a longer run before", err=True)
    rejected = sum(atoms.info["dosmatgen"].get("attempt", 0) for atoms in drawn)
    tell(f"{len(drawn)} crystals drawn; rejected by the screen and drawn again: {rejected}", err=True)
    sites, total = request.site_targets, request.total_target
    progress = options.relax is not None or len(drawn) > MANY
    chosen: list[Atoms] = []

    def relaxed(part: list[Atoms]) -> list[Atoms]:
        assert files.relaxed is not None
        assert options.relax is not None
        chosen.extend(part)  # the file goes on from what it holds
        told: dict[str, Any] = {"trust_model": options.trust_model, "overwrite": overwrite, **request.held}
        return relax_into(files.relaxed, chosen, options.relax, among=drawn, **told)[-len(part) :]

    with contextlib.nullcontext() if progress else busy(f"predicting the DOS of {len(drawn)} crystals"):
        found = score_and_relax(
            drawn, n, sites, total, accepts=lambda atoms: not_new(request, atoms) is None,  # some relax into known ones
            relaxed=None if files.relaxed is None else relaxed, progress=progress, **how,
        )  # fmt: skip
    if not found:
        raise RuntimeError(f"none of the {len(drawn)} crystals drawn is new once relaxed: draw more (--oversample)")
    picked = best(found, n)
    if len(picked) < min(n, len(drawn)):
        tell(f"warning: only {len(picked)} of the {len(drawn)} crystals drawn are new once relaxed", err=True)
    if options.relax == "chgnet":  # the potential of the hull
        hull = load_hull()
        for atoms in picked:
            above = hull.above(atoms.numbers, atoms.info["relaxation"]["energy"])
            atoms.info["scores"].setdefault("energy_above_hull", above)
    return picked


def _show(found: list[Atoms], files: _Files, request: Request) -> None:
    """Keep the best and print their table, and the known crystal that has the DOS best."""
    from dosmatgen_ase.files import write_structures, written_files
    from dosmatgen_ase.judge.stability import in_words
    from dosmatgen_ase.retrieval.index import default_index

    if files.best != files.out:
        for frame, atoms in enumerate(found):
            atoms.info["frame"] = frame
        write_structures(files.best, found)
    known = default_index()
    order = "best first" if files.best != files.out else "in this table best first"
    written = written_files(files.best, len(found))
    place = str(files.best) if len(written) == 1 else f"{written[0]} to {written[-1].name}"
    table = Table(title=printable(f"{len(found)} structures in {place}, {order}"))
    energies = any("energy_above_hull" in atoms.info["scores"] for atoms in found)
    for name in ("frame", "formula", "sites", "atoms", "Å³/atom", "distance", "error"):
        left = name in ("formula", "sites")
        table.add_column(name, justify="left" if left else "right", min_width=len(name), overflow="fold")
    table.add_column("known", overflow="fold")
    if energies:
        table.add_column("hull", justify="right")
    for atoms in found:
        told = atoms.info["scores"]
        given = ", ".join(f"{atoms[i].symbol} {i}" for i in request.site_targets) or "all"
        figures = [str(len(atoms)), f"{atoms.get_volume() / len(atoms):.1f}"]
        figures += [figure(told["distance"]), figure(told["expected_error"])]
        figures += [known.find(atoms) or "new"]
        figures += [in_words(told["energy_above_hull"], 2) or "?"] if energies else []
        table.add_row(str(atoms.info["frame"]), atoms.get_chemical_formula(), given, *figures)
    show(table)
    whole = "the file" if len(written_files(files.out, 2)) == 1 else str(files.stream)
    typer.echo(f"frame: place in {whole}, as in ase.io.read(file, frame); sites: those with the DOS")
    typer.echo(f"distance: {DISTANCE}, of the DOS that a forward model predicts; error: its expected error")
    if energies:
        typer.echo("hull: eV/atom above the hull, by CHGNet")
    later = "" if files.relaxed else ", and may relax into one"
    typer.echo(f"known: which of {len(known)} known crystals it is; new: none of these, but others may know it{later}")
    _show_nearest(request)
    if request.settings.seed is None and found:
        tell(f"seed: {found[0].info['dosmatgen']['seed']} (--seed gives the same structures again)")


def _show_nearest(request: Request) -> None:
    """Say how near the nearest known crystal of the allowed elements is: what generated ones have to beat."""
    from dosmatgen_ase.retrieval.query import search

    wanted = request.total_target or request.site_targets
    settings = request.settings
    try:
        hits = search(wanted, 1, elements=settings.elements, exclude_elements=settings.exclude_elements)
    except ValueError:  # no known crystal can be compared
        hits = []
    for atoms in hits:
        told = atoms.info["search"]
        what = f"{told['material_id']} {atoms.get_chemical_formula()}, distance {figure(told['distance'])}"
        whose = " of the allowed elements" if settings.elements or settings.exclude_elements else ""
        pinned = settings.fixed_species or settings.composition or settings.template is not None
        free = "; what is pinned does not count here" if pinned else ""
        typer.echo(f"nearest known crystal{whose}: {what} ({told['source']}{free})")


def _draw(found: list[Atoms], plot: Path, request: Request, forward: DOSPredictor) -> None:
    from dosmatgen_ase.judge.ranking import predicted_for_targets
    from dosmatgen_ase.plotting import plot_candidates

    sites, total = request.site_targets, request.total_target
    target = total or next(iter(sites.values()))
    shown = []
    for atoms, prediction in zip(found, forward.predict_arrays(found), strict=True):
        distance = figure(atoms.info["scores"]["distance"])
        title = f"frame {atoms.info['frame']}: {atoms.get_chemical_formula()}, predicted distance {distance}"
        shown.append((title, atoms, [dos for dos, _ in predicted_for_targets(prediction, sites, total)]))
    plot_candidates(target, shown, plot, sites=list(sites))
    tell(f"picture: {plot}")
