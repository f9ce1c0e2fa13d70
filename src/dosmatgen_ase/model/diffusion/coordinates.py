"""Fractional coordinates: flow matching on the torus.

A site moves from its clean position ``f0`` along the minimum image of ``f1 - f0``, ``f1`` uniform:
``f_t = f0 + t v``, ``v = minimum_image(f1 - f0)``. A rigid translation of a crystal changes nothing, so the mean of
``v`` over the moving sites is removed unless a site is held fixed (it then defines the origin). The network learns
``v`` from ``f_t``. For clean data concentrated at points ``a_k`` with weights ``w_k`` the exact velocity of one site is
``sum_k p_k (x - a_k) / t`` with ``p_k ~ w_k [abs(x - a_k) < t/2]``, which the tests use. Flow matching: arXiv
2210.02747; on the torus with the mean removed: FlowMM, arXiv 2406.04713.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dosmatgen_ase.crystals.batch import minimum_image, wrap


def remove_mean(velocity: Tensor, moving: Tensor, mask: Tensor) -> Tensor:
    """Subtract the mean over sites where every real site of the crystal moves; hold the others still.

    Parameters
    ----------
    velocity : Tensor, shape (B, N, 3)
    moving, mask : Tensor of bool, shape (B, N)
    """
    velocity = torch.where((moving & mask)[..., None], velocity, torch.zeros_like(velocity))
    mean = velocity.sum(1, keepdim=True) / mask.sum(1)[:, None, None].clamp(min=1)
    free = (moving | ~mask).all(1)[:, None, None] & mask[..., None]
    return torch.where(free, velocity - mean, velocity)


def noised(f0: Tensor, uniform: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates at the per-site level ``t`` and the velocity that leads there.

    Parameters
    ----------
    f0, uniform : Tensor, shape (B, N, 3)
        Clean positions and draws from [0, 1).
    t : Tensor, shape (B, N)
        Noise level of each site; 0 holds a site.
    mask : Tensor of bool, shape (B, N)
    """
    velocity = remove_mean(minimum_image(uniform - f0), t > 0, mask)
    return wrap(f0 + t[..., None] * velocity), velocity


def step_factor(t: float, s: float, annealing: float) -> float:
    """Share of the way to the predicted clean position to go in a step from ``t`` to ``s``.

    Plain Euler goes ``(t - s) / t``. Anti-annealing multiplies it by ``1 + annealing (1 - t)``, at most 1: late in the
    trajectory the coordinates settle faster than the flow asks for, which lowers energies at few steps (FlowMM, section
    4).
    """
    return min(1.0, (t - s) * (1.0 + annealing * (1.0 - t)) / t)
