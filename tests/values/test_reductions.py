"""Reductions over any dimensions: values, shapes and dtypes, and one rounding at the end."""

import itertools

import numpy
import pytest
import torch

import oracle
from operators import DTYPES, GAUSSIAN, each_reducing_operator
from oracle import same_bits
from ordered_sum import reduced_sum


@each_reducing_operator
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 1, 4, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_any_subset_of_the_dimensions_written_in_any_way(operator, shape, reduction, device):
    """Values against longdouble; the same bits however dim is written."""
    inputs = operator.inputs(shape, shape, shape[-1:], (), device=device)
    reduce = getattr(numpy, reduction)
    terms = operator.exact(*(x.cpu().numpy().astype(numpy.longdouble) for x in inputs))
    # No term is negative. Each has its own error; a sum of up to a thousand has 21 roundings, and a mean one more.
    rtol = (2 * operator.bound + 22) * 2.0**-53
    for count in range(1, len(shape) + 1):
        for dims in itertools.combinations(range(len(shape)), count):
            value = operator(*inputs, reduction=reduction, dim=dims)
            error = numpy.abs(value.cpu().numpy() - reduce(terms, dims)) / reduce(terms, dims)
            assert (error <= rtol).all(), error.max()
            negative = [d - len(shape) for d in reversed(dims)]
            mixed = tuple(d - len(shape) * (i % 2) for i, d in enumerate(dims))
            for written in (list(dims), negative, mixed, *(dims if count == 1 else ())):
                assert same_bits(operator(*inputs, reduction=reduction, dim=written), value)
    everything = operator(*inputs, reduction=reduction, dim=tuple(range(len(shape))))
    for none in (None, (), []):  # as in torch.sum
        assert same_bits(operator(*inputs, reduction=reduction, dim=none), everything)


@each_reducing_operator
def test_batchmean_is_the_sum_over_the_size_of_the_first_dimension(operator, device):
    for shape in ((7,), (4, 3), (4, 3, 2), (1, 5)):
        inputs = operator.inputs(shape, shape, device=device, dtype=torch.float32)
        total = operator(*inputs, reduction="sum")
        # A tensor: what torch divides by a number on CUDA, it multiplies by the reciprocal.
        assert same_bits(operator(*inputs, reduction="batchmean"), total / torch.full_like(total, shape[0]))
    inputs = operator.inputs([3], [3], [4, 3], [3], device=device)  # the first dimension of the terms, not of mu_p
    assert same_bits(operator(*inputs, reduction="batchmean"), operator(*inputs, reduction="sum") / 4)


@each_reducing_operator
def test_zero_dimensional_inputs_reduce_to_themselves(operator, device):
    inputs = operator.inputs([], [], [], [], device=device, dtype=torch.float32)
    for how in ({"reduction": r, "dim": d} for r in ("sum", "mean") for d in (None, (), 0, -1, [0])):
        assert same_bits(operator(*inputs, **how), operator(*inputs))


