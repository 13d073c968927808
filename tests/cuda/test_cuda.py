"""What only a GPU has: graphs, streams, several devices, memory that counts its peak, and room for more than 2^31 elements.

Values, gradients and the rest are tested on the GPU where they are tested on the CPU, by the fixture `device`.
"""

import gc
import math
import warnings

import pytest
import torch

import kl_ext
from kl_ext import gaussian_kl_div, kl_div_pair_loss, kl_div_single_loss
from operators import GAUSSIAN
from oracle import same_bits
from ordered_sum import reduced_sum

pytestmark = pytest.mark.cuda

SHAPE = (129, 70)
MIB = 2**20


def reduced(**how):
    return lambda *inputs: gaussian_kl_div(*inputs, **how)


# A function and the shapes of its arguments.
STEPS = {
    "single": (kl_div_single_loss, [SHAPE] * 2),
    "pair": (kl_div_pair_loss, [SHAPE] * 4),
    "pair with a prior": (kl_div_pair_loss, [SHAPE, SHAPE, SHAPE[1:], SHAPE[1:]]),
    "divergence": (reduced(), [SHAPE] * 4),
    "sum": (reduced(reduction="sum"), [(3000, 70)] * 4),
    "batchmean with a prior": (reduced(reduction="batchmean"), [(3000, 70), (3000, 70), (70,), (70,)]),
    "mean of dim 0": (reduced(reduction="mean", dim=0), [SHAPE] * 2),
    "rows": (reduced(reduction="sum", dim=1), [SHAPE, SHAPE, (1,), ()]),
    "against numbers": (lambda *p: gaussian_kl_div(*p, 0.5, -0.25, reduction="sum"), [SHAPE] * 2),
}
each_step = pytest.mark.parametrize("function, shapes", STEPS.values(), ids=STEPS.keys())
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def fresh(shapes, dtype=torch.float32, device="cuda"):
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def step(function, leaves):
    """The value and all gradients, through autograd."""
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def assert_same(got, want):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert same_bits(a, b), "the value" if i == 0 else f"gradient {i}"


def overwrite(leaves, numbers):
    with torch.no_grad():
        for leaf, x in zip(leaves, numbers, strict=True):
            leaf.copy_(x)


