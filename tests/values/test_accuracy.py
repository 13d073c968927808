"""Finite inputs give the true value to the stated bound: in float32 and float64, for any clamp, random or adversarial.

The half types and the mixes of dtypes are in test_dtypes.py, the functions below the operators in test_math_header.py.
"""

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kl_ext
import oracle
import points
from operators import PAIR, SINGLE, each_documented_loss

DTYPES = pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64], ids=["float32", "float64"])
POINTS = {SINGLE: points.single, PAIR: points.pair}
WIDE_POINTS = {SINGLE: points.wide_single, PAIR: points.wide_pair}
FAST = {SINGLE: oracle.single, PAIR: oracle.pair}
SLOW = {SINGLE: oracle.exact_single, PAIR: oracle.exact_pair}
BOUND = {SINGLE: oracle.SINGLE, PAIR: oracle.PAIR}
GRADIENTS = {SINGLE: oracle.GRADIENTS["single"], PAIR: oracle.GRADIENTS["pair"]}
UNBOUNDED = (-math.inf, math.inf)


def tensors(columns, device):
    return [torch.from_numpy(numpy.ascontiguousarray(column)).to(device).requires_grad_() for column in columns]


def evaluate(operator, inputs, clamps, grad_output=None):
    value = operator(*inputs, clamp_min=clamps[0], clamp_max=clamps[1])
    return value.detach(), torch.autograd.grad(value, inputs, torch.ones_like(value) if grad_output is None else grad_output)


def assert_accurate(operator, columns, device, clamps=(-30.0, 20.0), exact=None):
    """The value and, for a grad_output of 1, every gradient."""
    inputs = tensors(columns, device)
    exact = exact or FAST[operator](*columns, *clamps)
    value, gradients = evaluate(operator, inputs, clamps)
    oracle.assert_within(value, exact.value, oracle.ulp_error(value, exact.value), BOUND[operator], inputs)
    for got, want, scale, limit in zip(gradients, exact.gradients, exact.scales, GRADIENTS[operator], strict=True):
        oracle.assert_within(got, want, oracle.ulp_error(got, want, scale), limit, inputs)
    assert (value >= operator.of_divergence[1]).all(), "a divergence is never negative"


@DTYPES
@each_documented_loss
def test_bounds_hold_under_the_default_clamp(operator, dtype, device, rng):
    assert_accurate(operator, POINTS[operator](rng, 200_000, dtype), device)


@DTYPES
@each_documented_loss
def test_bounds_hold_against_mpmath(operator, dtype, device, rng):
    columns = POINTS[operator](rng, 600, dtype)
    assert_accurate(operator, columns, device, exact=oracle.exact_array(SLOW[operator], zip(*columns, strict=True)))


@DTYPES
@each_documented_loss
@pytest.mark.parametrize(
    "clamps",
    [
        UNBOUNDED,
        (-80.0, 80.0),
        (-43.0, 43.0),
        (-43.5, 44.0),
        (-350.0, 350.0),
        (-800.0, math.inf),
        (-math.inf, -5.0),
        (7.0, 7.0),
        (0.0, 2.0**100),  # as every bound here, a number of each dtype: a kernel clamps to numbers of its dtype
    ],
    ids=str,
)
def test_bounds_hold_under_any_clamp(operator, dtype, clamps, device, rng):
    assert_accurate(operator, WIDE_POINTS[operator](rng, 100_000, dtype), device, clamps)


@DTYPES
@each_documented_loss
def test_bounds_hold_under_random_clamps(operator, dtype, device, rng):
    for _ in range(20):
        clamps = numpy.sort(points.wide_log_vars(rng, 2, dtype)).tolist()
        assert_accurate(operator, WIDE_POINTS[operator](rng, 2000, dtype), device, clamps)


@DTYPES
@each_documented_loss
def test_bounds_hold_without_a_clamp_against_mpmath(operator, dtype, device, rng):
    columns = WIDE_POINTS[operator](rng, 600, dtype)
    exact = oracle.exact_array(SLOW[operator], zip(*columns, strict=True), *UNBOUNDED)
    assert_accurate(operator, columns, device, UNBOUNDED, exact)


