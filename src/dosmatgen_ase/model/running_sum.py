"""Running sums that are the same on every run, on CUDA as well."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def running_sum(values: Tensor) -> Tensor:
    """Cumulative sum over the last axis.

    ``torch.cumsum`` of floats adds in a changing order on CUDA, and refuses to run there under
    ``torch.use_deterministic_algorithms``.
    """
    return doubling_sum(values) if values.is_cuda else values.cumsum(-1)


def doubling_sum(values: Tensor) -> Tensor:
    """Cumulative sum over the last axis in log2(n) steps: each adds the value 1, 2, 4, ... places before."""
    distance = 1
    while distance < values.shape[-1]:
        values = values + pad(values[..., :-distance], (distance, 0))
        distance *= 2
    return values
