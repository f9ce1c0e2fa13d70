"""``dosmatgen report``: an inverse-design run as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dosmatgen_ase.cli.application import app
from dosmatgen_ase.cli.options import writable


@app.command()
def report(
    result: Annotated[
        Path, typer.Argument(metavar="RESULT", help="result.json of an inverse-design run.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="HTML file. Default: report.html beside RESULT.")
    ] = None,
) -> None:
    """Show an inverse-design run as one HTML file: target and computed DOS, crystals, a table sorted by match."""
    path = result.with_name("report.html") if out is None else out
    writable(path, (".html", ".htm"))
    from dosmatgen_ase.report import read_result, write_report

    typer.echo(f"report: {write_report(read_result(result), path)}")
