"""The zero of energy of DOS that are used together, scaling, and the warnings about targets that make no sense."""

from __future__ import annotations

import contextlib
import json
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dosmatgen_ase import DOSGenerator, DOSWarning, TargetDOS
from dosmatgen_ase.cli import app
from dosmatgen_ase.dos import Array, normalised_l1, on_common_zero
from dosmatgen_ase.dos.checks import STATES, doubts, states_below_zero
from dosmatgen_ase.judge.ranking import predicted_for_targets, score

E = np.linspace(-12.0, 8.0, 2001)


def broadened_box(lo: float, hi: float, sigma: float) -> Array:
    """One state per eV between lo and hi, broadened."""
    edges = [np.array([math.erf((e - edge) / (sigma * math.sqrt(2))) for e in E]) for edge in (lo, hi)]
    return 0.5 * (edges[0] - edges[1])


def gapped(shift: float = 0.0, sigma: float = 0.05, **options: Any) -> TargetDOS:
    """A valence band up to `shift` and a conduction band 3 eV above it."""
    values = 2 * (broadened_box(shift - 4.0, shift, sigma) + broadened_box(shift + 3.0, shift + 7.0, sigma))
    return TargetDOS.from_arrays(E, values, sigma=sigma, **options)


METAL = TargetDOS.from_arrays(E, 2 * broadened_box(-6.0, 4.0, 0.05), sigma=0.05)


# -- aligned -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("shift", [-0.8, -1.5, -2.2])
def test_a_gap_is_aligned_to_its_valence_band(sigma: float, shift: float) -> None:
    """A sharp edge is found within a third of the broadening, although its tail reaches three times that far."""
    moved = gapped(shift, sigma).aligned()
    assert moved.reference == "vbm"
    assert moved.energies[0] - E[0] == pytest.approx(-shift, abs=0.35 * sigma + 0.01)
    assert "zero moved by" in moved.provenance["steps"][-1]


def test_the_tail_of_a_level_is_taken_off_exactly() -> None:
    for states, sigma in ((0.5, 0.2), (6.0, 0.1), (2.0, 0.05)):
        levels = [states * np.exp(-0.5 * ((E - c) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi)) for c in (-2, 2)]
        moved = TargetDOS.from_arrays(E, sum(levels), sigma=sigma).aligned()
        assert moved.energies[0] - E[0] == pytest.approx(2.0, abs=0.01)


def test_what_aligned_leaves_alone_and_what_it_refuses() -> None:
    assert METAL.aligned() is METAL
    assert gapped(reference="vbm").aligned().reference == "vbm"
    assert gapped(-1.0).aligned(vbm=-1.0).energies == pytest.approx(E + 1.0)
    for unclear in (gapped(-1.0).window(-8.0, -3.0), gapped(-1.0).window(1.0, 5.0)):
        with pytest.raises(ValueError, match=r"not known at 0 eV, .* give aligned\(vbm=\.\.\.\)"):
            unclear.aligned()
    with pytest.raises(ValueError, match="vbm must be an energy"):
        METAL.aligned(vbm=math.nan)
    hole = gapped(-1.0)
    hole = TargetDOS.from_arrays(E, hole.values, known=(E < 0.3) | (E > 0.6), sigma=0.05)
    assert hole.aligned() is hole  # states may hide in what is not known


# -- common zero -------------------------------------------------------------------------------------------------------


def test_targets_of_two_zeros_are_refused_in_one_call(tmp_path: Path) -> None:
    mixed = {0: METAL, 1: gapped(reference="vbm")}
    with pytest.raises(ValueError, match=r"of site 0 .* Fermi level, but that of site 1 .* dos\.aligned\(\)") as caught:
        on_common_zero(mixed)
    assert "\n" not in str(caught.value)
    same = {0: gapped(-1.0).aligned(), 1: gapped(reference="vbm")}
    assert on_common_zero(same) == same
    total = {"cell": gapped(-1.0, kind="total")}
    assert on_common_zero(total)["cell"].reference == "vbm"
    assert on_common_zero({0: gapped(-1.0)})[0].reference == "fermi"  # another site may have the states


