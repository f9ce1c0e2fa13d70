"""Perturbed copies of the structures of a table, to be labelled: forward models meet crystals off equilibrium."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from ase import Atoms

from dosmatgen_ase.crystals.perturb import perturbed
from dosmatgen_ase.data import Structures
from dosmatgen_ase.dft.labels import candidates_to_label
from dosmatgen_ase.dft.settings import EspressoSettings


def perturbed_copies(
    structures: Structures | Mapping[str, Atoms],
    number: int,
    settings: EspressoSettings | None = None,
    *,
    seed: int = 0,
) -> tuple[dict[str, Atoms], dict[str, str]]:
    """Rattled and strained copies, `number` in all, one each of as many structures of at least two atoms.

    Structures come in the order "need" of `label` as if they had no symmetry, which the copies have not; where there
    are fewer than `number`, all get a second copy, and so on. A copy depends on its id and the seed alone, and a larger
    number goes on where a smaller one ended.

    Parameters
    ----------
    structures : Structures, or mapping of id to Atoms
    number : int
    settings : EspressoSettings, optional
        Whose pseudopotentials tell which elements can be labelled.
    seed : int

    Returns
    -------
    copies : dict
        Crystals by id; the first copy of mp-123 is mp-123-r1.
    parents : dict
        Id of the structure by that of its copy.

    Raises
    ------
    ValueError
        If the number is below 1, or no structure can be labelled.
    """
    if number < 1:
        raise ValueError(f"{number} perturbed copies: give at least 1")
    found = candidates_to_label(structures, settings or EspressoSettings())
    usable = [candidate for candidate in found if len(candidate.atoms) > 1]
    if not usable:
        raise ValueError("no structure of two atoms or more can be labelled: give others")
    usable.sort(key=lambda candidate: replace(candidate, spacegroup=1).rank(need=True))
    copies, parents = {}, {}
    for i in range(number):
        parent = usable[i % len(usable)]
        name = f"{parent.name}-r{i // len(usable) + 1}"
        copies[name] = perturbed(parent.atoms, np.random.default_rng([seed, zlib.crc32(name.encode())]))
        parents[name] = parent.name
    return copies, parents
