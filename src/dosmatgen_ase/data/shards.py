"""Shards, the files of the label set: their arrays, and what must fit in them. ``data/README.md`` tells the layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dosmatgen_ase.data.bands import BAND_KEYS, MeshBands, misfit_of_bands, unpack_bands
from dosmatgen_ase.files import read_npz
from dosmatgen_ase.limits import MAX_ATOMIC_NUMBER, MAX_ATOMS

SHARD_UNIT = 1e-3  # states/eV: shards store integers
SHARD_KEYS = {  # kinds of number and axes
    "material_id": ("U", 1), "split": ("U", 1), "atom_offset": ("iu", 1), "atomic_numbers": ("iu", 1),
    "frac_coords": ("f", 2), "cell": ("f", 2), "energies": ("f", 1), "site_dos": ("iu", 3), "total_dos": ("iu", 2),
    "e_max": ("f", 1), "band_gap": ("f", 1),
}  # fmt: skip
_SHARD_EXTRAS = {
    "recipe": ("iu", 0), "failed_id": ("U", 1), "failed_crystal": ("U", 1), "origin": ("U", 1), "parent": ("U", 1)
}  # fmt: skip

ORIGINS = ("given", "perturbed", "generated")
"""What the crystal of a label is: a known one, a copy of one off equilibrium, or one that a model made."""


def read_shard(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of one label shard: those of `SHARD_KEYS` and the extras, which older ones lack; no bands.

    Raises
    ------
    ValueError
        If the file is something else, damaged, or its arrays do not fit each other.
    """
    try:
        read = read_npz(path, SHARD_KEYS, _SHARD_EXTRAS)
        n = len(read["material_id"])
        failed = read.get("failed_id", np.array([], np.str_))
        older = {"failed_id": failed, "failed_crystal": np.full(len(failed), "")}
        older |= {"recipe": np.array(1), "origin": np.full(n, "given"), "parent": np.full(n, "")}
        data = {**older, **read}
        if wrong := _misfit(data):
            raise ValueError(wrong)
    except ValueError as error:
        raise ValueError(f"{path} is not a label shard as described in data/README.md: {error}") from None
    return data


def read_shards(directory: str | Path) -> list[dict[str, np.ndarray]]:
    """Read all shards of a folder, so that of labels with one `material_id` the last is the one that counts.

    Raises
    ------
    FileNotFoundError
        If the folder holds no shard.
    ValueError
        As `read_shard`.
    """
    return [data for _, data in _in_order(directory)]


def _in_order(directory: str | Path) -> list[tuple[Path, dict[str, np.ndarray]]]:
    """Shards with their files, those of later recipes last."""
    shards = [(path, read_shard(path)) for path in shard_paths(directory)]
    if not shards:
        raise FileNotFoundError(f"no label shards (*.npz) in {directory}: pass data/site_dos of a repository clone")
    return sorted(shards, key=lambda shard: int(shard[1]["recipe"]))


def shard_paths(directory: str | Path) -> list[Path]:
    """Files of the shards, in the order of the time in their names."""
    return sorted(Path(directory).glob("*.npz"))


def load_bands(directory: str | Path) -> dict[str, MeshBands]:
    """Read the bands of the labels that have any, which are those since recipe 5.

    Parameters
    ----------
    directory : path
        Folder of shards, as `load_site_dos` takes it. Where a `material_id` comes twice, the bands are those of the
        label that `load_site_dos` gives; if that has none, there are none.

    Returns
    -------
    dict
        Bands by `material_id`.

    Raises
    ------
    FileNotFoundError
        If the directory holds no shard.
    ValueError
        If a shard or its bands are damaged.

    Examples
    --------
    >>> bands = load_bands("data/site_dos")["mp-1700-r1"]  # doctest: +SKIP
    >>> bands.energies.shape  # spins, k-points, bands  # doctest: +SKIP
    (1, 76, 5)
    """
    found: dict[str, MeshBands | None] = {}
    for path, data in _in_order(directory):
        found |= zip(data["material_id"].tolist(), _bands(path, data), strict=True)
    return {name: bands for name, bands in found.items() if bands is not None}


def _bands(path: Path, data: dict[str, np.ndarray]) -> list[MeshBands | None]:
    """Bands of each label of a shard."""
    n = len(data["material_id"])
    try:
        arrays = read_npz(path, {}, BAND_KEYS)
        if "bands" not in arrays:
            return [None] * n
        if wrong := misfit_of_bands(arrays, n):
            raise ValueError(wrong)
    except ValueError as error:
        raise ValueError(f"{path} holds no bands as described in data/README.md: {error}") from None
    return unpack_bands(arrays, data["band_gap"] > 0)


def _misfit(data: dict[str, np.ndarray]) -> str | None:
    """What does not fit in the arrays of a shard."""
    n, sites, energies = len(data["material_id"]), len(data["atomic_numbers"]), data["energies"]
    shapes = {
        "failed_crystal": data["failed_id"].shape,
        "origin": (n,), "parent": (n,), "split": (n,), "cell": (n, 9), "e_max": (n,), "band_gap": (n,),
        "atom_offset": (n + 1,),
        "frac_coords": (sites, 3), "site_dos": (sites, 4, energies.size), "total_dos": (n, energies.size),
    }  # fmt: skip
    if wrong := [name for name, shape in shapes.items() if data[name].shape != shape]:
        return f"{', '.join(wrong)} do not fit the other arrays"
    if not np.isin(data["origin"], ORIGINS).all():
        return f"origin must be {', '.join(ORIGINS)}"
    sizes, offset = np.diff(data["atom_offset"].astype(np.int64)), data["atom_offset"]
    if not (offset[0] == 0 and offset[-1] == sites and ((sizes >= 1) & (sizes <= MAX_ATOMS)).all()):
        return f"atom_offset does not tell 1 to {MAX_ATOMS} atoms of each structure"
    if not ((data["atomic_numbers"] >= 1) & (data["atomic_numbers"] <= MAX_ATOMIC_NUMBER)).all():
        return f"atomic_numbers must lie in 1 to {MAX_ATOMIC_NUMBER}"
    numbers = ("frac_coords", "cell", "energies", "e_max", "band_gap")
    if wrong := [name for name in numbers if not np.isfinite(data[name]).all()]:
        return f"{', '.join(wrong)} hold numbers that are not finite"
    if n and np.abs(np.linalg.det(data["cell"].reshape(n, 3, 3).astype(float))).min() < 1e-3:
        return "a cell has no volume"
    if energies.size < 2 or not (np.diff(energies) > 0).all() or abs(energies).max() > 1000:
        return "energies must rise, within 1000 eV of zero"
    return None
