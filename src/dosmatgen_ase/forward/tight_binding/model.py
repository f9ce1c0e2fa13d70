"""The model: a network writes the tight-binding Hamiltonian of a crystal, its spectrum is the DOS.

What a site knows of itself comes from its element and, in rounds of messages, from its neighbours: their elements and
distances first, then what those know. From this follow the levels of its shells and its magnetic moment; from two sites
and their distance the integrals between them, as Harrison's universal values times (1 + learned), and the crystal field
of one on the other. Crystals with V, Cr, Mn, Fe, Co or Ni have two spin channels, split by moment x exchange.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from ase.data import covalent_radii
from torch import Tensor, nn
from torch.nn.functional import softplus

from dosmatgen_ase.forward.tight_binding.basis import (
    D_RADIUS,
    MAGNETIC,
    NUM_ELEMENTS,
    NUM_ORBITALS,
    SHELL_OF_ORBITAL,
)
from dosmatgen_ase.forward.tight_binding.graph import GraphBatch
from dosmatgen_ase.forward.tight_binding.integrals import (
    COEFFICIENTS,
    NUM_INTEGRALS,
    blocks,
    directions,
    harrison_scale,
)
from dosmatgen_ase.forward.tight_binding.spectrum import EMPTY, Spectrum, broadened, eigh, zero_and_gap
from dosmatgen_ase.parsing import whole_number

RADIAL = 16  # Gaussians of the distance over the sum of covalent radii
TAIL = 30.0
LEVEL_UNIT = 3.0  # eV: learned levels by element move faster than by the network
DELTA_START = 0.3  # Harrison's dd delta is zero: the learned factor counts from this instead
STONER = (0.1, 0.1, 0.9)  # eV of splitting of s, p, d per Bohr magneton
PLANE_SHARE = 0.5  # of 1, 0.5 and 0.25 the best on split val
BAND_ENDS = tuple(itertools.product((0.0, 0.5), repeat=3))  # k = -k: Gamma and centres of faces, where most bands end


@dataclass(frozen=True)
class TightBindingConfig:
    """Size of a `TightBinding` model.

    Attributes
    ----------
    width : numbers that a site keeps per round, its element included
    hidden : width of the network that writes the integrals
    site_hidden : width of the network that writes the levels
    rounds : of messages between neighbours
    message : numbers that a neighbour tells per radial function
    cutoff : of bonds, Angstrom
    dropout : probability in the networks of the levels and of what neighbours tell
    site_dropout : of the numbers that a site keeps, the same for all its bonds
    """

    width: int = 128
    hidden: int = 192
    site_hidden: int = 128
    rounds: int = 1
    message: int = 12
    cutoff: float = 6.0
    dropout: float = 0.2
    site_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name, highest in (("width", 1024), ("hidden", 2048), ("site_hidden", 2048), ("rounds", 4), ("message", 64)):
            whole_number(getattr(self, name), name, 1, highest)
        if not 1 <= self.cutoff <= 8:
            raise ValueError(f"cutoff={self.cutoff} A must lie in 1 to 8")
        for name in ("dropout", "site_dropout"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value!r} must be at least 0 and less than 1")


class MatrixElements(NamedTuple):
    """What the network writes, before it becomes a matrix.

    Attributes
    ----------
    onsite : (n, 9, 9), eV
        Levels and crystal field of each atom.
    hopping : (e, 9, 9), eV
        Block of each bond.
    moment : (n,), Bohr magnetons
    splitting : (n, 3), eV
        Between the spins, of s, p and d.
    """

    onsite: Tensor
    hopping: Tensor
    moment: Tensor
    splitting: Tensor


def linear(inputs: int, outputs: int, start: float) -> nn.Linear:
    """Layer whose weights start at random of this standard deviation around zero, without a bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=start)
    nn.init.zeros_(layer.bias)
    return layer


