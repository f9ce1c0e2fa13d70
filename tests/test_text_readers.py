"""Columns of text: the files of known programs, other tables, the ways of writing numbers; the right values of each.

The writers below follow what the programs print (Quantum ESPRESSO's dos.f90 and partialdos.f90, FHI-aims'
output_KS_dos.f90, sumo's write_files, VASPKIT's, pyprocar's and OptaDOS' files).
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dosmatgen_ase import TargetDOS
from dosmatgen_ase.dos import Array, normalised_l1
from dosmatgen_ase.dos.readers.numbers import column_names

HARTREE = 27.211386245988
ENERGIES = np.round(np.arange(-9.0, 4.0001, 0.02), 6)


def curve(centre: float, width: float, states: float) -> Array:
    return states * np.exp(-0.5 * ((ENERGIES - centre) / width) ** 2) / (width * np.sqrt(2 * np.pi))


UP = curve(-5.0, 0.4, 1.0) + curve(-1.0, 0.5, 3.0) + 0.15
DOWN = curve(-5.0, 0.4, 1.0) + curve(0.5, 0.5, 2.5) + 0.15
BOTH = UP + DOWN
LEVEL = 6.542  # Fermi level on a program's own scale


def rows(*columns: Array, form: str = "%14.6f") -> str:
    return "\n".join(" ".join(form % value for value in row) for row in np.column_stack(columns)) + "\n"


def commas(*columns: Array) -> str:
    return rows(*columns, form="%.6f").replace(" ", ",")


def read(tmp_path: Path, text: str | bytes, name: str = "dos.dat", **options: Any) -> TargetDOS:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return TargetDOS.from_file(path, **options)


def integral(values: Array) -> Array:
    return np.cumsum(values) * 0.02


# -- writers: (text, name of the file, other files beside it), of a spin-polarised DOS with its Fermi level at 0 -------

Written = tuple[str, str, dict[str, str]]


def espresso_dos() -> Written:
    head = f"#  E (eV)   dosup(E)     dosdw(E)   Int dos(E) EFermi = {LEVEL:7.3f} eV\n"
    return head + rows(ENERGIES + LEVEL, UP, DOWN, integral(BOTH), form="%13.5E"), "pwscf.dos", {}


def espresso_dos_without_spin() -> Written:
    head = f"#  E (eV)   dos(E)     Int dos(E) EFermi = {LEVEL:7.3f} eV\n"
    return head + rows(ENERGIES + LEVEL, BOTH, integral(BOTH), form="%13.5E"), "pwscf.dos", {}


def aims_total() -> Written:
    head = (
        "# total density of states output by FHI-aims, for a spin polarized system\n"
        "# The energy reference for this output is the average chemical potential, mu =       -4.532100 eV\n"
        "# aims_uuid : 0123\n#    Energy (eV)      DOS(spin up)   DOS(spin down)\n"
    )
    return head + rows(ENERGIES, UP, DOWN, form="%20.8f"), "KS_DOS_total.dat", {}


def aims_atom() -> Written:
    head = (
        "# aims_uuid : 0123\n"
        "# spin-{} angular momentum projected density of states for species Ni as calculated by FHI-aims\n"
        "# The energy reference for this output is the chemical potential, mu =       -4.532100 eV\n"
        "#      Energy (eV)         total dos       l= 0             l= 1             l= 2\n"
    )
    up = head.format("up") + rows(ENERGIES, UP, 0.1 * UP, 0.2 * UP, 0.7 * UP, form="%16.8f")
    down = head.format("down") + rows(ENERGIES, DOWN, 0.1 * DOWN, 0.2 * DOWN, 0.7 * DOWN, form="%16.8f")
    return up, "atom_proj_dos_spin_upNi0001.dat", {"atom_proj_dos_spin_dnNi0001.dat": down}


def optados_total() -> Written:
    bar = f"# {'#' * 76}\n"
    head = (
        f"{bar}#                  O p t a D O S   o u t p u t   f i l e\n#\n"
        "#    Density of States using adaptive broadening\n#  Generated on  9 Feb 2022 at 10:41:47\n"
        "# Column        Data\n#    1        Energy (eV)\n#    2        Up-spin DOS (electrons per eV)\n"
        "#    3        Down-spin DOS (electrons per eV)\n#    4        Up-spin Integrated DOS (electrons)\n"
        f"#    5        Down-spin Integrated DOS (electrons)\n{bar}"
    )
    return head + rows(ENERGIES, UP, -DOWN, integral(UP), -integral(DOWN), form="%18.8E"), "Fe.adaptive.dat", {}


def vaspkit_total() -> Written:
    return "#Energy   TDOS-UP   TDOS-DOWN\n" + rows(ENERGIES, UP, -DOWN), "TDOS.dat", {}


def vaspkit_site() -> Written:
    head = "#Energy       s      py      pz      px     dxy     dyz     dz2     dxz     dx2     tot\n"
    up, down = (np.array([0.05] * 4 + [0.16] * 5)[:, None] * part for part in (UP, -DOWN))
    up_text, down_text = head + rows(ENERGIES, *up, UP), head + rows(ENERGIES, *down, -DOWN)
    return up_text, "PDOS_A1_UP.dat", {"PDOS_A1_DW.dat": down_text}


def sumo_total() -> Written:
    return "# energy dos(up) dos(down)\n" + rows(ENERGIES, UP, -DOWN, form="%.18e"), "total_dos.dat", {}


def sumo_element() -> Written:
    head = "# energy s(up) s(down) d(up) d(down)\n"
    return head + rows(ENERGIES, 0.1 * UP, -0.1 * DOWN, 0.9 * UP, -0.9 * DOWN, form="%.10e"), "NiO_Ni_dos.dat", {}


def pyprocar_total() -> Written:
    head = "energies,dosTotalSpin-0,dosTotalSpin-1\n"
    return head + commas(ENERGIES, UP, -DOWN), "dos.csv", {}


PROGRAMS: dict[str, tuple[Callable[[], Written], str]] = {
    "Quantum ESPRESSO dos.x": (espresso_dos, "total"),
    "Quantum ESPRESSO dos.x, no spin": (espresso_dos_without_spin, "total"),
    "FHI-aims": (aims_total, "total"),
    "FHI-aims, atom": (aims_atom, "site"),
    "OptaDOS": (optados_total, "total"),
    "VASPKIT": (vaspkit_total, "total"),
    "VASPKIT, site": (vaspkit_site, "site"),
    "sumo": (sumo_total, "total"),
    "sumo, element": (sumo_element, "site"),
    "pyprocar": (pyprocar_total, "total"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_files_of_programs(tmp_path: Path, program: str) -> None:
    write, kind = PROGRAMS[program]
    text, name, others = write()
    for other, content in others.items():
        (tmp_path / other).write_text(content)
    target = read(tmp_path, text, name)
    assert (target.kind, target.reference) == (kind, "fermi")
    assert target.energies == pytest.approx(ENERGIES, abs=1e-4)
    assert target.values[target.known] == pytest.approx(BOTH[target.known], abs=2e-4)
    assert target.known[1:].all()
    assert target.provenance["source"] == f"{program.split(',')[0]} {name}"
    assert not any("site" in sentence for sentence in target.provenance.get("assumed", []))


def test_the_other_spin_may_be_the_file_that_is_given(tmp_path: Path) -> None:
    up, name, others = vaspkit_site()
    (tmp_path / name).write_text(up)
    ((other, down),) = others.items()
    assert read(tmp_path, down, other).values[1:] == pytest.approx(BOTH[1:], abs=1e-5)


def test_one_spin_without_the_other_is_told(tmp_path: Path) -> None:
    up, name, _ = vaspkit_site()
    with pytest.raises(ValueError, match=r"holds one spin: put PDOS_A1_DW.dat beside it, or say spin=.one.") as caught:
        read(tmp_path, up, name)
    assert name in str(caught.value)
    assert read(tmp_path, up, name, spin="one").values[1:] == pytest.approx(2 * UP[1:], abs=1e-5)


def test_projections_of_espresso_add_up_to_the_site(tmp_path: Path) -> None:
    head = "# E (eV)   ldosup(E)   ldosdw(E)  pdosup(E)  pdosdw(E)\n"
    for i, share in ((1, 0.1), (2, 0.9)):
        text = head + rows(ENERGIES + LEVEL, share * UP, share * DOWN, share * UP, share * DOWN, form="%.6E")
        (tmp_path / f"ni.pdos_atm#1(Ni)_wfc#{i}({'sd'[i - 1]})").write_text(text)
        (tmp_path / f"ni.pdos_atm#11(Ni)_wfc#{i}({'sd'[i - 1]})").write_text(text.replace("1", "9"))
    path = tmp_path / "ni.pdos_atm#1(Ni)_wfc#2(d)"
    with pytest.raises(ValueError, match="absolute energies, and no Fermi level in this file: give the Fermi level"):
        TargetDOS.from_file(path)
    site = TargetDOS.from_file(path, efermi=LEVEL)
    assert (site.kind, site.reference) == ("site", "fermi")
    assert site.energies == pytest.approx(ENERGIES, abs=1e-4)
    assert site.values == pytest.approx(BOTH, abs=1e-4)
    assert "orbitals of one atom added from 2 files" in site.provenance["steps"]
    assert "raw projection: there is no ni.pdos_tot to scale it by" in site.provenance["steps"]
    # The other atom has as many states, and the projections miss a tenth of the total.
    head = "# E (eV)  dosup(E)   dosdw(E)  pdosup(E)  pdosdw(E)\n"
    both = rows(ENERGIES + LEVEL, 2 * UP / 0.9, 2 * DOWN / 0.9, 2 * UP, 2 * DOWN, form="%.6E")
    (tmp_path / "ni.pdos_tot").write_text(head + both)
    scaled = TargetDOS.from_file(path, efermi=LEVEL)
    assert scaled.values == pytest.approx(BOTH / 0.9, abs=1e-4)
    assert scaled.known.all()
    (tmp_path / "ni.pdos_tot").write_text(head + rows(ENERGIES + LEVEL, 4 * UP, 4 * DOWN, 2 * UP, 2 * DOWN))
    with pytest.raises(ValueError, match="nothing is known"):  # half of the total is not projected
        TargetDOS.from_file(path, efermi=LEVEL)
    (tmp_path / "ni.pdos_tot").write_text(head + rows(ENERGIES, UP, DOWN, UP, DOWN))
    with pytest.raises(ValueError, match="not of one calculation"):
        TargetDOS.from_file(path, efermi=LEVEL)
    one = TargetDOS.from_file(path, efermi=LEVEL, columns=("E (eV)", "ldosup(E)"), spin="one")
    assert one.values == pytest.approx(1.8 * UP, abs=1e-4)


@pytest.mark.parametrize(
    ("given", "beside", "wanted"),
    [
        ("1(s)", ["1(s)~", "2(d)", "2(d)~", "2(d).bak", "2(d).orig", "#2(d)#", "1(s).gz", "2(d).png"], ["2(d)"]),
        ("1(s)", ["2(d)", "2(d).gz", "2(d).xz"], ["2(d)"]),
        ("1(s)", ["2(d).bz2"], ["2(d).bz2"]),
        ("1(s).gz", ["1(s)", "2(d)", "2(d).gz"], ["2(d).gz"]),
        ("1(s_j0.5)", ["2(p_j0.5)", "3(p_j1.5)", "3(p_j1.5)~"], ["2(p_j0.5)", "3(p_j1.5)"]),
        ("1(s)~", ["1(s)", "2(d)", "3(p)", "3(p)~"], ["2(d)", "3(p)~"]),
        ("1(s).dat", ["2(d).dat", "2(d).dat.gz"], ["2(d).dat"]),
    ],
)
def test_an_orbital_of_espresso_counts_once(tmp_path: Path, given: str, beside: list[str], wanted: list[str]) -> None:
    for number, end in enumerate((given, *beside)):
        share = 10.0**number  # the sum tells which files are in it
        text = "# E (eV)   ldos(E)   pdos(E)\n" + rows(ENERGIES, 0 * ENERGIES + share, 0 * ENERGIES + share)
        packer = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(end.split(".")[-1], bytes)
        (tmp_path / f"x.pdos_atm#1(Ni-a)_wfc#{end}").write_bytes(packer(text.encode()))
    (tmp_path / "x.pdos_atm#1(Ni-a)_wfc#9(f)").mkdir()
    target = TargetDOS.from_file(tmp_path / f"x.pdos_atm#1(Ni-a)_wfc#{given}", efermi=0.0)
    assert target.values[5] == pytest.approx(1 + sum(10.0 ** (beside.index(end) + 1) for end in wanted))
    assert f"orbitals of one atom added from {len(wanted) + 1} files" in target.provenance["steps"]


def test_total_of_projwfc_is_the_total(tmp_path: Path) -> None:
    head = "# E (eV)  dos(E)    pdos(E)\n"
    total = read(tmp_path, head + rows(ENERGIES + LEVEL, BOTH, 0.9 * BOTH), "ni.pdos_tot", efermi=LEVEL)
    assert total.kind == "total"
    assert total.values == pytest.approx(BOTH, abs=1e-5)


def test_a_gap_of_a_known_total_moves_its_zero(tmp_path: Path) -> None:
    gapped = np.where((ENERGIES > -2.0) & (ENERGIES < 1.0), 0.0, 1.0)
    head = f"#  E (eV)   dos(E)     Int dos(E) EFermi = {LEVEL:7.3f} eV\n"
    target = read(tmp_path, head + rows(ENERGIES + LEVEL, gapped, integral(gapped)), "si.dos")
    assert target.reference == "vbm"
    assert target.energies[target.values > 0][target.energies[target.values > 0] <= 1e-6][-1] == pytest.approx(
        0.0, abs=1e-6
    )
    stated = read(tmp_path, head + rows(ENERGIES + LEVEL, gapped, integral(gapped)), "si.dos", reference="fermi")
    assert stated.reference == "fermi"
    assert stated.energies == pytest.approx(ENERGIES, abs=1e-4)


def test_a_total_that_does_not_reach_its_fermi_level_is_read(tmp_path: Path) -> None:
    head = f"#  E (eV)   dos(E)     Int dos(E) EFermi = {LEVEL:7.3f} eV\n"
    below = ENERGIES < -2.0
    target = read(tmp_path, head + rows(ENERGIES[below] + LEVEL, BOTH[below], integral(BOTH[below])))
    assert target.reference == "fermi"
    assert target.energies == pytest.approx(ENERGIES[below], abs=1e-4)


def test_energies_above_the_last_band_are_unknown(tmp_path: Path) -> None:
    head = f"#  E (eV)   dos(E)     Int dos(E) EFermi = {LEVEL:7.3f} eV\n"
    cut = np.where(ENERGIES < 2.0, BOTH, 0.0)
    target = read(tmp_path, head + rows(ENERGIES + LEVEL, cut, integral(cut)))
    assert target.known[ENERGIES < 1.99].all()
    assert not target.known[ENERGIES > 2.01].any()


def test_vacuum_scale_of_aims_is_not_ignored(tmp_path: Path) -> None:
    text, _, _ = aims_total()
    raw = text.replace("average chemical potential, mu =       -4.532100 eV", "vacuum level")
    (tmp_path / "KS_DOS_total.dat").write_text(text)
    with pytest.raises(ValueError, match=r"relative to the vacuum: read KS_DOS_total\.dat, or give the Fermi level"):
        read(tmp_path, raw, "KS_DOS_total_raw.dat")
    assert read(tmp_path, raw, "KS_DOS_total_raw.dat", efermi=-4.0).energies == pytest.approx(ENERGIES + 4.0)


# -- other tables ------------------------------------------------------------------------------------------------------


def test_what_is_assumed_is_told_and_what_is_stated_is_not(tmp_path: Path) -> None:
    text = rows(ENERGIES, BOTH)
    told = read(tmp_path, text).provenance["assumed"]
    assert told == [
        "zero of energy at the Fermi level", "energy in column 0, DOS in column 1", "eV and states/eV",
        "both spins in the DOS", "the DOS of one site",
    ]  # fmt: skip
    for scale, span in ((0.01, "0.13"), (1000.0, "1.3e+04")):
        doubt = read(tmp_path, rows(scale * ENERGIES, BOTH)).provenance["assumed"][2]
        assert doubt.startswith(f"eV and states/eV, although the energies span {span} ")
        assert "--units" in doubt
    stated = {"reference": "fermi", "columns": (0, 1), "units": "eV", "spin": "summed", "kind": "site"}
    assert "assumed" not in read(tmp_path, text, **stated).provenance
    named = "E-Ef (eV), total DOS (states/eV)\n" + commas(ENERGIES, BOTH)
    assert "zero of energy at the Fermi level" not in read(tmp_path, named, "x.csv").provenance["assumed"]
    assert read(tmp_path, named, "x.csv").kind == "total"


@pytest.mark.parametrize("down", [1.0, -1.0])
@pytest.mark.parametrize(
    "names",
    [
        "E,up,down",
        "energy (eV);spin up;spin down",
        "# E dos_up dos_dn",
        "Energy\tTDOS-alpha\tTDOS-beta",
        "energy dosup(E) dosdw(E)",
    ],
)
def test_spin_columns_are_added(tmp_path: Path, names: str, down: float) -> None:
    separator = next((mark for mark in ",;\t" if mark in names), " ")
    body = "\n".join(separator.join(f"{x:.6f}" for x in row) for row in np.column_stack((ENERGIES, UP, down * DOWN)))
    target = read(tmp_path, f"{names}\n{body}\n")
    assert target.values == pytest.approx(BOTH, abs=1e-5)
    told = [step for step in target.provenance["steps"] if step.startswith("spins added")]
    assert len(told) == 1
    assert ("drawn downwards" in told[0]) == (down < 0)


@pytest.mark.parametrize("down", [1.0, -1.0])
@pytest.mark.parametrize("order", ["blocks", "interleaved"])
def test_spins_in_rows_are_added(tmp_path: Path, order: str, down: float) -> None:
    pairs = np.array([np.column_stack((ENERGIES, part)) for part in (UP, down * DOWN)])
    table = pairs.reshape(-1, 2) if order == "blocks" else pairs.transpose(1, 0, 2).reshape(-1, 2)
    target = read(tmp_path, rows(*table.T))
    assert target.energies == pytest.approx(ENERGIES)
    assert target.values == pytest.approx(BOTH, abs=1e-5)
    assert any("two spins in two" in step for step in target.provenance["steps"])


def test_equal_rows_are_two_spins_only_if_that_is_said(tmp_path: Path) -> None:
    text = rows(np.repeat(ENERGIES, 2), np.repeat(UP, 2))
    with pytest.raises(ValueError, match=r"is there twice: if they are two spins, say spin=.separate."):
        read(tmp_path, text)
    assert read(tmp_path, text, spin="separate").values == pytest.approx(2 * UP, abs=1e-5)


def test_columns_orbitals_and_integrals(tmp_path: Path) -> None:
    """Integrals are left out, a total is preferred to orbitals, and orbitals alone add up."""
    cases = {
        "E dos idos": (BOTH, integral(BOTH)),
        "energy s p d tot": (0.2 * BOTH, 0.1 * BOTH, 0.7 * BOTH, BOTH),
        "energy s p d": (0.2 * BOTH, 0.1 * BOTH, 0.7 * BOTH),
        "energy s_up s_down d_up d_down": (0.2 * UP, -0.2 * DOWN, 0.8 * UP, -0.8 * DOWN),
    }
    for names, columns in cases.items():
        assert read(tmp_path, f"{names}\n{rows(ENERGIES, *columns)}").values == pytest.approx(BOTH, abs=1e-5), names
    assert read(tmp_path, rows(ENERGIES, BOTH, integral(BOTH))).values == pytest.approx(BOTH, abs=1e-5)
    assert read(tmp_path, rows(ENERGIES, UP, -DOWN)).values == pytest.approx(BOTH, abs=1e-5)
    chosen = read(tmp_path, f"E,Ni1,Ni2\n{commas(ENERGIES, UP, DOWN)}", columns=("E", "Ni2"))
    assert chosen.values == pytest.approx(DOWN, abs=1e-5)


def test_units_of_the_header_and_of_the_caller(tmp_path: Path) -> None:
    text = rows(ENERGIES / HARTREE, BOTH * HARTREE, form="%.10f")
    for target in (read(tmp_path, f"# E(Ha) DOS(1/Ha)\n{text}"), read(tmp_path, text, units="Ha")):
        assert target.energies == pytest.approx(ENERGIES, abs=1e-6)
        assert target.values == pytest.approx(BOTH, abs=1e-6)
    per_ev = read(tmp_path, f"# E(Ha) DOS(states/eV)\n{rows(ENERGIES / HARTREE, BOTH, form='%.10f')}")
    assert per_ev.values == pytest.approx(BOTH, abs=1e-6)


RY = HARTREE / 2


@pytest.mark.parametrize(
    ("header", "unit", "per"),
    [
        ("energy(eV)  dos(states/Ry)", 1.0, RY),
        ("energy(eV)  dos(states/Ha/cell)", 1.0, HARTREE),
        ("E(eV) DOS(states/meV)", 1.0, 1e-3),
        ("E(Ry) DOS(1/Ry)", RY, RY),
        ("E(Ry) DOS(states/Ha)", RY, HARTREE),
        ("E(eV) relative to Fermi, dos in electrons/Ry", 1.0, RY),
        ("E(eV) DOS (states Ry^-1 atom^-1)", 1.0, RY),
        ("E(eV) DOS (states/unit cell/Ry)", 1.0, RY),
        ("states per atom per Hartree\n# E(eV)  DOS", 1.0, HARTREE),
        ("multiply by 0.0735 to get states/eV\n# E(eV)  DOS(states/Ry)", 1.0, RY),
        ("from states/Ry to\n# E(eV)  DOS(states/eV)", 1.0, 1.0),
        ("states/cell, E in Ry\n# E(eV)  DOS", 1.0, 1.0),
    ],
)
def test_what_unit_the_header_counts_states_per(tmp_path: Path, header: str, unit: float, per: float) -> None:
    text = rows(ENERGIES / unit, BOTH * per, form="%.10f")
    target = read(tmp_path, f"# {header}\n{text}")
    assert target.energies == pytest.approx(ENERGIES, abs=1e-6)
    assert target.values == pytest.approx(BOTH, abs=1e-6)
    assert any(f"from states per {per:g} eV" in step for step in target.provenance["steps"]) == ((unit, per) != (1, 1))
    # What the caller says comes first, and it is told if the header says another.
    stated = read(tmp_path, f"# {header}\n{rows(ENERGIES, BOTH)}", units="eV")
    assert stated.values == pytest.approx(BOTH, abs=1e-6)
    assert any("states per 1 eV, as units" in told for told in stated.provenance["assumed"]) == (per != 1.0)


def test_the_energy_may_stand_behind_the_dos(tmp_path: Path) -> None:
    text = rows(BOTH, ENERGIES * 1000, form="%.10f")
    target = read(tmp_path, f"# dos(states/eV)  energy(meV)\n{text}")
    assert target.energies == pytest.approx(ENERGIES, abs=1e-6)
    assert target.values == pytest.approx(BOTH, abs=1e-6)


@pytest.mark.parametrize("orbitals", [False, True])
@pytest.mark.parametrize(
    ("unit", "per_spin"),
    [
        ("states/eV/spin", True),
        ("states/(eV spin atom)", True),
        ("states/(Ry spin atom)", True),
        ("states per spin per eV", True),
        ("eV^-1 spin^-1", True),
        ("states/eV for one spin channel", True),
        ("states/eV, both spins, not per spin", False),
        ("states/eV, LDA/spin-orbit", False),
        ("states/eV per spin-polarised atom", False),
    ],
)
def test_states_per_spin(tmp_path: Path, unit: str, per_spin: bool, orbitals: bool) -> None:
    per = RY if "Ry" in unit else 1.0
    columns = (0.3 * UP * per, 0.7 * UP * per) if orbitals else (UP * per,)
    text = f"# {unit}\n# E  {'s  d' if orbitals else 'DOS'}\n{rows(ENERGIES, *columns, form='%.9f')}"
    if not per_spin:
        assert read(tmp_path, text).values == pytest.approx(UP, abs=1e-6)
        return
    with pytest.raises(ValueError, match=r'counts states per spin: add the other .*or say spin="one"'):
        read(tmp_path, text)
    assert read(tmp_path, text, spin="one").values == pytest.approx(2 * UP, abs=1e-6)
    assert read(tmp_path, text, spin="summed").values == pytest.approx(UP, abs=1e-6)
    both = f"# {unit}\n# E  up  down\n{rows(ENERGIES, UP * per, -DOWN * per, form='%.9f')}"
    assert read(tmp_path, both).values == pytest.approx(BOTH, abs=1e-6)
    blocks = rows(*(np.concatenate(pair) for pair in ((ENERGIES, ENERGIES), (UP * per, DOWN * per))), form="%.9f")
    assert read(tmp_path, f"# {unit}\n# E  DOS\n{blocks}").values == pytest.approx(BOTH, abs=1e-6)


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        ("E-E_F (eV) DOS (states/eV/cell)", "total"),
        ("# DOS per unit cell", "total"),
        ("# states/eV/f.u.", "total"),
        ("E-E_F (eV) PDOS (states/eV/cell)", "site"),
        ("# states/eV/cell, Ni d", "site"),
        ("# O with a vac nearby, cellulose", "site"),
        ("# states/eV/atom", "site"),
    ],
)
def test_what_the_header_counts_states_per(header: str, kind: str, tmp_path: Path) -> None:
    target = read(tmp_path, f"# {header.removeprefix('# ')}\n-1 1\n0 2\n1 1\n", "dos.dat")
    assert target.kind == kind
    assert any("counted per cell" in step for step in target.provenance["steps"]) == (kind == "total")
    assert read(tmp_path, f"# {header}\n-1 1\n0 2\n1 1\n", "dos.dat", kind="site").kind == "site"


@pytest.mark.parametrize(("units", "told"), [("Ry", True), ("eV", False), (None, False)])
def test_a_fermi_level_beside_other_units_is_told_to_be_in_ev(units: str | None, told: bool, tmp_path: Path) -> None:
    target = read(tmp_path, "-0.5 1\n-0.4 2\n0 1\n", "dos.dat", efermi=-0.3, units=units)
    assert any("efermi -0.3 in eV" in sentence for sentence in target.provenance["assumed"]) == told


def test_smearing_and_a_spin_drawn_downwards_are_told_apart(tmp_path: Path) -> None:
    """An isolated level by Methfessel-Paxton of order 1 is negative by 6.6 % of its area; a spin is so by all of it."""
    x = (ENERGIES + 3.0) / 0.3
    level = np.exp(-(x**2)) / (0.3 * np.sqrt(np.pi)) * (1.5 - x**2)
    smeared = read(tmp_path, rows(ENERGIES, level))
    assert smeared.total_states() == pytest.approx(1.0, abs=1e-3)
    assert "negative values" in smeared.provenance["steps"][-1]
    both = read(tmp_path, "E up down\n" + rows(ENERGIES, level, -level))
    assert both.total_states() == pytest.approx(2.0, abs=2e-3)
    with pytest.raises(ValueError, match=r"dos\.dat: the DOS is negative\. A spin drawn downwards is half of it"):
        read(tmp_path, rows(ENERGIES, -UP))
    assert read(tmp_path, rows(ENERGIES, -UP), spin="one").values == pytest.approx(2 * UP, abs=1e-5)
    with pytest.raises(ValueError, match=r"dos.dat: the DOS is -.* must not be negative"):
        read(tmp_path, rows(ENERGIES, UP - DOWN))


# -- numbers -----------------------------------------------------------------------------------------------------------

PLAIN = [(-2.5, 1.25), (-1.5, 2.5), (0.0, 1.0), (1.0, 0.5)]
NUMBERS = {
    "minus sign of typesetting": "E,DOS\n−2.5,1.25\n−1.5,2.5\n0.0,1.0\n1.0,0.5\n",
    "double precision": "-2.5D0 1.25d+00\n-1.5 0.25D1\n0.0 1.0D0\n1 5.0D-1\n",
    "three digits in the exponent": "-2.5 1.25\n-1.5 0.25+001\n0.0 0.1000+001\n1.0 0.5\n",
    "decimal commas and semicolons": "E;DOS\n-2,5;1,25\n-1,5;2,5\n0;1\n1;0,5\n",
    "decimal commas and tabs": "-2,5\t1,25\n-1,5\t2,5\n0,0\t1,0\n1,0\t0,5\n",
    "decimal commas and blanks": "-2,5 1,25\n-1,5 2,5\n0 1\n1 0,5\n",
    "byte order mark and Windows lines": "\ufeffE DOS\r\n-2.5 1.25\r\n-1.5 2.5\r\n0 1\r\n1 .5\r\n",
    "old Macintosh lines": "E DOS\r-2.5 1.25\r-1.5 2.5\r0 1\r1 .5\r",
    "comments after the numbers": "-2.5 1.25 # bottom\n-1.5 2.5 ! top\n0 1 // E_F\n1 0.5\n",
    "quotes": '"E","DOS"\n"-2.5","1.25"\n"-1.5","2.5"\n"0","1"\n"1","0.5"\n',
    "comma at the end": "-2.5,1.25,\n-1.5,2.5,\n0,1,\n1,0.5,\n",
    "comma and blank": "-2.5, 1.25\n-1.5, 2.5\n0, 1\n1, 0.5\n",
    "plus signs and points": "-2.5 +1.25\n-1.5 +2.5\n0. 1.\n+1. .5\n",
    "rows out of order": "0 1\n1 0.5\n-2.5 1.25\n-1.5 2.5\n",
    "downwards": "1 0.5\n0 1\n-1.5 2.5\n-2.5 1.25\n",
    "header in the middle of comments": "@ title\n# E DOS\n\n% units eV\n-2.5 1.25\n-1.5 2.5\n\n0 1\n&\n1 0.5\n",
    "energy in the second column": "DOS,E\n1.25,-2.5\n2.5,-1.5\n1,0\n0.5,1\n",
}


@pytest.mark.parametrize("what", NUMBERS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_ways_of_writing_numbers(tmp_path: Path, what: str, encoding: str) -> None:
    target = read(tmp_path, NUMBERS[what].encode(encoding))
    assert list(zip(target.energies.tolist(), target.values.tolist(), strict=True)) == PLAIN


def test_a_comment_in_latin_1_is_no_obstacle(tmp_path: Path) -> None:
    assert read(tmp_path, "# en \xe9lectronvolts\n-1 2\n0 3\n".encode("latin-1")).values.tolist() == [2.0, 3.0]


# -- property: every format gives back what was written ----------------------------------------------------------------


def unknown_table(separator: str, names: str, comma: bool, downwards: float) -> Written:
    body = "\n".join(
        separator.join(f"{x:.6f}" for x in row) for row in np.column_stack((ENERGIES, UP, downwards * DOWN))
    )
    return f"{names}\n{body.replace('.', ',') if comma else body}\n", "table.txt", {}


FORMATS = [write for write, _ in PROGRAMS.values()] + [
    lambda: unknown_table(",", "E,up,down", False, 1.0),
    lambda: unknown_table(";", "E;up;down", True, -1.0),
    lambda: unknown_table("\t", "# E up down", True, 1.0),
    lambda: unknown_table("  ", "# E - E_F (eV)  spin up  spin down", False, -1.0),
]
PACKERS: list[Callable[[bytes], bytes]] = [bytes, gzip.compress, bz2.compress, lzma.compress]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.sampled_from(range(len(FORMATS))),
    st.floats(-3.0, 3.0).map(lambda shift: round(shift, 3)),
    st.sampled_from(["eV", "meV", "Ry", "Ha"]),
    st.sampled_from(range(len(PACKERS))),
    st.booleans(),
    st.sampled_from(["\n", "\r\n"]),
    st.integers(0, 2**32 - 1),
)
def test_a_known_dos_comes_back(
    tmp_path_factory: pytest.TempPathFactory, form: int, shift: float, units: str, packer: int, shuffle: bool,
    ending: str, seed: int,
) -> None:  # fmt: skip
    """Whatever the program, zero, unit, order of rows, line ends and compression: the same target to 1 %."""
    text, name, others = FORMATS[form]()
    folder = tmp_path_factory.mktemp("dos")
    known = form < len(PROGRAMS)
    options: dict[str, Any] = {}
    if not known:  # programs have their own zero and unit
        unit = {"eV": 1.0, "meV": 1e-3, "Ry": HARTREE / 2, "Ha": HARTREE}[units]
        head, *body = text.splitlines()
        comma = ";" in head or "\t" in text
        table = np.array([[float(x.replace(",", ".") if comma else x) for x in line.replace(",", " ").split() if x]
                          if not comma else [float(x.replace(",", ".")) for x in line.replace(";", "\t").split("\t")]
                          for line in body])  # fmt: skip
        table = np.column_stack(((table[:, 0] + shift) / unit, table[:, 1:] * unit))
        separator = ";" if ";" in head else "\t" if comma else "," if "," in text else "  "
        lines = [separator.join(f"{x:.9f}".replace(".", ",") if comma else f"{x:.9f}" for x in row) for row in table]
        text = "\n".join([head, *lines]) + "\n"
        options = {"efermi": shift, "units": units}
    for other, content in {name: text, **others}.items():
        lines = content.splitlines()
        first = next(i for i, line in enumerate(lines) if line.split()[0].lstrip("-").replace(",", ".")[0].isdigit())
        if shuffle and (known is False or not name.startswith(("PDOS", "TDOS"))):
            lines[first:] = np.random.default_rng(seed).permutation(lines[first:]).tolist()
        (folder / other).write_bytes(PACKERS[packer]((ending.join(lines) + ending).encode()))
    target = TargetDOS.from_file(folder / name, **options)
    wanted = TargetDOS.from_arrays(ENERGIES, BOTH, kind=target.kind)
    assert normalised_l1(target, wanted) < 0.01
    assert json.dumps(target.provenance)


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("E (eV)  DOS (states/(eV atom))", ("E (eV)", "DOS (states/(eV atom))")),
        ("E(eV) s(1/eV)", ("E(eV)", "s(1/eV)")),
        ("energy [eV], dos [states/(eV cell)]", ("energy [eV]", "dos [states/(eV cell)]")),
        ("1/(" * 20_000, ()),  # took 20 s
        ("a (" * 20_000, ()),
    ],
    ids=["nested", "attached", "square", "unclosed", "unclosed, apart"],
)
def test_names_keep_their_units_in_brackets(line: str, names: tuple[str, ...]) -> None:
    assert column_names((line,), 2, None) == names
