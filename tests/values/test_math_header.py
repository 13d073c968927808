"""The formulas of csrc/math, compiled alone: the bounds that they state, before any operator is in between."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
import torch

import oracle
import points

HEADERS = Path(__file__).resolve().parents[2] / "csrc" / "math"

# The operators' own functions over arrays; and for the exhaustive test, which is too long for numpy, the largest errors of phi
# and expm1 over a range of float32 bit patterns against long double.
SOURCE = """
#include <algorithm>
#include <cmath>
#include <cstdint>
#include "gaussian.h"
using namespace kl_ext::math;

template <class T, Range range>
void exponentials(const T* x, T* half_phi_of_x, T* half_expm1_of_x, long n) {
  for (long i = 0; i < n; ++i) {
    const T half = T(0.5) * x[i];
    half_phi_of_x[i] = half_phi<range, Exactness::kExact>(half, split<range, 1>(half));
    half_expm1_of_x[i] = half_expm1<range>(split<range, 0, Use::kExpm1>(x[i]));
  }
}

template <class T, Range range>
void divergences(const T* mu_p, const T* log_var_p, const T* mu_q, const T* log_var_q, T* out, long n) {
  const Settings<T> none{-Format<T>::kInfinity, Format<T>::kInfinity};
  for (long i = 0; i < n; ++i) {
    const T inputs[] = {mu_p[i], log_var_p[i], mu_q[i], log_var_q[i]};
    out[i] = Divergence::forward<range>(inputs, none);
  }
}

// Of every loss the result and the gradients, interleaved.
template <class T, Range range, class F>
void loss(const T* const* inputs, Settings<T> settings, long i, T*& out) {
  T values[F::kInputs], gradients[F::kInputs];
  for (int input = 0; input < F::kInputs; ++input) values[input] = inputs[input][i];
  *out++ = F::result(F::template forward<range>(values, settings), settings);
  F::template backward<range>(T(0.75), values, settings, gradients);
  out = std::copy_n(gradients, F::kInputs, out);
}

template <class T, Range range>
void losses(const T* mu_p, const T* log_var_p, const T* mu_q, const T* log_var_q, T low, T high, T* out, long n) {
  const T* const inputs[] = {mu_p, log_var_p, mu_q, log_var_q};
  for (long i = 0; i < n; ++i) {
    loss<T, range, StandardDivergence>(inputs, {low, high}, i, out);
    loss<T, range, Divergence>(inputs, {low, high, T(2), T(0.5)}, i, out);
    loss<T, range, Divergence>(inputs, {low, high}, i, out);
  }
}

long double long_phi(long double x) {
  if (std::fabs(x) >= 0.5L) return std::expm1(x) - x;
  long double sum = 0;
  for (int n = 21; n >= 2; --n) sum = (1 + sum) * x / n;
  return sum * x;
}

double error_in_ulps(float got, long double exact) {
  const int exponent = exact == 0 ? -126 : std::max(std::ilogb(exact), -126);
  return std::fabs(got - exact) * std::ldexp(1.0L, 23 - exponent);
}

extern "C" {
#define KL_EXT_EXPORT(type, name, range) \\
  void exponentials_##type##_##name(const type* x, type* p, type* e, long n) { \\
    exponentials<type, Range::range>(x, p, e, n); \\
  } \\
  void divergences_##type##_##name(const type* a, const type* b, const type* c, const type* d, type* out, long n) { \\
    divergences<type, Range::range>(a, b, c, d, out, n); \\
  } \\
  void losses_##type##_##name(const type* a, const type* b, const type* c, const type* d, type low, type high, type* out, \\
                              long n) { \\
    losses<type, Range::range>(a, b, c, d, low, high, out, n); \\
  }
KL_EXT_EXPORT(float, narrow, kNarrow)
KL_EXT_EXPORT(float, wide, kWide)
KL_EXT_EXPORT(double, narrow, kNarrow)
KL_EXT_EXPORT(double, wide, kWide)