@pytest.mark.parametrize("width", [32, 64])
@each_documented_loss
def test_bounds_hold_for_whatever_hypothesis_finds(operator, width, device):
    finite = st.floats(width=width, allow_nan=False, allow_infinity=False)
    moderate = st.floats(min_value=-40, max_value=40, width=width)
    # Clamps that leave a finite log-variance finite.
    low, high = (st.one_of(moderate, finite, st.just(unbounded)) for unbounded in UNBOUNDED)
    clamps = st.one_of(st.just((-30.0, 20.0)), st.tuples(low, high).filter(lambda pair: pair[0] <= pair[1]))

    @settings(max_examples=200, deadline=None, database=None)
    @given(point=st.tuples(*[st.one_of(moderate, finite)] * operator.count), clamps=clamps)
    def check(point, clamps):
        columns = [numpy.array([x], dtype=f"float{width}") for x in point]
        assert_accurate(operator, columns, device, clamps, oracle.exact_array(SLOW[operator], [point], *clamps))

    check()


@DTYPES
@pytest.mark.parametrize("point", [points.WORST_KNOWN, points.WORST_KNOWN_GRADIENT], ids=["value", "gradient"])
@pytest.mark.parametrize("clamps", [(-30.0, 20.0), UNBOUNDED], ids=["narrow", "wide"])
def test_bounds_hold_at_the_worst_points_known(point, clamps, dtype, device):
    columns = [numpy.full(3, x, dtype=dtype) for x in point]
    assert_accurate(PAIR, columns, device, clamps, oracle.exact_array(oracle.exact_pair, zip(*columns, strict=True)))


@DTYPES
@pytest.mark.parametrize("clamps", [(-30.0, 20.0), UNBOUNDED], ids=["narrow", "wide"])
def test_the_gradient_of_a_subnormal_log_variance_is_rounded_once(clamps, dtype, device):
    """expm1(log_var) / 2, which is half of log_var there."""
    log_var = torch.from_numpy(numpy.arange(1, 40, dtype=dtype) * numpy.finfo(dtype).smallest_subnormal).to(device)
    _, (_, gradient) = evaluate(SINGLE, [torch.zeros_like(log_var).requires_grad_(), log_var.requires_grad_()], clamps)
    assert torch.equal(gradient, 0.5 * log_var)


@DTYPES
def test_bounds_hold_where_the_divergence_collapses(dtype, device, rng):
    """Down to inputs of 1e-30, where plain torch returns zeros, and in float64 to 1e-150."""
    n, lowest = 50_000, -30 if dtype is numpy.float32 else -150
    tiny = [points.decades(rng, n, lowest, -2).astype(dtype) for _ in range(4)]
    assert_accurate(SINGLE, tiny[:2], device)
    assert_accurate(PAIR, tiny, device)
    base = [points.means(rng, n, dtype), points.log_vars(rng, n, dtype)]
    assert_accurate(PAIR, [points.nudge(rng, base[0], 9), points.nudge(rng, base[1], 9), *base], device)


@DTYPES
def test_bounds_hold_at_the_clamp_edges_and_multiples_of_ln2(dtype, device, rng):
    n = 50_000
    for log_var in (points.clamp_edges, points.ln2_multiples):
        edges = log_var(rng, n, dtype)
        other = points.mixed(rng, n, edges, log_var(rng, n, dtype), points.log_vars(rng, n, dtype)).astype(dtype)
        mean = points.means(rng, n, dtype)
        assert_accurate(SINGLE, (mean, edges), device)
        assert_accurate(PAIR, (mean, edges, points.nudge(rng, mean), other), device)
        assert_accurate(PAIR, (mean, other, points.nudge(rng, mean), edges), device)


