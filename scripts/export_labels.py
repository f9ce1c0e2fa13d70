"""Write the label set as one parquet file with a Croissant description, for use without this package. Needs pyarrow.

python scripts/export_labels.py --out labels

Makes OUT/labels.parquet, OUT/croissant.json (JSON-LD, Croissant 1.0: columns, units, license, checksum) and
OUT/README.md, the datasheet. One row for each structure, its latest label. docs/howto/export.md tells the columns.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ase import Atoms

from dosmatgen_ase import __version__
from dosmatgen_ase.data import SHARD_UNIT, MeshBands, load_bands, read_shard
from dosmatgen_ase.data.shards import shard_paths
from dosmatgen_ase.files import output_folder, read_npz, write_atomic

ROOT = Path(__file__).parents[1]
LICENSE = "https://creativecommons.org/licenses/by/4.0/"
SOURCE = "https://github.com/fxcoudert/topology_databases"
CITE = (
    "Densities of states: computed for dosmatgen-ase. Structures: the Materials Project, A. Jain et al., "
    f"APL Materials 1, 011002 (2013), CC BY 4.0, retrieved via {SOURCE}"
)
_TERMS = (
    "citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty", "fileObject", "fileSet", "format",
    "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex",
    "repeated", "replace", "samplingRate", "separator", "source", "subField", "transform",
)  # fmt: skip
# That of Croissant 1.0, all of it: validators warn of any other.
CONTEXT = {
    "@language": "en", "@vocab": "https://schema.org/", "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/", "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/", "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"}, "examples": {"@id": "cr:examples", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    **{term: f"cr:{term}" for term in _TERMS},
}  # fmt: skip
EXTRAS = {
    "energy": ("f", 1), "efermi": ("f", 1), "num_electrons": ("f", 1), "magnetic_moment": ("f", 1),
    "spin_polarised": ("b", 1), "num_kpoints_ibz": ("iu", 1),
}  # fmt: skip


class Column(NamedTuple):
    """A column of the table: its type, that of Croissant, and what it holds."""

    type: Any
    kind: str
    text: str


TEXT, REAL, INTEGER, FLAG = (
    (pa.string(), "sc:Text"), (pa.float32(), "sc:Float"), (pa.int16(), "sc:Integer"), (pa.bool_(), "sc:Boolean")
)  # fmt: skip
REALS, INTEGERS = (pa.list_(pa.float32()), "sc:Float"), (pa.list_(pa.int16()), "sc:Integer")
COLUMNS = {
    "material_id": Column(*TEXT, "Materials Project id, or an id of its own where origin is not given"),
    "split": Column(*TEXT, "train, val or test, by reduced formula"),
    "formula": Column(*TEXT, "Chemical formula of the cell"),
    "origin": Column(*TEXT, "given, perturbed (a copy off equilibrium) or generated (by a model)"),
    "parent": Column(*TEXT, "material_id that the crystal came from; empty where origin is given"),
    "recipe": Column(*INTEGER, "Number of the recipe of the calculation, see README.md"),
    "num_atoms": Column(*INTEGER, "Atoms in the cell, N"),
    "cell": Column(*REALS, "9 numbers, rows a, b, c, Angstrom"),
    "atomic_numbers": Column(*INTEGERS, "N numbers"),
    "frac_coords": Column(*REALS, "3 N numbers, fractional"),
    "energies": Column(*REALS, "G energies, eV from the Fermi level, or from the valence-band maximum with a gap"),
    "site_dos": Column(*REALS, "N x 4 x G numbers in C order, states/eV: Loewdin projections on s, p, d, f of "
                       "each site, spins summed, Gaussian broadening of 0.1 eV"),
    "total_dos": Column(*REALS, "G numbers, states/eV per cell, spins summed, Gaussian broadening of 0.1 eV"),
    "e_max": Column(*REAL, "eV; above it bands are missing: unknown, not zero"),
    "band_gap": Column(*REAL, "eV, 0 for a metal"),
    "fermi_level": Column(*REAL, "eV, the zero of energies on the scale of the calculation"),
    "energy": Column(*REAL, "eV per cell, total energy with these pseudopotentials"),
    "num_electrons": Column(*REAL, "Valence electrons of the cell"),
    "magnetic_moment": Column(*REAL, "Bohr magnetons per cell"),
    "spin_polarised": Column(*FLAG, "Whether the calculation was spin-polarised"),
    "num_kpoints": Column(*INTEGER, "Irreducible k-points of the DOS mesh, K"),
    "bands": Column(*REALS, "S x K x B eigenvalues in C order, eV from the zero of energies; null where none are kept"),
    "bands_shape": Column(*INTEGERS, "S spins, K k-points, B bands; null without bands"),
    "bands_below": Column(*INTEGER, "Bands of each spin below those; null without bands"),
    "kpoints": Column(*REALS, "3 K fractional coordinates; null without bands"),
    "kpoint_weights": Column(*REALS, "K numbers of sum 1; null without bands"),
}  # fmt: skip


def rows(directory: Path) -> Iterator[dict[str, Any]]:
    """The latest label of every structure, shard after shard."""
    bands = load_bands(directory)
    paths = shard_paths(directory)
    shards = sorted(((read_shard(path), path) for path in paths), key=lambda shard: int(shard[0]["recipe"]))
    last = {name: (k, i) for k, (data, _) in enumerate(shards) for i, name in enumerate(data["material_id"].tolist())}
    for k, (data, path) in enumerate(shards):
        extras = read_npz(path, EXTRAS)
        for i, name in enumerate(data["material_id"].tolist()):
            if last[name] == (k, i):
                yield {**_row(data, i), **_facts(extras, i), **_band_columns(bands.get(name))}


def _row(data: dict[str, np.ndarray], i: int) -> dict[str, Any]:
    sites = slice(*data["atom_offset"][i : i + 2])
    numbers = data["atomic_numbers"][sites]
    return {
        "material_id": str(data["material_id"][i]), "split": str(data["split"][i]),
        "formula": Atoms(numbers).get_chemical_formula(), "origin": str(data["origin"][i]),
        "parent": str(data["parent"][i]), "recipe": int(data["recipe"]), "num_atoms": len(numbers),
        "cell": data["cell"][i], "atomic_numbers": numbers, "frac_coords": data["frac_coords"][sites].ravel(),
        "energies": data["energies"],
        "site_dos": (data["site_dos"][sites].ravel() * SHARD_UNIT).astype(np.float32),
        "total_dos": (data["total_dos"][i] * SHARD_UNIT).astype(np.float32),
        "e_max": float(data["e_max"][i]), "band_gap": float(data["band_gap"][i]),
    }  # fmt: skip


def _facts(extras: dict[str, np.ndarray], i: int) -> dict[str, Any]:
    names = {"efermi": "fermi_level", "num_kpoints_ibz": "num_kpoints"}
    return {names.get(name, name): values[i].item() for name, values in extras.items()}


def _band_columns(bands: MeshBands | None) -> dict[str, Any]:
    if bands is None:
        return dict.fromkeys(("bands", "bands_shape", "bands_below", "kpoints", "kpoint_weights"))
    return {
        "bands": bands.energies.ravel(), "bands_shape": list(bands.energies.shape), "bands_below": bands.below,
        "kpoints": bands.kpoints.ravel(), "kpoint_weights": bands.weights,
    }  # fmt: skip


def write_table(directory: Path, path: Path) -> int:
    """Write the parquet file, some hundred rows at a time; return how many there are."""
    schema = pa.schema([pa.field(name, column.type) for name, column in COLUMNS.items()])
    content, count = io.BytesIO(), 0
    batch: list[dict[str, Any]] = []

    def flush(writer: pq.ParquetWriter) -> None:
        arrays = [pa.array([row[name] for row in batch], column.type) for name, column in COLUMNS.items()]
        writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
        batch.clear()

    with pq.ParquetWriter(content, schema, compression="zstd", compression_level=15) as writer:
        for row in rows(directory):
            batch.append(row)
            count += 1
            if len(batch) == 500:
                flush(writer)
        if batch:
            flush(writer)
    write_atomic(path, content.getvalue())
    return count


def croissant(path: Path, count: int, url: str = "") -> dict[str, Any]:
    """Croissant description (docs.mlcommons.org/croissant, version 1.0) of the table."""
    name = path.name
    fields = [
        {
            "@type": "cr:Field", "@id": f"labels/{column}", "name": column, "description": told.text,
            "dataType": told.kind, **({"repeated": True} if pa.types.is_list(told.type) else {}),
            "source": {"fileObject": {"@id": name}, "extract": {"column": column}},
        }
        for column, told in COLUMNS.items()
    ]  # fmt: skip
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": "dosmatgen-ase-site-dos",
        "description": f"Site- and orbital-projected PBE densities of states of {count} inorganic crystals, by Quantum "
        "ESPRESSO with PseudoDojo pseudopotentials, most of them of the Materials Project. README.md is the datasheet.",
        "license": LICENSE,
        "citeAs": CITE,
        "version": __version__,
        "datePublished": datetime.now(UTC).date().isoformat(),
        **({"url": url} if url else {}),
        "creator": {"@type": "sc:Organization", "name": "The dosmatgen-ase developers"},
        "distribution": [
            {
                "@type": "cr:FileObject", "@id": name, "name": name, "contentUrl": name,
                "encodingFormat": "application/x-parquet", "contentSize": f"{path.stat().st_size} B",
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        ],
        "recordSet": [{"@type": "cr:RecordSet", "@id": "labels", "name": "labels", "field": fields}],
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description="The label set as one parquet file with a Croissant description.")
    parser.add_argument("--labels", type=Path, default=ROOT / "data" / "site_dos", help="folder of shards")
    parser.add_argument("--out", type=Path, default=Path("labels"), help="folder to write to")
    parser.add_argument(
        "--url", default="", help="where the archive can be found, such as its DOI; Croissant wants one"
    )
    options = parser.parse_args(arguments)
    output_folder(options.out)
    path = options.out / "labels.parquet"
    count = write_table(options.labels, path)
    write_atomic(
        options.out / "croissant.json", (json.dumps(croissant(path, count, options.url), indent=1) + "\n").encode()
    )
    write_atomic(options.out / "README.md", (ROOT / "data" / "README.md").read_bytes())
    print(f"{count} labels, {path.stat().st_size / 1e6:.1f} MB: {path}")


if __name__ == "__main__":
    main()
