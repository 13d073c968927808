"""Transforms of torch.func as the tests take them, and what they promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.func import grad as func_grad
from torch.utils._pytree import tree_flatten, tree_map

from batching import batching_fallbacks
from operators import DERIVATIVES_CLOSE, Operator
from oracle import same_bits

Function = Callable[..., Any]


def of_all(transform: Callable[..., Function], f: Function, **options: Any) -> Function:
    """The transform with respect to every input."""
    return lambda *inputs: transform(f, argnums=tuple(range(len(inputs))), **options)(*inputs)


def summed(f: Function) -> Function:
    return lambda *inputs: f(*inputs).square().sum()


def with_tangents(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.cos() for x in inputs)


TRANSFORMS: dict[str, Callable[[Function], Callable[..., Any]]] = {
    "grad": lambda f: of_all(func_grad, summed(f)),
    "vjp": lambda f: lambda *a: vjp(f, *a)[1](torch.ones_like(f(*a)).cumsum(0)),
    "jvp": lambda f: lambda *a: jvp(f, a, with_tangents(a)),
    "linearize": lambda f: lambda *a: linearize(f, *a)[1](*with_tangents(a)),
    "jacrev": lambda f: of_all(jacrev, f),
    "jacrev in chunks": lambda f: of_all(jacrev, f, chunk_size=2),
    "jacfwd": lambda f: of_all(jacfwd, f),
    "hessian": lambda f: of_all(hessian, f),
    "jacrev of jacrev": lambda f: of_all(jacrev, of_all(jacrev, f)),
    "jacfwd of jacfwd": lambda f: of_all(jacfwd, of_all(jacfwd, f)),
    "jacrev of jacfwd": lambda f: of_all(jacrev, of_all(jacfwd, f)),
    "third derivative": lambda f: jacfwd(jacrev(jacrev(summed(f)))),
    "grad of grad": lambda f: of_all(func_grad, lambda *a: sum(g.sum() for g in of_all(func_grad, summed(f))(*a))),
    "jvp of grad": lambda f: lambda *a: jvp(of_all(func_grad, summed(f)), a, with_tangents(a)),
    "grad of jvp": lambda f: of_all(func_grad, lambda *a: jvp(f, a, with_tangents(a))[1].sum()),
    "jvp of jvp": lambda f: lambda *a: jvp(lambda *b: jvp(f, b, with_tangents(b))[1], a, with_tangents(a)),
    "vmap": lambda f: vmap(f),
    "vmap of vmap": lambda f: vmap(vmap(f)),
    "vmap of vmap of other dims": lambda f: vmap(vmap(f, in_dims=-1), in_dims=1, out_dims=-1),
    "vmap in chunks": lambda f: vmap(f, chunk_size=1),
    "vmap of grad": lambda f: vmap(of_all(func_grad, summed(f))),
    "vmap of vjp": lambda f: vmap(lambda *a: vjp(f, *a)[1](a[0])),
    "vmap of jvp": lambda f: vmap(lambda *a: jvp(f, a, with_tangents(a))),
    "vmap of jacrev": lambda f: vmap(of_all(jacrev, f)),
    "vmap of hessian": lambda f: vmap(of_all(hessian, f)),
    "vmap of vmap of grad": lambda f: vmap(vmap(of_all(func_grad, summed(f)))),
    "grad of vmap": lambda f: of_all(func_grad, summed(vmap(f))),
    "jvp of vmap": lambda f: lambda *a: jvp(vmap(f), a, with_tangents(a)),
    "hessian of vmap": lambda f: of_all(hessian, vmap(f)),
    "functionalize of grad": lambda f: functionalize(of_all(func_grad, summed(f))),
}


def assert_same_as_formula(
    operator: Operator, transform: Callable[[Function], Function], *inputs: Tensor, about: object = "", **how: Any
) -> None:
    """What the transform gives of the operator and of its formula, which may do as it likes about batching."""
    actual = transform(operator.with_(how))(*inputs)
    with batching_fallbacks(shown=False):
        expected = transform(operator.formula_with(how))(*inputs)
    (actual_leaves, actual_tree), (expected_leaves, expected_tree) = tree_flatten(actual), tree_flatten(expected)
    assert actual_tree == expected_tree
    for a, e in zip(actual_leaves, expected_leaves, strict=True):
        torch.testing.assert_close(a, e, **DERIVATIVES_CLOSE, msg=lambda m: f"{about}: {m}")


def one_by_one(f: Callable[..., Any], in_dims: Sequence[int | None], *inputs: Tensor) -> Any:
    """What vmap promises: the function of each example by itself, stacked."""
    size = next(x.shape[d] for x, d in zip(inputs, in_dims, strict=True) if d is not None)
    examples = [f(*(x if d is None else x.select(d, i) for x, d in zip(inputs, in_dims, strict=True))) for i in range(size)]
    return tree_map(lambda *parts: torch.stack(parts), *examples)


def assert_same_bits(actual: Any, expected: Any, about: object = "") -> None:
    for a, e in zip(tree_flatten(actual)[0], tree_flatten(expected)[0], strict=True):
        assert same_bits(a, e), about
