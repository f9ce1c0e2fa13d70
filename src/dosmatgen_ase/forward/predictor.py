"""Forward model: a structure's site DOS, by learned tight binding and from frozen CHGNet atom features.

`DOSPredictor` is an ensemble of unlike models that gives a DOS per site with a calibrated uncertainty: Hamiltonians
written by a network (`tight_binding`), small networks that correct a per-element mean from the 385 numbers per atom
that `site_features` makes of a crystal, and others that correct the DOS of the Hamiltonians by them. `train_predictor`
fits the networks to labels and calibrates the whole; `pseudo_labels` applies it to structures without a label. The
predictor that ships is trained on all labels. Two more serve the benchmarks, trained on the two halves of the formulas
(`data.formula_fold`): the ranker picks there and makes the generator's pseudo-labels, the judge only ever measures.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.data import chemical_symbols
from torch import Tensor, nn
from torch.nn.functional import softplus

from dosmatgen_ase.crystals.checks import formula_of
from dosmatgen_ase.crystals.reduction import niggli_operation
from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA, TargetDOS
from dosmatgen_ase.files.tensors import fill, load_tensors, save_tensors, without_values
from dosmatgen_ase.forward.features import NUM_FEATURES, Features, check_cell, site_features, tight_binding_graph
from dosmatgen_ase.forward.tight_binding.graph import CrystalGraph
from dosmatgen_ase.forward.tight_binding.model import TightBinding, TightBindingConfig, linear
from dosmatgen_ase.forward.tight_binding.predict import predict_crystals
from dosmatgen_ase.forward.tight_binding.spectrum import MIN_GAP
from dosmatgen_ase.limits import MAX_ATOMIC_NUMBER
from dosmatgen_ase.parsing import is_real, site_numbers, whole_number
from dosmatgen_ase.threads import cpu_threads, once

DEFAULT_PREDICTOR = Path(__file__).parents[1] / "weights" / "predictor.safetensors"
METHODS = ("all", "tight-binding", "features")
MIN_LABELS = 3  # labelled structures that an element needs, at an energy, for its DOS there to count as known


@dataclass(frozen=True)
class PredictorConfig:
    """Size and training of a `DOSPredictor`.

    Attributes
    ----------
    hidden, depth : width and number of hidden layers of each member
    dropout : probability in every hidden layer
    members : networks in the ensemble, which differ by seed; 0 for tight binding alone
    correctors : networks that correct the tight-binding DOS in place of the element's mean
    epochs : passes over the labelled sites; the weights (an exponential average) of the best epoch on `val` are kept
    learning_rate, weight_decay : of AdamW, under a one-cycle schedule
    batch_size : sites per step
    """

    hidden: int = 320
    depth: int = 3
    dropout: float = 0.3
    members: int = 3
    correctors: int = 0
    epochs: int = 80
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name, lowest, highest in (("hidden", 1, 8192), ("depth", 1, 32), ("members", 0, 64), ("correctors", 0, 64)):
            whole_number(getattr(self, name), name, lowest, highest)
        if self.correctors and not self.members:
            raise ValueError(f"correctors={self.correctors} need members, with which they share inputs")


class SitePrediction(NamedTuple):
    """Predicted site DOS of one structure.

    Attributes
    ----------
    mean : (n, 151) float32
        Mean over the ensemble, states/eV at sigma 0.2 eV on `dos.MODEL_GRID`.
    spread : (n, 151) float32
        Half-width of the interval around the mean that held 68 % of the computed values of the validation split: the
        ensemble's standard deviation times one factor.
    known : (n, 151) bool
        False where fewer than 3 labelled structures tell the DOS of this element at this energy.
    error : (n,) float32
        Normalised L1 to be expected of each site, from the ensemble's relative spread; NaN where nothing is known.
    reason : str
        Why there is no prediction (then all is zero and unknown), else empty.
    gap : float, eV
        Band gap by tight binding, calibrated on the validation split, 0 for a metal; NaN without it.
    lacking : str
        Where one kind of model was asked, too, and refused the crystal: which answers alone, and why; else empty.
    """

    mean: np.ndarray
    spread: np.ndarray
    known: np.ndarray
    error: np.ndarray
    reason: str = ""
    gap: float = float("nan")
    lacking: str = ""


@dataclass
class _Opinions:
    """What the models say of one crystal of n sites; each DOS is (n, 151).

    Attributes
    ----------
    numbers : (n,), of the atoms
    bound, networks : by each tight-binding model and by each network
    corrected : mean of the correctors, if there are any
    gaps : by each tight-binding model, eV
    reason : why the last kind of model that refused did so
    """

    numbers: np.ndarray
    bound: list[np.ndarray] = field(default_factory=list)
    networks: list[np.ndarray] = field(default_factory=list)
    corrected: np.ndarray | None = None
    gaps: list[float] = field(default_factory=list)
    reason: str = ""

    def weighted(self) -> tuple[np.ndarray, np.ndarray]:
        """Opinions (m, n, 151) and their weights (m,), of sum 1.

        Correctors count half, tight binding and the mean network a quarter each: on `val` the three kinds err
        differently, and a corrector starts from one of the others.
        """
        both = self.bound and self.networks
        voices = [*self.bound, np.mean(self.networks, 0)] if both else self.bound or self.networks
        weights = np.full(len(voices), 1 / max(1, len(voices)))
        if self.corrected is not None:
            voices.append(self.corrected)
            weights = np.array([*[0.25 / len(self.bound)] * len(self.bound), 0.25, 0.5])
        return np.stack(voices) if voices else np.zeros((0, 0, 0)), weights.astype(np.float32)


def _member(inputs: int, config: PredictorConfig) -> nn.Sequential:
    """Standardised inputs -> correction to the element's mean DOS, before the softplus."""
    widths = [inputs, *[config.hidden] * config.depth]
    layers: list[nn.Module] = []
    for size, width in pairwise(widths):
        layers += [nn.Linear(size, width), nn.SiLU(), nn.Dropout(config.dropout)]
    return nn.Sequential(*layers, linear(widths[-1], MODEL_GRID.size, start=1e-3))  # at first the element's mean


