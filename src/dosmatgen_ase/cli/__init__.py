"""The command line: ``dosmatgen search``, ``index``, ``generate``, ``dos``, ``report``, ``train``, ``train-predictor``,
``relax``, ``predict``, ``dft``, ``label`` and ``data``.

Thin: every command reads its arguments, calls the library and prints. Heavy libraries are imported inside the commands,
so that ``dosmatgen --help`` needs none of them. One module holds one group of commands; `options`, `target` (DOS_FILE)
and `files` what they share;
`application` turns an error into one line on stderr and an exit code (1; 2 for a wrong command line; 130 for Ctrl-C);
`commands` joins all. This file imports nothing, so that Ctrl-C is heard from the first moment.
"""

from __future__ import annotations

from importlib import import_module

from dosmatgen_ase.moved import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from dosmatgen_ase.cli.commands import app
    from dosmatgen_ase.cli.files import read_structures

__all__ = ["app", "main", "read_structures"]

_HOME = {"app": "commands", "read_structures": "files"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def main() -> None:
    """Entry point of the ``dosmatgen`` command."""
    import _signal  # type: ignore[import-not-found]  # what `signal` is made of, without the enum, which would take as long as all before

    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:  # a shell may ignore it for a job behind it
        _signal.signal(_signal.SIGINT, leave)
    import sys

    if hasattr(sys.stdout, "reconfigure"):  # what takes its place may lack it
        sys.stdout.reconfigure(errors="replace")  # a sign that a terminal lacks must not end a command after its work
    from dosmatgen_ase.cli.commands import app

    app()  # which hears Ctrl-C as an exception while a command runs


def leave(*_: object) -> None:
    """End at Ctrl-C before and after a command, where there is nothing to tidy up, and much to interrupt."""
    import os

    os.write(2, b"interrupted\n")
    os._exit(130)
