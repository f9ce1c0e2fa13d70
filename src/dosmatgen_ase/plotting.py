"""Figures: overlays of densities of states, bands, crystals, both side by side, and what the label set covers.

Figures are made with `matplotlib.figure.Figure`, never through pyplot, so that no backend, style or open figure of the
user is touched.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dosmatgen_ase.dos import MODEL_GRID, TargetDOS
from dosmatgen_ase.dos.distances import as_compared
from dosmatgen_ase.files import MARK, write_atomic
from dosmatgen_ase.threads import without_warnings

if TYPE_CHECKING:
    from ase import Atoms
    from ase.spectrum.band_structure import BandStructure
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dosmatgen_ase.data.coverage import Coverage

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
    zeros = " or ".join(ZERO_NAMES[r] for r in sorted({dos.reference for dos in targets}))
    ax.set(xlim=(lo, hi), ylim=(0.0, None), xlabel=f"$E$ − {zeros} (eV)", ylabel=f"{first.kind} DOS (states/eV)")
    if ax.get_legend_handles_labels()[0]:
        for text in ax.legend(edgecolor="none", framealpha=0.8).get_texts():
            text.set_parse_math(False)  # a label is a name: "$" in it is a character
    if path is not None:
        _save(ax.get_figure(root=True), Path(path))
    return ax


def drawn_together(target: TargetDOS, others: Sequence[TargetDOS]) -> list[TargetDOS]:
    """Return the target and the DOS that were compared with it, as `plot_dos` should draw them: as they were compared.

    Each has its highest occupied level at zero, and all are on one grid and as broad as the broadest.

    Raises
    ------
    ValueError
        If one is a site's and another a total.
    """
    broadest = max([target, *others], key=lambda dos: dos.sigma or 0.0)
    with without_warnings():  # of zeros, which whoever compared them has told
        wanted = as_compared(broadest, target)[1]
        return [wanted, *(as_compared(dos, wanted)[0] for dos in others)]


def plot_bands(bands: BandStructure, path: str | PathLike[str] | None = None) -> Axes:
    """Draw a band structure from -10 to 5 eV, one line per band and piece of its path.

    Parameters
    ----------
    bands : from `predict_bands`, or any of ASE's
    path : path, optional
        Also save the figure there; the suffix says in which format (.png, .pdf, .svg).

    Returns
    -------
    matplotlib.axes.Axes
        Blue, with a second spin in orange.

    Raises
    ------
    ValueError
        If the format is not known.
    OSError
        If the file cannot be written.
    """
    from ase.spectrum.band_structure import BandStructurePlot
    from matplotlib.figure import Figure

    bands = bands.subtract_reference()
    plot = BandStructurePlot(bands)
    ax = plot.prepare_plot(Figure(figsize=(5, 4), layout="constrained").add_subplot(), emin=-10, emax=5)
    breaks = np.flatnonzero(np.diff(plot.xcoords) == 0) + 1  # two points at one place: the path goes on elsewhere
    for energies, colour in zip(bands.energies, (TARGET_COLOUR, OTHER_COLOUR), strict=False):
        for x, piece in zip(np.split(plot.xcoords, breaks), np.split(energies, breaks), strict=True):
            ax.plot(x, piece, color=colour, linewidth=1.0)
    ax.set(ylabel="$E$ − zero (eV)")
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
    picture = io.BytesIO()
    kind = path.suffix.lstrip(".").lower() or "png"
    # The name by which the package knows a picture of its own again, before it replaces one.
    metadata = {"Software" if kind == "png" else "Creator": MARK.decode()} if kind in ("png", "pdf", "svg") else None
    figure.savefig(picture, format=kind, dpi=150, metadata=metadata)
    write_atomic(path, picture.getvalue())


# -- crystals ----------------------------------------------------------------------------------------------------------

BALL = 0.5  # radius of a ball, in covalent radii
BOND = 1.15  # longest bond, in sums of covalent radii
BORDER = 0.06  # an atom this close (fractional) to a face of the cell is drawn on the opposite face as well


def draw_crystal(
    atoms: Atoms, ax: Axes | None = None, sites: Sequence[int] = (), *, repeats: int | None = None
) -> Axes:
    """Draw the unit cell as balls and sticks, in Jmol's colours, with the atoms on its borders repeated.

    The cell is moved so that the first of `sites` (or the first atom) is at its corners. The view has c upwards and a
    to the right, turned a little; what is farther away is paler.

    Parameters
    ----------
    atoms : ase.Atoms
        Periodic.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.
    sites : sequence of int, optional
        Atoms to be ringed in the colour of a target.
    repeats : int, optional
        Cells along each lattice vector: 2 draws the 2 x 2 x 2 supercell. By default 1, and 2 for one or two atoms.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If there is no atom or no cell.
    """
    from ase.data import chemical_symbols, covalent_radii
    from ase.data.colors import jmol_colors
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle

    if len(atoms) == 0 or abs(np.linalg.det(atoms.cell.array)) < 1e-6:
        raise ValueError("nothing to draw: give a crystal with atoms and three lattice vectors")
    if ax is None:
        ax = Figure(figsize=(3.2, 3.2), layout="constrained").add_subplot()
    if repeats is None:
        repeats = 2 if len(atoms) <= 2 else 1
    index, positions, box = _shown_atoms(atoms, sites[0] if len(sites) else 0, repeats)
    view = _view(box)
    edges = _cell_edges(box) @ view.T
    places = positions @ view.T  # right, up, towards the eye
    near, far = places[:, 2].max(), places[:, 2].min()

    def paled(colour: np.ndarray, depth: float) -> np.ndarray:
        return colour + 0.45 * (near - depth) / (near - far + 1e-9) * (1.0 - colour)

    numbers = atoms.numbers[index]
    radii = BALL * covalent_radii[numbers]
    for ends in edges:
        ax.plot(*ends[:, :2].T, color="0.6", linewidth=0.8, zorder=ends[:, 2].mean())
    distance = np.linalg.norm(places[:, None] - places, axis=-1)
    for i, j in np.argwhere(distance < BOND * (radii[:, None] + radii) / BALL):
        if i != j:  # each end draws its half
            along = (places[j] - places[i]) / distance[i, j]
            ends = np.stack([places[i] + 0.9 * radii[i] * along, (places[i] + places[j]) / 2])
            colour = paled(0.85 * jmol_colors[numbers[i]], places[i, 2])
            ax.plot(*ends[:, :2].T, color=colour, linewidth=2.5, solid_capstyle="butt", zorder=ends[:, 2].mean())
    for i, (x, y, depth) in enumerate(places):
        colour, r = paled(jmol_colors[numbers[i]], depth), radii[i]
        ringed = index[i] in sites
        edge, width = (TARGET_COLOUR, 2.2) if ringed else (0.45 * colour, 0.7)
        ax.add_artist(Circle((x, y), r, facecolor=colour, edgecolor=edge, linewidth=width, zorder=depth + 1e-3))
        shine: dict[str, Any] = {"facecolor": "white", "linewidth": 0, "alpha": 0.18, "zorder": depth + 2e-3}
        for share in (0.55, 0.35, 0.15):
            ax.add_artist(Circle((x - 0.3 * r, y + 0.3 * r), share * r, **shine))
    margin = radii.max() + 0.3
    corners = np.concatenate([places, edges.reshape(-1, 3)])
    (left, low), (right, high) = corners[:, :2].min(0) - margin, corners[:, :2].max(0) + margin
    ax.set(xlim=(left, right), ylim=(low, high), aspect="equal")
    ax.set_axis_off()
    ball: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 9}
    handles = [
        Line2D([], [], **ball, markerfacecolor=jmol_colors[z], markeredgecolor="0.4", label=chemical_symbols[z])
        for z in sorted(set(atoms.numbers.tolist()))
    ]
    if len(sites):
        ring: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": TARGET_COLOUR, "markeredgewidth": 2.2}
        handles.append(Line2D([], [], **ball, **ring, label="site with the target"))
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return ax


def plot_candidates(
    target: TargetDOS,
    candidates: Sequence[tuple[str, Atoms, Sequence[TargetDOS]]],
    path: str | PathLike[str],
    sites: Sequence[int] | Sequence[Sequence[int]] = (),
    sources: Sequence[str] | None = None,
) -> None:
    """Save one row per candidate: the target with the DOS predicted for it, as they are compared, and the crystal.

    Parameters
    ----------
    target : TargetDOS
    candidates : sequence of (title, ase.Atoms, predicted DOS)
        The DOS predicted for each conditioned site; none where there is no prediction.
    path : path
        The suffix says in which format.
    sites : sequence of int, or one such sequence for each candidate
        Conditioned sites, ringed in the crystals.
    sources : sequence of str, optional
        For each candidate what its DOS is called; "predicted" by default.

    Raises
    ------
    ValueError, OSError
        If there is no candidate, or not one entry of `sites` or `sources` for each; as `drawn_together`, `plot_dos`.
    """
    from matplotlib.figure import Figure

    if not candidates:
        raise ValueError("nothing to plot: give at least one candidate")
    figure = Figure(figsize=(10.0, 2.9 * len(candidates)), layout="constrained")
    rows = figure.subplots(len(candidates), 2, squeeze=False, width_ratios=[1.5, 1.0])
    named = list(sources or ["predicted"] * len(candidates))
    common = [int(site) for site in sites if isinstance(site, int | np.integer)]
    ringed = [list(own) for own in sites if not isinstance(own, int | np.integer)] or [common] * len(candidates)
    for (left, right), (title, atoms, found), own, source in zip(rows, candidates, ringed, named, strict=True):
        labels = ["target", *[source] * len(found)]
        if len(found) == len(own) > 1:
            labels[1:] = [f"{source}, site {site}" for site in own]
        plot_dos(drawn_together(target, found), labels, ax=left)
        left.set_title(title, loc="left", fontsize="medium", parse_math=False)
        draw_crystal(atoms, right, own)
    _save(figure, Path(path))


def _shown_atoms(atoms: Atoms, origin: int, repeats: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices (m,) and positions (m, 3) of the atoms to draw, atom `origin` at zero, and the box (3, 3), Angstrom."""
    frac = atoms.get_scaled_positions()
    frac = (frac - frac[origin]) % 1.0
    shifts = np.indices([repeats + 2] * 3).reshape(3, -1).T - 1
    images = frac[:, None] + shifts
    shown = ((images > -BORDER) & (images < repeats + BORDER)).all(axis=-1)
    return np.nonzero(shown)[0], images[shown] @ atoms.cell.array, repeats * atoms.cell.array


