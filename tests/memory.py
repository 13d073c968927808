"""Measure whether the memory that kl_ext keeps is worth what it costs, and write docs/reports/memory.md.

Each training runs with 512 MiB kept, the default, and with none, in turns of one process: time and page faults. In processes of
their own: the most memory that is resident, what the system takes back when it wants to, what is left to others where
address space is limited, what a training needs in a control group of little memory, and by how much many calls make a process
grow and slow down.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from resource import RLIMIT_AS, RUSAGE_SELF, getrusage, setrlimit
from typing import Any

import torch
from torch import Tensor, nn

import kl_ext
from kl_ext import _library
from reports import write_report

sys.path.insert(0, str(Path(__file__).with_name("layouts")))

from long_runs import growth_and_slowdown

REPORT = Path(__file__).resolve().parents[1] / "docs" / "reports" / "memory.md"
MIB = 2**20
ROUNDS = 25
KEPT = (512, 0)
LARGE = "images four times as large, term by term"


def digits() -> Callable[[], Tensor]:
    """As in examples/train_vae.py: batches of 100, no result of 128 KiB."""
    encoder = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 64))
    decoder = nn.Sequential(nn.Linear(32, 256), nn.SiLU(), nn.Linear(256, 64))
    images = torch.randn(100, 64)

    def loss() -> Tensor:
        mu, log_var = encoder(images).chunk(2, 1)
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)
        return (decoder(z) - images).square().sum(1).mean() + kl_ext.gaussian_kl_div(mu, log_var, reduction="batchmean")

    return step_of(loss, encoder, decoder)


def maps(side: int, weighted: bool) -> Callable[[], Tensor]:
    """An autoencoder of images; the terms are weighted one by one, or summed. Sides of 256 make mu and log_var of 1 MiB."""
    encoder = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.SiLU(), nn.Conv2d(16, 8, 3, padding=1))
    decoder = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.SiLU(), nn.ConvTranspose2d(16, 3, 4, 4))
    images = torch.randn(16, 3, side, side)

    def loss() -> Tensor:
        mu, log_var = encoder(images).chunk(2, 1)
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)
        error = (decoder(z) - images).square().sum() / 16
        if weighted:
            return error + (kl_ext.gaussian_kl_div(mu, log_var) * 0.5).sum() / 16
        return error + kl_ext.gaussian_kl_div(mu, log_var, reduction="batchmean")

    return step_of(loss, encoder, decoder)


def step_of(loss: Callable[[], Tensor], *modules: nn.Module) -> Callable[[], Tensor]:
    optimizer = torch.optim.SGD([x for module in modules for x in module.parameters()], 1e-6)

    def step() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step


def alone(numel: int) -> Callable[[], Tensor]:
    leaves = [torch.randn(numel, requires_grad=True) for _ in range(2)]

    def step() -> Tensor:
        value = kl_ext.gaussian_kl_div(*leaves)
        torch.autograd.grad(value, leaves, value.detach())
        return value

    return step


# By name: a step, and how many make a turn.
WORK: dict[str, tuple[Callable[[], Callable[[], Tensor]], int]] = {
    "a training on digits, small results": (digits, 100),
    "an autoencoder of images, summed": (lambda: maps(256, False), 3),
    "an autoencoder of images, term by term": (lambda: maps(256, True), 3),
    LARGE: (lambda: maps(512, True), 2),
    "the loss alone, results of 256 KiB": (lambda: alone(2**16), 200),
    "the loss alone, results of 8 MiB": (lambda: alone(2**21), 10),
}


def in_turns(name: str) -> list[dict[str, float]]:
    """A step with each setting, on an average: faults, and seconds as the ratio to those with nothing kept."""
    keep = ctypes.CDLL(str(_library.LIBRARY)).kl_ext_keep_memory
    keep.argtypes, keep.restype = [ctypes.c_uint64], ctypes.c_uint64
    make, steps = WORK[name]
    step = make()

    def turn(kept: int) -> dict[str, float]:
        keep(kept)
        step(), step()  # which leave their memory, or give back all
        before, start = getrusage(RUSAGE_SELF), time.perf_counter()
        for _ in range(steps):
            step()
        seconds, after = time.perf_counter() - start, getrusage(RUSAGE_SELF)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        faults = after.ru_minflt - before.ru_minflt
        return {"clock": seconds / steps, "processor": processor / steps, "faults": faults / steps}

    turn(0)
    rounds = [{kept: turn(kept) for kept in (KEPT if i % 2 else KEPT[::-1])} for i in range(ROUNDS)]
    return [{key: statistics.median(found[kept][key] for found in rounds) for key in rounds[0][0]} for kept in KEPT] + [
        {key: statistics.median(found[512][key] / found[0][key] for found in rounds) for key in ("clock", "processor")}
    ]


def status(name: str) -> int:
    """In MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) // 1024


