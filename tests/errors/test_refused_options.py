"""What the operators that reduce refuse, and in which words: in eager mode, under vmap, for fake tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kl_ext import gaussian_kl_div
from operators import GAUSSIAN, Operator, each_reducing_operator

NAME = "gaussian_kl_div"


@contextmanager
def raises(kind: type[Exception], message: str) -> Iterator[None]:
    """That type exactly, and that message, whole: nothing but torch's own backtrace may follow."""
    with pytest.raises(kind, match=rf"^{re.escape(message)}(\n|$)") as raised:
        yield
    assert raised.type is kind


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

MODES: dict[str, Callable[[Callable[..., Tensor], Tensor], Any]] = {
    "eager": lambda f, x: f(x),
    "requiring gradients": lambda f, x: f(x.requires_grad_()),
    "inference": lambda f, x: torch.inference_mode()(f)(x),
    "autocast": lambda f, x: torch.autocast(x.device.type, dtype=torch.bfloat16)(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
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
def test_fake_tensors_are_refused_with_the_message_of_real_ones(
    operator: Operator, how: dict[str, Any], kind: type[Exception], message: str
) -> None:
    """So that a compiled function or an exported one fails as the eager one does."""
    with FakeTensorMode(), raises(kind, f"{operator.name}: {message}"):
        operator(torch.randn(2, 3), torch.randn(3), **how)


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


@each_reducing_operator
@pytest.mark.parametrize("wrong", ["0.5", [0.5], 1j, object()], ids=lambda x: type(x).__name__)
def test_what_is_neither_a_tensor_nor_a_number(operator: Operator, wrong: Any, device: torch.device) -> None:
    x = torch.randn(2, 3, device=device)
    kind = type(wrong).__name__
    for position, name in enumerate(operator.arguments):
        for others in ([x, x, x, x], [x, x, 0.5, 0.5]):
            given = [wrong if i == position else other for i, other in enumerate(others)]
            expected = f"expected {name} to be a Tensor{' or a number' * (position > 1)}, got {kind}"
            with raises(TypeError, f"{operator.name}: {expected}"):
                operator(*given)


@each_reducing_operator
@pytest.mark.parametrize("wrong", [None, 0.5, 1], ids=str)
def test_p_is_given_as_tensors(operator: Operator, wrong: Any, device: torch.device) -> None:
    x = torch.randn(2, 3, device=device)
    for q in ((), (x, x), (0.5, 0.5), (x, 0.5)):
        with raises(TypeError, f"{operator.name}: expected {operator.arguments[0]} to be a Tensor, got {type(wrong).__name__}"):
            operator(wrong, x, *q)
        with raises(TypeError, f"{operator.name}: expected {operator.arguments[1]} to be a Tensor, got {type(wrong).__name__}"):
            operator(x, wrong, *q)


# As for the documented losses: dtypes, layouts, shapes, devices, clamps


@each_reducing_operator
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_dtypes_without_kernels(operator: Operator, dtype: torch.dtype, device: torch.device) -> None:
    x, bad = torch.randn(2, 3, device=device), torch.zeros(2, 3, device=device).to(dtype)
    for position, name in enumerate(operator.arguments):
        given = [bad if i == position else x for i in range(4)]
        for how in ({}, {"reduction": "sum"}):
            expected = f"expected {name} to be a float16, bfloat16, float32 or float64 tensor, got {str(dtype)[6:]}"
            with raises(TypeError, f"{operator.name}: {expected}"):
                operator(*given, **how)
            with raises(TypeError, f"{operator.name}_backward: {expected}"):
                operator.backward_operator(
                    x if not how else x.sum(), *given, *operator.bounds, how.get("reduction", "none"), None, [True] * 4
                )
    expected = f"expected dtype to be float16, bfloat16, float32 or float64, got {str(dtype)[6:]}"
    with raises(TypeError, f"{operator.name}: {expected}"):
        operator(x, x, dtype=dtype)


@each_reducing_operator
def test_sparse_tensors(operator: Operator, device: torch.device) -> None:
    x = torch.ones(2, 3, device=device)
    for position, name in enumerate(operator.arguments):
        given = [x.to_sparse() if i == position else x for i in range(4)]
        with raises(TypeError, f"{operator.name}: expected {name} to be a strided tensor, got torch.sparse_coo"):
            operator(*given, reduction="sum")


@pytest.mark.parametrize("bounds, shown", [((1.0, 0.0), "1 and 0"), ((float("nan"), 20.0), "nan and 20")], ids=str)
def test_clamps(bounds: tuple[float, float], shown: str, device: torch.device) -> None:
    x = torch.randn(2, 3, device=device)
    with raises(ValueError, f"{NAME}: expected clamp_min <= clamp_max, got {shown}"):
        gaussian_kl_div(x, x, clamp_min=bounds[0], clamp_max=bounds[1], reduction="mean")
    with raises(ValueError, f"{NAME}_backward: expected clamp_min <= clamp_max, got {shown}"):
        GAUSSIAN.backward_operator(x, x, x, None, None, *bounds, "none", None, [True] * 4)


@each_reducing_operator
@pytest.mark.parametrize("how", [{}, {"reduction": "sum"}, {"reduction": "batchmean"}], ids=str)
def test_shapes_that_do_not_broadcast(operator: Operator, how: dict[str, Any], device: torch.device) -> None:
    x, bad = torch.randn(2, 3, device=device), torch.randn(4, device=device)
    for position, name in enumerate(operator.arguments[1:], 1):
        given = [bad if i == position else x for i in range(4)]
        expected = f"expected {name} to broadcast with the shape [2, 3] of the arguments before it, got shape [4]"
        with raises(RuntimeError, f"{operator.name}: {expected}"):
            operator(*given, **how)


@each_reducing_operator
def test_devices_that_differ(operator: Operator, device: torch.device) -> None:
    x = torch.randn(2, 3, device=device)
    for position, name in enumerate(operator.arguments[1:], 1):
        given = [x.to("meta") if i == position else x for i in range(4)]
        with raises(RuntimeError, f"{operator.name}: expected {name} on {x.device} like {operator.arguments[0]}, got meta"):
            operator(*given, reduction="sum")


# grad_output

WRONG_SHAPES = [
    ("none", None, (3,), "[2, 3]"),
    ("none", None, (), "[2, 3]"),
    ("sum", None, (2, 3), "[]"),
    ("sum", None, (1,), "[]"),
    ("sum", [0], (2,), "[3]"),
    ("mean", [-1], (2, 1), "[2]"),
    ("batchmean", None, (2,), "[]"),
]


@each_reducing_operator
@pytest.mark.parametrize("reduction, dim, shape, expected", WRONG_SHAPES, ids=str)
def test_a_grad_output_of_another_shape_than_the_result(
    operator: Operator, reduction: str, dim: list[int] | None, shape: tuple[int, ...], expected: str, device: torch.device
) -> None:
    """Not of fake tensors: compiled autograd captures backward passes with stand-ins of another shape."""
    x, grad_output = torch.randn(2, 3, device=device), torch.randn(shape, device=device)
    with raises(RuntimeError, f"{operator.name}_backward: expected grad_output of shape {expected}, got shape {list(shape)}"):
        operator.backward_operator(grad_output, x, x[:1], None, None, *operator.bounds, reduction, dim, [True] * 4)


@each_reducing_operator
def test_a_grad_output_without_kernels_or_elsewhere(operator: Operator, device: torch.device) -> None:
    x = torch.randn(2, 3, device=device)
    arguments = (x, x, None, None, *operator.bounds, "none", None, [True] * 4)
    expected = "expected grad_output to be a float16, bfloat16, float32 or float64 tensor, got int64"
    with raises(TypeError, f"{operator.name}_backward: {expected}"):
        operator.backward_operator(x.long(), *arguments)
    with raises(
        RuntimeError, f"{operator.name}_backward: expected grad_output on {x.device} like {operator.arguments[0]}, got meta"
    ):
        operator.backward_operator(x.to("meta"), *arguments)
