"""Calls of which each allocation is made to fail in turn, in a process where that is possible (failing_allocations.cpp)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import kl_ext
from kl_ext import _library
from operators import Operator, named
from oracle import same_bits
from shared_library import build

SOURCE = Path(__file__).with_suffix(".cpp")
THREADS = 4
# Below 128 KiB torch allocates; from there on kl_ext does, and from 2 MiB on in huge pages. The latter two run in parallel.
SHAPES = {"small": (6, 40), "large": (64, 1024), "huge": (512, 1025)}
INJECTED, ONE, ALL = "the injected allocator", "one", "one and all that follow"
MODES = (INJECTED, ONE, ALL)

_leaf = torch.zeros((), requires_grad=True)
_zeros = torch.zeros(2**19)
_shim: ctypes.CDLL
_set_kept: Any

Call = Callable[[], Sequence[Tensor]]


def _load(library: Path) -> None:
    global _shim, _set_kept
    del os.environ["LD_PRELOAD"]
    _shim = ctypes.CDLL(str(library))
    _shim.arm.argtypes = [ctypes.c_long, ctypes.c_bool]
    _shim.inject.argtypes = [ctypes.c_bool]
    _shim.asked_since.argtypes = [ctypes.c_bool]
    for function in (_shim.asked_since, _shim.live_blocks, _shim.mapped_bytes, _shim.injected_bytes):
        function.restype = ctypes.c_long
    _set_kept = ctypes.CDLL(str(_library.LIBRARY)).kl_ext_keep_memory
    _set_kept.argtypes, _set_kept.restype = [ctypes.c_uint64], ctypes.c_uint64
    torch.set_num_threads(THREADS)
    _shim.watch()


class FailingProcess:
    """Runs functions of modules, one after the other, where allocations can be made to fail."""

    def __init__(self) -> None:
        self._library = build(SOURCE, "c10")
        self._start()

    def _start(self) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _load, (self._library,))
        # Threads that wait for work do not take the processor from those that have some.
        variables = {"LD_PRELOAD": str(self._library), "OMP_WAIT_POLICY": "passive"}
        before = dict(os.environ)
        os.environ.update(variables)
        try:
            self._pool.submit(os.getpid).result()
        finally:
            for name in variables:
                del os.environ[name]
            os.environ.update(before)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function returns. Fails if the process ends, and goes on with another."""
        try:
            return self._pool.submit(_seeded, int(torch.randint(2**31, ())), function, args).result()
        except BrokenProcessPool:
            self.stop()
            self._start()
            raise AssertionError("the process was terminated") from None

    def stop(self) -> None:
        self._pool.shutdown()


def _seeded(seed: int, function: Callable[..., Any], args: Any) -> Any:
    torch.manual_seed(seed)
    return function(*args)


# What is watched


def _give_back_what_is_kept() -> None:
    """A result of 2 MiB that goes while nothing is kept takes all else with it."""
    if _shim.mapped_bytes() == 0:
        return
    before = _set_kept(0)
    kl_ext.kl_div_single_loss(_zeros, _zeros)
    _set_kept(before)


def _in_use() -> dict[str, int]:
    # What a backward pass that failed has left in the queue of torch's engine goes with the next one.
    torch.autograd.grad(_leaf.exp(), _leaf)
    _give_back_what_is_kept()
    return {
        "blocks": _shim.live_blocks(),
        "bytes mapped": _shim.mapped_bytes(),
        "bytes of the injected allocator": _shim.injected_bytes(),
    }


@contextlib.contextmanager
def _injected(mode: str) -> Iterator[None]:
    _shim.inject(mode == INJECTED)
    try:
        yield
    finally:
        _shim.inject(False)


