"""Hostile columns of text: one line of error that names the file and the fix, or the right numbers; nothing else."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from dosmatgen_ase import TargetDOS

REFUSED: list[tuple[str | bytes, str]] = [
    # nothing there
    ("", "is empty"),
    (" \n\t\n", "is empty"),
    ("# only\n# comments\n", "holds no numbers"),
    ("energy dos\n", "holds no numbers"),
    ("lorem ipsum\ndolor sit\n", "holds no numbers"),
    (b"\x00\x01\x02\x03" * 20, "neither vasprun"),
    (b"\x89PNG\r\n\x1a\n" + bytes(40), "neither vasprun"),
    (b"0 1\n1 \x00 2\n", "neither vasprun"),
    (gzip.compress(b"0 1\n1 2\n" * 50, mtime=0)[:-12], "damaged gzip"),
    ("0 1\n", "at least 2 energies"),
    ("0 nan\n1 nan\n", "nothing is known"),
    # words that are no numbers, and rows that were taken for headers
    ("0 1\n1 x\n", "line 2: expected numbers, found 'x'"),
    ("-1 x\n0 1\n1 1\n", "line 1: expected numbers, found 'x'"),
    ("1st row\n0 1\n1 2\n", "line 1: '1st' is not a number"),
    ("0 1\n1 2\nFermi level: 3\n", "line 3: expected numbers"),
    ("0 1\n1 2\n\nE DOS\n0 3\n1 4\n", "line 4: expected numbers"),
    ("-2.0 ********\n-1.0 2.0\n0.0 3.0\n", "line 1: .* did not fit its field"),
    ("******** 1.0\n-1.0 2.0\n0.0 3.0\n", "line 1: .* did not fit its field"),
    ("-1 1e\n0 1\n1 2\n", "line 1: '1e' is not a number"),
    ("-1 1.2.3\n0 1\n", "line 1: '1.2.3' is not a number"),
    ("-1 --1\n0 1\n", "line 1: "),
    ("-15.0-14.9 1\n-14 2\n", "line 1: '-15.0-14.9' is not a number"),
    ("-1 1_000\n0 1\n", "line 1: '1_000' is not a number"),
    ("-1 0x10\n0 1\n", "line 1: '0x10' is not a number"),
    ("-1 (1,2)\n0 (3,4)\n", "line 1"),
    ("-1 1+2j\n0 1\n", "line 1: '1\\+2j' is not a number"),
    ("-1 50%\n0 60%\n", "line 1: '50%' is not a number"),
    ("2024-01-01 1\n2024-01-02 2\n", "line 1: '2024-01-01' is not a number"),
    ("12:30 1\n12:31 2\n", "line 1: '12:30' is not a number"),
    ("-1 5-10\n0 1\n", "line 1: '5-10' is not a number"),
    ("-1 1\n0 inf\n1 1\n", "line 2: 'inf' is infinite"),
    ("-1 1\n0 -Infinity\n1 1\n", "line 2: '-Infinity' is infinite"),
    ("-1 1\n0 1e999\n1 1\n", "line 2: '1e999' is infinite"),
    ("nan 1\n0 1\n1 2\n", "line 1: there is no energy"),
    (",1\n0,1\n1,2\n", "line 1|expected numbers|no energy"),
    ("-1 1 eV\n0 2 eV\n", "line 1: expected numbers, found 'eV'"),
    ("-1 True\n0 False\n", "line 1: expected numbers"),
    # columns
    ("0\n1\n2\n", "line 1: 1 column; a DOS needs two"),
    ("0 1\n1\n2 1\n", "line 2: 1 column, but 2 in line 1"),
    ("0 1\n1 2 3\n", "line 2: 3 columns, but 2 in line 1"),
    (
        "0 1 2\n1 2 2\n2 1 1\n",
        r"line 1: 3 columns: say which .*\(0, 1\) .*\(0, 1, 2\) adds two spins",
    ),
    ("0 1 2 3\n1 2 2 3\n2 1 1 3\n", "line 1: 4 columns: say which"),
    ("E,Ni,Au\n0,1.5,2\n1,2,2\n", r"3 columns \(E, Ni, Au\): say which"),
    ("0 " + "1 " * 400 + "\n1 " + "1 " * 400 + "\n", "line 1: 401 columns"),
    ("E up\n0 1\n1 2\n", r"column 1 \(up\) is one spin"),
    ("1 -3\n4 -2\n2 -1\n", "column 1 increases and column 0 does not"),
    ("0.5 -1\n1.5 0\n0.25 1\n", "column 1 increases and column 0 does not"),
    # commas
    ("-2,5,1,25\n-1,5,2,5\n", "line 1: 4 whole numbers between commas may be decimal commas: separate"),
    ("-2,5,1\n-1,5,2\n", "line 1: 3 whole numbers between commas"),
    ("-2.5;1,25\n-1.5;2,5\n", "commas, points and semicolons"),
    ("-2.5 1,250.5\n-1.5 2,500.5\n", "line 1: "),
    ("-2,5 1.25\n-1,5 2.5\n", "line 1: "),
    ("0;1\n1;2;3\n", "line 2: 3 columns, but 2 in line 1"),
    # repeated energies
    ("0 1\n0 1\n", "lines 1 and 2: the energy 0 eV is there twice"),
    ("0 1\n1 2\n1 3\n2 1\n", "lines 2 and 3: the energy 1 eV is there twice"),
    ("0 1\n0 1\n0 2\n1 1\n1 1\n1 2\n", "lines 1 and 2: the energy 0 eV is there twice"),
    ("0 1\n0 1.1\n1 2\n1 2.1\n", 'is there twice: if they are two spins, say spin="separate"'),
    ("0 1\n1 2\n0 1\n1 2\n0 1\n1 2\n", "is there twice"),
    # values
    ("0 1\n1 -5\n2 1\n", "the DOS is -5 at 1 eV: values must not be negative"),
    ("0 -1\n1 -2\n2 -1\n", "the DOS is negative. A spin drawn downwards is half of it"),
    ("0 -1\n1 1\n2 -1\n3 1\n", "the DOS is -1 at 0 eV: values must not be negative"),
    # energies that are none
    ("-100000 1\n100000 1\n", "200000 eV apart"),
    ("-5000 1\n0 2\n5000 1\n", "5000 eV apart, more than 100: are the energies in eV"),
    ("0 1\n1e300 2\n", "line 2: 1e\\+300 eV is no energy"),
    ("-1e308 1\n1e308 2\n", "line 1: -1e\\+308 eV is no energy"),
    # headers that say that it is something else
    ("# Frequency (THz) DOS\n0 1\n1 2\n", "not an electronic DOS"),
    ("# phonon DOS\n0 1\n1 2\n", "not an electronic DOS"),
    ("Energy(cm-1),DOS\n0,1\n1,2\n", "not an electronic DOS"),
    ("# E -COHP ICOHP\n0 1 1\n1 2 3\n", "not an electronic DOS"),
    ("Binding energy (eV)  intensity\n-1 0\n0 1\n1 2\n", r"'Binding energy' .*write the energies as E - E_F"),
    ("binding_energy,dos\n-1,0\n0,1\n1,2\n", "counts downwards from the Fermi level"),
    ("# E (eV) DOS (states/eV/A^3)\n0 1\n1 2\n", "per volume"),
    ("Energy (kJ/mol),DOS\n0,1\n1,2\n", "energies in"),
    ("E (K),DOS\n0,1\n1,2\n", "energies in 'K'"),
    # zeros that are neither the Fermi level nor the valence band
    ("# energies relative to the vacuum level\n-6 1\n-5 1\n", r"vacuum.*efermi= \(--efermi\).*--reference"),
    ("# E-Evac (eV)  DOS\n-6 1\n-5 1\n", r"another zero of energy \(Evac\): give the Fermi level"),
    ("energy_vs_vacuum,TDOS\n-6,1\n-5,1\n", r"another zero of energy \(vacuum\)"),
    ("# E - E_{vac}\n-6 1\n-5 1\n", "another zero of energy"),
    ("# zero is the HOMO\n-6 1\n-5 1\n", "another zero of energy"),
    ("# zero at midgap\n-6 1\n-5 1\n", "another zero of energy"),
    ("# E vs. SHE\n-6 1\n-5 1\n", "another zero of energy"),
    ("# Fermi energy: 5.3 eV\n-6 1\n5 1\n", "Fermi level of 5.3 eV, but not whether"),
    ("# E_F = -3.1\n-6 1\n5 1\n", "Fermi level of -3.1 eV"),
    ("# VBM: 3.2 eV, CBM 5.1 eV\n-6 1\n5 1\n", "valence-band maximum of 3.2 eV, but not whether"),
    ("# energies relative to the vacuum level\n# E_F = -4.5 eV\n-6 1\n5 1\n", "Fermi level of -4.5 eV"),
    ("# energies above the bottom of the valence band\n0 1\n5 1\n", r"another zero of energy \(bottom of the valence"),
    ("# E (Ry), E_F = 0.39\n-1 1\n1 1\n", "Fermi level of 0.39 eV"),  # no name of a column: eV is assumed
    ("# E_F = 0.39\n# E(Ry) DOS\n-1 1\n1 1\n", "Fermi level of 5.30622 eV"),
    ("# Fermi energy = 0.39 Ry\n-1 1\n1 1\n", "Fermi level of 5.30622 eV"),
    # one spin of two
    ("E s_up p_up\n0 1 1\n1 2 2\n", r"column 1, 2 \(s_up, p_up\) is one spin"),
    # programs
    ("# E (eV)  dos(E)    pdos(E)\n0 1 1\n1 2 2\n", "no Fermi level in this file"),
    ("#  E (eV)   dos(E)     Int dos(E)\n0 1 1\n1 2 2\n", "no Fermi level in this file"),
    ("#  E (eV)   dosup(E)  dosdw(E)  Int dos(E) EFermi =  5.1 6.2 eV\n0 1 1 1\n1 2 2 2\n", "two Fermi levels"),
    ("#  E (eV)   dos(E)     Int dos(E) EFermi =  5.1 eV\n0 1\n1 2\n", "dos.x writes 3 columns here, not 2"),
    ("# ik    E (eV)  dos(E)    pdos(E)\n1 0 1 1\n1 1 2 2\n", "resolved by k-point"),
    ("#  E (eV)   dos(E)     Int dos(E) EFermi =  5.1 eV\n0.1 1 1\n0.1 1 2\n0.2 1 3\n0.2 1 4\n", "is there twice"),
    ("energies,dosTotalSpin-0,spinChannel-0_orbitals-a,spinChannel-0_orbitals-b\n0,1.5,1,1\n1,2,1,1\n", "say which"),
]

STATED: list[tuple[str, dict[str, Any], str]] = [
    ("0 1\n1 2\n", {"columns": (0, 2)}, "2 columns, numbered from 0: there is no 2"),
    ("0 1\n1 2\n", {"columns": (0, -1)}, "there is no -1"),
    ("0 1\n1 2\n", {"columns": (0,)}, "two or more columns"),
    ("0 1\n1 2\n", {"columns": "01"}, "two or more columns"),
    ("0 1\n1 2\n", {"columns": (0, True)}, "two or more columns"),
    ("0 1\n1 2\n", {"columns": ("E", "dos")}, "0 columns are named 'E': they have no names"),
    ("E,a,a\n0,1,2.5\n1,2,3\n", {"columns": ("E", "a")}, "2 columns are named 'a'"),
    ("0 1\n1 2\n", {"spin": "both"}, "spin must be 'summed' or 'one' or 'separate'"),
    ("0 1\n1 2\n", {"spin": "separate"}, "needs two columns of DOS"),
    ("0 1 1\n1 2 2\n", {"spin": "one", "columns": (0, 1, 2)}, 'spin="one" goes with one column'),
    ("E s_up s_down\n0 1 1\n1 2 2\n", {"spin": "one"}, 'spin="one" goes with one column'),
    ("0 1\n0 1.5\n1 2\n1 2.5\n", {"spin": "summed"}, "is there twice"),
    ("0 1\n1 2\n", {"reference": "vacuum"}, r"reference must be 'fermi' or 'vbm', not 'vacuum': .*--efermi"),
    ("0 1\n1 2\n", {"kind": "atom"}, "kind must be 'site' or 'total'"),
    ("0 1\n1 2\n", {"units": "K"}, "units must be eV, meV, Ry or Ha"),
    ("0 1\n1 2\n", {"efermi": float("nan")}, "efermi must be an energy"),
    ("0 1\n1 2\n", {"site": 0}, "leave out site"),
    ("#  E (eV)  dos(E)  Int dos(E) EFermi = 5.1 eV\n0 1 1\n1 2 2\n", {"reference": "vbm"}, "gives the Fermi level"),
    ('{"energies": [0, 1], "values": [1, 2]}', {"columns": (0, 1)}, "is JSON, not columns of text: leave out columns"),
    ('{"energies": [0, 1], "values": [1, 2]}', {"efermi": 1.0}, "leave out efermi"),
]

READ: list[tuple[str, dict[str, Any], list[float], list[float]]] = [
    ("# energies relative to the vacuum level\n-6 1\n-5 2\n", {"efermi": -5.0}, [-1, 0], [1, 2]),
    ("# E_F = -3.1\n-1 1\n0 2\n", {"reference": "fermi"}, [-1, 0], [1, 2]),
    ("# E_F = 0.0\n-1 1\n0 2\n", {}, [-1, 0], [1, 2]),
    ("# E_F set to zero\n-1 1\n0 2\n", {}, [-1, 0], [1, 2]),
    ("-1000 3\n0 2\n", {"units": "meV"}, [-1, 0], [3000, 2000]),
    ("0 1 2\n1 2 2\n2 1 1\n", {"columns": (0, 1)}, [0, 1, 2], [1, 2, 1]),
    ("0 1 2\n1 2 2\n2 1 1\n", {"columns": (0, 1, 2)}, [0, 1, 2], [3, 4, 2]),
    ("0 1 *****\n1 2 3\n".replace("*****", "nan"), {"columns": (0, 1)}, [0, 1], [1, 2]),
    ("0 -1\n1 -2\n2 -1\n", {"spin": "one"}, [0, 1, 2], [2, 4, 2]),
    ("0 1\n0 1.1\n1 2\n1 2.1\n", {"spin": "separate"}, [0, 1], [2.1, 4.1]),
    ("-1 1 -2\n0 1 -1\n1 1 -.5\n", {}, [-1, 0, 1], [3, 2, 1.5]),
    ("0 1\n1 2\n\n0 -1\n1 -3\n", {}, [0, 1], [2, 5]),
]


# Headers, and what they say of zero: a reference, a value, a denial, or nothing.
ZEROS: dict[str, list[str]] = {
    "vbm": [
        "E-VBM (eV)  DOS", "E - E_VB (eV) DOS", "E-Ev (eV)", "E-EV (eV)  DOS", "energy above VBM (eV), DOS",
        "zero at VBM", "Energy wrt VBM (eV) DOS", "Energy (eV above VBM)  DOS", "energies measured from the VBM",
        "Energy reference: VBM", "energies relative to the top of the valence band", "E_v = 0", "VBM=0.0, CBM=1.1",
        "Valence band maximum set to zero", "E-VBM (eV), not relative to the Fermi level",
    ],
    "fermi": [
        "E - E_F (eV)", "E-Efermi (eV)  DOS", "E - mu (eV)  DOS", "E-E_F (eV), E_F = 5.3 eV", "E_F = 0.0",
        "mu = 0.0 eV", "energies relative to EF = 5.3 eV", "Energy - E_F (eV), E_F = 5.3 eV",
        "Fermi level at 0 eV, VBM = -0.4 eV", "VBM = -0.4, E_F=0", "energies relative to Fermi in eV",
        "energies relative to Fermi level\n# valence DOS", "DOS is not normalised\n# E-E_F (eV)  DOS",
        "spin-orbit: no\n# energy relative to the Fermi level",
        "Energies not absolute but relative to the Fermi level", "relative to the Fermi level, not to the vacuum",
        "without spin-orbit coupling E-E_F (eV)", "shifted to the Fermi level: yes",
    ],
    "assumed": [
        "number = 5", "simulation = 3", "mu = 2.10 mu_B", "mu = 1.5 uB", "mu (mu_B) = 2.0", "mu(Ni) = 0.61",
        "ref = 5.3", "mu_B = 5.788e-5 eV/T", "Fermi-Dirac smearing 0.1 eV", "smearing: fermi 0.2", "VBM at Gamma",
        "in eV 2 columns", "Energy - eV, DOS - states/eV", "energies shifted by 2 eV",
    ],
    "Fermi level of 5.3 eV, but not whether": [
        "EF=5.3", "E_Fermi(eV): 5.3", "Fermi level 5.3 eV", "Efermi 5.30", "Ef 5.3 eV", "mu = 5.3 eV", "µ = 5.3 eV",
        "chemical potential = 5.3 eV", "E(Fermi) = 5.3 eV", "Fermi energy (eV) 5.3", "e_F -> 5.3",
        "Fermi level of 5.3.", "E-fermi :   5.3     XC(G=0): -8.1",
    ],
    "valence-band maximum of 3.2 eV, but not whether": [
        "E_VBM = 3.2 eV", "VBM: 3.2 eV", "VBM 3.2", "E-VBM = 3.2 eV", "valence band maximum = 3.2 eV",
        "E_v = 3.2 eV", "top of the valence band: 3.2 eV",
    ],
    "Fermi level of 5.3 eV and says '.*not shifted": [
        "energies not shifted to the Fermi level, E_F = 5.3 eV", "efermi = 5.3 energies not shifted",
        "not shifted to the Fermi level; E_F=5.3",
    ],
    "its header says '": [
        "Energies are NOT relative to the Fermi level", "Energies are not\n# relative to the Fermi level",
        "energies have not been shifted to E_F", "neither shifted nor aligned to the Fermi level",
        "shifted to Fermi: no", "energies unshifted", "Fermi level is not at zero", "Fermi energy not subtracted",
        "not relative to the VBM", "energies are not E - E_F",
    ],
    'its header says "': ["Energies aren't shifted to E_F"],
}  # fmt: skip


@pytest.mark.parametrize(("header", "says"), [(header, says) for says in ZEROS for header in ZEROS[says]])
def test_zero_is_where_the_header_says(tmp_path: Path, header: str, says: str) -> None:
    path = tmp_path / "dos.dat"
    path.write_text(f"# {header}\n-5 1\n0 2\n5 1\n")
    if says not in ("vbm", "fermi", "assumed"):
        with pytest.raises(ValueError, match=rf"{says}.*efermi= \(--efermi\).*--reference") as caught:
            TargetDOS.from_file(path)
        assert "\n" not in str(caught.value)
        return
    target = TargetDOS.from_file(path)
    assert target.reference == says.replace("assumed", "fermi")
    assert target.energies == pytest.approx([-5, 0, 5])
    told = "zero of energy at the Fermi level" in target.provenance["assumed"]
    assert told == (says == "assumed")


@pytest.mark.parametrize(("header", "level"), [("VBM: 3.2 eV", 3.2), ("E_VBM = 0.2 Ry", 2.72114)])
def test_the_answer_to_a_valence_band_maximum(tmp_path: Path, header: str, level: float) -> None:
    path = tmp_path / "dos.dat"
    path.write_text(f"# {header}\n-5 1\n0 2\n5 1\n")
    with pytest.raises(ValueError, match=rf'say efermi={level}, reference="vbm" \(--efermi {level} --reference vbm\)'):
        TargetDOS.from_file(path)
    for read in (TargetDOS.from_file, TargetDOS.from_text):
        target = read(path, efermi=level, reference="vbm")
        assert target.reference == "vbm"
        assert target.energies == pytest.approx([-5 - level, -level, 5 - level])
        for reference in ("fermi", "vbm"):
            assert read(path, reference=reference).energies == pytest.approx([-5, 0, 5])


@pytest.mark.parametrize(("content", "message"), REFUSED)
def test_refused_in_one_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "dos.dat"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (TargetDOS.from_file, TargetDOS.from_text):
        with pytest.raises(ValueError, match=message) as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(("content", "options", "message"), STATED)
def test_stated_facts_that_cannot_be(tmp_path: Path, content: str, options: dict[str, Any], message: str) -> None:
    path = tmp_path / "dos.dat"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        TargetDOS.from_file(path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "options", "energies", "values"), READ)
def test_what_the_messages_advise_gives_the_right_numbers(
    tmp_path: Path, content: str, options: dict[str, Any], energies: list[float], values: list[float]
) -> None:
    path = tmp_path / "dos.dat"
    path.write_text(content)
    target = TargetDOS.from_file(path, **options)
    assert target.energies == pytest.approx(energies)
    assert target.values == pytest.approx(values)


def test_a_long_table_is_read_in_pieces(tmp_path: Path) -> None:
    """100,000 rows: the weights for the model's grid alone would fill 120 MB if they were made at once."""
    path = tmp_path / "long.dat"
    path.write_text("".join(f"{i / 5000 - 12:.6f} {i % 7}\n" for i in range(100_000)))
    seen = TargetDOS.from_file(path).on_grid()
    assert seen.values == pytest.approx(3.0, abs=1e-3)
