"""Overlays of DOS, and crystals: what is drawn, what is saved, and that matplotlib's global state stays as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.data.colors import jmol_colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from dosmatgen_ase import plotting
from dosmatgen_ase.dos import TargetDOS, normalised_l1
from dosmatgen_ase.plotting import BALL, OTHER_COLOUR, TARGET_COLOUR, draw_crystal, plot_candidates, plot_dos

NICKEL = Path(__file__).parents[1] / "data" / "ni_in_au3ni.npz"
WANTED = TargetDOS.from_peaks([(-2.0, 3.0, 0.3)], window=(-6.0, 2.0))
MADE = TargetDOS.from_peaks([(-1.5, 3.0, 0.3)])


def test_target_is_filled_blue_and_the_others_are_orange_lines() -> None:
    ax = plot_dos([WANTED, MADE, MADE.shift(0.5)])
    (fill,) = ax.collections
    assert mpl.colors.to_hex(fill.get_facecolor()[0]) == TARGET_COLOUR
    curves = [line for line in ax.lines if len(line.get_xdata()) > 2]
    assert [line.get_color() for line in curves] == [TARGET_COLOUR, OTHER_COLOUR, OTHER_COLOUR]
    assert np.array_equal(curves[1].get_ydata(), MADE.values)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["unknown", "target", "generated"]


def test_unknown_energies_are_hatched_and_not_drawn() -> None:
    known = (abs(MADE.energies + 3.0) > 0.5) & (MADE.energies < 3.0)
    holed = TargetDOS.from_arrays(MADE.energies, MADE.values, known=known)
    ax = plot_dos(holed)
    spans = sorted((patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches)
    assert spans == [pytest.approx((-3.5, -2.5), abs=0.2), pytest.approx((3.0, 5.0), abs=0.2)]
    assert all(patch.get_hatch() for patch in ax.patches)
    assert np.array_equal(np.isnan(ax.lines[0].get_ydata()), ~known)
    assert not plot_dos(MADE).patches


@pytest.mark.parametrize(
    ("references", "label"),
    [(("fermi",), r"$E$ − $E_\mathrm{F}$ (eV)"), (("vbm", "vbm"), r"$E$ − $E_\mathrm{VBM}$ (eV)")],
)
def test_axes_name_zero_and_units(references: tuple[str, ...], label: str) -> None:
    ax = plot_dos([TargetDOS.from_peaks([(-2.0, 3.0, 0.3)], reference=r, kind="total") for r in references])
    assert ax.get_xlabel() == label
    assert ax.get_ylabel() == "total DOS (states/eV)"
    assert ax.get_xlim() == (-10.0, 5.0)
    assert ax.get_ylim()[0] == 0.0


def test_labels_and_given_axes() -> None:
    given = Figure().add_subplot()
    ax = plot_dos([WANTED, MADE], labels=["Ni in Au3Ni", "made"], ax=given)
    assert ax is given
    assert {"Ni in Au3Ni", "made"} < {text.get_text() for text in ax.get_legend().get_texts()}


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_saves_a_whole_file_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"dos.{suffix}"
    path.write_text("old")
    plot_dos([TargetDOS.from_file(NICKEL, site=3), MADE], path=path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes()[:4] in (b"\x89PNG", b"%PDF", b"<?xm")


def test_failure_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "dos.docx"
    path.write_text("old")
    with pytest.raises(ValueError, match="docx"):
        plot_dos(WANTED, path=path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(OSError, match="missing"):
        plot_dos(WANTED, path=tmp_path / "missing" / "dos.png")


def test_hostile_input() -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_dos([])
    with pytest.raises(ValueError, match="1 labels for 2 DOS"):
        plot_dos([WANTED, MADE], labels=["one"])


def test_pyplot_is_never_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from dosmatgen_ase.dos import TargetDOS; from dosmatgen_ase.plotting import plot_dos; "
        "assert 'matplotlib' not in sys.modules; "
        f"plot_dos(TargetDOS.from_peaks([(0, 1, 0.3)]), path={str(tmp_path / 'a.png')!r}); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(Path(__file__).parents[1] / "src")})


# -- crystals ----------------------------------------------------------------------------------------------------------


def balls(ax: Axes, edge: str | None = None) -> list[Circle]:
    """The balls, without the reflections on them; those with an edge of this colour."""
    found = [patch for patch in ax.patches if isinstance(patch, Circle) and patch.get_linewidth() > 0]
    return [b for b in found if edge is None or mpl.colors.to_hex(b.get_edgecolor()) == edge]


def gold_nickel() -> Atoms:
    atoms = bulk("Au", cubic=True)
    atoms.symbols[3] = "Ni"
    return atoms


def test_atoms_on_the_borders_of_the_cell_are_repeated() -> None:
    ax = draw_crystal(gold_nickel())
    assert len(balls(ax)) == 8 + 6  # corners and faces
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"Au", "Ni"}
    nearest = max(balls(ax), key=lambda ball: ball.get_zorder())
    assert np.allclose(nearest.get_facecolor()[:3], jmol_colors[79], atol=0.01)
    assert nearest.get_radius() == pytest.approx(BALL * 1.36)  # covalent radius of gold, Angstrom


def test_a_supercell_is_drawn_where_asked_for() -> None:
    cell = bulk("Cu", cubic=True)
    assert len(balls(draw_crystal(cell))) == 14  # corners and faces
    assert len(balls(draw_crystal(cell, repeats=2))) == 63  # lattice points of (0 ... 2)^3, borders included


@pytest.mark.parametrize(("site", "rings"), [(0, 8), (3, 8)])
def test_the_conditioned_site_is_at_the_corners_and_ringed(site: int, rings: int) -> None:
    atoms = gold_nickel()
    atoms.positions += [0.3, 0.4, 0.5]
    ax = draw_crystal(atoms, sites=[site])
    assert len(balls(ax)) == 14
    assert len(balls(ax, TARGET_COLOUR)) == rings
    assert "site with the target" in {text.get_text() for text in ax.get_legend().get_texts()}


def test_the_drawing_does_not_depend_on_the_orientation_or_the_origin() -> None:
    atoms = gold_nickel()
    moved = atoms.copy()
    moved.rotate(40, (1, 2, 3), rotate_cell=True)
    moved.positions += [0.1, 2.0, -3.0]
    first, second = (np.array([b.get_center() for b in balls(draw_crystal(a))]) for a in (atoms, moved))
    assert np.allclose(np.sort(first, axis=0), np.sort(second, axis=0), atol=1e-6)


def test_bonds_join_neighbours_only() -> None:
    def bonds(lattice_constant: float) -> int:
        lines = draw_crystal(bulk("NaCl", "cesiumchloride", lattice_constant) * (1, 1, 2)).lines
        return sum(line.get_linewidth() == 2.5 for line in lines)

    assert bonds(3.5) > 0
    assert bonds(9.0) == 0


def test_candidates_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    plot_candidates(WANTED, [("a", gold_nickel(), [MADE.on_grid()]), ("b", bulk("Cu"), [])], path, sites=[0])
    width, height = (int.from_bytes(path.read_bytes()[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1500, 870)
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_candidates(WANTED, [], path)


@pytest.mark.parametrize("sites", [np.array([3]), [np.array([3])], [[3]]])
def test_sites_may_be_numbers_of_numpy(sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ringed: list[list[int]] = []
    monkeypatch.setattr(plotting, "draw_crystal", lambda atoms, ax, sites: ringed.append(sites))
    plot_candidates(WANTED, [("a", gold_nickel(), [])], tmp_path / "out.png", sites=sites)
    assert ringed == [[3]]


def test_candidates_are_drawn_as_they_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[TargetDOS]] = []

    def look(curves: list[TargetDOS], labels: list[str], ax: Axes) -> Axes:
        drawn.append(curves)
        return plot_dos(curves, labels, ax=ax)

    monkeypatch.setattr(plotting, "plot_dos", look)
    bands = [(-2.0, 6.0, 0.2), (3.0, 6.0, 0.2)]
    made = TargetDOS.from_peaks(bands, window=(-8, 5), kind="total", reference="fermi").on_grid()
    broad = made.on_grid(sigma=0.3)
    assert normalised_l1(made, broad) < 0.03
    for target in (broad, made):  # the other way round, the row is broader
        plot_candidates(target, [("a", gold_nickel(), [made, broad])], tmp_path / "out.png")
        wanted, *found = drawn.pop()
        for dos in found:
            assert (dos.sigma, dos.reference) == (0.3, "vbm") == (wanted.sigma, wanted.reference)
            known = dos.known & wanted.known
            assert np.abs(dos.values - wanted.values)[known].sum() < 0.03 * wanted.values[known].sum()


@pytest.mark.parametrize("atoms", [Atoms(), Atoms("Cu"), Atoms("Cu", cell=[1, 1, 0])])
def test_a_crystal_needs_atoms_and_a_cell(atoms: Atoms) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_crystal(atoms)
