"""The divergence of two Gaussians from their standard deviations: true values, and inputs on which to hold it to its bounds.

The oracles are two, as in oracle.py and within the same distance of each other: `exact_normal` takes one element to 60 digits
with mpmath, `normal` takes arrays in longdouble. Finite means and positive finite deviations only.
"""

from typing import Any

import mpmath
import numpy
from mpmath import mp, mpf

import points
from oracle import Array, Exact

# The bounds of csrc/math/normal.h, in ulps: of the value; of the gradients of means, everywhere and where it and D / q are at
# least 16 times the least normal number; of scale_p; of scale_q, of the larger of its two terms and, where scale_p >= scale_q,
# of itself; of value and gradient against N(0, 1).
VALUE, MEAN, USUAL_MEAN, SCALE_P, SCALE_Q, SCALE_Q_ITSELF = 4.5, 4.5, 2.5, 4.0, 9.0, 8.0
STANDARD, STANDARD_SCALE = 3.0, 1.5
GRADIENTS = (MEAN, SCALE_P, MEAN, SCALE_Q)

# Ratios at which the formula goes from one power of two to the next, and 1.
SEAMS = [0.73046875, 1.0]

# The worst that searches found, for the value, a mean, scale_p and scale_q, in float32.
WORST_KNOWN = [
    ("-0x1.5985bp-10", "0x1.73fb08p-8", "0x1.e84p-24", "0x1.fc1444p-9"),
    ("-0x1.b1p-140", "0x1.035328p+0", "-0x1.aa8p-140", "0x1.035318p+0"),
    ("-0x1.bfd4e4p+88", "0x1.ffffbep-29", "0x1.9a2ea2p+0", "0x1.efa55ap-23"),
    ("0x1.069f5ap+2", "0x1.11e6eap+2", "-0x1.fbb6ep-3", "0x1.107d8cp-1"),
]


def ratio_divergence(p: Array, q: Array) -> Array:
    """(r^2 - 1) / 2 - log r of r = p / q, by what r is off 1 where r is near 1: log1p(d) = 2 artanh(d / (2 + d))."""
    r, d = p / q, (p - q) / q
    near = numpy.abs(d) < 0.5
    small = numpy.where(near, d, 0)
    s = small / (2 + small)
    series = numpy.zeros_like(s)
    for n in range(43, 1, -2):
        series = series * s * s + 1 / numpy.longdouble(n)
    rest = small * small / (2 + small) - 2 * s**3 * series
    return numpy.where(near, small * small / 2 + rest, (r - 1) * (r + 1) / 2 - numpy.log(r))


@numpy.errstate(all="ignore")
def normal(mu_p: Array, p: Array, mu_q: Array = 0.0, q: Array = 1.0) -> Exact:
    """The divergence and its gradients; `scales` as the bounds have it."""
    mu_p, p, mu_q, q = numpy.broadcast_arrays(*(numpy.longdouble(x) for x in (mu_p, p, mu_q, q)))
    shift = (mu_p - mu_q) / q
    value = ratio_divergence(p, q) + shift * shift / 2
    mean, by_ratio, by_shift = shift / q, (p - q) / q * ((p + q) / q) / q, shift * (shift / q)
    gradients = mean, (p - q) / q * ((p + q) / p) / q, -mean, -(by_ratio + by_shift)
    return Exact(value, gradients, (*gradients[:3], numpy.maximum(numpy.abs(by_ratio), by_shift)), value)


@mp.workdps(60)
def exact_normal(mu_p: float, p: float, mu_q: float = 0.0, q: float = 1.0) -> Exact:
    mu_p, p, mu_q, q = mpf(mu_p), mpf(p), mpf(mu_q), mpf(q)
    with mp.workdps(700):  # the widest gap between two float64 exponents, so that neither difference is rounded
        d, delta = p - q, mu_p - mu_q
    shift = delta / q
    digits = 0 if d == 0 else max(0, int(-2 * mpmath.log10(abs(d / q))) + 1)
    with mp.workdps(60 + digits):
        ratio = (d / q) ** 2 / 2 + (d / q - mpmath.log(p / q)) if p > q / 2 else ((p / q) ** 2 - 1) / 2 - mpmath.log(p / q)
    value = ratio + shift**2 / 2
    by_ratio, by_shift = d * (p + q) / q**3, shift**2 / q
    gradients = shift / q, d * (p + q) / (p * q**2), -shift / q, -(by_ratio + by_shift)
    return Exact(value, gradients, (*gradients[:3], max(abs(by_ratio), by_shift)), value)


