"""A DOS in columns of text or CSV, from the programs that `layouts` knows or from anywhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dosmatgen_ase.dos.broadening import scale_sites_to_total
from dosmatgen_ase.dos.checks import gap_at_zero
from dosmatgen_ase.dos.grid import GAP_DOS, Array, Mask
from dosmatgen_ase.dos.readers.common import Content, Request, clip_negative_lobes, drawn_down, naming, record
from dosmatgen_ase.dos.readers.layouts import DOWN, UP, Layout, are_orbitals, layout_of
from dosmatgen_ase.dos.readers.numbers import Table, counted, read_table
from dosmatgen_ase.dos.readers.zeros import ENERGY_UNITS
from dosmatgen_ase.dos.target import TargetDOS

Curve = tuple[Array, Array]
SPINS = ("summed", "one", "separate")
MAX_ENERGY = 1e6  # eV; the deepest level of any atom lies at 1e5
USUAL_SPAN = (2.0, 1000.0)  # eV that a DOS covers; a valence band in Ry or Ha covers less, one in meV more
SAME = 0.2  # relative difference below which two values at every energy may be one, written twice


def read_text(content: Content, request: Request) -> TargetDOS:
    """Read columns from a file whose folder may hold the other spin or the other orbitals."""
    if request.site is not None:
        raise ValueError(f"{content.name} is a two-column file with one DOS: leave out site")
    _check(request)
    table = read_table(content)
    layout = layout_of(table, Path(content.name))
    reading = _Reading(table, layout, request, (), [*table.notes, *layout.notes], list(layout.assumed))
    reading.columns = _columns(reading)
    energies, values, known = _all_files(reading)
    zero, reference = _zero(reading)
    energies = energies - zero
    if zero:
        reading.steps.append(f"zero of energy at {zero:g} eV ({reference})")
    values, note = clip_negative_lobes(values)
    if (values < 0).any():
        worst = int(np.nanargmin(values))
        raise table.error(
            f"the DOS is {values[worst]:g} at {energies[worst]:g} eV: values must not be negative, and "
            "smearing does not make that much: is it a difference of spins, or a column of something else (--columns)?"
        )
    known = known & _known(energies, values, layout)
    kind = request.kind or layout.kind or "site"
    if kind != (request.kind or layout.kind):
        reading.assumed.append("the DOS of one site")
    if not layout.by_program and values[known].size and values[known].max() in (1.0, 100.0):
        reading.assumed.append(
            f"states/eV, although the largest value is {values[known].max():g} sharp (scale it: --electrons)"
        )
    told = record(f"{layout.source} {content.basename}", [*reading.steps, *note], reading.assumed)
    with naming(table.name):
        target = TargetDOS(energies, values, known, reference, request.sigma, kind, told)
    settled = request.reference is None and request.efermi is None and layout.by_program and kind == "total"
    return target.aligned() if settled and gap_at_zero(target) else target


@dataclass
class _Reading:
    """What the functions below hand on: what the file says, what the caller says, and what is to be told of both."""

    table: Table
    layout: Layout
    request: Request
    columns: tuple[int, ...]  # of the energy, then those that add up to the DOS
    steps: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Of the columns that add up to the DOS; empty if columns have no names."""
        return [self.table.names[i] for i in self.columns[1:]] if self.table.names else []


def _check(request: Request) -> None:
    """Raise ValueError for a stated fact that cannot be."""
    move = ": to any other zero give the Fermi level on its scale, efermi= (--efermi)"
    for name, known in (("reference", ("fermi", "vbm")), ("kind", ("site", "total")), ("spin", SPINS)):
        if (value := getattr(request, name)) is not None and value not in known:
            fix = move if name == "reference" else ""
            raise ValueError(f"{name} must be {' or '.join(repr(k) for k in known)}, not {value!r}{fix}")
    if request.units is not None and str(request.units).lower() not in ENERGY_UNITS:
        raise ValueError(f"units must be eV, meV, Ry or Ha, not {request.units!r}")
    if request.efermi is not None and not math.isfinite(request.efermi):
        raise ValueError(f"efermi must be an energy in eV, not {request.efermi!r}")
    if (columns := request.columns) is not None:
        listed = isinstance(columns, list | tuple) and len(columns) > 1
        if not listed or any(isinstance(c, bool) or not isinstance(c, int | str) for c in columns):
            what = "two or more columns by number (from 0) or name, energy first"
            raise ValueError(f"columns must be {what}, not {columns!r}")


