"""Every operator gives the bits that the CPU gives for contiguous numbers: on any device, in any layout, at every repetition.

On the CPU this is a test of the layouts alone. The documented losses under other clamps, with special values and in every mix
of dtypes: test_determinism.py.
"""

import numpy
import pytest
import torch

from kl_ext import gaussian_kl_div
from layouts import LAYOUTS
from operators import DTYPES, ELEMENTWISE, GAUSSIAN, PAIR, Operator, each_elementwise_operator
from oracle import same_bits
from reduction_cases import random_case

each_layout = pytest.mark.parametrize(
    "shape, make", [(shape, make) for shape, _, make in LAYOUTS], ids=[f"{len(shape)}d {name}" for shape, name, _ in LAYOUTS]
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
REDUCTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "mean"},
    {"reduction": "batchmean"},
    {"reduction": "sum", "dim": 0},
    {"reduction": "mean", "dim": 1},
    {"reduction": "sum", "dim": -1},
    {"reduction": "sum", "dim": (0, -1)},
]
LARGE = 1024 * 1024 + 3  # three levels of chunks


def moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on the device with the strides and the storage offset that it has."""
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """same_bits, sooner where there is no NaN."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    alike = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
    return alike or same_bits(a.cpu(), b.cpu())


def value_and_gradients(inputs, grad_output=None, **how):
    """grad_output: of the terms if given, else some numbers in the shape of the result."""
    value = gaussian_kl_div(*inputs, **how)
    if grad_output is None or value.shape != grad_output.shape:
        grad_output = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).to(value).view(value.shape)
    return [value, *GAUSSIAN.backward(grad_output, *inputs, **how)]


def loss_and_gradients(operator: Operator, inputs, grad_output):
    return [operator.operator(*inputs), *operator.backward(grad_output, *inputs)]


def assert_bits_of_the_cpu(compute, inputs, grad_output, device, about=""):
    """compute: of inputs and grad_output; those on the device as they are, those on the CPU made contiguous."""
    want = compute([x.contiguous() for x in inputs], grad_output.contiguous())
    got = compute([moved(x, device) for x in inputs], moved(grad_output, device))
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.device.type == device.type
        layouts = [(tuple(x.shape), x.stride(), x.dtype) for x in inputs]
        assert equal(a.cpu(), b), f"{about}: {'a gradient' if i else 'the value'} differs, inputs {layouts}"


@each_dtype
@each_layout
def test_every_layout_dtype_and_reduction(shape, make, dtype, device, rng):
    *inputs, grad_output = (make(x) for x in GAUSSIAN.wide_range(rng, *[shape] * 5, dtype=dtype))
    for operator in ELEMENTWISE:
        assert_bits_of_the_cpu(
            lambda x, grad, operator=operator: loss_and_gradients(operator, x, grad),
            inputs[: operator.count],
            grad_output,
            device,
            operator,
        )
    for how in REDUCTIONS:
        for count in (2, 4):
            assert_bits_of_the_cpu(
                lambda x, grad, how=how: value_and_gradients(x, grad, **how), inputs[:count], grad_output, device, how
            )


@each_dtype
@pytest.mark.parametrize("prior", [(65,), (1, 65), (), (30, 1, 65), (30, 1, 1), (37, 65)], ids=str)
def test_gradients_of_broadcast_priors(prior, dtype, device, rng):
    """For chunks, with every reduction; the documented pair too."""
    encoded, *q = GAUSSIAN.wide_range(rng, (30, 37, 130), prior, prior, dtype=dtype)
    (grad_output,) = GAUSSIAN.wide_range(rng, (30, 37, 65), dtype=dtype)
    inputs = [*encoded.chunk(2, -1), *q]
    for how in REDUCTIONS:
        assert_bits_of_the_cpu(lambda x, grad, how=how: value_and_gradients(x, grad, **how), inputs, grad_output, device, how)
    assert_bits_of_the_cpu(lambda x, grad: loss_and_gradients(PAIR, x, grad), inputs, grad_output, device, PAIR)
    one = torch.full((), 0.7, dtype=dtype).expand(30, 37, 65)  # what a sum sends back
    assert_bits_of_the_cpu(lambda x, grad: loss_and_gradients(PAIR, x, grad), inputs, one, device, PAIR)


