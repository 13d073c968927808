"""Sharded calls as their tests see them: layouts on meshes of four ranks, plain torch in float64, and the comparison with it
that every rank makes."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kl_ext
from operators import REDUCING, named
from reduction_cases import REDUCTIONS

COUNT = 4  # of ranks: enough for shards that are empty and for a mesh of two dimensions that both matter

# In units of 2^-23, for float32 and at most 1e3 terms: 4.5 of a term, 10.5 of their sum, 1 each of its weight, of a division
# and of a rounding, 2 of the sum of the ranks' parts. A gradient has 9 where a term has 4.5, of the larger of its two terms.
VALUE, GRADIENT = 20 * 2.0**-23, 24.5 * 2.0**-23

# A layout: the mesh, and shape and placements of each argument. R: replicated, S0: sharded along dimension 0, P: partial; one
# for each dimension of the mesh. Of four ranks the last has nothing of 5 or 3 rows.
Layout = tuple[tuple[int, ...], dict[str, tuple[tuple[int, ...], str]]]
TERMS = (5, 3, 8)


def of_p(mesh: tuple[int, ...], placements: str, other: str | None = None) -> Layout:
    return mesh, {"p": (TERMS, placements), "log p": (TERMS, other or placements)}


def of_pair(mesh: tuple[int, ...], placements: str, shape: tuple[int, ...], q: str, other: str | None = None) -> Layout:
    return mesh, {**of_p(mesh, placements)[1], "q": (shape, q), "log q": (shape, other or q)}


SINGLE: dict[str, Layout] = {
    "replicated": of_p((4,), "R"),
    "sharded along 0": of_p((4,), "S0"),
    "sharded along 1": of_p((4,), "S1"),
    "sharded along 2": of_p((4,), "S2"),
    "sharded each its way": of_p((4,), "S0", "S2"),
    "one partial": of_p((4,), "S1", "P"),
    "both partial": of_p((4,), "P"),
    "two dimensions of the mesh": of_p((2, 2), "S0 S2"),
    "one dimension sharded twice": of_p((2, 2), "S0 S0"),
    "mixed": of_p((2, 2), "R S1", "S2 P"),
}
PAIR: dict[str, Layout] = {
    "prior as p": of_pair((4,), "S0", TERMS, "S0"),
    "prior replicated": of_pair((4,), "S0", TERMS, "R"),
    "prior [D] replicated": of_pair((4,), "S0", (8,), "R"),
    "prior [D] sharded as p": of_pair((4,), "S2", (8,), "S0"),
    "prior [D] sharded otherwise": of_pair((4,), "S0", (8,), "S0"),
    "prior [D] partial": of_pair((4,), "S1", (8,), "P", "R"),
    "prior of one row, sharded along it": of_pair((4,), "S0", (1, 1, 8), "S0"),
    "prior of the middle": of_pair((4,), "S0", (5, 1, 8), "S0", "S2"),
    "prior of scalars": of_pair((4,), "S1", (), "R"),
    "prior is the largest": ((4,), {"p": ((8,), "S0"), "log p": ((), "R"), "q": (TERMS, "S0"), "log q": ((3, 1), "S0")}),
    "prior on a mesh of two": of_pair((2, 2), "S0 S2", (8,), "R S0", "S0 R"),
    "prior sharded twice": of_pair((2, 2), "S0 S0", TERMS, "S0 R", "R S0"),
    "prior mixed": of_pair((2, 2), "R S0", (3, 1), "S0 P", "R R"),
}
WEIGHTS: dict[str, tuple[tuple[int, ...], str]] = {
    "of each term": (TERMS, "S0"),
    "of each row": ((5, 1, 1), "S0"),
    "of each row, replicated": ((5, 1, 1), "R"),
    "of each column": ((8,), "S0"),
    "of the middle": ((1, 3, 1), "S1"),
    "a number": ((), "R"),
}

KINDS = ("none", "sum of 0", "mean", "mean of 0 and 1, kept", "batchmean")
each_kind = pytest.mark.parametrize("how", [REDUCTIONS[kind] for kind in KINDS], ids=KINDS)

each_reducing_name = pytest.mark.parametrize("name", [operator.name for operator in REDUCING])


# What plain torch has.


def reduced(terms: Tensor, weight: Tensor | None, reduction: str = "none", dim: Any = None, keepdim: bool = False) -> Tensor:
    weight = torch.ones_like(terms) if weight is None else weight.to(terms.dtype).expand_as(terms)
    terms = terms * weight
    if reduction == "none":
        return terms
    dims = tuple(range(terms.dim())) if dim is None else dim
    total = terms.sum(dims, keepdim)
    if reduction == "mean":
        return total / weight.sum(dims, keepdim)
    return total / terms.shape[0] if reduction == "batchmean" else total


# What every rank does.


@functools.cache
def mesh_of(shape: tuple[int, ...]) -> Any:
    from torch.distributed.tensor import init_device_mesh

    return init_device_mesh("cpu", shape)


def placed(whole: Tensor, mesh: Any, placements: str) -> Any:
    """The tensor on the mesh. A partial one has all its numbers on one rank and zeros on the others."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    letters = placements.split()
    shards = [Shard(int(letter[1:])) if letter.startswith("S") else Replicate() for letter in letters]
    local = distribute_tensor(whole, mesh, shards, src_data_rank=None).to_local()
    partial = [index for index, letter in enumerate(letters) if letter == "P"]
    if any(mesh.get_coordinate()[index] for index in partial):
        local = torch.zeros_like(local)
    shards = [Partial() if letter == "P" else shard for letter, shard in zip(letters, shards, strict=True)]
    return DTensor.from_local(local, mesh, shards, shape=whole.shape, stride=whole.stride())


