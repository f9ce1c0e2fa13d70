"""Training of `DOSPredictor`: tables by element, networks, tight-binding models, calibration, and evaluation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm import trange

from dosmatgen_ase.data import ORIGINS, SiteDOSLabels, formula_fold, load_shell_dos, load_site_dos
from dosmatgen_ase.dos import MODEL_GRID, normalised_l1_arrays
from dosmatgen_ase.files import exclusive, output_folder
from dosmatgen_ase.forward.features import Features, site_features
from dosmatgen_ase.forward.predictor import (
    DOSPredictor,
    PredictorConfig,
    SitePrediction,
    inverse_softplus,
    network_inputs,
    relative_spread,
)
from dosmatgen_ase.forward.tight_binding.graph import crystal_graph
from dosmatgen_ase.forward.tight_binding.model import TightBinding, TightBindingConfig
from dosmatgen_ase.forward.tight_binding.predict import predict_crystals
from dosmatgen_ase.forward.tight_binding.training import TightBindingTraining, fit, labelled_crystals, new_model
from dosmatgen_ase.limits import MAX_ATOMIC_NUMBER

COVERAGE = 0.68  # share of the computed values within the calibrated spread, as for one standard deviation


class Role(NamedTuple):
    """What a predictor of the project is made of: half of the formulas (None: all), networks, tight-binding models."""

    fold: int | None
    config: PredictorConfig
    tight_binding: int


# All models differ by seed. The judge shares neither labels nor CHGNet's features with the ranker.
ROLES = {
    "predictor": Role(None, PredictorConfig(correctors=3), 3),
    "ranker": Role(0, PredictorConfig(), 1),
    "judge": Role(1, PredictorConfig(members=0), 1),
}


def element_tables(labels: SiteDOSLabels, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return each element's mean DOS and the number of labelled structures behind it, both (95, 151).

    A structure counts once per element, however many sites it has; half a structure's weight of the mean over all
    elements is mixed in, so that elements with few labels, or none, fall back to that.

    Parameters
    ----------
    labels : all labels
    rows : those to use, a boolean mask or an index array
    """
    labels = labels.select(rows)
    owner, site = np.nonzero(labels.atomic_numbers)
    pairs = np.stack([owner, labels.atomic_numbers[owner, site]])  # of structure and element
    key, inverse = np.unique(pairs, axis=1, return_inverse=True)
    count = np.bincount(inverse, minlength=key.shape[1])[:, None]
    mean = np.zeros((key.shape[1], MODEL_GRID.size))
    np.add.at(mean, inverse, labels.values[owner, site])
    known = labels.known[key[0]]
    mean = mean / count * known
    overall = mean.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    total = np.zeros((MAX_ATOMIC_NUMBER + 1, MODEL_GRID.size))
    support = np.zeros_like(total)
    np.add.at(total, key[1], mean)
    np.add.at(support, key[1], known)
    baseline = (total + 0.5 * overall) / (support + 0.5)
    return torch.from_numpy(baseline.astype(np.float32)), torch.from_numpy(support.astype(np.int16))


