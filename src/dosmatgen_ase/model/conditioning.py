"""Conditioning on the DOS: encoder with a learned null, dropout for training, guidance around the denoiser.

A condition is partial by nature: some sites, some energies, or only the total of the cell. What is not known is told to
the network as unknown, never as zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dosmatgen_ase.crystals.batch import OnDevice
from dosmatgen_ase.dos import MODEL_GRID
from dosmatgen_ase.limits import MAX_ATOMS
from dosmatgen_ase.model.denoiser import Denoiser, mlp
from dosmatgen_ase.model.diffusion.process import NoisyCrystals, Prediction
from dosmatgen_ase.model.running_sum import running_sum

ELECTRONS = 50.0  # unit of the running sum: five electrons on bins of 0.1 eV


@dataclass(frozen=True)
class DOSCondition(OnDevice):
    """DOS targets on the model's grid (G bins, Gaussian sigma 0.2 eV).

    Attributes
    ----------
    site : Tensor, shape (B, N, G)
        states/eV.
    site_known : Tensor of bool, shape (B, N, G)
    total : Tensor, shape (B, G)
        states/eV per cell.
    total_known : Tensor of bool, shape (B, G)
    """

    site: Tensor
    site_known: Tensor
    total: Tensor
    total_known: Tensor

    @classmethod
    def none(cls, batch: int, size: int, num_bins: int, device: torch.device | str = "cpu") -> DOSCondition:
        """Nothing known."""
        site, total = (torch.zeros(s, device=device) for s in ((batch, size, num_bins), (batch, num_bins)))
        return cls(site, site.bool(), total, total.bool())


class DOSEncoder(nn.Module):
    """Embed partial DOS targets, one vector per site; also a distribution over the number of atoms given them."""

    def __init__(self, num_bins: int, width: int) -> None:
        super().__init__()
        self.site = mlp(3 * num_bins, 2 * width, width)
        self.total = mlp(3 * num_bins, 2 * width, width)
        self.null_site = nn.Parameter(torch.zeros(width))
        self.null_total = nn.Parameter(torch.zeros(width))
        self.num_atoms = mlp(2 * width, width, MAX_ATOMS + 1)

    def forward(self, condition: DOSCondition, num_atoms: Tensor) -> Tensor:
        """Embedding added to the sites, shape (B, N, width)."""
        per_atom = condition.total / num_atoms[:, None]
        return self._site(condition) + self._total(per_atom, condition.total_known)[:, None]

    def size_logits(self, condition: DOSCondition) -> Tensor:
        """Logits over the number of atoms, shape (B, 21), from what is known of the sites and of the total."""
        given = condition.site_known.any(-1)
        site = (self._site(condition) * given[..., None]).sum(1) / given.sum(1, keepdim=True).clamp(min=1)
        return self.num_atoms(torch.cat([site, self._total(condition.total, condition.total_known)], -1))

    def _site(self, condition: DOSCondition) -> Tensor:
        return self._embed(self.site, self.null_site, condition.site, condition.site_known)

    def _total(self, total: Tensor, known: Tensor) -> Tensor:
        return self._embed(self.total, self.null_total, total, known)

    @staticmethod
    def _embed(network: nn.Module, null: Tensor, values: Tensor, known: Tensor) -> Tensor:
        # The running sum counts electrons: the element shows in how many there are below the Fermi level.
        shown = values * known
        features = torch.cat([torch.log1p(shown), running_sum(shown) / ELECTRONS, known.to(values.dtype)], -1)
        return torch.where(known.any(-1, keepdim=True), network(features), null)


class ConditionalDenoiser(nn.Module):
    """The denoiser and the encoder of its condition; ``condition=None`` is unconditional."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.encoder = DOSEncoder(denoiser.config.num_bins, denoiser.config.width)

    def embed(self, condition: DOSCondition | None, state: NoisyCrystals) -> Tensor:
        """Embedding of a condition, shape (B, N, width): the same at every noise level."""
        if condition is None:
            batch, size = state.species.shape
            condition = DOSCondition.none(batch, size, self.denoiser.config.num_bins, state.species.device)
        return self.encoder(condition, state.num_atoms)

    def forward(self, state: NoisyCrystals, condition: DOSCondition | None) -> Prediction:
        """Run the network once."""
        return self.denoiser(state, self.embed(condition, state))


