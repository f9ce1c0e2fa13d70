"""What the columns of a text file are: of the programs that are known, by their headers, and of any other table.

A `Layout` says which columns hold the DOS, whose it is and where the zero of energy lies. What it leaves open is
assumed by `text`, which says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dosmatgen_ase.dos.readers.numbers import Table
from dosmatgen_ase.dos.readers.zeros import ENERGY_UNITS, claims, header_lines, zero_of_header

UP = re.compile(r"(?:^|[^a-z])(?:up|alpha|majority)(?:[^a-z]|$)|dosup|spin[\s_-]*(?:up|1)|↑")
DOWN = re.compile(r"(?:^|[^a-z])(?:down|dn|dw|dwn|beta|minority)(?:[^a-z]|$)|dosd[wn]|spin[\s_-]*(?:down|dn|2)|↓")
INTEGRATED = re.compile(r"^i\w?dos|^int|integr|cumul|^nelec|^n\(e\)")
ENERGY = re.compile(r"e(?:[^a-z]|$)|en(?:ergy|ergies|g)?(?:[^a-z]|$)")
TOTAL = re.compile(r"(?:l|t|p)?dos(?:[^a-z]|$)|tot|sum")
ORBITAL = re.compile(r"(?:\d?[spdf]|[pdf][xyz0-9_^+-][xyzr0-9_^+-]*|l=\d|x2-y2)")
NOT_ELECTRONIC = re.compile(r"phonon|vibration|frequenc|wave ?number|\bTHz\b|cm\^?-1|\bcoop\b|\bcohp\b", re.IGNORECASE)
# An axis that points the other way: positive below the Fermi level.
BINDING = re.compile(r"(?<!tight[ _-])\bbinding[ _-]*energ\w*", re.IGNORECASE)
PER_VOLUME = re.compile(
    r"/\s*(?:Å|A|Ang|Angstrom|bohr)\s*\^?\s*3|(?:Å|A|Ang)\s*\^\s*-?3|per volume|/volume|cm\^?-3", re.IGNORECASE
)
_UNIT = r"(m?eV|Ry|Rydberg|Ha|Hartree)(?![a-z])"
_STATES = r"(?:states?|electrons?|\b1)"
# The unit of energy that states are counted per.
PER_UNIT = re.compile(
    rf"{_STATES}\s*/\s*(?:(?:unit |formula )?[\w.]+\s?[/*·]\s?){{0,3}}{_UNIT}|"
    rf"{_STATES}\s*/\s*[(\[]\s*(?:[\w.]+[\s/*·,]+){{0,3}}{_UNIT}|"
    rf"(?<![a-z]){_UNIT}(?:\s*\^\s*)?[{{(]?(?:-1|⁻¹)(?![.\d])|(?:states?|electrons?|DOS) (?:per \w+ )?per {_UNIT}",
    re.IGNORECASE,
)
# What says that the DOS is that of one spin.
PER_SPIN = re.compile(
    rf"(?:{_UNIT}|states?|DOS|cell|atom|site|f\.?u\.?|\))\s*/\s*spin(?!\w|-[a-z])|{_STATES}\s*/\s*\([^()]{{0,40}}\bspin\b|"
    r"spin\s*\^\s*[{(]?-1|-1 spin-1|spin⁻¹|\bper (?:one |each |a |single )?spin(?!\w|-(?:orbit|pol))|"
    r"\b(?:one|single) spin[ -](?:channel|direction|component)",
    re.IGNORECASE,
)
PER_CELL = re.compile(
    r"/\s*(?:unit[ _-]?)?cell\b|/\s*(?:f\.?u\.?|u\.?c\.?|formula unit)(?![a-z])|"
    r"\bper (?:\w+ )?(?:cell|formula unit|f\.?u\.?)(?![a-z])|cell\s*\^?\s*-1",
    re.IGNORECASE,
)
# What says that the DOS is not that of all sites, whatever it is counted per.
OF_SITE = re.compile(
    r"[pl]dos|project|partial|local|\batom|\bsite|orbital|(?-i:(?<![A-Za-z_])\d?[spdf](?![A-Za-z.]))", re.IGNORECASE
)


@dataclass(frozen=True)
class Layout:
    """Columns, kind and zero of energy of a file.

    Attributes
    ----------
    source : str
        What wrote it; "text" if that is not known.
    columns : tuple of int
        Energy, then the columns that add up to the DOS. Empty: not known.
    kind : str or None
    zero : float or None
        Energy (eV) of the Fermi level on the scale of the file; None: not known.
    reference : str
        What that zero is.
    absolute : str
        Why `zero` must be given, if it must: the beginning of a message that says how.
    first_pile : bool
        Whether the states below the window are piled up in the first energy, as VASP does.
    unit : float
        eV of the unit of energy, as the header states it.
    per : float
        eV of the unit of energy that states are counted per; by default the same.
    notes, assumed : tuple of str
        What is to be told, and what the file does not say.
    partner : path or None
        File of the other spin.
    per_spin : bool
        Whether a column counts the states of one spin.
    siblings : tuple of paths
        Further files whose columns add up with this one's to the DOS of one site.
    total : path or None
        File of the total DOS and of the sum of the projections, by which those of a site are scaled.
    spin_blocks : bool
        Whether the rows of the second spin follow those of the first.
    """

    source: str = "text"
    columns: tuple[int, ...] = ()
    kind: str | None = None
    zero: float | None = None
    reference: str = "fermi"
    absolute: str = ""
    first_pile: bool = False
    unit: float | None = None
    per: float | None = None
    notes: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    partner: Path | None = None
    per_spin: bool = False
    siblings: tuple[Path, ...] = ()
    total: Path | None = None
    spin_blocks: bool = False

    @property
    def by_program(self) -> bool:
        """Whether a known program wrote it: band by band, so that energies above the last state are unknown."""
        return self.source != "text"


def layout_of(table: Table, path: Path) -> Layout:
    """What the file is, by its header (and, where programs split a DOS over files, by its name).

    Raises
    ------
    ValueError
        If it is known to hold something else than a DOS in states/eV.
    """
    words = f"{table.text} {' '.join(table.names)}"
    if found := NOT_ELECTRONIC.search(words):
        raise table.error(f"{found[0]!r} in its header says that it is not an electronic DOS")
    if found := BINDING.search(words):
        raise table.error(
            f"{found[0]!r} in its header counts downwards from the Fermi level: write the energies as "
            "E - E_F (the other sign), and change the header"
        )
    if PER_VOLUME.search(table.text):
        raise table.error("its DOS is per volume: multiply it by the volume of the cell, and change the header")
    for recognise in (_espresso, _abinit, _aims, _optados, _vaspkit, _pyprocar, _sumo):
        if layout := recognise(table, path):
            return layout
    return _unknown(table)


# -- columns by their names --------------------------------------------------------------------------------------------


def named_columns(names: Sequence[str]) -> tuple[int, ...]:
    """Energy and the columns that add up to the DOS, by their names; empty if the names do not tell.

    Integrated columns are left out; columns of a total are preferred to those of orbitals; spins are added.
    """
    if len(names) < 2:
        return ()
    low = [_without_unit(name) for name in names]
    energies = [i for i, name in enumerate(low) if ENERGY.match(name)]
    if not energies or (energies[0] != 0 and len(energies) > 1):
        return ()
    energy = energies[0]
    values = [i for i in range(len(low)) if i != energy and not INTEGRATED.search(low[i])]
    if len(values) == 1:
        return (energy, values[0])
    bare = [_without_spin(name) for name in low]
    totals = [i for i in values if TOTAL.match(bare[i]) or not bare[i] or bare[i] == "spin"]
    orbitals = [i for i in values if ORBITAL.fullmatch(bare[i])]
    if one_or_both_spins(totals, low):
        return (energy, *totals)
    if not totals and len(orbitals) == len(values):
        return (energy, *orbitals)
    return (energy, *values) if one_or_both_spins(values, low) else ()


def are_orbitals(names: Sequence[str]) -> bool:
    """Whether columns are orbitals by their names, of whatever spin; not if they have none."""
    return bool(names) and all(ORBITAL.fullmatch(_without_spin(_without_unit(name))) for name in names)


def _without_unit(name: str) -> str:
    """The name of a column in small letters, without a unit in brackets."""
    return re.sub(r"[(\[](?:e|ev|(?:states|electrons|1/)[^)\]]*|arb[^)\]]*)[)\]]+", "", name.lower()).strip()


def _without_spin(name: str) -> str:
    return re.sub(r"[(\[_\s-]*(?:spin)?[\s_-]*(?:up|down|dn|dw|dwn)[)\]]?$", "", name).strip(" _-([")


def one_or_both_spins(columns: Sequence[int], names: Sequence[str]) -> bool:
    """Whether columns are a single one, or one of each spin."""
    if len(columns) == 2:
        return bool(UP.search(names[columns[0]]) and DOWN.search(names[columns[1]]))
    return len(columns) == 1


# -- programs ----------------------------------------------------------------------------------------------------------


def _espresso(table: Table, path: Path) -> Layout | None:
    """``dos.x`` and ``projwfc.x`` of Quantum ESPRESSO; dos.x tells the Fermi level, energies are absolute in both."""
    head = table.text
    if re.search(r"\bik\s+E \(eV\)", head):
        raise ValueError(f"{table.name} is resolved by k-point: run projwfc.x without kresolveddos")
    if not re.search(r"E \(eV\)\s+l?dos(?:up)?\(E\)", head):
        return None
    spins = 2 if re.search(r"dosup\(E\)", head) else 1
    columns, kind, source = tuple(range(spins + 1)), "total", "Quantum ESPRESSO projwfc.x"
    if "Int dos(E)" in head:
        source = "Quantum ESPRESSO dos.x"
        if table.rows.shape[1] != spins + 2:
            raise table.error(f"dos.x writes {spins + 2} columns here, not {table.rows.shape[1]}")
    elif "ldos" in head:
        kind = "site"
    elif re.search(r"E \(eV\)\s+dos\(E\)", head):  # noncollinear
        columns = (0, 1)
    numbers = re.search(r"EFermi\s*=\s*([-+.\d\s]+)", head)
    levels = numbers[1].split() if numbers else []
    if len(levels) > 1:
        raise ValueError(
            f"{table.name} has two Fermi levels, because its moment is fixed: give the zero as efermi= (--efermi)"
        )
    absolute = "Quantum ESPRESSO writes absolute energies, and no Fermi level in this file: "
    layout = Layout(source, columns, kind, float(levels[0]) if levels else None, absolute=absolute)
    if kind == "site" and (found := PROJECTION.fullmatch(path.name)):
        total = path.with_name(f"{found['prefix']}.pdos_tot")
        return replace(layout, siblings=_other_orbitals(path, found), total=total)
    return layout


# Name of a file of projwfc.x: "si.pdos_atm#1(Si)_wfc#2(p)", "(p_j1.5)" with spin-orbit coupling.
PROJECTION = re.compile(
    r"(?P<atom>(?P<prefix>.*)\.pdos_atm#\d+\([\w-]+\)_wfc#)(?P<orbital>\d+)\([\w.]+\)"
    r"(?P<ending>.*?)(?P<packed>\.(?:gz|bz2|xz))?"
)


def _other_orbitals(path: Path, own: re.Match[str]) -> tuple[Path, ...]:
    """Files beside `path`, whose name is `own`, of the atom's other orbitals, one for each, packed or not.

    A backup, or any other ending that Quantum ESPRESSO does not write, counts only where `path` has the same ending.
    """
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    known = [(found, other) for other in beside if (found := PROJECTION.fullmatch(other.name)) and other.is_file()]
    # Of two files of an orbital, the one that is named like `path`.
    known.sort(key=lambda k: (k[0]["ending"] != own["ending"], k[0]["packed"] != own["packed"], k[1]))
    orbitals = {own["orbital"]: path}
    for found, other in known:
        if found["atom"] == own["atom"] and found["ending"] in (own["ending"], ""):
            orbitals.setdefault(found["orbital"], other)
    return tuple(orbitals.values())[1:]


def _abinit(table: Table, path: Path) -> Layout | None:
    """ABINIT's ``_DOS``, ``_DOS_TOTAL`` and ``_DOS_AT0001``: absolute energies in Ha, with the Fermi level."""
    head = "\n".join(table.header)
    if "ABINIT package : DOS file" not in head:
        return None
    if "electrons/Hartree" not in head:
        raise table.error("its header does not count the DOS of ABINIT in electrons/Hartree")
    hartree = ENERGY_UNITS["ha"]
    level = re.search(r"Fermi energy\s*:\s*([-+\d.]+)", head)
    of_atom = "one atomic sphere" in head and "for atom number" in head
    notes = (
        ("states outside the sphere around the atom are not in the file (--electrons scales it)",) if of_atom else ()
    )
    return Layout(
        "ABINIT", tuple(range(6)) if of_atom else (0, 1), "site" if of_atom else "total",
        float(level[1]) * hartree if level else None, unit=hartree, assumed=notes, spin_blocks=True,
        absolute="ABINIT writes absolute energies, and no single Fermi level in this file: ",
    )  # fmt: skip


