"""Files of CP2K, SIESTA, ABACUS and ABINIT: the right values of each, and one clear line for what cannot be read.

`recorded/cp2k` was written by CP2K 2023.1: LiH at the Gamma point of its cubic cell, with closed shells ("lih", and a
list of its first two atoms) and with two spins ("lihs"). The others follow what the programs print (SIESTA's pdos.F90,
ABACUS' write_dos_lcao.cpp, ABINIT's dos_hdr_write, with which files of its version 9.10 were compared).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dosmatgen_ase import TargetDOS
from dosmatgen_ase.dos import Array, DOSWarning, normalised_l1
from dosmatgen_ase.dos.grid import MODEL_SIGMA

HARTREE = 27.211386245988
RECORDED = Path(__file__).parent / "recorded" / "cp2k"


def written(tmp_path: Path, text: str, name: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def states(target: TargetDOS, low: float, high: float) -> float:
    inside = (target.energies >= low) & (target.energies <= high)
    return float(np.trapezoid(target.values[inside], target.energies[inside]))


# -- CP2K --------------------------------------------------------------------------------------------------------------


def cp2k(levels: Any, electrons: Any, held: Any, of: str = "atomic kind O", fermi: float = 0.0) -> str:
    """Levels in Hartree."""
    lines = [
        f"# Projected DOS for {of} at iteration step i = 0, E(Fermi) = {fermi:12.6f} a.u.",
        "#     MO Eigenvalue [a.u.]      Occupation                 s                 p",
    ]
    for i, (level, filled, part) in enumerate(zip(levels, electrons, held, strict=True), 1):
        lines.append(f"{i:8d} {level:17.6f} {filled:15.6f} {part:17.8f} {0.0:17.8f}")
    return "\n".join(lines) + "\n"


def test_cp2k_levels_are_gaussians_that_hold_two_electrons(tmp_path: Path) -> None:
    path = written(tmp_path, cp2k([-0.3, -0.1, 0.2], [2, 2, 0], [0.25, 0.5, 0.75], fermi=-0.1), "x-k1-1.pdos")
    dos = TargetDOS.from_file(path)
    assert (dos.kind, dos.reference, dos.sigma) == ("site", "vbm", MODEL_SIGMA)
    deep = -0.2 * HARTREE
    assert dos.values[np.abs(dos.energies - deep).argmin()] == pytest.approx(0.5 / MODEL_SIGMA / 2.5066, rel=2e-3)
    assert states(dos, deep - 1.5, deep + 1.5) == pytest.approx(0.5, rel=1e-3)
    assert states(dos, -1.5, 1.5) == pytest.approx(1.0, rel=1e-3)  # about the valence-band maximum, the zero
    assert dos.provenance["assumed"] == ["one O in the cell, as the file adds all O atoms"]
    assert dos.energies[-1] == pytest.approx(0.3 * HARTREE)  # higher levels are not in the file


@pytest.mark.parametrize(
    ("electrons", "zero", "reference", "assumed"),
    [
        ([2, 2, 0], -0.1, "vbm", 0),
        ([2, 1.3, 0.7], 0.0, "fermi", 0),  # a metal: partly filled
        ([2, 2, 2], 0.2, "vbm", 1),  # no empty level
        ([0, 0, 0], 0.0, "fermi", 0),
    ],
)
def test_zero_of_cp2k(tmp_path: Path, electrons: list[float], zero: float, reference: str, assumed: int) -> None:
    electrons = electrons if max(electrons) else [2, 0, 0]
    levels = [-0.3, -0.1, 0.2] if electrons != [2, 0, 0] else [0.0, 0.0, 0.2]  # filled and empty at one energy
    dos = TargetDOS.from_file(written(tmp_path, cp2k(levels, electrons, [0.5] * 3), "x-k1-1.pdos"))
    assert dos.reference == reference
    assert dos.energies[-1] == pytest.approx((0.2 - zero) * HARTREE, abs=1e-5)
    assert sum("zero of energy" in sentence for sentence in dos.provenance["assumed"]) == assumed


def test_the_kinds_of_real_cp2k_files_hold_all_electrons() -> None:
    kinds = [TargetDOS.from_file(RECORDED / f"lih-k{i}-1.pdos") for i in (1, 2)]
    assert sum(states(dos, -60, 0.85) for dos in kinds) == pytest.approx(16, abs=0.01)  # four of 3, four of 1
    some = TargetDOS.from_file(RECORDED / "lih-list1-1.pdos")
    assert "mean over the 2 atoms of the list" in some.provenance["steps"]
    assert "assumed" not in some.provenance
    assert states(some, -60, 0.85) == pytest.approx(states(kinds[0], -60, 0.85) / 4, rel=0.01)  # an atom of the kind


def test_both_spins_of_cp2k_are_the_closed_shell(tmp_path: Path) -> None:
    closed = TargetDOS.from_file(RECORDED / "lih-k2-1.pdos")
    for name in ("lihs-ALPHA_k2-1.pdos", "lihs-BETA_k2-1.pdos"):
        both = TargetDOS.from_file(RECORDED / name)
        assert normalised_l1(both, closed) < 1e-3
        assert any(step.startswith("the other spin added from lihs-") for step in both.provenance["steps"])
    text = (RECORDED / "lihs-ALPHA_k2-1.pdos").read_text()
    with pytest.raises(ValueError, match=r"it holds one spin: put a-BETA_k2-1\.pdos beside it"):
        TargetDOS.from_file(written(tmp_path, text, "a-ALPHA_k2-1.pdos"))
    with pytest.raises(ValueError, match="name it as CP2K does"):
        TargetDOS.from_file(written(tmp_path, text, "up.pdos"))
    written(tmp_path, text.replace("kind H", "kind Li"), "a-BETA_k2-1.pdos")
    with pytest.raises(ValueError, match="of other atoms"):
        TargetDOS.from_file(tmp_path / "a-ALPHA_k2-1.pdos")


# -- SIESTA and ABACUS -------------------------------------------------------------------------------------------------

GRID = np.round(np.arange(-20.0, 5.0001, 0.05), 5)
FERMI = -4.5


def curve(centre: float, number: float) -> Array:
    return number * np.exp(-0.5 * ((GRID - centre) / 0.3) ** 2) / (0.3 * np.sqrt(2 * np.pi))


ORBITALS = {
    1: [curve(-9.0, 0.5), curve(-8.0, 0.25)],
    2: [curve(-7.5, 1.5), curve(-1.0, 0.5)],
}  # of one spin; the last is empty


def pdos(siesta: bool, spins: int = 1, fermi: bool | None = None) -> str:
    fermi = siesta if fermi is None else fermi
    parts = ["<pdos>", f"<nspin>{spins}</nspin>", "<norbitals>4</norbitals>"]
    parts += [f'<fermi_energy units="eV">{FERMI:17.9E}</fermi_energy>'] if fermi else []
    parts += ['<energy_values units="eV">', *(f"{e:17.9E}" for e in GRID), "</energy_values>"]
    index = 0
    for atom, curves in ORBITALS.items():
        for one in curves:
            index += 1
            shell = ' n="3"' if siesta else ""
            parts.append(
                f'<orbital\n index="  {index}"\n atom_index="  {atom}"\n species="X{atom}"{shell}\n l="0"\n>\n<data>'
            )
            parts += [" ".join(f"{value:17.9E}" for value in [v] * spins) for v in one]
            parts += ["</data>", "</orbital>"]
    return "\n".join([*parts, "</pdos>"]) + "\n"


@pytest.mark.parametrize("name", ["nacl.PDOS", "PDOS.xml"])
@pytest.mark.parametrize(("siesta", "spins", "factor"), [(True, 1, 2), (True, 2, 2), (False, 1, 1), (False, 2, 2)])
def test_orbitals_of_an_atom_are_added(tmp_path: Path, name: str, siesta: bool, spins: int, factor: int) -> None:
    head = '<?xml version="1.0"?>\n' if name == "PDOS.xml" else ""
    path = written(tmp_path, head + pdos(siesta, spins), name)
    options: dict[str, Any] = {"sigma": 0.3} | ({} if siesta else {"efermi": FERMI})
    for site, number in ((0, 0.75), (1, 1.5), (None, 2.25)):
        dos = TargetDOS.from_file(path, site, **options)
        assert dos.kind == ("total" if site is None else "site")
        assert states(dos, -20, 3) == pytest.approx(factor * number, rel=1e-3)
        assert dos.provenance["source"].startswith("SIESTA" if siesta else "ABACUS")
        assert dos.reference == "vbm"  # the Fermi level lies in a gap
        filled = np.where(dos.energies < 1, dos.values, 0.0)
        assert dos.energies[filled.argmax()] == pytest.approx(-1.5 if site == 0 else 0.0, abs=0.7)


def test_a_pdos_without_a_fermi_level_asks_for_it(tmp_path: Path) -> None:
    for siesta in (True, False):
        with pytest.raises(ValueError, match=r"has no Fermi level: give it as efermi= \(--efermi\)"):
            TargetDOS.from_file(written(tmp_path, pdos(siesta, fermi=False), "PDOS"))
    path = written(tmp_path, pdos(True), "nacl.PDOS")
    with pytest.raises(ValueError, match=r"is PDOS of SIESTA or ABACUS, not columns of text: leave out columns"):
        TargetDOS.from_file(path, columns=[0, 1])


# -- ABINIT ------------------------------------------------------------------------------------------------------------

HA = np.round(np.arange(-0.3, 0.6001, 0.0005), 5)


def abinit(of_atom: bool, spins: int = 1, fermi: str = " Fermi energy :       0.20000000") -> str:
    """States per Hartree: two below the Fermi level for each spin and orbital, one above."""
    one = (
        2 * np.exp(-0.5 * ((HA - 0.1) / 0.01) ** 2) / 0.01 / 2.5066
        + np.exp(-0.5 * ((HA - 0.4) / 0.01) ** 2) / 0.01 / 2.5066
    )
    what = (
        (
            "The local DOS (in electrons/Hartree for one atomic sphere)",
            "and integrated local DOS (in electrons for one atomic sphere)",
        )
        if of_atom
        else ("The DOS (in electrons/Hartree/cell)", "and integrated DOS (in electrons/cell)")
    )
    lines = [
        "#",
        "# ABINIT package : DOS file  ",
        "#",
        f"# nsppol = {spins}, nkpt =    8, nband(1)=   8",
        "# Tetrahedron method",
    ]
    lines += ["# For identification : eigen(1:3)=  -0.225   0.220   0.220", "#", f"#{fermi}", "#", f"# {what[0]}"]
    lines += [f"# {what[1]} are computed.", f"# at {len(HA)} energies (in Hartree) covering the interval ", "#"]
    for spin in range(spins):
        if spins == 2:
            lines.append(f"#                Spin-{('up', 'dn')[spin]} DOS")
        if of_atom:
            lines += ["# for atom number iat=    1  iatom=    1"]
            lines += [
                "# energy(Ha)  l=0      l=1      l=2      l=3      l=4    (integral=>)  l=0   l=1   l=2   l=3   l=4"
            ]
        else:
            lines += ["# energy(Ha)     DOS  integrated DOS"]
        parts = (0.5, 0.25, 0.25, 0, 0) if of_atom else (1.0,)
        sums = np.cumsum(one) * 0.0005
        rows = np.column_stack([HA, *(part * one for part in parts), *(part * sums for part in parts)])
        lines += [" ".join(f"{value:12.5f}" for value in row) for row in rows] + [""]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("spins", [1, 2])
@pytest.mark.parametrize("of_atom", [True, False])
def test_abinit_counts_per_hartree_and_prints_its_fermi_level(tmp_path: Path, of_atom: bool, spins: int) -> None:
    name = "abo_DOS_AT0001" if of_atom else "abo_DOS_TOTAL"
    dos = TargetDOS.from_file(written(tmp_path, abinit(of_atom, spins), name))
    assert dos.kind == ("site" if of_atom else "total")
    zero = 0.2 if of_atom else dos.energies[0] / -HARTREE - 0.3  # a total with a gap moves to its edge
    assert zero < 0.2001
    assert states(dos, -8, (0.25 - zero) * HARTREE) == pytest.approx(2 * spins, rel=1e-3)
    assert dos.energies[dos.values.argmax()] == pytest.approx((0.1 - zero) * HARTREE, abs=0.02)
    assert any("sphere" in sentence for sentence in dos.provenance.get("assumed", [])) == of_atom
    assert dos.provenance["source"] == f"ABINIT {name}"


def test_abinit_without_one_fermi_level_asks_for_it(tmp_path: Path) -> None:
    two = " Fermi energy for electrons and holes       0.30000000      0.10000000"
    path = written(tmp_path, abinit(True, fermi=two), "abo_DOS_AT0001")
    with pytest.raises(ValueError, match="ABINIT writes absolute energies, and no single Fermi level in this file"):
        TargetDOS.from_file(path)
    assert TargetDOS.from_file(path, efermi=0.2 * HARTREE).energies[0] == pytest.approx(-0.5 * HARTREE)


# -- hostile -----------------------------------------------------------------------------------------------------------

GOOD, XML = cp2k([-0.3, -0.1, 0.2], [2, 2, 0], [0.25, 0.5, 0.75]), pdos(True)
ROW = "       3          0.200000        0.000000        0.75000000        0.00000000\n"
assert ROW in GOOD
HOSTILE = {
    "CP2K title alone": (GOOD.splitlines()[0] + "\n", "not a .pdos file of CP2K"),
    "CP2K no rows": ("\n".join(GOOD.splitlines()[:2]), "not a .pdos file of CP2K"),
    "CP2K words": (GOOD.replace("0.200000", "abc"), "not a .pdos file of CP2K"),
    "CP2K NaN": (GOOD.replace("0.200000", "nan"), "must be finite"),
    "CP2K overflow": (GOOD.replace("0.200000", "********"), "not a .pdos file of CP2K"),
    "CP2K short row": (GOOD.replace("0.75000000 ", ""), "not a .pdos file of CP2K"),
    "CP2K more names": (GOOD.replace("s                 p", "s  p  d"), "more or fewer than its columns"),
    "CP2K two steps": (GOOD + GOOD, "several steps or k-points"),
    "CP2K far level": (GOOD.replace("-0.300000", "-30000.0"), "its eigenvalues span"),
    "CP2K no Fermi level": (GOOD.replace("E(Fermi)", "E"), "lack the Fermi level"),
    "CP2K negative": (GOOD.replace("0.25000000", "-0.2500000").replace("0.50000000", "-0.5000000"), "negative"),
    "CP2K no states": (cp2k([-0.1, 0.2], [2, 0], [0, 0]), "zero everywhere"),
    "PDOS cut off": (XML[: len(XML) // 2], "cut off or damaged"),
    "PDOS words": (XML.replace("<nspin>1", "<nspin>one"), "not a complete PDOS"),
    "PDOS noncollinear": (XML.replace("<nspin>1", "<nspin>4"), "noncollinear"),
    "PDOS overflow": (XML.replace(f"{GRID[3]:17.9E}", "*" * 17), "overflowed"),
    "PDOS NaN": (XML.replace(f"{GRID[3]:17.9E}", "NaN"), "finite"),
    "PDOS other unit": (XML.replace('values units="eV"', 'values units="Ry"'), "its energies are in 'Ry'"),
    "PDOS no orbitals": (XML[: XML.index("<orbital")] + "</pdos>", "holds no orbitals"),
    "PDOS no first atom": (XML.replace('atom_index="  1"', 'atom_index="  3"'), "first atom|atom before"),
    "PDOS short table": (XML.replace("</data>", "</data>", 1).replace(f"{ORBITALS[2][0][7]:17.9E}\n", "", 1), "fit"),
    "PDOS nested": ("<pdos>" + "<a>" * 50 + "</a>" * 50 + "</pdos>", "nested too deep"),
    "PDOS entity": (
        '<?xml version="1.0"?>\n<!DOCTYPE pdos [<!ENTITY a "b">]>\n<pdos>&a;</pdos>',
        "its first tag is <pdos>",
    ),
    "ABINIT other unit": (abinit(False).replace("electrons/Hartree", "electrons/eV"), "does not count the DOS"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_have_one_line(what: str, tmp_path: Path) -> None:
    text, told = HOSTILE[what]
    path = written(tmp_path, text, "x-k1-1.pdos")
    with pytest.raises(ValueError, match=told) as caught:
        TargetDOS.from_file(path).on_grid()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_site_of_a_cp2k_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave out site"):
        TargetDOS.from_file(written(tmp_path, GOOD, "x-k1-1.pdos"), 0)
    with pytest.raises(ValueError, match="site 2 does not exist"):
        TargetDOS.from_file(written(tmp_path, XML, "x.PDOS"), 2)


def test_a_stated_width_differs_from_that_of_cp2k_levels(tmp_path: Path) -> None:
    with pytest.warns(DOSWarning, match="sigma 0.1 is stated in place of 0.2"):
        TargetDOS.from_file(written(tmp_path, GOOD, "x-k1-1.pdos"), sigma=0.1)
