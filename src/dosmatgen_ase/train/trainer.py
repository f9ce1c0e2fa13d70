"""Training: one loss over all fields, EMA, exact resume.

Every structure trains the geometry and the species; those with a DOS (computed or predicted) train the condition and
the DOS head as well. In a share of the examples each field has its own noise level, often zero, so that a pinned field
or site at sampling time is nothing new to the network.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from dosmatgen_ase.crystals.batch import CrystalBatch
from dosmatgen_ase.data import CrystalDataset, size_bucket_batches
from dosmatgen_ase.files import exclusive, output_folder, write_atomic
from dosmatgen_ase.files.tensors import load_tensors, save_tensors
from dosmatgen_ase.model.checkpoint import filled_model, load_model, save_model
from dosmatgen_ase.model.conditioning import ConditionalDenoiser, ConditionDropout, DOSCondition
from dosmatgen_ase.model.denoiser import Denoiser, DenoiserConfig
from dosmatgen_ase.model.diffusion.lattice import LatticeProcess
from dosmatgen_ase.model.diffusion.process import JointProcess, NoisyCrystals, Prediction
from dosmatgen_ase.parsing import is_real, is_whole
from dosmatgen_ase.threads import cpu_threads

MAY_CHANGE = ("steps", "threads", "save_every")  # on resume: a run may be made longer or shorter, or moved


@dataclass(frozen=True)
class TrainingConfig:
    """Everything a run depends on besides the data.

    Attributes
    ----------
    steps, warmup_steps : int
        Optimiser steps; the learning rate rises linearly, then falls as a cosine to 1 % of its top.
    learning_rate, weight_decay, gradient_clip : float
        Of AdamW.
    ema_decay : float
        Of the shipped weights.
    max_pairs : int
        A batch of b crystals padded to N sites has b N^2 at most this.
    draws_per_epoch : int
        Structures drawn (with replacement) per epoch.
    real_share, pseudo_share : float
        Share of the draws that carry a computed or a predicted DOS; the rest has none.
    size_exponent : float
        A structure of N > 8 atoms is drawn with weight (8 / N) ** size_exponent: cost grows as N^2.
    noise_exponent : float
        Levels are u ** noise_exponent, u uniform: above 1 puts weight on the data end.
    independent : float
        Share of examples in which the lattice and the coordinates have levels of their own; otherwise they share one.
    clean : float
        Among those, the probability of each of the two to be clean.
    species_clean, species_independent : float
        Share of examples in which every species is known, and in which they are masked at a level of their own.
        Otherwise they follow the geometry as in sampling: all are revealed at a level drawn from [0, species_end].
    species_end : float
        At most this, see :class:`dosmatgen_ase.generate.sampler.SamplerConfig`.
    fixed_sites : float
        Share of examples in which a random subset of the sites is clean; half of the time with the cell.
    fixed_species : float
        Share of examples in which the species of a random subset of the sites is known at every level.
    lattice_weight, coords_weight, species_weight, dos_weight, size_weight : float
        Of the loss terms.
    bf16 : bool
        Autocast to bfloat16 (CUDA, or CPUs with native bfloat16).
    compile : bool
        Compile the layers with torch.compile (needs a C++ compiler): two minutes at the start, a third faster after.
    threads : int
        CPU threads of :func:`train`; the caller's number is back afterwards.
    """

    steps: int = 20000
    warmup_steps: int = 300
    learning_rate: float = 1.5e-3
    weight_decay: float = 1e-3
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    max_pairs: int = 4096
    draws_per_epoch: int = 16384
    real_share: float = 0.2
    pseudo_share: float = 0.55
    size_exponent: float = 2.5
    noise_exponent: float = 1.4
    independent: float = 0.35
    clean: float = 0.3
    species_clean: float = 0.25
    species_independent: float = 0.15
    species_end: float = 0.7
    fixed_sites: float = 0.1
    fixed_species: float = 0.25
    lattice_weight: float = 1.0
    coords_weight: float = 3.0
    species_weight: float = 0.5
    dos_weight: float = 0.25
    size_weight: float = 0.05
    bf16: bool = False
    compile: bool = False
    threads: int = 1
    seed: int = 0
    save_every: int = 500
    dropout: ConditionDropout = field(default_factory=ConditionDropout)
    network: DenoiserConfig = field(default_factory=DenoiserConfig)

    def __post_init__(self) -> None:
        for name, told in self.__dataclass_fields__.items():
            value, default = getattr(self, name), told.default
            if isinstance(default, bool):
                fits, kind = isinstance(value, bool), "True or False"
            elif isinstance(default, int):
                least = int(name not in ("warmup_steps", "seed"))
                fits, kind = is_whole(value) and value >= least, f"a whole number of at least {least}"
            elif isinstance(default, float):
                fits, kind = is_real(value) and math.isfinite(value) and value >= 0, "a finite number, 0 or larger"
            else:
                continue
            if not fits:
                raise ValueError(f"{name}={value!r} must be {kind}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingConfig:
        """From JSON.

        Raises
        ------
        ValueError
            If a name is unknown, or a value is none that it may have.
        """
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"unknown training settings {unknown}: choose from {sorted(cls.__dataclass_fields__)}")
        nested: dict[str, Any] = {"dropout": ConditionDropout, "network": DenoiserConfig}
        given = dict(values)
        for name in nested.keys() & values.keys():
            try:
                given[name] = nested[name](**values[name])
            except (TypeError, ValueError) as error:  # of a name that is none, or no mapping
                raise ValueError(f"{name}={str(values[name])[:100]}: {error}") from None
        return cls(**given)


class DenseData:
    """The training set as tensors on one device: structures, DOS, and the weights with which they are drawn."""

    def __init__(self, dataset: CrystalDataset, config: TrainingConfig, device: torch.device) -> None:
        s = dataset.structures
        self.num_atoms_cpu = s.num_atoms
        self.crystals = CrystalBatch(
            torch.tensor(s.cell, dtype=torch.float32),
            torch.tensor(s.frac_coords, dtype=torch.float32),
            torch.tensor(s.atomic_numbers),
            torch.tensor(s.num_atoms),
        ).to(device)
        self.dos, self.known = torch.tensor(dataset.dos).to(device), torch.tensor(dataset.known).to(device)
        if not len(dataset.dos):  # structures without a DOS point to row 0, which must exist
            self.dos, self.known = (v.new_zeros(1, *v.shape[1:]) for v in (self.dos, self.known))
        self.dos_index = torch.tensor(dataset.dos_index).to(device)
        self.probability = draw_probability(dataset, config)
        digest = hashlib.sha256()
        for array in (s.cell, s.frac_coords, s.atomic_numbers, dataset.dos, dataset.known, dataset.dos_index):
            digest.update(array.tobytes())
        self.digest = digest.hexdigest()[:16]

    def batch(self, rows: np.ndarray) -> tuple[CrystalBatch, DOSCondition]:
        """Crystals and their full DOS, cut to the largest of them."""
        index = torch.as_tensor(rows, device=self.dos.device)
        n = int(self.num_atoms_cpu[rows].max())
        c = self.crystals
        crystals = CrystalBatch(
            c.cell[index], c.frac_coords[index, :n], c.atomic_numbers[index, :n], c.num_atoms[index]
        )
        which = self.dos_index[index]
        site_known = self.known[which.clamp(min=0), :n] & (which >= 0)[:, None, None]
        site = self.dos[which.clamp(min=0), :n].float() * site_known
        total_known = (site_known | ~crystals.mask[..., None]).all(1)
        return crystals, DOSCondition(site, site_known, site.sum(1) * total_known, total_known)


def draw_probability(dataset: CrystalDataset, config: TrainingConfig) -> np.ndarray:
    """Probability of each structure to be drawn, shape (n,): shares of labelled, predicted, bare, by size."""
    row = dataset.dos_index
    kind = np.where(row < 0, 2, np.append(dataset.pseudo, False)[row])  # 0: computed, 1: predicted, 2: none
    size = np.minimum(1.0, (8.0 / dataset.structures.num_atoms) ** config.size_exponent)
    shares = (config.real_share, config.pseudo_share, 1 - config.real_share - config.pseudo_share)
    weight = np.zeros(len(row))
    for k, share in enumerate(shares):
        chosen = kind == k
        if chosen.any():
            weight[chosen] = share * size[chosen] / size[chosen].sum()
    return weight / weight.sum()


def epoch_batches(data: DenseData, config: TrainingConfig, epoch: int) -> Iterator[np.ndarray]:
    """The batches of one epoch; the same for the same seed and epoch."""
    rng = np.random.default_rng((config.seed, epoch))
    rows = rng.choice(len(data.probability), config.draws_per_epoch, p=data.probability)
    for batch in size_bucket_batches(data.num_atoms_cpu[rows], config.max_pairs, rng):
        yield rows[batch]


def draw_levels(mask: Tensor, config: TrainingConfig, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Levels of lattice (B,), coordinates (B, N) and species (B, N), such as sampling and pins will ask for."""
    batch, device = mask.shape[0], mask.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    own = (uniform(batch, 2) ** config.noise_exponent).clamp(min=1e-3) * (uniform(batch, 2) >= config.clean)
    shared = (uniform(batch, 1) ** config.noise_exponent).clamp(min=1e-3).expand(batch, 2)
    levels = torch.where(uniform(batch, 1) < config.independent, own, shared)
    end = config.species_end * uniform(batch)
    species = ((levels[:, 1] - end) / (1 - end)).clamp(min=0)
    kind, alone = uniform(batch), uniform(batch)
    species = torch.where(kind < config.species_clean + config.species_independent, alone, species)
    species = torch.where(kind < config.species_clean, torch.zeros_like(species), species)
    with_fixed = uniform(batch, 1) < config.fixed_sites
    fixed = with_fixed & (uniform(*mask.shape) < uniform(batch, 1))
    t_lattice = levels[:, 0] * ~(with_fixed[:, 0] & (uniform(batch) < 0.5))
    t_coords = torch.where(fixed, torch.zeros_like(levels[:, 1:2]), levels[:, 1:2]) * mask
    known = (uniform(batch, 1) < config.fixed_species) & (uniform(*mask.shape) < uniform(batch, 1))
    return t_lattice, t_coords, torch.where(known, torch.zeros_like(t_coords), species[:, None])


