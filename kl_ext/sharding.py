"""The operators on `torch.distributed.tensor.DTensor`, forward and backward.

Importing this module makes the operators take DTensors. `import kl_ext` does so where `torch.distributed.tensor` is loaded
before it, and so does the first call of a public function in a program that has loaded it later. ``import kl_ext.sharding`` is
needed in such a program before `torch.compile` and before calls of `torch.ops.kl_ext`. Loading `torch.distributed.tensor`
takes most of a second, which other programs need not pay.

Each tensor may have any placements, on a mesh of any number of dimensions; shards may be uneven or empty. Along each dimension
of the mesh the terms are sharded as most of the numbers are already, or replicated if none are. Only tensors that lie otherwise
are moved. A tensor that broadcasts along the sharded dimension is needed whole on every rank. Then

- terms, and reductions over dimensions that are not sharded, are sharded like the terms. They have the bits that they have
  without sharding.
- sums and means over a sharded dimension are ``Partial("sum")``, and so is the gradient of a tensor that broadcasts along one.
  ``"mean"`` and ``"batchmean"`` divide by what belongs to the whole tensors: the number of their terms, the sum of their
  weights, the size of their first dimension. Shards may be uneven, therefore. Of all this only the sum of the weights has to be
  communicated.
- each rank's part of such a sum is rounded to the dtype of the result, and torch adds the parts when the result is used, in an
  order of its own. Across shards sums therefore do not have the same bits as without sharding, or with other shards.

A tensor that is not a DTensor goes beside DTensors if it is a single number, expanded or not, or within
`torch.distributed.tensor.experimental.implicit_replication`. It has to be the same on every rank. Its gradient is no DTensor
either.

Example, on each rank:
    >>> from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    >>> mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    >>> mu = distribute_tensor(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), mesh, [Shard(0)])
    >>> kl_ext.gaussian_kl_div(mu, 0 * mu, reduction="batchmean").full_tensor()
    tensor(1.2500)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ._checks import common_shape, reduced_dims
from ._fake import arithmetic_dtype
from ._operators import OPERATORS

# Why these are rules of dispatch and not sharding strategies: torch does not redistribute a tensor that is given by keyword, as
# weights are; a strategy cannot divide by the global count; and the strategies' cache knows nothing of reduction and dim unless
# told. Here every call is looked at afresh.

# For each dimension of a tensor, the dimension of the terms that it runs along. None: it has one number for all of them.
Axes = Sequence[int | None]


class _Call:
    """A call of an operator or its backward, and how its terms are shared out among the ranks."""

    def __init__(self, operator: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.operator = operator
        self.function = operator._schema.name.removeprefix("kl_ext::")
        self.arguments = _by_name(operator, args, kwargs)
        given = {name: x for name, x in self.arguments.items() if isinstance(x, Tensor)}
        self.mesh = _common_mesh(self.function, given)
        self.tensors = {name: _as_dtensor(self.function, name, x, self.mesh) for name, x in given.items()}

        # The operator checks the whole of each tensor, and says what the whole results are.
        whole = _without_numbers(given)
        self.results = self.run({**self.arguments, **whole})

        self.reduction = self.arguments.get("reduction", "none")
        of_terms = {name: x for name, x in whole.items() if name != "grad_output" or self.reduction == "none"}
        self.shape = common_shape(self.function, of_terms)
        self.reduced = reduced_dims(self.function, self.reduction, self.arguments.get("dim"), len(self.shape))
        self.axes = {name: self._axes(x.shape) for name, x in of_terms.items()}
        if self.reduction != "none" and "grad_output" in whole:
            self.axes["grad_output"] = self.axes_of_reduced()
        self.sharded = [self._most_sharded(index) for index in range(self.mesh.ndim)]  # dimensions of the terms

    def _axes(self, shape: torch.Size) -> Axes:
        new = len(self.shape) - len(shape)
        return [dim if size == self.shape[dim] else None for dim, size in enumerate(shape, new)]

    def axes_of_reduced(self) -> Axes:
        """The axes of the terms after their reduction."""
        dims = range(len(self.shape))
        if self.arguments["keepdim"]:
            return [None if dim in self.reduced else dim for dim in dims]
        return [dim for dim in dims if dim not in self.reduced]

    def _most_sharded(self, mesh_dim: int) -> int | None:
        """The dimension of the terms along which most numbers are sharded already."""
        numbers: Counter[int] = Counter()
        for name, tensor in self.tensors.items():
            placement = tensor.placements[mesh_dim]
            # Not _StridedShard, a class of its own or derived: tensors beside it could not be cut in its way.
            axis = self.axes[name][placement.dim] if type(placement) is Shard else None
            if axis is not None:
                numbers[axis] += tensor.numel()
        return max(numbers, key=numbers.__getitem__, default=None)

    def _placements(self, axes: Axes, otherwise: Placement) -> list[Placement]:
        """The placements of a tensor with these axes; `otherwise` where the terms are sharded along a dimension it lacks."""
        return [Replicate() if dim is None else Shard(axes.index(dim)) if dim in axes else otherwise for dim in self.sharded]

    def is_split(self) -> bool:
        """Whether the terms of one sum lie on several ranks."""
        return any(dim in self.reduced for dim in self.sharded)

    def local(self) -> dict[str, Any]:
        """The arguments of this rank."""
        moved = {
            name: tensor.redistribute(self.mesh, self._placements(self.axes[name], Replicate())).to_local()
            for name, tensor in self.tensors.items()
        }
        return {**self.arguments, **moved}

    def run(self, arguments: Mapping[str, Any]) -> Any:
        """Calls the operator."""
        return _run(self.operator, arguments)

    def whole(self, local: Tensor, axes: Axes, like: Tensor) -> DTensor:
        """One tensor from the results of the ranks: their sum if it lacks the sharded dimension."""
        placements = self._placements(axes, Partial())
        return DTensor.from_local(local, self.mesh, placements, shape=like.shape, stride=like.stride())

    def divided(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """x divided as "mean" and "batchmean" divide the whole sum, given the weights of this rank."""
        if self.reduction == "batchmean":
            count = self.shape[0]
        else:
            axes = () if weight is None else self.axes["weight"]
            count = math.prod(self.shape[dim] for dim in self.reduced if dim not in axes)
        # A tensor, and rounded once, as the operators divide: by a number, torch multiplies with its reciprocal on a GPU.
        divisor = x.new_full((), count)
        if weight is not None and self.reduction == "mean":
            weights = divisor * self._sum_of_weights(weight, x.dtype)
            divisor = weights.masked_fill(weights == 0, math.nan)  # as the operators have it
        return x / divisor

    def _sum_of_weights(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum over those reduced dimensions that the whole weight has, in the shape of the result."""
        weight = weight.reshape((1,) * (len(self.shape) - weight.dim()) + weight.shape)
        total = weight.sum(list(self.reduced), keepdim=self.arguments["keepdim"], dtype=dtype)
        is_part = [dim in self.reduced and dim in self.axes["weight"] for dim in self.sharded]
        parts = DTensor.from_local(total, self.mesh, [Partial() if part else Replicate() for part in is_part])
        return parts.redistribute(self.mesh, [Replicate()] * self.mesh.ndim).to_local()


