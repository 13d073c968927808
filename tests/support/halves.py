"""mu and log_var as the halves of one tensor, in every way that halves are taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Halve = Callable[[Tensor], Sequence[Tensor]]

# From a tensor [4, 6, 4, 4] to its halves.
HALVES: dict[str, Halve] = {
    "chunk of dim 0": lambda h: h.chunk(2),
    "chunk of dim 1": lambda h: h.chunk(2, 1),
    "chunk of the last dim": lambda h: h.chunk(2, -1),
    "chunk, log_var first": lambda h: h.chunk(2, 1)[::-1],
    "split": lambda h: h.split([3, 3], 1),
    "slices": lambda h: (h[:, :3], h[:, 3:]),
    "slices, log_var first": lambda h: (h[:, 3:], h[:, :3]),
    "slices that count from the end": lambda h: (h[:, :-3], h[:, -3:]),
    "slices to beyond the end": lambda h: (h[:, -9:3], h[:, 3:9]),
    "narrow": lambda h: (h.narrow(2, 0, 2), h.narrow(2, 2, 2)),
    "chunk of a channels-last tensor": lambda h: h.contiguous(memory_format=torch.channels_last).chunk(2, 1),
    "chunk of a transposed tensor": lambda h: h.transpose(0, 1).chunk(2),
    "chunk of an inner tensor": lambda h: (2 * h).chunk(2, 1),
}


def encoded(device: torch.device, dtype: torch.dtype = torch.float64, shape: Sequence[int] = (4, 6, 4, 4)) -> Tensor:
    return (torch.rand(shape, dtype=torch.float64, device=device) * 4 - 2).to(dtype).requires_grad_()


def apart(halves: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers in tensors of their own, the gradients of which autograd joins."""
    return [half.clone() for half in halves]


def joins(backward: Callable[[], Any]) -> bool:
    """Whether a backward pass has the gradients of halves joined by autograd."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        backward()
    return any(event.name in ("aten::cat", "aten::slice_backward") for event in profiled.events())
