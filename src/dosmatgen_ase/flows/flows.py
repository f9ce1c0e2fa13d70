"""The flow: generate -> screen -> relax -> DOS -> compare -> rank, and labels for data sets.

How many candidates survive is known only when the screen has run, so one job (`evaluate_candidates`) replaces itself by
three jobs per survivor and a ranking. Jobs in there run although one before them failed, get None in its place and say
so in their document: a candidate that fails costs itself alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.data import chemical_symbols
from jobflow import Flow, Job, Maker, OnMissing, Response, job
from pymatgen.core import Structure

from dosmatgen_ase.crystals.convert import to_atoms
from dosmatgen_ase.dos.checks import labelled_elements
from dosmatgen_ase.flows.jobs import (
    ESPRESSO,
    CompareDOSMaker,
    DOSMaker,
    GenerateMaker,
    PredictDOSMaker,
    RelaxMaker,
    ScreenMaker,
    add_reports,
    in_given_order,
    label_batch,
    targets_by_site,
)
from dosmatgen_ase.flows.schemas import LARGE, CandidateDoc, DOSDoc, InverseDesignDoc, RelaxDoc, ScreeningDoc
from dosmatgen_ase.flows.search import SearchMaker, with_known
from dosmatgen_ase.limits import MAX_ATOMIC_NUMBER
from dosmatgen_ase.parsing import DOSInput, formula_counts, site_elements, site_numbers


@dataclass
class InverseDesignMaker(Maker):
    """From a target DOS to crystals, relaxed, computed and ranked.

    Attributes
    ----------
    generate_maker, screen_maker, compare_maker
        The steps of this package.
    relax_maker
        `RelaxMaker`, or a Maker of atomate2 that relaxes one structure, such as ``ForceFieldRelaxMaker`` or the VASP
        ``DoubleRelaxMaker``. None computes structures as generated.
    dos_maker
        `DOSMaker` (Quantum ESPRESSO), `PredictDOSMaker` (no DFT), or a Maker whose output has a ``CompleteDos`` of
        pymatgen under ``vasp_objects["dos"]``, such as atomate2's ``UniformBandStructureMaker``, or atomate2's abinit
        ``BandStructureMaker(bs_maker=None)``.
    search_maker
        `SearchMaker`, whose known crystals are candidates beside the generated ones. None by default.

    Notes
    -----
    Where this package computes or predicts the DOS, elements without labels are not drawn (`labelled_elements`): most
    have no pseudopotential. Elements that ``elements``, a composition, a pin or the template names stay allowed.

    `RelaxMaker` holds the cell and the sites that the generation holds (``fixed_cell``, ``fixed_sites``, constraints of
    the template), and `DOSMaker` computes what is held as it is (``symmetry_tolerance`` 0). A ``relax_maker`` of
    another package is not told what is held: a warning says so. Known crystals have no cell or site of the template:
    they are relaxed and computed by the Makers as given.
    """

    name: str = "inverse design"
    generate_maker: GenerateMaker = field(default_factory=GenerateMaker)
    screen_maker: ScreenMaker = field(default_factory=ScreenMaker)
    relax_maker: Maker | None = field(default_factory=RelaxMaker)
    dos_maker: Maker = field(default_factory=DOSMaker)
    compare_maker: CompareDOSMaker = field(default_factory=CompareDOSMaker)
    search_maker: SearchMaker | None = None

    def make(self, dos: DOSInput, sites: Iterable[int] | None = None, template: Structure | None = None) -> Flow:
        """Make the flow; its output is an `InverseDesignDoc`.

        Parameters
        ----------
        dos, sites
            As in ``DOSGenerator.generate``; a target there must be.
        template : Structure, optional
            Start from this crystal.

        Raises
        ------
        ValueError
            If there is no target, or the template is disordered.
        """
        sites = None if sites is None else list(site_numbers(sites, "sites"))  # of which JSON knows all
        if not targets_by_site(dos, sites):
            raise ValueError("inverse design needs a target DOS: give one, or use GenerateMaker alone")
        start, kept = None if template is None else to_atoms(template), self.generate_maker.settings
        holds = kept.fixed_cell or kept.fixed_sites or (start is not None and start.constraints)
        if holds and not isinstance(self.relax_maker, RelaxMaker | None):  # another package's may have its own options
            told = "is not told which cell and sites the generation holds: hold them by its own options"
            name = type(self.relax_maker).__name__
            warnings.warn(f"relax_maker {name} {told}, or take RelaxMaker", stacklevel=2)
        generator = self.generate_maker
        if isinstance(self.dos_maker, DOSMaker | PredictDOSMaker):
            generator = _without_unlabelled(generator, start)
        generation = generator.make(dos, sites=sites, template=template)
        first: list[Job] = [generation]
        if self.search_maker is not None:
            known = self.search_maker.make(dos, sites=sites)
            first += [known, with_known(generation.output, known.output)]
        screening = self.screen_maker.make(first[-1].output)
        evaluation = evaluate_candidates(screening.output, self.relax_maker, self.dos_maker, self.compare_maker)
        return Flow([*first, screening, evaluation], output=evaluation.output, name=self.name)


def _without_unlabelled(maker: GenerateMaker, template: Atoms | None) -> GenerateMaker:
    """Exclude elements without labels: most have no pseudopotential. What the user names may stay."""
    settings = maker.settings
    if settings.elements is not None:
        return maker
    named = {*site_elements(settings.fixed_species or {}).values(), *(formula_counts(settings.composition) or {})}
    named |= set(template.symbols) if template else set()
    unlabelled = set(chemical_symbols[1 : MAX_ATOMIC_NUMBER + 1]) - labelled_elements() - named
    excluded = sorted({*(settings.exclude_elements or ()), *unlabelled}, key=chemical_symbols.index)
    return replace(maker, settings=settings.replace(exclude_elements=excluded))


@job  # without a schema: what is stored for this job is a reference to the output of the ranking
def evaluate_candidates(
    screening: ScreeningDoc, relax_maker: Maker | None, dos_maker: Maker, compare_maker: CompareDOSMaker
) -> Response:
    """Replace this job by relaxation, DOS and comparison of every survivor, and the ranking of all candidates."""
    screening = ScreeningDoc.model_validate(screening)
    steps: list[Job | Flow] = []
    results = []
    for candidate in screening.survivors:
        structure: Any = candidate.generated
        relaxation: Any = {"structure": structure}
        chain: list[Job | Flow] = []
        candidate, relaxing, computing = _holding(candidate, relax_maker, dos_maker)
        if relaxing is not None:
            chain.append(relaxing.make(structure))
            output = chain[-1].output
            if output.output_schema is not RelaxDoc:
                chain.append(in_given_order(structure, output.structure, output.output.energy_per_atom))
                output = chain[-1].output
            structure, relaxation = output.structure, output
        chain.append(computing.make(structure))
        output = chain[-1].output
        if output is None:  # atomate2's abinit flow leaves files only
            chain.append(read_abinit_dos(chain[-1].jobs[-1].output.dir_name, structure))
            output = chain[-1].output
        dos = output if output.output_schema is DOSDoc else output.vasp_objects["dos"]
        chain.append(compare_maker.make(screening.targets, candidate, relaxation, dos, engine=dos_maker.name))
        results.append(chain[-1].output)
        for step in chain:
            step.append_name(f" {candidate.index}")
        steps += chain
    ranking = rank(screening, results)
    flow = Flow([*steps, ranking], output=ranking.output, name="candidates")
    flow.update_config({"on_missing_references": OnMissing.NONE})
    return Response(replace=flow)


def _holding(
    candidate: CandidateDoc, relax_maker: Maker | None, dos_maker: Maker
) -> tuple[CandidateDoc, Maker | None, Maker]:
    """The candidate with what is held of it, and its Makers, which keep that.

    Held is what its generation held (the record of a known crystal holds nothing), what the Maker holds by itself, and
    what was held when the candidate was relaxed before.
    """
    told: list[Mapping[str, Any]] = [candidate.record, candidate.held]
    if isinstance(relax_maker, RelaxMaker):
        told.append({"fixed_cell": relax_maker.fixed_cell, "fixed_sites": relax_maker.fixed_sites})
    cell = any(held.get("fixed_cell") for held in told)
    sites = sorted({i for held in told for i in held.get("fixed_sites") or ()})
    if isinstance(relax_maker, RelaxMaker):
        relax_maker = replace(relax_maker, fixed_cell=cell, fixed_sites=sites)
    if isinstance(dos_maker, DOSMaker) and (cell or sites):
        dos_maker = replace(dos_maker, symmetry_tolerance=0.0)  # exact symmetry would move what is held
    held = {"fixed_cell": cell, "fixed_sites": sites}
    return candidate.model_copy(update={"held": held}), relax_maker, dos_maker


@job(output_schema=DOSDoc, data=LARGE)
def read_abinit_dos(directory: str | None, structure: Structure | None) -> DOSDoc:
    """Read what the uniform step of atomate2's abinit ``BandStructureMaker`` wrote."""
    from dosmatgen_ase.dft.errors import ElectronicStructureError
    from dosmatgen_ase.dft.readers import read_abinit

    done = DOSDoc(engine="abinit", directory=directory)
    if directory is None or structure is None:
        done.reason = "see the log of its job"
        return done
    folder = Path(directory.split(":", 1)[-1])  # atomate2 writes HOST:/PATH
    try:
        sites, done.total_dos = read_abinit(folder / "outdata" / "out", to_atoms(structure))
        done.site_dos = list(sites)
    except (ElectronicStructureError, FileNotFoundError) as error:
        done.reason = str(error)
    return done


