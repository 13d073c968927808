"""The terms of `gaussian_kl_div` to their bounds, its dtypes, numbers for q, and the shapes that its reductions leave."""

import itertools
import math

import numpy
import pytest
import torch

import oracle
import points
from kl_ext import gaussian_kl_div, kl_div_pair_loss, kl_div_single_loss
from operators import DTYPES, GAUSSIAN, each_reducing_operator
from oracle import same_bits
from ordered_sum import reduced_sum

FLOATS = pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64], ids=["float32", "float64"])
UNBOUNDED = {"clamp_min": -math.inf, "clamp_max": math.inf}


def tensors(columns, device):
    return [torch.from_numpy(numpy.ascontiguousarray(column)).to(device).requires_grad_() for column in columns]


def assert_accurate(columns, device, exact, **clamps):
    """The terms and, for a grad_output of 1, every gradient. `exact` is the documented pair's (twice the divergence), or the
    single loss's."""
    inputs = tensors(columns, device)
    value = gaussian_kl_div(*inputs, **clamps)
    half = len(inputs) // 2  # of 2: the oracle's t and gradients are twice the divergence's
    bound = oracle.PAIR if half == 2 else oracle.SINGLE
    oracle.assert_within(value.detach(), exact.t / half, oracle.ulp_error(value, exact.t / half), bound, inputs)
    assert (value >= 0).all(), "a divergence is never negative"
    limits = oracle.GRADIENTS["pair" if half == 2 else "single"]
    gradients = torch.autograd.grad(value, inputs, torch.ones_like(value))
    for got, want, scale, limit in zip(gradients, exact.gradients, exact.scales, limits, strict=True):
        oracle.assert_within(got, want / half, oracle.ulp_error(got, want / half, scale / half), limit, inputs)


@FLOATS
def test_terms_and_gradients_keep_their_bounds(dtype, device, rng):
    columns = points.pair(rng, 100_000, dtype)
    assert_accurate(columns, device, oracle.pair(*columns))
    assert_accurate(columns[:2], device, oracle.single(*columns[:2]))


@FLOATS
def test_terms_and_gradients_keep_their_bounds_against_mpmath(dtype, device, rng):
    columns = points.pair(rng, 300, dtype)
    assert_accurate(columns, device, oracle.exact_array(oracle.exact_pair, zip(*columns, strict=True)))
    assert_accurate(columns[:2], device, oracle.exact_array(oracle.exact_single, zip(*columns[:2], strict=True)))


@FLOATS
def test_terms_and_gradients_keep_their_bounds_without_a_clamp(dtype, device, rng):
    infinite = (-math.inf, math.inf)
    columns = points.wide_pair(rng, 300, dtype)
    exact = oracle.exact_array(oracle.exact_pair, zip(*columns, strict=True), *infinite)
    # Half of a t that is beyond the format may be within it: the divergence then overflows with t.
    value = gaussian_kl_div(*tensors(columns, device), **UNBOUNDED)
    fits = numpy.asarray(exact.t) < numpy.finfo(dtype).max
    error = numpy.where(fits, oracle.ulp_error(value, exact.t / 2), 0)
    oracle.assert_within(value.detach(), exact.t / 2, error, oracle.PAIR, tensors(columns, device))
    columns = columns[:2]
    assert_accurate(
        columns, device, oracle.exact_array(oracle.exact_single, zip(*columns, strict=True), *infinite), **UNBOUNDED
    )


@FLOATS
def test_a_finite_divergence_does_not_overflow_with_twice_itself(dtype, device):
    largest = float(numpy.finfo(dtype).max)
    delta = math.sqrt(largest) * 1.2  # delta^2 is 1.44 of the largest number, and the divergence 0.72 of it
    inputs = [torch.tensor([x], dtype=getattr(torch, dtype.__name__), device=device) for x in (delta, 0.0, 0.0, 0.0)]
    assert gaussian_kl_div(*inputs).isfinite().all()
    assert gaussian_kl_div(*inputs[:2]).isfinite().all()