class DOSPredictor:
    """Ensemble of unlike models that predicts the site DOS of a structure.

    Tight-binding models (`tight_binding.model`) see atoms alone. Networks see a site's 385 CHGNet features and the mean
    over the crystal of its elements' mean DOS; they give the softplus of a correction added to the (inverse softplus of
    the) mean DOS of the site's element, so it is never negative. Correctors see the site's mean tight-binding DOS, too,
    and correct that. The prediction is the mean of tight binding and the networks, averaged with that of the
    correctors; without correctors, the mean over the tight-binding models and the mean network. Its spread is the
    standard deviation of these (of the networks, where they are alone).

    Make one with `train_predictor` or `load`.
    """

    def __init__(
        self,
        config: PredictorConfig,
        tables: dict[str, Tensor],
        info: dict[str, Any],
        tight_binding: Sequence[TightBinding] = (),
    ) -> None:
        if not config.members and not tight_binding:
            raise ValueError("a predictor needs networks or tight-binding models")
        if config.correctors and not tight_binding:
            raise ValueError(f"correctors={config.correctors} need a tight-binding model to correct")
        self.config = config
        self.tables = tables  # baseline, support: (95, 151); input_mean, input_std: (536,); dos_mean, dos_std: (151,)
        self.info = info
        inputs = len(tables["input_mean"]) if config.members else 0
        self.members = nn.ModuleList(_member(inputs, config) for _ in range(config.members)).eval()
        wide = inputs + MODEL_GRID.size
        self.correctors = nn.ModuleList(_member(wide, config) for _ in range(config.correctors)).eval()
        self.tight_binding = tuple(model.eval().requires_grad_(False) for model in tight_binding)

    @property
    def baseline(self) -> np.ndarray:
        """Mean DOS per element, (95, 151), states/eV; row = atomic number."""
        return self.tables["baseline"].numpy()

    def calibration(self, method: str = "all") -> dict[str, Any]:
        """Factor on the ensemble's "spread", and slope and offset of the expected "error"; see `SitePrediction`."""
        found = self.info.get("calibration", {"spread": 1.0, "error": [1.0, 0.0]})  # plain before it is calibrated
        return self.info.get("calibrations", {}).get(method, found)

    @property
    def methods(self) -> tuple[str, ...]:
        """What `predict_arrays` can be asked for."""
        return METHODS if self.members and self.tight_binding else ("all", METHODS[1 if self.tight_binding else 2])

    def to(self, device: str | torch.device) -> DOSPredictor:
        """Have the tight-binding models compute on a device; the networks are quick anywhere. Returns itself."""
        for model in self.tight_binding:
            model.to(device)
        return self

    def standardised(self, inputs: Tensor, dos: Tensor | None = None) -> Tensor:
        """Inputs (s, 536) of networks as they see them; with the tight-binding DOS (s, 151) those of correctors."""
        made = (inputs - self.tables["input_mean"]) / self.tables["input_std"]
        if dos is not None:
            made = torch.cat([made, (dos - self.tables["dos_mean"]) / self.tables["dos_std"]], 1)
        return made.clamp(-5.0, 5.0)

    def predict_arrays(
        self,
        atoms_list: Sequence[Atoms],
        progress: bool = False,
        *,
        method: str = "all",
        features: Features | None = None,
    ) -> list[SitePrediction]:
        """Predict the site DOS of periodic structures; one that cannot be read comes back all unknown.

        Parameters
        ----------
        atoms_list : periodic crystals
        progress : show a progress bar
        method : "all", "tight-binding" or "features", of which `methods` tells those it has
        features : what `site_features` returned for these structures, if it is at hand

        Raises
        ------
        ValueError
            If it lacks the method.
        """
        if method not in self.methods:
            raise ValueError(f"method={method!r}: this predictor has {', '.join(self.methods)}")
        opinions = [_Opinions(atoms.numbers.astype(np.int64)) for atoms in atoms_list]
        if self.tight_binding and method != "features":
            self._by_tight_binding(atoms_list, opinions, progress)
        if self.members and method != "tight-binding":
            if features is None:
                features = site_features(atoms_list, progress=progress)
            self._by_networks(features, opinions)
        return [self._joined(found, method) for found in opinions]

    @torch.no_grad()
    def _by_networks(self, features: Features, opinions: Sequence[_Opinions]) -> None:
        """Fill in what networks and, where there is a tight-binding DOS, correctors say; or why they do not."""
        for i, feature in enumerate(features):
            if isinstance(feature, str):
                opinions[i].reason = feature
        readable = [i for i, feature in enumerate(features) if not isinstance(feature, str)]
        if not readable:
            return
        baseline, kinds = self.tables["baseline"], [opinions[i].numbers for i in readable]
        inputs = network_inputs(baseline, [features[i] for i in readable], kinds)
        offset = inverse_softplus(baseline[torch.from_numpy(np.concatenate(kinds))])
        x = self.standardised(inputs)
        found = torch.stack([softplus(net(x) + offset) for net in self.members])
        counts, both = [len(z) for z in kinds], []
        for i, seen, part in zip(readable, inputs.split(counts), found.split(counts, 1), strict=True):
            opinions[i].networks = list(part.numpy())
            if opinions[i].bound:
                both.append((opinions[i], seen))
        if self.correctors and both:
            self._correct(both)

    def _correct(self, both: Sequence[tuple[_Opinions, Tensor]]) -> None:
        """Fill in what correctors make of the tight-binding DOS of crystals, given with their inputs (n, 536)."""
        dos = torch.from_numpy(np.concatenate([np.mean(one.bound, 0) for one, _ in both]))
        x, offset = self.standardised(torch.cat([part for _, part in both]), dos), inverse_softplus(dos)
        corrected = torch.stack([softplus(net(x) + offset) for net in self.correctors]).mean(0)
        for (one, _), part in zip(both, corrected.split([len(part) for _, part in both]), strict=True):
            one.corrected = part.numpy()

    def _by_tight_binding(self, atoms_list: Sequence[Atoms], opinions: Sequence[_Opinions], progress: bool) -> None:
        """Fill in the DOS by each model, why there is none, and the mean gap."""
        graphs: dict[float, dict[int, CrystalGraph]] = {model.config.cutoff: {} for model in self.tight_binding}
        for i, atoms in enumerate(atoms_list):
            try:
                check_cell(atoms)  # that was given
                reduced = _reduced(atoms)
                for cutoff in graphs:
                    graphs[cutoff][i] = tight_binding_graph(reduced, cutoff)
            except ValueError as error:
                opinions[i].reason = str(error)
        with cpu_threads(1):  # matrices are small
            for mesh, model in enumerate(self.tight_binding):
                known = graphs[model.config.cutoff]
                told = predict_crystals(model, list(known.values()), progress, mesh=mesh)
                for i, found in zip(known, told, strict=True):
                    opinions[i].bound.append(found.dos.sum(axis=1))
                    opinions[i].gaps.append(found.gap)

    def _joined(self, opinions: _Opinions, method: str) -> SitePrediction:
        """Mean and calibrated spread of the opinions; of one, a part of the DOS itself is its spread."""
        z = opinions.numbers
        voices, weights = opinions.weighted()
        if not len(voices):
            nothing = np.zeros((len(z), MODEL_GRID.size), dtype=np.float32)
            return SitePrediction(nothing, nothing, nothing > 0, np.full(len(z), np.nan), opinions.reason)
        mean = np.tensordot(weights, voices, 1)
        spread = np.sqrt(np.tensordot(weights, (voices - mean) ** 2, 1))
        if len(voices) == 1:
            spread = np.maximum(mean, 1e-3)  # never sure, not even of a gap
        known = self.tables["support"].numpy()[z] >= MIN_LABELS
        both = bool(opinions.bound and opinions.networks)
        alone, by = ("tight-binding", "tight binding") if opinions.bound else ("features", "the networks")
        lacking = f"predicted by {by} alone: {opinions.reason}" if opinions.reason and not both else ""
        calibration = self.calibration(method if both else alone)
        slope, offset = calibration["error"]
        error = offset + slope * relative_spread(mean, spread, known)
        error[~known.any(axis=1)] = np.nan
        gap = self._gap(opinions.gaps)
        return SitePrediction(mean, spread * calibration["spread"], known, error, "", gap, lacking)

    def _gap(self, gaps: Sequence[float]) -> float:
        """Calibrated mean of the models' gaps, eV; 0 where that is a metal's, NaN without a model."""
        if not gaps:
            return float("nan")
        slope, offset = self.info.get("gap", (1.0, 0.0))
        mean = float(np.mean(gaps))
        return max(0.0, offset + slope * mean) if mean > MIN_GAP else 0.0

    def save(self, path: str | Path) -> None:
        """Save as one safetensors file (networks in half precision), atomically."""
        tensors = {f"members.nets.{k}": v.half() for k, v in self.members.state_dict().items()}
        tensors |= {f"correctors.nets.{k}": v.half() for k, v in self.correctors.state_dict().items()}
        for i, model in enumerate(self.tight_binding):
            tensors.update({f"tight_binding.{i}.{k}": v.half() for k, v in model.state_dict().items()})
        told: dict[str, Any] = {"kind": "predictor", "config": asdict(self.config), "info": self.info}
        if self.tight_binding:
            told["tight_binding"] = [asdict(model.config) for model in self.tight_binding]
        save_tensors(path, {**tensors, **self.tables}, told)

    @classmethod
    def load(cls, path: str | Path = DEFAULT_PREDICTOR) -> DOSPredictor:
        """Load what `save` wrote; the one that ships by default.

        Raises
        ------
        FileNotFoundError, ValueError
            If the file is absent, damaged, or holds something else.
        """
        tensors, header = load_tensors(path)
        if header.get("kind") != "predictor":
            raise ValueError(f"{path} holds no predictor (kind: {header.get('kind')}): give the path of one")
        tables = {k: v for k, v in tensors.items() if not k.startswith(("members.", "correctors.", "tight_binding."))}
        try:
            config = PredictorConfig(**header["config"])
            _check_tables(tables, config, header)
            tables = {k: table if k == "support" else table.float() for k, table in tables.items()}
            models = [_filled(k, told, tensors) for k, told in enumerate(header.get("tight_binding", []))]
            with without_values():
                predictor = cls(config, tables, header["info"], models)
            fill(predictor.members, _part("members.nets.", tensors))
            fill(predictor.correctors, _part("correctors.nets.", tensors))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            told = f"the header of {path} does not describe its own tensors ({error}): fetch or train it again"
            raise ValueError(told) from error
        return predictor


