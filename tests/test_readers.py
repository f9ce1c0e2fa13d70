"""Structured DOS files read as what they are: VASP, LOBSTER, pymatgen's JSON, CASTEP, .npz; and packed in any way.

The files are written here, small, in the layout of the programs; the values are those of closed forms.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.test
import numpy as np
import pytest
from ase.units import Hartree
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf

from dosmatgen_ase.dos import Array, TargetDOS

VASP = Path(ase.test.__file__).parent / "testdata" / "vasp"


# -- writers of small files --------------------------------------------------------------------------------------------


def rows(table: Any) -> str:
    return "\n".join("<r>" + " ".join(f"{x:.4f}" for x in row) + "</r>" for row in np.asarray(table))


def spin_sets(tables: Any) -> str:
    return "".join(f'<set comment="spin {s + 1}">{rows(table)}</set>' for s, table in enumerate(tables))


def calculation(energies: Any, dos: Any, integrated: Any, sites: Any, levels: Any, efermi: float) -> str:
    """One ionic step: dos, integrated (spins, G); sites (sites, spins, G, columns); levels (spins, k, bands)."""
    total = spin_sets([np.column_stack([energies, d, i]) for d, i in zip(dos, integrated, strict=True)])
    bands = "".join(
        f'<set comment="spin {s + 1}">'
        + "".join(f'<set comment="kpoint {k}">{rows(np.column_stack([e, 0 * e]))}</set>' for k, e in enumerate(spin))
        + "</set>"
        for s, spin in enumerate(np.asarray(levels, dtype=float))
    )
    partial = ""
    if sites is not None:
        ions = (
            f'<set comment="ion {i + 1}">' + spin_sets([np.column_stack([energies, t]) for t in ion]) + "</set>"
            for i, ion in enumerate(sites)
        )
        partial = f"<partial><array><field>energy</field><set>{''.join(ions)}</set></array></partial>"
    return (
        f"<calculation><eigenvalues><array><set>{bands}</set></array></eigenvalues>"
        f'<dos><i name="efermi">{efermi:.8f}</i><total><array><set>{total}</set></array></total>{partial}</dos>'
        "</calculation>"
    )


def vasprun(*steps: str, symbols: str = "Na", kpoints: str = "", **parameters: Any) -> str:
    settings_ = "".join(f'<i name="{name}">{value}</i>' for name, value in parameters.items())
    atoms = "".join(f"<rc><c>{symbol}</c><c>1</c></rc>" for symbol in symbols.split())
    return (
        '<?xml version="1.0" encoding="ISO-8859-1"?>\n<modeling><generator><i name="program">vasp</i></generator>'
        f'<kpoints>{kpoints}</kpoints><parameters><separator name="electronic">{settings_}</separator></parameters>'
        f'<atominfo><array name="atoms"><set>{atoms}</set></array></atominfo>{"".join(steps)}</modeling>'
    )


LOBSTER = " DOS and projected DOS file by LOBSTER. Energy is shifted such that the Fermi level lies at 0 eV. "


def doscar(energies: Any, dos: Any, integrated: Any, sites: Any, efermi: float, *, lobster: bool = False) -> str:
    """DOSCAR; sites (sites, G, columns) or None. LOBSTER's window is on VASP's scale; it names the orbitals."""
    shift = efermi if lobster else 0.0
    window = f"{energies[-1] + shift:16.8f}{energies[0] + shift:16.8f}{len(energies):5d}{efermi:16.8f}{1.0:16.8f}"
    number = 0 if sites is None else len(sites)
    lines = [f"{number or 1:4d}{number or 1:4d}   1   0", "  0.2E+02  0.4E-09  0.4E-09  0.4E-09  0.5E-15"]
    lines += ["  1.0E-004", "  CAR ", LOBSTER if lobster else " unknown system", window]
    for block, table in enumerate([np.vstack([dos, integrated]).T, *(() if sites is None else sites)]):
        lines += [f"{window}; Z= 11; 3s 3p_y"] if lobster and block else [window] * bool(block)
        lines += [f"{e:11.3f} " + " ".join(f"{x:.4E}" for x in row) for e, row in zip(energies, table, strict=True)]
    return "\n".join(lines) + "\n"


def pymatgen_dict(energies: Any, dos: Any, sites: Any, efermi: float, name: str = "CompleteDos") -> dict[str, Any]:
    """What as_dict writes; sites (sites, spins, G) go into one orbital each."""

    def by_spin(spins: Any) -> dict[str, Any]:
        return {key: row.tolist() for key, row in zip(("1", "-1"), np.asarray(spins), strict=False)}

    data = {"@module": "pymatgen.electronic_structure.dos", "@class": name, "efermi": efermi}
    data |= {"energies": np.asarray(energies).tolist(), "densities": by_spin(dos)}
    if sites is not None:
        species = [{"species": [{"element": "Na", "occu": 1}], "abc": [0, 0, 0]} for _ in sites]
        data |= {"structure": {"sites": species}, "pdos": [{"3s": {"densities": by_spin(ion)}} for ion in sites]}
    return data


def level(energies: Any, centre: float, width: float) -> tuple[Array, Array]:
    """A level of VASP's Gaussian smearing (SIGMA is `width`) and its integral."""
    x = (np.asarray(energies) - centre) / width
    return np.exp(-(x**2)) / (width * math.sqrt(math.pi)), 0.5 * (1 + erf(x))


