"""Bands between k-points: Wannier interpolation in a basis of atomic orbitals, from the irreducible points of a mesh.

Bands that are joined by their order in energy have a kink wherever two of them cross, and no curve through the points
of a coarse mesh finds it. The Hamiltonian in orbitals that stay near their atoms has none: it is a short Fourier
series in k, and its eigenvalues cross as they should.

1. Trial orbitals are the atomic ones that ``projwfc.x`` projects on, and a Gaussian s, p and d shell at every atom, as
   pseudopotentials lack empty shells (`gaussian_orbitals`, `project_on_gaussians`).
2. At each k-point, the orthonormal set nearest to their projections on the bands turns the eigenvalues into a
   Hamiltonian of the orbitals (Loewdin; N. Marzari et al., Rev. Mod. Phys. 84, 1419 (2012), section II.C; with atomic
   orbitals: L. A. Agapito et al., Phys. Rev. B 93, 035104 (2016)). There are more orbitals than bands: directions
   outside the bands lie above all of them.
3. Symmetry gives it on the whole mesh (`_unfolded`), Fourier series in real space, where each pair of orbitals is
   kept at its shortest distance (G. Pizzi et al., J. Phys.: Condens. Matter 32, 165902 (2020), section 4.2).

At the points of the mesh, eigenvalues and projections come out as they went in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import spglib
from ase import Atoms
from ase.data import covalent_radii
from ase.utils import atoms_to_spglib_cell
from scipy.io import FortranFile
from scipy.special import gamma, sph_harm_y

from dosmatgen_ase.dos import Array

SYMPREC = 1e-3
"""Tolerance of the symmetry, Angstrom."""

_WIDTH = 0.5  # of a Gaussian orbital, in covalent radii
# How much the Gaussians count beside the atomic orbitals, whose shape is right where they are occupied; as much as
# these where a pseudopotential has no such valence shell. Settled on eigenvalues at k-points outside the mesh.
_WEIGHT, _WEIGHT_MISSING = 0.5, 1.0
_MISSING = {  # atomic numbers by l: groups 1 to 12, and 1 and 2 from K on
    1: {3, 4, 11, 12, *range(19, 31), *range(37, 49), *range(55, 81), *range(87, 113)},
    2: {19, 20, 37, 38, 55, 56, 87, 88},
}
_ABOVE = 1.0  # eV, of what lies outside the bands above the highest, with which it must not mix
_NEAR = 1e-4  # Angstrom, distances that count as equal
_CHUNK = 4_000_000  # matrix elements held at a time


# -- k-points ----------------------------------------------------------------------------------------------------------


def symmetry_of(atoms: Atoms) -> dict[str, np.ndarray]:
    """Rotations, translations and equivalent atoms as spglib finds them.

    Raises
    ------
    ValueError
        If it finds none.
    """
    try:  # whether it raises or returns None is a setting of the process, which other packages change
        symmetry: dict[str, np.ndarray] | None = spglib.get_symmetry(atoms_to_spglib_cell(atoms), symprec=SYMPREC)
    except spglib.SpglibError:
        symmetry = None
    if symmetry is None:
        raise ValueError("spglib finds no symmetry in this structure: are two atoms in one place?")
    return symmetry


def mesh_size(atoms: Atoms, density: float) -> np.ndarray:
    """Points along each reciprocal vector, for a density in points per 1/A (2 pi included), rounded up."""
    lengths = 2 * np.pi * np.linalg.norm(atoms.cell.reciprocal(), axis=1)
    return np.maximum(1, np.ceil(lengths * density).astype(int))


@dataclass(frozen=True, eq=False)
class IrreducibleMesh:
    """Irreducible points of a Gamma-centred mesh; time reversal is always a symmetry."""

    size: np.ndarray  # (3,)
    points: Array  # (k, 3), fractional
    weights: Array  # (k,), sum 1

    @classmethod
    def of(cls, atoms: Atoms, density: float) -> IrreducibleMesh:
        """Reduce the mesh of a density, points per 1/A, by the symmetry of the crystal."""
        size, cell = mesh_size(atoms, density), atoms_to_spglib_cell(atoms)
        mapping, address = spglib.get_ir_reciprocal_mesh(size, cell, is_shift=[0, 0, 0], symprec=SYMPREC)
        irreducible, counts = np.unique(mapping, return_counts=True)
        return cls(size, address[irreducible] / size, counts / counts.sum())


# -- orbitals ----------------------------------------------------------------------------------------------------------


class Orbital(NamedTuple):
    """A real orbital; `shell` tells those of one atom and l apart."""

    site: int
    shell: int
    l: int
    m: int  # 0 to 2 l, in the order of projwfc.x: m = 0, then cosine and sine of 1, 2, ...


def real_harmonics(l: int, directions: Array) -> Array:
    """Orthonormal real spherical harmonics, (..., 2 l + 1), in the order and with the signs of Quantum ESPRESSO."""
    x, y, z = np.moveaxis(directions, -1, 0)
    polar, azimuth = np.arctan2(np.hypot(x, y), z), np.arctan2(y, x)
    columns = [sph_harm_y(l, 0, polar, azimuth).real]
    for m in range(1, l + 1):
        harmonic = math.sqrt(2) * sph_harm_y(l, m, polar, azimuth)
        columns += [harmonic.real, harmonic.imag]
    return np.stack(columns, -1)


def gaussian_orbitals(atoms: Atoms) -> list[Orbital]:
    """One s, p and d shell at every atom."""
    return [Orbital(i, -1 - l, l, m) for i in range(len(atoms)) for l in range(3) for m in range(2 * l + 1)]


def project_on_gaussians(atoms: Atoms, wavefunctions: Path) -> Array:
    """Projections of the bands at one k-point on `gaussian_orbitals`, complex, (orbitals, bands).

    Orbitals are ``r^l exp(-r^2 / 2 w^2) Y_lm``, normalised, of a width w proportional to the covalent radius. The file
    is one that Quantum ESPRESSO writes, ``wfc*.dat`` or, read with h5py, ``wfc*.hdf5``; named without the suffix.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it cannot be read.
    """
    miller, waves = _read_waves(wavefunctions)
    q = miller @ (2 * np.pi * atoms.cell.reciprocal().array)
    length = np.linalg.norm(q, axis=1)
    phases = np.exp(-2j * np.pi * miller @ atoms.get_scaled_positions(wrap=False).T)
    harmonics = [real_harmonics(l, q) * (-1j) ** l for l in range(3)]
    rows = []
    for site, number in enumerate(atoms.numbers):
        width = _WIDTH * covalent_radii[number]
        gaussian = np.exp(-((width * length) ** 2) / 2) * phases[:, site]
        for l in range(3):
            norm = math.sqrt(2 * (2 * np.pi * width) ** 3 / (atoms.get_volume() * gamma(l + 1.5)))
            shell = norm * ((width * length) ** l * gaussian)[:, None] * harmonics[l]
            rows.append(shell.conj().T @ waves.T)
    return np.concatenate(rows)


def _read_waves(stem: Path) -> tuple[Array, Array]:
    """Plane waves k + G in units of the reciprocal vectors, (waves, 3), and their coefficients, (bands, waves)."""
    binary, hdf5 = stem.with_suffix(".dat"), stem.with_suffix(".hdf5")
    if not binary.is_file() and not hdf5.is_file():
        raise FileNotFoundError(f"no wavefunctions at {binary}, nor with .hdf5")
    try:
        if binary.is_file():
            with FortranFile(binary) as file:
                k = np.frombuffer(file.read_ints("i1")[4:28].tobytes())  # after its number
                num_bands = int(file.read_ints()[3])
                reciprocal = file.read_reals().reshape(3, 3)
                miller = file.read_ints().reshape(-1, 3)
                waves = np.array([file.read_reals().view(complex) for _ in range(num_bands)])
        else:
            try:
                import h5py
            except ImportError as error:
                raise ImportError("wavefunctions in HDF5 need h5py: pip install dosmatgen-ase[hdf5]") from error
            with h5py.File(hdf5) as file:
                k, miller = file.attrs["xk"], file["MillerIndices"][()]
                reciprocal = np.array([file["MillerIndices"].attrs[f"bg{i}"] for i in (1, 2, 3)])
                waves = file["evc"][()].view(complex)
    except (OSError, KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"no wavefunctions of Quantum ESPRESSO in {stem}: {error}") from error
    return k @ np.linalg.inv(reciprocal) + miller, waves


# -- interpolation -----------------------------------------------------------------------------------------------------


def interpolated(
    atoms: Atoms, mesh: IrreducibleMesh, orbitals: Sequence[Orbital], eigenvalues: Array, atomic: Array,
    gaussians: Array, points: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Interpolate the bands of one spin and their projections on the atomic orbitals.

    Parameters
    ----------
    atoms : Atoms
    mesh : IrreducibleMesh
    orbitals : sequence of Orbital
        The atomic ones.
    eigenvalues : array, shape (k, bands)
        On the irreducible points, eV.
    atomic : complex array, shape (k, orbitals, bands)
        Projections on the atomic orbitals, orthonormal ones, as ``projwfc.x`` writes them.
    gaussians : complex array, shape (k, gaussians, bands)
        Projections on `gaussian_orbitals`.
    points : array, shape (K, 3)
        Where to, fractional.

    Returns
    -------
    eigenvalues : array, shape (K, bands)
        Ascending. Of more bands than orbitals, the highest are left out.
    probabilities : array, shape (K, orbitals, bands)
        Squared projections; of each band they add up to at most 1, which interpolation alone does not keep.

    Raises
    ------
    ValueError
        If the linear algebra does not converge.
    """
    added = gaussian_orbitals(atoms)
    basis = [*orbitals, *added]
    num_bands = min(eigenvalues.shape[1], len(basis))
    energies, atomic = eigenvalues[:, :num_bands], atomic[:, :, :num_bands]
    missing = [atoms.numbers[orbital.site] in _MISSING.get(orbital.l, ()) for orbital in added]
    weights = np.where(missing, _WEIGHT_MISSING, _WEIGHT)
    trial = np.concatenate([atomic, weights[:, None] * gaussians[:, :, :num_bands]], axis=1)
    left, _, right = np.linalg.svd(trial, full_matrices=False)
    nearest = left @ right  # (k, basis, bands), orthonormal columns
    top = energies.max() + _ABOVE
    hamiltonian = (nearest * (energies - top)[:, None]) @ _adjoint(nearest)
    overlap = nearest @ _adjoint(atomic)  # of the basis with the atomic orbitals
    unfolded = _unfolded(atoms, mesh, basis, [hamiltonian, overlap])
    origins, vectors, shares = _nearest_pairs(atoms, mesh)
    in_orbitals, of_atomic = (_series(mesh, basis, field, origins, shares) for field in unfolded)
    levels, probabilities = [], []
    for part in np.array_split(points, max(1, math.ceil(len(points) * len(basis) ** 2 / _CHUNK))):
        phases = np.exp(2j * np.pi * part @ vectors.T).astype(np.complex64)
        values, states = np.linalg.eigh(np.tensordot(phases, in_orbitals, 1))
        levels.append(values[:, :num_bands] + top)
        found = np.abs(_adjoint(np.tensordot(phases, of_atomic, 1)) @ states[:, :, :num_bands]) ** 2
        probabilities.append(found / np.maximum(found.sum(1, keepdims=True), 1.0))
    return np.concatenate(levels).astype(float), np.concatenate(probabilities).astype(float)


