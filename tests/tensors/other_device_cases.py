"""What is checked in the process that has the simulated device: calls there against plain torch in float64 on the CPU."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import weight_cases
from kl_ext import _other_devices
from operators import CLOSE, OPERATORS, Operator, gaussian_terms, named
from simulated_device import NAME
from weight_cases import left_out, some_weight, spoiled

DEVICE = torch.device("privateuseone", 0)  # torch's name until it is given one
Shapes = Sequence[tuple[int, ...]]


def close(got: Tensor, expected: Tensor) -> None:
    """As close as the formulas are in float64, scaled to the arithmetic, and one rounding to the dtype."""
    arithmetic = torch.promote_types(got.dtype, torch.float32)
    scale = torch.finfo(arithmetic).eps / torch.finfo(torch.float64).eps
    rounding = torch.finfo(got.dtype).eps if got.dtype != arithmetic else 0.0
    assert got.shape == expected.shape
    torch.testing.assert_close(
        got.detach().cpu().double(),
        expected.detach(),
        rtol=CLOSE["rtol"] * scale + rounding,
        atol=CLOSE["atol"] * scale,
        equal_nan=True,
    )


def gradients_of(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor | None = None) -> list[Tensor]:
    """The result, and the gradients of its inner product with `grad`, by default of its sum."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    return [result, *torch.autograd.grad(result, leaves, torch.ones_like(result) if grad is None else grad)]


def check_values_and_gradients(name: str, shapes: Shapes, dtype: torch.dtype, how: dict[str, Any]) -> None:
    operator = named(name)
    inputs = operator.inputs(*shapes, dtype=dtype)
    wide = [x.double() for x in inputs]
    there = [x.to(DEVICE) for x in inputs]
    grad = torch.randn(operator.formula(*wide, **how).shape, dtype=dtype)
    expected = gradients_of(operator.formula_with(how), wide, grad.double())
    results = gradients_of(operator.with_(how), there, grad.to(DEVICE))
    for got, want, like in zip(results, expected, [inputs[0], *inputs], strict=True):
        assert (got.device, got.dtype) == (DEVICE, like.dtype)
        close(got, want)


def check_weights(name: str, shapes: Shapes, dtype: torch.dtype, how: dict[str, Any]) -> None:
    """Where the weight is 0 the inputs hold NaN and whatever else memory may hold."""
    operator = named(name)
    for size in weight_cases.WEIGHTS.values():
        weight = some_weight(size, dtype)
        inputs = spoiled(operator.inputs(*shapes), weight)
        terms = torch.broadcast_shapes(*shapes)
        expected = gradients_of(weight_cases.formula(operator, weight.double(), how), inputs)
        results = gradients_of(weight_cases.weighted(operator, weight.to(DEVICE), how), [x.to(DEVICE) for x in inputs])
        for got, want in zip(results, expected, strict=True):
            close(got, want)
        for got, x in zip(results[1:], inputs, strict=True):
            assert (got.cpu()[left_out(weight, terms, x)] == 0).all()


def check_a_mean_without_weight(name: str) -> None:
    operator = named(name)
    inputs = [x.to(DEVICE) for x in operator.inputs((2, 3))]
    weight = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    value, *gradients = gradients_of(lambda *x: operator(*x, weight=weight, reduction="mean"), inputs)
    assert value.isnan()
    assert all((gradient == 0).all() for gradient in gradients)