def steps_of(target: TargetDOS) -> str:
    return "; ".join(target.provenance["steps"])


# -- vasprun.xml: zero of energy ---------------------------------------------------------------------------------------

E = np.arange(-8.0, 8.0, 0.05)
WIDE, WIDE_SUM = (2 * x for x in level(E, -1.0, 2.0))


def xml_of(levels: Any, efermi: float, **parameters: Any) -> str:
    spins = len(levels)
    step = calculation(E, [WIDE / spins] * spins, [WIDE_SUM / spins] * spins, None, levels, efermi)
    return vasprun(step, **({"ISMEAR": 0, "SIGMA": 0.2} | parameters))


@pytest.mark.parametrize(
    ("levels", "efermi", "reference", "zero"),
    [
        ([[[-2.0, 1.6, 7.0], [0.3, 1.4, 7.5]]], 0.0, "fermi", 0.0),  # one band crosses, slightly filled at one point
        ([[[-2.0, 1.6, 7.0], [-0.3, 1.4, 7.5]]], 0.5, "vbm", -0.3),  # it does not
        ([[[-2.0, 1.6, 7.0], [-0.3, 1.4, 7.5]]], -0.3004, "vbm", -0.3),  # E_F printed as the band edge
        ([[[-2.0, 1.6, 7.0], [-0.3, 1.4, 7.5]]], 1.4001, "vbm", -0.3),  # the same of the conduction band
        ([[[-2.0, 1.6, 7.0], [-0.3, 1.4, 7.5]], [[0.8, 3.0, 7.0], [0.9, 3.1, 7.0]]], 0.5, "vbm", -0.3),  # ferromagnet
        ([[[-2.0, 1.6, 7.0], [-0.3, 1.4, 7.5]], [[0.3, 3.0, 7.0], [0.9, 3.1, 7.0]]], 0.5, "fermi", 0.5),  # half-metal
        ([[[-2.0, 0.04, 7.0], [-0.02, 1.4, 7.5]]], 0.0, "fermi", 0.0),  # a gap below MIN_GAP
    ],
)
def test_vasprun_has_a_gap_only_if_no_band_crosses(
    tmp_path: Path, levels: Any, efermi: float, reference: str, zero: float
) -> None:
    path = tmp_path / "vasprun.xml"
    path.write_text(xml_of(levels, efermi))
    target = TargetDOS.from_vasprun(path)
    assert target.reference == reference
    assert target.energies[0] == pytest.approx(E[0] - zero, abs=1e-6)
    assert f"zero of energy at {zero:.4f} eV ({reference})" in steps_of(target)


@pytest.mark.filterwarnings("ignore::UserWarning")  # pymatgen's remarks on incomplete test files
def test_vasprun_agrees_with_pymatgen_on_real_files() -> None:
    """Energies, values and Fermi level as pymatgen reads them."""
    from pymatgen.io.vasp.outputs import Vasprun

    for name in ("vasprun_dfpt.xml", "vasprun_pstress.xml"):
        run = Vasprun(VASP / name, parse_potcar_file=False)
        target = TargetDOS.from_vasprun(VASP / name)
        vbm = run.eigenvalue_band_properties[2]
        assert target.energies == pytest.approx(run.tdos.energies - vbm, abs=1e-4)
        expected = np.clip(run.tdos.get_densities(), 0, None)
        scale = run.tdos.get_densities().sum() / expected.sum()
        assert target.values[target.known] == pytest.approx((scale * expected)[target.known], abs=1e-9)
        assert "8.00 states up to the Fermi level in the file, 8 electrons (NELECT)" in steps_of(target)
        assert "assumed" not in target.provenance


# -- vasprun.xml: states -----------------------------------------------------------------------------------------------

DEEP, SHALLOW, EMPTY = -12.13, -1.11, 3.3


def narrow(symbols: str = "Na Cl", spins: int = 1, **parameters: Any) -> str:
    """Levels much narrower than the step of 0.2 eV, sampled at points: 2 + 6 electrons, and 2 empty states."""
    energies = np.arange(-20.0, 12.0, 0.2)
    parts = [(n / spins * np.array(level(energies, e, 0.01))) for n, e in ((2, DEEP), (6, SHALLOW), (2, EMPTY))]
    dos, integrated = np.sum(parts, axis=0)
    shares = [np.stack([0.2 * wide(energies, spins)] * spins), np.stack([0.6 * wide(energies, spins)] * spins)]
    sites = [share[..., None] for share in shares]
    levels = [[[DEEP, SHALLOW, EMPTY, 9.0]]] * spins
    step = calculation(energies, [dos] * spins, [integrated] * spins, sites, levels, 0.5)
    return vasprun(step, symbols=symbols, **({"ISMEAR": 0, "SIGMA": 0.01, "NELECT": 8} | parameters))


def wide(energies: Array, spins: int) -> Array:
    return sum(level(energies, e, 0.5)[0] for e in (DEEP, SHALLOW, EMPTY)) / spins