def random_inputs(name: str, layout: Layout, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    whole = {key: torch.rand(shape) * 4 - 2 for key, (shape, _) in layout[1].items()}
    return {key: named(name).suited(i, x).to(dtype) for i, (key, x) in enumerate(whole.items())}


def sharded(name: str, layout: Layout, whole: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments by their names."""
    mesh = mesh_of(layout[0])
    arguments = zip(named(name).arguments, whole.items(), strict=False)
    return {argument: placed(x, mesh, layout[1][key][1]).requires_grad_() for argument, (key, x) in arguments}


def random_weight(shape: tuple[int, ...], is_mask: bool) -> Tensor:
    """A fifth of its numbers is 0, but not all along any dimension."""
    chosen = (torch.arange(math.prod(shape)) % 5 != 1).view(shape)
    return chosen if is_mask else (torch.rand(shape) + 0.5) * chosen


def assert_close(got: Tensor, expected: Tensor, bound: Tensor) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected).abs()
    assert bool((error <= bound).all()), f"{error.max()} of {bound.max()}"


def check(
    name: str, layout: Layout, how: dict[str, Any], seed: int, weight: tuple[tuple[int, ...], str] | None = None
) -> tuple[str, list[str]]:
    """Value and gradients; returns their placements."""
    torch.manual_seed(seed)
    whole = random_inputs(name, layout)
    tensors = sharded(name, layout, whole)
    given, mask = {}, None
    if weight is not None:
        mask = random_weight(weight[0], is_mask=bool(seed % 2))
        if "dim" in how and weight[0] != TERMS:  # there would be means of nothing
            mask = torch.rand(weight[0]) + 0.5
        given = {"weight": placed(mask, mesh_of(layout[0]), weight[1])}
    result = getattr(kl_ext, name)(**tensors, **given, **how)
    grad_output = torch.rand(result.shape) + 0.5
    gradients = torch.autograd.grad(
        result, list(tensors.values()), placed(grad_output, result.device_mesh, "R " * mesh_of(layout[0]).ndim)
    )

    shape = torch.broadcast_shapes(*(x.shape for x in whole.values()))
    leaves = [x.double().expand(shape).clone().requires_grad_() for x in whole.values()]
    terms = named(name).terms(*leaves)
    expected = reduced(terms, mask, **how)
    assert_close(result.full_tensor().detach(), expected.detach(), VALUE * expected.detach())
    of_terms, *of_leaves = torch.autograd.grad(expected, [terms, *leaves], grad_output.double())
    for gradient, exact, x in zip(gradients, of_leaves, whole.values(), strict=True):
        scale = (exact.abs() + 4 * of_terms.abs()).sum_to_size(x.shape)
        assert_close(gradient.full_tensor(), exact.sum_to_size(x.shape), GRADIENT * scale)
    return str(result.placements), [str(gradient.placements) for gradient in gradients]