def _aims(table: Table, path: Path) -> Layout | None:
    """FHI-aims: relative to the chemical potential, but to the vacuum in ``*_raw.dat``."""
    head = table.text
    if "FHI-aims" not in head:
        return None
    total = bool(re.search(r"total density of states", head, re.IGNORECASE))
    spins = 2 if total and "spin down" in head else 1
    raw = "vacuum" in head
    beside = path.with_name(path.name.replace("_raw", ""))
    fix = f"read {beside.name}, or " if raw and beside != path and beside.is_file() else ""
    absolute = f"its energies are relative to the vacuum: {fix}" if raw else ""
    species = not total and re.search(r"species_proj|_l_proj_dos", path.name)
    assumed = ("a DOS of a species: the sum over its atoms",) if species else ()
    columns, kind, zero = tuple(range(spins + 1)), "total" if total else "site", None if raw else 0.0
    partner = None
    if re.search(r"spin-(?:up|down)", head):
        partner = other_spin(path, (("spin_up", "spin_down"), ("spin_up", "spin_dn")))
    return Layout("FHI-aims", columns, kind, zero, absolute=absolute, assumed=assumed, partner=partner)


def _optados(table: Table, path: Path) -> Layout | None:
    """OptaDOS: the zero depends on SET_EFERMI_ZERO, which the file does not tell."""
    if not re.search(r"O\s?p\s?t\s?a\s?D\s?O\s?S", table.text):
        return None
    text, count = "\n".join(table.header), table.rows.shape[1]
    if not re.search(r"partial|projected", text, re.IGNORECASE):
        both = bool(re.search(r"down[- ]spin", text, re.IGNORECASE)) and count > 3
        return Layout("OptaDOS", (0, 1, 2) if both else (0, 1), "total")
    blocks = re.split(r"Column:?\s*(\d+)\s*contains:?", text)
    atoms = [sorted(set(re.findall(r"\b([A-Z][a-z]?)\s+(\d+)\b", block))) for block in blocks[2::2]]
    of_one_atom = len(atoms) == count - 1 and all(len(a) == 1 and a == atoms[0] for a in atoms)
    return Layout("OptaDOS", tuple(range(count)) if of_one_atom or count == 2 else (), "site")