@pytest.mark.parametrize("spins", [1, 2])
def test_states_lost_by_the_density_come_from_the_integrated_column(tmp_path: Path, spins: int) -> None:
    path = tmp_path / "vasprun.xml"
    path.write_text(narrow(spins=spins))
    total, sodium, chlorine = (TargetDOS.from_vasprun(path, site) for site in (None, 0, 1))
    assert total.total_states(hi=1.0) == pytest.approx(8.0, abs=1e-3)
    assert total.total_states(-0.5, 0.5) == pytest.approx(6.0, abs=1e-3)
    assert total.on_grid().total_states(-5.0, 2.0) == pytest.approx(6.0, abs=0.01)
    assert total.on_grid().band_centre(-5.0, 2.0) == pytest.approx(0.0, abs=0.11)  # half a step at the most
    assert sodium.total_states(-0.5, 0.5) == pytest.approx(1.5, abs=1e-3)
    assert chlorine.total_states(-0.5, 0.5) == pytest.approx(4.5, abs=1e-3)
    assert "states taken from the integrated column (10.00)" in steps_of(total)
    assert "8.00 states up to the Fermi level in the file, 8 electrons (NELECT)" in steps_of(total)
    assert "assumed" not in total.provenance
    assert ("both spins summed" in steps_of(total)) == (spins == 2)


def test_states_where_no_projection_was_sampled_are_unknown_and_told(tmp_path: Path) -> None:
    energies = np.arange(-20.0, 12.0, 0.2)
    dos, integrated = np.sum([np.array(level(energies, e, 0.01)) * 2 for e in (DEEP, SHALLOW, EMPTY)], axis=0)
    sites = [np.maximum(0.4 * dos, 0.5 * level(energies, SHALLOW, 0.4)[0])[None, :, None]] * 2
    path = tmp_path / "vasprun.xml"
    levels = [[[DEEP, SHALLOW, EMPTY, 9.0]]]
    path.write_text(vasprun(calculation(energies, [dos], [integrated], sites, levels, 0.5), symbols="Na Na", NELECT=4))
    site = TargetDOS.from_vasprun(path, 0)
    assert "unknown where no site has a projection: 4.00 states of the cell" in steps_of(site)
    assert not site.known[np.abs(site.energies - (DEEP - SHALLOW)).argmin()]
    assert site.total_states(-0.5, 0.5) == pytest.approx(1.0, abs=1e-3)


def test_a_density_that_holds_its_states_is_kept_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "vasprun.xml"
    path.write_text(xml_of([[[-2.0, 1.6, 7.0], [0.3, 1.4, 7.5]]], 0.0, NELECT=2))
    target = TargetDOS.from_vasprun(path)
    assert target.energies == pytest.approx(E, abs=1e-9)
    assert target.values[target.known] == pytest.approx(WIDE[target.known], abs=1e-4)


def test_electrons_that_are_missing_are_told(tmp_path: Path) -> None:
    path = tmp_path / "vasprun.xml"
    path.write_text(xml_of([[[-2.0, 1.6, 7.0], [0.3, 1.4, 7.5]]], 0.0, NELECT=11))
    (told,) = TargetDOS.from_vasprun(path).provenance["assumed"]
    assert "1.52 in the file where NELECT is 11" in told  # 1 + erf(1/2)


def test_an_empty_integrated_column_is_left_aside(tmp_path: Path) -> None:
    path = tmp_path / "vasprun.xml"
    path.write_text(vasprun(calculation(E, [WIDE], [0 * E], None, [[[-2.0, 9.0], [0.3, 9.0]]], 0.0)))
    target = TargetDOS.from_vasprun(path)
    assert target.total_states(-8, 0) == pytest.approx(1 + math.erf(0.5), abs=0.03)
    assert "integrated column holds no states" in steps_of(target)


# -- vasprun.xml: smearing, spin, steps --------------------------------------------------------------------------------


def methfessel_paxton(order: int, energies: Array, centre: float, width: float) -> tuple[Array, Array]:
    """Methfessel and Paxton, Phys. Rev. B 40, 3616 (1989): delta function of order 1 or 2 and its integral."""
    x = (energies - centre) / width
    hermite = {2: 4 * x**2 - 2, 4: 16 * x**4 - 48 * x**2 + 12}
    lower = {1: 2 * x, 3: 8 * x**3 - 12 * x}
    series = 1 + sum((-1) ** n / (math.factorial(n) * 4**n) * hermite[2 * n] for n in range(1, order + 1))
    sums = sum((-1) ** n / (math.factorial(n) * 4**n) * lower[2 * n - 1] for n in range(1, order + 1))
    gauss = np.exp(-(x**2)) / math.sqrt(math.pi)
    return gauss * series / width, 0.5 * (1 + erf(x)) - gauss * sums


@pytest.mark.parametrize(("order", "share"), [(1, 0.066), (2, 0.102)])
def test_methfessel_paxton_lobes_are_clipped_and_the_states_stay(tmp_path: Path, order: int, share: float) -> None:
    energies, levels = np.arange(-8.0, 8.0, 0.02), [-3.0, -1.0, 2.0, 4.0, 9.0]
    parts = np.sum([np.array(methfessel_paxton(order, energies, e, 0.2)) for e in levels], axis=0)
    dos, integrated = 2 * parts
    assert -dos[dos < 0].sum() / dos[dos > 0].sum() == pytest.approx(share, abs=0.002)
    path = tmp_path / "vasprun.xml"
    step = calculation(energies, [dos], [integrated], [dos[None, :, None] * 0.8], [[levels]], 0.5)
    path.write_text(vasprun(step, ISMEAR=order, SIGMA=0.2, NELECT=4))
    target = TargetDOS.from_vasprun(path)
    assert target.total_states(-4.0, -1.0) == pytest.approx(2.0, rel=0.01)  # the zero lies at -1 eV
    assert target.total_states(-1.0, 1.0) == pytest.approx(2.0, rel=0.01)
    assert "states/eV set to 0, the rest scaled by 0." in steps_of(target)
    assert TargetDOS.from_vasprun(path, 0).total_states(-1.0, 1.0) == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize(("ismear", "depth"), [(0, 0.3), (1, 0.12), (2, 0.15), (-5, 0.5)])
