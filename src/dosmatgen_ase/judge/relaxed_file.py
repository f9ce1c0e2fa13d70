"""Relaxations that are kept in a file as they come: the same call goes on from what the file holds."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.io.jsonio import encode
from tqdm import tqdm

from dosmatgen_ase.crystals.screening import digest
from dosmatgen_ase.files import DAMAGE, exclusive, read_structures, write_extxyz
from dosmatgen_ase.judge.relaxation import hold, relax_each

_SAVE_EVERY = 5.0  # seconds


def relax_into(
    path: Path,
    structures: Sequence[Atoms],
    calculator: str | Path = "chgnet",
    *,
    among: Sequence[Atoms] = (),
    fixed_cell: bool = False,
    fixed_sites: Sequence[int] = (),
    fmax: float = 0.05,
    max_steps: int = 200,
    time_limit: float = 120.0,
    processes: int = 1,
    trust_model: bool = False,
    overwrite: bool = False,
) -> list[Atoms]:
    """Do what :func:`relaxation.relax` does and keep it in an extxyz file as it comes; the same call goes on from it.

    The file is replaced every few seconds and at the end, however that comes. What it holds of these structures, by the
    same calculator and limits, is taken for done. What it holds of `among`, of which the structures are a choice, stays
    in it, behind them. Other structures in it are replaced with `overwrite` only. If it begins with all that are asked
    for, it stays as it is.

    Errors as in :func:`relaxation.relax`, ``FileExistsError`` if other structures would be lost, and ``OSError`` if the
    file cannot be written, or another run is writing it.
    """
    limits = (fmax, max_steps, time_limit)
    structures = hold(structures, fixed_sites)
    settings = (_named(calculator), *limits, *(["fixed cell"] if fixed_cell else []))
    origins = [_origin(atoms, settings) for atoms in structures]
    with exclusive(path):
        held = _held(path)
        known = {origin: atoms for origin, atoms in held if origin}
        done = {i: _again(known[own], structures[i]) for i, own in enumerate(origins) if own in known}
        if [origin for origin, _ in held[: len(origins)]] == origins:
            return list(done.values())
        further = {_origin(atoms, settings) for atoms in hold(among, fixed_sites)}
        kept = [atoms for origin, atoms in held if origin in further - set(origins)]
        lost = sum(origin not in further | set(origins) for origin, _ in held)
        if lost and not overwrite:
            fix = "choose another file (-o), or overwrite it (--overwrite)"
            raise FileExistsError(f"{path} holds {lost} structures of another run, which would be lost: {fix}")
        left, saved = [i for i in range(len(structures)) if i not in done], time.monotonic()
        each = relax_each([structures[i] for i in left], calculator, *limits, processes, fixed_cell, trust_model)
        shown = tqdm(total=len(structures), initial=len(done), unit="structure", desc="relax")
        try:
            with shown as bar, contextlib.closing(each) as finished:
                for i, atoms in zip(left, finished, strict=True):
                    atoms.info["relaxation"]["of"] = origins[i]
                    done[i] = atoms
                    bar.update()
                    if time.monotonic() - saved > _SAVE_EVERY:
                        write_extxyz(path, [*_in_order(done), *kept])
                        saved = time.monotonic()
        finally:
            if done:
                write_extxyz(path, [*_in_order(done), *kept])
        return _in_order(done)


def _in_order(done: dict[int, Atoms]) -> list[Atoms]:
    return [done[i] for i in sorted(done)]


def _held(path: Path) -> list[tuple[str, Atoms]]:
    """What a file holds, each structure with the digest of what it was made of; empty where that is not told."""
    held: list[Atoms] = []
    with contextlib.suppress(*DAMAGE):  # not there, or no structures
        held = read_structures(path, format="extxyz")
    told = [atoms.info.get("relaxation") for atoms in held]
    return [(one.get("of", "") if isinstance(one, dict) else "", atoms) for one, atoms in zip(told, held, strict=True)]


def _again(relaxed: Atoms, given: Atoms) -> Atoms:
    """A structure from the file with the constraints that it was given: extended XYZ keeps a part of them only."""
    found = copy.deepcopy(relaxed)  # with its energy; and one result may be asked for twice
    found.set_constraint(given.copy().constraints)
    return found


def _named(calculator: str | Path) -> str:
    """The name of a calculator, and the content of its file: another potential may have been put in the same place."""
    path = Path(str(calculator))
    if not path.is_file():
        return str(calculator)
    with path.open("rb") as file:
        return f"{calculator} {hashlib.file_digest(file, 'sha256').hexdigest()}"


def _origin(atoms: Atoms, settings: tuple[Any, ...]) -> str:
    """Digest of what a relaxation depends on."""
    told = f"{settings} {[_in_full(constraint) for constraint in atoms.constraints]} {digest(atoms)}".encode()
    return hashlib.sha256(told).hexdigest()[:16]


def _in_full(constraint: Any) -> str:
    """What a constraint is made of. The repr of some tells their address in memory, which is another in each run."""
    told: dict[str, Any] = getattr(constraint, "todict", lambda: None)() or {}
    plain = {key: digest(v) if isinstance(v, Atoms) else v for key, v in told.get("kwargs", {}).items()}
    return str(encode([type(constraint).__name__, plain]))
