"""Time both losses against what a user would otherwise run: the documented formulas in plain torch, and torch.compile of them.

    python benchmarks/bench_losses.py            (`make bench` runs this; some ten minutes on two cores)
    python benchmarks/bench_losses.py --quick    (two sizes, few rounds)

The contenders of a row run in this process, in turn, in every round, on the same fresh random numbers. A row reports the
median of the rounds and, as its ratios, the medians of each round's own ratio: what slows a round slows all its contenders.
What is timed and what is not stands in benchmarks/README.md, which shows the committed results too (benchmarks/table.py).
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from typing import Any

import torch
from torch import Tensor

import table
import timing
from timing import CONTENDERS, Timed

try:
    from tqdm import tqdm
except ModuleNotFoundError:
    sys.exit("The benchmark needs tqdm: `make bench` installs it, or `pip install '.[bench]'`.")

SIZES = [1 << exponent for exponent in (12, 14, 16, 18, 20, 22, 24)]  # 4 Ki to 16 Mi elements
QUICK_SIZES = [1 << 12, 1 << 18]
TENSORS = {"kl_div_single_loss": 2, "kl_div_pair_loss": 4}
FORWARD, BACKWARD = "forward", "forward + backward"
DISTANCES = [1e-1, 1e-2, 1e-3, 1e-4]  # from the prior, for the accuracy: small ones are posterior collapse


def contender(name: str, loss: str, direction: str) -> Timed:
    """A function of leaf tensors to time. With the backward comes the sum of a training loss, compiled where the loss is."""
    function = getattr(timing.formulas(name), loss)

    def values(leaves: list[Tensor]) -> Tensor:
        result: Tensor = function(*(leaves if leaves[0].dim() == 1 else timing.halves(leaves)))
        return result

    def total(leaves: list[Tensor]) -> Tensor:
        return values(leaves).sum()

    run = values if direction == FORWARD else total
    run = torch.compile(run, dynamic=False) if name == "torch.compile" else run

    def forward(leaves: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return run(leaves)

    return forward if direction == FORWARD else timing.gradients_of(run)


def fresh(loss: str, size: int, options: argparse.Namespace) -> list[Tensor]:
    """A leaf for each argument, or for each two arguments with --layout chunk."""
    count, shape = TENSORS[loss], [size]
    if options.layout == "chunk":
        width = math.gcd(size, 64)
        count, shape = count // 2, [size // width, 2 * width]
    return [timing.leaf(shape, options) for _ in range(count)]


def measure_speed(loss: str, direction: str, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row: the contenders in turn."""
    functions = {name: contender(name, loss, direction) for name in CONTENDERS}
    if options.layout == "chunk" and direction == BACKWARD:
        functions[timing.CHUNK] = timing.concatenate
    times = timing.time_in_turn(functions, fresh(loss, size, options), options.rounds)
    return {"loss": loss, "pass": direction, "elements": size, **times}


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
    """The command line."""
    parser = timing.parser_of(__doc__)
    parser.add_argument(
        "--layout",
        choices=timing.LAYOUTS,
        default="contiguous",
        help="chunk: mu and log_var are the halves of one tensor, as an encoder gives them (%(default)s)",
    )
    options = timing.parse(parser, 15, SIZES, QUICK_SIZES)
    options.accuracy_elements = 1 << (12 if options.quick else 20)
    return options


def main() -> int:
    """Measure, print the tables and write the JSON file."""
    options = parse_options()
    speed_rows = list(itertools.product(TENSORS, (FORWARD, BACKWARD), options.sizes))
    accuracy_rows = list(itertools.product(TENSORS, DISTANCES))
    result = timing.begin(options)
    result["accuracy"] = []
    with tqdm(total=len(speed_rows) + len(accuracy_rows), unit="row", mininterval=0) as progress:
        for loss, direction, size in speed_rows:
            progress.set_description(f"{loss}, {direction}, {size}")
            result["speed"].append(measure_speed(loss, direction, size, options))
            timing.free_memory()
            progress.update()
        for loss, distance in accuracy_rows:
            progress.set_description(f"{loss}, accuracy at {distance:g}")
            result["accuracy"].append(measure_accuracy(loss, distance, options))
            progress.update()

    print(f"\n{table.machine(result)}")
    print(f"Time of one call in microseconds:\n\n{table.times(result)}")
    print(f"Time of plain torch / torch.compile, in times of kl_ext (above 1: kl_ext is faster):\n\n{table.ratios(result)}")
    print(f"Accuracy near the prior:\n\n{table.accuracy(result)}")
    timing.write(result, timing.result_file(options, options.layout))
    return 0


if __name__ == "__main__":
    sys.exit(main())