def _check_tables(tables: Mapping[str, Tensor], config: PredictorConfig, header: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless the tables are there and have their shapes, and the calibrations are numbers."""
    inputs, grid = (NUM_FEATURES + MODEL_GRID.size,), (MAX_ATOMIC_NUMBER + 1, MODEL_GRID.size)
    shapes: dict[str, tuple[int, ...]] = {"baseline": grid, "support": grid}
    shapes |= {"input_mean": inputs, "input_std": inputs} if config.members else {}
    shapes |= {"dos_mean": grid[1:], "dos_std": grid[1:]} if config.correctors else {}
    if tables.keys() != shapes.keys():
        raise ValueError(f"it has the tables {sorted(tables)}")
    info = header["info"]
    if wrong := [name for name, table in tables.items() if tuple(table.shape) != shapes[name]]:
        raise ValueError(f"the table {wrong[0]} has the shape {tuple(tables[wrong[0]].shape)}")
    if not all(table.is_floating_point() for name, table in tables.items() if name != "support"):
        raise ValueError("a table holds no floats")
    if not isinstance(info, dict):
        raise ValueError("info is no mapping")
    slope, offset = info.get("gap", (1.0, 0.0))
    if not all(is_real(number) and math.isfinite(number) for number in (slope, offset)):
        raise ValueError("the calibration of the gap holds no finite numbers")
    several = info.get("calibrations", {})
    for told in (*([info["calibration"]] if "calibration" in info else []), *several.values()):
        slope, offset = told["error"]
        if not all(is_real(number) and math.isfinite(number) for number in (slope, offset, told["spread"])):
            raise ValueError("a calibration holds no finite numbers")


def _reduced(atoms: Atoms) -> Atoms:
    """The crystal with its Niggli-reduced cell, itself where it has that: a mesh over a skewed cell is another one."""
    operation = niggli_operation(atoms.cell.array)
    if np.array_equal(operation, np.eye(3)):
        return atoms
    copy = atoms.copy()
    copy.set_cell(operation @ atoms.cell.array, apply_constraint=False)
    return copy


def _part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)}


def _filled(number: int, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> TightBinding:
    """Build a tight-binding model from its config and values; ``ValueError`` as `fill`."""
    with torch.random.fork_rng(devices=[]):  # its first values come from the global generator
        model = TightBinding(TightBindingConfig(**config), torch.zeros(MAX_ATOMIC_NUMBER + 1, 3))
    fill(model, _part(f"tight_binding.{number}.", tensors))
    return model


def network_inputs(baseline: Tensor, features: Iterable[np.ndarray | str], numbers: Iterable[np.ndarray]) -> Tensor:
    """Return the unstandardised inputs (s, 536) of the sites of structures, which all have features."""
    parts = []
    for feature, z in zip(features, numbers, strict=True):
        context = baseline[torch.tensor(z)].mean(dim=0, keepdim=True).expand(len(z), -1)
        parts.append(torch.cat([torch.tensor(np.asarray(feature, dtype=np.float32)), context], dim=1))
    return torch.cat(parts)


def inverse_softplus(y: Tensor) -> Tensor:
    """What `softplus` turns into y; y below 0.001 counts as 0.001."""
    y = y.clamp(min=1e-3)
    return y + torch.log(-torch.expm1(-y))


@once
def default_predictor() -> DOSPredictor:
    """Return the predictor that ships with the package, loaded once per process."""
    return DOSPredictor.load()


def predict_dos(
    atoms: Atoms | Sequence[Atoms],
    sites: Sequence[int] | None = None,
    *,
    method: str = "all",
    progress: bool = False,
) -> list[Any]:
    """Predict the site DOS of crystals, each in a fraction of a second.

    Parameters
    ----------
    atoms : periodic crystal, or a sequence of them
    sites : the sites wanted (of every crystal), counted from 0; all by default
    method : "all" for the mean of all models, "tight-binding" for those that need no CHGNet, "features" for the others
    progress : show a progress bar

    Returns
    -------
    list of TargetDOS, or a list of such lists for a sequence
        One per site wanted, states/eV at sigma 0.2 eV on [-10, 5] eV; None where it is unknown, as fewer than 3
        labelled structures hold the site's element. `reference` is "vbm" where the predicted bands leave a gap, else
        "fermi". `provenance` tells the uncertainty: "expected_distance" (normalised L1) and "spread" (151
        values, states/eV; 68 % of computed DOS lie within it around the prediction). A DOS by one kind of model alone,
        as the other cannot read the crystal, says so there ("assumed"), and a warning names the crystal.

    Raises
    ------
    TypeError
        If something is not an Atoms, or a site is not a whole number.
    ValueError
        If a crystal lacks a site wanted, if CHGNet cannot read it, or if no site wanted is known. In a sequence the
        last two cost no other crystal: all its sites are None, and a warning names it and the reason.
    """
    single = isinstance(atoms, Atoms)
    structures: list[Atoms] = [atoms] if single else list(atoms)
    for item in structures:
        if not isinstance(item, Atoms):
            raise TypeError(f"predict_dos takes ase.Atoms or a list of them, not {type(item).__name__}")
    wanted = [_wanted_sites(sites, item) for item in structures]
    predictor = default_predictor()
    found: list[list[TargetDOS | None]] = []
    unknown: list[str] = []
    lacking: list[str] = []
    predictions = predictor.predict_arrays(structures, progress=progress, method=method)
    for i, (item, prediction, chosen) in enumerate(zip(structures, predictions, wanted, strict=True)):
        made = _targets_of(prediction, chosen, predictor.info)
        found.append(made)
        name = f"{'' if single else f'structure {i}, '}{formula_of(item)}"
        if chosen and not any(made):
            unknown.append(f"{name}: {prediction.reason or too_few_labels(item.numbers[chosen])}")
        elif prediction.lacking:
            lacking.append(f"{name}: {prediction.lacking}")
    if unknown and single:
        raise ValueError(f"no DOS for {unknown[0]}")
    for what, lines in (("no DOS", unknown), ("a less certain DOS", lacking)):
        if lines:
            told = "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")
            warnings.warn(f"{what} for {len(lines)} of {len(found)} structures: {told}", stacklevel=2)
    return found[0] if single else found


def too_few_labels(numbers: Iterable[int]) -> str:
    """Say why the DOS of sites of these elements, all unknown, is no prediction."""
    held = {chemical_symbols[z] for z in numbers if 0 <= z < len(chemical_symbols)}
    return f"fewer than {MIN_LABELS} labelled structures hold {', '.join(sorted(held))}"


def _wanted_sites(sites: Sequence[int] | None, atoms: Atoms) -> list[int]:
    wanted = site_numbers(range(len(atoms)) if sites is None else sites, "sites")
    if missing := [i for i in wanted if not 0 <= i < len(atoms)]:
        raise ValueError(
            f"sites={missing} do not exist: {atoms.get_chemical_formula()} has the sites 0 to {len(atoms) - 1}"
        )
    return list(wanted)


def _targets_of(prediction: SitePrediction, sites: Iterable[int], info: dict[str, Any]) -> list[TargetDOS | None]:
    """Return the DOS of these sites of a crystal, None where nothing is known of it."""
    told = np.asarray(prediction.known.any(axis=1))
    gapped = told.any() and _looks_gapped(prediction.mean[told])
    if not np.isnan(prediction.gap):
        gapped = prediction.gap > 0
    reference = "vbm" if gapped else "fermi"

    def target(i: int) -> TargetDOS:
        doubt = {"expected_distance": float(prediction.error[i]), "spread": prediction.spread[i].tolist()}
        record = {"source": "predictor", "steps": [], "predictor": info, **doubt}
        record |= {"assumed": [prediction.lacking]} if prediction.lacking else {}
        known, mean = prediction.known[i], prediction.mean[i]
        return TargetDOS(MODEL_GRID.energies, mean, known, reference, MODEL_SIGMA, provenance=record)

    return [target(i) if told[i] else None for i in sites]


class DOSCalculator(Calculator):
    """ASE calculator of the predicted site DOS: ``DOSCalculator().get_property("site_dos", atoms)``.

    Results: ``site_dos`` and ``site_dos_spread`` (n, 151), states/eV; ``site_dos_error`` (n,), see `SitePrediction`;
    ``dos_energies`` (151,), eV. NaN at sites whose DOS is unknown.
    """

    implemented_properties = ("site_dos", "site_dos_spread", "site_dos_error", "dos_energies")

    def calculate(
        self, atoms: Atoms | None = None, properties: Any = None, system_changes: Sequence[str] = all_changes
    ) -> None:
        """Fill ``results``; ``ValueError`` without atoms, and as `predict_dos`."""
        super().calculate(atoms, properties, system_changes)
        if self.atoms is None:
            raise ValueError("DOSCalculator has no atoms: give them, as in calculate(atoms)")
        sites = predict_dos(self.atoms)
        nothing = np.full(MODEL_GRID.size, np.nan)
        told = [dos.provenance if dos else {} for dos in sites]
        self.results = {
            "site_dos": np.array([dos.values if dos else nothing for dos in sites]),
            "site_dos_spread": np.array([item.get("spread", nothing) for item in told]),
            "site_dos_error": np.array([item.get("expected_distance", np.nan) for item in told]),
            "dos_energies": MODEL_GRID.energies,
        }


def _looks_gapped(site_dos: np.ndarray) -> bool:
    """Tell whether the DOS of a cell's sites (n, 151) leaves a gap just above zero.

    On the computed labels this finds 90 % of the gapped crystals (all with a gap above 1 eV), and 3 % of the metals.
    """
    above = (MODEL_GRID.energies > 0.25) & (MODEL_GRID.energies < 0.65)
    return bool(site_dos[:, above].sum(axis=0).min() < 0.02 * len(site_dos))


def relative_spread(mean: np.ndarray, spread: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Spread over states, both summed over the known bins, per site."""
    return np.asarray((spread * known).sum(axis=1) / np.maximum((mean * known).sum(axis=1), 1e-6))
