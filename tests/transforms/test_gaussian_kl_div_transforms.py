"""torch.func and the batched modes of autograd on the divergences: a batched dimension is never reduced away."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._vmap_internals import _vmap as legacy_vmap
from torch.autograd import functional, grad
from torch.func import grad as func_grad
from torch.func import hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from batching import batching_fallbacks, no_fallback  # noqa: F401 (a fixture)
from operators import Operator, each_reducing_operator
from oracle import same_bits
from reduction_cases import SHAPES, each_reduction

pytestmark = pytest.mark.usefixtures("no_fallback")
Function = Callable[..., Tensor]


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
    "jacrev of jacrev": lambda f: lambda *a: jacrev(jacrev(f, argnums=every(a)), argnums=every(a))(*a),
    "jvp of grad": lambda f: lambda *a: jvp(func_grad(summed(f), argnums=every(a)), a, tangents(a)),
    "grad of jvp": lambda f: lambda *a: func_grad(lambda *b: jvp(f, b, tangents(b))[1].sum(), argnums=every(a))(*a),
}


@each_reducing_operator
@pytest.mark.parametrize("shapes", [SHAPES["standard"], SHAPES["prior [D]"], SHAPES["all broadcast"]], ids=str)
@each_reduction
def test_a_transform_gives_what_it_gives_of_the_formula(
    operator: Operator, shapes: Sequence[Sequence[int]], how: dict[str, Any], device: torch.device
) -> None:
    inputs = operator.inputs(*([min(n, 2) for n in shape] for shape in shapes), device=device)
    for name, transform in TRANSFORMS.items():
        actual = transform(operator.with_(how))(*inputs)
        with batching_fallbacks(shown=False):
            expected = transform(operator.formula_with(how))(*inputs)
        for a, e in zip(tree_flatten(actual)[0], tree_flatten(expected)[0], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def one_by_one(f: Callable[..., Any], in_dims: Sequence[int | None], *inputs: Tensor) -> Any:
    size = next(x.shape[d] for x, d in zip(inputs, in_dims, strict=True) if d is not None)
    examples = [f(*(x if d is None else x.select(d, i) for x, d in zip(inputs, in_dims, strict=True))) for i in range(size)]
    return tree_map(lambda *parts: torch.stack(parts), *examples)


def assert_same_bits(actual: Any, expected: Any, about: object = "") -> None:
    for a, e in zip(tree_flatten(actual)[0], tree_flatten(expected)[0], strict=True):
        assert same_bits(a, e), about


@each_reducing_operator
@each_reduction
def test_vmap_over_any_in_dims_gives_the_bits_of_the_examples_alone(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    for count in (2, 4):
        inputs = operator.inputs(*[(3, 3, 3, 3)] * count, device=device, dtype=torch.float32)
        combinations = list(itertools.product([None, 0, 2, -1], repeat=count))
        for in_dims in combinations[1 :: 1 if count == 2 else 11]:
            given = [x if d is not None else x[0] for x, d in zip(inputs, in_dims, strict=True)]
            actual = vmap(operator.with_(how), in_dims=in_dims)(*given)
            assert_same_bits(actual, one_by_one(operator.with_(how), in_dims, *given), in_dims)


@each_reducing_operator
@each_reduction
def test_vmap_of_examples_of_different_ranks_gives_the_bits_of_the_examples_alone(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    for shapes in (SHAPES["prior [D]"], SHAPES["all broadcast"], SHAPES["q is the largest"], SHAPES["standard, outer"]):
        for batched in itertools.product([True, False], repeat=len(shapes)):
            if any(batched):
                sizes = [(5, *shape) if b else shape for shape, b in zip(shapes, batched, strict=True)]
                inputs = operator.inputs(*sizes, device=device, dtype=torch.float32)
                in_dims = tuple(0 if b else None for b in batched)
                actual = vmap(operator.with_(how), in_dims=in_dims)(*inputs)
                assert_same_bits(actual, one_by_one(operator.with_(how), in_dims, *inputs), (sizes, in_dims))


@each_reducing_operator
@each_reduction
def test_vmap_of_gradients_gives_the_bits_of_the_examples_alone(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    """Per-sample gradients, of shared inputs too."""
    for shapes in (SHAPES["standard"], SHAPES["prior [D]"], SHAPES["prior of scalars"], SHAPES["q is the largest"]):
        for batched in itertools.product([True, False], repeat=len(shapes)):
            if any(batched):
                sizes = [(3, *shape) if b else shape for shape, b in zip(shapes, batched, strict=True)]
                inputs = operator.inputs(*sizes, device=device, dtype=torch.float32)
                in_dims = tuple(0 if b else None for b in batched)
                gradients = TRANSFORMS["grad"](operator.with_(how))
                assert_same_bits(vmap(gradients, in_dims=in_dims)(*inputs), one_by_one(gradients, in_dims, *inputs), in_dims)


@each_reducing_operator
@each_reduction
def test_vmap_of_the_backward_operator_gives_the_bits_of_the_examples_alone(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    def backward(*tensors: Tensor) -> list[Tensor]:
        return operator.backward(*tensors, **how)

    inputs = operator.inputs(*SHAPES["prior [D]"], device=device, dtype=torch.float32)
    grad_output = torch.randn_like(operator(*inputs, **how))
    for in_dims in itertools.product([None, 0, -1], repeat=5):
        if sum(d is not None for d in in_dims) in (1, 3, 5):
            given = [
                x if d is None else torch.stack([x, x.neg(), x.sin()], d)
                for x, d in zip((grad_output, *inputs), in_dims, strict=True)
            ]
            assert_same_bits(vmap(backward, in_dims=in_dims)(*given), one_by_one(backward, in_dims, *given), in_dims)


@each_reducing_operator
@each_reduction
def test_nested_vmap_reduces_neither_batch(operator: Operator, how: dict[str, Any], device: torch.device) -> None:
    inputs = operator.inputs((3, 2, 3, 4, 2), (3, 2, 3, 4, 2), device=device, dtype=torch.float32)
    f = operator.with_(how)
    for inner, outer in ((0, 0), (1, -1), (-1, 0)):
        actual = vmap(vmap(f, in_dims=inner), in_dims=outer)(*inputs)
        expected = one_by_one(lambda *a, d=inner: one_by_one(f, (d, d), *a), (outer, outer), *inputs)
        assert_same_bits(actual, expected)
    actual = vmap(vmap(f, in_dims=(0, None)), in_dims=(None, 0))(inputs[0][0], inputs[1][0])
    expected = [[f(x, y) for x in inputs[0][0]] for y in inputs[1][0]]
    assert_same_bits(actual, torch.stack([torch.stack(row) for row in expected]))


@each_reducing_operator
@pytest.mark.parametrize("how", [{"reduction": r, "dim": d} for r in ("sum", "mean") for d in (None, 0, -1, ())], ids=str)
def test_vmap_over_zero_dimensional_examples_reduces_nothing(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    for count in (2, 4):
        inputs = operator.inputs(*[(5,)] * count, device=device, dtype=torch.float32)
        assert same_bits(vmap(operator.with_(how))(*inputs), operator(*inputs))
        gradients = vmap(TRANSFORMS["grad"](operator.with_(how)))(*inputs)
        assert_same_bits(gradients, one_by_one(TRANSFORMS["grad"](operator.with_(how)), (0,) * count, *inputs))


@each_reducing_operator
def test_vmap_takes_the_dtype_of_the_examples(operator: Operator, device: torch.device) -> None:
    """A 0-dim float64 example does not promote, however many there are; arithmetic and rounding are the example's."""
    half, double = operator.inputs((5, 4), (5,), device=device)
    half = half.half()
    for how in ({}, {"reduction": "mean"}, {"reduction": "batchmean"}, {"reduction": "sum", "dtype": torch.float64}):
        actual = vmap(operator.with_(how))(half, double)
        assert_same_bits(actual, one_by_one(operator.with_(how), (0, 0), half, double))


