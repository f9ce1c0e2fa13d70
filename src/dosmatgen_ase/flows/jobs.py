"""One Maker per step. A Maker is a dataclass of settings; its ``make`` calls the package and fills a document.

What is wrong with one structure is written into its document (``reason``) and does not stop the others. What is wrong
with the machine (a missing program, missing weights) fails the job.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from jobflow import Job, Maker, job
from pymatgen.core import Structure

from dosmatgen_ase.crystals.checks import MIN_VOLUME_PER_ATOM
from dosmatgen_ase.crystals.convert import to_atoms, to_structure
from dosmatgen_ase.crystals.screening import MAX_GIVEN_VOLUME_PER_ATOM
from dosmatgen_ase.dos import NEAR_GAP, TargetDOS, mae, mean_distance
from dosmatgen_ase.flows.schemas import (
    FORWARD_MODEL,
    LARGE,
    CandidateDoc,
    DOSDoc,
    GenerationDoc,
    RelaxDoc,
    ScreeningDoc,
    TrainDoc,
)
from dosmatgen_ase.generate.settings import DEFAULT_COUNT, GenerationOptions, GenerationSettings
from dosmatgen_ase.parsing import DOSInput, split_targets, whole_number

ESPRESSO = "Quantum ESPRESSO"  # the engine of `DOSMaker`
LATTICE_MATCH = 0.5  # Angstrom: an engine that reorders sites moves none of them this far


def targets_by_site(dos: DOSInput, sites: Iterable[int] | None = None) -> dict[str, TargetDOS]:
    """Name the site of every target, or "total", as ``DOSGenerator.generate`` reads its arguments; errors likewise."""
    total, targets = split_targets(whole_keys(dos), sites)
    return {str(i): target for i, target in targets.items()} if total is None else {"total": total}


def whole_keys(by_site: Any) -> Any:
    """Undo what JSON, which knows keys of text only, did to the sites of a mapping."""
    if not isinstance(by_site, Mapping):
        return by_site
    return {int(i) if isinstance(i, str) and i.isdecimal() else i: value for i, value in by_site.items()}


# -- generate and screen -----------------------------------------------------------------------------------------------


@dataclass(init=False)
class GenerateMaker(Maker):
    """Generate structures.

    Parameters
    ----------
    n : int
        Number of structures.
    settings : GenerationSettings, optional
        What to generate, and how, but for sites and template, which belong to `make`.
    weights, device : str, optional
        As in ``DOSGenerator``. A path is made absolute at once, as a job runs in a folder of its own.
    **options
        Fields of `GenerationSettings`, which replace those of ``settings``: ``GenerateMaker(num_atoms=4, seed=1)``.

    Raises
    ------
    TypeError, ValueError
        As `GenerationSettings`; if it has sites or a template.
    """

    name: str = "generate"
    n: int = DEFAULT_COUNT
    settings: GenerationSettings = GenerationSettings()  # noqa: RUF009  # frozen, so it may be shared
    weights: str = "default"
    device: str | None = None

    def __init__(
        self,
        name: str = name,
        n: int = n,
        settings: GenerationSettings = settings,
        weights: str = weights,
        device: str | None = device,
        **options: Unpack[GenerationOptions],
    ) -> None:
        self.name, self.n, self.device = name, whole_number(n, "n", 1), device
        self.weights = weights if weights == "default" else str(Path(weights).absolute())
        if options.get("fixed_species"):
            options["fixed_species"] = whole_keys(options["fixed_species"])
        self.settings = settings.replace(**options)
        if self.settings.template is not None or self.settings.sites is not None:
            raise ValueError("sites and template belong to make(dos, sites, template), not to the Maker's settings")

    @job(output_schema=GenerationDoc, data=LARGE)
    def make(
        self, dos: DOSInput, sites: Iterable[int] | None = None, template: Structure | None = None
    ) -> GenerationDoc:
        """Generate; a structure that is rejected too often costs itself, not those that were made before.

        Parameters
        ----------
        dos, sites
            As in ``DOSGenerator.generate``.
        template : Structure, optional
            Start from this crystal.
        """
        from dosmatgen_ase.generate.generator import DOSGenerator

        given = whole_keys(dos)
        settings = self.settings.replace(sites=sites, template=None if template is None else to_atoms(template))
        made, reason = [], None
        generator = DOSGenerator(self.weights, device=self.device)
        try:
            for atoms in generator.generate_iter(given, self.n, settings=settings):
                made.append(atoms)
        except RuntimeError as error:
            if not made:
                raise
            reason = f"{len(made)} of {self.n}: {error}"
        made.sort(key=lambda atoms: atoms.info["dosmatgen"]["index"])
        own = {"name": self.name, "n": self.n, "weights": self.weights, "device": self.device}
        return GenerationDoc(
            structures=[to_structure(atoms) for atoms in made],
            records=[atoms.info["dosmatgen"] for atoms in made],
            targets=targets_by_site(given, settings.sites),
            settings={**own, **self.settings.to_dict()},
            reason=reason,
        )


@dataclass
class ScreenMaker(Maker):
    """Reject what is no crystal (`screening.screen`) and what came twice; keep the most promising.

    Attributes
    ----------
    min_distance, min_volume_per_atom, max_volume_per_atom
        As in `screening.screen`, but as sparse as a template may be: the generator has judged the cells that it drew.
    drop_duplicates
        Keep the first of structures that pymatgen's StructureMatcher takes for one crystal, and whose sites with a
        target are equivalent. What holds a cell or sites is compared only with what holds the same of one template: a
        strained cell is not the crystal that it would relax to.
    keep
        Let only so many go on: those whose predicted DOS is nearest to the targets. None lets all go on. Known crystals
        of a `SearchMaker`, which gives their number, go on besides.
    """

    name: str = "screen"
    min_distance: float = 0.5
    min_volume_per_atom: float = MIN_VOLUME_PER_ATOM
    max_volume_per_atom: float = MAX_GIVEN_VOLUME_PER_ATOM
    drop_duplicates: bool = True
    keep: int | None = None

    @job(output_schema=ScreeningDoc, data=LARGE)
    def make(self, generation: GenerationDoc) -> ScreeningDoc:
        """Screen every structure of a generation."""
        from dosmatgen_ase.crystals.screening import KnownCrystals, screen
        from dosmatgen_ase.retrieval.index import default_index

        generation = GenerationDoc.model_validate(generation)
        limits = {key: getattr(self, key) for key in ("min_distance", "min_volume_per_atom", "max_volume_per_atom")}
        result = ScreeningDoc(
            candidates=[],
            targets=generation.targets,
            generation=generation.model_dump(include={"settings", "reason", "version"}),
        )
        before: defaultdict[str, KnownCrystals] = defaultdict(KnownCrystals)
        known, sites = default_index(), [int(key) for key in generation.targets if key != "total"]
        for structure, record in zip(generation.structures, generation.records, strict=True):
            atoms = to_atoms(structure)
            reason = screen(atoms, **limits).reason
            if reason is None and self.drop_duplicates:
                alike = before[_held(record)]
                if (twin := alike.find(atoms, sites)) is not None:
                    reason = f"the same crystal as candidate {twin}"
                else:
                    alike.add(atoms, str(record["index"]))
            told = {"index": record["index"], "formula": structure.composition.reduced_formula, "reason": reason}
            searched = record.get("search", {}).get("material_id")
            name = searched or (known.find(atoms) if reason is None else None)
            result.candidates.append(CandidateDoc(generated=structure, record=record, known_as=name, **told))
        if self.keep is not None and generation.targets:
            _keep_best(result, self.keep)
        return result


def _held(record: Mapping[str, Any]) -> str:
    """What the record of a structure says is held, and of which template; empty if nothing is."""
    held = [record.get("fixed_cell"), record.get("fixed_sites")]
    return json.dumps([*held, record.get("template_sha256")]) if any(held) else ""


def _keep_best(screening: ScreeningDoc, keep: int) -> None:
    """Give a reason to all but the `keep` survivors whose predicted DOS is nearest to the targets."""
    from dosmatgen_ase.judge.ranking import score

    survivors = [candidate for candidate in screening.survivors if "search" not in candidate.record]
    crystals = [to_atoms(candidate.generated) for candidate in survivors]
    for i, atoms in enumerate(crystals):
        atoms.info["survivor"] = i
    sites = {int(key): target for key, target in screening.targets.items() if key != "total"}
    for place, atoms in enumerate(score(crystals, sites, screening.targets.get("total")), 1):
        candidate = survivors[atoms.info["survivor"]]
        candidate.predicted_distance = atoms.info["scores"]["distance"]
        if place > keep:
            candidate.reason = f"place {place} of {len(survivors)} by predicted DOS: only {keep} go on"


# -- relax and compute -------------------------------------------------------------------------------------------------


@dataclass
class RelaxMaker(Maker):
    """Relax cell and positions; the fields are those of `relaxation.relax`.

    `calculator` is "chgnet", which works offline, or the name or file of a MACE model. A file is a pickle, which may
    run any code on the machine that does the job: it is loaded with `trust_model` alone.
    """

    name: str = "relax"
    calculator: str = "chgnet"
    fmax: float = 0.05
    max_steps: int = 200
    time_limit: float = 120.0
    fixed_cell: bool = False
    fixed_sites: list[int] = field(default_factory=list)
    trust_model: bool = False

    @job(output_schema=RelaxDoc)
    def make(self, structure: Structure) -> RelaxDoc:
        """Relax one structure."""
        from dosmatgen_ase.judge.relaxation import relax
        from dosmatgen_ase.judge.stability import load_hull

        relaxed: Any = relax(
            to_atoms(structure), self.calculator, fixed_cell=self.fixed_cell, fixed_sites=self.fixed_sites,
            fmax=self.fmax, max_steps=self.max_steps, time_limit=self.time_limit, trust_model=self.trust_model,
        )  # fmt: skip
        report = relaxed.info["relaxation"]
        above = load_hull().above(relaxed.numbers, report["energy"]) if self.calculator == "chgnet" else None
        structure = None if report["energy"] is None else to_structure(relaxed)
        return RelaxDoc(structure=structure, energy_above_hull=above, **report)


@job(output_schema=RelaxDoc)
def in_given_order(given: Structure, relaxed: Structure | None, energy: float | None) -> RelaxDoc:
    """Return the sites that another package relaxed in the order in which they were given: targets count sites.

    atomate2's inputs for VASP sort sites by element, and sites of one element keep their order.
    """
    if relaxed is None:
        return RelaxDoc(structure=None)
    wanted, found = np.array(given.atomic_numbers), np.array(relaxed.atomic_numbers)
    places, back = np.argsort(wanted, kind="stable"), np.argsort(found, kind="stable")
    if not np.array_equal(wanted[places], found[back]):
        reason = f"the relaxation returned {relaxed.formula} for {given.formula}: which site is which is not known"
        return RelaxDoc(structure=None, reason=reason)
    order = back[np.argsort(places)].tolist()
    return RelaxDoc(structure=Structure.from_sites([relaxed[i] for i in order]), energy=energy)


@dataclass
class DOSMaker(Maker):
    """Compute the site DOS with Quantum ESPRESSO (`dft.espresso.compute_dos`).

    Attributes
    ----------
    settings
        Fields of `dft.settings.EspressoSettings` that differ from its defaults.
    symmetry_tolerance
        Angstrom. The symmetry found within it is made exact first (`relaxation.symmetrized`): a relaxation leaves small
        displacements, and a crystal without symmetry costs ten times the k-points. 0 computes a structure as it is, as
        `InverseDesignMaker` does with one whose cell or sites are held.
    """

    name: str = "dos"
    settings: dict[str, Any] = field(default_factory=dict)
    symmetry_tolerance: float = 0.1

    @job(output_schema=DOSDoc, data=LARGE)
    def make(self, structure: Structure | None) -> DOSDoc:
        """Compute one structure, in a folder of its own below the current one, which is kept."""
        from dosmatgen_ase.dft.errors import ElectronicStructureError, InterruptedCalculation
        from dosmatgen_ase.dft.espresso import compute_dos
        from dosmatgen_ase.dft.settings import EspressoSettings
        from dosmatgen_ase.judge.relaxation import symmetrized

        done = DOSDoc(engine=ESPRESSO, settings=self.settings)
        if structure is None:
            done.reason = "there is no structure: its relaxation failed"
            return done
        atoms, settings = to_atoms(structure), EspressoSettings(**self.settings)
        if self.symmetry_tolerance:
            try:
                atoms = symmetrized(atoms, self.symmetry_tolerance)
            except ValueError as error:
                done.reason = str(error)
                return done
            done.structure = to_structure(atoms)
        done.directory = tempfile.mkdtemp(prefix="espresso-", dir=Path.cwd())
        try:
            result = compute_dos(atoms, settings, directory=done.directory)
        except InterruptedCalculation:
            raise  # says nothing about the structure: the job is to be run again
        except ElectronicStructureError as error:
            done.reason = str(error)
            return done
        finally:
            for file in Path(done.directory).rglob("*.save/wfc*"):
                file.unlink()  # wave functions: most of the bytes, and made again by the inputs
        done.site_dos, done.total_dos, done.electronic_structure = list(result.sites), result.total, result.to_dict()
        done.band_gap, done.fermi_level, done.energy = result.band_gap, result.fermi_level, result.energy
        return done


@dataclass
class PredictDOSMaker(Maker):
    """In place of `DOSMaker` where no DFT is at hand: the forward model that ships, in a fraction of a second.

    It is also what ``ScreenMaker.keep`` ranks by, so it must not judge that choice.
    """

    name: str = "predicted dos"

    @job(output_schema=DOSDoc, data=LARGE)
    def make(self, structure: Structure | None) -> DOSDoc:
        """Predict the site DOS of one structure."""
        if structure is None:
            return DOSDoc(engine=FORWARD_MODEL, reason="there is no structure: its relaxation failed")
        from dosmatgen_ase.forward.predictor import predict_dos

        try:
            sites = predict_dos(to_atoms(structure))
        except ValueError as error:
            return DOSDoc(engine=FORWARD_MODEL, reason=str(error))
        known = [dos for dos in sites if dos is not None]
        total = TargetDOS.sum_of(known) if len(known) == len(sites) else None
        return DOSDoc(engine=FORWARD_MODEL, site_dos=sites, total_dos=total)


# -- compare -----------------------------------------------------------------------------------------------------------


@dataclass
class CompareDOSMaker(Maker):
    """Measure how far the DOS of a candidate is from its targets.

    Attributes
    ----------
    max_distance
        Reject candidates that are farther away (normalised L1). None rejects none.
    """

    name: str = "compare"
    max_distance: float | None = None

    @job(output_schema=CandidateDoc, data=LARGE)
    def make(
        self, targets: dict[str, TargetDOS], candidate: CandidateDoc, relaxation: Any, dos: Any, engine: str = ""
    ) -> CandidateDoc:
        """Complete the document of a candidate.

        Parameters
        ----------
        targets : dict
            By site, or under "total".
        candidate : CandidateDoc
            As it left the screen.
        relaxation : RelaxDoc, dict or None
            None where the job failed.
        dos : DOSDoc, pymatgen CompleteDos (or its dict) or None
            None where the job failed.
        engine : str
            What made a CompleteDos.
        """
        done = CandidateDoc.model_validate(candidate).model_copy(deep=True)
        relaxed = RelaxDoc.model_validate(relaxation) if relaxation is not None else RelaxDoc(structure=None)
        done.structure = relaxed.structure
        if relaxed.energy is not None:  # what is computed again as it is keeps the energies that it came with
            done.energy_per_atom, done.energy_above_hull = relaxed.energy, relaxed.energy_above_hull
        if relaxed.structure is None:
            done.reason = f"relaxation failed: {relaxed.reason or 'see the log of its job'}"
            return done
        if relaxed.converged is not None:
            done.relaxation = relaxed.reason or f"converged in {relaxed.steps} steps"
        if isinstance(dos, Mapping) and "engine" in dos:
            dos = DOSDoc.model_validate(dos)
        if isinstance(dos, DOSDoc):
            done.engine, done.directory, done.band_gap = dos.engine, dos.directory, dos.band_gap
            done.structure = dos.structure or done.structure
        if dos is None or (isinstance(dos, DOSDoc) and dos.reason is not None):
            done.reason = f"no DOS: {'see the log of its job' if dos is None else dos.reason}"
            return done
        done.engine = done.engine or engine
        try:
            done.achieved = _achieved(targets, dos, relaxed.structure)
            pairs = [(done.achieved[key], target) for key, target in targets.items()]
            done.distance = mean_distance(pairs)
            if done.distance is None:
                raise ValueError("the target holds no states where both are known")
            done.mae = sum(mae(*pair) for pair in pairs) / len(pairs)
            with contextlib.suppress(ValueError):  # a target may end outside this window
                done.near_gap_distance = mean_distance(pairs, window=NEAR_GAP)
        except ValueError as error:
            done.reason = f"not comparable: {error}"
        if self.max_distance is not None and (done.distance or 0.0) > self.max_distance:
            done.reason = f"distance {done.distance:.2f}, more than {self.max_distance:g}"
        return done


def _achieved(targets: Mapping[str, TargetDOS], dos: Any, structure: Structure | None) -> dict[str, TargetDOS]:
    """The DOS of every site that has a target, or of the cell."""
    if isinstance(dos, DOSDoc):
        found = {"total": dos.total_dos, **{str(i): site for i, site in enumerate(dos.site_dos)}}
        achieved = {key: made for key in targets if (made := found.get(key)) is not None}
        if len(achieved) < len(targets):
            raise ValueError(f"{dos.engine} gave no DOS for {', '.join(sorted(set(targets) - set(achieved)))}")
        return achieved
    from pymatgen.electronic_structure.dos import CompleteDos

    dos = dos if isinstance(dos, CompleteDos) else CompleteDos.from_dict(dos)
    places = {key: None if key == "total" else _same_site(structure, dos.structure, int(key)) for key in targets}
    return {key: TargetDOS.from_pymatgen(dos, site) for key, site in places.items()}


def _same_site(structure: Structure, reordered: Structure, site: int) -> int:
    """Find a site again in a structure that an engine has sorted by element."""
    wanted = structure[site]
    distances = reordered.lattice.get_all_distances(wanted.frac_coords, reordered.frac_coords)[0]
    for i in distances.argsort().tolist():
        if reordered[i].specie.Z == wanted.specie.Z and distances[i] < LATTICE_MATCH:
            return i
    raise ValueError(f"site {site} ({wanted.specie}) is not in the structure that the DOS was computed for")


# -- labels and training -----------------------------------------------------------------------------------------------


@job
def label_batch(
    structures: dict[str, Structure], shards: str, split: dict[str, str], settings: dict[str, Any], workers: int
) -> dict[str, Any]:
    """Label some structures; started again, on whatever machine, it goes on where it was.

    Returns
    -------
    dict
        The fields of `labels.LabelReport`.
    """
    from dosmatgen_ase.data import load_structures
    from dosmatgen_ase.dft.labels import label
    from dosmatgen_ase.dft.settings import EspressoSettings

    beside = Path(shards).parent / "structures.parquet"
    # A folder of its own, as other batches write to the same shards; it stays if it holds failures that no shard tells.
    unpacked = Path(shards) / f"unpacked-{zlib.crc32(','.join(structures).encode()):08x}"
    report = label(
        {name: to_atoms(structure) for name, structure in structures.items()},
        shards,
        EspressoSettings(**{"time_limit": 600.0, **settings}),
        workers=workers,
        split=split,
        table=load_structures(beside) if beside.is_file() else None,
        unpacked=unpacked,
    )
    if not list(unpacked.glob("*.json")):
        shutil.rmtree(unpacked)
    return {**asdict(report), "shards": [str(path) for path in report.shards]}


@job
def add_reports(reports: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Join what `label_batch` returned; a job that failed adds nothing, and makes its labels when it runs again."""
    total: dict[str, Any] = {"shards": [], "labels": 0, "failed": {}, "skipped": {}, "done_before": 0}
    for report in filter(None, reports):
        for key, value in report.items():
            total[key] = total[key] | value if isinstance(value, dict) else total[key] + value
    return total


