"""Structures and site DOS labels as dense, padded numpy arrays, and the batches drawn from them.

Reading order: `Structures` (the parquet file), `SiteDOSLabels` (the shards of computed DOS, brought to the model's
grid), `CrystalDataset` (both joined by `material_id`), then how a training run walks through them
(`size_bucket_batches`) and how labels are halved (`formula_fold`). Cells hold at most 20 atoms, so everything is padded
to 20 sites and kept in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from ase import Atoms
from ase.formula import Formula

from dosmatgen_ase.data.shards import ORIGINS, SHARD_UNIT, read_shards
from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA, TargetDOS, resample, scale_sites_to_total
from dosmatgen_ase.files import DAMAGE, read_npz, read_structures
from dosmatgen_ase.limits import MAX_ATOMIC_NUMBER, MAX_ATOMS

LABEL_SIGMA = 0.1  # eV, broadening of the stored labels
ROUNDING_FLOOR = 10 * SHARD_UNIT  # states/eV per cell: below, the rounding of the shards decides the ratio of two DOS
SAME_SITES = 1e-3  # fractional, and share of the cell's largest number: labels and tables are in single precision


@dataclass(frozen=True, eq=False, kw_only=True)
class _Crystals:
    """What `Structures` and `SiteDOSLabels` share: the crystals themselves."""

    material_id: np.ndarray
    split: np.ndarray
    num_atoms: np.ndarray
    cell: np.ndarray
    frac_coords: np.ndarray
    atomic_numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.material_id)

    def atoms(self, i: int) -> Atoms:
        """Return crystal `i` as `ase.Atoms`, with its `material_id` in `info`."""
        n = int(self.num_atoms[i])
        return Atoms(
            numbers=self.atomic_numbers[i, :n],
            scaled_positions=self.frac_coords[i, :n],
            cell=self.cell[i],
            pbc=True,
            info={"material_id": str(self.material_id[i])},
        )

    def fingerprints(self) -> np.ndarray:
        """(n,) str array: of cell, sites and elements, so that an id given to another crystal is not taken for it."""
        cell, frac = np.round(self.cell, 4) + 0.0, np.round(self.frac_coords, 4) + 0.0  # -0.0 + 0.0 is 0.0
        parts = (b"".join(a.tobytes() for a in row) for row in zip(cell, frac, self.atomic_numbers, strict=True))
        return np.array([hashlib.sha256(part).hexdigest()[:16] for part in parts], dtype="U16")

    def select(self, rows: np.ndarray) -> Self:
        """Return the rows picked by a boolean mask or an index array, in that order."""
        return type(self)(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


@dataclass(frozen=True, eq=False, kw_only=True)
class Structures(_Crystals):
    """Periodic crystals of 1 to 20 atoms, padded to 20 sites.

    Attributes
    ----------
    material_id, split, reduced_formula : (n,) str arrays
    spacegroup, num_atoms : (n,) int arrays
    cell : (n, 3, 3) float64
        Rows are lattice vectors, Angstrom, right-handed.
    frac_coords : (n, 20, 3) float64
        In [0, 1); zero on padding.
    atomic_numbers : (n, 20) int64
        Zero on padding.
    """

    reduced_formula: np.ndarray
    spacegroup: np.ndarray


def read_crystals(path: str | Path, split: str | None = None, facts: Mapping[str, str] | None = None) -> list[Atoms]:
    """Read crystals of any size, from a table or from a file that ASE reads.

    Parameters
    ----------
    path
        Parquet with the columns ``cell`` (9 floats), ``atomic_numbers``, ``frac_coords`` (3 n) and ``material_id`` of
        `data/structures.parquet`, or any other file with one structure or many.
    split
        Keep only "train", "val" or "test" of a table, which then needs a column ``split``; all by default.
    facts
        Further columns of a table that are kept in ``info`` where they are there, by the name that they get.

    Returns
    -------
    list of Atoms
        With right-handed cells and ``info["material_id"]`` if they come from a table, else as they are read.

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        As `load_structures`.
    """
    path, facts = Path(path), facts or {}
    if path.suffix != ".parquet":
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}: give a parquet table, or a file that ASE reads")
        try:
            return list(read_structures(path))
        except Exception as error:
            raise ValueError(f"{path} holds no structures that ASE reads: {error}") from error
    needed = ["material_id", "cell", "atomic_numbers", "frac_coords"]
    table = _read_table(path, needed, split, list(facts.values()))
    columns = {name: table[column].to_pylist() for name, column in facts.items() if column in table.column_names}
    crystals = []
    try:
        for i, (name, flat, numbers, coords) in enumerate(zip(*(table[c].to_pylist() for c in needed), strict=True)):
            cell, frac = right_handed(np.reshape(flat, (1, 3, 3)), np.reshape(coords, (1, -1, 3)))
            told = {key: values[i] for key, values in columns.items() if values[i] is not None}
            info = {"material_id": str(name), **told}
            crystals.append(Atoms(numbers=numbers, scaled_positions=frac[0], cell=cell[0], pbc=True, info=info))
    except DAMAGE as error:
        raise _not_laid_out(path, error) from None
    return crystals


def _not_laid_out(path: str | Path, error: Exception) -> ValueError:
    told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return ValueError(f"{path} is not laid out as data/structures.parquet, or damaged ({told})")


_FREE_VALUES, _MAX_VALUES = 5_000_000, 10  # of a table; below the first, the second (per byte of the file) is not asked


def _read_table(path: Path, needed: Sequence[str], split: str | None, more: Sequence[str] = ()) -> Any:
    """The columns of a parquet table that are needed, and those of `more` that are there; one split, or all."""
    if not path.is_file():
        raise FileNotFoundError(f"no structures at {path}: pass data/structures.parquet of a clone of the repository")
    if split not in (None, "train", "val", "test"):
        raise ValueError(f"split={split!r} must be 'train', 'val', 'test' or None for all")
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError('reading structures needs pyarrow: pip install "dosmatgen-ase[train]"') from error
    columns = [*needed, *(["split"] if split is not None and "split" not in needed else [])]
    try:
        told = pq.read_metadata(path)
        groups = map(told.row_group, range(told.num_row_groups))
        count = sum(group.column(j).num_values for group in groups for j in range(told.num_columns))
        size = path.stat().st_size
        if count > max(_FREE_VALUES, _MAX_VALUES * size):
            raise ValueError(f"{path} holds {count} values in {size} bytes, which no table of structures does")
        there = pq.read_schema(path).names
        if missing := [name for name in columns if name not in there]:
            raise ValueError(
                f"{path} lacks the columns {', '.join(missing)}: a table laid out as data/structures.parquet has them"
            )
        table = pq.read_table(path, columns=[*columns, *(name for name in more if name in there)])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet table: {' '.join(str(error).split())}") from error
    if split is not None:
        table = table.filter(pc.equal(table["split"], split))
    if table.num_rows == 0:
        raise ValueError(f"{path} holds no structure" + (f" with split={split!r}" if split else ""))
    return table


def right_handed(cell: np.ndarray, frac_coords: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn left-handed cells over by (a, b, c) -> (-a, -b, -c), which leaves every Cartesian position where it is.

    Parameters
    ----------
    cell : (n, 3, 3), Angstrom
    frac_coords : (n, sites, 3)

    Returns
    -------
    cell, frac_coords : arrays of the same shapes, right-handed and wrapped into [0, 1)
    """
    sign = np.where(np.linalg.det(cell) < 0, -1.0, 1.0)[:, None, None]
    frac = (sign * frac_coords) % 1.0
    return sign * cell, np.where(frac >= 1.0, 0.0, frac)  # (-1e-17) % 1.0 is 1.0


