"""Known crystals beside generated ones: told from new ones, drawn again, searched by a Maker, marked in the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

pytest.importorskip("jobflow")

from jobflow import JobStore, run_locally
from maggma.stores import MemoryStore

from dosmatgen_ase import DOSGenerator, TargetDOS
from dosmatgen_ase.crystals.convert import to_atoms, to_structure
from dosmatgen_ase.dft import errors, espresso
from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA
from dosmatgen_ase.flows import (
    DOSMaker,
    GenerateMaker,
    InverseDesignMaker,
    PredictDOSMaker,
    ScreenMaker,
    SearchMaker,
)
from dosmatgen_ase.flows.schemas import GenerationDoc, InverseDesignDoc
from dosmatgen_ase.flows.search import in_order_of_targets, with_known
from dosmatgen_ase.forward.predictor import SitePrediction
from dosmatgen_ase.generate.generator import RejectedError
from dosmatgen_ase.judge import relaxation
from dosmatgen_ase.report import write_report
from dosmatgen_ase.retrieval import build
from dosmatgen_ase.retrieval import index as index_module
from dosmatgen_ase.retrieval.index import DOSIndex
from dosmatgen_ase.retrieval.query import search

TARGET = TargetDOS.from_peaks([(-1.0, 8.0, 0.5)], window=(-5.0, 2.0))
SETTINGS: dict[str, Any] = {"num_atoms": 2, "elements": ["Ni", "Cu"], "num_steps": 4, "seed": 1}


class StandIn:
    """A forward model whose site DOS is a peak that tells the element."""

    def predict_arrays(self, crystals: Sequence[Atoms], progress: bool = False) -> list[SitePrediction]:
        found = []
        for atoms in crystals:
            centre = -atoms.numbers[:, None] / 10
            mean = (3 * np.exp(-0.5 * ((MODEL_GRID.energies - centre) / 0.5) ** 2)).astype(np.float32)
            found.append(SitePrediction(mean, 0 * mean, np.ones(mean.shape, dtype=bool), np.full(len(atoms), 0.2)))
        return found


def make_index(crystals: Sequence[Atoms], folder: Path) -> DOSIndex:
    for i, atoms in enumerate(crystals):
        atoms.info = {"material_id": f"known-{i}"}
    file = folder / "predictor"
    file.write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build.DOSPredictor, "load", lambda _: StandIn())
        return build.build_index(crystals, predictor=file)


def ships(index: DOSIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this be the index that ships."""
    monkeypatch.setattr(index_module, "default_index", lambda: index)


def element_target(z: int) -> TargetDOS:
    values = 3 * np.exp(-0.5 * ((MODEL_GRID.energies + z / 10) / 0.5) ** 2)
    return TargetDOS.from_arrays(MODEL_GRID.energies, values, sigma=MODEL_SIGMA)


# -- new only ----------------------------------------------------------------------------------------------------------


