"""Species: absorbing (masked) discrete diffusion.

At level ``t`` every site is masked with probability ``t``, independently; 0 stands for "masked". The network predicts a
distribution over elements for masked sites. Going backwards, a site is revealed when ``t`` falls below its own uniform
time ``tau``; the revealed element is drawn from the network's prediction. A fixed species is a site that was never
masked: nothing else is needed, and the result is exact. References: D3PM (arXiv 2107.03006); the reveal-time view and
the cross-entropy objective: MDLM (arXiv 2406.07524).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dosmatgen_ase.model.running_sum import running_sum

MASKED = 0


def noised(atomic_numbers: Tensor, tau: Tensor, t: Tensor) -> Tensor:
    """Mask the sites whose reveal time ``tau`` lies below the level ``t`` (all of shape (B, N))."""
    return atomic_numbers.masked_fill(tau < t, MASKED)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw elements by inverting the cumulative distribution.

    Parameters
    ----------
    logits : Tensor, shape (B, N, Z + 1)
        Entry z belongs to atomic number z; entry 0 (masked) is never drawn.
    uniform : Tensor, shape (B, N)
        In [0, 1); the same number and logits give the same element, whatever the batch.

    Returns
    -------
    Tensor of int64, shape (B, N)
    """
    probabilities = torch.softmax(logits.double(), -1)
    probabilities[..., MASKED] = 0.0
    cumulative = running_sum(probabilities)
    threshold = uniform.double()[..., None] * cumulative[..., -1:]
    return (cumulative <= threshold).sum(-1).clamp(1, logits.shape[-1] - 1)
