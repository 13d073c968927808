"""The true values of the losses and of their gradients, computed without our kernels, and distances from them in ulps.

Two oracles. `exact_single` and `exact_pair` take one element to 60 digits and more with mpmath: slow, and beyond doubt.
`single` and `pair` take arrays in numpy's longdouble (64 bits of mantissa or more, exponents beyond any float64 result): within
0.01 ulp of float64, which test_oracle.py checks against the first. Finite inputs only; the clamp bounds are taken as given, so
they must be representable in the arithmetic type.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mpmath
import numpy
import torch
from mpmath import mp, mpf

Array = Any  # numpy.ndarray of longdouble, or one mpf

assert numpy.finfo(numpy.longdouble).nmant >= 63, "the oracle needs a longdouble wider than float64"


class Exact(NamedTuple):
    """`scales[i]` is what the bound of `gradients[i]` is in ulps of: itself, or for log_var_q the larger of its two terms."""

    value: Array
    gradients: tuple[Array, ...]
    scales: tuple[Array, ...]
    t: Array  # the value without the pair's constant 1/2


class Format(NamedTuple):
    mantissa_bits: int  # without the implicit one
    smallest_exponent: int  # of a normal number
    largest_exponent: int


# The bounds of csrc/math/gaussian.h, in ulps: of the single loss, of the documented pair and the t in it, of a gradient, of the
# gradient of log_var_q (of the larger of its two terms), and of whatever is rounded to a narrower dtype than the arithmetic's.
SINGLE, PAIR, GRADIENT, LOG_VAR_Q, NARROWED = 2.5, 4.5, 3.0, 6.0, 0.51
GRADIENTS = {"single": (GRADIENT, GRADIENT), "pair": (GRADIENT, GRADIENT, GRADIENT, LOG_VAR_Q)}

FORMATS = {
    torch.float16: Format(10, -14, 15),
    torch.bfloat16: Format(7, -126, 127),
    torch.float32: Format(23, -126, 127),
    torch.float64: Format(52, -1022, 1023),
}


def to_longdouble(x: torch.Tensor) -> Array:
    return x.detach().cpu().double().numpy().astype(numpy.longdouble)


def ulp(x: Array, dtype: torch.dtype) -> Array:
    """The spacing of dtype's numbers in the binade of x: down to the subnormal one, and as if exponents had no upper end."""
    form = FORMATS[dtype]
    _, exponent = numpy.frexp(numpy.where(numpy.isfinite(x), x, 0).astype(numpy.longdouble))
    exponent = numpy.where(numpy.equal(x, 0), form.smallest_exponent, exponent - 1)
    return numpy.ldexp(numpy.longdouble(1), numpy.maximum(exponent, form.smallest_exponent) - form.mantissa_bits)


def distance(got: torch.Tensor, exact: Array) -> Array:
    """|got - exact|. An infinite got stands for the first number beyond the format, or for anything beyond that one."""
    g, exact = to_longdouble(got), numpy.asarray(exact, dtype=numpy.longdouble)
    limit = numpy.ldexp(numpy.longdouble(1), FORMATS[got.dtype].largest_exponent + 1)
    overflowed = numpy.isinf(g)
    beyond = overflowed & (numpy.abs(exact) >= limit) & (numpy.signbit(g) == numpy.signbit(exact))
    both_nan = numpy.isnan(g) & numpy.isnan(exact)
    with numpy.errstate(invalid="ignore"):
        gap = numpy.abs(numpy.where(overflowed, numpy.copysign(limit, g), g) - exact)
    return numpy.where(beyond | both_nan, 0, numpy.where(numpy.isnan(gap), numpy.inf, gap))


def ulp_error(got: torch.Tensor, exact: Array, scale: Array | None = None) -> Array:
    """|got - exact| in ulps, of got's dtype, of `scale` (exact itself unless given)."""
    return distance(got, exact) / ulp(numpy.asarray(exact if scale is None else scale), got.dtype)


def assert_within(got: torch.Tensor, exact: Array, error: Array, bound: float, inputs: Sequence[torch.Tensor]) -> None:
    """Every error, of got from exact, is at most the bound. The message names the worst element and its inputs."""
    if error.size and not (error <= bound).all():
        at = numpy.unravel_index(numpy.argmax(error), error.shape)
        point = ", ".join(f"{x.expand(got.shape)[at].item():.17g}" for x in inputs)
        raise AssertionError(
            f"{got.dtype}: {(error > bound).sum()} of {error.size} beyond {bound}, the worst {error[at]:.4g} at ({point}): "
            f"got {got[at].item():.17g}, exactly {numpy.asarray(exact)[at]:.20g}"
        )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits, where any NaN equals any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


