"""Candidates for a target: first draws of the generator in several modes, judged and ranked by forward models."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from _targets import Target, rng_for
from ase import Atoms

from dosmatgen_ase.crystals.screening import screen
from dosmatgen_ase.dos import MODEL_GRID
from dosmatgen_ase.files import write_npz
from dosmatgen_ase.forward.predictor import DOSPredictor
from dosmatgen_ase.generate.constraints import Constraints
from dosmatgen_ase.generate.generator import BATCH_PAIRS
from dosmatgen_ase.generate.sampler import Randomness, SamplerConfig, sample
from dosmatgen_ase.judge.metrics import site_distances
from dosmatgen_ase.model.conditioning import ConditionalDenoiser, DOSCondition, Guidance


@dataclass(frozen=True)
class Mode:
    """What is handed over beside the number of atoms: "all", "none", or the "site" drawn for the target."""

    dos: str
    species: str

    @property
    def judged(self) -> str:
        """Sites that are judged."""
        return "site" if self.species == "site" else "all"


MODES = {
    "conditional": Mode("all", "none"),
    "unconditional": Mode("none", "none"),
    "site with DOS": Mode("site", "site"),
    "site without DOS": Mode("none", "site"),
    "species with DOS": Mode("all", "all"),
    "species without DOS": Mode("none", "all"),
}
METRICS = ("l1", "pooled", "near_gap", "mae")


@dataclass(frozen=True)
class Candidates:
    """K candidates of one target in each of the M modes.

    Attributes
    ----------
    numbers : (M, K, N)
    accepted : (M, K) bool
        The screen accepts it and CHGNet can read it.
    judged, ranked : (M, K, N, G) float16
        Site DOS by the judge and by the ranking predictor; NaN where not accepted.
    supported : (M, K, N) bool
        The judge knows the element from at least three labels.
    """

    numbers: np.ndarray
    accepted: np.ndarray
    judged: np.ndarray
    ranked: np.ndarray
    supported: np.ndarray


def draw(
    model: ConditionalDenoiser,
    constraints: Constraints,
    condition: DOSCondition | None,
    rngs: list[np.random.Generator],
    config: SamplerConfig,
    guidance_scale: float = 1.0,
) -> list[Atoms]:
    """First draws of one batch from pure noise, neither screened nor drawn again."""
    randomness = Randomness.draw(constraints.start.num_atoms, rngs)
    denoise = Guidance(guidance_scale).wrap(model, condition)
    return sample(denoise, model.denoiser.lattice, constraints, randomness, config).crystals.to_atoms()


def generate(
    model: ConditionalDenoiser,
    target: Target,
    count: int,
    config: SamplerConfig,
    guidance_scale: float,
    seed: int,
    modes: Sequence[str] = tuple(MODES),
) -> list[Atoms]:
    """``count`` first draws per mode, mode after mode; only the crystal's size and its pinned species are read."""
    size = len(target.atoms)
    rows = [(MODES[mode], k) for mode in modes for k in range(count)]
    room = max(1, BATCH_PAIRS // size**2)
    made: list[Atoms] = []
    for part in (rows[i : i + room] for i in range(0, len(rows), room)):
        shown = torch.tensor(np.array([target.sites(mode.dos) for mode, _ in part]))
        pinned = torch.tensor(np.array([target.sites(mode.species) for mode, _ in part]))
        known = shown[..., None] & torch.tensor(target.known)
        condition = replace(
            DOSCondition.none(len(part), size, MODEL_GRID.size),
            site=torch.tensor(target.dos, dtype=torch.float32) * known,
            site_known=known,
        )
        free = Constraints.none(torch.full((len(part),), size))
        start = replace(free.start, atomic_numbers=torch.tensor(target.atoms.numbers) * pinned)
        rngs = [rng_for(seed, target.material_id, k) for _, k in part]
        made += draw(model, replace(free, start=start, fixed_species=pinned), condition, rngs, config, guidance_scale)
    return made


def judge_candidates(
    made: list[Atoms], judge: DOSPredictor, ranker: DOSPredictor, num_modes: int = len(MODES)
) -> Candidates:
    """Screen candidates of one target, mode after mode, and predict their DOS."""
    passed = [i for i, atoms in enumerate(made) if screen(atoms).accepted]
    crystals = [made[i] for i in passed]
    numbers = np.array([atoms.numbers for atoms in made])
    shape = (len(made), numbers.shape[1], MODEL_GRID.size)
    accepted = np.zeros(len(made), dtype=bool)
    judged, ranked, supported = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(numbers.shape, dtype=bool)
    by_judge, by_ranker = (p.predict_arrays(crystals) for p in (judge, ranker))
    for i, mine, other in zip(passed, by_judge, by_ranker, strict=True):
        accepted[i] = not mine.reason
        if accepted[i]:
            judged[i], ranked[i], supported[i] = mine.mean, other.mean, mine.known.any(-1)

    def by_mode(array: np.ndarray) -> np.ndarray:
        return array.reshape(num_modes, -1, *array.shape[1:])

    return Candidates(
        numbers=by_mode(numbers),
        accepted=by_mode(accepted),
        judged=by_mode(judged.astype(np.float16)),
        ranked=by_mode(ranked.astype(np.float16)),
        supported=by_mode(supported),
    )


def cache_folder(options: argparse.Namespace, settings: str) -> Path:
    """Folder for what these settings make with the weights and predictors of the command line."""
    key = hashlib.sha256(settings.encode())
    for path in (options.weights, options.judge, options.predictor):
        key.update(path.read_bytes())
    return options.cache / key.hexdigest()[:16]


def cached(path: Path, make: Callable[[], Candidates]) -> Candidates:
    """Candidates from a file, made and kept there the first time."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_npz(path, **make().__dict__)
    with np.load(path, allow_pickle=False) as file:
        return Candidates(**{name: file[name] for name in file.files})


def candidate_figures(target: Target, candidates: Candidates, mode: int, sites: np.ndarray) -> dict[str, float]:
    """Mean, best and ranked pick of each metric over the accepted candidates of one mode; NaN if there are none."""
    keep = candidates.accepted[mode]
    if not keep.any():
        return {f"{metric} {which}": np.nan for metric in METRICS for which in ("mean", "best", "picked")}
    wanted = target.dos[sites]
    judged, ranked = (a[mode, keep][:, sites].astype(float) for a in (candidates.judged, candidates.ranked))
    pick = int(site_distances(ranked, wanted, target.known)["l1"].argmin())
    figures: dict[str, float] = {}
    for metric, d in site_distances(judged, wanted, target.known).items():
        figures |= {f"{metric} mean": d.mean(), f"{metric} best": d.min(), f"{metric} picked": d[pick]}
    return figures


def crystal_figures(
    values: np.ndarray, target: Target, which: str = "all", known: np.ndarray | None = None
) -> dict[str, float]:
    """Metrics of one DOS per site (N, G) over some sites (and bins), in the form of `mode_figures`."""
    sites = target.sites(which)
    mask = np.broadcast_to(target.known, target.dos.shape) if known is None else target.known & known
    distances = site_distances(values[sites], target.dos[sites], mask[sites])
    return {f"{metric} {figure}": float(d) for metric, d in distances.items() for figure in ("mean", "best", "picked")}
