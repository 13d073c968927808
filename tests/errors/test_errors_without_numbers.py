"""Meta and fake tensors are refused as real ones are, with the same type of error and the same words, in every mode.

The real tensors are the oracle here: test_refused_tensors.py and test_refused_options.py test what they get."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from operators import ELEMENTWISE, OPERATORS, Operator

pytestmark = pytest.mark.usefixtures("autograd_mode")

ops = torch.ops.kl_ext
INF, NAN = float("inf"), float("nan")

Make = Callable[..., Tensor]  # a shape, and a dtype: a tensor of whatever kind
Call = Callable[..., Any]


def named_calls(prefix: str, suffix: str, call_of: Callable[[Operator, int], tuple[int, Call]]) -> dict[str, tuple[int, Call]]:
    """A name, how many tensors it takes, and a call with them: of every operator with as many inputs as it may have."""
    return {
        f"{prefix}{operator}{suffix}{'' if count == operator.count else ', standard'}": call_of(operator, count)
        for operator in OPERATORS
        for count in reversed(operator.counts)
    }


def backward(operator: Operator, count: int) -> tuple[int, Call]:
    def call(*tensors: Tensor, **how: Any) -> Any:
        return operator.backward_operator(
            *operator.backward_arguments(tensors[0], tensors[1:], None, how, [True] * operator.count)
        )

    return count + 1, call


PUBLIC = named_calls("", "", lambda operator, count: (count, operator.function))
DISPATCHED = named_calls("torch.ops.", "", lambda operator, count: (count, getattr(ops, operator.name)))
BACKWARD = named_calls("", "_backward", backward)
EVERY = {**PUBLIC, **DISPATCHED, **BACKWARD}
WITHOUT_A_CLAMP = [operator.name for operator in OPERATORS if not operator.bounds]
CLAMPED = [name for name in EVERY if not any(other in name for other in WITHOUT_A_CLAMP)]


def bad_tensors(count: int, make: Make) -> Iterator[tuple[list[Tensor], dict[str, Any]]]:
    """Dtypes that have no kernels, in the place of each tensor."""
    for position in range(count):
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8):
            yield [make((2, 3), dtype if i == position else torch.float32) for i in range(count)], {}


def bad_clamps(count: int, make: Make) -> Iterator[tuple[list[Tensor], dict[str, Any]]]:
    for low, high in ((1.0, 0.0), (NAN, 20.0), (-30.0, NAN), (INF, -INF), (0.5, 0.25), (1e-7, -123456789.0)):
        yield [make((2, 3)) for _ in range(count)], {"clamp_min": low, "clamp_max": high}


def bad_dtypes(count: int, make: Make) -> Iterator[tuple[list[Tensor], dict[str, Any]]]:
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e5m2):
        yield [make((2, 3)) for _ in range(count)], {"dtype": dtype}


def bad_shapes(count: int, make: Make) -> Iterator[tuple[list[Tensor], dict[str, Any]]]:
    for position in range(1, count):
        for shape in ((4,), (3, 3), (2, 2, 2), (0, 3)):
            yield [make(shape if i == position else (2, 3)) for i in range(count)], {}


def bad_reductions(count: int, make: Make) -> Iterator[tuple[list[Tensor], dict[str, Any]]]:
    for how in (
        {"reduction": "median"},
        {"reduction": "batchmean", "dim": [0]},
        {"dim": [0]},
        {"reduction": "sum", "dim": [2]},
        {"reduction": "mean", "dim": [-3]},
        {"reduction": "sum", "dim": [0, -2]},
    ):
        yield [make((2, 3)) for _ in range(count)], how
    yield [make(()) for _ in range(count)], {"reduction": "batchmean"}


@contextlib.contextmanager
def refusal() -> Iterator[list[tuple[type, str]]]:
    """The type and the first line of the error that comes."""
    caught: list[tuple[type, str]] = []
    with pytest.raises(Exception) as raised:
        yield caught
    caught.append((raised.type, str(raised.value).splitlines()[0]))


def real(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape).to(dtype)


def meta(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype, device="meta")


def assert_alike(call: Call, count: int, cases: Callable[[int, Make], Any], fake: bool = True) -> None:
    with FakeTensorMode():
        fakes = list(cases(count, real))
    for (tensors, how), (on_meta, _), (faked, _) in zip(cases(count, real), cases(count, meta), fakes, strict=True):
        with refusal() as expected:
            call(*tensors, **how)
        with refusal() as actual:
            call(*on_meta, **how)
        assert actual == expected
        if fake:
            with refusal() as actual, faked[0].fake_mode:  # type: ignore[attr-defined]
                call(*faked, **how)
            assert actual == expected


@pytest.mark.parametrize("name", EVERY)
def test_tensors(name: str) -> None:
    count, call = EVERY[name]
    assert_alike(call, count, bad_tensors)


@pytest.mark.parametrize("name", CLAMPED)
def test_clamps(name: str) -> None:
    count, call = EVERY[name]
    assert_alike(call, count, bad_clamps)


@pytest.mark.parametrize("name", [*PUBLIC, *DISPATCHED])
def test_result_dtypes(name: str) -> None:
    if name in map(str, ELEMENTWISE):
        name = f"torch.ops.{name}"  # the documented functions take none
    count, call = EVERY[name]
    assert_alike(call, count, bad_dtypes)


@pytest.mark.parametrize("name", EVERY)
def test_shapes(name: str) -> None:
    """Not of fake tensors in backward passes: compiled autograd captures those with stand-ins of another shape."""
    count, call = EVERY[name]
    assert_alike(call, count, bad_shapes, fake=name not in BACKWARD)


@pytest.mark.parametrize("name", [name for name in EVERY if "gaussian_kl_div" in name or "normal_kl_div" in name])
def test_reductions(name: str) -> None:
    """In backward passes, of fake tensors, what does not depend on a shape."""
    count, call = EVERY[name]
    assert_alike(call, count, bad_reductions, fake=name not in BACKWARD)
    if name in BACKWARD:
        assert_alike(call, count, lambda *given: list(bad_reductions(*given))[:3])
