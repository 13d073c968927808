"""Calls that are repeated, in the process of failing_allocations.py, which counts what kl_ext holds."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import failing_allocations
import kl_ext
from operators import Operator, named

TIMES = [10 * 2**i for i in range(8)]


def _in_use() -> dict[str, int]:
    return {**failing_allocations._in_use(), "objects of Python": sys.getallocatedblocks()}


def check(call: Callable[[], Any]) -> None:
    """What leaks grows by one or more with each call, as long as there are calls. What Python and torch keep for later grows
    less and less. Growth by more than half of the calls counts, since something else may go meanwhile."""
    call()
    gc.collect()  # what is in cycles is no leak
    gc.freeze()  # which makes the next collections quick
    growths = []
    before = _in_use()
    for times in TIMES:
        for _ in range(times):
            call()
        after = _in_use()
        if any(after[what] - before[what] > times // 2 for what in after):
            gc.collect()
            after = _in_use()
        growth = {what: after[what] - before[what] for what in after if after[what] - before[what] > times // 2}
        if not growth:
            return
        growths.append(growth)
        before = after
    raise AssertionError(f"{TIMES} calls: growth of {growths}")


def other_calls(operator: Operator) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Those that failing_allocations.py does not make: errors, transforms, autocast, hooks, and graphs that go unused."""
    inputs = operator.inputs(*[(6, 40)] * operator.count, dtype=torch.float32)
    leaves = [x.detach().requires_grad_() for x in inputs]
    batched = [x.expand(3, 6, 40).contiguous() for x in inputs]

    def refused(*arguments: Any, **how: Any) -> Callable[[], None]:
        def call() -> None:
            try:
                operator.function(*arguments, **how)
            except (RuntimeError, TypeError, ValueError, IndexError):
                return
            raise AssertionError("nothing was raised")

        return call

    yield "no tensor", refused(*inputs[:-1], "text")
    yield "too few", refused(inputs[0])
    yield "an option that is none", refused(*inputs, options=1)
    yield "shapes that do not fit", refused(*inputs[:-1], inputs[-1][:, :7])
    yield "another dtype", refused(*inputs[:-1], inputs[-1].long())
    yield "another device", refused(*inputs[:-1], inputs[-1].to("meta"))
    if operator.reduces:
        yield "a list of dimensions", lambda: operator(*inputs, reduction="sum", dim=[0, 1])
        yield "another reduction", refused(*inputs, reduction="median")
        yield "no such dimension", refused(*inputs, reduction="sum", dim=5)
        yield "a weight that does not fit", refused(*inputs, weight=torch.ones(7))

    def hook_that_raises() -> None:
        value = operator(*leaves)
        value.register_hook(_raise)
        try:
            value.sum().backward()
        except ZeroDivisionError:
            return
        raise AssertionError("nothing was raised")

    def freed_graph() -> None:
        loss = operator(*leaves).sum()
        torch.autograd.grad(loss, leaves)
        try:
            torch.autograd.grad(loss, leaves)
        except RuntimeError:
            return
        raise AssertionError("nothing was raised")

    def changed_in_place() -> None:
        changed = [x * 1 for x in leaves]
        loss = operator(*changed).sum()
        changed[0].zero_()
        try:
            loss.backward()
        except RuntimeError:
            return
        raise AssertionError("nothing was raised")

    def retained() -> None:
        loss = operator(*leaves).sum()
        for _ in range(2):
            torch.autograd.grad(loss, leaves, retain_graph=True)

    def autocast() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            torch.autograd.grad(operator(*leaves).sum(), leaves)

    def saved_tensor_hooks() -> None:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
            torch.autograd.grad(operator(*leaves).sum(), leaves)

    def sum_of_terms(*tensors: Tensor) -> Tensor:
        return operator(*tensors).sum()

    def third_order() -> None:
        value = operator(*leaves).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, leaves[:1], create_graph=True)
            value = gradient.square().sum()

    places = tuple(range(operator.count))
    yield "a hook that raises", hook_that_raises
    yield "a second backward pass", freed_graph
    yield "an input changed in place", changed_in_place
    yield "a graph that is kept", retained
    yield "a graph that nobody uses", lambda: operator(*leaves)
    yield "autocast", autocast
    yield "hooks of saved tensors", saved_tensor_hooks
    yield "third order", third_order
    yield "vmap", lambda: torch.vmap(operator)(*batched)
    yield "vmap of some", lambda: torch.vmap(operator, in_dims=(0, *[None] * (operator.count - 1)))(batched[0], *inputs[1:])
    yield "gradients of samples", lambda: torch.vmap(torch.func.grad(sum_of_terms, places))(*batched)
    yield "Jacobian", lambda: torch.func.jacrev(lambda *x: operator(*x).sum(0), places)(*inputs)
    yield "Hessian", lambda: torch.func.hessian(sum_of_terms, 0)(*(x[:2, :2] for x in inputs))
    yield "dispatched", lambda: operator.operator(*inputs)


def _raise(gradient: Tensor) -> None:
    raise ZeroDivisionError


def check_all(name: str, shape: str | None) -> int:
    """How many kinds of call were checked: those of failing_allocations.py with inputs of this shape, or else the others."""
    operator = named(name)
    made = list(failing_allocations.calls(operator, shape) if shape else other_calls(operator))
    for title, call in made:
        try:
            check(call)
        except AssertionError as error:
            raise AssertionError(f"{title}: {error}") from error
    return len(made)


PLANTED: dict[str, Callable[[], Any]] = {
    "blocks": lambda: kl_ext.kl_div_single_loss(*_leaves),  # of a graph and of what it saves
    "bytes mapped": lambda: kl_ext.kl_div_single_loss(_large, _large),
    "objects of Python": object,
}
_large = torch.zeros(2**15)
_leaves = [torch.zeros(6, 40, requires_grad=True) for _ in range(2)]


def check_planted(what: str) -> None:
    """Calls that leak on purpose."""
    kept: list[Any] = []
    check(lambda: kept.append(PLANTED[what]()))
