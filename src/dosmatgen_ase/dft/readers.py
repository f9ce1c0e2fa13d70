"""Readers of what Quantum ESPRESSO and abinit wrote, with the sites of a crystal averaged over its symmetry."""

from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.units import Hartree, Ry

from dosmatgen_ase.dft.bands import Bands, broadened_dos
from dosmatgen_ase.dft.errors import ElectronicStructureError
from dosmatgen_ase.dft.interpolation import Orbital
from dosmatgen_ase.dft.settings import check_sigma, site_symmetry
from dosmatgen_ase.dos import MODEL_SIGMA, Array, TargetDOS
from dosmatgen_ase.dos.readers.common import existing
from dosmatgen_ase.dos.readers.densities import Densities

_existing = partial(existing, fix="give the output of a finished calculation")


def read_espresso(
    atomic_proj: str | os.PathLike[str],
    projwfc_output: str | os.PathLike[str],
    atoms: Atoms,
    *,
    sigma: float = MODEL_SIGMA,
) -> tuple[tuple[TargetDOS, ...], TargetDOS]:
    """Read a Quantum ESPRESSO calculation of any origin (norm-conserving, ultrasoft or PAW; collinear or not).

    A state of a noncollinear or spin-orbit run holds one electron.

    The k-points are taken as they are, with their weights: without the mesh, nothing can be interpolated, so take a
    dense one.

    Parameters
    ----------
    atomic_proj : path
        ``PREFIX.save/atomic_proj.xml``.
    projwfc_output : path
        What ``projwfc.x`` printed; it says which atom each projection belongs to.
    atoms : Atoms
        The structure, in the order of the calculation; equivalent sites are averaged.
    sigma : float
        Standard deviation of the broadening, eV.

    Returns
    -------
    sites : tuple of TargetDOS
        Scaled to add up to the total.
    total : TargetDOS

    Raises
    ------
    FileNotFoundError
        If a file is not there.
    ElectronicStructureError
        If the files or atoms do not belong together, or the files cannot be read or hold no empty bands.
    ValueError
        If sigma is below the step of the energy grid, 0.05 eV, or the elements of atoms are not those of the output.
    """
    check_sigma(sigma)
    proj, output = _existing(atomic_proj), _existing(projwfc_output)
    printed = output.read_text(errors="replace")
    read = read_projections(proj, printed, len(atoms))
    _check_elements(printed, atoms, output.name)
    projections = by_shell(read.orbitals, len(atoms), np.abs(read.amplitudes) ** 2)
    bands = Bands(read.eigenvalues, projections, read.weights, read.num_electrons, read.noncollinear)
    dos = broadened_dos(bands, site_symmetry(atoms)["equivalent_atoms"], sigma)
    kind = "noncollinear, " if read.noncollinear else ""
    source = f"Quantum ESPRESSO {proj.name}, {kind}{len(bands.weights)} k-points, Loewdin projections"
    return dos.targets({"source": source})