@each_reducing_operator
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_reductions_give_what_torch_gives(operator, shape, dtype, device):
    inputs = operator.inputs(shape, shape, shape[-1:], (), device=device, dtype=dtype)
    subsets = [d for n in range(1, len(shape) + 1) for d in itertools.combinations(range(len(shape)), n)]
    for dims, reduction in itertools.product([None, *subsets], ["sum", "mean"]):
        value = operator(*inputs, reduction=reduction, dim=dims)
        want = getattr(torch, reduction)(torch.empty(shape, dtype=dtype, device=device), dims)
        assert same_bits(value, want), (dims, reduction)
        assert not value.signbit()[~value.isnan()].any()
    want = torch.empty(shape, dtype=dtype).sum() / shape[0]
    assert same_bits(operator(*inputs, reduction="batchmean"), want)
    for reduction in ("sum", "mean", "batchmean"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        for x, g in zip(leaves, torch.autograd.grad(operator(*leaves, reduction=reduction), leaves), strict=True):
            assert g.shape == x.shape and (g == 0).all()


# dtype


def rounded_once(x, dtype):
    """torch rounds float64 to the half types by way of float32, which is twice."""
    exact = numpy.asarray(oracle.to_longdouble(x))
    spacing = oracle.ulp(exact, dtype)
    return torch.as_tensor((numpy.rint(exact / spacing) * spacing).astype(numpy.float64)).to(x.device, dtype)


# float64 terms mu^2 / 2 (the log-variances are 0) whose sum is a little more than half of a spacing above 1/2.
BARELY_ABOVE_HALF_A_SPACING = {
    torch.float16: ([1.0, 2.0**-6, 2.0**-6, 2.0**-20], 0.5 + 2.0**-11),
    torch.bfloat16: ([1.0, 2.0**-4, 2.0**-20], 0.5 + 2.0**-8),
}


@each_reducing_operator
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_float64_sum_is_rounded_once_to_a_half_type(operator, dtype, device):
    """By way of float32 it would be rounded to the middle of two half numbers, and from there to the wrong one."""
    mu, want = BARELY_ABOVE_HALF_A_SPACING[dtype]
    mu = torch.tensor(mu, dtype=torch.float64, device=device)
    standard = torch.full_like(mu, float(operator.has_deviations))
    assert operator(mu[None], standard, reduction="sum", dim=1, dtype=dtype).item() == want
    assert operator(mu[None], standard, reduction="batchmean", dtype=dtype).item() == want
    if len(mu) == 4:  # the division is exact
        assert operator(2 * mu, standard, reduction="mean", dtype=dtype).item() == want


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_float64_gradient_of_a_half_prior_is_rounded_once(dtype, device):
    above = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    mu = torch.ones(1, dtype=dtype, device=device)
    weights = torch.tensor([1.0, above, 2.0**-40], dtype=torch.float64, device=device)
    gradient, _ = GAUSSIAN.backward(weights, mu, torch.zeros_like(weights))
    assert gradient.item() == 1 + 2 * above


HOWS = ({}, {"reduction": "sum", "dim": 0}, {"reduction": "mean"}, {"reduction": "batchmean"})


@each_reducing_operator
@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("requested", [None, *DTYPES], ids=str)
def test_float64_arithmetic_if_an_input_or_dtype_is_float64_and_one_rounding(operator, how, requested, device):
    for dtypes in itertools.product(DTYPES, repeat=2):
        inputs = [x.to(d) for x, d in zip(operator.inputs([70, 30], [70, 30], device=device), dtypes, strict=True)]
        wide = torch.float64 if torch.float64 in (*dtypes, requested) else torch.float32
        terms = operator(*(x.to(wide) for x in inputs))
        if how:
            dims = [0] if how.get("dim") == 0 else [0, 1]
            terms = reduced_sum(terms, dims) / torch.tensor(
                {"sum": 1, "mean": 2100, "batchmean": 70}[how["reduction"]], dtype=wide
            )
        want = rounded_once(terms, requested or torch.promote_types(*dtypes))
        assert same_bits(operator(*inputs, **how, dtype=requested), want), dtypes


@each_reducing_operator
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_under_autocast_the_result_is_float32_unless_a_dtype_is_given(operator, how, device):
    inputs = operator.inputs([6, 5], [6, 5], [5], [5], device=device, dtype=torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        value = operator(*inputs, **how)
        with_numbers = operator(*inputs[:2], 0.1, 0.2, **how)
        chosen = [operator(*inputs, **how, dtype=dtype) for dtype in DTYPES]
        double = operator(inputs[0].double(), *inputs[1:], **how)
    assert same_bits(value, operator(*(x.float() for x in inputs), **how))
    assert with_numbers.dtype == torch.float32 and double.dtype == torch.float64
    for dtype, x in zip(DTYPES, chosen, strict=True):
        assert same_bits(x, operator(*inputs, **how, dtype=dtype))
