"""Results are tensors like any other: their storage may be grown, shared, given away, exported, and copied on write."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing

import numpy
import pytest
import torch
from torch import Tensor

import kl_ext

# A result of the C library, one of a kept block, one of huge pages.
SIZES = {"small": 100, "block": 100_000, "huge pages": 1_000_003}


@pytest.fixture(params=SIZES)
def numel(request: pytest.FixtureRequest) -> int:
    return SIZES[request.param]


def result(numel: int) -> tuple[Tensor, Tensor]:
    """A loss, and a copy of it that is not ours."""
    loss = kl_ext.gaussian_kl_div(*torch.randn(2, numel))
    return loss, loss.clone()


def overwrite_freed_memory(numel: int) -> None:
    """What was freed too early is some other result now."""
    gc.collect()
    for _ in range(3):
        kl_ext.gaussian_kl_div(torch.full((numel,), 7.0), torch.full((numel,), 1.0))


def test_resize(numel):
    loss, want = result(numel)
    loss.resize_(3 * numel)
    assert torch.equal(loss[:numel], want)
    loss.fill_(1.0)
    loss.resize_(2)
    assert loss.tolist() == [1.0, 1.0]
    loss.resize_(0).resize_(numel).copy_(want)
    overwrite_freed_memory(numel)
    assert torch.equal(loss, want)


def test_resize_of_the_storage(numel):
    """As FSDP frees parameters and fetches them again."""
    loss, want = result(numel)
    loss.untyped_storage().resize_(0)
    overwrite_freed_memory(numel)
    loss.untyped_storage().resize_(4 * numel)
    loss.copy_(want)
    overwrite_freed_memory(numel)
    assert torch.equal(loss, want)


def test_set(numel):
    """The storage of a result in another tensor, and another storage in a result."""
    loss, want = result(numel)
    other = torch.empty(0).set_(loss)
    address = other.data_ptr()
    assert address == loss.data_ptr()
    loss.set_(torch.ones(3))
    overwrite_freed_memory(numel)
    assert torch.equal(other, want)
    assert loss.tolist() == [1.0, 1.0, 1.0]
    loss.data = other
    del other
    overwrite_freed_memory(numel)
    assert loss.data_ptr() == address
    assert torch.equal(loss, want)


def test_views_outlive_the_result(numel):
    loss, want = result(numel)
    first, last = loss.detach().split([1, numel - 1])
    del loss
    overwrite_freed_memory(numel)
    assert torch.equal(torch.cat([first, last]), want)


@pytest.mark.parametrize(
    "export", [lambda loss: loss.numpy(), lambda loss: numpy.from_dlpack(loss), lambda loss: numpy.asarray(loss)[::1]]
)
def test_numpy_shares_the_memory_and_keeps_it(export, numel):
    loss, want = result(numel)
    array = export(loss)
    assert array.ctypes.data == loss.data_ptr()
    del loss
    overwrite_freed_memory(numel)
    numpy.testing.assert_array_equal(array, want.numpy())


def test_dlpack_shares_the_memory_and_keeps_it(numel):
    loss, want = result(numel)
    imported = torch.from_dlpack(loss)
    assert imported.data_ptr() == loss.data_ptr()
    del loss
    overwrite_freed_memory(numel)
    assert torch.equal(imported, want)


def test_inputs_may_come_from_elsewhere(numel):
    """From NumPy and by DLPack, and go before the result does."""
    arrays = numpy.random.default_rng(0).standard_normal((2, numel), dtype=numpy.float32)
    want = kl_ext.gaussian_kl_div(*torch.tensor(arrays))
    for take in (torch.from_numpy, torch.from_dlpack):
        inputs = take(arrays.copy())
        loss = kl_ext.gaussian_kl_div(*inputs)
        del inputs
        overwrite_freed_memory(numel)
        assert torch.equal(loss, want)


def add_one(loss: Tensor) -> None:
    loss.add_(1)


def test_another_process_shares_it(numel):
    loss, want = result(numel)
    address = loss.data_ptr()
    loss.share_memory_()
    assert loss.is_shared() and loss.data_ptr() != address
    assert torch.equal(loss, want)
    process = multiprocessing.get_context("spawn").Process(target=add_one, args=(loss,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert torch.equal(loss, want + 1)


@pytest.mark.parametrize("writes_to", ["the result", "the clone"])
def test_copy_on_write(writes_to, numel):
    loss, want = result(numel)
    lazy = torch._lazy_clone(loss)
    assert torch._C._is_cow_tensor(lazy) and torch._C._data_address(lazy) == torch._C._data_address(loss)
    written, kept = (loss, lazy) if writes_to == "the result" else (lazy, loss)
    written.zero_()
    assert torch.equal(kept, want) and not written.any()
    kept.zero_()  # the last reference: written where it is
    overwrite_freed_memory(numel)
    assert not kept.any()


def test_the_clone_outlives_the_result(numel):
    loss, want = result(numel)
    lazy = torch._lazy_clone(loss)
    del loss
    overwrite_freed_memory(numel)
    assert torch.equal(lazy, want)
    lazy.add_(1)
    overwrite_freed_memory(numel)
    assert torch.equal(lazy, want + 1)


def test_copies_in_python(numel):
    loss, want = result(numel)
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    copies = [copy.deepcopy(loss), copy.copy(loss), torch.load(file)]
    del loss
    overwrite_freed_memory(numel)
    assert all(torch.equal(one, want) for one in copies)


def test_gradients_are_such_results_too(numel):
    inputs = [torch.randn(numel, requires_grad=True) for _ in range(2)]
    kl_ext.gaussian_kl_div(*inputs, reduction="sum").backward()
    for x in inputs:
        assert x.grad is not None
        want = x.grad.clone()
        lazy = torch._lazy_clone(x.grad)
        x.grad.zero_()
        x.grad.untyped_storage().resize_(0)
        overwrite_freed_memory(numel)
        assert torch.equal(lazy, want)