def test_generate_refuses_two_zeros_and_warns_of_a_gap(tiny_weights: Path) -> None:
    generator = DOSGenerator(tiny_weights, device="cpu")
    with pytest.raises(ValueError, match="One crystal has one zero"):
        generator.generate({0: METAL, 1: gapped(reference="vbm")}, num_atoms=2, num_steps=2)
    with pytest.raises(ValueError, match="One crystal has one zero"):
        score([], {0: METAL, 1: gapped(reference="vbm")})
    with pytest.warns(DOSWarning, match=r'reference "fermi": .*dos\.aligned\(\) \(--align\) moves it by 1\.[45]'):
        generator.generate(gapped(-1.5), num_atoms=2, num_steps=2, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generator.generate(gapped(-1.5).aligned(), num_atoms=2, num_steps=2, seed=0)
        generator.generate([METAL, METAL], num_steps=2, seed=0)


def test_generation_for_a_gapped_total_is_that_for_the_aligned_one(tiny_weights: Path) -> None:
    generator = DOSGenerator(tiny_weights, device="cpu")
    dos = gapped(-1.5, kind="total")
    first, second = (generator.generate(d, num_atoms=4, num_steps=4, seed=0) for d in (dos, dos.aligned()))
    assert np.array_equal(first.numbers, second.numbers)
    assert first.positions == pytest.approx(second.positions)


def test_a_gapped_curve_is_compared_by_its_valence_band() -> None:
    """Mid-gap zero against valence-band zero: the same DOS is at distance 0, by reference alone it would be far off."""
    wanted = gapped(reference="vbm", kind="total")
    mid_gap = gapped(-1.5, kind="total")
    assert normalised_l1(mid_gap, wanted) < 0.02
    assert normalised_l1(TargetDOS.from_arrays(E, mid_gap.values, reference="vbm", kind="total"), wanted) > 0.5
    with pytest.warns(DOSWarning, match=r"dos\.aligned\(\).*the other DOS has its zero there"):
        assert normalised_l1(gapped(-1.5), gapped(reference="vbm")) > 0.5
    assert normalised_l1(gapped(-1.5).aligned(), gapped(reference="vbm")) < 0.02


def test_a_gapped_total_is_compared_by_its_valence_band_whatever_the_other_is() -> None:
    """A target stands at one zero for all candidates, that of generate and score."""
    high, low = gapped(-0.3, kind="total"), gapped(-1.5, kind="total")
    assert normalised_l1(high, low) < 0.03  # one crystal, its Fermi level at two places in the gap
    metal = replace(METAL, kind="total")
    assert normalised_l1(metal, low) == normalised_l1(metal, low.aligned())
    assert normalised_l1(metal, low) == normalised_l1(replace(metal, reference="vbm"), low)


def test_sites_of_one_reference_and_metals_are_compared_as_they_are() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert normalised_l1(gapped(-1.5), gapped(-1.5)) == 0.0
        assert normalised_l1(gapped(-1.5), gapped(-1.0)) > 0.2
        metal = TargetDOS.from_arrays(E, METAL.values, sigma=0.05, reference="vbm")
        assert normalised_l1(METAL, metal) == 0.0  # a metal's Fermi level is its highest occupied level


def test_ranking_aligns_a_gapped_total(monkeypatch: pytest.MonkeyPatch) -> None:
    from ase.build import bulk

    from dosmatgen_ase.judge import ranking

    seen: list[TargetDOS] = []

    def spy(prediction: Any, sites: Any, total: Any = None) -> Any:
        seen.append(total)
        return predicted_for_targets(prediction, sites, total)

    monkeypatch.setattr(ranking, "predicted_for_targets", spy)
    score([bulk("Si")], {}, gapped(-1.5, kind="total"))
    assert [dos.reference for dos in seen] == ["vbm"]


# -- scaled ------------------------------------------------------------------------------------------------------------


def test_scaled_by_a_factor_or_to_electrons() -> None:
    assert (2 * METAL).values == pytest.approx(2 * METAL.values)
    assert METAL * 2 == METAL.scaled(2) == np.float64(2) * METAL == np.int64(2) * METAL
    ten = METAL.scaled(electrons=10)
    assert ten.total_states(hi=0.0) == pytest.approx(10.0)
    assert ten.values == pytest.approx(METAL.values * 10 / METAL.total_states(hi=0.0))
    inside = METAL.scaled(electrons=3, lo=-4.0, hi=-2.0)
    assert inside.total_states(-4.0, -2.0) == pytest.approx(3.0)
    windowed = METAL.window(-3.0, 1.0).scaled(electrons=5)
    assert windowed.total_states(hi=0.0) == pytest.approx(5.0)
    assert (ten.sigma, ten.reference, ten.kind) == (METAL.sigma, METAL.reference, METAL.kind)
    assert "values times" in ten.provenance["steps"][-1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "a factor or electrons="),
        ({"factor": 2, "electrons": 3}, TypeError, "either a factor"),
        ({"factor": 0}, ValueError, "finite number above 0"),
        ({"factor": -1.0}, ValueError, "finite number above 0"),
        ({"electrons": math.inf}, ValueError, "finite number above 0"),
        ({"electrons": math.nan}, ValueError, "finite number above 0"),
        ({"electrons": "ten"}, TypeError, "by a number, not by 'ten'"),
        ({"factor": True}, TypeError, "by a number"),
        ({"electrons": 1, "hi": -11.0}, ValueError, "holds no states between -inf and -11 eV"),
    ],
)
def test_what_does_not_scale(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        METAL.scaled(**arguments)
    assert "\n" not in str(caught.value)


def test_only_numbers_multiply() -> None:
    for other in ("2", METAL, None, True):
        with pytest.raises(TypeError):
            METAL * other


# -- doubts ------------------------------------------------------------------------------------------------------------


def flat(states: float, lo: float = -10.0, **options: Any) -> TargetDOS:
    """As many states between lo and 0, and as dense above."""
    e = np.linspace(lo, 3.0, 601)
    return TargetDOS.from_arrays(e, np.full(e.size, states / -lo) + 1e-9 * e, **options)


@pytest.mark.parametrize(
    ("dos", "num_atoms", "message"),
    [
        (flat(9.0), (1, 1), None),
        (flat(0.9), (1, 1), None),
        (
            flat(40.0),
            (1, 1),
            r"40 states from -10\.0 to 0 eV, and no site of any element holds that number .*--kind total\); if its",
        ),
        (flat(0.01), (1, 1), r"holds 0.01 states from -10.0 to 0 eV, and no site [^;]* if its unit is arbitrary"),
        (flat(12.0, lo=-1.0), (1, 1), "holds 12 states from -1.0 to 0 eV"),
        (flat(0.0001, lo=-0.3), (1, 1), None),  # next to nothing is next to nothing there
        (flat(40.0, kind="total"), (1, 20), None),
        (flat(40.0, kind="total"), (4, 4), None),
        (flat(40.0, kind="total"), (1, 2), "no cell of 1 to 2 atoms holds that number"),
        (flat(500.0, kind="total"), (1, 20), "no cell of 1 to 20 atoms"),
        (TargetDOS.from_arrays(E, np.zeros_like(E)), (1, 1), "a gap alone does not determine"),
        (TargetDOS.from_arrays([0.1, 2.0], [0.0, 0.0]), (1, 1), "a gap alone does not determine"),
        (TargetDOS.from_arrays(E, np.full_like(E, 1e-6)), (1, 1), "states in all: if its unit is arbitrary"),
        (TargetDOS.from_arrays(E, METAL.values / METAL.values.max()), (1, 1), "is exactly 1, so it seems to be scaled"),
        (METAL, (1, 1), None),
        (TargetDOS.from_peaks([(-0.65, 6.0, 0.3)], window=(-3, 1)), (1, 1), None),
        (TargetDOS.from_peaks([(1.5, 3.0, 0.3)], window=(0.5, 3)), (1, 1), None),
        (TargetDOS.from_peaks([(1.5, 3.0, 0.3)], window=(0, 3)), (1, 1), None),
    ],
)
def test_doubts(dos: TargetDOS, num_atoms: tuple[int, int], message: str | None) -> None:
    found = doubts(dos, num_atoms)
    if message is None:
        assert found == []
    else:
        assert len(found) == 1
        assert re.search(message, found[0])
        assert "\n" not in found[0]


def test_generate_warns_of_a_target_in_arbitrary_units(tiny_weights: Path) -> None:
    generator = DOSGenerator(tiny_weights, device="cpu")
    with pytest.warns(DOSWarning, match="no site of any element holds that number") as caught:
        generator.generate({0: flat(400.0), 1: flat(400.0)}, num_atoms=2, num_steps=2, seed=0)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generator.generate(flat(400.0).scaled(electrons=10), num_atoms=2, num_steps=2, seed=0)


def test_a_site_pinned_to_an_element_without_labels_is_told(tiny_weights: Path) -> None:
    generator = DOSGenerator(tiny_weights, device="cpu")
    quick: dict[str, Any] = {"num_atoms": 2, "num_steps": 2, "seed": 0}
    with pytest.warns(DOSWarning, match="site 0 must be La, of which no label exists"):
        generator.generate(flat(9.0), fixed_species={0: "La"}, **quick)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generator.generate(flat(9.0), fixed_species={1: "La"}, **quick)  # what is asked for is on site 0
        generator.generate(flat(9.0), fixed_species={0: "Ni"}, **quick)


def test_the_table_of_states_is_sound() -> None:
    table = states_below_zero()
    assert STATES.stat().st_size < 30_000
    assert table["lo"] == sorted(table["lo"])
    assert table["lo"][-1] == 0.0
    assert len(table["elements"]) > 50
    for fewest, most in table["elements"].values():
        assert len(fewest) == len(most) == len(table["lo"])
        assert np.all(np.diff(fewest) <= 0)
        assert np.all(np.diff(most) <= 0)
        assert np.all(np.array(fewest) <= most)
    assert 7 < table["elements"]["Ni"][0][0] < 11 < table["elements"]["Ni"][1][0] + 1


def test_no_label_is_doubted() -> None:
    """The bounds are those of the training split; sites of the other splits lie within them, too."""
    pytest.importorskip("pyarrow")
    from dosmatgen_ase.data import load_site_dos

    labels = load_site_dos(Path(__file__).parents[1] / "data" / "site_dos")
    rows = np.flatnonzero(labels.split == "val")[::4]
    for i in rows:
        for dos in labels.targets(int(i)):
            assert not any("holds that number" in message for message in doubts(dos))


# -- the command line --------------------------------------------------------------------------------------------------


def told_by(*arguments: object) -> tuple[str, str]:
    """Standard output and error of a command that succeeds."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr
    return done.stdout, done.stderr


def test_the_command_line_reads_text_as_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "table.txt"
    path.write_text("".join(f"{e + 2.0:.3f} {v:.5f} {v / 3:.5f} 7\n" for e, v in zip(E, METAL.values, strict=True)))
    out, errors = told_by(
        "dos", path, "--columns", "0,1,2", "--efermi", 2, "--kind", "total", "--units", "eV", "--electrons", 11
    )
    assert errors == ""
    assert "total DOS of the cell" in out
    assert "11.000" in out
    path.write_text("".join(f"{e:.3f} {v:.5f}\n" for e, v in zip(E, METAL.values, strict=True)))
    out, errors = told_by("dos", path, "--spin", "one")
    assert len(errors.splitlines()) == 2
    assert "warning: the site DOS holds" in errors
    assert "assumed: zero of energy at the Fermi level; energy in column 0, DOS in column 1; eV and states/eV" in errors
    assert f"{2 * METAL.total_states(hi=0.0):.3f}" in out


def test_the_command_line_aligns_and_shows_warnings_as_lines(tmp_path: Path, tiny_weights: Path) -> None:
    path = tmp_path / "gapped.json"
    path.write_text(json.dumps(gapped(-1.5).to_dict()))
    out, _ = told_by("dos", path, "--align")
    assert "valence-band maximum (reference=vbm)" in out
    quick = ("-n", 1, "--num-atoms", 2, "--num-steps", 2, "--seed", 0, "--weights", tiny_weights)
    _, errors = told_by("generate", path, "-o", tmp_path / "a.extxyz", *quick)
    lines = [line for line in errors.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1
    assert "dos.aligned() (--align) moves it by 1.5" in lines[0]
    _, errors = told_by("generate", path, "-o", tmp_path / "b.extxyz", "--align", *quick)
    assert "warning" not in errors


@pytest.mark.parametrize(
    ("energies", "options", "message"),
    [
        (
            (0.0, 8.0),
            {},
            r"energies run from 0\.00 to 8\.00 eV, so that zero is hardly the Fermi level, as was",
        ),
        ((-11.0, -3.0), {}, r"energies run from -11\.00 to -3\.00 eV, so that zero is hardly the Fermi level"),
        ((0.0, 8.0), {"reference": "fermi"}, None),  # stated
        ((0.0, 8.0), {"efermi": 6.5}, None),
        ((-8.0, 0.5), {}, None),
    ],
)
def test_an_assumed_zero_at_an_end_is_told(
    energies: tuple[float, float], options: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    x = np.linspace(*energies, 161)
    np.savetxt(tmp_path / "figure.csv", np.c_[x, 1.0 + 0.1 * np.sin(x)])
    told = [m for m in doubts(TargetDOS.from_file(tmp_path / "figure.csv", **options)) if "hardly" in m]
    assert len(told) == (message is not None)
    assert message is None or re.search(message, told[0])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"reference": "vbm"}, "reference 'vbm' is stated in place of 'fermi', which was read: nothing is moved"),
        ({"kind": "total"}, "kind 'total' is stated in place of 'site', which was read"),
        ({"sigma": 0.3}, "sigma 0.3 is stated in place of 0.1, which was read"),
        ({"reference": "fermi", "kind": "site", "sigma": 0.1}, None),
    ],
)
def test_what_contradicts_a_file_is_told(options: dict[str, Any], told: str | None) -> None:
    path = Path(__file__).parents[1] / "data" / "ni_in_au3ni.npz"
    with contextlib.nullcontext() if told is None else pytest.warns(DOSWarning, match=told):
        dos = TargetDOS.from_file(path, 3, **options)
    assert all(getattr(dos, name) == value for name, value in options.items())