@each_dtype
@each_step
def test_a_captured_step_replays_with_new_numbers(function, shapes, dtype):
    leaves = fresh(shapes, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(function, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step(function, leaves)
    for _ in range(3):
        numbers = fresh(shapes, dtype)
        overwrite(leaves, numbers)
        graph.replay()
        assert_same(captured, step(function, numbers))


@each_step
def test_graphed_callables(function, shapes):
    """The forward and the backward pass in a graph each, as torch makes them of a module's forward."""
    graphed = torch.cuda.make_graphed_callables(function, tuple(fresh(shapes)))
    for _ in range(3):
        numbers = fresh(shapes)
        value = graphed(*numbers)
        gradients = torch.autograd.grad(value.sum(), numbers)
        assert_same([value.detach(), *gradients], step(function, numbers))


@each_step
def test_compiled_into_graphs(function, shapes):
    compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        numbers = fresh(shapes)
        torch.compiler.cudagraph_mark_step_begin()
        assert_same([x.clone() for x in step(compiled, numbers)], step(function, numbers))
    torch.compiler.reset()


@each_dtype
@each_step
def test_kernels_run_on_the_current_stream_and_the_host_does_not_wait(function, shapes, dtype):
    """The arguments are written on a side stream, late: what runs on another stream, or does not wait its turn, reads NaN."""
    numbers = fresh(shapes, dtype)
    want = step(function, numbers)
    leaves = [torch.full_like(x, math.nan).requires_grad_() for x in numbers]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        step(function, leaves)  # once before, so that nothing is loaded or allocated while the stream sleeps
        overwrite(leaves, [torch.full_like(x, math.nan) for x in numbers])
        torch.cuda.synchronize()
        torch.cuda._sleep(300_000_000)  # cycles: more than a tenth of a second
        overwrite(leaves, numbers)
        got = step(function, leaves)
        assert not stream.query(), "the host has waited for the device"
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(got, want)


@each_step
def test_nothing_synchronises(function, shapes):
    leaves = fresh(shapes)
    zero_dim = [torch.tensor(0.25, device="cuda")] + [x.detach() for x in leaves[1:]]
    step(function, leaves)
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        step(function, leaves)
        function(*zero_dim)
        function(torch.tensor(0.25), *zero_dim[1:])  # a 0-dim CPU tensor goes along as a number
    finally:
        torch.cuda.set_sync_debug_mode(before)


@each_step
def test_another_device_than_the_current_one(function, shapes):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here = fresh(shapes, device="cuda:0")
    there = [x.detach().to("cuda:1").requires_grad_() for x in here]
    with torch.cuda.device(0):
        got = step(function, there)
        assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in got)
    assert_same(got, step(function, here))


def test_tensors_of_two_gpus_are_refused():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, y = torch.randn(3, device="cuda:0"), torch.randn(3, device="cuda:1")
    with pytest.raises(RuntimeError, match="kl_div_pair_loss: expected mu_q on cuda:0 like mu_p, got cuda:1"):
        kl_div_pair_loss(x, x, y, x)


def peak(call):
    """How far allocated memory rises during a call, in bytes, and what the call returns."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


@pytest.mark.parametrize(
    "how",
    [
        {"reduction": "sum"},
        {"reduction": "batchmean"},
        {"reduction": "sum", "dim": 1},
        {"reduction": "mean", "dim": 0},
        {"reduction": "sum", "dim": (0, 1)},
    ],
    ids=str,
)
@each_dtype
def test_a_reduction_allocates_its_result_and_its_chunks_sums(dtype, how):
    """Forward: a number for 1024 terms at most, and no more for a second level. Backward: that and the gradients."""
    mu, log_var = torch.randn(16384, 2 * 1024, device="cuda").to(dtype).chunk(2, 1)
    prior = [torch.randn(1024, device="cuda").to(dtype) for _ in range(2)]
    sums = 4 * mu.numel() // 1024
    gaussian_kl_div(mu[:2], log_var[:2], **how)
    for inputs in ([mu, log_var], [mu, log_var, *prior]):
        size, value = peak(lambda inputs=inputs: gaussian_kl_div(*inputs, **how))
        assert size <= 2 * 4 * value.numel() + 2 * sums + MIB, f"{size / MIB:.2f} MiB"
        grad_output = torch.ones_like(value)
        size, gradients = peak(lambda inputs=inputs, grad=grad_output: GAUSSIAN.backward(grad, *inputs, **how))
        results = sum(x.numel() * x.element_size() for x in gradients)
        assert size <= results + 4 * value.numel() + 4 * sums + MIB, f"{size / MIB:.2f} MiB for {results / MIB:.2f}"


ROWS = 2**21 + 3  # of 1024: more than 2^31 elements, 4 GiB in bfloat16


@pytest.fixture(scope="module")
def large():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free GPU memory")
    mu = torch.empty(ROWS, 1024, device="cuda", dtype=torch.bfloat16).normal_()
    yield mu, torch.empty_like(mu).normal_()
    del mu
    torch.cuda.empty_cache()


WINDOWS = [slice(0, 3), slice(2**20 - 1, 2**20 + 2), slice(2**21 - 2, 2**21 + 1), slice(ROWS - 2, ROWS)]


def test_more_than_2_to_the_31_elements(large):
    assert large[0].numel() > 2**31
    value = kl_div_single_loss(*large)
    assert value.shape == large[0].shape
    for rows in WINDOWS:
        assert same_bits(value[rows].cpu(), kl_div_single_loss(*(x[rows].cpu() for x in large)))
    backward = torch.ops.kl_ext.kl_div_single_loss_backward
    for i, gradient in enumerate(backward(value, *large, -30.0, 20.0, [True, True])):
        for rows in WINDOWS:
            want = backward(*(x[rows].cpu() for x in (value, *large)), -30.0, 20.0, [True, True])[i]
            assert same_bits(gradient[rows].cpu(), want)


def test_more_than_2_to_the_31_strided_elements(large):
    """Every second column of rows that begin at an odd number: no vectors, and offsets beyond 32 bits."""
    inputs = [x.view(-1)[1:-1023].view(-1, 2048)[:, ::2] for x in large]
    value = kl_div_single_loss(*inputs)
    last = value.shape[0]
    for rows in (slice(0, 2), slice(2**20 - 2, 2**20 + 1), slice(last - 2, last)):
        assert same_bits(value[rows].cpu(), kl_div_single_loss(*(x[rows].cpu() for x in inputs)))


def test_sums_of_more_than_2_to_the_31_terms(large):
    """Rows are compared with the CPU's, and the full sum with the sum of the rows' sums, which are those of its chunks."""
    rows = gaussian_kl_div(*large, reduction="sum", dim=1, dtype=torch.float32)
    for window in WINDOWS:
        want = gaussian_kl_div(*(x[window].cpu() for x in large), reduction="sum", dim=1, dtype=torch.float32)
        assert same_bits(rows[window].cpu(), want)
    total = gaussian_kl_div(*large, reduction="sum", dtype=torch.float32)
    assert same_bits(total.cpu(), reduced_sum(rows.cpu(), [0]))
    columns = gaussian_kl_div(*large, reduction="sum", dim=0, dtype=torch.float32)
    for some in (slice(0, 2), slice(1023, 1024)):
        want = gaussian_kl_div(*(x[:, some].cpu() for x in large), reduction="sum", dim=0, dtype=torch.float32)
        assert same_bits(columns[some].cpu(), want)


def test_gradients_of_a_prior_from_more_than_2_to_the_31_terms(large):
    prior = [torch.randn(1024, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    grad_output = torch.ones((), device="cuda", dtype=torch.bfloat16)
    gradients = GAUSSIAN.backward(grad_output, *large, *prior, reduction="sum")
    for window in WINDOWS:
        inputs = [x[window].cpu() for x in large] + [x.cpu() for x in prior]
        want = GAUSSIAN.backward(grad_output.cpu(), *inputs, reduction="sum")
        assert_same([x[window].cpu() for x in gradients[:2]], want[:2])
    some = slice(511, 513)
    inputs = [x[:, some].cpu() for x in large] + [x[some].cpu() for x in prior]
    want = GAUSSIAN.backward(grad_output.cpu(), *inputs, reduction="sum")
    assert_same([x[some].cpu() for x in gradients[2:]], want[2:])


def test_sums_of_more_terms_than_a_launch_reaches_are_refused():
    """Only broadcasting makes so many."""
    x = torch.zeros((), device="cuda").expand(2**36)
    with pytest.raises(RuntimeError, match="expected at most 34359738368 terms to a sum on CUDA devices, got 68719476736"):
        gaussian_kl_div(x, x, reduction="sum")


def test_the_kernels_are_those_of_this_gpu():
    """Machine code for it, not PTX that the driver compiles: kl_ext's first call does not take seconds."""
    major, minor = torch.cuda.get_device_capability()
    built = kl_ext._library.build_facts().cuda_architectures
    real = [int("".join(filter(str.isdigit, name))) for name in built]
    assert any(arch // 10 == major and arch % 10 <= minor for arch in real), f"sm_{major}{minor} is not among {built}"
