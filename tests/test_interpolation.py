"""Interpolation of bands: tight-binding crystals come out exactly, whatever their symmetry."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.data import covalent_radii
from ase.lattice import BCT
from ase.units import Bohr
from scipy.io import FortranFile
from scipy.spatial.transform import Rotation

from dosmatgen_ase.dft.interpolation import (
    _WIDTH,
    IrreducibleMesh,
    Orbital,
    _rotated_harmonics,
    gaussian_orbitals,
    interpolated,
    mesh_size,
    project_on_gaussians,
    real_harmonics,
)
from dosmatgen_ase.dos import Array

HCP, ZINCBLENDE = bulk("Mg"), bulk("GaAs", "zincblende", 5.6)
WURTZITE = bulk("ZnO", "wurtzite", a=3.2, c=5.2)
TRICLINIC = Atoms(
    "SiC", scaled_positions=[[0, 0, 0], [0.3, 0.4, 0.6]], cell=[[3, 0, 0], [0.7, 3.4, 0], [1, 0.4, 4]], pbc=True
)
TETRAGONAL = Atoms("Al", cell=BCT(3.0, 4.6).tocell(), pbc=True)  # body-centred, its mesh is 4 x 4 x 5

# -- k-points ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("atoms", [bulk("Si"), HCP, TRICLINIC, bulk("Fe")], ids=["fcc", "hcp", "triclinic", "bcc"])
def test_irreducible_points_stand_for_the_full_mesh(atoms: Atoms) -> None:
    mesh = IrreducibleMesh.of(atoms, 1.3)
    assert mesh.weights.sum() == pytest.approx(1)
    assert len(mesh.points) < mesh.size.prod()
    # A function with the symmetry of the lattice: cosines over all vectors of the shortest shells.
    n = np.stack(np.meshgrid(*[range(-4, 5)] * 3, indexing="ij"), -1).reshape(-1, 3)
    length = np.linalg.norm(n @ atoms.cell.array, axis=1)

    def energy(points: Array) -> Array:
        return np.asarray((np.cos(2 * np.pi * points @ n.T) * np.exp(-0.5 * length**2 / 9) * (length < 7)).sum(1))

    grid = np.array(list(np.ndindex(*mesh.size))) / mesh.size
    assert mesh.weights @ energy(mesh.points) == pytest.approx(energy(grid).mean())


def test_the_mesh_follows_the_reciprocal_cell() -> None:
    assert mesh_size(Atoms("H", cell=np.diag([2 * np.pi, np.pi, 40.0]), pbc=True), 2.9).tolist() == [3, 6, 1]
    assert len(IrreducibleMesh.of(bulk("Al"), 3.0).points) == 35, "as in the label set"


# -- orbitals ----------------------------------------------------------------------------------------------------------


def test_harmonics_are_those_of_quantum_espresso() -> None:
    x, y, z = direction = np.array([0.6, 0.48, 0.64])
    s, p, d = (real_harmonics(l, direction) for l in range(3))  # noqa: E741
    assert s == pytest.approx([math.sqrt(1 / (4 * np.pi))])
    assert p == pytest.approx(math.sqrt(3 / (4 * np.pi)) * np.array([z, -x, -y]))
    expected = np.array([(3 * z * z - 1) / math.sqrt(12), -x * z, -y * z, (x * x - y * y) / 2, x * y])
    assert d == pytest.approx(math.sqrt(15 / (4 * np.pi)) * expected)


@pytest.mark.parametrize("degree", range(4))
def test_rotated_harmonics_represent_the_group(degree: int) -> None:
    first, second = Rotation.random(2, rng=np.random.default_rng(1)).as_matrix()
    second = -second  # an improper one
    one, two, both = (_rotated_harmonics(degree, turn) for turn in (first, second, first @ second))
    assert one @ two == pytest.approx(both)
    assert one @ one.T == pytest.approx(np.eye(2 * degree + 1))


def write_waves(path: Path, k: Array, reciprocal: Array, miller: np.ndarray, waves: Array) -> None:
    """What Quantum ESPRESSO writes for one k-point, lengths in 1/bohr, by the suffix."""
    if path.suffix == ".hdf5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            file.attrs["xk"] = k
            file["MillerIndices"], file["evc"] = miller.astype(np.int32), np.ascontiguousarray(waves).view(float)
            for i, vector in enumerate(reciprocal):
                file["MillerIndices"].attrs[f"bg{i + 1}"] = vector
        return
    with FortranFile(path, "w") as file:
        file.write_record(np.int32(1), k, np.int32(1), np.int32(0), np.float64(1))
        file.write_record(np.array([len(miller), len(miller), 1, len(waves)], dtype=np.int32))
        file.write_record(reciprocal)
        file.write_record(miller.astype(np.int32))
        for wave in waves:
            file.write_record(wave)


@pytest.mark.parametrize("suffix", [".dat", ".hdf5"])
def test_a_band_that_is_an_orbital_projects_on_it_alone(tmp_path: Path, suffix: str) -> None:
    """Orbitals of an atom in a large box, written as bands: their projections are the unit matrix."""
    atoms = Atoms("C", positions=[[1.0, 2.0, 0.5]], cell=np.diag([6.0, 6.5, 7.0]), pbc=True)
    reciprocal = 2 * np.pi * atoms.cell.reciprocal().array * Bohr
    miller = np.stack(np.meshgrid(*[range(-14, 15)] * 3, indexing="ij"), -1).reshape(-1, 3)
    fractional = np.array([0.2, 0.1, -0.3]) + miller
    q, width = fractional @ reciprocal / Bohr, _WIDTH * covalent_radii[6]
    radial = np.exp(-((width * q) ** 2).sum(1) / 2 - 2j * np.pi * fractional @ atoms.get_scaled_positions()[0])
    length = width * np.linalg.norm(q, axis=1)
    waves = [w for l in range(3) for w in ((-1j * length) ** l * radial * real_harmonics(l, q).T)]  # noqa: E741
    waves = np.array([w / np.linalg.norm(w) for w in waves])
    file = (tmp_path / "wfcup1").with_suffix(suffix)
    write_waves(file, np.array([0.2, 0.1, -0.3]) @ reciprocal, reciprocal, miller, waves)
    assert project_on_gaussians(atoms, tmp_path / "wfcup1") == pytest.approx(np.eye(9), abs=1e-6)


@pytest.mark.parametrize("suffix", [".dat", ".hdf5"])
@pytest.mark.parametrize("content", [b"", b"wrong" * 20])
def test_files_that_hold_no_wavefunctions(tmp_path: Path, suffix: str, content: bytes) -> None:
    if suffix == ".hdf5":
        pytest.importorskip("h5py")
    with pytest.raises(FileNotFoundError, match=r"no wavefunctions at .*wfc1\.dat, nor with \.hdf5"):
        project_on_gaussians(HCP, tmp_path / "wfc1")
    (tmp_path / "wfc1").with_suffix(suffix).write_bytes(content)
    with pytest.raises(ValueError, match="no wavefunctions of Quantum ESPRESSO in"):
        project_on_gaussians(HCP, tmp_path / "wfc1")


# -- interpolation -----------------------------------------------------------------------------------------------------


def s_and_p(atoms: Atoms) -> list[Orbital]:
    return [Orbital(i, 1 + l, l, m) for i in range(len(atoms)) for l in range(2) for m in range(2 * l + 1)]  # noqa: E741


def tight_binding(atoms: Atoms, points: Array, reach: float, signs: tuple[int, int, int] = (1, -1, -1)) -> Array:
    """Hamiltonian of s and p orbitals (z, x, y with `signs`), two-centre hoppings that end at `reach`, eV."""
    spans = np.ceil(reach * np.linalg.norm(atoms.cell.reciprocal(), axis=1)).astype(int) + 1
    lattice = np.stack(np.meshgrid(*[range(-n, n + 1) for n in spans], indexing="ij"), -1).reshape(-1, 3)
    positions, axes = atoms.get_scaled_positions(wrap=False), np.eye(3)[[2, 0, 1]] * np.array(signs)[:, None]
    blocks = np.zeros((len(points), len(atoms), 4, len(atoms), 4), dtype=complex)
    for i, j in np.ndindex(len(atoms), len(atoms)):
        for vector in lattice:
            apart = (vector + positions[j] - positions[i]) @ atoms.cell.array
            distance = np.linalg.norm(apart)
            if distance >= reach:
                continue
            if distance < 1e-6:
                hopping = np.diag([-0.1 * atoms.numbers[i], *[0.1 * atoms.numbers[i]] * 3])
            else:
                cosines, decay = axes @ apart / distance, (1 - distance / reach) ** 2
                hopping = np.zeros((4, 4))
                hopping[0, 0], hopping[0, 1:], hopping[1:, 0] = -1.4, 1.8 * cosines, -1.8 * cosines
                hopping[1:, 1:] = 3.2 * np.outer(cosines, cosines) - 0.8 * (np.eye(3) - np.outer(cosines, cosines))
                hopping *= decay
            blocks[:, i, :, j] += np.exp(2j * np.pi * points @ vector)[:, None, None] * hopping
    return blocks.reshape(len(points), 4 * len(atoms), 4 * len(atoms))


def error(atoms: Atoms, density: float, signs: tuple[int, int, int] = (1, -1, -1)) -> tuple[float, float]:
    """Greatest error of eigenvalues (eV) and probabilities at random k-points."""
    mesh, points = IrreducibleMesh.of(atoms, density), np.random.default_rng(0).random((20, 3))
    reach = 0.99 * math.pi * density  # no hopping is longer than half the period of the mesh
    levels, vectors = np.linalg.eigh(tight_binding(atoms, mesh.points, reach, signs))
    nothing = np.zeros((len(levels), len(gaussian_orbitals(atoms)), levels.shape[1]))
    found, shares = interpolated(atoms, mesh, s_and_p(atoms), levels, vectors, nothing, points)
    exact, states = np.linalg.eigh(tight_binding(atoms, points, reach, signs))
    return float(np.abs(found - exact).max()), float(np.abs(shares - np.abs(states) ** 2).max())


@pytest.mark.parametrize(
    "atoms",
    [bulk("Al"), bulk("Fe"), HCP, bulk("Si"), ZINCBLENDE, WURTZITE, TRICLINIC, TETRAGONAL],
    ids=["fcc", "bcc", "hcp", "diamond", "zincblende", "wurtzite", "triclinic", "mesh of lower symmetry"],
)
def test_a_tight_binding_crystal_comes_out_exactly(atoms: Atoms) -> None:
    """Bands cross, sites are swapped, screw axes and glide planes shift them: nothing of it leaves an error."""
    turned = atoms.copy()
    turned.rotate(40, (1, 2, 3), rotate_cell=True)
    turned.positions += 0.37  # the phases depend on where the atoms are
    assert error(turned, 1.4) == pytest.approx((0, 0), abs=1e-4)


def test_the_signs_of_the_orbitals_matter() -> None:
    """Negative control: orbitals along +x and +y are not those of Quantum ESPRESSO."""
    assert error(bulk("Al"), 1.4, (1, 1, 1))[0] > 0.1


def test_too_coarse_a_mesh_has_an_error() -> None:
    """Negative control: what the mesh cannot tell apart is lost."""
    mesh, points = IrreducibleMesh.of(HCP, 0.7), np.random.default_rng(0).random((20, 3))
    levels, vectors = np.linalg.eigh(tight_binding(HCP, mesh.points, 4.4))
    nothing = np.zeros((len(levels), 18, 8))
    found, _ = interpolated(HCP, mesh, s_and_p(HCP), levels, vectors, nothing, points)
    assert np.abs(found - np.linalg.eigvalsh(tight_binding(HCP, points, 4.4))).max() > 0.05


@pytest.mark.parametrize("num_bands", [5, 20, 30], ids=["few", "many", "more than orbitals"])
def test_points_of_the_mesh_keep_their_eigenvalues(num_bands: int) -> None:
    """Whatever the projections: here random ones, with Gaussians, in a crystal without symmetry."""
    rng, mesh = np.random.default_rng(2), IrreducibleMesh.of(TRICLINIC, 1.2)
    levels = np.cumsum(rng.uniform(0.1, 1.0, size=(len(mesh.points), num_bands)), axis=1)
    real, imaginary = rng.normal(size=(2, len(levels), 8 + 18, num_bands))
    atomic, gaussians = np.split(real + 1j * imaginary, [8], axis=1)
    atomic /= np.linalg.norm(atomic, axis=1, keepdims=True) * rng.uniform(1, 2, size=(len(levels), 1, num_bands))
    found, shares = interpolated(TRICLINIC, mesh, s_and_p(TRICLINIC), levels, atomic, gaussians, mesh.points)
    kept = min(num_bands, 26)
    assert found == pytest.approx(levels[:, :kept], abs=1e-5)
    assert shares == pytest.approx(np.abs(atomic[:, :, :kept]) ** 2, abs=1e-3)


def test_projections_of_a_band_never_exceed_it() -> None:
    """Bands that are atomic orbitals throughout, beside Gaussians that turn the basis otherwise at every point."""
    rng, mesh = np.random.default_rng(3), IrreducibleMesh.of(TRICLINIC, 1.2)
    levels = np.cumsum(rng.uniform(0.1, 1.0, size=(len(mesh.points), 8)), axis=1)
    atomic, gaussians = np.linalg.qr(rng.normal(size=(len(levels), 8, 8)))[0], rng.normal(size=(len(levels), 18, 8))
    _, shares = interpolated(TRICLINIC, mesh, s_and_p(TRICLINIC), levels, atomic, gaussians, rng.random((50, 3)))
    assert shares.sum(1).max() <= 1 + 1e-6
