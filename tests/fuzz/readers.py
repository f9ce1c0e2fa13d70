"""Every reader of a file that may come from anyone, with small honest files to begin from.

`READERS` names each: what makes its files, what reads one and goes on with it as the package does, and which exceptions
are documented. Seeds are made once a process.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from hostile import TAKERS, honest, made, take

Files = dict[str, bytes]
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Reader:
    """A kind of file: honest examples by name, what reads one, what it may raise, how often it is chosen."""

    seeds: Callable[[], Files]
    read: Callable[[Path], object]
    raises: tuple[type[Exception], ...] = (ValueError, FileNotFoundError)
    weight: int = 1
    make: Callable[[random.Random], bytes] | None = None  # in place of a change of a seed


# -- honest files ------------------------------------------------------------------------------------------------------


def crystals() -> list[Atoms]:
    """A few small ones; the first has copper alone."""
    gold = Atoms("Au3Ni", scaled_positions=[(0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0), (0, 0, 0)], cell=[4.0] * 3)
    gold.pbc = True
    found = [bulk("Cu"), bulk("NaCl", "rocksalt", a=5.6), gold]
    for i, atoms in enumerate(found):
        atoms.info["material_id"] = f"mp-{i}"
    return found


@lru_cache(maxsize=1)
def target() -> Any:
    """A window with one peak."""
    from dosmatgen_ase.dos import TargetDOS

    return TargetDOS.from_peaks([(-0.65, 6.0, 0.3)], window=(-3, 1))


@lru_cache(maxsize=1)
def dos_files() -> Files:
    """One of each form that `TargetDOS.from_file` knows."""
    import test_readers as made

    bands = [[[-2.0, 1.6, 7.0], [0.3, 1.4, 7.5]]]
    dos, sites = made.spins_and_sites(2)
    few = slice(None, None, 20)
    energies = made.SPREAD[few]
    ions = [made.WIDE[None, :, None]] * 2
    step = made.calculation(made.E, [made.WIDE], [made.WIDE_SUM], ions, bands, 0.0)
    table = np.column_stack([made.E, made.WIDE])
    text = "\n".join(f"{e:.3f} {d:.4f}" for e, d in table)
    castep = "Number of k-points     1\nNumber of spin components 1\nNumber of electrons    4.000\n"
    castep += "Number of eigenvalues       4\nFermi energies (in atomic units) 0.018\nUnit cell vectors\n"
    castep += "4 0 0\n0 4 0\n0 0 4\n"
    castep += "K-point 1 0.0 0.0 0.0 1.0\nSpin component 1\n-0.2\n-0.05\n0.1\n0.3\n"
    arrays = io.BytesIO()
    parts = {"total": dos[:, few].sum(0), "pdos": sites[:, :, few], "emax": 9.0, "gap": 0.0}
    np.savez_compressed(arrays, energies=energies, **parts)
    own = [site.to_dict() for site in [target(), target()]]
    import test_program_files as programs

    return {
        "x-k1-1.pdos": programs.GOOD.encode(),
        "nacl.PDOS": programs.XML.encode(),
        "abo_DOS_AT0001": programs.abinit(True, 2).encode(),
        "vasprun.xml": made.vasprun(step, symbols="Na Cl", ISMEAR=0, SIGMA=0.2).encode(),
        "DOSCAR": made.doscar(made.E, [made.WIDE], [made.WIDE_SUM], [table[:, 1:], table[:, 1:]], 0.0).encode(),
        "DOSCAR.lobster": made.doscar(made.E, [made.WIDE], [made.WIDE_SUM], None, 0.0, lobster=True).encode(),
        "pymatgen.json": json.dumps(made.pymatgen_dict(energies, dos[:, few], sites[:, :, few], 1.0)).encode(),
        "own.json": json.dumps(own[0]).encode(),
        "dft.json": json.dumps({"result": {"sites": own, "total": own[0]}}).encode(),
        "dos.npz": arrays.getvalue(),
        "x.bands": castep.encode(),
        "dos.txt": b"# energy dos\n" + text.encode(),
        "dos.csv": b"energy (eV), up, down\n" + text.replace(" ", ", ").encode(),
    }


def read_dos(path: Path) -> None:
    """As ``dosmatgen dos`` and ``generate`` do."""
    from dosmatgen_ase.dos import TargetDOS

    with contextlib.suppress(ValueError):  # not all have sites
        TargetDOS.from_file(path, 0).on_grid()
    dos = TargetDOS.from_file(path)
    dos.on_grid()
    dos.to_dict()


@lru_cache(maxsize=1)
def structure_files() -> Files:
    """Formats that users have crystals in."""
    from dosmatgen_ase.files import write_structures

    folder = Path.cwd() / "seeds"
    folder.mkdir(exist_ok=True)
    names = ("a.extxyz", "a.cif", "POSCAR", "a.traj", "a.db", "a.json")
    for name in names:
        write_structures(folder / name, crystals()[:1] if name == "POSCAR" else crystals())
    ase.io.write(folder / "geometry.in", crystals()[1], format="aims")
    return {name: (folder / name).read_bytes() for name in (*names, "geometry.in")}


def read_structures(path: Path) -> None:
    """As every command that takes structures does."""
    from dosmatgen_ase.cli.files import read_structures as read
    from dosmatgen_ase.crystals.screening import screen_given

    for atoms in read([path]).values():
        screen_given(atoms)


@lru_cache(maxsize=1)
def checkpoints() -> Files:
    """Tiny weights of a generator, of a predictor, and the state of a training."""
    from dosmatgen_ase.dos import MODEL_GRID
    from dosmatgen_ase.forward.predictor import DOSPredictor, PredictorConfig
    from dosmatgen_ase.forward.tight_binding.model import TightBinding, TightBindingConfig
    from dosmatgen_ase.model.checkpoint import save_model

    folder = Path.cwd() / "seeds"
    folder.mkdir(exist_ok=True)
    state = training()
    save_model(folder / "generator.safetensors", state.model, {})
    state.save(folder / "state.safetensors")
    tables = {name: torch.ones(95, MODEL_GRID.size) * 5 for name in ("baseline", "support")}
    tables |= {"input_mean": torch.zeros(536), "input_std": torch.ones(536)}
    small = TightBindingConfig(width=4, hidden=4, site_hidden=4, rounds=1, message=2)
    model = TightBinding(small, torch.zeros(95, 3))
    DOSPredictor(PredictorConfig(hidden=4, depth=1, members=1), tables, {}, [model]).save(
        folder / "predictor.safetensors"
    )
    names = ("generator.safetensors", "state.safetensors", "predictor.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


def training() -> Any:
    """A training that has begun, of the smallest network."""
    from test_training import CONFIG, bulk_dataset

    from dosmatgen_ase.model.denoiser import DenoiserConfig
    from dosmatgen_ase.train.trainer import Trainer

    network = DenoiserConfig(width=4, pair_width=4, vector_channels=2, num_layers=1, num_radial=3)
    return Trainer(replace(CONFIG, network=network), bulk_dataset())


def one(files: Callable[[], Files], *names: str) -> Callable[[], Files]:
    """Some of several."""
    return lambda: {name: files()[name] for name in names}


def read_generator(path: Path) -> None:
    """Weights that load must be able to draw."""
    from dosmatgen_ase.generate.generator import DOSGenerator

    generator = DOSGenerator(path, device="cpu")
    try:
        generator.generate(target(), 2, num_atoms=2, num_steps=1, seed=0)
    except RuntimeError as error:
        if type(error).__name__ != "RejectedError":
            raise


def read_predictor(path: Path) -> None:
    """Weights that load must be able to predict."""
    from dosmatgen_ase.forward.predictor import DOSPredictor

    predictor = DOSPredictor.load(path)
    for method in predictor.methods[-2:]:
        predictor.predict_arrays(
            crystals()[:2], method=method, features=[np.zeros((n, 385), np.float32) for n in (1, 2)]
        )


def read_state(path: Path) -> None:
    """A training that is continued."""
    trainer = training()
    trainer.restore(path)
    list(trainer.run(min(trainer.step + 1, 20)))


@lru_cache(maxsize=1)
def arrays() -> Files:
    """Hull, index, its pieces, label shard, pseudo-labels."""
    from test_labels import computed

    from dosmatgen_ase.dft import labels
    from dosmatgen_ase.dos import MODEL_GRID
    from dosmatgen_ase.files import write_npz
    from dosmatgen_ase.forward.predictor import SitePrediction
    from dosmatgen_ase.judge.stability import Hull
    from dosmatgen_ase.retrieval import build

    folder = Path.cwd() / "seeds"
    folder.mkdir(exist_ok=True)
    phases = [bulk("Cu"), bulk("Na", "bcc", a=4.2), bulk("Au"), bulk("Ni"), bulk("NaCl", "rocksalt", a=5.6), bulk("Al")]
    n = len(phases)
    Hull.lowest(phases, ["train"] * n, np.arange(n) / -2, [True] * n, [f"mp-{i}" for i in range(n)]).save(
        folder / "hull.npz"
    )
    values = np.exp(-(MODEL_GRID.energies**2))
    rows = []
    pieces: dict[str, Any] = {}
    for atoms in crystals():
        mean = np.tile(values, (len(atoms), 1)).astype(np.float32)
        told = SitePrediction(mean, mean / 9, mean >= 0, np.full(len(atoms), 0.3, np.float32))
        piece = build._Predicted(mean.astype(np.float16), told.known, told.error, "")
        pieces[atoms.info["material_id"]] = piece
        atoms.info.setdefault("band_gap", np.nan)
        rows.append(build._rows(atoms, piece, None))
    build._joined(rows, {"without_prediction": {}}).save(folder / "index.npz")
    build._write_piece(folder / "piece.npz", pieces)
    known = np.ones((2, 20, MODEL_GRID.size), bool)
    write_npz(
        folder / "pseudo.npz", material_id=np.array(["mp-4", "mp-5"]), values=known.astype(np.float16), known=known
    )
    work = folder / "work"
    work.mkdir(exist_ok=True)
    found = {atoms.info["material_id"]: computed(atoms) for atoms in crystals()}
    for name in found:
        (work / f"{name}.json").touch()
    candidates = {name: labels.Candidate(name, a, "train", 1) for name, a in zip(found, crystals(), strict=True)}
    next_shard = labels._NextShard(folder, work, candidates, labels.RECIPE, "given", {}, {}, found)
    next_shard.pack()
    (shard,) = next_shard.written
    with np.load(shard) as arrays:
        write_npz(shard, **arrays, origin=np.full(len(candidates), "given"), parent=np.full(len(candidates), ""))
    return {
        **{name: (folder / name).read_bytes() for name in ("hull.npz", "index.npz", "piece.npz", "pseudo.npz")},
        "shard.npz": shard.read_bytes(),
    }


def read_hull(path: Path) -> None:
    """A hull that loads must answer."""
    from dosmatgen_ase.judge.stability import Hull

    hull = Hull.load(path)
    for atoms in crystals():
        hull.above(atoms.numbers, -1.0)


def read_index(path: Path) -> None:
    """An index that loads must be searched."""
    from dosmatgen_ase.retrieval.index import DOSIndex
    from dosmatgen_ase.retrieval.query import search

    index = DOSIndex.load(path)
    for atoms in search(target(), 3, index=index):
        index.find(atoms)
    search({0: target()}, 2, index=index, elements=["Cu", "Ni", "Au"], num_atoms=[1, 4])


def read_piece(path: Path) -> None:
    """A damaged piece is made again."""
    from dosmatgen_ase.retrieval.build import _read_piece

    _read_piece(path)


def read_pseudo_labels(path: Path) -> None:
    """As ``dosmatgen train --pseudo-labels`` does."""
    from test_training import bulk_dataset

    from dosmatgen_ase.data import CrystalDataset, SiteDOSLabels, load_pseudo_labels

    bare = {"values": np.zeros((0, 20, 151), np.float32), "known": np.zeros((0, 151), bool), "band_gap": np.zeros(0)}
    none = {k: np.zeros(0, int) for k in ("num_atoms", "recipe")} | {
        k: np.zeros(0, str) for k in ("material_id", "split", "origin", "parent")
    }
    shapes = {
        "cell": np.zeros((0, 3, 3)),
        "frac_coords": np.zeros((0, 20, 3)),
        "atomic_numbers": np.zeros((0, 20), int),
    }
    labels = SiteDOSLabels(**none, **shapes, **bare)  # type: ignore[arg-type]
    CrystalDataset.join(bulk_dataset().structures, labels, load_pseudo_labels(path))


def read_shard(path: Path) -> None:
    """As training and ``dosmatgen label`` do."""
    from dosmatgen_ase.data import load_bands, load_shell_dos, load_site_dos
    from dosmatgen_ase.dft.labels import _LabelSet

    labels = load_site_dos(path.parent)
    load_shell_dos(path.parent, labels)
    for i in range(len(labels)):
        labels.atoms(i)
    for bands in load_bands(path.parent).values():
        bands.dos()
    _LabelSet.read(path.parent, 4)


def settings_files() -> Files:
    """Settings of a generation and of a training."""
    from dosmatgen_ase.generate.settings import GenerationSettings
    from dosmatgen_ase.train.trainer import TrainingConfig

    full = GenerationSettings(
        num_atoms=[4, 4], template=bulk("Cu", cubic=True), elements=["Cu", "Ni"], fixed_species={0: "Ni"}, seed=1,
        fixed_sites=[1], composition="Cu3Ni",
    )  # fmt: skip
    return {
        "settings.json": json.dumps(full.to_dict()).encode(),
        "training.json": json.dumps(asdict(TrainingConfig())).encode(),
    }


def read_settings(path: Path) -> None:
    """What `GenerationSettings.from_dict` takes must be a dict; its template counts as a structure."""
    from dosmatgen_ase.cli.train import _read_json
    from dosmatgen_ase.generate.request import Request
    from dosmatgen_ase.generate.settings import GenerationSettings

    Request.of(target(), GenerationSettings.from_dict(_read_json(path)))


def read_config(path: Path) -> None:
    """As ``dosmatgen train --config`` does."""
    from dosmatgen_ase.cli.train import _read_json
    from dosmatgen_ase.train.trainer import TrainingConfig

    TrainingConfig.from_dict(_read_json(path))


@lru_cache(maxsize=1)
def streams() -> Files:
    """Structures that runs go on from."""
    from dosmatgen_ase.generate.generator import DOSGenerator
    from dosmatgen_ase.judge.relaxed_file import relax_into

    folder = Path.cwd() / "seeds"
    weights = checkpoints()["generator.safetensors"]
    (folder / "w.safetensors").write_bytes(weights)
    drawn = folder / "drawn.extxyz"
    drawn.unlink(missing_ok=True)
    generator = DOSGenerator(folder / "w.safetensors", device="cpu")
    try:
        generator.generate(target(), 3, num_atoms=3, num_steps=1, seed=0, out=drawn)
    except RuntimeError as error:
        if type(error).__name__ != "RejectedError":
            raise
    relaxed = folder / "relaxed.extxyz"
    relaxed.unlink(missing_ok=True)
    relax_into(relaxed, [bulk("Cu"), bulk("Au")], EMT(), max_steps=0)  # type: ignore[arg-type]
    return {"drawn.extxyz": drawn.read_bytes(), "relaxed.extxyz": relaxed.read_bytes()}


def read_drawn(path: Path) -> None:
    """As ``dosmatgen generate`` does with an output that is there."""
    from dosmatgen_ase.generate.stream import Stream

    stream = Stream(path)
    stream.seed()
    stream.resume({"seed": 0})


def read_relaxed(path: Path) -> None:
    """As ``dosmatgen relax --overwrite`` does with an output that is there."""
    from dosmatgen_ase.judge.relaxed_file import relax_into

    relax_into(path, [bulk("Cu"), bulk("Au")], EMT(), max_steps=0, overwrite=True)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def dft_files() -> Files:
    """Files of Quantum ESPRESSO and abinit, and what ``dosmatgen dft`` keeps."""
    import test_electronic as made
    from test_labels import computed

    from dosmatgen_ase.dft.settings import RECIPE, EspressoSettings

    levels = np.array([[[-5.0, -1.0, 3.0, 9.0, 9.5, 10.0], [-5.5, -1.0, 3.0, 9.0, 9.5, 10.0]]])
    amplitudes = np.full((1, 2, 4, 6), 0.3)
    copper = bulk("Cu")
    crystal = {"numbers": copper.numbers.tolist(), "cell": copper.cell.tolist(), "positions": copper.positions.tolist()}
    settings = {**asdict(EspressoSettings()), "recipe": RECIPE}
    rows = "\n".join(f"{e:.4f} {abs(e):.4f} {e + 1:.4f} 0 0 0 0" for e in np.linspace(-0.5, 0.5, 60))
    abinit = f"# nsppol = 1\n# Fermi energy :      0.02\n{rows}\n"
    return {
        "atomic_proj.xml": made.atomic_proj(levels, amplitudes).encode(),
        "projwfc.out": made.STATES.encode(),
        "Cu.json": json.dumps(
            {"structure": crystal, "settings": settings, "result": computed(copper).to_dict()}
        ).encode(),
        "failed.json": json.dumps({"structure": crystal, "settings": settings, "failed": "no"}).encode(),
        "out_DOS_TOTAL": abinit.encode(),
    }


def read_espresso(path: Path) -> None:
    """One of the two files is damaged."""
    import test_electronic as made

    from dosmatgen_ase.dft.readers import read_espresso as read

    other = {"atomic_proj.xml": "projwfc.out", "projwfc.out": "atomic_proj.xml"}[path.name]
    path.with_name(other).write_bytes(dft_files()[other])
    read(path.with_name("atomic_proj.xml"), path.with_name("projwfc.out"), made.PAIR)


def read_abinit(path: Path) -> None:
    """The total is damaged, or the sphere of an atom."""
    from dosmatgen_ase.dft.readers import read_abinit as read

    path.with_name("out_DOS_AT0001").write_bytes(path.read_bytes())
    read(path.with_name("out"), bulk("Cu"))


def read_dft(path: Path) -> None:
    """As ``dosmatgen dft`` does with a result that is there."""
    from dosmatgen_ase.dft.batch import recorded_result

    recorded_result(path)


@lru_cache(maxsize=1)
def results() -> Files:
    """The result of an inverse-design run."""
    from dosmatgen_ase.crystals.convert import to_structure
    from dosmatgen_ase.flows.schemas import CandidateDoc, InverseDesignDoc

    made = [
        CandidateDoc(index=i, formula=str(a.symbols), generated=to_structure(a), record={"index": i}, reason=reason)
        for i, (a, reason) in enumerate(zip(crystals(), (None, "too dear", None), strict=True))
    ]
    done = InverseDesignDoc(targets={"0": target()}, candidates=made, generation={"settings": {}, "version": "0"})
    return {"result.json": done.model_dump_json().encode()}


def read_result(path: Path) -> None:
    """As ``dosmatgen report`` does; the pictures, which take a second, for the smallest files alone."""
    from dosmatgen_ase.report import read_result as read
    from dosmatgen_ase.report import write_report

    result = read(path)
    if path.stat().st_size % 40 == 0:
        write_report(result, path.with_name("report.html"))


@lru_cache(maxsize=1)
def tables() -> Files:
    """The parquet file of structures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = crystals()
    columns = {
        "material_id": [a.info["material_id"] for a in made],
        "split": ["train"] * 3,
        "reduced_formula": [str(a.symbols) for a in made],
        "spacegroup": [1] * 3,
        "num_atoms": [len(a) for a in made],
        "cell": [a.cell.array.ravel().tolist() for a in made],
        "frac_coords": [a.get_scaled_positions().ravel().tolist() for a in made],
        "atomic_numbers": [a.numbers.tolist() for a in made],
    }
    out = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), out)
    return {"structures.parquet": out.getvalue().to_pybytes()}


