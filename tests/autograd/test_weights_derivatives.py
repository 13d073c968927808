"""Derivatives of weighted terms in every mode and of every order: those of the formula, and 0 where a term is left out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._vmap_internals import _vmap as legacy_vmap
from torch.autograd import forward_ad, functional, grad, gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad as func_grad
from torch.func import hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_map

from batching import batching_fallbacks, no_fallback  # noqa: F401 (a fixture)
from halves import joins
from layouts import chunk
from operators import DERIVATIVES_CLOSE, Operator, each_reducing_operator
from oracle import same_bits
from weight_cases import (
    SHAPES,
    WEIGHTS,
    each_reduction,
    each_shapes,
    formula,
    garbage,
    left_out,
    mask,
    some_weight,
    spoiled,
    tamed,
    weighted,
)

Function = Callable[..., Tensor]


def positive_weight(size: Sequence[int], device: Any) -> Tensor:
    """With zeros, but no sum that is 0 of more than zeros, which no mean could be divided by."""
    return some_weight(size, device=device).abs()


def finite_sums(size: Sequence[int], device: Any) -> Tensor:
    """Zeros again, but not in every place of any row, plane or column of [2, 3, 4]."""
    weight = torch.rand(tuple(size), dtype=torch.float64, device=device) + 0.5
    if weight.dim() == 3 and weight.numel() == 24:
        weight[0, 0, 1] = weight[1, 2, 3] = weight[0, 1, 2] = 0
    return weight


def every(inputs: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


def summed(f: Function) -> Function:
    return lambda *inputs: f(*inputs).square().sum()


def tangents(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.cos() for x in inputs)


TRANSFORMS: dict[str, Callable[[Function], Callable[..., Any]]] = {
    "grad": lambda f: lambda *a: func_grad(summed(f), argnums=every(a))(*a),
    "vjp": lambda f: lambda *a: vjp(f, *a)[1](f(*a).detach()),
    "jvp": lambda f: lambda *a: jvp(f, a, tangents(a)),
    "jacrev": lambda f: lambda *a: jacrev(f, argnums=every(a))(*a),
    "jacfwd": lambda f: lambda *a: jacfwd(f, argnums=every(a))(*a),
    "hessian": lambda f: lambda *a: hessian(f, argnums=every(a))(*a),
    "jvp of grad": lambda f: lambda *a: jvp(func_grad(summed(f), argnums=every(a)), a, tangents(a)),
    "grad of jvp": lambda f: lambda *a: func_grad(lambda *b: jvp(f, b, tangents(b))[1].sum(), argnums=every(a))(*a),
}


@each_reducing_operator
@each_shapes
@each_reduction
def test_derivatives_are_numerically_right_in_every_mode(
    operator: Operator, shapes: Any, how: dict[str, Any], device: torch.device
) -> None:
    leaves = operator.inputs(*shapes, device=device, requires_grad=True)
    options = {"fast_mode": True, "check_undefined_grad": True, "check_grad_dtypes": True, "check_batched_grad": True}
    size = (2, 1, 4) if shapes == SHAPES["all broadcast"] else (2, 3, 4)
    function = weighted(operator, finite_sums(size, device), how)
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, **options)


@each_reducing_operator
@each_reduction
def test_a_transform_gives_what_it_gives_of_the_formula(operator: Operator, how: dict[str, Any], device: torch.device) -> None:
    for shapes, size in (([(2, 2, 2)] * 2, (2, 1, 2)), ([(2, 2, 2)] * 2 + [(2,)] * 2, (2, 2, 2))):
        inputs = operator.inputs(*shapes, device=device)
        weight = positive_weight(size, device) + (0.5 if how.get("reduction") == "mean" and "dim" in how else 0.0)
        for name, transform in TRANSFORMS.items():
            actual = transform(weighted(operator, weight, how))(*inputs)
            with batching_fallbacks(shown=False):
                expected = transform(formula(operator, weight, how))(*inputs)
            for a, e in zip(tree_flatten(actual)[0], tree_flatten(expected)[0], strict=True):
                torch.testing.assert_close(a, e, **DERIVATIVES_CLOSE, msg=lambda m, n=name: f"{n}: {m}")


# What is left out


def second(function: Function, leaves: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Gradients, and from them those of the leaves and of grad_output again."""
    grad_output = grad_output.detach().requires_grad_()
    firsts = grad(function(*leaves), leaves, grad_output, create_graph=True)
    return (*firsts, *grad(sum((g.sin() + g * g).sum() for g in firsts), [*leaves, grad_output]))


