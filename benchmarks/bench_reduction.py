"""Time gaussian_kl_div against the divergence and its reduction in plain torch, and against torch.compile of that.

    python benchmarks/bench_reduction.py            (`make bench` runs this too; an hour or two, see --help to choose)
    python benchmarks/bench_reduction.py --quick    (two widths, one size, few rounds)

A row is the forward and the backward pass for terms of shape [B, D]: one reduction, one D, contiguous arguments or the halves
of an encoder's output, against the standard normal or a learned prior of shape [D], which gets its gradients too. The machinery
is that of bench_losses.py: contenders in turn in this process, medians of the rounds and of each round's own ratio.

torch.compile compiles for each reduction, width, layout and prior, with B dynamic and D fixed, as a network has them; the
sizes of a case share what it made, unless it chose to make another for a larger B. Compiling is not timed, but takes some ten
seconds a case, so that by default only the widths 64 and 8192 have this contender: `--compiled all` gives it to every row,
`--compiled none` to no row.
"""

from __future__ import annotations

import argparse
import itertools
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

REDUCTIONS: dict[str, dict[str, Any]] = {
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "mean": {"reduction": "mean"},
    "batchmean": {"reduction": "batchmean"},
    "sum over 1": {"reduction": "sum", "dim": 1},
    "sum over 0": {"reduction": "sum", "dim": 0},
}
SIZES, QUICK_SIZES = [1 << 12, 1 << 16, 1 << 20, 1 << 24], [1 << 12]  # numbers of terms
WIDTHS, QUICK_WIDTHS = [2, 16, 64, 512, 8192], [2, 64]
PRIORS = ["standard", "learned"]
COMPILED_WIDTHS = [64, 8192]  # that torch.compile takes part in by default


def contender(name: str, how: dict[str, Any], layout: str) -> Timed:
    """A function of leaf tensors to time: mu and log_var or both in one, and those of the prior if there is one."""
    function = timing.formulas(name).gaussian_kl_div

    def loss(leaves: list[Tensor]) -> Tensor:
        p = 1 if layout == "chunk" else 2
        encoded = timing.halves(leaves[:p]) if layout == "chunk" else leaves[:p]
        reduced: Tensor = function(*encoded, *leaves[p:], **how)
        return reduced.sum() if reduced.dim() > 0 else reduced  # autograd starts from a scalar

    return timing.gradients_of(torch.compile(loss) if name == "torch.compile" else loss)


def fresh(width: int, layout: str, prior: str, size: int, options: argparse.Namespace) -> list[Tensor]:
    """Leaves for terms of shape [size / width, width]."""
    shapes = [[size // width, 2 * width]] if layout == "chunk" else [[size // width, width]] * 2
    leaves = [timing.leaf(shape, options) for shape in shapes]
    for leaf in leaves:
        torch._dynamo.maybe_mark_dynamic(leaf, 0)  # the batch: not compiled for one size
    return leaves + [timing.leaf([width], options) for _ in range(2 if prior == "learned" else 0)]


def measure_case(
    reduction: str, width: int, layout: str, prior: str, options: argparse.Namespace, progress: Any
) -> list[dict[str, Any]]:
    """A row for each size that is a number of whole rows."""
    compiled = options.compiled == "all" or (options.compiled == "some" and width in COMPILED_WIDTHS)
    names = [name for name in CONTENDERS if name != "torch.compile" or compiled]
    functions = {name: contender(name, REDUCTIONS[reduction], layout) for name in names}
    if layout == "chunk":
        functions[timing.CHUNK] = lambda leaves: timing.concatenate(leaves[:1])
    rows = []
    for size in sizes_of(width, options):
        progress.set_description(f"{reduction}, D = {width}, {layout}, {prior}, {size}")
        leaves = fresh(width, layout, prior, size, options)
        row = {"reduction": reduction, "width": width, "layout": layout, "prior": prior, "elements": size}
        rows.append({**row, **timing.time_in_turn(functions, leaves, options.rounds)})
        progress.update()
    timing.free_memory()
    return rows


def sizes_of(width: int, options: argparse.Namespace) -> list[int]:
    """Of the sizes, those that make rows of this width; the batch has at least two."""
    return [size for size in options.sizes if size % width == 0 and size >= 2 * width]


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = timing.parser_of(__doc__)
    choices = {"reductions": list(REDUCTIONS), "layouts": timing.LAYOUTS, "priors": PRIORS}
    for option, values in choices.items():
        parser.add_argument(f"--{option}", nargs="+", choices=values, default=values, help="all of them by default")
    parser.add_argument("--widths", type=timing.positive, nargs="+", metavar="D", help="sizes of the latent dimension")
    parser.add_argument(
        "--compiled",
        choices=["all", "some", "none"],
        help="the rows that torch.compile takes part in; some: those with D 64 and 8192 (some; with --quick, none)",
    )
    options = timing.parse(parser, 7, SIZES, QUICK_SIZES)
    options.widths = options.widths or (QUICK_WIDTHS if options.quick else WIDTHS)
    options.compiled = options.compiled or ("none" if options.quick else "some")
    if not any(sizes_of(width, options) for width in options.widths):
        parser.error("--sizes: none of them makes two or more rows of one of the --widths")
    return options


def main() -> int:
    """Measure, print the tables and write the JSON file."""
    options = parse_options()
    cases = list(itertools.product(options.reductions, options.widths, options.layouts, options.priors))
    result = timing.begin(options)
    with tqdm(total=sum(len(sizes_of(width, options)) for _, width, _, _ in cases), unit="row", mininterval=0) as progress:
        for case in cases:
            result["speed"] += measure_case(*case, options, progress)

    print(f"\n{table.machine(result)}")
    print(f"Time of forward and backward in microseconds:\n\n{table.reduction_times(result)}")
    print(
        "Time of plain torch / torch.compile, in times of kl_ext (above 1: kl_ext is faster); medians over sizes and layouts:"
    )
    print(f"\n{table.reduction_ratios(result)}")
    print(table.reduction_losses(result))
    timing.write(result, timing.result_file(options, "reduction"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
