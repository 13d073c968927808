"""Time both losses against what a user would otherwise run: the documented formulas in plain torch, and torch.compile of them.

    python benchmarks/bench_losses.py            (`make bench` runs this; some ten minutes on two cores)
    python benchmarks/bench_losses.py --quick    (two sizes, few rounds)

The contenders of a row run in this process, in turn, in every round, on the same fresh random numbers. A row reports the
median of the rounds and, as its ratios, the medians of each round's own ratio: what slows a round slows all its contenders.
What is timed and what is not stands in benchmarks/README.md, which shows the committed results too (benchmarks/table.py).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
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
import table
from machine import describe_machine

try:
    from tqdm import tqdm
except ModuleNotFoundError:
    sys.exit("The benchmark needs tqdm: `make bench` installs it, or `pip install '.[bench]'`.")

HERE = Path(__file__).resolve().parent
SIZES = [1 << exponent for exponent in (12, 14, 16, 18, 20, 22, 24)]  # 4 Ki to 16 Mi elements
QUICK_SIZES = [1 << 12, 1 << 18]
TENSORS = {"kl_div_single_loss": 2, "kl_div_pair_loss": 4}
FORWARD, BACKWARD = "forward", "forward + backward"
CONTENDERS = ["kl_ext", "plain torch", "torch.compile"]
CHUNK = "gradients concatenated"  # beside the contenders, with --layout chunk: what the backward of chunk takes
BLOCK_SECONDS = 5e-3  # calls are timed in blocks of about this length; longer ones one by one
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
DISTANCES = [1e-1, 1e-2, 1e-3, 1e-4]  # from the prior, for the accuracy: small ones are posterior collapse

Timed = Callable[[list[Tensor]], Any]


def contender(name: str, loss: str, direction: str) -> Timed:
    """A function of leaf tensors to time. With the backward comes the sum of a training loss, compiled where the loss is."""
    function = getattr(kl_ext if name == "kl_ext" else kl_ext.reference, loss)

    def values(leaves: list[Tensor]) -> Tensor:
        # A leaf [rows, 2 * width] is an encoder's output: mu and log_var are its halves.
        tensors = leaves if leaves[0].dim() == 1 else [half for leaf in leaves for half in leaf.chunk(2, dim=-1)]
        result: Tensor = function(*tensors)
        return result

    def total(leaves: list[Tensor]) -> Tensor:
        return values(leaves).sum()

    compiled = name == "torch.compile"
    run = values if direction == FORWARD else total
    run = torch.compile(run, dynamic=False) if compiled else run

    def forward(leaves: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return run(leaves)

    def forward_and_backward(leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(leaves), leaves)

    return forward if direction == FORWARD else forward_and_backward


def concatenate(leaves: list[Tensor]) -> Any:
    """What autograd does for chunk: one tensor of two gradients."""
    with torch.no_grad():
        return [torch.cat(leaf.chunk(2, dim=-1), dim=-1) for leaf in leaves]


def fresh(loss: str, size: int, options: argparse.Namespace) -> list[Tensor]:
    """Fresh standard normal numbers that want gradients: a tensor per argument, or per two arguments with --layout chunk."""
    count, shape = TENSORS[loss], [size]
    if options.layout == "chunk":
        width = math.gcd(size, 64)
        count, shape = count // 2, [size // width, 2 * width]
    return [torch.randn(shape, device=options.device).to(DTYPES[options.dtype]).requires_grad_() for _ in range(count)]


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
    """Drop what the last row left behind, compiled code included, so that every row starts alike."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_speed(loss: str, direction: str, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row: the contenders in turn, round after round, each round starting with the next one."""
    leaves = fresh(loss, size, options)
    functions = {name: contender(name, loss, direction) for name in CONTENDERS}
    if options.layout == "chunk" and direction == BACKWARD:
        functions[CHUNK] = concatenate
    calls = {}
    for name, function in functions.items():
        seconds_of(function, leaves, 2)  # compiles and warms up
        calls[name] = max(1, min(2000, round(BLOCK_SECONDS / seconds_of(function, leaves, 3))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for _ in range(options.rounds):
        for name in order:
            times[name].append(seconds_of(functions[name], leaves, calls[name]))
        order.append(order.pop(0))
    row: dict[str, Any] = {"loss": loss, "pass": direction, "elements": size}
    for name, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        ratio = statistics.median(a / b for a, b in zip(seconds, times["kl_ext"], strict=True))
        row[name] = {"median_us": 1e6 * middle, "quartiles_us": [1e6 * low, 1e6 * high], "ratio": ratio}
    return row


def measure_accuracy(loss: str, distance: float, options: argparse.Namespace) -> dict[str, Any]:
    """One row: values and gradients at a distance from the prior, compared with the same formula in float64."""
    contiguous = argparse.Namespace(**{**vars(options), "layout": "contiguous"})
    mu, log_var, *prior = (leaf.detach() for leaf in fresh(loss, options.accuracy_elements, contiguous))
    mu, log_var = mu * distance, log_var * distance
    leaves = [mu, log_var] if not prior else [prior[0] + mu, prior[1] + log_var, *prior]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    true_values = contender("plain torch", loss, FORWARD)(exact) - _floor(loss)
    true_gradient = contender("plain torch", loss, BACKWARD)(exact)[1]
    row: dict[str, Any] = {"loss": loss, "distance": distance, "elements": options.accuracy_elements}
    for name in CONTENDERS:
        values = contender(name, loss, FORWARD)(leaves).double() - _floor(loss)
        gradient = contender(name, loss, BACKWARD)(leaves)[1].double()
        errors = ((gradient - true_gradient) / true_gradient).abs()[true_gradient != 0]
        row[name] = {
            "below": (values < 0).double().mean().item(),
            "lost": ((values == 0) & (true_values > 0)).double().mean().item(),
            "mean_ratio": (values.mean() / true_values.mean()).item(),
            "gradient_error": errors.median().item(),
        }
    return row


def _floor(loss: str) -> float:
    """The value of a loss at the prior itself, and the least that it can be."""
    return 0.0 if loss == "kl_div_single_loss" else 0.5


def parse_options() -> argparse.Namespace:
    """The command line; what it asks for and cannot have is refused here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])

    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
        return int(text)

    parser.add_argument("--quick", action="store_true", help="two sizes, few rounds, less to check the accuracy on")
    parser.add_argument("--sizes", type=positive, nargs="+", metavar="N", help="numbers of elements (4 Ki to 16 Mi)")
    parser.add_argument("--rounds", type=positive, help="rounds that a row is the median of (15)")
    parser.add_argument("--threads", type=positive, help="threads of the CPU (torch's own number)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (%(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the arguments (%(default)s)")
    parser.add_argument(
        "--layout",
        choices=["contiguous", "chunk"],
        default="contiguous",
        help="chunk: mu and log_var are the halves of one tensor, as an encoder gives them (%(default)s)",
    )
    parser.add_argument("--out", type=Path, help="JSON file to write (results/DEVICE-DTYPE-LAYOUT.json; with --quick, none)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device; use --device cpu")
    if options.sizes is None:
        options.sizes = QUICK_SIZES if options.quick else SIZES
    if options.rounds is None:
        options.rounds = 5 if options.quick else 15
    options.accuracy_elements = 1 << (12 if options.quick else 20)
    if options.out is None and not options.quick:
        options.out = HERE / "results" / f"{options.device}-{options.dtype}-{options.layout}.json"
    return options


def main() -> int:
    """Measure, print the tables and write the JSON file."""
    options = parse_options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    speed_rows = list(itertools.product(TENSORS, (FORWARD, BACKWARD), options.sizes))
    accuracy_rows = list(itertools.product(TENSORS, DISTANCES))
    result: dict[str, Any] = {
        "machine": describe_machine(options.device),
        "options": {key: value for key, value in vars(options).items() if key != "out"},
        "speed": [],
        "accuracy": [],
    }
    if result["machine"]["load"] > 0.5:
        print(f"Other processes keep {result['machine']['load']:.1f} cores busy: do not trust these times.", file=sys.stderr)
    with tqdm(total=len(speed_rows) + len(accuracy_rows), unit="row", mininterval=0) as progress:
        for loss, direction, size in speed_rows:
            progress.set_description(f"{loss}, {direction}, {size}")
            result["speed"].append(measure_speed(loss, direction, size, options))
            free_memory()
            progress.update()
        for loss, distance in accuracy_rows:
            progress.set_description(f"{loss}, accuracy at {distance:g}")
            result["accuracy"].append(measure_accuracy(loss, distance, options))
            progress.update()

    print(f"\n{table.machine(result)}")
    print(f"Time of one call in microseconds:\n\n{table.times(result)}")
    print(f"Time of plain torch / torch.compile, in times of kl_ext (above 1: kl_ext is faster):\n\n{table.ratios(result)}")
    print(f"Accuracy near the prior:\n\n{table.accuracy(result)}")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