@each_reducing_operator
@each_shapes
@each_reduction
def test_second_derivatives_are_0_where_a_term_is_left_out_whatever_stands_there(
    operator: Operator, shapes: Any, how: dict[str, Any], device: torch.device
) -> None:
    for size in WEIGHTS.values():
        inputs = operator.inputs(*shapes, device=device)
        weight = some_weight(size, device=device)
        function = weighted(operator, weight, how)
        grad_output = torch.randn_like(function(*inputs))
        given = (spoiled(inputs, weight), tamed(operator, inputs, weight))
        got, want = (second(function, [x.requires_grad_() for x in leaves], grad_output) for leaves in given)
        for g, w in zip(got, want, strict=True):
            assert same_bits(g, w)
        outs = [left_out(weight, (2, 3, 4), x) for x in inputs]
        for x, is_out in zip(got, [*outs, *outs], strict=False):
            assert (x[is_out] == 0).all()


@each_reducing_operator
@each_shapes
@each_reduction
def test_tangents_are_not_touched_by_what_is_left_out(
    operator: Operator, shapes: Any, how: dict[str, Any], device: torch.device
) -> None:
    """Forward mode, and forward over reverse: with garbage for tangents there as well."""
    for size in WEIGHTS.values():
        inputs = operator.inputs(*shapes, device=device)
        weight = some_weight(size, device=device)
        function = weighted(operator, weight, how)
        directions = [torch.randn_like(x) for x in inputs]
        cases = (
            (spoiled(inputs, weight), spoiled(directions, weight)),
            (tamed(operator, inputs, weight), directions),
        )
        results = []
        for primals, along in cases:
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(x.requires_grad_(), t) for x, t in zip(primals, along, strict=True)]
                value = function(*duals)
                gradients = grad(value, duals, torch.ones_like(value), create_graph=True)
                results.append([*forward_ad.unpack_dual(value), *(y for g in gradients for y in forward_ad.unpack_dual(g))])
        value, tangent, *gradients = results[0]
        for g, w in zip(*results, strict=True):
            assert same_bits(g.detach(), w.detach())
        if not how:
            assert (tangent[(weight == 0).expand(2, 3, 4)] == 0).all()
        for x, *of_gradient in zip(inputs, gradients[::2], gradients[1::2], strict=True):
            for part in of_gradient:
                assert (part[left_out(weight, (2, 3, 4), x)] == 0).all()