@DTYPES
def test_bounds_hold_where_means_of_opposite_signs_differ_by_more_than_the_largest_number(dtype, device, rng):
    n, largest = 2000, numpy.finfo(dtype).max
    mu_p = (largest * rng.uniform(0.5, 1, n)).astype(dtype)
    mu_q = (-largest * rng.uniform(0.5, 1, n)).astype(dtype)
    log_vars = [points.log_vars(rng, n, dtype) for _ in range(2)]
    assert_accurate(PAIR, (mu_p, log_vars[0], mu_q, log_vars[1]), device)
    wide = [points.wide_log_vars(rng, n, dtype) for _ in range(2)]
    assert_accurate(PAIR, (mu_p, wide[0], mu_q, wide[1]), device, UNBOUNDED)
    balanced = (2 * numpy.log(largest.astype(numpy.longdouble)) + rng.normal(size=n)).astype(dtype)
    assert_accurate(PAIR, (mu_p, wide[0], mu_q, balanced), device, UNBOUNDED)


def overflows(gradient, dtype):
    """Whether the gradient for a grad_output of 1 leaves the format: it stays infinite then, however small grad_output is."""
    return numpy.abs(gradient) >= numpy.finfo(dtype).max * (1 - 4 * numpy.finfo(dtype).eps)


@DTYPES
@each_documented_loss
def test_a_power_of_two_as_grad_output_keeps_the_bounds(operator, dtype, device, rng):
    columns = POINTS[operator](rng, 20_000, dtype)
    inputs, exact = tensors(columns, device), FAST[operator](*columns)
    for power in (2.0**-20, -0.5, 64.0):
        _, gradients = evaluate(operator, inputs, (-30.0, 20.0), torch.full_like(inputs[0], power))
        for got, want, scale, bound in zip(gradients, exact.gradients, exact.scales, GRADIENTS[operator], strict=True):
            # Only a subnormal gradient can be rounded again, by half of the smallest number.
            smallest = oracle.ulp(0.0, got.dtype)
            error = oracle.distance(got, want * power) / (oracle.ulp(scale, got.dtype) * abs(power) + smallest / 2 / bound)
            oracle.assert_within(got, want * power, numpy.where(overflows(want, dtype), 0, error), bound, inputs)


@DTYPES
@each_documented_loss
def test_any_grad_output_adds_at_most_one_rounding(operator, dtype, device, rng):
    """|got - g f| <= |g| bound ulp(f) + ulp(g f) / 2, for the gradient f of a grad_output of 1."""
    columns = POINTS[operator](rng, 50_000, dtype)
    inputs, exact = tensors(columns, device), FAST[operator](*columns)
    grad_output = points.decades(rng, 50_000, -3, 3).astype(dtype)
    _, gradients = evaluate(operator, inputs, (-30.0, 20.0), torch.from_numpy(grad_output).to(device))
    g = grad_output.astype(numpy.longdouble)
    for got, want, scale, bound in zip(gradients, exact.gradients, exact.scales, GRADIENTS[operator], strict=True):
        inherited = numpy.abs(g) * bound * oracle.ulp(scale, got.dtype)
        rounding = oracle.ulp(numpy.abs(g * want) + inherited, got.dtype) / 2
        error = numpy.where(overflows(want, dtype), 0, oracle.distance(got, g * want) / (inherited + rounding))
        oracle.assert_within(got, g * want, error, 1.0, (*inputs, torch.from_numpy(grad_output)))


@DTYPES
@pytest.mark.parametrize("clamps", [(-30.0, 20.0), UNBOUNDED], ids=["default", "unbounded"])
def test_exactly_zero_where_p_equals_q(dtype, clamps, device, rng):
    mu, log_var = (points.wide_pair if clamps == UNBOUNDED else points.pair)(rng, 50_000, dtype)[:2]
    inputs = tensors((mu, log_var, mu, log_var), device)
    value, gradients = evaluate(PAIR, inputs, clamps)
    assert (value == 0.5).all()
    assert all((gradient == 0).all() for gradient in gradients)


