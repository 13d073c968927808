"""Random scripts find nothing wrong in kl_ext, and something wrong in each faulty twin of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kl_ext
from fuzz import size, smallest
from judge import PLAIN, run, verdict
from kl_ext import reference
from scripts import INPUTS, Script, draw

SEED = 1  # the suite runs the same scripts every time; `make fuzz` draws new ones
CASES = 2000
PARTS = 20
ENOUGH = 1500  # scripts, to find a planted fault with


@pytest.mark.parametrize("part", range(PARTS))
def test_random_scripts(part: int) -> None:
    for case in range(part * CASES // PARTS, (part + 1) * CASES // PARTS):
        script = draw(SEED * 1_000_000 + case)
        wrong = verdict(script, kl_ext)
        assert wrong is None, f"{wrong}\n{smallest(script, kl_ext)}"


class Twin(torch.autograd.Function):
    """A loss whose gradients are changed on their way."""

    @staticmethod
    def forward(ctx: Any, change: Callable[..., Tensor], call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.change, ctx.call, ctx.inputs = change, call, inputs  # without save_for_backward: a later change goes unseen
        with torch.no_grad():
            return call(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in ctx.inputs]
            y = ctx.call(*leaves)
        gradients = torch.autograd.grad(y, leaves, grad_output, allow_unused=True)
        changed = [None if g is None else ctx.change(g, i, x) for i, (g, x) in enumerate(zip(gradients, leaves, strict=True))]
        return None, None, *changed


def with_gradients(change: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def faulty(loss: Callable[..., Tensor], given: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        tensors = [x for x in given if isinstance(x, Tensor)]
        return Twin.apply(change, lambda *inputs: loss(*inputs, *given[len(inputs) :], **options), *tensors)

    return faulty


def clamp_lets_gradients_pass(g: Tensor, i: int, x: Tensor) -> Tensor:
    return torch.where((x.abs() > 30) & (g == 0), 1, g) if i % 2 else g


def a_nan_spreads(loss: Callable[..., Tensor], given: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    y = loss(*given, **options)
    return y + 0 * y.detach().sum() if y.detach().isnan().any() else y


def weight_multiplies(loss: Callable[..., Tensor], given: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """0 * NaN is NaN."""
    if options.get("weight") is None or options.get("reduction", "none") != "none":
        return loss(*given, **options)
    weight = options["weight"]
    y = loss(*given, **{**options, "weight": None})
    return (y * weight.expand(y.shape)).to(y.dtype)


def another_count(loss: Callable[..., Tensor], given: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    y = loss(*given, **options)
    return y * 2 if options.get("reduction") == "batchmean" and options.get("keepdim") else y


def q_has_no_tangent(loss: Callable[..., Tensor], given: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    q = [torch.autograd.forward_ad.unpack_dual(x).primal if isinstance(x, Tensor) else x for x in given[2:]]
    return loss(*given[:2], *q, **options)


def refused_is_computed(loss: Callable[..., Tensor], given: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    if options.get("dim") == 7:
        options = {**options, "dim": -1}
    return loss(*given, **options)


def call(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda loss, given, options: change(loss(*given, **options))


FAULTS: dict[str, Callable[..., Tensor]] = {
    "a value is 1e-5 off": call(lambda y: y * (1 + 1e-5)),
    "half a bit is lost": call(lambda y: y.half().to(y.dtype) if y.dtype == torch.float32 else y),
    "results are float64": call(Tensor.double),
    "results are transposed": call(lambda y: y.transpose(0, -1).contiguous().transpose(0, -1) if y.dim() > 1 else y),
    "results have one dimension more": call(lambda y: y[None] if y.dim() == 0 else y),
    "results require no gradient": call(Tensor.detach),
    "a gradient is 1e-5 off": with_gradients(lambda g, i, x: g * (1 + 1e-5) if i == 1 else g),
    "gradients of zeros are zero": with_gradients(lambda g, i, x: torch.where(x == 0, 0, g)),
    "an infinite log-variance gets a gradient": with_gradients(clamp_lets_gradients_pass),
    "changes in place go unseen": with_gradients(lambda g, i, x: g),
    "a NaN spreads": a_nan_spreads,
    "a weight of 0 stops no NaN": weight_multiplies,
    "another number of terms": another_count,
    "q has no tangent": q_has_no_tangent,
    "what is refused is computed": refused_is_computed,
}


def twin(faulty: Callable[..., Tensor]) -> SimpleNamespace:
    def loss(name: str) -> Callable[..., Tensor]:
        return lambda *given, **options: faulty(getattr(kl_ext, name), given, options)

    return SimpleNamespace(**{name: loss(name) for name in INPUTS})


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    kl = twin(FAULTS[name])
    first = random.Random(SEED).randrange(10**9)
    scripts = (draw(first + case) for case in range(ENOUGH))
    assert any(verdict(script, kl) for script in scripts)


def test_a_failure_is_reduced_to_the_smallest_script() -> None:
    """To the leaf, its loss and nothing else."""
    kl = twin(FAULTS["results are float64"])
    script = next(s for s in map(draw, range(100)) if "float64" not in s.code and (verdict(s, kl) or "").startswith("dtype"))
    left = smallest(script, kl)
    assert size(left) < size(script)
    assert len([line for line in left.lines if "= leaf(" in line]) <= 4
    assert len([line for line in left.lines if "kl." in line]) == 1


def test_a_script_runs_by_itself() -> None:
    for seed in range(20):
        script = draw(seed)
        if run(script, PLAIN, reference).error is None:
            exec(compile(str(script), "script", "exec"), {})


def test_the_same_seed_draws_the_same_script() -> None:
    assert draw(7) == draw(7) != draw(8)
    assert isinstance(draw(7), Script)
