"""The self-check of `python -m kl_ext`: every operator and its gradients on a device, against closed forms in plain Python."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Formula = Callable[..., tuple[float, ...]]


def _standard(mu: float, log_var: float) -> tuple[float, ...]:
    """The divergence from the standard normal and its gradients."""
    return 0.5 * (mu * mu + math.exp(log_var) - log_var - 1), mu, 0.5 * (math.exp(log_var) - 1)


def _pair(mu_p: float, log_var_p: float, mu_q: float, log_var_q: float) -> tuple[float, ...]:
    """The documented loss and its gradients."""
    difference, ratio = mu_p - mu_q, math.exp(log_var_p - log_var_q)
    shift = difference / math.exp(log_var_q)
    loss = log_var_q - log_var_p + ratio + difference * shift - 0.5
    return loss, 2 * shift, ratio - 1, -2 * shift, 1 - ratio - difference * shift


def _divergence(*point: float) -> tuple[float, ...]:
    """The divergence and its gradients, with q or without."""
    if len(point) == 2:
        return _standard(*point)
    loss, *gradients = _pair(*point)
    return 0.5 * (loss - 0.5), *(0.5 * gradient for gradient in gradients)


def _deviation(x: float) -> float:
    """A deviation in the place of a log-variance: any positive number is one."""
    return abs(x) + 0.25


def _normal(*point: float) -> tuple[float, ...]:
    """The divergence from standard deviations and its gradients, with q or without."""
    inputs = [_deviation(x) if i % 2 else x for i, x in enumerate(point)]
    loss, *gradients = _divergence(*(2 * math.log(x) if i % 2 else x for i, x in enumerate(inputs)))
    return loss, *(2 * gradient / x if i % 2 else gradient for i, (gradient, x) in enumerate(zip(gradients, inputs)))


# Each operator with its formula and the numbers of tensors it takes. Autograd calls the backward operators.
OPERATORS: dict[str, tuple[Formula, Sequence[int]]] = {
    "kl_div_single_loss": (_standard, [2]),
    "kl_div_pair_loss": (_pair, [4]),
    "gaussian_kl_div": (_divergence, [2, 4]),
    "normal_kl_div": (_normal, [2, 4]),
}
REDUCTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "sum", "dim": [0]},
    {"reduction": "sum", "dim": [1]},
    {"reduction": "mean"},
    {"reduction": "mean", "dim": [1]},
    {"reduction": "sum", "dim": [1], "keepdim": True},
    {"reduction": "batchmean"},
]
# Halves of one tensor take a backward operator of their own; a q of one row is shared by all rows.
LAYOUTS = ("separate tensors", "halves", "q of one row")
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-13}

# Numbers that float32 holds exactly, in rows longer than a vector register. q is the same in every row.
ROWS, COLUMNS = 3, 37
POINTS = [
    (0.25 * (i % 17) - 2, 0.375 * (i % 9) - 1.5, 0.125 * (i % COLUMNS % 5) - 0.25, 1.75 - 0.25 * (i % COLUMNS % 13))
    for i in range(ROWS * COLUMNS)
]


def _reduced(terms: Tensor, reduction: str = "none", dim: list[int] | None = None, keepdim: bool = False) -> Tensor:
    if reduction == "none":
        return terms
    if reduction == "batchmean":
        return terms.sum() / len(terms)
    return terms.sum(dim, keepdim) if reduction == "sum" else terms.mean(dim, keepdim)


def _join(tensors: Sequence[Tensor], layout: str, join_rows: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Of the inputs, or of their gradients: what stands for them in the layout."""
    if layout == "halves":
        return [torch.cat(list(halves), dim=1) for halves in zip(tensors[::2], tensors[1::2])]
    if layout == "q of one row":
        return [*tensors[:2], *map(join_rows, tensors[2:])]
    return list(tensors)


def _case_errors(name: str, arity: int, options: dict[str, Any], layout: str, dtype: torch.dtype, device: str) -> Iterator[str]:
    points = [point[:arity] for point in POINTS]
    inputs = torch.tensor(points, dtype=dtype, device=device).T.reshape(arity, ROWS, COLUMNS)
    if name == "normal_kl_div":
        inputs[1::2] = inputs[1::2].abs() + 0.25  # as _deviation
    leaves = [leaf.clone().requires_grad_() for leaf in _join(list(inputs), layout, lambda q: q[0])]
    arguments = [half for leaf in leaves for half in leaf.chunk(2, dim=1)] if layout == "halves" else leaves
    result = getattr(torch.ops.kl_ext, name)(*arguments, **options)
    results = (result, *torch.autograd.grad(result.sum(), leaves))

    formula, _ = OPERATORS[name]
    terms, *gradients = torch.tensor([formula(*point) for point in points], dtype=torch.float64).T.reshape(-1, ROWS, COLUMNS)
    weight = _reduced(torch.ones_like(terms), **options).sum() / terms.numel()  # of each term in the sum of the result
    expected = (_reduced(terms, **options), *_join([weight * x for x in gradients], layout, lambda grad_q: grad_q.sum(0)))

    for what, got, want in zip(("the result", *(f"gradient {i}" for i in range(arity))), results, expected):
        got = got.detach().cpu().double()
        where = f"{name} {dtype} {options} with {layout}: {what}"
        if got.shape != want.shape:
            yield f"{where} has the shape {list(got.shape)}, expected {list(want.shape)}"
        elif not torch.allclose(got, want, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype]):
            worst = (got - want).abs().argmax()
            yield f"{where} is {got.flatten()[worst]}, expected {want.flatten()[worst]}"


def errors(device: str) -> Iterator[str]:
    """Each way in which the operators on the device differ from the closed forms, and each operator that is not checked."""
    checked = {f"kl_ext::{name}{end}" for name in OPERATORS for end in ("", "_backward", "_backward.out")}
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("kl_ext::") and name not in checked:
            yield f"{name}: the self-check does not cover it"
    for name, (_, arities) in OPERATORS.items():
        reduces = any(argument.name == "reduction" for argument in getattr(torch.ops.kl_ext, name).default._schema.arguments)
        for arity, options, layout, dtype in itertools.product(
            arities, REDUCTIONS if reduces else REDUCTIONS[:1], LAYOUTS, TOLERANCES
        ):
            yield from _case_errors(name, arity, options, layout, dtype, device)
