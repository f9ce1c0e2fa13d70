"""Figures: overlays of densities of states.

Figures are made with `matplotlib.figure.Figure`, never through pyplot, so that no backend, style or open figure of the
user is touched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dosmatgen_ase.dos import MODEL_GRID, TargetDOS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TARGET_COLOUR = "#3b75af"
OTHER_COLOUR = "#ef8636"
ZERO_NAMES = {"fermi": r"$E_\mathrm{F}$", "vbm": r"$E_\mathrm{VBM}$"}


def plot_dos(
    targets: TargetDOS | Sequence[TargetDOS],
    labels: Sequence[str] | None = None,
    ax: Axes | None = None,
    path: str | PathLike[str] | None = None,
) -> Axes:
    """Draw one DOS, or the DOS that was wanted with those that were made over it.

    The first is filled blue and sets the energy range, its unknown energies are hatched; the others are orange lines,
    the first of them the strongest, interrupted where they are unknown. Each is drawn as it is: put them on one grid
    first (`TargetDOS.on_grid`) to compare heights.

    Parameters
    ----------
    targets : TargetDOS or sequence of TargetDOS
    labels : sequence of str, optional
        One per DOS, for the legend. By default "target" and "generated" (no legend for a single DOS).
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.
    path : path, optional
        Also save the figure there; the suffix says in which format (.png, .pdf, .svg). An existing file is replaced
        only by a complete one.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax.figure`` is the figure.

    Raises
    ------
    ValueError
        If there is nothing to draw, labels do not match, or the format is not known.
    OSError
        If the file cannot be written.
    """
    from matplotlib.figure import Figure

    targets = [targets] if isinstance(targets, TargetDOS) else list(targets)
    if not targets:
        raise ValueError("nothing to plot: give at least one TargetDOS")
    if labels is None:
        labels = ["target", "generated", *[""] * (len(targets) - 2)][: len(targets)] if len(targets) > 1 else [""]
    if len(labels) != len(targets):
        raise ValueError(f"{len(labels)} labels for {len(targets)} DOS: give one label each")
    if ax is None:
        ax = Figure(figsize=(6.0, 3.2), layout="constrained").add_subplot()

    first = targets[0]
    lo, hi = _energy_range(first)
    for start, end in _unknown_spans(first, lo, hi):
        # The underscore keeps all but the first span out of the legend.
        named = any(patch.get_label() == "unknown" for patch in ax.patches)
        label = "_unknown" if named else "unknown"
        ax.axvspan(start, end, facecolor="0.96", edgecolor="0.8", hatch="///", linewidth=0, zorder=0, label=label)
    wanted = np.where(first.known, first.values, np.nan)
    ax.fill_between(first.energies, wanted, color=TARGET_COLOUR, alpha=0.35, linewidth=0)
    ax.plot(first.energies, wanted, color=TARGET_COLOUR, linewidth=1.2, label=labels[0] or None)
    for rank, (dos, label) in enumerate(zip(targets[1:], labels[1:], strict=True)):
        made = np.where(dos.known, dos.values, np.nan)
        strength = max(0.35, 1.0 - 0.15 * rank)
        ax.plot(dos.energies, made, color=OTHER_COLOUR, linewidth=1.2, alpha=strength, label=label or None)

    ax.axvline(0.0, color="0.3", linewidth=0.8, linestyle=":")
    ax.set_xlim(lo, hi)
    ax.set_ylim(bottom=0.0)
    zeros = " or ".join(ZERO_NAMES[r] for r in sorted({dos.reference for dos in targets}))
    ax.set_xlabel(f"$E$ − {zeros} (eV)")
    ax.set_ylabel(f"{first.kind} DOS (states/eV)")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False)
    if path is not None:
        _save(ax.get_figure(root=True), Path(path))
    return ax


def _energy_range(dos: TargetDOS) -> tuple[float, float]:
    """The model's window, or all of a DOS that has nothing known in there."""
    inside = (dos.energies >= MODEL_GRID.minimum) & (dos.energies <= MODEL_GRID.maximum)
    if (inside & dos.known).any():
        return MODEL_GRID.minimum, MODEL_GRID.maximum
    return float(dos.energies[0]), float(dos.energies[-1])


def _unknown_spans(dos: TargetDOS, lo: float, hi: float) -> list[tuple[float, float]]:
    """Intervals of [lo, hi] in which the DOS is unknown, up to the known energies on either side."""
    known = np.clip(dos.energies[dos.known], lo, hi)
    left, right = np.flatnonzero(dos.known)[:-1], np.flatnonzero(dos.known)[1:]
    holes = [(float(dos.energies[a]), float(dos.energies[b])) for a, b in zip(left, right, strict=True) if b > a + 1]
    spans = [(lo, float(known[0])), *holes, (float(known[-1]), hi)]
    return [(max(a, lo), min(b, hi)) for a, b in spans if min(b, hi) - max(a, lo) > 1e-9]


def _save(figure: Figure | None, path: Path) -> None:
    if figure is None:
        raise ValueError("these axes belong to no figure: add them to one before saving")
    beside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        with beside.open("wb") as file:
            figure.savefig(file, format=path.suffix.lstrip(".") or "png", dpi=150)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
