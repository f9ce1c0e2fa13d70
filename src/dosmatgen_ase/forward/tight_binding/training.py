"""Training of `TightBinding` models on site DOS by shell: one loss, exact resume, a log."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dosmatgen_ase.data import SiteDOSLabels
from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA
from dosmatgen_ase.files.tensors import load_tensors, save_tensors
from dosmatgen_ase.forward.tight_binding.basis import NUM_ELEMENTS, start_levels
from dosmatgen_ase.forward.tight_binding.graph import CrystalGraph, collate, crystal_graph
from dosmatgen_ase.forward.tight_binding.kpoints import random_mesh
from dosmatgen_ase.forward.tight_binding.model import TightBinding, TightBindingConfig
from dosmatgen_ase.forward.tight_binding.spectrum import broadened

MAX_BATCH = 16  # crystals
CHUNK = 256  # crystals sorted by size together, so that company is random and padding small


@dataclass(frozen=True)
class TightBindingTraining:
    """How a `TightBinding` model is trained.

    Attributes
    ----------
    epochs : passes over the labelled crystals
    minutes : of wall time after which the schedule ends, in place of epochs; None for epochs
    learning_rate, weight_decay : of AdamW; the rate rises over 8 % of the run and falls as a cosine
    points : k-points per crystal of up to 6 atoms (half of it up to 10, a quarter above), half as many in the first
        60 % of the run: meshes are shifted at random each time, so few are no bias
    elements : of the padded Hamiltonians of a batch, at most
    orbital, moment, gap : weights of the losses on the DOS of s, p and d, on magnetic moments, and on the gap (1/eV)
    moved : first and last weight of the loss on how far states must move, eV
    """

    epochs: int = 40
    minutes: float | None = None
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    points: int = 24
    elements: int = 20_000
    orbital: float = 0.3
    moment: float = 0.1
    gap: float = 0.2
    moved: tuple[float, float] = (0.7, 0.1)


class LabelledCrystal(NamedTuple):
    """A crystal with its labels.

    Attributes
    ----------
    graph : CrystalGraph
    shells : (n, 3, 151)
        DOS of s, p and d of every site, states/eV.
    dos : (n, 151)
    known : (151,)
        1 where computed, else 0.
    moment : (n,)
        Magnitude of the magnetic moment, Bohr magnetons.
    gap : float, eV
        0 for a metal.
    """

    graph: CrystalGraph
    shells: Tensor
    dos: Tensor
    known: Tensor
    moment: Tensor
    gap: float


def labelled_crystals(
    labels: SiteDOSLabels, shells: Sequence[np.ndarray], moments: Sequence[np.ndarray], cutoff: float
) -> list[LabelledCrystal]:
    """Join labels, their shells (`data.load_shell_dos`) and moments, in order."""
    found = []
    for i, (parts, moment) in enumerate(zip(shells, moments, strict=True)):
        dos = torch.from_numpy(labels.values[i, : labels.num_atoms[i]])
        known = torch.from_numpy(labels.known[i].astype(np.float32))
        graph = crystal_graph(labels.atoms(i), cutoff)
        magnitude = torch.from_numpy(np.abs(moment).astype(np.float32))
        shares = torch.from_numpy(parts.astype(np.float32))
        found.append(LabelledCrystal(graph, shares, dos, known, magnitude, float(labels.band_gap[i])))
    return found


def new_model(crystals: Sequence[LabelledCrystal], config: TightBindingConfig, seed: int) -> TightBinding:
    """Return an untrained model whose levels start at the centres of the labels' shells."""
    total, weight = np.zeros((NUM_ELEMENTS, 3)), np.zeros((NUM_ELEMENTS, 3))
    for crystal in crystals:
        z, states = crystal.graph.numbers.numpy(), (crystal.shells * crystal.known).double().numpy()
        np.add.at(total, z, states @ MODEL_GRID.energies)
        np.add.at(weight, z, states.sum(-1))
    levels = start_levels(total / np.maximum(weight, 1e-6))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TightBinding(config, torch.from_numpy(levels))


