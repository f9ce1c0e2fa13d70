"""CASTEP's ``.bands``: eigenvalues and weights of the k-points, read by ASE and broadened here."""

from __future__ import annotations

import io
import math
import re

import numpy as np

from dosmatgen_ase.dos.grid import MIN_GAP, MODEL_SIGMA
from dosmatgen_ase.dos.readers.common import Content, Request, naming, record
from dosmatgen_ase.dos.readers.densities import gap_of
from dosmatgen_ase.dos.readers.levels import broadened
from dosmatgen_ase.dos.target import TargetDOS

_MAX_STATES = 20_000_000


def is_bands(content: Content) -> bool:
    """The words of its first lines."""
    return content.head.startswith("Number of k-points") and "Number of eigenvalues" in content.head


def read_bands(content: Content, request: Request) -> TargetDOS:
    """Read the total DOS of a mesh of k-points, broadened to `MODEL_SIGMA`."""
    name = content.name
    if request.site is not None:
        raise ValueError(f"{name} holds no site projections: leave out site")
    with naming(name, what=" is not a complete .bands file of CASTEP"):
        return _target(content)


def _target(content: Content) -> TargetDOS:
    from ase.io.castep import read_bands as read

    text = content.data.decode("utf-8", errors="replace")
    head = [[float(x) for x in re.findall(r"[-+]?\d[\d.Ee+-]*", line)] for line in text.splitlines()[:5]]
    if len(head) < 5 or not all(head):
        raise ValueError("its first five lines lack a number")
    num_k, num_spins, num_bands = int(head[0][0]), int(head[1][0]), int(head[3][0])
    if len(set(head[3])) > 1 or len(set(head[4])) > 1:
        raise ValueError("its spins have different numbers of eigenvalues or Fermi levels")
    if not 0 < num_k * num_spins * num_bands <= min(_MAX_STATES, len(text)):
        raise ValueError("its numbers of k-points and eigenvalues do not fit its length")
    _, weights, levels, fermi = read(io.StringIO(text))
    if not (np.isfinite(levels).all() and np.isfinite(weights).all() and math.isfinite(fermi) and weights.sum() > 0):
        raise ValueError("its eigenvalues and weights must be finite numbers")
    weights, levels = weights / weights.sum(), np.sort(levels, axis=-1)
    electrons = sum(head[2])
    filled = float((weights[:, None] * (levels <= fermi)).sum())
    # One electron in a state with two spins or spinors, else two: as the number of electrons says.
    degeneracy = 2.0 if num_spins == 1 and filled and electrons / filled > 1.5 else 1.0
    gap, vbm = gap_of(list(levels), fermi)
    zero, reference = (vbm, "vbm") if gap >= MIN_GAP else (fermi, "fermi")
    states = degeneracy * np.broadcast_to(weights[:, None], levels.shape)
    energies, values = broadened(levels, states, float(levels[..., -1].min()))
    steps = [
        f"{num_k} k-points, {electrons:g} electrons, {degeneracy * filled:.2f} states up to the Fermi level",
        f"zero of energy at {zero:.4f} eV ({reference})",
    ]
    told = ["k-points: taken as a mesh with the weights in the file; a path through the zone gives no DOS"]
    provenance = record(f"CASTEP {content.basename}", steps, told)
    known = np.ones(energies.size, dtype=bool)
    return TargetDOS(energies - zero, np.maximum(values, 0.0), known, reference, MODEL_SIGMA, "total", provenance)
