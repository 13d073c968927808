"""The formulas of csrc/math/normal.h, compiled alone: the bounds that the header states, before any operator is in between."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
import torch

import normal_cases as cases
import oracle
import points

HEADERS = Path(__file__).resolve().parents[2] / "csrc" / "math"

# The losses over arrays, out: the value and the gradients, one array each. And for the exhaustive test, which is too long for
# numpy, the largest errors over a range of float32 bit patterns of p, for one q, against long double: its difference from q is
# exact, and where log1p is that far off, so is what cancels it.
SOURCE = """
#include <algorithm>
#include <cmath>
#include <cstdint>
#include "normal.h"
using namespace kl_ext::math;

template <class Loss, class T>
void over(const T* const* inputs, const T* grad_output, T* const* out, long n) {
  for (long i = 0; i < n; ++i) {
    T values[Loss::kInputs], gradients[Loss::kInputs];
    for (int input = 0; input < Loss::kInputs; ++input) values[input] = inputs[input][i];
    out[0][i] = Loss::template forward<Range::kNarrow>(values, Settings<T>{T(-1), T(1)});
    Loss::template backward<Range::kNarrow>(grad_output[i], values, Settings<T>{T(-1), T(1)}, gradients);
    for (int input = 0; input < Loss::kInputs; ++input) out[1 + input][i] = gradients[input];
  }
}

void worse(float& error, float got, long double exact, long double scale) {
  const int exponent = scale == 0 ? -126 : std::max(std::ilogb(scale), -126);
  error = std::max(error, static_cast<float>(std::fabs(got - exact) * std::ldexp(1.0L, 23 - exponent)));
}

extern "C" {
#define KL_EXT_EXPORT(type) \\
  void normal_##type(const type* const* inputs, const type* grad_output, type* const* out, long n) { \\
    over<NormalDivergence>(inputs, grad_output, out, n); \\
  } \\
  void standard_##type(const type* const* inputs, const type* grad_output, type* const* out, long n) { \\
    over<StandardNormalDivergence>(inputs, grad_output, out, n); \\
  }
KL_EXT_EXPORT(float)
KL_EXT_EXPORT(double)