def read_abinit(prefix: str | os.PathLike[str], atoms: Atoms) -> tuple[tuple[TargetDOS, ...], TargetDOS]:
    """Read the files of abinit's ``prtdos 3``: ``PREFIX_DOS_TOTAL`` and ``PREFIX_DOS_AT0001`` ff. for every atom.

    The spheres miss charge, so the sites are scaled to the total at every energy; equivalent sites are averaged, as
    abinit sums over the irreducible wedge only. Energies above the last state are unknown.

    Parameters
    ----------
    prefix : path
        Folder and root of the names, such as ``run/out``.
    atoms : Atoms
        The structure, in abinit's order.

    Returns
    -------
    sites : tuple of TargetDOS
    total : TargetDOS

    Raises
    ------
    FileNotFoundError
        If a file is not there: abinit needs ``prtdos 3`` and ``natsph`` for all atoms.
    ElectronicStructureError
        If a file cannot be read, or there is one of a further atom.
    """
    energies, columns, fermi = _abinit_table(_existing(f"{os.fspath(prefix)}_DOS_TOTAL"))
    spheres = [_abinit_table(_existing(f"{os.fspath(prefix)}_DOS_AT{i + 1:04d}"))[1][:, :5] for i in range(len(atoms))]
    if (more := Path(f"{os.fspath(prefix)}_DOS_AT{len(atoms) + 1:04d}")).exists():
        told = f"the calculation has more than the {len(atoms)} atoms given"
        raise ElectronicStructureError(f"{told}: give its cell, or remove what an older one left", more)
    if len({len(energies), *map(len, spheres)}) > 1:
        raise ElectronicStructureError(f"the DOS files of {prefix} have different energies", Path(prefix))
    equivalent = site_symmetry(atoms)["equivalent_atoms"]
    projected = np.array(spheres).sum(2)
    dos = Densities(
        source=f"abinit {Path(prefix).name}_DOS",
        energies=energies,
        total=columns[None, :, 0],
        integrated=columns[None, :, 1] * Hartree if columns.shape[1] > 1 else None,
        sites=np.array([projected[equivalent == i].mean(0) for i in equivalent]),
        fermi=fermi,
        symbols=atoms.get_chemical_symbols(),
        sigma=0.0,  # abinit projects with the tetrahedron method, which does not broaden
    )
    try:
        return tuple(dos.target(i) for i in range(len(atoms))), dos.target(None)
    except ValueError as error:
        raise ElectronicStructureError(str(error), Path(f"{os.fspath(prefix)}_DOS_TOTAL")) from error


def _abinit_table(path: Path) -> tuple[Array, Array, float]:
    """Energies (G,) in eV, columns (G, c) in states/eV with the spins summed, Fermi level in eV."""
    text = path.read_text(errors="replace")
    fermi = re.search(r"Fermi energy :\s*(\S+)", text)
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    num_spins = 2 if re.search(r"nsppol = *2", text) else 1
    try:
        table = np.array(lines, dtype=float).reshape(num_spins, -1, len(lines[0]))
        if fermi is None or table.shape[1] < 2 or table.shape[2] < 2:
            raise ValueError("the Fermi level or the columns are missing")
        return table[0, :, 0] * Hartree, table[:, :, 1:].sum(0) / Hartree, float(fermi[1]) * Hartree
    except (ValueError, IndexError) as error:
        raise ElectronicStructureError("not a DOS file of abinit", path) from error


@dataclass(frozen=True, eq=False)
class Projections:
    """What projwfc.x found, at the k-points of the calculation."""

    orbitals: list[Orbital]
    eigenvalues: Array  # (spins, k, bands), eV
    amplitudes: Array  # (spins, k, orbitals, bands), complex
    weights: Array  # (k,), sum 1
    num_electrons: float
    noncollinear: bool


# A state of a collinear run, of a noncollinear one (its s_z), and of one with spin-orbit coupling (j and m_j).
_STATE = re.compile(
    r"state #\s*\d+: atom\s+(\d+)\s.*?wfc\s+(\d+)\s*\(.*?l=\s*(\d)\s*(?:m=\s*(\d+)\s*(s_z=)?|(j=).*?m_j=)"
)


