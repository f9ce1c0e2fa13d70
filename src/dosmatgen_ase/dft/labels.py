"""Site DOS labels for training: which structures are computed, in which order, and the shards they are packed into.

`label` computes structures with `electronic` and packs the results into ``SHARDS/<UTC time>-<digest>.npz``, of the
layout that `data.load_site_dos` reads (``data/README.md``). Every result and every failure is a file of its own in
``SHARDS/unpacked`` first, written in one piece: a run that is killed loses the structures it was computing, no more.

Labels of an earlier recipe (`dft.settings.RECIPE`) are computed anew like structures without one, and stay in use until
then. Shards are only ever added.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import ArrayLike

from dosmatgen_ase.crystals.checks import fault
from dosmatgen_ase.data import LABEL_SIGMA, ORIGINS, SHARD_UNIT, Structures, read_shard
from dosmatgen_ase.data.bands import pack_bands
from dosmatgen_ase.data.coverage import MAX_LABELLED_VOLUME_PER_ATOM, UNLABELLED
from dosmatgen_ase.dft.batch import compute_each, is_calculation, read_record
from dosmatgen_ase.dft.errors import ElectronicStructureError, InterruptedCalculation
from dosmatgen_ase.dft.order import Candidate, in_order, spacegroup
from dosmatgen_ase.dft.pseudopotentials import has_recipe_pseudopotentials, without_pseudopotential
from dosmatgen_ase.dft.result import ElectronicStructure
from dosmatgen_ase.dft.settings import RECIPE, EspressoSettings
from dosmatgen_ase.files import output_folder, remove_parts, write_npz
from dosmatgen_ase.limits import MAX_ATOMS

SHARD_SIZE = 100  # labels that are packed at a time
_MOST_EXCESS = 0.4  # electrons per atom; the most in data/site_dos is 0.21


@dataclass(frozen=True)
class LabelReport:
    """What a run of `label` did.

    Attributes
    ----------
    shards : files written
    labels : number of labels in them
    failed : why structures could not be computed, by id
    skipped : why structures were not tried, by id
    done_before : number of structures that had a label of this recipe, or had failed, when the run began
    """

    shards: list[Path]
    labels: int
    failed: dict[str, str]
    skipped: dict[str, str]
    done_before: int


def label(
    structures: Structures | Mapping[str, Atoms],
    shards: str | Path,
    settings: EspressoSettings | None = None,
    *,
    workers: int = 1,
    limit: int | None = None,
    order: Sequence[str] | str = "need",
    split: Mapping[str, str] | None = None,
    table: Structures | None = None,
    origin: str = "given",
    parents: Mapping[str, str] | None = None,
    unpacked: str | Path | None = None,
    progress: bool = False,
) -> LabelReport:
    """Compute the site DOS of structures that have no label of this recipe yet, and pack them into shards.

    What is in a shard, as a label or as a failure, or failed here before, is not computed again; but a label of an
    earlier recipe is. Labels by other `settings` or pseudopotentials than the recipe's replace none and are replaced by
    it. A run that was stopped or killed goes on where it was.

    Parameters
    ----------
    structures : Structures, or mapping of id to Atoms
    shards : path
        Folder of the label set, made if need be.
    settings : EspressoSettings, optional
        By default those of the label set, at the lowest priority and with 600 s of CPU time for each program.
    workers : int
        Structures computed at a time.
    limit : int, optional
        Compute no more than this many.
    order : str or sequence of ids
        "need": a fixed random order in which cheap structures come first more often, and cells of at least 9 atoms and
        kinds that forward models get wrong (`dft.order.hard_kinds`) more often than their cost alone would have it.
        "cost": without these. "coverage": as "need", after those that hold an element with fewer than 15 labels. Or
        the ids that come first. In all of them there are two structures without a label for each with a label of an
        earlier recipe, of which recipe 1 comes first, then 2 and 3.
    split : mapping of id to "train", "val" or "test", optional
        `Structures` bring their own. By default that of others of the same formula: in this mapping, among the labels,
        in `table`, or else "train".
    table : Structures, optional
        Crystals, such as those of data/structures.parquet, whose formulas keep their split.
    origin : one of `data.ORIGINS`
        "given" for crystals as they are known, "perturbed" for copies off equilibrium, "generated" for those of a
        model. What is not "given" is read only where it is asked for (`data.load_site_dos`): such a crystal counts as
        known nowhere.
    parents : mapping of id to id, optional
        Of perturbed copies the crystal, of generated ones the crystal whose DOS was wanted. Kept in the shard.
    unpacked : path, optional
        Folder of results that are in no shard yet, SHARDS/unpacked by default; for one run at a time.
    progress : bool
        Show a bar with rate and time left.

    Raises
    ------
    FileNotFoundError
        If the programs or the pseudopotentials' folder are not there.
    ValueError
        If another run works in this folder, the broadening is not that of labels, a split contradicts that of another
        structure of the formula, an id is that of another crystal's label or of one of another origin, a perturbed copy
        has no parent, or an argument is none of the above.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    if settings is not None and settings.sigma != LABEL_SIGMA:
        raise ValueError(f"sigma={settings.sigma}: labels are broadened by {LABEL_SIGMA} eV, so leave it out")
    parents = parents or {}
    names = structures.material_id.tolist() if isinstance(structures, Structures) else list(structures)
    _check_parents(names, origin, parents)
    settings = settings or EspressoSettings(time_limit=600.0, nice=19)
    folder, work = Path(shards), Path(shards) / "unpacked" if unpacked is None else Path(unpacked)
    output_folder(work)
    with _alone_in(work):
        labelled, candidates = _survey(structures, folder, settings, split, table)
        done = labelled.done_of(candidates)
        _tidy(work, done)
        remove_parts(folder)
        left = _Unpacked.read(work, candidates)
        _check_ids(candidates, labelled, left, origin, folder)

        done |= left.failed.keys()
        skipped = _skipped(candidates, settings)
        queue = labelled.queue(candidates, {*done, *skipped}, order)
        queue = [*(n for n in queue if n in left.crystal), *[n for n in queue if n not in left.crystal][:limit]]
        for name in left.outdated.intersection(queue):
            (work / f"{name}.json").unlink()

        shard = _NextShard(folder, work, candidates, labelled.wanted, origin, parents, left.failed)
        todo = {name: candidates[name].atoms for name in queue}
        try:
            with contextlib.closing(compute_each(todo, work, settings, workers=workers, progress=progress)) as results:
                for name, result in results:
                    shard.add(name, result)
        finally:
            shard.pack()
    return LabelReport(shard.written, shard.packed, shard.failed, skipped, len(done.intersection(candidates)))