# -- columns -----------------------------------------------------------------------------------------------------------


def _columns(reading: _Reading) -> tuple[int, ...]:
    """Numbers of the columns of energy and DOS."""
    table, layout = reading.table, reading.layout
    count = table.rows.shape[1]
    if count < 2:
        raise table.error(f"{counted(count)}; a DOS needs two, energy and states/eV", 0)
    if reading.request.columns is not None:
        return tuple(_column(c, table) for c in reading.request.columns)
    if layout.columns:
        if max(layout.columns) >= count:
            least = f"{layout.source} writes at least {max(layout.columns) + 1}"
            raise table.error(f"{count} columns, but {least}: copy the file again", 0)
        return layout.columns
    columns: tuple[int, ...] = (0, 1)
    if count > 2:
        columns = _columns_by_values(table)
        if left := [i for i in range(1, count) if i not in columns]:
            reading.steps.append(f"integrated DOS in columns {', '.join(map(str, left))} left out")
    elif np.any(table.rows[1:, 0] < table.rows[:-1, 0]) and np.all(table.rows[1:, 1] > table.rows[:-1, 1]):
        raise table.error(
            "column 1 increases and column 0 does not: if column 1 is the energy, say columns=(1, 0) "
            "(--columns 1,0); else sort the rows"
        )
    reading.assumed.append(f"energy in column {columns[0]}, DOS in column {' and '.join(map(str, columns[1:]))}")
    return columns


def _column(column: int | str, table: Table) -> int:
    """Number of a column that is given by number or name."""
    count = table.rows.shape[1]
    if isinstance(column, str):
        matches = [i for i, name in enumerate(table.names) if name.lower() == column.strip().lower()]
        if len(matches) != 1:
            named_as = f"they are named {', '.join(table.names)}" if table.names else "they have no names"
            raise table.error(f"{len(matches)} columns are named {column!r}: {named_as}")
        return matches[0]
    if not 0 <= column < count:
        raise table.error(f"{counted(count)}, numbered from 0: there is no {column}", 0)
    return column


def _columns_by_values(table: Table) -> tuple[int, ...]:
    """Columns of a table without telling names, by what is certain: integrals, and a spin drawn downwards."""
    rows = table.rows[np.isfinite(table.rows).all(axis=1)]
    if not table.names and len(rows) >= 3:
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        steps, values = np.diff(rows[:, 0]), rows[:, 1:]
        integrals = np.cumsum(values[1:] * steps[:, None], axis=0)

        def is_integral(of: int, column: int) -> bool:
            rise = values[1:, column] - values[0, column]
            return bool(rise[-1] > 0 and np.all(np.abs(rise - integrals[:, of]) <= 0.02 * abs(rise[-1])))

        if values.shape[1] == 2 and is_integral(0, 1):
            return (0, 1)
        if values.shape[1] == 4 and is_integral(0, 2) and is_integral(1, 3):
            return (0, 1, 2)
        if values.shape[1] == 2 and values[:, 0].sum() > 0 and drawn_down(values[:, 1]):
            return (0, 1, 2)
    count = table.rows.shape[1]
    names = f" ({', '.join(table.names)})" if table.names else ""
    pair = "; columns=(0, 1, 2) adds two spins" if count == 3 else ""
    told = f"{count} columns{names}: say which hold energy and DOS"
    raise table.error(f"{told}, as in columns=(0, 1) (--columns 0,1){pair}", 0)