@dataclass
class TrainMaker(Maker):
    """Train a generator (`training.train`), or go on with a run that was cut off.

    Attributes
    ----------
    config
        Fields of ``TrainingConfig`` that differ from its defaults.
    data
        Folder with ``structures.parquet`` and ``site_dos/*.npz``.
    out
        Folder of the run. All paths are made absolute at once, as a job runs in a folder of its own.
    """

    name: str = "train"
    config: dict[str, Any] = field(default_factory=dict)
    data: str = "data"
    out: str = "runs/default"
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.data, self.out = str(Path(self.data).absolute()), str(Path(self.out).absolute())

    def make(self, pseudo_labels: str | None = None) -> Job:
        """Train on the training split, with a file of predicted DOS for structures that have no label, if given."""
        if isinstance(pseudo_labels, str | Path):  # not the output of a job before, which the job alone can resolve
            pseudo_labels = str(Path(pseudo_labels).absolute())
        return self.train(pseudo_labels)

    @job(output_schema=TrainDoc)
    def train(self, pseudo_labels: str | None = None) -> TrainDoc:
        """What the job of `make` does."""
        from dosmatgen_ase.data import CrystalDataset, load_pseudo_labels, load_site_dos, load_structures
        from dosmatgen_ase.model.checkpoint import load_model
        from dosmatgen_ase.train.trainer import TrainingConfig, train

        structures = load_structures(Path(self.data) / "structures.parquet", split="train")
        extra = [] if pseudo_labels is None else [load_pseudo_labels(pseudo_labels)]
        dataset = CrystalDataset.join(structures, load_site_dos(Path(self.data) / "site_dos"), *extra)
        config = TrainingConfig.from_dict(self.config)
        weights = train(config, dataset, self.out, device=self.device)
        counts = {"structures": len(dataset), "labelled": len(dataset.labelled)}
        digest = load_model(weights)[1]["sha256"]
        return TrainDoc(weights=str(weights), sha256=digest, config=asdict(config), **counts)
