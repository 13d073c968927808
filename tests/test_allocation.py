"""Large results on the CPU get memory that earlier ones have left: faster, and never memory that somebody still holds."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kl_ext
from oracle import same_bits

MIB = 2**20
LARGE = 4 * MIB // 4  # numbers that take 4 MiB in float32


def loss_of(numel: int, value: float = 1.0) -> Tensor:
    """A result of as many numbers, all 0.5 * value**2."""
    return kl_ext.kl_div_single_loss(torch.tensor(value).expand(numel).contiguous(), torch.zeros(numel))


def test_a_large_result_gets_the_memory_that_an_earlier_one_left() -> None:
    first = loss_of(LARGE)
    address = first.data_ptr()
    del first
    assert loss_of(LARGE).data_ptr() == address


def test_gradients_and_their_whole_do_as_well() -> None:
    h = torch.randn(LARGE // 64, 2 * 64, requires_grad=True)
    addresses = set()
    for _ in range(3):
        h.grad = None
        kl_ext.gaussian_kl_div(*h.chunk(2, 1), reduction="batchmean").backward()
        addresses.add(h.grad.data_ptr())
    assert len(addresses) == 1


@pytest.mark.parametrize("numel", [MIB // 2, LARGE, LARGE + 1, 3 * LARGE - 7])
def test_large_results_begin_at_huge_pages_and_are_as_long_as_they_should_be(numel: int) -> None:
    result = loss_of(numel)
    assert result.data_ptr() % (2 * MIB) == 0
    assert result.untyped_storage().nbytes() == 4 * numel
    assert result.untyped_storage().resizable()


@pytest.mark.parametrize(
    "hold",
    [
        lambda result: result[5:],
        lambda result: result.view(2, -1).t(),
        lambda result: result.detach(),
        lambda result: result.numpy(),
        lambda result: result.untyped_storage(),
        lambda result: memoryview(result.numpy()),
        lambda result: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(result)),
    ],
    ids=["slice", "view", "detached", "numpy", "storage", "memoryview", "dlpack"],
)
def test_memory_that_is_seen_by_anything_is_not_given_away(hold: Callable[[Tensor], object]) -> None:
    result = loss_of(LARGE, 3.0)
    address = result.data_ptr()
    held = hold(result)
    del result
    others = [loss_of(LARGE) for _ in range(4)]
    assert address not in [other.data_ptr() for other in others]
    del held


def test_tensors_in_kept_memory_do_what_tensors_do() -> None:
    result = loss_of(LARGE, 2.0)
    assert torch.equal(copy.deepcopy(result), result)
    assert torch.equal(pickle.loads(pickle.dumps(result)), result)
    result.resize_(2 * LARGE)
    assert (result[:LARGE] == 2.0).all()
    result.resize_(10)
    assert (result == 2.0).all()
    shared = loss_of(LARGE, 2.0).share_memory_()
    assert shared.is_shared()
    assert (shared == 2.0).all()


@pytest.mark.parametrize("layout", ["chunk", "channels last", "transposed"])
def test_large_results_have_the_strides_of_small_ones(layout: str) -> None:
    def gradients(images: int) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.ones(images, 2 * 64, 32, 32)
        if layout == "channels last":
            h = h.contiguous(memory_format=torch.channels_last)
        if layout == "transposed":
            h = h.transpose(2, 3)
        mu, log_var = h.chunk(2, 1)
        return kl_ext.kl_div_single_loss(mu, log_var), *torch.ops.kl_ext.kl_div_single_loss_backward(
            mu, mu, log_var, -30.0, 20.0, [True, True]
        )

    for large, small in zip(gradients(16), gradients(4), strict=True):
        assert large.stride() == small.stride()
        assert same_bits(large[:4], small)


def test_no_two_living_tensors_share_memory() -> None:
    """Threads that make, keep and drop results of many sizes, each of which has to keep its numbers."""
    failures: list[str] = []
    seeds = torch.randint(2**31, (4,)).tolist()

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        held: list[tuple[float, Tensor]] = []
        for _ in range(60):
            numel, value, place = (int(torch.randint(*span, (), generator=generator)) for span in ((1, 12), (1, 100), (0, 4)))
            held.insert(place, (float(value), loss_of(numel * MIB // 4, float(value))))
            for expected, result in held[3:]:
                if not (result == 0.5 * expected**2).all():
                    failures.append(f"{expected}: {result}")
            del held[3:]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_forked_process_has_memory_of_its_own() -> None:
    loss_of(LARGE)
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        os._exit(0 if (loss_of(LARGE, 4.0) == 8.0).all() else 1)
    result = loss_of(LARGE, 2.0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (result == 2.0).all()


KEEPING = """
import os, sys, torch, kl_ext
from pathlib import Path
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) // 1024
x, y = torch.zeros(4, 2**22), torch.zeros(4, 2**22)
kl_ext.kl_div_single_loss(x[0], y[0])
before = resident()
results = [kl_ext.kl_div_single_loss(x[i], y[i]) for i in range(4)]
held = resident() - before
del results
print(held, resident() - before)
"""


@pytest.mark.parametrize(("keep", "kept"), [(0, 0), (20, 16), (40, 32), (None, 64)])
def test_no_more_memory_is_kept_than_is_allowed(keep: int | None, kept: int) -> None:
    """Four results of 16 MiB; one of them may have the memory of the first call."""
    environment = {**os.environ, **({} if keep is None else {"KL_EXT_KEEP_MEMORY": str(keep)})}
    output = subprocess.run([sys.executable, "-c", KEEPING], env=environment, check=True, capture_output=True, text=True).stdout
    held, left = map(int, output.split())
    assert held >= 48 - 4
    assert kept - 16 - 4 <= left <= kept + 4


OFFERED = """
import torch, kl_ext
from pathlib import Path
def offered():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("LazyFree")) // 1024
x, y = torch.zeros(2, 2**23)
for count in (2, 4):
    results = [kl_ext.kl_div_single_loss(x, y) for _ in range(count)]
    print(offered())
    del results
    print(offered())
"""


def test_what_is_kept_is_the_systems_to_take_but_for_the_last_of_it() -> None:
    """Results of 32 MiB: of two that are freed nothing is, of four the two that were freed first."""
    output = subprocess.run([sys.executable, "-c", OFFERED], check=True, capture_output=True, text=True).stdout
    assert [int(line) for line in output.split()] == [0, 0, 0, 64]


def test_small_results_are_left_to_torch() -> None:
    result = loss_of(1024)
    address = result.data_ptr()
    assert address % (2 * MIB) != 0
    del result
    assert loss_of(1024).numel() == 1024


def test_the_profiler_of_torch_sees_large_results_come_and_go() -> None:
    x = torch.zeros(LARGE)
    kl_ext.kl_div_single_loss(x, x)
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        kl_ext.kl_div_single_loss(x, x)
    sizes = [event.nbytes() for event in profile.kineto_results.events() if event.name() == "[memory]"]
    assert 4 * LARGE in sizes
    assert -4 * LARGE in sizes