def test_lobes_beyond_what_smearing_makes_are_refused_by_name(tmp_path: Path, ismear: int, depth: float) -> None:
    dos = WIDE - depth * 2 * level(E, 4.0, 0.5)[0]
    path = tmp_path / "vasprun.xml"
    integrated = np.cumsum(dos) * 0.05
    path.write_text(vasprun(calculation(E, [dos], [integrated], None, [[[-2.0, 9.0]]], 0.0), ISMEAR=ismear))
    with pytest.raises(ValueError, match=rf"vasprun\.xml: values must not be negative.*ISMEAR = {ismear} makes"):
        TargetDOS.from_vasprun(path)


@pytest.mark.parametrize("told_by", ["LSORBIT", "LNONCOLLINEAR", "projections"])
def test_spin_orbit_has_one_electron_in_a_state(tmp_path: Path, told_by: str) -> None:
    """Total and charge only; the other "spins" are magnetisation, which may be negative."""
    peaks = [2 * np.array(level(E, e, 0.1)) for e in (-1.0, 3.0)]
    dos, integrated = np.sum(peaks, axis=0)
    ion = np.stack([0.7 * dos, -0.5 * dos, 0.1 * dos, -0.6 * dos])[..., None]
    levels = [[[-1.0, -1.0, 3.0, 3.0, 9.0]]]
    path = tmp_path / "vasprun.xml"
    extra = {} if told_by == "projections" else {told_by: "T"}
    path.write_text(vasprun(calculation(E, [dos], [integrated], [ion], levels, 0.5), NELECT=2, **extra))
    total, site = (TargetDOS.from_vasprun(path, number) for number in (None, 0))
    assert total.reference == "vbm"
    assert total.total_states(-2.0, 2.0) == pytest.approx(2.0, rel=1e-3)
    assert site.total_states(-2.0, 2.0) == pytest.approx(2.0, rel=1e-3)
    assert "noncollinear: one electron in a state" in steps_of(total)
    assert "2.00 states up to the Fermi level in the file, 2 electrons" in steps_of(total)


def test_the_last_ionic_step_counts(tmp_path: Path) -> None:
    first, first_sum = (2 * x for x in level(E, -3.0, 0.3))
    last, last_sum = (2 * x for x in level(E, -1.0, 0.3))
    crossing = [[[-3.0, 1.6, 9.0], [0.7, 1.4, 9.0]]]
    steps = [calculation(E, [first], [first_sum], None, crossing, 7.0)]
    steps += [calculation(E, [last], [last_sum], None, crossing, 0.5)]
    path = tmp_path / "vasprun.xml"
    path.write_text(vasprun(*steps))
    target = TargetDOS.from_vasprun(path)
    assert target.energies[target.values.argmax()] == pytest.approx(-1.5, abs=0.03)
    path.write_text(vasprun(*steps, "<calculation><scstep/></calculation>"))
    assert TargetDOS.from_vasprun(path).provenance["assumed"][0].startswith("structure: the DOS is that of an earlier")


def test_kpoints_along_lines_are_told(tmp_path: Path) -> None:
    path = tmp_path / "vasprun.xml"
    line = '<generation param="listgenerated"/>'
    crossing = [[[-3.0, 1.6, 9.0], [0.3, 1.4, 9.0]]]
    path.write_text(vasprun(calculation(E, [WIDE], [WIDE_SUM], None, crossing, 0.0), kpoints=line))
    assert "k-points: they lie along lines" in TargetDOS.from_vasprun(path).provenance["assumed"][0]


def test_a_bands_only_dos_of_other_kpoints_is_not_taken(tmp_path: Path) -> None:
    text = vasprun(calculation(E, [WIDE], [WIDE_SUM], None, [[[-3.0, 1.6, 9.0], [0.3, 1.4, 9.0]]], 0.0))
    other = '<dos comment="kpoints_opt"><i name="efermi">5.0</i></dos></calculation>'
    path = tmp_path / "vasprun.xml"
    path.write_text(text.replace("</calculation>", other))
    assert "0.0000 eV (fermi)" in steps_of(TargetDOS.from_vasprun(path))


# -- JSON of pymatgen --------------------------------------------------------------------------------------------------

SPREAD = np.linspace(-9.0, 9.0, 1801)
VALENCE, CONDUCTION = level(SPREAD, -2.0, 0.3)[0], level(SPREAD, 4.0, 0.3)[0]


def spins_and_sites(spins: int) -> tuple[Array, Array]:
    """4 electrons, three quarters of them on site 0; (spins, G) and (sites, spins, G), spheres that hold 80 %."""
    dos = np.stack([(4 * VALENCE + 2 * CONDUCTION) / spins] * spins)
    return dos, 0.8 * np.stack([0.75 * dos, 0.25 * dos])


