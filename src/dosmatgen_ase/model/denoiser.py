"""The network: an E(3)-equivariant, periodic, permutation-equivariant denoiser on dense pairs.

Pairs are described in real space. For sites i, j and every lattice translation T within a cutoff the vector
``d = r_j - r_i + T`` gives radial functions ``phi_k(|d|)``; summed over all images they become three pair features:
scalars ``sum phi_k``, vectors ``sum phi_k d/|d|`` and tensors ``sum phi_k d d^T/|d|^2``. They are computed once per
call; the layers then work on dense (N, N) pairs. Scalars carry the chemistry, vector channels (as in PaiNN, arXiv
2102.03150) the geometry; coordinates are read out as sums of pair vectors, the cell from a sum of pair tensors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from dosmatgen_ase.crystals.batch import minimum_image
from dosmatgen_ase.limits import MAX_ATOMIC_NUMBER, MAX_ATOMS
from dosmatgen_ase.model.diffusion.coordinates import remove_mean
from dosmatgen_ase.model.diffusion.lattice import BASIS, LatticeProcess
from dosmatgen_ase.model.diffusion.process import NoisyCrystals, Prediction

MAX_IMAGES = 3  # translations per axis and direction: reaches the cutoff in every cell that is not collapsed
SIZES = {  # smallest and largest of each
    "width": (1, 4096),
    "pair_width": (1, 4096),
    "vector_channels": (1, 1024),
    "num_layers": (1, 64),
    "num_radial": (2, 256),
    "num_bins": (1, 10_000),
}


@dataclass(frozen=True)
class DenoiserConfig:
    """Size of the network. ``cutoff`` in Angstrom; ``num_bins`` is the size of the DOS grid.

    Raises
    ------
    ValueError
        If a number is out of bounds, which keep a damaged file from asking for all memory.
    """

    width: int = 128
    pair_width: int = 128
    vector_channels: int = 32
    num_layers: int = 4
    num_radial: int = 20
    cutoff: float = 6.5
    num_bins: int = 151

    def __post_init__(self) -> None:
        for name, (lowest, highest) in SIZES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
                raise ValueError(f"{name}={value!r} must be a whole number from {lowest} to {highest}")
        if not isinstance(self.cutoff, int | float) or not 1 < self.cutoff <= 20:
            raise ValueError(f"cutoff={self.cutoff!r} must be a number above 1 and at most 20 Angstrom")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class PairFeatures:
    """Radial functions summed over periodic images: scalars (B, N, N, K), vectors (.., 3, K), tensors (.., 6, K)."""

    scalar: Tensor
    vector: Tensor
    tensor: Tensor


@torch.no_grad()
def pair_features(cell: Tensor, frac_coords: Tensor, mask: Tensor, num_radial: int, cutoff: float) -> PairFeatures:
    """Sum radial functions over all periodic images of every pair within ``cutoff``.

    Only pairs i <= j and images inside the cutoff are evaluated (the pair (j, i) has the opposite vectors); a site's
    own images count, the site itself does not.

    On CUDA the sums are added in a changing order: their last digits differ from run to run unless
    ``torch.use_deterministic_algorithms(True)`` is set.

    Parameters
    ----------
    cell : Tensor, shape (B, 3, 3)
    frac_coords : Tensor, shape (B, N, 3)
    mask : Tensor of bool, shape (B, N)
    """
    batch, size = frac_coords.shape[:2]
    device = cell.device
    first, second = torch.triu_indices(size, size, device=device)
    num_pairs = len(first)
    difference = minimum_image(frac_coords[:, second] - frac_coords[:, first])  # (B, P, 3): from first to second
    vectors = difference @ cell
    real = mask[:, first] & mask[:, second]
    longest = (vectors.norm(dim=-1) * real).amax(1)
    heights = 1 / torch.linalg.inv(cell).norm(dim=1)  # distance between lattice planes, per axis
    reach = torch.floor(cutoff / heights.amin(0) + 0.5).nan_to_num(0.0).clamp(max=MAX_IMAGES).long().tolist()
    images = torch.cartesian_prod(*(torch.arange(-r, r + 1, device=device, dtype=cell.dtype) for r in reach))
    translations = images @ cell  # (B, M, 3)
    which, image = torch.nonzero(translations.norm(dim=-1) < cutoff + longest[:, None], as_tuple=True)
    candidates = vectors[which] + translations[which, image][:, None]  # (C, P, 3)
    squared = (candidates * candidates).sum(-1)
    entry, pair = torch.nonzero((squared < cutoff**2) & (squared > 1e-6) & real[which], as_tuple=True)
    distance = squared[entry, pair].sqrt()
    unit = candidates[entry, pair] / distance[:, None]

    centres = torch.linspace(0.5, cutoff - 0.5, num_radial, device=device, dtype=cell.dtype)
    spacing = (cutoff - 1.0) / (num_radial - 1)
    envelope = 0.5 * (1 + torch.cos(torch.pi * distance / cutoff))
    # Bounded below 1e-11: what is smaller ends in denormal numbers, which cost ten times as much to compute with.
    exponent = ((distance[:, None] - centres) / spacing).square_().clamp_(max=25.0)
    radial = torch.exp(-exponent) * envelope[:, None]
    # 1; x, y, z; xx, yy, zz, xy, xz, yz
    angular = torch.cat(
        [torch.ones_like(unit[:, :1]), unit, unit * unit, unit[:, :1] * unit[:, 1:], unit[:, 1:2] * unit[:, 2:]], 1
    )
    total = torch.zeros(batch * num_pairs, 10 * num_radial, device=device, dtype=cell.dtype)
    total.index_add_(0, which[entry] * num_pairs + pair, (angular[:, :, None] * radial[:, None]).flatten(1))
    total = total.view(batch, num_pairs, 10, num_radial)
    # Crowded noise must not drown the network: compress scalars, and damp vectors and tensors alike.
    scalar = total[:, :, 0]
    damped = total[:, :, 1:] / (1 + 0.3 * scalar[:, :, None])
    # From pairs i <= j to the full square.
    row = torch.zeros(size, size, dtype=torch.int64, device=device)
    row[first, second] = row[second, first] = torch.arange(num_pairs, device=device)
    sign = torch.ones(size, size, device=device, dtype=cell.dtype).triu() * 2 - 1
    vector = damped[:, row, :3] * sign[:, :, None, None]
    return PairFeatures(torch.log1p(scalar)[:, row], vector, damped[:, row, 3:])


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with SiLU between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def level_features(t: Tensor, num: int = 16) -> Tensor:
    """Smooth bumps over the noise level, denser near 0 where it matters, plus a flag for exactly 0."""
    centres = torch.linspace(0, 1, num - 1, device=t.device)
    bumps = torch.exp(-(((t.sqrt()[..., None] - centres) * (num - 2)) ** 2))
    return torch.cat([bumps, (t == 0)[..., None].to(t.dtype)], -1)


class Layer(nn.Module):
    """One round of messages: pairs, then vectors, then sites."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        d, p, c, k = config.width, config.pair_width, config.vector_channels, config.num_radial
        self.norm = nn.LayerNorm(d)
        self.site_to_pair = nn.Linear(d, 2 * p)
        self.pair_vector = nn.Linear(k, c, bias=False)
        self.pair_in = nn.Linear(k + 2 * c, p)
        self.pair_out = nn.Linear(p, p)
        self.vector_gate = nn.Linear(p, 2 * c, bias=False)
        self.filter = nn.Linear(k, d, bias=False)
        self.filter_site = nn.Linear(d, d, bias=False)
        self.vector_mix = nn.Linear(c, 2 * c, bias=False)
        self.site = mlp(3 * d + p + c, d, d + c)

    def forward(
        self, h: Tensor, u: Tensor, pair: Tensor, features: PairFeatures, site: Tensor, pair_mask: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Update sites ``h`` (B, N, D), vectors ``u`` (B, N, 3, C) and pairs (B, N, N, P); ``site`` (B, N, 1) marks
        real sites."""
        x = self.norm(h) * site  # the norm of a padded site is its bias, which must not enter the pool
        to_i, to_j = self.site_to_pair(x).chunk(2, -1)
        vector = self.pair_vector(features.vector)  # (B, N, N, 3, C)
        dot_i, dot_j = (vector * u[:, :, None]).sum(3), (vector * u[:, None]).sum(3)
        hidden = self.pair_in(torch.cat([features.scalar, dot_i, dot_j], -1))
        hidden = silu(hidden + pair + to_i[:, :, None] + to_j[:, None])
        pair = pair + silu(self.pair_out(hidden)) * pair_mask
        gate_vector, gate_carry = (self.vector_gate(pair) * pair_mask).chunk(2, -1)
        u = u + ((gate_vector[:, :, :, None] * vector).sum(2) + (gate_carry[:, :, :, None] * u[:, None]).sum(2) / count)
        left, right = self.vector_mix(u).chunk(2, -1)
        local = (self.filter(features.scalar) * self.filter_site(x)[:, None]).sum(2)
        pooled = (x.sum(1, keepdim=True) / count[..., 0]).expand_as(x)
        update = self.site(torch.cat([x, local, pooled, pair.sum(2) / count[..., 0], (left * right).sum(2)], -1))
        dh, gate = update.split([h.shape[-1], u.shape[-1]], -1)
        return h + dh, u * (1 + torch.tanh(gate))[:, :, None], pair


class Denoiser(nn.Module):
    """Predict velocities, species and site DOS from a noisy crystal and an embedded condition.

    Parameters
    ----------
    config : DenoiserConfig
    lattice : LatticeProcess
        Decodes the six-vector into the cell in which distances are measured.
    """

    def __init__(self, config: DenoiserConfig, lattice: LatticeProcess) -> None:
        super().__init__()
        self.config, self.lattice = config, lattice
        d, p, c, k = config.width, config.pair_width, config.vector_channels, config.num_radial
        self.element = nn.Embedding(MAX_ATOMIC_NUMBER + 1, d)
        self.size = nn.Embedding(MAX_ATOMS + 1, d)
        self.level = nn.Linear(32, d)
        self.lattice_in = mlp(6, d, d)
        self.pair_start = nn.Linear(k, p)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(d)
        self.coords_pair = mlp(p, p, k)
        self.coords_vector = nn.Linear(c, 1, bias=False)
        self.lattice_pair = mlp(p, p, k)
        self.lattice_out = mlp(d + 6 + 16, d, 6)
        self.species_out = mlp(d, d, MAX_ATOMIC_NUMBER + 1)
        self.dos_out = mlp(d, d, config.num_bins)

    def forward(self, state: NoisyCrystals, condition: Tensor | None = None) -> Prediction:
        """Run the network once.

        Parameters
        ----------
        state : NoisyCrystals
        condition : Tensor, shape (B, N, width), optional
            Embedded DOS targets, added to the sites.
        """
        mask = state.mask
        device = state.lattice.device
        count = state.num_atoms[:, None, None, None].to(torch.float32)
        pair_mask = (mask[:, :, None] & mask[:, None])[..., None].to(torch.float32)
        site = mask[..., None].to(torch.float32)
        # In bfloat16 an atom of a cell of 8 Angstrom would stand 0.03 off: only the layers may be autocast.
        with torch.autocast(device.type, enabled=False):
            cell = self.lattice.decode(state.lattice, state.num_atoms)
            features = pair_features(cell, state.frac_coords, mask, self.config.num_radial, self.config.cutoff)
            t_lattice = level_features(state.t_lattice)
            level = torch.cat([level_features(state.t_coords), t_lattice[:, None].expand(*mask.shape, -1)], -1)
            shared = self.lattice_in(state.lattice) + self.size(state.num_atoms)
            h = self.element(state.species) + self.level(level) + shared[:, None]
            h = (h if condition is None else h + condition) * site
            pair = self.pair_start(features.scalar) * pair_mask
        u = torch.zeros(*mask.shape, 3, self.config.vector_channels, device=device)
        for layer in self.layers:
            h, u, pair = layer(h, u, pair, features, site, pair_mask, count)
            h = h * site
        h, pair, u = self.norm(h).float() * site, pair.float(), u.float()

        with torch.autocast(device.type, enabled=False):
            length = (torch.linalg.det(cell) / state.num_atoms)[:, None, None] ** (1 / 3)
            pull = (self.coords_pair(pair)[:, :, :, None] * features.vector).sum((2, 4)) + self.coords_vector(u)[..., 0]
            velocity = torch.einsum("bix,bxc->bic", pull * length, torch.linalg.inv(cell)) * site
            moving = state.t_coords > 0
            stress = (self.lattice_pair(pair)[:, :, :, None] * features.tensor * pair_mask[..., None]).sum((1, 2, 4))
            xx, yy, zz, xy, xz, yz = (stress / count[..., 0, 0]).unbind(1)
            matrix = torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz], 1).view(-1, 3, 3)
            strain = torch.einsum("kab,nab->nk", BASIS.to(cell), matrix)
            mean = h.sum(1) / count[..., 0, 0]
            lattice = strain + self.lattice_out(torch.cat([mean, state.lattice, t_lattice], -1))
            site_dos = softplus(self.dos_out(h))
            return Prediction(lattice, remove_mean(velocity, moving, mask), self.species_out(h), site_dos)
