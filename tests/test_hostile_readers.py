"""Damaged and hostile structured DOS files: one line that names the file and the reason, never a silent default.

Each row is a file that is wrong in one way. Rows for columns of text are in the tests of the text reader.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.spectrum.doscollection import GridDOSCollection
from ase.spectrum.dosdata import GridDOSData
from test_readers import (
    SPREAD,
    VASP,
    WIDE,
    WIDE_SUM,
    E,
    calculation,
    columns,
    doscar,
    pymatgen_dict,
    spins_and_sites,
    vasprun,
    xml_of,
)

from dosmatgen_ase.dos import TargetDOS

BANDS = [[[-2.0, 1.6, 7.0], [0.3, 1.4, 7.5]]]
GOOD_XML = xml_of(BANDS, 0.0, NELECT=2)
DOS, SITES = spins_and_sites(2)
TABLE = np.column_stack([E, WIDE, WIDE_SUM])


def row(index: int) -> str:
    return "<r>" + " ".join(f"{x:.4f}" for x in TABLE[index]) + "</r>"


def xml(old: str, new: str, count: int = -1) -> bytes:
    assert old in GOOD_XML
    return GOOD_XML.replace(old, new, count).encode()


def with_ions(ions: Any, symbols: str = "Na") -> bytes:
    return vasprun(calculation(E, [WIDE], [WIDE_SUM], ions, BANDS, 0.0), symbols=symbols).encode()


# -- vasprun.xml -------------------------------------------------------------------------------------------------------

BOMB = (
    '<?xml version="1.0"?><!DOCTYPE modeling [<!ENTITY a "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa">'
    + "".join(f'<!ENTITY {y} "{f"&{x};" * 40}">' for x, y in zip("abcde", "bcdef", strict=True))
    + "]><modeling><incar>&f;</incar></modeling>"
)
EXTERNAL = '<?xml version="1.0"?><!DOCTYPE modeling [<!ENTITY x SYSTEM "file:///etc/passwd">]><modeling>&x;</modeling>'

XML = [
    ("cut in the head", GOOD_XML[:300].encode(), None, "cut off or damaged"),
    ("cut in the DOS", GOOD_XML[: len(GOOD_XML) * 2 // 3].encode(), None, "cut off or damaged"),
    ("last tag missing", GOOD_XML.removesuffix("</modeling>").encode(), None, "cut off or damaged"),
    ("html", b"<html><body>404</body></html>", None, "is a web page"),
    ("doctype html", b"<!DOCTYPE html><html></html>", None, "is a web page"),
    ("atomic_proj.xml", b"<PROJECTIONS><HEADER/></PROJECTIONS>", None, "read_espresso"),
    ("pw.x XML", b"<?xml version='1.0'?><qes:espresso xmlns:qes='x'/>", None, "output of pw.x"),
    ("another root", b"<phonon/>", None, "first tag is <phonon>"),
    ("no calculation", vasprun().encode(), None, "no ionic step"),
    ("no dos", xml("<dos>", "<nodos>").replace(b"</dos>", b"</nodos>"), None, "no ionic step"),
    ("no efermi", xml('<i name="efermi">0.00000000</i>', ""), None, "lacks the Fermi level"),
    ("efermi overflowed", xml('efermi">0.00000000', 'efermi">********'), None, "not a complete vasprun"),
    ("efermi nan", xml('efermi">0.00000000', 'efermi">nan'), None, "Fermi level is nan"),
    ("efermi empty", xml('efermi">0.00000000', 'efermi">'), None, "not a complete vasprun"),
    ("total missing", xml("<total>", "<t>").replace(b"</total>", b"</t>"), None, "lacks the Fermi level or the total"),
    ("a number overflowed", xml(row(150), "<r>-0.5 ******** 1.0</r>"), None, "overflowed its field"),
    ("a NaN", xml(row(150), "<r>-0.5 nan 1.0</r>"), None, "NaN or infinite"),
    ("an infinity", xml(row(150), "<r>-0.5 inf 1.0</r>"), None, "NaN or infinite"),
    ("an energy is NaN", xml(row(150), "<r>nan 1.0 1.0</r>"), None, "energies must be finite"),
    ("words", xml(row(150), "<r>a b c</r>"), None, "not made of numbers"),
    ("glued numbers", xml(row(150), "<r>-0.5-100.0 1.0</r>"), None, "not made of numbers"),
    ("a short row", xml(row(150), "<r>-0.5 1.0</r>"), None, "not made of numbers"),
    ("an empty row", xml(row(150), "<r/>"), None, "an empty row"),
    ("a repeated energy", xml(row(150), row(149)), None, "strictly increasing"),
    ("one energy", vasprun(calculation(E[:1], [WIDE[:1]], [WIDE_SUM[:1]], None, BANDS, 0)).encode(), None, "least 2"),
    ("zero everywhere", vasprun(calculation(E, [0 * E], [0 * E], None, BANDS, 0.0)).encode(), None, "zero everywhere"),
    ("in meV", vasprun(calculation(1e3 * E, [WIDE], [1e3 * WIDE_SUM], None, BANDS, 0.0)).encode(), None, "in meV"),
    ("site without LORBIT", GOOD_XML.encode(), 0, "LORBIT = 11"),
    ("site 1 of 1", with_ions([WIDE[None, :, None]]), 1, "site 1 does not exist: there are 1"),
    ("site -1", with_ions([WIDE[None, :, None]]), -1, "site -1 does not exist"),
    ("an ion is missing", with_ions([WIDE[None, :, None]], "Na Cl"), 0, "1 ions and 2 atoms"),
    ("an ion is short", with_ions([WIDE[None, :, None]]).replace(b"<r>-8.0000 0.0000</r>", b"", 1), 0, "fit|2 atoms"),
    ("projections negative", with_ions([-WIDE[None, :, None]] * 2, "Na Na"), 0, "projections .* are negative"),
    ("NaN eigenvalue", xml("<r>1.6000 0.0000</r>", "<r>nan 0.0000</r>"), None, "eigenvalues are not finite"),
    ("bands differ", xml("<r>1.6000 0.0000</r>", ""), None, "not a complete vasprun"),
    ("entities without end", BOMB.encode(), None, "not a complete vasprun"),
    ("an external entity", EXTERNAL.encode(), None, "not a complete vasprun"),
    ("nested deep", b"<modeling>" + b"<a>" * 5000 + b"</a>" * 5000 + b"</modeling>", None, "nested more than"),
    ("unknown encoding", GOOD_XML.replace("ISO-8859-1", "klingon").encode(), None, "not a complete vasprun"),
    ("null bytes", GOOD_XML.encode()[:500] + b"\x00" * 100 + GOOD_XML.encode()[500:], None, "cut off or damaged"),
]

# -- JSON --------------------------------------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    data = json.loads(json.dumps(pymatgen_dict(SPREAD[::20], DOS[:, ::20], SITES[:, :, ::20], 1.0)))
    given = change(data)
    return json.dumps(data if given is None else given).encode()


def put(value: Any, *path: Any) -> bytes:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return changed(change)


ORBITAL = ("pdos", 0, "3s", "densities", "1")
GRID = len(SPREAD[::20])

JSON = [
    ("efermi null", put(None, "efermi"), None, '"efermi" is None'),
    ("efermi a string", put("1.0", "efermi"), None, "\"efermi\" is '1.0'"),
    ("efermi a boolean", put(True, "efermi"), None, '"efermi" is True'),
    ("efermi NaN", put(float("nan"), "efermi"), None, "Fermi level is nan"),
    ("efermi a list", put([1.0], "efermi"), None, '"efermi" is'),
    ("no efermi", changed(lambda d: d.pop("efermi") and None), None, "lacks efermi"),
    ("no energies", changed(lambda d: d.pop("energies") and None), None, "lacks energies"),
    ("no densities", changed(lambda d: d.pop("densities") and None), None, "lacks densities"),
    ("energies strings", changed(lambda d: d.update(energies=[str(e) for e in d["energies"]])), None, "not strings"),
    ("energies null", put(None, "energies", 3), None, '"energies" must be numbers'),
    ("energies NaN", put(float("nan"), "energies", 3), None, "energies must be finite"),
    ("energies nested", changed(lambda d: d.update(energies=[d["energies"]])), None, "one row of numbers"),
    ("energies ragged", changed(lambda d: d.update(energies=[[1], [1, 2]])), None, "rows of one length"),
    ("energies backwards", changed(lambda d: d["energies"].reverse()), None, "strictly increasing"),
    ("energies in meV", changed(lambda d: d.update(energies=[1e3 * e for e in d["energies"]])), None, "in meV"),
    ("energies a dict", put({"data": 1}, "energies"), None, '"energies" must be numbers'),
    ("energies too long", changed(lambda d: d["energies"].append(99.0)), None, "91 values and the DOS 92 energies"),
    ("energies too long, no pdos", changed(lambda d: d.update(pdos=[], energies=[*d["energies"], 9.9])), None, "shape"),
    ("densities a list", put([1, 2], "densities"), None, "must be a dict of spins"),
    ("densities empty", put({}, "densities"), None, "must be a dict of spins"),
    ("densities null", put(None, "densities"), None, "must be a dict of spins"),
    ("a lone spin -1", changed(lambda d: d["densities"].pop("1") and None), None, "only spin -1 is there"),
    ("spin up", changed(lambda d: d["densities"].update(up=d["densities"].pop("1"))), None, "has a spin 'up'"),
    ("spin 2", changed(lambda d: d["densities"].update({"2": []})), None, "has a spin '2'"),
    ("spins unequal", changed(lambda d: d["densities"]["1"].pop() and None), None, "values, not as many"),
    ("density NaN", put(float("nan"), "densities", "1", 5), None, "NaN or infinite"),
    ("density infinite", put(float("inf"), "densities", "1", 5), None, "NaN or infinite"),
    ("density a string", put("1.0", "densities", "1", 5), None, "must be numbers, not strings"),
    ("density true", put([True] * GRID, "densities", "1"), None, "must be numbers, not true and false"),
    ("density one value", put([1.0], "densities", "1"), None, "values, not as many"),
    ("density a number", put(1.0, "densities", "1"), None, "one row of numbers"),
    ("density negative", put([-1.0] * GRID, "densities", "1"), None, "values must not be negative"),
    ("pdos one entry", changed(lambda d: d["pdos"].pop() and None), 0, "1 entries, and the structure 2 sites"),
    ("pdos of a site empty", put({}, "pdos", 1), 0, '"pdos" of site 1 is missing'),
    ("pdos of a site null", put(None, "pdos", 1), 0, '"pdos" of site 1 is missing'),
    ("pdos a string", put("pdos", "pdos"), 0, '"pdos" must be a list'),
    ("pdos a dict", put({"0": {}}, "pdos"), 0, '"pdos" must be a list'),
    ("pdos lacks a spin", changed(lambda d: d["pdos"][0]["3s"]["densities"].pop("-1") and None), 0, "other spins"),
    ("orbital null", put(None, "pdos", 0, "3s"), 0, "orbital '3s' must be a dict of spins"),
    ("orbital of one value", put([1.0], *ORBITAL), 0, "has 1 values and the DOS 91 energies"),
    ("orbital transposed", put([[1.0]] * GRID, *ORBITAL), 0, "one row of numbers"),
    ("orbital NaN", put(float("nan"), *ORBITAL, 3), 0, "site projections DOS holds NaN"),
    ("no structure", changed(lambda d: d.pop("structure") and None), 0, '"structure" must be the dict'),
    ("structure without sites", put({}, "structure"), 0, '"structure" must be the dict'),
    ("pdos empty", put([], "pdos"), 0, "no site projections"),
    ("phonons", changed(lambda d: d.update(frequencies=[1])), None, "phonon DOS"),
    ("another class", put("PhononDos", "@class"), None, "PhononDos"),
    ("two DOS", changed(lambda d: [d, d]), None, "holds 2 DOS: keep one"),
    ("two DOS by name", changed(lambda d: {"a": d, "b": d}), None, "holds 2 DOS: keep one"),
    ("an empty list", b"[]", None, "no DOS"),
    ("an empty object", b"{}", None, 'needs "energies"'),
    ("a list of numbers", b"[1, 2, 3]", None, "no DOS"),
    ("nested without end", b"[" * 100000, None, "not valid JSON"),
    ("an endless integer", b'{"energies": [' + b"1" * 5000 + b"]}", None, "not valid JSON"),
    ("cut off", changed(lambda d: None)[:1000], None, "not valid JSON"),
    ("not UTF-8", b'{"a": "\xff\xfe"}', None, "not valid JSON"),
    ("own, values strings", b'{"energies": [0, 1], "values": ["1", "2"]}', None, "real numbers"),
    ("own, values null", b'{"energies": [0, 1], "values": [1, null]}', None, "real numbers"),
    ("own, values NaN", b'{"energies": [0, 1], "values": [1, NaN]}', None, "NaN or infinite"),
    ("own, values booleans", b'{"energies": [0, 1], "values": [true, false]}', None, "real numbers"),
    ("own, one known", b'{"energies": [0, 1], "values": [1, 1], "known": [true]}', None, "one common length"),
    ("own, known numbers", b'{"energies": [0, 1], "values": [1, 1], "known": [1, 0]}', None, "array of bool"),
    ("own, values nested", b'{"energies": [0, 1], "values": [[1, 1]]}', None, "shape"),
    ("own, sigma a string", b'{"energies": [0, 1], "values": [1, 1], "sigma": "0.1"}', None, "sigma must be"),
    ("own, sigma a list", b'{"energies": [0, 1], "values": [1, 1], "sigma": [0.1]}', None, "sigma must be"),
    ("own, sigma true", b'{"energies": [0, 1], "values": [1, 1], "sigma": true}', None, "sigma must be"),
    ("own, reference a list", b'{"energies": [0, 1], "values": [1, 1], "reference": [1]}', None, "reference must"),
    ("own, kind null", b'{"energies": [0, 1], "values": [1, 1], "kind": null}', None, "kind must be"),
    ("own, provenance a list", b'{"energies": [0, 1], "values": [1, 1], "provenance": [1]}', None, "provenance must"),
    ("own, huge numbers", b'{"energies": [0, 1], "values": [1, 1e999]}', None, "NaN or infinite"),
    ("dft, failed", b'{"failed": "no convergence\\nat all"}', None, "failed: no convergence at all"),
    ("dft, site 3 of 1", b'{"sites": [{}], "total": {}}', 3, "site 3 does not exist"),
    ("dft, site a string", b'{"sites": ["a"], "total": {}}', 0, "not the dict of a TargetDOS"),
]

# -- .npz --------------------------------------------------------------------------------------------------------------

X = np.linspace(-12.0, 8.0, 401)
GOOD: dict[str, Any] = {
    "energies": X,
    "total": np.exp(-(X**2)),
    "pdos": np.stack([[np.exp(-(X**2)) / 8] * 4] * 2),
    "emax": np.float64(6.0),
    "gap": np.float64(0.0),
}


def npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **{k: v for k, v in {**GOOD, **arrays}.items() if v is not None})
    return stream.getvalue()


def packed_zeros(size: int) -> bytes:
    """A .npz of a few kB whose total holds `size` zeros."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **{**GOOD, "total": np.zeros(size)})
    return stream.getvalue()