@pytest.mark.parametrize("name", ["CompleteDos", "LobsterCompleteDos"])
@pytest.mark.parametrize("spins", [1, 2])
def test_dicts_are_read_by_their_class(tmp_path: Path, name: str, spins: int) -> None:
    dos, sites = spins_and_sites(spins)
    path = tmp_path / "dos.json"
    path.write_text(json.dumps(pymatgen_dict(SPREAD, dos, sites, 1.0, name)))
    total, site = TargetDOS.from_file(path), TargetDOS.from_file(path, 0)
    assert total.reference == "vbm"
    assert total.total_states(hi=1.0) == pytest.approx(4.0, rel=1e-3)
    assert site.total_states(hi=1.0) == pytest.approx(3.0, rel=1e-3)
    assert "4.00 states up to the Fermi level in the file" in steps_of(total)
    assert total.provenance["source"] == f"pymatgen {name}"


def test_what_pymatgen_writes_is_what_is_read(tmp_path: Path) -> None:
    """LobsterCompleteDos and FermiDos, through json, and as objects."""
    from monty.json import MontyEncoder
    from pymatgen.core import Lattice, Structure
    from pymatgen.electronic_structure.core import Spin
    from pymatgen.electronic_structure.dos import Dos, LobsterCompleteDos

    dos, sites = spins_and_sites(2)
    structure = Structure(Lattice.cubic(4.0), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    spins = (Spin.up, Spin.down)
    pdos = {
        structure[i]: {"3s": dict(zip(spins, 0.5 * ion, strict=True)), "3p_x": dict(zip(spins, 0.5 * ion, strict=True))}
        for i, ion in enumerate(sites)
    }
    whole = LobsterCompleteDos(structure, Dos(1.0, SPREAD, dict(zip(spins, dos, strict=True))), pdos)
    path = tmp_path / "lobster.json"
    data = {
        **Dos.as_dict(whole),
        "@class": "LobsterCompleteDos",
        "structure": structure.as_dict(),
        "pdos": [
            {orbital: {"densities": {str(int(spin)): row for spin, row in o.items()}} for orbital, o in site.items()}
            for site in pdos.values()
        ],
    }
    path.write_text(json.dumps(data, cls=MontyEncoder))  # arrays become dicts with "data"
    for site in (None, 0, 1):
        assert TargetDOS.from_file(path, site) == TargetDOS.from_pymatgen(whole, site)
    assert "site 1 (Cl)" in steps_of(TargetDOS.from_file(path, 1))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda dos: {"mp-149": dos},
        lambda dos: [dos],
        lambda dos: {"material_id": "mp-149", "dos": dos, "last_updated": "2026"},
        lambda dos: [{"mp-149": dos}],
    ],
)
def test_one_dos_in_a_list_or_under_a_name(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    dos, sites = spins_and_sites(1)
    path = tmp_path / "dos.json"
    path.write_text(json.dumps(wrap(pymatgen_dict(SPREAD, dos, sites, 1.0))))
    assert TargetDOS.from_file(path, 1).total_states(hi=1.0) == pytest.approx(1.0, rel=1e-3)


def test_no_class_in_a_file_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site property that names a class in the current folder, and a module that leaves a trace when imported."""
    (tmp_path / "evil_module.py").write_text("import pathlib; pathlib.Path('run').touch()\nclass Evil:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    dos, sites = spins_and_sites(1)
    data = pymatgen_dict(SPREAD, dos, sites, 1.0)
    evil = {"@module": "evil_module", "@class": "Evil", "a": 1}
    data["structure"]["sites"][0]["properties"] = {"magmom": evil}
    data["structure"] |= {"@module": "evil_module", "@class": "Evil"}
    data["extra"] = evil
    Path("dos.json").write_text(json.dumps(data))
    assert TargetDOS.from_file("dos.json", 0).total_states(hi=1.0) == pytest.approx(3.0, rel=1e-3)
    assert TargetDOS.from_pymatgen(data, 0).total_states(hi=1.0) == pytest.approx(3.0, rel=1e-3)
    assert not Path("run").exists()


def test_own_json_tells_what_it_left_out(tmp_path: Path) -> None:
    path = tmp_path / "dos.json"
    path.write_text('{"energies": [-1, 0, 1], "values": [1, 1, 0]}')
    told = TargetDOS.from_file(path).provenance["assumed"]
    assert [sentence.split(":")[0] for sentence in told] == ["zero of energy", "kind"]
    assert "assumed" not in TargetDOS.from_file(path, reference="vbm", kind="total").provenance
    path.write_text(json.dumps(TargetDOS.from_arrays([-1, 0, 1], [1, 1, 0]).to_dict()))
    assert "assumed" not in TargetDOS.from_file(path).provenance


# -- DOSCAR ------------------------------------------------------------------------------------------------------------


def columns(dos: Array, spins: int, share: float) -> Array:
    """Two orbitals, up and down beside each other with two spins; (G, columns)."""
    return np.column_stack([part * share * dos[s] for part in (0.3, 0.5) for s in range(spins)])


@pytest.mark.parametrize("lobster", [False, True])
@pytest.mark.parametrize("spins", [1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_doscar(tmp_path: Path, lobster: bool, spins: int, sign: int) -> None:
    """E_F at 2 eV; LOBSTER's energies start from it. A spin-down that is drawn downwards is turned up."""
    if spins == 1 and sign < 0:
        return
    energies = np.linspace(-9.0, 9.0, 1201)
    zero = 0.0 if lobster else 2.0
    valence, conduction = (np.array(level(energies, zero + e, 0.2)) for e in (-3.0, 2.0))
    dos, integrated = ((4 * valence + 2 * conduction) / spins)[:, None, :].repeat(spins, axis=1)
    if spins == 2:
        dos[1], integrated[1] = sign * dos[1], sign * integrated[1]
    sites = np.array([columns(abs(dos), spins, share) for share in (0.75, 0.25)])
    path = tmp_path / "DOSCAR"
    path.write_text(doscar(energies, dos, integrated, sites, 2.0, lobster=lobster))
    total, site = TargetDOS.from_file(path), TargetDOS.from_file(path, 0)
    assert total.reference == "vbm"
    assert total.total_states(-3.0, 1.0) == pytest.approx(4.0, rel=5e-3)
    assert site.total_states(-3.0, 1.0) == pytest.approx(3.0, rel=5e-3)
    zero_at = float(steps_of(total).split("zero of energy at ")[1].split()[0])
    assert zero_at == pytest.approx(zero - 3.0, abs=0.7)  # the edge of the valence band, within its width
    assert total.energies[total.values.argmax()] + zero_at == pytest.approx(zero - 3.0, abs=0.02)
    assert total.provenance["source"].startswith("LOBSTER" if lobster else "VASP")
    assert ("taken as positive" in steps_of(total)) == (sign < 0)


def test_doscar_of_a_metal_has_its_zero_at_the_fermi_level(tmp_path: Path) -> None:
    energies = np.linspace(-8.0, 8.0, 801)
    dos, integrated = (2 * x[None] for x in level(energies, 0.0, 2.0))
    (tmp_path / "DOSCAR").write_text(doscar(energies, dos, integrated, None, 1.234))
    target = TargetDOS.from_file(tmp_path / "DOSCAR")
    assert target.reference == "fermi"
    assert target.energies[0] == pytest.approx(-9.234, abs=1e-6)


def test_doscar_with_spin_orbit(tmp_path: Path) -> None:
    energies = np.linspace(-8.0, 8.0, 801)
    dos, integrated = (2 * x[None] for x in level(energies, -1.0, 0.3))
    ion = np.column_stack([share * dos[0] for _ in range(9) for share in (0.05, -0.04, 0.01, 0.02)])
    text = doscar(energies, dos, integrated, [ion], 1.0)
    (tmp_path / "DOSCAR").write_text(text)
    site = TargetDOS.from_file(tmp_path / "DOSCAR", 0)
    assert site.total_states() == pytest.approx(2.0, rel=5e-3)
    assert "noncollinear" in steps_of(site)


def test_doscar_of_lobster_is_told_by_its_window_too(tmp_path: Path) -> None:
    """Without the word: the window is on VASP's scale, the energies are not."""
    energies = np.linspace(-8.0, 8.0, 801)
    dos, integrated = (2 * x[None] for x in level(energies, 0.0, 2.0))
    text = doscar(energies, dos, integrated, None, 3.0, lobster=True).replace(LOBSTER, " unknown system")
    (tmp_path / "DOSCAR").write_text(text)
    target = TargetDOS.from_file(tmp_path / "DOSCAR")
    assert target.energies[0] == pytest.approx(-8.0, abs=1e-6)


def band_of_levels(energies: Any, width: float) -> tuple[Array, Array]:
    """A valence band from -6 to 0 eV and a conduction band from 3 eV, 8 states each, of VASP's Gaussian smearing."""
    centres = np.concatenate([-6 * np.linspace(0, 1, 400) ** 1.5, 3 + 4 * np.linspace(0, 1, 400)])
    parts = [np.array(level(energies, centre, width)) * 8 / 400 for centre in centres]
    return tuple(np.sum(parts, axis=0))


@pytest.mark.parametrize("form", ["DOSCAR", "dos.json"])
@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.2])
def test_the_tail_of_smearing_is_taken_off_or_told(tmp_path: Path, form: str, width: float) -> None:
    """SIGMA is `width`; the valence band ends at 2 eV on the file's scale."""
    energies = np.linspace(-12.0, 12.0, 2401)
    dos, integrated = (x[None] for x in band_of_levels(energies, width))
    path = tmp_path / form
    made = pymatgen_dict(energies + 2, dos, None, 3.5)
    path.write_text(json.dumps(made) if form == "dos.json" else doscar(energies + 2, dos, integrated, None, 3.5))
    known, unknown = TargetDOS.from_file(path, sigma=width / math.sqrt(2)), TargetDOS.from_file(path)
    assert known.reference == unknown.reference == "vbm"
    assert -10.0 - known.energies[0] == pytest.approx(2.0, abs=0.4 * width + 0.01)
    assert -10.0 - unknown.energies[0] == pytest.approx(2.0 + 2.5 * width, abs=0.4 * width)
    assert "assumed" not in known.provenance
    assert unknown.provenance["assumed"][0].startswith(
        "zero of energy: the end of the smearing's tail, up to about 2.5"
    )


