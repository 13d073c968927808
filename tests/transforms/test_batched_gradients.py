"""The batched modes of torch.autograd, which are older than torch.func and have a dispatch key of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.autograd import functional, grad

from batching import no_fallback  # noqa: F401 (a fixture)
from operator_cases import each_operator_and_wanted
from operators import Operator, each_operator
from oracle import same_bits
from reduction_cases import each_operator_and_reduction, shapes_for
from transform_cases import Function, assert_same_as_formula, summed, with_tangents

pytestmark = pytest.mark.usefixtures("no_fallback")


@each_operator_and_wanted
@pytest.mark.parametrize("create_graph", [False, True])
def test_is_grads_batched_gives_the_gradients_one_by_one(
    operator: Operator, wanted: Sequence[str], create_graph: bool, device: torch.device
) -> None:
    inputs = [
        x.requires_grad_(a in wanted)
        for a, x in zip(operator.arguments, operator.inputs([2, 1], [3], device=device, count=operator.count), strict=True)
    ]
    leaves = [x for x in inputs if x.requires_grad]
    result = operator.function(*inputs)
    weights = torch.randn(4, 2, 3, dtype=torch.float64, device=device)
    batched = grad(result, leaves, weights, is_grads_batched=True, retain_graph=True, create_graph=create_graph)
    for i, weight in enumerate(weights):
        for a, e in zip(batched, grad(result, leaves, weight, retain_graph=True), strict=True):
            assert same_bits(a[i], e)


@each_operator_and_reduction
@pytest.mark.parametrize("create_graph", [False, True])
def test_is_grads_batched_gives_the_bits_of_the_gradients_one_by_one(
    operator: Operator, how: dict[str, Any], create_graph: bool, device: torch.device
) -> None:
    for shapes in shapes_for(operator, "standard", "prior [D]", "prior of the middle"):
        leaves = operator.inputs(*shapes, device=device, requires_grad=True)
        value = operator(*leaves, **how)
        weights = torch.randn(3, *value.shape, dtype=torch.float64, device=device)
        batched = grad(value, leaves, weights, is_grads_batched=True, retain_graph=True, create_graph=create_graph)
        for i, weight in enumerate(weights):
            for a, e in zip(batched, grad(value, leaves, weight, retain_graph=True), strict=True):
                assert same_bits(a[i].detach(), e), shapes


@each_operator_and_reduction
def test_torch_autograd_functional_gives_what_it_gives_of_the_formula(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    inputs = operator.inputs([2, 2, 2], [2], device=device) if how else operator.inputs([2, 3], device=device)
    v = with_tangents(inputs)
    calls: dict[str, Callable[[Function], Any]] = {
        "jacobian": lambda f: functional.jacobian(f, inputs),
        "vectorized jacobian": lambda f: functional.jacobian(f, inputs, vectorize=True),
        "differentiable jacobian": lambda f: functional.jacobian(f, inputs, vectorize=True, create_graph=True),
        "forward-mode jacobian": lambda f: functional.jacobian(f, inputs, vectorize=True, strategy="forward-mode"),
        "hessian": lambda f: functional.hessian(summed(f), inputs),
        "vectorized hessian": lambda f: functional.hessian(summed(f), inputs, vectorize=True),
        "forward-mode hessian": lambda f: functional.hessian(
            summed(f), inputs, vectorize=True, outer_jacobian_strategy="forward-mode"
        ),
        "vjp": lambda f: functional.vjp(f, inputs, v[0]),
        "jvp": lambda f: functional.jvp(f, inputs, v),
        "hvp": lambda f: functional.hvp(summed(f), inputs, v),
        "vhp": lambda f: functional.vhp(summed(f), inputs, v),
    }
    few = ("jacobian", "vectorized jacobian", "forward-mode jacobian", "vectorized hessian")
    for name in few if how else calls:
        assert_same_as_formula(operator, lambda f, name=name: lambda *_: calls[name](f), *inputs, about=name, **how)


@each_operator
def test_a_vectorized_jacobian_of_half_inputs_comes_in_half(operator: Operator, device: torch.device) -> None:
    inputs = operator.inputs([2, 3], device=device, dtype=torch.bfloat16)
    plain, vectorized = (functional.jacobian(operator.function, inputs, vectorize=v) for v in (False, True))
    for p, v in zip(plain, vectorized, strict=True):
        assert same_bits(p, v)