def _adjoint(matrices: Array) -> Array:
    return matrices.conj().swapaxes(-1, -2)


def _series(mesh: IrreducibleMesh, basis: Sequence[Orbital], field: Array, origins: np.ndarray, shares: Array) -> Array:
    """Matrix elements ``<row, 0| . |column, R>`` of an operator (k, rows, columns) on the whole mesh.

    Columns are the first of the basis. In single precision, which costs half the time and 1e-5 eV.
    """
    sites = np.array([orbital.site for orbital in basis])
    grid = field.reshape(*mesh.size, *field.shape[1:])
    elements = np.fft.fftn(grid, axes=(0, 1, 2), norm="forward").reshape(field.shape)
    pairs = shares.astype(np.float32)[:, sites[:, None], sites[: field.shape[2]]]
    return np.asarray(elements.astype(np.complex64)[origins] * pairs)


def _nearest_pairs(atoms: Atoms, mesh: IrreducibleMesh) -> tuple[np.ndarray, np.ndarray, Array]:
    """Where the elements of a series belong that a mesh cannot tell apart: to those at the shortest distance.

    Lattice vectors of the mesh, by their number in C order (R,); what each becomes (R, 3); its share of each pair of
    sites (R, sites, sites).
    """
    images = np.array(list(itertools.product(range(-2, 3), repeat=3))) * mesh.size
    vectors = np.array(list(np.ndindex(*mesh.size)))[:, None] + images
    positions = atoms.get_scaled_positions(wrap=False)
    apart = (positions[None] - positions[:, None]) @ atoms.cell.array
    distances = np.linalg.norm((vectors @ atoms.cell.array)[:, :, None, None] + apart, axis=-1)
    nearest = distances <= distances.min(1, keepdims=True) + _NEAR
    used = nearest.any((2, 3))
    return np.nonzero(used)[0], vectors[used], (nearest / nearest.sum(1, keepdims=True))[used]


