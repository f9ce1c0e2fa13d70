"""The data set as torch-geometric sees it: one `Data` per crystal, and a size-aware loader. Needs the extra `[train]`.

The package's own training does not come through here (its network works on dense arrays); other graph networks can.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler
from torch_geometric.data import Data, Dataset
from torch_geometric.loader import DataLoader

from dosmatgen_ase.data.dataset import CrystalDataset, size_bucket_batches


class PyGCrystalDataset(Dataset):
    """View of a `CrystalDataset` as torch-geometric `Data`.

    Each item has `z` (n,) atomic numbers, `x` (n, 3) fractional coordinates, `pos` (n, 3) Angstrom, `cell` (1, 3, 3)
    Angstrom (rows are lattice vectors), `y` (n, 151) site DOS in states/eV, `y_known` (n, 151) bool (all false without
    a DOS), `pseudo` (1,) bool and `material_id`. Bonds are left to the user's own transform.
    """

    def __init__(self, dataset: CrystalDataset) -> None:
        super().__init__()
        self.crystals = dataset

    def len(self) -> int:
        """Return the number of crystals."""
        return len(self.crystals)

    def get(self, idx: int) -> Data:
        """Return crystal `idx`."""
        structures = self.crystals.structures
        n = int(structures.num_atoms[idx])
        frac = structures.frac_coords[idx, :n]
        row = int(self.crystals.dos_index[idx])
        bins = self.crystals.dos.shape[-1]
        values = self.crystals.dos[row, :n] if row >= 0 else np.zeros((n, bins))
        known = self.crystals.known[row, :n] if row >= 0 else np.zeros((n, bins), dtype=bool)
        return Data(
            z=torch.tensor(structures.atomic_numbers[idx, :n]),
            x=torch.tensor(frac, dtype=torch.float32),
            pos=torch.tensor(frac @ structures.cell[idx], dtype=torch.float32),
            cell=torch.tensor(structures.cell[idx], dtype=torch.float32)[None],
            y=torch.tensor(values, dtype=torch.float32),
            y_known=torch.tensor(known),
            pseudo=torch.tensor([row >= 0 and bool(self.crystals.pseudo[row])]),
            material_id=str(structures.material_id[idx]),
        )


class SizeBucketSampler(Sampler[list[int]]):
    """Batches of `size_bucket_batches`, anew each epoch; epoch e is drawn from the seed (seed, e)."""

    def __init__(self, num_atoms: np.ndarray, max_pairs: int, seed: int = 0) -> None:
        self.num_atoms, self.max_pairs, self.seed, self.epoch = num_atoms, max_pairs, seed, 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        self.epoch += 1
        for batch in size_bucket_batches(self.num_atoms, self.max_pairs, generator):
            yield batch.tolist()

    def __len__(self) -> int:
        """Return the number of batches, which the sizes alone decide: it is the same in every epoch."""
        return sum(1 for _ in size_bucket_batches(self.num_atoms, self.max_pairs, np.random.default_rng(0)))


def pyg_loader(dataset: CrystalDataset, max_pairs: int = 8192, seed: int = 0) -> DataLoader:
    """Return a torch-geometric `DataLoader` over batches of crystals of similar size.

    Parameters
    ----------
    dataset : crystals with or without a DOS
    max_pairs : bound on (crystals in the batch) x (sites of its largest)^2
    seed : of the order
    """
    sampler = SizeBucketSampler(dataset.structures.num_atoms, max_pairs, seed)
    return DataLoader(PyGCrystalDataset(dataset), batch_sampler=sampler)
