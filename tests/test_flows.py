"""Makers and flows: what travels between machines, what fails and what that costs, on jobflow and on FireWorks."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk

pytest.importorskip("jobflow")

from jobflow import Flow, JobStore, Maker, OnMissing, job, run_locally
from maggma.stores import MemoryStore
from monty.json import MontyDecoder, MontyEncoder
from pymatgen.core import Lattice, Structure
from pymatgen.electronic_structure.core import Orbital, Spin
from pymatgen.electronic_structure.dos import CompleteDos, Dos

from dosmatgen_ase.dos import MODEL_GRID, TargetDOS
from dosmatgen_ase.flows import (
    CandidateDoc,
    CompareDOSMaker,
    DOSDoc,
    DOSMaker,
    GenerateMaker,
    GenerationDoc,
    InverseDesignDoc,
    InverseDesignMaker,
    LabelMaker,
    PredictDOSMaker,
    RelaxDoc,
    RelaxMaker,
    ScreeningDoc,
    ScreenMaker,
    SearchMaker,
    TrainMaker,
)
from dosmatgen_ase.flows.flows import evaluate_candidates, validate_candidates
from dosmatgen_ase.flows.jobs import targets_by_site, to_atoms, to_structure
from dosmatgen_ase.forward.predictor import predict_dos

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
SMALL = ["-n", "3", "--keep", "1", "--num-atoms", "2", "--elements", "Ni", "Cu", "Au"]  # of the inverse-design scripts
TARGET = TargetDOS.from_peaks([(-1.0, 8.0, 0.5)], window=(-5.0, 2.0))
COPPER = Structure(Lattice.cubic(3.6), ["Cu"] * 4, [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])


def encoded(thing: Any) -> str:
    return json.dumps(thing, cls=MontyEncoder)


def decoded(text: str) -> Any:
    return MontyDecoder().decode(text)


def new_store() -> JobStore:
    return JobStore(MemoryStore(), additional_stores={"data": MemoryStore()})


def run(flow: Any, folder: Path, *, ensure_success: bool = True) -> Any:
    """The output of a flow or job run here."""
    store = new_store()
    settings = {"ensure_success": ensure_success, "raise_immediately": ensure_success, "log": False}
    run_locally(flow, store=store, root_dir=folder, create_folders=True, **settings)
    return store.get_output(flow.output.uuid, load=True)


class DOSLookalike(Maker):
    """Stands for a Maker of another package."""

    name = "other"


def small(weights: Path, **changes: Any) -> InverseDesignMaker:
    """Four structures of an untrained network, relaxed for two steps, their DOS predicted."""
    makers: dict[str, Any] = {
        "generate_maker": GenerateMaker(
            n=4, num_atoms=[2, 3], elements=["Ni", "Cu", "Au"], num_steps=4, weights=str(weights), seed=3
        ),
        "screen_maker": ScreenMaker(),
        "relax_maker": RelaxMaker(max_steps=2),
        "dos_maker": PredictDOSMaker(),
    }
    return InverseDesignMaker(**{**makers, **changes})


@pytest.mark.parametrize(
    ("dos_maker", "options", "excluded", "allowed"),
    [
        (DOSMaker(), {}, {"Ac", "Pu", "La", "Xe"}, {"Ni", "O", "Cs"}),
        (PredictDOSMaker(), {"exclude_elements": ["Pb"]}, {"Pb", "Ac"}, {"Ni"}),
        (DOSMaker(), {"fixed_species": {0: "La"}}, {"Ac", "Ce"}, {"La"}),
        (DOSMaker(), {"num_atoms": 5, "composition": "LaNi4"}, {"Ac"}, {"La"}),
        (DOSMaker(), {"elements": ["La", "Ni"]}, set(), {"La"}),
        (DOSLookalike(), {}, set(), {"Ac", "La"}),
    ],
)
def test_elements_without_labels_are_drawn_only_where_another_engine_follows_or_the_user_names_them(
    dos_maker: Maker, options: dict[str, Any], excluded: set[str], allowed: set[str]
) -> None:
    flow = InverseDesignMaker(generate_maker=GenerateMaker(n=1, **options), dos_maker=dos_maker).make(TARGET)
    found = set(flow.jobs[0].maker.settings.exclude_elements or ())
    assert found >= excluded
    assert not found & allowed
    assert not GenerateMaker(n=1).settings.exclude_elements  # the Maker alone draws all


# -- what travels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "maker",
    [
        GenerateMaker(num_atoms=[4, 6], fixed_species={0: "Co"}, elements=["Co", "Au"]),
        ScreenMaker(keep=2),
        RelaxMaker(fmax=0.1),
        DOSMaker(settings={"ecutwfc": 30.0}),
        PredictDOSMaker(),
        CompareDOSMaker(max_distance=0.5),
        TrainMaker(config={"steps": 3}),
        LabelMaker(settings={"ecutwfc": 30.0}),
        InverseDesignMaker(relax_maker=None, dos_maker=PredictDOSMaker()),
    ],
    ids=lambda maker: type(maker).__name__,
)
def test_a_maker_survives_json(maker: Maker) -> None:
    copy = decoded(encoded(maker))
    assert type(copy) is type(maker)
    assert encoded(copy) == encoded(maker)


def test_a_target_travels_inside_a_job() -> None:
    for given in (TARGET, [TARGET, TARGET], {1: TARGET}):
        kept = decoded(encoded(GenerateMaker().make(given))).function_args[0]
        assert targets_by_site(kept) == targets_by_site(given)


def test_documents_survive_json_and_turn_nan_into_none() -> None:
    candidate = CandidateDoc(
        index=0, formula="Cu", generated=COPPER, record={}, achieved={"0": TARGET}, distance=np.nan
    )
    assert candidate.distance is None
    result = InverseDesignDoc(targets={"0": TARGET}, candidates=[candidate], generation={})
    copy = InverseDesignDoc.model_validate_json(result.model_dump_json())
    assert copy.targets == {"0": TARGET}
    assert copy.candidates[0].achieved == {"0": TARGET}
    assert copy.candidates[0].generated == COPPER
    assert decoded(encoded(result)).candidates[0].generated == COPPER


def test_structures_pass_between_ase_and_pymatgen_and_disorder_is_refused() -> None:
    atoms = bulk("NaCl", "rocksalt", a=5.6)
    back = to_atoms(to_structure(atoms))
    np.testing.assert_allclose(back.positions, atoms.positions, atol=1e-12)
    assert (back.numbers == atoms.numbers).all()
    alloy = Structure(Lattice.cubic(3), [{"Cu": 0.5, "Au": 0.5}], [[0, 0, 0]])
    with pytest.raises(ValueError, match="disordered sites: order them first"):
        to_atoms(alloy)
    copper = bulk("Cu")
    copper.info["occupancy"] = {"0": {"Cu": 0.5, "Au": 0.5}}  # as ASE reads such a site from a CIF
    with pytest.raises(ValueError, match="Cu is disordered: order it first"):
        to_structure(copper)
    with pytest.raises(ValueError, match="disordered"):
        InverseDesignMaker().make(TARGET, template=alloy)
    with pytest.raises(ValueError, match="needs a target DOS"):
        InverseDesignMaker().make(None)


def test_flows_are_made_and_submitted_without_torch() -> None:
    pytest.importorskip("fireworks")
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "chgnet", "mace", "safetensors"):
            raise ImportError(f"{name} is not on this machine")
sys.meta_path.insert(0, Blocker())
from dosmatgen_ase import TargetDOS
from dosmatgen_ase.flows import InverseDesignMaker, TrainMaker
from jobflow.managers.fireworks import flow_to_workflow
target = TargetDOS.from_peaks([(-1.0, 8.0, 0.5)], window=(-5.0, 2.0))
flow = InverseDesignMaker().make({0: target})
print(len(flow_to_workflow(flow).to_dict()["fws"]))
try:
    import torch
except ImportError:
    print("blocked")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["3", "blocked"]


def test_the_decoded_copy_of_a_flow_runs_in_another_process(tiny_weights: Path, tmp_path: Path) -> None:
    flow = small(tiny_weights, screen_maker=ScreenMaker(keep=2)).make(TARGET)
    (tmp_path / "flow.json").write_text(encoded(flow))
    code = """