@pytest.mark.parametrize("sigma", [0.0, 0.01, 0.05, 0.1, 0.3, None])
def test_a_sharp_band_edge_has_no_tail(tmp_path: Path, sigma: float | None) -> None:
    """As the tetrahedron method makes it, whatever sigma is stated."""
    energies = np.linspace(-12.0, 12.0, 2401)
    dos = np.sqrt(np.maximum(-energies, 0) * (energies > -6)) + np.sqrt(np.maximum(energies - 3, 0))
    path = tmp_path / "dos.json"
    path.write_text(json.dumps(pymatgen_dict(energies + 2, dos[None], None, 3.5)))
    target = TargetDOS.from_file(path, sigma=sigma)
    assert -10.0 - target.energies[0] == pytest.approx(2.0, abs=0.0101)


def test_negative_lobes_are_no_gaussian_tail(tmp_path: Path) -> None:
    """Methfessel-Paxton crosses zero: the logarithm is steep there and says nothing of the edge."""
    energies = np.linspace(-12.0, 12.0, 2401)
    dos = np.zeros_like(energies)
    for centre in (-3.0, 3.0):
        x = (energies - centre) / 0.2
        dos += np.exp(-(x**2)) * (1.5 - x**2) / (0.2 * math.sqrt(math.pi))
    path = tmp_path / "dos.json"
    path.write_text(json.dumps(pymatgen_dict(energies, dos[None], None, 0.0)))
    target = TargetDOS.from_file(path, sigma=0.1)
    assert -12.0 - target.energies[0] == pytest.approx(-3.0 + 0.2 * math.sqrt(1.5), abs=0.0101)
    assert target.provenance["assumed"][0].startswith("zero of energy")


