r"""ONNX: what ``torch.onnx.export(dynamo=True)`` has to know of the operators, so that a graph of standard operators comes out.

.. code-block:: python

    torch.onnx.export(model, args, dynamo=True, custom_translation_table=kl_ext.onnx.translation_table())

This module needs ``onnx`` and ``onnxscript``, as ``torch.onnx`` does, and only ``import kl_ext.onnx`` loads it. It translates
the forward operators, with every reduction, weight and dtype; a graph for ONNX has no backward.

With φ(x) = e^x − 1 − x, the terms are, for clamped log-variances x and for deviations σ,

- against the standard normal (φ(x) + μ²) / 2,
- against q (φ(x_p − x_q) + ((μ_p − μ_q) e^(−x_q/2))²) / 2, of which the documented pair loss is twice and a half,
- from deviations (δ² + ((μ_p − μ_q) / σ_q)²) / 2 + ψ(δ), with δ = (σ_p − σ_q) / σ_q and ψ(δ) = δ − log(σ_p / σ_q).

Near 0, where these expressions of φ and ψ cancel, both are polynomials: a graph keeps its digits near the prior. It has
neither the bits of the operators nor their bounds. With onnxruntime on a CPU, where nothing over- or underflows, a term is
within 6 units in the last place of the true value from deviations, 8 from log-variances against the standard normal, and 8 +
``|x_p − x_q| / 2`` against q. Sums are in the runtime's order. Terms are computed and summed in float64 if an input or
``dtype`` is float64, else in float32, and rounded once to the type of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir
import torch
from onnxscript import opset18

from ._fake import result_dtype

__all__ = ["translation_table"]

op: Any = opset18  # the newest whose operators the terms need
_Value = Any  # a value of the graph: onnx_ir.Value
_DOUBLE, _FLOAT = onnx_ir.DataType.DOUBLE, onnx_ir.DataType.FLOAT


def translation_table() -> dict[torch._ops.OpOverload, Callable[..., _Value]]:
    """The translation of each forward operator, for the argument ``custom_translation_table`` of ``torch.onnx.export``.

    Returns:
        A new dictionary, to which translations of other operators can be added.

    Example:
        >>> import kl_ext.onnx
        >>> torch.ops.kl_ext.gaussian_kl_div.default in kl_ext.onnx.translation_table()
        True
    """
    operators = {name: getattr(torch.ops.kl_ext, name).default for name in _TERMS}
    return {operator: _translation(operator._schema, _TERMS[name]) for name, operator in operators.items()}


def _translation(schema: torch.FunctionSchema, terms_of: Callable[..., _Value]) -> Callable[..., _Value]:
    names = [argument.name for argument in schema.arguments]
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    tensors = [argument.name for argument in schema.arguments if str(argument.type) in ("Tensor", "Optional[Tensor]")]

    def translate(*args, **kwargs):  # type: ignore[no-untyped-def]  # torch.onnx reads annotations, and knows none of these
        given = {**defaults, **dict(zip(names, args)), **kwargs}
        present = {name: given[name] for name in tensors if given[name] is not None}
        dtype = _dtype_of_result(list(present.values()), given["dtype"])
        arithmetic = _Arithmetic(_DOUBLE if _DOUBLE in (dtype, *(x.dtype for x in present.values())) else _FLOAT)
        values = {name: op.Cast(x, to=arithmetic.dtype) for name, x in present.items()}
        weight = values.pop("weight", None)
        bounds = [(given["clamp_min"], given["clamp_max"])] if "clamp_min" in given else []
        terms = terms_of(arithmetic, *values.values(), *bounds)
        if weight is not None:
            zero = arithmetic.number(0)
            terms = op.Where(op.Equal(weight, zero), zero, op.Mul(terms, weight))
        rank = max(len(x.shape) for x in present.values())
        return op.Cast(_reduced(terms, weight, rank, given, arithmetic.dtype), to=dtype)

    return translate


def _dtype_of_result(tensors: Sequence[_Value], dtype: int | None) -> onnx_ir.DataType:
    """The dtype by torch's promotion. torch.onnx gives a dtype by its ONNX number, and -1 for none."""
    if dtype not in (None, -1):
        return onnx_ir.DataType(dtype)
    to_torch, from_torch = onnx_ir.tensor_adapters.to_torch_dtype, onnx_ir.tensor_adapters.from_torch_dtype
    return from_torch(result_dtype([torch.empty((1,) * len(x.shape), dtype=to_torch(x.dtype)) for x in tensors]))


def _reduced(terms: _Value, weight: _Value, rank: int, given: dict[str, Any], dtype: onnx_ir.DataType) -> _Value:
    reduction, dim = given.get("reduction", "none"), given.get("dim")
    if reduction == "none":
        return terms
    axes = op.Constant(value_ints=[*dim]) if dim and rank else None  # None: all of them
    keepdims = int(given["keepdim"])
    total = op.ReduceSum(terms, axes, keepdims=keepdims)
    if reduction == "sum":
        return total
    if reduction == "batchmean":
        return op.Div(total, op.Cast(op.Gather(op.Shape(terms), op.Constant(value_int=0)), to=dtype))
    if weight is not None:
        weights = op.ReduceSum(op.Expand(weight, op.Shape(terms)), axes, keepdims=keepdims)
        zero, nan = (op.Constant(value=onnx_ir.tensor(value, dtype=dtype)) for value in (0.0, math.nan))
        return op.Div(total, op.Where(op.Equal(weights, zero), nan, weights))
    count = op.Size(terms) if axes is None else op.ReduceProd(op.Gather(op.Shape(terms), axes), keepdims=0)
    return op.Div(total, op.Cast(count, to=dtype))