import sys
from monty.json import MontyDecoder
from jobflow import JobStore, run_locally
from maggma.stores import MemoryStore
from dosmatgen_ase.flows import InverseDesignDoc
flow = MontyDecoder().decode(open("flow.json").read())
store = JobStore(MemoryStore(), additional_stores={"data": MemoryStore()})
run_locally(flow, store=store, create_folders=True, ensure_success=True, log=False)
result = InverseDesignDoc.model_validate(store.get_output(flow.output.uuid, load=True))
open("result.json", "w").write(result.model_dump_json())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    result = InverseDesignDoc.model_validate_json((tmp_path / "result.json").read_bytes())
    assert result.targets == {"0": TARGET}
    assert len(result.candidates) == 4
    ranked = [c for c in result.candidates if c.reason is None]
    assert len(ranked) == 2
    assert ranked == sorted(ranked, key=lambda c: c.distance)
    assert max(c.predicted_distance for c in ranked) <= min(c.predicted_distance for c in result.candidates[2:])
    for candidate in ranked:
        assert candidate.structure != candidate.generated
        assert candidate.energy_per_atom < 0
        assert candidate.achieved["0"].provenance["source"] == "predictor"
        assert candidate.relaxation == "not converged in 2 steps"
    assert all("2 go on" in c.reason for c in result.candidates[2:])


# -- single jobs -------------------------------------------------------------------------------------------------------


def test_a_generation_is_made_again_from_its_document(tiny_weights: Path, tmp_path: Path) -> None:
    maker = small(tiny_weights).generate_maker
    first = GenerationDoc.model_validate(run(maker.make(TARGET, sites=[1]), tmp_path))
    assert first.targets == {"1": TARGET}
    assert [record["index"] for record in first.records] == [0, 1, 2, 3]
    again = GenerateMaker(**first.settings).make({int(i): target for i, target in first.targets.items()})
    second = GenerationDoc.model_validate(run(again, tmp_path))
    assert second.structures == first.structures
    assert second.records == first.records


def generation(*structures: Structure) -> GenerationDoc:
    records = [{"index": i} for i in range(len(structures))]
    return GenerationDoc(structures=list(structures), records=records, targets={"0": TARGET}, settings={})


def test_the_screen_names_a_reason_for_each_rejection(tmp_path: Path) -> None:
    close = COPPER.copy()
    close.translate_sites([0], [0.0, 0.45, 0.45])
    supercell = COPPER.get_primitive_structure()
    screened = ScreeningDoc.model_validate(run(ScreenMaker().make(generation(COPPER, close, supercell)), tmp_path))
    reasons = [candidate.reason for candidate in screened.candidates]
    assert reasons[0] is None
    assert "A apart, less than 0.5" in reasons[1]
    assert reasons[2] == "the same crystal as candidate 0"
    kept = run(ScreenMaker(drop_duplicates=False).make(generation(COPPER, supercell)), tmp_path)
    assert len(ScreeningDoc.model_validate(kept).survivors) == 2


def screened(records: list[dict[str, Any]], *structures: Structure, **targets: TargetDOS) -> list[str | None]:
    """What the screen says of structures with these records."""
    records = [{"index": i, **record} for i, record in enumerate(records)]
    made = GenerationDoc(structures=list(structures), records=records, targets=targets, settings={})
    return [candidate.reason for candidate in ScreenMaker().make.original(ScreenMaker(), made).candidates]


def test_twins_have_equivalent_sites_under_the_targets() -> None:
    alloy = bulk("NiAl", "cesiumchloride", a=2.88)
    pair = to_structure(alloy), to_structure(alloy[[1, 0]])
    assert screened([{}, {}], *pair, **{"0": TARGET}) == [None, None]
    assert screened([{}, {}], *pair, total=replace(TARGET, kind="total")) == [None, "the same crystal as candidate 0"]


@pytest.mark.parametrize("held", [{"fixed_cell": True, "fixed_sites": []}, {"fixed_cell": False, "fixed_sites": [1]}])
def test_what_is_held_is_no_twin_of_what_is_free(held: dict[str, Any]) -> None:
    salt = to_structure(bulk("MgO", "rocksalt", a=4.21))
    strained = salt.copy()
    strained.apply_strain([0.06, 0.06, -0.03])
    known: dict[str, Any] = {"search": {"material_id": "mp-1265"}}
    held = {**held, "template_sha256": "of the substrate"}
    other = {**held, "template_sha256": "of another"}
    reasons = screened([known, held, held, other, {}], salt, strained, strained, salt, strained, **{"0": TARGET})
    assert reasons == [None, None, "the same crystal as candidate 1", None, "the same crystal as candidate 0"]


def candidate_doc() -> CandidateDoc:
    return CandidateDoc(index=7, formula="Cu", generated=COPPER, record={"seed": 1})


def compare(dos: Any, relaxation: Any = None, **settings: Any) -> CandidateDoc:
    make = CompareDOSMaker(**settings).make.original  # the method itself, without the job around it
    relaxation = RelaxDoc(structure=COPPER, energy=-3.5, converged=True, steps=9) if relaxation is None else relaxation
    return make(CompareDOSMaker(**settings), {"0": TARGET}, candidate_doc(), relaxation, dos, engine="VASP")


def test_equal_dos_are_at_distance_zero_and_half_of_it_at_one_half() -> None:
    on_grid = TARGET.on_grid()
    same = compare(DOSDoc(engine="exact", site_dos=[on_grid], band_gap=0.0, directory="here"))
    assert (same.distance, same.mae, same.near_gap_distance) == (0.0, 0.0, 0.0)
    assert (same.reason, same.energy_per_atom, same.engine, same.directory) == (None, -3.5, "exact", "here")
    assert same.relaxation == "converged in 9 steps"
    half = DOSDoc(engine="half", site_dos=[replace(on_grid, values=on_grid.values / 2)])
    assert compare(half).distance == pytest.approx(0.5)
    assert compare(half, max_distance=0.4).reason == "distance 0.50, more than 0.4"
    assert compare(half, max_distance=0.6).reason is None


def test_energies_stay_where_nothing_is_relaxed_and_go_where_another_engine_relaxes() -> None:
    before = candidate_doc().model_copy(update={"energy_per_atom": -3.0, "energy_above_hull": 0.1})
    for relaxation, energies in (
        ({"structure": COPPER}, (-3.0, 0.1)),
        ({"structure": COPPER, "energy": -5.0}, (-5.0, None)),
    ):
        dos = DOSDoc(engine="exact", site_dos=[TARGET.on_grid()])
        done = CompareDOSMaker().make.original(CompareDOSMaker(), {"0": TARGET}, before, relaxation, dos)
        assert (done.energy_per_atom, done.energy_above_hull) == energies


def test_a_target_far_from_the_gap_has_no_near_gap_figure() -> None:
    deep = TargetDOS.from_peaks([(-6.0, 8.0, 0.5)], window=(-8.0, -4.0)).on_grid()
    make = CompareDOSMaker().make.original
    done = make(
        CompareDOSMaker(), {"0": deep}, candidate_doc(), RelaxDoc(structure=COPPER), DOSDoc(engine="x", site_dos=[deep])
    )
    assert (done.distance, done.near_gap_distance, done.reason) == (0.0, None, None)


def test_a_target_without_states_where_the_dos_is_known_is_told() -> None:
    grid = TARGET.on_grid()
    above = grid.energies > 0.5
    target = replace(grid, values=np.where(above, 0.0, grid.values))
    make = CompareDOSMaker().make.original
    dos = DOSDoc(engine="x", site_dos=[replace(target, known=above & target.known)])
    done = make(CompareDOSMaker(), {"0": target}, candidate_doc(), RelaxDoc(structure=COPPER), dos)
    assert done.reason == "not comparable: the target holds no states where both are known"
    assert (done.distance, done.mae) == (None, None)


