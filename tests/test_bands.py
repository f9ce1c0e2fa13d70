"""Bands along paths, from a tight-binding model with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.spectrum.band_structure import BandStructure

from dosmatgen_ase.forward.bands import predict_bands, predict_levels, pymatgen_bands
from dosmatgen_ase.forward.predictor import DOSPredictor, PredictorConfig
from dosmatgen_ase.forward.tight_binding.basis import start_levels
from dosmatgen_ase.forward.tight_binding.model import TightBinding, TightBindingConfig
from dosmatgen_ase.plotting import plot_bands


def random_model() -> TightBinding:
    """A tight-binding model of random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        levels = torch.tensor(start_levels(np.tile([-6.0, -2.0, -1.0], (95, 1))))
        model = TightBinding(TightBindingConfig(width=16, hidden=16, site_hidden=16), levels)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def predictor() -> DOSPredictor:
    torch.set_num_threads(1)
    tables = {"baseline": torch.ones(95, 151), "support": torch.full((95, 151), 9, dtype=torch.int16)}
    return DOSPredictor(PredictorConfig(members=0), tables, {}, [random_model()])


def test_bands_have_the_symmetry_of_the_crystal_and_join_at_special_points(predictor: DOSPredictor) -> None:
    atoms = bulk("Cu")
    bands = predict_bands(atoms, "GXG", npoints=41, predictor=predictor)
    assert bands.energies.shape == (1, 41, 9)
    assert bands.path.path == "GXG"
    np.testing.assert_allclose(bands.energies[0, 0], bands.energies[0, -1], atol=1e-4)
    gamma = bands.energies[0, 0]
    assert (np.diff(gamma) < 1e-4).sum() == 2 + 2 + 1  # s, p threefold, d three- and twofold
    assert np.ptp(bands.energies[0], axis=0).max() > 0.05
    assert predict_bands(bulk("Fe"), "GH", npoints=3, predictor=predictor).energies.shape[0] == 2


def test_electrons_fill_the_bands_below_zero_of_an_insulator(predictor: DOSPredictor) -> None:
    atoms = bulk("MgO", "rocksalt", a=5.5)
    bands = predict_bands(atoms, npoints=60, predictor=predictor)
    below = (bands.energies[0] < 0.1).sum(axis=1)
    (prediction,) = predictor.predict_arrays([atoms])
    assert prediction.gap > 0.5
    assert (below == 4).all()  # eight electrons
    assert bands.energies[0, :, 3].max() == pytest.approx(0, abs=1e-5)


def test_pymatgen_draws_the_same_bands(predictor: DOSPredictor) -> None:
    atoms = bulk("MgO", "rocksalt", a=5.5)
    bands = predict_bands(atoms, "GXWKGL,UX", npoints=60, predictor=predictor)
    line = pymatgen_bands(bands, atoms)
    assert line.nb_bands == bands.energies.shape[2]
    assert not line.is_metal()
    names = {point.label for point in line.kpoints if point.label}
    assert names == {"\\Gamma", "X", "W", "K", "L", "U"}


@pytest.mark.parametrize("num_spins", [1, 2])
def test_pymatgen_sees_the_gap_whatever_rounding_does_to_zero(num_spins: int) -> None:
    """Zero is the valence-band maximum, and so may lie a hair inside of the valence band."""
    atoms = bulk("MgO", "rocksalt", a=5.5)
    path = atoms.cell.bandpath("GX", npoints=3)
    one = np.array([[-5.0, -0.4, 3.0], [-5.0, -0.2, 2.0], [-5.0, 1e-6, 2.5]])
    line = pymatgen_bands(BandStructure(path, np.array([one, one - 0.1][:num_spins]), 0.0), atoms)
    assert line.efermi == pytest.approx(1.0 if num_spins == 1 else 0.95)
    assert line.get_band_gap()["energy"] == pytest.approx(2 * line.efermi, abs=1e-5)
    one[0, 1] = 0.5
    assert pymatgen_bands(BandStructure(path, np.array([one] * num_spins), 0.0), atoms).efermi == 0.0