def false_header() -> bytes:
    """A header that promises 10^13 numbers."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for key, array in GOOD.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(array))
            data = member.getvalue()
            if key == "total":
                data = data.replace(b"(401,), }" + b" " * 12, b"(9999999999999,), }" + b" " * 2)
            archive.writestr(f"{key}.npy", data)
    return stream.getvalue()


POSITIVE = GOOD["pdos"]
NPZ = [
    *((f"no {key}", npz(**{key: None}), None, f"it lacks {key}") for key in GOOD),
    ("pdos of one energy", npz(pdos=POSITIVE[..., :1]), 0, r"pdos must have shape \(sites, l, 401\)"),
    ("pdos without l", npz(pdos=POSITIVE[:, 0]), 0, "pdos must have shape"),
    ("pdos transposed", npz(pdos=POSITIVE.transpose(2, 1, 0)), 0, "pdos must have shape"),
    ("pdos of five l", npz(pdos=np.repeat(POSITIVE, 2, 1)), 0, "pdos must have shape"),
    ("pdos one value", npz(pdos=np.float64(1.0)), 0, "pdos must have shape"),
    ("pdos of no site", npz(pdos=POSITIVE[:0]), 0, "pdos must have shape"),
    ("pdos negative", npz(pdos=-POSITIVE), 0, "pdos must not be negative"),
    ("pdos complex", npz(pdos=POSITIVE + 0j), 0, "pdos must be numbers, not complex"),
    ("pdos boolean", npz(pdos=POSITIVE > 0), 0, "pdos must be numbers, not true and false"),
    ("pdos partly NaN", npz(pdos=np.where(POSITIVE > 0.1, np.nan, POSITIVE)), 0, "pdos holds NaN"),
    ("pdos NaN, total asked", npz(pdos=POSITIVE * np.nan), None, "pdos holds NaN"),
    ("total of one energy", npz(total=GOOD["total"][:1]), None, "one common length"),
    ("total one value", npz(total=np.float64(1.0)), None, "one common length"),
    ("total negative", npz(total=-GOOD["total"]), None, "total must not be negative"),
    ("total strings", npz(total=np.array(["a"] * 401)), None, "total must be numbers, not strings"),
    ("total of objects", npz(total=np.array([{}] * 401)), None, "holds Python objects"),
    ("total with named columns", npz(total=np.zeros(401, dtype=[("a", float)])), None, "total must be numbers"),
    ("energies in meV", npz(energies=1000 * X), None, "are they in meV"),
    ("energies backwards", npz(energies=X[::-1]), None, "strictly increasing"),
    ("energies twice", npz(energies=np.stack([X, X])), None, "one common length"),
    ("emax NaN", npz(emax=np.nan), None, "emax is nan"),
    ("emax infinite", npz(emax=np.inf), None, "emax is inf"),
    ("emax an array", npz(emax=X), None, "emax must be one number"),
    ("emax below all", npz(emax=-99.0), None, "nothing is known"),
    ("gap NaN", npz(gap=np.nan), None, "gap is nan"),
    ("gap an array", npz(gap=[1.0, 2.0]), None, "gap must be one number"),
    ("gap negative", npz(gap=-1.0), None, "gap must not be negative"),
    ("gap a boolean", npz(gap=True), None, "gap must be numbers"),
    ("site 2 of 2", npz(), 2, "site 2 does not exist: there are 2"),
    ("cut off", npz()[:2000], None, "not an .npz"),
    ("damaged inside", npz()[:1000] + b"\x00" * 200 + npz()[1200:], None, "not an .npz"),
    ("a zip of something else", b"PK\x05\x06" + b"\x00" * 18, None, "it lacks energies"),
    ("a bomb", packed_zeros(10_000_000), None, "unpacks to 76 MiB"),
    ("a header that promises more", false_header(), None, "its header says"),
]

# -- DOSCAR, .bands, packed --------------------------------------------------------------------------------------------

COLUMN = np.linspace(-8.0, 8.0, 161)
PEAK = np.exp(-(COLUMN**2))
DOSCAR = doscar(COLUMN, PEAK[None], np.cumsum(PEAK)[None] * 0.1, [columns(PEAK[None], 1, 0.4)] * 2, 1.0)
LINES = DOSCAR.splitlines()


def doscar_line(number: int, text: str) -> bytes:
    return "\n".join([*LINES[:number], text, *LINES[number + 1 :]]).encode()


@pytest.mark.parametrize("before", [b"\n", b"\r\n", b"\n \n"])
def test_blank_lines_above_a_doscar_are_passed_over(before: bytes, tmp_path: Path) -> None:
    plain, later = tmp_path / "DOSCAR", tmp_path / "DOSCAR.later"
    plain.write_bytes(DOSCAR.encode())
    later.write_bytes(before + DOSCAR.encode())
    assert np.array_equal(TargetDOS.from_file(later).values, TargetDOS.from_file(plain).values)


CASTEP = (
    "Number of k-points 1\nNumber of spin components 1\nNumber of electrons 2.0\nNumber of eigenvalues 2\n"
    "Fermi energies (in atomic units) 0.0\nUnit cell vectors\n1 0 0\n0 1 0\n0 0 1\nK-point 1 0 0 0 1.0\n"
    "Spin component 1\n-0.1\n0.1\n"
)

OTHERS = [
    ("DOSCAR cut in the total", "\n".join(LINES[:50]).encode(), None, "cut off: 44 of 161 energies from line 7"),
    ("DOSCAR cut in an ion", "\n".join(LINES[:-20]).encode(), None, "cut off"),
    ("DOSCAR without its last ion", "\n".join(LINES[: 6 + 161 + 162]).encode(), None, "1 ions and 2 atoms"),
    ("DOSCAR overflowed", doscar_line(20, "  -6.600  ********  0.1"), None, "line 21: a number overflowed"),
    ("DOSCAR with words", doscar_line(20, "  -6.600  abc  0.1"), None, "line 21: expected numbers"),
    ("DOSCAR with NaN", doscar_line(20, "  -6.600  NaN  0.1"), None, "NaN|line 21"),
    ("DOSCAR short line", doscar_line(20, "  -6.600  0.1"), None, "numbers in rows|one length|line|inhomogeneous"),
    ("DOSCAR no ion window", doscar_line(6 + 161, "garbage"), None, "line 168: expected the window"),
    ("DOSCAR site 2 of 2", DOSCAR.encode(), 2, "site 2 does not exist"),
    ("DOSCAR without projections", "\n".join(LINES[: 6 + 161]).encode(), 0, "no site projections"),
    ("DOSCAR huge NEDOS", doscar_line(5, "8.0 -8.0 999999999 1.0 1.0"), None, "a DOS of 999999999 energies"),
    ("CASTEP cut off", CASTEP[:-5].encode(), None, "not a complete .bands"),
    ("CASTEP site", CASTEP.encode(), 0, "no site projections"),
    ("CASTEP huge", CASTEP.replace("points 1", "points 1000000000").encode(), None, "do not fit its length"),
    ("CASTEP words", CASTEP.replace("-0.1", "abc").encode(), None, "not a complete .bands"),
    ("CASTEP far levels", CASTEP.replace("-0.1", "-1e9").encode(), None, "its eigenvalues span"),
    ("CASTEP NaN", CASTEP.replace("-0.1", "nan").encode(), None, "finite"),
    ("gzip cut off", gzip.compress(GOOD_XML.encode())[:-50], None, "damaged gzip"),
    ("gzip damaged", gzip.compress(GOOD_XML.encode())[:100] + b"\x00" * 40, None, "damaged gzip"),
    ("gzip alone", b"\x1f\x8b\x08", None, "damaged gzip"),
    ("gzip of nothing", gzip.compress(b""), None, "is empty"),
    ("gzip bomb", gzip.compress(b" " * 35_000_000, 1), None, "unpacks to more than"),
    ("gzip bomb of XML", gzip.compress(b"<modeling><incar>" + b"<i/>" * 9_000_000, 1), None, "unpacks to more than"),
    ("bzip2 cut off", bz2.compress(GOOD_XML.encode())[:-20], None, "damaged bzip2"),
    ("bzip2 bomb", bz2.compress(b"0" * 35_000_000, 1), None, "unpacks to more than"),
    ("xz cut off", lzma.compress(GOOD_XML.encode())[:-20], None, "damaged xz"),
    ("xz damaged", lzma.compress(GOOD_XML.encode())[:60] + b"\x00" * 60, None, "damaged xz"),
    ("zstd", b"\x28\xb5\x2f\xfd\x24\x00", None, "zstd -d"),
    ("compress", b"\x1f\x9d\x90", None, "uncompress"),
    ("7-Zip", b"7z\xbc\xaf\x27\x1c", None, "7-Zip"),
    ("brackets without end", b"[" + b"[]," * 5_000_000 + b"[]]", None, "more than 5,000,000 lists"),
]


@pytest.mark.parametrize(
    ("content", "site", "message"), [pytest.param(*case[1:], id=case[0]) for case in (*XML, *JSON, *NPZ, *OTHERS)]
)
def test_hostile(tmp_path: Path, content: bytes, site: int | None, message: str) -> None:
    path = tmp_path / "dos.file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        TargetDOS.from_file(path, site)
    told = str(caught.value)
    assert str(path) in told
    assert "\n" not in told
    assert len(told) < 500


def test_the_table_is_large() -> None:
    assert len({case[1] for case in (*XML, *JSON, *NPZ, *OTHERS)}) >= 150


# -- ASE: a total and its projections are not added --------------------------------------------------------------------


def ase_row(weight: float, **info: Any) -> GridDOSData:
    return GridDOSData(np.linspace(-5.0, 5.0, 101), np.full(101, weight), info)


ASE_SITES = [
    ase_row(0.5, index=0, label="Ni s"),
    ase_row(0.5, index=0, label="Ni d"),
    ase_row(1.0, index=1, label="Au"),
]
ASE_ROWS: dict[str, tuple[list[GridDOSData], float, float]] = {  # rows, the total, and site 0 scaled to it
    **{
        label: ([ase_row(3.0, label=label), *ASE_SITES], 3.0, 1.5)
        for label in ("total", "Total", "TDOS", "tdos", "Total DOS", "total_dos", "tot", "totDOS", "sum", " Sum ")
    },
    "no total": (ASE_SITES, 2.0, 1.0),
    "no label at all": ([ase_row(1.0, index=0), ase_row(2.0, index=1)], 3.0, 1.0),
    "a label that is no string": ([ase_row(1.0, index=0, label=7), ase_row(2.0, index=1)], 3.0, 1.0),
    "labels that begin so": ([ase_row(1.0, index=0, label="totem"), ase_row(2.0, index=1, label="summit")], 3.0, 1.0),
    "spins": ([ase_row(2.0, label="TDOS", spin="up"), ase_row(1.0, label="TDOS", spin="down"), *ASE_SITES], 3.0, 1.5),
    "spins in labels": ([ase_row(2.0, label="total up"), ase_row(1.0, label="Total (down)"), *ASE_SITES], 3.0, 1.5),
    "both spins, and each": (
        [ase_row(2.0, label="tot up"), ase_row(3.0, label="tot"), ase_row(1.0, label="tot down"), *ASE_SITES], 3.0, 1.5,
    ),
    "two totals": ([ase_row(2.0, label="sum"), ase_row(3.0, label="total"), *ASE_SITES], 3.0, 1.5),
    "a total of a site": ([*ASE_SITES, ase_row(1.0, index=0, label="tot")], 2.0, 1.0),
    "a total, and a site's": ([ase_row(3.0, label="tot"), ase_row(1.0, index=0, label="tot"), *ASE_SITES], 3.0, 1.5),
}  # fmt: skip


@pytest.mark.parametrize("case", ASE_ROWS)
def test_ase_totals_by_their_labels(case: str) -> None:
    rows, total, site = ASE_ROWS[case]
    for order in (rows, rows[::-1]):
        collection = GridDOSCollection(order)
        assert TargetDOS.from_ase(collection).values == pytest.approx(total)
        assert TargetDOS.from_ase(collection).kind == "total"
        assert TargetDOS.from_ase(collection, 0).values == pytest.approx(site)
        assert TargetDOS.from_ase(collection, 0).kind == "site"


@pytest.mark.parametrize(
    ("info", "kind"),
    [
        ({"label": "Total"}, "total"),
        ({"label": "sum"}, "total"),
        ({"label": "Ni d"}, "site"),
        ({}, "site"),
        ({"label": "total", "index": 0}, "site"),
    ],
)
def test_ase_kind_of_a_lone_row(info: dict[str, Any], kind: str) -> None:
    assert TargetDOS.from_ase(ase_row(1.0, **info)).kind == kind
    for stated in ("site", "total"):
        assert TargetDOS.from_ase(ase_row(1.0, **info), kind=stated).kind == stated
        assert TargetDOS.from_ase(GridDOSCollection([ase_row(1.0, **info)]), kind=stated).kind == stated
    with pytest.raises(ValueError, match='kind must be "site" or "total"'):
        TargetDOS.from_ase(ase_row(1.0, **info), kind="cell")


# -- mutated files: nothing but ValueError -----------------------------------------------------------------------------


def originals() -> dict[str, bytes]:
    small = (VASP / "vasprun_dfpt.xml").read_bytes()
    return {
        "vasprun": with_ions([WIDE[None, :, None]]),
        "json": changed(lambda d: None),
        "npz": npz(),
        "doscar": DOSCAR.encode(),
        "castep": CASTEP.encode(),
        "gzip": gzip.compress(small[:20000]),
    }


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, a piece cut out, doubled or replaced by what parsers stumble over."""
    traps = [b"NaN", b"-", b"1e999", b"****", b"null", b"\x00", b"<", b"]", b"{", b"\xff", b"9" * 30, b"true", b'"']
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 3, 20, 300])
        piece = rng.choice([b"", rng.choice(traps), data[at : at + length] * 2, rng.randbytes(length)])
        data = data[:at] + piece + data[at + length :]
    return data


def refused(path: Path, site: int | None) -> str | None:
    """The reason, or None where the file is read."""
    try:
        assert np.isfinite(TargetDOS.from_file(path, site).values).all()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("form", ["vasprun", "json", "npz", "doscar", "castep", "gzip"])
def test_mutated_files_are_read_or_refused(tmp_path: Path, form: str) -> None:
    rng, data, path = random.Random(form), originals()[form], tmp_path / "dos"
    for number in range(60):
        path.write_bytes(mutated(data, rng))
        for site in (None, 0):
            told = refused(path, site)
            assert told is None or (str(path) in told and "\n" not in told), number