# -- values ------------------------------------------------------------------------------------------------------------


def _all_files(reading: _Reading) -> tuple[Array, Array, Mask]:
    """Energies, values, and where these can be relied on, of this file and of those beside it that belong to it."""
    layout, request = reading.layout, reading.request
    curve = _curve(reading)
    if (partner := layout.partner) is not None and request.spin is None:
        if not partner.is_file():
            fix = f'put {partner.name} beside it, or say spin="one" (--spin one) if both are alike'
            raise ValueError(f"{reading.table.name} holds one spin: {fix}")
        reading.steps.append(f"the other spin added from {partner.name}")
        curve = _added(reading, curve, partner)
    if layout.siblings and request.columns is None:
        for sibling in layout.siblings:
            curve = _added(reading, curve, sibling)
        reading.steps.append(f"orbitals of one atom added from {len(layout.siblings) + 1} files")
    if layout.total is not None and request.columns is None:
        return _scaled_to_total(reading, curve, layout.total)
    return *curve, np.ones(curve[0].shape, dtype=bool)


def _curve(reading: _Reading) -> Curve:
    """Energies (eV, increasing) and values (states/eV, spins added) of the chosen columns; NaN where unknown."""
    table, layout, request = reading.table, reading.layout, reading.request
    columns = reading.columns
    unit, per = _units(reading)
    energies = table.rows[:, columns[0]] * unit
    if (absent := np.flatnonzero(np.isnan(energies))).size:
        raise table.error("there is no energy", absent[0])
    if (far := np.flatnonzero(np.abs(energies) > MAX_ENERGY)).size:
        told = f"{energies[far[0]]:g} eV is no energy of an electron"
        raise table.error(f"{told}: are the energies in eV (--units)?", far[0])
    if not (request.units or layout.unit or layout.by_program):
        span = float(np.ptp(energies))
        usual = USUAL_SPAN[0] <= span <= USUAL_SPAN[1]
        doubt = "" if usual else f", although the energies span {span:.3g} (if they are in meV, Ry or Ha: --units)"
        told = "eV and states/eV" if per == 1.0 else f"energies in eV, states per {per:g} eV"
        reading.assumed.append(f"{told}{doubt}")
    values = _spins_added(reading, table.rows[:, list(columns[1:])].T / per)
    energies, values = _sorted(reading, energies, values)
    if request.spin is None and layout.partner is None:
        in_rows = any(step.startswith("two spins in") for step in reading.steps)
        if lone := _lone_spin(reading, in_rows):
            raise table.error(
                f"{lone}: add the other (columns=(0, 1, 2), --columns), or say "
                'spin="one" (--spin one) if both are alike'
            )
        if len(columns) == 2 and not layout.by_program and not in_rows:
            reading.assumed.append("both spins in the DOS")
    if request.spin == "one":
        reading.steps.append("one spin, doubled")
        values = 2.0 * values
    return energies, values


def _units(reading: _Reading) -> tuple[float, float]:
    """eV of the unit of energy, and of the unit that states are counted per; what the caller says comes first."""
    layout, request = reading.layout, reading.request
    unit = ENERGY_UNITS[request.units.lower()] if request.units else layout.unit or 1.0
    per = layout.per or unit
    if request.units and per != unit:
        told = f"states per {unit:g} eV, as units says"
        reading.assumed.append(f"{told}, although the header counts them per {per:g} eV")
        per = unit
    if unit != 1.0:
        reading.steps.append(f"energies converted from units of {unit:g} eV, the DOS from states per {per:g} eV")
    elif per != 1.0:
        reading.steps.append(f"the DOS converted from states per {per:g} eV")
    return unit, per