def unlabelled(
    structures: Structures | Mapping[str, Atoms],
    shards: str | Path,
    settings: EspressoSettings | None = None,
    *,
    limit: int | None = None,
) -> dict[str, Atoms]:
    """Structures that `label` would compute, in the order "need"; at most `limit` of them.

    Raises
    ------
    FileNotFoundError
        If the pseudopotentials' folder is not there.
    """
    settings = settings or EspressoSettings()
    labelled, candidates = _survey(structures, Path(shards), settings, None, None)
    skipped = _skipped(candidates, settings)
    names = labelled.queue(candidates, {*labelled.done_of(candidates), *skipped}, "need")
    return {name: candidates[name].atoms for name in names[:limit]}


def candidates_to_label(structures: Structures | Mapping[str, Atoms], settings: EspressoSettings) -> list[Candidate]:
    """Structures that can be labelled at all, whether they have a label or not."""
    found = {candidate.name: candidate for candidate in _candidates(structures, None, {})}
    skipped = _skipped(found, settings)
    return [candidate for name, candidate in found.items() if name not in skipped]


# -- which -------------------------------------------------------------------------------------------------------------


def _survey(
    structures: Structures | Mapping[str, Atoms],
    folder: Path,
    settings: EspressoSettings,
    split: Mapping[str, str] | None,
    table: Structures | None,
) -> tuple[_LabelSet, dict[str, Candidate]]:
    """The labels there are, and what may get one."""
    own = settings.is_default and has_recipe_pseudopotentials(_elements(structures), settings)
    labelled = _LabelSet.read(folder, RECIPE if own else 0)
    found = _candidates(structures, split, {**_splits(table), **labelled.split})
    return labelled, {candidate.name: candidate for candidate in found}


def _candidates(
    structures: Structures | Mapping[str, Atoms], split: Mapping[str, str] | None, split_of_formula: Mapping[str, str]
) -> Iterator[Candidate]:
    if isinstance(structures, Structures):
        for i, name in enumerate(structures.material_id.tolist()):
            yield Candidate(name, structures.atoms(i), str(structures.split[i]), int(structures.spacegroup[i]))
        return
    formulas = {name: _formula(atoms.numbers) for name, atoms in structures.items()}
    known = formula_splits(formulas, split, split_of_formula)
    for name, atoms in structures.items():
        yield Candidate(name, atoms, known.get(formulas[name], "train"), spacegroup(atoms))


