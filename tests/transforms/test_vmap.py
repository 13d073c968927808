"""vmap of the operators and of their backward operators: the bits of the examples alone, and no batch is reduced away."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from batching import no_fallback  # noqa: F401 (a fixture)
from operator_cases import each_operator_and_wanted
from operators import DTYPES, HALF_TYPES, Operator, each_operator, each_reducing_operator
from oracle import same_bits
from reduction_cases import SHAPES, each_operator_and_reduction, each_reduction, shapes_for
from transform_cases import TRANSFORMS, assert_same_bits, one_by_one

pytestmark = pytest.mark.usefixtures("no_fallback")


@each_operator_and_reduction
def test_vmap_over_any_in_dims_gives_the_bits_of_the_examples_alone(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    f = operator.with_(how)
    for count in operator.counts:
        inputs = operator.inputs(*[(3, 3, 3, 3)] * count, device=device, dtype=torch.float32)
        combinations = list(itertools.product([None, 0, 2, -1], repeat=count))
        for in_dims in combinations[1 :: 11 if how and count > 2 else 1]:
            given = [x if d is not None else x[0] for x, d in zip(inputs, in_dims, strict=True)]
            assert_same_bits(vmap(f, in_dims=in_dims)(*given), one_by_one(f, in_dims, *given), in_dims)


@each_operator_and_reduction
def test_vmap_aligns_examples_of_different_ranks_from_the_right(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    f = operator.with_(how)
    every = shapes_for(operator, "prior [D]", "all broadcast", "q is the largest", "standard, outer")
    permuted = itertools.permutations([(3,), (2, 3), (), (2, 1)], operator.count)
    for shapes in (*every, *(() if how else permuted)):
        for batched in itertools.product([True, False], repeat=len(shapes)):
            if any(batched):
                sizes = [(5, *shape) if b else shape for shape, b in zip(shapes, batched, strict=True)]
                inputs = operator.inputs(*sizes, device=device, dtype=torch.float32)
                in_dims = tuple(0 if b else None for b in batched)
                assert_same_bits(vmap(f, in_dims=in_dims)(*inputs), one_by_one(f, in_dims, *inputs), (sizes, in_dims))


@each_operator
@pytest.mark.parametrize(
    "dtypes", [DTYPES, DTYPES[::-1], DTYPES[2:] + DTYPES[:2], HALF_TYPES * 2], ids=lambda d: "-".join(map(str, d))
)
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
            gradients = TRANSFORMS["grad"](operator.function)
            expected = one_by_one(gradients, in_dims, *given)
            for a, e in zip(vmap(gradients, in_dims=in_dims)(*given), expected, strict=True):
                assert same_bits(a, e), ranks


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


@each_operator
@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_vmap_accepts_any_randomness_and_out_dims(operator: Operator, randomness: str, device: torch.device) -> None:
    inputs = operator.inputs([4, 2, 3], device=device)
    expected = operator.function(*inputs)
    for out_dims in (0, 1, -1):
        actual = vmap(operator.function, out_dims=out_dims, randomness=randomness)(*inputs)
        assert same_bits(actual, expected.movedim(0, out_dims))


@each_operator
def test_vmap_over_no_examples_and_over_empty_examples(operator: Operator, device: torch.device) -> None:
    for shape in ([4, 0], [1, 0, 3]):
        actual = vmap(operator.function)(*operator.inputs(shape, device=device, dtype=torch.float16))
        assert (actual.shape, actual.dtype) == (torch.Size(shape), torch.float16)


@each_reducing_operator
def test_vmap_over_empty_examples_gives_what_torch_gives(operator: Operator, device: torch.device) -> None:
    x = torch.empty(4, 0, 3, device=device)
    for reduction in ("sum", "mean"):
        for dim in (None, 0, 1, (0, 1)):
            actual = vmap(lambda a, r=reduction, d=dim: operator(a, a, reduction=r, dim=d))(x)
            expected = vmap(lambda a, r=reduction, d=dim: getattr(torch, r)(a, d) if d is not None else getattr(torch, r)(a))(x)
            assert same_bits(actual, expected)


@each_operator_and_reduction
def test_vmap_of_gradients_gives_the_bits_of_the_examples_alone(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    """Per-sample gradients, of shared inputs too."""
    for shapes in shapes_for(operator, "standard", "prior [D]", "prior of scalars", "q is the largest"):
        for batched in itertools.product([True, False], repeat=len(shapes)):
            if any(batched):
                sizes = [(3, *shape) if b else shape for shape, b in zip(shapes, batched, strict=True)]
                inputs = operator.inputs(*sizes, device=device, dtype=torch.float32)
                in_dims = tuple(0 if b else None for b in batched)
                gradients = TRANSFORMS["grad"](operator.with_(how))
                assert_same_bits(vmap(gradients, in_dims=in_dims)(*inputs), one_by_one(gradients, in_dims, *inputs), in_dims)


@each_operator_and_wanted
def test_vmap_over_the_backward_operator_gives_the_bits_of_the_examples_alone(
    operator: Operator, wanted: Sequence[str], device: torch.device
) -> None:
    mask = [a in wanted for a in operator.arguments]

    def backward(*inputs: Tensor) -> list[Tensor]:
        gradients = operator.backward(*inputs, mask=mask)
        assert [g is not None for g in gradients] == mask
        return [g for g in gradients if g is not None]

    inputs = (torch.randn(2, 2, 2, device=device), *operator.inputs([2, 2, 2], device=device, dtype=torch.float32))
    every_in_dims = list(itertools.product([None, 0, -1], repeat=operator.count + 1))
    for in_dims in every_in_dims[1 :: 1 if operator.count == 2 else 7]:
        given = [x[0] if d is None else x for x, d in zip(inputs, in_dims, strict=True)]
        expected = one_by_one(backward, in_dims, *given)
        for a, e in zip(vmap(backward, in_dims=in_dims)(*given), expected, strict=True):
            assert same_bits(a, e), in_dims


@each_reducing_operator
@each_reduction
def test_vmap_over_the_backward_operator_of_a_reduction_gives_the_bits_of_the_examples_alone(
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


@each_operator
def test_vmap_over_the_backward_operator_reduces_each_examples_broadcast(operator: Operator, device: torch.device) -> None:
    def backward(*inputs: Tensor) -> list[Tensor]:
        return operator.backward(*inputs)

    for shapes in ([[3], [2, 3], [], [2, 1]], [[], [2, 1], [3], [2, 3]]):
        for batched in itertools.product([False, True], repeat=operator.count + 1):
            if any(batched):
                given = [[5, *shape] if b else shape for shape, b in zip(([2, 3], *shapes), batched, strict=False)]
                inputs = (
                    torch.randn(given[0], dtype=torch.float64, device=device),
                    *operator.inputs(*given[1 : operator.count + 1], device=device),
                )
                in_dims = tuple(0 if b else None for b in batched[: operator.count + 1])
                expected = one_by_one(backward, in_dims, *inputs)
                for a, e in zip(vmap(backward, in_dims=in_dims)(*inputs), expected, strict=True):
                    assert same_bits(a, e)


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
