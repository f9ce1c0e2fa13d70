"""Structures and site DOS labels as arrays, the batches drawn from them, and how well the labels cover the elements."""

from dosmatgen_ase.data.dataset import (
    LABEL_SIGMA,
    SHARD_KEYS,
    SHARD_UNIT,
    CrystalDataset,
    SiteDOSLabels,
    Structures,
    formula_fold,
    load_pseudo_labels,
    load_shell_dos,
    load_site_dos,
    load_structures,
    read_crystals,
    read_shard,
    size_bucket_batches,
)

__all__ = [
    "LABEL_SIGMA",
    "SHARD_KEYS",
    "SHARD_UNIT",
    "CrystalDataset",
    "SiteDOSLabels",
    "Structures",
    "formula_fold",
    "load_pseudo_labels",
    "load_shell_dos",
    "load_site_dos",
    "load_structures",
    "read_crystals",
    "read_shard",
    "size_bucket_batches",
]
