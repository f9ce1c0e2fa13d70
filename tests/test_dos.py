"""The DOS as a target: closed forms for broadening, masks and distances, real reader objects, hostile input."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.test
import numpy as np
import pytest
from ase.dft.dos import DOS
from ase.spectrum.doscollection import DOSCollection, GridDOSCollection, RawDOSCollection
from ase.spectrum.dosdata import GridDOSData, RawDOSData
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure
from pymatgen.electronic_structure.core import Orbital, Spin
from pymatgen.electronic_structure.dos import CompleteDos, Dos
from scipy.special import ndtr

from dosmatgen_ase.dos import (
    GAP_DOS,
    MODEL_GRID,
    MODEL_SIGMA,
    NEAR_GAP,
    Array,
    EnergyGrid,
    TargetDOS,
    band_centre_difference,
    fingerprint_similarity,
    mae,
    mae_arrays,
    normalised_l1,
    normalised_l1_arrays,
    resample,
    scale_sites_to_total,
    wasserstein,
)
from dosmatgen_ase.dos.broadening import PIECE

DATA = Path(__file__).parents[1] / "data"
VASP = Path(ase.test.__file__).parent / "testdata" / "vasp"
LABEL_ENERGIES = np.linspace(-12.0, 8.0, 401)


def gaussian(energies: Any, centre: float, sigma: float, states: float = 1.0) -> Array:
    return states * np.exp(-0.5 * ((energies - centre) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))


def peak(centre: float = -3.0, sigma: float = 0.1, states: float = 1.0, **options: Any) -> TargetDOS:
    values = gaussian(LABEL_ENERGIES, centre, sigma, states)
    return TargetDOS.from_arrays(LABEL_ENERGIES, values, sigma=sigma, **options)


# -- grid and value object ---------------------------------------------------------------------------------------------


def test_model_grid() -> None:
    assert MODEL_GRID.size == 151
    assert MODEL_GRID.energies[[0, 100, 150]] == pytest.approx([-10.0, 0.0, 5.0], abs=1e-12)
    with pytest.raises(ValueError, match="read-only"):
        MODEL_GRID.energies[0] = 0.0


@pytest.mark.parametrize("bounds", [(0, 1, 0.3), (1, 0, 0.1), (0, 1, 0), (0, 1, -0.1), (0, math.inf, 0.1)])
def test_grid_rejects(bounds: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="EnergyGrid"):
        EnergyGrid(*bounds)


def test_target_is_an_immutable_copy() -> None:
    values = np.ones(401)
    target = TargetDOS.from_arrays(LABEL_ENERGIES, values)
    values[:] = 7.0
    assert (target.values == 1.0).all()
    with pytest.raises(ValueError, match="read-only"):
        target.values[0] = 2.0
    with pytest.raises(AttributeError):
        target.sigma = 1.0


def test_equality_and_digest_follow_the_content_and_not_the_source() -> None:
    target = peak()
    assert target == peak()
    assert hash(target) == hash(peak())
    others = [peak(-3.1), peak(kind="total"), peak(reference="vbm"), peak(sigma=0.11), target.window(-5.0, 0.0)]
    assert len({t.digest() for t in [target, *others]}) == 6
    assert target != "peak"


def test_digest_is_the_same_on_every_machine() -> None:
    target = TargetDOS.from_arrays([0.0, 0.5, 1.0], [1.0, -0.0, 2.0], sigma=0.1)
    assert target.digest() == "e89d829d4e500c42acd5571d03104a64584b282b064c58ddc16600e6fdb901fd"
    assert target == TargetDOS.from_arrays([0.0, 0.5, 1.0], [1.0, 0.0, 2.0], sigma=0.1)


def test_unknown_values_do_not_count() -> None:
    known = [True, False, True]
    a = TargetDOS.from_arrays([0, 1, 2], [1, math.nan, 2], known=known)
    assert a.values.tolist() == [1.0, 0.0, 2.0]
    assert a == TargetDOS.from_arrays([0, 1, 2], [1, 99, 2], known=known)


def test_dict_round_trip_through_json() -> None:
    target = peak(reference="vbm", kind="total").window(-5.0, 1.0)
    again = TargetDOS.from_dict(json.loads(json.dumps(target.to_dict())))
    assert again == target
    assert again.provenance == target.provenance


def test_repr_is_one_short_line() -> None:
    assert repr(peak()) == (
        "TargetDOS(site, 401 energies, 401 known in [-12.00, 8.00] eV, reference=fermi, sigma=0.1 eV)"
    )


# -- broadening and resampling -----------------------------------------------------------------------------------------


def test_gaussian_widens_to_the_exact_gaussian() -> None:
    target = peak(sigma=0.1).on_grid()
    assert target.sigma == MODEL_SIGMA
    assert target.values == pytest.approx(gaussian(MODEL_GRID.energies, -3.0, 0.2), abs=1e-12)
    assert target.known.all()


@pytest.mark.parametrize("centre", [-3.0, -3.017, -2.9501])
def test_fine_input_loses_no_states(centre: float) -> None:
    # One spike that lies between the grid points: sampling at points would lose it.
    energies = np.arange(-12.0, 8.0, 0.001)
    values = np.zeros_like(energies)
    spike = np.argmin(abs(energies - centre))
    values[spike] = 1000.0
    target = TargetDOS.from_arrays(energies, values).on_grid()
    assert target.total_states() == pytest.approx(1.0, abs=1e-9)
    assert target.band_centre() == pytest.approx(energies[spike], abs=1e-9)
    assert target.values == pytest.approx(gaussian(MODEL_GRID.energies, energies[spike], 0.2), abs=1e-3)


def test_coarse_input_is_interpolated() -> None:
    energies = np.linspace(-12.0, 8.0, 11)
    target = TargetDOS.from_arrays(energies, 20.0 + energies).on_grid()
    inner = abs(MODEL_GRID.energies) < 1.0  # between kinks at -2, 0 and 2 of the (straight) line there are none
    assert target.values[inner] == pytest.approx(20.0 + MODEL_GRID.energies[inner], abs=1e-6)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    st.lists(st.floats(0.004, 1.3), min_size=30, max_size=60),
    st.sampled_from([None, 0.0, 0.05, 0.15]),
    st.integers(0, 2**32 - 1),
)
def test_states_are_conserved_on_irregular_grids(steps: list[float], sigma: float | None, seed: int) -> None:
    energies = -9.0 + np.cumsum(steps) * 13.0 / sum(steps)
    values = np.random.default_rng(seed).random(len(steps))
    values[[0, 1, -2, -1]] = 0.0
    target = TargetDOS.from_arrays(energies, values, sigma=sigma)
    # Padding with known zeros keeps the kernel inside the known range everywhere.
    padded = TargetDOS.from_arrays(
        np.concatenate([[-14.0, -9.5], energies, [4.5, 9.0]]), np.concatenate([[0, 0], values, [0, 0]]), sigma=sigma
    ).on_grid()
    assert padded.known.all()
    assert (padded.values >= 0).all()
    assert padded.total_states() == pytest.approx(target.total_states(), rel=1e-3)


def test_broadening_never_narrows() -> None:
    wide = peak(sigma=0.5)
    onto = wide.on_grid()
    assert onto.sigma == 0.5
    assert onto.values == pytest.approx(gaussian(MODEL_GRID.energies, -3.0, 0.5), abs=1e-3)
    assert "already at sigma 0.5 eV" in onto.provenance["steps"][-1]


def test_unknown_broadening_is_taken_as_none_and_said_so() -> None:
    unknown = TargetDOS.from_arrays(LABEL_ENERGIES, peak().values).on_grid()
    assert unknown.values == pytest.approx(gaussian(MODEL_GRID.energies, -3.0, math.hypot(0.1, 0.2)), abs=1e-12)
    assert "unknown" in unknown.provenance["steps"][-1]


def test_on_grid_twice_changes_nothing() -> None:
    once = peak().on_grid()
    assert once.on_grid() is once


def test_edges_do_not_bend_and_lose_one_extra_sigma() -> None:
    energies = np.arange(-6.0, 2.0001, 0.05)
    target = TargetDOS.from_arrays(energies, np.full(energies.size, 3.0), sigma=0.1).on_grid()
    inside = MODEL_GRID.energies[target.known]
    extra = math.sqrt(0.2**2 - 0.1**2)
    assert target.values[target.known] == pytest.approx(3.0)
    assert inside[0] - extra == pytest.approx(-6.0, abs=0.1)
    assert inside[-1] + extra == pytest.approx(2.0, abs=0.1)
    assert inside[0] >= -6.0 + extra - 0.01
    assert inside[-1] <= 2.0 - extra + 0.01


def test_unknown_hole_does_not_leak_into_its_neighbours() -> None:
    hole = abs(LABEL_ENERGIES + 4.0) < 1.0
    values = np.where(hole, math.nan, 2.0)
    target = TargetDOS.from_arrays(LABEL_ENERGIES, values, known=~hole, sigma=0.1).on_grid()
    assert not target.known[abs(MODEL_GRID.energies + 4.0) < 0.9].any()
    assert target.known[abs(MODEL_GRID.energies + 4.0) > 1.2].all()
    assert target.values[target.known] == pytest.approx(2.0)


def test_resample_widens_by_the_closed_form_and_keeps_leading_axes() -> None:
    grid, everywhere = EnergyGrid(-12.0, 8.0, 0.05), np.ones(401, dtype=bool)
    values = np.stack([gaussian(LABEL_ENERGIES, c, 0.1) for c in (-5.0, -3.0, 1.0)]).reshape(3, 1, 401)
    wide, known = resample(LABEL_ENERGIES, values, np.broadcast_to(everywhere, values.shape), 0.1, grid, 0.2)
    assert wide.shape == known.shape == (3, 1, 401)
    assert wide[1, 0] == pytest.approx(gaussian(LABEL_ENERGIES, -3.0, 0.2), abs=1e-12)
    assert wide[1, 0, 40:341:2] == pytest.approx(peak().on_grid().values, abs=1e-12)
    flat, known = resample(LABEL_ENERGIES, np.ones(401), everywhere, 0.1, grid, 0.2)
    assert flat[known] == pytest.approx(1.0)
    same, _ = resample(LABEL_ENERGIES, values, np.broadcast_to(everywhere, values.shape), 0.2, grid, 0.2)
    assert same == pytest.approx(values, abs=1e-12)


def test_resample_equals_on_grid_row_by_row() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((4, 401))
    known = np.array([8.0, 5.0, 3.0, -1.0])[:, None] >= LABEL_ENERGIES
    onto, mask = resample(LABEL_ENERGIES, values, known, 0.1)
    for i in range(4):
        single = TargetDOS.from_arrays(LABEL_ENERGIES, values[i], known=known[i], sigma=0.1).on_grid()
        assert onto[i] == pytest.approx(single.values, abs=1e-12)
        assert (mask[i] == single.known).all()


# -- window, shift, figures --------------------------------------------------------------------------------------------


def test_window_shift_and_moments() -> None:
    two = TargetDOS.from_arrays(
        LABEL_ENERGIES, gaussian(LABEL_ENERGIES, -4.0, 0.2, 3.0) + gaussian(LABEL_ENERGIES, 2.0, 0.2), sigma=0.2
    )
    assert two.total_states() == pytest.approx(4.0)
    assert two.total_states(-10.0, 0.0) == pytest.approx(3.0)
    assert two.band_centre() == pytest.approx(-4.0)
    assert two.band_centre(-10.0, 8.0) == pytest.approx(-2.5)
    assert two.window(0.0, 5.0).total_states() == pytest.approx(1.0)
    assert math.isnan(TargetDOS.from_arrays([-2.0, -1.0, 1.0], [0.0, 0.0, 1.0]).band_centre(-3.0, -1.0))
    assert two.shift(1.0).band_centre() == pytest.approx(-3.0)
    flat = TargetDOS.from_arrays([0.0, 1.0, 2.0], [1.0, 1.0, 1.0])
    assert flat.total_states(0.25, 1.5) == pytest.approx(1.25)


def test_peaks_hold_height_times_width() -> None:
    sketch = TargetDOS.from_peaks([(-2.0, 3.0, 0.3), (1.0, 1.0, 0.5)])
    assert sketch.total_states() == pytest.approx((0.9 + 0.5) * math.sqrt(2 * math.pi))
    assert sketch.values[np.argmin(abs(sketch.energies + 2.0))] == pytest.approx(3.0, abs=1e-2)
    assert sketch.sigma == MODEL_SIGMA
    assert sketch.on_grid().known.all()
    windowed = TargetDOS.from_peaks([(-0.65, 8.0, 0.25)], window=(-2.0, 0.5)).on_grid()
    inside = MODEL_GRID.energies[windowed.known]
    assert inside[[0, -1]] == pytest.approx([-2.0, 0.5], abs=0.051)


@pytest.mark.parametrize("width", [0.05, 0.2, 0.3, 1.5])
def test_a_sketch_asks_for_the_peak_as_drawn(width: float) -> None:
    """A DOS with just that peak at the model's broadening is at distance 0, a narrower or wider one is not."""

    def made(sigma: float) -> TargetDOS:  # what a model or DFT gives: on the model's grid, at its broadening
        values = np.exp(-0.5 * ((MODEL_GRID.energies + 1.0) / sigma) ** 2) / sigma
        return TargetDOS(MODEL_GRID.energies, values, np.full(values.shape, True), "fermi", MODEL_SIGMA)

    drawn = max(width, MODEL_SIGMA)
    sketch = TargetDOS.from_peaks([(-1.0, 1 / width, width)])
    assert normalised_l1(made(drawn), sketch) < 0.01
    assert normalised_l1(made(1.5 * drawn), sketch) > 0.2
    assert normalised_l1(made(drawn / 1.5), sketch) > 0.2
    beside = TargetDOS.from_peaks([(-1.0, 1 / width, width), (4.9, 30.0, 0.02)])  # a needle widens itself alone
    assert normalised_l1(made(drawn), beside, window=(-10.0, 3.5)) < 0.01


