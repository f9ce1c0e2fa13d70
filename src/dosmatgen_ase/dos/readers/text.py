"""A DOS in columns of text or CSV, from the programs that `layouts` knows or from anywhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

import numpy as np

from dosmatgen_ase.dos.broadening import scale_sites_to_total
from dosmatgen_ase.dos.checks import gap_at_zero
from dosmatgen_ase.dos.grid import GAP_DOS, Array, Mask
from dosmatgen_ase.dos.readers.common import Request, clip_negative_lobes, named, read_bytes, record
from dosmatgen_ase.dos.readers.layouts import DOWN, UP, Layout, are_orbitals, layout_of
from dosmatgen_ase.dos.readers.numbers import Table, counted, read_table
from dosmatgen_ase.dos.readers.zeros import ENERGY_UNITS
from dosmatgen_ase.dos.target import TargetDOS

SPINS = ("summed", "one", "separate")
MAX_ENERGY = 1e6
"""eV; the deepest level of any atom lies at 1e5."""

USUAL_SPAN = (2.0, 1000.0)
"""Energies that a DOS in eV covers. A valence band in Ry or Ha covers less, one in meV more."""

SAME = 0.2
"""Relative difference below which two values at every energy may be one, written twice."""


def read_text(path: str | PathLike[str], request: Request) -> TargetDOS:
    """What `TargetDOS.from_text` does."""
    return parse_text(read_bytes(path), path, request)


def parse_text(content: bytes, path: str | PathLike[str], request: Request) -> TargetDOS:
    """Read the bytes of the file at `path`, whose folder may hold the other spin or the other orbitals."""
    _check(request)
    table = read_table(content, str(path))
    layout = layout_of(table, Path(path))
    steps, assumed = [*table.notes, *layout.notes], list(layout.assumed)
    columns = _columns(table, layout, request, steps, assumed)
    curve = _curve(table, columns, layout, request, steps, assumed)
    if layout.partner is not None and request.spin is None:
        curve = _with_partner(curve, table, columns, layout, request, steps)
    for sibling in layout.siblings if request.columns is None else ():
        curve = _add(curve, _other(sibling, columns, layout, request), f"{table.name} and {sibling.name}")
    if layout.siblings and request.columns is None:
        steps.append(f"orbitals of one atom added from {len(layout.siblings) + 1} files")
    trusted = None
    if layout.total is not None and request.columns is None:
        curve, trusted = _scaled_to_total(curve, layout.total, table.name, steps)
    zero, reference = _zero(table.name, layout, request, assumed)
    if request.efermi and ENERGY_UNITS.get(str(request.units).lower(), layout.unit) not in (None, 1.0):
        assumed.append(f"efermi {zero:g} in eV, although the energies are not")
    energies, values = curve[0] - zero, curve[1]
    if zero:
        steps.append(f"zero of energy at {zero:g} eV ({reference})")
    values, note = clip_negative_lobes(values)
    if (values < 0).any():
        worst = int(np.nanargmin(values))
        raise ValueError(
            f"{table.name}: the DOS is {values[worst]:g} at {energies[worst]:g} eV: values must not be negative, and "
            "smearing does not make that much: is it a difference of spins, or a column of something else (--columns)?"
        )
    known = _known(energies, values, layout)
    if trusted is not None:
        known &= trusted
    kind = request.kind or layout.kind or "site"
    if kind != (request.kind or layout.kind):
        assumed.append("the DOS of one site")
    if layout.source == "text" and values[known].size and values[known].max() in (1.0, 100.0):
        assumed.append(
            f"states/eV, although the largest value is {values[known].max():g} sharp (scale it: --electrons)"
        )
    told = record(f"{layout.source} {Path(path).name}", [*steps, *note], assumed)
    target = named(table.name, TargetDOS, energies, values, known, reference, request.sigma, kind, told)
    settled = request.reference is None and request.efermi is None and layout.periodic and kind == "total"
    return target.aligned() if settled and gap_at_zero(target) else target


def _check(request: Request) -> None:
    """Raise ValueError for a stated fact that cannot be."""
    for name, known in (("reference", ("fermi", "vbm")), ("kind", ("site", "total")), ("spin", SPINS)):
        if (value := getattr(request, name)) is not None and value not in known:
            fix = (
                ": to any other zero give the Fermi level on its scale, efermi= (--efermi)"
                if name == "reference"
                else ""
            )
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


def _columns(table: Table, layout: Layout, request: Request, steps: list[str], assumed: list[str]) -> tuple[int, ...]:
    """Numbers of the columns of energy and DOS."""
    count = table.rows.shape[1]
    if count < 2:
        told = f"{counted(count)}; a DOS needs two, energy and states/eV"
        raise ValueError(f"{table.name}, line {table.lines[0]}: {told}")
    if request.columns is not None:
        return tuple(_column(c, table) for c in request.columns)
    if layout.columns:
        if max(layout.columns) >= count:
            told = f"{count} columns, but {layout.source} writes at least {max(layout.columns) + 1}"
            raise ValueError(f"{table.name}, line {table.lines[0]}: {told}: copy the file again")
        return layout.columns
    columns: tuple[int, ...] = (0, 1)
    if count > 2:
        columns = _columns_by_values(table)
        left = [i for i in range(1, count) if i not in columns]
        if left:
            steps.append(f"integrated DOS in columns {', '.join(map(str, left))} left out")
        if not columns:
            raise ValueError(_ask_for_columns(table))
    elif np.any(table.rows[1:, 0] < table.rows[:-1, 0]) and np.all(table.rows[1:, 1] > table.rows[:-1, 1]):
        raise ValueError(
            f"{table.name}: column 1 increases and column 0 does not: if column 1 is the energy, say columns=(1, 0) "
            "(--columns 1,0); else sort the rows"
        )
    assumed.append(f"energy in column {columns[0]}, DOS in column {' and '.join(map(str, columns[1:]))}")
    return columns


def _column(column: int | str, table: Table) -> int:
    """Number of a column that is given by number or name."""
    count = table.rows.shape[1]
    if isinstance(column, str):
        matches = [i for i, name in enumerate(table.names) if name.lower() == column.strip().lower()]
        if len(matches) != 1:
            named_as = f"they are named {', '.join(table.names)}" if table.names else "they have no names"
            raise ValueError(f"{table.name}: {len(matches)} columns are named {column!r}: {named_as}")
        return matches[0]
    if not 0 <= column < count:
        told = f"{counted(count)}, numbered from 0: there is no {column}"
        raise ValueError(f"{table.name}, line {table.lines[0]}: {told}")
    return column


def _columns_by_values(table: Table) -> tuple[int, ...]:
    """Columns of a table without telling names, by what is certain: integrals, and a spin drawn downwards."""
    rows = table.rows[np.isfinite(table.rows).all(axis=1)]
    if table.names or len(rows) < 3:
        return ()
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
    if values.shape[1] == 2 and values[:, 0].sum() > 0 and _drawn_down(values[:, 1]):
        return (0, 1, 2)
    return ()


def _ask_for_columns(table: Table) -> str:
    count = table.rows.shape[1]
    names = f" ({', '.join(table.names)})" if table.names else ""
    pair = "; columns=(0, 1, 2) adds two spins" if count == 3 else ""
    return (
        f"{table.name}, line {table.lines[0]}: {count} columns{names}: say which hold energy and DOS, as in "
        f"columns=(0, 1) (--columns 0,1){pair}"
    )


# -- values ------------------------------------------------------------------------------------------------------------


def _drawn_down(values: Array) -> bool:
    """Whether values are those of a spin drawn downwards: what smearing makes negative is far less than the rest."""
    return bool(-values[values < 0].sum() > 5 * values[values > 0].sum())


def _curve(
    table: Table, columns: tuple[int, ...], layout: Layout, request: Request, steps: list[str], assumed: list[str]
) -> tuple[Array, Array]:
    """Energies (eV, increasing) and values (states/eV, spins added) of the chosen columns; NaN where unknown."""
    unit, per = _units(layout, request, steps, assumed)
    energies = table.rows[:, columns[0]] * unit
    if np.isnan(energies).any():
        line = table.lines[np.flatnonzero(np.isnan(energies))[0]]
        raise ValueError(f"{table.name}, line {line}: there is no energy")
    if (far := np.flatnonzero(np.abs(energies) > MAX_ENERGY)).size:
        told = f"{energies[far[0]]:g} eV is no energy of an electron: are the energies in eV (--units)?"
        raise ValueError(f"{table.name}, line {table.lines[far[0]]}: {told}")
    if not request.units and layout.unit is None:
        span = float(np.ptp(energies))
        usual = USUAL_SPAN[0] <= span <= USUAL_SPAN[1]
        doubt = "" if usual else f", although the energies span {span:.3g} (if they are in meV, Ry or Ha: --units)"
        told = "eV and states/eV" if per == 1.0 else f"energies in eV, states per {per:g} eV"
        assumed.append(f"{told}{doubt}")
    parts = table.rows[:, list(columns[1:])].T / per
    values = _spins_added(table, columns, parts, layout, request, steps)
    energies, values = _sorted(table, energies, values, layout, request, steps)
    if request.spin is None and layout.partner is None:
        if lone := _lone_spin(table, columns, layout, steps):
            raise ValueError(
                f"{table.name}: {lone}: add the other (columns=(0, 1, 2), --columns), or say "
                'spin="one" (--spin one) if both are alike'
            )
        if len(columns) == 2 and layout.source == "text" and not any("spins" in step for step in steps):
            assumed.append("both spins in the DOS")
    if request.spin == "one":
        steps.append("one spin, doubled")
        values = 2.0 * values
    return energies, values


def _units(layout: Layout, request: Request, steps: list[str], assumed: list[str]) -> tuple[float, float]:
    """eV of the unit of energy, and of the unit that states are counted per; what the caller says comes first."""
    unit = ENERGY_UNITS[request.units.lower()] if request.units else layout.unit or 1.0
    if not request.units:
        per = layout.per or unit
    else:
        per = unit
        if layout.per not in (None, unit):
            assumed.append(
                f"states per {unit:g} eV, as units says, although the header counts them per {layout.per:g} eV"
            )
    if unit != 1.0:
        steps.append(f"energies converted from units of {unit:g} eV, the DOS from states per {per:g} eV")
    elif per != 1.0:
        steps.append(f"the DOS converted from states per {per:g} eV")
    return unit, per


def _lone_spin(table: Table, columns: tuple[int, ...], layout: Layout, steps: list[str]) -> str:
    """What says that the columns hold one spin of two; empty if nothing does."""
    names = [table.names[i] for i in columns[1:]] if table.names else []
    spins = _spins_named(names)
    if (len(columns) > 2 and not are_orbitals(names)) or len(spins) == 2:
        return ""
    if spins:
        return f"column {', '.join(map(str, columns[1:]))} ({', '.join(names)}) is one spin"
    in_rows = any(step.startswith("two spins in") for step in steps)
    return "its header counts states per spin" if layout.per_spin and not in_rows else ""


def _spins_named(names: Sequence[str]) -> set[str]:
    """Spins that are in the names of columns."""
    marks = {"up": UP, "down": DOWN}
    return {spin for spin, mark in marks.items() if any(mark.search(name.lower()) for name in names)}


def _spins_added(
    table: Table, columns: tuple[int, ...], parts: Array, layout: Layout, request: Request, steps: list[str]
) -> Array:
    """Sum of the columns (C, N), those that are drawn downwards turned up."""
    down = [i for i, part in enumerate(parts) if _drawn_down(part[np.isfinite(part)])]
    repeated = np.unique(table.rows[:, columns[0]]).size < len(table.rows)  # the other spin may stand in other rows
    alone = len(parts) == 1 and request.spin != "one" and layout.partner is None
    if down and alone and not repeated:
        raise ValueError(
            f"{table.name}: the DOS is negative. A spin drawn downwards is half of it: give both spins "
            '(columns=(0, 1, 2), --columns), or say spin="one" (--spin one) if both are alike'
        )
    if request.spin == "separate" and len(parts) == 1 and not repeated:
        needed = "needs two columns of DOS (columns=(0, 1, 2), --columns) or two rows at every energy"
        raise ValueError(f'{table.name}: spin="separate" {needed}')
    names = [table.names[i] for i in columns[1:]] if table.names else []
    if request.spin == "one" and len(parts) > 1 and not (are_orbitals(names) and len(_spins_named(names)) < 2):
        raise ValueError(f'{table.name}: spin="one" goes with one column of DOS, not with {len(parts)}')
    signs = np.ones((len(parts), 1))
    if len(parts) > 1 or request.spin == "one":  # otherwise the other spin stands in other rows, or in another file
        signs[down] = -1.0
    if len(parts) > 1:
        told = "spins added" if len(parts) == 2 else "columns added"
        listed = ", ".join(table.names[i] if table.names else str(i) for i in columns[1:])
        steps.append(f"{told}: {listed}{'; down was drawn downwards' if down else ''}")
    summed: Array = (signs * parts).sum(axis=0)
    return summed


def _sorted(
    table: Table, energies: Array, values: Array, layout: Layout, request: Request, steps: list[str]
) -> tuple[Array, Array]:
    """Rows in the order of energy; two at every energy are two spins, added."""
    lines = table.lines
    if np.any(energies[1:] < energies[:-1]):
        order = np.argsort(energies, kind="stable")
        blocks = np.count_nonzero(energies[1:] < energies[:-1]) == 1 and len(energies) % 2 == 0
        blocks = blocks and np.array_equal(energies[: len(energies) // 2], energies[len(energies) // 2 :])
        energies, values, lines = energies[order], values[order], lines[order]
        if not blocks:
            steps.append("rows sorted by energy")
    else:
        blocks = False
    twice = np.flatnonzero(np.diff(energies) == 0)
    if not twice.size:
        if len(energies) < 2:
            raise ValueError(f"{table.name}, line {lines[0]}: a DOS needs at least 2 energies, not {energies.size}")
        return energies, values
    where = f"lines {lines[twice[0]]} and {lines[twice[0] + 1]}"
    again = f"{table.name}, {where}: the energy {energies[twice[0]]:g} eV is there twice"
    pairs = len(energies) % 2 == 0 and np.array_equal(energies[::2], energies[1::2])
    if not pairs or (np.diff(energies[::2]) == 0).any() or len(energies) < 4 or request.spin in ("summed", "one"):
        raise ValueError(f"{again}: keep one row for each energy (or two, one for each spin)")
    high, low = np.maximum(values[::2], values[1::2]), np.minimum(values[::2], values[1::2])
    down = _drawn_down(low[np.isfinite(low)])
    alike = np.nansum(high - low) <= SAME * np.nansum(np.abs(high))
    expected = blocks if layout.spin_blocks else layout.source == "text"
    if not expected or (alike and not blocks and request.spin != "separate"):
        raise ValueError(f'{again}: if they are two spins, say spin="separate" (--spin separate); else keep one row')
    how = "in two blocks" if blocks else "in two rows at each energy"
    steps.append(f"two spins {how}, added{'; down was drawn downwards' if down else ''}")
    return energies[::2], high - low if down else high + low


def _with_partner(
    curve: tuple[Array, Array], table: Table, columns: tuple[int, ...], layout: Layout, request: Request,
    steps: list[str],
) -> tuple[Array, Array]:  # fmt: skip
    """Add the other spin, which stands in a file beside this one."""
    partner = layout.partner
    assert partner is not None
    if not partner.is_file():
        fix = f'put {partner.name} beside it, or say spin="one" (--spin one) if both are alike'
        raise ValueError(f"{table.name} holds one spin: {fix}")
    steps.append(f"the other spin added from {partner.name}")
    return _add(curve, _other(partner, columns, layout, request), f"{table.name} and {partner.name}")


def _other(path: Path, columns: tuple[int, ...], layout: Layout, request: Request) -> tuple[Array, Array]:
    """The same columns of another file of the same program."""
    table = read_table(read_bytes(path), str(path))
    if table.rows.shape[1] <= max(columns):
        raise ValueError(f"{path}, line {table.lines[0]}: only {table.rows.shape[1]} columns")
    quiet = replace(request, spin="one" if len(columns) == 2 and layout.partner else None)
    energies, values = _curve(table, columns, layout, quiet, [], [])
    return energies, values / 2.0 if quiet.spin == "one" else values


def _add(curve: tuple[Array, Array], other: tuple[Array, Array], names: str) -> tuple[Array, Array]:
    if curve[0].shape != other[0].shape or not np.allclose(curve[0], other[0], atol=1e-6):
        raise ValueError(f"{names} have different energies: they are not of one calculation")
    down = _drawn_down(curve[1][np.isfinite(curve[1])])
    return curve[0], np.abs(other[1]) + (-curve[1] if down else curve[1])


def _scaled_to_total(
    curve: tuple[Array, Array], path: Path, name: str, steps: list[str]
) -> tuple[tuple[Array, Array], Mask | None]:
    """Scale a site's projections by the file of the total and of all projections, if there is one."""
    if not path.is_file():
        steps.append(f"raw projection: there is no {path.name} to scale it by")
        return curve, None
    table = read_table(read_bytes(path), str(path))
    spins = (table.rows.shape[1] - 1) // 2
    if table.rows.shape[1] not in (3, 5) or len(table.rows) != len(curve[0]):
        raise ValueError(f"{name} and {path} do not fit together: they are not of one calculation")
    energies, total, projected = table.rows[:, 0], table.rows[:, 1 : spins + 1], table.rows[:, spins + 1 :]
    if not np.allclose(energies, curve[0], atol=1e-6):
        raise ValueError(f"{name} and {path} have different energies: they are not of one calculation")
    sites = np.maximum([curve[1], projected.sum(axis=1) - curve[1]], 0.0)
    scaled, known = scale_sites_to_total(sites, np.maximum(total.sum(axis=1), 0.0), energies=energies)
    steps.append(f"scaled by the ratio of the total to all projections in {path.name}")
    return (curve[0], scaled[0]), known


