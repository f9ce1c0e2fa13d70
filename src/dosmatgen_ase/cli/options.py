"""Options that several commands share, and how they are read; those of DOS_FILE are in `target`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import typer
from typer import Argument, Option

from dosmatgen_ase.cli.files import read_structure
from dosmatgen_ase.generate.settings import GenerationSettings, described
from dosmatgen_ase.parsing import names_from_text, numbers_from_text, pins_from_text

Command = TypeVar("Command", bound=Callable[..., None])

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
    "template": _Setting("--template", START, Path | None, "FILE", read_structure),
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


def site_list(text: str | None, option: str) -> list[int]:
    """``"0-3"`` or ``"0,2"`` as sites; none for None."""
    try:
        return [] if text is None else numbers_from_text(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def figure(value: float | None) -> str:
    """Return a number for a table; a question mark, which breaks no column, where it is unknown."""
    return "?" if value is None or math.isnan(value) else f"{value:.2f}"
