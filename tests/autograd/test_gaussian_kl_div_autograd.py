"""Derivatives of the divergences, of every order and in every mode, and what it saves for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

from batching import no_fallback  # noqa: F401 (a fixture)
from kl_ext import gaussian_kl_div
from operator_cases import subsets
from operators import DTYPES, GAUSSIAN, Operator, each_reducing_operator
from oracle import same_bits
from reduction_cases import REDUCTIONS, SHAPES, each_reduction, each_shapes

NAMES = GAUSSIAN.arguments  # the places of the inputs, of either divergence
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


@each_reducing_operator
@each_shapes
@each_reduction
def test_gradients_equal_those_of_the_formula_in_float64(
    operator: Operator, shapes: Sequence[Sequence[int]], how: dict[str, Any], device: torch.device
) -> None:
    leaves = operator.inputs(*shapes, device=device, requires_grad=True)
    actual, expected = operator(*leaves, **how), operator.formula(*leaves, **how)
    torch.testing.assert_close(actual, expected, **CLOSE)
    weights = torch.randn_like(actual)
    for x, a, e in zip(leaves, grad(actual, leaves, weights), grad(expected, leaves, weights), strict=True):
        assert a.shape == x.shape
        torch.testing.assert_close(a, e, **CLOSE)


@each_reducing_operator
@each_shapes
@pytest.mark.parametrize("how", [REDUCTIONS["none"], REDUCTIONS["sum"], REDUCTIONS["mean of 1"]], ids=str)
def test_the_gradient_of_any_subset_of_the_inputs_equals_that_of_the_formula(
    operator: Operator, shapes: Sequence[Sequence[int]], how: dict[str, Any], device: torch.device
) -> None:
    """What is not saved must not be missed: the inputs without gradient may be the ones that have the shape."""
    inputs = operator.inputs(*shapes, device=device)
    for wanted in subsets(NAMES[: len(shapes)]):
        given = [x.detach().requires_grad_(name in wanted) for x, name in zip(inputs, NAMES, strict=False)]
        leaves = [x for x in given if x.requires_grad]
        value = operator(*given, **how)
        weights = torch.randn_like(value)
        expected = grad(operator.formula(*given, **how), leaves, weights)
        for a, e in zip(grad(value, leaves, weights), expected, strict=True):
            torch.testing.assert_close(a, e, **CLOSE, msg=lambda m, w=wanted: f"gradients of {w}: {m}")


GRADCHECKED = ["standard", "standard, outer", "pair", "prior [D]", "all broadcast", "q is the largest"]


@each_reducing_operator
@pytest.mark.parametrize("shapes", [SHAPES[name] for name in GRADCHECKED], ids=GRADCHECKED)
@each_reduction
@pytest.mark.usefixtures("no_fallback")
def test_derivatives_are_numerically_right_in_every_mode(
    operator: Operator, shapes: Sequence[Sequence[int]], how: dict[str, Any], device: torch.device
) -> None:
    leaves = operator.inputs(*([min(n, 2) for n in shape] for shape in shapes), device=device, requires_grad=True)
    options = {"fast_mode": True, "check_undefined_grad": True, "check_grad_dtypes": True, "check_batched_grad": True}
    assert gradcheck(operator.with_(how), leaves, check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert gradgradcheck(operator.with_(how), leaves, check_fwd_over_rev=True, check_rev_over_rev=True, **options)


@each_reducing_operator
@pytest.mark.parametrize("how", [REDUCTIONS["sum of 0 and 2"], REDUCTIONS["batchmean"]], ids=str)
def test_derivatives_are_numerically_right_element_by_element(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    leaves = operator.inputs([2, 2, 2], [2, 1, 2], [2], [], device=device, requires_grad=True)
    assert gradcheck(operator.with_(how), leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(operator.with_(how), leaves, check_fwd_over_rev=True, gen_non_contig_grad_outputs=True)


@each_reducing_operator
@each_reduction
def test_the_backward_operator_is_itself_differentiable(operator: Operator, how: dict[str, Any], device: torch.device) -> None:
    def backward(grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(operator.backward(grad_output, *inputs, **how))

    def by_formula(grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(operator.formula_with(how), *inputs)[1](grad_output)

    inputs = operator.inputs(*SHAPES["prior of the middle"], device=device)
    tensors = (torch.randn_like(operator.formula(*inputs, **how)), *inputs)
    tangents = tuple(torch.randn_like(x) for x in tensors)
    actual, expected = (torch.func.jvp(f, tensors, tangents) for f in (backward, by_formula))
    torch.testing.assert_close(actual, expected, **CLOSE)
    leaves = [x.requires_grad_() for x in tensors]
    seconds = [grad(sum((g * g).sum() for g in f(*leaves)), leaves) for f in (backward, by_formula)]
    torch.testing.assert_close(*seconds, **CLOSE)


@each_reducing_operator
@each_reduction
def test_third_derivatives_equal_those_of_the_formula(operator: Operator, how: dict[str, Any], device: torch.device) -> None:
    leaves = operator.inputs(*SHAPES["prior [D]"], device=device, requires_grad=True)

    def third(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        total = function(*leaves).pow(2).sum()
        for _ in range(2):
            total = sum((g * (i + 1)).sum() for i, g in enumerate(grad(total, leaves, create_graph=True)))
        return grad(total, leaves)

    torch.testing.assert_close(third(operator.with_(how)), third(operator.formula_with(how)), rtol=1e-9, atol=1e-9)


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


@each_reducing_operator
@each_reduction
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_create_graph_leaves_the_bits_of_the_gradients_as_they_are(
    operator: Operator, how: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    leaves = operator.inputs(*SHAPES["prior of the middle"], device=device, dtype=dtype, requires_grad=True)
    value = operator(*leaves, **how)
    weights = torch.randn_like(value)
    kept = grad(value, leaves, weights, create_graph=True)
    for x, k, p in zip(leaves, kept, grad(value, leaves, weights), strict=True):
        assert same_bits(k.detach(), p) and p.dtype == x.dtype


@each_reduction
def test_gradients_are_zero_strictly_outside_the_clamp_and_pass_at_its_bounds(
    how: dict[str, Any], device: torch.device
) -> None:
    edges = torch.tensor([-0.5, 0.5, math.nextafter(-0.5, -1), math.nextafter(0.5, 1)], dtype=torch.float64, device=device)
    mu_p, mu_q = GAUSSIAN.inputs([2, 3, 4], [2, 3, 4], device=device)
    for log_vars in ((edges, edges.flip(0)[:, None, None].expand(4, 1, 1)[:2]), (edges.expand(2, 3, 4), edges.new_zeros(()))):
        leaves = [x.clone().requires_grad_() for x in (mu_p, log_vars[0], mu_q, log_vars[1])]
        bounds = {"clamp_min": -0.5, "clamp_max": 0.5}
        actual, expected = (f(*leaves, **how, **bounds) for f in (gaussian_kl_div, GAUSSIAN.formula))
        weights = torch.randn_like(actual)
        torch.testing.assert_close(grad(actual, leaves, weights), grad(expected, leaves, weights), **CLOSE)
        assert (grad(gaussian_kl_div(*leaves, **how, **bounds), leaves[1], weights)[0][..., 2:] == 0).all()


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
    for wanted in [(), *subsets(NAMES)]:
        mask = [name in wanted for name in NAMES]
        for is_wanted, g, full in zip(mask, operator.backward(one, *inputs, mask=mask, reduction="mean"), every, strict=True):
            assert same_bits(g, full) if is_wanted else g is None


@each_reducing_operator
def test_gradients_have_the_strides_of_empty_like(operator: Operator, device: torch.device) -> None:
    mu, log_var = torch.randn(2, 6, 4, 5, device=device).contiguous(memory_format=torch.channels_last).chunk(2, 1)
    prior = [torch.randn(4, 3, device=device).t()[..., None], torch.randn(5, 4, device=device).t()]
    leaves = [x.detach().requires_grad_() for x in (mu, log_var, *prior)]
    for how in ({}, {"reduction": "sum"}, {"reduction": "mean", "dim": (1, 3)}):
        value = operator(*leaves, **how)
        for x, g in zip(leaves, grad(value.sum(), leaves), strict=True):
            assert g.stride() == torch.empty_like(x).stride()


# What is saved

WANTED = [(count, wanted) for count in GAUSSIAN.counts for wanted in subsets(NAMES[:count])]
each_wanted = pytest.mark.parametrize("count, wanted", WANTED, ids=lambda x: "+".join(x) if isinstance(x, tuple) else str(x))


@each_reducing_operator
@each_wanted
@pytest.mark.parametrize("shape", [(2, 3), (3,)], ids=["same shapes", "prior"])
@pytest.mark.parametrize("how", [{}, {"reduction": "sum"}, {"reduction": "mean", "dim": 1}], ids=str)
def test_only_what_the_wanted_gradients_need_is_saved(
    operator: Operator, count: int, wanted: Sequence[str], shape: tuple[int, ...], how: dict[str, Any], device: torch.device
) -> None:
    shapes = [(2, 3), shape] if count == 2 else [(2, 3), (2, 3), shape, shape]
    inputs = [x.requires_grad_(n in wanted) for x, n in zip(operator.inputs(*shapes, device=device), NAMES, strict=False)]
    saved: list[int] = []
    with saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        operator(*inputs, **how)
    places = [NAMES.index(name) for name in wanted]
    needed = {NAMES[n] for p in places for n in operator.needed_places[p] if n < count}
    by_address = {x.data_ptr(): n for x, n in zip(inputs, NAMES, strict=False)}
    assert {by_address.get(address, "a new tensor") for address in saved} == needed
    assert len(saved) == len(needed)


@each_reducing_operator
@each_wanted
@pytest.mark.parametrize("how", [{}, {"reduction": "sum"}], ids=str)
def test_changing_an_input_in_place_is_caught_where_a_gradient_needs_it_and_allowed_elsewhere(
    operator: Operator, count: int, wanted: Sequence[str], how: dict[str, Any], device: torch.device
) -> None:
    places = [NAMES.index(name) for name in wanted]
    needed = {NAMES[n] for p in places for n in operator.needed_places[p] if n < count}
    for changed in range(count):
        inputs = operator.inputs(*[(2, 3), (2, 3), (3,), (3,)][:count], device=device)
        given = [x.requires_grad_(n in wanted) for x, n in zip(inputs, NAMES, strict=False)]
        leaves = [x for x in given if x.requires_grad]
        expected = grad(operator.formula(*given, **how).sum(), leaves)
        value = operator(*given, **how).sum()
        with torch.no_grad():
            given[changed].add_(1)
        if NAMES[changed] in needed:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                value.backward()
        else:
            torch.testing.assert_close(grad(value, leaves), expected, **CLOSE)
