"""``dosmatgen report``: an inverse-design run as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from dosmatgen_ase.cli.application import app, tell
from dosmatgen_ase.cli.files import output
from dosmatgen_ase.cli.options import Overwrite


@app.command()
def report(
    ctx: typer.Context,
    result: Annotated[
        Path,
        Argument(
            metavar="RESULT",
            help="result.json of an inverse-design run, as write_result and workflows/inverse_design_*.py write it.",
            show_default=False,
        ),
    ],
    out: Annotated[Path | None, Option("-o", "--out", help="HTML file. Default: report.html beside RESULT.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Show an inverse-design run as one HTML file: target and computed DOS, crystals, a table sorted by match."""
    path = result.with_name("report.html") if out is None else out
    output(ctx, "out", (".html", ".htm"), path=path)
    from dosmatgen_ase.report import read_result, write_report

    tell(f"report: {write_report(read_result(result), path)}")
