"""What tests of compiled code share: kl_ext's operators in a graph, steps in both ways, and a backward that is captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.autograd import grad
from torch.fx import Graph, GraphModule

from operators import Operator
from oracle import same_bits


def operators_in(graph: Graph, namespace: str = "kl_ext") -> list[Any]:
    return [node.target for node in graph.nodes if getattr(node.target, "namespace", None) == namespace]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """The same bits, in the same layout."""
    for a, e in zip(actual, expected, strict=True):
        assert same_bits(a, e) and a.stride() == e.stride()


def loss_of(operator: Operator, how: dict[str, Any]) -> Callable[..., Tensor]:
    """A function of a weight, or None, and the inputs."""

    def function(weight: Tensor | None, *inputs: Tensor) -> Tensor:
        return operator(*inputs, **how) if weight is None else operator(*inputs, weight=weight, **how)

    return function


def value_and_gradients(value: Tensor, leaves: Sequence[Tensor], grad_output: Tensor) -> list[Tensor]:
    return [value.detach(), *grad(value, leaves, grad_output)]


@contextmanager
def backward_compiled(backend: str = "aot_eager", dynamic: bool = True) -> Iterator[list[GraphModule]]:
    """Backward passes in here are captured, into the list that it gives, and run compiled."""
    graphs: list[GraphModule] = []

    def compile_backward(graph: GraphModule) -> Callable[..., Any]:
        graphs.append(graph)
        return torch.compile(graph, backend=backend, fullgraph=True)

    with compiled_autograd._enable(compile_backward, dynamic=dynamic):
        yield graphs
