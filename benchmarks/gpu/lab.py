"""The variants of csrc/cuda/tuning.h, timed side by side: gpu_check.py --lab. csrc/cuda/README.md says what each decides.

Each variant is the kernels, built with other numbers (-D) for the GPU that is there. Calls are captured in CUDA graphs,
and the variants take turns. All must give the same bits. A dry run builds some of them under the emulation of CUDA, on the CPU.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .context import BENCHMARKS, ROOT, Context, Found, program, save

DTYPES = [torch.float16, torch.bfloat16, torch.float32]  # in the order of csrc/cuda/kernels.h
COLUMNS = 512
SIZES = {"1 MiB": 2**20, "16 MiB": 2**24, "256 MiB": 2**28}  # of all tensors of the size of the terms
CALLS = 20  # in a graph
ROUNDS = 15


def threads(power: int) -> str:
    return f"(std::int64_t{{1}}<<{power})"


VARIANTS = {
    "as it is": [],
    "no sharing": ["-DKL_EXT_MOST_SHARERS=1"],
    "4 to a lane": ["-DKL_EXT_MOST_SHARERS=4"],
    "2^16 threads": [f"-DKL_EXT_SHARING_THREADS={threads(16)}"],
    "2^18 threads": [f"-DKL_EXT_SHARING_THREADS={threads(18)}"],
    "2 beside each other": ["-DKL_EXT_WIDTH_OF_PARTS=2"],
    "32 beside each other": ["-DKL_EXT_WIDTH_OF_PARTS=32"],
    "q never prepared": [f"-DKL_EXT_PREPARING_THREADS={threads(62)}"],
    "q prepared for 2 rows": ["-DKL_EXT_PREPARING_ROWS=2"],
    "q prepared for 16 rows": ["-DKL_EXT_PREPARING_ROWS=16"],
    "small blocks to 2^18": [f"-DKL_EXT_FEW_THREADS={threads(18)}", f"-DKL_EXT_SHARING_THREADS={threads(17)}"],
    "launches overlap at the end": ["-DKL_EXT_OVERLAP=1"],
    "launches overlap": ["-DKL_EXT_OVERLAP=2"],
    "128 elementwise threads": ["-DKL_EXT_ELEMENTWISE_THREADS=128"],
    "512 elementwise threads": ["-DKL_EXT_ELEMENTWISE_THREADS=512"],
    "2 elementwise vectors": ["-DKL_EXT_ELEMENTWISE_VECTORS=2"],
    "2 elementwise vectors, 80 registers": ["-DKL_EXT_ELEMENTWISE_VECTORS=2", "-DKL_EXT_BLOCKS_PER_PROCESSOR=3"],
    "32 elementwise registers": ["-DKL_EXT_BLOCKS_PER_PROCESSOR=8"],
    "48 elementwise registers": ["-DKL_EXT_BLOCKS_PER_PROCESSOR=5"],
}
OF_DRY_RUN = ["as it is", "no sharing", "2 elementwise vectors"]


@dataclass(frozen=True)
class Case:
    """Terms [B, 512], or sums of them."""

    name: str
    inputs: int = 2
    is_prior: bool = False
    over: tuple[bool, bool] = (True, True)  # rows, columns; neither: elementwise
    backward: bool = False

    @property
    def full_inputs(self) -> int:
        return 2 if self.is_prior else self.inputs

    @property
    def full_outputs(self) -> int:
        if any(self.over):
            return self.full_inputs * self.backward
        return 1 + self.full_inputs if self.backward else 1  # with grad_output

    def rows(self, total: int, itemsize: int) -> int:
        return max(2, total // ((self.full_inputs + self.full_outputs) * itemsize * COLUMNS))


CASES = [
    Case("full sum, N(0, 1)"),
    Case("full sum, full q", inputs=4),
    Case("full sum, [D] prior", inputs=4, is_prior=True),
    Case("sum over dimension 1", over=(False, True)),
    Case("sum over dimension 1, [D] prior", inputs=4, is_prior=True, over=(False, True)),
    Case("sum over dimension 0", over=(True, False)),
    Case("gradients, [D] prior", inputs=4, is_prior=True, over=(True, False), backward=True),
    Case("elementwise, N(0, 1)", over=(False, False)),
    Case("elementwise, full q", inputs=4, over=(False, False)),
    Case("elementwise gradients, full q", inputs=4, over=(False, False), backward=True),
]


def can_run(flags: Sequence[str]) -> bool:
    """Whether the GPU has what the variant takes."""
    return torch.cuda.get_device_capability() >= (9, 0) or not any("OVERLAP" in flag for flag in flags)


def command(out: Path, flags: Sequence[str], dry_run: bool) -> list[str]:
    """What builds a variant."""
    source = BENCHMARKS / "gpu/lab.cu"
    if dry_run:
        emulation = ROOT / "tests/cuda/cuda_emulation"
        emulated = [
            "-std=c++20",
            "-O1",
            "-ffp-contract=off",
            "-fno-strict-aliasing",
            "-include",
            str(emulation / "emulation.h"),
        ]
        sources = ["-x", "c++", str(source), str(emulation / "emulation.cpp")]
        return ["g++", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", *emulated, *flags, *sources, "-o", str(out)]
    capability = "{}{}".format(*torch.cuda.get_device_capability())
    options = ["-std=c++20", "-O3", "-fmad=false", f"-arch=sm_{capability}", "-Xcompiler=-fPIC,-ffp-contract=off"]
    return [
        program("nvcc") or "nvcc",
        "-shared",
        "-cudart=shared",
        f"-I{ROOT / 'csrc'}",
        *options,
        *flags,
        str(source),
        "-o",
        str(out),
    ]


def build(folder: Path, names: Sequence[str], dry_run: bool) -> dict[str, ctypes.CDLL]:
    """The libraries of the variants."""

    def one(index: int) -> ctypes.CDLL:
        out = folder / f"lab_{index}.so"
        subprocess.run(command(out, VARIANTS[names[index]], dry_run), check=True)
        library = ctypes.CDLL(str(out))
        library.lab_sum.restype = library.lab_each.restype = ctypes.c_int64
        return library

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(one, range(len(names)))))


class Call:
    """A case's tensors, and what a variant computes of them."""

    def __init__(self, case: Case, dtype: torch.dtype, rows: int, device: str):
        self.case, self.dtype, self.rows, self.device = case, dtype, rows, device
        generator = torch.Generator().manual_seed(0)
        shapes = [[COLUMNS] if case.is_prior and i >= 2 else [rows, COLUMNS] for i in range(case.inputs)]
        inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        is_sum = any(case.over)
        kept = [size for size, reduced in zip([rows, COLUMNS], case.over) if not reduced]
        outputs = case.full_inputs if case.backward else 1 - is_sum
        full = [torch.empty(rows, COLUMNS, dtype=dtype, device=device) for _ in range(outputs)]
        grad_output = torch.ones([] if is_sum else [rows, COLUMNS], dtype=dtype, device=device)
        self.sums = [torch.empty(kept, device=device) for _ in range(is_sum * (1 + case.backward))]
        self.results = [*full, *self.sums]
        self.data = [*full, *[grad_output] * case.backward, *inputs]

    def run(self, library: ctypes.CDLL, scratch: Tensor | None) -> int:
        """The numbers of scratch that it takes. Without scratch nothing is computed."""
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream if self.device == "cuda" else None)
        data, sums = ((ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors)) for tensors in (self.data, self.sums))
        sizes = ctypes.c_int64(self.rows), ctypes.c_int64(COLUMNS)
        place = None if scratch is None else ctypes.c_void_p(scratch.data_ptr())
        case, number = self.case, DTYPES.index(self.dtype)
        if not self.sums:
            return library.lab_each(case.backward, case.inputs, number, *sizes, data, place, stream)
        of = (case.backward, case.inputs, case.is_prior, number, *sizes, *case.over)
        return library.lab_sum(*of, data, sums, place, stream)

    def prepared(self, library: ctypes.CDLL) -> Callable[[], None]:
        """What runs it CALLS times, or once on the CPU."""
        scratch = torch.empty(max(1, self.run(library, None)), device=self.device)
        if self.device == "cpu":
            return lambda: self.run(library, scratch) and None
        self.run(library, scratch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                self.run(library, scratch)
        keep = scratch  # for as long as the graph

        def replay(_: Tensor = keep) -> None:
            graph.replay()

        return replay


def microseconds(run: Callable[[], None], device: str) -> float:
    """Of a call."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / CALLS


def measured(call: Call, libraries: dict[str, ctypes.CDLL]) -> Found:
    """The median time with each variant, and which give other bits than the first."""
    runs = {name: call.prepared(library) for name, library in libraries.items()}
    bits: dict[str, list[Tensor]] = {}
    for name, run in runs.items():
        for result in call.results:
            result.fill_(float("nan"))
        run()
        bits[name] = [x.view(torch.int16 if x.element_size() == 2 else torch.int32).clone() for x in call.results]
    first = next(iter(bits.values()))
    wrong = [name for name, other in bits.items() if not all(map(torch.equal, first, other))]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(2 if call.device == "cpu" else ROUNDS):
        names = list(runs)
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            times[name].append(microseconds(runs[name], call.device))
    return {"us": {name: round(statistics.median(t), 2) for name, t in times.items()}, "wrong": wrong}


def calls(context: Context) -> Iterator[tuple[str, Call]]:
    for size, total in {"small": 2**17}.items() if context.dry_run else SIZES.items():
        for dtype in [torch.float32, torch.bfloat16]:
            for case in CASES:
                rows = case.rows(total, dtype.itemsize)
                yield size, Call(case, dtype, rows, context.device)


def lab(context: Context) -> Found:
    end = time.monotonic() + context.seconds - 15
    names = OF_DRY_RUN if context.dry_run else [name for name, flags in VARIANTS.items() if can_run(flags)]
    libraries = build(context.folder, names, context.dry_run)
    rows: list[dict[str, Any]] = []
    found: Found = {"status": "partial", "variants": {name: VARIANTS[name] for name in names}, "rows": rows}
    for size, call in calls(context):
        if time.monotonic() > end:
            return found
        row = {"case": call.case.name, "dtype": str(call.dtype).removeprefix("torch."), "size": size}
        rows.append({**row, **measured(call, libraries)})
        print(rows[-1], flush=True)
        save(context, found)
    wrong = [f"other bits: {name}, {row['case']}, {row['dtype']}, {row['size']}" for row in rows for name in row["wrong"]]
    return {**found, "status": "failed" if wrong else "passed", "problems": wrong}