def _cell_edges(cell: np.ndarray) -> np.ndarray:
    """End points of the twelve edges of a cell, shape (12, 2, 3)."""
    corners = np.indices((2, 2, 2)).reshape(3, -1).T
    first, second = np.nonzero(np.triu(np.abs(corners[:, None] - corners).sum(-1) == 1))
    return np.stack([corners[first], corners[second]], axis=1) @ cell


def _view(cell: np.ndarray) -> np.ndarray:
    """Rows: right, up and towards the eye. c points up, a to the right, then turned by 20 and tilted by 12 degrees."""
    from scipy.spatial.transform import Rotation

    up = cell[2] / np.linalg.norm(cell[2])
    right = cell[0] - (cell[0] @ up) * up
    right /= np.linalg.norm(right)
    frame = np.stack([right, up, np.cross(right, up)])
    return Rotation.from_euler("yx", [-20, 12], degrees=True).as_matrix() @ frame


# -- the label set -----------------------------------------------------------------------------------------------------

GROUPS = {  # the first element of each row of the periodic table and the groups that its elements are in
    1: (1, 18), 3: (1, 2, *range(13, 19)), 11: (1, 2, *range(13, 19)), 19: range(1, 19), 37: range(1, 19),
    55: (1, 2, 3), 72: range(4, 19), 87: (1, 2, 3), 58: range(4, 18), 90: range(4, 18),
}  # fmt: skip
ROWS = {1: 1, 3: 2, 11: 3, 19: 4, 37: 5, 55: 6, 72: 6, 87: 7, 58: 8.3, 90: 9.3}


