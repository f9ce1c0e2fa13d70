"""What can go wrong in a calculation: with one structure, with the machine, or from outside."""

from __future__ import annotations

from pathlib import Path


class ElectronicStructureError(RuntimeError):
    """The calculation of one structure failed; `log` is the output to look at, where there is one."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message if log is None else f"{message} (see {log})")
        self.log = log


class InterruptedCalculation(ElectronicStructureError):
    """A program was stopped from outside, or memory was too short, which says nothing about the structure."""


class ProgramNotStarted(RuntimeError):
    """A program does not work at all, which would happen to every structure."""
