"""``dosmatgen relax`` and ``predict``: relaxation and prediction of structures, without DFT."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from tqdm import tqdm
from typer import Option

from dosmatgen_ase.cli.application import Reasons, app, busy, resumable, show, tell
from dosmatgen_ase.cli.files import PICTURES, output, read_structures
from dosmatgen_ase.cli.options import Overwrite, Structures, figure, site_list

if TYPE_CHECKING:
    from ase import Atoms

    from dosmatgen_ase.dos import TargetDOS
    from dosmatgen_ase.judge.stability import Hull

PREDICTION = "dosmatgen_ase.predict_dos"
"""Format of a prediction, by which it is told from a result of DFT: the one may be replaced by another, DFT not."""


@app.command()
def relax(
    ctx: typer.Context,
    files: Structures,
    out: Annotated[
        Path,
        Option("-o", "--out", help="File of the relaxed: .extxyz, .xyz, .cif, .vasp (one each), .traj, .db or .json."),
    ] = Path("relaxed.extxyz"),
    overwrite: Overwrite = False,
    calculator: Annotated[
        str, Option(help="chgnet, or a MACE model: the path of a file, or a name such as medium-mpa-0.")
    ] = "chgnet",
    trust_model: Annotated[
        bool, Option("--trust-model", help="Load a MACE model file, which may run any code: trust its maker.")
    ] = False,
    fmax: Annotated[float, Option(help="Converged when no force is larger than this, eV/A.")] = 0.05,
    max_steps: Annotated[int, Option(min=0, help="Limit of steps for each structure.")] = 200,
    time_limit: Annotated[float, Option(help="Limit of time for each structure, seconds.")] = 120.0,
    jobs: Annotated[int, Option("-j", "--jobs", min=1, help="Structures relaxed at a time.")] = 1,
    fixed_cell: Annotated[bool, Option("--fixed-cell", help="Keep the cell; only atoms move.")] = False,
    fixed_sites: Annotated[
        str | None, Option(help="Sites that do not move: 0-3 or 0,2. The cell is then fixed, too.")
    ] = None,
) -> None:
    """Relax cell and positions with a machine-learned potential. The table and the file tell what failed.

    With CHGNet the table also has the energy above the hull, made by the same potential. A run that was killed goes on
    where it stopped: give the same command again. Atoms that a file marks as fixed stay, and the cell with them.
    """
    from dosmatgen_ase.files import STRUCTURES, stream_of, write_extxyz, write_structures
    from dosmatgen_ase.files import read_structures as read

    with busy("loading the potential"):
        from dosmatgen_ase.judge.relaxation import check_trust
        from dosmatgen_ase.judge.relaxed_file import relax_into
        from dosmatgen_ase.judge.stability import load_hull

    check_trust(calculator, trust_model)
    stream = stream_of(out)
    output(ctx, "out", STRUCTURES, path=stream, marks=(b"relaxation=",), ours=False)
    named = read_structures(files)
    if out != stream:
        output(ctx, "out", STRUCTURES, count=len(named), marks=(b"relaxation",), ours=False, exact=True)
    limits: dict[str, Any] = {"fmax": fmax, "max_steps": max_steps, "time_limit": time_limit, "processes": jobs}
    limits["trust_model"] = trust_model
    held: dict[str, Any] = {"fixed_cell": fixed_cell, "fixed_sites": site_list(fixed_sites, "--fixed-sites")}
    warnings.filterwarnings("ignore", module=r"chgnet\.")  # it warns of its own code
    with resumable(lambda: f"what is relaxed is kept in {stream}"):
        relaxed = relax_into(stream, list(named.values()), calculator, **limits, **held, overwrite=overwrite)
    hull = load_hull() if calculator == "chgnet" else None
    table, reasons = _relaxed_table(named, relaxed, hull)
    if len(read(stream, format="extxyz")) <= len(relaxed):  # else it holds more of this run than was asked for
        write_extxyz(stream, relaxed)
    if out != stream:
        write_structures(out, relaxed)
    show(table)
    reasons.tell()
    if all(atoms.info["relaxation"]["energy"] is None for atoms in relaxed):
        raise RuntimeError("no structure could be relaxed: the reasons stand above")


def _relaxed_table(named: Iterable[str], relaxed: list[Atoms], hull: Hull | None) -> tuple[Table, Reasons]:
    """What became of each structure, whose energy above the hull is written into its info."""
    from dosmatgen_ase.judge.stability import in_words

    table, reasons = Table("structure", "formula", "steps", "eV/atom", "above hull", "moved, A", "outcome"), Reasons()
    for name, atoms in zip(named, relaxed, strict=True):
        told = atoms.info["relaxation"]
        energy = "" if told["energy"] is None else f"{told['energy']:.3f}"
        above = hull.above(atoms.numbers, told["energy"]) if hull else None
        if above is not None:
            atoms.info["energy_above_hull"] = above
        figures = str(told["steps"]), energy, in_words(above), f"{told['rmsd']:.2f}"
        outcome = reasons.cell(name, told["reason"] or "converged")
        table.add_row(name, atoms.get_chemical_formula(), *figures, outcome)
    return table, reasons


@app.command()
def predict(
    ctx: typer.Context,
    files: Structures,
    out: Annotated[
        Path, Option("-o", "--out", help="Folder of the results. Each NAME.json can be read as a DOS_FILE.")
    ] = Path("predicted"),
    plot: Annotated[Path | None, Option(help="Picture (.png, .pdf, .svg) of the sites of the first one.")] = None,
    bands: Annotated[
        bool, Option("--bands", help="Write the bands, too: NAME_bands.json (ASE) and NAME_bands.png.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Predict the site DOS of structures by the forward model that ships, each in a fraction of a second.

    The column "expected error" estimates the normalised L1 to a computed DOS, from the spread of the ensemble.
    """
    with busy("loading the models"):
        from dosmatgen_ase.dos import TargetDOS
        from dosmatgen_ase.files import output_folder, write_atomic
        from dosmatgen_ase.forward.predictor import predict_dos

    output(ctx, "plot", PICTURES)
    named = read_structures(files)
    output_folder(out)
    for name in named:
        for file, marks in _outputs(out, name, bands).items():
            if file.stem != name and (file.stem in named or (plot and file.resolve() == plot.resolve())):
                raise ValueError(f"cannot write the bands of {name}: {file} is another output, too; rename one of them")
            output(ctx, "out", (file.suffix,), path=file, marks=marks, ours=False)
    table = Table("structure", "site", "element", "states in [-10, 0] eV", "band centre, eV", "expected error")
    reasons = Reasons()
    first: tuple[str, list[TargetDOS | None]] | None = None
    for name, atoms in tqdm(named.items(), disable=len(named) == 1, unit="structure", desc="predict"):
        try:
            sites: list[TargetDOS | None] = predict_dos(atoms)
        except (OSError, ImportError):  # of this installation, not of the structure
            raise
        except Exception as error:  # noqa: BLE001 -- whatever a structure raises is its own failure, and ends no run
            table.add_row(name, "", atoms.get_chemical_formula(), "", "", reasons.cell(name, _own(error)))
            _remove(_outputs(out, name, bands))
            continue
        total = None if None in sites else TargetDOS.sum_of([dos for dos in sites if dos])
        record: dict[str, Any] = {"format": PREDICTION, "sites": [dos and dos.to_dict() for dos in sites]}
        record["total"] = total and total.to_dict()
        write_atomic(out / f"{name}.json", json.dumps(record).encode())
        _add_sites(table, name, atoms, sites)
        if bands and (reason := _write_bands(atoms, out, name)):
            table.add_row("", "bands", "", "", "", reasons.cell(name, reason))
        first = first or (name, sites)
    show(table)
    reasons.tell()
    if first is None:
        raise RuntimeError("no structure could be predicted: the reasons stand above")
    name, sites = first
    known = {i: dos for i, dos in enumerate(sites) if dos is not None}
    tell(f"results: {out}/NAME.json, as in dosmatgen dos {out}/{name}.json --site {min(known)}")
    if plot is not None:
        from dosmatgen_ase.plotting import plot_dos

        plot_dos(list(known.values()), [f"site {i}" for i in known], path=plot)
        tell(f"picture: {plot}")


