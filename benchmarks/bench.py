"""Measure kl_ext against its peers and against the machine: everything that docs/speed.md claims.

    python benchmarks/bench.py                         (`make bench`; half an hour on two cores)
    python benchmarks/bench.py --quick                 (`make bench-quick`; under two minutes, two sizes, few rounds)
    python benchmarks/bench.py --only ratios floor     (some of the suites)

Prints the goals and whether they are met, and writes a JSON file. What is timed and what is not stands in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

from measure import goals, scaling, suites, timing
from measure.accuracy import accuracy
from measure.machine import describe_machine
from measure.suites import KI, MI, Plan
from measure.timing import Effort
from pages import tables

try:
    from tqdm import tqdm
except ModuleNotFoundError:
    sys.exit("The benchmark needs tqdm: `make bench` installs it, or `pip install '.[bench]'`.")

RESULTS = Path(__file__).resolve().parent / "results"
# Once for each number of threads.
SUITES = {
    "overhead": suites.overhead,
    "forms": suites.forms,
    "floor": suites.floor,
    "peak": suites.peak,
    "ratios": suites.ratios,
    "compiled-step": suites.compiled_step,
    "dtypes": scaling.dtypes,
    "subnormals": scaling.subnormals,
    "linear": scaling.linear,
}
ONCE = {"threads": scaling.threads, "accuracy": accuracy}


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = [*SUITES, *ONCE]
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, few rounds; results/ is left as it is")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SUITE", help=", ".join(names))
    parser.add_argument("--sizes", type=positive, nargs="+", metavar="N", help="numbers of terms, for the suite ratios")
    parser.add_argument("--threads", type=positive, nargs="+", metavar="N", help="threads of the CPU (1 2; with --quick, 1)")
    parser.add_argument("--seconds", type=float, help="that a row may take, unless its fewest rounds take longer")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write (of everything results/cpu.json, of less none)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device; use --device cpu")
    is_everything = not options.quick and options.only == names and options.sizes is None and options.threads is None
    if options.threads is None or options.device == "cuda":
        options.threads = [1] if options.quick or options.device == "cuda" else [1, 2]
    if options.out is None and is_everything:
        options.out = RESULTS / f"{options.device}.json"
    return options


def positive(text: str) -> int:
    """An argument of the command line that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def plan_of(options: argparse.Namespace) -> Plan:
    """What to measure."""
    if options.quick:
        effort = Effort(options.seconds or 0.1, 3, 9, options.device)
        small: dict[str, Any] = {
            "sizes": [4 * KI, MI],
            "large": [MI],
            "linear": [MI, 4 * MI],
            "accuracy_elements": 16 * KI,
        }
        plan = Plan(effort, options.threads, **small, batches=[128], latents=[32])
    else:
        plan = Plan(Effort(options.seconds or 0.7, 5, 41, options.device), options.threads)
    return plan if options.sizes is None else Plan(**{**vars(plan), "sizes": options.sizes})


def measure(options: argparse.Namespace, plan: Plan) -> list[timing.Row]:
    """All rows, with a progress bar. Inductor's cache starts empty; its code is made for the number of threads of the stage."""
    stages = [(threads, {name: suite for name, suite in SUITES.items() if name in options.only}) for threads in plan.threads]
    stages.append((plan.threads[-1], {name: suite for name, suite in ONCE.items() if name in options.only}))
    rows: list[timing.Row] = []
    before = torch.get_num_threads()
    total = sum(sum(1 for _ in suite(plan)) for _, chosen in stages for suite in chosen.values())
    try:
        with fresh_cache(), tqdm(total=total, unit="case", mininterval=0, smoothing=0) as progress:
            for threads, chosen in stages:
                torch.set_num_threads(threads)
                for case in itertools.chain.from_iterable(suite(plan) for suite in chosen.values()):
                    progress.set_description(f"{case.description}, {threads} thread{'s' if threads > 1 else ''}")
                    rows += case.measure()
                    timing.free_memory()
                    progress.update()
    finally:
        torch.set_num_threads(before)
    return rows


def write(result: dict[str, Any], path: Path) -> None:
    """The result as a file, a row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = {key: ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in result[key]) for key in ("goals", "rows")}
    head = json.dumps({key: value for key, value in result.items() if key not in lists}, indent=1)
    body = "".join(f',\n "{key}": [\n  {lines}\n ]' for key, lines in lists.items())
    path.write_text(head.removesuffix("\n}") + body + "\n}\n")
    print(f"written: {path}")


def main() -> int:
    """Measure, print the tables and write the JSON file."""
    options = parse_options()
    machine = describe_machine(options.device)
    if machine["load"] > 0.5:
        print(f"Other processes keep {machine['load']:.1f} cores busy: do not trust these times.", file=sys.stderr)
    start = time.monotonic()
    rows = measure(options, plan_of(options))
    result = {
        "machine": machine,
        "options": {key: value for key, value in vars(options).items() if key != "out"},
        "seconds": round(time.monotonic() - start),
        "goals": goals.judge(rows),
        "rows": rows,
    }
    print(f"\n{tables.machine(result)}")
    for title, kind in tables.PRINTED.items():
        if text := kind(result):
            print(f"{title}\n\n{text}")
    if options.out:
        write(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
