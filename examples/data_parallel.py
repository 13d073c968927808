"""How train_vae.py shares its work among the processes that torchrun has started.

Each process draws the same weights, batches and noise, and takes its share of every batch. What they add up are gradients and
losses that are weighted by the shares, and so the sums are those of the whole batch, also where the shares are not equal.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_processes() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are: 0 and 1 without torchrun."""
    launched = dist.is_available() and dist.is_torchelastic_launched()
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched else (0, 1)


def device_of_this_process(kind: str) -> torch.device:
    """Under torchrun each process of a machine has a GPU of its own."""
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)


def connect(device: torch.device) -> None:
    """With the other processes, before the first sum.

    The functions of torch.distributed.nn keep the group that is there when they are imported, and an optimizer imports them.
    The threads of a group that is kept run on after `destroy_process_group`, and one that lets go of a tensor while Python
    ends aborts the process. So they are imported before there is a group.
    """
    import torch.distributed.nn

    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replaces tensors of one dtype by their sums over all processes, in one exchange."""
    together = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(together)
    for tensor, total in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))