@each_reducing_operator
def test_numbers_for_q_work_under_vmap(operator: Operator, device: torch.device) -> None:
    inputs = operator.inputs((5, 3), (5, 3), device=device, dtype=torch.float32)
    actual = vmap(lambda *a: operator(*a, *operator.numbers, reduction="sum"))(*inputs)
    assert same_bits(actual, operator(*inputs, *operator.numbers, reduction="sum", dim=1))


@each_reducing_operator
def test_vmap_over_empty_examples_gives_what_torch_gives(operator: Operator, device: torch.device) -> None:
    x = torch.empty(4, 0, 3, device=device)
    for reduction in ("sum", "mean"):
        for dim in (None, 0, 1, (0, 1)):
            actual = vmap(lambda a, r=reduction, d=dim: operator(a, a, reduction=r, dim=d))(x)
            expected = vmap(lambda a, r=reduction, d=dim: getattr(torch, r)(a, d) if d is not None else getattr(torch, r)(a))(x)
            assert same_bits(actual, expected)


class Divisors(TorchDispatchMode):
    """Whatever anything is divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket == torch.ops.aten.div:
            self.seen.append(args[1])
        return function(*args, **kwargs or {})


@each_reducing_operator
@each_reduction
@pytest.mark.parametrize("mapped", [vmap, legacy_vmap], ids=["torch.func", "is_grads_batched"])
def test_batches_are_divided_by_tensors_of_their_device(
    operator: Operator, how: dict[str, Any], mapped: Callable[..., Any]
) -> None:
    """By a number, or a tensor of the CPU, torch on a GPU multiplies with the reciprocal: other bits than a quotient's."""
    with FakeTensorMode(), Divisors() as divisors:
        inputs = [torch.randn((5, *shape), device="cuda") for shape in SHAPES["prior [D]"]]
        grad_output = torch.randn_like(vmap(operator.with_(how))(*inputs))
        mapped(lambda *a: tuple(operator.backward(*a, **how)))(grad_output, *inputs)
    # What is left to the rules: the size of an example's first dimension, which the operators do not see.
    assert len(divisors.seen) == (2 if how.get("reduction") == "batchmean" else 0)
    for divisor in divisors.seen:
        assert isinstance(divisor, Tensor) and (divisor.device.type, divisor.shape) == ("cuda", ())