def test_a_gap_is_compared_by_its_mean_error_beside_other_targets() -> None:
    grid = TARGET.on_grid()
    gap = TargetDOS(grid.energies, 0 * grid.values, (grid.energies > 0) & (grid.energies < 1), "fermi", 0.2)
    filled = replace(gap, values=np.full(grid.values.shape, 0.5))
    make = CompareDOSMaker().make.original
    two = Structure.from_spacegroup("Im-3m", Lattice.cubic(2.9), ["Cu"], [[0, 0, 0]])
    dos = DOSDoc(engine="x", site_dos=[grid, filled])
    done = make(CompareDOSMaker(), {"0": grid, "1": gap}, candidate_doc(), RelaxDoc(structure=two), dos)
    assert done.reason is None
    assert done.distance == pytest.approx(0.25)  # the mean of 0 and 0.5 states/eV


@pytest.mark.parametrize(
    ("dos", "relaxation", "reason"),
    [
        (None, None, "no DOS: see the log of its job"),
        (DOSDoc(engine="x", reason="SCF did not converge"), None, "no DOS: SCF did not converge"),
        (None, RelaxDoc(structure=None, reason="broke down"), "relaxation failed: broke down"),
        (None, {"structure": None, "energy": None}, "relaxation failed: see the log of its job"),
        (DOSDoc(engine="x", site_dos=[]), None, "not comparable: x gave no DOS for 0"),
        (DOSDoc(engine="x", site_dos=[TARGET.shift(30.0)]), None, "not comparable: no known energy"),
    ],
)
def test_what_is_missing_is_told(dos: Any, relaxation: Any, reason: str) -> None:
    done = compare(dos, relaxation)
    assert done.reason.startswith(reason)
    assert done.distance is None
    assert done.record == {"seed": 1}


@pytest.mark.parametrize("held", [{"fixed_cell": True}, {"fixed_sites": [1]}])
def test_a_maker_holds_parts_of_the_template_that_comes_with_the_call(tmp_path: Path, held: dict[str, Any]) -> None:
    host = bulk("MgO", "rocksalt", a=4.21)
    maker = GenerateMaker(n=1, seed=1, num_steps=2, **held)
    output = run(maker.make(None, template=to_structure(host)), tmp_path)
    made = to_atoms(Structure.from_dict(output["structures"][0]))
    if "fixed_cell" in held:
        np.testing.assert_allclose(made.cell.array, host.cell.array, atol=1e-8)
    else:
        assert made.numbers[1] == host.numbers[1]
    with pytest.raises(ValueError, match="needs a template"):
        run(maker.make(None), tmp_path)


def makers_of(record: dict[str, Any], relax_maker: Maker | None, dos_maker: Maker) -> list[Maker]:
    """The Makers that relax and compute a candidate of this record."""
    candidate = candidate_doc().model_copy(update={"record": record})
    screening = ScreeningDoc(candidates=[candidate], targets={"0": TARGET}, generation={})
    flow = evaluate_candidates.original(screening, relax_maker, dos_maker, CompareDOSMaker()).replace
    makers = [step.maker for step in flow.jobs[:-2] if step.maker is not None]
    return [replace(maker, name=maker.name.removesuffix(" 7")) for maker in makers]


def test_the_relaxation_of_a_design_holds_what_its_generation_is_to_keep(tiny_weights: Path) -> None:
    held = [[True] * 3, [True] * 3, [False, True, True], [False] * 3]
    template = COPPER.copy(site_properties={"selective_dynamics": held})
    whole, partly = to_atoms(template).constraints
    assert whole.index.tolist() == [3]
    assert (partly.index.tolist(), partly.mask.tolist()) == ([2], [True, False, False])
    assert not to_atoms(COPPER).constraints
    template.add_site_property("selective_dynamics", [[True] * 3] * 3 + [[False] * 3])
    maker = GenerateMaker(n=1, num_steps=1, weights=str(tiny_weights), seed=0)
    (record,) = maker.make.original(maker, TARGET, sites=[0], template=template).records
    relaxing, _ = makers_of(record, RelaxMaker(fixed_sites=[0], fmax=0.1), DOSMaker())
    assert relaxing == RelaxMaker(fixed_cell=True, fixed_sites=[0, 3], fmax=0.1)
    blurred = to_atoms(COPPER)
    blurred.rattle(0.05, seed=1)
    start = to_structure(blurred)
    done = RelaxMaker(fixed_cell=True, fixed_sites=[2], max_steps=2).make.original(
        RelaxMaker(fixed_cell=True, fixed_sites=[2], max_steps=2), start
    )
    assert np.allclose(done.structure.lattice.matrix, start.lattice.matrix)
    moved = np.abs(done.structure.cart_coords - start.cart_coords).max(axis=1)
    assert moved[2] < 1e-9
    assert moved.max() > 1e-3


@pytest.mark.parametrize(
    ("record", "relaxing", "held"),
    [
        ({"fixed_cell": True, "fixed_sites": []}, RelaxMaker(), True),
        ({"fixed_cell": False, "fixed_sites": [1]}, RelaxMaker(), True),
        ({"fixed_cell": True, "fixed_sites": []}, None, True),
        ({"fixed_cell": False, "fixed_sites": []}, RelaxMaker(fixed_cell=True), True),
        ({"fixed_cell": False, "fixed_sites": []}, RelaxMaker(), False),
        ({"search": {}}, RelaxMaker(), False),
    ],
)
def test_dft_leaves_what_is_held_where_it_is(record: dict[str, Any], relaxing: Maker | None, held: bool) -> None:
    given = DOSMaker(settings={"ecutwfc": 30.0})
    assert makers_of(record, relaxing, given)[-1] == replace(given, symmetry_tolerance=0.0 if held else 0.1)
    assert makers_of(record, FailingMaker(), PredictDOSMaker()) == [FailingMaker(), PredictDOSMaker()]  # as given


@pytest.mark.parametrize(
    ("relaxing", "engine", "tolerance"),
    [
        (RelaxMaker(fixed_cell=True), "forward model", 0.0),
        (RelaxMaker(fixed_sites=[1]), "forward model", 0.0),
        (RelaxMaker(), "forward model", 0.1),
        (RelaxMaker(), "Quantum ESPRESSO", 0.0),
    ],
)
def test_what_was_held_or_computed_by_dft_is_validated_as_it_is(
    relaxing: RelaxMaker, engine: str, tolerance: float
) -> None:
    record = {"fixed_cell": False, "fixed_sites": []}
    first = CandidateDoc(index=0, formula="Cu", generated=COPPER, record=record)
    screening = ScreeningDoc(candidates=[first], targets={"0": TARGET}, generation={})
    flow = evaluate_candidates.original(screening, relaxing, PredictDOSMaker(), CompareDOSMaker()).replace
    computed = {"structure": COPPER, "distance": 0.1, "engine": engine}
    done = flow.jobs[-2].function_args[1].model_copy(update=computed)
    assert done.record == record, "regenerate reads it"
    result = InverseDesignDoc(targets={"0": TARGET}, candidates=[done], generation={})
    again = validate_candidates(InverseDesignDoc.model_validate_json(result.model_dump_json()), DOSMaker())
    steps = evaluate_candidates.original(*again.function_args, **again.function_kwargs).replace.jobs
    assert steps[0].maker.symmetry_tolerance == tolerance


def test_a_relaxation_that_cannot_be_told_what_is_held_is_warned_of() -> None:
    def made(relax_maker: Maker | None, template: Structure = COPPER, **settings: Any) -> None:
        maker = InverseDesignMaker(generate_maker=GenerateMaker(**settings), relax_maker=relax_maker)
        maker.make(TARGET, template=template)

    pinned = COPPER.copy(site_properties={"selective_dynamics": [[True] * 3] * 3 + [[False] * 3]})
    with pytest.warns(UserWarning, match="relax_maker DOSLookalike is not told which cell and sites the generation"):
        made(DOSLookalike(), fixed_cell=True)
    with pytest.warns(UserWarning, match="hold them by its own options, or take RelaxMaker"):
        made(DOSLookalike(), template=pinned)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(DOSLookalike())
        made(RelaxMaker(), fixed_cell=True)
        made(None, fixed_sites=[1])


def complete_dos(structure: Structure, marked: int) -> CompleteDos:
    """A peak on one site, a flat DOS on the others."""
    energies = MODEL_GRID.energies
    peak, flat = np.exp(-((energies + 1) ** 2) / 0.5) * 4, np.full(energies.size, 0.05)
    rows = [peak if i == marked else flat for i in range(len(structure))]
    sites = {site: {Orbital.s: {Spin.up: row}} for site, row in zip(structure, rows, strict=True)}
    return CompleteDos(structure, Dos(0.0, energies, {Spin.up: np.sum(rows, axis=0)}), sites)