def _unfolded(atoms: Atoms, mesh: IrreducibleMesh, basis: Sequence[Orbital], fields: Sequence[Array]) -> list[Array]:
    """Operators (k, rows, columns) on the irreducible points -> on all points, in C order."""
    symmetry = symmetry_of(atoms)
    missing = np.ones(int(mesh.size.prod()), dtype=bool)
    unfolded = [np.empty((len(missing), *field.shape[1:]), dtype=complex) for field in fields]
    for rotation, translation in zip(symmetry["rotations"], symmetry["translations"], strict=True):
        images = mesh.points @ np.linalg.inv(rotation)
        # A mesh may have less symmetry than the crystal: an image between its points is none of them.
        scaled = images * mesh.size
        on_mesh = np.flatnonzero(np.abs(scaled - np.round(scaled)).max(1) < 1e-6)
        # Time reversal takes the complex conjugate, as all orbitals are real.
        for sign in (1, -1):
            address = sign * np.round(scaled[on_mesh]).astype(int) % mesh.size
            place, first = np.unique(np.ravel_multi_index(tuple(address.T), tuple(mesh.size)), return_index=True)
            place, first = place[missing[place]], on_mesh[first[missing[place]]]
            if not place.size:
                continue
            turn = _representation(atoms, basis, rotation, translation, images[first])
            for whole, field in zip(unfolded, fields, strict=True):
                columns = field.shape[2]
                turned = turn @ field[first] @ _adjoint(turn[:, :columns, :columns])
                whole[place] = turned if sign == 1 else turned.conj()
            missing[place] = False
    if missing.any():
        raise ValueError("the symmetry of the crystal does not give all points of the mesh")
    return unfolded


