"""Runs a script with kl_ext, with plain torch and with an oracle, and says what is wrong with the first.

Plain torch in the script's own dtypes (kl_ext.reference) says which calls are refused, and the dtypes, shapes and strides of
results, and which gradients there are. Numbers are compared with those of an oracle in float64:

- The exact oracle has the terms and their gradients from longdouble. Every other step of such a script is exact, so that a
  gradient is a sum of positive multiples of those of the terms. Its error is bounded by that of the terms (docs/numbers.md) and
  of the additions, in ulps of the sum of all contributions without their signs. For that sum the script runs once more.
- The mild oracle is the plain formula in float64, for numbers at which nothing cancels much: derivatives of every kind.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

import normal_cases
import oracle
from kl_ext import reference
from oracle import FORMATS, Array, distance, to_longdouble, ulp
from ordered_sum import additions
from scripts import INPUTS, PREAMBLE, Script

# Of a term or its gradient, in ulps: the largest bound there is, and one rounding each for grad_output and a weight.
TERM = max(oracle.PAIR, oracle.LOG_VAR_Q, *normal_cases.GRADIENTS, normal_cases.VALUE) + 2

# The numbers of mild scripts are below 1, their deviations from 0.5 to 1.5. Then no intermediate result of a formula or of its
# first two derivatives is above 5 e^2 2^4, each takes a dozen operations, and at most 2^10 of them are added up in a number.
MILD = 5 * math.e**2 * 2**4 * 12 * 2**10


class Outcome(NamedTuple):
    """What a script leaves: the line at which it was refused and why, its results, and the gradients of its leaves."""

    line: int | None
    error: BaseException | None
    results: dict[str, Any]
    gradients: dict[str, Tensor | None]


def run(script: Script, names: dict[str, Any], kl: Any) -> Outcome:
    """The script with these names, and with `kl` for the package."""
    variables = {**names, "kl": kl}
    line, error = None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exec(compile(script.code, "script", "exec"), variables)
        except Exception as raised:
            error, frame = raised, raised.__traceback__
            while frame is not None:
                line = frame.tb_lineno if frame.tb_frame.f_code.co_filename == "script" else line
                frame = frame.tb_next
    results = {name: x for name, x in variables.items() if re.fullmatch(r"[tyz]\d+", name)}
    gradients = {name: x.grad for name, x in variables.items() if re.fullmatch(r"x\d+", name) and x.requires_grad}
    return Outcome(line, error, results, gradients)


def _called(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _unchanged(x: Any) -> Any:
    return x


REAL: dict[str, Any] = {}
exec(PREAMBLE, REAL)
PLAIN = {**REAL, "compiled": _unchanged}
IN_FLOAT64 = {**PLAIN, "leaf": Tensor.double, "checkpoint": _called}


def exact_terms(function: str, inputs: list[Array], low: float, high: float) -> oracle.Exact:
    """Those of finite inputs."""
    if function == "normal_kl_div":
        return normal_cases.normal(*inputs)
    if len(inputs) == 2:
        return oracle.single(*inputs, low, high)
    pair = oracle.pair(*inputs, low, high)
    if function == "kl_div_pair_loss":
        return pair
    return oracle.Exact(pair.t / 2, tuple(g / 2 for g in pair.gradients), tuple(s / 2 for s in pair.scales), pair.t)


class ExactTerms(torch.autograd.Function):
    """Terms, weighted; their gradients, or the sizes of what these are made of. A gradient is NaN where nothing is said of it.

    Like the operators it refuses no change of its inputs by itself; the judge knows which scripts make one.
    """

    @staticmethod
    def forward(ctx, function, sizes, low, high, weight, *inputs):  # type: ignore[override]
        arrays = numpy.broadcast_arrays(*map(to_longdouble, inputs))
        if function == "normal_kl_div":
            usual = numpy.logical_and.reduce([numpy.isfinite(x) for x in arrays] + [x > 0 for x in arrays[1::2]])
        else:
            clamped = [numpy.clip(x, low, high) for x in arrays[1::2]]
            usual = numpy.logical_and.reduce([numpy.isfinite(x) for x in (*arrays[::2], *clamped)])
        harmless = [numpy.where(usual, x, 1) for x in arrays]
        exact = exact_terms(function, harmless, low, high)
        clamps = {} if function == "normal_kl_div" else {"clamp_min": low, "clamp_max": high}
        plain = getattr(reference, function)(*inputs, **clamps).numpy()
        value = numpy.where(usual, exact.value, plain)
        weights = numpy.ones_like(value) if weight is None else numpy.broadcast_to(to_longdouble(weight), value.shape)
        kept = weights != 0
        value = numpy.where(kept, value, 0) * weights
        ctx.gradients = [
            numpy.where(kept, numpy.where(usual, numpy.abs(s) if sizes else g, numpy.nan), 0) * weights
            for g, s in zip(exact.gradients, exact.scales, strict=False)
        ]
        ctx.shapes = [x.shape for x in inputs]
        return torch.from_numpy(numpy.asarray(value, numpy.float64))

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[override]
        grad = to_longdouble(grad_output)
        terms = [torch.from_numpy(numpy.asarray(grad * g, numpy.float64)) for g in ctx.gradients]
        return None, None, None, None, None, *(t.sum_to_size(s) for t, s in zip(terms, ctx.shapes, strict=False))


def _exact(function: str, sizes: bool) -> Callable[..., Tensor]:
    def exact(
        *given: Any,
        weight: Tensor | None = None,
        clamp_min: float | None = -30.0,
        clamp_max: float | None = 20.0,
        reduction: str = "none",
        dim: Any = None,
        keepdim: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        inputs = [torch.as_tensor(x, dtype=torch.float64) for x in given]
        low, high = -math.inf if clamp_min is None else clamp_min, math.inf if clamp_max is None else clamp_max
        terms = ExactTerms.apply(function, sizes, low, high, weight, *inputs)
        if reduction == "none":
            return terms
        total = terms.sum(None if reduction == "batchmean" else dim, keepdim)
        if reduction == "sum":
            return total
        if reduction == "batchmean":
            return total / terms.shape[0]
        weights = torch.ones(()) if weight is None else weight
        return total / weights.double().expand_as(terms).sum(dim, keepdim)

    return exact


EXACT, SIZES = (SimpleNamespace(**{f: _exact(f, sizes) for f in INPUTS}) for sizes in (False, True))


def coarsest(script: Script) -> torch.dtype:
    """The coarsest dtype of arithmetic that a script has."""
    names = set(re.findall(r"torch\.(float32|float16|bfloat16)", script.code))
    return torch.float32 if names else torch.float64


def _off(got: Tensor, exact: Tensor, error: Array, early: int = 1) -> bool:
    """Whether a number is further from the exact one than the error. Some overflow early: a mean does where its sum does."""
    limit = numpy.ldexp(numpy.longdouble(1), FORMATS[got.dtype].largest_exponent)
    e = to_longdouble(exact)
    near_the_end = numpy.isfinite(e) & (numpy.abs(e) >= limit / early)
    wrong = distance(got, numpy.where(numpy.isinf(e), numpy.copysign(4 * limit, e), e)) > error
    return bool((wrong & ~near_the_end).any())


def _same_layout(got: Tensor, plain: Tensor) -> bool:
    """Strides of dimensions that have more than one element."""
    pairs = zip(got.shape, got.stride(), plain.stride(), strict=True)
    return got.numel() == 0 or all(a == b for size, a, b in pairs if size > 1)


def _told(got: Any, plain: Any, name: str, strides: bool) -> str | None:
    """What differs from plain torch in a tensor, but its numbers."""
    if (got is None) != (plain is None):
        return f"{name} is {'None' if got is None else 'there'}"
    if got is None:
        return None
    if (got.dtype, got.shape, got.requires_grad) != (plain.dtype, plain.shape, plain.requires_grad):
        return f"dtype, shape or requires_grad of {name}"
    return f"strides of {name}" if strides and not _same_layout(got, plain) else None


def _changed(script: Script) -> bool:
    return ".mul_(" in script.code


def verdict(script: Script, kl: Any) -> str | None:
    """What is wrong with kl when it runs the script; None where nothing is."""
    real, plain = run(script, REAL, kl), run(script, PLAIN, reference)
    if "compiled" in script.code:
        torch._dynamo.reset()
    if (real.error is None) != (plain.error is None) or real.line != plain.line:
        stale = any(re.search("modified (by an )?inplace", str(e)) for e in (real.error, plain.error))
        if not (_changed(script) and stale):
            raised = real.error or plain.error
            return f"{'refused' if real.error else 'not refused'}, {type(raised).__name__}"
    for name, y in plain.results.items():
        if name.startswith("t"):
            continue  # plain torch promotes tangents that have no dimensions
        # Where inputs have several layouts, the order of operations in the formula decides which one the result has.
        one_layout = name.startswith("y") and "transpose" not in script.code
        if wrong := _told(real.results.get(name), y, name, one_layout):
            return wrong
    alike = real.error is None and plain.error is None
    for name, x in plain.gradients.items() if alike else ():
        got = real.gradients.get(name)
        if "create_graph" in script.code and (got is None) != (x is None) and not (x if got is None else got).any():
            continue  # the gradient of what is constant
        if wrong := _told(got, x, f"gradient of {name}", True):
            return wrong
    return _wrong_numbers(script, real)


def _wrong_numbers(script: Script, real: Outcome) -> str | None:
    arithmetic = coarsest(script)
    if script.mild:
        exact = run(script, IN_FLOAT64, reference)
        sizes = exact
    else:
        exact, sizes = run(script, IN_FLOAT64, EXACT), run(script, IN_FLOAT64, SIZES)
    if exact.error is not None and real.error is None:
        return f"oracle refused: {exact.error!r}"
    elements = math.prod(max(int(size), 1) for size in re.findall(r"\d+", script.lines[0]))
    for name, y in real.results.items():
        if (true := exact.results.get(name)) is None or y is None:
            continue
        y, true = y.detach(), true.detach()
        fine = torch.float64 if y.dtype == torch.float64 and arithmetic == torch.float64 else torch.float32
        bound = MILD if script.mild else TERM + additions(2 * elements)
        scale = numpy.maximum(numpy.abs(to_longdouble(true)), 1 if script.mild else 0)
        error = bound * ulp(scale, fine) + (0 if fine == y.dtype else oracle.NARROWED) * ulp(scale, y.dtype)
        if _off(y, true, error, elements):
            return f"value of {name}"
    if real.error is not None:
        return None
    calls = script.code.count("kl.")
    for name, grad in real.gradients.items():
        if grad is None or (true := exact.gradients.get(name)) is None:
            continue
        size = to_longdouble(sizes.gradients[name])
        scale = numpy.maximum(numpy.abs(size), 1) if script.mild else numpy.abs(size)
        fine = torch.float64 if grad.dtype == torch.float64 and arithmetic == torch.float64 else torch.float32
        bound = MILD if script.mild else TERM + additions(2 * elements) + 4 * calls
        # A call rounds each of its gradients to the half type, and autograd each sum of two.
        half = 0 if fine == grad.dtype else 2 * calls + 4
        tiny = ulp(numpy.zeros(()), grad.dtype)
        error = bound * ulp(scale, fine) + half * ulp(scale, grad.dtype) + elements * tiny / 2
        # The gradient of a term may overflow before it is divided by the number of terms or multiplied by a hook.
        end = min(torch.finfo(fine).max, torch.finfo(grad.dtype).max) / (64 * elements)
        known = torch.from_numpy(numpy.asarray(numpy.isfinite(scale) & (scale < end)))
        if _off(torch.where(known, grad.detach(), 0), torch.where(known, true, 0), error):
            return f"gradient of {name}"
    return None
