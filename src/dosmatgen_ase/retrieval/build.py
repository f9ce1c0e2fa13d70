"""Make a `DOSIndex`: the computed site DOS of crystals where there is a label, the predicted one elsewhere."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from tqdm import tqdm

from dosmatgen_ase import __version__
from dosmatgen_ase.crystals.screening import digest, right_handed, screen_given
from dosmatgen_ase.data import SiteDOSLabels, read_crystals
from dosmatgen_ase.data.dataset import SAME_SITES
from dosmatgen_ase.dos import MODEL_GRID
from dosmatgen_ase.files import exclusive, output_folder, read_npz, write_npz
from dosmatgen_ase.forward.predictor import DEFAULT_PREDICTOR, DOSPredictor, _looks_gapped
from dosmatgen_ase.parsing import is_real, is_whole
from dosmatgen_ase.retrieval.index import DOSIndex

PIECE = 256  # crystals of a piece: what an interruption costs at most
FACTS = ("band_gap", "energy_above_hull")  # in ``info`` of a crystal, eV and eV/atom
SAME = 1e-3  # normalised L1 below which two sites of one element in one crystal have the same DOS


def read_known(path: str | Path) -> list[Atoms]:
    """Read a table of crystals for `build_index`, with their gap and energy above the hull.

    Parameters
    ----------
    path
        Parquet laid out as `data/structures.parquet`; its columns ``band_gap`` (eV) and
        ``energy_above_hull_lower_bound`` (eV/atom) are used where they are there. Cells may be of any size.

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        As `data.read_crystals`.
    """
    return read_crystals(path, facts={"band_gap": "band_gap", "energy_above_hull": "energy_above_hull_lower_bound"})


def build_index(
    crystals: Sequence[Atoms],
    labels: SiteDOSLabels | None = None,
    *,
    predictor: str | Path = DEFAULT_PREDICTOR,
    parts: str | Path | None = None,
    source: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> DOSIndex:
    """Make an index of crystals.

    A labelled crystal has its computed DOS; the bins that were not computed are filled by the prediction, so that a
    target which reaches farther can be compared.

    Parameters
    ----------
    crystals : sequence of Atoms
        Named by ``info["material_id"]``, a text or a whole number. ``info["band_gap"]`` (eV) and
        ``info["energy_above_hull"]`` (eV/atom) are kept where they are there.
    labels : SiteDOSLabels, optional
        Joined by ``material_id``; labelled crystals that are not among `crystals` are added.
    predictor : path
        Forward model; by default the one that ships.
    parts : path, optional
        Folder that keeps what is predicted, in pieces, by which an interrupted run goes on. By default none.
    source : mapping, optional
        Where the crystals come from, for attribution (`optimade.OptimadeStructures.source`); kept in ``info``.
    progress : bool
        Show a progress bar.

    Raises
    ------
    ValueError
        If there is no crystal, one has no name or that of another, is no crystal at all, has a gap or an energy that is
        no number, or lists other sites than its label or has another cell.
    BlockingIOError
        If another run goes on with the same `parts`.
    """
    everything, labelled = [_checked(atoms) for atoms in crystals], _labelled(labels)
    for atoms in everything:
        if (label := labelled.get(atoms.info["material_id"])) is not None:
            _check_same(atoms, label.atoms)
    listed = {atoms.info["material_id"] for atoms in everything}
    everything += [label.atoms for name, label in labelled.items() if name not in listed]
    names = [atoms.info["material_id"] for atoms in everything]
    if not names:
        raise ValueError("there is no crystal to index: give at least one")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two crystals are named {twice}: rename one of them")
    if parts is not None:
        output_folder(Path(parts))
    with contextlib.nullcontext() if parts is None else exclusive(Path(parts)):
        predictions = _predict(everything, Path(predictor), parts, progress)
    given = zip(everything, predictions, names, strict=True)
    found = [_rows(atoms, prediction, labelled.get(name)) for atoms, prediction, name in given]
    info = {
        "version": __version__,
        "predictor_sha256": _sha256(Path(predictor)),
        "band_gap": "computed where the DOS is, else as given with the crystals, eV",
        "energy_above_hull": "as given with the crystals, eV/atom",
        "without_prediction": {name: p.reason for name, p in zip(names, predictions, strict=True) if p.reason},
        **({} if source is None else {"source": dict(source)}),
    }
    return _joined(found, info)


def _checked(atoms: Atoms) -> Atoms:
    """The crystal with a right-handed cell and with `FACTS`; ValueError if it is not fit to be indexed."""
    name = atoms.info.get("material_id")
    if is_whole(name):  # extended XYZ reads a name of digits as a number
        name = str(name)
    if not isinstance(name, str) or not name:
        raise ValueError(f'{atoms.get_chemical_formula()} has no name: set info["material_id"]')
    turned = right_handed(atoms)
    outcome = screen_given(turned)
    if not outcome.accepted:
        raise ValueError(f"{name} cannot be indexed: {outcome.reason}")
    turned.info["material_id"] = name
    for fact in FACTS:
        value = turned.info.get(fact)
        if value is not None and not (is_real(value) and abs(value) != np.inf):  # NaN is unknown
            raise ValueError(f"{fact}={str(value)!r:.60} of {name} is no number: mend it, or leave it out")
        turned.info[fact] = np.nan if value is None else float(value)
    return turned


def _check_same(atoms: Atoms, labelled: Atoms) -> None:
    """Refuse a crystal that is not the one that was labelled under its name, as `CrystalDataset.join` does."""
    same = np.array_equal(atoms.numbers, labelled.numbers)
    if same:
        apart, cell = atoms.get_scaled_positions() - labelled.get_scaled_positions(), labelled.cell.array
        same = (np.abs(apart - np.rint(apart)) <= SAME_SITES).all()
        same &= (np.abs(atoms.cell.array - cell) <= SAME_SITES * np.abs(cell).max()).all()
    if not same:
        told = "list different sites or cells: use the structures that were labelled"
        raise ValueError(f"label and structure of {atoms.info['material_id']} {told}")


class _Label(NamedTuple):
    """Computed DOS of one crystal."""

    atoms: Atoms
    values: np.ndarray  # (n, 151)
    known: np.ndarray  # (151,)
    band_gap: float  # eV


def _labelled(labels: SiteDOSLabels | None) -> dict[str, _Label]:
    """Labels by the name of their crystal."""
    if labels is None:
        return {}
    return {
        name: _Label(labels.atoms(i), labels.values[i, :n], labels.known[i], float(labels.band_gap[i]))
        for i, (name, n) in enumerate(zip(labels.material_id.tolist(), labels.num_atoms.tolist(), strict=True))
    }


# -- predictions -------------------------------------------------------------------------------------------------------


class _Predicted(NamedTuple):
    """What an index needs of a `SitePrediction`, rounded as the pieces keep it."""

    mean: np.ndarray  # (n, 151) float16
    known: np.ndarray  # (n, 151) bool
    error: np.ndarray  # (n,) float32
    reason: str


def _predict(crystals: Sequence[Atoms], predictor: Path, parts: str | Path | None, progress: bool) -> list[_Predicted]:
    """Predictions of the crystals, in order; those of an interrupted run are taken from its pieces."""
    folder, stem = None if parts is None else Path(parts), _sha256(predictor)[:12]
    keys = [digest(atoms) for atoms in crystals]
    done: dict[str, _Predicted] = {}
    for path in sorted(folder.glob(f"{stem}-*.npz")) if folder is not None else []:
        done |= _read_piece(path)
    missing = [i for i, key in enumerate(keys) if key not in done]
    forward = DOSPredictor.load(predictor)
    before = len(crystals) - len(missing)
    with tqdm(total=len(crystals), initial=before, disable=not progress, unit="crystal", desc="site DOS") as bar:
        for start in range(0, len(missing), PIECE):
            rows = missing[start : start + PIECE]
            found = forward.predict_arrays([crystals[i] for i in rows])
            made = {
                keys[i]: _Predicted(p.mean.astype(np.float16), p.known, p.error.astype(np.float32), p.reason)
                for i, p in zip(rows, found, strict=True)
            }
            if folder is not None:
                _write_piece(folder / f"{stem}-{keys[rows[0]][:16]}.npz", made)
            done |= made
            bar.update(len(rows))
    return [done[key] for key in keys]


def remove_parts(folder: Path) -> None:
    """Remove the pieces of a finished run, and their folder if it holds nothing else."""
    for path in folder.iterdir() if folder.is_dir() else ():  # of predictions, and of pages of a database
        if re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]{16}\.npz|page-[0-9a-f]{12}-\d{6}\.json", path.name):
            path.unlink()
    with contextlib.suppress(OSError):  # somebody has put something there
        folder.rmdir()


def _write_piece(path: Path, made: Mapping[str, _Predicted]) -> None:
    found = list(made.values())
    write_npz(
        path,
        key=np.array(list(made)),
        counts=np.array([len(p.mean) for p in found]),
        mean=np.concatenate([p.mean for p in found]),
        known=np.packbits(np.concatenate([p.known for p in found]), axis=1),
        error=np.concatenate([p.error for p in found]),
        reason=np.array([p.reason for p in found]),
    )


def _read_piece(path: Path) -> dict[str, _Predicted]:
    """What a piece holds; nothing if it is damaged, so that it is made again."""
    try:
        kinds = {"key": ("U", 1), "counts": ("iu", 1), "mean": ("f", 2), "known": ("u", 2), "error": ("f", 1)}
        file = read_npz(path, {**kinds, "reason": ("U", 1)})
        known = np.unpackbits(file["known"], axis=1, count=MODEL_GRID.size).astype(bool)
        if not (file["mean"].shape == known.shape == (file["counts"].sum(), MODEL_GRID.size)):
            return {}
        ends = np.cumsum(file["counts"])[:-1]
        parts = (np.split(array, ends) for array in (file["mean"], known, file["error"]))
        rows = zip(*parts, file["reason"].tolist(), strict=True)
        return {key: _Predicted(*row) for key, row in zip(file["key"].tolist(), rows, strict=True)}
    except ValueError:
        return {}


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no predictor at {path}: give one made by dosmatgen train-predictor")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- rows --------------------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """A crystal of n sites, of which k have a DOS of their own."""

    atoms: Atoms
    band_gap: float
    gapped: bool
    place: np.ndarray  # (n,) of each site among the k
    values: np.ndarray  # (k, 151)
    error: np.ndarray  # (k,)
    known: np.ndarray  # (k, 151)
    computed: np.ndarray  # (151,)


def _rows(atoms: Atoms, prediction: _Predicted, label: _Label | None) -> _Rows:
    """The computed DOS of a crystal, and the predicted one in the bins that were not computed."""
    mean, known = prediction.mean.astype(np.float32), prediction.known
    values = np.where(known, mean, np.float32(0))
    if label is None:
        told = known.any(axis=1)
        gap, gapped = atoms.info["band_gap"], bool(told.any() and _looks_gapped(mean[told]))
        computed = np.zeros(MODEL_GRID.size, dtype=bool)
    else:
        computed, gap, gapped = label.known, label.band_gap, label.band_gap > 0
        values, known = np.where(computed, label.values, values), known | computed
    first, place = _different(atoms.numbers, values, known)
    return _Rows(atoms, gap, gapped, place, values[first], prediction.error[first], known[first], computed)


def _joined(found: Sequence[_Rows], info: dict[str, Any]) -> DOSIndex:
    """The index of the crystals."""
    patterns: dict[bytes, int] = {}

    def pattern(mask: np.ndarray) -> int:
        return patterns.setdefault(mask.tobytes(), len(patterns))

    masks = [([pattern(known) for known in rows.known], pattern(rows.computed)) for rows in found]
    crystals = [rows.atoms for rows in found]
    hull = [atoms.info.get("energy_above_hull", np.nan) for atoms in crystals]
    row_start = np.cumsum([0, *(len(rows.values) for rows in found)], dtype=np.int64)
    return DOSIndex(
        material_id=np.array([atoms.info["material_id"] for atoms in crystals]),
        cell=np.array([atoms.cell.array for atoms in crystals], dtype=np.float32),
        band_gap=np.array([rows.band_gap for rows in found], dtype=np.float32),
        energy_above_hull=np.array(hull, dtype=np.float32),
        gapped=np.array([rows.gapped for rows in found]),
        site_start=np.cumsum([0, *map(len, crystals)], dtype=np.int64),
        frac_coords=np.concatenate([atoms.get_scaled_positions() for atoms in crystals]).astype(np.float32),
        atomic_numbers=np.concatenate([atoms.numbers for atoms in crystals]).astype(np.uint8),
        site_row=np.concatenate([rows.place + start for rows, start in zip(found, row_start, strict=False)]),
        row_start=row_start,
        values=np.concatenate([rows.values for rows in found]).astype(np.float32),
        error=np.concatenate([rows.error for rows in found]).astype(np.float32),
        masks=np.array([np.frombuffer(mask, dtype=bool) for mask in patterns]),
        row_mask=np.concatenate([of_rows for of_rows, _ in masks]),
        computed_mask=np.array([of_crystal for _, of_crystal in masks]),
        info=info,
    )


def _different(numbers: np.ndarray, values: np.ndarray, known: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Sites whose DOS stands for that of others in the crystal, and for each site the place in that list."""
    first: list[int] = []
    place = np.zeros(len(numbers), dtype=np.int64)
    for i, z in enumerate(numbers.tolist()):
        for k, j in enumerate(first):
            close = np.abs(values[i] - values[j]).sum() <= SAME * values[j].sum()
            if z == numbers[j] and close and np.array_equal(known[i], known[j]):
                place[i] = k
                break
        else:
            place[i] = len(first)
            first.append(i)
    return first, place
