"""A crystal as the model sees it: its bonds within the cutoff, and batches of several crystals.

`crystal_graph` finds the bonds of one crystal; `collate` joins crystals of different sizes. Positions and the cell may
be tensors that require a gradient: bonds are linear in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from dosmatgen_ase.forward.tight_binding.basis import ELECTRONS, MAGNETIC, NUM_ORBITALS, ORBITALS

MIN_DISTANCE = 0.1  # Angstrom; closer atoms share a place
TOO_CLOSE = f"two atoms are closer than {MIN_DISTANCE:g} A: move them apart"


@dataclass(frozen=True)
class CrystalGraph:
    """Bonds of one crystal of n atoms.

    Attributes
    ----------
    numbers : (n,) int64
    first, second : (e,) int64
        Atoms of each directed bond.
    bond : (e, 3)
        From the first atom to the second, Angstrom.
    image : (e,) int64
        Row of `vectors` that tells the cell of the second atom.
    vectors : (v, 3)
        Lattice vectors that occur, in units of the cell; row 0 is zero.
    reciprocal : (3,) float64 array
        Lengths of the reciprocal vectors, 1/Angstrom (without 2 pi).
    source, target : (m,) int64
        Elements of the bonds' blocks, out of e x 81, between orbitals that exist; their image, row and column in the
        Hamiltonian, packed as (image * size + row) * size + column.
    size : int
        Number of orbitals.
    """

    numbers: Tensor
    first: Tensor
    second: Tensor
    bond: Tensor
    image: Tensor
    vectors: Tensor
    reciprocal: np.ndarray
    source: Tensor
    target: Tensor
    size: int

    @property
    def magnetic(self) -> bool:
        """Whether the crystal gets two spin channels."""
        return bool(MAGNETIC.intersection(self.numbers.tolist()))

    @property
    def electrons(self) -> float:
        """Valence electrons of the cell."""
        return float(ELECTRONS[self.numbers.numpy()].sum())


def crystal_graph(atoms: Atoms, cutoff: float) -> CrystalGraph:
    """Find the bonds of a periodic crystal.

    Parameters
    ----------
    atoms : periodic crystal
    cutoff : Angstrom

    Raises
    ------
    ValueError
        If two atoms share a place.
    """
    from ase.neighborlist import neighbor_list

    first, second, shift, bond = neighbor_list("ijSD", atoms, cutoff)
    if len(bond) and np.linalg.norm(bond, axis=1).min() < MIN_DISTANCE:
        raise ValueError(TOO_CLOSE)
    numbers = atoms.numbers.astype(np.int64)
    everything = np.concatenate([np.zeros((1, 3), dtype=np.int64), shift])
    vectors, image = np.unique(everything, axis=0, return_inverse=True)
    image = image.ravel()
    order = np.argsort(np.arange(len(vectors)) != image[0], kind="stable")  # the home cell first
    vectors, image = vectors[order], np.argsort(order)[image[1:]]
    size, exists = num_orbitals(atoms), ORBITALS[numbers]  # (n, 9)
    place = np.cumsum(exists.ravel()).reshape(exists.shape) - 1  # of each orbital in the Hamiltonian
    both = exists[first][:, :, None] & exists[second][:, None]
    target = (image[:, None, None] * size + place[first][:, :, None]) * size + place[second][:, None]
    return CrystalGraph(
        numbers=torch.from_numpy(numbers),
        first=torch.from_numpy(first.astype(np.int64)),
        second=torch.from_numpy(second.astype(np.int64)),
        bond=torch.from_numpy(bond.astype(np.float32)),
        image=torch.from_numpy(image.astype(np.int64)),
        vectors=torch.from_numpy(vectors.astype(np.float32)),
        reciprocal=np.linalg.norm(np.linalg.inv(atoms.cell.array).T, axis=1),
        source=torch.from_numpy(np.flatnonzero(both).astype(np.int32)),
        target=torch.from_numpy(target[both].astype(np.int32)),
        size=size,
    )


def num_orbitals(atoms: Atoms) -> int:
    """Orbitals of a cell, which is the size of its Hamiltonian."""
    return int(ORBITALS[atoms.numbers].sum())


@dataclass(frozen=True)
class GraphBatch:
    """Several crystals, all or none of them magnetic; atoms and bonds in one row, matrices padded to one size.

    Attributes
    ----------
    numbers, owner, site : (n,)
        Atomic number, crystal, and number within the crystal of each atom.
    first, second : (e,)
        Atoms of each bond.
    bond : (e, 3), Angstrom
    vectors : (b, v, 3)
        Lattice vectors of each crystal, padded with zeros; row 0 is the home cell.
    source, target : (m,)
        Where elements of bonds' blocks go in the flattened (b, v, size, size).
    place, exists : (n, 9)
        Place of each orbital in its crystal's Hamiltonian; whether it exists.
    sizes, electrons : (b,)
        Orbitals and electrons of each crystal.
    size, sites : int
        Largest number of orbitals and of sites.
    magnetic : bool
    """

    numbers: Tensor
    owner: Tensor
    site: Tensor
    first: Tensor
    second: Tensor
    bond: Tensor
    vectors: Tensor
    source: Tensor
    target: Tensor
    place: Tensor
    exists: Tensor
    sizes: Tensor
    electrons: Tensor
    size: int
    sites: int
    magnetic: bool

    def __len__(self) -> int:
        return len(self.sizes)

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on a device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in self.__dict__.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def collate(graphs: Sequence[CrystalGraph]) -> GraphBatch:
    """Join crystals, all or none of them magnetic.

    Raises
    ------
    ValueError
        If some are magnetic and some are not.
    """
    if len({g.magnetic for g in graphs}) != 1:
        raise ValueError("a batch needs at least one crystal, and either all or none of them magnetic")
    counts = torch.tensor([len(g.numbers) for g in graphs])
    start = (counts.cumsum(0) - counts).tolist()
    size, most = max(g.size for g in graphs), max(len(g.vectors) for g in graphs)
    numbers = torch.cat([g.numbers for g in graphs])
    owner = torch.arange(len(graphs)).repeat_interleave(counts)
    exists = torch.from_numpy(ORBITALS)[numbers]
    vectors = graphs[0].vectors.new_zeros(len(graphs), most, 3)
    source, target, bonds = [], [], 0
    for b, g in enumerate(graphs):
        vectors[b, : len(g.vectors)] = g.vectors
        source.append(g.source.long() + bonds)
        packed = g.target.long()
        column, rest = packed % g.size, packed // g.size
        target.append(((b * most + rest // g.size) * size + rest % g.size) * size + column)
        bonds += len(g.first) * NUM_ORBITALS**2
    sizes = torch.tensor([g.size for g in graphs])
    return GraphBatch(
        numbers=numbers,
        owner=owner,
        site=torch.cat([torch.arange(n) for n in counts.tolist()]),
        first=torch.cat([g.first + s for g, s in zip(graphs, start, strict=True)]),
        second=torch.cat([g.second + s for g, s in zip(graphs, start, strict=True)]),
        bond=torch.cat([g.bond for g in graphs]),
        vectors=vectors,
        source=torch.cat(source),
        target=torch.cat(target),
        place=exists.flatten().cumsum(0).view(-1, NUM_ORBITALS) - 1 - (sizes.cumsum(0) - sizes)[owner][:, None],
        exists=exists,
        sizes=sizes,
        electrons=torch.tensor([g.electrons for g in graphs]),
        size=size,
        sites=int(counts.max()),
        magnetic=graphs[0].magnetic,
    )