def test_a_known_crystal_is_drawn_again_and_the_others_stay(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    generator = DOSGenerator(tiny_weights, device="cpu")
    free = generator.generate(TARGET, 3, **SETTINGS)
    ships(make_index([free[1].copy(), bulk("Cu")], tmp_path), monkeypatch)
    new = generator.generate(TARGET, 3, new_only=True, **SETTINGS)
    assert [atoms.info["dosmatgen"]["attempt"] for atoms in new] == [0, 1, 0]
    assert np.array_equal(new[0].positions, free[0].positions)
    assert not np.array_equal(new[1].positions, free[1].positions)
    assert new[0].info["dosmatgen"]["new_only"] is True
    assert free[0].info["dosmatgen"]["new_only"] is False
    again = generator.regenerate(new[1], TARGET)
    assert np.array_equal(again.positions, new[1].positions)


def test_a_wish_that_only_known_crystals_fulfil_fails_clearly(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    copper = bulk("Cu")
    ships(make_index([copper.copy()], tmp_path), monkeypatch)
    generator = DOSGenerator(tiny_weights, device="cpu")
    with pytest.raises(RejectedError, match="not new: the same crystal as known-0"):
        generator.generate(TARGET, template=copper, strength=0.0, new_only=True, seed=0)


@pytest.mark.parametrize(("known_after", "expected"), [({0}, [1]), ({0, 1}, None)])
def test_what_relaxes_into_a_known_crystal_is_not_new(
    known_after: set[int], expected: list[int] | None, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stub:
        """Knows some structures once they are relaxed and scored."""

        def find(self, atoms: Atoms) -> str | None:
            return "known-7" if "scores" in atoms.info and atoms.info["dosmatgen"]["index"] in known_after else None

    def scored(candidates: Sequence[Atoms], *_: object, **__: object) -> list[Atoms]:
        for atoms in candidates:
            atoms.info["scores"] = {"score": 0.5}
        return list(candidates)

    torch.set_num_threads(1)
    monkeypatch.setattr(index_module, "default_index", Stub)
    monkeypatch.setattr("dosmatgen_ase.judge.ranking.score", scored)
    generator = DOSGenerator(tiny_weights, device="cpu")
    if expected is None:
        with pytest.raises(RejectedError, match="0 of 2 structures are new after relaxation"):
            generator.generate(TARGET, 1, oversample=2, new_only=True, **SETTINGS)
    else:
        made = generator.generate(TARGET, 1, oversample=2, new_only=True, **SETTINGS)
        assert [atoms.info["dosmatgen"]["index"] for atoms in made] == expected


# -- the Maker ---------------------------------------------------------------------------------------------------------


def test_sites_that_match_stand_where_the_targets_belong(tmp_path: Path) -> None:
    gold = Atoms("AuAuAuNi", scaled_positions=[(0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0), (0, 0, 0)],
                 cell=[4.0] * 3, pbc=True)  # fmt: skip
    index = make_index([gold, bulk("Cu")], tmp_path)
    (hit,) = search(element_target(28), 1, elements=["Ni", "Au"], index=index)
    assert in_order_of_targets(hit, [2]).get_chemical_symbols() == ["Au", "Au", "Ni", "Au"]
    (hit,) = search({0: element_target(28), 3: element_target(79)}, 1, elements=["Ni", "Au"], index=index)
    assert in_order_of_targets(hit, [0, 3]).get_chemical_symbols() == ["Ni", "Au", "Au", "Au"]
    (hit,) = search([element_target(29)] * 3, 1, elements=["Cu"], index=index)
    assert len(in_order_of_targets(hit, [0, 1, 2])) == 3
    (hit,) = search(element_target(29), 1, elements=["Cu"], index=index)
    far = in_order_of_targets(hit, [1])
    assert len(far) == 2
    assert far.get_distance(0, 1, mic=True) == pytest.approx(hit.cell.lengths()[0])


def test_known_crystals_come_before_generated_ones_with_numbers_of_their_own() -> None:
    copper = {"structures": [], "records": [{"index": 4}, {"index": 2}], "targets": {}, "settings": {"n": 5}}
    known = {"structures": [], "records": [{"index": 0, "search": {}}], "targets": {}, "settings": {"n": 1}}
    joined = with_known.original(GenerationDoc(**copper), GenerationDoc(**known))
    assert joined.records == [{"index": 5, "search": {}}, {"index": 4}, {"index": 2}]
    assert joined.settings == {"n": 5, "search": {"n": 1}}


def test_known_and_generated_candidates_stand_in_one_report(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    index = make_index([bulk("Cu"), bulk("Ni"), bulk("Au")], tmp_path)
    index.save(tmp_path / "index.npz")
    ships(index, monkeypatch)
    maker = InverseDesignMaker(
        search_maker=SearchMaker(n=2, exclude_elements=["Au"], index=str(tmp_path / "index.npz")),
        generate_maker=GenerateMaker(n=2, weights=str(tiny_weights), **SETTINGS),
        screen_maker=ScreenMaker(keep=1),
        relax_maker=None,
        dos_maker=PredictDOSMaker(),
    )
    store = JobStore(MemoryStore(), additional_stores={"data": MemoryStore()})
    flow = maker.make(TARGET)
    run_locally(flow, store=store, root_dir=tmp_path / "run", create_folders=True, ensure_success=True, log=False)
    result = InverseDesignDoc.model_validate(store.get_output(flow.output.uuid, load=True))
    found = {c.known_as: c for c in result.candidates if "search" in c.record}
    assert set(found) == {"known-0", "known-1"}
    assert all(c.distance is not None for c in found.values())
    assert {c.index for c in found.values()} == {2, 3}
    generated = [c for c in result.candidates if "search" not in c.record]
    assert [c.index for c in sorted(generated, key=lambda c: c.index)] == [0, 1]
    assert sum(c.distance is not None for c in generated) <= 1  # `keep` counts generated ones alone
    page = write_report(result, tmp_path / "report.html").read_text()
    assert "known as known-0, found by search" in page


def test_pins_of_the_template_hold_generated_crystals_and_no_known_ones(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strained host, the cell and seven of its eight sites held, beside a known crystal of one atom."""
    torch.set_num_threads(1)
    index = make_index([bulk("Cu", a=3.9)], tmp_path)
    index.save(tmp_path / "index.npz")
    ships(index, monkeypatch)
    relaxed: dict[int, dict[str, Any]] = {}
    computed: dict[int, Atoms] = {}

    def as_it_is(atoms: Atoms, *_: Any, **settings: Any) -> Atoms:
        relaxed[len(atoms)] = {name: settings[name] for name in ("fixed_cell", "fixed_sites")}
        atoms.info["relaxation"] = {"energy": -1.0, "converged": True, "steps": 1, "reason": None}
        return atoms

    def look(atoms: Atoms, *_: Any, **__: Any) -> None:
        computed[len(atoms)] = atoms
        raise errors.ElectronicStructureError("seen")

    monkeypatch.setattr(relaxation, "relax", as_it_is)
    monkeypatch.setattr(espresso, "compute_dos", look)
    host = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    host.set_cell(host.cell.array * [0.99, 0.99, 1.01], scale_atoms=True)
    maker = InverseDesignMaker(
        search_maker=SearchMaker(n=1, index=str(tmp_path / "index.npz")),
        generate_maker=GenerateMaker(
            n=1, weights=str(tiny_weights), num_steps=2, seed=1, fixed_cell=True, fixed_sites=range(1, 8)
        ),
        dos_maker=DOSMaker(),
    )
    flow = maker.make(TARGET, template=to_structure(host))
    store = JobStore(MemoryStore(), additional_stores={"data": MemoryStore()})
    run_locally(flow, store=store, root_dir=tmp_path / "run", create_folders=True, ensure_success=True, log=False)
    assert relaxed[1] == {"fixed_cell": False, "fixed_sites": []}
    assert relaxed[8] == {"fixed_cell": True, "fixed_sites": list(range(1, 8))}
    np.testing.assert_allclose(computed[8].cell.array, host.cell.array, atol=1e-6)
    held = to_atoms(to_structure(host)).get_scaled_positions()[1:]
    np.testing.assert_allclose(computed[8].get_scaled_positions()[1:], held, atol=1e-6)