def check_clamps(name: str, count: int) -> None:
    """At the bounds and on either side of them, for every log-variance."""
    operator = named(name)
    low, high = -0.5, 0.75
    points = torch.tensor([low - 1, low, 0.0, high, high + 1, torch.nan], dtype=torch.float64)
    grid = torch.cartesian_prod(*[points] * (count // 2)).view(-1, count // 2)
    inputs = [x for log_var in grid.unbind(1) for x in (torch.randn(len(grid), dtype=torch.float64), log_var)]
    scale, offset = operator.of_divergence
    expected = gradients_of(lambda *x: scale * gaussian_terms(*x, clamp_min=low, clamp_max=high) + offset, inputs)
    results = gradients_of(operator.with_({"clamp_min": low, "clamp_max": high}), [x.to(DEVICE) for x in inputs])
    for got, want in zip(results, expected, strict=True):
        close(got, want)


def write_gradients(operator: Operator, tensors: Sequence[Tensor], gradients: dict[str, Tensor]) -> None:
    """Into what is given, by the names of inputs. tensors: grad_output and all inputs."""
    reduction = ("none", None) if operator.reduces else ()
    given = {f"grad_{name}": gradients.get(name) for name in operator.arguments}
    operator.backward_out(*tensors, *operator.bounds, *reduction, **given)


def refusal(call: Callable[[], Any]) -> tuple[type, str]:
    try:
        call()
    except Exception as error:
        return type(error), str(error).splitlines()[0]
    raise AssertionError("nothing was refused")


def bad_calls(operator: Operator, device: torch.device) -> dict[str, Callable[[], Any]]:
    """By what is wrong with them."""
    good = [x.to(device) for x in operator.inputs((2, 3), dtype=torch.float32)]
    calls: dict[str, Callable[[], Any]] = {
        "dtype": lambda: operator(good[0].long(), *good[1:]),
        "shape": lambda: operator(good[0], torch.ones(4, device=device), *good[2:]),
        "device": lambda: operator(good[0], torch.ones(2, 3, device="meta"), *good[2:]),
        "result dtype": lambda: operator.operator(*good, dtype=torch.int64),
        "backward dtype": lambda: operator.backward(good[0].long(), *good),
        "backward shape": lambda: operator.backward(good[0], good[0], torch.ones(4, device=device), *good[2:]),
    }
    first, second, *_ = operator.arguments
    like = torch.empty_like(good[0])
    calls |= {
        "out dtype": lambda: write_gradients(operator, [good[0], *good], {first: like.half()}),
        "out shape": lambda: write_gradients(operator, [good[0], *good], {first: torch.empty(3, device=device)}),
        "out shared": lambda: write_gradients(operator, [good[0], *good], {first: like, second: like}),
    }
    if operator.bounds:
        calls["clamp"] = lambda: operator(*good, clamp_min=1.0, clamp_max=0.0)
    if operator.reduces:
        calls |= {
            "reduction": lambda: operator(*good, reduction="median"),
            "dim": lambda: operator(*good, reduction="sum", dim=2),
            "weight dtype": lambda: operator(*good, weight=good[0].int()),
            "weight shape": lambda: operator(*good, weight=torch.ones(2, 2, 3, device=device)),
            "one of q": lambda: operator(*good[:3]),
            "weight that requires grad": lambda: operator(*good, weight=good[0].clone().requires_grad_()),
            "grad_output": lambda: operator.backward(torch.ones(3, device=device), *good, reduction="sum"),
        }
    return calls


def check_errors(name: str) -> None:
    operator = named(name)
    there, here = bad_calls(operator, DEVICE), bad_calls(operator, torch.device("cpu"))
    for what, call in there.items():
        kind, message = refusal(call)
        expected_kind, expected = refusal(here[what])
        assert (kind, message) == (expected_kind, expected.replace(" on cpu like", f" on {DEVICE} like")), what


def check_a_tensor_of_the_cpu_beside_the_device(name: str) -> None:
    operator = named(name)
    inputs = [x.to(DEVICE) for x in operator.inputs((2, 3))]
    kind, message = refusal(lambda: operator(inputs[0], inputs[1].cpu(), *inputs[2:]))
    first, second, *_ = operator.arguments
    assert (kind, message) == (RuntimeError, f"{name}: expected {second} on {DEVICE} like {first}, got cpu")


def check_one_warning() -> None:
    _other_devices._warn.cache_clear()  # as in a new process
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for operator in OPERATORS:
            for inputs in itertools.repeat([x.to(DEVICE) for x in operator.inputs((2, 3))], 2):
                gradients_of(operator, inputs)
                operator(*(x.cpu() for x in inputs))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1, messages
    assert messages[0].startswith(f"kl_ext has no kernels for {NAME} ")
    assert "lose digits" in messages[0] and "bits" in messages[0]


def check_without_float64(name: str) -> None:
    """Everything that does not ask for float64, beside numbers and 0-dim tensors of it from the CPU."""
    operator = named(name)
    for dtype in (torch.float32, torch.float16):
        inputs = [x.to(DEVICE) for x in operator.inputs((2, 3), dtype=dtype)]
        numbers = [torch.tensor(1.0, dtype=torch.float64)] * (operator.count - 1)
        for given in (inputs, [inputs[0], *numbers], [*inputs[:2], *(operator.numbers or inputs[2:])]):
            tensors = [x for x in given if isinstance(x, Tensor)]
            gradients_of(lambda *x: operator(*x, *given[len(x) :]), tensors)  # noqa: B023  # called at once
        if operator.reduces:
            weight = inputs[0] > 0
            for reduction in ("none", "sum", "mean", "batchmean"):
                gradients_of(lambda *x: operator(*x, weight=weight, reduction=reduction), inputs)  # noqa: B023
    kind, _ = refusal(lambda: torch.ones(2, dtype=torch.float64, device=DEVICE))
    assert kind is RuntimeError  # or this has tested nothing


def check_derivatives(name: str, count: int, how: dict[str, Any]) -> None:
    """Reverse, forward, both, and batched, by finite differences."""
    operator = named(name)
    inputs = [x.to(DEVICE).requires_grad_() for x in operator.inputs((2, 3), (3,), *[(2, 3)] * (count - 2))]
    function = operator.with_(how)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


def check_vmap(name: str) -> None:
    operator = named(name)
    inputs = [x.to(DEVICE) for x in operator.inputs((4, 2, 3))]
    terms = torch.func.vmap(operator, in_dims=1)(*inputs)
    close(terms, operator.formula(*(x.cpu() for x in inputs)).movedim(1, 0))
    gradients = torch.func.vmap(torch.func.grad(lambda *x: operator(*x).sum()))(*inputs)
    close(gradients, gradients_of(operator.formula, [x.cpu() for x in inputs])[1])


def check_tangents_of_the_backward(name: str) -> None:
    """A kernel that differentiates must not do so for tangents too, which are the autograd layer's."""
    operator = named(name)
    inputs = [x.to(DEVICE) for x in operator.inputs((2, 3))]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, torch.ones_like(x)) for x in inputs]
        gradients = operator.backward(torch.ones_like(inputs[0]), *duals)
        tangent = forward_ad.unpack_dual(gradients[0]).tangent
    first_gradient = torch.func.grad(lambda *x: operator.formula(*x).sum())
    ones = tuple(torch.ones(2, 3, dtype=torch.float64) for _ in inputs)
    close(tangent, torch.func.jvp(first_gradient, tuple(x.cpu() for x in inputs), ones)[1])


