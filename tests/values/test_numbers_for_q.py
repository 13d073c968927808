"""Numbers in place of tensors for q: they do not promote, and are rounded to the arithmetic and no further."""

import itertools
import math

import numpy
import pytest
import torch

import oracle
from kl_ext import gaussian_kl_div
from operators import DTYPES, GAUSSIAN, each_reducing_operator
from oracle import same_bits


@each_reducing_operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
def test_numbers_for_q_do_not_promote(operator, dtype, shape, device):
    mu, log_var, _, tensor = operator.inputs(shape, shape, shape, shape, device=device, dtype=dtype)
    for q in itertools.product([0.5, 1, tensor], repeat=2):
        value = operator(mu, log_var, *q)
        assert (value.dtype, value.shape, value.device) == (dtype, mu.shape, mu.device)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        same = [x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=wide, device=device) for x in q]
        want = operator(mu.to(wide), log_var.to(wide), *(x.to(wide) for x in same)).to(dtype)
        assert same_bits(value, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_numbers_for_q_are_rounded_to_the_arithmetic_and_no_further(dtype, shape, device):
    """0.1 is neither a half nor a float32 number: a 0-dim half input must not make a half of it."""
    mu, log_var = GAUSSIAN.inputs(shape, shape, device=device, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    value = gaussian_kl_div(mu, log_var, 0.1, -0.1, dtype=wide)
    exact = oracle.pair(*map(oracle.to_longdouble, (mu, log_var, *(torch.tensor(x, dtype=wide) for x in (0.1, -0.1))))).t / 2
    oracle.assert_within(value, exact, oracle.ulp_error(value, exact), oracle.PAIR, [mu, log_var])


@each_reducing_operator
def test_numbers_for_q_are_float64_where_the_arithmetic_is(operator, device):
    """Whichever of the inputs, or dtype, makes it so."""
    single, double = (torch.ones(3, dtype=dtype, device=device) for dtype in (torch.float32, torch.float64))
    want = operator(double, double, 0.1, 1.0)
    assert same_bits(operator(single, single, 0.1, double), want)
    assert same_bits(operator(single, single, 0.1, 1.0, dtype=torch.float64), want)
    assert same_bits(operator(single[0], single[0], 0.1, 1.0, dtype=torch.float64), want[0])


@each_reducing_operator
def test_numbers_of_numpy_are_numbers(operator, device):
    """`log_var_q=numpy.log(4)` is a float64 scalar of numpy, which is a Python float."""
    x = torch.ones(3, device=device)
    want = operator(x, x, 0.5, math.log(4))
    assert same_bits(operator(x, x, numpy.float64(0.5), numpy.log(4)), want)
    assert same_bits(operator(x, x, torch.full_like(x, 0.5), numpy.log(4)), want)


@each_reducing_operator
def test_numbers_for_q_go_with_every_reduction_and_gradient(operator, device):
    mu, log_var = operator.inputs([4, 3], [4, 3], device=device, requires_grad=True)
    q = [torch.full((), x, dtype=torch.float64, device=device) for x in operator.numbers]
    for how in ({}, {"reduction": "sum", "dim": 0}, {"reduction": "batchmean"}):
        value, want = operator(mu, log_var, *operator.numbers, **how), operator(mu, log_var, *q, **how)
        assert same_bits(value, want)
        for a, e in zip(*(torch.autograd.grad(v.sum(), (mu, log_var)) for v in (value, want)), strict=True):
            assert same_bits(a, e)
