"""Derivatives of higher orders: those of the formula, and finite where it overflows; the backward operator has its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck

from batching import no_fallback  # noqa: F401 (a fixture)
from operators import (
    DERIVATIVES_CLOSE,
    DTYPES,
    HALF_TYPES,
    OPERATORS,
    Operator,
    each_operator,
    each_reducing_operator,
)
from reduction_cases import SHAPES, each_reduction

# gradcheck also checks the batched modes, and those must not go example by example.
pytestmark = pytest.mark.usefixtures("no_fallback")


def nested_derivatives(function: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The weighted sum over all inputs of the derivative, taken once for each of the weights."""
    result = function(*inputs)
    for weight in weights:
        if not result.requires_grad:  # torch does not differentiate a constant
            return torch.zeros_like(result)
        gradients = grad((result * weight).sum(), inputs, create_graph=True, materialize_grads=True)
        result = sum((g * (i + 1) for i, g in enumerate(gradients)), torch.zeros_like(result))
    return result


@each_operator
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_derivatives_up_to_the_fourth_equal_those_of_the_formula(operator: Operator, order: int, device: torch.device) -> None:
    inputs = operator.inputs([2, 3], device=device, requires_grad=True)
    weights = [torch.randn(2, 3, dtype=torch.float64, device=device) for _ in range(order)]
    actual, expected = (nested_derivatives(f, inputs, weights) for f in (operator.function, operator.formula))
    torch.testing.assert_close(actual, expected, **DERIVATIVES_CLOSE)


@each_reducing_operator
@each_reduction
def test_third_derivatives_of_a_reduction_equal_those_of_the_formula(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    leaves = operator.inputs(*SHAPES["prior [D]"], device=device, requires_grad=True)

    def third(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        total = function(*leaves).pow(2).sum()
        for _ in range(2):
            total = sum((g * (i + 1)).sum() for i, g in enumerate(grad(total, leaves, create_graph=True)))
        return grad(total, leaves)

    torch.testing.assert_close(third(operator.with_(how)), third(operator.formula_with(how)), **DERIVATIVES_CLOSE)


@each_operator
@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[::-1], HALF_TYPES * 2], ids=lambda d: "-".join(map(str, d)))
def test_second_derivatives_of_mixed_dtypes_are_rounded_once(
    operator: Operator, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    def second(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        result = function(*leaves)
        grad_output = weights.to(result.dtype, copy=True).requires_grad_()
        first = grad(result, leaves, grad_output, create_graph=True)
        total = sum((g.to(result.dtype) * weights).sum() for g in first)
        return grad(total, (*leaves, grad_output))

    leaves = [x.to(d).requires_grad_() for x, d in zip(operator.inputs([4, 3], device=device), dtypes, strict=False)]
    weights = torch.ones(4, 3, dtype=torch.float64, device=device)
    actual = second(operator.function, leaves)
    expected = second(operator.formula, [x.detach().double().requires_grad_() for x in leaves])
    for x, a, e in zip((*leaves, operator.function(*leaves)), actual, expected, strict=True):
        assert a.dtype == x.dtype
        torch.testing.assert_close(a, e.to(x.dtype))


@pytest.mark.parametrize("operator", [operator for operator in OPERATORS if operator.bounds], ids=str)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_derivatives_of_any_order_are_finite_far_outside_the_clamp(
    operator: Operator, order: int, device: torch.device
) -> None:
    """exp overflows there, and the zero that a clamp gives must not become a zero times infinity."""
    far = torch.tensor([-1e4, -100.0, 0.5, 100.0, 1e4], dtype=torch.float64, device=device)
    inputs = [(far.roll(i) if "log_var" in a else far / 1e4).requires_grad_() for i, a in enumerate(operator.arguments)]
    weights = [torch.randn_like(far) for _ in range(order)]
    bounds = {"clamp_min": -3.0, "clamp_max": 3.0}
    actual, expected = (
        nested_derivatives(lambda *a, f=f: f(*a, **bounds), inputs, weights) for f in (operator.function, operator.formula)
    )
    assert expected.isfinite().all()
    torch.testing.assert_close(actual, expected, **DERIVATIVES_CLOSE)


@each_operator
def test_the_backward_operator_is_itself_differentiable_in_both_modes(operator: Operator, device: torch.device) -> None:
    def formula(grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(operator.formula, *inputs)[1](grad_output)

    def backward(grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(operator.backward(grad_output, *inputs))

    inputs = (
        torch.randn(2, 3, dtype=torch.float64, device=device),
        *operator.inputs(*([2, 3], [3], [2, 3], [3])[: operator.count], device=device),
    )
    tangents = tuple(torch.randn_like(x) for x in inputs)
    options = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
    assert gradcheck(backward, [x.requires_grad_() for x in inputs], fast_mode=True, **options)
    (actual, actual_tangent), (expected, expected_tangent) = (torch.func.jvp(f, inputs, tangents) for f in (backward, formula))
    torch.testing.assert_close(actual, expected, **DERIVATIVES_CLOSE)
    torch.testing.assert_close(actual_tangent, expected_tangent, **DERIVATIVES_CLOSE)


@each_reducing_operator
@each_reduction
def test_the_backward_operator_of_a_reduction_is_itself_differentiable(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    def backward(grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(operator.backward(grad_output, *inputs, **how))

    def by_formula(grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(operator.formula_with(how), *inputs)[1](grad_output)

    inputs = operator.inputs(*SHAPES["prior of the middle"], device=device)
    tensors = (torch.randn_like(operator.formula(*inputs, **how)), *inputs)
    tangents = tuple(torch.randn_like(x) for x in tensors)
    actual, expected = (torch.func.jvp(f, tensors, tangents) for f in (backward, by_formula))
    torch.testing.assert_close(actual, expected, **DERIVATIVES_CLOSE)
    leaves = [x.requires_grad_() for x in tensors]
    seconds = [grad(sum((g * g).sum() for g in f(*leaves)), leaves) for f in (backward, by_formula)]
    torch.testing.assert_close(*seconds, **DERIVATIVES_CLOSE)
