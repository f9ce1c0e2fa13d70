"""Use of a trained model: crystals in, site DOS and gaps out, in batches of like size on fixed meshes of k-points."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA
from dosmatgen_ase.forward.tight_binding.graph import CrystalGraph, collate
from dosmatgen_ase.forward.tight_binding.kpoints import mesh_size, offset_mesh
from dosmatgen_ase.forward.tight_binding.model import TightBinding
from dosmatgen_ase.forward.tight_binding.spectrum import broadened

MAX_ORBITALS = 1000  # of a cell, as of 111 atoms with s, p and d: a Hamiltonian takes 8 MB a k-point
BATCH_ELEMENTS = 400_000  # of the Hamiltonians of a batch, all k-points together
MAX_BATCH = 32


class TightBindingDOS(NamedTuple):
    """What one model says of one crystal.

    Attributes
    ----------
    dos : (n, 3, 151) float32
        Of s, p and d of every site, states/eV at sigma 0.2 eV on `dos.MODEL_GRID`.
    gap : float, eV
        0 for a metal.
    """

    dos: np.ndarray
    gap: float


def mesh_points(sites: int) -> int:
    """Return the points of the mesh for a cell of so many atoms, at most: about the same density for all."""
    return max(8, min(96, 256 // sites))


def predict_crystals(
    model: TightBinding, graphs: Sequence[CrystalGraph], progress: bool = False, *, mesh: int = 0
) -> list[TightBindingDOS]:
    """Predict the DOS of crystals, each the same in any company (within rounding).

    Parameters
    ----------
    model : in evaluation mode
    graphs : crystals of at most `MAX_ORBITALS` orbitals each
    progress : show a progress bar
    mesh : of `kpoints.offset_mesh`, one of four
    """
    device = model.start.device
    energies = torch.tensor(MODEL_GRID.energies, dtype=torch.float32, device=device)
    found: dict[int, TightBindingDOS] = {}
    with torch.no_grad(), tqdm(total=len(graphs), disable=not progress, unit="crystal", desc="tight binding") as bar:
        for rows, points, weights, steps in _batches(graphs, mesh):
            batch = collate([graphs[i] for i in rows]).to(device)
            spectrum, _ = model.spectrum(batch, points.to(device), weights.to(device), steps.to(device))
            dos = broadened(spectrum, energies, MODEL_SIGMA).cpu().numpy()
            for b, i in enumerate(rows):
                sites = len(graphs[i].numbers)
                shells = dos[b, : 3 * sites].reshape(sites, 3, -1)
                found[i] = TightBindingDOS(shells.copy(), float(spectrum.gap[b]))
            bar.update(len(rows))
    return [found[i] for i in range(len(graphs))]


def _batches(graphs: Sequence[CrystalGraph], which: int) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Share crystals out in batches of like size, all or none magnetic, with their points of the Brillouin zone.

    Yields the rows of b crystals; the points (b, k, 3), their weights (b, k), and the steps of the meshes (b, 3).
    """
    sizes = [mesh_size(g.reciprocal, mesh_points(len(g.numbers))) for g in graphs]
    meshes = [offset_mesh(size, which) for size in sizes]
    order = sorted(range(len(graphs)), key=lambda i: (graphs[i].magnetic, len(meshes[i]).bit_length(), graphs[i].size))
    while order:
        rows, most = [order[0]], len(meshes[order[0]])
        for i in order[1:MAX_BATCH]:
            most = max(most, len(meshes[i]))
            like = graphs[i].magnetic == graphs[rows[0]].magnetic and graphs[i].size <= 1.3 * graphs[rows[0]].size + 2
            if not like or (len(rows) + 1) * most * graphs[i].size ** 2 > BATCH_ELEMENTS:
                break
            rows.append(i)
        order = order[len(rows) :]
        most = max(len(meshes[i]) for i in rows)
        points, weights = np.zeros((len(rows), most, 3)), np.zeros((len(rows), most))
        for b, i in enumerate(rows):  # what is added repeats a point and has no weight
            count = len(meshes[i])
            points[b], points[b, :count], weights[b, :count] = meshes[i][0], meshes[i], 1 / count
        steps = torch.from_numpy(np.stack([1 / sizes[i] for i in rows]))
        yield rows, torch.from_numpy(points).float(), torch.from_numpy(weights).float(), steps.float()
