"""Statistics in closed form, and the controls that must fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
from ase.build import bulk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dosmatgen_ase.dos import MODEL_GRID
from dosmatgen_ase.judge.metrics import bootstrap_interval, match_rms, median, nearest_sites, quantile, site_distances

G = MODEL_GRID.size
ALL = np.ones(G, dtype=bool)


def column_ratio(rows: np.ndarray) -> float:
    return rows[:, 0].mean() / rows[:, 1].mean()


def test_quantiles_are_members_of_the_sample_and_allow_infinity() -> None:
    assert quantile([3.0, 1.0, math.inf, 2.0], [0.25, 0.5, 0.75]).tolist() == [1.0, 2.0, 3.0]
    assert median([1.0, math.inf, math.inf]) == math.inf
    assert median([1.0, 2.0, math.inf]) == 2.0


def test_the_interval_of_a_mean_has_the_width_of_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    low, high = bootstrap_interval(values, np.mean)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    narrow = bootstrap_interval(values, np.mean, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    intervals = [bootstrap_interval(rng.exponential(1.0, 60), np.mean, samples=300) for _ in range(300)]
    covered = np.mean([low <= 1.0 <= high for low, high in intervals])
    assert 0.89 < covered < 0.97


def test_the_interval_is_that_of_scipy() -> None:
    """Which refuses a single value, and makes NaN where a member is infinite: these are what ours is for."""
    values = np.random.default_rng(2).normal(5.0, 2.0, 60)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0))
    assert bootstrap_interval(values, np.mean) == pytest.approx(tuple(theirs.confidence_interval), abs=1e-3)
    assert bootstrap_interval([1.0], np.mean) == (1.0, 1.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.arange(20.0)
    assert bootstrap_interval(values, np.mean, seed=3) == bootstrap_interval(values, np.mean, seed=3)
    assert bootstrap_interval(values, np.mean, seed=3) != bootstrap_interval(values, np.mean, seed=4)


def test_columns_stay_paired() -> None:
    values = np.random.default_rng(0).lognormal(0.0, 1.0, 30)
    low, high = bootstrap_interval(np.stack([0.5 * values, values], 1), column_ratio)
    assert low == pytest.approx(0.5)
    assert high == pytest.approx(0.5)
    shuffled = bootstrap_interval(np.stack([0.5 * values, values[::-1]], 1), column_ratio)
    assert shuffled[1] - shuffled[0] > 0.1


def test_infinite_members_make_no_nan() -> None:
    low, high = bootstrap_interval([0.1, 0.2, 0.3, math.inf, math.inf], median)
    assert low < 0.4
    assert high == math.inf


@pytest.mark.parametrize(
    ("values", "confidence", "fragment"),
    [([], 0.95, "at least one value"), (3.0, 0.95, "at least one value"), ([1.0], 0.0, "0.95"), ([1.0], 95, "0.95")],
)
def test_a_bootstrap_of_nothing_is_refused(values: object, confidence: float, fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        bootstrap_interval(values, np.mean, confidence=confidence)


def test_site_distances_by_hand() -> None:
    target = np.zeros((2, G))
    target[0, 10], target[1, 75] = 1.0, 3.0  # 75 lies at -2.5 eV
    target[1, 100] = 1.0  # 0 eV
    made = target.copy()
    made[0] = 0.0  # this site is missed whole: 1
    made[1, 100] = 2.0  # this one by a quarter
    d = site_distances(made, target, ALL)
    assert d["l1"] == pytest.approx((1 + 1 / 4) / 2)
    assert d["pooled"] == pytest.approx(2 / 5)
    assert d["near_gap"] == pytest.approx(1 / 1)
    assert d["mae"] == pytest.approx(2 / (2 * G))


def test_unknown_bins_do_not_count() -> None:
    rng = np.random.default_rng(0)
    target, known = rng.random((3, G)), rng.random((3, G)) < 0.7
    spoilt = np.where(known, target, 99.0)
    assert all(d == 0 for d in site_distances(spoilt, target, known).values())
    assert all(d > 0 for d in site_distances(spoilt, target, ALL).values())


@given(scale=st.floats(0.0, 5.0), sites=st.integers(1, 4))
@settings(derandomize=True, deadline=None, max_examples=20)
def test_a_scaled_target_is_as_far_as_its_scale(scale: float, sites: int) -> None:
    target = np.random.default_rng(sites).random((sites, G))
    d = site_distances(np.stack([scale * target, target]), target, ALL)
    for name in ("l1", "pooled", "near_gap"):
        np.testing.assert_allclose(d[name], [abs(scale - 1), 0.0], atol=1e-12)


def test_only_the_crystal_without_a_prediction_is_nan() -> None:
    target = np.random.default_rng(0).random((2, G))
    d = site_distances(np.stack([target, np.full((2, G), np.nan)]), target, ALL)
    for values in d.values():
        assert np.isnan(values).tolist() == [False, True]


def test_a_site_without_states_is_left_out_and_a_target_without_any_refused() -> None:
    target = np.stack([np.ones(G), np.zeros(G)])
    assert site_distances(np.ones((2, G)), target, ALL)["l1"] == 0.0
    with pytest.raises(ValueError, match="no states"):
        site_distances(np.ones((1, G)), target[1:], ALL)


def test_the_nearest_site_is_found_over_common_bins() -> None:
    rng = np.random.default_rng(0)
    library, known = rng.random((50, G)), rng.random((50, G)) < 0.97
    rows = rng.permutation(50)[:10]
    queries, asked = library[rows] + 1e-3 * rng.random((10, G)), rng.random((10, G)) < 0.9
    spoilt = np.where(known, library, 99.0)
    assert nearest_sites(np.where(asked, queries, -99.0), asked, spoilt, known).tolist() == rows.tolist()


def test_the_power_decides_between_one_large_and_many_small_errors() -> None:
    library = np.zeros((2, G))
    library[0, 0] = 10.0
    library[1] = 0.1
    query, known = np.zeros((1, G)), np.ones((2, G), dtype=bool)
    assert nearest_sites(query, known[:1], library, known, power=1).tolist() == [0]
    assert nearest_sites(query, known[:1], library, known, power=2).tolist() == [1]


def test_a_row_that_does_not_know_where_the_states_are_is_not_near() -> None:
    peak = np.where(np.arange(G) == 40, 10.0, 0.0)
    library = np.stack([np.zeros(G), 0.8 * peak])
    known = np.stack([np.arange(G) != 40, ALL])
    assert nearest_sites(peak[None], ALL[None], library, known).tolist() == [1]


def test_a_row_that_knows_little_is_not_near() -> None:
    library = np.stack([np.zeros(G), np.ones(G)])
    known = np.stack([np.arange(G) < 10, ALL])
    assert nearest_sites(np.zeros((1, G)), ALL[None], library, known).tolist() == [1]
    with pytest.raises(ValueError, match="query 0"):
        nearest_sites(np.zeros((1, G)), ALL[None], library[:1], known[:1])


def test_the_same_crystal_matches_however_it_is_written() -> None:
    salt = bulk("NaCl", "rocksalt", a=5.64)
    other = salt.copy()
    other.rotate(30, (1, 1, 0), rotate_cell=True)
    other.set_cell(1.1 * other.cell, scale_atoms=True)
    other.positions += 0.7
    assert match_rms(other, salt) == pytest.approx(0.0, abs=1e-6)
    assert match_rms(bulk("NaCl", "rocksalt", a=5.64, cubic=True), salt) == pytest.approx(0.0, abs=1e-6)


def test_another_arrangement_or_chemistry_does_not_match() -> None:
    salt = bulk("NaCl", "rocksalt", a=5.64)
    assert math.isnan(match_rms(bulk("NaCl", "cesiumchloride", a=3.4), salt))
    assert math.isnan(match_rms(bulk("KCl", "rocksalt", a=5.64), salt))
    moved = salt.copy()
    moved.rattle(0.2, seed=0)
    assert 0.01 < match_rms(moved, salt) < 0.2


def test_the_usual_tolerances_are_lenient() -> None:
    salt = bulk("NaCl", "rocksalt", a=5.64)
    assert match_rms(bulk("NaCl", "zincblende", a=5.64), salt) == pytest.approx(0.433, abs=1e-3)
