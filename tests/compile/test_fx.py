"""torch.fx.symbolic_trace takes a public function for one step of the graph, whatever its arguments are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from operators import OPERATORS, Operator
from oracle import same_bits

Call = Callable[[Tensor, Tensor], Tensor]


def calls_of(operator: Operator) -> dict[str, tuple[Any, Call]]:
    """With options, with all inputs, and with numbers where it takes those."""
    options = [
        {"clamp_max": None, "reduction": "batchmean"},
        {"clamp_min": -1, "reduction": "sum", "dim": [0], "keepdim": True},
    ]
    first, second = (operator.taken(option) for option in options)
    least, first_number = operator.counts[0], operator.numbers[:1]
    calls: dict[str, Call] = {
        f"{operator}": lambda x, y: operator(*[x, y, y, x][:least], **first),
        f"{operator}, all inputs": lambda x, y: operator(*[x, y, y, x][: operator.count], **second),
    }
    if operator.numbers:
        calls[f"{operator}, numbers"] = lambda x, y: operator(x, y, *operator.numbers)
        calls[f"{operator}, a number and a tensor"] = lambda x, y: operator(x, y, *first_number, y)
    return {name: (operator.function, call) for name, call in calls.items()}


CALLS = {name: call for operator in OPERATORS for name, call in calls_of(operator).items()}


@pytest.mark.parametrize(("function", "call"), CALLS.values(), ids=CALLS)
def test_a_traced_call_is_one_step_and_gives_the_same_bits(function: Any, call: Any, device: torch.device) -> None:
    module = fx.symbolic_trace(call)
    assert [node.target for node in module.graph.nodes if node.op == "call_function"] == [function]
    leaves = [x.requires_grad_() for x in torch.rand(2, 3, 4, device=device) + 0.1]
    actual, expected = module(*leaves), call(*leaves)
    assert same_bits(actual, expected)
    for a, b in zip(*(torch.autograd.grad(value.sum(), leaves) for value in (actual, expected)), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize(("function", "call"), CALLS.values(), ids=CALLS)
def test_a_traced_module_can_be_pickled_and_compiled(function: Any, call: Any, device: torch.device, tmp_path: Any) -> None:
    torch.save(fx.symbolic_trace(call), tmp_path / "module.pt")
    module = torch.load(tmp_path / "module.pt", weights_only=False)
    x, y = torch.rand(2, 3, 4, device=device) + 0.1
    torch.compiler.reset()
    assert same_bits(torch.compile(module, backend="eager", fullgraph=True)(x, y), call(x, y))
