"""The command line: real runs with a tiny network, resume after a kill, and one line for every error."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.io.jsonio import read_json
from typer.main import get_command
from typer.testing import CliRunner, Result

from dosmatgen_ase import DOSGenerator, cli, energy_above_hull
from dosmatgen_ase.cli import app
from dosmatgen_ase.cli.options import SETTINGS, site_list
from dosmatgen_ase.cli.target import TargetOptions
from dosmatgen_ase.data import SHARD_KEYS
from dosmatgen_ase.dos import TargetDOS, normalised_l1
from dosmatgen_ase.files import write_extxyz
from dosmatgen_ase.forward.bands import predict_bands
from dosmatgen_ase.forward.predictor import DOSPredictor, PredictorConfig, default_predictor, predict_dos
from dosmatgen_ase.generate.settings import GenerationSettings, described
from dosmatgen_ase.judge import ranking as ranking_module
from dosmatgen_ase.judge.ranking import RELAXED
from dosmatgen_ase.model.checkpoint import load_model, save_model
from dosmatgen_ase.model.conditioning import ConditionalDenoiser
from dosmatgen_ase.model.denoiser import Denoiser, DenoiserConfig
from dosmatgen_ase.model.diffusion.lattice import LatticeProcess
from dosmatgen_ase.train.trainer import TrainingConfig

ROOT = Path(__file__).parents[1]
NICKEL = ROOT / "data" / "ni_in_au3ni.npz"
TINY = DenoiserConfig(width=16, pair_width=16, vector_channels=4, num_layers=1, num_radial=8)
TINY_JSON = {
    "steps": 4,
    "warmup_steps": 1,
    "max_pairs": 64,
    "draws_per_epoch": 32,
    "save_every": 2,
    "network": TINY.to_dict(),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator with random weights, small enough to leave most of the noise as it is, in roomy cells."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ConditionalDenoiser(Denoiser(TINY, LatticeProcess((0.0,) * 5 + (2.2,), (0.1,) * 6)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.1)
        save_model(folder / "tiny.safetensors", model, {})
        save_predictor(folder / "predictor.safetensors", torch.rand(95, 151))
    return folder


def save_predictor(path: Path, baseline: torch.Tensor) -> None:
    tables = {
        "baseline": baseline,
        "support": torch.full((95, 151), 9, dtype=torch.int16),
        "input_mean": torch.zeros(536),
        "input_std": torch.ones(536),
    }
    DOSPredictor(PredictorConfig(hidden=4, depth=1, members=1), tables, {}).save(path)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def command(weights: Path, out: Path, *more: object) -> list[object]:
    return ["generate", NICKEL, "--site", 3, "--weights", weights / "tiny.safetensors", "--predictor",
            weights / "predictor.safetensors", "--device", "cpu", "-o", out, *more]  # fmt: skip


def generate(weights: Path, out: Path, *more: object) -> Result:
    return run(*command(weights, out, "--num-steps", 10, *more))


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generates_ranks_and_draws(weights: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "out.extxyz", tmp_path / "out.png"
    result = generate(weights, out, "-n", 3, "--num-atoms", "2-4", "--plot", plot)
    assert result.exit_code == 0, result.output
    frames = ase.io.read(out, ":")
    assert sorted(len(atoms) for atoms in frames) == [2, 3, 4]
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.extxyz", "out.png"]

    rows = re.findall(r"│\s*(\d+) │ (\w+)\s*│ (\w+) 0\s*│\s*(\d+) │\s*([\d.]+) │\s*([\d.]+) │", result.output)
    assert sorted(int(row[0]) for row in rows) == [0, 1, 2]
    assert result.output.count("│ new ") == 3
    assert re.search(r"nearest known crystal: mp-\d+ \w+, distance 0\.\d\d \((computed|predicted)\)", result.output)
    distances = [float(row[-1]) for row in rows]
    assert distances == sorted(distances)
    predictor = DOSPredictor.load(weights / "predictor.safetensors")
    target = TargetDOS.from_file(NICKEL, site=3)
    for frame, formula, symbol, size, volume, distance in rows:
        atoms = frames[int(frame)]
        assert atoms[0].symbol == symbol
        assert (atoms.get_chemical_formula(), len(atoms)) == (formula, int(size))
        assert float(volume) == pytest.approx(atoms.get_volume() / len(atoms), abs=0.05)
        mean = predictor.predict_arrays([atoms])[0].mean[0]
        expected = normalised_l1(TargetDOS.from_arrays(target.on_grid().energies, mean, sigma=0.2), target)
        assert float(distance) == pytest.approx(expected, abs=0.0051)
    assert re.search(r"^\d+\.\d s$", result.output, re.MULTILINE)


def test_a_template_of_several_structures_is_told(weights: Path, tmp_path: Path) -> None:
    ase.io.write(tmp_path / "two.extxyz", [bulk("Ni", cubic=True), bulk("Cu", cubic=True)])
    out = tmp_path / "out.extxyz"
    told = generate(weights, out, "-n", 1, "--template", tmp_path / "two.extxyz", "--strength", 0.0, "--seed", 7)
    assert "two.extxyz: Cu4, the last of 2 structures" in told.stderr
    assert ase.io.read(out).get_chemical_formula() == "Cu4"


def test_every_option_reaches_the_generator(weights: Path, tmp_path: Path) -> None:
    template, out = tmp_path / "template.cif", tmp_path / "out.extxyz"
    copper = bulk("Cu", cubic=True)
    ase.io.write(template, copper)
    result = generate(
        weights, out, "-n", 2, "--template", template, "--strength", 0.3, "--fixed-cell", "--on-sites", "0,2",
        "--fixed-species", "0=Co", "--fixed-sites", "1-2", "--free-species", "2",
        "--elements", "Co,Cu,O", "--exclude-elements", "O",
        "--composition", "CoCu3", "--guidance-scale", 1.5, "--num-atoms", 4, "--seed", 7,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "the last of" not in result.stderr
    for atoms in ase.io.read(out, ":"):
        assert np.allclose(atoms.cell, copper.cell)
        assert atoms.get_chemical_formula() == "CoCu3"
        assert atoms.symbols[0] == "Co"
        info = atoms.info["dosmatgen"]
        wanted = {"seed": 7, "guidance_scale": 1.5, "num_steps": 10, "strength": 0.3}
        wanted |= {"fixed_sites": [1, 2], "free_species": [2]}
        assert {key: info[key] for key in wanted} == wanted
        assert set(info["targets"]) == {"0", "2"}
        assert "O" in info["forbidden_elements"]
        assert "Ni" in info["forbidden_elements"]
        assert "Cu" not in info["forbidden_elements"]


def test_a_total_target_is_compared_with_the_total(weights: Path, tmp_path: Path) -> None:
    out, total = tmp_path / "out.extxyz", tmp_path / "total.dat"
    x = np.linspace(-12, 7, 400)
    np.savetxt(total, np.stack([x, np.full_like(x, 4.0)], axis=1))
    flat = tmp_path / "flat.safetensors"
    save_predictor(flat, torch.ones(95, 151))
    result = run(
        "generate", total, "--kind", "total", "--sigma", 0.2, "--num-atoms", 2, "-n", 1, "--num-steps", 2, "-o", out,
        "--weights", weights / "tiny.safetensors", "--predictor", flat, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert ase.io.read(out).info["dosmatgen"]["total_target"]
    # Two sites of about 1 state/eV for 4 states/eV of the target (the random network adds little).
    assert float(re.search(r"([\d.]+) │ +[\d.]+ │ new", result.output)[1]) == pytest.approx(0.5, abs=0.1)


def test_the_same_command_goes_on_where_it_stopped(weights: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.extxyz", tmp_path / "part.extxyz"
    assert generate(weights, whole, "-n", 4, "--num-atoms", "2,3").exit_code == 0
    text = whole.read_text()
    part.write_text(text[: len(text) // 2])  # killed in the middle of a structure
    kept = text[: len(text) // 2].count("Lattice") - 1
    assert kept >= 1
    result = generate(weights, part, "-n", 4, "--num-atoms", "2,3")
    assert result.exit_code == 0, result.output
    assert part.read_text().splitlines()[:4] == text.splitlines()[:4]  # what was there stays as it was
    first, second = (sorted(ase.io.read(p, ":"), key=lambda a: a.info["dosmatgen"]["index"]) for p in (whole, part))
    assert len(first) == len(second) == 4
    for a, b in zip(first, second, strict=True):
        assert (a.symbols == b.symbols).all()
        assert np.allclose(a.positions, b.positions, atol=1e-4)
    other = generate(weights, part, "-n", 4, "--num-atoms", "2,3", "--seed", 1)
    assert other.exit_code == 1
    assert "holds structures of another request" in other.stderr
    assert len(ase.io.read(part, ":")) == 4


def test_interruption_tells_what_is_kept(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.extxyz"
    arguments = command(weights, out, "-n", 3, "--num-atoms", "1-3", "--num-steps", 1000)
    process = subprocess.Popen(
        [sys.executable, "-m", "dosmatgen_ase.cli", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    for _ in range(2400):
        if process.poll() is not None or (out.exists() and out.stat().st_size):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    kept = len(ase.io.read(out, ":"))
    assert f"interrupted: {kept} of 3 structures are kept in {out}" in errors
    assert 1 <= kept < 3


# -- errors ------------------------------------------------------------------------------------------------------------


def truncated(tmp_path: Path, weights: Path) -> Path:
    content = (weights / "tiny.safetensors").read_bytes()
    path = tmp_path / "truncated.safetensors"
    path.write_bytes(content[: len(content) // 2])
    return path


def written(tmp_path: Path, name: str, text: str) -> Path:
    (tmp_path / name).write_text(text)
    return tmp_path / name


GENERATE: list[tuple[Callable[[Path, Path], list[object]], int, str]] = [
    (lambda tmp, w: ["absent.xml"], 1, "no file absent.xml"),
    (lambda tmp, w: [written(tmp, "empty.dat", "")], 1, "is empty"),
    (lambda tmp, w: [written(tmp, "down.dat", "0 1\n1 -5\n2 1\n")], 1, "must not be negative"),
    (lambda tmp, w: [written(tmp, "nan.dat", "0 nan\n1 nan\n2 nan\n")], 1, "nothing is known in this DOS"),
    (lambda tmp, w: [written(tmp, "inf.dat", "0 1\n1 inf\n2 1\n")], 1, "line 2: 'inf' is infinite"),
    (lambda tmp, w: [written(tmp, "shape.dat", "0 1\n1\n2 1\n")], 1, "line 2: 1 column, but 2 in line 1"),
    (lambda tmp, w: [written(tmp, "order.dat", "0 1\n1 1\n1 2\n")], 1, "the energy 1 eV is there twice"),
    (lambda tmp, w: [written(tmp, "far.dat", "50 1\n51 1\n52 1\n")], 1, "--efermi for columns of text"),
    (lambda tmp, w: [written(tmp, "bad.xml", "<modeling>")], 1, "is not a complete vasprun.xml"),
    (lambda tmp, w: [NICKEL, "--site", 9], 1, "site 9 does not exist"),
    (lambda tmp, w: [NICKEL, "--num-atoms", "4-"], 2, "'4-' must be like 4, 4,6 or 4-7"),
    (lambda tmp, w: [NICKEL, "--num-atoms", "7-4"], 2, "'7-4' must be like"),
    (lambda tmp, w: [NICKEL, "--num-atoms", "four"], 2, "'four' must be like"),
    (lambda tmp, w: [NICKEL, "--num-atoms", 0], 1, "must lie between 1 and 20"),
    (lambda tmp, w: [NICKEL, "--num-atoms", 500], 1, "must lie between 1 and 20"),
    (lambda tmp, w: [NICKEL, "--num-atoms", "4-40"], 1, "error: num_atoms=21 must lie between 1 and 20"),
    (
        lambda tmp, w: [written(tmp, "off.dat", "20 1\n21 2\n22 1\n")],
        1,
        "off.dat: no known energy of the DOS of text off.d",
    ),
    (lambda tmp, w: [NICKEL, "-n", 0], 1, "n=0 must be a whole number of at least 1"),
    (lambda tmp, w: [NICKEL, "-n", "many"], 2, "Invalid value for '-n'"),
    (lambda tmp, w: [NICKEL, "--seed", -1], 1, "seed=-1"),
    (lambda tmp, w: [NICKEL, "--guidance-scale", "nan"], 1, "guidance_scale=nan"),
    (lambda tmp, w: [NICKEL, "--num-steps", 0], 1, "num_steps=0"),
    (lambda tmp, w: [NICKEL, "--fixed-species", "Co"], 2, "'Co' must be like 0=Co"),
    (lambda tmp, w: [NICKEL, "--fixed-species", "0=Co", "--fixed-species", "00=Ni"], 2, "site 0 is named twice"),
    (lambda tmp, w: [NICKEL, "--fixed-species", "0=Xx"], 1, "not an element"),
    (lambda tmp, w: [NICKEL, "--elements", "Ni", "--exclude-elements", "Ni"], 1, "leave no element"),
    (lambda tmp, w: [NICKEL, "--composition", "NiAu3", "--num-atoms", 5], 1, "contradicts composition"),
    (lambda tmp, w: [NICKEL, "--site", 3, "--on-sites", 6, "--num-atoms", 4], 1, "sites (--on-sites) names site 6"),
    (lambda tmp, w: [NICKEL, "--site", 3, "--fixed-cell"], 1, "needs a template"),
    (lambda tmp, w: [NICKEL, "--site", 3, "--window", 2, -2], 1, "a window needs lo < hi"),
    (lambda tmp, w: [NICKEL, "--site", 3, "--window", 50, 60], 1, "holds no known energy"),
    (lambda tmp, w: [NICKEL, "--template", "absent.cif"], 1, "no template absent.cif"),
    (lambda tmp, w: [NICKEL, "--template", written(tmp, "bad.cif", "nothing")], 1, "is not a structure that ASE reads"),
    (lambda tmp, w: [NICKEL, "-o", tmp / "absent" / "out.extxyz"], 1, "cannot write"),
    (lambda tmp, w: [NICKEL, "-o", tmp], 1, "must end in .extxyz, .xyz, .cif"),
    (lambda tmp, w: [NICKEL, "--plot", tmp / "absent" / "out.png"], 1, "cannot write"),
    (lambda tmp, w: [NICKEL, "--plot", tmp / "out.docx"], 1, "must end in .png or .pdf or .svg"),
    (lambda tmp, w: [NICKEL, "--weights", "absent.safetensors"], 1, "no weights at absent.safetensors"),
    (lambda tmp, w: [NICKEL, "--weights", truncated(tmp, w)], 1, "is not a readable safetensors file (truncated?)"),
    (lambda tmp, w: [NICKEL, "--weights", w / "predictor.safetensors"], 1, "holds a predictor, not a generator"),
    (lambda tmp, w: [NICKEL, "--predictor", "absent.safetensors"], 1, "no weights at absent.safetensors"),
    (lambda tmp, w: [NICKEL, "--device", "abacus"], 1, "device='abacus' cannot be used here"),
    (lambda tmp, w: [NICKEL, "--device", "cuda:99"], 1, "device='cuda:99' cannot be used here"),
    (lambda tmp, w: [NICKEL, "--no-such-option"], 2, "No such option: --no-such-option"),
    (lambda tmp, w: [], 2, "Missing argument"),
]


def assert_one_line(result: Result, code: int, fragment: str) -> None:
    assert result.exit_code == code, result.output
    assert fragment in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("arguments", "code", "fragment"), GENERATE)
def test_bad_input_is_one_line(
    arguments: Callable[[Path, Path], list[object]], code: int, fragment: str, weights: Path, tmp_path: Path
) -> None:
    given = arguments(tmp_path, weights)
    defaults = {"-o": tmp_path / "out.extxyz", "--weights": weights / "tiny.safetensors",
                "--predictor": weights / "predictor.safetensors"}  # fmt: skip
    missing = [item for option, value in defaults.items() if option not in given for item in (option, value)]
    assert_one_line(run("generate", *given, *missing), code, fragment)
    assert not list(tmp_path.glob("out.*")) or (tmp_path / "out.extxyz").stat().st_size == 0


def test_other_commands_fail_in_one_line_too(tmp_path: Path) -> None:
    assert_one_line(run("generat"), 2, "No such command 'generat'")
    assert_one_line(run("dos", "absent.xml"), 1, "no file absent.xml")
    assert_one_line(run("dos", NICKEL, "--reference", "vacuum"), 1, 'reference must be "fermi" or "vbm"')
    config = written(tmp_path, "config.json", json.dumps(TINY_JSON))
    assert_one_line(run("train", "--config", "absent.json"), 1, "no config absent.json")
    assert_one_line(run("train", "--config", written(tmp_path, "a.json", "{")), 1, "is not valid JSON")
    assert_one_line(run("train", "--config", written(tmp_path, "b.json", "[]")), 1, "must hold a JSON object")
    unknown = written(tmp_path, "c.json", '{"step": 3}')
    assert_one_line(run("train", "--config", unknown), 1, "unknown training settings ['step']")
    assert_one_line(run("train", "--config", config, "--data", tmp_path), 1, "no structures at")
    assert_one_line(run("train", "--config", config, "--device", "abacus"), 1, "device='abacus' cannot be used here")
    assert_one_line(run("train-predictor", "--data", tmp_path), 1, "no label shards")


def test_a_folder_and_an_accident_of_a_reader_are_told_as_such(tmp_path: Path) -> None:
    assert_one_line(run("dos", tmp_path), 1, f"{tmp_path} is a folder, not a file: give the path of")
    os.mkfifo(tmp_path / "pipe")
    assert_one_line(run("dos", tmp_path / "pipe"), 1, "pipe is a pipe or a device: save what comes out of it to a file")
    assert_one_line(run("predict", tmp_path), 1, f"{tmp_path} is a folder, not a file: give files that ASE reads")
    assert_one_line(run("report", tmp_path), 1, f"{tmp_path} is a folder, not a result")
    columns = written(tmp_path, "dos.dat", "# a b\n1.0 2.0\n2.0 3.0\n")
    found = run("predict", columns)
    assert_one_line(found, 1, "dos.dat holds no structures that ASE reads: ")
    assert "object has no attribute" not in found.stderr
    assert_one_line(run("report", columns), 1, "workflows/inverse_design_*.py write it")


def test_dos_and_search_tell_what_is_probably_wrong(tmp_path: Path) -> None:
    cell = written(tmp_path, "cell.dat", "# E-E_F DOS\n" + "".join(f"{e / 10} 4\n" for e in range(-100, 30)))
    for command in ("dos", "search"):
        told = run(command, cell)
        assert "warning: the site DOS holds 40 states" in told.stderr, told.stderr
        assert "--kind total" in told.stderr
    assert "warning" not in run("dos", NICKEL, "--site", 3).stderr


def test_search_says_when_nothing_is_near(tmp_path: Path) -> None:
    peaks = TargetDOS.from_peaks([(-9.0, 3.0, 0.2), (3.0, 6.0, 0.2)], window=(-10, 5))
    odd = written(tmp_path, "odd.json", json.dumps(peaks.to_dict()))
    assert "none of these has this DOS: even the nearest" in run("search", odd, "-n", 1).stdout
    found = run("search", NICKEL, "--site", 3, "-n", 1).stdout
    assert "none of these" not in found
    assert "0 is the same DOS, 1 an error as large as the target" in found


def test_debug_lets_the_traceback_through() -> None:
    with pytest.raises(FileNotFoundError):
        CliRunner().invoke(app, ["--debug", "dos", "absent.xml"], catch_exceptions=False)


def test_ranges() -> None:
    assert site_list("4-7", "x") == [4, 5, 6, 7]
    assert site_list("4, 6", "x") == [4, 6]
    assert site_list("2,4-5", "x") == [2, 4, 5]
    assert site_list(None, "x") == []


def test_every_setting_of_the_generator_is_an_option_with_its_default_and_words() -> None:
    options = {option.name: option for option in get_command(app).commands["generate"].params}
    words, signature = described(), inspect.signature(GenerationSettings)
    assert list(signature.parameters) == [f.name for f in fields(GenerationSettings)]
    assert set(SETTINGS) == set(signature.parameters)
    for name, parameter in signature.parameters.items():
        assert words[name].endswith(".")
        assert words[name].replace("`", "") in options[name].help
        assert options[name].default == parameter.default


# -- the other commands ------------------------------------------------------------------------------------------------


def test_dos_shows_how_a_file_is_read(tmp_path: Path) -> None:
    result = run("dos", NICKEL, "--site", 3, "--plot", tmp_path / "dos.png")
    assert result.exit_code == 0, result.output
    target = TargetDOS.from_file(NICKEL, site=3)
    for fact in (
        "401 energies from -12.00 to 8.00 eV, step 0.05 eV", "Fermi level (reference=fermi)", "sigma 0.1 eV",
        f"{target.band_centre():.3f} eV", f"{target.total_states(hi=0.0):.3f}", "[-12.00, 1.40] eV",
        "npz ni_in_au3ni.npz", "site 3, sites scaled to add up to the total",
    ):  # fmt: skip
        assert fact in result.output
    assert (tmp_path / "dos.png").read_bytes()[:4] == b"\x89PNG"


def test_a_window_is_what_is_asked_for(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.extxyz"
    result = generate(weights, out, "-n", 1, "--num-atoms", 3, "--window", -2, 0.5)
    assert result.exit_code == 0, result.output
    wanted = TargetDOS.from_file(NICKEL, site=3).window(-2, 0.5)
    assert ase.io.read(out).info["dosmatgen"]["targets"] == {"0": wanted.digest()}
    assert "[-2.00, 0.50] eV" in run("dos", NICKEL, "--site", 3, "--window", -2, 0.5).output


@pytest.mark.parametrize("left", [0, 1])
def test_what_relaxes_into_known_crystals_is_told(
    weights: Path, tmp_path: Path, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ranking_module.score_and_relax
    monkeypatch.setattr(ranking_module, "score_and_relax", lambda *given, **more: whole(*given, **more)[:left])
    result = generate(weights, tmp_path / "out.extxyz", "-n", 2, "--num-atoms", 2, "--new-only")
    assert result.exit_code == (0 if left else 1)
    told = "warning: only 1 of the 2 crystals drawn are new" if left else "none of the 2 crystals drawn is new"
    assert told in result.output


def test_a_zero_that_is_moved_is_told(weights: Path, tmp_path: Path) -> None:
    total = TargetDOS.from_peaks([(-2.0, 4.0, 0.4), (3.0, 4.0, 0.4)], window=(-6, 5), kind="total", reference="fermi")
    (tmp_path / "total.json").write_text(json.dumps(total.to_dict()))
    line = command(weights, tmp_path / "out.extxyz", "-n", 1, "--num-atoms", 2, "--num-steps", 10)
    result = run(*[tmp_path / "total.json" if word == NICKEL else word for word in line if word not in ("--site", 3)])
    assert result.exit_code == 0, result.output
    assert re.search(r"total\.json: zero moved by [+-]?\d\.\d+ eV to the valence-band maximum", result.stderr)


def test_electrons_are_those_of_the_whole_file_with_a_window_or_without(tmp_path: Path) -> None:
    energies = np.linspace(-12, 6, 361)
    curve = 0.4 * (abs(energies + 5) < 4) + 2.0 * np.exp(-(((energies + 0.5) / 0.5) ** 2))
    np.savetxt(tmp_path / "arbitrary.dat", np.stack([energies, curve], 1))
    read = TargetOptions(reference="fermi", electrons=10.0).read(tmp_path / "arbitrary.dat")
    cut = TargetOptions(reference="fermi", electrons=10.0, window=(-2, 1)).read(tmp_path / "arbitrary.dat")
    assert read.total_states(hi=0.0) == pytest.approx(10)
    np.testing.assert_allclose(cut.values[cut.known], read.values[cut.known])
    assert cut.known.sum() < 70


def test_dos_tells_unknown_windows_and_broadening(tmp_path: Path) -> None:
    assert "none: no states in [-10, 0] eV" in run("dos", written(tmp_path, "above.dat", "0.5 0\n1 1\n2 0\n")).output
    result = run("dos", written(tmp_path, "sketch.dat", "-3 0\n-2 1\n-1 nan\n0 nan\n1 0\n2 0\n"))
    assert "[-3.00, -2.00], [1.00, 2.00] eV" in result.output
    assert "unknown, taken as none" in result.output


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of the repository's data: 36 training structures, 30 of them labelled, and 8 other labels."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "site_dos").mkdir()
    with np.load(min((ROOT / "data" / "site_dos").glob("*.npz"))) as shard:
        full = {key: shard[key] for key in SHARD_KEYS}
    rows = np.concatenate([np.flatnonzero(full["split"] == s)[:k] for s, k in (("train", 30), ("val", 4), ("test", 4))])
    starts, ends = full["atom_offset"][rows], full["atom_offset"][rows + 1]
    sites = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
    per_site = ("atomic_numbers", "frac_coords", "site_dos")
    cut = {
        k: v if k == "energies" else v[sites] if k in per_site else v[rows]
        for k, v in full.items()
        if k != "atom_offset"
    }
    cut["atom_offset"] = np.concatenate([[0], np.cumsum(ends - starts)])
    np.savez(folder / "site_dos" / "a.npz", **cut)
    table = pq.read_table(ROOT / "data" / "structures.parquet")
    labelled = pc.is_in(table["material_id"], pa.array(cut["material_id"][:30].tolist()))
    bare = table.filter(pc.and_(pc.equal(table["split"], "train"), pc.invert(labelled))).slice(0, 6)
    pq.write_table(pa.concat_tables([table.filter(labelled), bare]), folder / "structures.parquet")
    return folder


def test_train_makes_weights_and_goes_on(small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = written(tmp_path, "config.json", json.dumps(TINY_JSON))
    arguments = ["train", "--config", config, "--data", small_data, "--out", out, "--device", "cpu", "--threads", 1]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"weights: {out / 'weights.safetensors'}\n"
    assert "36 structures, 30 with a computed and 0 with a predicted DOS" in result.stderr
    _, header = load_model(out / "weights.safetensors")
    assert header["training"]["steps"] == 4
    assert header["data"] == {"structures": 36, "labelled": 30, "predicted": 0}
    written(tmp_path, "config.json", json.dumps({**TINY_JSON, "learning_rate": 1.0}))
    other = run(*arguments)
    assert other.exit_code == 1
    assert "was started with other settings of ['learning_rate']" in other.stderr.splitlines()[-1]


def test_train_runs_the_stages_of_a_recipe(small_data: Path, tmp_path: Path) -> None:
    out, first = tmp_path / "run", {"structures": "wide", "predicted": False}
    staged = {"common": TINY_JSON, "stages": [first, {"predicted": False, "steps": 2}]}
    config = written(tmp_path, "staged.json", json.dumps(staged))
    arguments = ["train", "--config", config, "--data", small_data, "--out", out, "--device", "cpu", "--threads", 1]
    assert_one_line(run(*arguments), 1, "name it with --wide FILE.parquet")
    result = run(*arguments, "--wide", small_data / "structures.parquet")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"weights: {out / 'weights.safetensors'}\n"
    _, header = load_model(out / "weights.safetensors")
    assert [stage["training"]["steps"] for stage in header["stages"]] == [4, 2]
    assert header["stages"][0]["structures"] == "wide"
    assert run(*arguments, "--wide", small_data / "structures.parquet").exit_code == 0  # its own files, done already
    written(out, "record.json", "{}")
    assert_one_line(run(*arguments, "--wide", small_data / "structures.parquet"), 1, "--overwrite")


def test_train_predictor_and_pseudo_labels(small_data: Path, tmp_path: Path) -> None:
    pair, out = tmp_path / "pair", tmp_path / "run"
    result = run("train-predictor", "--data", small_data, "--out", pair, "--epochs", 1, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert re.search(r"ranker\s*│ \d\.\d\d\s*│ \d\.\d\d", result.stdout)
    folds = [DOSPredictor.load(pair / f"{name}.safetensors").info["fold"] for name in ("predictor", "ranker", "judge")]
    assert folds == [None, 0, 1]

    config = written(tmp_path, "config.json", json.dumps(TINY_JSON))
    arguments = ["train", "--config", config, "--data", small_data, "--out", out, "--device", "cpu"]
    result = run(*arguments, "--pseudo-labels", "auto", "--predictor", pair / "ranker.safetensors")
    assert result.exit_code == 0, result.output
    assert "predicting the DOS of 6 structures" in result.stderr
    assert "30 with a computed and 6 with a predicted DOS" in result.stderr
    again = run(*arguments, "--pseudo-labels", out / "pseudo_labels.npz")
    assert again.exit_code == 0, again.output
    assert "predicting" not in again.stderr
    assert_one_line(run(*arguments, "--pseudo-labels", "absent.npz"), 1, "no pseudo-labels at absent.npz")


def test_the_ready_config_is_valid() -> None:
    config = TrainingConfig.from_dict(json.loads((ROOT / "configs" / "default.json").read_text()))
    assert Denoiser(config.network, LatticeProcess((0.0,) * 6, (1.0,) * 6))


def test_help_is_complete_and_needs_no_heavy_library() -> None:
    for command in get_command(app).commands:
        assert re.search(rf"``(dosmatgen )?{command}``", str(cli.__doc__))
        result = run(command, "--help")
        assert result.exit_code == 0
        assert "--" in result.output
    code = (
        "import sys; from dosmatgen_ase.cli import app; "
        "from typer.testing import CliRunner; r = CliRunner().invoke(app, ['--help']); assert r.exit_code == 0; "
        "print([m for m in ('torch', 'ase', 'numpy', 'scipy', 'pymatgen', 'chgnet', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.stdout.strip() == "[]", done.stderr
    assert run("--version").output.startswith("dosmatgen ")


@pytest.mark.parametrize("file", ["README.md", "scripts/demo.sh"])
def test_commands_in_the_documentation_fit(file: str) -> None:
    lines = re.findall(r"^(?:\.venv/bin/)?dosmatgen (.+)$", (ROOT / file).read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        name, *arguments = shlex.split(line, comments=True)
        context = get_command(app).commands[name].make_context(name, arguments)
        for option in ("dos_file", "config"):
            assert option not in context.params or (ROOT / context.params[option]).is_file()


def test_predict_writes_what_other_commands_read(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "salt.cif", bulk("NaCl", "rocksalt", a=5.64))
    ase.io.write(tmp_path / "flat.xyz", bulk("Cu", a=1.0), format="extxyz")
    out, picture = tmp_path / "out", tmp_path / "salt.png"
    result = run("predict", tmp_path / "flat.xyz", tmp_path / "salt.cif", "--out", out, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 10_000
    assert "collapsed" in result.stdout
    assert f"{out}/salt.json --site 0" in result.stdout
    assert {p.name for p in out.iterdir()} == {"salt.json"}
    assert "2/2" in result.stderr  # the progress bar of several
    assert "loading" not in result.stderr  # that is for a terminal
    sites = [TargetDOS.from_file(out / "salt.json", site=i) for i in range(2)]
    for dos, expected in zip(sites, predict_dos(ase.io.read(tmp_path / "salt.cif")), strict=True):
        np.testing.assert_allclose(dos.values, expected.values, atol=1e-5)
    total = TargetDOS.from_file(out / "salt.json")
    assert total.kind == "total"
    np.testing.assert_allclose(total.values, sites[0].values + sites[1].values)
    assert_one_line(run("predict", tmp_path / "flat.xyz", "--out", out), 1, "no structure could be predicted")


def test_predict_writes_bands_that_ase_reads(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "copper.cif", bulk("Cu"))
    result = run("predict", tmp_path / "copper.cif", "--out", tmp_path / "out", "--bands")
    assert result.exit_code == 0, result.output
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"copper.json", "copper_bands.json", "copper_bands.png"}
    found = read_json(tmp_path / "out" / "copper_bands.json")
    np.testing.assert_allclose(found.energies, predict_bands(ase.io.read(tmp_path / "copper.cif")).energies, atol=1e-5)


def test_what_is_left_of_another_crystal_does_not_stand_for_one_that_fails(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.cif", bulk("Cu"))
    mine = tmp_path / "out" / "b.json"
    mine.parent.mkdir()
    mine.write_text("the result of somebody else")
    line = ["--out", tmp_path / "out", "--bands", "--overwrite"]
    assert run("predict", tmp_path / "a.cif", *line).exit_code == 0
    assert len(list(mine.parent.glob("a*"))) == 3
    for name in ("a", "b"):
        ase.io.write(tmp_path / f"{name}.cif", bulk("Cu", a=1.0))
        assert_one_line(run("predict", tmp_path / f"{name}.cif", *line), 1, "no structure could be predicted")
    assert list(mine.parent.iterdir()) == [mine], "only what we wrote is removed"


@pytest.mark.parametrize(("other", "plot"), [("a_bands.cif", None), ("b.cif", "out/../out/a_bands.png")])
def test_two_outputs_in_one_file_are_refused_before_the_work(other: str, plot: str | None, tmp_path: Path) -> None:
    for name in ("a.cif", other):
        ase.io.write(tmp_path / name, bulk("Cu"))
    more = [] if plot is None else ["--plot", tmp_path / plot]
    (tmp_path / "out").mkdir()
    line = ["predict", tmp_path / "a.cif", tmp_path / other, "--out", tmp_path / "out", *more]
    assert_one_line(run(*line, "--bands"), 1, "cannot write the bands of a: ")
    assert list((tmp_path / "out").iterdir()) == []
    assert run(*line).exit_code == 0


@pytest.mark.parametrize("error", [ValueError("no bands"), RuntimeError("no room")])
def test_bands_that_fail_cost_themselves_alone(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bands(atoms: Atoms) -> Any:
        if "Cu" in atoms.symbols:
            raise error
        return predict_bands(atoms)

    for name in ("Al", "Cu"):
        ase.io.write(tmp_path / f"{name}.cif", bulk("Al"))
    line = ["predict", tmp_path / "Cu.cif", tmp_path / "Al.cif", "--out", tmp_path / "out", "--bands"]
    assert run(*line).exit_code == 0
    ase.io.write(tmp_path / "Cu.cif", bulk("Cu"))
    monkeypatch.setattr("dosmatgen_ase.forward.bands.predict_bands", bands)
    result = run(*line)
    assert result.exit_code == 0, result.output
    assert str(error) in result.stdout
    made = {file.name for file in (tmp_path / "out").iterdir()}
    assert made == {"Cu.json", "Al.json", "Al_bands.json", "Al_bands.png"}
    assert TargetDOS.from_file(tmp_path / "out" / "Cu.json", site=0).total_states(hi=0.0) > 5


def test_predict_tells_an_element_without_labels_and_keeps_the_other_sites(tmp_path: Path) -> None:
    no_label = int(np.flatnonzero(default_predictor().tables["support"].numpy().max(axis=1)[1:90] == 0)[-1]) + 1
    atoms = bulk("NaCl", "rocksalt", a=6.0)
    atoms.numbers[0] = no_label
    ase.io.write(tmp_path / "rare.cif", atoms)
    result = run("predict", tmp_path / "rare.cif", "--out", tmp_path, "--plot", tmp_path / "rare.png")
    assert result.exit_code == 0, result.output
    assert "unknown" in result.stdout
    assert "rare.json --site 1" in result.stdout
    assert TargetDOS.from_file(tmp_path / "rare.json", site=1).total_states() > 0
    for site, whose in ((0, "the DOS of site 0"), (None, "the total DOS")):
        with pytest.raises(ValueError, match=f"{whose} is unknown there"):
            TargetDOS.from_file(tmp_path / "rare.json", site=site)


def test_oversampling_keeps_the_draws_and_the_best(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.extxyz"
    result = run(*command(weights, out, "-n", 2, "--oversample", 3, "--num-atoms", 2, "--num-steps", 2))
    assert result.exit_code == 0, result.output
    assert len(ase.io.read(out, ":")) == 6
    best = ase.io.read(tmp_path / "out-best.extxyz", ":")
    assert len(best) == 2
    assert best[0].info["scores"]["score"] <= best[1].info["scores"]["score"]
    assert "2 structures in" in result.output
    broken = run(*command(weights, tmp_path / "no.extxyz", "-n", 1, "--relax", "bogus"))
    assert_one_line(broken, 1, "bogus")
    assert not (tmp_path / "no.extxyz").exists()


def test_of_many_draws_the_command_relaxes_those_that_python_does_and_goes_on(tmp_path: Path) -> None:
    out, relaxed = tmp_path / "out.extxyz", tmp_path / "out-relaxed.extxyz"
    wish = {"num_atoms": 2, "elements": ["Ni", "Au", "Cu"], "seed": 3}
    options = ("--num-atoms", 2, "--elements", "Ni,Au,Cu", "--seed", 3, "-o", out)
    arguments = ("generate", NICKEL, "--site", 3, "-n", 1, "--oversample", 6, "--relax", "chgnet", *options)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    first = ase.io.read(relaxed, ":")
    assert len(first) == RELAXED  # the best four of six
    best = ase.io.read(tmp_path / "out-best.extxyz")
    target = TargetDOS.from_file(NICKEL, site=3)
    expected = DOSGenerator(device="cpu").generate(target, oversample=6, relax="chgnet", **wish)
    assert (best.numbers == expected.numbers).all()
    # A relaxation makes more of the rounding of the file, on some machines up to 1e-5 A.
    np.testing.assert_allclose(best.positions, expected.positions, atol=1e-4)
    assert best.info["scores"]["score"] == pytest.approx(expected.info["scores"]["score"], abs=1e-4)
    above = energy_above_hull(best)
    assert best.info["scores"]["energy_above_hull"] == pytest.approx(above, abs=1e-3)
    assert f"{above:.2f}" in result.stdout
    assert "eV/atom above the hull, by CHGNet" in result.stdout

    write_extxyz(relaxed, first[:2])  # as a kill leaves it
    assert run(*arguments).exit_code == 0
    again = ase.io.read(relaxed, ":")
    assert [atoms.positions.tolist() for atoms in again] == [atoms.positions.tolist() for atoms in first]

    write_extxyz(relaxed, first[::-1])  # as of a run whose choice of the draws was another
    assert run(*arguments).exit_code == 0
    again = ase.io.read(relaxed, ":")
    assert [atoms.positions.tolist() for atoms in again] == [atoms.positions.tolist() for atoms in first]

    for atoms in first:
        atoms.info["relaxation"]["of"] = "another limit"  # as of dosmatgen relax OUT: it may have taken hours
    write_extxyz(relaxed, first)
    kept = relaxed.read_bytes()
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert "out-relaxed.extxyz holds 4 structures of another run, which would be lost" in refused.stderr
    assert relaxed.read_bytes() == kept