def validate_candidates(result: InverseDesignDoc, dos_maker: Maker, keep: int = 3) -> Job:
    """Compute the best candidates of a finished run again by another engine, as they are, and rank them by that.

    What `DOSMaker` has computed, it computes again as it is: its symmetry was made exact then, where nothing was held.
    Of what another engine computed, it makes the symmetry exact first, where nothing was held.
    """
    best = [candidate for candidate in result.candidates if candidate.distance is not None][:keep]
    if isinstance(dos_maker, DOSMaker) and all(candidate.engine == ESPRESSO for candidate in best):
        dos_maker = replace(dos_maker, symmetry_tolerance=0.0)  # a second search may find more symmetry, and move atoms
    # What the first engine found must not stand under the name of the second where that fails.
    found = ("achieved", "distance", "near_gap_distance", "mae", "band_gap", "engine", "directory", "reason")
    forgotten = {name: CandidateDoc.model_fields[name].default for name in found}
    again = [candidate.model_copy(update={**forgotten, "generated": candidate.structure}) for candidate in best]
    screening = ScreeningDoc(candidates=again, targets=result.targets, generation=result.generation)
    return evaluate_candidates(screening, None, dos_maker, CompareDOSMaker())


@job(output_schema=InverseDesignDoc, data=LARGE)
def rank(screening: ScreeningDoc, results: list[CandidateDoc | None]) -> InverseDesignDoc:
    """Sort the candidates: by distance, then those that fell out, in the order of their generation."""
    screening = ScreeningDoc.model_validate(screening)
    done = {c.index: c for c in map(CandidateDoc.model_validate, filter(None, results))}
    candidates = [done.get(candidate.index, candidate) for candidate in screening.candidates]
    for candidate in screening.survivors:
        if candidate.index not in done:
            candidate.reason = "the comparison failed: see the log of its job"
    candidates.sort(key=lambda c: (c.reason is not None, c.distance is None, c.distance or 0.0, c.index))
    return InverseDesignDoc(targets=screening.targets, candidates=candidates, generation=screening.generation)