# -- sites and total ---------------------------------------------------------------------------------------------------


def test_sites_are_scaled_where_they_cover_enough() -> None:
    energies = np.arange(5.0)
    sites = np.array([[1.0, 3.0, 0.2, 0.0, 1.0], [1.0, 0.6, 0.2, 0.0, 1.0]])
    total = np.array([2.5, 4.0, 1.0, 5e-4, 2.0])
    scaled, known = scale_sites_to_total(sites, total, energies=energies, e_max=3.5)
    assert known.tolist() == [True, True, False, True, False]  # covered, covered, 40 % covered, a gap, above e_max
    assert scaled[:, known].sum(axis=0) == pytest.approx([2.5, 4.0, 0.0])
    assert scaled[0, 1] == pytest.approx(4.0 * 3.0 / 3.6)
    assert (scaled[:, ~known] == 0).all()
    _, paw = scale_sites_to_total(sites, total, energies=energies, min_coverage=0.0)
    assert paw.all()


# -- distances ---------------------------------------------------------------------------------------------------------


def test_distances_in_closed_form() -> None:
    a, b = peak(-6.0), peak(-3.0)
    assert normalised_l1(a, a) == 0.0
    assert normalised_l1(a, b) == pytest.approx(2.0, abs=1e-9)
    assert normalised_l1(peak(states=3.0), peak(states=2.0)) == pytest.approx(0.5)
    assert wasserstein(a, b) == pytest.approx(3.0)
    assert wasserstein(peak(states=3.0), peak(states=2.0)) == pytest.approx(0.0, abs=1e-9)
    assert band_centre_difference(a, b) == pytest.approx(-3.0)
    assert mae(peak(states=3.0), peak(states=2.0)) == pytest.approx(1.0 / 0.1 / 151)
    # Gaussians a distance d apart overlap by r = exp(-d^2 / 4 sigma^2); Tanimoto is r / (2 - r).
    r = math.exp(-(0.3**2) / (4 * 0.2**2))
    assert fingerprint_similarity(peak(-3.3), peak(-3.0)) == pytest.approx(r / (2 - r))
    assert fingerprint_similarity(peak(states=5.0), peak()) == pytest.approx(1.0)