def _vaspkit(table: Table, path: Path) -> Layout | None:
    """VASPKIT's ``TDOS.dat`` and ``PDOS_*.dat``: relative to the Fermi level; spin down is negative."""
    names = [name.lower() for name in table.names]
    total = len(names) > 1 and names[0] == "energy" and names[1] in ("tdos", "tdos-up")
    orbitals = len(names) > 3 and names[0] == "energy" and names[1] == "s" and names[-1] in ("tot", "total")
    orbitals = orbitals and (path.name.startswith("PDOS") or "dxy" in names)
    if not (total or orbitals):
        return None
    if re.match(r"I(?:TDOS|PDOS|DOS)", path.name):
        raise ValueError(f"{table.name} is an integrated DOS: give {path.name[1:]}")
    element, partner = None, None
    if orbitals:
        partner = other_spin(path, (("_UP", "_DW"), ("_UP", "_DN"), ("_up", "_dw")))
        element = re.match(r"PDOS_(?!A[_.])([A-Z][a-z]?)(?:_|\.)", path.name)
    layout = _from_vasp("VASPKIT", named_columns(table.names), total, element[1] if element else None)
    return replace(layout, partner=partner)


def _sumo(table: Table, path: Path) -> Layout | None:
    """sumo's ``*_dos.dat``: relative to the Fermi level; spin down is negative."""
    names = table.names
    if not (path.stem.endswith("_dos") and len(names) > 1 and names[0] == "energy"):
        return None
    bare = [re.sub(r"\((?:up|down)\)$", "", name) for name in names[1:]]
    total = set(bare) == {"dos"}
    if not total and not all(ORBITAL.fullmatch(name) or name in ("f_3", "f_2", "f_1") for name in bare):
        return None
    element = None if total else path.stem.removesuffix("_dos").split("_")[-1]
    return _from_vasp("sumo", tuple(range(len(names))), total, element)


