"""Weights that are refused: by name, in the same words in every mode and for real, meta and fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from operators import REDUCING, Operator, each_reducing_operator
from refusals import raises
from test_errors_without_numbers import Make, assert_alike

pytestmark = pytest.mark.usefixtures("autograd_mode")

REQUIRES_GRAD = (
    "expected weight not to require grad, for weights are not differentiated. Pass weight.detach(), or multiply the terms of "
    'reduction="none" with the weight'
)
Cases = Iterator[tuple[list[Tensor], dict[str, Any]]]


# Calls with a weight and inputs, in this order, of everything that takes one.
def calls(operator: Operator, count: int) -> dict[str, Callable[..., Any]]:
    def backward(weight: Tensor, *inputs: Tensor, **how: Any) -> Any:
        return operator.backward(inputs[0], *inputs, weight=weight, **how)

    return {
        operator.name: lambda weight, *inputs, **how: operator.function(*inputs, weight=weight, **how),
        f"torch.ops.{operator}": lambda w, *x, **how: operator.operator(*x, *[None] * (4 - count), w, **how),
        f"{operator}_backward": backward,
    }


CALLS = {
    f"{name} of {count}": (count, call, name.removeprefix("torch.ops."))
    for operator in REDUCING
    for count in (2, 4)
    for name, call in calls(operator, count).items()
}
each_call = pytest.mark.parametrize("count, call, name", CALLS.values(), ids=CALLS.keys())
WRONG_DTYPES = (torch.int64, torch.uint8, torch.complex64, torch.float8_e4m3fn)
LARGER = ((4,), (3, 3), (5, 2, 3), (2, 2, 3), (1, 2, 3), (0, 3), (2, 0))


def wrong_dtypes(count: int, make: Make) -> Cases:
    for dtype in WRONG_DTYPES:
        for shape in ((2, 3), (2, 1), ()):
            yield [make(shape, dtype), *(make((2, 3)) for _ in range(count))], {}


def wrong_shapes(count: int, make: Make) -> Cases:
    for shape in LARGER:
        for dtype in (torch.float32, torch.bool):
            yield [make(shape, dtype), *(make((2, 3)) for _ in range(count))], {}


def larger_than_one_term(count: int, make: Make) -> Cases:
    for shape in ((1,), (2, 3)):
        yield [make(shape), *(make(()) for _ in range(count))], {}


@each_call
def test_wrong_dtypes(count: int, call: Callable[..., Any], name: str) -> None:
    inputs = [torch.ones(2, 3) for _ in range(count)]
    for dtype in WRONG_DTYPES:
        got = str(dtype).removeprefix("torch.")
        expected = f"{name}: expected weight to be a bool, float16, bfloat16, float32 or float64 tensor, got {got}"
        with raises(TypeError, expected):
            call(torch.ones(2, 3).to(dtype), *inputs)
    assert_alike(call, count, wrong_dtypes)


@each_call
def test_weights_that_would_enlarge_the_terms(count: int, call: Callable[..., Any], name: str) -> None:
    """One more dimension too, though it be of size 1. Fake backward passes: test_errors_without_numbers.py."""
    inputs = [torch.ones(2, 3), *(torch.ones(3) for _ in range(count - 1))]
    for shape in LARGER:
        with raises(
            RuntimeError, f"{name}: expected weight to expand to the shape [2, 3] of the terms, got shape {list(shape)}"
        ):
            call(torch.ones(shape), *inputs)
    for cases in (wrong_shapes, larger_than_one_term):
        assert_alike(call, count, cases, fake=not name.endswith("_backward"))


@each_call
def test_weights_elsewhere(count: int, call: Callable[..., Any], name: str) -> None:
    """A number of the CPU goes with tensors of any device, as in torch; not one of another device."""
    real, meta = torch.ones(2, 3), torch.ones(2, 3, device="meta")
    grad_output = {"grad_output": "grad_output"}.get(name, "mu_p" if "gaussian" in name else "loc_p")
    with raises(RuntimeError, f"{name}: expected weight on cpu like {grad_output}, got meta"):
        call(meta, *[real] * count)
    with raises(RuntimeError, f"{name}: expected weight on meta like {grad_output}, got cpu"):
        call(real, *[meta] * count)
    with raises(RuntimeError, f"{name}: expected weight on cpu like {grad_output}, got meta"):
        call(meta[0, 0], *[real] * count)
    call(torch.ones(()), *[meta] * count)
    with FakeTensorMode():
        if not name.endswith("_backward"):
            with raises(RuntimeError, f"{name}: expected weight on cpu like {grad_output}, got cuda:0"):
                call(torch.ones(2, 3, device="cuda"), *(torch.ones(2, 3) for _ in range(count)))
        call(torch.ones(()), *(torch.ones(2, 3, device="cuda") for _ in range(count)))


@each_call
def test_sparse_weights(count: int, call: Callable[..., Any], name: str) -> None:
    if torch.is_inference_mode_enabled():
        pytest.skip("sparse tensors reach no check there, inputs or weights")
    inputs = [torch.ones(2, 3) for _ in range(count)]
    for weight, layout in ((inputs[0].to_sparse(), "torch.sparse_coo"), (inputs[0].to_sparse_csr(), "torch.sparse_csr")):
        with raises(TypeError, f"{name}: expected weight to be a strided tensor, got {layout}"):
            call(weight, *inputs)


@each_call
def test_a_weight_that_requires_grad(count: int, call: Callable[..., Any], name: str) -> None:
    """Where grad mode is off nothing is differentiated, and it is taken."""
    for inputs in ([torch.ones(2, 3) for _ in range(count)], [torch.ones(2, 3, device="meta") for _ in range(count)]):
        with torch.inference_mode(False), torch.enable_grad():
            weight = torch.ones(2, 1, device=inputs[0].device).requires_grad_()
            with raises(RuntimeError, f"{name}: {REQUIRES_GRAD}"):
                call(weight, *inputs)
            with raises(RuntimeError, f"{name}: {REQUIRES_GRAD}"):
                call(weight * 2, *(x.clone().requires_grad_() for x in inputs))
            call(weight.detach(), *inputs)
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                call(weight, *inputs)
    with torch.inference_mode(False), torch.enable_grad(), FakeTensorMode():
        inputs, weight = [torch.ones(2, 3) for _ in range(count)], torch.ones(2, 1, requires_grad=True)
        with raises(RuntimeError, f"{name}: {REQUIRES_GRAD}"):
            call(weight, *inputs)
        with torch.no_grad():
            call(weight, *inputs)


@each_reducing_operator
def test_a_weight_that_requires_grad_beside_given_gradients(operator: Operator) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        x, weight = torch.ones(2, 3), torch.ones(2, 1, requires_grad=True)
        clamp = [-30.0, 20.0] if operator.bounds else []
        places = dict.fromkeys((f"grad_{name}" for name in operator.arguments), None)
        places[f"grad_{operator.arguments[0]}"] = torch.empty_like(x)
        arguments = (x, x, x, None, None, *clamp, "none", None, False)
        with raises(RuntimeError, f"{operator}_backward: {REQUIRES_GRAD}"):
            operator.backward_out(*arguments, weight, **places)
        operator.backward_out(*arguments, weight.detach(), **places)


@each_reducing_operator
def test_a_weight_is_not_differentiated_by_any_other_means(operator: Operator) -> None:
    """Forward mode, torch.func and torch.compile."""
    x = torch.ones(2, 3)
    with torch.inference_mode(False), torch.enable_grad():

        def total(weight: Tensor) -> Tensor:
            return operator.function(x.clone(), x.clone(), weight=weight, reduction="sum")

        for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
            with raises(RuntimeError, f"{operator}: {REQUIRES_GRAD}"):
                transform(total)(torch.ones(2, 3))
        with forward_ad.dual_level(), raises(RuntimeError, f"{operator}: {REQUIRES_GRAD}"):
            total(forward_ad.make_dual(torch.ones(2, 3), torch.ones(2, 3)))
        compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
        with pytest.raises(Exception, match="expected weight not to require grad"):
            compiled(torch.ones(2, 3, requires_grad=True))
        torch.compiler.reset()


@each_reducing_operator
def test_what_is_no_tensor(operator: Operator) -> None:
    x = torch.ones(2, 3)
    for wrong in (1.0, True, [1.0], "1", object()):
        with raises(TypeError, f"{operator}: expected weight to be a Tensor, got {type(wrong).__name__}"):
            operator.function(x, x, weight=wrong)
