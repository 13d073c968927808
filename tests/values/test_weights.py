"""Weights and masks: what they make of terms and of their sums, what is left out, and which bits come of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from kl_ext import gaussian_kl_div, reference
from layouts import chunk, inside, shifted, transposed
from operators import DTYPES, GAUSSIAN, REDUCING, Operator, close, each_reducing_operator
from oracle import NARROWED, assert_within, distance, same_bits, ulp
from ordered_sum import reduced_sum
from reduction_cases import random_case
from weight_cases import (
    WEIGHT_DTYPES,
    WEIGHTS,
    each_reduction,
    each_shapes,
    each_weight,
    exact_terms,
    formula,
    garbage,
    in_arithmetic,
    left_out,
    mask,
    ordered_gradients,
    ordered_value,
    some_weight,
    spoiled,
    sums_of,
    tamed,
)

CLOSE = close(24)
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


# Values


@each_reducing_operator
@pytest.mark.parametrize("of_weight", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_term_is_multiplied_with_one_rounding(
    operator: Operator, dtype: torch.dtype, of_weight: torch.dtype, device: torch.device
) -> None:
    """The term's own 4.5 ulps, which are at most 9 units of roundoff, and one more for the product."""
    for count in (2, 4):
        inputs = operator.inputs(*[(7, 50)] * count, dtype=dtype, device=device)
        for size in ((7, 50), (7, 1), (50,)):
            weight = some_weight(size, of_weight, device)
            got = operator.function(*inputs, weight=weight)
            exact = exact_terms(operator, inputs, weight)
            if got.dtype in UNIT:
                bound, error = 10 * 1.001 * UNIT[got.dtype] * abs(exact), distance(got, exact)
                assert (error <= bound).all(), (error / bound).max()
            else:
                assert_within(got, exact, distance(got, exact) / ulp(exact, got.dtype), NARROWED, inputs)
            assert (got[(weight == 0).expand(7, 50)] == 0).all()


@each_reducing_operator
@each_shapes
@each_reduction
@each_weight
def test_reductions_and_gradients_are_those_of_the_weighted_terms(
    operator: Operator, shapes: Any, how: dict[str, Any], size: Any, device: torch.device
) -> None:
    leaves = operator.inputs(*shapes, device=device, requires_grad=True)
    weight = some_weight(size, device=device)
    actual, expected = operator.function(*leaves, weight=weight, **how), formula(operator, weight, how)(*leaves)
    finite = expected.isfinite()  # a mean over weights that are all 0 is not
    torch.testing.assert_close(actual[finite], expected[finite], **CLOSE)
    assert actual[~finite].isnan().all()
    grad_output = torch.where(finite, torch.randn_like(actual), 0.0)
    gradients = (torch.autograd.grad(x, leaves, grad_output) for x in (actual, expected))
    for a, e in zip(*gradients, strict=True):
        rest = e.isfinite()  # 0 / 0 in the formula
        torch.testing.assert_close(a[rest], e[rest], **CLOSE)


@each_reducing_operator
@pytest.mark.parametrize(
    "shape, size",
    [((6,), (6,)), ((4, 5), (4, 1)), ((2, 3, 4), (2, 1, 4)), ((2, 3, 4, 5), (2, 1, 4, 5)), ((2, 1, 4), (1, 1, 4)), ((), ())],
    ids=str,
)
def test_masks_of_samples_sequences_and_images(operator: Operator, shape: Any, size: Any, device: torch.device) -> None:
    """By torch's plain indexing: what is kept is selected, and what is not is nowhere."""
    inputs = operator.inputs(*[shape] * 4, device=device)
    keep = mask(size, device)
    chosen = [x[keep.expand(shape)] for x in inputs]
    for how, number in (({"reduction": "sum"}, chosen[0].new_ones(())), ({"reduction": "mean"}, chosen[0].numel())):
        torch.testing.assert_close(
            operator.function(*inputs, weight=keep, **how), operator.terms(*chosen).sum() / number, **CLOSE
        )


@each_reducing_operator
def test_a_mean_is_weighted_as_torch_weights_it(operator: Operator, device: torch.device) -> None:
    """mse_loss of the square roots of the terms from 0, with the same weights."""
    inputs = operator.inputs((5, 6), (5, 6), device=device)
    weight = torch.rand(5, 6, dtype=torch.float64, device=device)
    roots = operator.terms(*inputs).sqrt()
    expected = torch.nn.functional.mse_loss(roots, torch.zeros_like(roots), weight=weight)
    torch.testing.assert_close(operator.function(*inputs, weight=weight, reduction="mean"), expected, **CLOSE)