def positive(x: Any, dtype: Any) -> Any:
    """x as deviations of the dtype: what is no positive number there becomes the least, and infinity the largest."""
    info = numpy.finfo(dtype)
    return numpy.fmin(numpy.fmax(x, info.smallest_subnormal), info.max).astype(dtype)


def powers_of_two(rng: numpy.random.Generator, n: int, low: float, high: float) -> Any:
    """2^low to 2^high with the logarithm uniform, in longdouble, which holds them all."""
    return numpy.exp2(rng.uniform(low, high, n).astype(numpy.longdouble))


def deviations(rng: numpy.random.Generator, n: int, dtype: Any) -> Any:
    """Over all exponents, subnormal ones too, more of them at both ends, near powers of two, and usual ones."""
    info = numpy.finfo(dtype)
    low, high = info.minexp - info.nmant, info.maxexp
    powers = numpy.ldexp(numpy.longdouble(1), rng.integers(low, high, n))
    return points.mixed(
        rng,
        n,
        positive(powers_of_two(rng, n, low, high), dtype),
        positive(powers_of_two(rng, n, low, info.minexp + 2), dtype),
        positive(powers_of_two(rng, n, high - 4, high), dtype),
        positive(powers_of_two(rng, n, -4, 4), dtype),
        positive(points.nudge(rng, powers.astype(dtype)), dtype),
    ).astype(dtype)


def pair(rng: numpy.random.Generator, n: int, dtype: Any) -> tuple[Any, Any, Any, Any]:
    """p anywhere, next to q, or where r leaves one octave for the next; means such that neither term or either one prevails."""
    info = numpy.finfo(dtype)
    q, half = deviations(rng, n, dtype), info.maxexp / 2 + 2
    exact = q.astype(numpy.longdouble)
    seams = numpy.ldexp(rng.choice(numpy.array(SEAMS, numpy.longdouble), n), rng.integers(-3, 4, n))
    p = points.mixed(
        rng,
        n,
        deviations(rng, n, dtype),
        q,
        positive(points.nudge(rng, q, 8), dtype),
        positive(exact * (1 + points.sign(rng, n) * numpy.exp2(-rng.uniform(0, info.nmant + 1, n))), dtype),
        positive(points.nudge(rng, positive(exact * seams, dtype), 20), dtype),
        positive(exact * powers_of_two(rng, n, -2, 2), dtype),
        positive(exact * powers_of_two(rng, n, -half, half), dtype),
    ).astype(dtype)

    def means(x: Any) -> Any:
        return numpy.clip(x, -info.max, info.max).astype(dtype)

    sign, low, high = points.sign(rng, n), info.minexp - info.nmant, info.maxexp
    anywhere = means(sign * powers_of_two(rng, n, low, high))
    mu_q = points.mixed(rng, n, anywhere, rng.normal(size=n).astype(dtype), dtype(0)).astype(dtype)
    balanced = exact * numpy.sqrt(numpy.abs(p - exact) / exact) * rng.normal(size=n)
    mu_p = points.mixed(
        rng,
        n,
        mu_q,
        means(points.sign(rng, n) * powers_of_two(rng, n, low, high)),
        means(mu_q + sign * exact * powers_of_two(rng, n, -4, 4)),
        means(mu_q + balanced),
        means(mu_q + sign * exact * powers_of_two(rng, n, -half, half)),
        means(mu_q.astype(numpy.longdouble) * (1 + sign * numpy.exp2(-rng.uniform(0, info.nmant, n)))),
    ).astype(dtype)
    columns = mu_p, p, mu_q, q
    for i, point in enumerate(WORST_KNOWN):
        for column, x in zip(columns, point, strict=True):
            column[i] = float.fromhex(x)
    return columns


def standard(rng: numpy.random.Generator, n: int, dtype: Any) -> tuple[Any, Any]:
    """Deviations over all exponents, next to 1, and where the deviation leaves one octave for the next; means of every size."""
    one = numpy.ones(n, dtype)
    info = numpy.finfo(dtype)
    seams = numpy.ldexp(rng.choice(SEAMS, n), rng.integers(-3, 4, n)).astype(dtype)
    near = one + points.sign(rng, n) * numpy.exp2(-rng.uniform(0, info.nmant + 1, n))
    p = points.mixed(
        rng, n, deviations(rng, n, dtype), one, points.nudge(rng, seams, 20), positive(near, dtype), rng.uniform(0.25, 4, n)
    ).astype(dtype)
    half = info.maxexp / 2 + 2
    mu = points.mixed(
        rng, n, dtype(0), rng.normal(size=n), (p - numpy.longdouble(1)) * rng.normal(size=n), powers_of_two(rng, n, -half, half)
    )
    return numpy.clip(mu, -info.max, info.max).astype(dtype), p