def _pad(flat: np.ndarray, counts: np.ndarray, dtype: type) -> np.ndarray:
    """Spread rows of `flat` (sum(counts), ...) over a zero array (n, 20, ...)."""
    padded = np.zeros((len(counts), MAX_ATOMS, *flat.shape[1:]), dtype=dtype)
    padded[np.arange(MAX_ATOMS) < counts[:, None]] = flat
    return padded


def load_structures(path: str | Path, split: str | None = None, max_atoms: int = MAX_ATOMS) -> Structures:
    """Read crystals from a parquet file laid out as `data/structures.parquet`.

    Parameters
    ----------
    path : file with the attributes of `Structures` as columns (cell as 9 floats, frac_coords as 3 n)
    split : keep only "train", "val" or "test"; all by default
    max_atoms : keep only cells of at most this many atoms (20 is the most the arrays hold)

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ImportError
        If pyarrow is not installed.
    ValueError
        If `split` or `max_atoms` is none of the above, it is no such table, or nothing is left.
    """
    if not 1 <= max_atoms <= MAX_ATOMS:
        raise ValueError(f"max_atoms={max_atoms} must lie between 1 and {MAX_ATOMS}")
    table = _read_table(Path(path), [f.name for f in fields(Structures)], split)
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        table = table.filter(pc.less_equal(table["num_atoms"], max_atoms))
        if table.num_rows:
            return _structures(table.combine_chunks())
    except (*DAMAGE, pa.ArrowException) as error:
        raise _not_laid_out(path, error) from None
    raise ValueError(f"{path} holds no structure with split={split!r} and max_atoms={max_atoms}")