@each_reducing_operator
def test_a_batchmean_divides_by_the_first_size_whatever_the_weights_are(operator: Operator, device: torch.device) -> None:
    inputs = operator.inputs((5, 6), (5, 6), device=device)
    weight = mask((5, 1), device)
    total = operator.function(*inputs, weight=weight, reduction="sum")
    torch.testing.assert_close(operator.function(*inputs, weight=weight, reduction="batchmean"), total / 5)


@each_reducing_operator
@pytest.mark.parametrize("of_weight", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_has_the_dtype_of_a_product(
    operator: Operator, dtype: torch.dtype, of_weight: torch.dtype, device: torch.device
) -> None:
    for shape, size in (((3, 4), (3, 1)), ((3, 4), ()), ((), ())):
        inputs = operator.inputs(shape, shape, dtype=dtype, device=device)
        weight = torch.ones(size, dtype=of_weight, device=device)
        expected = (weight * torch.ones(shape, dtype=dtype, device=device)).dtype
        for how in ({}, {"reduction": "sum"}, {"reduction": "mean"}, *([{"reduction": "batchmean"}] if shape else [])):
            assert operator.function(*inputs, weight=weight, **how).dtype == expected
            for wanted in DTYPES:
                assert operator.function(*inputs, weight=weight, **how, dtype=wanted).dtype == wanted


@each_reducing_operator
def test_numbers_for_q_take_a_weight(operator: Operator, device: torch.device) -> None:
    inputs = operator.inputs((5, 6), (5, 6), dtype=torch.float32, device=device)
    q = (0.5, 0.75)
    tensors = [torch.tensor(x, device=device) for x in q]
    for weight in (mask((5, 1), device), some_weight((5, 6), torch.float16, device)):
        for how in ({}, {"reduction": "mean"}, {"reduction": "sum", "dim": 1}):
            expected = operator.function(*inputs, *tensors, weight=weight, **how)
            assert same_bits(operator.function(*inputs, *q, weight=weight, **how), expected)


@each_reducing_operator
@each_reduction
def test_the_reference_says_the_same(operator: Operator, how: dict[str, Any], device: torch.device) -> None:
    """Gradients too, and of what is left out: users may read it for a definition."""
    inputs = operator.inputs(*[(2, 3, 4)] * 4, device=device)
    weight = some_weight((2, 3, 4), device=device)
    leaves = [x.requires_grad_() for x in spoiled(inputs, weight)]
    values = [function(*leaves, weight=weight, **how) for function in (getattr(reference, operator.name), operator.function)]
    torch.testing.assert_close(*values, **CLOSE, equal_nan=True)
    grad_output = torch.where(values[0].isfinite(), torch.randn_like(values[0]), 0.0)
    gradients = [torch.autograd.grad(value, leaves, grad_output) for value in values]
    torch.testing.assert_close(*gradients, **CLOSE, equal_nan=True)


# What is left out


@each_reducing_operator
@each_shapes
@each_reduction
@pytest.mark.parametrize(
    "dtype, of_weight",
    [(torch.float16, torch.bool), (torch.float32, torch.bfloat16), (torch.float64, torch.float64)],
    ids=str,
)
def test_what_is_left_out_may_be_anything(
    operator: Operator,
    shapes: Any,
    how: dict[str, Any],
    dtype: torch.dtype,
    of_weight: torch.dtype,
    device: torch.device,
) -> None:
    """NaN, infinities, any bits, in inputs and in grad_output: the same bits, and gradients that are 0."""
    for size in WEIGHTS.values():
        inputs = operator.inputs(*shapes, dtype=dtype, device=device)
        weight = some_weight(size, of_weight, device)
        given = spoiled(inputs, weight), tamed(operator, inputs, weight)
        got, want = (operator.function(*x, weight=weight, **how) for x in given)
        assert same_bits(got, want)
        grad_output = torch.randn_like(got)
        grad = torch.where(weight != 0, grad_output, garbage(got.shape, got.dtype, device)) if not how else grad_output
        gradients = [operator.backward(grad, *x, weight=weight, **how) for x in given]
        wants = operator.backward(grad_output, *given[1], weight=weight, **how)
        for x, g, e, w in zip(inputs, *gradients, wants, strict=True):
            assert same_bits(g, w) and same_bits(e, w)
            assert (g[left_out(weight, (2, 3, 4), x)] == 0).all()


@each_reducing_operator
@pytest.mark.parametrize("how", [{}, {"reduction": "sum"}, {"reduction": "mean"}, {"reduction": "mean", "dim": 1}], ids=str)
def test_padding_leaks_nowhere_in_large_batches(operator: Operator, how: dict[str, Any], device: torch.device) -> None:
    """More terms than a thread takes at once, of a prior that all share: whole kernels of vectors."""
    lengths = torch.randint(1, 200, (300, 1), device=device)
    keep = torch.arange(200, device=device) < lengths
    for shapes in ([(300, 200)] * 2, [(300, 200)] * 2 + [(200,)] * 2):
        inputs = operator.inputs(*shapes, dtype=torch.float32, device=device)
        padded = [torch.where(keep, x, garbage(x.shape, x.dtype, device)) for x in inputs[:2]]
        results = []
        for p in (padded, [torch.where(keep, x, torch.ones_like(x)) for x in inputs[:2]]):
            leaves = [x.detach().clone().requires_grad_() for x in (*p, *inputs[2:])]
            value = operator.function(*leaves, weight=keep, **how)
            results.append([value.detach(), *torch.autograd.grad(value.square().sum(), leaves)])
        for got, want in zip(*results, strict=True):
            assert got.isfinite().all() and same_bits(got, want)
        assert all((g[~keep] == 0).all() for g in results[0][1:3])


@each_reducing_operator
def test_a_weight_that_is_false_everywhere_gives_zeros(operator: Operator, device: torch.device) -> None:
    inputs = [garbage((4, 5), torch.float32, device) for _ in range(4)]
    for weight in (torch.zeros(4, 1, dtype=torch.bool, device=device), torch.zeros((), device=device)):
        for how in ({}, {"reduction": "sum"}, {"reduction": "batchmean"}):
            value = operator.function(*inputs, weight=weight, **how)
            assert same_bits(value, torch.zeros_like(value))  # +0
            for gradient in operator.backward(torch.ones_like(value), *inputs, weight=weight, **how):
                assert (gradient == 0).all()


@each_reducing_operator
@each_shapes
@pytest.mark.parametrize("keepdim", [False, True])
def test_a_mean_without_weight_is_nan_as_an_empty_mean_is(
    operator: Operator, shapes: Any, keepdim: bool, device: torch.device
) -> None:
    """And its gradients are 0 where it left everything out, in those of shared inputs as well."""
    leaves = operator.inputs(*shapes, device=device, requires_grad=True)
    value = operator.function(*leaves, weight=torch.zeros(2, 1, 1, device=device), reduction="mean", keepdim=keepdim)
    assert value.isnan().all() and torch.empty(0).mean().isnan()
    for gradient in torch.autograd.grad(value.sum(), leaves):
        assert (gradient == 0).all()
    rows = torch.tensor([[[0.0], [1.0], [2.0]], [[3.0], [0.0], [0.0]]], dtype=torch.float64, device=device)
    value = operator.function(*leaves, weight=rows, reduction="mean", dim=2, keepdim=keepdim)
    assert torch.equal(value.isnan().view(2, 3), (rows == 0).view(2, 3))
    sums = operator.function(*leaves, weight=(rows != 0), reduction="sum", dim=2, keepdim=keepdim) / 4
    for a, e in zip(torch.autograd.grad(value.sum(), leaves), torch.autograd.grad(sums.sum(), leaves), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, e, **CLOSE)


@each_reducing_operator
def test_a_mean_is_nan_where_weights_cancel(operator: Operator, device: torch.device) -> None:
    """Their sum is 0, though terms are not: a quotient would be infinite."""
    inputs = operator.inputs((2, 2), (2, 2), device=device)
    weight = torch.tensor([[1.0, -1.0], [1.0, 3.0]], dtype=torch.float64, device=device)
    value = operator.function(*inputs, weight=weight, reduction="mean", dim=1)
    plain = getattr(reference, operator.name)(*inputs, weight=weight, reduction="mean", dim=1)
    assert value.isnan().tolist() == plain.isnan().tolist() == [True, False]
    torch.testing.assert_close(value, plain, equal_nan=True, **CLOSE)


@each_reducing_operator
def test_no_terms_at_all(operator: Operator, device: torch.device) -> None:
    inputs = operator.inputs((0, 3), (0, 3), (3,), (3,), device=device)
    for weight in (torch.ones(0, 3, device=device), torch.ones(3, dtype=torch.bool, device=device), torch.ones(())):
        assert operator.function(*inputs, weight=weight).shape == (0, 3)
        assert operator.function(*inputs, weight=weight, reduction="sum") == 0
        assert operator.function(*inputs, weight=weight, reduction="mean").isnan()
        assert operator.function(*inputs, weight=weight, reduction="mean", dim=0).isnan().tolist() == [True] * 3
        for reduction in ("sum", "mean"):
            gradients = operator.backward(torch.ones((), device=device).double(), *inputs, weight=weight, reduction=reduction)
            assert all((gradient == 0).all() for gradient in gradients)


# Bits


def scaled(operator: Operator, inputs: list[Tensor]) -> list[Tensor]:
    """Inputs of wide_range of any operator, as this one takes them."""
    return [x.abs() + 0.125 if operator.has_deviations and i % 2 else x for i, x in enumerate(inputs)]


def weight_for(rng: numpy.random.Generator, shape: Any, dtype: torch.dtype) -> Tensor:
    own = [n if rng.random() < 0.6 else 1 for n in shape][int(rng.integers(len(shape) + 1)) if rng.random() < 0.3 else 0 :]
    size = numpy.where(rng.random(own) < 0.3, 0, rng.normal(size=own) * rng.choice([0.01, 1.0, 100.0], own))
    weight = torch.as_tensor(size).to(dtype)
    if own and rng.random() < 0.4:
        weight = inside(weight, int(rng.integers(len(own)))) if dtype != torch.bool else shifted_mask(weight)
    return weight


def shifted_mask(weight: Tensor) -> Tensor:
    """At an odd address."""
    return torch.cat([weight.new_ones(3), weight.flatten()])[3:].view(weight.shape)


def test_sums_and_gradients_are_ordered_for_any_shapes_layouts_and_dtypes(rng: numpy.random.Generator) -> None:
    for trial in range(120):
        inputs, dims = random_case(rng)
        operator = REDUCING[trial % 2]
        inputs = scaled(operator, inputs)
        shape = torch.broadcast_shapes(*(x.shape for x in inputs))
        weight = weight_for(rng, shape, WEIGHT_DTYPES[rng.integers(5)])
        reduction = str(rng.choice(["sum", "mean", "none", "batchmean"]))
        how: dict[str, Any] = {} if reduction == "none" else {"reduction": reduction}
        how |= {"dim": dims, "keepdim": bool(rng.random() < 0.3)} if reduction in ("sum", "mean") else {}
        about = f"{operator} {how} {[(x.shape, x.stride(), x.dtype) for x in (*inputs, weight)]}"
        value = operator.function(*inputs, weight=weight, **how)
        assert same_bits(value, ordered_value(operator, inputs, weight, how)), about
        grad_output = torch.as_tensor(rng.normal(size=tuple(value.shape))).to(value.dtype)
        wants = ordered_gradients(operator, grad_output, inputs, weight, how)
        for got, want in zip(operator.backward(grad_output, *inputs, weight=weight, **how), wants, strict=True):
            assert same_bits(got, want), about


@each_reducing_operator
@pytest.mark.parametrize("n", [1, 63, 64, 65, 1023, 1024, 1025, 4096 + 7, 70_001])
def test_sums_of_every_length_count_what_is_left_out_as_0(operator: Operator, n: int) -> None:
    for count, shapes in ((2, [(n,)] * 2), (4, [(n,)] * 4), (4, [(3, n)] * 2 + [(n,)] * 2)):
        inputs = operator.inputs(*shapes, dtype=torch.float32)
        assert len(inputs) == count
        for weight in (mask((n,)), some_weight((n,), torch.float32), some_weight((n,), torch.float16)):
            for reduction in ("sum", "mean"):
                for dim in (None, -1):
                    how = {"reduction": reduction, "dim": dim}
                    value = operator.function(*inputs, weight=weight, **how)
                    assert same_bits(value, ordered_value(operator, inputs, weight, how))


def test_another_order_or_a_dropped_term_would_show() -> None:
    """The control: sums of what is kept alone, or by torch, have other bits."""
    inputs = [x * 3 for x in GAUSSIAN.inputs((200, 3000), (200, 3000), dtype=torch.float32)]
    keep = torch.rand(200, 3000) < 0.5
    value = gaussian_kl_div(*inputs, weight=keep, reduction="sum", dim=1)
    terms = in_arithmetic(gaussian_kl_div(*inputs), keep)
    selected = torch.stack([reduced_sum(row[k], [0]) for row, k in zip(gaussian_kl_div(*inputs), keep, strict=True)])
    assert same_bits(value, reduced_sum(terms, [1]))
    assert not same_bits(value, terms.sum(1)) and not same_bits(value, selected)


def test_the_sum_of_weights_is_in_the_same_order() -> None:
    """Of weights whose sum shows it, and that of torch is another."""
    inputs = GAUSSIAN.inputs((200, 3000), (200, 3000), dtype=torch.float32)
    weight = torch.rand(200, 3000)
    value = gaussian_kl_div(*inputs, weight=weight, reduction="mean", dim=1)
    total = gaussian_kl_div(*inputs, weight=weight, reduction="sum", dim=1)
    assert same_bits(value, total / sums_of(weight, {"reduction": "sum", "dim": 1}))
    assert not same_bits(value, total / weight.sum(1))


FLAT: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "offset": shifted_mask,
    "first chunk of the last dim": lambda x: torch.cat([x, x], -1).chunk(2, -1)[0],
    "second chunk of dim 0": lambda x: torch.cat([x, x], 0).chunk(2, 0)[1],
    "transposed": lambda x: transposed(x, 0, -1),
    "every second column": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "flipped": lambda x: x.flip(0).flip(0),
    "negated": lambda x: x if x.dtype == torch.bool else torch._neg_view(-x),
}


