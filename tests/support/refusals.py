"""Calls of every operator, in every way to call it, and the error that one is to end in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from operators import OPERATORS, Operator


@contextmanager
def raises(kind: type[Exception], message: str) -> Iterator[None]:
    """That type exactly, and that message, whole: nothing but torch's own backtrace may follow."""
    with pytest.raises(kind, match=rf"^{re.escape(message)}(\n|$)") as raised:
        yield
    assert raised.type is kind


def _public(operator: Operator, reduction: dict[str, Any]) -> Callable[..., Any]:
    return lambda *inputs, **how: operator(*inputs, **reduction, **how)


def _dispatched(operator: Operator, reduction: dict[str, Any]) -> Callable[..., Any]:
    return lambda *inputs, **how: operator.operator(*inputs, **reduction, **how)


def _backward(operator: Operator, reduction: dict[str, Any]) -> Callable[..., Any]:
    def call(grad_output: Tensor, *inputs: Tensor, **how: Any) -> Any:
        return operator.backward_operator(*operator.backward_arguments(grad_output, inputs, how=reduction | how))

    return call


PUBLIC, DISPATCHED, BACKWARD = _public, _dispatched, _backward


def calls_of(
    operators: Sequence[Operator] = OPERATORS,
    ways: Sequence[Callable[..., Any]] = (PUBLIC, DISPATCHED, BACKWARD),
    reductions: Sequence[str] = ("none", "sum"),
) -> list[Any]:
    """The name that errors begin with, the names of the tensor arguments, and a call with these and keywords: for the operators
    that reduce with each of these reductions."""
    calls = []
    for way in ways:
        for operator in operators:
            name = f"{operator}_backward" if way is BACKWARD else operator.name
            arguments = ["grad_output"] * (way is BACKWARD) + [*operator.arguments]
            for reduction in reductions if operator.reduces else ["none"]:
                given = {"reduction": reduction} if reduction != "none" else {}
                label = f"{'' if way is PUBLIC else 'torch.ops.'}{name}{f'-{reduction}' if given else ''}"
                calls.append(pytest.param(name, arguments, way(operator, given), id=label))
    return calls


def each(calls: Sequence[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name, arguments, call", calls)