@FLOATS
@pytest.mark.parametrize("clamps", [{}, UNBOUNDED], ids=["default", "unbounded"])
def test_exactly_zero_where_p_equals_q(dtype, clamps, device, rng):
    mu, log_var = (points.wide_pair if clamps else points.pair)(rng, 20_000, dtype)[:2]
    inputs = tensors((mu, log_var, mu, log_var), device)
    value = gaussian_kl_div(*inputs, **clamps)
    assert (value == 0).all() and not value.signbit().any()
    assert all((g == 0).all() for g in torch.autograd.grad(value.sum(), inputs))
    assert gaussian_kl_div(*inputs, **clamps, reduction="sum").item() == 0


def test_never_negative_and_exactly_zero_in_half_types(device, rng):
    for dtype in DTYPES[:2]:
        largest = torch.finfo(dtype).max
        inputs = [
            torch.from_numpy(x).clamp(-largest, largest).to(device, dtype) for x in points.pair(rng, 50_000, numpy.float32)
        ]
        assert (gaussian_kl_div(*inputs) >= 0).all()
        assert (gaussian_kl_div(*inputs[:2]) >= 0).all()
        assert (gaussian_kl_div(*inputs[:2], *inputs[:2]) == 0).all()


def test_half_types_are_rounded_once_from_float32(device, rng):
    for dtype in DTYPES[:2]:
        inputs = [torch.from_numpy(x).to(device, dtype) for x in points.pair(rng, 20_000, numpy.float32)]
        value = gaussian_kl_div(*inputs)
        exact = oracle.pair(*(oracle.to_longdouble(x) for x in inputs)).t / 2
        oracle.assert_within(value, exact, oracle.ulp_error(value, exact), oracle.NARROWED, inputs)


def test_without_q_it_is_against_the_standard_normal(device):
    mu, log_var = GAUSSIAN.inputs([50], [50], device=device, dtype=torch.float32)
    value = gaussian_kl_div(mu, log_var)
    assert same_bits(value, kl_div_single_loss(mu, log_var))
    zero = torch.zeros_like(mu).double()
    torch.testing.assert_close(
        value.double(), GAUSSIAN.formula(mu.double(), log_var.double(), zero, zero), rtol=1e-6, atol=1e-6
    )


def test_the_documented_pair_is_twice_the_divergence_and_a_half(device, rng):
    inputs = [torch.from_numpy(x).to(device) for x in points.pair(rng, 20_000, numpy.float32)]
    assert same_bits(2 * gaussian_kl_div(*inputs) + 0.5, kl_div_pair_loss(*inputs))


# Numbers for q