def _elements(structures: Structures | Mapping[str, Atoms]) -> set[str]:
    """Elements that a label may hold."""
    if isinstance(structures, Structures):
        numbers = set(np.unique(structures.atomic_numbers).tolist()) - {0}
    else:
        numbers = {int(z) for atoms in structures.values() if not fault(atoms) for z in atoms.numbers}
    return {chemical_symbols[z] for z in numbers - UNLABELLED.keys()}


def formula_splits(
    formulas: Mapping[str, str], split: Mapping[str, str] | None, known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Split of every formula that has one: given by a name in ``formulas``, or known before.

    Raises
    ------
    ValueError
        If a split is none, or not that of the others of the formula.
    """
    found = dict(known or {})
    for name, wanted in (split or {}).items():
        if name not in formulas:
            continue
        if wanted not in ("train", "val", "test"):
            raise ValueError(f"{name} cannot be in the split {wanted!r}: choose among train, val and test")
        if found.setdefault(formulas[name], wanted) != wanted:
            others = f"the others of its formula are in {found[formulas[name]]!r}"
            raise ValueError(f"{name} cannot be in the split {wanted!r}: {others}")
    return found


def _splits(table: Structures | None) -> dict[str, str]:
    """Split of each formula."""
    if table is None:
        return {}
    rows = np.unique(table.reduced_formula, return_index=True)[1].tolist()
    return {_formula(table.atomic_numbers[i, : table.num_atoms[i]]): str(table.split[i]) for i in rows}


def _formula(numbers: ArrayLike) -> str:
    known = np.clip(np.asarray(numbers), 0, len(chemical_symbols) - 1)  # what is no element gets no label
    return str(Atoms(known).symbols.formula.reduce()[0].format("hill"))


def _skipped(candidates: Mapping[str, Candidate], settings: EspressoSettings) -> dict[str, str]:
    """Why structures are not tried."""
    faults = {name: told for name, candidate in candidates.items() if (told := fault(candidate.atoms))}
    elements = {symbol for name, c in candidates.items() if name not in faults for symbol in c.atoms.symbols}
    no_label = without_pseudopotential(elements, settings)
    no_label |= {s: f"{s} is {UNLABELLED[z]}" for s in elements if (z := atomic_numbers[s]) in UNLABELLED}
    skipped = {}
    for name, candidate in candidates.items():
        atoms = candidate.atoms
        if name in faults:
            skipped[name] = f"it {faults[name]}"
        elif barred := sorted(set(atoms.symbols) & no_label.keys()):
            skipped[name] = no_label[barred[0]]
        elif len(atoms) > MAX_ATOMS:
            skipped[name] = f"more than {MAX_ATOMS} atoms"
        elif atoms.get_volume() > MAX_LABELLED_VOLUME_PER_ATOM * len(atoms):
            skipped[name] = f"more than {MAX_LABELLED_VOLUME_PER_ATOM:g} A^3 per atom"
    return skipped


def _without_log(reason: str) -> str:
    """A reason without its log, which is of this machine and not kept."""
    return reason.split(" (see ")[0]


def unsound(result: ElectronicStructure) -> str | None:
    """What is wrong with a result that a program reported as a success; None if nothing is."""
    below = result.total.values[result.energies <= 0].sum() * (result.energies[1] - result.energies[0])
    if not (np.isfinite(result.total.values).all() and np.isfinite(result.orbital_dos).all()):
        return "the DOS holds numbers that are not finite"
    if result.e_max <= 1.5:
        return f"too few bands: the DOS ends at {result.e_max:.2f} eV"
    if not 0.3 < below <= 1.1 * result.num_electrons + 0.5:
        return f"{below:.2f} states below zero, but {result.num_electrons:g} electrons"
    if result.orbital_dos.max() > np.iinfo(np.uint16).max * SHARD_UNIT:
        return "a peak is too high for the numbers of a shard"
    if result.bands is not None:
        held = result.bands.electrons_below(result.band_gap / 2)
        if abs(held - result.num_electrons) > _MOST_EXCESS * len(result.sites):
            return f"too coarse a k-mesh: {held:.2f} electrons below zero, but the cell has {result.num_electrons:g}"
    return None


# -- the label set on disk ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Crystal:
    """Enough of a crystal to tell it from another that was given its id."""

    formula: str
    num_atoms: int
    volume: float

    @classmethod
    def of(cls, numbers: ArrayLike, cell: ArrayLike) -> _Crystal:
        volume = abs(float(np.linalg.det(np.reshape(np.asarray(cell, dtype=float), (3, 3)))))
        return cls(_formula(numbers), len(np.asarray(numbers)), volume)

    def is_like(self, other: _Crystal) -> bool:
        same = (self.formula, self.num_atoms) == (other.formula, other.num_atoms)
        return same and abs(self.volume - other.volume) <= 1e-3 * other.volume  # shards hold cells in single precision

    def __str__(self) -> str:
        return f"{self.formula}, {self.num_atoms} atoms, {self.volume:.2f} A^3"


@dataclass(frozen=True)
class _LabelSet:
    """What is in the shards of a folder.

    Attributes
    ----------
    wanted : recipe of the run's labels; those of an earlier one are computed anew
    recipe, crystal, origin : latest recipe, crystal and origin by the id of a label
    failed : crystals that failed by id, "" where an older shard does not tell
    elements : number of labels by element
    split : by formula
    """

    wanted: int
    recipe: dict[str, int] = field(default_factory=dict)
    crystal: dict[str, _Crystal] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    failed: dict[str, set[str]] = field(default_factory=dict)
    elements: Counter[str] = field(default_factory=Counter)
    split: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, wanted: int) -> _LabelSet:
        known = cls(wanted)
        for path in sorted(folder.glob("*.npz")):
            shard = read_shard(path)
            ids = shard["material_id"].tolist()
            sites = np.split(shard["atomic_numbers"], shard["atom_offset"][1:-1])
            for name, split, numbers, cell in zip(ids, shard["split"].tolist(), sites, shard["cell"], strict=True):
                if name not in known.crystal:
                    known.elements.update(set(Atoms(numbers).symbols))
                    known.crystal[name] = _Crystal.of(numbers, cell)
                    known.split[known.crystal[name].formula] = split
                known.recipe[name] = max(int(shard["recipe"]), known.recipe.get(name, 0))
            known.origin.update(zip(ids, shard["origin"].tolist(), strict=True))
            for name, crystal in zip(shard["failed_id"].tolist(), shard["failed_crystal"].tolist(), strict=True):
                known.failed.setdefault(name, set()).add(crystal)
        return known

    def done_of(self, candidates: Mapping[str, Candidate]) -> set[str]:
        """Ids that are not tried again; a failure is that of a crystal, not of its id."""
        done = {name for name, recipe in self.recipe.items() if recipe >= self.wanted}
        for name in self.failed.keys() & candidates.keys():
            atoms = candidates[name].atoms
            if self.failed[name] & {"", str(_Crystal.of(atoms.numbers, atoms.cell))}:
                done.add(name)
        return done

    def queue(
        self, candidates: Mapping[str, Candidate], left_out: Collection[str], order: Sequence[str] | str
    ) -> list[str]:
        """Ids of the others in the order in which they are computed."""
        waiting = {name: candidate for name, candidate in candidates.items() if name not in left_out}
        return in_order(waiting, order, elements=self.elements, recipes=self.recipe, known=candidates)


@dataclass(frozen=True)
class _Unpacked:
    """Results that a stopped run left in no shard, by id: crystals and failures, and labels of an earlier recipe."""

    crystal: dict[str, _Crystal]
    failed: dict[str, str]
    outdated: set[str]

    @classmethod
    def read(cls, work: Path, names: Collection[str]) -> _Unpacked:
        left = cls({}, {}, set())
        for path in work.glob("*.json"):
            name = path.stem
            if name not in names or (record := read_record(path)) is None:
                continue
            if "result" in record and record["settings"].get("recipe", 1) != RECIPE:
                left.outdated.add(name)
                continue
            left.crystal[name] = _Crystal.of(record["structure"]["numbers"], record["structure"]["cell"])
            if "failed" in record:
                left.failed[name] = _without_log(record["failed"])
        return left


def _check_parents(names: Collection[str], origin: str, parents: Mapping[str, str]) -> None:
    """Raise ValueError if the origin is none, or parents do not go with it."""
    if origin not in ORIGINS:
        raise ValueError(f"origin={origin!r} must be {', '.join(map(repr, ORIGINS))}")
    if origin == "perturbed" and (alone := [name for name in names if name not in parents]):
        raise ValueError(f"{len(alone)} perturbed copies have no parent, such as {alone[0]}: name theirs in parents")
    if origin == "given" and parents:
        raise ValueError("crystals that are given have no parents: give an origin")


def _check_ids(
    candidates: Mapping[str, Candidate], labelled: _LabelSet, left: _Unpacked, origin: str, folder: Path
) -> None:
    """Raise ValueError if a structure has the id of another crystal, or of one of another origin."""
    known = {**labelled.crystal, **left.crystal}
    for name in known.keys() & candidates.keys():
        atoms = candidates[name].atoms
        given = _Crystal.of(atoms.numbers, atoms.cell)
        if not given.is_like(known[name]):
            raise ValueError(f"{name} ({given}) has the id of another crystal in {folder}, {known[name]}: rename it")
    for name in candidates:
        if (other := labelled.origin.get(name, origin)) != origin:
            told = f"{name} is {other} in {folder}, and {origin} here"
            raise ValueError(f"{told}: rename it, or say the same origin")


@contextlib.contextmanager
def _alone_in(work: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process however that ends. No structure can have its name."""
    with (work / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run works in {work}: wait for its end, or give another folder") from None
        yield


def _tidy(work: Path, done: Collection[str]) -> None:
    """Remove what a killed run left: half results, and whole ones that it had packed but not removed."""
    for path in work.iterdir():
        if path.is_dir() and is_calculation(path):
            # Renamed first: a program of that run may still write there, and must not meet the next try.
            shutil.rmtree(path.rename(path.with_name(f".{path.name}")) if path.name[0] != "." else path, True)
        elif path.suffix == ".part" or (path.suffix == ".json" and path.stem in done):
            path.unlink()


@dataclass
class _NextShard:
    """Results as they come, packed into a shard whenever there are enough."""

    folder: Path
    work: Path
    candidates: Mapping[str, Candidate]
    recipe: int
    origin: str
    parents: Mapping[str, str]
    failed: dict[str, str]
    labels: dict[str, ElectronicStructure] = field(default_factory=dict)
    written: list[Path] = field(default_factory=list)
    packed: int = 0

    def add(self, name: str, result: ElectronicStructure | ElectronicStructureError) -> None:
        if isinstance(result, InterruptedCalculation):
            return  # to be tried again
        reason = unsound(result) if isinstance(result, ElectronicStructure) else _without_log(str(result))
        if reason is not None:
            self.failed[name] = reason
            shutil.rmtree(self.work / name, ignore_errors=True)
        elif isinstance(result, ElectronicStructure):
            self.labels[name] = result
        if len(self.labels) == SHARD_SIZE:
            self.pack()

    def pack(self) -> None:
        """Write a shard and then remove what it holds from `work`. The only place that knows how a shard is written."""
        if not self.labels:
            return
        names, results = list(self.labels), list(self.labels.values())
        crystals = [self.candidates[name].atoms for name in names]
        failed = {name: reason for name, reason in self.failed.items() if (self.work / f"{name}.json").exists()}
        failures = [self.candidates[name].atoms for name in failed]
        arrays: dict[str, Any] = {
            "material_id": names, "split": [self.candidates[name].split for name in names],
            "atom_offset": np.cumsum([0, *map(len, crystals)], dtype=np.int32),
            "cell": np.array([a.cell.array.ravel() for a in crystals], np.float32),
            "atomic_numbers": np.concatenate([a.numbers for a in crystals]).astype(np.int16),
            "frac_coords": np.concatenate([a.get_scaled_positions() for a in crystals]).astype(np.float32),
            "energies": results[0].energies.astype(np.float32),
            "site_dos": _integers(np.concatenate([r.orbital_dos for r in results]), np.uint16),
            "total_dos": _integers([r.total.values for r in results], np.uint32),
            "spin_polarised": [r.spin_polarised for r in results],
            "num_kpoints_ibz": np.array([r.num_kpoints for r in results], np.int16),
            "recipe": np.int16(self.recipe),
        }  # fmt: skip
        if self.origin != "given":
            arrays["origin"] = np.full(len(names), self.origin)
            arrays["parent"] = np.array([self.parents.get(name, "") for name in names], np.str_)
        arrays |= {
            "failed_id": np.array(list(failed), np.str_),
            "failed_reason": np.array(list(failed.values()), np.str_),
            "failed_crystal": np.array([str(_Crystal.of(a.numbers, a.cell)) for a in failures], np.str_),
            **pack_bands([r.bands for r in results]),
        }
        for name in ("e_max", "band_gap", "energy", "num_electrons", "magnetic_moment", "fermi_level"):
            arrays[name.replace("fermi_level", "efermi")] = np.array([getattr(r, name) for r in results], np.float32)
        digest = zlib.crc32("".join(names).encode())  # two runs may pack in one second
        path = self.folder / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{digest:08x}.npz"
        write_npz(path, **arrays)
        for name in [*names, *failed]:
            (self.work / f"{name}.json").unlink()
        self.written.append(path)
        self.packed += len(names)
        self.labels.clear()


def _integers(values: Any, kind: type) -> np.ndarray:
    return np.round(np.asarray(values) / SHARD_UNIT).clip(0, np.iinfo(kind).max).astype(kind)
