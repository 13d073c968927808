"""float16, bfloat16, float32, float64 and their mixes: torch's promotion, one rounding to the result's dtype, each gradient in
its input's."""

import itertools
import math
from fractions import Fraction

import numpy
import pytest
import torch

import kl_ext
import oracle
from operators import DTYPES, PAIR, SINGLE, each_documented_loss, each_elementwise_operator

EXACT = {SINGLE: oracle.single, PAIR: oracle.pair}
BOUND = {SINGLE: oracle.SINGLE, PAIR: oracle.PAIR}
GRADIENTS = {SINGLE: oracle.GRADIENTS["single"], PAIR: oracle.GRADIENTS["pair"]}


def arithmetic(*dtypes):
    return torch.float64 if torch.float64 in dtypes else torch.float32


def assert_accurate(operator, inputs, result_dtype, dtype=None):
    """Value and gradients for a grad_output of 1: to the bound in ulps of the arithmetic, or of a narrower dtype to 0.51."""
    inputs = [x.requires_grad_() for x in inputs]
    value = operator.operator(*inputs, dtype=dtype)
    assert value.dtype == result_dtype
    exact = EXACT[operator](*map(oracle.to_longdouble, inputs))
    kinds = [x.dtype for x in inputs]
    bound = BOUND[operator] if value.dtype == arithmetic(*kinds, dtype) else oracle.NARROWED
    oracle.assert_within(value, exact.value, oracle.ulp_error(value, exact.value), bound, inputs)
    gradients = torch.autograd.grad(value, inputs, torch.ones_like(value))
    computed = arithmetic(*kinds, value.dtype)
    for x, got, want, scale, limit in zip(inputs, gradients, exact.gradients, exact.scales, GRADIENTS[operator], strict=True):
        assert got.dtype == x.dtype and got.shape == x.shape
        if x.shape == value.shape:
            # Half an ulp of its own, and what the arithmetic may be off by.
            unit = oracle.ulp(scale, computed)
            allowed = limit * unit + (0 if x.dtype == computed else oracle.ulp(want, x.dtype) / 2 + limit * unit / 100)
            oracle.assert_within(got, want, oracle.distance(got, want) / allowed, 1.0, inputs)


def values(*shape, dtype, device):
    return (torch.randn(shape, dtype=torch.float64) * 2).to(device=device, dtype=dtype)


@pytest.mark.parametrize("first, second", list(itertools.product(DTYPES, repeat=2)), ids=lambda x: str(x)[6:])
def test_every_mix_of_two(first, second, device):
    inputs = [values(3000, dtype=dtype, device=device) for dtype in (first, second)]
    assert_accurate(SINGLE, inputs, torch.add(*inputs).dtype)
    four = [values(3000, dtype=dtype, device=device) for dtype in (first, second, second, first)]
    assert_accurate(PAIR, four, torch.promote_types(first, second))


def test_mixes_of_four(device, rng):
    mixes = list(itertools.product(DTYPES, repeat=4))
    for index in rng.permutation(len(mixes))[:64]:
        inputs = [values(500, dtype=dtype, device=device) for dtype in mixes[index]]
        assert_accurate(PAIR, inputs, sum(inputs).dtype)


