"""scripts/draw_picks.py: targets of train alone, ids and parents, runs that go on."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from test_data import gaussian, write_shard

from dosmatgen_ase.data import load_site_dos

ROOT = Path(__file__).parents[1]


class Generator:
    """Returns copper with the number of atoms of the target, the second and third asked for broken in two ways."""

    asked: list[tuple[int, int]]

    def __init__(self) -> None:
        self.asked = []

    def generate(self, targets: list[Any], oversample: int, seed: int, new_only: bool) -> Atoms:
        assert new_only
        self.asked.append((len(targets), seed))
        atoms = bulk("Cu" if len(self.asked) != 2 else "Ce", "fcc", a=3.6) * (len(targets), 1, 1)
        atoms.info = {"dosmatgen": {"seed": seed}, "scores": {"score": 1.0}, "broken": len(self.asked) == 3}
        return atoms


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Six labels of two sites; one of them in the split `test`, and one of a single site."""
    shards = tmp_path / "site_dos"
    shards.mkdir()
    level = gaussian(-1, 0.1)
    write_shard(shards / "a.npz", [f"x-{i}" for i in range(6)], [np.array([level, level])] * 6)
    write_shard(shards / "b.npz", ["single"], [level[None]])
    with np.load(shards / "a.npz") as shard:
        arrays = dict(shard)
    arrays["split"][0] = "val"
    np.savez(shards / "a.npz", **arrays)
    return shards


def test_picks_are_of_training_targets_and_the_run_goes_on(
    labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = Generator()
    main = runpy.run_path(str(ROOT / "scripts" / "draw_picks.py"))["main"]

    class Known:
        asked = 0

        def find(self, atoms: Atoms) -> str | None:
            self.asked += 1
            return "mp-30" if self.asked == 1 else None

    known = Known()

    def relaxed(atoms: Atoms) -> Atoms:
        copy = atoms.copy()
        copy.info["relaxation"] = {"converged": not atoms.info["broken"]}
        copy.rattle(0.001, seed=0)
        return copy

    monkeypatch.setitem(main.__globals__, "DOSGenerator", lambda: generator)
    monkeypatch.setitem(main.__globals__, "relax", relaxed)
    monkeypatch.setitem(main.__globals__, "default_index", lambda: known)
    out = tmp_path / "picks.extxyz"
    command = ["--labels", str(labels), "--out", str(out), "--candidates", "3", "--targets"]
    main([*command, "1"])
    told = capsys.readouterr().out
    assert "1 picks" in told
    assert "3 targets passed over" in told
    assert "it holds an element without labels" in told
    assert "did not converge" in told
    assert "it relaxed into mp-30" in told
    first = ase.io.read(out, ":")
    main([*command, "2"])
    made = ase.io.read(out, ":")
    assert [atoms.info["parent"] for atoms in made[:1]] == [atoms.info["parent"] for atoms in first]
    assert len({seed for _, seed in generator.asked[:4]}) == 4, "each target has a seed of its own"
    read = load_site_dos(labels)
    split = dict(zip(read.material_id.tolist(), read.split.tolist(), strict=True))
    for atoms in made:
        assert atoms.info["material_id"] == f"pick-{atoms.info['parent']}"
        assert split[atoms.info["parent"]] == "train"
        assert atoms.info["parent"] != "single"
        assert "scores" not in atoms.info
        np.testing.assert_allclose(atoms.get_all_distances(mic=True)[0, 1], 3.6 / np.sqrt(2), atol=1e-3)
    ase.io.write(out, bulk("Cu"))
    with pytest.raises(SystemExit):
        main([*command, "3"])
    assert "holds other crystals than picks" in capsys.readouterr().err
