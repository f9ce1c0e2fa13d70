"""Forward model: a structure's site DOS, by learned tight binding and from frozen CHGNet atom features.

`DOSPredictor` is an ensemble of unlike models that gives a DOS per site with a calibrated uncertainty: Hamiltonians
written by a network (`tight_binding`), and small networks that correct a per-element mean from the 385 numbers per atom
that `site_features` makes of a crystal. `train_predictor` fits the networks to labels and calibrates the whole;
`pseudo_labels` applies it to structures without a label. The predictor that ships is trained on all labels. Two more
serve the benchmarks, trained on the two halves of the formulas (`data.formula_fold`): the ranker picks there and makes
the generator's pseudo-labels, the judge only ever measures.
"""

from __future__ import annotations

import contextlib
import copy
import io
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from ase.calculators.calculator import Calculator, all_changes
from ase.data import chemical_symbols
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm import tqdm, trange

from dosmatgen_ase.crystals.checks import is_disordered
from dosmatgen_ase.crystals.convert import to_structure
from dosmatgen_ase.data import MAX_ATOMS, SiteDOSLabels, Structures, formula_fold, load_shell_dos, load_site_dos
from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA, TargetDOS, normalised_l1_arrays
from dosmatgen_ase.files import write_npz
from dosmatgen_ase.forward.tight_binding.graph import CrystalGraph, crystal_graph
from dosmatgen_ase.forward.tight_binding.model import TightBinding, TightBindingConfig
from dosmatgen_ase.forward.tight_binding.predict import MAX_ORBITALS, predict_crystals
from dosmatgen_ase.forward.tight_binding.training import TightBindingTraining, fit, labelled_crystals, new_model
from dosmatgen_ase.model.checkpoint import fill, load_tensors, save_tensors, without_values
from dosmatgen_ase.parsing import site_numbers
from dosmatgen_ase.threads import cpu_threads

if TYPE_CHECKING:
    from ase import Atoms

DEFAULT_PREDICTOR = Path(__file__).parents[1] / "weights" / "predictor.safetensors"
NUM_FEATURES = 385  # 4 convolutions x 64, final site vector 64, crystal vector 64, magnetic moment 1
MAX_ATOMIC_NUMBER = 94  # last element CHGNet knows
MIN_VOLUME = 2.0  # Angstrom^3 per atom: below, neighbour lists explode and CHGNet means nothing
COVERAGE = 0.68  # share of the computed values within the calibrated spread, as for one standard deviation
METHODS = ("all", "tight-binding", "features")
MIN_LABELS = 3  # labelled structures that an element needs, at an energy, for its DOS there to count as known

_LOADING = threading.Lock()

# -- features ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def load_chgnet() -> Any:
    """Return CHGNet 0.3.0 on the CPU, frozen, loaded quietly once per process: its weights come with its wheel."""
    with (
        _LOADING,  # what is redirected here is that of the process
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        torch.random.fork_rng(devices=[]),
    ):
        warnings.simplefilter("ignore")
        from chgnet.model import CHGNet

        model = CHGNet.load(use_device="cpu", verbose=False)
    return model.eval().requires_grad_(False)


def check_crystal(atoms: Atoms) -> None:
    """Refuse what no forward model can read.

    Raises
    ------
    ValueError
        With the reason: not a finite crystal, unknown elements, collapsed.
    """
    cell, numbers = atoms.cell.array, atoms.numbers
    if not (np.isfinite(cell).all() and np.isfinite(atoms.positions).all()):
        raise ValueError("non-finite cell or positions")
    if len(numbers) == 0 or not atoms.pbc.all():
        raise ValueError("not a crystal: needs at least one atom and pbc=True")
    if is_disordered(atoms):
        raise ValueError("disordered: sites are shared or partly empty")
    if numbers.min() < 1 or numbers.max() > MAX_ATOMIC_NUMBER:
        raise ValueError(f"elements outside CHGNet's 1..{MAX_ATOMIC_NUMBER}")
    if abs(np.linalg.det(cell)) < MIN_VOLUME * len(numbers):
        raise ValueError(f"collapsed cell: less than {MIN_VOLUME} A^3 per atom")


