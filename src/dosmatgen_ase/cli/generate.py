"""``dosmatgen generate``: crystals for a DOS, ranked and drawn."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dosmatgen_ase.cli.application import app
from dosmatgen_ase.cli.options import (
    Device,
    DosFile,
    FileSite,
    Kind,
    Predictor,
    Reference,
    Sigma,
    Window,
    figure,
    names,
    pins,
    read_structure,
    read_target,
    whole_numbers,
    writable,
)

if TYPE_CHECKING:
    from dosmatgen_ase.dos import TargetDOS
    from dosmatgen_ase.forward.predictor import DOSPredictor
    from dosmatgen_ase.judge.ranking import Ranking


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
        "num_atoms": None if num_atoms is None else whole_numbers(num_atoms, "--num-atoms"),
        "sites": None if on_sites is None else whole_numbers(on_sites, "--on-sites"),
        "fixed_sites": None if fixed_sites is None else whole_numbers(fixed_sites, "--fixed-sites"),
        "fixed_species": pins(fixed_species or ()),
        "elements": names(elements),
        "exclude_elements": names(exclude_elements),
        "composition": composition,
        "strength": strength,
        "fixed_cell": fixed_cell,
        "guidance_scale": guidance_scale,
        "seed": seed,
        **({} if num_steps is None else {"num_steps": num_steps}),
    }
    target = read_target(dos_file, site, reference=reference, sigma=sigma, kind=kind, window=window)
    writable(out, (".extxyz", ".xyz"))
    writable(plot)
    settings["template"] = None if template is None else read_structure(template)

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
    writable(best_file, (".extxyz", ".xyz"))
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
        figures += [figure(told["distance"]), figure(told["expected_error"])]
        figures += [figure(told["energy_above_hull"])] if energies else []
        table.add_row(str(atoms.info["frame"]), atoms.get_chemical_formula(), given, *figures)
    Console().print(table)
    typer.echo("frame: place in the file, as in ase.io.read(file, frame)")
    typer.echo("predicted distance: normalised L1 of the DOS that a forward model predicts, to the target")
    if plot is not None:
        from dosmatgen_ase.plotting import plot_candidates

        target = total or next(iter(sites.values()))
        shown = []
        for atoms, prediction in zip(found[:4], forward.predict_arrays(found[:4]), strict=True):
            distance = figure(atoms.info["scores"]["distance"])
            title = f"frame {atoms.info['frame']}: {atoms.get_chemical_formula()}, predicted distance {distance}"
            shown.append((title, atoms, [dos for dos, _ in predicted_for_targets(prediction, sites, total)]))
        plot_candidates(target, shown, plot, sites=() if total is not None else list(sites))
        typer.echo(f"picture: {plot}")