def test_a_site_is_found_again_in_a_structure_sorted_by_the_engine() -> None:
    ours = Structure(
        Lattice.cubic(4), ["Au", "Cu", "Au", "Cu"], [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    )
    sorted_by_engine = Structure.from_sites([ours[i] for i in (3, 1, 2, 0)])
    dos = complete_dos(sorted_by_engine, marked=3)  # our site 0
    done = compare(dos, RelaxDoc(structure=ours))
    assert done.reason is None
    assert done.engine == "VASP"
    assert done.achieved["0"].values.max() > 3
    assert compare(dos.as_dict(), RelaxDoc(structure=ours)).distance == pytest.approx(done.distance)
    elsewhere = ours.copy()
    elsewhere.replace(0, "Ni")
    assert "site 0 (Ni) is not in the structure" in compare(dos, RelaxDoc(structure=elsewhere)).reason


def test_labels_are_made_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_labels import stand_in_engine

    from dosmatgen_ase.data import load_site_dos
    from dosmatgen_ase.dft import batch
    from dosmatgen_ase.dft.programs import Programs

    monkeypatch.setattr(batch, "compute_in", None)  # put back afterwards
    monkeypatch.setattr(Programs, "find", lambda *_: None)
    (tmp_path / "upf").mkdir()
    for symbol in ("Cu", "Ni", "Au"):
        (tmp_path / "upf" / f"{symbol}.upf").touch()
    stand_in_engine(tmp_path / "log")
    gold = Structure(Lattice.cubic(3), ["Au"], [[0, 0, 0]])
    given = {"a": COPPER, "gold": gold, "b": to_structure(bulk("Ni"))}
    maker = LabelMaker(settings={"pseudo_dir": str(tmp_path / "upf")}, batch_size=2)
    flow = decoded(encoded(maker.make(given, tmp_path / "shards", split={"b": "val"})))
    output = run(flow, tmp_path)
    assert (output["labels"], len(output["shards"])) == (2, 2)
    assert output["failed"] == {"gold": "the SCF calculation did not converge"}
    labels = load_site_dos(tmp_path / "shards")
    assert dict(zip(labels.material_id.tolist(), labels.split.tolist(), strict=True)) == {"a": "train", "b": "val"}
    assert to_structure(labels.atoms(labels.material_id.tolist().index("a"))).matches(COPPER)
    assert {path.suffix for path in (tmp_path / "shards").iterdir()} == {".npz"}
    again = run(maker.make(given, tmp_path / "shards"), tmp_path)
    assert (again["labels"], again["done_before"]) == (0, 3)
    assert sorted((tmp_path / "log").read_text().split()) == ["a", "b", "gold"]
    with pytest.raises(ValueError, match="at least one"):
        LabelMaker().make({}, tmp_path)


def test_every_batch_knows_the_split_of_a_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dosmatgen_ase import data
    from dosmatgen_ase.dft import labels

    seen: dict[str, Any] = {}

    def label(given: Any, *_: Any, unpacked: Path, **rest: Any) -> labels.LabelReport:
        unpacked.mkdir(parents=True)
        seen["".join(given)] = rest
        return labels.LabelReport([], 0, {}, {}, 0)

    monkeypatch.setattr(labels, "label", label)
    monkeypatch.setattr(data, "load_structures", lambda path: path)
    given = {"a": COPPER, "b": to_structure(bulk("Ni")), "c": COPPER.get_primitive_structure()}
    maker = LabelMaker(batch_size=1)
    run(maker.make(given, tmp_path / "site_dos", split={"c": "test"}), tmp_path)
    assert {name: rest["split"] for name, rest in seen.items()} == {"a": {"a": "test"}, "b": {}, "c": {"c": "test"}}
    assert [rest["table"] for rest in seen.values()] == [None] * 3
    (tmp_path / "structures.parquet").touch()
    run(maker.make(given, tmp_path / "site_dos"), tmp_path)
    assert [rest["table"] for rest in seen.values()] == [tmp_path / "structures.parquet"] * 3, "as in dosmatgen label"
    with pytest.raises(ValueError, match=r"c cannot be in the split 'val': .* are in 'test'"):
        maker.make(given, tmp_path, split={"a": "test", "c": "val"})


def test_a_target_for_the_cell_is_compared_with_the_total() -> None:
    total = replace(TARGET.on_grid(), kind="total")
    relaxed = RelaxDoc(structure=COPPER)
    arguments = ({"total": total}, candidate_doc(), relaxed)
    make = CompareDOSMaker().make.original
    same = make(CompareDOSMaker(), *arguments, DOSDoc(engine="exact", total_dos=total))
    assert same.distance == 0.0
    assert same.achieved == {"total": total}
    vasp = make(CompareDOSMaker(), *arguments, complete_dos(COPPER, 0))
    assert vasp.achieved["total"].kind == "total"
    assert vasp.distance > 0
    assert targets_by_site(total) == {"total": total}


def test_a_target_of_the_cell_stands_at_one_zero_for_all_candidates() -> None:
    bands = [(-3.0, 6.0, 0.2), (2.0, 6.0, 0.2)]
    target = TargetDOS.from_peaks(bands, window=(-8, 6), kind="total", reference="fermi")
    metal = TargetDOS.from_peaks([(-1.0, 8.0, 0.8)], window=(-8, 6), kind="total", reference="fermi")
    make = CompareDOSMaker().make.original
    for made in (metal, target.aligned(), target.shift(1.0)):
        distances = [
            make(
                CompareDOSMaker(), {"total": wanted}, candidate_doc(), RelaxDoc(structure=COPPER),
                DOSDoc(engine="x", total_dos=made),
            ).distance
            for wanted in (target, target.aligned())
        ]  # fmt: skip
        assert distances[0] == distances[1]
        assert (distances[0] < 0.1) == (made is not metal)


def test_a_training_job_finds_its_folders_wherever_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    maker = TrainMaker(data="mine", out="runs/a")
    monkeypatch.chdir("/")
    copy = decoded(encoded(maker))
    assert (copy.data, copy.out) == (str(tmp_path / "mine"), str(tmp_path / "runs" / "a"))


def test_files_that_a_job_needs_are_found_wherever_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator, search, training = GenerateMaker(weights="w"), SearchMaker(index="i"), TrainMaker().make("predicted.npz")
    monkeypatch.chdir("/")
    assert (decoded(encoded(generator)).weights, GenerateMaker().weights) == (str(tmp_path / "w"), "default")
    assert (decoded(encoded(search)).index, SearchMaker().index) == (str(tmp_path / "i"), None)
    assert decoded(encoded(training)).function_args == [str(tmp_path / "predicted.npz")]
    assert training.name == "train"


def test_training_is_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_training import CONFIG, bulk_dataset

    from dosmatgen_ase import data
    from dosmatgen_ase.train.trainer import TrainingConfig

    dataset = bulk_dataset()
    monkeypatch.setattr(data, "load_structures", lambda path, split: (path, split))
    monkeypatch.setattr(data, "load_site_dos", lambda path: path)
    monkeypatch.setattr(data.CrystalDataset, "join", lambda *parts: dataset)
    monkeypatch.setattr(TrainingConfig, "from_dict", lambda values: replace(CONFIG, **values))
    output = run(TrainMaker(config={"steps": 2}, data="somewhere", out=str(tmp_path / "run")).make(), tmp_path)
    assert output["structures"] == 10
    assert output["labelled"] == 4
    generated = GenerateMaker(n=1, num_atoms=2, num_steps=2, weights=output["weights"]).make(None)
    assert run(generated, tmp_path)["records"][0]["weights"] == output["sha256"]


# -- failures ----------------------------------------------------------------------------------------------------------


@dataclass
class FailingMaker(Maker):
    """Relaxes, or computes, in a job of another library that raises for cells of two atoms."""

    name: str = "failing"
    vasp_objects: bool = False

    @job
    def make(self, structure: Structure) -> Any:
        if len(structure) == 2:
            raise RuntimeError("something that nobody foresaw")
        if self.vasp_objects:
            return {"vasp_objects": {"dos": complete_dos(structure, 0)}}
        return {"structure": structure, "output": {"energy_per_atom": -1.0}}


@pytest.mark.parametrize("step", ["relax_maker", "dos_maker"])
def test_a_failed_job_costs_its_candidate_alone(step: str, tiny_weights: Path, tmp_path: Path) -> None:
    maker = FailingMaker(vasp_objects=step == "dos_maker")
    flow = small(tiny_weights, **{"relax_maker": None, step: maker}).make(TARGET)
    result = InverseDesignDoc.model_validate(run(flow, tmp_path, ensure_success=False))
    failed = [c for c in result.candidates if len(c.generated) == 2]
    good = [c for c in result.candidates if len(c.generated) == 3]
    assert len(failed) == len(good) == 2
    assert result.candidates == good + failed
    assert all("see the log of its job" in c.reason for c in failed)
    assert all(c.reason is None and c.distance is not None for c in good)
    with pytest.raises(RuntimeError, match="nobody foresaw"):
        run(small(tiny_weights, **{"relax_maker": None, step: maker}).make(TARGET), tmp_path)


@dataclass
class SortingMaker(Maker):
    """Relaxes as VASP by atomate2 does: sites come back sorted by element."""

    name: str = "sorting"
    twice: bool = False

    @job
    def make(self, structure: Structure) -> Any:
        relaxed = structure.get_sorted_structure()
        return {"structure": relaxed * [1 + self.twice, 1, 1], "output": {"energy_per_atom": -1.0}}


def test_a_site_is_the_same_site_after_the_relaxation_by_another_package(tmp_path: Path) -> None:
    mixed = Structure(Lattice.cubic(4), ["Au", "Cu", "Au"], [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5]])
    assert mixed.get_sorted_structure()[0].specie.symbol == "Cu"
    candidate = CandidateDoc(index=0, formula="Au2Cu", generated=mixed, record={})
    screening = ScreeningDoc(candidates=[candidate], targets={"2": TARGET}, generation={})
    done = []
    for twice in (False, True):
        job = evaluate_candidates(screening, SortingMaker(twice=twice), PredictDOSMaker(), CompareDOSMaker())
        done += InverseDesignDoc.model_validate(run(job, tmp_path)).candidates
    assert done[0].structure == mixed
    assert [site.specie.symbol for site in done[0].structure] == ["Au", "Cu", "Au"]
    assert done[0].energy_per_atom == -1.0
    assert done[0].achieved["2"] == predict_dos(to_atoms(mixed))[2]
    assert "the relaxation returned Cu2 Au4 for Cu1 Au2: which site is which is not known" in done[1].reason


