"""Gradients: those of the formula in float64, in each input's dtype, shape and strides, and exact where the formula cancels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from batching import no_fallback  # noqa: F401 (a fixture)
from operator_cases import Layout, each_layout, subsets
from operators import (
    CLOSE,
    DTYPES,
    GAUSSIAN,
    HALF_TYPES,
    SINGLE,
    Operator,
    clamp,
    close,
    each_documented_loss,
    each_elementwise_operator,
    each_operator,
    each_reducing_operator,
)
from oracle import same_bits
from reduction_cases import SHAPES, each_operator_and, each_operator_and_reduction, each_reduction, shapes_for

pytestmark = pytest.mark.usefixtures("no_fallback")

SUMS_CLOSE = close(24)


@each_elementwise_operator
@each_layout
def test_gradients_in_any_layout_equal_those_of_the_formula_in_float64(
    operator: Operator, layout: Layout, device: torch.device
) -> None:
    leaves, view = layout(operator, device, torch.float64)
    actual, expected = operator.function(*view(*leaves)), operator.formula(*view(*leaves))
    torch.testing.assert_close(actual, expected, **CLOSE)
    weights = torch.randn_like(actual)
    for leaf, a, e in zip(leaves, grad(actual, leaves, weights), grad(expected, leaves, weights), strict=True):
        assert a.shape == leaf.shape
        torch.testing.assert_close(a, e, **SUMS_CLOSE)


@each_operator_and_reduction
def test_gradients_equal_those_of_the_formula_in_float64(operator: Operator, how: dict[str, Any], device: torch.device) -> None:
    for shapes in shapes_for(operator):
        leaves = operator.inputs(*shapes, device=device, requires_grad=True)
        actual, expected = operator(*leaves, **how), operator.formula(*leaves, **how)
        torch.testing.assert_close(actual, expected, **SUMS_CLOSE)
        weights = torch.randn_like(actual)
        for x, a, e in zip(leaves, grad(actual, leaves, weights), grad(expected, leaves, weights), strict=True):
            assert a.shape == x.shape
            torch.testing.assert_close(a, e, **SUMS_CLOSE, msg=lambda m, s=shapes: f"{s}: {m}")


@each_operator_and("none", "sum", "mean of 1")
def test_the_gradient_of_any_subset_of_the_inputs_equals_that_of_the_formula(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    """What is not saved must not be missed: the inputs without gradient may be the ones that have the shape."""
    for shapes in shapes_for(operator):
        inputs, names = operator.inputs(*shapes, device=device), operator.arguments[: len(shapes)]
        for wanted in subsets(names):
            given = [x.detach().requires_grad_(a in wanted) for x, a in zip(inputs, names, strict=True)]
            leaves = [x for x in given if x.requires_grad]
            value = operator(*given, **how)
            weights = torch.randn_like(value)
            expected = grad(operator.formula(*given, **how), leaves, weights)
            for a, e in zip(grad(value, leaves, weights), expected, strict=True):
                torch.testing.assert_close(a, e, **SUMS_CLOSE, msg=lambda m, w=(shapes, wanted): f"gradients of {w}: {m}")


@each_documented_loss
def test_gradients_at_the_bounds_and_at_non_finite_inputs_are_those_of_the_formula(
    operator: Operator, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner in (torch, torch.Tensor):
        monkeypatch.setattr(owner, "clamp", clamp)
    special = [-math.inf, -2.0, -1.0, math.nextafter(-1.0, 0), 0.0, 1.0, math.nextafter(1.0, 2), 2.0, math.inf, math.nan]
    special = torch.tensor(special, dtype=torch.float64, device=device)
    grids = torch.meshgrid(*[special] * operator.count, indexing="ij")
    bounds = {"clamp_min": -1.0, "clamp_max": 1.0}

    def gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        inputs = [g.clone().requires_grad_() for g in grids]
        return grad(function(*inputs, **bounds).sum(), inputs)

    for name, actual, expected in zip(
        operator.arguments, gradients(operator.function), gradients(operator.formula), strict=True
    ):
        if "log_var" in name:
            at = grids[operator.arguments.index(name)]
            outside = ~((at >= -1) & (at <= 1))
            assert (actual[outside] == 0).all(), f"the gradient of {name} is not zero outside the clamp and where it is NaN"
        finite = torch.stack([g.isfinite() for g in grids]).all(0)
        torch.testing.assert_close(actual[finite], expected[finite], **CLOSE)
        torch.testing.assert_close(actual, expected, **CLOSE, equal_nan=True, msg=lambda m, n=name: f"gradient of {n}: {m}")


@each_reduction
def test_gradients_are_zero_strictly_outside_the_clamp_and_pass_at_its_bounds(
    how: dict[str, Any], device: torch.device
) -> None:
    edges = torch.tensor([-0.5, 0.5, math.nextafter(-0.5, -1), math.nextafter(0.5, 1)], dtype=torch.float64, device=device)
    mu_p, mu_q = GAUSSIAN.inputs([2, 3, 4], [2, 3, 4], device=device)
    for log_vars in ((edges, edges.flip(0)[:, None, None].expand(4, 1, 1)[:2]), (edges.expand(2, 3, 4), edges.new_zeros(()))):
        leaves = [x.clone().requires_grad_() for x in (mu_p, log_vars[0], mu_q, log_vars[1])]
        bounds = {"clamp_min": -0.5, "clamp_max": 0.5}
        actual, expected = (f(*leaves, **how, **bounds) for f in (GAUSSIAN.function, GAUSSIAN.formula))
        weights = torch.randn_like(actual)
        torch.testing.assert_close(grad(actual, leaves, weights), grad(expected, leaves, weights), **SUMS_CLOSE)
        assert (grad(GAUSSIAN(*leaves, **how, **bounds), leaves[1], weights)[0][..., 2:] == 0).all()


@each_operator
@pytest.mark.parametrize(
    "dtypes", [DTYPES, DTYPES[::-1], DTYPES[1:] + DTYPES[:1], HALF_TYPES * 2], ids=lambda d: "-".join(map(str, d))
)
def test_gradients_come_in_each_inputs_own_dtype_shape_and_strides(
    operator: Operator, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    exact = [x.mT for x in operator.inputs([5, 3, 4], [1, 3, 1], device=device, count=operator.count)]
    inputs = [x.to(dtype).requires_grad_() for x, dtype in zip(exact, dtypes, strict=False)]
    rounded = [x.detach().double().requires_grad_() for x in inputs]
    actual = grad(operator.function(*inputs).sum(), inputs)
    expected = grad(operator.formula(*rounded).sum(), rounded)
    for x, a, e in zip(inputs, actual, expected, strict=True):
        assert (a.dtype, a.shape, a.device) == (x.dtype, x.shape, x.device)
        assert a.stride() == torch.empty_like(x).stride()
        torch.testing.assert_close(a, e.to(x.dtype))


@each_reducing_operator
def test_gradients_have_the_strides_of_empty_like(operator: Operator, device: torch.device) -> None:
    mu, log_var = torch.randn(2, 6, 4, 5, device=device).contiguous(memory_format=torch.channels_last).chunk(2, 1)
    prior = [torch.randn(4, 3, device=device).t()[..., None], torch.randn(5, 4, device=device).t()]
    leaves = [x.detach().requires_grad_() for x in (mu, log_var, *prior)]
    for how in ({}, {"reduction": "sum"}, {"reduction": "mean", "dim": (1, 3)}):
        value = operator(*leaves, **how)
        for x, g in zip(leaves, grad(value.sum(), leaves), strict=True):
            assert g.stride() == torch.empty_like(x).stride()


@each_elementwise_operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", [([8, 16],), ([8, 16], [16])], ids=["same_shape", "prior"])
def test_create_graph_leaves_the_bits_of_the_gradients_as_they_are(
    operator: Operator, dtype: torch.dtype, shapes: Sequence[Sequence[int]], device: torch.device
) -> None:
    inputs = operator.inputs(*shapes, device=device, dtype=dtype)
    scales = torch.tensor([1.0, 1e-3, 1e-6, 1e-30, 30.0, math.nan, math.inf, -1e-10] * 2, dtype=torch.float64, device=device)
    inputs = [(x.double() * scales).to(dtype).requires_grad_() for x in inputs]
    weights = torch.randn(8, 16, device=device).to(dtype)
    kept = grad(operator.function(*inputs), inputs, weights, create_graph=True)
    plain = grad(operator.function(*inputs), inputs, weights)
    for name, k, p in zip(operator.arguments, kept, plain, strict=True):
        torch.testing.assert_close(k.detach(), p, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"gradient of {n}: {m}")


@each_reducing_operator
@each_reduction
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_create_graph_leaves_the_bits_of_the_gradients_of_a_reduction_as_they_are(
    operator: Operator, how: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    leaves = operator.inputs(*SHAPES["prior of the middle"], device=device, dtype=dtype, requires_grad=True)
    value = operator(*leaves, **how)
    weights = torch.randn_like(value)
    kept = grad(value, leaves, weights, create_graph=True)
    for x, k, p in zip(leaves, kept, grad(value, leaves, weights), strict=True):
        assert same_bits(k.detach(), p) and p.dtype == x.dtype


@each_elementwise_operator
def test_negated_views_are_differentiated_as_their_values(operator: Operator, device: torch.device) -> None:
    def views(leaf: Tensor) -> list[Tensor]:
        conjugates = [torch.view_as_complex(part).conj() for part in leaf.unbind()]
        assert all(c.imag.is_neg() for c in conjugates)
        return [c.imag for c in conjugates]

    (leaf,) = SINGLE.inputs([operator.count, 3, 2], device=device, requires_grad=True)[:1]
    weights = torch.view_as_complex(torch.randn(3, 2, dtype=torch.float64, device=device)).conj().imag
    actual = grad(operator.function(*views(leaf)), leaf, weights)
    expected = grad(operator.formula(*views(leaf)), leaf, weights)
    torch.testing.assert_close(actual, expected, **CLOSE)


REDUCED_GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded from one number": lambda g: g.flatten()[0].expand(g.shape) if g.dim() else g,
    "every second of twice as many": lambda g: g.repeat_interleave(2, 0)[::2] if g.dim() else g.repeat(2)[0],
    "transposed": lambda g: g.mT.contiguous().mT if g.dim() > 1 else g,
    "negated": lambda g: torch._neg_view(-g),
}


@each_reducing_operator
@pytest.mark.parametrize("make", REDUCED_GRADS.values(), ids=REDUCED_GRADS.keys())
@each_reduction
def test_reduced_gradients_are_taken_as_they_are(
    operator: Operator, make: Callable[[Tensor], Tensor], how: dict[str, Any], device: torch.device
) -> None:
    for name in ("standard", "prior [D]"):
        inputs = operator.inputs(*SHAPES[name], device=device, dtype=torch.float32)
        grad_output = make(torch.randn_like(operator(*inputs, **how)))
        plain = grad_output.resolve_neg().clone(memory_format=torch.contiguous_format)
        for a, e in zip(operator.backward(grad_output, *inputs, **how), operator.backward(plain, *inputs, **how), strict=True):
            assert same_bits(a, e)


@each_reducing_operator
def test_unwanted_gradients_are_none_and_the_others_do_not_change(operator: Operator, device: torch.device) -> None:
    inputs = operator.inputs(*SHAPES["prior [D]"], device=device, dtype=torch.float32)
    one = torch.ones((), device=device)
    every = operator.backward(one, *inputs, reduction="mean")
    for wanted in [(), *subsets(operator.arguments)]:
        mask = [name in wanted for name in operator.arguments]
        for is_wanted, g, full in zip(mask, operator.backward(one, *inputs, mask=mask, reduction="mean"), every, strict=True):
            assert same_bits(g, full) if is_wanted else g is None
