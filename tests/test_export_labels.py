"""scripts/export_labels.py: the label set as one table that needs nothing of this package to be read."""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_mesh_bands import bands_of, with_bands

pq = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two shards, of which the second has newer labels, and what was made of them."""
    folder = tmp_path_factory.mktemp("export")
    shards = folder / "site_dos"
    shards.mkdir()
    names = ("energy", "magnetic_moment")
    for name, ids, recipe, bands in (
        ("1.npz", ["a", "b"], 4, [None, None]),
        ("2.npz", ["b", "c-r1"], 5, [bands_of(1), bands_of(2, spins=2)]),
    ):
        more: dict[str, Any] = {key: np.full(2, -1.5, np.float32) for key in names}
        more |= {"spin_polarised": np.zeros(2, bool), "num_kpoints_ibz": np.full(2, 8, np.int16)}
        if recipe == 5:
            more |= {"origin": np.array(["given", "perturbed"]), "parent": np.array(["", "c"])}
        with_bands(shards / name, ids, recipe, bands, **more)
    main = runpy.run_path(str(ROOT / "scripts" / "export_labels.py"))["main"]
    main(["--labels", str(shards), "--out", str(folder / "out"), "--url", "https://doi.org/10.1/x"])
    return shards, folder / "out"


def test_the_table_holds_the_latest_label_of_each_structure(exported: tuple[Path, Path]) -> None:
    shards, out = exported
    table = {row["material_id"]: row for row in pq.read_table(out / "labels.parquet").to_pylist()}
    assert {name: row["recipe"] for name, row in table.items()} == {"a": 4, "b": 5, "c-r1": 5}
    assert (table["c-r1"]["origin"], table["c-r1"]["parent"]) == ("perturbed", "c")
    assert (table["a"]["origin"], table["a"]["parent"]) == ("given", "")
    with np.load(shards / "2.npz") as shard:
        row = table["b"]
        site = np.array(row["site_dos"]).reshape(row["num_atoms"], 4, -1)
        np.testing.assert_allclose(site, shard["site_dos"][:1] * 1e-3, atol=1e-6)
        np.testing.assert_allclose(row["total_dos"], shard["total_dos"][0] * 1e-3, atol=1e-6)
        np.testing.assert_allclose(row["energies"], shard["energies"])
        np.testing.assert_allclose(np.reshape(row["cell"], (3, 3)), 4 * np.eye(3))
        np.testing.assert_allclose(row["frac_coords"], shard["frac_coords"][0])
    assert row["formula"] == "C"
    assert (row["energy"], row["fermi_level"], row["num_kpoints"]) == (-1.5, 9.5, 8)
    bands = bands_of(2, spins=2)
    row = table["c-r1"]
    np.testing.assert_allclose(np.reshape(row["bands"], row["bands_shape"]), bands.energies, atol=1e-5)
    np.testing.assert_allclose(np.reshape(row["kpoints"], (-1, 3)), bands.kpoints)
    np.testing.assert_allclose(row["kpoint_weights"], bands.weights)
    assert row["bands_below"] == 2
    assert table["a"]["bands"] is None
    assert table["a"]["bands_shape"] is None


def test_the_description_fits_the_table(exported: tuple[Path, Path]) -> None:
    _, out = exported
    told = json.loads((out / "croissant.json").read_text())
    (file,) = told["distribution"]
    content = (out / file["contentUrl"]).read_bytes()
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert file["contentSize"] == f"{len(content)} B"
    (records,) = told["recordSet"]
    schema = pq.read_schema(out / "labels.parquet")
    columns = [field["source"]["extract"]["column"] for field in records["field"]]
    assert columns == schema.names
    for field in records["field"]:
        assert field["source"]["fileObject"]["@id"] == file["@id"]
        assert field.get("repeated", False) == str(schema.field(field["name"]).type).startswith("list")
    wanted = {"name", "description", "license", "url", "creator", "datePublished", "conformsTo", "citeAs"}
    assert wanted <= set(told)
    assert "3 inorganic crystals" in told["description"]
    assert (out / "README.md").read_text() == (ROOT / "data" / "README.md").read_text()


def test_the_documentation_tells_every_column(exported: tuple[Path, Path]) -> None:
    page = (ROOT / "docs" / "howto" / "export.md").read_text()
    told = json.loads((exported[1] / "croissant.json").read_text())
    for field in told["recordSet"][0]["field"]:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{field['name']}` |"))
        assert field["description"] in row


def test_a_failed_export_leaves_the_table_before_it(exported: tuple[Path, Path], tmp_path: Path) -> None:
    shards, _ = exported
    write_table = runpy.run_path(str(ROOT / "scripts" / "export_labels.py"))["write_table"]
    path = tmp_path / "labels.parquet"
    assert write_table(shards, path) == 3
    before = path.read_bytes()
    assert pq.read_metadata(path).num_rows == 3
    damaged = tmp_path / "site_dos"
    shutil.copytree(shards, damaged)
    (damaged / "3.npz").write_bytes(b"no shard")
    with pytest.raises(ValueError, match=r"3\.npz"):
        write_table(damaged, path)
    assert {file.name for file in tmp_path.iterdir()} == {"labels.parquet", "site_dos"}
    assert path.read_bytes() == before