def test_a_drawn_band_ends_where_its_path_breaks(predictor: DOSPredictor, tmp_path: Path) -> None:
    bands = predict_bands(bulk("Fe"), "GHN,PG", npoints=40, predictor=predictor)
    ax = plot_bands(bands, tmp_path / "bands.png")
    pieces = [line.get_xydata() for line in ax.lines if len(line.get_xydata()) > 2]
    assert len(pieces) == 2 * 2 * bands.energies.shape[2]  # two spins, two pieces
    assert sum(map(len, pieces)) == bands.energies.size
    np.testing.assert_allclose(pieces[0][:, 1], bands.energies[0, : len(pieces[0]), 0])
    assert all((np.diff(piece[:, 0]) > 0).all() for piece in pieces)  # no upright line
    assert (tmp_path / "bands.png").stat().st_size > 5_000


def test_zero_of_a_drawing_is_the_reference_of_the_bands(predictor: DOSPredictor) -> None:
    bands = predict_bands(bulk("Cu"), "GX", npoints=5, predictor=predictor)
    moved = BandStructure(bands.path, bands.energies + 7.0, reference=7.0)
    plain, drawn = ([line.get_ydata() for line in plot_bands(some).lines] for some in (bands, moved))
    for one, other in zip(plain, drawn, strict=True):  # the dotted line at zero is among them
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_levels_at_given_points_are_those_of_the_path(predictor: DOSPredictor) -> None:
    bands = predict_bands(bulk("Fe"), "GHN", npoints=40, predictor=predictor)
    levels = predict_levels(bulk("Fe"), bands.path.kpts, predictor=predictor)
    np.testing.assert_array_equal(levels, bands.energies)
    assert levels.shape[0] == 2
    for wrong in ([0, 0, 0], np.zeros((0, 3)), [[0, 0, np.nan]], [[0, 0]]):
        with pytest.raises(ValueError, match=r"must be finite numbers of shape \(k, 3\)"):
            predict_levels(bulk("Fe"), wrong, predictor=predictor)


def test_bad_requests_are_told(predictor: DOSPredictor) -> None:
    with pytest.raises(ValueError, match="no bands for Cu: it has collapsed"):
        predict_bands(bulk("Cu", a=0.5), predictor=predictor)
    with pytest.raises(ValueError, match="path='GQ9' is not a path"):
        predict_bands(bulk("Cu"), "GQ9", predictor=predictor)
    for path in ("", "GX,"):
        with pytest.raises(ValueError, match=f"path='{path}' is not a path .* a piece of it is empty"):
            predict_bands(bulk("Cu"), path, predictor=predictor)
    support = predictor.tables["support"].clone()
    support[57] = 2
    few = DOSPredictor(predictor.config, {**predictor.tables, "support": support}, {}, predictor.tight_binding)
    with pytest.raises(ValueError, match="no bands for LaN: fewer than 3 labelled structures hold La"):
        predict_bands(bulk("LaN", "rocksalt", a=5.3), predictor=few)
    with pytest.raises(ValueError, match="no bands for La: fewer than 3"):
        predict_levels(bulk("La", "fcc", a=5.3), [[0, 0, 0]], predictor=few)
    with pytest.raises(ValueError, match="no bands for La: it has collapsed"):
        predict_bands(bulk("La", "fcc", a=1.0), predictor=few)
    tables = {**predictor.tables, "input_mean": torch.zeros(536), "input_std": torch.ones(536)}
    networks = DOSPredictor(PredictorConfig(hidden=4, depth=1, members=1), tables, {})
    with pytest.raises(ValueError, match="need a tight-binding model"):
        predict_bands(bulk("Cu"), predictor=networks)


def test_a_band_structure_can_be_written(predictor: DOSPredictor, tmp_path: Path) -> None:
    from ase.io.jsonio import read_json

    bands = predict_bands(bulk("Cu"), "GX", npoints=5, predictor=predictor)
    bands.write(tmp_path / "bands.json")
    np.testing.assert_allclose(read_json(tmp_path / "bands.json").energies, bands.energies)
