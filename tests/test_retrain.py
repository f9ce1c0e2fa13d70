"""A clone can train again what the package ships, from its data folder alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dosmatgen_ase.data import load_structures
from dosmatgen_ase.model.checkpoint import load_model

ROOT = Path(__file__).parents[1]
STEPS = 20
SMALL = {  # the shipped recipe with a network of a few thousand parameters, in batches of a few structures
    "steps": STEPS, "warmup_steps": 2, "max_pairs": 256, "draws_per_epoch": 512, "save_every": STEPS,
    "network": {"width": 16, "pair_width": 16, "vector_channels": 4, "num_layers": 1, "num_radial": 8},
}  # fmt: skip


@pytest.mark.skipif(not (ROOT / "data").is_dir(), reason="no data/: needs a clone of the repository")
def test_a_clone_trains_from_its_data_with_one_command(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    tracked = subprocess.run(["git", "ls-files", "data", "configs"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git repository")
    for name in tracked.stdout.split():  # what a clone holds, and no cache of ours
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    config = json.loads((tmp_path / "configs" / "default.json").read_text())
    config |= {**SMALL, "network": {**config["network"], **SMALL["network"]}}
    (tmp_path / "configs" / "small.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "dosmatgen_ase.cli", "train", "--config", "configs/small.json", "--device", "cpu"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, header = load_model(tmp_path / "runs" / "default" / "weights.safetensors")
    structures = load_structures(ROOT / "data" / "structures.parquet", split="train")
    assert header["training"]["steps"] == STEPS
    assert header["data"]["structures"] == len(structures)
    assert header["data"]["labelled"] > 900
    assert header["data"]["predicted"] == 0
