"""Bands of a crystal, at any points of its Brillouin zone and along a path through it, by learned tight binding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dosmatgen_ase.crystals.checks import formula_of
from dosmatgen_ase.forward.features import tight_binding_graph
from dosmatgen_ase.forward.predictor import MIN_LABELS, DOSPredictor, default_predictor, too_few_labels
from dosmatgen_ase.forward.tight_binding.graph import CrystalGraph, collate
from dosmatgen_ase.forward.tight_binding.kpoints import symmetric_mesh
from dosmatgen_ase.forward.tight_binding.model import TightBinding, bloch
from dosmatgen_ase.forward.tight_binding.predict import mesh_points
from dosmatgen_ase.threads import cpu_threads

if TYPE_CHECKING:
    from ase import Atoms
    from ase.spectrum.band_structure import BandStructure
    from numpy.typing import ArrayLike

POINTS_PER_STEP = 32
_SAME = 1e-3  # eV, by which a full band may rise above zero by rounding


def predict_bands(
    atoms: Atoms, path: str | None = None, *, npoints: int = 120, predictor: DOSPredictor | None = None
) -> BandStructure:
    """Predict the bands of a crystal by its first tight-binding model.

    Parameters
    ----------
    atoms : periodic crystal
    path : special points as ASE names them, such as "GXWKGL"; by default ASE's path of the crystal's Bravais lattice
    npoints : of the whole path
    predictor : by default the one that ships

    Returns
    -------
    ase.spectrum.band_structure.BandStructure
        Energies (spins, npoints, bands) in eV; zero is the Fermi level, or the valence-band maximum
        where there is a gap. Bands more than about 5 eV above it are no prediction: labels end there.

    Raises
    ------
    ValueError
        If the crystal cannot be read or holds an element of fewer than 3 labelled structures, the path is not one, or
        the predictor has no tight-binding model.
    """
    from ase.spectrum.band_structure import BandStructure

    model, graph = _readable(atoms, predictor)
    try:
        if isinstance(path, str) and not all(path.split(",")):
            raise ValueError("a piece of it is empty")
        band_path = atoms.cell.bandpath(path, npoints=npoints)
    except (KeyError, ValueError) as error:
        raise ValueError(f"path={path!r} is not a path through special points of this lattice: {error}") from error
    return BandStructure(band_path, _levels(model, graph, torch.tensor(band_path.kpts).float()), reference=0.0)


def predict_levels(atoms: Atoms, kpoints: ArrayLike, *, predictor: DOSPredictor | None = None) -> np.ndarray:
    """Predict the eigenvalues of a crystal at any points of its Brillouin zone, by its first tight-binding model.

    Parameters
    ----------
    atoms : periodic crystal
    kpoints : (k, 3)
        In units of the reciprocal cell.
    predictor : by default the one that ships

    Returns
    -------
    array, shape (spins, k, bands)
        eV, ascending, from the Fermi level, or the valence-band maximum where there is a gap.

    Raises
    ------
    ValueError
        If the crystal cannot be read or holds an element of fewer than 3 labelled structures, the points are not
        (k, 3), or the predictor has no tight-binding model.
    """
    model, graph = _readable(atoms, predictor)
    wanted = torch.from_numpy(np.array(kpoints, dtype=np.float32))
    if wanted.ndim != 2 or wanted.shape[1] != 3 or not len(wanted) or not wanted.isfinite().all():
        raise ValueError(f"kpoints of shape {tuple(wanted.shape)} must be finite numbers of shape (k, 3)")
    return _levels(model, graph, wanted)


def _readable(atoms: Atoms, predictor: DOSPredictor | None) -> tuple[TightBinding, CrystalGraph]:
    """The model that tells the bands, and what it sees of the crystal."""
    predictor = predictor or default_predictor()
    if not predictor.tight_binding:
        raise ValueError("bands need a tight-binding model, and this predictor has none: use the one that ships")
    model = predictor.tight_binding[0]
    try:
        graph = tight_binding_graph(atoms, model.config.cutoff)
        known = predictor.tables["support"].numpy().max(axis=1) >= MIN_LABELS
        if not known[atoms.numbers].all():
            raise ValueError(too_few_labels(atoms.numbers[~known[atoms.numbers]]))
    except ValueError as error:
        raise ValueError(f"no bands for {formula_of(atoms)}: {error}") from error
    return model, graph


def _levels(model: TightBinding, graph: CrystalGraph, kpoints: Tensor) -> np.ndarray:
    batch = collate([graph])
    points, weights = symmetric_mesh(graph.reciprocal, 8 * mesh_points(len(graph.numbers)))
    with torch.no_grad(), cpu_threads(1):
        mesh, _ = model.spectrum(batch, torch.tensor(points)[None].float(), torch.tensor(weights)[None].float())
        elements = model.matrix_elements(batch)
        parts = kpoints.split(POINTS_PER_STEP)
        levels = torch.cat([torch.linalg.eigvalsh(bloch(batch, elements, part[None]))[0] for part in parts], 1)
    zero = mesh.zero
    if mesh.gap > 0:  # these points may meet a higher top of the valence band than the mesh does
        filled = round(graph.electrons * len(levels) / 2)
        together = levels.transpose(0, 1).flatten(1).sort(1).values
        zero = torch.maximum(zero, together[:, filled - 1].max())
    return np.asarray((levels - zero).numpy().astype(float))


def pymatgen_bands(bands: BandStructure, atoms: Atoms) -> Any:
    """Return bands as pymatgen's ``BandStructureSymmLine``; its Fermi level lies in the middle of a gap.

    Parameters
    ----------
    bands : from `predict_bands`
    atoms : the same crystal
    """
    from pymatgen.core import Lattice
    from pymatgen.electronic_structure.bandstructure import BandStructureSymmLine
    from pymatgen.electronic_structure.core import Spin
    from pymatgen.io.ase import AseAtomsAdaptor

    spins = (Spin.up, Spin.down)
    eigenvalues = {spin: energies.T for spin, energies in zip(spins, bands.energies, strict=False)}
    lattice = Lattice(atoms.cell.array).reciprocal_lattice
    special = {("\\Gamma" if name == "G" else name): np.asarray(k) for name, k in bands.path.special_points.items()}
    structure, zero = AseAtomsAdaptor.get_structure(atoms), _mid_gap(bands.energies)
    return BandStructureSymmLine(bands.path.kpts, eigenvalues, lattice, zero, special, structure=structure)


def _mid_gap(energies: np.ndarray) -> float:
    """Middle of the gap above zero of bands (spins, k, bands), 0 without one.

    Zero itself is the valence-band maximum, and pymatgen would see it inside of that band, by rounding.
    """
    lowest, highest = energies.min(axis=1), energies.max(axis=1)
    full, empty = highest <= _SAME, lowest > _SAME
    if not (full | empty).all() or full.all() or empty.all():
        return 0.0
    return float(highest[full].max() + lowest[empty].min()) / 2
