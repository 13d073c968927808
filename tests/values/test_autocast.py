"""Under autocast the inputs stay as they are and the loss is float32; float64 stays float64; gradients are the inputs' own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, grad
from torch.autograd.graph import saved_tensors_hooks

from loss_cases import DTYPES, HALF_TYPES, Loss, each_loss
from oracle import same_bits

each_half = pytest.mark.parametrize("half", HALF_TYPES, ids=str)


def autocast(device: torch.device, dtype: torch.dtype, enabled: bool = True) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


@each_loss
@each_half
def test_half_inputs_give_a_float32_loss_rounded_once(loss: Loss, half: torch.dtype, device: torch.device) -> None:
    inputs = loss.inputs([4, 3], [3], device=device, dtype=half)
    assert loss.function(*inputs).dtype == half
    with autocast(device, half):
        result = loss.function(*inputs)
    assert same_bits(result, loss.operator(*inputs, dtype=torch.float32))
    assert same_bits(result, loss.function(*(x.float() for x in inputs)))


@each_loss
@each_half
def test_the_result_is_float64_where_an_input_is_and_float32_elsewhere(
    loss: Loss, half: torch.dtype, device: torch.device
) -> None:
    for dtypes in itertools.product(DTYPES, repeat=loss.count):
        inputs = [x.to(d) for x, d in zip(loss.inputs([2, 3], device=device), dtypes, strict=True)]
        expected = torch.float64 if torch.float64 in dtypes else torch.float32
        with autocast(device, half):
            assert same_bits(loss.function(*inputs), loss.operator(*inputs, dtype=expected))


@each_loss
@each_half
def test_gradients_come_in_the_inputs_own_dtypes(loss: Loss, half: torch.dtype, device: torch.device) -> None:
    for dtypes in itertools.product(DTYPES, repeat=loss.count):
        inputs = [x.to(d).requires_grad_() for x, d in zip(loss.inputs([2, 3], [3], device=device), dtypes, strict=True)]
        with autocast(device, half):
            result = loss.function(*inputs)
        weights = torch.randn_like(result)
        plain = loss.operator(*inputs, dtype=result.dtype)
        for x, a, e in zip(inputs, grad(result, inputs, weights), grad(plain, inputs, weights), strict=True):
            assert a.dtype == x.dtype
            assert same_bits(a, e)


@each_loss
@each_half
def test_backward_inside_the_region_gives_the_same_bits(loss: Loss, half: torch.dtype, device: torch.device) -> None:
    inputs = loss.inputs([4, 3], device=device, dtype=half, requires_grad=True)
    with autocast(device, half):
        inside = grad(loss.function(*inputs).sum(), inputs)
        result = loss.function(*inputs).sum()
    for a, e in zip(inside, grad(result, inputs), strict=True):
        assert same_bits(a, e)


@each_loss
def test_the_inputs_are_saved_as_they_are(loss: Loss, device: torch.device) -> None:
    """No float32 copies: neither in the forward pass nor kept for the backward."""
    inputs = loss.inputs([4, 3], device=device, dtype=torch.bfloat16, requires_grad=True)
    saved: list[int] = []
    with saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x), autocast(device, torch.bfloat16):
        loss.function(*inputs)
    assert sorted(saved) == sorted(x.data_ptr() for x in inputs)


@each_loss
def test_an_explicit_dtype_wins_over_autocast(loss: Loss, device: torch.device) -> None:
    inputs = loss.inputs([4, 3], device=device, dtype=torch.float16)
    for dtype in DTYPES:
        with autocast(device, torch.float16):
            result = loss.operator(*inputs, dtype=dtype)
        assert same_bits(result, loss.operator(*inputs, dtype=dtype))


@each_loss
@each_half
def test_a_disabled_region_inside_an_enabled_one_promotes_as_outside(
    loss: Loss, half: torch.dtype, device: torch.device
) -> None:
    inputs = loss.inputs([4, 3], device=device, dtype=half)
    with autocast(device, half):
        assert loss.function(*inputs).dtype == torch.float32
        with autocast(device, half, enabled=False):
            assert same_bits(loss.function(*inputs), loss.operator(*inputs))
            assert loss.function(*inputs).dtype == half
            with autocast(device, half):
                assert loss.function(*inputs).dtype == torch.float32
        assert loss.function(*inputs).dtype == torch.float32
    assert loss.function(*inputs).dtype == half


@each_loss
def test_autocast_for_the_cpu_leaves_cuda_tensors_alone(loss: Loss, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("needs tensors of another device than the autocast's")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss.function(*loss.inputs([4, 3], device=device, dtype=torch.bfloat16)).dtype == torch.bfloat16


@each_loss
def test_the_backward_operator_is_untouched_by_autocast(loss: Loss, device: torch.device) -> None:
    inputs = loss.inputs([4, 3], device=device, dtype=torch.bfloat16)
    grad_output = torch.randn(4, 3, device=device).bfloat16()
    arguments = (grad_output, *inputs, -30.0, 20.0, [True] * loss.count)
    with autocast(device, torch.bfloat16):
        inside = loss.backward_operator(*arguments)
    for a, e in zip(inside, loss.backward_operator(*arguments), strict=True):
        assert same_bits(a, e)


@each_loss
@each_half
def test_every_kind_of_differentiation_works_under_autocast(loss: Loss, half: torch.dtype, device: torch.device) -> None:
    inputs = loss.inputs([4, 3], device=device, dtype=half)
    exact = [x.double() for x in inputs]
    everything = tuple(range(loss.count))
    with autocast(device, half):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, torch.ones_like(x)) for x in inputs]
            tangent = forward_ad.unpack_dual(loss.function(*duals)).tangent
        gradients = torch.func.grad(lambda *a: loss.function(*a).sum(), argnums=everything)(*inputs)
        batched = torch.func.vmap(loss.function)(*inputs)
        leaves = [x.clone().requires_grad_() for x in inputs]
        first = grad(loss.function(*leaves).sum(), leaves, create_graph=True)
        second = grad(sum(g.float().sum() for g in first), leaves)
    assert tangent.dtype == torch.float32
    expected = torch.func.jvp(loss.formula, tuple(exact), tuple(torch.ones_like(x) for x in exact))[1]
    torch.testing.assert_close(tangent, expected.float())
    expected = torch.func.grad(lambda *a: loss.formula(*a).sum(), argnums=everything)(*exact)
    for g, f, e in zip(gradients, first, expected, strict=True):
        assert g.dtype == f.dtype == half
        assert same_bits(g, f.detach())
        torch.testing.assert_close(g, e.to(half))
    assert same_bits(batched, loss.operator(*inputs, dtype=torch.float32))
    assert all(s.dtype == half for s in second)


@each_loss
def test_a_loss_compiles_under_autocast(loss: Loss, device: torch.device) -> None:
    def step(*inputs: Tensor) -> Tensor:
        with autocast(device, torch.bfloat16):
            return loss.function(*inputs)

    torch.compiler.reset()
    inputs = loss.inputs([4, 3], [3], device=device, dtype=torch.bfloat16, requires_grad=True)
    actual, expected = torch.compile(step, backend="aot_eager", fullgraph=True)(*inputs), step(*inputs)
    assert same_bits(actual, expected)
    for a, e in zip(grad(actual.sum(), inputs), grad(expected.sum(), inputs), strict=True):
        assert same_bits(a, e)


@each_loss
def test_a_gradient_scaler_scales_and_unscales(loss: Loss, device: torch.device) -> None:
    leaves = [x.requires_grad_() for x in loss.inputs([4, 3], device=device, dtype=torch.float32)]
    expected = grad(loss.function(*leaves).sum(), leaves)
    optimizer = torch.optim.SGD(leaves, lr=0.0)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    with autocast(device, torch.bfloat16):
        total = loss.function(*leaves).sum()
    scaler.scale(total).backward()
    scaler.unscale_(optimizer)
    for leaf, e in zip(leaves, expected, strict=True):
        assert same_bits(leaf.grad, e)