def _pyprocar(table: Table, path: Path) -> Layout | None:
    """pyprocar's export: relative to the Fermi level; spin down is negative."""
    names = list(table.names)
    spins = [i for i, name in enumerate(names) if re.fullmatch(r"dosTotalSpin-\d", name)]
    channels = [i for i, name in enumerate(names) if name.startswith("spinChannel-")]
    if "energies" not in names or not (spins or channels):
        return None
    energy = names.index("energies")
    what = {re.sub(r"^spinChannel-\d", "", names[i]) for i in channels}
    total = not channels
    columns = (energy, *(channels or spins)) if total or len(what) == 1 else ()
    return _from_vasp("pyprocar", columns, total)


def _from_vasp(program: str, columns: tuple[int, ...], total: bool, element: str | None = None) -> Layout:
    """Of a program that rewrites VASP's DOS relative to the Fermi level: a total, or all atoms of an element."""
    assumed = [f"zero at the Fermi level, as {program} writes unless told otherwise"]
    if element is not None:
        assumed.append(f"one {element} in the cell, as the file adds all {element} atoms")
    kind = "total" if total else "site"
    return Layout(program, columns, kind, 0.0, first_pile=True, assumed=tuple(assumed))


def other_spin(path: Path, pairs: Sequence[tuple[str, str]]) -> Path | None:
    """File of the other spin beside `path`; None where its name has no mark of a spin.

    The first name that could be meant is returned where there is no such file.
    """
    candidates = [path.with_name(path.name.replace(a, b)) for up, down in pairs for a, b in ((up, down), (down, up))]
    candidates = [other for other in candidates if other != path]
    return next((other for other in candidates if other.is_file()), candidates[0] if candidates else None)