@pytest.mark.parametrize("first, second", list(itertools.product(DTYPES, repeat=2)), ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("shapes", [((), (7,)), ((7,), ()), ((), ()), ((1,), (7,))], ids=str)
def test_zero_dim_tensors_weigh_in_as_in_torch_add(first, second, shapes, device):
    inputs = [values(*shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, (first, second), strict=True)]
    want = torch.add(*inputs).dtype
    assert_accurate(SINGLE, inputs, want)
    assert PAIR(inputs[0], inputs[1], inputs[1], inputs[0]).dtype == want


def test_zero_dim_mixes_of_four_promote_as_in_torch(device, rng):
    for _ in range(64):
        inputs = [values(*((5,) if rng.integers(2) else ()), dtype=DTYPES[rng.integers(4)], device=device) for _ in range(4)]
        assert PAIR(*inputs).dtype == result_type(inputs), [(x.dtype, x.dim()) for x in inputs]


def result_type(tensors):
    """torch's rule for more than two: tensors with dimensions decide alone where there are any."""
    deciding = [x for x in tensors if x.dim()] or tensors
    result = deciding[0].dtype
    for x in deciding[1:]:
        result = torch.promote_types(result, x.dtype)
    return result


def test_the_rule_for_more_than_two_is_torchs(rng):
    for _ in range(64):
        tensors = [torch.zeros((5,) if rng.integers(2) else (), dtype=DTYPES[rng.integers(4)]) for _ in range(2)]
        assert result_type(tensors) == torch.result_type(*tensors) == torch.add(*tensors).dtype
        tensors.append(torch.zeros((5,) if rng.integers(2) else (), dtype=DTYPES[rng.integers(4)]))
        assert result_type(tensors) == torch.addcmul(*tensors).dtype


@each_documented_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("source", DTYPES, ids=lambda x: str(x)[6:])
def test_the_dtype_argument_of_the_operators(operator, source, dtype, device):
    """The result's dtype; float64 also raises the arithmetic's."""
    assert_accurate(operator, [values(2000, dtype=source, device=device) for _ in range(operator.count)], dtype, dtype)


@each_documented_loss
def test_float64_arithmetic_for_a_zero_dim_float64_tensor(operator, device):
    """The result is float32 by promotion, and rounded once from float64."""
    inputs = [values(5000, dtype=torch.float32, device=device) for _ in range(operator.count)]
    inputs[-1] = torch.tensor(0.1, dtype=torch.float64, device=device)
    value = operator(*inputs)
    exact = EXACT[operator](*map(oracle.to_longdouble, inputs)).value
    assert value.dtype == torch.float32
    oracle.assert_within(value, exact, oracle.ulp_error(value, exact), oracle.NARROWED, inputs)


@each_documented_loss
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda x: str(x)[6:])
def test_gradients_of_half_types_are_computed_in_float32_and_rounded_once(operator, dtype, device):
    """A grad_output of another dtype does not pass through the half type first."""
    inputs = [values(3000, dtype=dtype, device=device) for _ in range(operator.count)]
    grad_output = torch.rand(3000, device=device) + 0.5
    exact = EXACT[operator](*map(oracle.to_longdouble, inputs))
    g = oracle.to_longdouble(grad_output)
    gradients = operator.backward_operator(grad_output, *inputs, *operator.bounds, [True] * operator.count)
    for got, want, scale, bound in zip(gradients, exact.gradients, exact.scales, GRADIENTS[operator], strict=True):
        allowed = g * (bound + 1) * oracle.ulp(scale, torch.float32) + oracle.ulp(g * want * 1.000001, dtype) * 0.501
        assert got.dtype == dtype
        oracle.assert_within(got, g * want, oracle.distance(got, g * want) / allowed, 1.0, inputs)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda x: str(x)[6:])
