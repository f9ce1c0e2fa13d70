"""Structures and site DOS labels as arrays, the batches drawn from them, and how well the labels cover the elements."""

from dosmatgen_ase.data.bands import MeshBands
from dosmatgen_ase.data.dataset import (
    LABEL_SIGMA,
    CrystalDataset,
    SiteDOSLabels,
    Structures,
    formula_fold,
    load_pseudo_labels,
    load_shell_dos,
    load_site_dos,
    load_structures,
    read_crystals,
    size_bucket_batches,
)
from dosmatgen_ase.data.shards import ORIGINS, SHARD_KEYS, SHARD_UNIT, load_bands, read_shard

__all__ = [
    "LABEL_SIGMA",
    "ORIGINS",
    "SHARD_KEYS",
    "SHARD_UNIT",
    "CrystalDataset",
    "MeshBands",
    "SiteDOSLabels",
    "Structures",
    "formula_fold",
    "load_bands",
    "load_pseudo_labels",
    "load_shell_dos",
    "load_site_dos",
    "load_structures",
    "read_crystals",
    "read_shard",
    "size_bucket_batches",
]