void long_phis(const double* x, long double* out, long n) {
  for (long i = 0; i < n; ++i) out[i] = long_phi(x[i]);
}

void worst(std::uint32_t first, std::uint32_t last, double* phi_error, double* expm1_error) {
  for (std::uint32_t bits = first; bits <= last; ++bits) {
    const float x = from_bits<float>(bits);
    float p, e;
    exponentials<float, Range::kNarrow>(&x, &p, &e, 1);
    *phi_error = std::fmax(*phi_error, error_in_ulps(p, long_phi(x) / 2));
    *expm1_error = std::fmax(*expm1_error, error_in_ulps(e, std::expm1(static_cast<long double>(x)) / 2));
  }
}
}
"""

PHI, EXPM1 = 2.0, 1.5  # the bounds that exponential.h states
EDGE = 50.5  # the widest difference of log-variances under the default clamp, and a little more
CONFIGURATIONS = pytest.mark.parametrize(
    "dtype, range_",
    [(d, r) for d in (numpy.float32, numpy.float64) for r in ("narrow", "wide")],
    ids=lambda x: getattr(x, "__name__", x),
)


def compiled(folder, *more):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "header.cpp").write_text(SOURCE)
    options = ["-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{HEADERS}"]
    subprocess.run([compiler, *options, *more, "header.cpp", "-o", "header.so"], cwd=folder, check=True, timeout=300)
    return ctypes.CDLL(str(folder / "header.so"))


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("header"))


@pytest.fixture(scope="module")
def header_of_gpus(tmp_path_factory):
    """What stands under __CUDA_ARCH__, but for instructions that only a GPU has."""
    return compiled(tmp_path_factory.mktemp("header_of_gpus"), "-D__CUDA_ARCH__=750")


def call(header, name, dtype, range_, inputs, outputs):
    """Calls name_dtype_range(inputs..., outputs..., length) and returns the outputs as tensors."""
    inputs = [numpy.ascontiguousarray(x, dtype=dtype) for x in inputs]
    results = [numpy.empty_like(inputs[0]) for _ in range(outputs)]
    function = getattr(header, f"{name}_{'float' if dtype is numpy.float32 else 'double'}_{range_}")
    function(*(ctypes.c_void_p(x.ctypes.data) for x in (*inputs, *results)), ctypes.c_long(inputs[0].size))
    return [torch.from_numpy(x) for x in results]


def assert_exponentials(header, dtype, range_, x):
    half_phi, half_expm1 = call(header, "exponentials", dtype, range_, [x], 2)
    exact, inputs = x.astype(numpy.longdouble), (torch.from_numpy(x),)
    with numpy.errstate(over="ignore"):
        pairs = (half_phi, oracle.phi(exact) / 2, PHI), (half_expm1, numpy.expm1(exact) / 2, EXPM1)
    for got, want, bound in pairs:
        oracle.assert_within(got, want, oracle.ulp_error(got, want), bound, inputs)
    assert (half_phi >= 0).all()


def losses(header, dtype, range_, inputs, bounds):
    """Of every loss the result and the gradients, as bits, every NaN alike."""
    number, suffix = (ctypes.c_float, "float") if dtype is numpy.float32 else (ctypes.c_double, "double")
    inputs = [numpy.ascontiguousarray(x, dtype=dtype) for x in inputs]
    out = numpy.empty([inputs[0].size, 3 + 5 + 5], dtype)
    function = getattr(header, f"losses_{suffix}_{range_}")
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in inputs]
    function(*pointers, *map(number, bounds), ctypes.c_void_p(out.ctypes.data), ctypes.c_long(inputs[0].size))
    out[numpy.isnan(out)] = numpy.nan
    return out.view(f"i{dtype().itemsize}")


def numbers_of_every_size(rng, n, dtype, range_):
    """Means and log-variances of p and q, close to each other in part; infinities and NaN among them."""
    inputs = []
    for i in range(4):
        if i % 2 == 0:
            parts = rng.normal(0, 2, n), points.decades(rng, n, -44, 38), rng.choice([0.0, -0.0, 1.0, numpy.inf, numpy.nan], n)
        else:
            wide = 1000 if range_ == "wide" else 60
            parts = rng.uniform(-wide, wide, n), points.decades(rng, n, -44, 1), rng.choice([0.0, -0.0, 20, -30, numpy.nan], n)
        x = points.mixed(rng, n, *parts)
        if i >= 2:
            x = numpy.where(rng.random(n) < 0.2, inputs[i - 2], x)
        inputs.append(x.astype(dtype))
    return inputs


@CONFIGURATIONS
def test_what_is_written_otherwise_for_gpus_has_the_same_bits(header, header_of_gpus, dtype, range_, rng):
    inputs = numbers_of_every_size(rng, 200_000, dtype, range_)
    for bounds in ((-30, 20), (0, 20), (-30, 0)) + (((-numpy.inf, numpy.inf),) if range_ == "wide" else ()):
        ours, theirs = (losses(h, dtype, range_, inputs, bounds) for h in (header, header_of_gpus))
        assert (ours == theirs).all()


@CONFIGURATIONS
def test_nothing_depends_on_the_sign_of_a_log_variance_of_zero(header, dtype, range_, rng):
    """A GPU's instructions for a clamp may leave either zero."""
    n = 100_000
    mu_p, log_var_p, mu_q, log_var_q = numbers_of_every_size(rng, n, dtype, range_)
    log_var_p[: n // 2] = 0
    log_var_q[n // 4 : 3 * n // 4] = 0
    results = []
    for sign_p in (0.0, -0.0):
        for sign_q in (0.0, -0.0):
            log_vars = (numpy.where(x == 0, numpy.array(s, dtype), x) for x, s in ((log_var_p, sign_p), (log_var_q, sign_q)))
            signed_p, signed_q = log_vars
            results.append(losses(header, dtype, range_, [mu_p, signed_p, mu_q, signed_q], (-30, 20)))
    for other in results[1:]:
        assert (other == results[0]).all()


@CONFIGURATIONS
def test_phi_and_expm1_hold_their_bounds(header, dtype, range_, rng):
    n = 400_000
    x = points.mixed(
        rng,
        n,
        rng.uniform(-EDGE, EDGE, n),
        rng.uniform(-1, 1, n),
        points.decades(rng, n, -44, 0),
        points.ln2_multiples(rng, n, dtype, 72),
    ).astype(dtype)
    assert_exponentials(header, dtype, range_, x)


@CONFIGURATIONS
def test_phi_and_expm1_hold_their_bounds_where_most_roundings_meet(header, dtype, range_, rng):
    """Where 2^k - 1 is the first not to be exact, at the ends of what each k covers, and at points found by searching."""
    n = 200_000
    mantissa = numpy.finfo(dtype).nmant + 1
    ends = points.mixed(rng, n, rng.uniform(-0.001, 0.001, n), rng.uniform(0.58, 0.59, n), rng.uniform(0.9, 1, n))
    x = (rng.integers(mantissa - 1, mantissa + 4, n) + ends) * math.log(2)
    near_one = rng.choice([-1, 1, 2, 3], n) * math.log(2) + math.log(2) * ends
    searched = [38.806916981268628, 38.816204883771576, 1.9361072580177627, 17.045404434204102, 1.094460893234422]
    assert_exponentials(header, dtype, range_, numpy.concatenate([x, near_one, searched]).astype(dtype))


@pytest.mark.parametrize("dtype, narrow_bound", [(numpy.float32, 43), (numpy.float64, 350)])
def test_phi_and_expm1_hold_their_bounds_beside_every_multiple_of_ln2_in_the_narrow_range(header, dtype, narrow_bound):
    """2^k r is an addition to the exponent of r, which must not be too small for it."""
    largest = int(narrow_bound / math.log(2))
    multiples = numpy.arange(-largest, largest + 1) * numpy.log(numpy.longdouble(2))
    x = multiples.astype(dtype)
    above, below = numpy.nextafter(x, dtype(numpy.inf)), numpy.nextafter(x, dtype(-numpy.inf))
    assert_exponentials(header, dtype, "narrow", numpy.concatenate([x, above, below]))


def test_phi_and_expm1_hold_their_bounds_over_an_even_sample_of_all_floats_in_range(header):
    """Every 1009th bit pattern: two million of them, from the smallest subnormal number on, both signs."""
    last = numpy.float32(EDGE).view(numpy.int32)
    positive = numpy.arange(0, last + 1, 1009, dtype=numpy.int32).view(numpy.float32)
    assert_exponentials(header, numpy.float32, "narrow", numpy.concatenate([positive, -positive]))


def test_the_oracle_of_the_exhaustive_test_agrees_with_the_other(header, rng):
    x = points.mixed(
        rng, 10_000, rng.uniform(-EDGE, EDGE, 10_000), rng.uniform(-1, 1, 10_000), points.decades(rng, 10_000, -44, 0)
    )
    got = numpy.empty(x.size, dtype=numpy.longdouble)
    header.long_phis(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(got.ctypes.data), ctypes.c_long(x.size))
    want = oracle.phi(x.astype(numpy.longdouble))
    assert (numpy.abs(got - want) <= 2.0**-60 * want).all()


@pytest.mark.slow
def test_phi_and_expm1_hold_their_bounds_over_all_floats_in_range(header):
    errors = ctypes.c_double(0), ctypes.c_double(0)
    last = int(numpy.float32(EDGE).view(numpy.uint32))
    for sign in (0, 1 << 31):
        header.worst(ctypes.c_uint32(sign), ctypes.c_uint32(sign + last), *map(ctypes.byref, errors))
    print(f"largest errors: phi {errors[0].value:.3f} ulp, expm1 {errors[1].value:.3f} ulp")
    assert errors[0].value <= PHI and errors[1].value <= EXPM1


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64])
def test_phi_and_expm1_hold_their_bounds_to_where_they_overflow_and_beyond(header, dtype, rng):
    assert_exponentials(header, dtype, "wide", points.wide_log_vars(rng, 200_000, dtype))


