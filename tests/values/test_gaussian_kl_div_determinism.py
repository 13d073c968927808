"""Sums have the same bits for any number of threads and every instruction set, and their error stays within its bound.

Run as a script, this file prints digests of many sums: `python test_gaussian_kl_div_determinism.py SEED`, under the environment
variable ATEN_CPU_CAPABILITY by which torch chooses its kernels.
"""

import functools
import json
import math
import platform
import sys
import zlib

import numpy
import pytest
import torch

from conftest import SEED
from kl_ext import gaussian_kl_div
from operators import GAUSSIAN, REDUCING, Operator
from oracle import same_bits
from ordered_sum import additions
from reduction_cases import random_case
from test_determinism import differing, digest, run_under, supported

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@functools.cache
def cases(seed):
    """Of everything that is compared: the divergence, inputs, reduction and grad_output."""
    rng = numpy.random.default_rng(seed)
    return {f"{d}, {name}": (d, *case) for d in REDUCING for name, case in cases_of(d, rng).items()}


def cases_of(operator: Operator, rng):
    """Random ones, and ones large enough for 7 threads."""
    result = {}
    for i in range(60):
        inputs, dims = random_case(rng, operator)
        how = [{}, {"reduction": "sum", "dim": dims}, {"reduction": "mean", "dim": dims}][i % 3]
        result[f"random {i}"] = inputs, how
    encoded, *prior = operator.wide_range(rng, (2000, 400), (200,), (200,))
    large = [*encoded.chunk(2, -1), *prior]
    image = operator.wide_range(rng, (3, 40, 50, 50), (3, 1, 50, 50))
    for dim in (None, 0, 1):
        result[f"large rows, sum of {dim}"] = large, {"reduction": "sum", "dim": dim}
    for dim in ((0, 2, 3), 1, None):
        result[f"image, mean of {dim}"] = image, {"reduction": "mean", "dim": dim}
    result["non-finite"] = [torch.where(x > 2, math.inf, torch.where(x < -2, math.nan, x)) for x in large], {"reduction": "sum"}
    result["1M"] = operator.wide_range(rng, (1024 * 1024 + 3,), ()), {"reduction": "batchmean"}
    for name, (inputs, how) in result.items():
        (grad_output,) = GAUSSIAN.wide_range(rng, tuple(operator(*inputs, **how).shape))
        result[name] = inputs, how, grad_output
    return result


def digests(seed):
    return {
        name: digest([operator(*inputs, **how), *operator.backward(grad_output, *inputs, **how)])
        for name, (operator, inputs, how, grad_output) in cases(seed).items()
    }


@pytest.fixture(scope="module")
def seed():
    return zlib.crc32(f"{SEED} sums".encode())


@pytest.fixture(scope="module")
def here(seed):
    return digests(seed)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_sums_to_the_same_bits(capability, seed, here):
    if not supported(capability):
        pytest.skip(f"this processor has no {capability}")
    answer = json.loads(run_under(capability, __file__, str(seed)))
    if platform.machine() == "x86_64":
        assert answer["capability"].lower() == capability, "torch did not follow ATEN_CPU_CAPABILITY"
    assert not differing(answer["digests"], here)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_sums_to_the_same_bits(threads, seed, here):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert not differing(digests(seed), here)
    finally:
        torch.set_num_threads(before)


def test_a_repeated_sum_has_the_same_bits(seed, here):
    assert not differing(digests(seed), here)


# The error bound h u sum |t|. The terms are those that the operator itself computes elementwise: their own error has its bound.


