"""Two at once, what is not ours, and what a file may not make us do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from test_training import CONFIG, bulk_dataset
from typer.testing import CliRunner

from dosmatgen_ase import TargetDOS
from dosmatgen_ase.cli import app
from dosmatgen_ase.crystals.convert import to_structure
from dosmatgen_ase.dft.batch import is_calculation
from dosmatgen_ase.files import exclusive, output_folder, read_npz, write_npz
from dosmatgen_ase.forward.predictor_training import train_predictors
from dosmatgen_ase.report import read_result
from dosmatgen_ase.retrieval.build import build_index, remove_parts
from dosmatgen_ase.train.trainer import TrainingConfig, train

TARGET = TargetDOS.from_peaks([(-0.65, 6.0, 0.3)], window=(-3, 1))


def test_a_second_training_in_a_folder_is_told(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path / "state.safetensors"),
        pytest.raises(BlockingIOError, match="another run is writing it; wait for its end"),
    ):
        train(CONFIG, bulk_dataset(), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_second_training_of_predictors_or_run_of_an_index_is_told(tmp_path: Path) -> None:
    with exclusive(tmp_path / "judge.safetensors"), pytest.raises(BlockingIOError, match="another run"):
        train_predictors(tmp_path / "labels", {"judge": tmp_path / "judge.safetensors"})
    copper = bulk("Cu")
    copper.info["material_id"] = "cu"
    with exclusive(tmp_path / "parts"), pytest.raises(BlockingIOError, match="another run"):
        build_index([copper], parts=tmp_path / "parts")


def test_a_folder_is_told_from_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="it is no folder; choose another name"):
        output_folder(tmp_path / "notes")
    with pytest.raises(FileExistsError, match="it is no folder"):
        train(CONFIG, bulk_dataset(), tmp_path / "notes", progress=False)
    assert (tmp_path / "notes").read_text() == "mine"


def test_no_folder_of_the_user_is_removed(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / f"{'a' * 12}-{'b' * 16}.npz").touch()
    (parts / "thesis.npz").touch()
    remove_parts(parts)
    assert [path.name for path in parts.iterdir()] == ["thesis.npz"]
    for names, ours in (((), True), (("scf.in", "o", "CRASH", "x.pdos_tot"), True), (("scf.in", "thesis.tex"), False)):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        assert is_calculation(folder) == ours


def test_a_result_imports_no_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dosmatgen_ase.flows.schemas import CandidateDoc, InverseDesignDoc

    (tmp_path / "hostile_module.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    candidate = CandidateDoc(index=0, formula="Cu", generated=to_structure(bulk("Cu")), record={})
    data = json.loads(InverseDesignDoc(targets={"0": TARGET}, candidates=[candidate], generation={}).model_dump_json())
    path = tmp_path / "result.json"
    path.write_text(json.dumps(data))
    assert read_result(path).candidates[0].generated == candidate.generated
    for place in ("whole", "site"):
        hostile = {"@module": "hostile_module", "@class": "Run"}
        changed = json.loads(json.dumps(data))
        crystal = changed["candidates"][0]["generated"]
        if place == "whole":
            changed["candidates"][0]["generated"] = hostile
        else:
            crystal["sites"][0]["properties"] = {"magmom": hostile}
        path.write_text(json.dumps(changed))
        if place == "whole":
            with pytest.raises(ValueError, match="is not the result of an inverse-design run"):
                read_result(path)
        else:
            read_result(path)
    assert "hostile_module" not in sys.modules


def test_an_npz_takes_no_more_memory_than_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    wanted = {"values": ("f", 1)}
    write_npz(path, values=np.arange(3.0))
    assert read_npz(path, wanted)["values"].tolist() == [0, 1, 2]
    write_npz(path, values=np.zeros(200 << 20, np.uint8))
    with pytest.raises(ValueError, match="it unpacks to 200 MiB from"):
        read_npz(path, {"values": ("u", 1)})
    for array in (np.arange(3), np.zeros((2, 2)), np.array("x")):
        write_npz(path, values=array)
        with pytest.raises(ValueError, match="values has the shape"):
            read_npz(path, wanted)
    for order in "<>":
        names = np.array(["a", "bc"], dtype=f"{order}U2")
        write_npz(path, names=names)
        assert read_npz(path, {"names": ("U", 1)})["names"].tolist() == ["a", "bc"]
        names.view(f"{order}u4")[1] = 0x110000
        write_npz(path, names=names)
        with pytest.raises(ValueError, match="names is damaged: it holds what is no character"):
            read_npz(path, {"names": ("U", 1)})
    np.savez(path, values=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="Python objects"):
        read_npz(path, wanted)
    with pytest.raises(ValueError, match="it lacks other"):
        read_npz(path, {"other": ("f", 1)})


@pytest.mark.parametrize(
    "values",
    [{"steps": "x"}, {"steps": 0}, {"bf16": 1}, {"learning_rate": None}, {"network": 5}, {"dropout": {"x": 1}}],
)
def test_a_setting_of_a_training_that_is_none_is_named(values: dict[str, object]) -> None:
    (name,) = values
    with pytest.raises(ValueError, match=f"{name}="):
        TrainingConfig.from_dict(values)


def hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


WAIT = "print('loading', flush=True); import time; time.sleep(60)"
AT_THE_END = f"import atexit; atexit.register(lambda: exec({WAIT!r})); from dosmatgen_ase.cli import main; main()"


@pytest.mark.parametrize("moment", ["modules load", "the command line is read", "all is done"])
def test_ctrl_c_before_and_after_a_command_is_one_line(moment: str, tmp_path: Path) -> None:
    """What is loaded, called or left then tells it, and takes its time."""
    code = "from dosmatgen_ase.cli import main; main()"
    if moment == "modules load":
        (tmp_path / "typer.py").write_text(WAIT)
    elif moment == "the command line is read":
        code = f"import typer.main; typer.main.get_command = lambda *_: exec({WAIT!r}); {code}"
    else:
        code = AT_THE_END
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", code, "--version"]
    # A job in the background of a shell ignores Ctrl-C, and so would its children.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=hear_ctrl_c
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline() not in ("loading\n", ""):
            pass
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "interrupted\n")


def test_weights_that_are_no_ours_are_not_replaced_by_a_training(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "weights.safetensors").write_bytes(b"the only copy")
    (tmp_path / "config.json").write_text('{"steps": 1}')
    data = Path(__file__).parents[1] / "data"
    arguments = ["train", "--config", str(tmp_path / "config.json"), "--out", str(run), "--data", str(data)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "exists and holds something else" in done.stderr
    assert (run / "weights.safetensors").read_bytes() == b"the only copy"
