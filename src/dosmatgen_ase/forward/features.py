"""What the models see of a crystal: CHGNet's features of its atoms, and the graph for tight binding."""

from __future__ import annotations

import contextlib
import copy
import io
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn
from tqdm import tqdm

from dosmatgen_ase.crystals.checks import MIN_VOLUME_PER_ATOM, beyond_bounds, fault
from dosmatgen_ase.crystals.convert import to_structure
from dosmatgen_ase.data import Structures
from dosmatgen_ase.files import read_npz, write_npz
from dosmatgen_ase.forward.tight_binding.graph import MIN_DISTANCE, TOO_CLOSE, CrystalGraph, crystal_graph, num_orbitals
from dosmatgen_ase.forward.tight_binding.predict import MAX_ORBITALS
from dosmatgen_ase.threads import cpu_threads, once, without_warnings

Features: TypeAlias = Sequence[np.ndarray | str]  # of each structure those of its atoms, (n, 385), or why it has none
NUM_FEATURES = 385  # 4 convolutions x 64, final site vector 64, crystal vector 64, magnetic moment 1
MAX_BONDS = 200_000  # and angles of a crystal: CHGNet takes 3 kB for each, 0.6 GB in all


@once
def load_chgnet() -> Any:
    """Return CHGNet 0.3.0 on the CPU, frozen, loaded quietly once per process: its weights come with its wheel."""
    with without_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
        from chgnet.model import CHGNet

        model = CHGNet.load(use_device="cpu", verbose=False)
    return model.eval().requires_grad_(False)


def check_crystal(atoms: Atoms) -> None:
    """Refuse what no forward model can read.

    Raises
    ------
    ValueError
        With the reason: as `check_cell`, or two atoms in one place.
    """
    from ase.neighborlist import neighbor_list

    check_cell(atoms)
    if len(neighbor_list("i", atoms, MIN_DISTANCE)):
        raise ValueError(TOO_CLOSE)


def check_cell(atoms: Atoms) -> None:
    """Do what `check_crystal` does, but for the distances between atoms, which take a few milliseconds.

    Raises
    ------
    ValueError
        With the reason: no crystal (`fault`), collapsed, or beyond the bounds.
    """
    if told := fault(atoms):
        raise ValueError(f"it {told}")
    if (per_atom := atoms.get_volume() / len(atoms)) < MIN_VOLUME_PER_ATOM:
        raise ValueError(f"it has collapsed: {per_atom:.3g} A^3 per atom, less than {MIN_VOLUME_PER_ATOM:g}")
    if (beyond := beyond_bounds(atoms)) is not None:
        raise ValueError(beyond)


def chgnet_graph(atoms: Atoms, most: int = MAX_BONDS) -> Any:
    """Return the graph on which CHGNet works, of at most so many bonds and angles together.

    Raises
    ------
    ValueError
        With the reason why the structure has none: as `check_crystal`, or atoms alone.
    """
    check_crystal(atoms)
    _check_bonds(atoms, most)
    structure = to_structure(atoms, wrap=True)
    structure.to = lambda **_: ""  # CHGNet would write one that it fails on into the folder where we are
    try:
        with without_warnings():
            return load_chgnet().graph_converter(structure)
    except Exception as error:  # foreign code: whatever it raises is the failure of this structure only
        raise ValueError(f"CHGNet cannot build its graph: {type(error).__name__}: {error}") from error


def _check_bonds(atoms: Atoms, most: int) -> None:
    """Count the bonds (within 6 A) and angles (of bonds within 3 A) that CHGNet would see, before it builds them."""
    from ase.neighborlist import neighbor_list

    near = np.bincount(neighbor_list("i", atoms, 3.0), minlength=1)
    count = int((near * (near - 1)).sum())
    if count <= most:
        count += len(neighbor_list("i", atoms, 6.0))
    if count > most:
        raise ValueError(f"{count} bonds and angles are too many for CHGNet, at most {most}: take a smaller cell")


def tight_binding_graph(atoms: Atoms, cutoff: float) -> CrystalGraph:
    """Return the bonds on which tight binding works.

    Raises
    ------
    ValueError
        With the reason why the structure has none: as `check_crystal`, atoms alone, too large a cell.
    """
    check_cell(atoms)  # distances are looked at beside the bonds
    if (size := num_orbitals(atoms)) > MAX_ORBITALS:
        raise ValueError(f"it has {size} orbitals, more than {MAX_ORBITALS}: use a smaller cell")
    graph = crystal_graph(atoms, cutoff)
    if len(np.unique(graph.first)) < len(atoms):
        raise ValueError(f"isolated atoms: not all have a neighbour within {cutoff:g} A")
    return graph