def test_distances_see_only_what_both_know() -> None:
    wrong_above = TargetDOS.from_arrays(LABEL_ENERGIES, peak().values + (LABEL_ENERGIES > 0.0) * 9.0, sigma=0.1)
    assert normalised_l1(wrong_above, peak()) > 1.0
    assert normalised_l1(wrong_above.window(-10.0, -1.0), peak()) == pytest.approx(0.0, abs=1e-12)
    assert normalised_l1(wrong_above, peak(), window=(-10.0, -1.0)) == pytest.approx(0.0, abs=1e-6)
    # Of two equal peaks only one lies near the gap; the other is wrong by a factor of two.
    target = TargetDOS.from_peaks([(-6.0, 1.0, 0.3), (0.0, 1.0, 0.3)])
    wrong_below = TargetDOS.from_peaks([(-6.0, 2.0, 0.3), (0.0, 1.0, 0.3)])
    assert normalised_l1(wrong_below, target) == pytest.approx(0.5)
    assert normalised_l1(wrong_below, target, window=NEAR_GAP) == pytest.approx(0.0, abs=1e-9)


def test_broader_target_sets_the_broadening_of_both() -> None:
    assert normalised_l1(peak(sigma=0.1), peak(sigma=0.4)) < 0.02


def test_empty_targets_give_nan() -> None:
    zero = TargetDOS.from_arrays(LABEL_ENERGIES, np.zeros(401), sigma=0.1)
    for distance in (normalised_l1, wasserstein, fingerprint_similarity, band_centre_difference):
        assert math.isnan(distance(peak(), zero))
    assert mae(peak(), zero) == pytest.approx(1.0 / 0.1 / 151)


