"""Jagged nested tensors: every operator, from its schema, on the numbers that these tensors hold.

A jagged tensor of shape [B, *, D] holds B sequences of rows, one after another in values of shape [rows, D]. Where each result
belongs to one row, or all sequences are reduced together, an operator goes over the values as they are: *packed*. The sequences
have to be kept apart for the sum or mean of each (the ragged dimension is reduced, the batch is not) and for the gradient of a
dense tensor that has numbers of its own for each. For these the tensors are *padded* to [B, longest, D], and a weight leaves
the padding out. Terms that are left out change no sum: a sequence has the bits of the same call on this sequence alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import is_fake
from torch.nested._internal.nested_tensor import NestedTensor

from ._checks import reduced_dims
from ._fake import arithmetic_dtype, result_dtype
from ._operators import OPERATORS, Operator, defaults_of, divided, names_of


class _Ragged:
    """The ragged structure that the tensors of one call share."""

    def __init__(self, function: str, tensors: Mapping[str, Tensor]) -> None:
        jagged = {name: x for name, x in tensors.items() if isinstance(x, NestedTensor)}
        name, like = next(iter(jagged.items()))
        self.rank, self.dim, self.size = like.dim(), like._ragged_idx, like.shape[like._ragged_idx]
        self.offsets, self.cache = like._offsets, like._metadata_cache
        self.batch, self.rows = like.shape[0], like._values.shape[self.dim - 1]
        for other, x in jagged.items():
            if x._lengths is not None:
                raise NotImplementedError(
                    f"{function}: expected {other} to have no gaps between its sequences, got a nested tensor with lengths; "
                    f"{other}.contiguous() has none"
                )
            if (x.dim(), x._ragged_idx) != (self.rank, self.dim) or x.shape[self.dim] != self.size:
                raise RuntimeError(
                    f"{function}: expected {other} to have the ragged structure of {name}, shape {_shown(like)}, got shape "
                    f"{_shown(x)}; torch.nested.nested_tensor_from_jagged(values, {name}.offsets()) has it"
                )
        for other, tensor in tensors.items():
            if not isinstance(tensor, NestedTensor) and not self._is_broadcast(tensor):
                raise RuntimeError(
                    f"{function}: expected {other} to broadcast with the shape {_shown(like)} of {name}, with size 1 in the "
                    f"ragged dimension, got shape {_shown(tensor)}"
                )
        self._like = like

    def _full(self, dense: Tensor) -> Tensor:
        """The tensor with ones in front, as broadcasting sees it."""
        return dense.reshape((1,) * (self.rank - dense.dim()) + dense.shape)

    def _is_broadcast(self, dense: Tensor) -> bool:
        if dense.dim() > self.rank:
            return False
        shape = self._full(dense).shape
        return shape[self.dim] == 1 and (shape[0] == 1 or shape[0] == self.batch)

    def is_by_sequence(self, x: Tensor) -> bool:
        """Whether x is dense and has its own numbers for each sequence."""
        return not isinstance(x, NestedTensor) and self._full(x).shape[0] != 1

    def _sequence_of_row(self) -> Tensor:
        sequences = torch.arange(self.batch, device=self.offsets.device)
        return torch.repeat_interleave(sequences, self.offsets.diff(), output_size=self.rows)

    def packed(self, x: Tensor) -> Tensor:
        """The packed rows: dimension d of the jagged tensor, except the batch, becomes dimension d - 1."""
        if isinstance(x, NestedTensor):
            return x._values
        if x.dim() == 0:  # stays 0-dim, so that it does not take part in promotion
            return x
        if not self.is_by_sequence(x):
            return self._full(x).squeeze(0)
        by_sequence = self._full(x).squeeze(self.dim).movedim(0, self.dim - 1)
        return by_sequence.index_select(self.dim - 1, self._sequence_of_row())

    def jagged(self, values: Tensor, ragged_dim: int) -> Tensor:
        return NestedTensor(values, offsets=self.offsets, _ragged_idx=ragged_dim, _metadata_cache=self.cache)

    def _longest(self) -> int:
        if self._like._maybe_max_seqlen is None and is_fake(self.offsets):
            return self.rows  # unknown while a graph is traced
        return self._like._get_max_seqlen() if self.batch else 0

    def _places(self) -> Tensor:
        """The positions in a sequence: [1, longest]."""
        return torch.arange(self._longest(), device=self.offsets.device).unsqueeze(0)

    def mask(self, x: NestedTensor) -> Tensor:
        """True where a sequence has a row, false in its padding: [B, longest], with ones for the other dimensions of x."""
        mask, dim = self._places() < self.offsets.diff().unsqueeze(1), x._ragged_idx
        return mask.reshape(self.batch, *(1,) * (dim - 1), mask.shape[1], *(1,) * (x.dim() - dim - 1))

    def padded(self, x: Tensor) -> Tensor:
        """The padded tensor. Padding repeats the last row of a sequence."""
        if not isinstance(x, NestedTensor):
            return x
        rows = self.offsets[:-1].unsqueeze(1) + self._places()
        rows = rows.minimum(self.offsets[1:].unsqueeze(1) - 1).clamp_min(0)
        dim = x._ragged_idx - 1
        padded: Tensor = x._values.index_select(dim, rows.flatten()).unflatten(dim, rows.shape)
        return padded.movedim(dim, 0)

    def masked(self, x: Tensor) -> Tensor:
        """The tensor padded with zeros. A gradient may have fewer dimensions than the inputs."""
        if isinstance(x, NestedTensor):
            return torch.where(self.mask(x), self.padded(x), x._values.new_zeros(()))
        return x

    def weight(self, weight: Tensor | None) -> Tensor:
        """The weight, padded, with zeros in the padding; a mask if there is none."""
        if weight is None or isinstance(weight, NestedTensor):
            return self.mask(self._like) if weight is None else self.masked(weight)
        return torch.where(self.mask(self._like), weight, weight.new_zeros(()))

    def unpadded(self, padded: Tensor) -> Tensor:
        """The packed rows of a padded tensor."""
        sequence = self._sequence_of_row()
        place = torch.arange(self.rows, device=sequence.device) - self.offsets[sequence]
        width = padded.shape[self.dim]
        flat = padded.movedim(0, self.dim - 1).flatten(self.dim - 1, self.dim)
        return flat.index_select(self.dim - 1, sequence * width + place)


def _shown(x: Tensor) -> str:
    return f"[{', '.join(str(size) for size in x.shape)}]"


@dataclass
class _Call:
    """One call of an operator: its arguments by name, its inputs, and their ragged structure."""

    function: str
    given: dict[str, Any]
    inputs: list[str]

    def __post_init__(self) -> None:
        tensors = self.present([*self.inputs, "weight"])
        self.reduction: str = self.given.get("reduction", "none")
        self.keepdim: bool = self.given.get("keepdim", False)
        if self.reduction == "none" and "grad_output" in self.given:
            # It has the structure where an input that is broadcast has none.
            tensors["grad_output"] = self.given["grad_output"]
        elif not any(isinstance(tensors[name], NestedTensor) for name in tensors if name != "weight"):
            shape = torch.broadcast_shapes(*(x.shape for name, x in tensors.items() if name != "weight"))
            raise RuntimeError(
                f"{self.function}: expected weight to expand to the shape {list(shape)} of the terms, "
                f"got shape {_shown(tensors['weight'])}"
            )
        self.ragged = _Ragged(self.function, tensors)
        self.reduced = reduced_dims(self.function, self.reduction, self.given.get("dim"), self.ragged.rank)
        self.is_ragged_reduced = self.ragged.dim in self.reduced
        self.is_by_sequence = self.is_ragged_reduced and 0 not in self.reduced
        if 0 in self.reduced and not self.is_ragged_reduced:
            raise NotImplementedError(
                f"{self.function}: expected dim to have the ragged dimension {self.ragged.dim} where it has dimension 0, "
                f"got {self.given['dim']}"
            )

    def present(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self.given[name] for name in names if self.given.get(name) is not None}

    def padded(self) -> dict[str, Any]:
        """The arguments of the same call on padded tensors."""
        tensors = {name: self.ragged.padded(x) for name, x in self.present(self.inputs).items()}
        tensors |= {name: self.ragged.masked(x) for name, x in self.present(["grad_output"]).items()}
        weight = {"weight": self.ragged.weight(self.given["weight"])} if "weight" in self.given else {}
        return {**self.given, **tensors, **weight}

    def packed(self) -> dict[str, Any]:
        """The arguments of the call on packed tensors, in which batchmean is still a sum."""
        tensors = {name: self.ragged.packed(x) for name, x in self.present([*self.inputs, "weight"]).items()}
        how: dict[str, Any] = {}
        if self.reduction == "batchmean":
            how = {"reduction": "sum"}
        elif self.reduced:
            how = {"dim": [dim - 1 for dim in self.reduced if dim > 0]}
        return {**self.given, **tensors, **how}


def _forward(op: Callable[..., Tensor], call: _Call) -> Tensor:
    given, ragged, tensors = call.given, call.ragged, list(call.present([*call.inputs, "weight"]).values())
    dtype = given["dtype"] or result_dtype(tensors)
    if call.is_by_sequence:
        return op(**{**call.padded(), "dtype": dtype})
    if not call.is_ragged_reduced:
        before = sum(dim < ragged.dim for dim in call.reduced)
        return ragged.jagged(op(**call.packed()), ragged.dim - (0 if call.keepdim else before))
    if call.reduction == "batchmean":
        wide = torch.float64 if dtype == torch.float64 else arithmetic_dtype(tensors)
        result = divided(op(**{**call.packed(), "dtype": wide}), ragged.batch).to(dtype)
    else:
        result = op(**call.packed())
    return result.unsqueeze(0) if call.keepdim else result


def _backward(op: Callable[..., Any], call: _Call) -> list[Tensor | None]:
    """Makes up to two calls: gradients that need the sequences apart come from padded tensors, all others from packed ones."""
    _check_grad_output(call)
    ragged, mask = call.ragged, call.given["output_mask"]
    inputs = [x if is_wanted else None for x, is_wanted in zip((call.given[name] for name in call.inputs), mask)]
    apart = [x is not None and (call.is_by_sequence or ragged.is_by_sequence(x)) for x in inputs]
    together = [x is not None and not is_apart for x, is_apart in zip(inputs, apart)]
    gradients: list[Tensor | None] = [None] * len(inputs)
    if any(apart):
        found = op(**{**call.padded(), "output_mask": apart})
        for i, x in enumerate(inputs):
            if x is not None and apart[i]:
                is_jagged = isinstance(x, NestedTensor)
                gradients[i] = ragged.jagged(ragged.unpadded(found[i]), ragged.dim) if is_jagged else found[i]
    if any(together):
        found = op(**{**call.packed(), "output_mask": together, "grad_output": _packed_grad_output(call)})
        for i, x in enumerate(inputs):
            if x is not None and together[i]:
                is_jagged = isinstance(x, NestedTensor)
                gradients[i] = ragged.jagged(found[i], ragged.dim) if is_jagged else found[i].reshape(x.shape)
    return gradients


def _check_grad_output(call: _Call) -> None:
    grad_output = call.given["grad_output"]
    is_jagged = isinstance(grad_output, NestedTensor)
    if is_jagged == call.is_ragged_reduced or (is_jagged and grad_output.shape[grad_output._ragged_idx] != call.ragged.size):
        expected = "a strided tensor" if call.is_ragged_reduced else f"jagged with the ragged size {call.ragged.size}"
        raise RuntimeError(f"{call.function}: expected grad_output to be {expected}, got shape {_shown(grad_output)}")


def _packed_grad_output(call: _Call) -> Tensor:
    grad_output: Tensor = call.given["grad_output"]
    if isinstance(grad_output, NestedTensor):
        return grad_output._values
    if call.keepdim:
        grad_output = grad_output.squeeze(0)
    if call.reduction == "batchmean":
        dtype = arithmetic_dtype([grad_output, *call.present(call.inputs).values()])
        grad_output = divided(grad_output.to(dtype), call.ragged.batch)
    return grad_output


def _rule(operator: Operator, op: OpOverload) -> Callable[..., Any]:
    """The function that torch calls, below autograd, if an argument is jagged."""
    function = op._schema.name.partition("::")[2]
    inputs = list(operator.inputs)
    places = [argument.name for argument in op._schema.arguments if argument.alias_info is not None]

    def rule(cls: Any, func: OpOverload, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        given = {**defaults_of(op), **dict(zip(names_of(op), args)), **kwargs}
        if "grad_output" not in given:
            return _forward(op, _Call(function, given, inputs))
        if not places:
            return tuple(_backward(op, _Call(function, given, inputs)))
        written = [given.pop(place) for place in places]
        given["output_mask"] = [place is not None for place in written]
        gradients = _backward(operator.backward, _Call(function, given, inputs))
        for place, gradient in zip(written, gradients):
            if place is not None:
                place.copy_(gradient)
        return None

    return rule


for _operator in OPERATORS:
    for _op in (_operator.forward, _operator.backward, _operator.backward_out):
        torch.library.register_torch_dispatch(_op, NestedTensor, _rule(_operator, _op))
