"""Draw docs/_static/model.svg: from the target through the sampler to ranked crystals.

python scripts/draw_model.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PATH = Path(__file__).parents[1] / "docs" / "_static" / "model.svg"
BLUE, ORANGE, GREY = "#dbe7f3", "#fce3d0", "#ededed"


def box(ax: Axes, x: float, y: float, width: float, text: str, colour: str, height: float = 1.0) -> None:
    """A box with its centre at (x, y); the first line is bold."""
    corner = (x - width / 2, y - height / 2)
    ax.add_patch(FancyBboxPatch(corner, width, height, "round,pad=0,rounding_size=0.12", fc=colour, ec="#555555", lw=1))
    head, _, rest = text.partition("\n")
    lines = rest.count("\n") + 1 if rest else 0
    ax.text(x, y + 0.14 * lines, head, ha="center", va="center", weight="bold", fontsize=10.5)
    if rest:
        ax.text(x, y - 0.17, rest, ha="center", va="center", fontsize=9, linespacing=1.25)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    """An arrow between two points."""
    style = f"arc3,rad={bend}"
    look = {"arrowstyle": "-|>", "mutation_scale": 13, "color": "#444444"}
    ax.add_patch(FancyArrowPatch(start, end, connectionstyle=style, **look))


def main() -> None:
    """Draw it."""
    mpl.rcParams["svg.hashsalt"] = "dosmatgen-ase"
    figure = Figure(figsize=(11.0, 4.6))
    ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    ax.set(xlim=(0, 11), ylim=(0, 4.6))
    ax.axis("off")
    box(ax, 1.15, 3.75, 1.9, "target DOS\nvalues, known mask\nper site or per cell", BLUE)
    box(ax, 1.15, 2.3, 1.9, "encoder\none vector per site;\nunknown: learned null", BLUE)
    box(ax, 1.15, 0.85, 1.9, "wishes\npins, elements,\ncomposition, template", BLUE)
    frame = "round,pad=0,rounding_size=0.15"
    ax.add_patch(FancyBboxPatch((2.75, 0.3), 5.0, 4.0, frame, fc="white", ec="#999999", ls="--"))
    title = "sampler: 10 steps from noise (t = 1) to a crystal (t = 0)"
    ax.text(5.25, 4.08, title, ha="center", va="center", fontsize=10)
    box(ax, 4.0, 3.15, 2.1, "noisy crystal\ncell (six-vector),\ncoordinates, species", GREY)
    box(ax, 6.55, 3.15, 2.0, "network\nE(3)-equivariant;\nwith and without DOS", ORANGE)
    box(ax, 6.55, 1.55, 2.0, "prediction\nvelocities, logits,\nDOS of each site", GREY)
    box(ax, 4.0, 1.55, 2.1, "step\nhold the pins, mask the\nlogits, reveal species", ORANGE)
    box(ax, 9.55, 3.15, 2.3, "screen\ndistances, density,\nduplicates", GREY)
    box(ax, 9.55, 1.9, 2.3, "rank\nforward model predicts\nDOS and its error", ORANGE)
    box(ax, 9.55, 0.75, 2.3, "crystals\nase.Atoms, best first", BLUE, 0.8)
    arrow(ax, (1.15, 3.25), (1.15, 2.8))
    arrow(ax, (2.1, 2.3), (6.2, 2.65), 0.03)
    arrow(ax, (2.1, 0.85), (3.4, 1.05), 0.1)
    arrow(ax, (5.05, 3.15), (5.55, 3.15))
    arrow(ax, (6.55, 2.65), (6.55, 2.05))
    arrow(ax, (5.55, 1.55), (5.05, 1.55))
    arrow(ax, (4.0, 2.05), (4.0, 2.65))
    arrow(ax, (7.75, 3.15), (8.4, 3.15))
    arrow(ax, (9.55, 2.65), (9.55, 2.4))
    arrow(ax, (9.55, 1.4), (9.55, 1.15))
    figure.savefig(PATH, metadata={"Date": None})


if __name__ == "__main__":
    main()
