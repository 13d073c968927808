"""torch.func and the batched modes of autograd: what the formulas give under the same transform, and no batching fallback."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import functional, grad
from torch.func import functionalize, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.func import grad as func_grad
from torch.utils._pytree import tree_flatten, tree_map

from batching import batching_fallbacks, no_fallback  # noqa: F401 (a fixture)
from operator_cases import each_elementwise_operator_and_wanted
from operators import DTYPES, HALF_TYPES, Operator, each_elementwise_operator
from oracle import same_bits

Function = Callable[..., Tensor]


@pytest.mark.parametrize("kind", ["functorch", "legacy"])
def test_a_batching_fallback_would_be_seen(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The control of every test here: an operator without a batching rule, in both batching systems."""
    with torch.library._scoped_library("kl_ext_test", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CPU")
        twice = torch.ops.kl_ext_test.twice.default
        capfd.readouterr()
        with batching_fallbacks(shown=True):
            vmap(twice)(torch.ones(2, 3)) if kind == "functorch" else torch._vmap_internals._vmap(twice)(torch.ones(2, 3))
        assert "batching rule for kl_ext_test::twice" in capfd.readouterr().err


def sides(operator: Operator, transform: Callable[[Function], Callable[..., Any]], *inputs: Tensor) -> tuple[Any, Any]:
    """What the transform gives of the loss and of the formula, which may do as it likes about batching."""
    actual = transform(operator.function)(*inputs)
    with batching_fallbacks(shown=False):
        return actual, transform(operator.formula)(*inputs)


def assert_same(operator: Operator, transform: Callable[[Function], Callable[..., Any]], *inputs: Tensor) -> None:
    actual, expected = sides(operator, transform, *inputs)
    (actual_leaves, actual_tree), (expected_leaves, expected_tree) = tree_flatten(actual), tree_flatten(expected)
    assert actual_tree == expected_tree
    for a, e in zip(actual_leaves, expected_leaves, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def of_all(transform: Callable[..., Function], f: Function, **options: Any) -> Function:
    """The transform with respect to every input."""
    return lambda *inputs: transform(f, argnums=tuple(range(len(inputs))), **options)(*inputs)


def summed(f: Function) -> Function:
    return lambda *inputs: f(*inputs).sum()


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


@each_elementwise_operator
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.usefixtures("no_fallback")
def test_a_transform_gives_what_it_gives_of_the_formula(
    operator: Operator, transform: Callable[..., Any], device: torch.device
) -> None:
    assert_same(operator, transform, *operator.inputs([2, 3], device=device))


@each_elementwise_operator
@pytest.mark.usefixtures("no_fallback")
def test_transforms_broadcast(operator: Operator, device: torch.device) -> None:
    inputs = operator.inputs([2, 1], [3], [], [1, 1, 3], device=device)
    for name in ("grad", "jvp", "jacrev", "jacfwd", "hessian", "jvp of grad", "grad of jvp"):
        assert_same(operator, TRANSFORMS[name], *inputs)


@each_elementwise_operator
@pytest.mark.usefixtures("no_fallback")
def test_transforms_keep_the_gradient_zero_outside_the_clamp(operator: Operator, device: torch.device) -> None:
    def clamped(f: Function) -> Function:
        return lambda *inputs: f(*inputs, clamp_min=-0.5, clamp_max=0.5)

    outside_and_inside = torch.tensor([-1.0, 0.1, 0.9], dtype=torch.float64, device=device)
    inputs = [outside_and_inside.roll(i) for i in range(operator.count)]
    for name in ("grad", "jvp", "jacfwd", "hessian", "vmap of grad", "vmap of jvp", "grad of jvp", "jvp of jvp"):
        assert_same(operator, lambda f, name=name: TRANSFORMS[name](clamped(f)), *inputs)


def one_by_one(f: Callable[..., Any], in_dims: Sequence[int | None], *inputs: Tensor) -> Any:
    """What vmap promises: the function of each example by itself, stacked."""
    size = next(x.shape[d] for x, d in zip(inputs, in_dims, strict=True) if d is not None)
    examples = [f(*(x if d is None else x.select(d, i) for x, d in zip(inputs, in_dims, strict=True))) for i in range(size)]
    return tree_map(lambda *parts: torch.stack(parts), *examples)


@each_elementwise_operator
@pytest.mark.usefixtures("no_fallback")
def test_vmap_over_every_combination_of_in_dims_gives_the_bits_of_the_examples_alone(
    operator: Operator, device: torch.device
) -> None:
    inputs = operator.inputs([2, 2, 2], device=device, dtype=torch.float32)
    for in_dims in itertools.product([None, 0, 1, -1], repeat=operator.count):
        if any(d is not None for d in in_dims):
            expected = one_by_one(operator.function, in_dims, *inputs)
            assert same_bits(vmap(operator.function, in_dims=in_dims)(*inputs), expected), in_dims


@each_elementwise_operator
@pytest.mark.usefixtures("no_fallback")
def test_vmap_aligns_examples_of_different_ranks_from_the_right(operator: Operator, device: torch.device) -> None:
    shapes = [[3], [2, 3], [], [2, 1]]
    for permutation in itertools.permutations(shapes, operator.count):
        for batched in itertools.product([False, True], repeat=operator.count):
            if any(batched):
                of_these = [[5, *shape] if b else shape for shape, b in zip(permutation, batched, strict=True)]
                inputs = operator.inputs(*of_these, device=device, dtype=torch.float32)
                in_dims = tuple(0 if b else None for b in batched)
                expected = one_by_one(operator.function, in_dims, *inputs)
                assert same_bits(vmap(operator.function, in_dims=in_dims)(*inputs), expected), of_these


@each_elementwise_operator
@pytest.mark.parametrize(
    "dtypes", [DTYPES, DTYPES[::-1], DTYPES[2:] + DTYPES[:2], HALF_TYPES * 2], ids=lambda d: "-".join(map(str, d))
)
@pytest.mark.usefixtures("no_fallback")
def test_vmap_promotes_dtypes_by_the_ranks_of_the_examples(
    operator: Operator, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """An example of rank 0 does not promote one of rank 1, though both have a batch dimension more."""
    for ranks in itertools.product([0, 1], repeat=operator.count):
        inputs = [
            x.to(d) for x, d in zip(operator.inputs(*([4, 3][: r + 1] for r in ranks), device=device), dtypes, strict=False)
        ]
        for in_dims in ((0,) * operator.count, (*(0,) * (operator.count - 1), None)):
            given = [x if d == 0 else x[0] for x, d in zip(inputs, in_dims, strict=True)]
            expected = one_by_one(operator.function, in_dims, *given)
            assert same_bits(vmap(operator.function, in_dims=in_dims)(*given), expected), ranks
            gradients = func_grad(summed(operator.function), argnums=tuple(range(operator.count)))
            expected = one_by_one(gradients, in_dims, *given)
            for a, e in zip(vmap(gradients, in_dims=in_dims)(*given), expected, strict=True):
                assert same_bits(a, e), ranks


@each_elementwise_operator
@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_vmap_accepts_any_randomness_and_out_dims(operator: Operator, randomness: str, device: torch.device) -> None:
    inputs = operator.inputs([4, 2, 3], device=device)
    expected = operator.function(*inputs)
    for out_dims in (0, 1, -1):
        actual = vmap(operator.function, out_dims=out_dims, randomness=randomness)(*inputs)
        assert same_bits(actual, expected.movedim(0, out_dims))


@each_elementwise_operator
@pytest.mark.usefixtures("no_fallback")
def test_vmap_over_no_examples_and_over_empty_examples(operator: Operator, device: torch.device) -> None:
    for shape in ([4, 0], [1, 0, 3]):
        actual = vmap(operator.function)(*operator.inputs(shape, device=device, dtype=torch.float16))
        assert (actual.shape, actual.dtype) == (torch.Size(shape), torch.float16)


@each_elementwise_operator_and_wanted
@pytest.mark.usefixtures("no_fallback")
def test_vmap_over_the_backward_operator_gives_the_bits_of_the_examples_alone(
    operator: Operator, wanted: Sequence[str], device: torch.device
) -> None:
    mask = [a in wanted for a in operator.arguments]

    def backward(*inputs: Tensor) -> list[Tensor]:
        gradients = operator.backward_operator(*inputs, -30.0, 20.0, mask)
        assert [g is not None for g in gradients] == mask
        return [g for g in gradients if g is not None]

    inputs = (torch.randn(2, 2, 2, device=device), *operator.inputs([2, 2, 2], device=device, dtype=torch.float32))
    every_in_dims = list(itertools.product([None, 0, -1], repeat=operator.count + 1))
    for in_dims in every_in_dims[1 :: 1 if operator.count == 2 else 7]:
        given = [x[0] if d is None else x for x, d in zip(inputs, in_dims, strict=True)]
        expected = one_by_one(backward, in_dims, *given)
        for a, e in zip(vmap(backward, in_dims=in_dims)(*given), expected, strict=True):
            assert same_bits(a, e), in_dims


@each_elementwise_operator
@pytest.mark.usefixtures("no_fallback")
def test_vmap_over_the_backward_operator_reduces_each_examples_broadcast(operator: Operator, device: torch.device) -> None:
    def backward(*inputs: Tensor) -> tuple[Tensor, ...]:
        return operator.backward_operator(*inputs, -30.0, 20.0, [True] * operator.count)

    for shapes in ([[3], [2, 3], [], [2, 1]], [[], [2, 1], [3], [2, 3]]):
        for batched in itertools.product([False, True], repeat=operator.count + 1):
            if any(batched):
                given = [[5, *shape] if b else shape for shape, b in zip(([2, 3], *shapes), batched, strict=False)]
                inputs = (
                    torch.randn(given[0], dtype=torch.float64, device=device),
                    *operator.inputs(*given[1:], device=device),
                )
                in_dims = tuple(0 if b else None for b in batched[: operator.count + 1])
                expected = one_by_one(backward, in_dims, *inputs)
                for a, e in zip(vmap(backward, in_dims=in_dims)(*inputs), expected, strict=True):
                    torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@each_elementwise_operator
@pytest.mark.usefixtures("no_fallback")
def test_per_sample_gradients_with_a_shared_prior(operator: Operator, device: torch.device) -> None:
    inputs = operator.inputs([4, 3], [3], device=device)
    in_dims = (0, None) * (operator.count // 2)
    gradients = func_grad(summed(operator.function), argnums=tuple(range(operator.count)))
    for a, e in zip(vmap(gradients, in_dims=in_dims)(*inputs), one_by_one(gradients, in_dims, *inputs), strict=True):
        assert same_bits(a, e)


# The batched modes of torch.autograd, which are older than torch.func and have a dispatch key of their own


@each_elementwise_operator_and_wanted
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.usefixtures("no_fallback")
def test_is_grads_batched_gives_the_gradients_one_by_one(
    operator: Operator, wanted: Sequence[str], create_graph: bool, device: torch.device
) -> None:
    inputs = [
        x.requires_grad_(a in wanted)
        for a, x in zip(operator.arguments, operator.inputs([2, 1], [3], device=device), strict=True)
    ]
    leaves = [x for x in inputs if x.requires_grad]
    result = operator.function(*inputs)
    weights = torch.randn(4, 2, 3, dtype=torch.float64, device=device)
    batched = grad(result, leaves, weights, is_grads_batched=True, retain_graph=True, create_graph=create_graph)
    for i, weight in enumerate(weights):
        for a, e in zip(batched, grad(result, leaves, weight, retain_graph=True), strict=True):
            torch.testing.assert_close(a[i].detach(), e, rtol=1e-12, atol=1e-12)


@each_elementwise_operator
@pytest.mark.usefixtures("no_fallback")
def test_torch_autograd_functional_gives_what_it_gives_of_the_formula(operator: Operator, device: torch.device) -> None:
    inputs = operator.inputs([2, 3], device=device)
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
    for name, call in calls.items():
        actual, expected = (tree_flatten(side)[0] for side in sides(operator, lambda f, call=call: lambda *_: call(f), *inputs))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@each_elementwise_operator
@pytest.mark.usefixtures("no_fallback")
def test_a_vectorized_jacobian_of_half_inputs_comes_in_half(operator: Operator, device: torch.device) -> None:
    inputs = operator.inputs([2, 3], device=device, dtype=torch.bfloat16)
    plain, vectorized = (functional.jacobian(operator.function, inputs, vectorize=v) for v in (False, True))
    for p, v in zip(plain, vectorized, strict=True):
        assert same_bits(p, v)
