"""A fixed set of more than a million numbers, and what the operators make of them: every dtype, weight, sum and gradient.

tests/values/every_kernel.cpp has the same set, and prints the same lines.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from operators import DTYPES, OPERATORS, Operator
from oracle import Array

# Of the lines: the same from every compiler, instruction set and device.
HASH = "122e237389474631"

TERMS = 5175
FLAT, LONG_ROWS, LONG_COLUMNS, PRIOR = (TERMS,), (5, 1035), (1035, 5), (45, 115)
SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -5e-324, 1e-40, 3e38, -3e38, 1e300, 88.8, -104.0, 709.9]
OF_ZEROS, OF_WEIGHTS, OF_GRADIENTS = 8, 9, 10  # streams of random numbers; those before are of inputs
RANGES = {"narrow": (-30.0, 20.0), "wide": (-math.inf, math.inf)}


def random_numbers(stream: int, count: int = TERMS) -> Array:
    """In (-1, 1): splitmix64 of the stream and the place."""
    z = (numpy.uint64(stream << 32) + numpy.arange(1, count + 1, dtype=numpy.uint64)) * numpy.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    z ^= z >> numpy.uint64(31)
    return (z.astype(numpy.int64) >> numpy.int64(11)) * 2.0**-52


def to_tensor(numbers: Array, dtype: torch.dtype) -> Tensor:
    """Rounded to float32 before a half type."""
    x = torch.from_numpy(numbers)
    return x if dtype == torch.float64 else x.float().to(dtype)


@dataclass(frozen=True)
class Call:
    """An operator with so many inputs, their dtype, a clamp, and a kind of weight."""

    operator: Operator
    count: int
    dtype: torch.dtype
    range: str
    weight_kind: str  # unweighted, weighted or masked

    def __str__(self) -> str:
        return f"{self.operator} {self.count} {name_of(self.dtype)} {self.range} {self.weight_kind}"

    @property
    def clamp(self) -> tuple[float, float]:
        return RANGES[self.range]

    def input(self, place: int, shape: Sequence[int], with_special: bool, dtype: torch.dtype | None = None) -> Tensor:
        """q in the last dimension alone, where the shape is that of the prior."""
        n = numpy.arange(TERMS)
        numbers = random_numbers(place)
        if self.operator.has_deviations and place % 2:
            numbers = numpy.ldexp(1.5 + 0.5 * numbers, 4 - n % 16 // 2)
        else:
            numbers = numpy.ldexp(numbers, 5 - n % 16)
        if with_special:
            numbers = numpy.where((n + 5 * place) % 23 == 0, numpy.array(SPECIAL)[n // 23 % len(SPECIAL)], numbers)
        if shape == PRIOR and place >= 2:
            numbers, shape = numbers[: PRIOR[1]], PRIOR[1:]
        return to_tensor(numbers, dtype or self.dtype).view(tuple(shape))

    def inputs(self, shape: Sequence[int], with_special: bool = False) -> list[Tensor]:
        return [self.input(place, shape, with_special) for place in range(self.count)]

    def weight(self, shape: Sequence[int]) -> Tensor | None:
        numbers = numpy.where(random_numbers(OF_ZEROS) < 0, 0.0, random_numbers(OF_WEIGHTS))
        weight = {"weighted": to_tensor(numbers, self.dtype), "masked": torch.from_numpy(numbers != 0)}.get(self.weight_kind)
        return None if weight is None else weight.view(tuple(shape))

    def grad_output(self, shape: Sequence[int]) -> Tensor:
        return to_tensor(random_numbers(OF_GRADIENTS), self.dtype).view(tuple(shape))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def calls() -> Iterator[Call]:
    for operator in OPERATORS:
        for count, dtype, (name, _) in itertools.product(operator.counts, DTYPES, RANGES.items()):
            for weight in ("unweighted", "weighted", "masked"):
                if (operator.bounds or name == "wide") and (operator.reduces or weight == "unweighted"):
                    yield Call(operator, count, dtype, name, weight)


def results(call: Call, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """What the operators give, by name."""
    operator = call.operator
    bounds = operator.taken(dict(zip(("clamp_min", "clamp_max"), call.clamp, strict=True)))

    def forward(inputs: list[Tensor], shape: Sequence[int], **how: Any) -> Tensor:
        weight = call.weight(shape)
        how |= {} if weight is None else {"weight": weight.to(device)}
        return operator.operator(*(x.to(device) for x in inputs), **bounds, **how)

    def backward(inputs: list[Tensor], shape: Sequence[int]) -> list[Tensor]:
        weight = call.weight(shape)
        moved = [x.to(device) for x in (call.grad_output(shape), *inputs)]
        return operator.backward(*moved, weight=None if weight is None else weight.to(device), **bounds)

    special = call.inputs(FLAT, with_special=True)
    yield "terms", forward(special, FLAT)
    yield from ((f"gradient{i}", x) for i, x in enumerate(backward(special, FLAT)))
    if operator.reduces:
        for name, shape, how in (
            ("sum", FLAT, {"reduction": "sum"}),
            ("sum0", LONG_COLUMNS, {"reduction": "sum", "dim": [0]}),
            ("sum1", LONG_ROWS, {"reduction": "sum", "dim": [1]}),
            ("batchmean", LONG_ROWS, {"reduction": "batchmean"}),
            ("mean1", LONG_ROWS, {"reduction": "mean", "dim": [1]}),
        ):
            yield name, forward(call.inputs(shape), shape, **how)
    if call.count == 4:
        prior = call.inputs(PRIOR)
        yield "prior_terms", forward(prior, PRIOR)
        yield from ((f"prior_gradient{i}", x) for i, x in enumerate(backward(prior, PRIOR)))
    if call.dtype == torch.float64 and call.weight_kind == "unweighted":
        for dtype in DTYPES[:3]:
            others = [call.input(place, FLAT, True, dtype) for place in range(1, call.count)]
            yield f"terms_with_{name_of(dtype)}", forward([special[0], *others], FLAT, dtype=dtype)


def checksum(x: Tensor) -> str:
    """Of the numbers in float64, where every NaN is one: processors differ in the bits of theirs."""
    x = x.detach().cpu().double().contiguous()
    return f"{zlib.crc32(torch.where(x.isnan(), math.nan, x).numpy().tobytes()):08x}"


def lines(device: torch.device) -> list[str]:
    return [f"{call} {name} {checksum(x)}" for call in calls() for name, x in results(call, device)]


def hash_of(some: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(some).encode()).hexdigest()[:16]