# -- zero and window ---------------------------------------------------------------------------------------------------


def _zero(name: str, layout: Layout, request: Request, assumed: list[str]) -> tuple[float, str]:
    """Energy of the zero on the scale of the file, and what it is."""
    if request.efermi is not None:
        return float(request.efermi), request.reference or "fermi"
    if request.reference is not None:
        if layout.zero and request.reference != layout.reference:
            told = f"{layout.source} gives the Fermi level, {layout.zero:g} eV, not the valence-band maximum"
            raise ValueError(f"{name}: {told}: give its energy, as in reference='vbm', efermi=...  (--efermi)")
        return layout.zero or 0.0, request.reference
    if layout.absolute and layout.zero is None:
        raise ValueError(
            f"{name}: {layout.absolute}give the Fermi level on its scale as efermi= (--efermi), or say "
            'reference="fermi" or "vbm" (--reference) if its energies are relative to that'
        )
    if layout.zero is None:
        assumed.insert(0, "zero of energy at the Fermi level")
    return layout.zero or 0.0, layout.reference


def _known(energies: Array, values: Array, layout: Layout) -> Mask:
    """Energies at which the file tells the DOS."""
    known = ~np.isnan(values)
    states = np.flatnonzero(known & (values >= GAP_DOS))
    if layout.periodic and states.size:
        known &= energies <= energies[states[-1]]  # bands are missing above
    if layout.first_pile and values[0] >= GAP_DOS and known[1:].any():
        known[0] = False  # the states below the window are piled up there
    return known
