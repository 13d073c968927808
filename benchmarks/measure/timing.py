"""How contenders are timed: in turn, in one process, for as many rounds as fit into a row's share of time.

A contender is a function of leaf tensors. A round times a block of calls of each contender, and starts with another one than
the round before. A row reports the median of the rounds, and as its ratios the medians of each round's own ratio: what slows a
round slows all its contenders. A call too long to be timed with others follows one that is not timed: as in a training loop,
the memory it takes is what a call like it has just freed.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK_SECONDS = 5e-3  # calls are timed in blocks of about this length; longer ones one by one
MOST_CALLS = 2000  # in a block
BRIEF_ROUNDS = 3
LARGE = 1 << 20  # from here on calls alternate between two sets of inputs
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

Timed = Callable[[list[Tensor]], Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """What a row may take: seconds, within these numbers of rounds; and where its tensors are."""

    seconds: float
    fewest: int
    most: int
    device: str = "cpu"
    clock: Callable[[], float] = time.perf_counter

    def rounds(self, seconds_of_one: float) -> int:
        return max(self.fewest, min(self.most, int(self.seconds / max(seconds_of_one, 1e-9))))


def leaf(shape: Sequence[int], device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fresh standard normal numbers that want a gradient."""
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


def sets_of(make: Callable[[], list[Tensor]], elements: int) -> list[list[Tensor]]:
    """Inputs for one row: two sets of large ones, so that no call finds in a cache what the last one left there."""
    return [make() for _ in range(2 if elements >= LARGE else 1)]


def time_in_turn(
    contenders: dict[str, Timed],
    sets: list[list[Tensor]],
    effort: Effort,
    of: str,
    prepare: dict[str, Callable[[], None]] | None = None,
    brief: Collection[str] = (),
) -> Row:
    """Times in microseconds and ratios to the contender `of`, each as lower quartile, median and upper quartile.

    What `prepare` has for a contender runs before each of its blocks, and before a call that is not timed. Where a row gets no
    more than its fewest rounds, the contenders in `brief` take part in the first BRIEF_ROUNDS of them; they have no calls that
    are not timed.
    """

    def seconds_of(name: str, calls: int, first: int = 0, follow: bool = False) -> float:
        function, count = contenders[name], len(sets)
        if prepare and name in prepare:
            prepare[name]()
        if follow and calls == 1 and name not in brief:
            function(sets[(first + 1) % count])
        synchronize(effort.device)
        start = effort.clock()
        for index in range(calls):
            function(sets[(first + index) % count])
        synchronize(effort.device)
        return (effort.clock() - start) / calls

    calls = {}
    for name in contenders:
        seconds_of(name, 1)  # compiles
        warm = seconds_of(name, 1, 1)
        calls[name] = calls_of(warm if warm > BLOCK_SECONDS else seconds_of(name, 3), len(sets))
    rounds: list[dict[str, float]] = []
    order = list(contenders)
    planned = 1
    gc.collect()
    gc.disable()
    try:
        while len(rounds) < planned:
            start = effort.clock()
            present = [name for name in order if name not in brief or planned != effort.fewest or len(rounds) < BRIEF_ROUNDS]
            rounds.append({name: seconds_of(name, calls[name], len(rounds), follow=True) for name in present})
            if len(rounds) == 1:
                planned = effort.rounds(effort.clock() - start)
            order.append(order.pop(0))
    finally:
        gc.enable()
    return {
        "rounds": len(rounds),
        "us": {name: quartiles([1e6 * times[name] for times in rounds if name in times]) for name in contenders},
        "ratio": {
            name: quartiles([times[name] / times[of] for times in rounds if name in times]) for name in contenders if name != of
        },
        "seconds": rounds,  # what further ratios are computed from; not kept
    }


def calls_of(seconds: float, sets: int) -> int:
    """Calls in a block: one, or whole turns through the sets of inputs."""
    calls = min(MOST_CALLS, round(BLOCK_SECONDS / max(seconds, 1e-9)))
    return 1 if calls <= 1 else math.ceil(calls / sets) * sets


def quartiles(numbers: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile, to four digits."""
    found = statistics.quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else numbers * 3
    return [float(f"{number:.4g}") for number in found]


def forward_of(run: Callable[[list[Tensor]], Tensor]) -> Timed:
    """The forward pass alone, as an evaluation has it."""

    def forward(leaves: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return run(leaves)

    return forward


def gradients_of(run: Callable[[list[Tensor]], Tensor]) -> Timed:
    """The forward and the backward pass, into every leaf that wants a gradient. The gradient of a result that is not a scalar
    averages over it."""
    weights: dict[torch.Size, Tensor] = {}

    def forward_and_backward(leaves: list[Tensor]) -> tuple[Tensor, ...]:
        result = run(leaves)
        leaves = [leaf for leaf in leaves if leaf.requires_grad]
        if result.dim() == 0:
            return torch.autograd.grad(result, leaves)
        if result.shape not in weights:
            weights[result.shape] = torch.full_like(result, 1 / result.numel())
        return torch.autograd.grad(result, leaves, weights[result.shape])

    return forward_and_backward


def synchronize(device: str) -> None:
    """Wait for the device, where there is something to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()


def free_memory() -> None:
    """Drop what was left behind, compiled code included, so that everything after it starts alike."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
