"""Order candidates by their predicted DOS, its expected error, and their energy.

`Ranking` holds the weight of each criterion, `score` measures candidates, `best` picks distinct ones. Scores stand in
``atoms.info["scores"]``. What ranks must not judge: figures about the picks come from another model, or from DFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from dosmatgen_ase.crystals.screening import KnownCrystals, right_handed, screen_given
from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA, TargetDOS, mean_distance, on_common_zero
from dosmatgen_ase.forward.predictor import DOSPredictor, SitePrediction, default_predictor
from dosmatgen_ase.judge.relaxation import relax as relax_atoms
from dosmatgen_ase.judge.stability import chgnet_energies, load_hull
from dosmatgen_ase.parsing import is_real

if TYPE_CHECKING:
    from ase import Atoms

RELAXED = 4
"""Draws that are relaxed for each crystal that is wanted: of the best few of 64 draws, the best after relaxation was
among the first four before it for 33 of 34 training targets (docs/decisions.md)."""


@dataclass(frozen=True)
class Ranking:
    """Weights of the criteria; their sum is the score, and low is good.

    Attributes
    ----------
    distance : float
        Of the predicted distance to the target: normalised L1, mean over the conditioned sites.
    uncertainty : float
        Of the error to be expected of that prediction, in the same unit.
    energy : float
        Of the energy above the hull, per eV/atom (`stability`), where below it counts as on it; 0 spares computing it.
    """

    distance: float = 1.0
    uncertainty: float = 0.0
    energy: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.distance, self.uncertainty, self.energy)
        if not all(is_real(w) and math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(f"{self}: weights must be finite numbers, not negative, and one of them above 0")


def predicted_for_targets(
    prediction: SitePrediction, sites: Mapping[int, TargetDOS], total: TargetDOS | None = None
) -> list[tuple[TargetDOS, TargetDOS]]:
    """Pairs of predicted and wanted DOS, for each conditioned site and the cell; those that can be predicted at all."""
    rows = [(prediction.mean[i], prediction.known[i], target) for i, target in sites.items()]
    if total is not None:
        rows.append((prediction.mean.sum(axis=0), prediction.known.all(axis=0), total))
    return [
        (TargetDOS(MODEL_GRID.energies, values, known, target.reference, MODEL_SIGMA, target.kind), target)
        for values, known, target in rows
        if known.any()
    ]


def predicted_distance(
    prediction: SitePrediction, sites: Mapping[int, TargetDOS], total: TargetDOS | None = None
) -> float | None:
    """`dos.mean_distance` to the targets; None unless every one of them can be compared."""
    pairs = predicted_for_targets(prediction, sites, total)
    if len(pairs) < len(sites) + (total is not None):
        return None
    try:
        return mean_distance(pairs)
    except ValueError:  # no bin is known in both
        return None


def score(
    candidates: Sequence[Atoms],
    sites: Mapping[int, TargetDOS],
    total: TargetDOS | None = None,
    *,
    ranking: Ranking | None = None,
    relax: Any = None,
    fixed_cell: bool = False,
    fixed_sites: Sequence[int] = (),
    predictor: DOSPredictor | None = None,
    progress: bool = False,
    trust_model: bool = False,
) -> list[Atoms]:
    """Measure candidates and return them, best first.

    Parameters
    ----------
    candidates : sequence of Atoms
        Left as they are.
    sites : mapping {site: TargetDOS}
    total : TargetDOS, optional
        Wanted of the whole cell.
    ranking : Ranking, optional
        Weights; by default the predicted distance alone.
    relax : ASE calculator, "chgnet", or the path or name of a MACE model, optional
        Relax first (`relaxation.relax`); what breaks down comes last. None leaves structures as they are.
    fixed_cell, fixed_sites : bool, sequence of int
        What stays in that relaxation.
    predictor : DOSPredictor, optional
        By default the one that ships.
    progress : bool
        Show progress bars.
    trust_model : bool
        Of `relaxation.relax`: load the file of a MACE model.

    Returns
    -------
    list of Atoms
        With ``info["scores"]``: ``score``, ``distance``, ``expected_error`` and, where it counts, ``energy_above_hull``
        (eV/atom, negative below the known hull); None for what could not be measured, which comes last.

    Raises
    ------
    ValueError
        If distances count and there is no target; as `relaxation.relax`.
    IndexError
        If a candidate lacks a site that has a target.
    """
    ranking = ranking or Ranking()
    if ranking.distance and not sites and total is None:
        raise ValueError("there is no DOS to rank by: give one, or Ranking(distance=0, energy=1)")
    sites, total = on_common_zero(sites), None if total is None else on_common_zero({0: total})[0]
    found = [_copy(atoms) for atoms in candidates]
    if relax is not None:
        held: dict[str, Any] = {"fixed_cell": fixed_cell, "fixed_sites": fixed_sites}
        found = relax_atoms(found, relax, progress=progress, trust_model=trust_model, **held)
    predictions = (predictor or default_predictor()).predict_arrays(found, progress=progress)
    above: list[float | None] = [None] * len(found)
    if ranking.energy:
        hull, energies = load_hull(), chgnet_energies(found, progress=progress)
        above = [hull.above(atoms.numbers, float(e)) for atoms, e in zip(found, energies, strict=True)]
    conditioned = list(sites) if sites and total is None else slice(None)
    for atoms, prediction, energy in zip(found, predictions, above, strict=True):
        costs = {
            "distance": predicted_distance(prediction, sites, total),
            "expected_error": _mean(prediction.error[conditioned]),
            **({"energy_above_hull": energy} if ranking.energy else {}),
        }
        weights = (ranking.distance, ranking.uncertainty, ranking.energy)
        parts = [(weight, cost) for weight, cost in zip(weights, costs.values(), strict=False) if weight]
        if energy is not None and energy < 0:  # no better than on the hull, which may lack a phase there
            parts[-1] = ranking.energy, 0.0
        sound = not _broke_down(atoms) and screen_given(right_handed(atoms)).accepted
        known = sound and not any(cost is None for _, cost in parts)
        atoms.info["scores"] = {"score": sum(w * cost for w, cost in parts if cost) if known else None, **costs}
    return sorted(found, key=_place)


def _broke_down(atoms: Atoms) -> bool:
    """Whether a relaxation broke down, so that this is its starting geometry; other programs may use the name, too."""
    told = atoms.info.get("relaxation")
    return isinstance(told, Mapping) and told.get("energy", 0.0) is None


def _copy(atoms: Atoms) -> Atoms:
    """A copy with the energy, forces and stress of a relaxation, which ASE's own leaves behind."""
    copy = atoms.copy()
    copy.calc = atoms.calc
    return copy