def losses(
    model: ConditionalDenoiser,
    crystals: CrystalBatch,
    full: DOSCondition,
    config: TrainingConfig,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Loss of each field on freshly noised crystals.

    Coordinates are compared in the clean cell, in units of (volume per atom)^(1/3); the lattice in standard deviations;
    species by cross-entropy on masked sites; the DOS by normalised L1 on known bins.
    """
    process = JointProcess(model.denoiser.lattice)
    sign = torch.where(
        torch.rand(len(crystals), 1, 1, generator=generator, device=crystals.cell.device) < 0.5, -1.0, 1.0
    )
    crystals = replace(crystals, frac_coords=(crystals.frac_coords * sign) % 1.0)  # the mirror crystal has the same DOS
    mask = crystals.mask
    state, target = process.noised(crystals, *draw_levels(mask, config, generator), generator)
    shown = config.dropout(full, mask, generator)
    with torch.autocast(crystals.cell.device.type, torch.bfloat16, enabled=config.bf16):
        prediction: Prediction = model(state, shown)
        size_logits = model.encoder.size_logits(shown)
    return {
        **field_losses(state, prediction, target, crystals, full),
        "size": cross_entropy(size_logits.float(), crystals.num_atoms),
    }


def field_losses(
    state: NoisyCrystals, prediction: Prediction, target: Prediction, crystals: CrystalBatch, full: DOSCondition
) -> dict[str, Tensor]:
    """Mean loss per field over the examples in which that field is noisy (for the DOS: known)."""
    mask = crystals.mask
    length = (torch.linalg.det(crystals.cell).abs() / crystals.num_atoms) ** (1 / 3)
    error = torch.einsum("bic,bcx->bix", prediction.coords - target.coords, crystals.cell) / length[:, None, None]
    # Near t = 1 nothing can be known of the velocity: full weight there would only add noise to the gradient.
    moving = (mask & (state.t_coords > 0)) * (1.05 - state.t_coords)
    noisy = (state.t_lattice > 0).float()
    hidden = mask & (state.species == 0)
    logits = prediction.species[hidden].float()
    known = full.site_known.float()
    assert prediction.site_dos is not None
    difference = ((prediction.site_dos - full.site).abs() * known).sum((1, 2))
    reference = (full.site * known).sum((1, 2)) + 0.5
    labelled = known.flatten(1).any(1).float()
    species = cross_entropy(logits, target.species[hidden], reduction="sum") if len(logits) else logits.sum()
    return {
        "coords": (error.square().sum(-1) * moving).sum() / moving.sum().clamp(min=1),
        "lattice": ((prediction.lattice - target.lattice).square().mean(-1) * noisy).sum() / noisy.sum().clamp(min=1),
        "species": species / max(1, len(logits)),
        "dos": (difference / reference * labelled).sum() / labelled.sum().clamp(min=1),
    }


class Trainer:
    """Model, EMA, optimiser and random state of a run; saved and restored exactly."""

    def __init__(self, config: TrainingConfig, dataset: CrystalDataset, device: str | torch.device = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        structures = dataset.structures
        lattice = LatticeProcess.fit(torch.tensor(structures.cell), torch.tensor(structures.num_atoms))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)  # not that of any GPU
            self.model = ConditionalDenoiser(Denoiser(config.network, lattice)).to(self.device)
        if config.compile:
            for layer in self.model.denoiser.layers:
                layer.compile(dynamic=True)
        self.ema = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.data = DenseData(dataset, config, self.device)
        self.step = self.epoch = self.position = 0
        self.init: str | None = None  # hash of the weights that the run started from

    def start_from(self, path: str | Path) -> str:
        """Take over weights made by :meth:`export`; return their hash.

        Raises
        ------
        ValueError
            If they belong to a network of another size.
        """
        parent, header = load_model(path)
        if parent.denoiser.config != self.config.network:
            raise ValueError(f"{path} has another network ({parent.denoiser.config}): set 'network' to the same")
        self.model.denoiser.lattice = parent.denoiser.lattice
        self.model.load_state_dict(parent.state_dict())
        self.ema = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.init = str(header["sha256"])
        return self.init

    def learning_rate(self) -> float:
        """At the current step."""
        c = self.config
        if self.step < c.warmup_steps:
            return c.learning_rate * (self.step + 1) / c.warmup_steps
        progress = (self.step - c.warmup_steps) / max(1, c.steps - c.warmup_steps)
        return c.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

    def run(self, until: int) -> Iterator[dict[str, float]]:
        """Train up to step ``until``, yielding the losses of every step."""
        while self.step < until:
            for rows in list(epoch_batches(self.data, self.config, self.epoch))[self.position :]:
                record = self._train(rows)
                self.position += 1  # before the caller sees the step, who may save the state there
                yield record
                if self.step >= until:
                    return
            self.epoch, self.position = self.epoch + 1, 0

    def _train(self, rows: np.ndarray) -> dict[str, float]:
        c = self.config
        parts = losses(self.model, *self.data.batch(rows), c, self.generator)
        total = sum(getattr(c, f"{name}_weight") * value for name, value in parts.items())
        assert isinstance(total, Tensor)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad(set_to_none=False)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.gradient_clip)
        told = {"loss": total, **parts, "gradient_norm": norm}
        # Read at once: a GPU waits for each number that is read.
        record = dict(zip(told, torch.stack([v.detach().float() for v in told.values()]).tolist(), strict=True))
        if not math.isfinite(record["loss"]):
            fix = "lower learning_rate and start in a new folder, from the weights of this one (init)"
            raise FloatingPointError(f"the loss is not finite at step {self.step}: {fix}")
        self.optimizer.step()
        self.step += 1
        decay = min(c.ema_decay, (1 + self.step) / (10 + self.step))
        current = self.model.state_dict()
        get_ema_multi_avg_fn(decay)([self.ema[name] for name in current], list(current.values()), self.step)
        return record

    def save(self, path: Path) -> None:
        """Write the full state of the run, atomically."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
        tensors["generator"] = self.generator.get_state()
        place = {"step": self.step, "epoch": self.epoch, "position": self.position}
        origin = {"lattice": asdict(self.model.denoiser.lattice), "init": self.init, "device": self.device.type}
        origin["data"] = self.data.digest
        save_tensors(path, tensors, {"kind": "training", "config": asdict(self.config), **place, **origin})

    def restore(self, path: Path) -> None:
        """Continue from :meth:`save`, bit for bit where the data is the same; a warning tells where it is not.

        Raises
        ------
        ValueError
            If the run was started with settings that differ in more than :data:`MAY_CHANGE`, on another type of device,
            or by a version that did not tell its origin.
        """
        tensors, header = load_tensors(path)
        if (kind := header.get("kind")) != "training":
            raise ValueError(f"{path} holds a {kind}, not the state of a training run: choose a new folder")
        needed = {"config", "lattice", "init", "device", "data", "step", "epoch", "position"}
        if not (needed <= header.keys() and isinstance(header["config"], dict)):
            raise ValueError(f"{path} does not tell what the run started from (an older version): choose a new folder")
        stored, own = header["config"], json.loads(json.dumps(asdict(self.config)))
        changed = sorted(k for k in own if stored.get(k) != own[k] and k not in MAY_CHANGE)
        if changed:
            raise ValueError(
                f"{path} was started with other settings of {changed}: restore them or choose a new folder"
            )
        if header["device"] != self.device.type:
            told = f"{path} was made on {header['device']}, this run is on {self.device.type}"
            fix = "resume on the first or choose a new folder"
            raise ValueError(f"{told}, whose random numbers differ: {fix}")
        if header["data"] != self.data.digest:
            told = "the data differ from those that the run began with: it goes on with the present data"
            warnings.warn(f"{path}: {told}", stacklevel=2)
        try:
            self._take_over(tensors, header)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            told = f"the header of {path} does not describe its own tensors ({reason}): choose a new folder"
            raise ValueError(told) from error

    def _take_over(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        self.model.denoiser.lattice = LatticeProcess(*(tuple(header["lattice"][k]) for k in ("mean", "std")))
        self.init = header["init"]
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            if name != "generator":
                group, rest = name.split(".", 1)
                groups[group][rest] = tensor
        for name in ("model", "ema"):
            if _form(groups[name]) != _form(self.ema):
                raise ValueError(f"{name} has tensors of other names, shapes or types than the network")
        place = [header[k] for k in ("step", "epoch", "position")]
        if not all(is_whole(k) and k >= 0 for k in place):
            raise ValueError(f"step, epoch and position are {place}")
        self.model.load_state_dict(groups["model"])
        self.ema = {k: v.to(self.device) for k, v in groups["ema"].items()}
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in groups["optimizer"].items():
            i, key = name.split(".", 1)
            state.setdefault(int(i), {})[key] = tensor
        parameters = dict(enumerate(self.model.parameters()))
        for number, held in state.items():
            like = {"step": torch.zeros(()), "exp_avg": parameters[number], "exp_avg_sq": parameters[number]}
            if _form(held) != _form(like):
                raise ValueError(f"the optimizer's state {number} does not fit the network")
        if state and state.keys() != parameters.keys():
            raise ValueError("the optimizer's state does not fit the network")
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.generator.set_state(tensors["generator"])
        self.step, self.epoch, self.position = place

    def export(self, path: Path, metadata: dict[str, Any]) -> None:
        """Write the EMA weights as a generator."""
        model = filled_model(self.config.network, self.model.denoiser.lattice, self.ema)
        save_model(path, model, {"training": {"steps": self.step, "config": asdict(self.config)}, **metadata})


def _form(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def train(
    config: TrainingConfig,
    dataset: CrystalDataset,
    out: str | Path,
    *,
    init: str | Path | None = None,
    device: str = "cpu",
    metadata: dict[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Train, or continue the run found in ``out``.

    Parameters
    ----------
    config : TrainingConfig
    dataset : CrystalDataset
        Training structures only.
    out : path
        Folder for ``state.safetensors`` (resume), ``log.jsonl`` and ``weights.safetensors`` (EMA, for DOSGenerator).
    init : path, optional
        Weights to start from, as made by this function; the learning rate starts over. A run that is continued has
        them already: they may be left out, but not be others.
    device : str
    metadata : dict, optional
        Kept in the header of the weights.
    progress : bool

    Returns
    -------
    Path
        Of the weights.

    Raises
    ------
    ValueError
        If the run in ``out`` was started otherwise, see :meth:`Trainer.restore`, or from another ``init``.
    BlockingIOError
        If another run trains in ``out``.
    OSError
        If nothing can be written there.
    """
    output_folder(Path(out))
    with exclusive(Path(out) / "state.safetensors"), cpu_threads(config.threads):
        return _finished(Trainer(config, dataset, device), Path(out), init, dict(metadata or {}), progress)


def _finished(trainer: Trainer, out: Path, init: str | Path | None, metadata: dict[str, Any], progress: bool) -> Path:
    """Weights of the run, after what it lacks; as :func:`train`."""
    config = trainer.config
    state, weights = out / "state.safetensors", out / "weights.safetensors"
    if state.exists():
        trainer.restore(state)
        if trainer.step > config.steps:
            told = f"the run in {out} has {trainer.step} steps already, more than steps={config.steps}"
            raise ValueError(f"{told}: ask for as many, or choose a new folder")
        if init is not None and load_model(init)[1]["sha256"] != trainer.init:
            raise ValueError(f"the run in {out} did not start from {init}: leave init out or choose a new folder")
    elif init is not None:
        trainer.start_from(init)
    if trainer.init is not None:
        metadata["init"] = trainer.init
    _cut_log(out / "log.jsonl", trainer.step)
    history: list[dict[str, float]] = []
    start = time.time()
    with (
        (out / "log.jsonl").open("a") as log,
        tqdm(total=config.steps, initial=trainer.step, disable=not progress, unit="step", mininterval=1.0) as bar,
    ):
        for record in trainer.run(config.steps):
            history.append(record)
            bar.update()
            saved = trainer.step % config.save_every == 0 or trainer.step == config.steps
            if saved or trainer.step % 50 == 0:  # with each state, as a resumed run does not know the steps before it
                mean = {k: round(float(np.mean([h[k] for h in history])), 5) for k in record}
                bar.set_postfix({k: f"{v:.3f}" for k, v in mean.items() if k != "gradient_norm"})
                log.write(json.dumps({"step": trainer.step, "seconds": round(time.time() - start, 1), **mean}) + "\n")
                log.flush()
                history.clear()
            if saved:
                trainer.save(state)
                trainer.export(weights, metadata)
    if not weights.exists() or load_model(weights)[1].get("training", {}).get("steps") != trainer.step:
        trainer.export(weights, metadata)  # the run was killed between the last two lines
    return weights


def _cut_log(path: Path, step: int) -> None:
    """Drop what was logged after the state that is resumed, so that no step is told twice."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_atomic(path, "".join(line + "\n" for line in kept).encode())