def assert_within_the_bound(value, terms, n, repeated=1):
    exact = math.fsum(terms.double().tolist()) * repeated
    bound = additions(n) * UNIT_ROUNDOFF[terms.dtype] * exact  # no term is negative
    assert abs(value.double().item() - exact) <= bound, f"{abs(value.item() - exact) / bound:.3g} of the bound for {n} terms"


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF, ids=str)
def test_the_error_is_within_its_bound_of_the_exact_sum(dtype, rng):
    for n in (2, 100, 1000, 1024, 1025, 60_000, 1_000_000):
        inputs = GAUSSIAN.wide_range(rng, (n,), (n,), dtype=dtype)
        terms = gaussian_kl_div(*inputs)
        assert_within_the_bound(gaussian_kl_div(*inputs, reduction="sum"), terms, n)
        same = [x[:1].expand(n) for x in inputs]  # equal terms round the same way at every step
        assert_within_the_bound(gaussian_kl_div(*same, reduction="sum"), terms[:1], n, repeated=n)


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF, ids=str)
def test_the_error_of_a_gradient_is_within_its_bound_of_the_exact_sum(dtype, rng):
    """Its terms have either sign."""
    mu, log_var, *prior = GAUSSIAN.wide_range(rng, (20_000, 3), (20_000, 3), (3,), (3,), dtype=dtype)
    (grad_output,) = GAUSSIAN.wide_range(rng, (20_000, 3), dtype=dtype)
    inputs = [mu, log_var, *prior]
    terms = GAUSSIAN.backward(grad_output, *(x.expand(mu.shape) for x in inputs))
    for got, term in zip(GAUSSIAN.backward(grad_output, *inputs)[2:], terms[2:], strict=True):
        for column in range(3):
            exact = math.fsum(term[:, column].double().tolist())
            sizes = math.fsum(term[:, column].abs().double().tolist())
            assert abs(got[column].double().item() - exact) <= additions(20_000) * UNIT_ROUNDOFF[dtype] * sizes


@pytest.mark.parametrize("n", [10**7, 10**8])
def test_the_error_is_within_its_bound_for_many_terms(n, rng):
    """Rows without memory of their own: the exact sum is that of the one row, many times."""
    row = 10_000
    mu, log_var = (x.expand(n // row, row) for x in GAUSSIAN.wide_range(rng, (row,), (row,)))
    value = gaussian_kl_div(mu, log_var, reduction="sum")
    assert_within_the_bound(value, gaussian_kl_div(mu[0], log_var[0]), n, repeated=n // row)


def test_the_error_is_within_its_bound_for_many_different_terms(rng):
    """10^8 of them, against their sum in long double, whose error is to the bound as 2^-40 to 1."""
    n = 10**8
    mu = torch.randn(n, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))
    log_var = torch.zeros(())
    value = gaussian_kl_div(mu, log_var, reduction="sum").double().item()
    exact = numpy.longdouble(0)
    for block in mu.split(10**6):
        exact += gaussian_kl_div(block, log_var).numpy().astype(numpy.longdouble).sum()
    assert abs(value - float(exact)) <= additions(n) * UNIT_ROUNDOFF[torch.float32] * float(exact)


@pytest.mark.slow
def test_a_sum_of_more_terms_than_32_bits_count(rng):
    n, row = 2**31 + 2**16, 2**16
    mu, log_var = (x.expand(n // row, row) for x in GAUSSIAN.wide_range(rng, (row,), (row,)))
    value = gaussian_kl_div(mu, log_var, reduction="sum")
    assert_within_the_bound(value, gaussian_kl_div(mu[0], log_var[0]), n, repeated=n // row)


def test_the_mean_of_many_terms_is_one_division(rng):
    """By a number of terms that float32 does not hold: 2^24 + 1 is rounded to it."""
    n = 2**24 + 1
    mu = torch.from_numpy(rng.normal(size=1)).float().expand(n)
    total = gaussian_kl_div(mu, torch.zeros(()), reduction="sum")
    assert same_bits(gaussian_kl_div(mu, torch.zeros(()), reduction="mean"), total / torch.tensor(float(n)))


if __name__ == "__main__":
    print(json.dumps({"capability": torch.backends.cpu.get_cpu_capability(), "digests": digests(int(sys.argv[1]))}))
