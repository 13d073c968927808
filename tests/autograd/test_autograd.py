"""Gradients of every order and mode: right in float64, in each input's dtype, and exact where the formula cancels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from batching import no_fallback  # noqa: F401 (a fixture)
from operator_cases import Layout, clamped_inputs, each_elementwise_operator_and_wanted, each_layout
from operators import CLOSE, DTYPES, HALF_TYPES, SINGLE, Operator, clamp, each_elementwise_operator

# gradcheck and its like also check the batched modes, and those must not go example by example.
pytestmark = pytest.mark.usefixtures("no_fallback")

each_mode = pytest.mark.parametrize("fast_mode", [False, True], ids=["slow", "fast"])


@each_elementwise_operator
@each_layout
@each_mode
def test_first_derivatives_are_numerically_right_in_both_modes_and_batched(
    operator: Operator, layout: Layout, fast_mode: bool, device: torch.device
) -> None:
    leaves, view = layout(operator, device, torch.float64)
    assert gradcheck(
        lambda *leaves: operator.function(*view(*leaves)),
        leaves,
        fast_mode=fast_mode,
        check_undefined_grad=True,
        check_grad_dtypes=True,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
    )


@each_elementwise_operator
@each_layout
@pytest.mark.parametrize("non_contiguous", [False, True], ids=["contiguous", "non_contiguous_grad_output"])
def test_second_derivatives_are_numerically_right(
    operator: Operator, layout: Layout, non_contiguous: bool, device: torch.device
) -> None:
    leaves, view = layout(operator, device, torch.float64)
    assert gradgradcheck(
        lambda *leaves: operator.function(*view(*leaves)),
        leaves,
        gen_non_contig_grad_outputs=non_contiguous,
        fast_mode=not non_contiguous,
        check_undefined_grad=True,
        check_grad_dtypes=True,
        check_batched_grad=True,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
    )


@each_elementwise_operator_and_wanted
def test_gradients_of_any_subset_of_the_inputs_are_numerically_right(
    operator: Operator, wanted: Sequence[str], device: torch.device
) -> None:
    inputs = [
        x.requires_grad_(a in wanted)
        for a, x in zip(operator.arguments, operator.inputs([2, 1], [3], device=device), strict=True)
    ]
    options = {"fast_mode": True, "check_undefined_grad": True, "check_batched_grad": True}
    assert gradcheck(operator.function, inputs, check_forward_ad=True, **options)
    assert gradgradcheck(operator.function, inputs, check_fwd_over_rev=True, **options)


@each_elementwise_operator
@each_mode
def test_derivatives_are_numerically_right_inside_and_outside_the_clamp(
    operator: Operator, fast_mode: bool, device: torch.device
) -> None:
    def clamped(*inputs: Tensor) -> Tensor:
        return operator.function(*inputs, clamp_min=-0.5, clamp_max=0.5)

    inputs = clamped_inputs(operator, device)
    options = {"fast_mode": fast_mode, "check_batched_grad": True}
    assert gradcheck(clamped, inputs, check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert gradgradcheck(clamped, inputs, check_fwd_over_rev=True, **options)


@each_elementwise_operator
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


@each_elementwise_operator
@each_layout
def test_gradients_equal_those_of_the_formula_in_float64(operator: Operator, layout: Layout, device: torch.device) -> None:
    leaves, view = layout(operator, device, torch.float64)
    actual, expected = operator.function(*view(*leaves)), operator.formula(*view(*leaves))
    torch.testing.assert_close(actual, expected, **CLOSE)
    weights = torch.randn_like(actual)
    for leaf, a, e in zip(leaves, grad(actual, leaves, weights), grad(expected, leaves, weights), strict=True):
        assert a.shape == leaf.shape
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


@each_elementwise_operator
@pytest.mark.parametrize(
    "dtypes", [DTYPES, DTYPES[::-1], DTYPES[1:] + DTYPES[:1], HALF_TYPES * 2], ids=lambda d: "-".join(map(str, d))
)
def test_gradients_come_in_each_inputs_own_dtype_shape_and_strides(
    operator: Operator, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    exact = [x.mT for x in operator.inputs([5, 3, 4], [1, 3, 1], device=device)]
    inputs = [x.to(dtype).requires_grad_() for x, dtype in zip(exact, dtypes, strict=False)]
    rounded = [x.detach().double().requires_grad_() for x in inputs]
    actual = grad(operator.function(*inputs).sum(), inputs)
    expected = grad(operator.formula(*rounded).sum(), rounded)
    for x, a, e in zip(inputs, actual, expected, strict=True):
        assert (a.dtype, a.shape, a.device) == (x.dtype, x.shape, x.device)
        assert a.stride() == torch.empty_like(x).stride()
        torch.testing.assert_close(a, e.to(x.dtype))


def nested_derivatives(function: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The weighted sum over all inputs of the derivative, taken once for each of the weights."""
    result = function(*inputs)
    for weight in weights:
        gradients = grad((result * weight).sum(), inputs, create_graph=True, materialize_grads=True)
        result = sum((g * (i + 1) for i, g in enumerate(gradients)), torch.zeros_like(result))
    return result


@each_elementwise_operator
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_derivatives_up_to_the_fourth_equal_those_of_the_formula(operator: Operator, order: int, device: torch.device) -> None:
    inputs = operator.inputs([2, 3], device=device, requires_grad=True)
    weights = [torch.randn(2, 3, dtype=torch.float64, device=device) for _ in range(order)]
    actual, expected = (nested_derivatives(f, inputs, weights) for f in (operator.function, operator.formula))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@each_elementwise_operator
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


@each_elementwise_operator
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
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


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


@each_elementwise_operator
def test_the_backward_operator_is_itself_differentiable_in_both_modes(operator: Operator, device: torch.device) -> None:
    def formula(grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(operator.formula, *inputs)[1](grad_output)

    def backward(grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return operator.backward_operator(grad_output, *inputs, -30.0, 20.0, [True] * operator.count)

    inputs = (torch.randn(2, 3, dtype=torch.float64, device=device), *operator.inputs([2, 3], [3], device=device))
    tangents = tuple(torch.randn_like(x) for x in inputs)
    options = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
    assert gradcheck(backward, [x.requires_grad_() for x in inputs], fast_mode=True, **options)
    (actual, actual_tangent), (expected, expected_tangent) = (torch.func.jvp(f, inputs, tangents) for f in (backward, formula))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(actual_tangent, expected_tangent, rtol=1e-11, atol=1e-11)