def _lone_spin(reading: _Reading, in_rows: bool) -> str:
    """What says that the columns hold one spin of two (in rows: not); empty if nothing does."""
    names, columns = reading.names, reading.columns[1:]
    spins = _spins_named(names)
    if (len(columns) > 1 and not are_orbitals(names)) or len(spins) == 2:
        return ""
    if spins:
        return f"column {', '.join(map(str, columns))} ({', '.join(names)}) is one spin"
    return "its header counts states per spin" if reading.layout.per_spin and not in_rows else ""


def _spins_named(names: Sequence[str]) -> set[str]:
    """Spins that are in the names of columns."""
    marks = {"up": UP, "down": DOWN}
    return {spin for spin, mark in marks.items() if any(mark.search(name.lower()) for name in names)}


def _spins_added(reading: _Reading, parts: Array) -> Array:
    """Sum of the columns (C, N), those that are drawn downwards turned up."""
    table, spin, names = reading.table, reading.request.spin, reading.names
    several = len(parts) > 1
    down = [i for i, part in enumerate(parts) if drawn_down(part)]
    if not several and np.unique(table.rows[:, reading.columns[0]]).size == len(table.rows):  # no spin in other rows
        if down and spin != "one" and reading.layout.partner is None:
            raise table.error(
                "the DOS is negative. A spin drawn downwards is half of it: give both spins "
                '(columns=(0, 1, 2), --columns), or say spin="one" (--spin one) if both are alike'
            )
        if spin == "separate":
            needed = "needs two columns of DOS (columns=(0, 1, 2), --columns) or two rows at every energy"
            raise table.error(f'spin="separate" {needed}')
    if spin == "one" and several and not (are_orbitals(names) and len(_spins_named(names)) < 2):
        raise table.error(f'spin="one" goes with one column of DOS, not with {len(parts)}')
    signs = np.ones((len(parts), 1))
    if several or spin == "one":  # otherwise the other spin stands in other rows, or in another file
        signs[down] = -1.0
    if several:
        told = "spins added" if len(parts) == 2 else "columns added"
        listed = ", ".join(names or map(str, reading.columns[1:]))
        reading.steps.append(f"{told}: {listed}{'; down was drawn downwards' if down else ''}")
    summed: Array = (signs * parts).sum(axis=0)
    return summed


def _sorted(reading: _Reading, energies: Array, values: Array) -> Curve:
    """Rows in the order of energy; two at every energy are two spins, added."""
    table, spin, lines = reading.table, reading.request.spin, reading.table.lines
    falls, half = np.count_nonzero(energies[1:] < energies[:-1]), len(energies) // 2
    blocks = falls == 1 and np.array_equal(energies[:half], energies[half:])
    if falls:
        order = np.argsort(energies, kind="stable")
        energies, values, lines = energies[order], values[order], lines[order]
        if not blocks:
            reading.steps.append("rows sorted by energy")
    twice = np.flatnonzero(np.diff(energies) == 0)
    if not twice.size:
        if len(energies) < 2:
            raise table.error(f"a DOS needs at least 2 energies, not {energies.size}", 0)
        return energies, values
    where = f"lines {lines[twice[0]]} and {lines[twice[0] + 1]}"
    again = f"{table.name}, {where}: the energy {energies[twice[0]]:g} eV is there twice"
    pairs = np.array_equal(energies[::2], energies[1::2])
    if not pairs or (np.diff(energies[::2]) == 0).any() or len(energies) < 4 or spin in ("summed", "one"):
        raise ValueError(f"{again}: keep one row for each energy (or two, one for each spin)")
    high, low = np.maximum(values[::2], values[1::2]), np.minimum(values[::2], values[1::2])
    down = drawn_down(low)
    alike = np.nansum(high - low) <= SAME * np.nansum(np.abs(high))
    expected = blocks if reading.layout.spin_blocks else not reading.layout.by_program
    if not expected or (alike and not blocks and spin != "separate"):
        raise ValueError(f'{again}: if they are two spins, say spin="separate" (--spin separate); else keep one row')
    how = "in two blocks" if blocks else "in two rows at each energy"
    reading.steps.append(f"two spins {how}, added{'; down was drawn downwards' if down else ''}")
    return energies[::2], high - low if down else high + low