def test_a_run_without_survivors_still_has_a_result(tiny_weights: Path, tmp_path: Path) -> None:
    flow = small(tiny_weights, screen_maker=ScreenMaker(max_volume_per_atom=2.5)).make(TARGET)
    result = InverseDesignDoc.model_validate(run(flow, tmp_path))
    assert len(result.candidates) == 4
    assert all("A^3 per atom, more than 2.5" in c.reason for c in result.candidates)


def test_structures_made_before_a_hopeless_one_are_kept(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dosmatgen_ase.generate.generator import DOSGenerator

    original = DOSGenerator.generate_iter

    def two_then_none(self: Any, *arguments: Any, **settings: Any) -> Any:
        made = original(self, *arguments, **settings)
        yield next(made)
        yield next(made)
        raise RuntimeError("structure 2 was rejected 5 times")

    monkeypatch.setattr(DOSGenerator, "generate_iter", two_then_none)
    output = GenerationDoc.model_validate(run(small(tiny_weights).generate_maker.make(TARGET), tmp_path))
    assert len(output.structures) == 2
    assert output.reason == "2 of 4: structure 2 was rejected 5 times"


def test_a_missing_program_fails_the_job_and_a_failed_calculation_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"pw.x is not on the PATH"):
        run(DOSMaker().make(COPPER), tmp_path)
    from dosmatgen_ase.dft import errors, espresso

    def diverges(*arguments: Any, directory: str) -> None:
        raise errors.ElectronicStructureError("the SCF calculation did not converge", Path(directory) / "scf.out")

    monkeypatch.setattr(espresso, "compute_dos", diverges)
    output = DOSDoc.model_validate(run(DOSMaker().make(COPPER), tmp_path))
    assert "did not converge" in output.reason
    assert Path(output.directory).is_dir()
    assert DOSDoc.model_validate(run(DOSMaker().make(None), tmp_path)).reason.startswith("there is no structure")

    def interrupted(*arguments: Any, directory: str) -> None:
        raise errors.InterruptedCalculation("stopped by signal 15")

    monkeypatch.setattr(espresso, "compute_dos", interrupted)
    with pytest.raises(errors.InterruptedCalculation, match="signal 15"):
        run(DOSMaker().make(COPPER), tmp_path)


def test_dft_sees_the_symmetry_that_a_relaxation_blurred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_electronic import some_result

    from dosmatgen_ase.dft import errors, espresso

    seen = []

    def look(atoms: Any, *arguments: Any, directory: str) -> None:
        seen.append(to_structure(atoms))
        raise errors.ElectronicStructureError("seen")

    monkeypatch.setattr(espresso, "compute_dos", look)
    blurred = to_atoms(COPPER)
    blurred.rattle(0.01, seed=1)
    for tolerance in (0.1, 0.0):
        run(DOSMaker(symmetry_tolerance=tolerance).make(to_structure(blurred)), tmp_path)
    groups = [structure.get_space_group_info(symprec=1e-4)[1] for structure in seen]
    assert groups == [225, 1]
    monkeypatch.setattr(espresso, "compute_dos", lambda *_, **__: some_result())
    computed = DOSDoc.model_validate(run(DOSMaker().make(to_structure(blurred)), tmp_path))
    assert computed.structure == seen[0]
    kept = compare(computed, RelaxDoc(structure=to_structure(blurred)))
    assert kept.reason is None
    assert kept.structure == seen[0], "the next engine goes on with the crystal of this DOS"
    as_it_is = DOSDoc.model_validate(run(DOSMaker(symmetry_tolerance=0.0).make(to_structure(blurred)), tmp_path))
    assert as_it_is.structure is None
    overlapping = Structure(COPPER.lattice, ["Cu", "Cu"], [[0, 0, 0], [0.01, 0, 0]])
    assert "atoms are closer" in DOSDoc.model_validate(run(DOSMaker().make(overlapping), tmp_path)).reason
    assert len(seen) == 2


def test_a_disk_that_fills_up_gives_one_line_and_what_was_finished_stays(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dosmatgen_ase import files
    from dosmatgen_ase.flows.database import file_job_store

    arrays = tmp_path / "outputs_data.json"  # the last that a job writes

    def fill(descriptor: int) -> None:
        if arrays.exists() and '"energies"' in arrays.read_text():  # the generation fitted
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fill)
    flow = small(tiny_weights, relax_maker=None).make(TARGET)
    with pytest.raises(OSError, match=r"^cannot write .*: No space left on device; choose a folder that .* has space$"):
        run_locally(flow, store=file_job_store(tmp_path), root_dir=tmp_path, raise_immediately=True, log=False)
    again = file_job_store(tmp_path)
    monkeypatch.undo()
    again.connect()
    kept = GenerationDoc.model_validate(again.get_output(flow.jobs[0].output.uuid, load=True))
    assert len(kept.structures) == 4
    assert kept.targets == {"0": TARGET}
    assert not list(tmp_path.glob(".*.part"))


def put(folder: Path, name: str, value: Any) -> None:
    from dosmatgen_ase.flows.database import file_job_store

    store = file_job_store(folder)
    store.connect()
    store.update([{"uuid": name, "index": 1, "output": {"values": [value]}}], key=["uuid", "index"])
    store.close()