@each_reducing_operator
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(37, 70), (3, 5, 9, 13)], ids=str)
def test_layouts_of_weights_and_inputs_do_not_show(operator: Operator, shape: Any, dtype: torch.dtype) -> None:
    inputs = operator.inputs(*[shape] * 2, *[shape[-1:]] * 2, dtype=torch.float32)
    weight = some_weight(shape, dtype)
    of_inputs = (shifted, lambda x: chunk(x, -1, 1), lambda x: transposed(x, 0, -1), lambda x: inside(x, 0))
    for how in ({}, {"reduction": "sum"}, {"reduction": "mean", "dim": 0}, {"reduction": "sum", "dim": (0, -1)}):
        value = operator.function(*inputs, weight=weight, **how)
        grad_output = torch.randn_like(value)
        gradients = operator.backward(grad_output, *inputs, weight=weight, **how)
        for name, make in FLAT.items():
            for view in (lambda x: x, *of_inputs):
                given = [*map(view, inputs[:2]), *inputs[2:]]
                assert same_bits(operator.function(*given, weight=make(weight), **how), value), name
            for got, want in zip(operator.backward(grad_output, *given, weight=make(weight), **how), gradients, strict=True):
                assert same_bits(got, want), name


@each_reducing_operator
@pytest.mark.parametrize("size", [(37, 1, 1), (37, 1, 70), (4, 1), (70,), (1, 1, 1), ()], ids=str)
def test_a_broadcast_weight_has_the_bits_of_an_expanded_one_of_any_dtype(operator: Operator, size: Any) -> None:
    """[B, 1, 1] where it is, expanded by strides, and copied; a mask as bool, and as 1.0 and 0.0 of any dtype."""
    shape = (37, 4, 70)
    for shapes in ([shape] * 2, [shape] * 4, [shape] * 2 + [(70,)] * 2):
        inputs = operator.inputs(*shapes, dtype=torch.float32)
        keep = mask(size)
        for how in ({}, {"reduction": "sum"}, {"reduction": "mean", "dim": (1, 2)}, {"reduction": "mean", "dim": 0}):
            value = operator.function(*inputs, weight=keep, **how)
            grad_output = torch.randn_like(value)
            gradients = operator.backward(grad_output, *inputs, weight=keep, **how)
            forms = [keep.expand(shape), keep.expand(shape).contiguous()]
            forms += [x.to(dtype) for x in (keep, forms[1]) for dtype in DTYPES[:3]]
            for weight in forms:
                assert same_bits(operator.function(*inputs, weight=weight, **how), value)
                for got, want in zip(operator.backward(grad_output, *inputs, weight=weight, **how), gradients, strict=True):
                    assert same_bits(got, want)


@each_reducing_operator
def test_a_weight_of_ones_changes_no_bit(operator: Operator) -> None:
    inputs = operator.inputs((1030, 70), (1030, 70), (70,), (70,), dtype=torch.float32)
    for count, how in itertools.product((2, 4), ({}, {"reduction": "sum"}, {"reduction": "mean", "dim": 0})):
        for weight in (torch.ones(1030, 1), torch.ones((), dtype=torch.bool), torch.ones(1030, 70, dtype=torch.bfloat16)):
            value = operator.function(*inputs[:count], **how)
            assert same_bits(operator.function(*inputs[:count], weight=weight, **how), value)
            grad_output = torch.randn_like(value)
            pairs = (operator.backward(grad_output, *inputs[:count], weight=w, **how) for w in (None, weight))
            assert all(same_bits(a, b) for a, b in zip(*pairs, strict=True))
