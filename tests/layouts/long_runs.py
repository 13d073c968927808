"""A process that makes many calls: by how much it has grown, and slowed down, from its first tenth to its last."""

from __future__ import annotations

import subprocess
import sys

# The time is that of the processor, and the same call of torch's own is timed in turn: a busy machine slows down both.
RUN = """
import resource, statistics, sys, time
from pathlib import Path

import torch

import kl_ext

torch.set_num_threads(1)
count = int(sys.argv[1])
leaves = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]
kept = []

def small_calls():
    kl_ext.kl_div_single_loss(*leaves)
    torch.autograd.grad(kl_ext.gaussian_kl_div(*leaves, reduction="batchmean"), leaves)

def planted():
    small_calls()
    kept.append(bytes(64))
    if len(kept) % 4 == 0:
        kept.count(None)

encoder = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.SiLU(), torch.nn.Linear(32, 16))
optimizer = torch.optim.SGD(encoder.parameters(), 1e-3)
images = torch.randn(8, 16)

@torch.compile
def loss_of(images):
    return kl_ext.gaussian_kl_div(*encoder(images).chunk(2, 1), reduction="batchmean")

def compiled_steps():
    loss_of(images).backward()
    optimizer.step()
    optimizer.zero_grad()

def plain():
    torch.autograd.grad(torch.add(*leaves).sum(), leaves)

def seconds(call, times):
    start = time.process_time()
    for _ in range(times):
        call()
    return time.process_time() - start

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

call = globals()[sys.argv[2]]
seconds(call, 20), seconds(plain, 20)
tenths = []
for _ in range(10):
    pairs = [(seconds(call, count // 500), seconds(plain, count // 2000)) for _ in range(50)]
    tenths.append((resident(), statistics.median(a / b for a, b in pairs)))
(before, first), (after, last) = tenths[0], tenths[-1]
print(after - before, last / first)
"""


def growth_and_slowdown(calls: str, count: int) -> tuple[float, float]:
    """In bytes, and as a factor."""
    output = subprocess.run([sys.executable, "-c", RUN, str(count), calls], check=True, capture_output=True, text=True).stdout
    growth, slowdown = map(float, output.split())
    return growth, slowdown
