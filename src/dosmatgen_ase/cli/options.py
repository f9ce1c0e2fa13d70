"""What several commands share: their options, how option values are read, and input and output files."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ase import Atoms

    from dosmatgen_ase.dos import TargetDOS

DosFile = Annotated[
    Path,
    typer.Argument(
        metavar="DOS_FILE",
        help="vasprun.xml, pymatgen or TargetDOS JSON, .npz, or two columns: energy (eV), DOS (states/eV).",
        show_default=False,
    ),
]
FileSite = Annotated[
    int | None,
    typer.Option("--site", help="Site of the file's structure whose DOS is meant, from 0. Default: the total DOS."),
]
Reference = Annotated[str | None, typer.Option(help="What zero energy is, if the file does not say: fermi or vbm.")]
Sigma = Annotated[float | None, typer.Option(help="Gaussian broadening of the file, standard deviation in eV.")]
Kind = Annotated[str | None, typer.Option(help="Whose DOS a two-column file holds: site or total.")]
Window = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Energies (eV) in which the DOS is meant; elsewhere it counts as unknown."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: CUDA where there is one.")]
Data = Annotated[Path, typer.Option(help="Folder with structures.parquet and site_dos/*.npz.")]
Predictor = Annotated[
    Path | None, typer.Option(help="Forward model made by train-predictor. Default: the shipped one.")
]

Structures = Annotated[
    list[Path],
    typer.Argument(metavar="FILES", help="Files that ASE reads, with one structure or many.", show_default=False),
]


def read_target(
    dos_file: Path,
    site: int | None,
    *,
    reference: str | None,
    sigma: float | None,
    kind: str | None,
    window: tuple[float, float] | None,
) -> TargetDOS:
    """Read the DOS that a command is about, cut to its window; say on the standard error what was assumed."""
    from dosmatgen_ase.dos import TargetDOS

    target = TargetDOS.from_file(dos_file, site, reference=reference, sigma=sigma, kind=kind)
    for sentence in target.provenance.get("assumed", []):
        typer.echo(f"{dos_file}: {sentence}", err=True)
    return target if window is None else target.window(*window)


def whole_numbers(text: str, option: str) -> list[int]:
    """``"4-7"``, ``"4,6"`` or ``"4"`` as a list."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,3})(?:-(\d{1,3}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise typer.BadParameter(f"{text!r} must be like 4, 4,6 or 4-7", param_hint=option)
        numbers += range(first, last + 1)
    return numbers


def names(text: str | None) -> list[str] | None:
    """``"Ni,Au"`` as ``["Ni", "Au"]``."""
    return None if text is None else [name.strip() for name in text.split(",")]


def pins(texts: Sequence[str]) -> dict[int, str]:
    """``["0=Co"]`` as ``{0: "Co"}``."""
    found = {}
    for text in texts:
        match = re.fullmatch(r"(\d{1,3})=([A-Za-z]{1,2})", text)
        if match is None:
            raise typer.BadParameter(f"{text!r} must be like 0=Co", param_hint="--fixed-species")
        if int(match[1]) in found:
            raise typer.BadParameter(f"site {int(match[1])} is named twice", param_hint="--fixed-species")
        found[int(match[1])] = match[2]
    return found


def writable(path: Path | None, endings: Sequence[str] = (".png", ".pdf", ".svg")) -> None:
    """Find out before the work, not after it, that a result cannot be written; None is not asked for."""
    if path is None:
        return
    if path.suffix.lower() not in endings:
        raise ValueError(f"cannot write {path}: its name must end in {' or '.join(endings)}")
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; choose another place") from error
    if not existed:
        path.unlink()


def figure(value: float | None) -> str:
    """Return a number for a table, or "unknown"."""
    return "unknown" if value is None or math.isnan(value) else f"{value:.2f}"


def read_structure(path: Path) -> Atoms:
    """Read the template."""
    import ase.io

    if not path.is_file():
        raise FileNotFoundError(f"no template {path}: give a file that ASE reads (CIF, POSCAR, extxyz, ...)")
    try:
        return ase.io.read(path)
    except Exception as error:
        raise ValueError(f"template {path} is not a structure that ASE reads: {error}") from error


def read_structures(files: Sequence[Path]) -> dict[str, Atoms]:
    """Every structure of the files, named ``STEM`` or, where a file has many, ``STEM-0000``, ``STEM-0001``, ..."""
    import ase.io

    found: dict[str, Atoms] = {}
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}: give files that ASE reads (CIF, POSCAR, extxyz, ...)")
        try:
            frames = ase.io.read(path, ":")
        except Exception as error:
            raise ValueError(f"{path} holds no structures that ASE reads: {error}") from error
        stem = re.sub(r"[^\w+-]+", "_", path.stem)
        for i, atoms in enumerate(frames):
            name = stem if len(frames) == 1 else f"{stem}-{i:04d}"
            if name in found:
                raise ValueError(f"two structures would be named {name}: rename {path}")
            found[name] = atoms
    return found