def test_every_value_of_a_half_type(dtype, device):
    """All 65,536 bit patterns as log_var and as mu: within 0.51 ulp where they are finite."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = every[every.isfinite()].to(device)
    other = values(every.numel(), dtype=dtype, device=device)
    for inputs in ((other, every), (every, other)):
        assert_accurate(SINGLE, inputs, dtype)
    for position in range(4):
        inputs = [values(every.numel(), dtype=dtype, device=device) for _ in range(4)]
        inputs[position] = every
        assert_accurate(PAIR, inputs, dtype)


@each_elementwise_operator
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("start", [0, 1])
def test_half_types_of_any_length_and_start_have_the_bits_of_float32_rounded_once(operator, dtype, start, device):
    """Values, gradients and sums of rows with gaps between: on the CPU two bfloat16 are read and written as one word."""

    def elementwise(*inputs, grad_output):
        of_one = grad_output[:1, :1].expand(grad_output.shape)
        gradients = [
            operator.backward_operator(grad, *inputs, *operator.bounds, [True] * operator.count)
            for grad in (grad_output, of_one)
        ]
        return [operator.operator(*inputs), *gradients[0], *gradients[1]]

    for length in (*range(1, 18), 31, 32, 33, 63, 64, 65, 95, 127, 128, 129, 191, 192, 1001, 1023, 1024, 1025, 2049):
        halves = [
            values(3, length + 2, dtype=dtype, device=device)[:, start : start + length] for _ in range(operator.count + 1)
        ]
        floats = [x.float() for x in halves]
        sums = [kl_ext.gaussian_kl_div(*x[: operator.count], reduction="sum", dtype=torch.float32) for x in (halves, floats)]
        assert oracle.same_bits(*sums), f"the sum of 3 x {length}"
        halves[0][1, length // 2] = floats[0][1, length // 2] = math.nan
        got, want = (elementwise(*x[: operator.count], grad_output=x[operator.count]) for x in (halves, floats))
        assert all(oracle.same_bits(x, y.to(dtype)) for x, y in zip(got, want, strict=True)), f"3 x {length}"


@each_documented_loss
def test_results_that_overflow_a_half_type_are_infinite_and_no_others(operator, device):
    """The arithmetic is float32, so only the rounding at the end can overflow."""
    zeros = torch.zeros(3, dtype=torch.float16, device=device)
    mu = torch.tensor([300.0, 361.0, 362.5], dtype=torch.float16, device=device)
    value = operator(mu, zeros, *[zeros] * (operator.count - 2))
    exact = numpy.array([300.0, 361.0, 362.5]) ** 2 / 2 * operator.of_divergence[0]
    assert value.isinf().tolist() == (exact >= 65520).tolist()


def test_subnormal_half_results_are_rounded_once(device):
    """float16 values of 1e-3 squared fall below its smallest normal number."""
    mu = torch.linspace(1e-4, 8e-3, 2000, dtype=torch.float64).to(torch.float16).to(device)
    assert_accurate(SINGLE, [mu, torch.zeros_like(mu)], torch.float16)


def test_autocast_leaves_inputs_and_returns_float32(device):
    half = torch.bfloat16
    inputs = [values(1000, dtype=half, device=device).requires_grad_() for _ in range(4)]
    exact = oracle.pair(*map(oracle.to_longdouble, inputs)).value
    with torch.autocast(device.type, dtype=half):
        value = PAIR(*inputs)
        assert SINGLE(*inputs[:2]).dtype == torch.float32
        assert SINGLE(inputs[0], inputs[1].double()).dtype == torch.float64
    assert value.dtype == torch.float32
    oracle.assert_within(value, exact, oracle.ulp_error(value, exact), oracle.PAIR, inputs)
    assert all(gradient.dtype == half for gradient in torch.autograd.grad(value.sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float64_is_rounded_to_half_types_once_and_at_any_magnitude(dtype: torch.dtype, device: torch.device) -> None:
    """The loss of (mu, 0) is exactly mu^2 / 2; what float32 rounds to zero on the way included."""
    mu = torch.tensor([0.0, 1e-160, 1e-30, 1e-23, 1e-20, 1e-4, 3e-4, 1.0, 1.4, 300.0, 1e30], dtype=torch.float64, device=device)
    actual = torch.ops.kl_ext.kl_div_single_loss(mu, torch.zeros_like(mu), dtype=dtype)
    nearest = [exactly_rounded(0.5 * x * x, dtype) for x in mu.tolist()]
    assert actual.tolist() == nearest


def exactly_rounded(x: float, dtype: torch.dtype) -> float:
    """To nearest even, by integers."""
    bits, least, largest = (11, -24, 65504.0) if dtype == torch.float16 else (8, -133, 2.0**127 * (2 - 2**-7))
    if x == 0:
        return 0.0
    place = max(math.frexp(x)[1] - bits, least)
    rounded = math.ldexp(round(Fraction(x) / Fraction(2) ** place), place)
    return rounded if rounded <= largest else math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_elementwise_operator
def test_every_nan_of_half_types_stays_nan(operator, dtype, device):
    """Whatever its sign and payload: in the terms, in sums, and in the gradients it reaches."""
    exponent = 0x7F80 if dtype is torch.bfloat16 else 0x7C00
    payloads = torch.arange(exponent + 1, 0x8000, dtype=torch.int32)
    nans = torch.cat([payloads, payloads + 0x8000]).to(torch.uint16).view(dtype).to(device)
    for position in range(operator.count):
        inputs = [torch.zeros_like(nans) for _ in range(operator.count)]
        inputs[position] = nans
        leaves = [x.requires_grad_() for x in inputs]
        value = operator.operator(*leaves)
        assert value.isnan().all()
        assert kl_ext.gaussian_kl_div(*leaves, reduction="sum", dim=0).isnan()
        gradients = torch.autograd.grad(value, leaves, torch.ones_like(value))
        assert position % 2 == 1 or gradients[position].isnan().all()  # a clamp passes no gradient to NaN


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nan", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF - 2**32, 0x7FC00000])
def test_every_nan_as_the_gradient_of_a_sum_stays_nan(dtype, nan, device):
    inputs = [torch.ones(37, dtype=dtype, device=device) for _ in range(2)]
    grad = torch.tensor(nan, dtype=torch.int32, device=device).view(torch.float32)
    backward = torch.ops.kl_ext.gaussian_kl_div_backward.default
    gradients = backward(grad, *inputs, None, None, -30.0, 20.0, "sum", None, [True, True, False, False])
    assert gradients[0].isnan().all() and gradients[1].isnan().all()
