"""The emulation of CUDA finds what is wrong in a kernel: faults in kernels of its own, and in copies of the real ones."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from emulated_checks import check_sum, finish_sums
from emulated_kernels import (
    EMULATION,
    ORDERS,
    PLAIN_ENVIRONMENT,
    ROOT,
    Emulated,
    KernelFault,
    compile_emulated,
    instances,
    link_emulated,
    objects,
)

FAULTS = EMULATION / "faults.cu"


def marked_lines(mark: str) -> dict[str, int]:
    """The kernels of faults.cu with a line marked so, and its number."""
    lines: dict[str, int] = {}
    for number, line in enumerate(FAULTS.read_text().splitlines(), 1):
        if kernel := re.match(r"__global__ void (\w+)\(", line):
            name = kernel[1]
        if line.endswith(f"// {mark}"):
            lines[name] = number
    return lines


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[bool, Path]:
    """faults.cu, compiled without and with sanitizers."""
    built = {}
    for sanitize in (False, True):
        folder = tmp_path_factory.mktemp("faults")
        compiled = compile_emulated([FAULTS, EMULATION / "emulation.cpp"], folder, sanitize)
        built[sanitize] = link_emulated(compiled, folder / "faults", sanitize, shared=False)
    return built


def run_kernel(program: Path, kernel: str, order: str, rng) -> subprocess.CompletedProcess[str]:
    command = [str(program), kernel, str(ORDERS.index(order)), str(rng.integers(2**31))]
    environment = {**PLAIN_ENVIRONMENT, "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
@pytest.mark.parametrize("order", ORDERS)
def test_every_planted_fault_is_found(programs, rng, order, sanitize):
    """With the kernel's name and the line; races, uninitialised and out-of-range reads, divergence: see faults.cu."""
    faults = marked_lines("FAULT")
    assert len(faults) == 20
    for kernel, line in faults.items():
        run = run_kernel(programs[sanitize], kernel, order, rng)
        assert run.returncode == 2, f"{kernel}: {run.returncode}\n{run.stdout}{run.stderr}"
        assert f"faults.cu:{line}" in run.stderr and f"of faults::{kernel}" in run.stderr, run.stderr
        assert re.search(r"in block \d+, thread \d+ of", run.stderr)


@pytest.mark.parametrize("order", ORDERS)
def test_what_lies_outside_shared_memory_is_left_to_the_sanitizers(programs, rng, order):
    faults = marked_lines("SANITIZED")
    assert len(faults) == 4
    for kernel, line in faults.items():
        run = run_kernel(programs[True], kernel, order, rng)
        assert run.returncode not in (0, 2), f"{kernel}: {run.stdout}"
        assert f"faults.cu:{line}" in run.stderr and f"faults::{kernel}(" in run.stderr, run.stderr


@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_kernel_without_a_fault_runs(programs, rng, order, sanitize):
    run = run_kernel(programs[sanitize], "nothing", order, rng)
    assert run.returncode == 0 and run.stdout.split() == [str(sum(range(64)))] * 3 * 64, run.stderr


def sum_terms(emulated: Emulated) -> None:
    check_sum(emulated, [*torch.randn(2, 1030, 16)], [0])
    check_sum(emulated, [*torch.randn(2, 66 * 1024)], [0])


def sum_few_terms(emulated: Emulated) -> None:
    """So few that threads share lanes. Some rows have terms in one lane only, whose order is then seen in the sum."""
    emulated.set_few_threads(2**17)
    inputs = torch.randn(2, 8, 1000)
    inputs[:, 2:][..., torch.arange(1000) % 64 != 5] = 0
    check_sum(emulated, [*inputs], [1])
    check_sum(emulated, [*torch.randn(2, 3, 999)], [1])  # 8 threads to a lane, twice
    check_sum(emulated, [*torch.randn(2, 1000, 8)], [0])
    check_sum(emulated, [*torch.randn(2, 1100, 8)], [0])  # parts of lanes


def sum_given_q(emulated: Emulated) -> None:
    emulated.set_prepares_q(True)
    check_sum(emulated, [*torch.randn(2, 1030, 16), *torch.randn(2, 16)], [0])
    check_sum(emulated, [*torch.randn(2, 300, 32), *torch.randn(2, 32)], [0, 1])
    check_sum(emulated, [*torch.randn(2, 300, 64)[..., :32], *torch.randn(2, 300, 32)], [0, 1])  # each row has its own


def sum_what_is_left(emulated: Emulated) -> None:
    finish_sums(emulated, torch.randn(64 * 1024, 1), True, torch.empty(1))


class Change(NamedTuple):
    file: str  # of csrc/cuda
    pattern: str
    replacement: str
    said: str  # of the fault
    which: int = 0  # of the matches
    is_shared: bool = False  # whether it is where threads share lanes
    is_given_q: bool = False  # whether it is where terms share q

    @property
    def compiled(self) -> tuple[str, Callable[[Emulated], None]]:
        """The source with it that is compiled anew, and what runs it."""
        if self.file == "finish.cu":
            return "finish.cu", sum_what_is_left
        if self.is_given_q or self.file == "given_q.cuh":
            return "Divergence_forward_sum.cu", sum_given_q
        few = self.is_shared or self.file == "sum_terms.cuh"
        return "StandardDivergence_forward_sum.cu", sum_few_terms if few else sum_terms