def _representation(
    atoms: Atoms, basis: Sequence[Orbital], rotation: np.ndarray, translation: Array, images: Array
) -> Array:
    """What a symmetry operation does to Bloch sums of the orbitals, (K, basis, basis), where it takes k to `images`.

    Bloch sums are ``sum_R exp(i k R) phi(r - R - tau)``, as in Quantum ESPRESSO.
    """
    positions, cell = atoms.get_scaled_positions(wrap=False), atoms.cell.array
    moved = positions @ rotation.T + translation
    apart = moved[:, None] - positions
    target = np.linalg.norm((apart - np.round(apart)) @ cell, axis=-1).argmin(1)
    lattice = np.round(moved - positions[target])
    cartesian = cell.T @ rotation @ np.linalg.inv(cell.T)
    index = {orbital: i for i, orbital in enumerate(basis)}
    turn = np.zeros((len(basis), len(basis)))
    blocks = {l: _rotated_harmonics(l, cartesian) for l in {orbital.l for orbital in basis}}
    for i, (site, shell, l, m) in enumerate(basis):
        for other in range(2 * l + 1):
            turn[index[Orbital(int(target[site]), shell, l, other)], i] = blocks[l][other, m]
    phases = np.exp(-2j * np.pi * images @ lattice.T)
    return turn * phases[:, None, [orbital.site for orbital in basis]]


def _rotated_harmonics(l: int, rotation: Array) -> Array:
    """D with ``Y_m(rotation^-1 r) = sum_n D_nm Y_n(r)``, from their values in directions enough to tell."""
    directions = np.random.default_rng(0).normal(size=(4 * l + 4, 3))
    solution, *_ = np.linalg.lstsq(real_harmonics(l, directions), real_harmonics(l, directions @ rotation), rcond=None)
    return np.asarray(solution)
