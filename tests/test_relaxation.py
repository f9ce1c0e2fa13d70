"""Relaxation: real minima are found, and whatever goes wrong with one structure is told in it."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import spglib
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_properties
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms, FixBondLength, FixCartesian, FixedPlane, FixScaled, FixSymmetry
from pymatgen.io.ase import AseAtomsAdaptor
from typer.testing import CliRunner

from dosmatgen_ase.cli import app
from dosmatgen_ase.crystals.screening import screen_given
from dosmatgen_ase.files import write_extxyz
from dosmatgen_ase.judge import relaxation
from dosmatgen_ase.judge.relaxation import _mace_environment, relax, symmetrized
from dosmatgen_ase.judge.relaxed_file import _in_full, relax_into

torch.set_num_threads(1)

COPPER = 3.59  # EMT's lattice constant, Angstrom (ase.calculators.emt: 3.589)


class Raises(Calculator):
    """Fails on gold, works on everything else."""

    implemented_properties = ("energy", "forces", "stress")

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = None) -> None:
        super().calculate(atoms, properties, system_changes)
        if "Au" in atoms.get_chemical_symbols():
            raise RuntimeError("no\nparameters for gold")
        self.results = {"energy": 0.0, "forces": np.zeros((len(atoms), 3)), "stress": np.zeros(6)}


class Explodes(Raises):
    """Pulls the cell together without end."""

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = None) -> None:
        super().calculate(atoms, properties, system_changes)
        self.results["stress"] = np.array([50.0, 50, 50, 0, 0, 0])


class NotANumber(Raises):
    """Returns NaN."""

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = None) -> None:
        super().calculate(atoms, properties, system_changes)
        self.results["energy"] = math.nan


def strained_copper() -> Atoms:
    atoms = bulk("Cu", a=3.9, cubic=True)
    atoms.rattle(0.1, seed=1)
    return atoms


def report(atoms: Atoms) -> dict[str, Any]:
    told = atoms.info["relaxation"]
    assert set(told) == {"converged", "steps", "energy", "energy_start", "rmsd", "reason"}
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["converged"] == (told["reason"] is None)
    return told


def test_copper_goes_to_its_lattice_constant() -> None:
    start = strained_copper()
    before = start.copy()
    relaxed = relax(start, EMT(), fmax=0.01)
    told = report(relaxed)
    assert told["converged"]
    assert relaxed.get_volume() ** (1 / 3) == pytest.approx(COPPER, abs=0.005)
    assert told["energy"] < told["energy_start"] - 0.2
    assert relaxed.get_potential_energy() == pytest.approx(4 * told["energy"])
    assert np.abs(relaxed.get_forces()).max() <= 0.01
    assert relaxed.get_stress().shape == (6,)
    assert start == before
    assert "relaxation" not in start.info


def test_a_left_handed_cell_relaxes_as_the_same_crystal_right_handed() -> None:
    start = strained_copper()
    start.symbols[1] = "Au"  # so that no two vectors are alike
    start.set_cell(start.cell * [[1.0], [1.02], [1.05]], scale_atoms=True)
    turned = start.copy()
    turned.set_cell(start.cell[[1, 0, 2]])
    one, other = relax([start, turned], EMT())
    told, same = report(one), report(other)
    assert told["rmsd"] > 0.05, "there is something to be found"
    assert same["rmsd"] == pytest.approx(told["rmsd"], abs=1e-4)
    assert same["energy"] == pytest.approx(told["energy"], abs=1e-5)
    assert np.linalg.det(other.cell) == pytest.approx(np.linalg.det(one.cell), abs=1e-3)
    assert other.get_all_distances(mic=True) == pytest.approx(one.get_all_distances(mic=True), abs=1e-3)


def test_where_no_site_is_free_a_left_handed_cell_moves_none() -> None:
    crystal = bulk("MgO", "rocksalt", a=4.25)
    crystal.set_cell(crystal.cell[[1, 0, 2]])
    assert np.linalg.det(crystal.cell) < 0
    assert report(relax(crystal, Raises()))["rmsd"] < 1e-6


def test_rmsd_counts_neither_strain_nor_shift() -> None:
    strained = relax(bulk("Cu", a=3.9, cubic=True), EMT())
    assert report(strained)["steps"] > 3
    assert report(strained)["rmsd"] < 1e-6
    one_off = bulk("Cu", a=COPPER, cubic=True)
    one_off.positions += 1.0  # a common shift
    one_off.positions[0, 0] += 0.2
    # Relative to the mean, one atom of four moves back by 3/4 of 0.2 A and the others by 1/4.
    expected = 0.2 * math.sqrt((0.75**2 + 3 * 0.25**2) / 4)
    assert report(relax(one_off, EMT(), fmax=0.005))["rmsd"] == pytest.approx(expected, rel=0.02)


def test_a_list_comes_back_as_a_list_and_bad_members_do_not_cost_the_others() -> None:
    structures = [bulk("Cu"), bulk("Au"), bulk("Cu").repeat(2)]
    relaxed = relax(structures, Raises())
    assert [report(a)["converged"] for a in relaxed] == [True, False, True]
    assert report(relaxed[1])["reason"] == "the calculator failed: RuntimeError: no parameters for gold"
    assert relaxed[1].calc is None
    assert relax([], Raises()) == []


@pytest.mark.parametrize(
    ("atoms", "calculator", "fragment"),
    [
        (bulk("Cu"), Explodes(), "broke down in step"),
        (bulk("Cu"), NotANumber(), "not finite"),
        (bulk("Cu", a=1.0), EMT(), "rejected before relaxation: 0.25 A^3 per atom"),
        (Atoms("Cu", cell=3 * np.eye(3)), EMT(), "not periodic"),
        (Atoms(cell=3 * np.eye(3), pbc=True), EMT(), "no atoms"),
    ],
)
def test_what_breaks_down_keeps_its_geometry_and_says_why(atoms: Atoms, calculator: Any, fragment: str) -> None:
    relaxed = relax(atoms, calculator)
    told = report(relaxed)
    assert fragment in told["reason"]
    assert told["energy"] is None
    assert told["rmsd"] == 0.0
    assert np.array_equal(relaxed.cell, atoms.cell)
    assert np.array_equal(relaxed.positions, atoms.positions)


def test_whatever_a_structure_raises_is_its_own_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def screen(atoms: Atoms) -> Any:
        if "Au" in atoms.symbols:
            raise MemoryError("no room for\n64000 atoms")
        return screen_given(atoms)

    monkeypatch.setattr(relaxation, "screen_given", screen)
    relaxed = relax([bulk("Au"), bulk("Cu")], EMT())
    assert report(relaxed[0])["reason"] == "MemoryError: no room for 64000 atoms"
    assert report(relaxed[0])["energy"] is None
    assert report(relaxed[1])["converged"]


def test_the_command_fails_where_every_structure_does(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "two.extxyz", [bulk("Cu", a=1.0), bulk("Au", a=1.0)])
    out = tmp_path / "out.extxyz"
    done = CliRunner().invoke(app, ["relax", str(tmp_path / "two.extxyz"), "-o", str(out)])
    assert done.exit_code == 1
    assert "no structure could be relaxed: the reasons stand above" in done.stderr
    assert re.search(r"^two-0000, two-0001: rejected before .* A\^3 per atom", done.stdout, re.MULTILINE), done.stdout
    assert all("A^3 per atom" in a.info["relaxation"]["reason"] for a in ase.io.read(out, ":")), "they are recorded"


def test_collapsed_cells_never_reach_the_calculator() -> None:
    calculator = Raises()
    relax(bulk("Au", a=1.0), calculator)
    assert calculator.atoms is None


def test_running_out_of_time_or_steps_keeps_the_last_geometry() -> None:
    start = strained_copper()
    for settings, reason in (({"time_limit": 1e-9}, "time limit"), ({"max_steps": 3}, "not converged in 3 steps")):
        relaxed = relax(start, EMT(), **settings)
        told = report(relaxed)
        assert reason in told["reason"]
        assert told["energy"] is not None
    assert told["steps"] == 3
    assert told["energy"] < told["energy_start"]
    assert told["rmsd"] > 0


def test_fixed_atoms_stay_where_they_are_and_so_does_the_cell() -> None:
    start = strained_copper()
    start.set_constraint(FixAtoms([0, 2]))
    relaxed = relax(start, EMT())
    assert report(relaxed)["converged"]
    assert np.array_equal(relaxed.cell, start.cell)
    assert np.array_equal(relaxed.positions[[0, 2]], start.positions[[0, 2]])
    assert np.abs(relaxed.positions[[1, 3]] - start.positions[[1, 3]]).max() > 0.01
    assert len(relaxed.constraints) == 1


def test_a_fixed_cell_stays_to_the_last_digit_while_the_atoms_move() -> None:
    start = strained_copper()
    relaxed = relax(start, EMT(), fixed_cell=True)
    assert report(relaxed)["converged"]
    assert report(relaxed)["rmsd"] > 0.05
    assert np.array_equal(relaxed.cell, start.cell)
    assert not relaxed.constraints
    assert np.abs(relaxed.get_forces()).max() <= 0.05
    assert np.abs(relaxed.get_stress()).max() > 0.01, "the cell alone is strained"


@pytest.mark.parametrize("sites", [[0, 2], np.array([2, 0]), range(0, 3, 2)])
def test_fixed_sites_stay_to_the_last_digit_and_the_cell_with_them(sites: Any) -> None:
    start = strained_copper()
    held = start.copy()
    held.set_constraint(FixAtoms([0, 2]))
    by_argument, by_constraint = relax(start, EMT(), fixed_sites=sites), relax(held, EMT())
    assert np.array_equal(by_argument.positions, by_constraint.positions)
    assert np.array_equal(by_argument.positions[[0, 2]], start.positions[[0, 2]])
    assert np.array_equal(by_argument.cell, start.cell)
    assert not start.constraints


def test_a_held_site_is_what_the_movement_of_the_others_is_measured_from() -> None:
    start = bulk("Cu", a=COPPER, cubic=True)
    start.positions[1, 0] += 0.2
    told = report(relax(start, EMT(), fixed_sites=[0, 2, 3], fmax=0.001))
    assert told["rmsd"] == pytest.approx(0.2 / math.sqrt(4), rel=0.01)


@pytest.mark.parametrize(
    ("constraint", "cell_moves"),
    [
        (FixScaled(0), True),
        (FixSymmetry(bulk("Cu", a=3.9, cubic=True)), True),
        (FixedPlane(0, (0, 0, 1)), False),
        (FixCartesian(0, (True, False, False)), False),
        (FixBondLength(0, 1), False),
    ],
)
def test_the_cell_moves_only_under_constraints_that_can_follow_it(constraint: Any, cell_moves: bool) -> None:
    start = bulk("Cu", a=3.9, cubic=True)
    start.set_constraint(constraint)
    relaxed = relax(start, EMT())
    assert report(relaxed)["converged"]
    assert np.array_equal(relaxed.cell, start.cell) != cell_moves


@pytest.mark.parametrize(
    "constraint",
    [FixAtoms([]), FixAtoms(mask=[False] * 4), FixCartesian([], (True,) * 3), FixCartesian(0, (False,) * 3)],
)
def test_a_constraint_that_holds_nothing_holds_no_cell(constraint: Any) -> None:
    start = strained_copper()
    start.set_constraint(constraint)
    free, held = relax(strained_copper(), EMT()), relax(start, EMT())
    assert np.array_equal(held.cell, free.cell)
    assert report(held) == report(free)


def test_a_site_held_by_its_scaled_position_is_what_movement_is_measured_from() -> None:
    start = bulk("Cu", a=COPPER, cubic=True)
    start.positions[1, 0] += 0.2
    start.set_constraint([FixScaled(0)])
    relaxed = relax(start, EMT(), fmax=0.005)
    moved = (relaxed.get_scaled_positions(wrap=False) - start.get_scaled_positions(wrap=False)) @ relaxed.cell
    assert np.abs(moved[0]).max() < 1e-9
    assert report(relaxed)["rmsd"] == pytest.approx(np.sqrt((moved**2).sum(1).mean()))


def with_results(place: str) -> Atoms:
    atoms = bulk("Cu", a=3.7)
    stress = [0.1, 0.2, 0.3, 0.0, 0.0, 0.0]
    if place == "info":
        atoms.info |= {"energy": -10.25, "free_energy": -10.3, "stress": stress, "note": "kept"}
    else:
        atoms.arrays |= {"forces": np.full((1, 3), 0.5), "energies": np.array([-10.25]), "magmoms": np.array([2.0])}
    return atoms


@pytest.mark.parametrize("place", ["info", "arrays"])
@pytest.mark.parametrize("calculator", [EMT(), NotANumber()])
def test_results_of_another_program_are_neither_lost_nor_taken_for_the_relaxed_ones(
    place: str, calculator: Any, tmp_path: Path
) -> None:
    start = with_results(place)
    given = dict(getattr(start, place))
    relaxed = relax(start, calculator)
    write_extxyz(tmp_path / "out.extxyz", [relaxed])
    back = ase.io.read(tmp_path / "out.extxyz")
    kept = getattr(back, place)
    for name in given.keys() & set(all_properties):
        assert name not in getattr(relaxed, place)
        assert np.allclose(kept[f"given_{name}"], given[name])
    energy = report(relaxed)["energy"]
    if energy is None:
        assert back.calc is None
    else:
        assert back.get_potential_energy() == pytest.approx(energy, abs=1e-6)
        assert np.allclose(back.get_forces(), relaxed.get_forces(), atol=1e-6)
    assert getattr(start, place).keys() == given.keys()


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "fragment"),
    [
        (("Cu",), {}, TypeError, "takes ase.Atoms or a list"),
        ((bulk("Cu"), 3), {}, TypeError, "must be an ASE calculator"),
        ((bulk("Cu"), "CHGNet"), {}, ValueError, "calculator 'CHGNet' is not known: write it as chgnet"),
        ((bulk("Cu"), "emt"), {}, ValueError, 'neither "chgnet", a file, nor one of the MACE models'),
        ((bulk("Cu"), EMT()), {"fmax": 0.0}, ValueError, "fmax"),
        ((bulk("Cu"), EMT()), {"time_limit": math.nan}, ValueError, "time_limit"),
        ((bulk("Cu"), EMT()), {"processes": 0}, ValueError, "processes"),
        ((bulk("Cu"), EMT()), {"fixed_sites": [1]}, ValueError, r"fixed_sites=\[1\]: Cu has the sites 0 to 0"),
        ((bulk("Cu"), EMT()), {"fixed_sites": [-1]}, ValueError, r"fixed_sites=\[-1\]"),
        ((bulk("Cu"), EMT()), {"fixed_sites": ["Cu"]}, TypeError, "whole numbers"),
        (([bulk("Cu"), bulk("Cu")], EMT()), {"processes": 2}, TypeError, "a calculator given by name"),
    ],
)
def test_mistakes_of_the_caller_raise(arguments: Any, settings: Any, error: type[Exception], fragment: str) -> None:
    if "emt" in arguments:
        pytest.importorskip("mace")
    with pytest.raises(error, match=fragment):
        relax(*arguments, **settings)


def test_processes_change_nothing_but_the_time() -> None:
    several = [bulk("Cu", a=3.7), bulk("NaCl", "rocksalt", a=0.8), bulk("Al", a=4.2)]
    one, two = (relax(several, max_steps=3, processes=n) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.positions, b.positions)
        assert report(a) == report(b)


POOL = """
import os, time
from dosmatgen_ase.judge.relaxation import WorkerPool
if __name__ == "__main__":
    with WorkerPool(2) as pool:
        jobs = [pool.submit(os.getpid) for _ in range(2)]
        [job.result() for job in jobs]
        print(*pool._processes, flush=True)
        [pool.submit(time.sleep, 600).result() for _ in range(2)]