def _structures(table: Any) -> Structures:
    """Make arrays of a table of pyarrow; ``ValueError`` if its columns do not fit each other."""
    import pyarrow.compute as pc

    text = {name: table[name].to_numpy().astype(str) for name in ("material_id", "split", "reduced_formula")}

    def flat(name: str) -> np.ndarray:
        return pc.list_flatten(table[name]).to_numpy().astype(np.float64)

    counts = table["num_atoms"].to_numpy().astype(np.int64)
    numbers, cells, coords = flat("atomic_numbers"), flat("cell"), flat("frac_coords")
    sizes = {"atomic_numbers": counts.sum(), "cell": 9 * len(counts), "frac_coords": 3 * counts.sum()}
    for (name, size), values in zip(sizes.items(), (numbers, cells, coords), strict=True):
        if values.size != size or not np.isfinite(values).all():
            raise ValueError(f"{name} has {values.size} numbers for {size} places, or some are not finite")
    if counts.min() < 1 or not ((numbers >= 1) & (numbers <= MAX_ATOMIC_NUMBER)).all():
        raise ValueError(f"num_atoms must be at least 1, atomic_numbers lie in 1 to {MAX_ATOMIC_NUMBER}")
    cell, frac = right_handed(cells.reshape(-1, 3, 3), _pad(coords.reshape(-1, 3), counts, np.float64))
    return Structures(
        **text,
        spacegroup=table["spacegroup"].to_numpy().astype(np.int64),
        num_atoms=counts,
        cell=cell,
        frac_coords=frac,
        atomic_numbers=_pad(numbers, counts, np.int64),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class SiteDOSLabels(_Crystals):
    """Computed site DOS on the model's grid.

    Attributes
    ----------
    material_id, split : (n,) str arrays
    num_atoms : (n,) int array
    cell, frac_coords, atomic_numbers : as in `Structures`
    values : (n, 20, 151) float32
        states/eV per site, sites scaled to the total, sigma 0.2 eV, on `dos.MODEL_GRID`; zero where padded or unknown.
    known : (n, 151) bool
        Bins that were computed.
    band_gap : (n,) float, eV
        Zero energy is the valence-band maximum where positive, else the Fermi level.
    recipe : (n,) int
        Number of the recipe that they were computed by (`dft.settings.RECIPE`).
    origin, parent : (n,) str arrays
        What the crystal is, one of `data.ORIGINS`, and the `material_id` that it came from, if any.
    """

    values: np.ndarray
    known: np.ndarray
    band_gap: np.ndarray
    recipe: np.ndarray
    origin: np.ndarray
    parent: np.ndarray

    def targets(self, i: int) -> list[TargetDOS]:
        """Return the DOS of each site of crystal `i`, at sigma 0.2 eV on `dos.MODEL_GRID`."""
        reference = "vbm" if self.band_gap[i] > 0 else "fermi"
        return [
            TargetDOS(MODEL_GRID.energies, values, self.known[i], reference, MODEL_SIGMA)
            for values in self.values[i, : self.num_atoms[i]].astype(float)
        ]


def load_site_dos(
    directory: str | Path, recipe: int | None = None, *, origins: Collection[str] = ("given",)
) -> SiteDOSLabels:
    """Read every label shard `*.npz` of a directory, or those of one recipe.

    Where a `material_id` comes twice the later recipe wins, and of one recipe the later name, which begins with the
    time.

    The layout of a shard is told in `data/README.md`. Sites are summed over l, scaled so that they add up to the total
    DOS, masked to what was computed (below `e_max`, projections covering at least 70 % of the total) and smeared to
    sigma 0.2 eV.

    Parameters
    ----------
    directory : path
    recipe : int, optional
        By default all recipes together.
    origins : collection of str
        Which crystals, of `data.ORIGINS`. By default known ones alone; forward models learn from all.

    Raises
    ------
    FileNotFoundError
        If the directory holds no shard.
    ValueError
        If a shard lacks an array, none is of the recipe, or an origin is none.
    """
    if not origins or not set(origins) <= set(ORIGINS):
        raise ValueError(f"origins={origins} must be some of {', '.join(map(repr, ORIGINS))}")
    shards = read_shards(directory)
    if recipe is not None:
        shards = [data for data in shards if data["recipe"] == recipe]
        if not shards:
            raise ValueError(f"no label shard in {directory} is of recipe {recipe}")
    last = {name: (k, i) for k, data in enumerate(shards) for i, name in enumerate(data["material_id"].tolist())}
    found = []
    for k, data in enumerate(shards):
        wanted = np.isin(data["origin"], list(origins))
        chosen = [i for i, n in enumerate(data["material_id"].tolist()) if last[n] == (k, i) and wanted[i]]
        if chosen:
            found.append(_labels_of(data, chosen))
    if not found:
        raise ValueError(f"the label shards in {directory} hold no label: pass data/site_dos of a repository clone")
    together = {f.name: np.concatenate([getattr(part, f.name) for part in found]) for f in fields(SiteDOSLabels)}
    texts = {name: np.array(column.tolist()) for name, column in together.items() if column.dtype.kind == "U"}
    return SiteDOSLabels(**{**together, **texts})  # texts no wider than they need be


def _labels_of(data: dict[str, np.ndarray], chosen: Sequence[int]) -> SiteDOSLabels:
    """Some labels of a shard."""
    energies = data["energies"].astype(np.float64)
    sites = [slice(*data["atom_offset"][i : i + 2]) for i in chosen]
    scaled, known = [], []
    for i, part in zip(chosen, sites, strict=True):
        raw = data["site_dos"][part].sum(axis=1, dtype=np.int64) * SHARD_UNIT
        total = data["total_dos"][i] * SHARD_UNIT
        dos, covered = scale_sites_to_total(raw, total, energies=energies, e_max=float(data["e_max"][i]))
        covered |= (energies <= data["e_max"][i]) & (total < ROUNDING_FLOOR)
        scaled.append(dos)
        known.append(np.broadcast_to(covered, dos.shape))
    values, known_values = resample(energies, np.concatenate(scaled), np.concatenate(known), LABEL_SIGMA)
    counts = np.array([len(dos) for dos in scaled])

    def padded(name: str, dtype: type) -> np.ndarray:
        return _pad(np.concatenate([data[name][part] for part in sites]), counts, dtype)

    cells = data["cell"][chosen].reshape(-1, 3, 3).astype(np.float64)
    cell, frac_coords = right_handed(cells, padded("frac_coords", np.float64))
    return SiteDOSLabels(
        **{name: data[name][chosen] for name in ("material_id", "split", "origin", "parent")},
        num_atoms=counts,
        cell=cell,
        frac_coords=frac_coords,
        atomic_numbers=padded("atomic_numbers", np.int64),
        values=_pad(values, counts, np.float32),
        known=known_values[np.cumsum(counts) - counts],  # the same for all sites of a crystal
        band_gap=data["band_gap"][chosen].astype(np.float64),
        recipe=np.full(len(chosen), data["recipe"], dtype=np.int64),
    )


def load_shell_dos(directory: str | Path, labels: SiteDOSLabels) -> list[np.ndarray]:
    """Read the s, p and d parts of labels.

    Parameters
    ----------
    directory : path
        The folder that `labels` were read from by `load_site_dos`, all recipes.
    labels : SiteDOSLabels
        Any selection of them, also with one more than once.

    Returns
    -------
    list of (n, 3, 151) float32 arrays
        states/eV per site and shell, at sigma 0.2 eV on `dos.MODEL_GRID`, scaled as the sites' own `values` are; zero
        where unknown.

    Raises
    ------
    ValueError
        If the directory lacks one of the labels.
    """
    wanted = {name: i for i, name in enumerate(labels.material_id.tolist())}
    found: dict[str, np.ndarray] = {}
    for data in read_shards(directory):  # the last of a name wins, as in `load_site_dos`
        names = data["material_id"].tolist()
        chosen = [k for k, name in enumerate(names) if name in wanted and data["recipe"] == labels.recipe[wanted[name]]]
        if not chosen:
            continue
        raw = [data["site_dos"][slice(*data["atom_offset"][k : k + 2]), :3] for k in chosen]
        together = np.concatenate(raw) * SHARD_UNIT
        everywhere = np.ones(together.shape, dtype=bool)
        parts, _ = resample(data["energies"].astype(np.float64), together, everywhere, LABEL_SIGMA)
        for k, part in zip(chosen, np.split(parts, np.cumsum([len(r) for r in raw])[:-1]), strict=True):
            i = wanted[names[k]]
            scale = labels.values[i, : len(part), None] / np.maximum(part.sum(axis=1, keepdims=True), SHARD_UNIT)
            found[names[k]] = (part * np.minimum(scale, 3.0)).astype(np.float32)  # what hardly projects is not blown up
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"{directory} lacks {len(missing)} of the labels, the first is {missing[0]}")
    return [found[name] for name in labels.material_id.tolist()]


