"""The oracles and the helpers are right: nothing else checks them."""

import math

import numpy
import pytest
import torch
from mpmath import mp, mpf

import points
from oracle import (
    FORMATS,
    distance,
    exact_array,
    exact_pair,
    exact_single,
    mpf_to_longdouble,
    pair,
    same_bits,
    single,
    ulp,
    ulp_error,
)

HALVES = [torch.float16, torch.bfloat16]
EVERY = [*HALVES, torch.float32, torch.float64]


def test_mpmath_gives_known_values():
    with mp.workdps(60):
        assert abs(exact_single(1.0, 1.0).value - (mp.e - 1) / 2) < mpf(10) ** -58
        assert exact_single(1.0, 1.0).gradients[0] == 1
        assert abs(exact_pair(0.5, 0.0, 0.0, 1.0).t - (1 + mpf("1.25") / mp.e - 1)) < mpf(10) ** -58
        assert abs(exact_pair(0.5, 0.0, 0.0, 1.0).value - exact_pair(0.5, 0.0, 0.0, 1.0).t - mpf("0.5")) < mpf(10) ** -58


def test_mpmath_agrees_with_the_documented_formula_and_its_derivatives():
    point, step = [0.3, -0.7, -0.4, 0.9], mpf(10) ** -20
    with mp.workdps(60):

        def formula(a, b, c, d):
            return mp.log(mp.exp(d) / mp.exp(b)) + (mp.exp(b) + (a - c) ** 2) / mp.exp(d) - mpf("0.5")

        exact = exact_pair(*point)
        assert abs(formula(*map(mpf, point)) - exact.value) < mpf(10) ** -55
        for i, gradient in enumerate(exact.gradients):
            up, down = [[mpf(x) + sign * step * (i == j) for j, x in enumerate(point)] for sign in (1, -1)]
            assert abs((formula(*up) - formula(*down)) / (2 * step) - gradient) < mpf(10) ** -35


def test_mpmath_keeps_its_digits_where_the_value_collapses():
    assert abs(exact_single(0.0, 1e-30).value / (mpf(1e-30) ** 2 / 4) - 1) < mpf(10) ** -29
    assert abs(exact_single(0.0, 5e-324).value / (mpf(5e-324) ** 2 / 4) - 1) < mpf(10) ** -50
    assert exact_pair(0.1, 5.0, 0.1, 5.0).t == 0
    assert exact_pair(1e300, 0.0, 1e300, 1e-300).t > 0


def test_gradients_stop_strictly_outside_the_clamp():
    for log_var, gradient in [(-31.0, 0), (-30.0, mp.expm1(-30) / 2), (20.0, mp.expm1(20) / 2), (20.5, 0)]:
        assert exact_single(0.0, log_var).gradients[1] == pytest.approx(float(gradient), rel=1e-12)
        assert float(single(0.0, log_var).gradients[1]) == pytest.approx(float(gradient), rel=1e-12)
        assert float(exact_pair(0.5, log_var, 0.0, -log_var).gradients[1] == 0) == float(not -30 <= log_var <= 20)
        assert float(pair(0.5, -log_var, 0.0, log_var).gradients[3] == 0) == float(not -30 <= log_var <= 20)


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64])
@pytest.mark.parametrize("clamps", [(-30.0, 20.0), (-math.inf, math.inf)], ids=["default", "unbounded"])
@pytest.mark.parametrize(
    "inputs, fast, slow", [("single", single, exact_single), ("pair", pair, exact_pair)], ids=["single", "pair"]
)
def test_longdouble_agrees_with_mpmath_to_a_hundredth_of_an_ulp(inputs, fast, slow, dtype, clamps, rng):
    columns = getattr(points, inputs if clamps[0] == -30 else f"wide_{inputs}")(rng, 400, dtype)
    got = fast(*columns, *clamps)
    exact = exact_array(slow, zip(*columns, strict=True), *clamps)
    limit = numpy.longdouble(numpy.finfo(numpy.float64).max) * 2
    pairs = [(got.value, exact.value, exact.value), (got.t, exact.t, exact.t)]
    pairs += zip(got.gradients, exact.gradients, exact.scales, strict=True)
    for g, e, scale in pairs:
        with numpy.errstate(invalid="ignore"):
            error = numpy.abs(g - e) / ulp(scale, torch.float64)
        error = numpy.where((numpy.abs(g) >= limit) & (numpy.abs(e) >= limit) & (numpy.sign(g) == numpy.sign(e)), 0, error)
        worst = numpy.argmax(error)
        assert error[worst] <= 0.01, (float(error[worst]), [float(column[worst]).hex() for column in columns])