def _are_same(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(same_bits(*pair) for pair in zip(results, expected, strict=True))


def check(call: Call, mode: str) -> int:
    """Makes each allocation of the call fail in turn, and returns how many there are."""
    with _injected(mode):
        expected = [x.clone() for x in call()]
        call()
        before = _in_use()
        n, was_asked = 0, True
        while was_asked:
            n += 1
            error = ""
            results: Sequence[Tensor] = []
            _give_back_what_is_kept()  # so that large results need memory of the system
            _shim.arm(n, mode == ALL)
            try:
                results = call()
            except (RuntimeError, MemoryError) as raised:
                error = str(raised)
            was_asked = _shim.asked_since(False) >= n
            if was_asked and mode == INJECTED:
                assert error, f"allocation {n} failed, and nobody says so"
            if error:
                assert was_asked, f"fails though all allocations succeed: {error}"
                assert "alloc" in error or "memory" in error, f"allocation {n} failed: {error}"
            else:
                assert _are_same(results, expected), f"allocation {n} failed: a wrong result"
                _shim.asked_since(True)
                results = []  # which may allocate as well
                was_asked = _shim.asked_since(False) >= n
            if (after := _in_use()) != before:
                gc.collect()
                after = _in_use()
            assert after == before, f"allocation {n} failed: in use before {before}, after {after}"
            assert _are_same(call(), expected), f"allocation {n} failed: a later result"
    return n - 1


# Calls


def _leaves(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in inputs]


def _strided(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def calls(operator: Operator, shape: str) -> Iterator[tuple[str, Call]]:
    """By name: every way to get values and derivatives, and for large tensors those whose allocations differ."""
    inputs = operator.inputs(*[SHAPES[shape]] * operator.count, dtype=torch.float32)
    if shape == "huge":
        leaves = _leaves(inputs)
        yield "values", lambda: [operator(*inputs)]
        yield "gradients", lambda: torch.autograd.grad(operator(*leaves).sum(), leaves)
        return
    if shape == "large":
        yield from _calls_on(operator, "all inputs", inputs)
        yield from _calls_on(operator, "a column for all", [_strided(inputs[0]), *inputs[1:-1], inputs[-1][:, :1]])
        yield from _calls_of_halves(operator, inputs)
        return
    for count in operator.counts:
        yield from _calls_on(operator, f"{count} inputs", inputs[:count])
    if operator.numbers:
        yield "numbers", lambda: [operator(*inputs[:2], *operator.numbers)]
    yield from _calls_on(operator, "strided", [_strided(x) for x in inputs])
    yield from _calls_on(operator, "some strided", [inputs[0], *map(_strided, inputs[1:])])
    yield from _calls_on(operator, "a row for all", [*inputs[:-1], inputs[-1][:1]])
    yield from _calls_on(operator, "a column for all", [*inputs[:-1], inputs[-1][:, :1]])
    if operator.count == 4:
        yield from _calls_on(operator, "shared q", [*inputs[:2], *(x[0] for x in inputs[2:])])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        yield from _calls_on(operator, str(dtype), [x.to(dtype) for x in inputs])
    yield from _calls_on(operator, "two dtypes", [inputs[0].double(), *inputs[1:]])
    yield from _calls_of_halves(operator, inputs)


def _calls_on(operator: Operator, name: str, inputs: Sequence[Tensor]) -> Iterator[tuple[str, Call]]:
    leaves = _leaves(inputs)
    weight = torch.rand(inputs[0].shape[0], 1)
    reductions: list[dict[str, Any]] = [{}]
    if operator.reduces:
        reductions += [{"reduction": "sum"}, {"reduction": "batchmean"}, {"reduction": "sum", "dim": 0}]
        reductions += [{"reduction": "mean", "dim": 1, "keepdim": True}, {"reduction": "mean", "weight": weight}]
        reductions += [{"reduction": "sum", "dim": 1, "weight": weight > 0.5}]
    for how in reductions:
        value = operator(*inputs, **how)
        grad_output = torch.rand_like(value)
        title = ", ".join([name, *(f"{key}" if key == "weight" else f"{key}={how[key]}" for key in how)])

        def value_of(how: Any = how) -> Sequence[Tensor]:
            return [operator(*inputs, **how)]

        def gradients(how: Any = how, grad_output: Tensor = grad_output) -> Sequence[Tensor]:
            return torch.autograd.grad(operator(*leaves, **how), leaves, grad_output)

        yield title, value_of
        yield f"{title}: gradients", gradients
    how, grad_output = {}, torch.rand_like(operator(*inputs))

    def one_gradient() -> Sequence[Tensor]:
        return torch.autograd.grad(operator(*inputs[:-1], leaves[-1]).sum(), leaves[-1])

    def second_order() -> Sequence[Tensor]:
        first = torch.autograd.grad(operator(*leaves), leaves, grad_output, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    def forward_mode() -> Sequence[Tensor]:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, x.detach().cos()) for x in inputs]
            return [forward_ad.unpack_dual(operator(*duals)).tangent.clone()]

    def backward() -> Sequence[Tensor]:
        return operator.backward(grad_output, *inputs)

    places = [torch.empty_like(x) for x in inputs]
    shared = [x.clone() for x in inputs]

    def backward_out(inputs: Sequence[Tensor] = inputs, places: Sequence[Tensor] = places) -> Sequence[Tensor]:
        arguments = operator.backward_arguments(grad_output, inputs)
        del arguments[-3 if operator.reduces else -1]  # the mask
        given = dict(zip(operator.arguments, places, strict=False))
        operator.backward_out(*arguments, **{f"grad_{name}": given.get(name) for name in operator.arguments})
        return places

    def backward_out_over_inputs() -> Sequence[Tensor]:
        """Computed beside the inputs first."""
        for place, x in zip(shared, inputs, strict=True):
            place.copy_(x)
        return backward_out(shared, shared)

    yield f"{name}: one gradient", one_gradient
    yield f"{name}: second order", second_order
    yield f"{name}: forward mode", forward_mode
    yield f"{name}: the backward operator", backward
    yield f"{name}: out", backward_out
    if all(x.shape == inputs[0].shape for x in inputs):  # no gradient is a sum
        yield f"{name}: out over the inputs", backward_out_over_inputs


def _calls_of_halves(operator: Operator, inputs: Sequence[Tensor]) -> Iterator[tuple[str, Call]]:
    for dim in (0, 1):
        whole = torch.cat(list(inputs[:2]), dim).requires_grad_()

        def gradient(dim: int = dim, whole: Tensor = whole) -> Sequence[Tensor]:
            terms = operator(*whole.chunk(2, dim), *inputs[2:])
            return torch.autograd.grad(terms.sum(), whole)

        yield f"halves along {dim}: gradients", gradient


def check_all(name: str, shape: str, mode: str) -> dict[str, int]:
    """How many allocations each call makes."""
    counts = {}
    for title, call in calls(named(name), shape):
        try:
            counts[title] = check(call, mode)
        except AssertionError as error:
            raise AssertionError(f"{title}: {error}") from error
    return counts