def test_random_shapes_layouts_broadcasts_and_reductions(device, rng):
    for _ in range(100):
        inputs, dims = random_case(rng)
        reduction = str(rng.choice(["sum", "mean", "none"]))
        how = {} if reduction == "none" else {"reduction": reduction, "dim": dims}
        shape = torch.broadcast_shapes(*(x.shape for x in inputs))
        (grad_output,) = GAUSSIAN.wide_range(rng, shape, dtype=inputs[0].dtype)
        assert_bits_of_the_cpu(lambda x, grad, how=how: value_and_gradients(x, grad, **how), inputs, grad_output, device, how)


@each_dtype
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 5)], ids=str)
def test_empty(shape, dtype, device):
    inputs = [torch.empty(shape, dtype=dtype)] * 4
    hows = [{}, *({"reduction": reduction} for reduction in ("sum", "mean", "batchmean")), {"reduction": "sum", "dim": 0}]
    for how in hows:
        assert_bits_of_the_cpu(lambda x, grad, how=how: value_and_gradients(x, grad, **how), inputs, inputs[0], device, how)
    for operator in ELEMENTWISE:
        assert_bits_of_the_cpu(
            lambda x, grad, operator=operator: loss_and_gradients(operator, x, grad),
            inputs[: operator.count],
            inputs[0],
            device,
            operator,
        )


@each_dtype
def test_sums_of_three_levels(dtype, device, rng):
    inputs = GAUSSIAN.wide_range(rng, (LARGE,), (LARGE,), (), (), dtype=dtype)
    rows = GAUSSIAN.wide_range(rng, (LARGE // 64, 64), (LARGE // 64, 64), (64,), (64,), dtype=dtype)
    for given in (inputs, inputs[:2], rows):
        for how in ({"reduction": "sum"}, {"reduction": "batchmean"}, {"reduction": "mean", "dim": 0}):
            assert_bits_of_the_cpu(
                lambda x, grad, how=how: value_and_gradients(x, **how), given, torch.zeros((), dtype=dtype), device, how
            )


@each_elementwise_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twenty_runs_of_a_loss_give_the_same_bits(operator, dtype, device, rng):
    encoded, *others = GAUSSIAN.wide_range(rng, (2000, 400), (200,), (200,), (2000, 200), dtype=dtype)
    inputs = [x.to(device) for x in [*encoded.chunk(2, -1), *others[:2]][: operator.count]]
    grad_output = others[2].to(device)
    first = loss_and_gradients(operator, inputs, grad_output)
    for run in range(1, 20):
        for a, b in zip(loss_and_gradients(operator, inputs, grad_output), first, strict=True):
            assert equal(a, b), f"run {run}"


@pytest.mark.parametrize("how", REDUCTIONS, ids=str)
def test_twenty_runs_of_a_reduction_give_the_same_bits(how, device, rng):
    encoded, *prior = GAUSSIAN.wide_range(rng, (6000, 400), (200,), (200,))
    inputs = [x.to(device) for x in [*encoded.chunk(2, -1), *prior]]
    first = value_and_gradients(inputs, **how)
    for run in range(1, 20):
        for a, b in zip(value_and_gradients(inputs, **how), first, strict=True):
            assert equal(a, b), f"run {run}"


def test_what_is_moved_keeps_its_layout(device):
    base = torch.from_numpy(numpy.arange(24.0)).view(4, 6)
    for x in (base, base.t(), base[1:, ::2], base[:1].expand(4, 6), base.chunk(2, 1)[1]):
        y = moved(x, device)
        assert (y.stride(), y.storage_offset()) == (x.stride(), x.storage_offset()) and torch.equal(y.cpu(), x)