def test_mpf_to_longdouble_keeps_64_bits_and_every_exponent():
    assert mpf_to_longdouble(mpf(0)) == 0
    assert mpf_to_longdouble(mpf(2) ** -16000) == numpy.ldexp(numpy.longdouble(1), -16000)
    assert mpf_to_longdouble(mpf(10) ** 100000) == numpy.inf
    with mp.workdps(60):
        third = mpf_to_longdouble(mpf(1) / 3)
    assert abs(third * 3 - 1) <= numpy.finfo(numpy.longdouble).eps


@pytest.mark.parametrize("dtype", EVERY)
def test_ulp_is_the_spacing_of_the_format(dtype):
    info, form = torch.finfo(dtype), FORMATS[dtype]
    assert info.max == 2.0**form.largest_exponent * (2 - 2.0**-form.mantissa_bits)
    for x in (1.0, 1.5, 3.0, info.tiny, info.max):
        below = torch.nextafter(torch.tensor(x, dtype=dtype), torch.tensor(0.0, dtype=dtype)).item()
        assert ulp(numpy.longdouble(x), dtype) == (x - below) * (2 if math.frexp(x)[0] == 0.5 and x != info.tiny else 1)
    smallest = math.ldexp(info.tiny, -form.mantissa_bits)
    for x in (0.0, smallest, info.tiny / 2, smallest / 1024):
        assert ulp(numpy.longdouble(x), dtype) == smallest
    assert ulp(numpy.longdouble(-1.0), dtype) == info.eps


@pytest.mark.parametrize("dtype", EVERY)
def test_ulp_error_counts_ulps(dtype):
    info = torch.finfo(dtype)
    limit = numpy.ldexp(numpy.longdouble(1), FORMATS[dtype].largest_exponent + 1)

    def error(got, exact):
        return float(ulp_error(torch.tensor([got], dtype=dtype), numpy.array([exact], dtype=numpy.longdouble))[0])

    assert error(1.0, 1.0) == 0
    assert error(1.0 + info.eps, numpy.longdouble(1.0)) == 1
    assert error(1.0, numpy.longdouble(1.0) + info.eps / 4) == 0.25
    assert error(info.tiny, 0.0) == 2.0 ** FORMATS[dtype].mantissa_bits
    assert error(-1.0, 1.0) == 2 / info.eps
    assert error(math.inf, limit * 4) == error(-math.inf, -limit) == 0
    assert error(math.inf, info.max) == 1 and error(info.max, limit) == 0.5
    assert error(info.max, limit * 4) > 0.7 / info.eps
    assert error(math.inf, 1.0) > 1 / info.eps and error(-math.inf, limit) > 1 / info.eps
    assert error(math.nan, math.nan) == error(math.inf, math.inf) == 0
    assert error(math.nan, 1.0) == error(1.0, math.nan) == error(math.nan, math.inf) == error(math.inf, -math.inf) == math.inf


def test_distance_is_absolute():
    assert float(distance(torch.tensor(3.0), numpy.longdouble(1.0))) == 2.0


def test_same_bits_sees_one_bit_and_overlooks_which_nan():
    a = torch.tensor([1.0, -0.0, math.nan])
    other_nan = torch.tensor([0x3F800000, -(2**31), 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert same_bits(a, other_nan) and same_bits(a, a.clone())
    assert not same_bits(a, torch.tensor([1.0, 0.0, math.nan]))
    assert not same_bits(a, torch.tensor([math.nextafter(1.0, 2.0) + 1e-7, -0.0, math.nan]))
    assert not same_bits(a, a.double()) and not same_bits(a, a[:2]) and not same_bits(torch.ones(1), torch.full((1,), math.nan))


def test_points_hold_the_worst_known_one_and_what_collapses(rng):
    mu_p, log_var_p, mu_q, log_var_q = points.pair(rng, 2000, numpy.float32)
    assert [float(c[0]) for c in (mu_p, log_var_p, mu_q, log_var_q)] == [float(numpy.float32(x)) for x in points.WORST_KNOWN]
    assert ((mu_p == mu_q) & (log_var_p == log_var_q)).any()
    assert ((log_var_p != log_var_q) & (numpy.abs(log_var_p - log_var_q) <= 1e-6 * numpy.abs(log_var_q))).any()
    assert (numpy.abs(log_var_q[log_var_q != 0]) < 1e-20).any() and (numpy.abs(log_var_q) > 30).any()
    for wide in (points.wide_single, points.wide_pair):
        assert all(numpy.isfinite(column).all() for column in wide(rng, 2000, numpy.float32))