def plot_coverage(coverage: Coverage, path: str | PathLike[str]) -> None:
    """Save labels per element on a periodic table, and by size, crystal system and gap; errors as of `plot_dos`."""
    from ase.data import chemical_symbols
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(10.0, 8.4), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.1, 1.0])
    upper, lower = parts
    table = upper.subplots()
    scale, colours = LogNorm(1, max(2, *coverage.elements.values())), colormaps["Blues"]
    for first, groups in GROUPS.items():
        for z, column in enumerate(groups, first):
            symbol, row = chemical_symbols[z], ROWS[first]
            count = coverage.elements[symbol]
            face = colours(0.05 + 0.9 * float(scale(count))) if count else "white"
            ink = "white" if count and scale(count) > 0.5 else "0.2" if count else "0.7"
            table.add_patch(Rectangle((column, row), 0.94, 0.94, facecolor=face, edgecolor="0.75", linewidth=0.6))
            table.text(column + 0.47, row + 0.38, symbol, ha="center", va="center", color=ink, fontsize=11)
            if count:
                table.text(column + 0.47, row + 0.74, str(count), ha="center", va="center", color=ink, fontsize=7)
    table.set(xlim=(0.9, 19.1), ylim=(10.4, 0.9), aspect="equal")
    table.set_axis_off()
    total = sum(n for n, _, _ in coverage.splits.values())
    table.set_title(f"Labels that hold an element, of {total} in all")

    sizes, systems, gaps = lower.subplots(1, 3)
    numbers = range(1, 21)
    sizes.bar(numbers, [coverage.structure_sizes[n] for n in numbers], color="0.87", label="structures")
    sizes.bar(numbers, [coverage.num_atoms[n] for n in numbers], color=TARGET_COLOUR, label="labels")
    sizes.set(yscale="log", xlabel="atoms per cell", xticks=(1, 5, 10, 15, 20))
    sizes.legend(frameon=False, fontsize="small", ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for axes, counts in ((systems, coverage.crystal_systems), (gaps, coverage.gaps)):
        axes.bar_label(axes.barh(list(counts), list(counts.values()), color=TARGET_COLOUR), padding=2, fontsize="small")
        axes.margins(x=0.18)
        axes.invert_yaxis()
        axes.set_xlabel("labels")
    systems.set_title(f"{coverage.num_spacegroups} space groups", fontsize="medium")
    gaps.set_title("band gap", fontsize="medium")
    for axes in (sizes, systems, gaps):
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, Path(path))