def check_modes(name: str) -> None:
    """Without gradients, and with what is made in inference mode."""
    operator = named(name)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inputs = [x.to(DEVICE) for x in operator.inputs((2, 3))]
            grad = torch.ones_like(inputs[0])
            inside = [operator(*inputs), *operator.backward(grad, *inputs)]
        outside = [operator(*inputs), *operator.backward(grad, *inputs)]
        expected = gradients_of(operator.formula, [x.cpu().clone() for x in inputs])
        for got, want in zip([*inside, *outside], [*expected, *expected], strict=True):
            assert not got.requires_grad
            close(got, want)


def check_masks_and_given_gradients(name: str, count: int) -> None:
    operator = named(name)
    inputs = [x.to(DEVICE) for x in operator.inputs((2, 3), (3,), *[(2, 3)] * (count - 2))]
    grad = torch.randn(2, 3, dtype=torch.float64).to(DEVICE)
    expected = gradients_of(operator.formula, [x.cpu() for x in inputs], grad.cpu())[1:]
    for mask in itertools.product([False, True], repeat=count):
        gradients = operator.backward(grad, *inputs, mask=mask)
        assert [x is not None for x in gradients] == list(mask)
        given = {a: torch.full_like(x, 7) for a, x, m in zip(operator.arguments, inputs, mask) if m}
        write_gradients(operator, [grad, *inputs, *[None] * (operator.count - count)], given)  # type: ignore[list-item]
        for got in ([x for x in gradients if x is not None], given.values()):
            for x, want in zip(got, [e for e, m in zip(expected, mask) if m], strict=True):
                close(x, want)


def check_numbers_of_the_cpu(name: str) -> None:
    """0-dim tensors, with a grad_output that is larger where the operator lets it be."""
    operator = named(name)
    inputs = operator.inputs(())
    grad = torch.randn(() if operator.reduces else (2, 3), dtype=torch.float64)
    expected = gradients_of(lambda *x: operator.formula(*x).expand(grad.shape), inputs, grad)[1:]
    for got, want in zip(operator.backward(grad.to(DEVICE), *inputs), expected, strict=True):
        assert got.device.type == "cpu"
        close(got, want)


def check_halves(name: str) -> None:
    operator = named(name)
    mu, log_var, *q = operator.inputs((3, 4))
    whole = torch.cat([mu, log_var], dim=1)

    def of(function: Callable[..., Tensor], device: Any) -> list[Tensor]:
        return gradients_of(lambda h: function(*h.chunk(2, 1), *(x.to(device) for x in q)), [whole.to(device)])

    for got, want in zip(of(operator, DEVICE), of(operator.formula, "cpu"), strict=True):
        close(got, want)


def check_layouts(name: str) -> None:
    """The strides that a result has on the CPU, which compiled programs rely on."""
    operator = named(name)
    for dims in ((0, 1, 2), (2, 0, 1), (1, 0, 2)):
        inputs = [x.permute(dims) for x in operator.inputs((2, 3, 4))]
        here = operator(*inputs)
        there = operator(*(x.to(DEVICE) for x in inputs))
        assert there.stride() == here.stride()


def check_autocast(name: str) -> None:
    operator = named(name)
    inputs = [x.to(DEVICE) for x in operator.inputs((2, 3), dtype=torch.float16)]
    with torch.autocast(NAME, dtype=torch.float16):
        result, *gradients = gradients_of(operator, inputs)
    assert result.dtype == torch.float32
    assert [x.dtype for x in gradients] == [torch.float16] * len(inputs)
    close(result, operator.formula(*(x.cpu().double() for x in inputs)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert operator(*inputs).dtype == torch.float16


def check_compile(name: str) -> None:
    operator = named(name)
    compiled = torch.compile(operator.function, backend="aot_eager", fullgraph=True)
    inputs = [x.to(DEVICE) for x in operator.inputs((2, 3))]
    for got, want in zip(gradients_of(compiled, inputs), gradients_of(operator, inputs), strict=True):
        assert torch.equal(got.cpu(), want.cpu())


def check_jagged(name: str) -> None:
    operator = named(name)
    values = operator.inputs((5, 2))
    offsets = torch.tensor([0, 2, 5]).to(DEVICE)
    nested = [torch.nested.nested_tensor_from_jagged(x.to(DEVICE), offsets) for x in values]
    close(operator(*nested).values(), operator.formula(*values))