def _added(reading: _Reading, curve: Curve, path: Path) -> Curve:
    """Add the same columns of another file of the same program."""
    columns, layout = reading.columns, reading.layout
    table = read_table(Content.of(path))
    if table.rows.shape[1] <= max(columns):
        raise table.error(f"only {table.rows.shape[1]} columns", 0)
    one_spin = len(columns) == 2 and layout.partner is not None
    quiet = replace(reading.request, spin="one" if one_spin else None)
    energies, values = _curve(_Reading(table, layout, quiet, columns))
    if curve[0].shape != energies.shape or not np.allclose(curve[0], energies, atol=1e-6):
        names = f"{reading.table.name} and {path.name}"
        raise ValueError(f"{names} have different energies: they are not of one calculation")
    own = -curve[1] if drawn_down(curve[1]) else curve[1]
    return curve[0], np.abs(values / 2.0 if one_spin else values) + own


def _scaled_to_total(reading: _Reading, curve: Curve, path: Path) -> tuple[Array, Array, Mask]:
    """Scale a site's projections by the file of the total and of all projections, if there is one."""
    name, (energies, values) = reading.table.name, curve
    if not path.is_file():
        reading.steps.append(f"raw projection: there is no {path.name} to scale it by")
        return energies, values, np.ones(energies.shape, dtype=bool)
    rows = read_table(Content.of(path)).rows
    if rows.shape[1] not in (3, 5) or len(rows) != len(energies):
        raise ValueError(f"{name} and {path} do not fit together: they are not of one calculation")
    if not np.allclose(rows[:, 0], energies, atol=1e-6):
        raise ValueError(f"{name} and {path} have different energies: they are not of one calculation")
    total, projected = (part.sum(axis=1) for part in np.split(rows[:, 1:], 2, axis=1))
    sites = np.maximum([values, projected - values], 0.0)
    scaled, known = scale_sites_to_total(sites, np.maximum(total, 0.0), energies=rows[:, 0])
    reading.steps.append(f"scaled by the ratio of the total to all projections in {path.name}")
    return energies, scaled[0], known


# -- zero and window ---------------------------------------------------------------------------------------------------


def _zero(reading: _Reading) -> tuple[float, str]:
    """Energy of the zero on the scale of the file, and what it is."""
    table, layout, request = reading.table, reading.layout, reading.request
    if request.efermi is not None:
        zero = float(request.efermi)
        if zero and ENERGY_UNITS.get(str(request.units).lower(), layout.unit) not in (None, 1.0):
            reading.assumed.append(f"efermi {zero:g} in eV, although the energies are not")
        return zero, request.reference or "fermi"
    if request.reference is not None:
        if layout.zero and request.reference != layout.reference:
            told = f"{layout.source} gives the Fermi level, {layout.zero:g} eV, not the valence-band maximum"
            raise table.error(f"{told}: give its energy, as in reference='vbm', efermi=...  (--efermi)")
        return layout.zero or 0.0, request.reference
    if layout.absolute and layout.zero is None:
        raise table.error(
            f"{layout.absolute}give the Fermi level on its scale as efermi= (--efermi), or say "
            'reference="fermi" or "vbm" (--reference) if its energies are relative to that'
        )
    if layout.zero is None:
        reading.assumed.insert(0, "zero of energy at the Fermi level")
    return layout.zero or 0.0, layout.reference


def _known(energies: Array, values: Array, layout: Layout) -> Mask:
    """Energies at which the file tells the DOS."""
    known = ~np.isnan(values)
    states = np.flatnonzero(known & (values >= GAP_DOS))
    if layout.by_program and states.size:
        known &= energies <= energies[states[-1]]  # bands are missing above
    if layout.first_pile and values[0] >= GAP_DOS and known[1:].any():
        known[0] = False  # the states below the window are piled up there
    return known
