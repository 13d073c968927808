"""Under autocast the inputs stay as they are and the loss is float32; float64 stays float64; gradients are the inputs' own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, grad
from torch.autograd.graph import saved_tensors_hooks

from operators import DTYPES, HALF_TYPES, Operator, each_elementwise_operator, each_reducing_operator
from oracle import same_bits
from weight_cases import REDUCTIONS, SHAPES, WEIGHT_DTYPES, some_weight

each_half = pytest.mark.parametrize("half", HALF_TYPES, ids=str)


def autocast(device: torch.device, dtype: torch.dtype, enabled: bool = True) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


@each_elementwise_operator
@each_half
def test_half_inputs_give_a_float32_loss_rounded_once(operator: Operator, half: torch.dtype, device: torch.device) -> None:
    inputs = operator.inputs([4, 3], [3], device=device, dtype=half)
    assert operator.function(*inputs).dtype == half
    with autocast(device, half):
        result = operator.function(*inputs)
    assert same_bits(result, operator.operator(*inputs, dtype=torch.float32))
    assert same_bits(result, operator.function(*(x.float() for x in inputs)))


@each_elementwise_operator
@each_half
def test_the_result_is_float64_where_an_input_is_and_float32_elsewhere(
    operator: Operator, half: torch.dtype, device: torch.device
) -> None:
    for dtypes in itertools.product(DTYPES, repeat=operator.count):
        inputs = [x.to(d) for x, d in zip(operator.inputs([2, 3], device=device), dtypes, strict=True)]
        expected = torch.float64 if torch.float64 in dtypes else torch.float32
        with autocast(device, half):
            assert same_bits(operator.function(*inputs), operator.operator(*inputs, dtype=expected))


@each_reducing_operator
@pytest.mark.parametrize("of_weight", WEIGHT_DTYPES, ids=str)
def test_weighted_terms_are_float32_and_float64_stays(operator: Operator, of_weight: torch.dtype, device: torch.device) -> None:
    for dtype in DTYPES:
        leaves = operator.inputs(*SHAPES["prior [D]"], dtype=dtype, device=device, requires_grad=True)
        weight = some_weight((2, 3, 1), of_weight, device)
        wide = torch.float64 if torch.float64 in (dtype, of_weight) else torch.float32
        for how in REDUCTIONS.values():
            expected = operator.function(*leaves, weight=weight, **how, dtype=wide)
            grad_output = torch.randn_like(expected)
            with autocast(device, torch.bfloat16):
                value = operator.function(*leaves, weight=weight, **how)
            assert same_bits(value.detach(), expected.detach())
            pairs = (grad(x, leaves, grad_output) for x in (value, expected))
            for a, e in zip(*pairs, strict=True):
                assert a.dtype == dtype and same_bits(a, e)


@each_elementwise_operator
@each_half
def test_gradients_come_in_the_inputs_own_dtypes(operator: Operator, half: torch.dtype, device: torch.device) -> None:
    for dtypes in itertools.product(DTYPES, repeat=operator.count):
        inputs = [x.to(d).requires_grad_() for x, d in zip(operator.inputs([2, 3], [3], device=device), dtypes, strict=True)]
        with autocast(device, half):
            result = operator.function(*inputs)
        weights = torch.randn_like(result)
        plain = operator.operator(*inputs, dtype=result.dtype)
        for x, a, e in zip(inputs, grad(result, inputs, weights), grad(plain, inputs, weights), strict=True):
            assert a.dtype == x.dtype
            assert same_bits(a, e)


@each_elementwise_operator
@each_half
def test_backward_inside_the_region_gives_the_same_bits(operator: Operator, half: torch.dtype, device: torch.device) -> None:
    inputs = operator.inputs([4, 3], device=device, dtype=half, requires_grad=True)
    with autocast(device, half):
        inside = grad(operator.function(*inputs).sum(), inputs)
        result = operator.function(*inputs).sum()
    for a, e in zip(inside, grad(result, inputs), strict=True):
        assert same_bits(a, e)


@each_elementwise_operator
def test_the_inputs_are_saved_as_they_are(operator: Operator, device: torch.device) -> None:
    """No float32 copies: neither in the forward pass nor kept for the backward."""
    inputs = operator.inputs([4, 3], device=device, dtype=torch.bfloat16, requires_grad=True)
    saved: list[int] = []
    with saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x), autocast(device, torch.bfloat16):
        operator.function(*inputs)
    assert sorted(saved) == sorted(x.data_ptr() for x in inputs)


@each_elementwise_operator
def test_an_explicit_dtype_wins_over_autocast(operator: Operator, device: torch.device) -> None:
    inputs = operator.inputs([4, 3], device=device, dtype=torch.float16)
    for dtype in DTYPES:
        with autocast(device, torch.float16):
            result = operator.operator(*inputs, dtype=dtype)
        assert same_bits(result, operator.operator(*inputs, dtype=dtype))


@each_elementwise_operator
@each_half
def test_a_disabled_region_inside_an_enabled_one_promotes_as_outside(
    operator: Operator, half: torch.dtype, device: torch.device
) -> None:
    inputs = operator.inputs([4, 3], device=device, dtype=half)
    with autocast(device, half):
        assert operator.function(*inputs).dtype == torch.float32
        with autocast(device, half, enabled=False):
            assert same_bits(operator.function(*inputs), operator.operator(*inputs))
            assert operator.function(*inputs).dtype == half
            with autocast(device, half):
                assert operator.function(*inputs).dtype == torch.float32
        assert operator.function(*inputs).dtype == torch.float32
    assert operator.function(*inputs).dtype == half


@each_elementwise_operator
def test_autocast_for_the_cpu_leaves_cuda_tensors_alone(operator: Operator, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("needs tensors of another device than the autocast's")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert operator.function(*operator.inputs([4, 3], device=device, dtype=torch.bfloat16)).dtype == torch.bfloat16


@each_elementwise_operator
def test_the_backward_operator_is_untouched_by_autocast(operator: Operator, device: torch.device) -> None:
    inputs = operator.inputs([4, 3], device=device, dtype=torch.bfloat16)
    grad_output = torch.randn(4, 3, device=device).bfloat16()
    arguments = operator.backward_arguments(grad_output, inputs)
    with autocast(device, torch.bfloat16):
        inside = operator.backward_operator(*arguments)
    for a, e in zip(inside, operator.backward_operator(*arguments), strict=True):
        assert same_bits(a, e)


@each_elementwise_operator
@each_half
def test_every_kind_of_differentiation_works_under_autocast(
    operator: Operator, half: torch.dtype, device: torch.device
) -> None:
    inputs = operator.inputs([4, 3], device=device, dtype=half)
    exact = [x.double() for x in inputs]
    everything = tuple(range(operator.count))
    with autocast(device, half):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, torch.ones_like(x)) for x in inputs]
            tangent = forward_ad.unpack_dual(operator.function(*duals)).tangent
        gradients = torch.func.grad(lambda *a: operator.function(*a).sum(), argnums=everything)(*inputs)
        batched = torch.func.vmap(operator.function)(*inputs)
        leaves = [x.clone().requires_grad_() for x in inputs]
        first = grad(operator.function(*leaves).sum(), leaves, create_graph=True)
        second = grad(sum(g.float().sum() for g in first), leaves)
    assert tangent.dtype == torch.float32
    expected = torch.func.jvp(operator.formula, tuple(exact), tuple(torch.ones_like(x) for x in exact))[1]
    torch.testing.assert_close(tangent, expected.float())
    expected = torch.func.grad(lambda *a: operator.formula(*a).sum(), argnums=everything)(*exact)
    for g, f, e in zip(gradients, first, expected, strict=True):
        assert g.dtype == f.dtype == half
        assert same_bits(g, f.detach())
        torch.testing.assert_close(g, e.to(half))
    assert same_bits(batched, operator.operator(*inputs, dtype=torch.float32))
    assert all(s.dtype == half for s in second)


@each_elementwise_operator
def test_a_loss_compiles_under_autocast(operator: Operator, device: torch.device) -> None:
    def step(*inputs: Tensor) -> Tensor:
        with autocast(device, torch.bfloat16):
            return operator.function(*inputs)

    torch.compiler.reset()
    inputs = operator.inputs([4, 3], [3], device=device, dtype=torch.bfloat16, requires_grad=True)
    actual, expected = torch.compile(step, backend="aot_eager", fullgraph=True)(*inputs), step(*inputs)
    assert same_bits(actual, expected)
    for a, e in zip(grad(actual.sum(), inputs), grad(expected.sum(), inputs), strict=True):
        assert same_bits(a, e)


@each_elementwise_operator
def test_a_gradient_scaler_scales_and_unscales(operator: Operator, device: torch.device) -> None:
    leaves = [x.requires_grad_() for x in operator.inputs([4, 3], device=device, dtype=torch.float32)]
    expected = grad(operator.function(*leaves).sum(), leaves)
    optimizer = torch.optim.SGD(leaves, lr=0.0)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    with autocast(device, torch.bfloat16):
        total = operator.function(*leaves).sum()
    scaler.scale(total).backward()
    scaler.unscale_(optimizer)
    for leaf, e in zip(leaves, expected, strict=True):
        assert same_bits(leaf.grad, e)