def _add_sites(table: Table, name: str, atoms: Atoms, sites: list[TargetDOS | None]) -> None:
    """One row for each site, also where its DOS is unknown."""
    for i, dos in enumerate(sites):
        figures = ("unknown", "", "")
        if dos is not None:
            error_expected = figure(dos.provenance["expected_distance"])
            figures = (f"{dos.total_states(hi=0.0):.2f}", f"{dos.band_centre():.2f}", error_expected)
        table.add_row(name if i == 0 else "", str(i), atoms.symbols[i], *figures)


def _own(error: Exception) -> str:
    """The reason of a failure that is of one structure alone."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _outputs(out: Path, name: str, bands: bool) -> dict[Path, Sequence[bytes]]:
    """Files of a structure, each with the marks by which it is known to come from this command."""
    return {out / f"{name}.json": (PREDICTION.encode(),), **(_of_bands(out, name) if bands else {})}


def _of_bands(out: Path, name: str) -> dict[Path, Sequence[bytes]]:
    """As `_outputs`, those of the bands alone: data and picture."""
    from dosmatgen_ase.files import MARK

    return {out / f"{name}_bands{ending}": (MARK, b"BandStructure", b"bandstructure") for ending in (".json", ".png")}


def _remove(files: Mapping[Path, Sequence[bytes]]) -> None:
    """Remove what an earlier run left for another structure; it would be taken for that of the one that failed."""
    from dosmatgen_ase.files import check_output

    for file, marks in files.items():
        with contextlib.suppress(FileExistsError):  # of somebody else: only --overwrite would have replaced it
            check_output(file, marks=marks)
            file.unlink(missing_ok=True)


def _write_bands(atoms: Atoms, out: Path, name: str) -> str | None:
    """Write the predicted bands, data and picture; or say why there are none."""
    from ase.io.jsonio import encode

    from dosmatgen_ase.files import write_atomic
    from dosmatgen_ase.forward.bands import predict_bands
    from dosmatgen_ase.plotting import plot_bands

    data, picture = made = _of_bands(out, name)
    try:
        found = predict_bands(atoms)
        plot_bands(found, picture)
        write_atomic(data, encode(found).encode())
    except (OSError, ImportError):
        raise
    except Exception as error:  # noqa: BLE001 -- as for the DOS, which stays
        _remove(made)
        return _own(error)
    return None
