"""Overlays of DOS: what is drawn, what is saved, and that matplotlib's global state stays as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from dosmatgen_ase.dos import TargetDOS
from dosmatgen_ase.plotting import OTHER_COLOUR, TARGET_COLOUR, plot_dos

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