@CONFIGURATIONS
def test_t_holds_its_bound(header, dtype, range_, rng):
    """The divergence is t / 2, and halving is exact."""
    columns = points.pair(rng, 200_000, dtype)
    columns[1][:], columns[3][:] = numpy.clip(columns[1], -30, 20), numpy.clip(columns[3], -30, 20)
    (got,) = call(header, "divergences", dtype, range_, columns, 1)
    want = oracle.pair(*columns).t / 2
    oracle.assert_within(got, want, oracle.ulp_error(got, want), oracle.PAIR, [torch.from_numpy(c) for c in columns])
    assert (got >= 0).all()


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64])
def test_t_holds_its_bound_without_a_clamp(header, dtype, rng):
    columns = points.wide_pair(rng, 200_000, dtype)
    (got,) = call(header, "divergences", dtype, "wide", columns, 1)
    want = oracle.pair(*columns, -math.inf, math.inf).t / 2
    oracle.assert_within(got, want, oracle.ulp_error(got, want), oracle.PAIR, [torch.from_numpy(c) for c in columns])


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64])
def test_t_holds_its_bound_at_the_worst_point_known(header, dtype):
    columns = [numpy.array([x], dtype=dtype) for x in points.WORST_KNOWN]
    (got,) = call(header, "divergences", dtype, "narrow", columns, 1)
    want = oracle.exact_array(oracle.exact_pair, zip(*columns, strict=True)).t / 2
    assert oracle.ulp_error(got, want)[0] <= oracle.PAIR


def test_the_headers_know_no_torch():
    for header_file in HEADERS.glob("*.h"):
        text = header_file.read_text()
        assert not any(f"{name}/" in text for name in ("ATen", "c10", "torch")), header_file.name