@pytest.mark.parametrize("sigma", [-0.1, math.nan, math.inf, "0.1"])
def test_a_stated_sigma_that_cannot_be_is_refused(tmp_path: Path, sigma: Any) -> None:
    path = tmp_path / "dos.json"
    path.write_text(json.dumps(pymatgen_dict(SPREAD, spins_and_sites(1)[0], None, 1.0)))
    with pytest.raises(ValueError, match=r"sigma must be a finite standard deviation >= 0 in eV"):
        TargetDOS.from_file(path, sigma=sigma)


@pytest.mark.parametrize("title", [" NaCl static for LOBSTER", "lobster", LOBSTER])
@pytest.mark.parametrize("efermi", [2.0, -2.0])
def test_doscar_of_vasp_whose_title_names_lobster(tmp_path: Path, title: str, efermi: float) -> None:
    """The title is free text; the energies start with the window, so they are on VASP's scale."""
    energies = np.linspace(-8.0, 8.0, 801)
    dos, integrated = (2 * x[None] for x in level(energies, efermi, 2.0))
    text = doscar(energies, dos, integrated, None, efermi).replace(" unknown system", title)
    (tmp_path / "DOSCAR").write_text(text)
    target = TargetDOS.from_file(tmp_path / "DOSCAR")
    assert target.energies[0] == pytest.approx(-8.0 - efermi, abs=1e-6)
    assert target.provenance["source"] == "VASP DOSCAR"


def test_doscar_of_lobster_is_told_by_its_sentence(tmp_path: Path) -> None:
    """A window on the scale of neither."""
    energies = np.linspace(-8.0, 8.0, 801)
    dos, integrated = (2 * x[None] for x in level(energies, 0.0, 2.0))
    text = doscar(energies, dos, integrated, None, 3.0, lobster=True).replace(f"{-5.0:16.8f}", f"{-9.0:16.8f}")
    (tmp_path / "DOSCAR").write_text(text)
    target = TargetDOS.from_file(tmp_path / "DOSCAR")
    assert target.energies[0] == pytest.approx(-8.0, abs=1e-6)
    assert target.provenance["source"] == "LOBSTER DOSCAR"


def test_sites_that_hold_far_more_than_the_total_are_told(tmp_path: Path) -> None:
    """Seen in a public DOSCAR: a total a hundred times too small."""
    dos, sites = spins_and_sites(1)
    path = tmp_path / "dos.json"
    path.write_text(json.dumps(pymatgen_dict(SPREAD, 0.01 * dos, sites, 1.0)))
    assert TargetDOS.from_file(path, 0).provenance["assumed"][1:] == [
        "scale: the sites hold 80.0 times the total DOS; the total is taken as right"
    ]


def test_doscar_as_fortran_writes_numbers(tmp_path: Path) -> None:
    """Three digits in the exponent leave no room for the E, and wide numbers none for the blank."""
    energies = np.linspace(-100.5, 10.0, 222)
    dos = level(energies, -1.0, 2.0)[0]
    sums = np.cumsum(dos) * 0.5
    lines = doscar(energies, dos[None], sums[None], None, 5.0).splitlines()
    lines[6] = "   -100.500 0.1234-101 0.1234D-99"
    lines[5] = f"{10.0:16.8f}{-100.5:16.8f}  222{5.0:16.8f}{1.0:16.8f}"
    (tmp_path / "DOSCAR").write_text("\n".join(lines))
    target = TargetDOS.from_file(tmp_path / "DOSCAR")
    assert target.values[0] == 0.0 or target.values[0] < 1e-90
    assert target.total_states() == pytest.approx(1.0, rel=0.01)