CHANGES = {
    "exchange too small": Change("sum_kernels.cuh", r"kShares \? 1 : 2", "kShares ? 1 : 4", "beyond its"),
    "half the lanes left out": Change("exchange.cuh", r"if \(is_upper\)", "if (lane > 48)", "no thread has written"),
    "all lanes write": Change("exchange.cuh", r"if \(is_upper\)", "if (lane < 64)", "no barrier after the write"),
    "shuffle across warps": Change("exchange.cuh", "distance < 32", "distance <= 32", "part of a warp"),
    "lanes that leave early": Change("sum_kernels.cuh", "(?=T lanes.*\n  Q<)", "if (lane > 9) return;", "has returned"),
    "barrier for some": Change("exchange.cuh", r"__syncthreads\(\);", "if (lane > 9) __syncthreads();", "is at a barrier"),
    "too few groups": Change("finish.cu", "of_groups, kMaxGroups", "of_groups, kMaxGroups / 4", "beyond its"),
    "too few places": Change("sum_kernels.cuh", "(?<=kPlaces = kThreads)", " / 2", "beyond its"),
    "too little room for sharers": Change(
        "sum_kernels.cuh", r"(?<=exchange, kItems \* kThreads)(?=\);)", " / 2", "beyond its", is_shared=True
    ),
    "every second sharer leaves nothing": Change(
        "sum_terms.cuh", "(?=exchange.item . kThreads . threadIdx.x. = )", "if (sharers.own % 2 == 0) ", "no thread has written"
    ),
    "a part of the wrong lanes": Change(
        "sum_kernels.cuh", r"(?<=shape.log_lanes\)) \+ lane_in_block", "", "instead of", is_shared=True
    ),
    "a lane left out": Change(
        "sum_kernels.cuh", "(?=sharer == 0 && count > 0)", "lane != 17 && ", "instead of", is_shared=True
    ),
    "sharers mistaken for lanes": Change(
        "sum_kernels.cuh",
        r"\(shape.log_width \+ shape.log_lanes\)",
        "shape.log_width",
        "instead of|beyond|no barrier",
        is_shared=True,
    ),
    "a lane of the wrong owner": Change("sum_terms.cuh", "sharers.own == 0", "sharers.own == 1", "beyond its|instead of"),
    "a sharer left out": Change("sum_terms.cuh", "sharer = 0; ", "sharer = 1; ", "instead of"),
    "a missing term is not +0": Change("sum_terms.cuh", r": T\(0\)(?=;\n *}\n *__sync)", ": T(1)", "instead of"),
    "terms in the wrong order": Change(
        "sum_terms.cuh", r"sharer \* sharers.distance", "(sharers.count - 1 - sharer) * sharers.distance", "instead of"
    ),
    "all of a team write": Change("finish.cu", "speaks(?= && group)", "true", "no barrier after the write"),
    "no wait for the partial sums": Change("finish.cu", r"KL_EXT_AWAIT_LAUNCH\(\);", "", "does not wait for the launch before"),
    "q of another direction": Change("given_q.cuh", "prepared<!", "prepared<", "instead of"),
    "q of another vector": Change("given_q.cuh", r"thread.vector_in_row\(\)", "0", "instead of"),
    "q of half the columns": Change("given_q.cuh", "plan.vectors.divisor", "plan.vectors.divisor / 2", "no thread has written"),
    "q of a part in place of another's": Change("given_q.cuh", r"\(i \* kParts", "(i / 2 * kParts", "no barrier|instead of"),
    "q of the first row": Change("sum_layout.h", r"strides\[1\] == 0", "strides[1] >= 0", "instead of", is_given_q=True),
    "q of another column": Change(
        "sum_terms.cuh", r"(?<=values\[2 \+ i\] = q.inputs\[i\]\[)item", "0", "instead of", is_given_q=True
    ),
    "half a team shuffles": Change("finish.cu", r"(?=return fold)", "if (threadIdx.x % 2) return 0;", "shuffles at"),
}
for source in sorted((ROOT / "csrc/cuda").glob("*.cu*")):
    for i in range(source.read_text().count("__syncthreads();")):
        CHANGES[f"{source.name} without barrier {i}"] = Change(
            source.name, r"__syncthreads\(\);", "", "no barrier|no thread has written", i
        )


@pytest.mark.parametrize("change", CHANGES)
def test_a_fault_in_a_real_kernel_is_found(tmp_path, change):
    file, pattern, replacement, said, which, *_ = CHANGES[change]
    source, use = CHANGES[change].compiled
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc/cuda" / file
    text = path.read_text()
    match = list(re.finditer(pattern, text))[which]
    path.write_text(text[: match.start()] + replacement + text[match.end() :])
    sources = {path.name: path for path in [*instances(tmp_path), *(tmp_path / "csrc/cuda").glob("*.cu")]}
    changed = compile_emulated([sources[source]], tmp_path, csrc=tmp_path / "csrc")
    # Of an inline function that several objects have, the first one's is linked.
    others = [path for path in objects() if path.name != changed[0].name]
    emulated = Emulated(link_emulated([*changed, *others], tmp_path / "libchanged.so"))
    emulated.set_few_threads(0)
    for order in ORDERS:
        emulated.set_order(order, 1)
        with pytest.raises((KernelFault, AssertionError), match=said) as fault:  # the latter of wrong bits
            use(emulated)
        if isinstance(fault.value, KernelFault):
            assert re.search(r"csrc/cuda/\w+\.cuh?:\d+: ", str(fault.value)) and "of kl_ext::cuda::" in str(fault.value)