def read_projections(path: Path, projwfc_output: str, num_sites: int) -> Projections:
    """Read ``atomic_proj.xml`` of projwfc.x. Only its printed output tells which atom a projection belongs to."""
    states = _STATE.findall(projwfc_output)
    orbitals = [Orbital(int(site) - 1, int(wfc), int(degree), int(m or 1) - 1) for site, wfc, degree, m, *_ in states]
    if {orbital.site for orbital in orbitals} != set(range(num_sites)):
        told = f"the output of projwfc.x does not list the states of {num_sites} atoms"
        fix = "give the cell of the calculation, and pseudopotentials with atomic states"
        raise ElectronicStructureError(f"{told}: {fix}", path)
    spinors = {bool(s_z or j) for *_, s_z, j in states}
    if len(spinors) > 1:
        raise ElectronicStructureError("the output of projwfc.x mixes collinear and noncollinear states", path)
    try:
        return _parse_projections(path, orbitals, spinors.pop())
    except (OSError, ET.ParseError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        told = " ".join(f"{error}".split()) if isinstance(error, (OSError, ValueError, ET.ParseError)) else repr(error)
        raise ElectronicStructureError(f"not an atomic_proj.xml that fits its output: {told[:300]}", path) from error


# "atom   1 (Fe1)": a label is a symbol, then digits, or _ or - and anything.
_LABEL = re.compile(r"[^(]*\(([A-Za-z]{1,2})(?![A-Za-z])")


def _check_elements(projwfc_output: str, atoms: Atoms, name: str) -> None:
    """Raise ValueError if the order of the atoms is not that of the calculation; a label may name no element."""
    symbols = atoms.get_chemical_symbols()
    for state in _STATE.finditer(projwfc_output):
        label, given = _LABEL.match(state[0]), symbols[int(state[1]) - 1]
        element = label[1].capitalize() if label else given
        if element in chemical_symbols[1:] and element != given:
            told = f"atom {int(state[1])} is {element} in {name} and {given} in atoms"
            raise ValueError(f"{told}: give the structure in the order of the calculation")


def _parse_projections(path: Path, orbitals: list[Orbital], spinors: bool) -> Projections:
    root = ET.parse(path).getroot()
    header, states = root.find("HEADER"), root.find("EIGENSTATES")
    if header is None or states is None:
        raise ValueError("it lacks HEADER or EIGENSTATES")
    num_bands, num_k = int(header.attrib["NUMBER_OF_BANDS"]), int(header.attrib["NUMBER_OF_K-POINTS"])
    num_spins = int(header.attrib["NUMBER_OF_SPIN_COMPONENTS"])
    num_electrons = float(header.attrib["NUMBER_OF_ELECTRONS"])
    if num_spins not in ((1, 4) if spinors else (1, 2)):
        kind = "noncollinear" if spinors else "collinear"
        raise ValueError(f"it has {num_spins} spin components, and the output of projwfc.x is {kind}")
    # Spin up comes first, for all k-points.
    shape = (1 if spinors else num_spins, num_k)
    # NumPy would guess a count of -1.
    if min(num_bands, num_k) < 1 or not (math.isfinite(num_electrons) and num_electrons > 0):
        raise ValueError("its numbers of bands, k-points and electrons must be above 0")
    weights = np.array([float(k.attrib["Weight"]) for k in states.iter("K-POINT")]).reshape(shape)[0]
    eigenvalues = np.array([_numbers(e) * Ry for e in states.iter("E")]).reshape(*shape, num_bands)
    waves = [_numbers(wave).view(complex) for block in states.iter("PROJS") for wave in block]
    amplitudes = np.array(waves).reshape(*shape, len(orbitals), num_bands)
    if not (np.isfinite(eigenvalues).all() and np.isfinite(amplitudes).all() and np.isfinite(weights).all()):
        raise ValueError("its numbers are not all finite")
    if weights.min() < 0 or weights.sum() <= 0:
        raise ValueError("the weights of its k-points must not be negative")
    return Projections(orbitals, eigenvalues, amplitudes, weights / weights.sum(), num_electrons, spinors)


def by_shell(orbitals: Sequence[Orbital], num_sites: int, probabilities: Array) -> Array:
    """Sum (..., orbitals, bands) over m and shells: (..., sites, 4, bands)."""
    summed = np.zeros((*probabilities.shape[:-2], num_sites, 4, probabilities.shape[-1]))
    for i, orbital in enumerate(orbitals):
        summed[..., orbital.site, orbital.l, :] += probabilities[..., i, :]
    return summed


def _numbers(element: ET.Element) -> Array:
    return np.array((element.text or "").split(), dtype=float)
