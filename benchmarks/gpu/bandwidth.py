"""Bandwidth of every operator on a GPU, as a share of a measured copy's, and the times of plain torch and torch.compile.

    cd benchmarks && python -m gpu.bandwidth --result rows.json --seconds 120    (gpu_check.py runs it as a stage)

A size is what a call moves at the least, each argument read once and each result written once; the copy moves as much, as
float32. It is the faster of two: the driver's memcpy, which is torch's copy_, and torch's elementwise kernel that reads and
writes once. Calls are captured in a CUDA graph, so that launches cost the contenders alike, over several sets of random numbers
in turn (L2: over one set), and the graph's replays are timed by device events, a replay of each contender in turn. A time is a
median; a share or a ratio is the median of each round's own. `called_us` is a call from Python, launches and all. torch.compile
is measured with its own graphs off (max-autotune-no-cudagraphs): it is in a graph already. Its backward is a function of the
same tensors as kl_ext's; that of plain torch is what autograd does after the forward. What there is no time to compile has no
number.
"""

from __future__ import annotations

import argparse
import collections
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import cases
from .cases import Case

MIB = 2**20
SIZES = {"1 GiB": 1024 * MIB, "L2": 16 * MIB, "256 MiB": 256 * MIB}  # in the order of their weight
DRY_SIZES = {"1 GiB": MIB, "L2": MIB // 16, "256 MiB": MIB // 4}
COPIES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "memcpy": lambda to, of: to.copy_(of),
    "copy kernel": lambda to, of: torch.neg(of, out=to),
}
MODES = {"torch.compile": None, "max-autotune": "max-autotune-no-cudagraphs"}
Row = tuple[str, str, Case]  # dtype, size, case


def rows() -> list[Row]:
    """In order of weight."""
    return list(itertools.product(cases.DTYPES, SIZES, cases.cases()))


def key(row: Row) -> str:
    dtype, size, case = row
    return f"{case.name}, {dtype}, {size}"


