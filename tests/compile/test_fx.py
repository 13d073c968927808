"""torch.fx.symbolic_trace takes a public function for one step of the graph, whatever its arguments are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import kl_ext
from oracle import same_bits

CALLS: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "kl_div_single_loss": (kl_ext.kl_div_single_loss, lambda x, y: kl_ext.kl_div_single_loss(x, y, clamp_max=None)),
    "kl_div_pair_loss": (kl_ext.kl_div_pair_loss, lambda x, y: kl_ext.kl_div_pair_loss(x, y, y, x, clamp_min=-1)),
    "gaussian_kl_div": (kl_ext.gaussian_kl_div, lambda x, y: kl_ext.gaussian_kl_div(x, y, reduction="batchmean")),
    "q": (kl_ext.gaussian_kl_div, lambda x, y: kl_ext.gaussian_kl_div(x, y, y, x, reduction="sum", dim=[0], keepdim=True)),
    "numbers for q": (kl_ext.gaussian_kl_div, lambda x, y: kl_ext.gaussian_kl_div(x, y, 0.0, 1)),
    "a number and a tensor for q": (kl_ext.gaussian_kl_div, lambda x, y: kl_ext.gaussian_kl_div(x, y, 0.5, y)),
}


@pytest.mark.parametrize(("function", "call"), CALLS.values(), ids=CALLS)
def test_a_traced_call_is_one_step_and_gives_the_same_bits(function: Any, call: Any, device: torch.device) -> None:
    module = fx.symbolic_trace(call)
    assert [node.target for node in module.graph.nodes if node.op == "call_function"] == [function]
    leaves = [torch.randn(3, 4, device=device, requires_grad=True) for _ in range(2)]
    actual, expected = module(*leaves), call(*leaves)
    assert same_bits(actual, expected)
    for a, b in zip(*(torch.autograd.grad(value.sum(), leaves) for value in (actual, expected)), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize(("function", "call"), CALLS.values(), ids=CALLS)
def test_a_traced_module_can_be_pickled_and_compiled(function: Any, call: Any, device: torch.device, tmp_path: Any) -> None:
    torch.save(fx.symbolic_trace(call), tmp_path / "module.pt")
    module = torch.load(tmp_path / "module.pt", weights_only=False)
    x, y = torch.randn(3, 4, device=device), torch.randn(3, 4, device=device)
    torch.compiler.reset()
    assert same_bits(torch.compile(module, backend="eager", fullgraph=True)(x, y), call(x, y))