# -- CASTEP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spins", [1, 2])
def test_castep_bands(tmp_path: Path, spins: int) -> None:
    """Two k-points of weight 1/4 and 3/4; 4 electrons in two bands, or one up and three down."""
    levels = np.array([[-5.0, -1.0, 3.0, 9.0], [-4.5, -1.5, 3.5, 9.5]])
    lines = ["Number of k-points     2", f"Number of spin components {spins}"]
    lines += [f"Number of electrons    {'4.000' if spins == 1 else '2.000 2.000'}"]
    lines += [f"Number of eigenvalues  {'     4' * spins}"]
    lines += [f"Fermi energies (in atomic units) {f'{0.5 / Hartree:.6f} ' * spins}", "Unit cell vectors"]
    lines += ["4 0 0", "0 4 0", "0 0 4"]
    for k, weight in ((2, 0.75), (1, 0.25)):  # out of order, as CASTEP writes them
        lines.append(f"K-point {k} 0.0 0.0 0.{k} {weight}")
        for spin in range(spins):
            lines += [f"Spin component {spin + 1}", *(f"{e / Hartree:.8f}" for e in levels[k - 1])]
    path = tmp_path / "x.bands"
    path.write_text("\n".join(lines) + "\n")
    target = TargetDOS.from_file(path)
    assert (target.reference, target.kind, target.sigma) == ("vbm", "total", 0.2)
    assert target.total_states(hi=2.0) == pytest.approx(4.0, rel=2e-3)
    assert target.band_centre(-5.0, -2.2) == pytest.approx(1.0 - (0.25 * 5.0 + 0.75 * 4.5), abs=0.01)
    assert "zero of energy at -1.0000 eV (vbm)" in steps_of(target)
    assert target.provenance["assumed"][0].startswith("k-points: taken as a mesh")


# -- packed files ------------------------------------------------------------------------------------------------------

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "twice": lambda data: gzip.compress(gzip.compress(data)),
}


@pytest.mark.parametrize("ending", [".xml", ".xml.gz", ".xml.bz2", ".xml.xz", ""])
@pytest.mark.parametrize("packer", list(PACKERS))
def test_packing_is_told_by_content(tmp_path: Path, packer: str, ending: str) -> None:
    text = xml_of([[[-2.0, 1.6, 7.0], [0.3, 1.4, 7.5]]], 0.0, NELECT=2)
    path = tmp_path / f"vasprun{ending}"
    path.write_bytes(PACKERS[packer](text.encode()))
    target = TargetDOS.from_vasprun(path)
    assert target == TargetDOS.from_file(path)
    assert target.total_states(hi=0.0) == pytest.approx(1 + math.erf(0.5), abs=0.01)


# -- the same DOS in every form ----------------------------------------------------------------------------------------


def write_npz(path: Path, energies: Array, dos: Array, sites: Array, zero: float) -> None:
    np.savez(path, energies=energies - zero, total=dos.sum(0), pdos=sites.sum(1)[:, None], emax=99.0, gap=2.0)


@settings(max_examples=40)
@given(
    form=st.sampled_from(["vasprun", "json", "doscar", "lobster", "npz"]),
    spins=st.sampled_from([1, 2]),
    fermi=st.floats(-6.0, 6.0),
    electrons=st.floats(0.5, 40.0),
    share=st.floats(0.05, 0.95),
    packer=st.sampled_from(list(PACKERS)),
    unpolarised=st.booleans(),
)
def test_one_dos_in_every_form(
    tmp_path_factory: pytest.TempPathFactory,
    form: str,
    spins: int,
    fermi: float,
    electrons: float,
    share: float,
    packer: str,
    unpolarised: bool,
) -> None:
    """A band around 2 eV below the Fermi level and one around 3 eV above it, on two sites, comes back to 1 %."""
    shift = 0.0 if form == "lobster" else fermi
    energies = np.linspace(-12.0, 12.0, 1601) + shift
    valence, conduction = (np.array(level(energies, shift + e, 0.25)) for e in (-2.0, 3.0))
    splits = [1.0] if spins == 1 else [0.5, 0.5] if unpolarised else [0.8, 0.2]
    dos, integrated = np.moveaxis([s * (electrons * valence + 2 * conduction) for s in splits], 1, 0)
    sites = 0.85 * np.stack([share * dos, (1 - share) * dos])
    path = tmp_path_factory.mktemp("form") / "dos"
    if form == "vasprun":
        levels = np.broadcast_to(np.array([-2.0, 3.0, 11.9]) + shift, (spins, 2, 3))
        step = calculation(energies, dos, integrated, sites[..., None], levels, fermi)
        content = vasprun(step, symbols="Na Cl", NELECT=electrons, ISMEAR=0, SIGMA=0.25).encode()
    elif form == "json":
        content = json.dumps(pymatgen_dict(energies, dos, sites, fermi)).encode()
    elif form == "npz":
        write_npz(path.with_suffix(".npz"), energies, dos, sites, shift)
        content = path.with_suffix(".npz").read_bytes()
    else:
        flat = [np.column_stack(list(ion)) for ion in sites]
        content = doscar(energies, dos, integrated, flat, fermi, lobster=form == "lobster").encode()
    path.write_bytes(PACKERS[packer](content))
    for site, part in ((None, 1.0), (0, share), (1, 1 - share)):
        target = TargetDOS.from_file(path, site)
        zero = 0.0 if form == "npz" else float(steps_of(target).split("zero of energy at ")[1].split()[0]) - shift
        assert target.reference == "vbm"
        low, high = -5.0 - zero, 0.5 - zero  # the valence band, and the energies up to the gap
        assert target.total_states(low, high) == pytest.approx(part * electrons, rel=0.01)
        assert target.band_centre(low, high) + zero == pytest.approx(-2.0, abs=0.02)
        expected = part * (electrons * valence[0] + 2 * conduction[0])
        known = target.known & (target.values > 0.05 * expected.max())
        assert target.values[known] == pytest.approx(expected[known], rel=0.01, abs=0.01 * expected.max())
        assert known.sum() > 30