@each_reducing_operator
def test_a_hessian_is_0_where_a_term_is_left_out(operator: Operator, device: torch.device) -> None:
    """And in the mean of a row that has no weight, which is NaN."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64, device=device)
    inputs = spoiled(operator.inputs(*[(2, 2)] * 4, device=device), weight)
    for how in ({"reduction": "sum"}, {"reduction": "mean", "dim": 1}):
        for result in (hessian(summed(weighted(operator, weight, how)), argnums=(0, 1, 2, 3))(*inputs),):
            for block in tree_flatten(result)[0]:
                rest = block.clone()
                rest[0, 0, 0, 0] = 0
                assert block.shape == (2, 2, 2, 2)
                if how["reduction"] == "sum":
                    assert (rest == 0).all()


# Gradients that are written where they are told, and what is saved


@each_reducing_operator
@each_shapes
@each_reduction
def test_gradients_written_to_given_tensors_have_the_same_bits(
    operator: Operator, shapes: Any, how: dict[str, Any], device: torch.device
) -> None:
    for size, dtype in itertools.product(((2, 3, 4), (2, 1, 4), ()), (torch.bool, torch.float16, torch.float32)):
        inputs = operator.inputs(*shapes, dtype=torch.float32, device=device)
        weight = some_weight(size, dtype, device)
        grad_output = torch.randn_like(operator.function(*inputs, weight=weight, **how))
        expected = operator.backward(grad_output, *inputs, weight=weight, **how)
        wanted = [i % 3 != 1 for i in range(len(inputs))]
        given = [garbage(x.shape, x.dtype, device) if w else None for x, w in zip(inputs, wanted, strict=True)]
        head, bounds = operator.backward_arguments(grad_output, inputs, weight, how, wanted)[:5], ()
        if operator.bounds:
            bounds = (-30.0, 20.0)
        dim = how.get("dim")
        named = zip([f"grad_{name}" for name in operator.arguments], [*given, None, None], strict=False)
        arguments = (*head, *bounds, how.get("reduction", "none"), dim, how.get("keepdim", False), weight)
        operator.backward_out(*arguments, **dict(named))
        for got, want in zip(given, expected, strict=True):
            assert got is None or same_bits(got, want)


@each_reducing_operator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1])
@each_reduction
def test_the_gradient_of_halves_is_written_at_once_with_the_bits_of_one_that_is_joined(
    operator: Operator, how: dict[str, Any], dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    if operator.bounds:
        drawn = operator.inputs((4, 6, 8), dtype=dtype, device=device)[0]
    else:
        drawn = torch.cat(operator.inputs(*[(4, 6, 8)] * 2, dtype=dtype, device=device), dim)
    h = drawn.requires_grad_()
    prior = operator.inputs((1,), (1,), dtype=dtype, device=device)
    shape = h.chunk(2, dim)[0].shape
    for size in (shape, (shape[0], 1, shape[2]), (shape[0], 1, 1)):
        for q, weight in itertools.product(([], prior), (mask(size, device), some_weight(size, dtype, device))):
            halves = h.chunk(2, dim)
            value = operator.function(*halves, *q, weight=weight, **how)
            apart = operator.function(*(x.clone() for x in halves), *q, weight=weight, **how)
            weights = torch.randn_like(value)
            (expected,) = grad(apart, h, weights)
            result = []
            assert not joins(lambda v=value, w=weights, r=result: r.extend(grad(v, h, w)))
            assert same_bits(result[0], expected)
            for part in result[0].chunk(2, dim):
                assert (part[(weight == 0).expand(shape)] == 0).all()


@each_reducing_operator
@pytest.mark.parametrize("how", [{}, {"reduction": "sum"}, {"reduction": "mean", "dim": 1}], ids=str)
def test_the_weight_is_saved_as_it_is(operator: Operator, how: dict[str, Any], device: torch.device) -> None:
    """Not widened, not expanded; and a change of it in place is caught."""
    inputs = operator.inputs((4, 5), (4, 5), device=device, requires_grad=True)
    weight = mask((4, 1), device)
    saved: list[int] = []
    with saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        operator.function(*inputs, weight=weight, **how)
    assert sorted(saved) == sorted(x.data_ptr() for x in (*inputs, weight))
    value = operator.function(*inputs, weight=weight, **how).sum()
    weight.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@each_reducing_operator
@each_reduction
def test_create_graph_leaves_the_bits_of_the_gradients(operator: Operator, how: dict[str, Any], device: torch.device) -> None:
    leaves = operator.inputs(*SHAPES["prior [D]"], dtype=torch.float32, device=device, requires_grad=True)
    value = operator.function(*leaves, weight=some_weight((3, 1), torch.float32, device), **how)
    weights = torch.randn_like(value)
    kept = grad(value, leaves, weights, create_graph=True)
    for a, b in zip(kept, grad(value, leaves, weights), strict=True):
        assert same_bits(a.detach(), b)


# Batches


def one_by_one(f: Callable[..., Any], in_dims: Sequence[int | None], *tensors: Tensor) -> Any:
    size = next(x.shape[d] for x, d in zip(tensors, in_dims, strict=True) if d is not None)
    examples = [f(*(x if d is None else x.select(d, i) for x, d in zip(tensors, in_dims, strict=True))) for i in range(size)]
    return tree_map(lambda *parts: torch.stack(parts), *examples)


def assert_same_bits(actual: Any, expected: Any, about: object) -> None:
    for a, e in zip(tree_flatten(actual)[0], tree_flatten(expected)[0], strict=True):
        assert same_bits(a.detach(), e.detach()), about


def in_batches(tensors: Sequence[Tensor], in_dims: Sequence[int | None], size: int = 3) -> list[Tensor]:
    """Other numbers in each example: the square keeps deviations positive, and what is left out."""
    batched = []
    for x, d in zip(tensors, in_dims, strict=True):
        others = [x, x.flip(-1) if x.dim() else x, x & False if x.dtype == torch.bool else x * x]
        batched.append(x if d is None else torch.stack(others[:size], d))
    return batched


def combinations(count: int) -> list[tuple[int | None, ...]]:
    """Batched in front, behind or not at all; each tensor alone, each alone not, all, and some others."""
    every_way = [dims for dims in itertools.product([None, 0, -1], repeat=count) if any(d is not None for d in dims)]
    few = [dims for dims in every_way if sum(d is None for d in dims) in (0, 1, count - 1)]
    alone = [dims for dims in few if sum(d is None for d in dims) == count - 1]
    return few[::2] + alone if count < 4 else few[::7] + alone


@each_reducing_operator
@each_reduction
@pytest.mark.usefixtures("no_fallback")
def test_vmap_over_any_of_the_arguments_has_the_bits_of_the_examples_alone(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    """A batched weight of unbatched inputs too; values, gradients, and the backward operator itself."""

    def function(weight: Tensor, *inputs: Tensor) -> Tensor:
        return operator.function(*inputs, weight=weight, **how)

    def gradients(weight: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return func_grad(lambda *x: function(weight, *x).square().sum(), argnums=tuple(range(len(inputs))))(*inputs)

    for name in ("standard", "prior [D]"):
        inputs = operator.inputs(*SHAPES[name], dtype=torch.float32, device=device)
        for size, dtype in (((2, 3, 4), torch.bool), ((2, 1, 4), torch.float32), ((4,), torch.float16), ((), torch.float32)):
            weight = some_weight(size, dtype, device)
            for in_dims in combinations(1 + len(inputs)):
                given = in_batches([weight, *inputs], in_dims)
                about = (name, size, in_dims)
                assert_same_bits(vmap(function, in_dims)(*given), one_by_one(function, in_dims, *given), about)
                if size == (2, 1, 4):
                    assert_same_bits(vmap(gradients, in_dims)(*given), one_by_one(gradients, in_dims, *given), about)


@each_reducing_operator
@each_reduction
@pytest.mark.parametrize("mapped", [vmap, legacy_vmap], ids=["torch.func", "is_grads_batched"])
@pytest.mark.usefixtures("no_fallback")
def test_a_batched_backward_operator_has_the_bits_of_the_examples_alone(
    operator: Operator, how: dict[str, Any], mapped: Callable[..., Any], device: torch.device
) -> None:
    def backward(grad_output: Tensor, weight: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(operator.backward(grad_output, *inputs, weight=weight, **how))

    for name in ("standard", "prior [D]"):
        inputs = operator.inputs(*SHAPES[name], dtype=torch.float32, device=device)
        for size, dtype in (((2, 3, 4), torch.float32), ((2, 1, 4), torch.bool), ((), torch.float32))[name == "standard" :]:
            weight = some_weight(size, dtype, device)
            grad_output = torch.randn_like(operator.function(*inputs, weight=weight, **how))
            weight_alone = (None, 0, *[None] * len(inputs))
            for in_dims in (weight_alone, *combinations(2 + len(inputs))[:: 2 if name == "standard" else 5]):
                given = in_batches([grad_output, weight, *inputs], in_dims)
                from_front = tuple(d if d is None else d % x.dim() for x, d in zip(given, in_dims, strict=True))
                actual = mapped(backward, from_front)(*given)
                assert_same_bits(actual, one_by_one(backward, in_dims, *given), (name, size, in_dims))


@each_reducing_operator
@pytest.mark.parametrize("how", [{"reduction": r, "dim": d} for r in ("sum", "mean") for d in (None, 0, ())], ids=str)
def test_vmap_over_examples_of_one_term(operator: Operator, how: dict[str, Any], device: torch.device) -> None:
    inputs = operator.inputs((5,), (5,), dtype=torch.float32, device=device)
    weight = some_weight((5,), torch.float32, device)

    def function(weight: Tensor, *inputs: Tensor) -> Tensor:
        return operator.function(*inputs, weight=weight, **how)

    for in_dims in ((0, 0, 0), (None, 0, 0), (0, None, None), (0, 0, None)):
        given = [x if d is not None else x[0] for x, d in zip((weight, *inputs), in_dims, strict=True)]
        assert_same_bits(vmap(function, in_dims)(*given), one_by_one(function, in_dims, *given), in_dims)


@each_reducing_operator
def test_nested_vmap_over_masks_and_inputs(operator: Operator, device: torch.device) -> None:
    """Every mask of every sample, as importance-weighted objectives have it."""
    inputs = operator.inputs((4, 5), (4, 5), dtype=torch.float32, device=device)
    masks = mask((3, 5), device)
    for how in ({}, {"reduction": "sum"}, {"reduction": "mean"}):

        def function(weight: Tensor, *x: Tensor, how: dict[str, Any] = how) -> Tensor:
            return operator.function(*x, weight=weight, **how)

        actual = vmap(vmap(function, (None, 0, 0)), (0, None, None))(masks, *inputs)
        expected = [torch.stack([function(m, *(x[i] for x in inputs)) for i in range(4)]) for m in masks]
        assert same_bits(actual, torch.stack(expected))


@each_reducing_operator
@each_reduction
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.usefixtures("no_fallback")
def test_is_grads_batched_gives_the_gradients_one_by_one(
    operator: Operator, how: dict[str, Any], create_graph: bool, device: torch.device
) -> None:
    for name, size in (("standard", (2, 3, 4)), ("prior [D]", (2, 1, 4)), ("all broadcast", (3, 1)), ("pair", ())):
        leaves = operator.inputs(*SHAPES[name], device=device, requires_grad=True)
        value = operator.function(*leaves, weight=some_weight(size, device=device), **how)
        weights = torch.randn(3, *value.shape, dtype=torch.float64, device=device)
        batched = grad(value, leaves, weights, is_grads_batched=True, retain_graph=True, create_graph=create_graph)
        for i, weight in enumerate(weights):
            for a, e in zip(batched, grad(value, leaves, weight, retain_graph=True), strict=True):
                assert same_bits(a[i].detach(), e)


@each_reducing_operator
def test_vectorised_jacobians_and_hessians_of_torch_autograd(operator: Operator, device: torch.device) -> None:
    inputs = tuple(operator.inputs((2, 2), (2, 2), device=device))
    weight = positive_weight((2, 1), device)
    for how in ({}, {"reduction": "sum", "dim": 1}, {"reduction": "mean"}):
        functions = weighted(operator, weight, how), formula(operator, weight, how)
        for options in ({"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}):
            with batching_fallbacks(shown=False):
                torch.testing.assert_close(*(functional.jacobian(f, inputs, **options) for f in functions), **DERIVATIVES_CLOSE)
        with batching_fallbacks(shown=False):
            torch.testing.assert_close(
                *(functional.hessian(summed(f), inputs, vectorize=True) for f in functions), **DERIVATIVES_CLOSE
            )


@each_reducing_operator
def test_halves_of_one_weight_and_a_weight_that_is_an_input(operator: Operator, device: torch.device) -> None:
    """The same memory in several arguments."""
    x = operator.inputs((4, 6), dtype=torch.float32, device=device)[0].abs() + 0.5
    weight = x.detach()
    leaf = x.clone().requires_grad_()
    value = operator.function(leaf, leaf, weight=weight, reduction="sum")
    other = operator.function(leaf, leaf, weight=chunk(weight.clone(), 1, 1), reduction="sum")
    assert same_bits(value.detach(), other.detach())
    assert same_bits(*grad(value, leaf), *grad(other, leaf))
