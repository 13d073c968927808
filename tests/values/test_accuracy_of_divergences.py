"""The terms of `gaussian_kl_div` and their gradients, to the bounds of the documented losses."""

import math

import numpy
import pytest
import torch

import oracle
import points
from kl_ext import gaussian_kl_div, kl_div_pair_loss, kl_div_single_loss
from operators import CLOSE, DTYPES, GAUSSIAN
from oracle import same_bits

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
    unit = torch.finfo(torch.float32).eps
    formula = GAUSSIAN.formula(mu.double(), log_var.double(), zero, zero)
    torch.testing.assert_close(value.double(), formula, rtol=oracle.SINGLE * unit, atol=CLOSE["atol"])


def test_the_documented_pair_is_twice_the_divergence_and_a_half(device, rng):
    inputs = [torch.from_numpy(x).to(device) for x in points.pair(rng, 20_000, numpy.float32)]
    assert same_bits(2 * gaussian_kl_div(*inputs) + 0.5, kl_div_pair_loss(*inputs))
