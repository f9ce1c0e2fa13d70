"""What is asked for: labelled crystals as targets, drawn in an order that new labels hardly change."""

from __future__ import annotations

import argparse
import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms

from dosmatgen_ase.data import SiteDOSLabels
from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA, TargetDOS


def add_targets(parser: argparse.ArgumentParser, count: int) -> None:
    """Options that say which labels are targets; `drawn_rows` reads them."""
    parser.add_argument("--num-targets", type=int, default=count, help="at most this many (default %(default)s)")
    parser.add_argument(
        "--targets", type=Path, metavar="RESULT.json", help="those of an earlier result, in place of a draw"
    )


def in_random_order(labels: SiteDOSLabels, rows: np.ndarray, seed: int) -> list[int]:
    """Rows by a random number made from the seed and the id, so that new labels hardly change the first ones."""
    names = labels.material_id.tolist()  # 0, 3: a stream of which no draw takes numbers, or it would be chosen by them
    return sorted(rows.tolist(), key=lambda i: rng_for(seed, names[i], 0, 3).random())


def drawn_rows(labels: SiteDOSLabels, fitting: np.ndarray, options: argparse.Namespace) -> list[int]:
    """Rows of the targets among those that fit: of an earlier result, or drawn.

    Raises
    ------
    SystemExit
        If an earlier result names none, or a label that is not there or does not fit.
    """
    if options.targets is None:
        return in_random_order(labels, fitting, options.seed)[: options.num_targets]
    wanted = json.loads(options.targets.read_text()).get("target_ids")
    row_of = {str(labels.material_id[i]): i for i in fitting.tolist()}
    if not wanted or set(wanted) - row_of.keys():
        raise SystemExit(f"{options.targets} names no targets, or labels that are not there: draw them")
    return [row_of[name] for name in wanted]


def rng_for(seed: int, material_id: str, *more: int) -> np.random.Generator:
    """Random numbers of one structure, whatever else is drawn beside it."""
    return np.random.default_rng((seed, zlib.crc32(material_id.encode()), *more))


@dataclass(frozen=True)
class Target:
    """One labelled crystal: what is asked for (DOS, number of atoms) and, for the judge only, the crystal itself."""

    material_id: str
    atoms: Atoms
    dos: np.ndarray  # (N, G)
    known: np.ndarray  # (G,)
    reference: str
    site: int  # the site of the masked modes

    @property
    def key(self) -> str:
        """Name of files about it: of the id, and of the label itself, which may be computed anew."""
        digest = hashlib.sha256(self.atoms.numbers.tobytes() + self.dos.tobytes() + self.known.tobytes())
        return f"{self.material_id}-{digest.hexdigest()[:8]}"

    def sites(self, which: str) -> np.ndarray:
        """Mask (N,) of "all" sites, "none", or the drawn "site"."""
        index = np.arange(len(self.atoms))
        return {"all": index >= 0, "none": index < 0, "site": index == self.site}[which]

    @classmethod
    def from_label(cls, labels: SiteDOSLabels, row: int, seed: int) -> Target:
        """Row of the labels."""
        atoms, name = labels.atoms(row), str(labels.material_id[row])
        site = int(rng_for(seed, name, 0, 1).integers(len(atoms)))  # numbers that no draw (seed, name, k) uses
        reference = "vbm" if labels.band_gap[row] > 0 else "fermi"
        return cls(name, atoms, labels.values[row, : len(atoms)].astype(float), labels.known[row], reference, site)

    def targets(self, which: str) -> dict[int, TargetDOS]:
        """The DOS of "all" sites, "none", or the drawn "site", as `DOSGenerator.generate` takes them."""
        return {
            int(i): TargetDOS(MODEL_GRID.energies, self.dos[i], self.known, self.reference, MODEL_SIGMA)
            for i in np.flatnonzero(self.sites(which))
        }