def _by_name(operator: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, defaults included."""
    arguments = {argument.name: argument.default_value for argument in operator._schema.arguments}
    arguments.update(zip(arguments, args), **kwargs)
    return arguments


def _run(operator: OpOverload, arguments: Mapping[str, Any]) -> Any:
    schema = operator._schema.arguments
    positional = [arguments[argument.name] for argument in schema if not argument.kwarg_only]
    return operator(*positional, **{argument.name: arguments[argument.name] for argument in schema if argument.kwarg_only})


def _without_numbers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same shapes, strides and dtypes on the meta device."""
    return {name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for name, x in tensors.items()}


def _common_mesh(function: str, tensors: Mapping[str, Tensor]) -> DeviceMesh:
    meshes = {name: x.device_mesh for name, x in tensors.items() if isinstance(x, DTensor)}
    first, mesh = next(iter(meshes.items()))
    for name, other in meshes.items():
        if other != mesh:
            raise RuntimeError(f"{function}: expected {name} on {mesh} like {first}, got {other}")
    return mesh


def _as_dtensor(function: str, name: str, tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    tensor = tensor.detach()  # autograd is above this; what moves a DTensor would record its steps all the same
    if isinstance(tensor, DTensor):
        return tensor
    is_number = not any(stride for size, stride in zip(tensor.shape, tensor.stride()) if size != 1)
    if not (is_number or DTensor._op_dispatcher._allow_implicit_replication):
        raise TypeError(f"{function}: expected {name} to be a DTensor like others, or a single number, got a plain tensor")
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim)


def _forward(cls: type, operator: OpOverload, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> DTensor:
    """Each rank reduces its own terms. Where those of one mean lie on several ranks, it sums them and divides by all."""
    call = _Call(operator, args, kwargs)
    arguments, meta = call.local(), call.results
    if call.reduction == "none":
        axes: Axes = list(range(len(call.shape)))
    else:
        axes = call.axes_of_reduced()
    if call.is_split() and call.reduction != "sum":
        wide = arithmetic_dtype([meta, *call.tensors.values()])
        sums = call.run({**arguments, "reduction": "sum", "dim": call.reduced, "dtype": wide})
        local = call.divided(sums, arguments.get("weight")).to(meta.dtype)
    else:
        local = call.run(arguments)
    return call.whole(local, axes, meta)


def _backward(
    cls: type, operator: OpOverload, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor | None, ...]:
    """Each rank has the gradients of its own terms; those of a tensor that several ranks share are to be added up."""
    call = _Call(operator, args, kwargs)
    arguments = call.local()
    if call.is_split() and call.reduction != "sum":
        grad = arguments["grad_output"].to(arithmetic_dtype(list(call.tensors.values())))
        arguments["grad_output"] = call.divided(grad, arguments.get("weight"))
        arguments.update(reduction="sum", dim=call.reduced)
    gradients: list[Tensor | None] = []
    for name, local, meta in zip(_inputs(operator), call.run(arguments), call.results, strict=True):
        if local is None:
            gradients.append(None)
            continue
        gradient = call.whole(local, call.axes[name], meta)
        gradients.append(gradient if isinstance(call.arguments[name], DTensor) else gradient.full_tensor())
    return tuple(gradients)


def _backward_out(cls: type, operator: OpOverload, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Computes the gradients and copies them, sharded like the tensors that they are written to."""
    arguments = _by_name(operator, args, kwargs)
    backward = getattr(torch.ops.kl_ext, operator._schema.name.removeprefix("kl_ext::")).default
    whole = _without_numbers({name: x for name, x in arguments.items() if isinstance(x, Tensor)})
    _run(operator, {**arguments, **whole})  # its checks
    given = [arguments.pop(f"grad_{name}") for name in _inputs(backward)]
    gradients = _run(backward, {**arguments, "output_mask": [x is not None for x in given]})
    for x, gradient in zip(given, gradients, strict=True):
        if x is not None:
            x.copy_(gradient.redistribute(x.device_mesh, x.placements) if isinstance(x, DTensor) else gradient)


def _inputs(backward: OpOverload) -> tuple[str, ...]:
    """The tensors by which a backward operator differentiates, in the order of its results."""
    return next(operator.inputs for operator in OPERATORS if operator.backward is backward)


for _operator in OPERATORS:
    torch.library.register_torch_dispatch(_operator.forward, DTensor, _forward)
    torch.library.register_torch_dispatch(_operator.backward, DTensor, _backward)
    torch.library.register_torch_dispatch(_operator.backward_out, DTensor, _backward_out)