def load_pseudo_labels(path: str | Path) -> dict[str, np.ndarray]:
    """Read pseudo-labels written by `predictor.write_pseudo_labels`.

    Returns
    -------
    dict
        `material_id` (m,), `values` (m, 20, 151) float16 in states/eV, `known` (m, 20, 151) bool; `structure` (m,)
        and `predictor` tell in newer files what was predicted, and by what.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or it is something else or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no pseudo-labels at {path}: make them with predictor.write_pseudo_labels")
    try:
        wanted = {"material_id": ("U", 1), "values": ("f", 3), "known": ("b", 3)}
        data = read_npz(path, wanted, {"structure": ("U", 1), "predictor": ("U", 0)})
        shape = (len(data["material_id"]), MAX_ATOMS, MODEL_GRID.size)
        of = data.get("structure", data["material_id"])
        if data["values"].shape != shape or data["known"].shape != shape or of.shape != shape[:1]:
            raise ValueError(f"values and known must have the shape {shape}, and structure that length")
        if not all(np.isfinite(part).all() and (part >= 0).all() for part in data["values"]):
            raise ValueError("values hold negative numbers, or such that are not finite")
    except ValueError as error:
        raise ValueError(f"{path} holds no pseudo-labels ({error}): write them again") from None
    return data


@dataclass(frozen=True, eq=False)
class CrystalDataset:
    """Structures, each with at most one site DOS: computed (`pseudo` false) or predicted (`pseudo` true).

    Attributes
    ----------
    structures : Structures
    dos : (m, 20, 151) float16, states/eV at sigma 0.2 eV
    known : (m, 20, 151) bool
    dos_index : (n,) int64
        Row of `dos` that belongs to each structure, -1 where it has none.
    pseudo : (m,) bool
        Rows of `dos` that were predicted.
    """

    structures: Structures
    dos: np.ndarray
    known: np.ndarray
    dos_index: np.ndarray
    pseudo: np.ndarray

    def __len__(self) -> int:
        return len(self.structures)

    @property
    def labelled(self) -> np.ndarray:
        """Indices of the structures with a computed site DOS."""
        has_dos = np.flatnonzero(self.dos_index >= 0)
        return has_dos[~self.pseudo[self.dos_index[has_dos]]]

    @classmethod
    def join(
        cls, structures: Structures, labels: SiteDOSLabels, pseudo_labels: dict[str, np.ndarray] | None = None
    ) -> CrystalDataset:
        """Join by `material_id`. A computed DOS displaces a predicted one; a DOS without its structure is left out.

        Raises
        ------
        ValueError
            If a label's cell, sites or split, or what a DOS was predicted for, are not those of the structure.
        """
        row_of = {material_id: i for i, material_id in enumerate(structures.material_id.tolist())}
        real = [(row_of[m], j) for j, m in enumerate(labels.material_id.tolist()) if m in row_of]
        _check_same(structures, labels, real)
        taken = {i for i, _ in real}
        names = [] if pseudo_labels is None else pseudo_labels["material_id"].tolist()
        guess = [(row_of[m], j) for j, m in enumerate(names) if m in row_of and row_of[m] not in taken]
        owners, rows = np.array(real + guess, dtype=np.int64).reshape(-1, 2).T
        computed, guessed = np.split(rows, [len(real)])
        site = labels.atomic_numbers[computed] > 0
        dos = [labels.values[computed].astype(np.float16)]
        known = [labels.known[computed][:, None, :] & site[:, :, None]]
        if pseudo_labels is not None:
            if "structure" in pseudo_labels:  # older files do not tell
                given = structures.select(owners[len(real) :])
                if (other := given.fingerprints() != pseudo_labels["structure"][guessed]).any():
                    name = given.material_id[other.argmax()]
                    raise ValueError(f"the predicted DOS of {name} is of another structure: predict it again")
            dos.append(pseudo_labels["values"][guessed].astype(np.float16))
            known.append(pseudo_labels["known"][guessed])
        dos_index = np.full(len(structures), -1, dtype=np.int64)
        dos_index[owners] = np.arange(len(owners))
        return cls(
            structures=structures,
            dos=np.concatenate(dos),
            known=np.concatenate(known),
            dos_index=dos_index,
            pseudo=np.arange(len(owners)) >= len(real),
        )


def _check_same(structures: Structures, labels: SiteDOSLabels, pairs: Sequence[tuple[int, int]]) -> None:
    """Refuse labels (second of each pair) of other crystals than the structures of that name."""
    i, j = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    apart, cell = structures.frac_coords[i] - labels.frac_coords[j], structures.cell[i]
    other = (structures.atomic_numbers[i] != labels.atomic_numbers[j]).any(1)
    other |= (np.abs(apart - np.rint(apart)) > SAME_SITES).any((1, 2))
    other |= (np.abs(cell - labels.cell[j]) > SAME_SITES * np.abs(cell).max((1, 2), keepdims=True)).any((1, 2))
    moved = structures.split[i] != labels.split[j]  # the test split must not be trained on
    for bad, fault in ((other, "list different sites or cells"), (moved, "are of different splits")):
        if bad.any():
            raise ValueError(f"label and structure of {structures.material_id[i[bad.argmax()]]} {fault}: rebuild one")


def size_bucket_batches(num_atoms: np.ndarray, max_pairs: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield one epoch of batches of structures of similar size, each structure once, in random order.

    The dense network costs as much as its pairs of sites after padding, so a batch of b structures padded to N sites is
    kept at b N^2 <= `max_pairs` (a single structure is always allowed). Ties in size are shuffled before cutting, and
    so are the batches. To resume at batch p of epoch e, seed the generator with (seed, e) and skip p batches: nothing
    else is drawn.

    Parameters
    ----------
    num_atoms : (n,) int
    max_pairs : int, at least 1
    generator : numpy Generator, drawn from before the first batch is yielded

    Yields
    ------
    (b,) int64 arrays of indices into `num_atoms`
    """
    if max_pairs < 1:
        raise ValueError(f"max_pairs={max_pairs} must be at least 1")
    order = generator.permutation(len(num_atoms))
    order = order[np.argsort(-np.asarray(num_atoms)[order], kind="stable")]  # the first of a batch sets its padding
    batches = []
    while order.size:
        size = max(1, int(max_pairs // int(num_atoms[order[0]]) ** 2))
        batches.append(order[:size])
        order = order[size:]
    for b in generator.permutation(len(batches)):
        yield batches[b]


def formula_fold(reduced_formula: str, k: int = 2) -> int:
    """Return a fold in [0, k) that depends on the composition alone: SHA-256 of the reduced Hill formula, modulo `k`.

    "OLi2", "Li2O" and "Li4O2" fall together. With k = 2 the labels of fold 0 train the predictor that ranks and
    pseudo-labels, those of fold 1 the independent judge.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    hill = Formula(reduced_formula).reduce()[0].format("hill")
    return int.from_bytes(hashlib.sha256(hill.encode()).digest()[:8], "big") % k
