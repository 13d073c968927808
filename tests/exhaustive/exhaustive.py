"""Hold the formulas of csrc/math to their bounds on every input there is, or on billions: `make test-exhaustive`.

Every float32 of what has one input, every pair of log-variances of what is stored in 16 bits, and for float32 pairs a search
that climbs from random points. search.cpp does the work; the worst points it prints are judged again here, with mpmath.
Writes docs/reports/exhaustive.md. ARGS="--only climb --seed 7 --points 1000000000" runs a part and writes nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("search.cpp")
REPORT = ROOT / "docs" / "reports" / "exhaustive.md"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]


import numpy  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import normal_cases  # noqa: E402
import oracle  # noqa: E402
from compiled_kernels import FLAGS, VECTORS  # noqa: E402
from reports import write_report  # noqa: E402

ALL = 1 << 32
LEAST_POINTS = 10**10  # of a climb


class Piece(NamedTuple):
    """What search.cpp does in one run, and the bounds of what it measures, in ulps of `dtype`."""

    name: str
    kind: str
    bounds: dict[str, float]
    dtype: torch.dtype = torch.float32
    clamp: tuple[float, float] = (-30.0, 20.0)
    mean: float = 0.0
    points: int = ALL


class Worst(NamedTuple):
    """The worst result for one quantity: its error in ulps, itself, and the inputs in the order of the operators."""

    error: float
    got: float
    inputs: tuple[float, ...]


SINGLE = {"value": oracle.SINGLE, "gradient": oracle.GRADIENT}
PAIR = {
    "value": oracle.PAIR,
    "gradient of means": oracle.GRADIENT,
    "gradient of log_var_p": oracle.GRADIENT,
    "gradient of log_var_q": oracle.LOG_VAR_Q,
}
HALF = dict.fromkeys(PAIR, oracle.NARROWED)
RATIO = {
    "value": normal_cases.VALUE,
    "gradient of scale_p": normal_cases.SCALE_P,
    "gradient of scale_q": normal_cases.SCALE_Q_ITSELF,
}
PIECES = [
    Piece("single loss, clamped to ±43", "single", SINGLE, clamp=(-43.0, 43.0)),
    Piece("single loss, not clamped", "single", SINGLE, clamp=(-math.inf, math.inf)),
    Piece(
        "normal_kl_div against N(0, 1)",
        "standard",
        {"value": normal_cases.STANDARD, "gradient": normal_cases.STANDARD_SCALE},
    ),
    Piece("normal_kl_div, scale_q = 1", "ratio", RATIO),
    Piece("gaussian_kl_div of bfloat16, equal means", "bfloat16", HALF, torch.bfloat16),
    Piece("gaussian_kl_div of float16, equal means", "float16", HALF, torch.float16),
    Piece("gaussian_kl_div of float32", "climb", PAIR, points=LEAST_POINTS),
]


def build(program: Path, sources: Path = ROOT / "csrc") -> Path:
    program.parent.mkdir(parents=True, exist_ok=True)
    vectors = VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])
    command = [os.environ.get("CXX", "g++"), *FLAGS, *vectors, "-pthread", "-I", sources, SOURCE, "-o", program]
    subprocess.run(command, check=True)
    return program


def search(
    program: Path,
    piece: Piece,
    *,
    seed: int = 1,
    threads: int = 2,
    first: int = 0,
    points: int | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> tuple[int, dict[str, Worst]]:
    """How many points were evaluated, and the worst result of each quantity."""
    numbers = *piece.clamp, piece.mean, first, piece.points if points is None else points, seed, threads
    with subprocess.Popen([program, piece.kind, *map(str, numbers)], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        done, worst = 0, []
        for line in run.stdout:
            what, *fields = line.split()
            if what == "done":
                done = int(fields[0])
                progress(done)
            else:
                error, got, *inputs = map(float.fromhex, fields)
                worst.append(Worst(error, got, tuple(inputs)))
    if run.returncode != 0:
        raise subprocess.CalledProcessError(run.returncode, run.args)
    return done, dict(zip(piece.bounds, worst, strict=True))


def exact_error(piece: Piece, quantity: str, worst: Worst) -> float:
    """The error of a result by mpmath; where no finite error was found, or the inputs are not finite, what the search says."""
    if not math.isfinite(worst.error) or not all(map(math.isfinite, worst.inputs)):
        return worst.error
    mu_p, p, mu_q, _ = worst.inputs
    if piece.kind in ("standard", "ratio"):
        if p <= 0:
            return worst.error
        exact, factor = oracle.exact_array(normal_cases.exact_normal, [(mu_p, p, mu_q, 1.0)]), 1
    else:
        # The documented pair's gradients are twice those of the divergence, as t is twice the divergence.
        exact, factor = oracle.exact_array(oracle.exact_pair, [worst.inputs], *piece.clamp), 2
    # The quantity's place among all, and then among the gradients of mu_p, p, mu_q and q.
    place = {"value": None, "gradient of means": 0, "gradient of log_var_q": 3, "gradient of scale_q": 3}.get(quantity, 1)
    want, scale = (exact.t, exact.t) if place is None else (exact.gradients[place], exact.scales[place])
    if piece.dtype != torch.float32:
        scale = numpy.maximum(scale, numpy.abs(want))
    return float(oracle.ulp_error(torch.tensor([worst.got], dtype=piece.dtype), want / factor, scale / factor)[0])


def judged(piece: Piece, found: dict[str, Worst]) -> dict[str, Worst]:
    """The worst results with their errors by mpmath, which those of the search must agree with."""
    result = {}
    for quantity, worst in found.items():
        error = exact_error(piece, quantity, worst)
        if not abs(error - worst.error) <= 1e-5 and error != worst.error:
            raise AssertionError(f"{piece.name}, {quantity}: {worst} is {error} ulp off by mpmath")
        result[quantity] = worst._replace(error=error)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a kind: " + ", ".join(dict.fromkeys(piece.kind for piece in PIECES)))
    parser.add_argument("--seed", type=int, help="of the searches; a new one each time unless given")
    parser.add_argument("--points", type=int, help="how many of each kind, from the first on")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    seed = secrets.randbelow(10**6) if arguments.seed is None else arguments.seed
    pieces = [piece for piece in PIECES if arguments.only in (None, piece.kind)]
    if arguments.points is not None:
        pieces = [piece._replace(points=arguments.points) for piece in pieces]
    program = build(ROOT / "build" / "exhaustive" / "search")
    rows, failed, began, worst = [], False, time.monotonic(), 0.0
    with tqdm(total=sum(piece.points for piece in pieces), unit="points", unit_scale=True, smoothing=0) as bar:
        before = 0
        for piece in pieces:
            bar.set_description(piece.name)
            done, found = search(
                program,
                piece,
                seed=seed,
                threads=arguments.threads,
                progress=lambda done: bar.update(before + done - bar.n),  # noqa: B023
            )
            before += done
            for quantity, (error, _, inputs) in judged(piece, found).items():
                bound = piece.bounds[quantity]
                wrong = not error <= bound
                failed, worst = failed or wrong, max(worst, error / bound)
                at = ", ".join(float.hex(x) for x in inputs)
                tqdm.write(
                    f"{piece.name}: {quantity} {error:.4f} of {bound} ulp at {at}{', BEYOND ITS BOUND' if wrong else ''}"
                )
                rows.append([piece.name, f"{done:,}", quantity, f"{error:.4f}", f"{bound:g}", f"`{at}`"])
    if pieces == PIECES:
        text = (
            f"The largest errors in ulps, of the results' dtype, and where: mu_p, log_var_p or scale_p, mu_q, log_var_q or "
            f"scale_q.\nThe searches began at random points of seed {seed}; all else is every input there is. "
            f"{(time.monotonic() - began) / 60:.0f} minutes."
        )
        head = ["what", "points", "of", "error", "bound", "at"]
        found = f"no error above {worst:.0%} of its bound"
        write_report(REPORT, "make test-exhaustive", "tests/exhaustive/exhaustive.py", found, text, head, rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