// errors: of the value, of p and of q; or, for q = 1, of the value and of p against N(0, 1).
void worst(std::uint32_t first, std::uint32_t last, std::uint32_t step, float q, bool standard, float* errors) {
  const Settings<float> none{0, 0};
  for (std::uint32_t bits = first; bits < last; bits += step) {
    const float p = from_bits<float>(bits);
    const long double d = static_cast<long double>(p) - q, shift = d / q;
    const long double value = shift * shift / 2 + (shift - std::log1p(shift));
    const long double by_p = d * (static_cast<long double>(p) + q) / (static_cast<long double>(p) * q * q);
    const long double by_q = -by_p * p / q;
    if (standard) {
      const float inputs[] = {0, p};
      float gradients[2];
      worse(errors[0], StandardNormalDivergence::forward<Range::kNarrow>(inputs, none), value, value);
      StandardNormalDivergence::backward<Range::kNarrow>(1.0f, inputs, none, gradients);
      worse(errors[1], gradients[1], by_p, by_p);
    } else {
      const float inputs[] = {0, p, 0, q};
      float gradients[4];
      worse(errors[0], NormalDivergence::forward<Range::kNarrow>(inputs, none), value, value);
      NormalDivergence::backward<Range::kNarrow>(1.0f, inputs, none, gradients);
      worse(errors[1], gradients[1], by_p, by_p);
      worse(errors[2], gradients[3], by_q, by_q);
    }
  }
}
}
"""

DTYPES = pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64], ids=["float32", "float64"])
LOSSES = pytest.mark.parametrize("loss", ["normal", "standard"])
POINTS = {"normal": cases.pair, "standard": cases.standard}
GRADIENTS = {"normal": cases.GRADIENTS, "standard": (0.0, cases.STANDARD_SCALE)}
VALUES = {"normal": cases.VALUE, "standard": cases.STANDARD}
VECTORS = {"AVX2": ["-mavx2", "-mfma"], "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]}


def compiled(folder, *more):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "normal.cpp").write_text(SOURCE)
    options = ["-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{HEADERS}"]
    subprocess.run([compiler, *options, *more, "normal.cpp", "-o", "normal.so"], cwd=folder, check=True, timeout=300)
    return ctypes.CDLL(str(folder / "normal.so"))


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("normal"))


@pytest.fixture(scope="module", params=VECTORS)
def header_of_vectors(request, tmp_path_factory):
    """As the kernels are compiled for an instruction set that has vectors."""
    if torch.backends.cpu.get_cpu_capability() not in list(VECTORS)[list(VECTORS).index(request.param) :]:
        pytest.skip(f"this CPU has no {request.param}")
    options = ["-O3", "-fno-math-errno", "-fno-trapping-math", *VECTORS[request.param]]
    return compiled(tmp_path_factory.mktemp(request.param), *options)


def pointers(arrays):
    return (ctypes.c_void_p * len(arrays))(*(x.ctypes.data for x in arrays))


def evaluate(header, loss, columns, grad_output=1.0):
    """The value and the gradients, as tensors."""
    dtype = columns[0].dtype
    inputs = [numpy.ascontiguousarray(x) for x in columns]
    weights = numpy.ascontiguousarray(numpy.broadcast_to(dtype.type(grad_output), inputs[0].shape))
    out = [numpy.empty_like(inputs[0]) for _ in range(1 + len(inputs))]
    function = getattr(header, f"{loss}_{'float' if dtype == numpy.float32 else 'double'}")
    function(pointers(inputs), ctypes.c_void_p(weights.ctypes.data), pointers(out), ctypes.c_long(inputs[0].size))
    value, *gradients = map(torch.from_numpy, out)
    return value, gradients


def assert_within(got, exact, scale, bound, columns):
    oracle.assert_within(got, exact, oracle.ulp_error(got, exact, scale), bound, [torch.from_numpy(c) for c in columns])


def assert_accurate(header, loss, columns, exact):
    value, gradients = evaluate(header, loss, columns)
    assert_within(value, exact.value, exact.value, VALUES[loss], columns)
    assert (value >= 0).all()
    for got, want, scale, bound in zip(gradients, exact.gradients, exact.scales, GRADIENTS[loss], strict=False):
        assert_within(got, want, scale, bound, columns)
    if loss == "normal":
        wider = columns[1] >= columns[3]
        scale = numpy.where(wider, exact.gradients[3], numpy.inf)
        error = numpy.where(wider, oracle.ulp_error(gradients[3], exact.gradients[3], scale), 0)
        oracle.assert_within(
            gradients[3], exact.gradients[3], error, cases.SCALE_Q_ITSELF, [torch.from_numpy(c) for c in columns]
        )


@DTYPES
@LOSSES
def test_bounds_hold_everywhere(header, loss, dtype, rng):
    columns = POINTS[loss](rng, 200_000, dtype)
    assert_accurate(header, loss, columns, cases.normal(*columns))


@DTYPES
@LOSSES
def test_bounds_hold_against_mpmath(header, loss, dtype, rng):
    columns = POINTS[loss](rng, 1_500, dtype)
    exact = oracle.exact_array(cases.exact_normal, zip(*columns, strict=True))
    assert_accurate(header, loss, columns, exact)
    # And so the fast oracle's word is good for the others.
    ours = cases.normal(*columns)
    type_ = torch.from_numpy(columns[0]).dtype
    for fast, slow, scale in zip((ours.value, *ours.gradients), (exact.value, *exact.gradients), (exact.value, *exact.scales)):
        assert (numpy.abs(fast - slow) <= 0.01 * oracle.ulp(scale, type_)).all()


@DTYPES
def test_gradients_of_means_hold_a_tighter_bound_away_from_subnormal_numbers(header, dtype, rng):
    columns = cases.pair(rng, 200_000, dtype)
    exact, tiny = cases.normal(*columns).gradients[0], numpy.finfo(dtype).tiny
    usual = (numpy.abs(exact) >= 16 * tiny) & (numpy.abs(exact * columns[3]) >= 16 * tiny)
    columns = [x[usual] for x in columns]
    _, gradients = evaluate(header, "normal", columns)
    assert_within(gradients[0], exact[usual], exact[usual], cases.USUAL_MEAN, columns)


def test_bounds_hold_for_every_float_ratio_from_a_half_to_two(header):
    errors = (ctypes.c_float * 2)()
    first, last = (int(numpy.float32(x).view(numpy.uint32)) for x in (0.5, 2.0))
    header.worst(first, last, 1, ctypes.c_float(1.0), True, errors)
    assert errors[0] <= cases.STANDARD and errors[1] <= cases.STANDARD_SCALE


def test_bounds_hold_for_a_line_of_floats_from_half_of_q_to_twice_it(header, rng):
    errors = (ctypes.c_float * 3)()
    q = numpy.float32(rng.uniform(1, 2))
    first, last = (int((q * numpy.float32(x)).view(numpy.uint32)) for x in (0.5, 2.0))
    header.worst(first, last, 3, ctypes.c_float(q), False, errors)
    assert errors[0] <= cases.VALUE and errors[1] <= cases.SCALE_P and errors[2] <= cases.SCALE_Q_ITSELF, q


@DTYPES
@LOSSES
def test_any_grad_output_adds_at_most_one_rounding(header, loss, dtype, rng):
    """|got - g f| <= |g| bound ulp(f) + ulp(g f) / 2, for the gradient f of a grad_output of 1."""
    columns = POINTS[loss](rng, 50_000, dtype)
    grad_output = points.decades(rng, 50_000, -3, 3).astype(dtype)
    exact, (_, gradients) = cases.normal(*columns), evaluate(header, loss, columns, grad_output)
    g = grad_output.astype(numpy.longdouble)
    for got, want, scale, bound in zip(gradients, exact.gradients, exact.scales, GRADIENTS[loss], strict=False):
        inherited = numpy.abs(g) * bound * oracle.ulp(scale, got.dtype)
        rounding = oracle.ulp(numpy.abs(g * want) + inherited, got.dtype) / 2
        size = numpy.maximum(numpy.abs(want), numpy.abs(scale))
        overflows = size + bound * oracle.ulp(size, got.dtype) >= numpy.finfo(dtype).max
        error = numpy.where(overflows, 0, oracle.distance(got, g * want) / (inherited + rounding))
        oracle.assert_within(got, g * want, error, 1.0, [torch.from_numpy(c) for c in (*columns, grad_output)])


@DTYPES
def test_exactly_zero_where_p_equals_q(header, dtype, rng):
    mu, deviation, *_ = cases.pair(rng, 50_000, dtype)
    value, gradients = evaluate(header, "normal", [mu, deviation, mu, deviation])
    assert (value == 0).all() and all((gradient == 0).all() for gradient in gradients)


@DTYPES
def test_exactly_zero_at_the_standard_normal(header, dtype):
    value, gradients = evaluate(header, "standard", [numpy.zeros(3, dtype), numpy.ones(3, dtype)])
    assert (value == 0).all() and all((gradient == 0).all() for gradient in gradients)


# Where r, r^2, a difference of means or 1 / q^2 is beyond the exponents of a float32, and the value is not.
FINITE = [
    (0.0, 2.0**-149, 0.0, 2.0**-149),
    (0.0, 2.0**-149, 0.0, 3.4e38),
    (0.0, 3.4e38, 0.0, 3e38),
    (3.4e38, 3.4e38, -3.4e38, 3e38),
    (1e-45, 1e-45, 0.0, 2e-45),
    (1e-20, 3e-40, 1.00001e-20, 4e-40),
    (2e38, 1.0, -2e38, 1e20),
    (0.0, 2.0**64, 0.0, 1.0),
    (0.0, 2.6e19, 0.0, 1.0),
    (2.6e19, 1.0, 0.0, 1.0),
    (0.0, 1e-30, 0.0, 1e-49 * 1e10),
]
INFINITE = [(0.0, 2.7e19, 0.0, 1.0), (2.7e19, 1.0, 0.0, 1.0), (0.0, 3.4e38, 0.0, 1e-45), (3.4e38, 1.0, -3.4e38, 1e-45)]


@pytest.mark.parametrize("point", FINITE, ids=str)
def test_infinite_only_where_the_value_itself_overflows(header, point):
    columns = [numpy.array([x], numpy.float32) for x in point]
    exact = oracle.exact_array(cases.exact_normal, zip(*columns, strict=True))
    assert exact.value[0] < numpy.finfo(numpy.float32).max, "the point is for a finite value"
    value, _ = evaluate(header, "normal", columns)
    assert value.isfinite().all()
    assert_accurate(header, "normal", columns, exact)


@pytest.mark.parametrize("point", INFINITE, ids=str)
def test_infinite_where_the_value_overflows(header, point):
    value, gradients = evaluate(header, "normal", [numpy.array([x], numpy.float32) for x in point])
    assert value.item() == math.inf
    assert not any(gradient.isnan().any() for gradient in gradients)


INF, NAN = math.inf, math.nan

# Inputs, the value, and the gradients of mu_p, p and q.
SPECIAL = [
    ((0.5, 0.0, 0.0, 2.0), INF, (0.125, -INF, 0.46875)),
    ((0.5, -0.0, 0.0, 2.0), INF, (0.125, INF, 0.46875)),
    ((0.5, -1.0, 0.0, 2.0), NAN, (0.125, NAN, NAN)),
    ((0.5, NAN, 0.0, 2.0), NAN, (0.125, NAN, NAN)),
    ((0.5, INF, 0.0, 2.0), NAN, (0.125, NAN, -INF)),
    ((0.5, -INF, 0.0, 2.0), NAN, (0.125, NAN, NAN)),
    ((0.5, 1.0, 0.0, 0.0), NAN, (NAN, NAN, NAN)),
    ((0.5, 1.0, 0.0, -0.0), NAN, (NAN, NAN, NAN)),
    ((0.5, 1.0, 0.0, -2.0), NAN, (NAN, NAN, NAN)),
    ((0.5, 1.0, 0.0, NAN), NAN, (NAN, NAN, NAN)),
    ((0.5, 1.0, 0.0, INF), INF, (NAN, NAN, NAN)),
    ((0.5, 1.0, 0.0, -INF), NAN, (NAN, NAN, NAN)),
    ((0.5, 0.0, 0.0, 0.0), NAN, (NAN, NAN, NAN)),
    ((0.5, 0.0, 0.0, INF), INF, (NAN, NAN, NAN)),
    ((0.5, INF, 0.0, INF), NAN, (NAN, NAN, NAN)),
    ((0.5, -1.0, 0.0, -1.0), NAN, (NAN, NAN, NAN)),
    ((0.5, -1.0, 0.0, INF), NAN, (NAN, NAN, NAN)),
    ((0.5, -1.0, 0.0, -INF), NAN, (NAN, NAN, NAN)),
    ((0.5, -0.0, 0.0, -1.0), NAN, (NAN, NAN, NAN)),
    ((INF, 1.0, 0.0, 2.0), INF, (INF, -0.75, -INF)),
    ((0.0, 1.0, INF, 2.0), INF, (-INF, -0.75, -INF)),
    ((-INF, 1.0, INF, 2.0), INF, (-INF, -0.75, -INF)),
    ((INF, 1.0, INF, 2.0), NAN, (NAN, -0.75, NAN)),
    ((INF, 1.0, 0.0, INF), NAN, (NAN, NAN, NAN)),
    ((INF, 0.0, 0.0, 2.0), INF, (INF, -INF, -INF)),
    ((INF, -1.0, 0.0, 2.0), NAN, (INF, NAN, NAN)),
    ((NAN, 1.0, 0.0, 2.0), NAN, (NAN, -0.75, NAN)),
    ((0.0, 1.0, NAN, 2.0), NAN, (NAN, -0.75, NAN)),
]

STANDARD_SPECIAL = [
    ((0.5, 0.0), INF, (0.5, -INF)),
    ((0.5, -0.0), INF, (0.5, INF)),
    ((0.5, -1.0), NAN, (0.5, NAN)),
    ((0.5, NAN), NAN, (0.5, NAN)),
    ((0.5, INF), NAN, (0.5, INF)),
    ((0.5, -INF), NAN, (0.5, NAN)),
    ((INF, 2.0), INF, (INF, 1.5)),
    ((-INF, 2.0), INF, (-INF, 1.5)),
    ((INF, 0.0), INF, (INF, -INF)),
    ((NAN, 2.0), NAN, (NAN, 1.5)),
]


@DTYPES
@pytest.mark.parametrize("inputs, value, gradients", SPECIAL + STANDARD_SPECIAL, ids=str)
def test_special_values(header, dtype, inputs, value, gradients):
    loss = "normal" if len(inputs) == 4 else "standard"
    got, got_gradients = evaluate(header, loss, [numpy.array([x], dtype) for x in inputs])
    want = (value, gradients[0], gradients[1], -gradients[0], gradients[2]) if loss == "normal" else (value, *gradients)
    assert numpy.array_equal([x.item() for x in (got, *got_gradients)], want, equal_nan=True)


@DTYPES
def test_special_values_are_those_of_the_plain_formula(header, dtype):
    """As torch.distributions has it, but that a negative deviation is none."""
    values = numpy.array([0.0, 0.5, 1.0, 3.0, INF, NAN], dtype)
    signed = numpy.concatenate([-values, values])
    mu_p, p, mu_q, q = (torch.from_numpy(x.ravel()).double() for x in numpy.meshgrid(signed, values, signed, values))
    ratio, shift = (p / q) ** 2, ((mu_p - mu_q) / q) ** 2
    want = 0.5 * (ratio + shift - 1 - ratio.log())
    got, _ = evaluate(header, "normal", [x.numpy().astype(dtype) for x in (mu_p, p, mu_q, q)])
    roundings = 4 * 36 * 2.0**-52  # of the formula, whose parts are at most 36
    torch.testing.assert_close(got.double(), want, rtol=cases.VALUE * numpy.finfo(dtype).eps, atol=roundings, equal_nan=True)


@DTYPES
@LOSSES
def test_the_same_bits_with_vectors(header, header_of_vectors, loss, dtype, rng):
    columns = POINTS[loss](rng, 100_000, dtype)
    for column in columns:
        column[rng.random(column.size) < 0.02] = numpy.nan
        column[rng.random(column.size) < 0.02] = numpy.inf
        column[rng.random(column.size) < 0.02] *= -1
    (value, gradients), (other, others) = (evaluate(h, loss, columns, 0.75) for h in (header, header_of_vectors))
    assert all(oracle.same_bits(a, b) for a, b in zip((value, *gradients), (other, *others), strict=True))


def test_a_nan_that_is_made_here_is_one_that_bfloat16_can_hold(header):
    """Rounding to bfloat16 adds to the bits, and would carry out of a NaN with ones in its lower half."""
    for loss, inputs in (("normal", (0.0, -1.0, 0.0, -1.0)), ("standard", (0.0, -1.0))):
        value, gradients = evaluate(header, loss, [numpy.array([x], numpy.float32) for x in inputs])
        for x in (value, *gradients):
            assert not x.isnan() or x.numpy().view(numpy.uint32) & 0xFFFF == 0


def test_the_header_knows_no_torch():
    text = (HEADERS / "normal.h").read_text()
    assert not any(f"{name}/" in text for name in ("ATen", "c10", "torch"))