"""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(tmp_path: Path, end: signal.Signals) -> None:
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    environment = {**os.environ, "PYTHONPATH": str(Path(relaxation.__file__).parents[2])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        workers = [int(word) for word in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.send_signal(end)
        parent.wait(60)
    deadline = time.monotonic() + 60
    while alive := [pid for pid in workers if _runs(pid)]:
        if time.monotonic() > deadline:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            pytest.fail("workers went on")
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_denormal_numbers_come_back() -> None:
    relax(bulk("Cu"), EMT())
    assert torch.tensor(1e-40).mul(1.0) > 0


def test_chgnet_relaxes_rock_salt() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of CHGNet's reaches the user
        relaxed = relax(bulk("NaCl", "rocksalt", a=5.9))
    assert report(relaxed)["converged"]
    assert relaxed.cell.lengths() * math.sqrt(2) == pytest.approx(5.69, abs=0.03)  # PBE: 5.70 A


def offline(name: str) -> str:
    raise RuntimeError(f"no route to host for {name}")


def test_a_mace_name_that_cannot_be_downloaded_gives_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mace")
    from mace.calculators import foundations_models

    monkeypatch.setattr(foundations_models, "download_mace_mp_checkpoint", offline)
    before = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    with pytest.raises(OSError, match=r"cannot download MACE model 'small'.*local model file"):
        relax(bulk("Cu"), "small")
    assert os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD") == before


def test_a_file_that_is_no_mace_model_gives_one_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("mace")
    (tmp_path / "m.model").write_text("not a model")
    with pytest.raises(ValueError, match="not a MACE model"):
        relax(bulk("Cu"), tmp_path / "m.model", trust_model=True)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("command", [["relax", "--calculator"], ["generate", "--relax"]])
def test_a_model_file_is_not_loaded_without_trust(tmp_path: Path, command: list[str]) -> None:
    torch.save(Payload(tmp_path / "ran"), tmp_path / "m.model")
    ase.io.write(tmp_path / "cu.cif", bulk("Cu"))
    name, option = command
    done = CliRunner().invoke(app, [name, str(tmp_path / "cu.cif"), option, str(tmp_path / "m.model")])
    assert done.exit_code == 1
    assert "is a pickle, which may run any code" in done.stderr
    assert "add trust_model=True (--trust-model)" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_python_and_flows_trust_no_model_file_unasked(tmp_path: Path) -> None:
    from dosmatgen_ase import DOSGenerator, TargetDOS
    from dosmatgen_ase.crystals.convert import to_structure
    from dosmatgen_ase.flows.jobs import RelaxMaker

    path = tmp_path / "m.model"
    torch.save(Payload(tmp_path / "ran"), path)
    dos, maker = TargetDOS.from_peaks([(-0.65, 6.0, 0.3)], window=(-3, 1)), RelaxMaker(calculator=str(path))
    for attempt in (
        lambda: relax(bulk("Cu"), path),
        lambda: relax([bulk("Cu"), bulk("Ag")], str(path), processes=2),
        lambda: relax_into(tmp_path / "out.extxyz", [bulk("Cu")], path),
        lambda: DOSGenerator().generate(dos, 1, num_atoms=2, relax=path),
        lambda: maker.make.original(maker, to_structure(bulk("Cu"))),
    ):
        with pytest.raises(ValueError, match=r"is a pickle, which may run any code .* add trust_model=True"):
            attempt()
    assert not (tmp_path / "ran").exists()


def suicide(atoms: Atoms) -> Atoms:
    """Ends its own process at gold, as the system does with one that takes all memory."""
    if "Au" in atoms.symbols:
        os.kill(os.getpid(), signal.SIGKILL)
    atoms = atoms.copy()
    atoms.info["relaxation"] = {"reason": None}
    return atoms


def test_a_structure_that_costs_its_process_is_its_own_failure() -> None:
    given = [bulk(symbol) for symbol in ("Cu", "Au", "Al", "Ag")]
    found = list(relaxation.in_processes(suicide, given, 2))
    assert [str(atoms.symbols) for atoms in found] == ["Cu", "Au", "Al", "Ag"]
    reasons = [atoms.info["relaxation"]["reason"] for atoms in found]
    assert [reason is None for reason in reasons] == [True, False, True, True]
    assert "its process was killed, as by a system that is short of memory" in reasons[1]
    assert found[1].info["relaxation"]["energy"] is None


@pytest.mark.parametrize("atoms", [bulk("NaCl", "rocksalt", a=5.6), bulk("Fe") * (2, 1, 1)])
def test_chgnet_gives_the_numbers_of_its_own_calculator(atoms: Atoms) -> None:
    from dosmatgen_ase.forward.features import load_chgnet
    from dosmatgen_ase.judge.chgnet import CHGNetForces

    model = load_chgnet()
    atoms.rattle(0.05, seed=2)
    told = model.predict_structure(AseAtomsAdaptor.get_structure(atoms), task="efs")
    atoms.calc = CHGNetForces()
    assert atoms.get_potential_energy() / len(atoms) == pytest.approx(float(told["e"]), abs=1e-5)
    np.testing.assert_allclose(atoms.get_forces(), told["f"], atol=2e-5)
    assert atoms.calc.results["stress"].shape == (6,), "nine numbers would change as a file is read"
    np.testing.assert_allclose(atoms.get_stress(voigt=False), told["s"] / 160.21766208, atol=1e-6)


def test_a_cell_too_large_for_chgnet_is_told_before_the_work() -> None:
    outcome = report(relax(bulk("C", "diamond", cubic=True) * (3, 3, 3), max_steps=0))
    assert "bonds and angles are too many for CHGNet, at most 50000: take a smaller cell" in outcome["reason"]


def test_without_mace_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m == "mace" or m.startswith("mace.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mace", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pip install dosmatgen-ase"):
        relax(bulk("Cu"), "medium-mpa-0")


def test_a_local_mace_model_file_relaxes(tmp_path: Path) -> None:
    pytest.importorskip("mace")
    with _mace_environment():
        from e3nn import o3
        from mace.modules import ScaleShiftMACE, interaction_classes

        kinds, scalars = interaction_classes["RealAgnosticResidualInteractionBlock"], o3.Irreps("4x0e")
        model = ScaleShiftMACE(
            r_max=4.0, num_bessel=4, num_polynomial_cutoff=5, max_ell=1, num_interactions=2, num_elements=1,
            interaction_cls=kinds, interaction_cls_first=kinds, hidden_irreps=scalars, MLP_irreps=scalars,
            gate=torch.nn.functional.silu, atomic_energies=np.array([-3.0]), avg_num_neighbors=12.0,
            atomic_numbers=[29], correlation=1, atomic_inter_scale=[0.01], atomic_inter_shift=[0.0],
        )  # fmt: skip
        torch.save(model.double(), tmp_path / "tiny.model")
    told = report(relax(strained_copper(), str(tmp_path / "tiny.model"), max_steps=3, trust_model=True))
    assert told["energy"] == pytest.approx(-3.0, abs=1.0)


def test_the_command_relaxes_files_and_tells_failures(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "salt.cif", bulk("NaCl", "rocksalt", a=5.8))
    ase.io.write(tmp_path / "two.extxyz", [bulk("Cu", a=1.0), bulk("Cu", a=3.7)])
    out = tmp_path / "relaxed.extxyz"
    files = [str(tmp_path / name) for name in ("salt.cif", "two.extxyz")]
    result = CliRunner().invoke(app, ["relax", *files, "-o", str(out), "--max-steps", "30"])
    assert result.exit_code == 0, result.output
    assert "two-0000" in result.output
    told = [a.info["relaxation"] for a in ase.io.read(out, ":")]
    assert [t["converged"] for t in told] == [True, False, True]
    assert "A^3 per atom" in told[1]["reason"]
    above = [a.info.get("energy_above_hull") for a in ase.io.read(out, ":")]
    assert above[1] is None
    assert max(abs(above[0]), abs(above[2])) < 0.03
    same = CliRunner().invoke(app, ["relax", files[0], files[0], "-o", str(out)])
    assert same.exit_code == 1
    assert "two structures would be named salt" in same.output
    before = (tmp_path / "two.extxyz").read_bytes()
    onto_itself = CliRunner().invoke(app, ["relax", files[1], "-o", files[1]])
    assert onto_itself.exit_code == 1
    assert "this command reads it" in onto_itself.output
    assert (tmp_path / "two.extxyz").read_bytes() == before
    ase.io.write(tmp_path / "water.xyz", molecule("H2O"))
    none = CliRunner().invoke(app, ["relax", str(tmp_path / "water.xyz"), "-o", str(tmp_path / "none.extxyz")])
    assert none.exit_code == 1
    assert "no structure could be relaxed" in none.output
    assert "has no cell" in ase.io.read(tmp_path / "none.extxyz").info["relaxation"]["reason"]


AIRSS = """TITL mgo-1 0.0 18.5 -10.25 0 0 2 (Fm-3m) n - 1
CELL 1.0 3.01 3.01 3.01 60 60 60
LATT -1
SFAC Mg O
Mg 1 0.0 0.0 0.0 1.0
O  2 0.5 0.5 0.5 1.0
END
"""


def test_the_command_holds_cell_and_sites_and_reads_files_that_carry_energies(tmp_path: Path) -> None:
    (tmp_path / "mgo.res").write_text(AIRSS)
    copper = with_results("arrays")
    copper.set_constraint(FixAtoms([0]))
    ase.io.write(tmp_path / "cu.traj", copper)
    files, out = [str(tmp_path / "mgo.res"), str(tmp_path / "cu.traj")], tmp_path / "relaxed.extxyz"
    result = CliRunner().invoke(app, ["relax", *files, "-o", str(out)])
    assert result.exit_code == 0, result.output
    oxide, metal = ase.io.read(out, ":")
    assert oxide.info["given_energy"] == -10.25
    assert oxide.get_potential_energy() == pytest.approx(2 * oxide.info["relaxation"]["energy"])
    assert np.allclose(metal.cell, copper.cell, atol=1e-8), "one atom is fixed, so the cell stays"
    oxide.rattle(0.05, seed=1)
    ase.io.write(tmp_path / "start.extxyz", oxide)
    start = ase.io.read(tmp_path / "start.extxyz")
    for option in (["--fixed-cell"], ["--fixed-sites", "1"]):
        line = ["relax", str(tmp_path / "start.extxyz"), "-o", str(out), "--overwrite", *option]
        result = CliRunner().invoke(app, line)
        assert result.exit_code == 0, result.output
        held = ase.io.read(out)
        assert np.allclose(held.cell, start.cell, atol=1e-8)
        assert not np.allclose(held.positions[0], start.positions[0], atol=1e-3)
        assert np.allclose(held.positions[1], start.positions[1], atol=1e-8) == ("--fixed-sites" in option)


def test_a_run_that_was_stopped_goes_on_with_what_is_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relaxed: list[float] = []

    class Stopping(EMT):
        """Counts structures by their lattice, and stops like Ctrl-C at the third."""

        def calculate(self, *args: Any) -> None:
            lattice = round(float(args[0].info["a"]), 2)
            if lattice not in relaxed:
                if lattice == stop_at:
                    raise KeyboardInterrupt
                relaxed.append(lattice)
            super().calculate(*args)

    monkeypatch.setattr(relaxation, "load_calculator", lambda *_: Stopping())
    structures = [bulk("Cu", a=a) for a in (3.5, 3.6, 3.7, 3.8)]
    for atoms in structures:
        atoms.info["a"] = atoms.cell.lengths()[0] * np.sqrt(2)
    out, stop_at = tmp_path / "out.extxyz", 3.7
    with pytest.raises(KeyboardInterrupt):
        relax_into(out, structures, "emt")
    assert [round(a.info["a"], 2) for a in ase.io.read(out, ":")] == [3.5, 3.6]
    relaxed.clear()
    stop_at = 0.0
    made = relax_into(out, structures, "emt")
    assert relaxed == [3.7, 3.8]
    assert [a.info["relaxation"]["converged"] for a in made] == [True] * 4
    assert len(ase.io.read(out, ":")) == 4
    relaxed.clear()
    assert len(relax_into(out, structures, "emt")) == 4
    assert relaxed == []
    before = out.read_bytes()
    assert len(relax_into(out, structures[:2], "emt")) == 2
    assert (relaxed, out.read_bytes()) == ([], before), "what it holds beyond these stays"
    lost = r"holds [124] structures of another run, which would be lost: choose"
    for others, limits in ((structures[1:], {}), (structures, {"fmax": 0.01}), ([*structures[:2], bulk("Au")], {})):
        with pytest.raises(FileExistsError, match=lost):
            relax_into(out, others, "emt", **limits)
    assert (relaxed, out.read_bytes()) == ([], before)
    fifth = bulk("Cu", a=3.75)
    fifth.info["a"] = 3.75
    made = relax_into(out, [fifth, structures[2]], "emt", among=structures)  # another choice of the same draws
    assert relaxed == [3.75], "what the file holds is not done again"
    assert [round(a.info["a"], 2) for a in made] == [3.75, 3.7]
    assert [round(a.info["a"], 2) for a in ase.io.read(out, ":")] == [3.75, 3.7, 3.5, 3.6, 3.8], "nothing is lost"
    relaxed.clear()
    relax_into(out, structures[1:], "emt", fmax=0.01, overwrite=True)
    assert relaxed == [3.6, 3.7, 3.8]


class Nameless:
    """A constraint of somebody else, which cannot be told."""

    def adjust_positions(self, atoms: Atoms, new: np.ndarray) -> None: ...

    def adjust_forces(self, atoms: Atoms, forces: np.ndarray) -> None: ...


@pytest.mark.parametrize(
    "constraints",
    [
        [FixScaled(0, (True, False, False)), FixScaled([1, 2], (False, True, True))],
        [FixCartesian(0, (True, False, False)), FixAtoms([3])],
        [FixSymmetry(bulk("Cu", a=3.7, cubic=True))],
        [Nameless()],
    ],
    ids=["scaled", "cartesian", "symmetry", "nameless"],
)
def test_what_is_held_is_known_again_when_a_run_goes_on(
    constraints: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaxation, "load_calculator", lambda *_: EMT())
    out, start = tmp_path / "out.extxyz", bulk("Cu", a=3.7, cubic=True)
    start.set_constraint(constraints)
    (first,) = relax_into(out, [start], "emt")
    (again,) = relax_into(out, [start.copy()], "emt")
    assert [type(c) for c in again.constraints] == [type(c) for c in constraints]
    assert list(map(_in_full, again.constraints)) == list(map(_in_full, first.constraints))
    start.set_constraint(FixAtoms([1]))
    with pytest.raises(FileExistsError, match="another run"):
        relax_into(out, [start], "emt")


def test_the_command_writes_what_is_held_also_when_it_is_given_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaxation, "load_calculator", lambda *_: EMT())
    start = bulk("Cu", a=3.7, cubic=True)
    start.set_constraint([FixScaled(0, (True, False, False))])
    ase.io.write(tmp_path / "sd.vasp", start)
    out = tmp_path / "POSCAR_relaxed"
    line = ["relax", str(tmp_path / "sd.vasp"), "-o", str(out), "--calculator", "emt"]
    for turn in range(2):
        done = CliRunner().invoke(app, line)
        assert done.exit_code == 0, done.output
        assert "Selective dynamics" in out.read_text(), turn
        (kept,) = ase.io.read(tmp_path / "POSCAR_relaxed.extxyz", ":", format="extxyz")
        assert kept.info["relaxation"]["converged"]


def test_another_potential_in_the_same_file_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_file(path: str | Path, *_: Any) -> LennardJones:
        return LennardJones(sigma=float(Path(path).read_text()), epsilon=0.4, rc=9.0)

    monkeypatch.setattr(relaxation, "load_calculator", of_file)
    model, out = tmp_path / "m.model", tmp_path / "out.extxyz"
    model.write_text("2.3")
    (first,) = relax_into(out, [bulk("Cu", a=3.7)], model, trust_model=True)
    model.write_text("2.6")
    with pytest.raises(FileExistsError, match="holds 1 structures of another run"):
        relax_into(out, [bulk("Cu", a=3.7)], model, trust_model=True)
    (second,) = relax_into(out, [bulk("Cu", a=3.7)], model, trust_model=True, overwrite=True)
    assert second.get_volume() > 1.2 * first.get_volume()


def test_what_was_told_of_the_geometry_given_is_set_aside() -> None:
    copper = bulk("Cu", a=3.7)
    copper.info |= {"energy_above_hull": 0.0123, "scores": {"distance": 0.2}, "material_id": "x"}
    broken = bulk("Si")  # which EMT does not know
    broken.info |= copper.info
    for atoms in (relax(copper, EMT()), relax(broken, EMT())):
        assert not {"energy_above_hull", "scores"} & atoms.info.keys()
        assert (atoms.info["given_energy_above_hull"], atoms.info["given_scores"]) == (0.0123, {"distance": 0.2})
        assert atoms.info["material_id"] == "x"
    assert "energy_above_hull" in copper.info, "what was given stays"


def test_the_command_loses_no_structures_of_other_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaxation, "load_calculator", lambda *_: EMT())
    monkeypatch.chdir(tmp_path)
    for name in ("Cu", "Au"):
        ase.io.write(f"{name}.cif", bulk(name))
    line = ["relax", "--calculator", "emt"]
    assert CliRunner().invoke(app, [*line, "Cu.cif", "Au.cif"]).exit_code == 0
    before = Path("relaxed.extxyz").read_bytes()
    refused = CliRunner().invoke(app, [*line, "Au.cif"])
    assert refused.exit_code == 1
    assert "relaxed.extxyz holds 1 structures of another run" in refused.stderr
    assert CliRunner().invoke(app, [*line, "Cu.cif"]).exit_code == 0, "it is there already"
    assert Path("relaxed.extxyz").read_bytes() == before
    assert CliRunner().invoke(app, [*line, "Au.cif", "--overwrite"]).exit_code == 0
    assert [str(atoms.symbols) for atoms in ase.io.read("relaxed.extxyz", ":")] == ["Au"]


def test_symmetry_within_the_tolerance_is_made_exact_and_no_other() -> None:
    exact = bulk("NaCl", "rocksalt", a=5.64, cubic=True)[[4, 1, 2, 3, 0, 5, 6, 7]]
    rattled = exact.copy()
    rattled.rattle(0.02, seed=1)
    before = rattled.positions.copy()

    def operations(atoms: Atoms) -> int:
        cell = (atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)
        return len(spglib.get_symmetry(cell, symprec=1e-4)["rotations"])

    refined = symmetrized(rattled)
    assert (operations(rattled), operations(refined), operations(exact)) == (1, 192, 192)
    assert np.array_equal(refined.numbers, exact.numbers)
    assert np.abs(refined.get_all_distances(mic=True) - exact.get_all_distances(mic=True)).max() < 0.05
    assert operations(symmetrized(rattled, 1e-3)) == 1
    assert np.array_equal(rattled.positions, before)
    with pytest.raises(ValueError, match=r"within 0.1 A: two atoms are closer"):
        symmetrized(Atoms("Cu2", positions=[[0, 0, 0], [0.03, 0, 0]], cell=[3, 3, 3], pbc=True))
