"""Warnings about a target that is probably not what its user means: its zero of energy, its number of states."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dosmatgen_ase.dos.edges import gap_around_zero
from dosmatgen_ase.dos.grid import MODEL_GRID, inside_window
from dosmatgen_ase.dos.target import TargetDOS

STATES = Path(__file__).parents[1] / "references" / "states_below_zero.json"
"""States that sites of each element hold below zero, made by scripts/count_states.py."""

SLACK = 0.15  # share by which a target may hold more or fewer states than any labelled site before it is told

WHOLE_CELL = 'if it is the DOS of a whole cell, say kind="total" (--kind total)'
SCALE_IT = "if its unit is arbitrary, scale it: dos.scaled(electrons=...), --electrons"

NO_STATES = 1e-3  # states in the whole window below which a target is as good as empty
SEEN_SHIFT = 0.1  # eV between zero and the states below it, worth a warning: one step of the model's grid
ONE_SIDED = 0.5  # eV below zero that must be known where zero was assumed: occupied states are what tells a crystal
MANY = 10  # different values above which a DOS is a curve, not a box that is drawn with a height of 1

Key = TypeVar("Key")


class DOSWarning(UserWarning):
    """A DOS is used that is probably not what its user means; the message says why and names the fix."""


def gap_at_zero(dos: TargetDOS) -> tuple[float, float] | None:
    """Edges (eV) of a gap around the Fermi level, with states known on both sides; None where there is none."""
    if dos.reference != "fermi":
        return None
    gap = gap_around_zero(dos.energies, dos.values, dos.known, dos.sigma)
    return gap if gap is not None and np.isfinite(gap[1]) else None


def on_common_zero(targets: Mapping[Key, TargetDOS], name: str = "site {}") -> dict[Key, TargetDOS]:
    """The targets of one crystal, with one zero of energy.

    Zero is the highest occupied level: the Fermi level of a metal or the valence-band maximum of a gapped crystal. A
    total DOS of reference "fermi" that has a gap at zero is moved to its valence-band maximum. What a site's DOS has at
    zero does not tell this, as the site may have no states where the crystal has some.

    Raises
    ------
    ValueError
        If some have their zero at the Fermi level and others at the valence-band maximum.
    """
    moved = {key: dos.aligned() if dos.kind == "total" and gap_at_zero(dos) else dos for key, dos in targets.items()}
    zeros = {dos.reference: key for key, dos in moved.items()}
    if len(zeros) > 1:
        fermi, vbm = name.format(zeros["fermi"]), name.format(zeros["vbm"])
        raise ValueError(
            f"the target of {fermi} has its zero at the Fermi level, but that of {vbm} at the valence-band maximum. "
            "One crystal has one zero: move the first by dos.aligned() if its own gap tells how far, else by "
            'dos.shift(eV), or set reference="vbm" (--reference) if that is its zero'
        )
    return moved


def pair_on_common_zero(dos: TargetDOS, target: TargetDOS) -> tuple[TargetDOS, TargetDOS]:
    """Two DOS of possibly different crystals as they are compared: each with its highest occupied level at zero.

    A total DOS with a gap around its Fermi level is moved to its valence-band maximum, whatever the other's reference:
    a target must not stand at one zero for metals and at another for insulators. A site's is left as it is, but where
    the other DOS has its zero at the valence-band maximum, a `DOSWarning` tells how it is moved.
    """
    pair = []
    for one in (dos, target):
        gap = gap_at_zero(one)
        if gap and one.kind == "site" and gap[0] < -SEEN_SHIFT and dos.reference != target.reference:
            warnings.warn(f"{_shift_advice(gap)}; the other DOS has its zero there", DOSWarning, stacklevel=5)
        pair.append(one.aligned() if gap and one.kind == "total" else one)
    return pair[0], pair[1]


def doubts(dos: TargetDOS, num_atoms: tuple[int, int] = (1, 1)) -> list[str]:
    """What speaks against a target, one sentence each.

    Parameters
    ----------
    dos : TargetDOS
    num_atoms : (int, int)
        Fewest and most atoms that a total DOS may be of.
    """
    seen = (MODEL_GRID.minimum, MODEL_GRID.maximum)
    if not (dos.known & inside_window(dos.energies, seen)).any():
        return []  # an error where it is used
    states = dos.total_states(*seen)
    if states == 0:
        told = "a gap alone does not determine a crystal: include states beside the gap"
        return [f"the {dos.kind} DOS is zero at every known energy, and {told}"]
    if states < NO_STATES:
        return [f"the {dos.kind} DOS holds {states:.2g} states in all: {SCALE_IT}"]
    found = [_zero_at_an_end(dos)]
    if (gap := gap_at_zero(dos)) and dos.kind == "site" and gap[0] < -SEEN_SHIFT:
        found.append(_shift_advice(gap))
    found.append(_states_that_fit_nothing(dos, num_atoms))
    top = float(dos.values.max())
    if top in (1.0, 100.0) and dos.provenance.get("source") == "arrays" and np.unique(dos.values).size > MANY:
        found.append(
            f"the largest value of the DOS is exactly {top:g}, so it seems to be scaled, not in states/eV: {SCALE_IT}"
        )
    return [message for message in found if message]


def warn_of_doubts(targets: Mapping[Any, TargetDOS], num_atoms: tuple[int, int] = (1, 1), stacklevel: int = 3) -> None:
    """Issue a `DOSWarning` for each of the `doubts` of the targets, each once."""
    count = num_atoms if any(dos.kind == "total" for dos in targets.values()) else (1, 1)
    for message in dict.fromkeys(message for dos in dict.fromkeys(targets.values()) for message in doubts(dos, count)):
        warnings.warn(message, DOSWarning, stacklevel=stacklevel)


def _shift_advice(gap: tuple[float, float]) -> str:
    return (
        f'the DOS has no states from {gap[0]:.2f} to {gap[1]:.2f} eV, but reference "fermi": if its crystal has a gap, '
        f"its zero is the valence-band maximum: dos.aligned() (--align) moves it by {-gap[0]:.2f} eV"
    )


def _zero_at_an_end(dos: TargetDOS) -> str:
    """A sentence if zero was only assumed to be the Fermi level, and hardly any energy is known on one side of it."""
    assumed = dos.provenance.get("assumed", [])
    if not any(sentence.startswith("zero of energy") and "the Fermi level" in sentence for sentence in assumed):
        return ""
    known = dos.energies[dos.known]
    if known[0] < -ONE_SIDED and known[-1] > 0:
        return ""
    told = f"its energies run from {known[0]:.2f} to {known[-1]:.2f} eV, so that zero is hardly the Fermi level"
    return f"{told}, as was assumed: give the Fermi level of the file (efermi=, --efermi)"


@cache
def states_below_zero() -> dict[str, Any]:
    """The table of `STATES`: ``lo`` (eV) and, for each element, fewest and most states from there to 0."""
    table: dict[str, Any] = json.loads(STATES.read_text())
    return table


def labelled_elements() -> frozenset[str]:
    """Return the elements that the labels hold: only theirs is a DOS that the models know."""
    return frozenset(states_below_zero()["elements"])


def _states_that_fit_nothing(dos: TargetDOS, num_atoms: tuple[int, int]) -> str:
    """A sentence if the states known below zero are more, or fewer, than sites of any element hold there."""
    table = states_below_zero()
    known = dos.energies[dos.known & inside_window(dos.energies, (-np.inf, 0.0))]
    if not known.size or known[0] >= 0:
        return ""
    edges = np.array(table["lo"])
    start = max(float(known[0]), float(edges[0]))
    held = dos.total_states(start, 0.0)
    below = edges[edges <= start + 1e-6]
    fewest = {symbol: np.interp(start, edges, rows[0]) for symbol, rows in table["elements"].items()}
    most = {symbol: rows[1][below.size - 1] for symbol, rows in table["elements"].items()}
    whole = bool(dos.known[inside_window(dos.energies, (start, 0.0))].all()) and known[-1] > -0.2
    fewer, more = num_atoms[0] * (1 - SLACK), num_atoms[1] * (1 + SLACK)
    limits = {symbol: (fewer * fewest[symbol] - 0.005, more * most[symbol] + 0.05) for symbol in most}
    if any((not whole or low <= held) and held <= high for low, high in limits.values()):
        return ""
    nearest = min(limits, key=lambda s: min(abs(held - limits[s][0]), abs(held - limits[s][1])))
    sizes = " to ".join(map(str, dict.fromkeys(num_atoms)))
    whose = "no site of any element" if dos.kind == "site" else f"no cell of {sizes} atoms"
    between = f"{num_atoms[0] * fewest[nearest]:.2g} to {num_atoms[1] * most[nearest]:.3g}"
    many = dos.kind == "site" and all(held > high for _, high in limits.values())
    return (
        f"the {dos.kind} DOS holds {held:.3g} states from {start:.1f} to 0 eV, and {whose} holds that number (nearest: "
        f"{nearest}, {between}): {f'{WHOLE_CELL}; ' if many else ''}{SCALE_IT}"
    )
