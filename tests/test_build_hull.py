"""scripts/build_hull.py: when it writes the hull that ships."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from dosmatgen_ase.judge.stability import Hull

ROOT = Path(__file__).parents[1]
METALS = ("Cu", "Ni", "Al")


class _Table:
    """What the script reads of a table: one crystal of each metal."""

    atomic_numbers = np.array([bulk(symbol).numbers for symbol in METALS])
    split = np.array(["train"] * len(METALS))

    def __len__(self) -> int:
        return len(METALS)

    def atoms(self, i: int) -> Atoms:
        atoms = bulk(METALS[i])
        atoms.info["material_id"] = METALS[i]
        return atoms


def test_a_stop_leaves_the_hull_alone_until_all_energies_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(ROOT / "scripts" / "build_hull.py"))["main"]
    out = tmp_path / "hull.npz"
    out.write_bytes(b"the one that ships")
    calls: list[int] = []

    def energies(crystals: list[Atoms]) -> list[float]:
        calls.append(len(crystals))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [-1.0] * len(crystals)

    def stopped(*_: Any, **__: Any) -> Iterator[Atoms]:
        raise KeyboardInterrupt
        yield

    for name, stand_in in {
        "load_structures": lambda _: _Table(),
        "chgnet_energies": energies,
        "relax_each": stopped,
        "CHUNK": 2,
    }.items():
        monkeypatch.setitem(main.__globals__, name, stand_in)
    command = ["--cache", str(tmp_path / "hull.jsonl"), "--out", str(out)]
    main(command)
    assert "goes on from here" in capsys.readouterr().out
    assert out.read_bytes() == b"the one that ships"
    main(command)
    assert "3 formulas, 0 of them relaxed" in capsys.readouterr().out
    assert calls == [2, 1, 1]
    assert sorted(Hull.load(out).name.tolist()) == sorted(METALS)
