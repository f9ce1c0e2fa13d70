"""The command line: ``dosmatgen search``, ``index``, ``generate``, ``dos``, ``report``, ``train``, ``train-predictor``,
``relax``, ``predict``, ``dft``, ``label`` and ``data``.

Thin: every command reads its arguments, calls the library and prints. Heavy libraries are imported inside the commands,
so that ``dosmatgen --help`` needs none of them. One module holds one group of commands; `options` what they share;
`application` turns an error into one line on stderr and an exit code (1; 2 for a wrong command line; 130 for Ctrl-C).
"""

from dosmatgen_ase.cli.application import app
from dosmatgen_ase.cli.options import read_structures

# Imported for the commands that they add to `app`, in the order of its help.
from dosmatgen_ase.cli import search, generate, dos, report, train, judge, dft  # isort: skip

__all__ = ["app", "dft", "dos", "generate", "judge", "main", "read_structures", "report", "search", "train"]


def main() -> None:
    """Entry point of the ``dosmatgen`` command."""
    app()
