"""``dosmatgen dos``: how a file is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text
from typer import Option

from dosmatgen_ase.cli.application import app, printable, show, tell
from dosmatgen_ase.cli.files import PICTURES, output
from dosmatgen_ase.cli.options import Overwrite, with_options
from dosmatgen_ase.cli.target import DosFile, TargetOptions, tell_doubts

if TYPE_CHECKING:
    from dosmatgen_ase.dos import TargetDOS


@app.command()
@with_options(options=TargetOptions)
def dos(
    dos_file: DosFile,
    options: TargetOptions,
    ctx: typer.Context,
    plot: Annotated[Path | None, Option(help="Picture (.png, .pdf or .svg) of the DOS.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Show how a file is read: grid, zero of energy, broadening, known window, band centre, states."""
    import numpy as np

    from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA

    output(ctx, "plot", PICTURES)
    target = options.read(dos_file)
    tell_doubts(target)
    seen = target.on_grid()
    energies, steps = target.energies, np.diff(target.energies)
    uniform = np.allclose(steps, steps[0], rtol=1e-3)
    spacing = f"{steps[0]:.4g}" if uniform else f"{steps.min():.3g} to {steps.max():.3g}"
    centre = target.band_centre()
    zero = {"fermi": "Fermi level", "vbm": "valence-band maximum"}[target.reference]
    facts = {
        "kind": {"site": "DOS of one site", "total": "total DOS of the cell"}[target.kind],
        "grid": f"{energies.size} energies from {energies[0]:.2f} to {energies[-1]:.2f} eV, step {spacing} eV",
        "zero of energy": f"{zero} (reference={target.reference})",
        "broadening": "unknown, taken as none" if target.sigma is None else f"sigma {target.sigma:g} eV",
        "known": _windows(target),
        "states below 0 eV": f"{target.total_states(hi=0.0):.3f} (known part)",
        "band centre": f"{centre:.3f} eV (of [-10, 0] eV)" if np.isfinite(centre) else "none: no states in [-10, 0] eV",
        "the model sees": f"{_windows(seen)} of [{MODEL_GRID.minimum:g}, {MODEL_GRID.maximum:g}] eV, "
        f"sigma {max(MODEL_SIGMA, seen.sigma or 0.0):g} eV",
        "source": str(target.provenance.get("source", "not told")),
        "steps": "; ".join(target.provenance.get("steps", [])) or "none",
        "sha256": target.digest(),
    }
    table = Table("", "", show_header=False, title=printable(dos_file))
    for name, fact in facts.items():
        table.add_row(name, Text(fact, overflow="fold"))
    show(table)
    if plot is not None:
        from dosmatgen_ase.plotting import plot_dos

        plot_dos(target, path=plot)
        tell(f"picture: {plot}")


def _windows(target: TargetDOS) -> str:
    """The known energies as intervals, eV."""
    import numpy as np

    edges = np.flatnonzero(np.diff(np.concatenate([[False], target.known, [False]]).astype(int))).reshape(-1, 2)
    e = target.energies
    parts = [f"[{e[first]:.2f}, {e[end - 1]:.2f}]" for first, end in edges[:4]]
    more = f" and {len(edges) - 4} more" if len(edges) > 4 else ""
    return f"{', '.join(parts)}{more} eV"