def chgnet_graph(atoms: Atoms) -> object:
    """Return the graph on which CHGNet works.

    Raises
    ------
    ValueError
        With the reason why the structure has none: as `check_crystal`, or atoms alone.
    """
    check_crystal(atoms)
    structure = to_structure(atoms, wrap=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_chgnet().graph_converter(structure)
    except Exception as error:  # foreign code: whatever it raises is the failure of this structure only
        raise ValueError(f"CHGNet cannot build its graph: {type(error).__name__}: {error}") from error


def tight_binding_graph(atoms: Atoms, cutoff: float) -> CrystalGraph:
    """Return the bonds on which tight binding works.

    Raises
    ------
    ValueError
        With the reason why the structure has none: as `check_crystal`, atoms alone or in one place, too large a cell.
    """
    check_crystal(atoms)
    graph = crystal_graph(atoms, cutoff)
    if len(np.unique(graph.first)) < len(atoms):
        raise ValueError(f"isolated atoms: not all have a neighbour within {cutoff:g} A")
    if graph.size > MAX_ORBITALS:
        raise ValueError(f"{graph.size} orbitals are too many, at most {MAX_ORBITALS}: take a smaller cell")
    return graph


@lru_cache(maxsize=1)
def _observed_chgnet() -> tuple[Any, threading.local]:
    """A CHGNet of our own whose layers put what they return into ``outputs`` of the thread that runs them.

    Its hooks stay, and nobody else runs it: hooks that come and go on the model that relaxations share would catch
    what other threads compute.
    """
    model, caught = copy.deepcopy(load_chgnet()), threading.local()

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        caught.outputs.append(output)

    for layer in (*model.atom_conv_layers, model.readout_norm):
        layer.register_forward_hook(keep)
    return model, caught


def _forward(graphs: list, counts: list[int]) -> np.ndarray:
    """Run CHGNet on graphs of `counts` atoms and return the (sum(counts), 385) features; threads may do so at once."""
    model, caught = _observed_chgnet()
    outputs: list[Tensor] = []
    caught.outputs = outputs
    try:
        with torch.no_grad():
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


def cached_site_features(
    structures: Structures, directory: str | Path, piece: int = 512, progress: bool = False
) -> list[np.ndarray | str]:
    """Return `site_features` of a table of structures, kept on disk in pieces so that an interrupted run resumes.

    Pieces (`*.npz`) are looked up by `material_id`, so one folder serves any selection of the same structures.
    """
    directory = Path(directory)
    known: dict[str, np.ndarray | str] = {}
    for path in sorted(directory.glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            parts = np.split(file["features"], np.cumsum(file["counts"])[:-1])
            ids, reasons = file["material_id"].tolist(), file["reason"].tolist()
            known.update((i, reason or part) for i, part, reason in zip(ids, parts, reasons, strict=True))
    missing = [i for i, material_id in enumerate(structures.material_id.tolist()) if material_id not in known]
    for start in trange(0, len(missing), piece, disable=not progress, unit="piece", desc="CHGNet features"):
        rows = missing[start : start + piece]
        fresh = site_features([structures.atoms(i) for i in rows])
        arrays = [f if isinstance(f, np.ndarray) else np.zeros((0, NUM_FEATURES), np.float32) for f in fresh]
        ids = structures.material_id[rows]
        write_npz(
            directory / f"{ids[0]}.npz",
            material_id=ids,
            counts=np.array([len(a) for a in arrays]),
            features=np.concatenate(arrays).astype(np.float16),
            reason=np.array([f if isinstance(f, str) else "" for f in fresh]),
        )
        rounded = [f if isinstance(f, str) else f.astype(np.float16) for f in fresh]  # as a resumed run reads them
        known.update(zip(ids.tolist(), rounded, strict=True))
    return [known[material_id] for material_id in structures.material_id.tolist()]


# -- the model ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PredictorConfig:
    """Size and training of a `DOSPredictor`.

    Attributes
    ----------
    hidden, depth : width and number of hidden layers of each member
    dropout : probability in every hidden layer
    members : networks in the ensemble, which differ by seed; 0 for tight binding alone
    epochs : passes over the labelled sites; the weights (an exponential average) of the best epoch on `val` are kept
    learning_rate, weight_decay : of AdamW, under a one-cycle schedule
    batch_size : sites per step
    """

    hidden: int = 320
    depth: int = 3
    dropout: float = 0.3
    members: int = 3
    epochs: int = 80
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name, highest in (("hidden", 8192), ("depth", 32), ("members", 64)):
            value, lowest = getattr(self, name), int(name != "members")
            if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
                raise ValueError(f"{name}={value!r} must be a whole number from {lowest} to {highest}")


class Role(NamedTuple):
    """What a predictor of the project is made of: half of the formulas (None: all), networks, tight-binding models."""

    fold: int | None
    config: PredictorConfig
    tight_binding: int


# All models differ by seed. The judge shares neither labels nor CHGNet's features with the ranker.
ROLES = {
    "predictor": Role(None, PredictorConfig(), 1),
    "ranker": Role(0, PredictorConfig(), 1),
    "judge": Role(1, PredictorConfig(members=0), 1),
}


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
        Band gap by tight binding, 0 for a metal; NaN without it.
    """

    mean: np.ndarray
    spread: np.ndarray
    known: np.ndarray
    error: np.ndarray
    reason: str = ""
    gap: float = float("nan")


def _member(inputs: int, config: PredictorConfig) -> nn.Sequential:
    """Standardised inputs -> correction to the element's mean DOS, before the softplus."""
    widths = [inputs, *[config.hidden] * config.depth]
    layers: list[nn.Module] = []
    for size, width in pairwise(widths):
        layers += [nn.Linear(size, width), nn.SiLU(), nn.Dropout(config.dropout)]
    head = nn.Linear(widths[-1], MODEL_GRID.size)
    nn.init.normal_(head.weight, std=1e-3)  # start at the element's mean
    nn.init.zeros_(head.bias)
    return nn.Sequential(*layers, head)


class DOSPredictor:
    """Ensemble of unlike models that predicts the site DOS of a structure.

    Tight-binding models (`tight_binding.model`) see atoms alone. Networks see a site's 385 CHGNet features and the mean
    over the crystal of its elements' mean DOS; they give the softplus of a correction added to the (inverse softplus of
    the) mean DOS of the site's element, so it is never negative. The prediction is the mean over the tight-binding
    models and the mean network; its spread, their standard deviation (of the networks, where they are alone).

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
        self.config = config
        self.tables = tables  # baseline, support: (95, 151); with networks input_mean, input_std: (536,)
        self.info = info
        inputs = len(tables["input_mean"]) if config.members else 0
        self.members = nn.ModuleList(_member(inputs, config) for _ in range(config.members)).eval()
        self.tight_binding = tuple(model.eval().requires_grad_(False) for model in tight_binding)

    @property
    def baseline(self) -> np.ndarray:
        """Mean DOS per element, (95, 151), states/eV; row = atomic number."""
        return self.tables["baseline"].numpy()

    def calibration(self, method: str = "all") -> dict[str, Any]:
        """Factor on the ensemble's "spread", and slope and offset of the expected "error"; see `SitePrediction`."""
        plain = {"spread": 1.0, "error": [1.0, 0.0]}  # before it is calibrated
        found = self.info.get("calibration", plain)
        if method == "all" or method not in self.methods:
            return found
        return self.info.get("calibrations", {}).get(method, found)

    @property
    def methods(self) -> tuple[str, ...]:
        """What `predict_arrays` can be asked for."""
        return METHODS if self.members and self.tight_binding else ("all", METHODS[1 if self.tight_binding else 2])

    def _standardised(self, inputs: Tensor) -> Tensor:
        return ((inputs - self.tables["input_mean"]) / self.tables["input_std"]).clamp(-5.0, 5.0)

    def predict_features(
        self, features: Sequence[np.ndarray | str], numbers: Sequence[np.ndarray]
    ) -> list[SitePrediction]:
        """Predict by the networks alone, from what `site_features` returned and atomic numbers (n,)."""
        opinions = self._by_networks(features, numbers)
        reasons = [feature if isinstance(feature, str) else "" for feature in features]
        nothing = [float("nan")] * len(features)
        told = zip(numbers, opinions, reasons, nothing, strict=True)
        return [self._joined(z, list(found), reason, gap, "features") for z, found, reason, gap in told]

    def predict_arrays(
        self,
        atoms_list: Sequence[Atoms],
        progress: bool = False,
        *,
        method: str = "all",
        features: Sequence[np.ndarray | str] | None = None,
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
        numbers = [atoms.numbers.astype(np.int64) for atoms in atoms_list]
        opinions: list[list[np.ndarray]] = [[] for _ in atoms_list]
        reasons, gaps = [""] * len(atoms_list), [float("nan")] * len(atoms_list)
        if self.tight_binding and method != "features":
            self._by_tight_binding(atoms_list, opinions, reasons, gaps, progress)
        used = ["tight-binding" if found else method for found in opinions]
        if self.members and method != "tight-binding":
            if features is None:
                features = site_features(atoms_list, progress=progress)
            for i, found in enumerate(self._by_networks(features, numbers)):
                if len(found) and opinions[i]:
                    opinions[i].append(found.mean(0))
                    used[i] = method
                elif len(found):
                    opinions[i], used[i] = list(found), "features"
                elif not opinions[i]:
                    reasons[i] = str(features[i])
        told = zip(numbers, opinions, reasons, gaps, used, strict=True)
        return [self._joined(z, found, reason, gap, how) for z, found, reason, gap, how in told]

    def _by_networks(self, features: Sequence[np.ndarray | str], numbers: Sequence[np.ndarray]) -> list[np.ndarray]:
        """DOS (m, n, 151) by each of m networks, m = 0 for structures without features."""
        found = [np.zeros((0, len(z), MODEL_GRID.size), dtype=np.float32) for z in numbers]
        readable = {i: feature for i, feature in enumerate(features) if not isinstance(feature, str)}
        if not readable:
            return found
        baseline = self.tables["baseline"]
        with torch.no_grad():
            kinds = [numbers[i] for i in readable]
            x = self._standardised(_inputs(baseline, readable.values(), kinds))
            offset = _inverse_softplus(baseline[torch.from_numpy(np.concatenate(kinds))])
            members = torch.stack([softplus(net(x) + offset) for net in self.members]).numpy()
        start = 0
        for i, feature in readable.items():
            found[i] = members[:, start : (start := start + len(feature))]
        return found

    def _by_tight_binding(
        self,
        atoms_list: Sequence[Atoms],
        opinions: list[list[np.ndarray]],
        reasons: list[str],
        gaps: list[float],
        progress: bool,
    ) -> None:
        """Fill in the DOS (n, 151) by each model, why there is none, and the mean gap."""
        graphs: dict[float, dict[int, CrystalGraph]] = {model.config.cutoff: {} for model in self.tight_binding}
        for i, atoms in enumerate(atoms_list):
            try:
                for cutoff in graphs:
                    graphs[cutoff][i] = tight_binding_graph(atoms, cutoff)
            except ValueError as error:
                reasons[i] = str(error)
        with cpu_threads(1):  # matrices are small
            for model in self.tight_binding:
                known = graphs[model.config.cutoff]
                for i, found in zip(known, predict_crystals(model, list(known.values()), progress), strict=True):
                    opinions[i].append(found.dos.sum(axis=1))
                    gaps[i] = (0.0 if np.isnan(gaps[i]) else gaps[i]) + found.gap / len(self.tight_binding)

    def _joined(
        self, z: np.ndarray, opinions: Sequence[np.ndarray], reason: str, gap: float, method: str
    ) -> SitePrediction:
        """Mean and calibrated spread of m opinions (n, 151); of one, a part of the DOS itself is its spread."""
        if not opinions:
            nothing = np.zeros((len(z), MODEL_GRID.size), dtype=np.float32)
            return SitePrediction(nothing, nothing, nothing > 0, np.full(len(z), np.nan), reason)
        together = np.stack(opinions)
        mean = together.mean(0)
        spread = together.std(0) if len(together) > 1 else np.maximum(mean, 1e-3)  # never sure, not even of a gap
        known = self.tables["support"].numpy()[z] >= MIN_LABELS
        calibration = self.calibration(method)
        slope, offset = calibration["error"]
        error = offset + slope * _relative_spread(mean, spread, known)
        error[~known.any(axis=1)] = np.nan
        return SitePrediction(mean, spread * calibration["spread"], known, error, "", gap)

    def save(self, path: str | Path) -> None:
        """Save as one safetensors file (networks in half precision), atomically."""
        tensors = {f"members.nets.{k}": v.half() for k, v in self.members.state_dict().items()}
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
        tables = {k: v for k, v in tensors.items() if not k.startswith(("members.", "tight_binding."))}
        try:
            config = PredictorConfig(**header["config"])
            named = {"baseline", "support", *(("input_mean", "input_std") if config.members else ())}
            if tables.keys() != named:
                raise ValueError(f"it has the tables {sorted(tables)}")
            models = [_filled(k, told, tensors) for k, told in enumerate(header.get("tight_binding", []))]
            with without_values():
                predictor = cls(config, tables, header["info"], models)
            fill(predictor.members, _part("members.nets.", tensors))
        except (KeyError, TypeError, ValueError) as error:
            told = f"the header of {path} does not describe its own tensors ({error}): fetch or train it again"
            raise ValueError(told) from error
        return predictor


def _part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)}


def _filled(number: int, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> TightBinding:
    """Build a tight-binding model from its config and values; ``ValueError`` as `fill`."""
    with torch.random.fork_rng(devices=[]):  # its first values come from the global generator
        model = TightBinding(TightBindingConfig(**config), torch.zeros(MAX_ATOMIC_NUMBER + 1, 3))
    fill(model, _part(f"tight_binding.{number}.", tensors))
    return model


def _inputs(baseline: Tensor, features: Iterable[np.ndarray | str], numbers: Iterable[np.ndarray]) -> Tensor:
    """Return the unstandardised inputs (s, 536) of the sites of structures, which all have features."""
    parts = []
    for feature, z in zip(features, numbers, strict=True):
        context = baseline[torch.tensor(z)].mean(dim=0, keepdim=True).expand(len(z), -1)
        parts.append(torch.cat([torch.tensor(np.asarray(feature, dtype=np.float32)), context], dim=1))
    return torch.cat(parts)


def _inverse_softplus(y: Tensor) -> Tensor:
    y = y.clamp(min=1e-3)
    return y + torch.log(-torch.expm1(-y))


@lru_cache(maxsize=1)
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
    """Predict the site DOS of crystals, each in milliseconds.

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
        values, states/eV; 68 % of computed DOS lie within it around the prediction).

    Raises
    ------
    TypeError
        If something is not an Atoms, or a site is not a whole number.
    ValueError
        If a crystal lacks a site wanted, if CHGNet cannot read it, or if no site wanted is known. In a sequence the
        last two cost no other crystal: all its sites are None, and a warning names it and the reason.
    """
    from ase import Atoms

    single = isinstance(atoms, Atoms)
    structures: list[Atoms] = [atoms] if single else list(atoms)
    for item in structures:
        if not isinstance(item, Atoms):
            raise TypeError(f"predict_dos takes ase.Atoms or a list of them, not {type(item).__name__}")
    wanted = [_wanted_sites(sites, item) for item in structures]
    predictor = default_predictor()
    found: list[list[TargetDOS | None]] = []
    unknown: list[str] = []
    predictions = predictor.predict_arrays(structures, progress=progress, method=method)
    for i, (item, prediction, chosen) in enumerate(zip(structures, predictions, wanted, strict=True)):
        made = _targets_of(prediction, chosen, predictor.info)
        found.append(made)
        if chosen and not any(made):
            lacking = f"fewer than {MIN_LABELS} labelled structures hold {', '.join(sorted(set(item.symbols[chosen])))}"
            formula = item.get_chemical_formula()
            unknown.append(f"{'' if single else f'structure {i}, '}{formula}: {prediction.reason or lacking}")
    if unknown and single:
        raise ValueError(f"no DOS for {unknown[0]}")
    if unknown:
        shown = "; ".join(unknown[:3]) + (f"; and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        warnings.warn(f"no DOS for {len(unknown)} of {len(found)} structures: {shown}", stacklevel=2)
    return found[0] if single else found


def _wanted_sites(sites: Sequence[int] | None, atoms: Atoms) -> list[int]:
    wanted = site_numbers(range(len(atoms)) if sites is None else sites, "sites")
    if missing := [i for i in wanted if not 0 <= i < len(atoms)]:
        raise ValueError(f"sites={missing}: {atoms.get_chemical_formula()} has the sites 0 to {len(atoms) - 1}")
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
        """Fill ``results``; ``ValueError`` as `predict_dos`."""
        super().calculate(atoms, properties, system_changes)
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


# -- training and use --------------------------------------------------------------------------------------------------


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
    key, inverse = np.unique(
        np.stack([owner, labels.atomic_numbers[owner, site]]), axis=1, return_inverse=True
    )  # (structure, element) pairs
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
    features: Sequence[np.ndarray | str],
    *,
    fold: int | None = None,
    config: PredictorConfig | None = None,
    tight_binding: Sequence[TightBinding] = (),
    seed: int = 0,
    progress: bool = False,
) -> DOSPredictor:
    """Train networks on the labels of split `train`; `val` picks the epoch, `test` is not looked at.

    The loss is each site's normalised L1 over its known bins, softened by 1 state/eV x bin so that nearly empty sites
    do not rule it; a site weighs 1 / sqrt(sites of its cell).

    Parameters
    ----------
    labels : all labels
    features : what `site_features` returned for ``labels.atoms(i)``, in order
    fold : 0 or 1 to train and validate on that half of the formulas only (`data.formula_fold`); all by default
    config : `PredictorConfig()` by default
    tight_binding : models trained on the same labels (`train_tight_binding`) that join the networks
    seed : of initial weights, dropout and order
    progress : show a progress bar

    Raises
    ------
    ValueError
        If `features` does not match `labels`, or no training or validation label is left.
    """
    config = config or PredictorConfig()
    if len(features) != len(labels):
        raise ValueError(f"{len(features)} features for {len(labels)} labels: pass site_features of all labelled atoms")
    train_rows, val_rows = training_rows(labels, features, fold)
    baseline, support = element_tables(labels, train_rows)
    tables = {"baseline": baseline, "support": support}
    info: dict[str, Any] = {"fold": fold, "seed": seed, "train_structures": len(train_rows)}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not that of any GPU
        if config.members:
            train, val = (_training_sites(baseline, labels, features, rows) for rows in (train_rows, val_rows))
            tables |= {"input_mean": train.inputs.mean(0), "input_std": train.inputs.std(0) + 1e-3}
            info["descriptor"] = "CHGNet 0.3.0"
        predictor = DOSPredictor(config, tables, info, tight_binding)
        if config.members:
            train, val = (part._replace(inputs=predictor._standardised(part.inputs)) for part in (train, val))
        for net in predictor.members:
            _fit(net, train, val, config, progress)
    predictor.members.eval()
    calibrate(predictor, labels, features, val_rows)
    return predictor


def training_rows(
    labels: SiteDOSLabels, features: Sequence[np.ndarray | str], fold: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of labels to train on and to validate by, all readable, of one half of the formulas or all.

    Raises
    ------
    ValueError
        If either is empty.
    """
    usable = np.array([not isinstance(f, str) for f in features], dtype=bool)
    folds = np.array([formula_fold(labels.atoms(i).get_chemical_formula(), 2) for i in range(len(labels))])
    in_fold = (folds == fold) if fold is not None else usable
    train, val = (np.flatnonzero(usable & in_fold & (labels.split == split)) for split in ("train", "val"))
    if not len(train) or not len(val):
        raise ValueError(f"{len(train)} training and {len(val)} validation labels: both are needed")
    return train, val


def train_tight_binding(
    label_directory: str | Path,
    labels: SiteDOSLabels,
    features: Sequence[np.ndarray | str],
    *,
    fold: int | None = None,
    config: TightBindingConfig | None = None,
    settings: TightBindingTraining | None = None,
    seed: int = 0,
    directory: str | Path | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> TightBinding:
    """Train one tight-binding model on split `train`; `val` is measured for the log, `test` is not looked at.

    Parameters
    ----------
    label_directory : shards that `labels` come from, for their s, p and d parts
    labels : all labels
    features : what `site_features` returned for ``labels.atoms(i)``; of these the magnetic moments alone are used, to
        train by, and not needed later
    fold : as in `train_predictor`
    config, settings : `TightBindingConfig()` and `TightBindingTraining()` by default
    seed : of initial weights, dropout, order and k-points
    directory : keeps the state, so that an interrupted run goes on, and log.jsonl; none by default
    device : where to train
    progress : show a progress bar

    Returns
    -------
    TightBinding
        On the CPU.
    """
    config, settings = config or TightBindingConfig(), settings or TightBindingTraining()
    parts = []
    for rows in training_rows(labels, features, fold):
        chosen = labels.select(rows)
        moments = [np.asarray(features[i], dtype=np.float32)[:, -1] for i in rows.tolist()]
        parts.append(labelled_crystals(chosen, load_shell_dos(label_directory, chosen), moments, config.cutoff))
    train, val = parts
    model = new_model(train, config, seed).to(device)
    return fit(model, train, val, settings, seed=seed, directory=directory, progress=progress).cpu()


class _Sites(NamedTuple):
    """Labelled sites as tensors: inputs (s, 536), offset, dos and known (s, 151), weight (s,)."""

    inputs: Tensor
    offset: Tensor
    dos: Tensor
    known: Tensor
    weight: Tensor

    def loss(self, net: nn.Module, rows: Tensor) -> Tensor:
        """Weighted mean of the softened normalised L1 over these sites."""
        error = (softplus(net(self.inputs[rows]) + self.offset[rows]) - self.dos[rows]).abs() * self.known[rows]
        scale = (self.dos[rows] * self.known[rows]).sum(1) + 1.0
        return (self.weight[rows] * error.sum(1) / scale).sum() / self.weight[rows].sum()


def _training_sites(
    baseline: Tensor, labels: SiteDOSLabels, features: Sequence[np.ndarray | str], rows: np.ndarray
) -> _Sites:
    """Sites of labels that all have features; their inputs are not standardised yet."""
    labels, readable = labels.select(rows), [features[i] for i in rows.tolist()]
    owner, site = np.nonzero(labels.atomic_numbers)
    return _Sites(
        inputs=_inputs(baseline, readable, [labels.atoms(i).numbers for i in range(len(labels))]),
        offset=_inverse_softplus(baseline[torch.from_numpy(labels.atomic_numbers[owner, site])]),
        dos=torch.from_numpy(labels.values[owner, site]),
        known=torch.from_numpy(labels.known[owner].astype(np.float32)),
        weight=torch.from_numpy(labels.num_atoms[owner].astype(np.float32) ** -0.5),
    )


def _fit(net: nn.Module, train: _Sites, val: _Sites, config: PredictorConfig, progress: bool) -> None:
    """Train one member in place and leave it with the averaged weights of its best epoch on `val`."""
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
    net.load_state_dict(best_state)


def _relative_spread(mean: np.ndarray, spread: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Spread over states, both summed over the known bins, per site."""
    return np.asarray((spread * known).sum(axis=1) / np.maximum((mean * known).sum(axis=1), 1e-6))


def _compared(
    predictor: DOSPredictor,
    labels: SiteDOSLabels,
    features: Sequence[np.ndarray | str],
    rows: np.ndarray,
    method: str = "all",
) -> tuple[SitePrediction, np.ndarray, np.ndarray]:
    """Prediction, DOS and known bins of all sites of some labels, structure after structure."""
    atoms, known_features = [labels.atoms(i) for i in rows], [features[i] for i in rows]
    found = predictor.predict_arrays(atoms, features=known_features, method=method)
    labels = labels.select(rows)
    owner, site = np.nonzero(labels.atomic_numbers)
    mean, spread, bins, error = (np.concatenate(part) for part in list(zip(*found, strict=True))[:4])
    joined = SitePrediction(mean, spread, bins, error)
    return joined, labels.values[owner, site].astype(np.float64), labels.known[owner]


def calibrate(
    predictor: DOSPredictor, labels: SiteDOSLabels, features: Sequence[np.ndarray | str], rows: np.ndarray
) -> None:
    """Fit what `DOSPredictor.calibration` tells to the validation labels `rows`, for each method that it has."""
    predictor.info.pop("calibration", None)
    predictor.info.pop("calibrations", None)
    fitted = {method: _calibration(predictor, labels, features, rows, method) for method in predictor.methods}
    predictor.info["calibration"] = fitted.pop("all")
    if predictor.members and predictor.tight_binding:
        predictor.info["calibrations"] = fitted


def _calibration(
    predictor: DOSPredictor, labels: SiteDOSLabels, features: Sequence[np.ndarray | str], rows: np.ndarray, method: str
) -> dict[str, Any]:
    raw, target, known = _compared(predictor, labels, features, rows, method)
    factor = np.quantile((np.abs(raw.mean - target) / np.maximum(raw.spread, 1e-3))[known], COVERAGE)
    error = normalised_l1_arrays(raw.mean.astype(float), target, known)
    fair = np.isfinite(error) & (error < 3)  # the ratio of a nearly empty site must not rule a straight line
    doubt = _relative_spread(raw.mean, raw.spread, known)[fair]
    networks = predictor.members and method != "tight-binding"
    alone = not networks and len(predictor.tight_binding) == 1  # no spread: the mean error stands for every site
    line = [0.0, error[fair].mean()] if alone else np.polyfit(doubt, error[fair], 1)
    return {"spread": float(factor), "error": [float(value) for value in line]}


def evaluate(
    predictor: DOSPredictor,
    labels: SiteDOSLabels,
    features: Sequence[np.ndarray | str],
    split: str,
    method: str = "all",
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

    rows = [i for i in np.flatnonzero(labels.split == split).tolist() if not isinstance(features[i], str)]
    if not rows:
        raise ValueError(f"no labels of split {split!r} to measure by: add some")
    found, target, known = _compared(predictor, labels, features, np.array(rows), method)
    numbers = np.concatenate([labels.atoms(i).numbers for i in rows])
    figures: dict[str, Any] = {"structures": len(rows), "sites": len(target)}
    errors: dict[str, np.ndarray] = {}
    for prefix, values in (("", found.mean.astype(float)), ("element_", predictor.baseline[numbers].astype(float))):
        error = errors[prefix] = normalised_l1_arrays(values, target, known)
        figures[f"{prefix}mean"] = float(np.nanmean(error))
        figures[f"{prefix}median"] = float(np.nanmedian(error))
        figures[f"{prefix}pooled"] = float((np.abs(values - target) * known).sum() / (target * known).sum())
    figures["ratio"] = figures["mean"] / figures["element_mean"]
    finite = np.isfinite(errors[""])
    doubt = _relative_spread(found.mean, found.spread, known)  # the expected error follows it
    expected = found.error[finite & np.isfinite(found.error)]
    constant = not len(expected) or np.ptp(expected) < 1e-6  # one model's: it orders nothing
    figures["rank_correlation"] = 0.0 if constant else float(spearmanr(doubt[finite], errors[""][finite]).statistic)
    figures["coverage"] = float((np.abs(found.mean - target) <= found.spread)[known].mean())
    figures["expected_error"] = float(expected.mean()) if len(expected) else None
    by_element = {z: errors[""][finite & (numbers == z)] for z in np.unique(numbers[finite]).tolist()}
    figures["per_element"] = {chemical_symbols[z]: [float(np.median(e)), len(e)] for z, e in by_element.items()}
    return figures


def pseudo_labels(
    structures: Structures, predictor: DOSPredictor, cache: str | Path | None = None, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Predict the site DOS of structures that have no label.

    Parameters
    ----------
    structures : n structures
    predictor : the ranking predictor, so that the judge stays independent of what the generator learns
    cache : folder that keeps the CHGNet features, so that an interrupted run resumes; none by default
    progress : show a progress bar

    Returns
    -------
    values : (n, 20, 151) float16, states/eV
    known : (n, 20, 151) bool
        All false on padding and for structures that cannot be read.
    """
    crystals = [structures.atoms(i) for i in range(len(structures))]
    features = None
    if cache is not None and predictor.members:
        features = cached_site_features(structures, cache, progress=progress)
    values = np.zeros((len(structures), MAX_ATOMS, MODEL_GRID.size), dtype=np.float16)
    known = np.zeros(values.shape, dtype=bool)
    for i, prediction in enumerate(predictor.predict_arrays(crystals, progress, features=features)):
        n = len(prediction.mean)
        known[i, :n] = prediction.known
        values[i, :n] = np.where(prediction.known, prediction.mean, 0.0)
    return values, known


def write_pseudo_labels(
    path: str | Path,
    structures: Structures,
    predictor: DOSPredictor,
    cache: str | Path | None = None,
    progress: bool = False,
) -> None:
    """Write `pseudo_labels` as an npz (material_id, values, known) that `data.load_pseudo_labels` reads, atomically."""
    values, known = pseudo_labels(structures, predictor, cache, progress)
    write_npz(Path(path), material_id=structures.material_id, values=values, known=known)


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
    """
    labels = load_site_dos(label_directory)
    features = site_features([labels.atoms(i) for i in range(len(labels))], progress=progress)
    figures = {}
    for number, (name, role) in enumerate(ROLES.items()):
        if name not in paths:
            continue
        models = [
            train_tight_binding(
                label_directory,
                labels,
                features,
                fold=role.fold,
                settings=settings,
                seed=seed + number + len(ROLES) * k,
                directory=Path(runs) / f"{name}_{k}" if runs is not None else None,
                device=device,
                progress=progress,
            )
            for k in range(role.tight_binding)
        ]
        chosen: dict[str, Any] = {"fold": role.fold, "config": role.config, "seed": seed + number}
        predictor = train_predictor(labels, features, **chosen, tight_binding=models, progress=progress)
        predictor.save(paths[name])
        splits = [split for split in ("val", "test") if (labels.split == split).any()]
        figures[name] = {split: evaluate(predictor, labels, features, split) for split in splits}
    return figures
