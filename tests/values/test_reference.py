"""The weights of the reference and its normal_kl_div, by what they promise and against torch.distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from kl_ext import reference
from operators import CLOSE, REDUCING

SHAPE = (3, 4, 5)
FUNCTIONS = {operator.name: getattr(reference, operator.name) for operator in REDUCING}
each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "full": lambda: torch.rand(SHAPE, dtype=torch.float64) - 0.25,
    "of samples": lambda: torch.rand(3, 1, 1, dtype=torch.float64),
    "of the middle": lambda: torch.rand(4, 1, dtype=torch.float64),
    "a mask": lambda: torch.rand(SHAPE) > 0.5,
    "a mask of samples": lambda: torch.tensor([True, False, True])[:, None, None],
    "a number": lambda: torch.tensor(0.5, dtype=torch.float64),
}
REDUCTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "sum", "dim": 1},
    {"reduction": "mean", "dim": (0, -1), "keepdim": True},
    {"reduction": "batchmean"},
]


def inputs_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """They serve as means, log-variances and deviations alike."""
    return [(torch.rand(shape, dtype=torch.float64) + 0.1).to(dtype).requires_grad_() for shape in shapes]


def weighted(terms: Tensor, weight: Tensor, how: dict[str, Any]) -> Tensor:
    """By the definition; there is no NaN here that would have to be left out."""
    weights = weight.to(terms.dtype).expand(terms.shape)
    dims = how.get("dim", (0, 1, 2))
    total = (weights * terms).sum(dims, keepdim=how.get("keepdim", False))
    return {
        "none": lambda: weights * terms,
        "sum": lambda: total,
        "mean": lambda: total / weights.sum(dims, keepdim=how.get("keepdim", False)),
        "batchmean": lambda: total / len(terms),
    }[how.get("reduction", "none")]()


@each_function
@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("how", REDUCTIONS, ids=str)
def test_weights_multiply_the_terms(function: Callable[..., Tensor], make: Callable[[], Tensor], how: dict[str, Any]) -> None:
    weight, inputs = make(), inputs_of(SHAPE, (5,), (3, 1, 1), ())
    for given in (inputs, inputs[:2], [*inputs[:2], 0.5, 0.25], [inputs[0], inputs[1], inputs[2], 2]):
        torch.testing.assert_close(function(*given, weight=weight, **how), weighted(function(*given), weight, how), **CLOSE)


@each_function
@pytest.mark.parametrize("how", REDUCTIONS, ids=str)
@pytest.mark.parametrize("there", [math.nan, math.inf, -math.inf, -1e30])
def test_what_has_weight_0_is_left_out(function: Callable[..., Tensor], how: dict[str, Any], there: float) -> None:
    inputs, mask = inputs_of(*[SHAPE] * 4), torch.rand(SHAPE) > 0.5
    results = []
    for fill in (0.5, there):
        given = [x.detach().masked_fill(~mask, fill).requires_grad_() for x in inputs]
        result = function(*given, weight=mask, **how)
        results.append([result, *torch.autograd.grad(result.sum(), given)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert all((gradient[~mask] == 0).all() for gradient in results[1][1:])


@each_function
def test_a_weight_that_would_enlarge_the_terms_is_refused(function: Callable[..., Tensor]) -> None:
    for shape in ((2, 4), (4, 4)):
        with pytest.raises(RuntimeError):
            function(*inputs_of((1, 4), (1, 4)), weight=torch.ones(shape))


@each_function
def test_a_mean_without_weight_is_nan(function: Callable[..., Tensor]) -> None:
    assert function(*inputs_of((3,), (3,)), weight=torch.zeros(3), reduction="mean").isnan()


@each_function
@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float16, torch.float16, torch.bool], torch.float16),
        ([torch.float16, torch.float16, torch.bfloat16], torch.float32),
        ([torch.float32, torch.float32, torch.float64], torch.float64),
    ],
    ids=str,
)
def test_the_weight_takes_part_in_the_promotion(
    function: Callable[..., Tensor], dtypes: list[torch.dtype], expected: torch.dtype
) -> None:
    inputs = [torch.ones(3, dtype=dtype) for dtype in dtypes]
    assert function(*inputs[:2], weight=inputs[2]).dtype == expected
    assert function(*inputs[:2], torch.ones((), dtype=torch.float64), inputs[0], weight=inputs[2]).dtype == expected


@pytest.mark.parametrize("shapes", [((3, 4),) * 4, ((3, 4), (4,), (3, 1), ()), ((),) * 4], ids=str)
def test_the_divergence_of_normals_is_that_of_torch(shapes: tuple[tuple[int, ...], ...]) -> None:
    inputs = inputs_of(*shapes)
    p, q, standard = Normal(*inputs[:2]), Normal(*inputs[2:]), Normal(torch.zeros((), dtype=torch.float64), 1.0)
    for given, expected in ((inputs, kl_divergence(p, q)), (inputs[:2], kl_divergence(p, standard))):
        value = reference.normal_kl_div(*given)
        torch.testing.assert_close(value, expected, **CLOSE)
        gradients = (torch.autograd.grad(x.sum(), given, retain_graph=True) for x in (value, expected))
        for gradient, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, wanted, **CLOSE)
    numbers = reference.normal_kl_div(*inputs[:2], 0.5, 2)
    torch.testing.assert_close(numbers, kl_divergence(p, Normal(torch.tensor(0.5).double(), 2.0)), **CLOSE)


def test_deviations_that_are_none() -> None:
    loc, scale = torch.zeros(4), torch.tensor([0.0, -1.0, math.nan, 1.0])
    for q in ((), (0.0, 1.0), (torch.zeros(()), torch.ones(()))):
        got = reference.normal_kl_div(loc, scale, *q)
        torch.testing.assert_close(got, torch.tensor([math.inf, math.nan, math.nan, 0.0]), rtol=0, atol=0, equal_nan=True)


def test_half_a_prior_is_refused() -> None:
    with pytest.raises(ValueError, match="loc_q and scale_q together"):
        reference.normal_kl_div(torch.zeros(2), torch.ones(2), 1.0)
