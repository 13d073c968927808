"""The error of a sum is within its bound h u sum |t| of the exact one, of a value and of a gradient.

The terms are those that the operator itself computes elementwise: their own error has its bound.
"""

import math

import numpy
import pytest
import torch

from kl_ext import gaussian_kl_div
from operators import GAUSSIAN
from oracle import same_bits
from ordered_sum import additions

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


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
