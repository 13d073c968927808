"""The operators that write gradients where they are told: what they write, and what they refuse to write to, as torch.add(out=)
refuses it: real, meta and fake tensors alike."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kl_ext import _bindings
from operators import OPERATORS, named
from oracle import same_bits

INPUTS = {operator.name: operator.arguments for operator in OPERATORS}
HOWS = {None: ("none", None), "sum": ("sum", None), "mean of rows": ("mean", [1])}
each_operator = pytest.mark.parametrize("name", INPUTS)
each_reduction = pytest.mark.parametrize(
    ("name", "reduction"),
    [(operator.name, how) for operator in OPERATORS for how in HOWS if how is None or operator.reduces],
)


def rest(name: str, reduction: str | None = None) -> list[Any]:
    return [*named(name).bounds, *(HOWS[reduction] if named(name).reduces else ())]


def into(name: str, tensors: Sequence[Tensor], gradients: dict[str, Tensor], reduction: str | None = None) -> None:
    """tensors: grad_output and the inputs; gradients by the names of their inputs."""
    operator = getattr(torch.ops.kl_ext, f"{name}_backward").out
    given = {f"grad_{key}": gradients.get(key) for key in INPUTS[name]}
    assert operator(*tensors, *rest(name, reduction), **given) is None


def fresh(name: str, tensors: Sequence[Tensor], reduction: str | None = None) -> dict[str, Tensor]:
    """The gradients that the operator returns."""
    operator = getattr(torch.ops.kl_ext, f"{name}_backward").default
    keys = INPUTS[name]
    return dict(zip(keys, operator(*tensors, *rest(name, reduction), [True] * len(keys)), strict=True))


# Real tensors, and those without numbers, which are refused with the same words.
KINDS = {"real": (nullcontext, None), "meta": (nullcontext, "meta"), "fake": (FakeTensorMode, None)}


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, device: torch.device) -> Iterator[torch.device]:
    context, where = KINDS[request.param]
    with context():
        yield torch.device(where or device)


MODES = {"default": nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with MODES[request.param]():
        yield


def arguments(name: str, place: torch.device, shape: Sequence[int] = (4, 6)) -> list[Tensor]:
    drawn = [torch.randn(tuple(shape), device=place) for _ in range(1 + len(INPUTS[name]))]
    return [drawn[0], *(named(name).suited(i, x) for i, x in enumerate(drawn[1:]))]


def placed(base: Tensor, name: str, position: int, slices: tuple[Any, ...], place: torch.device) -> list[Tensor]:
    """The arguments, the one at this position being a part of base."""
    tensors = arguments(name, place)
    tensors[position] = base[slices]
    return tensors


# Two parts of one tensor, [4, 6] each, that share some of their numbers: rows that are dense, columns with gaps between them.
PARTLY = {
    "rows": ((6, 6), (slice(0, 4),), (slice(1, 5),)),
    "columns": ((4, 12), (slice(None), slice(0, 6)), (slice(None), slice(3, 9))),
    "steps": ((4, 13), (slice(None), slice(0, 12, 2)), (slice(None), slice(2, 13, 2))),
    "rows the other way": ((6, 6), (slice(2, 6),), (slice(0, 4),)),
}


@each_operator
@pytest.mark.parametrize("part", PARTLY)
def test_an_output_may_not_share_a_part_of_an_argument(name: str, part: str, place: torch.device, mode: None) -> None:
    shape, one, other = PARTLY[part]
    names = ["grad_output", *INPUTS[name]]
    for position, key in itertools.product(range(len(names)), INPUTS[name]):
        base = torch.randn(shape, device=place)
        message = f"{name}_backward: expected grad_{key} to be {names[position]} itself or to share no memory with it"
        with pytest.raises(RuntimeError, match=f"^{message}, got a partial overlap"):
            into(name, placed(base, name, position, one, place), {key: base[other]})


def test_torch_refuses_a_part_of_an_argument_too(device: torch.device) -> None:
    base = torch.randn(6, 6, device=device)
    with pytest.raises(RuntimeError, match="refer to a single memory location"):
        torch.add(base[:4], 1, out=base[1:5])


@each_operator
@pytest.mark.parametrize("part", [*PARTLY, "the same"])
def test_two_outputs_may_not_share_memory(name: str, part: str, place: torch.device, mode: None) -> None:
    shape, one, other = PARTLY.get(part, ((4, 6), (slice(None),), (slice(None),)))
    tensors = arguments(name, place)
    for first, second in itertools.combinations(INPUTS[name], 2):
        base = torch.randn(shape, device=place)
        message = f"{name}_backward: expected grad_{second} to share no memory with grad_{first}, got tensors that overlap"
        with pytest.raises(RuntimeError, match=f"^{message}"):
            into(name, tensors, {first: base[one], second: base[other]})


@each_operator
def test_two_halves_of_one_tensor_share_no_memory(name: str, device: torch.device) -> None:
    tensors = arguments(name, device)
    expected = fresh(name, tensors)
    for whole, dim in ((torch.empty(4, 12, device=device), 1), (torch.empty(8, 6, device=device), 0)):
        for first, second in itertools.combinations(INPUTS[name], 2):
            one, other = whole.chunk(2, dim)
            into(name, tensors, {first: one, second: other})
            assert same_bits(one, expected[first]) and same_bits(other, expected[second])
    interleaved = torch.empty(4, 12, device=device)
    first, second = INPUTS[name][:2]
    into(name, tensors, {first: interleaved[:, ::2], second: interleaved[:, 1::2]})
    assert same_bits(interleaved[:, ::2], expected[first]) and same_bits(interleaved[:, 1::2], expected[second])


@each_operator
def test_a_sum_may_not_be_written_over_what_it_is_a_sum_of(name: str, place: torch.device, mode: None) -> None:
    """The gradient of an input that is broadcast is read from while it is added up."""
    names = INPUTS[name]
    for position, key in enumerate(names):
        tensors = arguments(name, place)
        tensors[1 + position] = torch.randn(6, device=place)
        message = f"{name}_backward: expected grad_{key}, which is a sum, to share no memory with {key}, got the same memory"
        with pytest.raises(RuntimeError, match=f"^{message}"):
            into(name, tensors, {key: tensors[1 + position]})


@each_reduction
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(4, 6), (3, 1000)], ids=str)
def test_an_output_may_be_an_argument_itself(
    name: str, reduction: str | None, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """As torch.add(x, y, out=x): each input in turn, all at once, and grad_output where it has that shape."""
    drawn = [x.to(dtype) for x in arguments(name, device, shape)]
    if reduction is not None:
        drawn[0] = drawn[0].sum() if reduction == "sum" else drawn[0][:, 0].clone()
    expected = fresh(name, drawn, reduction)
    names = INPUTS[name]
    for chosen in [*([key] for key in names), names, names[::-1]]:
        tensors = [x.clone() for x in drawn]
        given = {key: tensors[1 + names.index(other)] for key, other in zip(names, chosen, strict=False)}
        into(name, tensors, given, reduction)
        assert all(same_bits(gradient, expected[key]) for key, gradient in given.items())
    if reduction is None:
        for key in names:
            tensors = [x.clone() for x in drawn]
            into(name, tensors, {key: tensors[0]})
            assert same_bits(tensors[0], expected[key])


def negative(like: Tensor) -> Tensor:
    """A tensor that holds its numbers negated, with the bit that says so."""
    view = torch.view_as_complex(torch.stack([torch.zeros_like(like), -like], -1)).conj().imag
    assert view.is_neg() and torch.equal(view, like)
    return view


@each_reduction
def test_outputs_and_arguments_may_have_the_negative_bit(name: str, reduction: str | None, device: torch.device) -> None:
    tensors = arguments(name, device)
    if reduction is not None:
        tensors[0] = tensors[0].sum() if reduction == "sum" else tensors[0][:, 0].clone()
    expected = fresh(name, tensors, reduction)
    outputs = {key: negative(torch.randn(4, 6, device=device)) for key in INPUTS[name]}
    into(name, tensors, outputs, reduction)
    assert all(torch.equal(outputs[key], expected[key]) and outputs[key].is_neg() for key in outputs)
    plain = {key: torch.empty(4, 6, device=device) for key in INPUTS[name]}
    into(name, [negative(x) for x in tensors], plain, reduction)
    assert all(same_bits(plain[key], expected[key]) for key in plain)
    mixed = {key: x if i % 2 else negative(x) for i, (key, x) in enumerate(plain.items())}
    into(name, [x if i % 2 else negative(x) for i, x in enumerate(tensors)], mixed, reduction)
    assert all(torch.equal(mixed[key], expected[key]) for key in mixed)


@each_operator
def test_two_outputs_with_the_negative_bit_may_not_share_memory(name: str, device: torch.device) -> None:
    first, second = INPUTS[name][:2]
    output = negative(torch.randn(4, 6, device=device))
    with pytest.raises(RuntimeError, match=f"^{name}_backward: expected grad_{second} to share no memory with grad_{first}"):
        into(name, arguments(name, device), {first: output, second: output})


@each_operator
def test_every_output_is_on_the_device_of_its_input(name: str, place: torch.device, mode: None) -> None:
    """Beside outputs that are, and for all arguments on the meta device."""
    other = torch.device("meta" if place.type != "meta" else "cpu")
    tensors = arguments(name, place)
    for key in INPUTS[name]:
        outputs = {other_key: torch.empty(4, 6, device=place) for other_key in INPUTS[name]}
        outputs[key] = torch.empty(4, 6, device=other)
        with pytest.raises(
            RuntimeError, match=f"^{name}_backward: expected grad_{key} on {place.type}.* like {key}, got {other}"
        ):
            into(name, tensors, outputs)


@each_operator
def test_every_output_has_the_dtype_and_the_shape_of_its_input(name: str, place: torch.device, mode: None) -> None:
    tensors = arguments(name, place)
    for key in INPUTS[name]:
        with pytest.raises(TypeError, match=f"^{name}_backward: expected grad_{key} to be float32 like {key}, got float64"):
            into(name, tensors, {key: torch.empty(4, 6, device=place, dtype=torch.float64)})
        with pytest.raises(
            RuntimeError, match=rf"^{name}_backward: expected grad_{key} of shape \[4, 6\] like {key}, got shape \[6\]"
        ):
            into(name, tensors, {key: torch.empty(6, device=place)})
        with pytest.raises(
            RuntimeError, match="more than one element of the written-to tensor refers to a single memory location"
        ):
            into(name, tensors, {key: torch.empty(6, device=place).expand(4, 6)})


@each_reduction
def test_outputs_that_fit_are_taken_without_numbers_too(
    name: str, reduction: str | None, place: torch.device, mode: None
) -> None:
    tensors = arguments(name, place)
    if reduction is not None:
        tensors[0] = tensors[0].sum() if reduction == "sum" else tensors[0][:, 0].clone()
    into(name, tensors, {key: torch.empty(4, 6, device=place) for key in INPUTS[name]}, reduction)
    into(name, tensors, {INPUTS[name][0]: tensors[1]}, reduction)
    into(name, tensors, {}, reduction)


# Which memory two tensors share, against a count of their bytes.


def bytes_of(sizes: Sequence[int], strides: Sequence[int], offset: int, itemsize: int) -> list[int]:
    starts = [
        itemsize * (offset + sum(i * stride for i, stride in zip(index, strides, strict=True)))
        for index in itertools.product(*map(range, sizes))
    ]
    return [start + byte for start in starts for byte in range(itemsize)]


def overlap_by_counting(a: tuple[Any, ...], b: tuple[Any, ...]) -> int:
    one, other = bytes_of(*a), bytes_of(*b)
    if not set(one) & set(other):
        return 0
    return 1 if a[0] == b[0] and one == other and len(set(one)) == len(one) else 2


def drawn_placement(draw: random.Random) -> tuple[Any, ...]:
    rank = draw.randrange(4)
    sizes = tuple(draw.choice([0, 1, 1, 2, 3, 4]) if draw.random() < 0.1 else draw.randrange(1, 5) for _ in range(rank))
    strides = tuple(draw.choice([0, 1, 2, 3, 4, 5, 6, 8, 12, 16]) for _ in range(rank))
    return sizes, strides, draw.randrange(24), draw.choice([2, 4, 8])


def test_shared_memory_is_found_exactly() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    found = {0: 0, 1: 0, 2: 0}
    for _ in range(6000):
        a = drawn_placement(draw)
        b = draw.choice([a, drawn_placement(draw), (*a[:2], draw.randrange(24), a[3])])
        expected = overlap_by_counting(a, b)
        # A tensor that holds one number in two places is not the same as itself, number by number, where that is by stride 0.
        actual = _bindings.overlap(*a, *b)
        assert bool(actual) == bool(expected), (a, b)
        if len(set(bytes_of(*a))) == len(bytes_of(*a)):
            assert actual == expected, (a, b)
        found[actual] += 1
    assert min(found.values()) > 100


FULL: Callable[..., int] = _bindings.overlap


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (((1000, 512), (1024, 1), 0, 4), ((1000, 512), (1024, 1), 512, 4), 0),
        (((1000, 512), (1024, 1), 0, 4), ((1000, 512), (1024, 1), 511, 4), 2),
        (((1000, 512), (1024, 2), 0, 4), ((1000, 512), (1024, 2), 1, 4), 0),
        (((64, 64, 64), (8192, 128, 1), 0, 2), ((64, 64, 64), (8192, 128, 1), 64, 2), 0),
        (((1 << 40,), (1,), 0, 4), ((1 << 40,), (1,), 1 << 40, 4), 0),
        (((1 << 40,), (1,), 0, 4), ((1 << 40,), (1,), (1 << 40) - 1, 4), 2),
    ],
    ids=str,
)
def test_large_tensors_are_compared_without_counting(a: Any, b: Any, expected: int) -> None:
    assert FULL(*a, *b) == FULL(*b, *a) == expected