def _mlp(inputs: int, hidden: int, outputs: int, dropout: float = 0.0, start: float | None = None) -> nn.Sequential:
    """One hidden layer; the outputs' weights start as those of `linear`, if `start` is given."""
    last = nn.Linear(hidden, outputs) if start is None else linear(hidden, outputs, start)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Dropout(dropout), last)


class TightBinding(nn.Module):
    """Crystals -> levels and DOS.

    Parameters
    ----------
    config : TightBindingConfig
    levels : (95, 3)
        Where the levels of each element start (`basis.start_levels`), eV from the zero.
    """

    start: Tensor
    d_radius: Tensor
    radius: Tensor
    centres: Tensor
    magnetic: Tensor

    def __init__(self, config: TightBindingConfig, levels: Tensor) -> None:
        super().__init__()
        self.config = config
        wide = config.width * (1 + config.rounds)
        self.register_buffer("start", levels.float())
        self.register_buffer("d_radius", torch.from_numpy(D_RADIUS), persistent=False)
        radius = torch.tensor(covalent_radii[:NUM_ELEMENTS], dtype=torch.float32).clamp(min=0.3)
        self.register_buffer("radius", radius, persistent=False)
        self.register_buffer("centres", torch.linspace(0.6, 2.4, RADIAL), persistent=False)
        magnetic = torch.tensor([z in MAGNETIC for z in range(NUM_ELEMENTS)])
        self.register_buffer("magnetic", magnetic, persistent=False)
        self.element = nn.Embedding(NUM_ELEMENTS, config.width)
        told = nn.Embedding(NUM_ELEMENTS, config.message)  # what a neighbour says, in the first round and later ones
        later = (nn.Linear(config.width * (1 + k), config.message) for k in range(1, config.rounds))
        self.told = nn.ModuleList([told, *later])
        self.heard = nn.ModuleList(
            _mlp(RADIAL * config.message, 128, config.width, config.dropout) for _ in range(config.rounds)
        )
        self.forget = nn.Dropout(config.site_dropout)
        self.level = nn.Embedding(NUM_ELEMENTS, 3)
        self.onsite = _mlp(wide, config.site_hidden, 3, config.dropout, start=0.0)
        self.moment = _mlp(wide, 64, 1)
        self.exchange = _mlp(wide, 64, 3, start=0.0)
        self.left, self.right = nn.Linear(wide, config.hidden), nn.Linear(wide, config.hidden)
        self.distance = nn.Linear(RADIAL, config.hidden)
        last = linear(config.hidden, 2 * NUM_INTEGRALS, start=0.01)  # of hopping, and of the crystal field
        self.integrals = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden, config.hidden), nn.SiLU(), last)
        nn.init.normal_(self.element.weight, std=0.3)
        nn.init.normal_(told.weight, std=0.5)
        nn.init.zeros_(self.level.weight)

    def matrix_elements(self, batch: GraphBatch) -> MatrixElements:
        """Let the network write the blocks of the Hamiltonian."""
        z, i, j = batch.numbers, batch.first, batch.second
        r = torch.linalg.vector_norm(batch.bond, dim=1)
        ratio = r / (self.radius[z[i]] + self.radius[z[j]])
        part = (r / self.config.cutoff).clamp(max=1)
        exponent = ((ratio[:, None] - self.centres) * 8) ** 2
        radial = torch.exp(-exponent) * (exponent < TAIL)  # denormal numbers are slow
        near = radial * (0.5 * (1 + torch.cos(math.pi * part)))[:, None]
        site = self.element(z)
        for k, (tell, hear) in enumerate(zip(self.told, self.heard, strict=True)):
            told = tell(site if k else z)
            message = (near[:, :, None] * told[j][:, None]).flatten(1)
            around = message.new_zeros(len(z), message.shape[1]).index_add(0, i, message)
            site = torch.cat([site, hear(around)], -1)
        site = self.forget(site)
        pair = self.left(site)[i] + self.right(site)[j] + self.distance(radial)
        factor, field = self.integrals(pair).split(NUM_INTEGRALS, -1)
        # Harrison's integrals reach one shell of neighbours only; beyond, and to zero at the cutoff, they are screened.
        screen = (torch.exp(-1.5 * (ratio - 1).clamp(min=0)) * (1 - part**6) ** 2)[:, None]
        eta = r.new_tensor(COEFFICIENTS)
        strength = torch.where(eta == 0, DELTA_START * factor, eta * (1 + factor))
        strength = strength * harrison_scale(r, self.d_radius[z[i]], self.d_radius[z[j]]) * screen
        angular = directions(batch.bond / r[:, None])
        hopping, own = blocks(strength, angular), blocks(0.5 * field * screen, angular)
        own = (own + own.mT) / 2
        shells = list(SHELL_OF_ORBITAL)
        levels = self.start[z] + LEVEL_UNIT * self.level(z) + self.onsite(site)
        onsite = torch.diag_embed(levels[:, shells]).index_add(0, i, own)
        moment = softplus(self.moment(site)[:, 0] - 1.0)
        reach = torch.where(self.magnetic[z], moment, 0.05 * moment)  # other elements are polarised by these
        splitting = r.new_tensor(STONER) * reach[:, None] * (1 + self.exchange(site))
        return MatrixElements(onsite, hopping, moment, splitting)

    def spectrum(
        self, batch: GraphBatch, kpoints: Tensor, kweights: Tensor | None = None, steps: Tensor | None = None
    ) -> tuple[Spectrum, Tensor]:
        """Levels, their shells and zero; and the moment of each atom (n,), Bohr magnetons.

        Parameters
        ----------
        batch : GraphBatch of b crystals
        kpoints : (b, k, 3)
            In units of the reciprocal cell.
        kweights : (b, k), optional
            Sum 1; all the same by default.
        steps : (b, 3), optional
            Of the mesh, in units of the reciprocal cell: each level is spread out over the cell of its point as its
            velocity says. Without, it stands for itself alone.
        """
        elements = self.matrix_elements(batch)
        space = _in_space(batch, elements)
        hamiltonian = bloch(batch, elements, kpoints, space)
        crystals, channels, points, size = hamiltonian.shape[:4]
        levels, vectors = eigh(hamiltonian)
        shell = torch.tensor(SHELL_OF_ORBITAL, device=kpoints.device) + 3 * batch.site[:, None]
        owner = batch.owner[:, None].expand_as(batch.place)
        pick = levels.new_zeros(crystals, size, 3 * batch.sites)
        pick[owner[batch.exists], batch.place[batch.exists], shell[batch.exists]] = 1.0
        share = (vectors.real**2 + vectors.imag**2).mT.reshape(crystals, -1, size) @ pick
        if kweights is None:
            kweights = levels.new_full((crystals, points), 1 / points)
        ends = torch.tensor(BAND_ENDS).to(kpoints).expand(crystals, -1, -1)
        edges = torch.linalg.eigvalsh(bloch(batch, elements, ends, space, real=True))
        spread = None if steps is None else _spread(batch, space, kpoints, vectors, steps)
        found = zero_and_gap(levels, kweights, batch.electrons.to(levels), edges, spread)
        weights = share.view(crystals, channels, points, size, -1)
        return Spectrum(levels, weights, kweights, *found, spread), elements.moment

    def forward(
        self, batch: GraphBatch, kpoints: Tensor, energies: Tensor, sigma: float, kweights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """DOS (b, sites, 3, energies) of s, p and d of every site, states/eV, and moments (n,); see `spectrum`."""
        spectrum, moment = self.spectrum(batch, kpoints, kweights)
        dos = broadened(spectrum, energies, sigma)
        return dos.view(len(batch), batch.sites, 3, -1), moment


def _in_space(batch: GraphBatch, elements: MatrixElements) -> Tensor:
    """Hamiltonian (b, v, n, n) between the home cell and those of the lattice vectors, without spin."""
    crystals, most, size = len(batch), batch.vectors.shape[1], batch.size
    both = batch.exists[:, :, None] & batch.exists[:, None]
    place = (batch.owner * most * size)[:, None] + batch.place  # of a row in the home cells
    home = (place[:, :, None] * size + batch.place[:, None])[both]
    flat = elements.hopping.new_zeros(crystals * most * size * size)
    flat = flat.index_add(0, batch.target, elements.hopping.flatten()[batch.source])
    return flat.index_add(0, home, elements.onsite[both]).view(crystals, most, size, size)


def bloch(
    batch: GraphBatch, elements: MatrixElements, kpoints: Tensor, space: Tensor | None = None, *, real: bool = False
) -> Tensor:
    """Hamiltonian (b, c, k, n, n) of c spin channels; padding has the level `EMPTY`.

    Parameters
    ----------
    batch : GraphBatch
    elements : MatrixElements
    kpoints : (b, k, 3)
    space : (b, v, n, n), optional
        The elements in the space of lattice vectors, if they are at hand.
    real : the points are `BAND_ENDS`, where it is real: a real matrix, cheaper by far
    """
    size = batch.size
    flat = (_in_space(batch, elements) if space is None else space).flatten(2)
    phase = 2 * math.pi * kpoints @ batch.vectors.to(kpoints).mT
    matrix = phase.cos() @ flat if real else torch.complex(phase.cos() @ flat, phase.sin() @ flat)
    hamiltonian = matrix.view(len(batch), 1, -1, size, size)
    hamiltonian = (hamiltonian + hamiltonian.mH) / 2
    unused = torch.arange(size, device=flat.device) >= batch.sizes[:, None]
    hamiltonian = hamiltonian + torch.diag_embed(EMPTY * unused).to(hamiltonian.dtype)[:, None, None]
    if not batch.magnetic:
        return hamiltonian
    owner = batch.owner[:, None].expand(-1, NUM_ORBITALS)[batch.exists]
    half = (elements.splitting[:, list(SHELL_OF_ORBITAL)] / 2)[batch.exists]
    shift = flat.new_zeros(len(batch), size).index_put((owner, batch.place[batch.exists]), half)
    split = torch.diag_embed(shift).to(hamiltonian.dtype)[:, None, None]
    return torch.cat([hamiltonian - split, hamiltonian + split], 1)


def velocities(batch: GraphBatch, space: Tensor, kpoints: Tensor, vectors: Tensor) -> Tensor:
    """Derivatives (b, c, k, n, 3) of the levels by the point, eV times the reciprocal cell (Hellmann and Feynman).

    Parameters
    ----------
    batch : GraphBatch
    space : (b, v, n, n), eV
    kpoints : (b, k, 3)
    vectors : (b, c, k, n, n)
        Eigenvectors, in columns.
    """
    around = 2 * math.pi * batch.vectors.to(kpoints)
    phase = kpoints @ around.mT
    found = []
    for axis in range(3):
        turn = around[:, None, :, axis]
        slope = torch.complex(-(phase.sin() * turn) @ space.flatten(2), (phase.cos() * turn) @ space.flatten(2))
        slope = slope.view(len(batch), 1, -1, batch.size, batch.size)
        found.append((vectors.conj() * (slope @ vectors)).real.sum(-2))
    return torch.stack(found, -1)


def _spread(batch: GraphBatch, space: Tensor, kpoints: Tensor, vectors: Tensor, steps: Tensor) -> Tensor:
    """Standard deviation (b, c, k, n) of each level over the cell of its point, eV, held fixed in gradients.

    A plane over the cell has the variance sum (slope x step)^2 / 12. Bands bend, so a part of it is taken.
    """
    with torch.no_grad():
        slope = velocities(batch, space, kpoints, vectors)
        return (slope * steps.to(slope)[:, None, None, None]).square().sum(-1).mul(PLANE_SHARE / 12).sqrt()