@dataclass(frozen=True)
class ConditionDropout:
    """How much of a known DOS a training example is shown; each probability is drawn per structure.

    Attributes
    ----------
    structure : float
        Nothing is shown (unconditional).
    single_site : float
        One random site only (the masked task).
    some_sites : float
        Every site with its own random rate.
    window : float
        Only a random energy window.
    total : float
        The total of the cell is shown as well; half of the time it replaces the sites.
    shift, scale : float
        Standard deviations of a rigid shift of the energies (eV) and of the logarithm of the values: codes,
        pseudopotentials and Fermi levels differ by as much, and the network must not learn targets by heart. The scale
        stays small, for it blurs the number of electrons.
    """

    structure: float = 0.15
    single_site: float = 0.3
    some_sites: float = 0.2
    window: float = 0.3
    total: float = 0.15
    shift: float = 0.05
    scale: float = 0.02

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            most = math.inf if name in ("shift", "scale") else 1
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise ValueError(f"{name}={value!r} must be a number of at least 0{'' if most > 1 else ', at most 1'}")

    def __call__(self, condition: DOSCondition, mask: Tensor, generator: torch.Generator) -> DOSCondition:
        """Drop parts of ``condition``; ``mask``, shape (B, N), marks real sites."""
        batch, size, bins = condition.site.shape
        device = condition.site.device

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=device)

        mode = uniform(batch)
        single = mode < self.single_site
        some = (mode >= self.single_site) & (mode < self.single_site + self.some_sites)
        score = uniform(batch, size).masked_fill(~mask, -1.0)
        keep_one = score == score.amax(1, keepdim=True)
        keep_some = uniform(batch, size) < uniform(batch, 1)
        keep = torch.where(single[:, None], keep_one, torch.where(some[:, None], keep_some, mask)) & mask
        ends = (uniform(batch, 2) * (bins + 1)).floor().sort(1).values
        index = torch.arange(bins, device=device)
        window = (index >= ends[:, :1]) & (index < ends[:, 1:])
        window = window | (uniform(batch, 1) >= self.window)
        shown = uniform(batch) >= self.structure
        with_total = (uniform(batch) < self.total) & shown
        without_sites = with_total & (uniform(batch) < 0.5)
        site_known = condition.site_known & (keep & (shown & ~without_sites)[:, None])[..., None] & window[:, None]
        total_known = condition.total_known & with_total[:, None] & window
        return self._moved(DOSCondition(condition.site, site_known, condition.total, total_known), generator)

    def _moved(self, condition: DOSCondition, generator: torch.Generator) -> DOSCondition:
        """Shift the energies and scale the values of each structure; linear interpolation between bins."""
        batch, bins = condition.total.shape
        device = condition.site.device
        normal = torch.randn(batch, 2, generator=generator, device=device)
        position = torch.arange(bins, device=device) - self.shift / MODEL_GRID.step * normal[:, :1]
        position = (position.clamp(-1, bins) * 1000).round() / 1000  # rounding errors must not cost a bin
        left = position.floor().clamp(0, bins - 1).long()
        right = (left + 1).clamp(max=bins - 1)
        share = (position - left).clamp(0, 1)
        inside = (position >= 0) & (position <= bins - 1)
        gain = (self.scale * normal[:, 1:]).exp()

        def moved(values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
            def spread(x: Tensor) -> Tensor:
                return x.view(batch, *[1] * (values.ndim - 2), -1).expand(*values.shape[:-1], x.shape[-1])

            below, above, weight = spread(left), spread(right), spread(share)
            mixed = values.gather(-1, below) * (1 - weight) + values.gather(-1, above) * weight
            both = known.gather(-1, below) & (known.gather(-1, above) | (weight == 0))
            return mixed * spread(gain), both & spread(inside)

        return DOSCondition(
            *moved(condition.site, condition.site_known), *moved(condition.total, condition.total_known)
        )


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598) within an interval of noise levels (arXiv 2404.07724).

    ``prediction = unconditional + scale * (conditional - unconditional)`` on velocities and logits. Scale 1 needs the
    conditional pass only, scale 0 ignores the condition; otherwise both passes run as one batch. Outside ``interval``
    the scale is 1.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def wrap(
        self, model: ConditionalDenoiser, condition: DOSCondition | None
    ) -> Callable[[NoisyCrystals, float], tuple[Prediction, int]]:
        """Return a function of (state, t) that gives the guided prediction and the number of network passes it took."""

        embedded: dict[bool, Tensor] = {}  # with the condition, without: encoded once per trajectory

        def embedding(state: NoisyCrystals, conditional: bool) -> Tensor:
            if conditional not in embedded:
                embedded[conditional] = model.embed(condition if conditional else None, state)
            return embedded[conditional]

        def denoise(state: NoisyCrystals, t: float) -> tuple[Prediction, int]:
            scale = self.scale if self.interval[0] <= t <= self.interval[1] or self.scale == 0 else 1.0
            if condition is None or scale in (0.0, 1.0):
                return model.denoiser(state, embedding(state, condition is not None and scale == 1.0)), 1
            twice = replace(state, **{k: torch.cat([v, v]) for k, v in state.__dict__.items()})
            both = model.denoiser(twice, torch.cat([embedding(state, True), embedding(state, False)]))
            mixed = {}
            for name, value in both.__dict__.items():
                with_dos, without = value.chunk(2)
                mixed[name] = without + scale * (with_dos - without)
            return Prediction(**mixed), 2

        return denoise
