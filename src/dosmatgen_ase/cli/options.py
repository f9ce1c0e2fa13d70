"""What several commands share: their options, how option values are read, and input and output files."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import typer
from typer import Argument, Option

from dosmatgen_ase.cli.application import tell
from dosmatgen_ase.generate.settings import GenerationSettings, described
from dosmatgen_ase.limits import MAX_ATOMS
from dosmatgen_ase.parsing import names_from_text, numbers_from_text, pins_from_text

if TYPE_CHECKING:
    from ase import Atoms

    from dosmatgen_ase.dos import TargetDOS

Command = TypeVar("Command", bound=Callable[..., None])
Key = TypeVar("Key")

DosFile = Annotated[
    Path,
    Argument(
        metavar="DOS_FILE",
        help="vasprun.xml, DOSCAR, pymatgen or TargetDOS JSON, .npz, files of other programs, or columns of text: "
        "energy (eV), DOS (states/eV).",
        show_default=False,
    ),
]
PICTURES = (".png", ".pdf", ".svg")
DISTANCE = "normalised L1 to the target, 0 is the same DOS, 1 an error as large as the target"
Overwrite = Annotated[bool, Option("--overwrite", help="Replace existing files that this command did not write.")]
Device = Annotated[str | None, Option(help="cpu, cuda, cuda:1, ... Default: CUDA where there is one.")]
Data = Annotated[Path, Option(help="Folder with structures.parquet and site_dos/*.npz.")]
Predictor = Annotated[Path | None, Option(help="Forward model made by train-predictor. Default: the shipped one.")]

STRUCTURE_TABLES = Argument(
    metavar="STRUCTURES",
    help="A table laid out as data/structures.parquet, or files that ASE reads.",
    show_default=False,
)
Structures = Annotated[
    list[Path], Argument(metavar="FILES", help="Files that ASE reads, with one structure or many.", show_default=False)
]


def column_from_text(text: str) -> int | str:
    """Number or name of a column."""
    return int(text) if re.fullmatch(r"\s*\d{1,6}\s*", text) else text.strip()


# -- options that are declared once and stand in several commands ------------------------------------------------------


def with_options(**groups: Callable[..., Any]) -> Callable[[Command], Command]:
    """Give a command, in place of a parameter of that name, the options of a group; it gets the object they make.

    A group is a class or function whose parameters typer can read. What the command declares itself is not the group's.
    """

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters
        members: dict[str, list[inspect.Parameter]] = {}
        for name, group in groups.items():
            options = inspect.signature(group, eval_str=True).parameters
            members[name] = [option for option in options.values() if option.name not in own]

        @wraps(command)
        def wrapper(**values: Any) -> None:
            for name, group in groups.items():
                values[name] = group(**{option.name: values.pop(option.name) for option in members[name]})
            command(**values)

        shown = [p.replace(kind=p.KEYWORD_ONLY) for name, one in own.items() for p in members.get(name, [one])]
        wrapper.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in shown}
        return wrapper  # type: ignore[return-value]

    return decorate


TARGET_PANEL = "How DOS_FILE is read"
reading = partial(Option, rich_help_panel=TARGET_PANEL)


@dataclass(frozen=True)
class TargetOptions:
    """How DOS_FILE is read: every command that takes one has these."""

    site: Annotated[
        int | None,
        reading(help="Take the DOS of this site of the file's structure, counted from 0. Default: the total DOS."),
    ] = None
    reference: Annotated[
        str | None,
        reading(
            help="What the zero of the energies is, if the file does not say: fermi or vbm. For any other zero, as the "
            "vacuum, give --efermi."
        ),
    ] = None
    efermi: Annotated[
        float | None,
        reading(help="Energy of a text file that becomes zero, in eV whatever --units says: its Fermi level."),
    ] = None
    align: Annotated[bool, reading("--align", help="Move zero to the valence-band maximum, below the gap.")] = False
    columns: Annotated[
        str | None,
        reading(
            metavar="0,1", help="Columns of text: energy, then those that add up to the DOS. Numbers from 0, or names."
        ),
    ] = None
    spin: Annotated[
        str | None,
        reading(
            help="Spins in columns of text: summed (both added), one (of two that are alike), separate (up and down)."
        ),
    ] = None
    units: Annotated[str | None, reading(help="Unit of the energies in text: eV, meV, Ry or Ha.")] = None
    electrons: Annotated[
        float | None,
        reading(help="Scale the DOS to this number of states below 0 eV in the whole file, if its unit is arbitrary."),
    ] = None
    sigma: Annotated[float | None, reading(help="Gaussian broadening of the file, standard deviation in eV.")] = None
    kind: Annotated[
        str | None, reading(help="Whose DOS it is, if the file does not say: site, or total (of the cell).")
    ] = None
    window: Annotated[
        tuple[float, float] | None,
        reading(metavar="LOW HIGH", help="Use the DOS between these energies (eV) only; elsewhere it is unknown."),
    ] = None

    def read(self, dos_file: Path) -> TargetDOS:
        """Read the DOS that a command is about, cut to its window; say on the standard error what was assumed."""
        from dosmatgen_ase.dos import DOSWarning, TargetDOS

        warnings.simplefilter("default", DOSWarning)  # the application shows them
        names = ("reference", "sigma", "kind", "spin", "efermi", "units")
        columns = None if self.columns is None else [column_from_text(part) for part in self.columns.split(",")]
        target = TargetDOS.from_file(
            dos_file, self.site, columns=columns, **{name: getattr(self, name) for name in names}
        )
        try:
            if self.align:
                target = target.aligned()
            if self.electrons is not None:  # of the whole file, so before the window
                target = target.scaled(electrons=self.electrons)
            if self.window is not None:
                target = target.window(*self.window)
            target.on_grid()  # what the model cannot see is an error before anything is said
        except ValueError as error:
            raise ValueError(f"{dos_file}: {error}") from error
        if assumed := target.provenance.get("assumed"):
            tell(f"{dos_file}: assumed: {'; '.join(assumed)} (see --help: {TARGET_PANEL})", err=True)
        return target


def on_told_zero(dos_file: Path, targets: Mapping[Key, TargetDOS]) -> dict[Key, TargetDOS]:
    """`on_common_zero`; say on the standard error if a total with a gap is moved to its valence-band maximum."""
    from dosmatgen_ase.dos import on_common_zero

    moved = on_common_zero(targets)
    for target in dict.fromkeys(moved[key] for key, given in targets.items() if moved[key] != given):
        tell(f"{dos_file}: {target.provenance['steps'][-1]}", err=True)
    return moved


def tell_doubts(target: TargetDOS) -> None:
    """Say on the standard error what is probably wrong with a target, as `generate` does."""
    from dosmatgen_ase.dos.checks import doubts

    for doubt in doubts(target, (1, MAX_ATOMS if target.kind == "total" else 1)):
        tell(f"warning: {doubt}", err=True)


class _Setting(NamedTuple):
    """How a field of `GenerationSettings` is written on the command line."""

    flag: str
    panel: str
    type: Any
    metavar: str | None = None
    read: Callable[[Any], Any] = lambda value: value


CRYSTAL, START, SAMPLING = "What the crystal must have", "Start from a crystal", "How it is drawn"
SETTINGS = {
    "num_atoms": _Setting("--num-atoms", CRYSTAL, str | None, "4,6 or 4-7", numbers_from_text),
    "sites": _Setting("--on-sites", CRYSTAL, str | None, "0,2", numbers_from_text),
    "elements": _Setting("--elements", CRYSTAL, str | None, "Ni,Au", names_from_text),
    "exclude_elements": _Setting("--exclude-elements", CRYSTAL, str | None, "O,F", names_from_text),
    "composition": _Setting("--composition", CRYSTAL, str | None, "NiAu3"),
    "fixed_species": _Setting("--fixed-species", CRYSTAL, list[str] | None, "0=Co", pins_from_text),
    "new_only": _Setting("--new-only", CRYSTAL, bool),
    "template": _Setting("--template", START, Path | None, "FILE", lambda path: read_structure(path)),
    "strength": _Setting("--strength", START, float),
    "fixed_cell": _Setting("--fixed-cell", START, bool),
    "fixed_sites": _Setting("--fixed-sites", START, str | None, "0,2", numbers_from_text),
    "free_species": _Setting("--free-species", START, str | None, "0,2", numbers_from_text),
    "guidance_scale": _Setting("--guidance-scale", SAMPLING, float | None),
    "num_steps": _Setting("--num-steps", SAMPLING, int),
    "seed": _Setting("--seed", SAMPLING, int | None),
}
"""In the order of the help. Names, defaults and words are those of `GenerationSettings`; a test misses no field."""


def generation_settings(**values: Any) -> GenerationSettings:
    """What the options of `SETTINGS` make."""
    read: dict[str, Any] = {}
    for name, value in values.items():
        try:
            read[name] = value if value is None else SETTINGS[name].read(value)
        except ValueError as error:
            if name == "template":  # a file
                raise
            raise typer.BadParameter(str(error), param_hint=SETTINGS[name].flag) from None
    return GenerationSettings(**read)


def _settings_signature() -> inspect.Signature:
    """The options of `SETTINGS`, for `with_options`."""
    fields, words = inspect.signature(GenerationSettings).parameters, described()
    parameters = []
    for name, told in SETTINGS.items():
        several = " May be given several times." if told.type == list[str] | None else ""
        text = words[name].replace("`", "") + several
        option = Option(told.flag, metavar=told.metavar, help=text, rich_help_panel=told.panel)
        parameters.append(fields[name].replace(annotation=Annotated[told.type, option]))
    return inspect.Signature(parameters)


generation_settings.__signature__ = _settings_signature()  # type: ignore[attr-defined]


# -- files -------------------------------------------------------------------------------------------------------------


def site_list(text: str | None, option: str) -> list[int]:
    """``"0-3"`` or ``"0,2"`` as sites; none for None."""
    try:
        return [] if text is None else numbers_from_text(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def output(
    ctx: typer.Context,
    option: str,
    endings: Sequence[str],
    *,
    path: Path | None = None,
    count: int = 1,
    marks: Sequence[bytes] = (),
    ours: bool = True,
    continued: bool = False,
    exact: bool = False,
) -> None:
    """Check before the work that an output can be written and replaces no file of the user.

    Parameters
    ----------
    option : str
        Name of the parameter that holds the path.
    endings : sequence of str
        That its name may have.
    path : path, optional
        What is to be written, if it is only derived from that parameter.
    count : int
        Largest number of structures; several in POSCAR format become numbered files.
    marks : sequence of bytes
        By which a file is known as made by this command, beside the name of the package. Formats that keep no ``info``
        have that name only.
    ours : bool
        Whether the name of the package is enough. It is not where other commands write such files, too, and their work
        would be lost.
    continued : bool
        Whoever writes it looks at what it holds, and goes on from there.
    exact : bool
        Exactly `count` structures are written, not fewer.
    """
    from dosmatgen_ase.files import (
        MARK,
        STRUCTURES,
        check_output,
        keeps_info,
        numbered_files,
        possible_files,
        structure_format,
        written_files,
    )

    path = path or ctx.params[option]
    if path is None:
        return
    files, known = [path], (MARK, *marks) if ours else tuple(marks)
    if endings == STRUCTURES:
        structure_format(path)
        files = written_files(path, count) if exact else possible_files(path, count)
        files += [file for file in numbered_files(path) if file not in files]  # they may be removed
        known = known if keeps_info(path) else (MARK,)  # "search" and the like stand in CIF of anybody
    elif path.suffix.lower() not in endings:
        raise ValueError(f"cannot write {path}: its name must end in {' or '.join(endings)}")
    others: list[Path] = []
    for name, value in ctx.params.items():
        given = value if isinstance(value, list | tuple) else [value]
        others += [Path(v) for v in given if name != option and isinstance(v, str | Path) and v]
    overwrite = continued or bool(ctx.params.get("overwrite"))
    for file in files:
        check_output(file, inputs=others, marks=known, overwrite=overwrite)


def figure(value: float | None) -> str:
    """Return a number for a table; a question mark, which breaks no column, where it is unknown."""
    return "?" if value is None or math.isnan(value) else f"{value:.2f}"


_FREE_MEMORY, _MEMORY = 2**30, 40  # bytes while a file is read; and so many times its size: an Atoms takes 2 kB
_UNPACKED = 10  # of a packed file, usually


@contextlib.contextmanager
def _bounded_memory(path: Path) -> Iterator[None]:
    """Bound what a reader takes: some make room for as many atoms as the head of a file tells. On Linux only.

    The bound is of the whole process, so it is for the command line, where nothing else runs meanwhile.
    """
    import resource

    pages = Path("/proc/self/statm")
    if not pages.exists():
        yield
        return
    size = path.stat().st_size * (_UNPACKED if path.suffix.lower() in (".gz", ".bz2", ".xz") else 1)
    wanted = int(pages.read_text().split()[0]) * resource.getpagesize() + _FREE_MEMORY + _MEMORY * size
    before = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *limits]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _frames(path: Path) -> Any:
    """Read the structures of a file; raise whatever ASE raises, and ValueError where that takes too much memory."""
    from dosmatgen_ase.files import read_structures as read

    try:
        with _bounded_memory(path):
            return read(path)
    except MemoryError:
        told = "it asks for more memory than a file of its size needs: does its head tell the right number of atoms?"
        raise ValueError(told) from None


def read_structure(path: Path) -> Any:
    """Read the template. Of several structures it is the last, as in ASE; a line says so."""
    from dosmatgen_ase.files import no_file, reason_of

    if not path.is_file():
        raise FileNotFoundError(f"{no_file(path, 'template')}: give a file that ASE reads (CIF, POSCAR, extxyz, ...)")
    try:
        frames = _frames(path)
        last = frames[-1]
    except Exception as error:
        raise ValueError(f"template {path} is not a structure that ASE reads: {reason_of(error)}") from error
    if len(frames) > 1:
        tell(f"template {path}: {last.get_chemical_formula()}, the last of {len(frames)} structures", err=True)
    return last


def single_table(paths: Sequence[Path]) -> Path | None:
    """The table among files of structures, which must come alone; None where there is none."""
    tables = [path for path in paths if path.suffix == ".parquet"]
    if tables and len(paths) > 1:
        raise ValueError(f"give {tables[0]} alone: a table and other files cannot be read in one run")
    return tables[0] if tables else None


def read_structures(files: Sequence[Path]) -> dict[str, Atoms]:
    """Every structure of the files, named ``STEM`` or, where a file has many, ``STEM-0000``, ``STEM-0001``, ..."""
    from dosmatgen_ase.files import no_file, reason_of

    found: dict[str, Atoms] = {}
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{no_file(path)}: give files that ASE reads (CIF, POSCAR, extxyz, ...)")
        try:
            frames = _frames(path)
        except Exception as error:
            raise ValueError(f"{path} holds no structures that ASE reads: {reason_of(error)}") from error
        stem = re.sub(r"[^\w+-]+", "_", path.stem)
        for i, atoms in enumerate(frames):
            name = stem if len(frames) == 1 else f"{stem}-{i:04d}"
            if name in found:
                raise ValueError(f"two structures would be named {name}: rename {path}")
            found[name] = atoms
    return found
