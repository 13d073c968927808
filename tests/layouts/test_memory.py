"""No input is ever copied, however it lies in memory: a call allocates its results and nothing else."""

import itertools

import pytest
import torch

import kl_ext
from layouts import LAYOUTS, chunk
from operators import each_operator

SHAPES = {2: (512, 384), 4: (8, 16, 32, 48), 5: (4, 8, 12, 16, 32)}
NUMEL = 512 * 384
# Every layout, at a size where a copy cannot hide.
EVERY = pytest.mark.parametrize(
    "shape, make",
    [(SHAPES[len(shape)], make) for shape, _, make in LAYOUTS],
    ids=[f"{len(shape)}d {name}" for shape, name, _ in LAYOUTS],
)
SMALL = 64 * 1024  # what bookkeeping may take; an input has 12 times as much


def allocated(call, device):
    """All that a call allocates, in bytes, whether or not it is freed within the call; and what the call returns."""
    if device.type == "cuda":
        requested = "requested_bytes.all.allocated"  # "allocated_bytes" counts what blocks are rounded up to
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()[requested]
        result = call()
        return torch.cuda.memory_stats()[requested] - before, result
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        result = call()
    events = [event.nbytes() for event in profile.kineto_results.events() if event.name() == "[memory]"]
    return sum(size for size in events if size > 0), result


def nbytes(tensors):
    return sum(x.untyped_storage().nbytes() for x in tensors if x is not None)


def assert_allocates_its_results_only(call, device, spare=0):
    call()  # once before, for what is made on the first call
    size, result = allocated(call, device)
    results = result if isinstance(result, tuple) else (result,)
    assert nbytes(results) <= size <= nbytes(results) + spare + SMALL, f"{size} bytes for results of {nbytes(results)}"


def test_a_planted_copy_is_found(device):
    """What the measure is for: the copy of one strided input, although it is freed before the call returns."""
    x = torch.randn(512, 384, device=device)

    def with_copy():
        return kl_ext.kl_div_single_loss(x.t().contiguous(), x.t())

    size, result = allocated(with_copy, device)
    assert size >= 2 * nbytes([result])
    with pytest.raises(AssertionError):
        assert_allocates_its_results_only(with_copy, device)
    assert_allocates_its_results_only(lambda: torch.add(x.t(), x.t()), device)


def test_every_layout_is_large_enough_to_be_seen(device):
    for (shape, _, make), _ in zip(LAYOUTS, range(100), strict=False):
        x = make(torch.empty(SHAPES[len(shape)], device=device))
        assert x.numel() * x.element_size() >= 10 * SMALL


@each_operator
@EVERY
def test_forward_never_copies(operator, shape, make, device):
    inputs = [make(torch.randn(shape, device=device)) for _ in range(operator.count)]
    assert_allocates_its_results_only(lambda: operator(*inputs), device)
    mixed = [torch.randn(shape, device=device), *inputs[1:]]
    assert_allocates_its_results_only(lambda: operator(*mixed), device)


def backward(operator, grad_output, inputs, mask=None):
    return tuple(operator.backward(grad_output, *inputs, mask=mask))


@each_operator
@EVERY
def test_backward_never_copies(operator, shape, make, device):
    inputs = [make(torch.randn(shape, device=device)) for _ in range(operator.count)]
    dense, one = torch.randn(shape, device=device), torch.ones((), device=device)
    for grad_output in (dense, make(dense), one.expand(shape)):
        assert_allocates_its_results_only(lambda g=grad_output: backward(operator, g, inputs), device)


@each_operator
def test_backward_allocates_only_what_is_wanted(operator, device):
    inputs = [chunk(torch.randn(512, 384, device=device), 1, 1) for _ in range(operator.count)]
    grad_output = torch.ones((), device=device).expand(512, 384)
    for mask in itertools.product([False, True], repeat=operator.count):
        assert_allocates_its_results_only(lambda m=mask: backward(operator, grad_output, inputs, list(m)), device)


@each_operator
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_chunks_of_other_dtypes_and_mixes_of_them_are_not_copied(operator, dtype, device):
    for kinds in ([dtype] * operator.count, [dtype, torch.float32] * (operator.count // 2)):
        inputs = [chunk(torch.randn(512, 384, device=device), 1, 1).to(kind) for kind in kinds]
        inputs = [chunk(x, 1, 0) for x in inputs]
        value = operator(*inputs)
        assert_allocates_its_results_only(lambda i=inputs: operator(*i), device)
        assert_allocates_its_results_only(lambda i=inputs, v=value: backward(operator, v, i), device)


@each_operator
def test_broadcast_priors_are_not_expanded_in_the_forward(operator, device):
    h = torch.randn(512, 2 * 384, device=device)
    mu, log_var = h.chunk(2, 1)
    prior = torch.randn(384, device=device)
    for inputs in ([mu, prior], [prior, log_var], [mu, prior[:1]]):
        full = [*inputs, prior, prior][: operator.count]
        assert_allocates_its_results_only(lambda i=full: operator(*i), device)


@each_operator
def test_broadcast_gradients_take_at_most_one_full_tensor_each(operator, device):
    """Until they are reduced within the kernel; and the inputs are not copied here either."""
    mu, log_var = torch.randn(512, 2 * 384, device=device).chunk(2, 1)
    prior = torch.randn(384, device=device)
    inputs = [mu, prior] if operator.count == 2 else [mu, log_var, prior, prior]
    full = sum(4 * NUMEL for x in inputs if x is prior)
    grad_output = torch.ones((), device=device).expand(512, 384)
    assert_allocates_its_results_only(lambda: backward(operator, grad_output, inputs), device, spare=full)


@each_operator
def test_a_step_of_training_copies_nothing(operator, device):
    """Through autograd: the result, the sum, and the gradients of the two (or four) parts of the encoder's output."""
    parts = [x.requires_grad_() for x in torch.randn(512, operator.count * 384, device=device).chunk(operator.count, 1)]
    parts = [x.detach().requires_grad_() for x in parts]

    def step():
        value = operator(*parts)
        return (value, *torch.autograd.grad(value.sum(), parts))

    assert_allocates_its_results_only(step, device)