class Bench:
    """Times contenders on one device."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.sizes = SIZES if device == "cuda" else DRY_SIZES
        self.stream = torch.cuda.Stream() if device == "cuda" else None

    def sets_and_repeats(self, size: str) -> tuple[int, int]:
        """How many sets of tensors take turns, and how often the turn comes round in a graph: a millisecond, or half."""
        if self.device == "cpu":
            return 1, 1
        return {"L2": (1, 200), "256 MiB": (3, 4), "1 GiB": (2, 1)}[size]

    def graph(self, calls: list[Callable[[], Any]], repeats: int) -> Callable[[], Any]:
        """All calls in turn, as one graph; the results of a turn live until the next, so that they lie apart."""
        results: collections.deque[Any] = collections.deque(maxlen=max(1, len(calls) - 1))

        def run() -> None:
            for _ in range(repeats):
                for call in calls:
                    results.append(call())

        if self.stream is None:
            return run
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            run()  # compiles, loads, allocates
        torch.cuda.synchronize()
        results.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):  # torch.cuda.graph collects garbage first, which takes longer than all of this
            gc.disable()
            graph.capture_begin()
            try:
                run()
            finally:
                graph.capture_end()
                gc.enable()
        return graph.replay

    def times(self, contenders: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Microseconds of each round, the contenders in turn."""
        order = list(contenders)
        events: dict[str, list[Any]] = {name: [] for name in order}
        for _ in range(self.rounds):
            for name in order:
                events[name].append(self.one(contenders[name]))
            order.append(order.pop(0))
        if self.stream is None:
            return events
        torch.cuda.synchronize()
        return {name: [1e3 * start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}

    def one(self, call: Callable[[], Any]) -> Any:
        if self.stream is None:
            start = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - start)
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda._sleep(200_000)  # while the device waits, the host puts all of this in its queue
        pair[0].record()
        call()
        pair[1].record()
        return pair

    def called(self, call: Callable[[], Any], calls: int = 200) -> float:
        """Microseconds of a call from Python."""
        calls = calls if self.device == "cuda" else 2
        samples = []
        for _ in range(5):
            if self.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            if self.device == "cuda":
                torch.cuda.synchronize()
            samples.append(1e6 * (time.perf_counter() - start) / calls)
        return statistics.median(samples)

    def measure(self, row: Row, others: list[str], copies: bool = True) -> dict[str, Any]:
        """kl_ext, the other contenders and, of a row that has none yet, the copies."""
        dtype, size, case = row
        kind = cases.DTYPES[dtype]
        batch = case.batch(self.sizes[size], kind.itemsize)
        moved = case.bytes(batch, kind.itemsize)
        count, repeats = self.sets_and_repeats(size)
        sets = [case.fresh(batch, kind, self.device) for _ in range(count)]
        own = case.own()
        calls: dict[str, list[Callable[[], Any]]] = {"kl_ext": [lambda x=x: own(*x) for x in sets]}
        if copies:
            pairs = [[torch.randn(moved // 8, device=self.device) for _ in range(2)] for _ in range(count)]
            for name, copy in COPIES.items():
                calls[name] = [lambda to=to, of=of, copy=copy: copy(to, of) for to, of in pairs]
        for name in others:
            calls[name] = self.contender(name, case, sets)
        graphs = {name: self.graph(of_name, repeats) for name, of_name in calls.items()}
        for graph in graphs.values():
            graph()
        times = self.times(graphs)
        result: dict[str, Any] = {**self.facts(row), "bytes": moved, "calls": count * repeats}
        for name, samples in times.items():
            low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
            ratio = statistics.median(a / b for a, b in zip(samples, times["kl_ext"], strict=True))
            each = {"us": middle, "quartiles_us": [low, high], "ratio": ratio}
            each = {part: value if part == "ratio" else scaled(value, count * repeats) for part, value in each.items()}
            if size == "L2" and name not in COPIES:
                each["called_us"] = self.called(calls[name][0])
            result[name] = each
        if copies:
            faster = min(COPIES, key=lambda name: result[name]["us"])
            result["copy"] = {**result[faster], "by": faster}
            copied = 2 * (moved // 8) * 4
            result["share_of_copy"] = result["copy"]["ratio"] * moved / copied
        result["gb_per_s"] = moved / result["kl_ext"]["us"] / 1e3
        return result

    def contender(self, name: str, case: Case, sets: list[list[torch.Tensor]]) -> list[Callable[[], Any]]:
        if name == "plain torch":
            if self.stream is None:
                return [case.eager(x) for x in sets]
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # a backward runs where its forward ran
                return [case.eager(x) for x in sets]
        compiled = self.compiled(case, MODES[name])
        for x in sets[:1]:
            compiled(*x)
        return [lambda x=x: compiled(*x) for x in sets]

    def compiled(self, case: Case, mode: str | None) -> Callable[..., Any]:
        """For the very shapes; on the CPU, where this is a dry run, traced and no more."""
        how: dict[str, Any] = {"mode": mode} if self.device == "cuda" else {"backend": "eager"}
        return torch.compile(case.plain(), dynamic=False, fullgraph=True, **how)

    def facts(self, row: Row) -> dict[str, Any]:
        dtype, size, case = row
        about = {"case": case.name, "operator": case.operator, "reduction": case.reduction, "q": case.q}
        return {**about, "direction": case.direction, "is_reduction": case.is_reduction, "dtype": dtype, "size": size}


def scaled(value: Any, calls: int) -> Any:
    return [x / calls for x in value] if isinstance(value, list) else value / calls


def precompile(part: int, parts: int, bench: Bench, deadline: float) -> None:
    """Fills torch.compile's cache with a share of what will be measured."""
    for row in rows()[part::parts]:
        if time.monotonic() > deadline:
            return
        dtype, size, case = row
        kind = cases.DTYPES[dtype]
        tensors = case.fresh(case.batch(bench.sizes[size], kind.itemsize), kind, bench.device)
        bench.compiled(case, MODES["torch.compile"])(*tensors)
        del tensors
        torch.compiler.reset()


def work(bench: Bench, seconds: float, limit: int | None, write: Callable[[dict[str, Any]], None]) -> None:
    """All rows with plain torch; then as many as there is time for with torch.compile, by weight, a few with max-autotune."""
    start = time.monotonic()
    found: dict[str, dict[str, Any]] = {}

    def passes() -> Iterator[tuple[Row, str, float]]:
        for row in rows()[:limit]:
            yield row, "plain torch", 0.5
        share = 0.9 if bench.device == "cuda" else 1.0
        if bench.device == "cuda":
            in_parallel(time.monotonic() + 0.3 * (start + seconds - time.monotonic()))
        for row in rows()[: 1 if limit else None]:
            yield row, "torch.compile", share
        for row in rows()[: 1 if limit else None]:
            if row[2].q != "full" or row[2].operator == "kl_div_pair_loss":
                yield row, "max-autotune", 1.0

    for row, other, share in passes():
        if time.monotonic() - start > share * seconds:
            continue
        try:
            measured = bench.measure(row, [other], copies=key(row) not in found)
        except Exception as problem:  # one contender's trouble is no other's
            if other == "plain torch" and not isinstance(problem, torch.OutOfMemoryError):
                raise
            found.setdefault(key(row), bench.facts(row)).setdefault("problems", {})[other] = str(problem)[:300]
        else:
            kept = found.setdefault(key(row), measured)
            kept[other] = {**measured[other], "kl_ext_us": measured["kl_ext"]["us"]}
        if other != "plain torch":
            torch.compiler.reset()
        if bench.device == "cuda":
            torch.cuda.empty_cache()
        write({"rows": list(found.values()), "of": len(rows()[:limit]), "seconds": time.monotonic() - start})


def in_parallel(deadline: float) -> None:
    """Compiles in other processes, one for every second core and 8 at most."""
    parts = min(8, max(1, (os.cpu_count() or 1) // 2))
    command = [sys.executable, "-m", "gpu.bandwidth", "--seconds", str(deadline - time.monotonic()), "--precompile"]
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    workers = [subprocess.Popen([*command, f"{part}/{parts}"], env=environment) for part in range(parts)]
    for worker in workers:
        try:
            worker.wait(max(1.0, deadline - time.monotonic() + 5))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--result", type=Path, help="JSON file, written again after each row")
    parser.add_argument("--seconds", type=float, default=120.0, help="what torch.compile must fit in (%(default)s)")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--rows", type=int, help="only the first so many")
    parser.add_argument("--precompile", metavar="I/N", help=argparse.SUPPRESS)
    options = parser.parse_args()
    bench = Bench(options.device, options.rounds)
    if options.precompile:
        part, parts = map(int, options.precompile.split("/"))
        precompile(part, parts, bench, time.monotonic() + options.seconds)
        return 0

    def write(result: dict[str, Any]) -> None:
        if options.result:
            options.result.with_suffix(".tmp").write_text(json.dumps(result, indent=1))
            options.result.with_suffix(".tmp").replace(options.result)

    work(bench, options.seconds, options.rows, write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
