"""Forward-mode differentiation: the formula's tangents for any inputs that have one, alone and with the reverse mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, grad

import oracle
from batching import no_fallback  # noqa: F401 (a fixture)
from operator_cases import clamped_inputs, each_elementwise_operator_and_wanted, subsets
from operators import (
    CLOSE,
    DTYPES,
    HALF_TYPES,
    PAIR,
    SINGLE,
    Operator,
    close,
    each_documented_loss,
    each_elementwise_operator,
    each_reducing_operator,
)
from reduction_cases import SHAPES, each_reduction

pytestmark = pytest.mark.usefixtures("no_fallback")


def tangent_of(function: Callable[..., Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor | None:
    with forward_ad.dual_level():
        duals = [x if t is None else forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        return forward_ad.unpack_dual(function(*duals)).tangent


@each_elementwise_operator_and_wanted
def test_a_tangent_on_any_subset_of_the_inputs_gives_the_formulas_tangent(
    operator: Operator, wanted: Sequence[str], device: torch.device
) -> None:
    inputs = operator.inputs([2, 1], [3], device=device)
    tangents = [torch.randn_like(x) if a in wanted else None for a, x in zip(operator.arguments, inputs, strict=True)]
    actual = tangent_of(operator.function, inputs, tangents)
    assert actual is not None
    assert actual.shape == (2, 3)
    torch.testing.assert_close(actual, tangent_of(operator.formula, inputs, tangents), **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(tangent_of(operator.function, inputs, tangents), actual, rtol=0, atol=0)


@each_documented_loss
def test_a_tangent_is_zero_outside_the_clamp(operator: Operator, device: torch.device) -> None:
    inputs = clamped_inputs(operator, device)
    bounds = {"clamp_min": -0.5, "clamp_max": 0.5}
    for wanted in subsets(operator.arguments):
        tangents = [torch.randn_like(x) if a in wanted else None for a, x in zip(operator.arguments, inputs, strict=True)]
        actual, expected = (
            tangent_of(lambda *a, f=f: f(*a, **bounds), inputs, tangents) for f in (operator.function, operator.formula)
        )
        torch.testing.assert_close(actual, expected, **CLOSE)


@each_elementwise_operator
@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[::-1], HALF_TYPES * 2], ids=lambda d: "-".join(map(str, d)))
def test_tangents_of_mixed_dtypes_come_in_the_dtype_of_the_result(
    operator: Operator, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    inputs = [x.to(d) for x, d in zip(operator.inputs([2, 3], [3], device=device), dtypes, strict=False)]
    tangents = [torch.randn_like(x) for x in inputs]
    result = operator.function(*inputs)
    actual = tangent_of(operator.function, inputs, tangents)
    expected = tangent_of(operator.formula, [x.double() for x in inputs], [t.double() for t in tangents])
    assert actual is not None
    assert expected is not None
    assert (actual.dtype, actual.shape) == (result.dtype, result.shape)
    torch.testing.assert_close(actual, expected.to(result.dtype))


@each_elementwise_operator
def test_zero_tensors_are_accepted_as_tangents_and_as_incoming_gradients(operator: Operator, device: torch.device) -> None:
    inputs = operator.inputs([2, 3], device=device)
    zero = torch._efficientzerotensor((2, 3), dtype=torch.float64, device=device)
    moving = [torch.randn_like(inputs[0]), *[zero] * (operator.count - 1)]
    expected = tangent_of(operator.formula, inputs, [t.clone() for t in moving])
    torch.testing.assert_close(tangent_of(operator.function, inputs, moving), expected, **CLOSE)
    gradients = operator.backward(zero, *inputs)
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.zeros_like(inputs[0]), rtol=0, atol=0)


@each_elementwise_operator
def test_forward_over_reverse_and_reverse_over_forward_agree_with_the_formula(operator: Operator, device: torch.device) -> None:
    def forward_over_reverse(function: Callable[..., Tensor]) -> Tensor:
        return tangent_of(lambda *a: torch.stack(grad((function(*a) * weights).sum(), a, create_graph=True)), inputs, tangents)

    def reverse_over_forward(function: Callable[..., Tensor]) -> Tensor:
        return torch.stack(grad((tangent_of(function, inputs, tangents) * weights).sum(), inputs))

    inputs = operator.inputs([2, 3], device=device, requires_grad=True)
    tangents = [torch.randn_like(x) for x in inputs]
    weights = torch.randn_like(inputs[0])
    expected = forward_over_reverse(operator.formula)
    for actual in (forward_over_reverse(operator.function), reverse_over_forward(operator.function)):
        torch.testing.assert_close(actual, expected, **close(operator.count))


@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-12, 1e-30])
def test_first_derivatives_of_every_mode_keep_full_relative_precision_where_the_formula_cancels(
    scale: float, device: torch.device
) -> None:
    """The log-variance gradient is expm1, not exp - 1: near zero the difference has no correct digit in float32."""
    log_var = (torch.rand(64, device=device) + 0.5) * scale
    zero = torch.zeros_like(log_var)
    single = torch.expm1(log_var.double()) / 2
    pair = torch.expm1(log_var.double())
    bound = oracle.GRADIENT * torch.finfo(torch.float32).eps
    for function, expected in (
        (lambda lv: SINGLE.function(zero, lv), single),
        (lambda lv: PAIR.function(zero, lv, zero, zero), pair),
        (lambda lv: PAIR.function(zero, zero, zero, lv), -torch.expm1(-log_var.double())),
    ):
        differentiated = {
            "backward": grad(function(leaf := log_var.clone().requires_grad_()).sum(), leaf)[0],
            "create_graph": grad(function(leaf).sum(), leaf, create_graph=True)[0].detach(),
            "forward_ad": tangent_of(function, [log_var], [torch.ones_like(log_var)]),
            "func.grad": torch.func.grad(lambda lv, f=function: f(lv).sum())(log_var),
            "func.jvp": torch.func.jvp(function, (log_var,), (torch.ones_like(log_var),))[1],
            "vmap": torch.func.vmap(torch.func.grad(lambda lv, f=function: f(lv)[0]))(log_var),
        }
        for mode, actual in differentiated.items():
            torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=0, msg=lambda m, mode=mode: f"{mode}: {m}")


@each_reducing_operator
@each_reduction
def test_forward_mode_tangents_equal_those_of_the_formula_in_the_dtype_of_the_result(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    inputs = operator.inputs(*SHAPES["prior [D]"], device=device)
    for dtype in DTYPES:
        rounded = [x.to(dtype) for x in inputs]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, x.cos()) for x in rounded]
            value, tangent = forward_ad.unpack_dual(operator(*duals, **how))
        exact = [x.double() for x in rounded]
        expected = torch.func.jvp(operator.formula_with(how), tuple(exact), tuple(x.cos().double() for x in rounded))[1]
        assert tangent.dtype == value.dtype == dtype
        torch.testing.assert_close(tangent, expected.to(dtype))
