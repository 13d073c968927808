"""What is measured on a GPU: each operator forward and backward, its contenders, and the fewest bytes that it can move."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kl_ext
import kl_ext.reference

WIDTH = 512  # D of terms [B, D]
BOUNDS = (-30.0, 20.0)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REDUCTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "sum": {"reduction": "sum"},
    "batchmean": {"reduction": "batchmean"},
    "sum over 1": {"reduction": "sum", "dim": 1},
}
Q = ["standard", "full", "prior"]  # no q; q as large as p; q of shape [D]


@dataclass(frozen=True)
class Case:
    """One direction of one operator, with one reduction, against one kind of q."""

    operator: str
    reduction: str
    q: str
    direction: str  # forward or backward

    @property
    def name(self) -> str:
        of = self.operator if self.operator != "gaussian_kl_div" else f"{self.operator}, {self.reduction}, q {self.q}"
        return f"{of}, {self.direction}"

    @property
    def is_reduction(self) -> bool:
        """Whether something is summed: the terms, or the gradients of a prior."""
        return self.reduction != "none" or (self.q == "prior" and self.direction == "backward")

    @property
    def arguments(self) -> int:
        return 2 if self.q == "standard" else 4

    def tensors(self) -> tuple[int, int]:
        """How many tensors of the size of the terms are read, and how many written."""
        large = 4 if self.q == "full" else 2
        of_terms = self.reduction == "none"
        return (large + of_terms, large) if self.direction == "backward" else (large, int(of_terms))

    def batch(self, total: int, itemsize: int) -> int:
        """B, so that a call moves about `total` bytes."""
        return max(2, total // (sum(self.tensors()) * itemsize * WIDTH))

    def bytes(self, batch: int, itemsize: int) -> int:
        """What a call must move: each argument read once, each result written once."""
        numbers = sum(self.tensors()) * batch * WIDTH
        backward = self.direction == "backward"
        if self.q == "prior":
            numbers += 2 * WIDTH * (2 if backward else 1)
        if self.reduction != "none":
            numbers += batch if self.reduction == "sum over 1" else 1
        return numbers * itemsize

    def fresh(self, batch: int, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Standard normal numbers: grad_output, then the arguments; the forward leaves grad_output alone."""
        of_terms = (batch, WIDTH)
        shapes: list[tuple[int, ...]] = [of_terms] * 2
        if self.q != "standard":
            shapes += [of_terms if self.q == "full" else (WIDTH,)] * 2
        result = {"none": of_terms, "sum over 1": (batch,)}.get(self.reduction, ())
        if self.direction == "forward":
            result = (1,)
        return [torch.randn(shape, device=device, dtype=dtype) for shape in [result, *shapes]]

    def loss(self, contender: str) -> Callable[..., Tensor]:
        function = getattr(kl_ext if contender == "kl_ext" else kl_ext.reference, self.operator)
        how = REDUCTIONS[self.reduction]
        return lambda *arguments: function(*arguments, **how)

    def own(self) -> Callable[..., Any]:
        """kl_ext's call, of grad_output and the arguments: the operator itself, one launch or a few."""
        if self.direction == "forward":
            function = self.loss("kl_ext")
            return lambda _, *arguments: function(*arguments)
        backward = getattr(torch.ops.kl_ext, f"{self.operator}_backward").default
        mask = [True] * self.arguments
        if self.operator != "gaussian_kl_div":
            return lambda grad, *arguments: backward(grad, *arguments, *BOUNDS, mask)
        how = REDUCTIONS[self.reduction]
        reduction, dim = how.get("reduction", "none"), [how["dim"]] if "dim" in how else None
        mask4 = mask + [False] * (4 - len(mask))
        missing = [None] * (4 - self.arguments)
        return lambda grad, *arguments: backward(grad, *arguments, *missing, *BOUNDS, reduction, dim, mask4)

    def plain(self) -> Callable[..., Any]:
        """The same in plain torch, for torch.compile: the backward as a function of what kl_ext's is a function of."""
        function = self.loss("plain torch")
        if self.direction == "forward":
            return lambda _, *arguments: function(*arguments)

        def backward(grad: Tensor, *arguments: Tensor) -> Any:
            return torch.func.vjp(function, *arguments)[1](grad)

        return backward

    def eager(self, tensors: list[Tensor]) -> Callable[[], Any]:
        """The same in plain torch, uncompiled; of the backward only that which autograd does after the forward."""
        function = self.loss("plain torch")
        grad, *arguments = tensors
        if self.direction == "forward":
            return lambda: function(*arguments)
        leaves = [x.detach().requires_grad_() for x in arguments]
        value = function(*leaves)
        return lambda: torch.autograd.grad(value, leaves, grad, retain_graph=True)


def cases() -> list[Case]:
    """Every case, forward before backward."""
    operators = [("kl_div_single_loss", "none", "standard"), ("kl_div_pair_loss", "none", "full")]
    operators += [("gaussian_kl_div", reduction, q) for reduction, q in itertools.product(REDUCTIONS, Q)]
    return [Case(*operator, direction) for operator in operators for direction in ("forward", "backward")]
