"""What the benchmarks share: contenders timed in turn in one process, the options of the command line, the file of results."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kl_ext
import kl_ext.reference
from machine import describe_machine

HERE = Path(__file__).resolve().parent
LAYOUTS = ["contiguous", "chunk"]
CONTENDERS = ["kl_ext", "plain torch", "torch.compile"]
CHUNK = "gradients concatenated"  # beside the contenders, for chunk views: what the backward of chunk takes
BLOCK_SECONDS = 5e-3  # calls are timed in blocks of about this length; longer ones one by one
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

Timed = Callable[[list[Tensor]], Any]


def formulas(contender: str) -> Any:
    """The module whose functions a contender calls."""
    return kl_ext if contender == "kl_ext" else kl_ext.reference


def gradients_of(run: Callable[[list[Tensor]], Tensor]) -> Timed:
    """The backward pass after the forward pass, into every leaf."""

    def forward_and_backward(leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(leaves), leaves)

    return forward_and_backward


def halves(leaves: list[Tensor]) -> list[Tensor]:
    """The mu and log_var that are the halves of each leaf [rows, 2 * width], an encoder's output."""
    return [half for leaf in leaves for half in leaf.chunk(2, dim=-1)]


def concatenate(leaves: list[Tensor]) -> Any:
    """What autograd does for chunk: one tensor of two gradients."""
    with torch.no_grad():
        return [torch.cat(leaf.chunk(2, dim=-1), dim=-1) for leaf in leaves]


def leaf(shape: list[int], options: argparse.Namespace) -> Tensor:
    """Fresh standard normal numbers that want a gradient."""
    return torch.randn(shape, device=options.device).to(DTYPES[options.dtype]).requires_grad_()


def time_in_turn(functions: dict[str, Timed], leaves: list[Tensor], rounds: int) -> dict[str, Any]:
    """The functions in turn, round after round, each round starting with the next one; their times and ratios by name."""
    calls = {}
    for name, function in functions.items():
        seconds_of(function, leaves, 1)  # compiles
        warm = seconds_of(function, leaves, 1)
        calls[name] = 1 if warm > BLOCK_SECONDS else max(1, min(2000, round(BLOCK_SECONDS / seconds_of(function, leaves, 3))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for _ in range(rounds):
        for name in order:
            times[name].append(seconds_of(functions[name], leaves, calls[name]))
        order.append(order.pop(0))
    row = {}
    for name, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        ratio = statistics.median(a / b for a, b in zip(seconds, times["kl_ext"], strict=True))
        row[name] = {"median_us": 1e6 * middle, "quartiles_us": [1e6 * low, 1e6 * high], "ratio": ratio}
    return row


def seconds_of(function: Timed, leaves: list[Tensor], calls: int) -> float:
    """Seconds of one call, averaged over a block of calls."""
    synchronize(leaves[0])
    start = time.perf_counter()
    for _ in range(calls):
        function(leaves)
    synchronize(leaves[0])
    return (time.perf_counter() - start) / calls


def synchronize(tensor: Tensor) -> None:
    """Wait for the device, where there is something to wait for."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def free_memory() -> None:
    """Drop what was left behind, compiled code included, so that everything after it starts alike."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def positive(text: str) -> int:
    """An argument of the command line that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def parser_of(documentation: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(documentation or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few and small cases, few rounds; nothing is written")
    parser.add_argument("--sizes", type=positive, nargs="+", metavar="N", help="numbers of elements")
    parser.add_argument("--rounds", type=positive, help="rounds that a row is the median of")
    parser.add_argument("--threads", type=positive, help="threads of the CPU (torch's own number)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (%(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the arguments (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write (one in results/; with --quick, none)")
    return parser


def parse(parser: argparse.ArgumentParser, rounds: int, sizes: list[int], quick_sizes: list[int]) -> argparse.Namespace:
    """What was asked for, with defaults; what cannot be had is refused."""
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device; use --device cpu")
    if options.sizes is None:
        options.sizes = quick_sizes if options.quick else sizes
    if options.rounds is None:
        options.rounds = 5 if options.quick else rounds
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options


def result_file(options: argparse.Namespace, name: str) -> Path | None:
    """Where the result goes, if anywhere."""
    default = None if options.quick else HERE / "results" / f"{options.device}-{options.dtype}-{name}.json"
    return options.out or default


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """A result without rows."""
    machine = describe_machine(options.device)
    if machine["load"] > 0.5:
        print(f"Other processes keep {machine['load']:.1f} cores busy: do not trust these times.", file=sys.stderr)
    return {"machine": machine, "options": {key: value for key, value in vars(options).items() if key != "out"}, "speed": []}


def write(result: dict[str, Any], path: Path | None) -> None:
    """The result as a file."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {path}")
