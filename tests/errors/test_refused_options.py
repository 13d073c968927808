"""Options that are refused: reductions, dims, one half of q alone, clamps, result dtypes, masks, and any that are not there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from operators import (
    OPERATORS,
    REDUCING,
    Operator,
    each_documented_loss,
    each_elementwise_operator,
    each_reducing_operator,
)
from refusals import DISPATCHED, PUBLIC, calls_of, each, raises

in_each_autograd_mode = pytest.mark.usefixtures("autograd_mode")

# Keywords for terms of shape [2, 3], the exception and its message.
REDUCTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"reduction": "Sum"}, ValueError, 'expected reduction to be "none", "sum", "mean" or "batchmean", got "Sum"'),
    ({"reduction": ""}, ValueError, 'expected reduction to be "none", "sum", "mean" or "batchmean", got ""'),
    ({"reduction": "max", "dim": 9}, ValueError, 'expected reduction to be "none", "sum", "mean" or "batchmean", got "max"'),
    ({"dim": 0}, ValueError, 'expected no dim with reduction "none", got [0]'),
    ({"reduction": "none", "dim": (0, 1)}, ValueError, 'expected no dim with reduction "none", got [0, 1]'),
    ({"reduction": "batchmean", "dim": 0}, ValueError, 'expected no dim with reduction "batchmean", got [0]'),
    ({"reduction": "sum", "dim": 2}, IndexError, "expected dim from -2 to 1, got 2"),
    ({"reduction": "mean", "dim": -3}, IndexError, "expected dim from -2 to 1, got -3"),
    ({"reduction": "sum", "dim": (0, 5)}, IndexError, "expected dim from -2 to 1, got 5"),
    ({"reduction": "sum", "dim": (0, 0)}, RuntimeError, "expected each dim once, got [0, 0]"),
    ({"reduction": "mean", "dim": (1, -1)}, RuntimeError, "expected each dim once, got [1, -1]"),
]
each_refused = pytest.mark.parametrize("how, kind, message", REDUCTIONS, ids=lambda x: str(x) if isinstance(x, dict) else "")


def of_a_fake_tensor(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    """As a compiled function or an exported one is called: it is to fail as the eager one does."""
    with FakeTensorMode() as mode:
        return function(mode.from_tensor(x))


MODES: dict[str, Callable[[Callable[..., Tensor], Tensor], Any]] = {
    "eager": lambda f, x: f(x),
    "requiring gradients": lambda f, x: f(x.requires_grad_()),
    "inference": lambda f, x: torch.inference_mode()(f)(x),
    "autocast": lambda f, x: torch.autocast(x.device.type, dtype=torch.bfloat16)(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "fake": of_a_fake_tensor,
}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())


def listed(how: dict[str, Any]) -> dict[str, Any]:
    return how | ({"dim": [how["dim"]]} if isinstance(how.get("dim"), int) else {})


@each_reducing_operator
@each_refused
@each_mode
def test_reductions_are_refused_in_every_mode(
    operator: Operator,
    how: dict[str, Any],
    kind: type[Exception],
    message: str,
    mode: Callable[..., Any],
    device: torch.device,
) -> None:
    x = torch.randn(2, 3, device=device)
    for given in (lambda a: operator(a, a, **how), lambda a: operator(a, a, a, a, **how)):
        with raises(kind, f"{operator.name}: {message}"):
            mode(given, x.clone())


@each_reducing_operator
@each_refused
def test_the_operator_refuses_reductions_too(
    operator: Operator, how: dict[str, Any], kind: type[Exception], message: str, device: torch.device
) -> None:
    x = torch.randn(2, 3, device=device)
    with raises(kind, f"{operator.name}: {message}"):
        operator.operator(x, x, **listed(how))


@each_reducing_operator
@each_refused
def test_the_backward_operator_refuses_reductions(
    operator: Operator, how: dict[str, Any], kind: type[Exception], message: str, device: torch.device
) -> None:
    x = torch.randn(2, 3, device=device)
    how = listed(how)
    with raises(kind, f"{operator.name}_backward: {message}"):
        operator.backward_operator(
            x.sum(), x, x, None, None, *operator.bounds, how.get("reduction", "none"), how.get("dim"), [True] * 4
        )


@each_reducing_operator
@each_mode
def test_a_batchmean_of_zero_dimensional_tensors_is_refused(
    operator: Operator, mode: Callable[..., Any], device: torch.device
) -> None:
    with raises(ValueError, f'{operator.name}: expected at least one dimension for reduction "batchmean", got 0-dim tensors'):
        mode(lambda a: operator(a, a, reduction="batchmean"), torch.tensor(0.5, device=device))


@each_reducing_operator
@pytest.mark.parametrize("dim", [1, -2, (0, 1)], ids=str)
@each_mode
def test_zero_dimensional_tensors_have_the_dims_that_torch_gives_them(
    operator: Operator, dim: Any, mode: Callable[..., Any], device: torch.device
) -> None:
    wrong = dim if isinstance(dim, int) else 1
    with raises(IndexError, f"{operator.name}: expected dim from -1 to 0, got {wrong}"):
        mode(lambda a: operator(a, a, reduction="sum", dim=dim), torch.tensor(0.5, device=device))


@each_reducing_operator
def test_a_dim_given_twice_is_refused_for_zero_dimensional_tensors_as_torch_refuses_it(
    operator: Operator, device: torch.device
) -> None:
    x = torch.tensor(0.5, device=device)
    for dim in ((0, 0), (0, -1)):
        with pytest.raises(RuntimeError):
            x.sum(dim)
        with raises(RuntimeError, f"{operator.name}: expected each dim once, got {list(dim)}"):
            operator(x, x, reduction="sum", dim=dim)


# q


@each_reducing_operator
@each_mode
def test_mu_q_and_log_var_q_go_together(operator: Operator, mode: Callable[..., Any], device: torch.device) -> None:
    x = torch.randn(2, 3, device=device)
    first, second = operator.arguments[2:]
    for q in ({first: x}, {first: 0.5}, {second: x}, {second: 0}):
        (name,) = q
        with raises(ValueError, f"{operator.name}: expected {first} and {second} together or neither, got {name} alone"):
            mode(lambda a, q=q: operator(a, a, **q), x.clone())


@each_reducing_operator
def test_the_backward_operator_takes_mu_q_and_log_var_q_together(operator: Operator, device: torch.device) -> None:
    x = torch.randn(2, 3, device=device)
    first, second = operator.arguments[2:]
    for q, name in (((x, None), first), ((None, x), second)):
        with raises(
            ValueError, f"{operator.name}_backward: expected {first} and {second} together or neither, got {name} alone"
        ):
            operator.backward_operator(x, x, x, *q, *operator.bounds, "none", None, [True] * 4)


# Clamps

INF, NAN = float("inf"), float("nan")
CLAMPS = [
    ((1.0, 0.0), "1 and 0"),
    ((NAN, 20.0), "nan and 20"),
    ((-30.0, NAN), "-30 and nan"),
    ((INF, -INF), "inf and -inf"),
    ((0.5, 0.25), "0.5 and 0.25"),
]
each_clamping_call = each(calls_of([operator for operator in OPERATORS if operator.bounds], reductions=("none", "mean")))


@in_each_autograd_mode
@each_clamping_call
@pytest.mark.parametrize("bounds, shown", CLAMPS)
def test_clamps(name, arguments, call, bounds, shown, device):
    with raises(ValueError, f"{name}: expected clamp_min <= clamp_max, got {shown}"):
        call(*(torch.randn(2, 3, device=device) for _ in arguments), clamp_min=bounds[0], clamp_max=bounds[1])


@in_each_autograd_mode
@each_clamping_call
def test_clamps_are_checked_for_empty_tensors_too(name, arguments, call, device):
    with raises(ValueError, f"{name}: expected clamp_min <= clamp_max, got 2 and 1"):
        call(*(torch.randn(0, device=device) for _ in arguments), clamp_min=2, clamp_max=1)


# Other options


@in_each_autograd_mode
@each(calls_of(ways=(DISPATCHED,)) + calls_of(REDUCING, (PUBLIC,)))
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_result_dtypes_without_kernels(name, arguments, call, dtype, device):
    with raises(TypeError, f"{name}: expected dtype to be float16, bfloat16, float32 or float64, got {str(dtype)[6:]}"):
        call(*(torch.randn(2, 3, device=device) for _ in arguments), dtype=dtype)


@in_each_autograd_mode
@each_elementwise_operator
@pytest.mark.parametrize("length", [0, 1, 3, 5])
def test_masks_of_the_wrong_length(operator, length, device):
    x = torch.randn(2, 3, device=device)
    with pytest.raises((RuntimeError, TypeError)):
        operator.backward_operator(x, *[x] * operator.count, *operator.bounds, [True] * length)


@in_each_autograd_mode
@each_documented_loss
def test_the_documented_signature_and_nothing_more(operator, device):
    arguments, call = operator.arguments, operator.function
    parameters = inspect.signature(call).parameters
    assert list(parameters) == [*arguments, "clamp_min", "clamp_max"]
    assert [p.kind for p in parameters.values()] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * len(arguments) + [
        inspect.Parameter.KEYWORD_ONLY
    ] * 2
    assert (parameters["clamp_min"].default, parameters["clamp_max"].default) == (-30.0, 20.0)
    given = [torch.randn(2, 3, device=device) for _ in arguments]
    assert torch.equal(call(**dict(zip(arguments, given, strict=True))), call(*given, clamp_min=-30, clamp_max=20))
    for wrong in ({"reduction": "sum"}, {"dtype": torch.float32}, {"out": given[0]}):
        with pytest.raises(TypeError):
            call(*given, **wrong)
    with pytest.raises(TypeError):
        call(*given, -30.0, 20.0)
    with pytest.raises(TypeError):
        call(*given[:-1])