def read_table(path: Path) -> None:
    """As training, ``label`` and ``index`` do."""
    from dosmatgen_ase.data import load_structures

    structures = load_structures(path)
    for i in range(len(structures)):
        structures.atoms(i)


def _dft_error() -> type[Exception]:
    from dosmatgen_ase.dft.errors import ElectronicStructureError

    return ElectronicStructureError


READERS = {
    "dos": Reader(dos_files, read_dos, weight=10),
    "structures": Reader(structure_files, read_structures, weight=5),
    "generator": Reader(one(checkpoints, "generator.safetensors"), read_generator, weight=2),
    "predictor": Reader(one(checkpoints, "predictor.safetensors"), read_predictor, weight=2),
    "state": Reader(one(checkpoints, "state.safetensors"), read_state, weight=2),
    "hull": Reader(one(arrays, "hull.npz"), read_hull),
    "index": Reader(one(arrays, "index.npz"), read_index, weight=2),
    "piece": Reader(one(arrays, "piece.npz"), read_piece),
    "pseudo-labels": Reader(one(arrays, "pseudo.npz"), read_pseudo_labels),
    "shard": Reader(one(arrays, "shard.npz"), read_shard, weight=2),
    "settings": Reader(lambda: one(settings_files, "settings.json")(), read_settings, (ValueError, TypeError), 2),
    "config": Reader(lambda: one(settings_files, "training.json")(), read_config, (ValueError, TypeError)),
    "drawn": Reader(one(streams, "drawn.extxyz"), read_drawn),
    "relaxed": Reader(one(streams, "relaxed.extxyz"), read_relaxed),
    "espresso": Reader(one(dft_files, "atomic_proj.xml", "projwfc.out"), read_espresso, (_dft_error(), ValueError)),
    "abinit": Reader(one(dft_files, "out_DOS_TOTAL"), read_abinit, (_dft_error(),)),
    "dft": Reader(one(dft_files, "Cu.json", "failed.json"), read_dft),
    "result": Reader(results, read_result),
    "table": Reader(tables, read_table),
    "crystals": Reader(
        lambda: dict.fromkeys((f"{name}.json" for name in TAKERS), honest()),
        take,
        (ValueError, TypeError, RuntimeError),
        0,
        made,
    ),
}
"""Readers by name. Those of weight 0 are chosen by name alone."""
