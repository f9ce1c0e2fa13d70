"""DOS_FILE: how a command reads the target, and what it tells of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from typer import Argument, Option

from dosmatgen_ase.cli.application import tell
from dosmatgen_ase.limits import MAX_ATOMS

if TYPE_CHECKING:
    from dosmatgen_ase.dos import TargetDOS

Key = TypeVar("Key")
TARGET_PANEL = "How DOS_FILE is read"
reading = partial(Option, rich_help_panel=TARGET_PANEL)
DosFile = Annotated[
    Path,
    Argument(
        metavar="DOS_FILE",
        help="vasprun.xml, DOSCAR, pymatgen or TargetDOS JSON, .npz, files of other programs, or columns of text: "
        "energy (eV), DOS (states/eV).",
        show_default=False,
    ),
]


def column_from_text(text: str) -> int | str:
    """Number or name of a column."""
    return int(text) if re.fullmatch(r"\s*\d{1,6}\s*", text) else text.strip()


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
