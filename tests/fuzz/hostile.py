"""Crystals that no calculation has made, and what takes crystals: each must refuse in one line, or compute."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.io.jsonio import decode, encode


def crystal(rng: random.Random) -> Atoms:
    """One of them; the same generator gives the same crystal."""
    kind = rng.choice(list(KINDS))
    atoms = KINDS[kind](rng)
    atoms.info["kind"] = kind
    return atoms


def _some(rng: random.Random, size: int, edge: float, elements: str = "Cu") -> Atoms:
    places = [[rng.random() for _ in range(3)] for _ in range(size)]
    cell = np.diag([edge] * 3)
    return Atoms([elements] * size, scaled_positions=places, cell=cell, pbc=True)


def _far(rng: random.Random) -> Atoms:
    atoms = bulk("NaCl", "rocksalt", a=5.6)
    atoms.positions[rng.randrange(2), rng.randrange(3)] += rng.choice([1e3, 1e6, 1e12, -1e12, 1e100, 1e300, 1e308])
    return atoms


def _skewed(rng: random.Random) -> Atoms:
    shear = np.eye(3)
    shear[1, 0] = rng.choice([3, 10, 100, 1e4, 1e7, 1e12])
    shear[2, rng.randrange(2)] = rng.choice([0, 5, 100, 1e6])
    return (
        make_supercell(bulk("Cu"), shear)
        if abs(shear).max() < 1e4
        else Atoms("Cu", cell=shear @ bulk("Cu").cell, pbc=True)
    )


def _thin(rng: random.Random) -> Atoms:
    edges = [rng.choice([0.01, 0.3, 0.6, 1.2, 3.0]), rng.choice([0.6, 1.5, 4.0]), rng.choice([4.0, 40.0, 400.0, 4e4])]
    return Atoms("Cu", cell=edges, pbc=True)


def _not_finite(rng: random.Random) -> Atoms:
    atoms = bulk("NaCl", "rocksalt", a=5.6)
    if rng.random() < 0.5:
        atoms.positions[0, 0] = rng.choice([math.nan, math.inf, -math.inf])
    else:
        atoms.cell[0, 0] = rng.choice([math.nan, math.inf, 1e200, 1e-200])
    return atoms


def _strange(rng: random.Random) -> Atoms:
    atoms = bulk("NaCl", "rocksalt", a=5.6)
    kind = rng.randrange(7)
    if kind == 0:
        atoms.numbers[0] = rng.choice([0, 95, 118, 119, 200, -1])
    elif kind == 1:
        atoms.info["occupancy"] = rng.choice([5, "x", {0: 3}, {"0": {"Na": 0.5}}, [[]]])
    elif kind == 2:
        atoms.pbc = rng.choice([False, [True, True, False]])
    elif kind == 3:
        atoms.set_cell(-atoms.cell.array)
    elif kind == 4:
        atoms.info |= {
            "energy": "x",
            "stress": [1, 2],
            "forces": None,
            "dosmatgen": 3,
            "relaxation": "no",
            "material_id": 7,
        }
    elif kind == 5:
        atoms.arrays["forces"] = np.full((2, 3), np.nan)
    else:
        atoms.set_initial_magnetic_moments([np.nan, 1e300])
    return atoms


def _cluster(rng: random.Random) -> Atoms:
    places = [[rng.random() * 6 for _ in range(3)] for _ in range(300)]
    return Atoms("C300", positions=places, cell=[40] * 3, pbc=True)


KINDS: dict[str, Callable[[random.Random], Atoms]] = {
    "empty": lambda _: Atoms(cell=np.eye(3), pbc=True),
    "no cell": lambda _: Atoms("Cu", pbc=True),
    "flat": lambda _: Atoms("Cu", cell=[[3, 0, 0], [0, 3, 0], [3, 3, 0]], pbc=True),
    "one place": lambda rng: Atoms("Cu3", positions=[[0.0, 0, rng.choice([0, 1e-9, 0.1])]] * 3, cell=[4] * 3, pbc=True),
    "far": _far,
    "skewed": _skewed,
    "thin": _thin,
    "not finite": _not_finite,
    "strange": _strange,
    "dense": lambda rng: _some(rng, rng.choice([2, 8, 20, 60]), rng.choice([1.0, 2.0, 4.0])),
    "crowded": lambda rng: _some(rng, 2000, rng.choice([16.0, 30.0])),
    "sparse": lambda rng: _some(rng, rng.choice([1, 2]), rng.choice([20.0, 100.0, 1e4, 1e9])),
    "cluster": _cluster,
    "large": lambda rng: bulk("Cu", cubic=True) * ([rng.choice([8, 14, 25])] * 3),
    "supercell": lambda rng: bulk(rng.choice(["Cu", "Si", "Fe"]), cubic=True) * (2, 2, rng.choice([1, 2])),
    "heavy": lambda rng: _some(rng, rng.choice([4, 20]), rng.choice([5.0, 8.0]), rng.choice(["U", "Cs", "He", "Ce"])),
    "tiny": lambda rng: Atoms("H", cell=[rng.choice([1e-12, 1e-3, 0.5])] * 3, pbc=True),
    "huge": lambda rng: Atoms("H", cell=[rng.choice([1e5, 1e12, 1e102, 1e150])] * 3, pbc=True),
}  # fmt: skip


# -- what takes them ---------------------------------------------------------------------------------------------------


def _predict(atoms: Atoms) -> None:
    from dosmatgen_ase import predict_dos

    predict_dos(atoms)


def _bands(atoms: Atoms) -> None:
    from dosmatgen_ase import predict_bands

    predict_bands(atoms, npoints=5)


def _relax(atoms: Atoms) -> None:
    from dosmatgen_ase import relax
    from dosmatgen_ase.files import extxyz

    relaxed = relax([atoms], max_steps=1, time_limit=2.0)
    assert "\n" not in str(relaxed[0].info["relaxation"]["reason"])
    if np.isfinite(relaxed[0].cell).all() and "kind" in atoms.info and atoms.info["kind"] != "strange":
        extxyz(relaxed)


def _screen(atoms: Atoms) -> None:
    from dosmatgen_ase import screen_many
    from dosmatgen_ase.crystals.checks import check_atoms

    outcome = screen_many([atoms, atoms])
    assert all("\n" not in str(told.reason) for told in outcome)
    check_atoms(atoms, "it", 2000)


def _index(atoms: Atoms) -> None:
    from dosmatgen_ase.retrieval.build import build_index

    atoms.info["material_id"] = "x"
    build_index([atoms])


def _dft(atoms: Atoms) -> None:
    from dosmatgen_ase.dft import espresso
    from dosmatgen_ase.dft.interpolation import IrreducibleMesh
    from dosmatgen_ase.dft.settings import EspressoSettings

    crystal = espresso._crystal(atoms)
    settings = EspressoSettings().resolved(crystal)
    pseudos = {symbol: Path(f"{symbol}.upf") for symbol in set(crystal.get_chemical_symbols())}
    run = espresso._Run(Path.cwd(), None, settings, pseudos)  # type: ignore[arg-type]  # nothing is run
    mesh = IrreducibleMesh.of(crystal, settings.dos_kpoint_density or 1.0)
    run._write_pw(crystal, False, "nscf", np.column_stack([mesh.points, mesh.weights]))


def _hull(atoms: Atoms) -> None:
    from dosmatgen_ase import energy_above_hull

    energy_above_hull(atoms)


def _template(atoms: Atoms) -> None:
    from readers import checkpoints, target

    from dosmatgen_ase.generate.generator import DOSGenerator

    weights = Path("w.safetensors")
    weights.write_bytes(checkpoints()["generator.safetensors"])
    DOSGenerator(weights, device="cpu").generate(target(), 1, template=atoms, strength=0.5, num_steps=2, seed=0)


def _symmetry(atoms: Atoms) -> None:
    from dosmatgen_ase.judge.relaxation import symmetrized

    symmetrized(atoms)


def _labels(atoms: Atoms) -> None:
    from dosmatgen_ase.dft import labels

    list(labels._candidates({"x": atoms}, None, {}))


TAKERS: dict[str, Callable[[Atoms], Any]] = {
    "predict": _predict, "bands": _bands, "relax": _relax, "screen": _screen, "index": _index, "dft": _dft,
    "hull": _hull, "template": _template, "symmetry": _symmetry, "labels": _labels,
}  # fmt: skip
"""Every function that a crystal of the user goes into; the first word of a file's name tells which."""


def made(rng: random.Random) -> bytes:
    """A crystal as a file."""
    return str(encode(crystal(rng))).encode()


def honest() -> bytes:
    """A crystal that every taker takes."""
    return str(encode(bulk("NaCl", "rocksalt", a=5.6))).encode()


def take(path: Path) -> None:
    """Give the crystal of a file to what its name tells."""
    atoms = decode(path.read_text())
    TAKERS[path.stem](atoms)
