"""torch.export: the exported program keeps the operators, serves the shapes it was exported for, and survives saving."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram, export

from operator_cases import Layout, each_layout
from operators import DTYPES, Operator, each_elementwise_operator
from oracle import same_bits


class Wrapped(torch.nn.Module):
    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.loss = operator.function
        self.bounds = operator.taken({"clamp_min": -1.0})

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.loss(*inputs, **self.bounds)


def operators_in(program: ExportedProgram) -> list[torch._ops.OpOverload]:
    return [node.target for node in program.graph.nodes if getattr(node.target, "namespace", None) == "kl_ext"]


@each_elementwise_operator
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_loss_gives_the_bits_of_eager(operator: Operator, strict: bool, device: torch.device) -> None:
    module = Wrapped(operator)
    inputs = operator.inputs([2, 3], [3], device=device, dtype=torch.float32)
    program = export(module, inputs, strict=strict)
    assert operators_in(program) == [operator.operator]
    others = operator.inputs([2, 3], [3], device=device, dtype=torch.float32)
    assert same_bits(program.module()(*others), module(*others))


@each_elementwise_operator
def test_an_exported_loss_serves_every_size_of_its_dynamic_dimensions(operator: Operator, device: torch.device) -> None:
    module = Wrapped(operator)
    rows, columns = Dim("rows"), Dim("columns")
    shapes = tuple(({0: rows, 1: columns}, {0: columns})[i % 2] for i in range(operator.count))
    program = export(module, operator.inputs([4, 3], [3], device=device), dynamic_shapes=(shapes,))
    assert operators_in(program) == [operator.operator]
    for size in ([2, 5], [7, 2], [64, 33]):
        inputs = operator.inputs(size, size[1:], device=device)
        assert same_bits(program.module()(*inputs), module(*inputs))


@each_elementwise_operator
@each_layout
def test_an_exported_loss_keeps_the_strides_of_eager(operator: Operator, layout: Layout, device: torch.device) -> None:
    class Viewed(torch.nn.Module):
        def forward(self, *leaves: Tensor) -> Tensor:
            return operator.function(*view(*leaves))

    leaves, view = layout(operator, device, torch.float32)
    inputs = tuple(leaf.detach() for leaf in leaves)
    program = export(Viewed(), inputs)
    actual, expected = program.module()(*inputs), Viewed()(*inputs)
    assert same_bits(actual, expected)
    assert actual.stride() == expected.stride()
    (output,) = [node.args[0][0] for node in program.graph.nodes if node.op == "output"]
    assert output.meta["val"].stride() == expected.stride()


@each_elementwise_operator
@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[::-1], DTYPES[:2] * 2], ids=lambda d: "-".join(map(str, d)))
def test_an_exported_program_can_be_saved_decomposed_and_run_elsewhere(
    operator: Operator, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    module = Wrapped(operator)
    inputs = tuple(x.to(d) for x, d in zip(operator.inputs([2, 3], [3], device=device), dtypes, strict=False))
    file = io.BytesIO()
    torch.export.save(export(module, inputs), file)
    file.seek(0)
    program = torch.export.load(file).run_decompositions()
    assert operators_in(program) == [operator.operator]
    assert same_bits(program.module()(*inputs), module(*inputs))
