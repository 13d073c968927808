"""The operators as their schemas describe them (csrc/operators.h), and calls of them with named arguments."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._checks import check_clamp, check_result_dtype, check_tensors, check_together, check_weight

Overload = torch._ops.OpOverload


@dataclass
class Call:
    """The arguments of an operator or of its backward; those that it does not have keep their defaults."""

    inputs: dict[str, Tensor]  # the given ones
    weight: Tensor | None = None
    clamp: dict[str, float] = field(default_factory=dict)
    reduction: str = "none"
    dim: Sequence[int] | None = None
    keepdim: bool = False
    dtype: torch.dtype | None = None
    grad_output: Tensor | None = None
    output_mask: Sequence[bool] = ()
    gradients: dict[str, Tensor] = field(default_factory=dict)  # given to be written to, by the names of their inputs

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The inputs, and then the weight."""
        return self.inputs if self.weight is None else {**self.inputs, "weight": self.weight}


@dataclass(frozen=True)
class Operator:
    """An operator, its backward, and what their schemas say."""

    name: str
    inputs: tuple[str, ...]
    optional: tuple[str, ...]  # inputs that are given together or not at all
    clamps: bool
    reduces: bool

    @property
    def forward(self) -> Overload:
        overload: Overload = getattr(torch.ops.kl_ext, self.name).default
        return overload

    @property
    def backward(self) -> Overload:
        overload: Overload = getattr(torch.ops.kl_ext, f"{self.name}_backward").default
        return overload

    @property
    def backward_out(self) -> Overload:
        overload: Overload = getattr(torch.ops.kl_ext, f"{self.name}_backward").out
        return overload

    def read(self, overload: Overload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The arguments of an overload as a call, with their types checked."""
        values = {**defaults_of(overload), **dict(zip(names_of(overload), args)), **kwargs}
        function = self.name if overload is self.forward else f"{self.name}_backward"
        check_together(function, {name: values[name] for name in self.optional})
        call = Call(
            inputs={name: values[name] for name in self.inputs if values[name] is not None},
            clamp={name: values[name] for name in ("clamp_min", "clamp_max") if name in values},
            gradients={name: values[f"grad_{name}"] for name in self.inputs if values.get(f"grad_{name}") is not None},
            **{name: values[name] for name in _PLAIN if name in values},
        )
        check_tensors(function, call.inputs if call.grad_output is None else {"grad_output": call.grad_output, **call.inputs})
        if call.weight is not None:
            check_weight(function, call.weight)
        if call.clamp:
            check_clamp(function, **call.clamp)
        check_result_dtype(function, call.dtype)
        return call

    def run(self, call: Call, inputs: Sequence[Tensor], weight: Tensor | None, **how: Any) -> Tensor:
        """Calls the operator on these tensors, with the clamp and dtype of the call and the arguments in `how`."""
        padded = [*inputs, *[None] * (len(self.inputs) - len(inputs)), weight] if self.reduces else inputs
        result: Tensor = self.forward(*padded, **call.clamp, **{"dtype": call.dtype, **how})
        return result

    def run_backward(
        self, call: Call, grad_output: Tensor, inputs: Sequence[Tensor], weight: Tensor | None, **how: Any
    ) -> tuple[Tensor | None, ...]:
        """Calls the backward operator on these tensors, with the clamp and mask of the call and the arguments in `how`."""
        padded = [*inputs, *[None] * (len(self.inputs) - len(inputs))]
        arguments: list[Any] = [grad_output, *padded, *call.clamp.values()]
        if self.reduces:
            reduction = {"reduction": "none", "dim": None, "keepdim": False, **how}
            arguments += [reduction["reduction"], reduction["dim"], call.output_mask, reduction["keepdim"], weight]
        else:
            arguments.append(call.output_mask)
        gradients: tuple[Tensor | None, ...] = self.backward(*arguments)
        return gradients


def divided(x: Tensor, count: int) -> Tensor:
    """The quotient rounded once, as in the operators: on a GPU torch divides by a number by multiplying with its reciprocal."""
    return x / x.new_full((), count)


_PLAIN = ("weight", "reduction", "dim", "keepdim", "dtype", "grad_output", "output_mask")


@functools.cache
def names_of(overload: Overload) -> tuple[str, ...]:
    """The names of the arguments of an overload."""
    return tuple(argument.name for argument in overload._schema.arguments)


@functools.cache
def defaults_of(overload: Overload) -> dict[str, Any]:
    """The default values of those arguments that have one."""
    return {a.name: a.default_value for a in overload._schema.arguments if a.has_default_value()}


def _described(name: str) -> Operator:
    forward = getattr(torch.ops.kl_ext, name).default._schema.arguments
    backward = [argument.name for argument in getattr(torch.ops.kl_ext, f"{name}_backward").out._schema.arguments]
    inputs = tuple(argument.name for argument in forward if f"grad_{argument.name}" in backward)
    return Operator(
        name=name,
        inputs=inputs,
        optional=tuple(argument.name for argument in forward if argument.name in inputs and argument.has_default_value()),
        clamps="clamp_min" in backward,
        reduces="reduction" in backward,
    )


def _names_of_operators() -> list[str]:
    registered = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("kl_ext::"))
    return sorted(name.removeprefix("kl_ext::") for name in registered if "_backward" not in name)


OPERATORS = tuple(_described(name) for name in _names_of_operators())