@dataclass
class LabelMaker(Maker):
    """Make training labels of many structures: `labels.label` on one batch per job.

    Attributes
    ----------
    settings
        Fields of `dft.settings.EspressoSettings` that differ from its defaults. Labels of one data set share them.
    batch_size
        Structures of a job, which writes a shard.
    workers
        Structures that a job computes at a time.
    """

    name: str = "labels"
    settings: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 20
    workers: int = 1

    def make(
        self, structures: Mapping[str, Structure], shards: str | Path, split: Mapping[str, str] | None = None
    ) -> Flow:
        """Make the flow; its output is a `labels.LabelReport` of all jobs, as a dict.

        Parameters
        ----------
        structures : mapping of id to Structure
        shards : path
            Folder of the label set, on a disk that the workers see. What has a label of the latest recipe there is not
            computed again.
        split : mapping of id to "train", "val" or "test", optional
            As in `labels.label`.

        Raises
        ------
        ValueError
            If there is no structure, one is disordered, or a split contradicts that of another of the formula.
        """
        from dosmatgen_ase.dft.labels import formula_splits

        if not structures:
            raise ValueError("no structures to label: give at least one")
        for structure in structures.values():
            to_atoms(structure)
        formulas = {name: structure.composition.reduced_formula for name, structure in structures.items()}
        parts = formula_splits(formulas, split)
        jobs = []
        for start in range(0, len(structures), self.batch_size):
            batch = dict(list(structures.items())[start : start + self.batch_size])
            # Those without a split, too: which of a formula's batches runs first is not known.
            own = {name: parts[formulas[name]] for name in batch if formulas[name] in parts}
            jobs.append(label_batch(batch, str(Path(shards).resolve()), own, self.settings, self.workers))
        total = add_reports([step.output for step in jobs])
        total.config.on_missing_references = OnMissing.NONE
        return Flow([*jobs, total], output=total.output, name=self.name)
