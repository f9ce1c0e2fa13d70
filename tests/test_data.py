"""Structures, labels, their join, the batches drawn from them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ase.geometry import get_distances
from hypothesis import given, settings
from hypothesis import strategies as st

from dosmatgen_ase.data.dataset import (
    CrystalDataset,
    SiteDOSLabels,
    Structures,
    formula_fold,
    load_pseudo_labels,
    load_site_dos,
    load_structures,
    read_crystals,
    right_handed,
    size_bucket_batches,
)
from dosmatgen_ase.dos import MODEL_GRID
from dosmatgen_ase.limits import MAX_ATOMS

DATA = Path(__file__).parents[1] / "data"
ENERGIES = np.linspace(-12.0, 8.0, 401)


def gaussian(centre: float, sigma: float) -> np.ndarray:
    return np.exp(-0.5 * ((ENERGIES - centre) / sigma) ** 2) / (np.sqrt(2 * np.pi) * sigma)


def write_shard(
    path: Path,
    ids: list[str],
    site_dos: list[np.ndarray],
    e_max: float = 30.0,
    scale: float = 1.0,
    recipe: int | None = None,
) -> None:
    """Write a shard of cubic crystals of carbon sites with site_dos (sites, 401) each, all in the s channel."""
    counts = [len(d) for d in site_dos]
    sites = np.concatenate(site_dos)
    spd = np.zeros((len(sites), 4, 401), dtype=np.uint16)
    spd[:, 0] = np.rint(sites * 1000)
    np.savez(
        path,
        material_id=np.array(ids),
        split=np.array(["train"] * len(ids)),
        atom_offset=np.concatenate([[0], np.cumsum(counts)]),
        atomic_numbers=np.full(len(sites), 6, dtype=np.int16),
        frac_coords=np.linspace(0, 0.9, 3 * len(sites)).reshape(-1, 3).astype(np.float32),
        cell=np.tile(4 * np.eye(3, dtype=np.float32).reshape(9), (len(ids), 1)),
        energies=ENERGIES.astype(np.float32),
        site_dos=spd,
        total_dos=np.array([np.rint(d.sum(0) * 1000 * scale) for d in site_dos]).astype(np.uint32),
        e_max=np.full(len(ids), e_max, dtype=np.float32),
        band_gap=np.zeros(len(ids), dtype=np.float32),
        **({} if recipe is None else {"recipe": np.array(recipe)}),
    )


@pytest.fixture(scope="module")
def structures() -> Structures:
    return load_structures(DATA / "structures.parquet")


@pytest.fixture(scope="module")
def labels() -> SiteDOSLabels:
    return load_site_dos(DATA / "site_dos")


def test_structures_are_what_the_datasheet_says(structures: Structures) -> None:
    assert len(structures) == len(set(structures.material_id.tolist())) == 21311
    assert set(structures.split.tolist()) == {"train", "val", "test"}
    assert (np.linalg.det(structures.cell) > 0).all()
    assert structures.frac_coords.min() >= 0.0
    assert structures.frac_coords.max() < 1.0
    np.testing.assert_array_equal((structures.atomic_numbers > 0).sum(1), structures.num_atoms)
    for formula in ("train", "val"):
        inside = set(structures.reduced_formula[structures.split == formula].tolist())
        assert not inside & set(structures.reduced_formula[structures.split == "test"].tolist())


def test_structures_filter_select_and_atoms(structures: Structures) -> None:
    small = load_structures(DATA / "structures.parquet", split="val", max_atoms=4)
    assert len(small) == int(((structures.split == "val") & (structures.num_atoms <= 4)).sum())
    picked = small.select(np.array([2, 0]))
    atoms = picked.atoms(0)
    assert picked.material_id.tolist() == small.material_id[[2, 0]].tolist()
    assert atoms.pbc.all()
    np.testing.assert_allclose(atoms.cell.array, small.cell[2])
    assert len(atoms) == small.num_atoms[2]


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_right_handed_keeps_every_distance(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cell, frac = rng.normal(size=(1, 3, 3)) + 3 * np.eye(3), rng.uniform(-1, 2, size=(1, 5, 3))
    cell[0, 0] *= rng.choice([-1, 1])
    new_cell, new_frac = right_handed(cell, frac)
    assert np.linalg.det(new_cell[0]) > 0
    pairs = ((cell[0], frac[0]), (new_cell[0], new_frac[0]))
    before, after = (get_distances(f @ c, cell=c, pbc=True)[1] for c, f in pairs)
    np.testing.assert_allclose(after, before, atol=1e-9)


def test_right_handed_maps_a_tiny_negative_coordinate_into_the_cell() -> None:
    assert right_handed(np.eye(3)[None], np.full((1, 1, 3), -1e-17))[1].max() == 0.0


def test_a_peak_keeps_its_weight_and_gets_sigma_0_2(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.npz", ["x-1"], [np.stack([gaussian(-3.0, 0.1), 2 * gaussian(1.0, 0.1)])])
    labels = load_site_dos(tmp_path)
    assert labels.known.all()
    energies = MODEL_GRID.energies
    for site, (centre, weight) in enumerate([(-3.0, 1.0), (1.0, 2.0)]):
        values = labels.values[0, site].astype(float)
        assert values.sum() * 0.1 == pytest.approx(weight, abs=0.01)
        assert np.average(energies, weights=values) == pytest.approx(centre, abs=0.01)
        assert np.sqrt(np.average((energies - centre) ** 2, weights=values)) == pytest.approx(0.2, abs=0.01)
    assert not labels.values[0, 2:].any()


def test_sites_are_scaled_to_the_total_and_uncovered_energies_are_unknown(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.npz", ["x-1"], [gaussian(-3.0, 0.1)[None]], scale=1.25)  # covered: 80 %
    covered = load_site_dos(tmp_path)
    assert covered.values.sum() * 0.1 == pytest.approx(1.25, abs=0.01)
    write_shard(tmp_path / "a.npz", ["x-1"], [gaussian(-3.0, 0.1)[None]], scale=2.0)  # covered: 50 %
    missing = load_site_dos(tmp_path)
    assert not missing.known[0, np.abs(MODEL_GRID.energies + 3) < 0.25].any()
    assert missing.known[0, np.abs(MODEL_GRID.energies + 3) > 0.8].all()


def test_above_e_max_is_unknown_and_does_not_leak(tmp_path: Path) -> None:
    site = 0.5 + 40.0 * (ENERGIES > 2.0)
    write_shard(tmp_path / "a.npz", ["x-1"], [site[None]], e_max=2.0)
    labels = load_site_dos(tmp_path)
    edge = MODEL_GRID.energies[labels.known[0]].max()
    assert 1.7 <= edge <= 2.0
    np.testing.assert_allclose(labels.values[0, 0, labels.known[0]], 0.5, atol=1e-3)
    assert not labels.values[0, 0, ~labels.known[0]].any()


def test_the_later_recipe_wins_then_the_later_name(tmp_path: Path) -> None:
    write_shard(tmp_path / "1.npz", ["x-1", "x-2"], [gaussian(0.0, 0.1)[None], gaussian(0.0, 0.1)[None]])
    write_shard(tmp_path / "2.npz", ["x-2", "x-3", "x-3"], [k * gaussian(0.0, 0.1)[None] for k in (3, 5, 3)])
    labels = load_site_dos(tmp_path)
    assert labels.material_id.tolist() == ["x-1", "x-2", "x-3"]
    assert labels.recipe.tolist() == [1, 1, 1]
    np.testing.assert_allclose(labels.values.sum((1, 2)) * 0.1, [1, 3, 3], atol=0.01)
    write_shard(tmp_path / "0.npz", ["x-2"], [7 * gaussian(0.0, 0.1)[None]], recipe=2)
    labels = load_site_dos(tmp_path)
    assert labels.material_id.tolist() == ["x-1", "x-3", "x-2"]
    assert labels.recipe.tolist() == [1, 1, 2]
    np.testing.assert_allclose(labels.values.sum((1, 2)) * 0.1, [1, 3, 7], atol=0.01)
    assert load_site_dos(tmp_path, recipe=1).material_id.tolist() == ["x-1", "x-2", "x-3"]
    with pytest.raises(ValueError, match="of recipe 3"):
        load_site_dos(tmp_path, recipe=3)


def test_real_labels_hold_the_electrons_below_zero(labels: SiteDOSLabels) -> None:
    """Where the valence bands lie wholly on the grid and a gap follows, they hold a whole number of electrons."""
    assert np.isfinite(labels.values).all()
    assert (labels.values >= 0).all()
    assert not labels.values[np.broadcast_to(labels.atomic_numbers[:, :, None] == 0, labels.values.shape)].any()
    inside = labels.known[:, MODEL_GRID.energies < 0.6].all(axis=1) & (labels.band_gap > 1.5)
    quiet_floor = labels.values[:, :, :3].sum((1, 2)) < 1e-3  # nothing reaches below the grid's lower end
    rows = inside & quiet_floor
    electrons = labels.values[rows][:, :, MODEL_GRID.energies < 0.85].sum((1, 2)) * 0.1
    assert rows.sum() > 20
    assert np.median(np.abs(electrons - np.rint(electrons))) < 0.05


def test_join_prefers_computed_to_predicted_labels(structures: Structures, labels: SiteDOSLabels) -> None:
    few = structures.select(np.arange(0, len(structures), 50))
    owners = np.isin(few.material_id, labels.material_id)
    guess = {
        "material_id": few.material_id,
        "values": np.ones((len(few), MAX_ATOMS, 151), dtype=np.float16),
        "known": np.broadcast_to(few.atomic_numbers[:, :, None] > 0, (len(few), MAX_ATOMS, 151)),
    }
    dataset = CrystalDataset.join(few, labels, guess)
    assert owners.any()
    np.testing.assert_array_equal(np.sort(dataset.labelled), np.flatnonzero(owners))
    assert (dataset.dos_index >= 0).all()
    assert len(np.unique(dataset.dos_index)) == len(few)
    for i in dataset.labelled[:5].tolist():
        j = labels.material_id.tolist().index(few.material_id[i])
        np.testing.assert_allclose(dataset.dos[dataset.dos_index[i]], labels.values[j], rtol=1e-3, atol=1e-3)
    alone = CrystalDataset.join(few, labels)
    assert (alone.dos_index >= 0).sum() == owners.sum()
    assert not alone.pseudo.any()


def test_join_refuses_a_label_of_other_sites(structures: Structures, labels: SiteDOSLabels) -> None:
    row = np.flatnonzero(np.isin(structures.material_id, labels.material_id))[:1]
    one = structures.select(row)
    one.atomic_numbers[0, 0] += 1
    with pytest.raises(ValueError, match="list different sites"):
        CrystalDataset.join(one, labels)


def _swapped(one: Structures) -> Structures:
    """The first two sites exchange their places, not their elements."""
    frac = one.frac_coords.copy()
    frac[0, :2] = frac[0, 1::-1]
    return replace(one, frac_coords=frac)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_swapped, "list different sites or cells"),
        (lambda one: replace(one, cell=one.cell * 1.3), "list different sites or cells"),
        (lambda one: replace(one, split=np.array(["train"])), "are of different splits"),
    ],
)
def test_join_refuses_a_label_of_another_crystal(
    structures: Structures, labels: SiteDOSLabels, change: Callable[[Structures], Structures], told: str
) -> None:
    of_test = (labels.split == "test") & (labels.num_atoms == 2) & (labels.atomic_numbers[:, 0] > 0)
    one = structures.select(np.isin(structures.material_id, labels.material_id[of_test]))
    one = one.select(np.abs(one.frac_coords[:, 0] - one.frac_coords[:, 1]).max(1).argmax()[None])
    assert len(CrystalDataset.join(one, labels).labelled) == 1
    turned = replace(one, frac_coords=np.where(one.frac_coords < 1e-4, 1 - 1e-5, one.frac_coords))
    turned.frac_coords[:, 2:] = 0
    assert len(CrystalDataset.join(turned, labels).labelled) == 1, "the same sites, on the other side of the cell"
    with pytest.raises(ValueError, match=f"of {one.material_id[0]} {told}"):
        CrystalDataset.join(change(one), labels)


def test_join_refuses_what_was_predicted_for_another_structure(structures: Structures, labels: SiteDOSLabels) -> None:
    few = structures.select(np.flatnonzero(~np.isin(structures.material_id, labels.material_id))[:3])
    shape = (3, MAX_ATOMS, 151)
    guess = {"material_id": few.material_id, "values": np.ones(shape, np.float16), "known": np.ones(shape, bool)}
    told = {**guess, "structure": few.fingerprints()}
    backwards = few.select(np.array([2, 0]))
    assert CrystalDataset.join(backwards, labels, told).pseudo.sum() == 2
    other = replace(few, cell=few.cell * np.array([1, 1.1, 1])[:, None, None])
    assert CrystalDataset.join(other, labels, guess).pseudo.sum() == 3, "older files do not tell"
    with pytest.raises(ValueError, match=f"predicted DOS of {few.material_id[1]} is of another structure"):
        CrystalDataset.join(other, labels, told)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=200), st.integers(1, 3000), st.integers(0, 99))
def test_batches_draw_each_structure_once_within_the_bound(sizes: list[int], max_pairs: int, seed: int) -> None:
    num_atoms = np.array(sizes)
    batches = list(size_bucket_batches(num_atoms, max_pairs, np.random.default_rng(seed)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(sizes)))
    assert all(len(b) == 1 or len(b) * num_atoms[b].max() ** 2 <= max_pairs for b in batches)
    again = list(size_bucket_batches(num_atoms, max_pairs, np.random.default_rng(seed)))
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_batches_are_shuffled_between_epochs() -> None:
    num_atoms = np.full(100, 4)
    one, two = (next(size_bucket_batches(num_atoms, 160, np.random.default_rng((0, e)))) for e in (0, 1))
    assert set(one.tolist()) != set(two.tolist())


def test_folds_depend_on_composition_only_and_split_in_half(structures: Structures) -> None:
    assert formula_fold("Li2O") == formula_fold("OLi2") == formula_fold("Li4O2")
    # Frozen: weights in the repository were trained on these halves.
    assert [formula_fold(f) for f in ("NaCl", "Si", "MgO", "Fe", "TiO2")] == [1, 1, 0, 0, 1]
    folds = np.array([formula_fold(f) for f in structures.reduced_formula[::20].tolist()])
    assert 0.44 < folds.mean() < 0.56


def test_a_table_is_read_as_it_is_by_both_readers(structures: Structures) -> None:
    crystals = read_crystals(DATA / "structures.parquet", "val", {"gap": "band_gap", "none": "not_there"})
    rows = np.flatnonzero(structures.split == "val")
    assert [a.info["material_id"] for a in crystals] == structures.material_id[rows].tolist()
    for i in range(0, len(rows), 100):
        expected = structures.atoms(int(rows[i]))
        assert crystals[i].numbers.tolist() == expected.numbers.tolist()
        np.testing.assert_array_equal(crystals[i].cell, expected.cell)
        np.testing.assert_array_equal(crystals[i].positions, expected.positions)
        assert set(crystals[i].info) == {"material_id", "gap"}


def _text(path: Path) -> Path:
    path.write_text("no crystals\n")
    return path


def _without_groups(folder: Path) -> Path:
    pq.write_table(pa.table({"material_id": ["a"], "num_atoms": [30]}), folder / "short.parquet")
    return folder / "short.parquet"


@pytest.mark.parametrize(
    ("call", "error", "fragment"),
    [
        (lambda d: load_structures(d / "none.parquet"), FileNotFoundError, "data/structures.parquet"),
        (lambda d: load_structures(DATA / "structures.parquet", split="dev"), ValueError, "'train', 'val', 'test'"),
        (lambda d: load_structures(DATA / "structures.parquet", max_atoms=21), ValueError, "between 1 and 20"),
        (lambda d: load_structures(_text(d / "t.parquet")), ValueError, "t.parquet is not a readable parquet table"),
        (lambda d: load_structures(_without_groups(d)), ValueError, "lacks the columns .*spacegroup"),
        (lambda d: read_crystals(d / "none.cif"), FileNotFoundError, "a file that ASE reads"),
        (lambda d: read_crystals(_text(d / "none.cif")), ValueError, "holds no structures that ASE reads"),
        (lambda d: read_crystals(DATA / "structures.parquet", "dev"), ValueError, "'train', 'val', 'test'"),
        (lambda d: load_site_dos(d), FileNotFoundError, "data/site_dos"),
        (lambda d: (np.savez(d / "a.npz", material_id=["x"]), load_site_dos(d)), ValueError, "lacks split"),
        (lambda d: (np.savez(d / "p", values=[1]), load_pseudo_labels(d / "p.npz")), ValueError, "lacks material_id"),
        (lambda d: next(size_bucket_batches(np.ones(3), 0, np.random.default_rng(0))), ValueError, "at least 1"),
        (lambda d: formula_fold("Si", 0), ValueError, "at least 1"),
    ],
)
def test_hostile_inputs_are_told_plainly(tmp_path: Path, call, error: type[Exception], fragment: str) -> None:  # noqa: ANN001
    with pytest.raises(error, match=fragment):
        call(tmp_path)


def test_the_package_imports_without_torch_geometric_and_pyarrow() -> None:
    source = str(Path(__file__).parents[1] / "src")
    code = (
        f"import sys; sys.path.insert(0, {source!r}); import dosmatgen_ase.data; "
        "assert not {'torch_geometric', 'pyarrow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_geometric_view(structures: Structures, labels: SiteDOSLabels) -> None:
    pytest.importorskip("torch_geometric")
    import torch

    from dosmatgen_ase.data.pyg import PyGCrystalDataset, pyg_loader

    owners = np.isin(structures.material_id, labels.material_id)
    few = structures.select(np.concatenate([np.flatnonzero(owners)[:40], np.flatnonzero(~owners)[:20]]))
    dataset = CrystalDataset.join(few, labels)
    view = PyGCrystalDataset(dataset)
    i = int(dataset.labelled[0])
    item = view[i]
    np.testing.assert_allclose(item.pos.numpy(), few.atoms(i).positions, atol=1e-4)
    assert item.y_known.any()
    assert item.y.shape == (few.num_atoms[i], 151)
    seen: list[str] = []
    assert len(pyg_loader(dataset, max_pairs=500)) == len(list(pyg_loader(dataset, max_pairs=500, seed=7)))
    for batch in pyg_loader(dataset, max_pairs=500):
        counts = torch.bincount(batch.batch)
        assert batch.cell.shape == (batch.num_graphs, 3, 3)
        assert counts.max() ** 2 * batch.num_graphs <= 500 or batch.num_graphs == 1
        seen += batch.material_id
    assert sorted(seen) == sorted(few.material_id.tolist())
