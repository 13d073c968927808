"""Divergences from deviations to their bounds, at the ends of the format and beside those from log-variances.

The formulas alone are in test_normal_math.py, and what all operators have in common is tested with them.
"""

import math

import numpy
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import normal_cases as cases
import oracle
from halves import HALVES, apart, encoded, joins
from kl_ext import gaussian_kl_div, normal_kl_div
from kl_ext.reference import normal_kl_div as plain
from layouts import LAYOUTS, describe, expanded, iterator_strides
from operators import CLOSE, DTYPES, NORMAL
from oracle import same_bits
from ordered_sum import reduced_sum
from test_normal_math import FINITE, INFINITE, SPECIAL, STANDARD_SPECIAL

FLOATS = pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64], ids=["float32", "float64"])


def tensors(columns, device, dtype=None):
    drawn = [torch.from_numpy(numpy.ascontiguousarray(column)).to(device, dtype) for column in columns]
    return [x.requires_grad_() for x in drawn]


def assert_accurate(columns, device):
    """The terms and, for a grad_output of 1, every gradient; of two columns, against N(0, 1)."""
    inputs = tensors(columns, device)
    bounds = cases.GRADIENTS if len(inputs) == 4 else (0.0, cases.STANDARD_SCALE)
    value, exact = normal_kl_div(*inputs), cases.normal(*columns)
    bound = cases.VALUE if len(inputs) == 4 else cases.STANDARD
    oracle.assert_within(value.detach(), exact.value, oracle.ulp_error(value, exact.value), bound, inputs)
    assert (value >= 0).all(), "a divergence is never negative"
    gradients = torch.autograd.grad(value, inputs, torch.ones_like(value))
    for got, want, scale, limit in zip(gradients, exact.gradients, exact.scales, bounds, strict=False):
        oracle.assert_within(got, want, oracle.ulp_error(got, want, scale), limit, inputs)


@FLOATS
def test_terms_and_gradients_keep_their_bounds(dtype, device, rng):
    """For deviations and means over all exponents, near p = q, and where the formula changes from one octave to the next."""
    assert_accurate(cases.pair(rng, 100_000, dtype), device)
    assert_accurate(cases.standard(rng, 100_000, dtype), device)


@FLOATS
def test_terms_keep_their_bounds_against_mpmath(dtype, device, rng):
    for columns, bound in ((cases.pair(rng, 300, dtype), cases.VALUE), (cases.standard(rng, 300, dtype), cases.STANDARD)):
        exact = oracle.exact_array(cases.exact_normal, zip(*columns, strict=True)).value
        value = normal_kl_div(*tensors(columns, device)).detach()
        oracle.assert_within(value, exact, oracle.ulp_error(value, exact), bound, tensors(columns, device))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("source", [cases.pair, cases.standard], ids=["q", "standard"])
