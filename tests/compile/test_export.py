"""torch.export: the exported program keeps the operators, serves the shapes it was exported for, and survives saving."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram, export

from compiled import loss_of, operators_in
from operator_cases import Layout, each_layout
from operators import DTYPES, Operator, each_elementwise_operator, each_reducing_operator
from oracle import same_bits
from reduction_cases import REDUCTIONS
from weight_cases import mask


class Wrapped(torch.nn.Module):
    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.loss = operator.function
        self.bounds = operator.taken({"clamp_min": -1.0})

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.loss(*inputs, **self.bounds)


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@each_elementwise_operator
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_loss_gives_the_bits_of_eager(operator: Operator, strict: bool, device: torch.device) -> None:
    module = Wrapped(operator)
    inputs = operator.inputs([2, 3], [3], device=device, dtype=torch.float32)
    program = export(module, inputs, strict=strict)
    assert operators_in(program.graph) == [operator.operator]
    others = operator.inputs([2, 3], [3], device=device, dtype=torch.float32)
    assert same_bits(program.module()(*others), module(*others))


@each_elementwise_operator
def test_an_exported_loss_serves_every_size_of_its_dynamic_dimensions(operator: Operator, device: torch.device) -> None:
    module = Wrapped(operator)
    rows, columns = Dim("rows"), Dim("columns")
    shapes = tuple(({0: rows, 1: columns}, {0: columns})[i % 2] for i in range(operator.count))
    program = export(module, operator.inputs([4, 3], [3], device=device), dynamic_shapes=(shapes,))
    assert operators_in(program.graph) == [operator.operator]
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
    program = saved_and_loaded(export(module, inputs)).run_decompositions()
    assert operators_in(program.graph) == [operator.operator]
    assert same_bits(program.module()(*inputs), module(*inputs))


@each_reducing_operator
@pytest.mark.parametrize("how", [REDUCTIONS[name] for name in ("none", "mean", "sum of 0 and 2", "batchmean")], ids=str)
def test_an_exported_reduction_serves_other_sizes_and_survives_saving(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    class Loss(torch.nn.Module):
        def forward(self, weight: Tensor | None, *inputs: Tensor) -> Tensor:
            return loss_of(operator, how)(weight, *inputs)

    def arguments(rows: int, weighted: bool) -> tuple[Any, ...]:
        inputs = operator.inputs((rows, 3, 4), (rows, 3, 4), (4,), (4,), dtype=torch.float32, device=device)
        return mask((rows, 1, 4), device) if weighted else None, *inputs

    rows = Dim("rows", min=2, max=64)
    for weighted in (False, True):
        shapes = ({0: rows} if weighted else None, ({0: rows}, {0: rows}, None, None))
        program = export(Loss(), arguments(2, weighted), dynamic_shapes=shapes)
        for served in (program, saved_and_loaded(program).run_decompositions()):
            assert operators_in(served.graph) == [operator.operator]
            given = arguments(7, weighted)
            assert same_bits(served.module()(*given), Loss()(*given))
