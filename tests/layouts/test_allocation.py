"""Results of 128 KiB and more on the CPU get memory that earlier ones left: faster, and never what somebody still holds."""

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

KIB, MIB = 2**10, 2**20
LARGE = 4 * MIB // 4  # numbers that take 4 MiB in float32
MEDIUM = 256 * KIB // 4
SMALLEST = 128 * KIB // 4
PAGE = os.sysconf("SC_PAGE_SIZE")


def loss_of(numel: int, value: float = 1.0) -> Tensor:
    """A result of as many numbers, all 0.5 * value**2."""
    return kl_ext.kl_div_single_loss(torch.tensor(value).expand(numel).contiguous(), torch.zeros(numel))


def left_by(numel: int) -> int:
    """The address of a result that nobody holds any more."""
    return loss_of(numel).data_ptr()


@pytest.fixture
def nothing_kept() -> None:
    """At the start; what is freed from then on is kept."""
    zeros = torch.zeros(513 * MIB // 4)
    kl_ext.kl_div_single_loss(zeros, zeros)  # more than is kept: as it goes, all else goes


@pytest.mark.parametrize("numel", [SMALLEST, MEDIUM, MIB // 2 - 1, LARGE])
def test_a_result_gets_the_memory_that_an_earlier_one_left(numel: int) -> None:
    address = left_by(numel)
    assert loss_of(numel).data_ptr() == address


@pytest.mark.usefixtures("nothing_kept")
def test_less_than_128_KiB_is_left_to_torch() -> None:
    """Which does not know of what is kept, though it would do."""
    address = left_by(SMALLEST)
    assert loss_of(SMALLEST - 1).data_ptr() != address
    assert loss_of(SMALLEST).data_ptr() == address


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("block", [MEDIUM, 2 * LARGE])
def test_memory_serves_results_that_leave_at_most_a_quarter_of_it(block: int) -> None:
    address = left_by(block)
    assert loss_of(block // 4 * 3).data_ptr() == address
    assert loss_of(block // 4 * 3 - 1).data_ptr() != address
    assert loss_of(block + 1).data_ptr() != address


@pytest.mark.parametrize("numel", [MEDIUM, LARGE])
def test_gradients_and_their_whole_do_as_well(numel: int) -> None:
    h = torch.randn(numel // 64, 2 * 64, requires_grad=True)
    addresses = set()
    for _ in range(3):
        h.grad = None
        kl_ext.gaussian_kl_div(*h.chunk(2, 1), reduction="batchmean").backward()
        addresses.add(h.grad.data_ptr())
    assert len(addresses) == 1


@pytest.mark.parametrize("numel", [SMALLEST, SMALLEST + 1, 100_000, MIB // 2 - 1, MIB // 2, LARGE, LARGE + 1, 3 * LARGE - 7])
def test_results_begin_at_pages_and_are_as_long_as_they_should_be(numel: int) -> None:
    """From 2 MiB on at huge ones."""
    result = loss_of(numel)
    assert result.data_ptr() % (2 * MIB if numel >= MIB // 2 else PAGE) == 0
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
        h = torch.ones(images, 2 * 8, 32, 32)
        if layout == "channels last":
            h = h.contiguous(memory_format=torch.channels_last)
        if layout == "transposed":
            h = h.transpose(2, 3)
        mu, log_var = h.chunk(2, 1)
        return kl_ext.kl_div_single_loss(mu, log_var), *torch.ops.kl_ext.kl_div_single_loss_backward(
            mu, mu, log_var, -30.0, 20.0, [True, True]
        )

    for small, *larger in zip(gradients(2), gradients(8), gradients(64), strict=True):
        assert small.nbytes < 128 * KIB
        for large in larger:
            assert large.stride() == small.stride()
            assert same_bits(large[:2], small)


@pytest.mark.parametrize("unit", [SMALLEST // 5 * 4 + 3, MIB // 4])
def test_no_two_living_tensors_share_memory(unit: int) -> None:
    """Threads that make, keep and drop results of many sizes, each of which has to keep its numbers."""
    failures: list[str] = []
    seeds = torch.randint(2**31, (4,)).tolist()

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        held: list[tuple[float, Tensor]] = []
        for _ in range(60):
            numel, value, place = (int(torch.randint(*span, (), generator=generator)) for span in ((1, 12), (1, 100), (0, 4)))
            held.insert(place, (float(value), loss_of(numel * unit, float(value))))
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


@pytest.mark.parametrize("numel", [MEDIUM, LARGE])
def test_a_forked_process_has_memory_of_its_own(numel: int) -> None:
    loss_of(numel)
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        os._exit(0 if (loss_of(numel, 4.0) == 8.0).all() else 1)
    result = loss_of(numel, 2.0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (result == 2.0).all()


def numbers_of(code: str, *arguments: int, **environment: object) -> list[int]:
    """What a fresh process prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    output = subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout
    return [int(number) for number in output.split()]


PLACE = """
import sys, torch, kl_ext
print(kl_ext.kl_div_single_loss(*torch.zeros(2, int(sys.argv[1]))).data_ptr())
"""


@pytest.mark.parametrize("keep", [0, 1])
def test_where_nothing_is_kept_less_than_2_MiB_is_left_to_torch(keep: int) -> None:
    """Whose results begin behind what the C library notes there, not at a page."""
    (address,) = numbers_of(PLACE, MEDIUM, KL_EXT_KEEP_MEMORY=keep)
    assert (address % PAGE == 0) == (keep > 0)


OLDEST = """
import sys, torch, kl_ext
numel, count = map(int, sys.argv[1:])
x = torch.zeros(2, numel)
def losses(count):
    return [kl_ext.kl_div_single_loss(*x) for _ in range(count)]
results = losses(count + 1)
addresses = [result.data_ptr() for result in results]
while results:
    del results[0]
results = losses(count)
print(*(addresses.index(result.data_ptr()) for result in results))
"""


def test_beyond_the_limit_the_oldest_goes_and_the_newest_serves_first() -> None:
    """Of five results 1 MiB keeps four."""
    assert numbers_of(OLDEST, MEDIUM, 4, KL_EXT_KEEP_MEMORY=1) == [4, 3, 2, 1]


KEEPING = """
import sys, torch, kl_ext
from pathlib import Path
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) // 1024
count, numel = map(int, sys.argv[1:])
x, y = torch.zeros(count, numel), torch.zeros(count, numel)
kl_ext.kl_div_single_loss(x[0], y[0])
before = resident()
results = [kl_ext.kl_div_single_loss(x[i], y[i]) for i in range(count)]
held = resident() - before
del results
print(held, resident() - before)
"""


@pytest.mark.parametrize(
    ("numel", "keep", "kept"),
    [(4 * MIB, 0, 0), (4 * MIB, 20, 16), (4 * MIB, 40, 32), (4 * MIB, None, 64), (MEDIUM, 20, 20), (MEDIUM, 40, 40)],
)
def test_no_more_memory_is_kept_than_is_allowed(numel: int, keep: int | None, kept: int) -> None:
    """Of results of 64 MiB together; one of them may have the memory of the first call."""
    held, left = numbers_of(KEEPING, 16 * MIB // numel, numel, **({} if keep is None else {"KL_EXT_KEEP_MEMORY": keep}))
    first = 4 * numel // MIB
    assert held >= 64 - first - 4
    assert kept - first - 4 <= left <= kept + 4


OFFERED = """
import sys, torch, kl_ext
from pathlib import Path
def offered():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("LazyFree"))
count, numel = map(int, sys.argv[1:])
x, y = torch.zeros(2, numel)
for count in (count, 2 * count):
    results = [kl_ext.kl_div_single_loss(x, y) for _ in range(count)]
    print(offered())
    del results
    print(offered())
"""


@pytest.mark.parametrize("numel", [8 * MIB, MEDIUM])
def test_what_is_kept_is_the_systems_to_take_but_for_the_last_of_it(numel: int) -> None:
    """Of results of 64 MiB together that are freed nothing is, of twice as many those that were freed first.

    Linux is slow to count the last few ordinary pages.
    """
    *before, after = [kib / KIB for kib in numbers_of(OFFERED, 16 * MIB // numel, numel)]
    assert before == [0, 0, 0]
    assert after == pytest.approx(64, abs=2)


FAULTS = """
import torch, kl_ext
from kl_ext import reference
from resource import RUSAGE_SELF, getrusage
leaves = [torch.randn(1024, 64, requires_grad=True) for _ in range(2)]
faults = 0
for step in range(20):
    terms = reference.gaussian_kl_div(*leaves)
    torch.autograd.grad(terms.sum() / 1024, leaves)
    before = getrusage(RUSAGE_SELF).ru_minflt
    torch.autograd.grad(kl_ext.gaussian_kl_div(*leaves, reduction="batchmean"), leaves)
    faults += (getrusage(RUSAGE_SELF).ru_minflt - before) * (step >= 10)
print(faults)
"""


def test_a_training_step_takes_no_page_faults_where_the_C_library_does() -> None:
    """Two gradients of 256 KiB, 64 pages each, beside plain torch. The C library gives back whatever is freed, which by itself
    it does at times."""
    (faults,) = numbers_of(FAULTS, MALLOC_MMAP_THRESHOLD_=64 * KIB, MALLOC_TRIM_THRESHOLD_=64 * KIB)
    assert faults < 10 * 10


@pytest.mark.parametrize("numel", [MEDIUM, LARGE])
def test_the_profiler_of_torch_sees_results_come_and_go(numel: int) -> None:
    x = torch.zeros(numel)
    kl_ext.kl_div_single_loss(x, x)
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        kl_ext.kl_div_single_loss(x, x)
    sizes = [event.nbytes() for event in profile.kineto_results.events() if event.name() == "[memory]"]
    assert 4 * numel in sizes
    assert -4 * numel in sizes