def test_half_types_are_rounded_once_from_float32(source, dtype, device, rng):
    """Values, none of which is negative, and gradients: that of scale_q, where its terms cancel, in ulps of the larger one."""
    with numpy.errstate(over="ignore"):
        columns = source(rng, 50_000, numpy.float32)
    rounded = [torch.from_numpy(column).to(dtype) for column in columns]
    usable = torch.stack([x.isfinite() & ((x > 0) | (i % 2 == 0)) for i, x in enumerate(rounded)]).all(0)
    inputs = [x[usable].to(device).requires_grad_() for x in rounded]
    value, exact = normal_kl_div(*inputs), cases.normal(*(oracle.to_longdouble(x) for x in inputs))
    oracle.assert_within(value.detach(), exact.value, oracle.ulp_error(value, exact.value), oracle.NARROWED, inputs)
    assert (value >= 0).all() and (value.isfinite().sum() > 1000)
    gradients = torch.autograd.grad(value, inputs, torch.ones_like(value))
    for got, want, scale in zip(gradients, exact.gradients, exact.scales, strict=False):
        scale = numpy.maximum(numpy.abs(want), numpy.abs(scale))
        oracle.assert_within(got, want, oracle.ulp_error(got, want, scale), oracle.NARROWED, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exactly_zero_where_p_equals_q(dtype, device, rng):
    """And against N(0, 1) where p is that; in sums as well."""
    kind = numpy.float64 if dtype == torch.float64 else numpy.float32
    with numpy.errstate(over="ignore"):
        mu, deviation = (torch.from_numpy(x).to(dtype) for x in cases.pair(rng, 20_000, kind)[:2])
    usable = mu.isfinite() & deviation.isfinite() & (deviation > 0)
    mu, deviation = mu[usable].to(device), deviation[usable].to(device)
    for inputs in ([mu, deviation, mu, deviation], [torch.zeros_like(mu), torch.ones_like(mu)]):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = normal_kl_div(*leaves)
        assert (value == 0).all() and not value.signbit().any()
        assert all((g == 0).all() for g in torch.autograd.grad(value.sum(), leaves))
        assert normal_kl_div(*inputs, reduction="sum").item() == 0


# The ends of the format


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs, value, gradients", SPECIAL + STANDARD_SPECIAL, ids=str)
def test_deviations_that_are_0_negative_infinite_or_no_number(inputs, value, gradients, dtype, device):
    """Elementwise, as one of many, and in a sum."""
    leaves = [torch.tensor([x], dtype=dtype, device=device, requires_grad=True) for x in inputs]
    want = [gradients[0], gradients[1], -gradients[0], gradients[2]] if len(inputs) == 4 else list(gradients)
    for got in (normal_kl_div(*leaves), normal_kl_div(*(x.expand(3, 50) for x in leaves))[1, 7], normal_kl_div(*leaves).sum()):
        torch.testing.assert_close(got.item(), value, equal_nan=True, rtol=0, atol=0)
    total = normal_kl_div(*leaves, reduction="sum")
    torch.testing.assert_close(total.item(), value, equal_nan=True, rtol=0, atol=0)
    got = [x.item() for x in torch.autograd.grad(total, leaves)]
    assert numpy.array_equal(got, want, equal_nan=True)


@pytest.mark.parametrize("point", FINITE, ids=str)
def test_finite_where_a_variance_or_a_ratio_overflows_and_the_value_does_not(point, device):
    columns = [numpy.array([x], numpy.float32) for x in point]
    assert normal_kl_div(*tensors(columns, device)).isfinite().all()
    assert_accurate(columns, device)


@pytest.mark.parametrize("point", INFINITE, ids=str)
def test_infinite_where_the_value_overflows(point, device):
    leaves = tensors([numpy.array([x], numpy.float32) for x in point], device)
    value = normal_kl_div(*leaves)
    assert value.item() == math.inf
    assert not any(x.isnan().any() for x in torch.autograd.grad(value.sum(), leaves))


def test_nothing_is_clamped(device):
    """Log-variances of -60 and 60, beyond the default clamp of the other divergence."""
    mu, log_std = torch.zeros(2, device=device), torch.tensor([-30.0, 30.0], device=device)
    unbounded = gaussian_kl_div(mu, 2 * log_std, clamp_min=None, clamp_max=None)
    torch.testing.assert_close(normal_kl_div(mu, log_std.exp()), unbounded, rtol=1e-5, atol=0)
    assert (gaussian_kl_div(mu, 2 * log_std) < unbounded).all()


# Beside others


def test_the_same_as_torch_distributions_in_float64(device):
    loc_p, scale_p, loc_q, scale_q = NORMAL.inputs(*[(50, 3)] * 4, device=device)
    expected = kl_divergence(Normal(loc_p, scale_p), Normal(loc_q, scale_q))
    torch.testing.assert_close(normal_kl_div(loc_p, scale_p, loc_q, scale_q), expected, **CLOSE)
    expected = kl_divergence(Normal(loc_p, scale_p), Normal(torch.zeros_like(loc_p), torch.ones_like(loc_p)))
    torch.testing.assert_close(normal_kl_div(loc_p, scale_p), expected, **CLOSE)


@FLOATS
def test_from_logarithms_of_deviations_by_doubling_them(dtype, device, rng):
    """As exact as from log-variances: to the bound of the other divergence, from the logarithms given."""
    mu, log_std = rng.normal(size=2000).astype(dtype), rng.uniform(-10, 9, 2000).astype(dtype)
    value = gaussian_kl_div(*(torch.from_numpy(x).to(device) for x in (mu, 2 * log_std)))
    exact = oracle.single(mu, 2 * log_std.astype(numpy.longdouble)).value
    oracle.assert_within(value, exact, oracle.ulp_error(value, exact), oracle.SINGLE, [torch.from_numpy(log_std)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_for_q_are_rounded_to_the_arithmetic_and_no_further(dtype, device):
    """0.1 is neither a half nor a float32 number."""
    loc, scale = NORMAL.inputs([500], [500], device=device, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    value = normal_kl_div(loc, scale, 0.1, 1.1, dtype=wide)
    exact = cases.normal(*map(oracle.to_longdouble, (loc, scale, *(torch.tensor(x, dtype=wide) for x in (0.1, 1.1))))).value
    oracle.assert_within(value, exact, oracle.ulp_error(value, exact), cases.VALUE, [loc, scale])


def test_the_operator_is_scriptable(device):
    @torch.jit.script
    def total(loc: Tensor, scale: Tensor, q: Tensor) -> Tensor:
        sums = torch.ops.kl_ext.normal_kl_div(loc, scale, q, q, reduction="sum", dim=[1], keepdim=True)
        return sums + torch.ops.kl_ext.normal_kl_div(loc, scale)

    loc, scale, _, q = NORMAL.inputs([4, 3], [4, 3], [3], [3], device=device, requires_grad=True)
    want = normal_kl_div(loc, scale, q, q, reduction="sum", dim=1, keepdim=True) + normal_kl_div(loc, scale)
    assert same_bits(total(loc, scale, q), want)
    for a, e in zip(*(torch.autograd.grad(x.sum(), (loc, scale, q)) for x in (total(loc, scale, q), want)), strict=True):
        assert same_bits(a, e)


# Layouts


def assert_like_contiguous(inputs, grad_output):
    """The bits that contiguous copies give; the strides of torch for the result, and for gradients those of their inputs."""
    copies = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
    value = normal_kl_div(*inputs)
    assert same_bits(value, normal_kl_div(*copies)) and value.isfinite().all(), describe(*inputs)
    assert value.stride() == iterator_strides(*inputs), describe(*inputs)
    expected = NORMAL.backward(grad_output.contiguous(), *copies)
    for x, got, gradient in zip(inputs, NORMAL.backward(grad_output, *inputs), expected, strict=True):
        assert got.stride() == torch.empty_like(x).stride() and same_bits(got, gradient), describe(*inputs)
    dims = [0, value.dim() - 1]
    ordered = reduced_sum(normal_kl_div(*copies), dims)
    assert same_bits(normal_kl_div(*inputs, reduction="sum", dim=dims), ordered), describe(*inputs)


@pytest.mark.parametrize("shape, name, make", LAYOUTS, ids=[f"{len(s)}d {n}" for s, n, _ in LAYOUTS])
@pytest.mark.parametrize("count", [2, 4])
def test_each_layout_for_all_arguments_and_for_each(count, shape, name, make, device):
    inputs = NORMAL.inputs(*[shape] * count, device=device, dtype=torch.float32)
    grad_output = torch.randn(shape, device=device)
    assert_like_contiguous([make(x) for x in inputs], make(grad_output))
    for position in range(count):
        assert_like_contiguous([make(x) if i == position else x for i, x in enumerate(inputs)], grad_output)


def test_a_prior_that_all_rows_share_gives_the_bits_of_an_expanded_one(device):
    for dtype in DTYPES:
        p, q = (NORMAL.inputs(shape, shape, device=device, dtype=dtype) for shape in ((65, 33), (33,)))
        for how in ({}, {"reduction": "sum"}, {"reduction": "mean", "dim": 0}, {"reduction": "batchmean"}):
            want = normal_kl_div(*p, *(x.expand(65, 33).contiguous() for x in q), **how)
            assert same_bits(normal_kl_div(*p, *q, **how), want)
            assert same_bits(normal_kl_div(*p, *(expanded(x.expand(65, 33), 0) for x in q), **how), want)


# Halves of one tensor


@pytest.mark.parametrize("halve", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
def test_gradients_of_halves_are_written_at_once(halve, reduction, device):
    """With the bits of those that autograd joins, and the values of the formula's."""
    for with_q in (False, True):
        h = (encoded(device).detach().abs() + 0.5).requires_grad_()
        q = [h.new_tensor(0.75), h.new_tensor(1.25)] if with_q else []
        mu, deviation = apart(halve(h))
        results = {
            "at once": normal_kl_div(*halve(h), *q, reduction=reduction).sum(),
            "joined": normal_kl_div(mu, deviation, *q, reduction=reduction).sum(),
            "plain": plain(*halve(h), *q, reduction=reduction).sum(),
        }
        gradients = {name: torch.autograd.grad(x, h, retain_graph=True)[0] for name, x in results.items()}
        torch.testing.assert_close(gradients["at once"], gradients["plain"], **CLOSE)
        assert same_bits(gradients["at once"] + 0.0, gradients["joined"] + 0.0)
        assert gradients["at once"].stride() == gradients["joined"].stride()
        assert not joins(results["at once"].backward) and joins(results["joined"].backward)