@each_reducing_operator
@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_derivatives_are_divided_by_tensors_too(operator: Operator, reduction: str, device: torch.device) -> None:
    leaves = operator.inputs((3, 2), (3, 2), device=device, requires_grad=True)
    f = operator.with_({"reduction": reduction})
    with Divisors() as divisors:
        gradients = grad(f(*leaves), leaves, create_graph=True)
        assert not divisors.seen
        grad(sum(x.sum() for x in gradients), leaves)
        jvp(f, tuple(x.detach() for x in leaves), tangents([x.detach() for x in leaves]))
    assert len(divisors.seen) == 2
    for divisor in divisors.seen:
        assert isinstance(divisor, Tensor) and (divisor.device.type, divisor.shape) == (device.type, ())


# The batched modes of torch.autograd, which are older than torch.func


@each_reducing_operator
@pytest.mark.parametrize("shapes", [SHAPES["standard"], SHAPES["prior [D]"], SHAPES["prior of the middle"]], ids=str)
@each_reduction
@pytest.mark.parametrize("create_graph", [False, True])
def test_is_grads_batched_gives_the_gradients_one_by_one(
    operator: Operator, shapes: Sequence[Sequence[int]], how: dict[str, Any], create_graph: bool, device: torch.device
) -> None:
    leaves = operator.inputs(*shapes, device=device, requires_grad=True)
    value = operator(*leaves, **how)
    weights = torch.randn(3, *value.shape, dtype=torch.float64, device=device)
    batched = grad(value, leaves, weights, is_grads_batched=True, retain_graph=True, create_graph=create_graph)
    for i, weight in enumerate(weights):
        for a, e in zip(batched, grad(value, leaves, weight, retain_graph=True), strict=True):
            assert same_bits(a[i].detach(), e)


@each_reducing_operator
@each_reduction
def test_torch_autograd_functional_gives_what_it_gives_of_the_formula(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    inputs = tuple(operator.inputs((2, 2, 2), (2,), device=device))
    calls: dict[str, Callable[[Function], Any]] = {
        "jacobian": lambda f: functional.jacobian(f, inputs),
        "vectorized jacobian": lambda f: functional.jacobian(f, inputs, vectorize=True),
        "forward-mode jacobian": lambda f: functional.jacobian(f, inputs, vectorize=True, strategy="forward-mode"),
        "vectorized hessian": lambda f: functional.hessian(summed(f), inputs, vectorize=True),
    }
    for name, call in calls.items():
        actual = call(operator.with_(how))
        with batching_fallbacks(shown=False):
            expected = call(operator.formula_with(how))
        for a, e in zip(tree_flatten(actual)[0], tree_flatten(expected)[0], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