# -- any other table ---------------------------------------------------------------------------------------------------


def _unknown(table: Table) -> Layout:
    """A table that no program is known for: what its header says."""
    text = f"{table.text} "
    unit, columns = None, named_columns(table.names)
    energy = table.names[columns[0] if columns else 0] if table.names else ""
    if found := re.search(r"[(\[]\s*([A-Za-z/]+)\s*[)\]]", energy):
        unit = ENERGY_UNITS.get(found[1].lower())
        if unit is None and not re.fullmatch(r"e|ef|efermi|fermi", found[1], re.IGNORECASE):
            raise table.error(f"energies in {found[1]!r}: give them in eV, meV, Ry or Ha")
    kind = "total" if re.search(r"\btotal[ _-]dos|\btdos\b|total density of states", text, re.IGNORECASE) else None
    notes: tuple[str, ...] = ()
    if kind is None and PER_CELL.search(text) and not OF_SITE.search(text):
        kind, notes = "total", ("counted per cell in its header, so taken as the total DOS",)
    per_spin = bool(claims(PER_SPIN, header_lines(table))[0])
    zero, per = zero_of_header(table, unit), _counted_per(table)
    return Layout(columns=columns, kind=kind, unit=unit, per=per, per_spin=per_spin, notes=notes, **zero)


def _counted_per(table: Table) -> float | None:
    """eV of the unit that states are counted per: of the names of the columns, else of the header; eV if among them."""
    for text in (" ".join(table.names), table.text):
        if units := [ENERGY_UNITS[found[found.lastindex or 0].lower()] for found in PER_UNIT.finditer(text)]:
            return 1.0 if 1.0 in units else units[0]
    return None