@once
def _observed_chgnet() -> tuple[Any, threading.local]:
    """A CHGNet of our own whose layers put what they return into ``outputs`` of the thread that runs them.

    Its hooks stay, and nobody else runs it: hooks that come and go on the model that relaxations share would catch
    what other threads compute.
    """
    model, caught = copy.deepcopy(load_chgnet()), threading.local()

    def keep(_module: nn.Module, network_inputs: Any, output: Tensor) -> None:
        caught.outputs.append(output)

    for layer in (*model.atom_conv_layers, model.readout_norm):
        layer.register_forward_hook(keep)
    return model, caught


def _forward(graphs: list[Any], counts: list[int]) -> np.ndarray:
    """Run CHGNet on graphs of `counts` atoms and return the (sum(counts), 385) features; threads may do so at once."""
    model, caught = _observed_chgnet()
    outputs: list[Tensor] = []
    caught.outputs = outputs
    try:
        with torch.no_grad(), cpu_threads(1):  # cells are small
            moments = torch.cat(model(graphs, task="em")["m"])
    finally:
        del caught.outputs
    crystal = torch.cat([part.mean(0, keepdim=True).expand(len(part), -1) for part in outputs[-1].split(counts)])
    return torch.cat([*outputs, crystal, moments[:, None]], dim=1).numpy()


def site_features(atoms_list: Sequence[Atoms], batch_size: int = 32, progress: bool = False) -> list[np.ndarray | str]:
    """Return CHGNet's view of every site: a frozen descriptor of its chemical surroundings.

    Per atom the output of each of the four convolutions, the normalised final site vector, the mean of those over the
    crystal, and the predicted magnetic moment (mu_B). CHGNet was trained on energies, forces, stresses and moments of
    most Materials Project crystals, never on a DOS.

    Parameters
    ----------
    atoms_list : periodic crystals
    batch_size : structures per forward pass
    progress : show a progress bar

    Returns
    -------
    list
        Per structure an (n, 385) float32 array, or a line of text that says why it has none (collapsed, isolated
        atoms, ...).
    """
    found: list[np.ndarray | str] = [""] * len(atoms_list)
    starts = range(0, len(atoms_list), batch_size)
    for start in tqdm(starts, disable=not progress, unit="batch", desc="CHGNet features"):
        graphs, rows = [], []
        for i in range(start, min(start + batch_size, len(atoms_list))):
            try:
                graphs.append(chgnet_graph(atoms_list[i]))
                rows.append(i)
            except ValueError as error:
                found[i] = str(error)
        if not graphs:
            continue
        counts = [len(atoms_list[i]) for i in rows]
        features = _forward(graphs, counts)
        for i, part in zip(rows, np.split(features, np.cumsum(counts)[:-1]), strict=True):
            found[i] = part if np.isfinite(part).all() else "CHGNet returned non-finite features"
    return found


def cached_site_features(structures: Structures, directory: str | Path, piece: int = 512) -> list[np.ndarray | str]:
    """Return `site_features` of a table of structures, kept on disk in pieces so that an interrupted run resumes.

    Pieces (`*.npz`) are looked up by `material_id` and the crystal itself, so one folder serves any selection of any
    structures. Pieces of older versions do not tell the crystal: they are left there, and made again.
    """
    directory = Path(directory)
    prints = structures.fingerprints()
    keys = list(zip(structures.material_id.tolist(), prints.tolist(), strict=True))
    known: dict[tuple[str, str], np.ndarray | str] = {}
    kinds = {"features": ("f", 2), "counts": ("iu", 1)}
    kinds |= dict.fromkeys(("material_id", "structure", "reason"), ("U", 1))
    for path in sorted(directory.glob("*.npz")):
        with contextlib.suppress(ValueError):  # what is damaged is made again
            file = read_npz(path, kinds)
            parts = np.split(file["features"], np.cumsum(file["counts"])[:-1])
            ids, of, reasons = (file[name].tolist() for name in ("material_id", "structure", "reason"))
            known |= {(i, s): reason or part for i, s, part, reason in zip(ids, of, parts, reasons, strict=True)}
    missing = [i for i, key in enumerate(keys) if key not in known]
    for start in range(0, len(missing), piece):
        rows = missing[start : start + piece]
        made = site_features([structures.atoms(i) for i in rows])
        fresh = [f if isinstance(f, str) else f.astype(np.float16) for f in made]  # as a resumed run reads them
        arrays = [f if isinstance(f, np.ndarray) else np.zeros((0, NUM_FEATURES), np.float16) for f in fresh]
        ids = structures.material_id[rows]
        write_npz(
            directory / f"{ids[0]}-{prints[rows[0]]}.npz",  # a piece of another crystal of that name stays
            material_id=ids,
            structure=prints[rows],
            counts=np.array([len(a) for a in arrays]),
            features=np.concatenate(arrays),
            reason=np.array([f if isinstance(f, str) else "" for f in fresh]),
        )
        known.update(zip([keys[i] for i in rows], fresh, strict=True))
    return [known[key] for key in keys]