@DTYPES
def test_exactly_zero_at_the_standard_normal(dtype, device):
    value, gradients = evaluate(SINGLE, tensors([numpy.zeros(5, dtype)] * 2, device), (-30.0, 20.0))
    assert (value == 0).all() and all((gradient == 0).all() for gradient in gradients)


def test_exactly_zero_where_the_clamp_makes_p_equal_q(device):
    values = [0.25, -40.0, 0.25, -31.5]
    assert kl_ext.kl_div_pair_loss(*(torch.tensor([x], device=device) for x in values)).item() == 0.5


# (arguments, clamps of +-inf): where a factor overflows, underflows or is lost, and the loss is not.
FINITE = [
    (SINGLE, numpy.float32, (0.0, 89.0)),
    (SINGLE, numpy.float32, (0.0, 89.4)),
    (SINGLE, numpy.float32, (0.0, -3e38)),
    (SINGLE, numpy.float32, (2e19, 0.0)),
    (SINGLE, numpy.float64, (0.0, 710.2)),
    (SINGLE, numpy.float64, (1.5e154, -1e308)),
    (PAIR, numpy.float32, (0.0, 0.0, 0.0, -88.0)),
    (PAIR, numpy.float32, (3.0, -100.0, 3.0, -100.0)),
    (PAIR, numpy.float32, (3.0, -101.0, 3.0, -100.0)),
    (PAIR, numpy.float32, (1e-30, -100.0, 0.0, -100.0)),
    (PAIR, numpy.float32, (1e-45, -290.0, 0.0, -290.0)),
    (PAIR, numpy.float32, (3e-45, -289.0, -3e-45, -290.0)),
    (PAIR, numpy.float32, (1e25, 150.0, 0.0, 150.0)),
    (PAIR, numpy.float32, (3e38, 177.0, -3e38, 177.0)),
    (PAIR, numpy.float32, (0.0, -2e38, 0.0, 1e38)),
    (PAIR, numpy.float32, (1e-20, 80.0, 0.0, 80.0)),
    (PAIR, numpy.float64, (3.0, -800.0, 3.0, -800.5)),
    (PAIR, numpy.float64, (5e-324, -1480.0, 0.0, -1480.0)),
    (PAIR, numpy.float64, (1e300, 1400.0, -1e300, 1400.0)),
    # Just below where the ratio of variances overflows.
    (PAIR, numpy.float32, (0.0, 88.72283935546875, 0.0, 1e-6)),
    (PAIR, numpy.float64, (0.0, 709.78271289338397, 0.0, 0.0)),
    (PAIR, numpy.float64, (0.0, 355.0, 0.0, -354.78271289338397)),
]


@pytest.mark.parametrize("operator, dtype, point", FINITE, ids=lambda x: str(x) if isinstance(x, tuple) else "")
def test_infinite_only_where_the_loss_itself_overflows(operator, dtype, point, device):
    columns = [numpy.array([x], dtype=dtype) for x in point]
    exact = oracle.exact_array(SLOW[operator], zip(*columns, strict=True), *UNBOUNDED)
    value, _ = evaluate(operator, tensors(columns, device), UNBOUNDED)
    assert exact.value[0] < numpy.finfo(dtype).max, "the point is for a finite loss"
    assert value.isfinite().all()
    assert_accurate(operator, columns, device, UNBOUNDED, exact)


@pytest.mark.parametrize(
    "operator, point",
    [
        (SINGLE, (0.0, 89.5)),
        (SINGLE, (3e19, 0.0)),
        (PAIR, (1.0, 0.0, 0.0, -89.0)),
        (PAIR, (0.0, -4.0172871782917574e37, 0.0, -3.4028234663852886e38)),  # their difference does not overflow
    ],
    ids=str,
)
def test_infinite_where_the_loss_overflows(operator, point, device):
    """And the gradients with it, or they are finite."""
    value, gradients = evaluate(operator, tensors([numpy.array([x], numpy.float32) for x in point], device), UNBOUNDED)
    assert value.item() == math.inf
    assert not any(gradient.isnan().any() for gradient in gradients)
