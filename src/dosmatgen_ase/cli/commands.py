"""All commands: importing this module fills the application, in the order of its help."""

from dosmatgen_ase.cli.application import app

from dosmatgen_ase.cli import search, generate, dos, report, train, judge, dft  # isort: skip

__all__ = ["app", "dft", "dos", "generate", "judge", "report", "search", "train"]
