"""What `reduction`, `dim` and an optional q mean, for fake tensors and vmap: the same as in csrc, and in the same words."""

from collections.abc import Sequence

import torch
from torch import Tensor


def reduced_dims(function: str, reduction: str, dim: Sequence[int] | None, rank: int) -> list[int]:
    """The dimensions that are reduced, in ascending order."""
    if reduction not in ("none", "sum", "mean", "batchmean"):
        raise ValueError(f'{function}: expected reduction to be "none", "sum", "mean" or "batchmean", got "{reduction}"')
    if dim is not None and reduction in ("none", "batchmean"):
        raise ValueError(f'{function}: expected no dim with reduction "{reduction}", got {list(dim)}')
    if reduction == "batchmean" and rank == 0:
        raise ValueError(f'{function}: expected at least one dimension for reduction "batchmean", got 0-dim tensors')
    if reduction == "none":
        return []
    if not dim:
        return list(range(rank))
    limit = max(rank, 1)
    for index in dim:
        if not -limit <= index < limit:
            raise IndexError(f"{function}: expected dim from {-limit} to {limit - 1}, got {index}")
    wrapped = sorted(index % limit for index in dim)
    if len(set(wrapped)) < len(wrapped):
        raise RuntimeError(f"{function}: expected each dim once, got {list(dim)}")
    return wrapped if rank else []


def kept_sizes(shape: torch.Size, reduced: Sequence[int]) -> list[int]:
    """The sizes that a reduction leaves."""
    return [size for index, size in enumerate(shape) if index not in reduced]


def check_together(function: str, mu_q: Tensor | None, log_var_q: Tensor | None) -> None:
    """Both parameters of q or neither."""
    if (mu_q is None) != (log_var_q is None):
        alone = "log_var_q" if mu_q is None else "mu_q"
        raise ValueError(f"{function}: expected mu_q and log_var_q together or neither, got {alone} alone")
