"""One pass, weighted: no call allocates anything of the size of the terms but the gradients that are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from operators import GAUSSIAN, Operator, each_reducing_operator
from test_memory import allocated, nbytes
from test_one_pass import MIB, assert_allocates_its_results_only

ROWS, COLUMNS = 4096, 512  # 8 MiB
SPARE = MIB // 4
WEIGHTS = {
    "[B, 1], bool": lambda: torch.ones(ROWS, 1, dtype=torch.bool),
    "[D], float32": lambda: torch.ones(COLUMNS),
    "full, bool": lambda: torch.ones(ROWS, COLUMNS, dtype=torch.bool),
    "full, float16": lambda: torch.ones(ROWS, COLUMNS, dtype=torch.float16),
    "full, float32": lambda: torch.ones(ROWS, COLUMNS),
    "transposed, bool": lambda: torch.ones(COLUMNS, ROWS, dtype=torch.bool).t(),
}
each_weight = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
HOW: list[dict[str, Any]] = [
    {"reduction": "sum"},
    {"reduction": "mean"},
    {"reduction": "sum", "dim": -1},
    {"reduction": "mean", "dim": 0},
]


def assert_small(call: Any) -> None:
    """In the count of torch, beside what the call returns."""
    call()
    size, result = allocated(call, torch.device("cpu"))
    results = nbytes(result if isinstance(result, list) else [result])
    assert results <= size <= results + SPARE, f"{size} bytes for results of {results}"


@pytest.fixture(scope="module")
def encoded() -> list[Tensor]:
    """The halves of [B, 2D]."""
    return list(torch.full((ROWS, 2 * COLUMNS), 0.25).chunk(2, -1))


def test_the_measure_finds_one_planted_product(encoded: list[Tensor]) -> None:
    keep = torch.ones(ROWS, 1)
    with pytest.raises(AssertionError, match="bytes for results"):
        assert_small(lambda: (GAUSSIAN.function(*encoded) * keep).sum())


@each_reducing_operator
@each_weight
def test_the_forward_allocates_the_result_alone(operator: Operator, weight: Any, encoded: list[Tensor]) -> None:
    w, prior = weight(), torch.full((COLUMNS,), 0.125)
    for how in HOW:
        for q in ([], [prior, prior]):
            assert_small(lambda q=q, how=how: operator.function(*encoded, *q, weight=w, **how))


@each_reducing_operator
@each_weight
def test_the_backward_allocates_the_gradients_alone(operator: Operator, weight: Any, encoded: list[Tensor]) -> None:
    """Those of p and of a prior, and those of the prior alone."""
    w, prior = weight(), torch.full((COLUMNS,), 0.125)
    for how in HOW:
        grad = torch.ones_like(operator.function(*encoded, weight=w, **how))
        for mask in ([True] * 4, [False, False, True, True]):
            assert_small(lambda m=mask, h=how, g=grad: operator.backward(g, *encoded, prior, prior, weight=w, mask=m, **h))


def test_the_memory_of_the_process_does_not_rise_by_the_size_of_the_terms() -> None:
    """64 MiB of them, in a training step with a mask of samples, from the loss to the gradients."""
    leaves = [x.requires_grad_() for x in torch.full((32768, 2 * 512), 0.25).chunk(2, -1)]
    leaves = [x.detach().requires_grad_() for x in leaves]
    keep = torch.ones(32768, 1, dtype=torch.bool)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(GAUSSIAN.function(*leaves, weight=keep, reduction="mean"), leaves)

    step()
    assert_allocates_its_results_only(step)