def peak(name: str) -> int:
    make, steps = WORK[name]
    step = make()
    for _ in range(10 * steps):
        step()
    return status("VmHWM")


def leave_512_mib() -> None:
    x = torch.zeros(16 * MIB // 4)
    _ = [kl_ext.kl_div_single_loss(x, x) for _ in range(32)]


def taken_back() -> list[int]:
    """What is resident before 512 MiB of results have come and gone, thereafter, and once the system has taken what it may."""
    kl_ext.kl_div_single_loss(torch.zeros(1), torch.zeros(1))
    before = status("VmRSS")
    leave_512_mib()
    left = status("VmRSS")
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for begin, end in offered():
        advise(begin, end - begin, 21)  # MADV_PAGEOUT
    taken = status("VmRSS")
    value = alone(2**21)()
    assert ((value >= 0) & value.isfinite()).all()
    return [before, left, taken]


def offered() -> list[tuple[int, int]]:
    """The parts of memory in which the system may take some pages."""
    found = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            part = int(match[1], 16), int(match[2], 16)
        elif (match := re.match(r"LazyFree: +(\d+)", line)) and int(match[1]) > 0:
            found.append(part)
    return found


def others() -> int:
    """How many MiB torch gets where 768 MiB more may be mapped, after 512 MiB of results have come and gone."""
    limit = (status("VmSize") + 768) * MIB
    setrlimit(RLIMIT_AS, (limit, limit))
    leave_512_mib()
    tensors = []
    try:
        while True:
            tensors.append(torch.ones(16 * MIB // 4))
    except RuntimeError:
        return 16 * len(tensors)


def filled() -> None:
    """Writes how many MiB torch has got so far, after 512 MiB of results have come and gone, until the process ends."""
    leave_512_mib()
    tensors = []
    while True:
        tensors.append(torch.ones(16 * MIB // 4))
        print(16 * len(tensors), flush=True)


def pace(name: str) -> float:
    """The seconds of a step, a median."""
    make, _ = WORK[name]
    step = make()
    step(), step()
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@contextmanager
def control_group(mib: int) -> Iterator[Path]:
    """A group whose processes have this much memory together, and are killed when they need more. Version 1 or 2."""
    memory, limit = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
    if not memory.exists():
        memory, limit = Path("/sys/fs/cgroup"), "memory.max"
    group = memory / f"kl_ext-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(str(mib * MIB))
        yield group
    finally:
        for wait in (0.0, 0.1, 1.0, 10.0):  # a process that was killed stays in its group for a moment
            time.sleep(wait)
            with suppress(OSError):
                group.rmdir()
                break


def has_control_groups() -> bool:
    try:
        with control_group(1024):
            return True
    except OSError:
        return False


def run(kept: int, *arguments: str, mib: int | None = None) -> subprocess.CompletedProcess[str]:
    """A function of this file in a process of its own, which prints what it finds. With `mib`, in a group of that memory."""
    variables = {**os.environ, "KL_EXT_KEEP_MEMORY": str(kept)}
    command = [sys.executable, __file__, *arguments]
    if mib is None:
        return subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True)
    with control_group(mib) as group:
        join = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
        return subprocess.run([*join, *command], env=variables, stdout=subprocess.PIPE, text=True)


def child(kept: int, *arguments: str, mib: int | None = None) -> Any:
    """What a function of this file finds in a process of its own."""
    done = run(kept, *arguments, mib=mib)
    done.check_returncode()
    return json.loads(done.stdout)


def least_memory(kept: int, name: str) -> int:
    """The smallest group, to 16 MiB, in which a training runs both times."""
    fails, works = 0, 1024
    run(kept, "peak", name, mib=works).check_returncode()
    while works - fails > 16:
        mib = (fails + works) // 2
        statuses = {run(kept, "peak", name, mib=mib).returncode for _ in range(2)}
        if not statuses <= {0, -signal.SIGKILL}:
            raise RuntimeError(f"the training ended with {statuses}")
        works, fails = (mib, fails) if statuses == {0} else (works, mib)
    return works


def small_groups() -> str:
    """What is kept, where a control group has little memory."""
    if not has_control_groups():
        return "No control group could be made here: what is kept, where one has little memory, was not measured."
    used = child(0, "taken_back")[0]
    filled = [run(kept, "filled", mib=used + 768) for kept in KEPT]
    if any(done.returncode != -signal.SIGKILL for done in filled):
        raise RuntimeError("a process ended otherwise than by the limit of its group")
    got = [int(done.stdout.split()[-1]) for done in filled]
    least = [least_memory(kept, LARGE) for kept in KEPT]
    mib = max(least) + 64
    paces = [[child(kept, "pace", LARGE, mib=mib) for kept in KEPT] for _ in range(5)]
    kept, none = (statistics.median(found) for found in zip(*paces, strict=True))
    return f"""In a control group of {used + 768} MiB, 768 more than are resident in a process that has called kl_ext, torch
gets {got[0]} MiB for tensors of its own after 512 MiB of results have come and gone, or {got[1]} with nothing kept. The
training *{LARGE}* runs in a group of {least[0]} MiB, or of {least[1]} with nothing kept, and in none that
is smaller by 16. In a group of {mib} MiB one of its steps takes {1e3 * kept:.3g} ms, or {1e3 * none:.3g}."""


def long_runs() -> tuple[str, str]:
    """The most that any of them grew and slowed down, and a list of all."""
    found, lines = [], []
    for name, calls, count in (
        ("1,000,000 small calls", "small_calls", 10**6 // 2),
        ("10,000 compiled steps", "compiled_steps", 10**4),
    ):
        growth, slowdown = growth_and_slowdown(calls, count)
        found.append((growth / 1024, slowdown))
        lines.append(f"- {name}: {growth / 1024:+.0f} KiB, {slowdown:.2f} times")
    growths, slowdowns = zip(*found, strict=True)
    return f"at most {max(growths):.0f} KiB more, {max(slowdowns):.2f} times as long", "\n".join(lines)


def main() -> None:
    rows = []
    for name in WORK:
        kept, none, ratio = child(512, "in_turns", name)
        peaks = [child(kept, "peak", name) for kept in KEPT]
        faults = f"{kept['faults']:.0f} / {none['faults']:.0f}"
        milliseconds = f"{1e3 * kept['clock']:.3g} / {1e3 * none['clock']:.3g}"
        shares = [f"{ratio[key]:.2f}" for key in ("clock", "processor")]
        rows.append([name, faults, milliseconds, *shares, "{} / {}".format(*peaks)])
        print(*rows[-1], sep=" | ", flush=True)
    before, left, taken = child(512, "taken_back")
    without = child(0, "taken_back")
    tensors = [child(kept, "others") for kept in KEPT]
    groups = small_groups()
    found, runs = long_runs()
    text = f"""With 512 MiB kept (`KL_EXT_KEEP_MEMORY=512`, the default) / with nothing kept (`0`), in one thread: page faults
and milliseconds of a step, its time with 512 as a share of that with 0, and the most MiB that are resident. Medians of
{ROUNDS} turns.

512 MiB of results that come and go leave {left - before} MiB resident, or {without[1] - without[0]} with nothing kept. Once
the system has taken what it may (`MADV_PAGEOUT`), {taken - before} MiB are left, and later results are right.

Where the address space is limited (`ulimit -v`) what is kept counts. With 768 MiB to go, and 512 MiB of results that came and
went, torch gets {tensors[0]} MiB for tensors of its own, or {tensors[1]} with nothing kept.

{groups}

From the first tenth of a run to the last, the memory of the process and the time of a call, beside a call of torch:

{runs}"""
    head = ["training", "page faults", "milliseconds", "share of the time", "of the processor's", "MiB resident"]
    write_report(REPORT, "make test-memory", "tests/memory.py", found, text, head, rows)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if sys.argv[1:]:
        print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
