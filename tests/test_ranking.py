"""Ranking of candidates, and what `DOSGenerator.generate` returns with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.lj import LennardJones

from dosmatgen_ase import DOSGenerator, TargetDOS, energy_above_hull, predict_dos
from dosmatgen_ase.dos import MODEL_GRID, normalised_l1
from dosmatgen_ase.forward.predictor import SitePrediction
from dosmatgen_ase.generate.generator import RejectedError
from dosmatgen_ase.judge import ranking as ranking_module
from dosmatgen_ase.judge.ranking import Ranking, best, predicted_distance, predicted_for_targets, score, score_and_relax
from dosmatgen_ase.judge.relaxation import relax


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def copper() -> TargetDOS:
    return predict_dos(bulk("Cu"))[0]


@pytest.fixture(scope="module")
def generator() -> DOSGenerator:
    return DOSGenerator(device="cpu")


def metals() -> list[Atoms]:
    return [bulk("Al"), bulk("Cu"), bulk("Ag")]


def test_the_crystal_that_has_the_dos_comes_first(copper: TargetDOS) -> None:
    ranked = score(metals(), {0: copper})
    first, *others = [atoms.info["scores"]["distance"] for atoms in ranked]
    assert ranked[0].symbols[0] == "Cu"
    assert first < 0.5 * min(others)  # the d bands of silver lie elsewhere, aluminium has none
    told = [atoms.info["scores"] for atoms in ranked]
    assert told[0]["distance"] == pytest.approx(0.0, abs=1e-3)
    assert [t["score"] for t in told] == [t["distance"] for t in told]
    assert told[1]["distance"] == pytest.approx(normalised_l1(predict_dos(ranked[1])[0], copper), abs=1e-3)
    assert all(0 < t["expected_error"] < 2 for t in told)
    assert "energy_above_hull" not in told[0]


def test_weights_count(copper: TargetDOS) -> None:
    stretched = bulk("Cu", a=4.2)
    by_both = score([stretched, bulk("Al")], {0: copper}, ranking=Ranking(distance=1, uncertainty=2, energy=3))
    for atoms in by_both:
        told = atoms.info["scores"]
        expected = told["distance"] + 2 * told["expected_error"] + 3 * told["energy_above_hull"]
        assert told["score"] == pytest.approx(expected)
        assert told["energy_above_hull"] == pytest.approx(energy_above_hull(atoms), abs=1e-4)
    by_energy = score([stretched, bulk("Cu")], {}, ranking=Ranking(distance=0, energy=1))
    assert by_energy[0].cell.volume < by_energy[1].cell.volume


def test_what_cannot_be_measured_comes_last(copper: TargetDOS) -> None:
    collapsed, rare = bulk("Cu", a=1.2), bulk("Po", "sc", a=3.3)
    ranked = score([collapsed, rare, bulk("Al")], {0: copper})
    assert [atoms.symbols[0] for atoms in ranked] == ["Al", "Cu", "Po"]
    assert [atoms.info["scores"]["score"] is None for atoms in ranked] == [False, True, True]


def test_a_left_handed_cell_is_measured_as_the_same_crystal(copper: TargetDOS) -> None:
    turned = bulk("Cu")
    turned.set_cell(-turned.cell.array)
    by_both = Ranking(distance=1, energy=1)
    found, plain = (score([atoms], {0: copper}, ranking=by_both)[0] for atoms in (turned, bulk("Cu")))
    assert found.info["scores"]["score"] is not None
    assert found.info["scores"] == pytest.approx(plain.info["scores"], abs=1e-4)
    assert found == turned, "it comes back as it was given"
    assert best([bulk("Cu"), turned, bulk("Ag")], 2)[1].symbols[0] == "Ag", "it is the same crystal"


@pytest.mark.parametrize("told", ["done", None, 3, {"by": "another program"}])
def test_what_other_programs_tell_of_a_relaxation_does_no_harm(told: Any, copper: TargetDOS) -> None:
    atoms = bulk("Cu")
    atoms.info["relaxation"] = told
    assert score([atoms], {0: copper})[0].info["scores"]["score"] == pytest.approx(0.0, abs=1e-3)


def test_every_target_counts(copper: TargetDOS) -> None:
    salt = predict_dos(bulk("NaCl", "rocksalt", a=5.64))
    pair = score([bulk("NaCl", "rocksalt", a=5.64), bulk("MgO", "rocksalt", a=4.21)], {0: salt[0], 1: salt[1]})
    assert pair[0].get_chemical_formula() == "ClNa"
    values = np.zeros((2, MODEL_GRID.size), dtype=np.float32)
    known = np.array([np.ones(MODEL_GRID.size), np.zeros(MODEL_GRID.size)], dtype=bool)
    half = SitePrediction(values, values, known, np.zeros(2))
    assert len(predicted_for_targets(half, {0: copper, 1: copper})) == 1
    assert predicted_distance(half, {0: copper, 1: copper}) is None  # not the mean of what happens to be known
    assert predicted_distance(half, {0: copper}) == pytest.approx(1.0)


def test_a_gap_can_be_ranked_by(copper: TargetDOS) -> None:
    """A target without states has no ratio; it must neither be ignored nor spoil the other targets."""
    gap = TargetDOS(MODEL_GRID.energies, 0.0 * copper.values, abs(MODEL_GRID.energies) < 0.5, "fermi", copper.sigma)
    salt, metal = bulk("NaCl", "rocksalt", a=5.64), bulk("AlNi", "cesiumchloride", a=2.88)
    ranked = score([metal, salt], {0: gap})
    assert [atoms.get_chemical_formula() for atoms in ranked] == ["ClNa", "AlNi"]
    assert ranked[0].info["scores"]["distance"] < ranked[1].info["scores"]["distance"]
    assert all(atoms.info["scores"]["score"] is not None for atoms in score([metal, salt], {0: copper, 1: gap}))


def test_a_cell_with_vacuum_is_ranked_as_any_other(copper: TargetDOS) -> None:
    slabs = [fcc111(name, (1, 1, 3), vacuum=25.0, periodic=True) for name in ("Al", "Cu")]
    assert all(atoms.get_volume() / len(atoms) > 100 for atoms in slabs)
    ranked = score(slabs, {1: copper})
    assert [atoms.symbols[0] for atoms in ranked] == ["Cu", "Al"]
    assert all(atoms.info["scores"]["score"] is not None for atoms in ranked)
    assert best([slabs[0], slabs[0].copy(), slabs[1]], 2) == [slabs[0], slabs[1]]


def test_total_targets_are_compared_with_the_cell(copper: TargetDOS) -> None:
    total = TargetDOS(copper.energies, 4 * copper.values, copper.known, "fermi", copper.sigma, "total")
    ranked = score([bulk("Cu"), bulk("Cu", cubic=True)], {}, total)
    assert [len(atoms) for atoms in ranked] == [4, 1]


def test_relaxation_comes_before_the_score(copper: TargetDOS) -> None:
    start = bulk("Ar", a=5.0)
    start.info["dosmatgen"] = {"index": 3}
    engine = LennardJones(sigma=3.4, epsilon=0.0104, rc=8.0)
    relaxed = score([start], {}, ranking=Ranking(distance=0, energy=1), relax=engine)[0]
    assert relaxed.info["relaxation"]["steps"] > 0
    assert relaxed.info["dosmatgen"] == {"index": 3}
    assert relaxed.cell.volume != start.cell.volume
    told = relaxed.info["scores"]
    assert told["score"] == pytest.approx(energy_above_hull(relaxed), abs=1e-5)  # of the relaxed crystal
    assert told["score"] < energy_above_hull(start)


def test_below_the_hull_is_no_better_than_on_it(copper: TargetDOS, monkeypatch: pytest.MonkeyPatch) -> None:
    by_energy = Ranking(distance=0, energy=1)
    energies = {"Cu": -0.3, "Ag": 0.0, "Al": 0.1}
    monkeypatch.setattr(
        ranking_module, "chgnet_energies", lambda found, progress: [energies[str(a.symbols)] for a in found]
    )
    monkeypatch.setattr(ranking_module, "load_hull", lambda: Level())
    ranked = score([bulk(symbol) for symbol in ("Al", "Ag", "Cu")], {}, ranking=by_energy)
    assert [atoms.info["scores"]["score"] for atoms in ranked] == [0.0, 0.0, pytest.approx(0.1)]
    assert [str(atoms.symbols) for atoms in ranked] == ["Ag", "Cu", "Al"], "the order given, where none is better"
    assert ranked[1].info["scores"]["energy_above_hull"] == -0.3, "told as it is"
    both = Ranking(distance=1, uncertainty=1, energy=10)
    told = score([bulk("Cu")], {0: copper}, ranking=both)[0].info["scores"]
    assert told["score"] == pytest.approx(told["distance"] + told["expected_error"])


class Level:
    """A hull at 0 eV/atom everywhere."""

    def above(self, numbers: np.ndarray, energy: float) -> float:
        return energy


def test_best_prefers_distinct_crystals() -> None:
    a, b, c = bulk("Cu"), bulk("Cu", cubic=True), bulk("Ag")
    assert best([a, b, c], 2) == [a, c]
    assert best([a, b, c], 3) == [a, b, c]  # too few: the twin comes back, in its place
    assert best([b, a], 1) == [b]


def test_generate_oversamples_and_ranks(generator: DOSGenerator, copper: TargetDOS, tmp_path: Path) -> None:
    plain = generator.generate(copper, 6, num_atoms=2, seed=3)
    picked = generator.generate(copper, 2, num_atoms=2, seed=3, oversample=3, out=tmp_path / "all.extxyz")
    assert "scores" not in plain[0].info
    scores = [atoms.info["scores"]["score"] for atoms in picked]
    assert scores == sorted(scores)
    every = [a.info["scores"]["score"] for a in score(plain, {0: copper})]
    assert scores[0] == pytest.approx(every[0])  # the best of the same draws
    assert len((tmp_path / "all.extxyz").read_text().split("Lattice")) == 7  # what was drawn is kept
    one = generator.generate(copper, num_atoms=2, seed=3, oversample=6)
    assert one.info["scores"]["score"] == pytest.approx(scores[0])
    again = generator.regenerate(one, copper)
    np.testing.assert_allclose(again.positions, one.positions, atol=1e-5)


def test_what_is_rejected_does_not_cost_the_candidates(
    generator: DOSGenerator, copper: TargetDOS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of eight fails: the other seven are ranked, and told. Too few are an error that has them."""
    whole = DOSGenerator._complete

    def complete(self: DOSGenerator, request: Any, batch: list[int], *rest: Any) -> Any:
        made, reasons = whole(self, request, batch, *rest)
        del made[7]
        return made, {**reasons, 7: "too dense"}

    monkeypatch.setattr(DOSGenerator, "_complete", complete)
    with pytest.warns(UserWarning, match=r"structure 7 was rejected 5 times.*The 7 others are ranked"):
        picked = generator.generate(copper, 2, num_atoms=2, seed=3, oversample=4)
    assert [a.info["scores"]["score"] for a in picked] == sorted(a.info["scores"]["score"] for a in picked)
    assert 7 not in {a.info["dosmatgen"]["index"] for a in picked}
    with pytest.raises(RejectedError, match="structure 7 was rejected") as caught:
        generator.generate(copper, 8, num_atoms=2, seed=3, ranking=Ranking())
    assert [a.info["dosmatgen"]["index"] for a in caught.value.structures] == list(range(7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"oversample": 0}, "oversample=0 must be a whole number"),
        ({"oversample": 1.5}, "oversample=1.5 must be a whole number"),
        ({"oversample": True}, "oversample=True must be a whole number"),
    ],
)
def test_wrong_settings(generator: DOSGenerator, copper: TargetDOS, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generator.generate(copper, 1, **settings)


def test_there_must_be_something_to_rank_by(generator: DOSGenerator, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no DOS to rank by"):
        generator.generate(None, 1, oversample=2, out=tmp_path / "none.extxyz")
    assert not (tmp_path / "none.extxyz").exists()  # told before the work
    with pytest.raises(ValueError, match="one of them above 0"):
        Ranking(distance=0)
    with pytest.raises(ValueError, match="not negative"):
        Ranking(energy=-1)
    with pytest.raises(ValueError, match=r"energy='a'.*weights must be finite numbers"):
        Ranking(energy="a")  # type: ignore[arg-type]


class _Counting(LennardJones):
    """Counts the crystals that are relaxed with it, by element."""

    def __init__(self) -> None:
        super().__init__(sigma=2.3, epsilon=0.4, rc=6.0)
        self.seen: list[str] = []

    def calculate(self, atoms: Atoms | None = None, *rest: Any, **more: Any) -> None:
        assert atoms is not None
        if self.seen[-1:] != [name := str(atoms.symbols)]:
            self.seen.append(name)
        super().calculate(atoms, *rest, **more)


def test_of_many_draws_the_best_are_relaxed_and_ranked_again(copper: TargetDOS) -> None:
    draws = [bulk(symbol, "fcc", a=4.0) for symbol in ("Ne", "Na", "Al", "Ag", "Xe", "K", "Cu", "Pb")]
    in_order = [str(atoms.symbols) for atoms in score(draws, {0: copper})]
    engine = _Counting()
    kept = score_and_relax(draws, 1, {0: copper}, relaxed=partial(relax, calculator=engine), accepts=lambda atoms: True)
    assert set(engine.seen) == set(in_order[: ranking_module.RELAXED])
    assert len(kept) == ranking_module.RELAXED
    again = [str(atoms.symbols) for atoms in score(kept, {0: copper})]
    assert [str(atoms.symbols) for atoms in kept] == again  # by the DOS of the relaxed crystals
    assert all("relaxation" in atoms.info for atoms in kept)
    energies = [atoms.info["relaxation"]["energy"] for atoms in kept]
    assert [atoms.get_potential_energy() for atoms in kept] == pytest.approx(energies)
    assert all(atoms.get_forces().shape == (1, 3) and atoms.get_stress().shape == (6,) for atoms in kept)


def test_more_draws_are_relaxed_where_the_best_are_refused_or_alike(copper: TargetDOS) -> None:
    draws = [*(bulk("Cu") for _ in range(8)), *(bulk(symbol, "fcc", a=4.0) for symbol in ("Ag", "Al", "Pb"))]
    engine = _Counting()
    kept = score_and_relax(
        draws, 1, {0: copper}, relaxed=partial(relax, calculator=engine), accepts=lambda atoms: atoms.symbols[0] != "Cu"
    )
    assert {str(atoms.symbols) for atoms in kept} == {"Ag", "Al", "Pb"}
    two = score_and_relax(
        draws, 2, {0: copper}, relaxed=partial(relax, calculator=_Counting()), accepts=lambda atoms: True
    )
    assert {str(atoms.symbols) for atoms in best(two, 2)} > {"Cu"}
    broken = score_and_relax(
        draws, 1, {0: copper}, relaxed=partial(relax, calculator=_Broken()), accepts=lambda atoms: True
    )
    assert len(broken) == len(draws)  # none held together: all were tried
    assert (
        score_and_relax([], 1, {0: copper}, relaxed=partial(relax, calculator=_Broken()), accepts=lambda atoms: True)
        == []
    )


class _Broken(LennardJones):
    def calculate(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("the potential broke down")


def test_a_relaxation_that_broke_down_is_not_ranked_by_its_start(copper: TargetDOS) -> None:
    (atoms,) = score([bulk("Cu")], {0: copper}, relax=_Broken())
    assert "broke down" in atoms.info["relaxation"]["reason"]
    assert atoms.info["scores"]["score"] is None


def test_elements_without_labels_are_not_the_surest() -> None:
    ranked = score([bulk("Po", "sc", a=3.3), bulk("Cu")], {}, ranking=Ranking(distance=0, uncertainty=1))
    assert [atoms.symbols[0] for atoms in ranked] == ["Cu", "Po"]


def test_best_takes_rejected_crystals_last_of_their_formula_without_a_crash() -> None:
    broken = bulk("Cu")
    broken.cell[:] = 0.0
    assert len(best([broken, bulk("Cu")], 2)) == 2


def test_a_calculator_that_cannot_be_loaded_is_told_before_the_work(
    generator: DOSGenerator, copper: TargetDOS, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, OSError), match="bogus"):
        generator.generate(copper, 1, relax="bogus", out=tmp_path / "none.extxyz")
    assert not (tmp_path / "none.extxyz").exists()