def phi(x: Array) -> Array:
    """e^x - 1 - x: the power series up to 1/2, where the other form cancels, and beyond it that form."""
    small = numpy.abs(x) < 0.5
    near, far = numpy.where(small, x, 0), numpy.where(small, 1, x)
    series = numpy.zeros_like(x)
    for n in range(21, 1, -1):
        series = (1 + series) * near / n
    return numpy.where(small, series * near, numpy.expm1(far) - far)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b, and what rounding it left out."""
    s = a + b
    from_b = s - a
    return s, (a - (s - from_b)) + (b - from_b)


def clamp(x: Array, low: float, high: float) -> Array:
    return numpy.minimum(numpy.maximum(x, numpy.longdouble(low)), numpy.longdouble(high))


def passes(x: Array, low: float, high: float) -> Array:
    return (x >= low) & (x <= high)


@numpy.errstate(all="ignore")
def single(mu: Array, log_var: Array, low: float = -30.0, high: float = 20.0) -> Exact:
    mu, log_var = numpy.broadcast_arrays(numpy.longdouble(mu), numpy.longdouble(log_var))
    lv = clamp(log_var, low, high)
    value = (mu * mu + phi(lv)) / 2
    gradients = mu, numpy.where(passes(log_var, low, high), numpy.expm1(lv) / 2, 0)
    return Exact(value, gradients, gradients, value)


@numpy.errstate(all="ignore")
def pair(mu_p: Array, log_var_p: Array, mu_q: Array, log_var_q: Array, low: float = -30.0, high: float = 20.0) -> Exact:
    """The documented pair, which is t + 1/2 with t = 2 KL, and its gradients."""
    mu_p, log_var_p, mu_q, log_var_q = numpy.broadcast_arrays(
        *(numpy.longdouble(x) for x in (mu_p, log_var_p, mu_q, log_var_q))
    )
    lp, lq = clamp(log_var_p, low, high), clamp(log_var_q, low, high)
    d, rest = two_sum(lp, -lq)
    slope = numpy.expm1(d)
    rest = numpy.where(numpy.isfinite(rest) & numpy.isfinite(slope), rest, 0)
    delta = mu_p - mu_q
    scaled = numpy.where(delta == 0, 0, delta * numpy.exp(-lq))
    square = numpy.where(delta == 0, 0, scaled * delta)
    t = phi(d) + rest * numpy.where(rest == 0, 0, slope) + square
    slope = slope + rest * numpy.where(rest == 0, 0, slope + 1)
    to_lp = numpy.where(passes(log_var_p, low, high), slope, 0)
    to_lq = numpy.where(passes(log_var_q, low, high), -(slope + square), 0)
    gradients = 2 * scaled, to_lp, -2 * scaled, to_lq
    return Exact(t + 0.5, gradients, (*gradients[:3], numpy.maximum(numpy.abs(slope), square)), t)


def exact_phi(x: mpf) -> mpf:
    digits = 0 if x == 0 else max(0, int(-mpmath.log10(abs(x))) + 1)
    with mp.workdps(60 + digits):
        return mpmath.expm1(x) - x


def exact_clamp(x: mpf, low: float, high: float) -> mpf:
    return min(max(x, mpf(low)), mpf(high))


@mp.workdps(60)
def exact_single(mu: float, log_var: float, low: float = -30.0, high: float = 20.0) -> Exact:
    mu, log_var = mpf(mu), mpf(log_var)
    lv = exact_clamp(log_var, low, high)
    value = (mu * mu + exact_phi(lv)) / 2
    gradients = mu, mpmath.expm1(lv) / 2 if low <= log_var <= high else mpf(0)
    return Exact(value, gradients, gradients, value)


@mp.workdps(60)
def exact_pair(mu_p: float, log_var_p: float, mu_q: float, log_var_q: float, low: float = -30.0, high: float = 20.0) -> Exact:
    mu_p, log_var_p, mu_q, log_var_q = mpf(mu_p), mpf(log_var_p), mpf(mu_q), mpf(log_var_q)
    lp, lq = exact_clamp(log_var_p, low, high), exact_clamp(log_var_q, low, high)
    with mp.workdps(700):  # the widest gap between two float64 exponents, so that neither difference is rounded
        d, delta = lp - lq, mu_p - mu_q
    slope = mpmath.expm1(d)
    scaled = delta * mpmath.exp(-lq)
    square = scaled * delta
    t = exact_phi(d) + square
    to_lp = slope if low <= log_var_p <= high else mpf(0)
    to_lq = -(slope + square) if low <= log_var_q <= high else mpf(0)
    gradients = 2 * scaled, to_lp, -2 * scaled, to_lq
    return Exact(t + mpf(0.5), gradients, (*gradients[:3], max(abs(slope), square)), t)


def mpf_to_longdouble(x: mpf) -> numpy.longdouble:
    """x rounded to longdouble; infinite or zero beyond its exponents."""
    mantissa, exponent = mpmath.frexp(x)
    high = float(mantissa)
    with numpy.errstate(over="ignore", under="ignore"):
        exponent = max(-17000, min(17000, int(exponent)))
        return numpy.ldexp(numpy.longdouble(high) + numpy.longdouble(float(mantissa - high)), exponent)


def exact_array(oracle: Any, points: Any, *clamps: float) -> Exact:
    """`exact_single` or `exact_pair` at every row of points, as arrays of longdouble."""
    rows = [oracle(*map(float, point), *clamps) for point in points]

    def column(take: Any) -> Array:
        return numpy.array([mpf_to_longdouble(take(row)) for row in rows], dtype=numpy.longdouble)

    count = len(rows[0].gradients)
    return Exact(
        column(lambda row: row.value),
        tuple(column(lambda row, i=i: row.gradients[i]) for i in range(count)),
        tuple(column(lambda row, i=i: row.scales[i]) for i in range(count)),
        column(lambda row: row.t),
    )