def _place(atoms: Atoms) -> tuple[bool, float]:
    """Sort by this: the score, what has none last."""
    value = atoms.info["scores"]["score"]
    return value is None, value or 0.0


def score_and_relax(
    candidates: Sequence[Atoms],
    wanted: int,
    sites: Mapping[int, TargetDOS],
    total: TargetDOS | None = None,
    *,
    accepts: Callable[[Atoms], bool],
    relaxed: Callable[[list[Atoms]], list[Atoms]] | None = None,
    **how: Any,
) -> list[Atoms]:
    """Score candidates; of many that are to be relaxed, relax the best ones and score these again.

    A draw that looks good only before it is relaxed falls back, and the others cost no relaxation. Where too few of
    `RELAXED` times ``wanted`` hold together, are accepted and differ, the next ones follow.

    Parameters
    ----------
    candidates, sites, total : as `score`
    wanted : int
        How many are needed.
    accepts : callable
        Of a crystal, relaxed where that is asked: whether it counts.
    relaxed : callable, optional
        Relaxes crystals and returns them in their order.
    **how
        Other arguments of `score`.

    Returns
    -------
    list of Atoms
        Those that are accepted and, with `relaxed`, relaxed; best first. Raises as `score`.
    """
    if relaxed is None or not candidates:
        return [atoms for atoms in score(candidates, sites, total, **how) if accepts(atoms)]
    part = RELAXED * wanted
    draws = score(candidates, sites, total, **how) if len(candidates) > part else list(candidates)
    found: list[Atoms] = []
    for start in range(0, len(draws), part):
        again = score(relaxed(draws[start : start + part]), sites, total, **how)
        found += [atoms for atoms in again if accepts(atoms)]
        whole = [atoms for atoms in found if atoms.info["scores"]["score"] is not None]
        if len(list(islice(_unlike(whole), wanted))) == wanted:
            break
    return sorted(found, key=_place)


def best(ranked: Sequence[Atoms], n: int) -> list[Atoms]:
    """Return ``n`` of them, best first; a crystal that came before is taken only where too few others are left."""
    kept = dict.fromkeys(islice(_unlike(ranked), n))
    others = (i for i in range(len(ranked)) if i not in kept)
    return [ranked[i] for i in sorted([*kept, *others][:n])]


def _unlike(crystals: Sequence[Atoms]) -> Iterator[int]:
    """Numbers of the crystals that are not the same as one before; what the screen rejects is like none."""
    seen = KnownCrystals()
    for i, atoms in enumerate(map(right_handed, crystals)):
        if screen_given(atoms).accepted:
            if seen.find(atoms) is not None:
                continue
            seen.add(atoms, str(i))
        yield i


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) and np.isfinite(values).all() else None