def train_predictor(
    labels: SiteDOSLabels,
    features: Features,
    *,
    fold: int | None = None,
    config: PredictorConfig | None = None,
    tight_binding: Sequence[TightBinding] = (),
    unseen: Mapping[int, np.ndarray] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> DOSPredictor:
    """Train networks on the labels of split `train`; `val` picks the epoch, `test` is not looked at.

    The loss is each site's normalised L1 over its known bins, softened by 1 state/eV x bin so that nearly empty sites
    do not rule it; a site weighs 1 / sqrt(sites of its cell). Correctors learn from the errors of models that have not
    seen the crystal (stacking; D. H. Wolpert, Neural Networks 5, 241 (1992)): on what it was trained on, a
    tight-binding model leaves hardly anything to correct.

    Parameters
    ----------
    labels : all labels
    features : what `site_features` returned for ``labels.atoms(i)``, in order
    fold : 0 or 1 to train and validate on that half of the formulas only (`data.formula_fold`); all by default
    config : `PredictorConfig()` by default
    tight_binding : models trained on the same labels (`tight_binding.training.fit`) that join the networks
    unseen : row of a training label -> its tight-binding DOS (n, 151) by models that were not trained on it
        (`unseen_dos`); needed where there are correctors
    seed : of initial weights, dropout and order
    progress : show a progress bar

    Raises
    ------
    ValueError
        If `features` does not match `labels`, no training or validation label is left, or `unseen` lacks some.
    """
    config = config or PredictorConfig()
    if len(features) != len(labels):
        raise ValueError(f"{len(features)} features for {len(labels)} labels: pass site_features of all labelled atoms")
    train_rows, val_rows = training_rows(labels, features, fold)
    baseline, support = element_tables(labels, train_rows)
    tables = {"baseline": baseline, "support": support}
    info: dict[str, Any] = {"fold": fold, "seed": seed, "train_structures": len(train_rows)}
    parts = [_training_sites(baseline, *_chosen(labels, features, rows)) for rows in (train_rows, val_rows)]
    if config.members:
        tables |= {"input_mean": parts[0].inputs.mean(0), "input_std": parts[0].inputs.std(0) + 1e-3}
        info["descriptor"] = "CHGNet 0.3.0"
    if config.correctors:
        if lacking := sorted(set(train_rows.tolist()) - (unseen or {}).keys()):
            raise ValueError(f"correctors need the unseen DOS of all training labels: {len(lacking)} are missing")
        dos = [torch.from_numpy(np.concatenate([(unseen or {})[i] for i in train_rows.tolist()])).float()]
        dos.append(torch.from_numpy(np.concatenate(_mean_dos(tight_binding, labels, val_rows))))
        tables |= {"dos_mean": dos[0].mean(0), "dos_std": dos[0].std(0) + 1e-3}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not that of any GPU
        predictor = DOSPredictor(config, tables, info, tight_binding)
        if config.members:
            train, val = (part._replace(inputs=predictor.standardised(part.inputs)) for part in parts)
            for net in predictor.members:
                _fit(net, train, val, config, progress)
        if config.correctors:
            train, val = (part.around(start, predictor) for part, start in zip(parts, dos, strict=True))
            for net in predictor.correctors:
                _fit(net, train, val, config, progress)
    calibrate(predictor, *_chosen(labels, features, val_rows))
    return predictor


def unseen_dos(labels: SiteDOSLabels, features: Features, halves: Sequence[TightBinding]) -> dict[int, np.ndarray]:
    """Tight-binding DOS (n, 151) of every training label by the model of the other half of the formulas, by row.

    Parameters
    ----------
    labels : all labels
    features : what `site_features` returned for ``labels.atoms(i)``, in order
    halves : the model trained on fold 0, and that trained on fold 1
    """
    found: dict[int, np.ndarray] = {}
    for fold, model in enumerate(halves):
        rows, _ = training_rows(labels, features, 1 - fold)
        found.update(zip(rows.tolist(), _mean_dos([model], labels, rows), strict=True))
    return found


def _mean_dos(models: Sequence[TightBinding], labels: SiteDOSLabels, rows: np.ndarray) -> list[np.ndarray]:
    """Mean over models of the DOS (n, 151) of labelled crystals, float32."""
    atoms = [labels.atoms(i) for i in rows.tolist()]
    by_model = []
    for mesh, model in enumerate(models):
        graphs = [crystal_graph(one, model.config.cutoff) for one in atoms]
        by_model.append([found.dos.sum(1) for found in predict_crystals(model, graphs, mesh=mesh)])
    return [np.mean(parts, 0) for parts in zip(*by_model, strict=True)]


def training_rows(labels: SiteDOSLabels, features: Features, fold: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of labels to train on and to validate by, all readable, of one half of the formulas or all.

    Raises
    ------
    ValueError
        If either is empty.
    """
    usable = _readable(features)
    if fold is not None:
        formulas = [labels.atoms(i).get_chemical_formula() for i in range(len(labels))]
        usable &= np.array([formula_fold(formula, 2) == fold for formula in formulas], dtype=bool)
    train, val = (np.flatnonzero(usable & (labels.split == split)) for split in ("train", "val"))
    if not len(train) or not len(val):
        raise ValueError(f"{len(train)} training and {len(val)} validation labels: both are needed")
    return train, val


def _readable(features: Features) -> np.ndarray:
    return np.array([not isinstance(one, str) for one in features], dtype=bool)


def _chosen(labels: SiteDOSLabels, features: Features, rows: np.ndarray) -> tuple[SiteDOSLabels, Features]:
    return labels.select(rows), [features[i] for i in rows.tolist()]


class _Sites(NamedTuple):
    """Labelled sites as tensors: inputs (s, 536 or 687), offset, dos and known (s, 151), weight (s,)."""

    inputs: Tensor
    offset: Tensor
    dos: Tensor
    known: Tensor
    weight: Tensor

    def around(self, dos: Tensor, predictor: DOSPredictor) -> _Sites:
        """The same sites as correctors see them, which start at this DOS (s, 151)."""
        return self._replace(inputs=predictor.standardised(self.inputs, dos), offset=inverse_softplus(dos))

    def loss(self, net: nn.Module, rows: Tensor) -> Tensor:
        """Weighted mean of the softened normalised L1 over these sites."""
        error = (softplus(net(self.inputs[rows]) + self.offset[rows]) - self.dos[rows]).abs() * self.known[rows]
        scale = (self.dos[rows] * self.known[rows]).sum(1) + 1.0
        return (self.weight[rows] * error.sum(1) / scale).sum() / self.weight[rows].sum()


def _training_sites(baseline: Tensor, labels: SiteDOSLabels, features: Features) -> _Sites:
    """Sites of labels that all have features; their inputs are not standardised yet."""
    owner, site = np.nonzero(labels.atomic_numbers)
    return _Sites(
        inputs=network_inputs(baseline, features, [labels.atoms(i).numbers for i in range(len(labels))]),
        offset=inverse_softplus(baseline[torch.from_numpy(labels.atomic_numbers[owner, site])]),
        dos=torch.from_numpy(labels.values[owner, site]),
        known=torch.from_numpy(labels.known[owner].astype(np.float32)),
        weight=torch.from_numpy(labels.num_atoms[owner].astype(np.float32) ** -0.5),
    )


def _fit(net: nn.Module, train: _Sites, val: _Sites, config: PredictorConfig, progress: bool) -> None:
    """Train one member in place and leave it in evaluation mode, with averaged weights of its best epoch on `val`."""
    sites = len(train.weight)
    steps = -(-sites // config.batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    # Of 10 steps the first tenth has no length, which torch divides by; more of them than are taken do no harm.
    total_steps = max(steps * config.epochs, 11)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=total_steps, pct_start=0.1
    )
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    best, best_state = float("inf"), copy.deepcopy(net.state_dict())
    everything = torch.arange(len(val.weight))
    for _ in trange(config.epochs, disable=not progress, desc="predictor", unit="epoch"):
        net.train()
        for rows in torch.randperm(sites).split(config.batch_size):
            optimizer.zero_grad()
            train.loss(net, rows).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(net)
        average.eval()
        with torch.no_grad():
            error = val.loss(average.module, everything).item()
        if error < best:
            best, best_state = error, copy.deepcopy(average.module.state_dict())
    net.eval().load_state_dict(best_state)


def _compared(
    predictor: DOSPredictor, labels: SiteDOSLabels, features: Features, method: str
) -> tuple[SitePrediction, np.ndarray, np.ndarray, np.ndarray]:
    """Prediction, DOS and known bins of all sites of labels, structure after structure; the gap of each structure."""
    found = predictor.predict_arrays([labels.atoms(i) for i in range(len(labels))], features=features, method=method)
    owner, site = np.nonzero(labels.atomic_numbers)
    mean, spread, bins, error = (np.concatenate(part) for part in list(zip(*found, strict=True))[:4])
    gaps = np.array([one.gap for one in found])
    joined = SitePrediction(mean, spread, bins, error)
    return joined, labels.values[owner, site].astype(np.float64), labels.known[owner], gaps


def calibrate(predictor: DOSPredictor, labels: SiteDOSLabels, features: Features) -> None:
    """Fit what `DOSPredictor.calibration` tells to the labels of the validation, for each method; and the gap."""
    fitted: dict[str, dict[str, Any]] = {}
    line = None
    for method in predictor.methods:
        raw, target, known, gaps = _compared(predictor, labels, features, method)
        factor = np.quantile((np.abs(raw.mean - target) / np.maximum(raw.spread, 1e-3))[known], COVERAGE)
        error = normalised_l1_arrays(raw.mean.astype(float), target, known)
        fair = np.isfinite(error) & (error < 3)  # the ratio of a nearly empty site must not rule a straight line
        doubt = relative_spread(raw.mean, raw.spread, known)[fair]
        networks = predictor.members and method != "tight-binding"
        alone = not networks and len(predictor.tight_binding) == 1  # no spread: the mean error stands for every site
        slope = [0.0, error[fair].mean()] if alone else np.polyfit(doubt, error[fair], 1)
        fitted[method] = {"spread": float(factor), "error": [float(value) for value in slope]}
        if method == "all":
            line = gap_line(gaps, labels.band_gap)
    predictor.info["calibration"] = fitted.pop("all")
    if predictor.members and predictor.tight_binding:
        predictor.info["calibrations"] = fitted
    if line is not None:
        predictor.info["gap"] = line


def gap_line(predicted: np.ndarray, computed: np.ndarray) -> list[float] | None:
    """Slope and offset (eV) of the line through gaps with the least mean absolute error; None of fewer than 20.

    Where models of the gap err, those that are predicted wide are too wide in the mean.

    Parameters
    ----------
    predicted, computed : (n,), eV, 0 for a metal; NaN where nothing is predicted
    """
    from scipy.optimize import linprog

    both = (predicted > 0) & (computed > 0)
    if (n := int(both.sum())) < 20:
        return None
    # Unknown: slope, offset and an error of each crystal, which bounds |slope x + offset - y|; their sum is least.
    line, y = np.stack([predicted[both], np.ones(n)], 1), computed[both]
    bounds = np.block([[line, -np.eye(n)], [-line, -np.eye(n)]])
    limits = [(None, None), (None, None), *[(0, None)] * n]
    fit = linprog(np.r_[0.0, 0.0, np.ones(n)], bounds, np.r_[y, -y], bounds=limits)
    return [float(value) for value in fit.x[:2]]


def evaluate(
    predictor: DOSPredictor, labels: SiteDOSLabels, features: Features, split: str, method: str = "all"
) -> dict[str, Any]:
    """Measure a predictor on the labels of one split.

    Returns
    -------
    dict
        Number of `structures` and `sites`; the normalised L1 of the predictor, as `mean` and `median` over sites, and
        `pooled` (all absolute errors over all states); the same of the per-element mean of the training labels
        (`element_mean`, `element_median`, `element_pooled`) and the `ratio` of the means over sites; `rank_correlation`
        (Spearman) of the error expected of a site with its error, and the mean `expected_error`; `coverage`, the share
        of known bins in which the DOS lies within the calibrated spread; `per_element`, median error and number of
        sites by symbol.
    """
    from scipy.stats import spearmanr

    rows = np.flatnonzero(_readable(features) & (labels.split == split))
    if not len(rows):
        raise ValueError(f"there are no labels of the split {split!r} to measure on: add some")
    labels, features = _chosen(labels, features, rows)
    found, target, known, _ = _compared(predictor, labels, features, method)
    numbers = labels.atomic_numbers[labels.atomic_numbers > 0]
    figures: dict[str, Any] = {"structures": len(rows), "sites": len(target)}
    errors: dict[str, np.ndarray] = {}
    for prefix, values in (("", found.mean.astype(float)), ("element_", predictor.baseline[numbers].astype(float))):
        error = errors[prefix] = normalised_l1_arrays(values, target, known)
        figures[f"{prefix}mean"] = float(np.nanmean(error))
        figures[f"{prefix}median"] = float(np.nanmedian(error))
        figures[f"{prefix}pooled"] = float((np.abs(values - target) * known).sum() / (target * known).sum())
    figures["ratio"] = figures["mean"] / figures["element_mean"]
    finite = np.isfinite(errors[""])
    doubt = relative_spread(found.mean, found.spread, known)  # the expected error follows it
    expected = found.error[finite & np.isfinite(found.error)]
    constant = not len(expected) or np.ptp(expected) < 1e-6  # one model's: it orders nothing
    figures["rank_correlation"] = 0.0 if constant else float(spearmanr(doubt[finite], errors[""][finite]).statistic)
    figures["coverage"] = float((np.abs(found.mean - target) <= found.spread)[known].mean())
    figures["expected_error"] = float(expected.mean()) if len(expected) else None
    by_element = {z: errors[""][finite & (numbers == z)] for z in np.unique(numbers[finite]).tolist()}
    figures["per_element"] = {chemical_symbols[z]: [float(np.median(e)), len(e)] for z, e in by_element.items()}
    return figures


def train_predictors(
    label_directory: str | Path,
    paths: Mapping[str, str | Path],
    *,
    settings: TightBindingTraining | None = None,
    runs: str | Path | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Train predictors on the labels of a directory and save them.

    Parameters
    ----------
    label_directory : shards of site DOS
    paths : where to save each of the `ROLES` wanted
    settings : of the tight-binding models; `TightBindingTraining()` by default
    runs : folder that keeps the state and log of these, so that an interrupted run goes on; none by default
    device : where to train them
    seed : of initial weights, dropout and order; each role adds its own number
    progress : show a progress bar

    Returns
    -------
    dict
        Per role `evaluate` on "val" (which picked the epochs and calibrated) and, where there are labels, "test".

    Raises
    ------
    BlockingIOError
        If another run writes one of the paths, or goes on in the same folder.
    """
    with contextlib.ExitStack() as alone:
        for path in [*paths.values(), *([] if runs is None else [runs])]:
            output_folder(Path(path).parent)
            alone.enter_context(exclusive(Path(path)))
        labels = load_site_dos(label_directory, origins=ORIGINS)
        features = site_features([labels.atoms(i) for i in range(len(labels))], progress=progress)

        @cache
        def bound(name: str, k: int) -> TightBinding:
            """Tight-binding model number k of a role; those of the halves serve the predictor's correctors, too."""
            number = seed + list(ROLES).index(name) + len(ROLES) * k
            config, parts = TightBindingConfig(), []
            for rows in training_rows(labels, features, ROLES[name].fold):
                chosen, seen = _chosen(labels, features, rows)
                moments = [np.asarray(one, dtype=np.float32)[:, -1] for one in seen]  # needed in training alone
                parts.append(labelled_crystals(chosen, load_shell_dos(label_directory, chosen), moments, config.cutoff))
            train, val = parts
            model = new_model(train, config, number).to(device)
            folder = Path(runs) / f"{name}_{k}" if runs is not None else None
            how = settings or TightBindingTraining()
            return fit(model, train, val, how, seed=number, directory=folder, progress=progress).cpu()

        figures = {}
        for number, (name, role) in enumerate(ROLES.items()):
            if name not in paths:
                continue
            models = [bound(name, k) for k in range(role.tight_binding)]
            chosen: dict[str, Any] = {"fold": role.fold, "config": role.config, "seed": seed + number}
            if role.config.correctors:
                chosen["unseen"] = unseen_dos(labels, features, [bound(half, 0) for half in ("ranker", "judge")])
            predictor = train_predictor(labels, features, **chosen, tight_binding=models, progress=progress)
            predictor.save(paths[name])
            splits = [split for split in ("val", "test") if (labels.split == split).any()]
            figures[name] = {split: evaluate(predictor, labels, features, split) for split in splits}
        return figures