def _square(x: _Value) -> _Value:
    return op.Mul(x, x)


class _Arithmetic:
    """The terms in float32 or float64."""

    def __init__(self, dtype: onnx_ir.DataType) -> None:
        self.dtype = dtype

    def number(self, value: float) -> _Value:
        return op.Constant(value=onnx_ir.tensor(value, dtype=self.dtype))

    def phi(self, x: _Value) -> _Value:
        """e^x - 1 - x. Up to 1 by the Taylor series x²/2 (1 + x/3 (1 + x/4 (1 + …))), which lacks less than a tenth of an ulp.
        It has this form because the optimiser of onnxscript takes the addition of 1/12! for that of 0."""
        one = series = self.number(1)
        for n in range(19 if self.dtype == _DOUBLE else 12, 2, -1):
            series = op.Add(op.Mul(op.Mul(x, self.number(1 / n)), series), one)
        near = op.Mul(op.Mul(_square(x), self.number(0.5)), series)
        return op.Where(op.Less(op.Abs(x), one), near, op.Sub(op.Sub(op.Exp(x), one), x))

    def clamped(self, x: _Value, bounds: tuple[float, float]) -> _Value:
        """The clamped x. NaN stays; Clip does not specify what becomes of it."""
        low, high = (self.number(bound) for bound in bounds)
        x = op.Where(op.Less(x, low), low, x)
        return op.Where(op.Greater(x, high), high, x)

    def twice_divergence(self, mu_p: _Value, log_var_p: _Value, *more: Any) -> _Value:
        """Twice the divergence of p from q, or from the standard normal without q."""
        *q, bounds = more
        log_var_p = self.clamped(log_var_p, bounds)
        if not q:
            return op.Add(self.phi(log_var_p), _square(mu_p))
        mu_q, log_var_q = q[0], self.clamped(q[1], bounds)
        distance = op.Mul(op.Sub(mu_p, mu_q), op.Exp(op.Mul(log_var_q, self.number(-0.5))))
        return op.Add(self.phi(op.Sub(log_var_p, log_var_q)), _square(distance))

    def divergence(self, *inputs: Any) -> _Value:
        return op.Mul(self.twice_divergence(*inputs), self.number(0.5))

    def pair_loss(self, *inputs: Any) -> _Value:
        return op.Add(self.twice_divergence(*inputs), self.number(0.5))

    def log_of_ratio(self, a: _Value, b: _Value) -> _Value:
        """A difference of logarithms cancels; a ratio over- and underflows."""
        ratio, least = op.Div(a, b), 1e-300 if self.dtype == _DOUBLE else 1e-30
        is_safe = op.And(op.Greater(ratio, self.number(least)), op.Less(ratio, self.number(1 / least)))
        return op.Where(is_safe, op.Log(ratio), op.Sub(op.Log(a), op.Log(b)))

    def divergence_of_deviations(self, loc_p: _Value, scale_p: _Value, *q: _Value) -> _Value:
        """With s = δ / (2 + δ), log(1 + δ) is 2 (s + s³/3 + s⁵/5 + …), and δ - 2 s is δ s. The series serves for δ from -1/2 to
        1, where |s| is at most 1/3."""
        loc_q, scale_q = q or (self.number(0), self.number(1))
        distance = op.Div(op.Sub(loc_p, loc_q), scale_q)
        delta = op.Div(op.Sub(scale_p, scale_q), scale_q)
        s = op.Div(delta, op.Add(delta, self.number(2)))
        count = 17 if self.dtype == _DOUBLE else 8
        terms = [2 / (2 * n + 3) for n in range(count)]
        series = self.number(terms.pop())
        for term in reversed(terms):
            series = op.Add(op.Mul(_square(s), series), self.number(term))
        near = op.Sub(op.Mul(delta, s), op.Mul(op.Mul(s, _square(s)), series))
        is_near = op.LessOrEqual(op.Abs(op.Sub(delta, self.number(0.25))), self.number(0.75))
        is_near = op.And(is_near, op.Greater(scale_q, self.number(0)))
        psi = op.Where(is_near, near, op.Sub(delta, self.log_of_ratio(scale_p, scale_q)))
        return op.Add(op.Mul(op.Add(_square(delta), _square(distance)), self.number(0.5)), psi)


_TERMS: dict[str, Callable[..., _Value]] = {
    "kl_div_single_loss": _Arithmetic.divergence,
    "kl_div_pair_loss": _Arithmetic.pair_loss,
    "gaussian_kl_div": _Arithmetic.divergence,
    "normal_kl_div": _Arithmetic.divergence_of_deviations,
}