def test_what_json_does_not_know_costs_no_document(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", float("inf")), ("c", float("nan")), ("d", 2.0)):
        put(tmp_path, name, value)
    kept = json.loads((tmp_path / "outputs.json").read_text())
    assert {d["uuid"]: d["output"]["values"] for d in kept} == {"a": [1.0], "b": [None], "c": [None], "d": [2.0]}


def test_a_database_that_cannot_be_read_is_not_taken_for_empty(tmp_path: Path) -> None:
    put(tmp_path, "a", 1.0)
    torn = (tmp_path / "outputs.json").read_text()[:-5]
    (tmp_path / "outputs.json").write_text(torn)
    with pytest.raises(ValueError, match=r"^\S+outputs.json cannot be read: .*: mend it .NaN must be null., or move"):
        put(tmp_path, "b", 2.0)
    assert (tmp_path / "outputs.json").read_text() == torn


# -- engines -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mace_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MACE potential for nickel, copper and gold with random weights."""
    pytest.importorskip("mace")
    pytest.importorskip("atomate2")
    import torch

    from dosmatgen_ase.judge.relaxation import _mace_environment

    with _mace_environment(), torch.random.fork_rng():
        from e3nn import o3
        from mace import modules

        torch.manual_seed(0)
        model = modules.ScaleShiftMACE(
            r_max=4.0, num_bessel=4, num_polynomial_cutoff=5, max_ell=1, num_interactions=2, num_elements=3,
            interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
            interaction_cls_first=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
            hidden_irreps=o3.Irreps("4x0e"), MLP_irreps=o3.Irreps("4x0e"), gate=torch.nn.functional.silu,
            atomic_energies=np.array([-3.0, -3.5, -3.2]), avg_num_neighbors=12.0, atomic_numbers=[28, 29, 79],
            correlation=2, atomic_inter_scale=1.0, atomic_inter_shift=0.0,
        )  # fmt: skip
        path = tmp_path_factory.mktemp("mace") / "tiny.model"
        torch.save(model.double(), path)
    return path


@pytest.mark.filterwarnings("ignore:`task_document_kwargs` is now deprecated:DeprecationWarning:atomate2")
def test_atomate2_relaxes_with_a_mace_file_inside_the_flow(
    mace_model: Path, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atomate2.forcefields.jobs import ForceFieldRelaxMaker

    # What importing mace sets for the process, and atomate2 counts on; `relax` takes it back after its own import.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

    relaxer = ForceFieldRelaxMaker(
        force_field_name="MACE-MP-0",
        steps=3,
        relax_kwargs={"fmax": 1e-4},
        calculator_kwargs={"model": str(mace_model), "default_dtype": "float64"},
    )
    flow = small(tiny_weights, relax_maker=relaxer, screen_maker=ScreenMaker(keep=1)).make(TARGET)
    result = InverseDesignDoc.model_validate(run(flow, tmp_path))
    best = result.candidates[0]
    assert best.reason is None
    assert best.structure != best.generated
    assert -5.0 < best.energy_per_atom < -1.0


def test_a_vasp_flow_of_atomate2_is_compared_by_the_dos_of_its_last_step() -> None:
    pytest.importorskip("atomate2")
    from atomate2.vasp.flows.core import UniformBandStructureMaker

    screening = ScreeningDoc(candidates=[candidate_doc()], targets={"0": TARGET}, generation={})
    response = evaluate_candidates.original(screening, None, UniformBandStructureMaker(), CompareDOSMaker())
    vasp, compared, ranking = decoded(encoded(response.replace)).jobs
    static, uniform = vasp.jobs
    assert static.function_args[0] == COPPER
    dos = compared.function_args[3]
    assert dos.uuid == uniform.uuid
    assert [value for _, value in dos.attributes] == ["vasp_objects", "dos"]
    assert {j.config.on_missing_references for j in (static, uniform, compared, ranking)} == {OnMissing.NONE}


# What VASP must be asked, by hand: projections on sites, tetrahedra, and the charge density of the static step.
VASP_INPUTS = {
    "static": "LORBIT = 11\nISMEAR = -5\nNSW = 0\nLCHARG = True\nGGA = Pe\n",
    "non-scf uniform": "LORBIT = 11\nISMEAR = -5\nNSW = 0\nICHARG = 11\nGGA = Pe\n",
}
OUTCAR = "number of bands    NBANDS=     12\n   total plane-waves  NPLWV =   5832\n   IBRION =     -1\n"


@pytest.mark.filterwarnings("ignore::UserWarning")  # pymatgen's remarks on incomplete test files
def test_vasp_by_way_of_atomate2_ranks_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("atomate2")
    from atomate2.utils.testing.vasp import monkeypatch_vasp
    from atomate2.vasp.flows.core import UniformBandStructureMaker
    from atomate2.vasp.powerups import update_user_incar_settings
    from pymatgen.io.vasp import Kpoints, Poscar, Vasprun
    from test_dos import vasprun_with_projections

    vasprun = tmp_path / "vasprun.xml"
    vasprun_with_projections(vasprun)
    reference_run = Vasprun(vasprun, parse_potcar_file=False)
    salt = reference_run.final_structure
    target = TargetDOS.from_pymatgen(reference_run.complete_dos, 1)
    for name, incar in VASP_INPUTS.items():
        asked, given = tmp_path / "reference" / name / "inputs", tmp_path / "reference" / name / "outputs"
        asked.mkdir(parents=True)
        given.mkdir()
        (asked / "INCAR").write_text(incar)
        Poscar(salt).write_file(asked / "POSCAR")
        if name != "static":
            Kpoints.automatic_density_by_vol(salt, 1000, force_gamma=True).write_file(str(asked / "KPOINTS"))
        shutil.copy(vasprun, given)
        Poscar(salt).write_file(given / "CONTCAR")
        (given / "INCAR").write_text(incar)
        (given / "OUTCAR").write_text(OUTCAR)
        (given / "CHGCAR").touch()  # the second step starts from it
    reference = {f"{name} {i}": name for name in VASP_INPUTS for i in (0, 1)}
    checks = {
        job: {"incar_settings": [line.split()[0] for line in VASP_INPUTS[name].splitlines()],
              "check_inputs": ["incar", "poscar"] + ["kpoints"] * (name != "static")}
        for job, name in reference.items()
    }  # fmt: skip
    monkeypatch.setattr(GenerateMaker, "make", lambda *_, **__: made([salt, salt], {"1": target}))
    maker = InverseDesignMaker(
        screen_maker=ScreenMaker(drop_duplicates=False),
        relax_maker=None,
        dos_maker=update_user_incar_settings(UniformBandStructureMaker(), {"GGA": "PE"}),
    )
    for mock in monkeypatch_vasp(monkeypatch, tmp_path / "reference", nelect=8):
        mock(reference, checks)
        result = InverseDesignDoc.model_validate(run(maker.make(target, sites=[1]), tmp_path))
    assert [c.reason for c in result.candidates] == [None, None]
    for candidate in result.candidates:
        assert candidate.engine == "uniform band structure"
        assert candidate.distance == pytest.approx(0.0, abs=1e-6)
        assert candidate.achieved["1"].total_states(-10.0, 1.0) == pytest.approx(4.5, abs=0.1)


@job
def made(structures: list[Structure], targets: dict[str, TargetDOS]) -> GenerationDoc:
    """A generation that is known beforehand."""
    records = [{"index": i} for i in range(len(structures))]
    return GenerationDoc(structures=structures, records=records, targets=targets, settings={})


@pytest.mark.dft
def test_quantum_espresso_in_the_flow(tmp_path: Path) -> None:
    settings = {"ecutwfc": 30.0, "dos_kpoint_density": 1.5}
    output = DOSDoc.model_validate(run(DOSMaker(settings=settings).make(to_structure(bulk("Al"))), tmp_path))
    assert output.reason is None
    assert output.total_dos.total_states(hi=0.0) == pytest.approx(3.0, abs=0.15)
    assert (Path(output.directory) / "scf.out").exists()
    assert not list(Path(output.directory).rglob("wfc*.dat"))


def readme_blocks() -> list[str]:
    text = (ROOT / "workflows" / "README.md").read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_python_of_the_workflows_readme_runs() -> None:
    pytest.importorskip("atomate2")
    blocks = readme_blocks()
    local = [block for block in blocks if "jobflow_remote" not in block]
    assert len(local) == len(blocks) - 1 > 0
    for block in local:
        namespace: dict[str, Any] = {}
        exec(block, namespace)
        assert encoded(decoded(encoded(namespace["maker"]))) == encoded(namespace["maker"])


def test_the_configuration_of_jobflow_remote_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    jobflow_remote = pytest.importorskip("jobflow_remote", reason='needs the extra "remote"')
    from jobflow_remote.config.base import Project
    from monty.serialization import loadfn

    project = Project.model_validate(loadfn(ROOT / "workflows" / "jobflow_remote.yaml"))
    assert set(project.get_jobstore().additional_stores) == {"data"}
    worker = project.workers["cluster"]
    assert worker.get_host().host == "LOGIN.EXAMPLE.ORG"
    batch = worker.get_scheduler_io().get_submission_script(["jf"], worker.resources)
    assert {"#SBATCH --ntasks=8", "#SBATCH --time=04:00:00"} <= set(batch.splitlines())
    submitted: dict[str, Any] = {}
    monkeypatch.setattr(jobflow_remote, "submit_flow", lambda flow, **where: submitted.update(where, flow=flow))
    monkeypatch.chdir(ROOT)
    exec(next(block for block in readme_blocks() if "submit_flow" in block), {})
    assert (submitted["worker"], submitted["project"]) == ("cluster", project.name)
    assert len(submitted["flow"].jobs) == 3


def script(name: str, *options: str) -> str:
    """Run a workflow script in a process of its own."""
    command = [sys.executable, str(ROOT / "workflows" / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_local_script_leaves_a_result_and_a_report(tiny_weights: Path, tmp_path: Path) -> None:
    options = ["--demo", "--predict", "--weights", os.path.relpath(tiny_weights), *SMALL, "--out", str(tmp_path)]
    assert "report.html" in script("inverse_design_local.py", *options)
    assert (tmp_path / "report.html").exists()
    result = InverseDesignDoc.model_validate_json((tmp_path / "result.json").read_bytes())
    assert [c.reason is None for c in result.candidates] == [True, False, False]


def test_the_local_script_relaxes_with_a_mace_file(mace_model: Path, tiny_weights: Path, tmp_path: Path) -> None:
    model = [
        "--trust-model",
        "--calculator",
        os.path.relpath(mace_model),
    ]  # as seen from here, not from the folder of a job
    options = ["--demo", "--predict", "--weights", str(tiny_weights), *SMALL, *model, "--out", str(tmp_path)]
    script("inverse_design_local.py", *options)
    result = InverseDesignDoc.model_validate_json((tmp_path / "result.json").read_bytes())
    assert sum(c.relaxation is not None for c in result.candidates) == 1


def test_a_script_reports_what_failed_and_without_a_result_says_so(tiny_weights: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "workflows" / "inverse_design_local.py"), "--demo", *SMALL]
    options = [*command, "--out", str(tmp_path), "--weights"]
    without_programs = {**ENVIRONMENT, "PATH": str(tmp_path)}
    done = subprocess.run([*options, str(tiny_weights)], capture_output=True, text=True, env=without_programs)
    assert done.returncode == 0, done.stderr
    result = InverseDesignDoc.model_validate_json((tmp_path / "result.json").read_bytes())
    assert "no DOS: see the log of its job" in [candidate.reason for candidate in result.candidates]
    assert (tmp_path / "report.html").exists()
    hopeless = subprocess.run([*options, str(tmp_path / "none")], capture_output=True, text=True, env=ENVIRONMENT)
    assert hopeless.returncode == 1
    assert hopeless.stderr.splitlines()[-1] == "there is no result: the log above tells which job failed"


def test_the_vasp_script_reports_what_failed(tmp_path: Path) -> None:
    pytest.importorskip("atomate2")
    known = candidate_doc().model_copy(update={"structure": COPPER, "distance": 0.3, "engine": "another"})
    result = InverseDesignDoc(targets={"0": TARGET}, candidates=[known], generation={})
    (tmp_path / "result.json").write_text(result.model_dump_json())
    said = script("validate_with_vasp.py", str(tmp_path / "result.json"), "--out", str(tmp_path / "vasp"))
    assert "another 0.300, VASP None no DOS: see the log of its job" in said  # there is no VASP here
    assert (tmp_path / "vasp" / "report.html").exists()


def test_vasp_is_asked_for_pbe_without_u_as_the_labels_are() -> None:
    pytest.importorskip("atomate2")
    from atomate2.vasp.flows.core import UniformBandStructureMaker
    from atomate2.vasp.powerups import update_user_incar_settings

    oxide = Structure(np.eye(3) * 4.17, ["Ni", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    texts = [(ROOT / "workflows" / name).read_text() for name in ("validate_with_vasp.py", "README.md")]
    for text in texts:
        (asked,) = re.findall(r"update_user_incar_settings\(UniformBandStructureMaker\(\), (\{.*?\})\)", text)
        maker = update_user_incar_settings(UniformBandStructureMaker(), ast.literal_eval(asked))
        incar = maker.static_maker.input_set_generator.get_input_set(oxide, potcar_spec=True)["INCAR"]
        assert (incar["GGA"], incar["LDAU"]) == ("Pe", False)
        assert not incar.get("LDAUU")


def test_the_vasp_script_writes_inputs(tmp_path: Path) -> None:
    pytest.importorskip("atomate2")
    script("validate_with_vasp.py", "--demo", "--out", str(tmp_path))
    assert "LORBIT = 11" in (tmp_path / "INCAR").read_text()  # projections on sites
    assert "GGA = Pe" in (tmp_path / "INCAR").read_text()
    assert Structure.from_file(tmp_path / "POSCAR").composition.reduced_formula == "NiAu3"


def test_the_label_script_names_structures_by_their_files(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        bulk("Cu").write(tmp_path / folder / "my cu (1).cif")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name in ("pw.x", "projwfc.x"):
        (binaries / name).write_text("#!/bin/sh\necho Program PWSCF\nexit 3\n")
        (binaries / name).chmod(0o755)
    (tmp_path / "Cu.upf").touch()
    environment = {**ENVIRONMENT, "PATH": f"{binaries}:{os.environ['PATH']}", "ESPRESSO_PSEUDO": str(tmp_path)}
    command = [sys.executable, str(ROOT / "workflows" / "label_structures.py"), "--out", str(tmp_path / "labels")]
    files = [str(tmp_path / folder / "my cu (1).cif") for folder in ("a", "b")]
    done = subprocess.run([*command, files[0]], capture_output=True, text=True, env=environment)
    assert '"my_cu_1_": "pw.x (scf) failed: exit code 3"' in done.stdout, done.stderr
    twice = subprocess.run([*command, *files], capture_output=True, text=True, env=environment)
    assert twice.returncode == 2
    assert "error: two structures would be named my_cu_1_: rename" in twice.stderr


@pytest.mark.dft
def test_the_label_script_makes_labels(tmp_path: Path) -> None:
    from dosmatgen_ase.data import load_site_dos

    assert '"labels": 2' in script("label_structures.py", "--demo", "--out", str(tmp_path))
    labels = load_site_dos(tmp_path)
    assert labels.material_id.tolist() == ["Al", "Si"]
    assert labels.band_gap[0] == 0 < labels.band_gap[1] < 1


@pytest.mark.dft
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("abinit") is None, reason="needs abinit: apt-get install abinit")
def test_abinit_by_way_of_atomate2_agrees_with_quantum_espresso(tmp_path: Path) -> None:
    for package in ("abipy", "gpaw_data"):
        pytest.importorskip(package, reason='needs the extra "abinit"')
    assert "Al itself 0.000, abinit 0.0" in script("validate_with_abinit.py", "--demo", "--out", str(tmp_path))
    (done,) = InverseDesignDoc.model_validate_json((tmp_path / "result.json").read_bytes()).candidates
    assert done.engine == "abinit"
    assert done.reason is None
    assert 0 < done.distance < 0.1  # two codes, two kinds of pseudopotentials
    assert done.achieved["0"].total_states(hi=0.0) == pytest.approx(3.0, abs=0.05)


@dataclass
class AbinitMaker(Maker):
    """Like atomate2's flow of abinit: files in a folder, and no output of the flow."""

    name: str = "abinit"
    folder: str = ""

    def make(self, structure: Structure) -> Flow:
        return Flow([task_document("myhost:" + self.folder if self.folder else None)])


@job
def task_document(dir_name: str | None) -> dict[str, str]:
    if dir_name is None:
        raise RuntimeError("abinit did not end well")
    return {"dir_name": dir_name}


def test_files_of_abinit_are_read_and_what_is_wrong_with_them_is_told(tmp_path: Path) -> None:
    from test_electronic import abinit_file

    energies = np.linspace(-0.3, 0.6, 901)
    level = np.exp(-0.5 * ((energies - 0.06) / 0.01) ** 2) / (np.sqrt(2 * np.pi) * 0.01)
    (tmp_path / "outdata").mkdir()
    out = tmp_path / "outdata" / "out"
    abinit_file(Path(f"{out}_DOS_TOTAL"), energies, [np.column_stack([8 * level, 0 * level])])
    for i in range(4):
        abinit_file(Path(f"{out}_DOS_AT{i + 1:04d}"), energies, [np.column_stack([level, *[0 * level] * 9])])

    def validated(folder: str) -> CandidateDoc:
        first = {"distance": 0.3, "mae": 0.1, "near_gap_distance": 0.2, "achieved": {"0": TARGET}}
        known = candidate_doc().model_copy(
            update={**first, "structure": COPPER, "band_gap": 1.0, "engine": "another", "directory": "elsewhere"}
        )
        result = InverseDesignDoc(targets={"0": TARGET}, candidates=[known], generation={})
        output = run(validate_candidates(result, AbinitMaker(folder=folder)), tmp_path, ensure_success=False)
        return InverseDesignDoc.model_validate(output).candidates[0]

    done = validated(str(tmp_path))
    assert (done.engine, done.reason) == ("abinit", None)
    assert done.achieved["0"].total_states() == pytest.approx(2.0, rel=0.02)
    assert done.distance != 0.3
    assert validated("").reason == "no DOS: see the log of its job"
    Path(f"{out}_DOS_AT0003").unlink()
    failed = validated(str(tmp_path))
    assert "no file" in failed.reason
    assert failed.engine == "abinit"
    assert failed.directory == f"myhost:{tmp_path}"
    assert (failed.distance, failed.mae, failed.near_gap_distance, failed.band_gap) == (None,) * 4
    assert failed.achieved == {}


@pytest.mark.dft
@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / "src" / "dosmatgen_ase" / "weights" / "default.safetensors").exists(), reason="no weights yet"
)
def test_the_demo_computes_its_candidates(tmp_path: Path) -> None:
    script("inverse_design_local.py", "--demo", "--keep", "2", "--out", str(tmp_path))
    result = InverseDesignDoc.model_validate_json((tmp_path / "result.json").read_bytes())
    computed = [c for c in result.candidates if c.engine == "Quantum ESPRESSO"]
    assert len(computed) == 2
    assert result.candidates[0].distance < 2  # that of a DOS that has nothing in common with the target
    assert all(c.distance is not None or c.reason for c in computed)


# -- FireWorks ---------------------------------------------------------------------------------------------------------

FIREWORKS = "inverse_design_fireworks.py"


def submit(out: Path, weights: Path) -> None:
    options = ["--demo", "--predict", "--weights", os.path.relpath(weights), *SMALL, "--out", str(out)]
    assert "'READY': 1" in script(FIREWORKS, "submit", *options)


def test_fireworks_runs_in_another_process_what_was_submitted_in_one(tiny_weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("mongomock_persistence")
    submit(tmp_path, tiny_weights)
    assert "'READY': 0, 'WAITING': 0, 'COMPLETED': 8, 'FIZZLED': 0" in script(
        FIREWORKS, "launch", "--out", str(tmp_path)
    )
    script(FIREWORKS, "report", "--out", str(tmp_path))
    result = InverseDesignDoc.model_validate_json((tmp_path / "result.json").read_bytes())
    assert len(result.candidates) == 3
    assert result.candidates[0].distance is not None
    assert (tmp_path / "report.html").exists()


def test_an_unreachable_database_gives_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "workflows" / FIREWORKS), "launch", "--uri", "mongodb://127.0.0.1:9/none"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    assert "error: cannot reach the database of --uri: 127.0.0.1:9: [Errno 111] Connection refused" in done.stderr
    assert "Traceback" not in done.stderr


def kill_launcher(options: list[str], ready: Callable[[], bool]) -> None:
    """SIGKILL a launcher when it is time."""
    command = [sys.executable, str(ROOT / "workflows" / FIREWORKS), "launch", *options]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:
        try:
            while True:
                time.sleep(0.1)
                assert launcher.poll() is None
                launcher.send_signal(signal.SIGSTOP)  # so that what is seen still holds when it is killed
                if ready():
                    break
                launcher.send_signal(signal.SIGCONT)
        finally:
            launcher.kill()


def rerun_lost(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    lpad = [sys.executable, "-m", "fireworks.scripts.lpad_run", "-l", str(out / "my_launchpad.yaml")]
    command = [*lpad, "detect_lostruns", "--time", "0", "--rerun"]
    return subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **environment})


def test_a_killed_launcher_loses_and_doubles_nothing(tiny_weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("mongomock_persistence")
    submit(tmp_path, tiny_weights)
    database = tmp_path / "launchpad.json"

    def states() -> list[str]:
        return [doc["state"] for _, doc in json.loads(database.read_text())["fireworks"]["fireworks"]["documents"]]

    kill_launcher(["--out", str(tmp_path)], lambda: {"RUNNING", "COMPLETED"} <= set(states()))
    before = {d["uuid"]: d for d in json.loads((tmp_path / "outputs.json").read_text())}
    done = rerun_lost(tmp_path, MONGOMOCK_SERVERSTORE_FILE=str(database))
    assert done.returncode == 0, done.stderr
    assert "Lost FireWorks: 1" in done.stdout
    assert "RUNNING" not in states()
    everything = "'READY': 0, 'WAITING': 0, 'COMPLETED': 8, 'FIZZLED': 0"
    assert everything in script(FIREWORKS, "launch", "--out", str(tmp_path))
    stored = json.loads((tmp_path / "outputs.json").read_text())
    assert len({(document["uuid"], document["index"]) for document in stored}) == len(stored)
    assert next(iter(before.values())) in stored, "the generation was not made twice"
    script(FIREWORKS, "report", "--out", str(tmp_path))
    assert len(InverseDesignDoc.model_validate_json((tmp_path / "result.json").read_bytes()).candidates) == 3


SERVER = """
import sys, time, briskdb
database = briskdb.Database(sys.argv[1], shards=2, documents=True)
server = database.serve(mongo="127.0.0.1:0")
print(server.mongo_address, flush=True)
time.sleep(3600)
"""


@pytest.mark.slow
def test_a_database_server_keeps_workflow_and_outputs_though_the_launcher_is_killed(
    tiny_weights: Path, tmp_path: Path
) -> None:
    pytest.importorskip("briskdb", reason="needs a server that speaks MongoDB's protocol: pip install briskdb")
    from pymongo import MongoClient

    command = [sys.executable, "-c", SERVER, str(tmp_path / "database")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            uri = f"mongodb://{server.stdout.readline().strip()}/dosmatgen"
            address = ["--uri", uri, "--out", str(tmp_path)]
            options = ["--demo", "--predict", "--weights", str(tiny_weights), *SMALL]
            script(FIREWORKS, "submit", *options, *address)

            def is_inside_the_first_job() -> bool:  # importing torch takes longer than this second
                return any(f.stat().st_mtime < time.time() - 1 for f in tmp_path.glob("launches/*/FW.json"))

            kill_launcher(address, is_inside_the_first_job)
            # This server has no $lookup, with which lpad lists inconsistent jobs after it has put back the lost.
            assert "unsupported document query" in rerun_lost(tmp_path).stderr
            assert "'COMPLETED': 8, 'FIZZLED': 0" in script(FIREWORKS, "launch", *address)
            with MongoClient(uri) as client:
                stored = [(document["uuid"], document["index"]) for document in client["dosmatgen"]["outputs"].find({})]
            assert len(set(stored)) == len(stored) > 0
            script(FIREWORKS, "report", *address)
        finally:
            server.kill()
    assert not (tmp_path / "outputs.json").exists()
    result = InverseDesignDoc.model_validate_json((tmp_path / "result.json").read_bytes())
    assert result.candidates[0].distance is not None