@each_reducing_operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
def test_numbers_for_q_do_not_promote(operator, dtype, shape, device):
    mu, log_var, _, tensor = operator.inputs(shape, shape, shape, shape, device=device, dtype=dtype)
    for q in itertools.product([0.5, 1, tensor], repeat=2):
        value = operator(mu, log_var, *q)
        assert (value.dtype, value.shape, value.device) == (dtype, mu.shape, mu.device)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        same = [x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=wide, device=device) for x in q]
        want = operator(mu.to(wide), log_var.to(wide), *(x.to(wide) for x in same)).to(dtype)
        assert same_bits(value, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_numbers_for_q_are_rounded_to_the_arithmetic_and_no_further(dtype, shape, device):
    """0.1 is neither a half nor a float32 number: a 0-dim half input must not make a half of it."""
    mu, log_var = GAUSSIAN.inputs(shape, shape, device=device, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    value = gaussian_kl_div(mu, log_var, 0.1, -0.1, dtype=wide)
    exact = oracle.pair(*map(oracle.to_longdouble, (mu, log_var, *(torch.tensor(x, dtype=wide) for x in (0.1, -0.1))))).t / 2
    oracle.assert_within(value, exact, oracle.ulp_error(value, exact), oracle.PAIR, [mu, log_var])


@each_reducing_operator
def test_numbers_for_q_are_float64_where_the_arithmetic_is(operator, device):
    """Whichever of the inputs, or dtype, makes it so."""
    single, double = (torch.ones(3, dtype=dtype, device=device) for dtype in (torch.float32, torch.float64))
    want = operator(double, double, 0.1, 1.0)
    assert same_bits(operator(single, single, 0.1, double), want)
    assert same_bits(operator(single, single, 0.1, 1.0, dtype=torch.float64), want)
    assert same_bits(operator(single[0], single[0], 0.1, 1.0, dtype=torch.float64), want[0])


@each_reducing_operator
def test_numbers_of_numpy_are_numbers(operator, device):
    """`log_var_q=numpy.log(4)` is a float64 scalar of numpy, which is a Python float."""
    x = torch.ones(3, device=device)
    want = operator(x, x, 0.5, math.log(4))
    assert same_bits(operator(x, x, numpy.float64(0.5), numpy.log(4)), want)
    assert same_bits(operator(x, x, torch.full_like(x, 0.5), numpy.log(4)), want)


@each_reducing_operator
def test_numbers_for_q_go_with_every_reduction_and_gradient(operator, device):
    mu, log_var = operator.inputs([4, 3], [4, 3], device=device, requires_grad=True)
    q = [torch.full((), x, dtype=torch.float64, device=device) for x in operator.numbers]
    for how in ({}, {"reduction": "sum", "dim": 0}, {"reduction": "batchmean"}):
        value, want = operator(mu, log_var, *operator.numbers, **how), operator(mu, log_var, *q, **how)
        assert same_bits(value, want)
        for a, e in zip(*(torch.autograd.grad(v.sum(), (mu, log_var)) for v in (value, want)), strict=True):
            assert same_bits(a, e)


# Reductions


@each_reducing_operator
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 1, 4, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_any_subset_of_the_dimensions_written_in_any_way(operator, shape, reduction, device):
    """Values against plain torch in float64; the same bits however dim is written."""
    inputs = operator.inputs(shape, shape, shape[-1:], (), device=device)
    reduce = getattr(torch, reduction)
    terms = operator.formula(*inputs)
    for count in range(1, len(shape) + 1):
        for dims in itertools.combinations(range(len(shape)), count):
            value = operator(*inputs, reduction=reduction, dim=dims)
            torch.testing.assert_close(value, reduce(terms, dims), rtol=1e-12, atol=1e-12)
            negative = [d - len(shape) for d in reversed(dims)]
            mixed = tuple(d - len(shape) * (i % 2) for i, d in enumerate(dims))
            for written in (list(dims), negative, mixed, *(dims if count == 1 else ())):
                assert same_bits(operator(*inputs, reduction=reduction, dim=written), value)
    everything = operator(*inputs, reduction=reduction, dim=tuple(range(len(shape))))
    for none in (None, (), []):  # as in torch.sum
        assert same_bits(operator(*inputs, reduction=reduction, dim=none), everything)


@each_reducing_operator
def test_batchmean_is_the_sum_over_the_size_of_the_first_dimension(operator, device):
    for shape in ((7,), (4, 3), (4, 3, 2), (1, 5)):
        inputs = operator.inputs(shape, shape, device=device, dtype=torch.float32)
        total = operator(*inputs, reduction="sum")
        # A tensor: what torch divides by a number on CUDA, it multiplies by the reciprocal.
        assert same_bits(operator(*inputs, reduction="batchmean"), total / torch.full_like(total, shape[0]))
    inputs = operator.inputs([3], [3], [4, 3], [3], device=device)  # the first dimension of the terms, not of mu_p
    assert same_bits(operator(*inputs, reduction="batchmean"), operator(*inputs, reduction="sum") / 4)


@each_reducing_operator
def test_zero_dimensional_inputs_reduce_to_themselves(operator, device):
    inputs = operator.inputs([], [], [], [], device=device, dtype=torch.float32)
    for how in ({"reduction": r, "dim": d} for r in ("sum", "mean") for d in (None, (), 0, -1, [0])):
        assert same_bits(operator(*inputs, **how), operator(*inputs))


@each_reducing_operator
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_reductions_give_what_torch_gives(operator, shape, dtype, device):
    inputs = operator.inputs(shape, shape, shape[-1:], (), device=device, dtype=dtype)
    subsets = [d for n in range(1, len(shape) + 1) for d in itertools.combinations(range(len(shape)), n)]
    for dims, reduction in itertools.product([None, *subsets], ["sum", "mean"]):
        value = operator(*inputs, reduction=reduction, dim=dims)
        want = getattr(torch, reduction)(torch.empty(shape, dtype=dtype, device=device), dims)
        assert same_bits(value, want), (dims, reduction)
        assert not value.signbit()[~value.isnan()].any()
    want = torch.empty(shape, dtype=dtype).sum() / shape[0]
    assert same_bits(operator(*inputs, reduction="batchmean"), want)
    for reduction in ("sum", "mean", "batchmean"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        for x, g in zip(leaves, torch.autograd.grad(operator(*leaves, reduction=reduction), leaves), strict=True):
            assert g.shape == x.shape and (g == 0).all()


# dtype


def rounded_once(x, dtype):
    """torch rounds float64 to the half types by way of float32, which is twice."""
    exact = numpy.asarray(oracle.to_longdouble(x))
    spacing = oracle.ulp(exact, dtype)
    return torch.as_tensor((numpy.rint(exact / spacing) * spacing).astype(numpy.float64)).to(x.device, dtype)


# float64 terms mu^2 / 2 (the log-variances are 0) whose sum is a little more than half of a spacing above 1/2.
BARELY_ABOVE_HALF_A_SPACING = {
    torch.float16: ([1.0, 2.0**-6, 2.0**-6, 2.0**-20], 0.5 + 2.0**-11),
    torch.bfloat16: ([1.0, 2.0**-4, 2.0**-20], 0.5 + 2.0**-8),
}


@each_reducing_operator
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_float64_sum_is_rounded_once_to_a_half_type(operator, dtype, device):
    """By way of float32 it would be rounded to the middle of two half numbers, and from there to the wrong one."""
    mu, want = BARELY_ABOVE_HALF_A_SPACING[dtype]
    mu = torch.tensor(mu, dtype=torch.float64, device=device)
    standard = torch.full_like(mu, float(operator.has_deviations))
    assert operator(mu[None], standard, reduction="sum", dim=1, dtype=dtype).item() == want
    assert operator(mu[None], standard, reduction="batchmean", dtype=dtype).item() == want
    if len(mu) == 4:  # the division is exact
        assert operator(2 * mu, standard, reduction="mean", dtype=dtype).item() == want


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_float64_gradient_of_a_half_prior_is_rounded_once(dtype, device):
    above = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    mu = torch.ones(1, dtype=dtype, device=device)
    weights = torch.tensor([1.0, above, 2.0**-40], dtype=torch.float64, device=device)
    gradient, _ = GAUSSIAN.backward(weights, mu, torch.zeros_like(weights))
    assert gradient.item() == 1 + 2 * above


HOWS = ({}, {"reduction": "sum", "dim": 0}, {"reduction": "mean"}, {"reduction": "batchmean"})


@each_reducing_operator
@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("requested", [None, *DTYPES], ids=str)
def test_float64_arithmetic_if_an_input_or_dtype_is_float64_and_one_rounding(operator, how, requested, device):
    for dtypes in itertools.product(DTYPES, repeat=2):
        inputs = [x.to(d) for x, d in zip(operator.inputs([70, 30], [70, 30], device=device), dtypes, strict=True)]
        wide = torch.float64 if torch.float64 in (*dtypes, requested) else torch.float32
        terms = operator(*(x.to(wide) for x in inputs))
        if how:
            dims = [0] if how.get("dim") == 0 else [0, 1]
            terms = reduced_sum(terms, dims) / torch.tensor(
                {"sum": 1, "mean": 2100, "batchmean": 70}[how["reduction"]], dtype=wide
            )
        want = rounded_once(terms, requested or torch.promote_types(*dtypes))
        assert same_bits(operator(*inputs, **how, dtype=requested), want), dtypes


@each_reducing_operator
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_under_autocast_the_result_is_float32_unless_a_dtype_is_given(operator, how, device):
    inputs = operator.inputs([6, 5], [6, 5], [5], [5], device=device, dtype=torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        value = operator(*inputs, **how)
        with_numbers = operator(*inputs[:2], 0.1, 0.2, **how)
        chosen = [operator(*inputs, **how, dtype=dtype) for dtype in DTYPES]
        double = operator(inputs[0].double(), *inputs[1:], **how)
    assert same_bits(value, operator(*(x.float() for x in inputs), **how))
    assert with_numbers.dtype == torch.float32 and double.dtype == torch.float64
    for dtype, x in zip(DTYPES, chosen, strict=True):
        assert same_bits(x, operator(*inputs, **how, dtype=dtype))