def test_array_distances_agree_with_loops() -> None:
    rng = np.random.default_rng(1)
    values, target = rng.random((2, 3, 4, 151))
    known = rng.random((3, 4, 151)) > 0.3
    l1, error = normalised_l1_arrays(values, target, known), mae_arrays(values, target, known)
    assert l1.shape == error.shape == (3, 4)
    for index in np.ndindex(3, 4):
        v, t = values[index][known[index]], target[index][known[index]]
        assert l1[index] == pytest.approx(abs(v - t).sum() / t.sum())
        assert error[index] == pytest.approx(abs(v - t).mean())
    shared = normalised_l1_arrays(values, target[0, 0], known[0, 0])
    assert shared.shape == (3, 4)
    assert np.isnan(normalised_l1_arrays(values, target, np.zeros_like(known))).all()
    assert np.isnan(mae_arrays(values, target, np.zeros_like(known))).all()


def test_site_and_total_are_not_comparable() -> None:
    with pytest.raises(ValueError, match="site DOS cannot be compared with a total"):
        normalised_l1(peak(), peak(kind="total"))


def test_nothing_known_in_common() -> None:
    with pytest.raises(ValueError, match="no energy is known in both"):
        normalised_l1(peak().window(-10.0, -5.0), peak().window(-1.0, 4.0))


# -- pymatgen ----------------------------------------------------------------------------------------------------------


