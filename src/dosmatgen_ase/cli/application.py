"""The application of all commands, and the one place where an error or a warning becomes one line."""

from __future__ import annotations

import contextlib
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Option
from typer.core import TyperGroup

from dosmatgen_ase import __version__
from dosmatgen_ase.cli import leave

USAGE, INTERRUPTED = 2, 130  # exit codes
ROOM, NAMED = 28, 5  # characters of a reason that a table takes; names that a line below it takes
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError)  # what the library raises


class OneLineErrors(TyperGroup):
    """Turns whatever a command raises into one line on stderr and an exit code; ``--debug`` lets it through."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with _ctrl_c_as_exception(), warnings.catch_warnings():
                warnings.showwarning = partial(_show_warning, warnings.showwarning)
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


@contextlib.contextmanager
def _ctrl_c_as_exception() -> Iterator[None]:
    """Let Ctrl-C raise `KeyboardInterrupt` where it would end the process at once, as outside of a command."""
    ends = signal.getsignal(signal.SIGINT) is leave
    if ends:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ends:
            signal.signal(signal.SIGINT, leave)


def _show_warning(others: Any, message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Show the package's own warnings as one line each, and leave the `others` to Python."""
    if category.__module__.startswith("dosmatgen_ase."):
        _say(f"warning: {message}", "yellow")
    else:
        others(message, category, *place, **more)


def _say(line: str, style: str) -> None:
    """One line on stderr, however wide the terminal is."""
    Console(stderr=True).print(Text(printable(" ".join(line.split())), style=style), soft_wrap=True)


def printable(text: object) -> str:
    """Return a text without control characters: names of files may hold some, and a terminal obeys them."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def show(*tables: Table) -> None:
    """Print tables as they are: brackets and colons in names are no markup."""
    Console(markup=False, emoji=False).print(*tables)


def tell(line: str, *, err: bool = False) -> None:
    """Print a line that may hold names of files."""
    typer.echo(printable(line), err=err)


class Reasons:
    """Reasons of failures, for which a column has no room: they are told below the table, each with whom it hit."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def cell(self, name: str, reason: str) -> str:
        """What the table has: a short reason itself."""
        if len(reason) <= ROOM:
            return reason
        self._names.setdefault(" ".join(reason.split()), []).append(name)
        return "see below"

    def tell(self) -> None:
        """One line for each reason."""
        for reason, names in self._names.items():
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            tell(f"{', '.join(names[:NAMED])}{more}: {reason}")


def busy(step: str) -> AbstractContextManager[object]:
    """Say on a terminal what goes on during a step that has no progress bar; elsewhere nothing."""
    return Console(stderr=True).status(Text(printable(step)))


@contextlib.contextmanager
def resumable(kept: Callable[[], str]) -> Iterator[None]:
    """Say on Ctrl-C what is kept of the work in this block."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f": {kept()}; the same command goes on from there") from None


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
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options before the command; `OneLineErrors` reads ``debug``."""
