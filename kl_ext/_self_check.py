"""The self-check of `python -m kl_ext`: operators and their gradients on a device, against plain torch in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._operators import OPERATORS, Operator

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


def _leaves(operator: Operator, count: int, layout: str) -> list[Tensor]:
    points = torch.tensor(POINTS, dtype=torch.float64).T.reshape(-1, ROWS, COLUMNS)[:count]
    inputs = [x.abs() + 0.25 if name.startswith("scale") else x for name, x in zip(operator.inputs, points)]
    if layout == "halves":
        return [torch.cat(halves, dim=1) for halves in zip(inputs[::2], inputs[1::2])]
    return [*inputs[:2], *(q[0] for q in inputs[2:])] if layout == "q of one row" else inputs


def _result_and_gradients(function: Any, leaves: Sequence[Tensor], layout: str, options: dict[str, Any]) -> list[Tensor]:
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    arguments = [half for leaf in leaves for half in leaf.chunk(2, dim=1)] if layout == "halves" else leaves
    result = function(*arguments, **options)
    return [result, *torch.autograd.grad(result.sum(), leaves)]


def _case_errors(
    operator: Operator, count: int, options: dict[str, Any], layout: str, dtype: torch.dtype, device: str
) -> Iterator[str]:
    leaves = _leaves(operator, count, layout)
    expected = _result_and_gradients(getattr(reference, operator.name), leaves, layout, options)
    given = [leaf.to(device, dtype) for leaf in leaves]
    results = _result_and_gradients(operator.forward, given, layout, options)
    for what, got, want in zip(("the result", *(f"gradient {i}" for i in range(count))), results, expected):
        got, want = got.detach().cpu().double(), want.detach()
        where = f"{operator.name} {dtype} {options} with {layout}: {what}"
        if got.shape != want.shape:
            yield f"{where} has the shape {list(got.shape)}, expected {list(want.shape)}"
        elif not torch.allclose(got, want, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype]):
            worst = (got - want).abs().argmax()
            yield f"{where} is {got.flatten()[worst]}, expected {want.flatten()[worst]}"


def errors(device: str) -> Iterator[str]:
    """Each way in which the operators on the device differ from the reference, and each operator that is not checked."""
    checked = [operator for operator in OPERATORS if hasattr(reference, operator.name)]
    names = {f"kl_ext::{operator.name}{end}" for operator in checked for end in ("", "_backward", "_backward.out")}
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("kl_ext::") and name not in names:
            yield f"{name}: the self-check does not cover it"
    for operator in checked:
        counts = sorted({len(operator.inputs) - len(operator.optional), len(operator.inputs)})
        reductions = REDUCTIONS if operator.reduces else REDUCTIONS[:1]
        for count, options, layout, dtype in itertools.product(counts, reductions, LAYOUTS, TOLERANCES):
            yield from _case_errors(operator, count, options, layout, dtype, device)
