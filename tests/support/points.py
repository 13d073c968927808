"""Inputs on which to hold the losses to their bounds: random ones, and those where a formula in floating point goes wrong.

Every function returns float32 or float64 arrays of the numpy dtype given, one per argument of the loss, all of one length.
"""

from typing import Any

import numpy

LN2 = numpy.log(numpy.longdouble(2))

# The largest error found in the search that gave the bounds: t is 4.02 ulp off here in float32.
WORST_KNOWN = (-1.24227452, -5.19932699, -0.0546756387, -5.19932699)
# Where the gradient of log_var_q was 6.2 ulp of its larger term off while that was rounded before it was added.
WORST_KNOWN_GRADIENT = tuple(map(float.fromhex, ("-0x1.87151cp-3", "0x1.e8124ep-6", "-0x1.8e99p-1", "-0x1.6815bep-2")))


def sign(rng: numpy.random.Generator, n: int) -> Any:
    return rng.choice([-1.0, 1.0], n)


def decades(rng: numpy.random.Generator, n: int, low: float, high: float) -> Any:
    """Either sign, with the logarithm of the size uniform between 10^low and 10^high."""
    return sign(rng, n) * 10.0 ** rng.uniform(low, high, n)


def nudge(rng: numpy.random.Generator, x: Any, most: int = 4) -> Any:
    """x moved by up to `most` ulps of its own dtype, either way."""
    integer = {4: numpy.int32, 8: numpy.int64}[x.dtype.itemsize]
    moved = x.view(integer) + rng.integers(-most, most + 1, x.shape).astype(integer)
    return numpy.where(x == 0, x, moved.view(x.dtype))


def mixed(rng: numpy.random.Generator, n: int, *sources: Any) -> Any:
    """Each element from one of the sources."""
    return numpy.choose(rng.integers(len(sources), size=n), [numpy.broadcast_to(source, n) for source in sources])


def clamp_edges(rng: numpy.random.Generator, n: int, dtype: Any) -> Any:
    return nudge(rng, rng.choice(numpy.array([-30, 20], dtype=dtype), n))


def ln2_multiples(rng: numpy.random.Generator, n: int, dtype: Any, most: int = 43) -> Any:
    return nudge(rng, (rng.integers(-most, most + 1, n) * LN2).astype(dtype))


def means(rng: numpy.random.Generator, n: int, dtype: Any) -> Any:
    return mixed(rng, n, rng.normal(size=n), decades(rng, n, -30, 0), decades(rng, n, 0, 15), 0.0).astype(dtype)


def log_vars(rng: numpy.random.Generator, n: int, dtype: Any) -> Any:
    return mixed(
        rng,
        n,
        rng.uniform(-31, 21, n).astype(dtype),
        rng.normal(size=n).astype(dtype),
        decades(rng, n, -30, 0).astype(dtype),
        ln2_multiples(rng, n, dtype),
        clamp_edges(rng, n, dtype),
        decades(rng, n, 1.3, 30).astype(dtype),
        dtype(0),
    )


def single(rng: numpy.random.Generator, n: int, dtype: Any) -> tuple[Any, Any]:
    return means(rng, n, dtype), log_vars(rng, n, dtype)


def pair(rng: numpy.random.Generator, n: int, dtype: Any) -> tuple[Any, Any, Any, Any]:
    """q as a single; p anywhere, within rounding of q, at a tiny distance, or with its log-variance a multiple of ln 2 away."""
    mu_q, log_var_q = single(rng, n, dtype)
    mu_p = mixed(
        rng,
        n,
        means(rng, n, dtype),
        nudge(rng, mu_q),
        mu_q,
        (mu_q + decades(rng, n, -10, 0)).astype(dtype),
        (mu_q * 1.5).astype(dtype),
    )
    log_var_p = mixed(
        rng,
        n,
        log_vars(rng, n, dtype),
        nudge(rng, log_var_q),
        log_var_q,
        (log_var_q + decades(rng, n, -10, 0)).astype(dtype),
        (log_var_q + ln2_multiples(rng, n, dtype)).astype(dtype),
    )
    columns = mu_p, log_var_p, mu_q, log_var_q
    for column, value in zip(columns, WORST_KNOWN, strict=True):
        column[:1] = value
    return columns


def wide_log_vars(rng: numpy.random.Generator, n: int, dtype: Any) -> Any:
    """Log-variances for a clamp that lets everything through: to where e^x and e^-x overflow, and far beyond."""
    edge = float(numpy.log(numpy.finfo(dtype).max))
    largest = float(numpy.log10(numpy.finfo(dtype).max)) - 0.01
    return mixed(
        rng,
        n,
        rng.uniform(-2.2 * edge, 2.2 * edge, n).astype(dtype),
        nudge(rng, (rng.choice([-2, -1.1634, -1, 1, 1.0079, 2], n) * edge).astype(dtype), 1000),
        ln2_multiples(rng, n, dtype, int(3 * edge)),
        decades(rng, n, -largest, largest).astype(dtype),
        log_vars(rng, n, dtype),
    )


def wide_means(rng: numpy.random.Generator, n: int, dtype: Any) -> Any:
    """Means over every finite size, subnormal ones included."""
    info = numpy.finfo(dtype)
    largest, smallest = float(numpy.log10(info.max)) - 0.01, float(numpy.log10(info.tiny)) - info.nmant * 0.30
    return mixed(
        rng,
        n,
        decades(rng, n, smallest, largest),
        decades(rng, n, smallest, 0),
        rng.normal(size=n),
        info.max,
        info.smallest_subnormal,
        0.0,
    ).astype(dtype)


def wide_single(rng: numpy.random.Generator, n: int, dtype: Any) -> tuple[Any, Any]:
    return wide_means(rng, n, dtype), wide_log_vars(rng, n, dtype)


def wide_pair(rng: numpy.random.Generator, n: int, dtype: Any) -> tuple[Any, Any, Any, Any]:
    """Also pairs whose D^2 e^-lq is of the size of 1 although its factors leave the format."""
    info = numpy.finfo(dtype)
    log_var_q, mu_q = wide_log_vars(rng, n, dtype), wide_means(rng, n, dtype)
    edge = float(numpy.log(info.max))
    balanced = numpy.exp(numpy.clip(log_var_q.astype(float), -2.2 * edge, 1.9 * edge).astype(numpy.longdouble) / 2)
    with numpy.errstate(over="ignore", under="ignore"):
        offset = numpy.clip(balanced * rng.normal(size=n), -info.max / 2, info.max / 2).astype(dtype)
    mu_p = mixed(rng, n, wide_means(rng, n, dtype), mu_q, offset)
    mu_q = numpy.where(mu_p == offset, dtype(0), mu_q)
    log_var_p = mixed(
        rng, n, wide_log_vars(rng, n, dtype), log_var_q, nudge(rng, log_var_q), (log_var_q + rng.normal(size=n)).astype(dtype)
    )
    # Two means of opposite signs near the largest number differ by more than it: they have a test of their own.
    with numpy.errstate(over="ignore"):
        mu_p = numpy.where(numpy.isfinite(mu_p - mu_q), mu_p, mu_q)
    return mu_p, numpy.where(numpy.isfinite(log_var_p), log_var_p, log_var_q), mu_q, log_var_q