def complete_dos(gapped: bool = False) -> CompleteDos:
    """Two sites (Ni with d, O with p) on VASP-like energies, E_F at 3 eV; the spheres miss a fifth of the states."""
    structure = Structure(Lattice.cubic(4.2), ["Ni", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    energies = np.linspace(-9.0, 12.0, 2101)
    # Bands: Ni d below E_F, O p deeper, and conduction states, which come close to E_F in the metal.
    lowest = 1.5 if gapped else 0.0
    conduction = np.where((energies > 3.0 + lowest) & (energies < 10.0), 0.5, 0.0)
    ni_d, o_p = gaussian(energies, 1.5, 0.1, 4.0), gaussian(energies, -2.0, 0.1, 3.0)
    pdos = {
        structure[0]: {
            Orbital.dxy: {Spin.up: 0.8 * ni_d, Spin.down: 0.4 * ni_d},
            Orbital.s: {Spin.up: 0.4 * conduction, Spin.down: 0.4 * conduction},
        },
        structure[1]: {Orbital.px: {Spin.up: 0.8 * o_p, Spin.down: 0.8 * o_p}},
    }
    fill = 0.0 if gapped else 0.01
    metal = np.where((energies > 1.0) & (energies < 3.5), fill, 0.0)
    up, down = ni_d + o_p + conduction + metal, 0.5 * ni_d + o_p + conduction + metal
    return CompleteDos(structure, Dos(3.0, energies, {Spin.up: up, Spin.down: down}), pdos)


def test_pymatgen_sites_add_up_to_the_spin_summed_total() -> None:
    dos = complete_dos()
    total = TargetDOS.from_pymatgen(dos)
    sites = [TargetDOS.from_pymatgen(dos, site) for site in (0, 1)]
    assert (total.kind, sites[0].kind, total.reference, total.sigma) == ("total", "site", "fermi", None)
    assert total.energies == pytest.approx(dos.energies - 3.0)
    assert total.total_states() == pytest.approx(np.trapezoid(dos.get_densities(), dos.energies), rel=1e-3)
    both = sites[0].known & sites[1].known
    assert (sites[0].values + sites[1].values)[both] == pytest.approx(total.values[both])
    assert sites[0].total_states(-2.5, -0.5) == pytest.approx(6.0, rel=0.01)
    assert sites[1].total_states(-6.0, -4.0) == pytest.approx(6.0, rel=0.01)
    assert any("sites scaled" in step for step in sites[0].provenance["steps"])


def test_pymatgen_energies_above_the_last_band_are_unknown() -> None:
    total = TargetDOS.from_pymatgen(complete_dos())
    assert total.known[total.energies < 6.9].all()
    assert not total.known[total.energies > 7.01].any()


def test_pymatgen_gap_moves_the_zero_to_the_valence_band() -> None:
    target = TargetDOS.from_pymatgen(complete_dos(gapped=True))
    assert target.reference == "vbm"
    assert target.values[target.energies < 0][-1] >= GAP_DOS > target.values[target.energies > 0.02][0]


def test_pymatgen_tail_of_a_stated_broadening_is_no_part_of_the_band() -> None:
    energies = np.arange(-6.0, 8.0, 0.02)
    edges = [ndtr(sign * (energies - edge) / 0.1) for sign, edge in ((1, -4.0), (-1, 1.0), (1, 4.0))]
    dos = Dos(2.0, energies, {Spin.up: 3 * (edges[0] * edges[1] + edges[2])})
    unstated, stated = (TargetDOS.from_pymatgen(dos, sigma=sigma) for sigma in (None, 0.1))
    assert (unstated.sigma, stated.sigma) == (None, 0.1)
    assert dos.energies[0] - unstated.energies[0] > 1.2  # the zero lies in the tail
    assert dos.energies[0] - stated.energies[0] == pytest.approx(1.0, abs=0.05)


def test_pymatgen_coarse_metal_has_no_gap() -> None:
    metal = Dos(0.1, np.arange(-5.0, 5.0, 0.4), {Spin.up: np.ones(25)})
    assert TargetDOS.from_pymatgen(metal).reference == "fermi"


def test_pymatgen_volume_normalised_dos_returns_to_states_per_ev() -> None:
    dos = complete_dos()
    assert TargetDOS.from_pymatgen(dos.get_normalized()).total_states() == pytest.approx(
        TargetDOS.from_pymatgen(dos).total_states()
    )


def test_pymatgen_pile_in_the_first_energy_is_unknown() -> None:
    energies = np.linspace(-5.0, 5.0, 501)
    values = np.ones(501)
    values[0] = 400.0
    target = TargetDOS.from_pymatgen(Dos(0.0, energies, {Spin.up: values}))
    assert not target.known[0]
    assert target.known[1:].all()


def test_pymatgen_dicts_and_json_files(tmp_path: Path) -> None:
    dos = complete_dos()
    as_dict = json.loads(json.dumps(dos.as_dict(), default=float))
    assert TargetDOS.from_pymatgen(as_dict, 0) == TargetDOS.from_pymatgen(dos, 0)
    assert TargetDOS.from_pymatgen(Dos.as_dict(dos)) == TargetDOS.from_pymatgen(dos)
    path = tmp_path / "dos.json"
    path.write_text(json.dumps(as_dict))
    assert TargetDOS.from_file(path, 1) == TargetDOS.from_pymatgen(dos, 1)
    packed = tmp_path / "dos.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert TargetDOS.from_file(packed, site=1) == TargetDOS.from_pymatgen(dos, 1)


# -- vasprun.xml -------------------------------------------------------------------------------------------------------


def vasprun_with_projections(path: Path) -> None:
    """A real vasprun.xml (NaCl, ISMEAR = 0, SIGMA = 0.1) given s and p projections: Na 0.2, Cl 0.6 of the total."""
    text = (VASP / "vasprun_dfpt.xml").read_text()
    rows = text.split("<dos>")[1].split("<r>")[1:302]
    table = np.array([[float(x) for x in row.split("</r>")[0].split()] for row in rows])
    ions = ""
    for number, share in ((1, 0.2), (2, 0.6)):
        lines = "".join(f"<r> {e:.4f} {0.25 * share * d:.6f} {0.75 * share * d:.6f} </r>\n" for e, d, _ in table)
        ions += f'<set comment="ion {number}"><set comment="spin 1">\n{lines}</set></set>\n'
    partial = (
        '<partial><array><dimension dim="1">gridpoints</dimension><dimension dim="2">spin</dimension>'
        '<dimension dim="3">ion</dimension><field>energy</field><field>s</field><field>px</field>'
        f"<set>{ions}</set></array></partial>"
    )
    path.write_text(text.replace("</dos>", partial + "</dos>"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # pymatgen's remarks on incomplete test files
def test_vasprun_total_and_sites(tmp_path: Path) -> None:
    path = tmp_path / "vasprun.xml"
    vasprun_with_projections(path)
    total = TargetDOS.from_file(path)
    assert (total.reference, total.kind) == ("vbm", "total")
    assert total.sigma == pytest.approx(0.1 / math.sqrt(2))
    assert total.total_states(-10.0, 1.0) == pytest.approx(6.0, abs=1e-3)  # Cl 3p; Na 2s and 2p are in the core
    assert total.known[total.energies < 20.0].all()
    assert not total.known[-1]
    sodium, chlorine = (TargetDOS.from_file(path, site=i) for i in (0, 1))
    assert sodium.values + chlorine.values == pytest.approx(total.values, abs=1e-3)
    assert chlorine.total_states(-10.0, 1.0) == pytest.approx(4.5, abs=1e-3)
    assert chlorine.on_grid().total_states(-10.0, 1.0) == pytest.approx(4.5, abs=0.01)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_vasprun_methfessel_paxton_lobes_are_zeroed_and_named() -> None:
    target = TargetDOS.from_file(VASP / "vasprun_pstress.xml")
    assert target.sigma is None
    assert target.provenance["steps"][0].startswith("negative values down to -0.14")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("cut", "site", "message"), [(30000, None, "not a complete vasprun"), (-1, 0, "LORBIT")])
def test_vasprun_errors(tmp_path: Path, cut: int, site: int | None, message: str) -> None:
    path = tmp_path / "vasprun.xml"
    path.write_text((VASP / "vasprun_dfpt.xml").read_text()[:cut])
    with pytest.raises(ValueError, match=message):
        TargetDOS.from_file(path, site)


# -- ASE ---------------------------------------------------------------------------------------------------------------


def test_ase_grid_data() -> None:
    data = GridDOSData(LABEL_ENERGIES + 2.0, gaussian(LABEL_ENERGIES, -3.0, 0.1))
    target = TargetDOS.from_ase(data, sigma=0.1, efermi=2.0)
    assert target.energies == pytest.approx(LABEL_ENERGIES, abs=1e-9)
    assert target.on_grid().values == pytest.approx(gaussian(MODEL_GRID.energies, -3.0, 0.2), abs=1e-9)
    assert TargetDOS.from_ase(data).sigma is None


def test_ase_raw_data_become_gaussians_known_up_to_the_last_state() -> None:
    raw = RawDOSData([1.0, -3.0, -3.0], [0.5, 2.0, 1.0])
    target = TargetDOS.from_ase(raw, sigma=0.15)
    expected = gaussian(target.energies, -3.0, 0.15, 3.0) + gaussian(target.energies, 1.0, 0.15, 0.5)
    assert target.values == pytest.approx(expected, abs=1e-9)
    assert target.sigma == 0.15
    assert target.energies[[0, -1]] == pytest.approx([-3.75, 1.0])


def rows_of(kind: str) -> list[Any]:
    infos = [{"index": "0", "l": "s"}, {"index": "0", "l": "d"}, {"index": "1", "l": "s"}]
    weights = [np.full(401, w) for w in (0.5, 1.5, 2.0)]
    if kind == "raw":
        return [RawDOSData([-3.0, 4.0], [w[0], w[0]], info) for w, info in zip(weights, infos, strict=True)]
    return [GridDOSData(LABEL_ENERGIES, w, info) for w, info in zip(weights, infos, strict=True)]


def test_ase_grid_collection() -> None:
    rows = rows_of("grid")
    raw_site = TargetDOS.from_ase(GridDOSCollection(rows), 0)
    assert raw_site.values == pytest.approx(2.0)
    assert "raw projection" in raw_site.provenance["steps"][0]
    assert TargetDOS.from_ase(GridDOSCollection(rows)).values == pytest.approx(4.0)
    with_total = GridDOSCollection([*rows, GridDOSData(LABEL_ENERGIES, np.full(401, 6.0), {"label": "Total"})])
    assert TargetDOS.from_ase(with_total).values == pytest.approx(6.0)
    assert TargetDOS.from_ase(with_total, 0).values == pytest.approx(3.0)
    assert TargetDOS.from_ase(with_total, 1).kind == "site"
    up, down = {"label": "Total", "spin": "up"}, {"label": "Total", "spin": "down"}
    spins = [GridDOSData(LABEL_ENERGIES, np.full(401, 4.0), up), GridDOSData(LABEL_ENERGIES, np.full(401, 2.0), down)]
    assert TargetDOS.from_ase(GridDOSCollection(spins)).values == pytest.approx(6.0)
    assert TargetDOS.from_ase(GridDOSCollection([*rows, *spins]), 0).values == pytest.approx(3.0)
    unnamed = GridDOSCollection([GridDOSData(LABEL_ENERGIES, np.full(401, w)) for w in (1.0, 2.0)])
    assert TargetDOS.from_ase(unnamed, 1).values == pytest.approx(2.0)


def test_ase_raw_collection() -> None:
    collection = RawDOSCollection(rows_of("raw"))
    site = TargetDOS.from_ase(collection, 1)
    assert site.sigma == MODEL_SIGMA
    assert site.total_states(-5.0, 0.0) == pytest.approx(2.0, rel=1e-6)
    assert TargetDOS.from_ase(collection).total_states(-5.0, 0.0) == pytest.approx(4.0, rel=1e-6)


class OneBand:
    """A calculator, as far as ase.dft.dos.DOS is concerned: levels at -2 and 1 eV, Fermi level 5 eV."""

    def get_k_point_weights(self) -> Array:
        return np.array([1.0])

    def get_number_of_spins(self) -> int:
        return 1

    def get_eigenvalues(self, kpt: int, spin: int) -> Array:
        return np.array([3.0, 6.0])

    def get_fermi_level(self) -> float:
        return 5.0


def test_ase_dft_dos_width_is_sqrt2_sigma() -> None:
    target = TargetDOS.from_ase(DOS(OneBand(), width=0.2, npts=801))
    assert target.sigma == pytest.approx(0.2 / math.sqrt(2))
    assert target.kind == "total"
    expected = gaussian(target.energies, -2.0, target.sigma, 2.0) + gaussian(target.energies, 1.0, target.sigma, 2.0)
    assert target.values[target.known] == pytest.approx(expected[target.known], abs=1e-9)
    assert target.energies[target.known][-1] == pytest.approx(1.0, abs=0.01)
    assert target.on_grid().values[:85] == pytest.approx(gaussian(MODEL_GRID.energies[:85], -2.0, 0.2, 2.0), abs=1e-3)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "# comment\n-1 0.5\n0 1.0\n1 nan\n",
        "energy,dos\n-1,0.5\n0,1.0\n1,nan\n",
        "\ufeffE (eV); DOS\n\n-1; 0.5\n0; 1.0\n1; NaN\n",
        "@ title\n-1\t5e-1\n0\t1.0\n1\tnan",
    ],
)
def test_text_forms(tmp_path: Path, text: str) -> None:
    path = tmp_path / "dos.dat"
    path.write_text(text, encoding="utf-8")
    target = TargetDOS.from_file(path)
    assert target == TargetDOS.from_text(path)
    assert target.energies.tolist() == [-1.0, 0.0, 1.0]
    assert target.values.tolist() == [0.5, 1.0, 0.0]
    assert target.known.tolist() == [True, True, False]


def test_text_columns_and_stated_facts(tmp_path: Path) -> None:
    path = tmp_path / "dos.dat"
    path.write_text("-1 9 0.5\n0 9 1.0\n")
    assert TargetDOS.from_text(path, columns=(0, 2)).values.tolist() == [0.5, 1.0]
    path.write_text("-1 0.5\n0 1.0\n")
    target = TargetDOS.from_file(path, sigma=0.3, reference="vbm", kind="total")
    assert (target.sigma, target.reference, target.kind) == (0.3, "vbm", "total")


def test_own_json(tmp_path: Path) -> None:
    path = tmp_path / "target.json"
    path.write_text(json.dumps(peak().to_dict()))
    assert TargetDOS.from_file(path) == peak()


def test_nickel_in_au3ni() -> None:
    path = DATA / "ni_in_au3ni.npz"
    nickel = TargetDOS.from_file(path, site=3)
    assert (nickel.kind, nickel.reference, nickel.sigma) == ("site", "fermi", 0.1)
    model = nickel.on_grid()
    assert model.energies[model.values.argmax()] == pytest.approx(-0.65, abs=0.1)
    assert nickel.total_states(-12.0, 0.0) == pytest.approx(10.0, abs=0.5)  # 3d8 4s2
    total = TargetDOS.from_file(path)
    sites = [TargetDOS.from_file(path, site=i) for i in range(4)]
    known = nickel.known
    assert sum(s.values for s in sites)[known] == pytest.approx(total.values[known], abs=1e-4)
    assert total.total_states(-12.0, 0.0) == pytest.approx(43.0, abs=0.1)  # 3 x 11 + 10 electrons


# -- hostile input -----------------------------------------------------------------------------------------------------

E, V = [0.0, 1.0, 2.0], [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("energies", "values", "options", "error", "message"),
    [
        (E, [1, math.nan, 1], {}, ValueError, "pass known=False"),
        (E, [1, math.inf, 1], {}, ValueError, "NaN or infinite"),
        (E, [1, math.nan, 1], {"known": [True, True, False]}, ValueError, "NaN or infinite"),
        ([], [], {}, ValueError, "at least 2 energies"),
        ([0.0], [1.0], {}, ValueError, "at least 2 energies"),
        (E, [1, -1, 1], {}, ValueError, "must not be negative"),
        ([0, 2, 1], V, {}, ValueError, "strictly increasing"),
        ([0, 1, 1], V, {}, ValueError, "strictly increasing"),
        ([2, 1, 0], V, {}, ValueError, "strictly increasing"),
        ([0, math.nan, 2], V, {}, ValueError, "energies must be finite"),
        (E, V[:2], {}, ValueError, "one common length"),
        (E, V, {"known": [True]}, ValueError, "one common length"),
        (E, [V], {}, ValueError, r"shape \(G,\)"),
        (E, [[1], [1, 2], 3], {}, ValueError, "ragged"),
        (E, [1j, 1, 1], {}, TypeError, "real numbers, not complex128"),
        (E, ["a", "b", "c"], {}, TypeError, "real numbers"),
        (E, None, {}, TypeError, "real numbers"),
        (E, V, {"known": [False] * 3}, ValueError, "nothing is known"),
        (E, V, {"known": [1, 0, 1]}, TypeError, "array of bool"),
        (E, V, {"reference": "vacuum"}, ValueError, "reference must be"),
        (E, V, {"kind": "orbital"}, ValueError, "kind must be"),
        (E, V, {"sigma": -0.1}, ValueError, "sigma must be"),
        (E, V, {"sigma": math.nan}, ValueError, "sigma must be"),
    ],
)
def test_hostile_arrays(
    energies: Any, values: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        TargetDOS.from_arrays(energies, values, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: peak().window(20.0, 30.0), ValueError, "holds no known energy"),
        (lambda: peak().window(1.0, 1.0), ValueError, "needs lo < hi"),
        (lambda: peak().window(math.nan, 1.0), ValueError, "needs lo < hi"),
        (lambda: peak().total_states(0.0, -5.0), ValueError, "needs lo < hi"),
        (lambda: peak().band_centre(0.0, -5.0), ValueError, "needs lo < hi"),
        (lambda: peak().scaled(electrons=4, lo=0.0, hi=-10.0), ValueError, "needs lo < hi"),
        (lambda: band_centre_difference(peak(), peak(), lo=0.0, hi=-10.0), ValueError, "needs lo < hi"),
        (lambda: normalised_l1(peak(), peak(), window=(2.0, -2.0)), ValueError, "needs lo < hi"),
        (lambda: peak().shift(100.0).on_grid(), ValueError, "falls on the grid"),
        (lambda: peak().window(-3.1, -2.9).on_grid(), ValueError, "too narrow for sigma 0.2 eV .* widen the window"),
        (lambda: peak(sigma=0.3).window(-3.06, -3.04).on_grid(), ValueError, "too narrow for sigma"),
        (lambda: peak().on_grid(MODEL_GRID, 0.05), ValueError, "take a smaller step"),
        (lambda: peak().shift(math.nan), ValueError, "energies must be finite"),
        (lambda: TargetDOS.from_dict({"energies": E}), ValueError, 'needs "energies" and "values"'),
        (lambda: TargetDOS.from_dict({"energies": E, "values": V, "refrence": "vbm"}), ValueError, "'refrence'"),
        (lambda: TargetDOS.from_dict({"energies": E, "values": V, "efermi": 5.1}), ValueError, "unknown fields"),
        (lambda: TargetDOS(*map(np.array, (E, V, [True] * 3)), provenance={"a": {1}}), ValueError, "JSON-able"),
        (lambda: TargetDOS.from_peaks([]), ValueError, "triples"),
        (lambda: TargetDOS.from_peaks([(0, 1)]), ValueError, "triples"),
        (lambda: TargetDOS.from_peaks([(0, 1), (0, 1, 2)]), ValueError, "triples"),
        (lambda: TargetDOS.from_peaks([(0, -1, 0.1)]), ValueError, "above 0"),
        (lambda: TargetDOS.from_peaks([(0, 1, 0)]), ValueError, "above 0"),
        (lambda: TargetDOS.from_peaks([(math.nan, 1, 1)]), ValueError, "finite"),
        (lambda: TargetDOS.from_peaks([(3, 1, 0.2)], window=(-1, 1)), ValueError, "lies outside"),
        (lambda: TargetDOS.from_peaks([(0, 1, 0.2)], window=(1, -1)), ValueError, "lo < hi"),
        (lambda: TargetDOS.from_pymatgen(complete_dos(), 2), ValueError, "site 2 does not exist: there are 2"),
        (lambda: TargetDOS.from_pymatgen(complete_dos(), -1), ValueError, "site -1 does not exist"),
        (lambda: TargetDOS.from_pymatgen(complete_dos(), 0.0), TypeError, "site must be an int"),
        (lambda: TargetDOS.from_pymatgen(Dos(0, E, {Spin.up: V}), 0), ValueError, "no site projections"),
        (lambda: TargetDOS.from_pymatgen(Dos(0, E, {Spin.up: [0, 0, 0]})), ValueError, "zero everywhere"),
        (lambda: TargetDOS.from_pymatgen({"energies": E}), ValueError, "not a pymatgen Dos"),
        (lambda: TargetDOS.from_pymatgen([1, 2]), TypeError, "not list"),
        (lambda: TargetDOS.from_ase("dos"), TypeError, "not str"),
        (lambda: TargetDOS.from_ase(GridDOSData(E, V), 0), ValueError, "leave out site"),
        (lambda: TargetDOS.from_ase(RawDOSData([], [])), ValueError, "at least one state"),
        (lambda: TargetDOS.from_ase(RawDOSData([-1e6, 0], [1, 1]), sigma=1e-3), ValueError, "larger sigma"),
        (lambda: TargetDOS.from_ase(RawDOSData([math.nan, 0], [1, 1])), ValueError, "finite energies"),
        (lambda: TargetDOS.from_ase(RawDOSData([-1, 0], [1, 1]), sigma=math.nan), ValueError, "sigma > 0"),
        (lambda: TargetDOS.from_ase(RawDOSCollection([])), ValueError, "empty"),
        (lambda: TargetDOS.from_ase(GridDOSCollection(rows_of("grid")), 2), ValueError, "site 2 does not exist"),
        (
            lambda: TargetDOS.from_ase(DOSCollection([*rows_of("raw"), *rows_of("grid")])),
            ValueError,
            "mixes raw and grid",
        ),
        (lambda: TargetDOS.from_file("no/such/file"), FileNotFoundError, "no file no/such/file"),
        (lambda: TargetDOS.from_vasprun("no/such/file"), FileNotFoundError, "no file"),
        (lambda: TargetDOS.from_file(DATA), FileNotFoundError, "is a folder, not a file"),
        (lambda: TargetDOS.from_file(DATA / "ni_in_au3ni.npz", 4), ValueError, "there are 4, numbered from 0"),
    ],
)
def test_hostile_calls(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "site", "message"),
    [
        (b"", None, "is empty"),
        (b"   \n", None, "is empty"),
        (b"energy dos\n", None, "holds no numbers"),
        (b"0 1\n1 x\n", None, "line 2: expected numbers"),
        (b"0 1 2\n", None, "line 1: 3 columns"),
        (b"0\n1\n", None, "line 1: 1 column;"),
        (b"0 1\n0 1\n", None, "lines 1 and 2: the energy 0 eV is there twice"),
        (b"0 1\n1 -1\n", None, "must not be negative"),
        (b"0 1\n1 1\n", 0, "leave out site"),
        (b"\xff\xfe\x00\x01", None, "holds no numbers"),
        (b"{not json", None, "not valid JSON"),
        (b'{"a": 1}', None, 'needs "energies"'),
        (b'{"energies": [0, 1], "values": [1]}', None, "one common length"),
        (b'{"energies": [0, 1], "values": [1, 1]}', 0, "leave out site"),
        (b'{"densities": {}}', None, "not a pymatgen Dos"),
        (b'{"densities": [1], "efermi": 0, "energies": [0]}', None, "must be a dict of spins"),
        (
            b'{"densities": {"1": [1]}, "efermi": 0, "energies": [0], "pdos": [1], "structure": {}}',
            0,
            "must be the dict of a Structure",
        ),
        (b'{"result": null}', None, 'needs "energies"'),
        (b'{"result": 3}', 0, "leave out site"),
        (b'{"result": ["sites", "total"]}', None, 'needs "energies"'),
        (b'{"sites": 5, "total": {}}', 0, '"sites" must be a list'),
        (b'{"sites": {"a": 1}, "total": {}}', 0, '"sites" must be a list'),
        (b'{"sites": [null], "total": null}', 0, "DOS of site 0 is unknown there"),
        (b"<html></html>", None, "not a complete vasprun"),
        (b"PK\x03\x04 broken", None, "not an .npz"),
        (b"\x1f\x8b broken", None, "damaged gzip"),
    ],
)
def test_hostile_files(tmp_path: Path, content: bytes, site: int | None, message: str) -> None:
    path = tmp_path / "dos"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        TargetDOS.from_file(path, site)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sum_over_sites() -> None:
    x = np.linspace(-5, 5, 11)
    one = TargetDOS.from_arrays(x, np.full(11, 1.0), sigma=0.1)
    two = TargetDOS.from_arrays(x, np.full(11, 2.5), known=x < 3, sigma=0.1)
    total = TargetDOS.sum_of([one, two])
    assert total.kind == "total"
    np.testing.assert_allclose(total.values[x < 3], 3.5)
    np.testing.assert_array_equal(total.known, x < 3)
    for others in ([], [one, TargetDOS.from_arrays(x + 1, one.values, sigma=0.1)], [one, replace(one, sigma=0.2)]):
        with pytest.raises(ValueError, match="a sum needs"):
            TargetDOS.sum_of(others)
    with pytest.raises(ValueError, match=r"that of \[1\] is unknown"):
        TargetDOS.sum_of([one, None])  # type: ignore[list-item]


def test_a_fine_grid_without_further_broadening_is_taken_in_pieces() -> None:
    energies = np.linspace(-10.0, 5.0, 1501)
    dos = TargetDOS.from_arrays(energies, 1 + np.sin(energies), sigma=0.2, kind="site", reference="fermi")
    fine = EnergyGrid(-10, 5, 0.001)  # more than one piece
    assert fine.size > PIECE
    once = dos.on_grid(fine, 0.2)
    assert once.known.all()
    np.testing.assert_allclose(once.values, np.interp(fine.energies, energies, dos.values), atol=1e-12)
