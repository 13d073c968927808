"""Threads get the bits of one, and whatever they do at once ends well."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oracle import same_bits
from stress import THREADS, new_cases, results_of

STRESS = Path(__file__).with_name("stress.py")


def test_eight_threads_on_shared_leaves_get_the_bits_of_one() -> None:
    cases, before = new_cases(), torch.get_num_threads()
    torch.set_num_threads(1)
    expected = [results_of(case) for case in cases]
    barrier = threading.Barrier(THREADS)
    got: list[list[list[Tensor]]] = []

    def work() -> None:
        torch.set_num_threads(1)
        barrier.wait()
        got.append([results_of(case) for case in cases])

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    assert len(got) == THREADS
    for results in got:
        for one, other in zip(results, expected, strict=True):
            assert all(map(same_bits, one, other))


COUNTED = """
import os, sys, torch, kl_ext

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
x = torch.zeros(2**20)
number = int(sys.argv[1])
torch.set_num_threads(number)
alone = threads()
kl_ext.kl_div_single_loss(x, x), kl_ext.gaussian_kl_div(x, x, reduction="sum")
assert threads() - alone == number - 1, (alone, threads())
x.exp()
assert threads() - alone == number - 1, "torch has threads of its own"
"""


@pytest.mark.parametrize("number", ["1", "3", "5"])
def test_as_many_threads_compute_as_torch_is_told_and_they_are_torchs(number: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", COUNTED, number]
    completed = subprocess.run(command, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr


def test_a_stress_of_everything_that_threads_share() -> None:
    """First calls at once, changes of the environment and of how many threads compute, forks, and the end of the process."""
    completed = subprocess.run([sys.executable, str(STRESS), "2"], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