def batches(
    crystals: Sequence[LabelledCrystal], elements: int, rng: np.random.Generator
) -> list[list[LabelledCrystal]]:
    """Share crystals out in random batches of like size, all or none magnetic."""
    kinds: dict[tuple[bool, int], list[LabelledCrystal]] = {}
    for crystal in crystals:
        kinds.setdefault((crystal.graph.magnetic, _points(crystal, 24)), []).append(crystal)
    found = []
    for (magnetic, _), members in sorted(kinds.items(), key=lambda item: item[0]):
        mixed = [members[i] for i in rng.permutation(len(members))]
        for start in range(0, len(mixed), CHUNK):
            part = sorted(mixed[start : start + CHUNK], key=lambda c: c.graph.size)
            while part:
                fits = [
                    (k + 1) * c.graph.size**2 * (1 + magnetic) <= elements
                    and c.graph.size <= 1.3 * part[0].graph.size + 2
                    for k, c in enumerate(part[1:MAX_BATCH], start=1)
                ]
                many = 1 + sum(fits)  # the smallest, for they are sorted
                found.append(part[:many])
                part = part[many:]
    return [found[i] for i in rng.permutation(len(found))]


def _points(crystal: LabelledCrystal, most: int) -> int:
    sites = len(crystal.graph.numbers)
    return most if sites <= 6 else max(1, most // 2) if sites <= 10 else max(1, most // 4)


def random_points(members: Sequence[LabelledCrystal], most: int, rng: np.random.Generator) -> Tensor:
    """Random k-points (b, k, 3) of a batch."""
    number = _points(members[0], most)
    return torch.from_numpy(np.stack([random_mesh(m.graph.reciprocal, number, rng) for m in members])).float()


def fit(
    model: TightBinding,
    train: Sequence[LabelledCrystal],
    val: Sequence[LabelledCrystal],
    settings: TightBindingTraining,
    *,
    seed: int = 0,
    directory: str | Path | None = None,
    progress: bool = False,
) -> TightBinding:
    """Train a model in place, on the device that it is on.

    Parameters
    ----------
    model : TightBinding
    train, val : labelled crystals; the second are only measured, for the log
    settings : TightBindingTraining
    seed : of the order, k-points and dropout
    directory : folder of log.jsonl and state.safetensors, from which an interrupted run goes on; none by default
    progress : show a progress bar

    Raises
    ------
    ValueError
        If there is nothing to train on, or the folder holds a run with other settings or on other labels.
    """
    if not train or not val:
        raise ValueError(f"{len(train)} training and {len(val)} validation crystals: both are needed")
    run = _Run(model, settings, seed, Path(directory) if directory is not None else None, labels_digest([*train, *val]))
    run.resume()
    with tqdm(total=1000, initial=round(1000 * run.done), disable=not progress, desc="tight binding") as bar:
        bar.bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        while run.done < 1:
            run.epoch(train, bar)
            error = mean_error(model, val, settings.points)
            bar.set_postfix_str(f"epoch {run.epochs}, val {error:.3f}")
            run.save(error)
    return model.eval()


def labels_digest(crystals: Sequence[LabelledCrystal]) -> str:
    """Digest of crystals and their labels, in order."""
    found = hashlib.sha256()
    for crystal in crystals:
        graph = crystal.graph
        for part in (graph.numbers, graph.bond, crystal.shells, crystal.dos, crystal.known, crystal.moment):
            found.update(part.numpy().tobytes())
        found.update(f"{crystal.gap}".encode())
    return found.hexdigest()[:16]


def mean_error(model: TightBinding, crystals: Sequence[LabelledCrystal], points: int) -> float:
    """Mean over sites of the normalised L1, on fixed random k-points."""
    model.eval()
    rng, errors = np.random.default_rng(0), []
    device = model.start.device
    energies = torch.tensor(MODEL_GRID.energies, dtype=torch.float32, device=device)
    with torch.no_grad():
        for members in batches(crystals, 40_000, rng):
            batch = collate([m.graph for m in members]).to(device)
            found, _ = model(batch, random_points(members, points, rng).to(device), energies, MODEL_SIGMA)
            sites = found.sum(2)[batch.owner, batch.site].cpu()
            known = torch.stack([m.known for m in members])[batch.owner.cpu()]
            dos = torch.cat([m.dos for m in members])
            errors.append(((sites - dos).abs() * known).sum(-1) / (dos * known).sum(-1).clamp(min=1e-9))
    return float(torch.cat(errors).mean())


@dataclass
class _Run:
    """What changes while a model is trained."""

    model: TightBinding
    settings: TightBindingTraining
    seed: int
    directory: Path | None
    labels: str
    done: float = 0.0
    epochs: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        rate, decay = self.settings.learning_rate, self.settings.weight_decay
        self.optimizer = torch.optim.AdamW(self.model.parameters(), rate, weight_decay=decay)
        self.described = {"config": asdict(self.model.config), "training": asdict(self.settings), "seed": self.seed}

    def epoch(self, train: Sequence[LabelledCrystal], bar: tqdm) -> None:
        """Walk through the crystals once, or until the time is over; what is drawn depends on seed and epoch only."""
        rng = np.random.default_rng([self.seed, self.epochs])
        made = batches(train, self.settings.elements, rng)
        began, before = time.monotonic(), self.done
        self.model.train()
        devices = [self.model.start.device] if self.model.start.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(rng.integers(2**62)))  # of this device too: dropout runs there
            for number, members in enumerate(made, start=1):
                self.step(members, rng)
                if self.settings.minutes is None:
                    self.done = (self.epochs + number / len(made)) / self.settings.epochs
                else:
                    self.done = before + (time.monotonic() - began) / (60 * self.settings.minutes)
                bar.update(min(1000, round(1000 * self.done)) - bar.n)
                if self.done >= 1:
                    break
        self.epochs += 1

    def step(self, members: Sequence[LabelledCrystal], rng: np.random.Generator) -> None:
        """Take one step."""
        warm, done = 0.08, min(self.done, 1.0)
        shape = done / warm if done < warm else 0.5 * (1 + math.cos(math.pi * (done - warm) / (1 - warm)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * shape + 1e-6
        most = self.settings.points if done > 0.6 else max(1, self.settings.points // 2)
        first, last = self.settings.moved
        points = random_points(members, most, rng)
        loss = self.loss(members, points, last + (first - last) * (1 - done))
        self.optimizer.zero_grad()
        loss.backward()
        if torch.isfinite(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)):
            self.optimizer.step()
        self.steps += 1

    def loss(self, members: Sequence[LabelledCrystal], points: Tensor, moved: float) -> Tensor:
        """Mean over sites of the softened normalised L1, its parts by shell and what must move; of moments and of gaps.

        The distance that states must move (the integral of the difference of cumulated DOS, in eV times states) still
        pulls a level that overlaps with none of its target, where the L1 says nothing.
        """
        device = self.model.start.device
        batch = collate([m.graph for m in members]).to(device)
        energies = torch.tensor(MODEL_GRID.energies, dtype=torch.float32, device=device)
        spectrum, moment = self.model.spectrum(batch, points.to(device))
        found = broadened(spectrum, energies, MODEL_SIGMA).view(len(batch), batch.sites, 3, -1)[batch.owner, batch.site]
        shells = torch.cat([m.shells for m in members]).to(device)
        dos = torch.cat([m.dos for m in members]).to(device)
        known = torch.stack([m.known for m in members]).to(device)[batch.owner]
        scale = (dos * known).sum(-1) + 1
        difference = (found.sum(1) - dos) * known
        step = float(MODEL_GRID.energies[1] - MODEL_GRID.energies[0])
        error = difference.abs().sum(-1)
        error = error + self.settings.orbital * ((found - shells).abs() * known[:, None]).sum((-1, -2))
        error = error + moved * step * (difference.cumsum(-1).abs() * known).sum(-1)
        loss = (error / scale).mean()
        if batch.magnetic:
            carriers = self.model.magnetic[batch.numbers]
            wanted = torch.cat([m.moment for m in members]).to(device)
            loss = loss + self.settings.moment * (moment - wanted).abs()[carriers].mean()
        gap = loss.new_tensor([m.gap for m in members])
        # An odd number of electrons teaches nothing.
        opening = torch.where(spectrum.opening.isnan(), gap, spectrum.opening)
        wrong = torch.where(gap > 0, (opening - gap).abs(), opening.clamp(min=0))
        return loss + self.settings.gap * wrong.mean()

    def save(self, error: float) -> None:
        """Write the state, then a line of the log."""
        if self.directory is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{i}.{k}": v for k, v in state.items()})
        told = {"done": self.done, "epochs": self.epochs, "steps": self.steps}
        header = {"kind": "tight-binding", **self.described, "labels": self.labels, **told}
        save_tensors(self.directory / "state.safetensors", tensors, header)
        with (self.directory / "log.jsonl").open("a") as log:
            log.write(json.dumps({**told, "val": error}) + "\n")

    def resume(self) -> None:
        """Go on from the folder's state, if there is one."""
        if self.directory is None or not (path := self.directory / "state.safetensors").exists():
            return
        tensors, header = load_tensors(path)
        if {k: header.get(k) for k in self.described} != json.loads(json.dumps(self.described)):
            raise ValueError(f"{self.directory} holds a run with other settings: choose a new folder")
        if header.get("labels") != self.labels:
            raise ValueError(f"{self.directory} holds a run on other labels: choose a new folder, or remove this one")
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        state: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                state.setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.done, self.epochs, self.steps = header["done"], header["epochs"], header["steps"]
