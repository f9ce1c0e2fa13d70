"""Bands that a label keeps: which are kept, how a shard holds them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk
from hypothesis import given
from hypothesis import strategies as st
from test_data import gaussian, write_shard

from dosmatgen_ase.data import MeshBands, load_bands
from dosmatgen_ase.data.bands import BAND_UNIT, pack_bands, unpack_bands
from dosmatgen_ase.dft.bands import Bands, broadened_dos, kept_bands
from dosmatgen_ase.dft.errors import ElectronicStructureError
from dosmatgen_ase.dft.interpolation import IrreducibleMesh


def bands_of(seed: int, spins: int = 1, levels: int = 5, density: float = 1.0) -> MeshBands:
    """Random levels of copper."""
    generator = np.random.default_rng(seed)
    mesh = IrreducibleMesh.of(bulk("Cu"), density)
    energies = np.sort(generator.uniform(-12, 8, (spins, len(mesh.points), levels)))
    points = np.rint(mesh.points * mesh.size).astype(int)
    counts = np.rint(mesh.weights * mesh.size.prod()).astype(int)
    return MeshBands(np.round(energies, 3), mesh.size, points, counts, 2, "fermi", 9.5, 11.0)


def same(one: MeshBands | None, other: MeshBands | None) -> bool:
    if one is None or other is None:
        return one is other
    np.testing.assert_allclose(one.energies, other.energies, atol=BAND_UNIT / 2)
    for name in ("mesh", "points", "counts"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (one.below, one.reference) == (other.below, other.reference)
    assert (one.fermi_level, one.num_electrons) == pytest.approx((other.fermi_level, other.num_electrons))
    return True


@given(kinds=st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=4))
def test_what_is_packed_comes_out_of_the_shard(kinds: list[int]) -> None:
    given = [bands_of(i, spins, 3 + i) if spins else None for i, spins in enumerate(kinds)]
    arrays = pack_bands(given)
    if not any(kinds):
        assert arrays == {}
        return
    n = len(kinds)
    known = {**arrays, "efermi": np.full(n, 9.5), "num_electrons": np.full(n, 11.0)}
    back = unpack_bands(known, np.zeros(n, dtype=bool))
    assert all(same(a, b) for a, b in zip(given, back, strict=True))


def test_bands_survive_json() -> None:
    bands = bands_of(0, spins=2)
    assert same(MeshBands.from_dict(json.loads(json.dumps(bands.to_dict()))), bands)
    assert repr(bands) == "MeshBands(2 spins, 8 of 64 k-points, 5 bands)"


def test_a_flat_band_is_one_gaussian_with_two_electrons() -> None:
    bands = bands_of(0)
    flat = MeshBands(**{**vars(bands), "energies": np.full((1, len(bands.counts), 1), -1.0)})
    grid = np.arange(-3, 1, 0.01)
    dos = flat.dos(grid, sigma=0.1)
    assert dos.sum() * 0.01 == pytest.approx(2.0, abs=1e-6)
    assert grid[dos.argmax()] == pytest.approx(-1.0)
    assert dos.max() == pytest.approx(2 / (np.sqrt(2 * np.pi) * 0.1), rel=1e-3)
    both = MeshBands(**{**vars(flat), "energies": np.repeat(flat.energies, 2, axis=0)})
    np.testing.assert_allclose(both.dos(grid, 0.1), dos)
    assert [flat.electrons_below(energy) for energy in (-2.0, -1.0, 0.0)] == pytest.approx([4.0, 5.0, 6.0])  # two below
    assert both.electrons_below(0.0) == pytest.approx(6.0)
    for sigma in (0.0, -0.2, np.nan, np.inf):
        with pytest.raises(ValueError, match="sigma must be a finite standard deviation above 0"):
            flat.dos(grid, sigma)
    assert bands.weights.sum() == pytest.approx(1.0)
    assert np.abs(bands.kpoints).max() <= 1.0


def test_bands_that_come_into_the_window_are_kept_but_for_the_inexact_ones_at_the_top() -> None:
    mesh = IrreducibleMesh.of(bulk("Cu"), 1.0)
    centres = np.array([-40.0, -20.0, -3.0, -1.0, 2.0, 5.0, 7.9, 30.0, 31.0, 32.0])
    width = np.linspace(-0.5, 0.5, len(mesh.points))[:, None]
    levels = (centres + width)[None] + 6.0
    projections = np.zeros((1, len(mesh.points), 1, 4, len(centres)))
    dos = broadened_dos(Bands(levels, projections, mesh.weights, 8.0), np.array([0]), 0.1)
    kept = kept_bands(mesh, levels, 8.0, dos)
    assert dos.zero == pytest.approx(-0.5 + 6.0)
    assert kept.below == 2
    assert kept.energies.shape == (1, len(mesh.points), 5), "ten bands, two below, one above, two inexact"
    np.testing.assert_allclose(kept.energies[0, 0], centres[2:7] + 0.5 - 0.5)
    assert (kept.energies <= 0).sum() == 2 * len(mesh.points)
    assert kept.counts.sum() == np.prod(kept.mesh)
    np.testing.assert_allclose(kept.kpoints, mesh.points)
    np.testing.assert_allclose(kept.weights, mesh.weights)
    assert (kept.reference, kept.fermi_level, kept.num_electrons) == ("vbm", dos.zero, 8.0)
    with pytest.raises(ElectronicStructureError, match="no empty bands"):
        broadened_dos(Bands(levels[..., :4], projections[..., :4], mesh.weights, 8.0), np.array([0]), 0.1)


# -- shards ------------------------------------------------------------------------------------------------------------


def with_bands(path: Path, ids: list[str], recipe: int, bands: list[MeshBands | None], **changes: Any) -> None:
    """A shard of `test_data` with bands."""
    write_shard(path, ids, [gaussian(0, 0.1)[None]] * len(ids), recipe=recipe)
    with np.load(path) as shard:
        arrays = dict(shard)
    n = len(ids)
    known = {"efermi": np.full(n, 9.5, np.float32), "num_electrons": np.full(n, 11.0, np.float32)}
    np.savez(path, **{**arrays, **pack_bands(bands), **known, **changes})


def test_bands_are_those_of_the_label_that_counts(tmp_path: Path) -> None:
    a, b, c = bands_of(1), bands_of(2, spins=2), bands_of(3)
    with_bands(tmp_path / "1.npz", ["a", "b"], 5, [a, b])
    with_bands(tmp_path / "2.npz", ["b", "c", "d"], 4, [c, c, c])
    with_bands(tmp_path / "3.npz", ["d", "e"], 5, [None, a])
    write_shard(tmp_path / "0.npz", ["old", "e"], [gaussian(0, 0.1)[None]] * 2)
    read = load_bands(tmp_path)
    assert set(read) == {"a", "b", "c", "e"}, "d was computed anew without bands"
    assert all(same(read[name], bands) for name, bands in {"a": a, "b": b, "c": c, "e": a}.items())
    with pytest.raises(FileNotFoundError, match="no label shards"):
        load_bands(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"bands": np.zeros(7, np.int16)}, "bands do not fit bands_shape"),
        ({"bands": np.zeros(7)}, "bands has the shape"),
        ({"bands_shape": np.array([[3, 8, 5]], np.int16)}, "one or two spins"),
        ({"bands_shape": np.array([[1, -8, 5]], np.int16)}, "one or two spins"),
        ({"bands_shape": np.zeros((2, 3), np.int16)}, "one or two spins"),
        ({"kmesh": np.zeros((1, 3), np.int16)}, "kmesh and kpoint_counts must be at least 1"),
        ({"kpoint_counts": np.zeros(8, np.uint16)}, "kmesh and kpoint_counts must be at least 1"),
        ({"bands_below": np.array([-1])}, "bands_below at least 0"),
        ({"efermi": np.array([np.nan])}, "not finite"),
        ({"kpoints": None}, "lacks kpoints"),
    ],
)
def test_damaged_bands_are_told(tmp_path: Path, changes: dict[str, Any], fragment: str) -> None:
    path = tmp_path / "x.npz"
    with_bands(path, ["a"], 5, [bands_of(0)])
    with np.load(path) as shard:
        arrays = {**shard, **changes}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match=f"x.npz holds no bands as described in data/README.md: .*{fragment}"):
        load_bands(tmp_path)
