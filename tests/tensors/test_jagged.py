"""Jagged nested tensors: values, gradients and reductions are those of the sequences one by one, in plain torch and float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import kl_ext
from operators import CLOSE, ELEMENTWISE, GAUSSIAN, HALF_TYPES, OPERATORS, REDUCING, named
from oracle import same_bits

LENGTHS = (3, 0, 5, 1)
BATCH, ROWS, WIDTH = len(LENGTHS), sum(LENGTHS), 4
OFFSETS = torch.tensor([0, *itertools.accumulate(LENGTHS)])


def jagged(values: Tensor, like: Tensor | None = None, ragged_dim: int = 1) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, OFFSETS if like is None else like.offsets(), jagged_dim=ragged_dim)


ELEMENTWISE_COUNTS = [(operator.name, count) for operator in ELEMENTWISE for count in operator.counts]
REDUCED_COUNTS = [(operator.name, count) for operator in REDUCING for count in operator.counts]

Shape = tuple[int, ...] | str


def input_of(shape: Shape, is_positive: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
    """A leaf, of the values where it is jagged."""
    x = torch.rand((ROWS, *({"jagged": (WIDTH,), "narrow": (1,)}[shape])) if isinstance(shape, str) else shape) * 4 - 2
    return (x.abs() + 0.5 if is_positive else x).to(dtype).requires_grad_()


def inputs_of(name: str, shapes: Sequence[Shape], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [input_of(shape, named(name).has_deviations and i % 2 == 1, dtype) for i, shape in enumerate(shapes)]


def as_given(leaves: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
    """All jagged ones of one structure."""
    return [jagged(leaf) if isinstance(shape, str) else leaf for leaf, shape in zip(leaves, shapes, strict=True)]


def sequence(leaf: Tensor, shape: Shape, index: int) -> Tensor:
    """[length, width] or broadcast with it."""
    if isinstance(shape, str):
        return leaf[OFFSETS[index] : OFFSETS[index + 1]]
    return leaf[index if leaf.shape[0] > 1 else 0] if leaf.dim() == 3 else leaf


def expected(
    name: str,
    leaves: Sequence[Tensor],
    shapes: Sequence[Shape],
    weight: Tensor | None = None,
    weight_shape: Shape = (),
    reduction: str = "none",
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
) -> Tensor:
    """Sequence by sequence; the values of the result where that is jagged."""
    leaves = [leaf.double() for leaf in leaves]
    terms, weights = [], []
    for index in range(BATCH):
        rows = [sequence(leaf, shape, index) for leaf, shape in zip(leaves, shapes, strict=True)]
        t = named(name).terms(*rows).expand(LENGTHS[index], WIDTH)
        w = torch.ones(()) if weight is None else sequence(weight, weight_shape, index)
        w = w.double().expand_as(t)
        weights.append(w)
        terms.append(torch.where(w == 0, 0, t) * w)
    dims = (dim,) if isinstance(dim, int) else tuple(dim or (0, 1, 2))
    reduced = {d % 3 for d in dims}
    if reduction == "none":
        return torch.cat(terms)
    if 0 in reduced:
        terms, weights = [torch.cat(terms)], [torch.cat(weights)]
    inside = [d - 1 for d in sorted(reduced - {0})]
    sums = [t.sum(inside, keepdim) for t in terms]
    if reduction == "mean":
        sums = [s / w.sum(inside, keepdim) for s, w in zip(sums, weights, strict=True)]
    if 0 in reduced:
        result = sums[0] / BATCH if reduction == "batchmean" else sums[0]
        return result.unsqueeze(0) if keepdim else result
    return torch.stack(sums) if 1 in reduced else torch.cat(sums)


def values_of(x: Tensor) -> Tensor:
    return x.values() if x.is_nested else x


def check(
    name: str, shapes: Sequence[Shape], weight_shape: Shape | None = None, weight: Tensor | None = None, **how: Any
) -> None:
    """Value and gradients."""
    leaves = inputs_of(name, shapes)
    extra: dict[str, Any] = {}
    if weight_shape is not None:
        weight = torch.rand(input_of(weight_shape).shape).double() if weight is None else weight
        weight = torch.where(torch.rand(weight.shape) < 0.3, torch.zeros((), dtype=weight.dtype), weight)
        extra["weight"] = as_given([weight], [weight_shape])[0]
    actual = getattr(kl_ext, name)(*as_given(leaves, shapes), **extra, **how)
    wanted = expected(name, leaves, shapes, weight, weight_shape or (), **how)
    assert values_of(actual).shape == wanted.shape
    torch.testing.assert_close(values_of(actual), wanted, equal_nan=True, **CLOSE)
    grad = torch.randn_like(wanted)
    found = torch.autograd.grad(actual, leaves, jagged(grad, actual) if actual.is_nested else grad)
    for x, y in zip(found, torch.autograd.grad(wanted, leaves, grad), strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x, y, equal_nan=True, **CLOSE)


PRIORS: list[tuple[Shape, ...]] = [
    ("jagged", "jagged"),
    ("narrow", "jagged"),
    ((WIDTH,), (WIDTH,)),
    ((1, 1, WIDTH), ()),
    ((BATCH, 1, WIDTH), (WIDTH,)),
    ((BATCH, 1, 1), (BATCH, 1, WIDTH)),
    ("jagged", (BATCH, 1, WIDTH)),
]
each_prior = pytest.mark.parametrize("prior", PRIORS, ids=str)


@each_prior
def test_the_documented_losses(prior: tuple[Shape, ...]) -> None:
    check("kl_div_single_loss", ("jagged", prior[1]))
    check("kl_div_single_loss", (prior[0], "jagged"))
    check("kl_div_pair_loss", ("jagged", "jagged", *prior))
    check("kl_div_pair_loss", (*prior, "jagged", "jagged"))


HOW: dict[str, dict[str, Any]] = {
    "none": {},
    "sum": {"reduction": "sum"},
    "mean": {"reduction": "mean"},
    "batchmean": {"reduction": "batchmean"},
    "sum of rows": {"reduction": "sum", "dim": -1},
    "mean of rows": {"reduction": "mean", "dim": (2,)},
    "over batch and ragged": {"reduction": "sum", "dim": (1, 0)},
    "mean over batch and ragged": {"reduction": "mean", "dim": (0, -2)},
}
BY_SEQUENCE: dict[str, dict[str, Any]] = {
    "sum of sequences": {"reduction": "sum", "dim": (1, 2)},
    "mean of sequences": {"reduction": "mean", "dim": (-1, -2)},
    "sum over ragged": {"reduction": "sum", "dim": 1},
    "mean over ragged": {"reduction": "mean", "dim": [1]},
}


@pytest.mark.parametrize(("name", "count"), REDUCED_COUNTS)
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_divergences_and_their_reductions(name: str, count: int, how: dict[str, Any], keepdim: bool) -> None:
    for prior in PRIORS if count == 4 else [()]:
        check(name, ("jagged", "jagged", *prior), **how, keepdim=keepdim)


@pytest.mark.parametrize(("name", "count"), REDUCED_COUNTS)
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("how", BY_SEQUENCE.values(), ids=BY_SEQUENCE)
def test_sums_and_means_of_each_sequence(name: str, count: int, how: dict[str, Any], keepdim: bool) -> None:
    for prior in PRIORS if count == 4 else [()]:
        check(name, ("jagged", "jagged", *prior), **how, keepdim=keepdim)


@pytest.mark.parametrize(("name", "count"), REDUCED_COUNTS)
@pytest.mark.parametrize("weight", ["jagged", "narrow", (WIDTH,), (BATCH, 1, 1), (BATCH, 1, WIDTH), ()], ids=str)
@pytest.mark.parametrize("how", [*HOW.values(), *BY_SEQUENCE.values()], ids=[*HOW, *BY_SEQUENCE])
def test_weights(name: str, count: int, how: dict[str, Any], weight: Shape) -> None:
    prior = PRIORS[5] if count == 4 else ()
    check(name, ("jagged", "jagged", *prior), weight, **how)
    check(name, ("jagged", "jagged", *prior), weight, torch.ones(input_of(weight).shape, dtype=torch.bool), **how)


@pytest.mark.parametrize("how", [*HOW.values(), *BY_SEQUENCE.values()], ids=[*HOW, *BY_SEQUENCE])
def test_what_a_mask_leaves_out_may_be_anything(how: dict[str, Any]) -> None:
    leaves = inputs_of("gaussian_kl_div", ["jagged", "jagged"])
    mask = torch.ones(ROWS, 1, dtype=torch.bool)
    mask[1] = mask[7] = False
    spoilt = [leaf.detach().where(mask, torch.nan).requires_grad_() for leaf in leaves]
    prior = torch.zeros(BATCH, 1, WIDTH, requires_grad=True)
    results = []
    for mu, log_var in (leaves, spoilt):
        result = kl_ext.gaussian_kl_div(jagged(mu), jagged(log_var), prior, prior, weight=jagged(mask), **how)
        results.append((values_of(result), *torch.autograd.grad(values_of(result).sum(), (mu, log_var, prior))))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert not any(gradient[[1, 7]].any() for gradient in results[1][1:3])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_has_the_bits_that_it_has_alone(reduction: str, dtype: torch.dtype) -> None:
    """Of more and of fewer than the 1024 terms that are summed at a time."""
    lengths = (700, 1, 300, 129)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    mu, log_var = torch.randn(2, sum(lengths), WIDTH).to(dtype)
    prior = torch.randn(len(lengths), 1, WIDTH).to(dtype).requires_grad_()
    like = torch.nested.nested_tensor_from_jagged(mu, offsets)
    how = {"reduction": reduction, "dim": (1, 2)}
    together = kl_ext.gaussian_kl_div(
        like, torch.nested.nested_tensor_from_jagged(log_var, like.offsets()), prior, prior, **how
    )
    rows = [slice(a, b) for a, b in itertools.pairwise(offsets.tolist())]
    alone = [
        kl_ext.gaussian_kl_div(mu[row], log_var[row], prior[i], prior[i], reduction=reduction) for i, row in enumerate(rows)
    ]
    assert same_bits(together, torch.stack(alone))
    gradients = (torch.autograd.grad(result.sum(), prior)[0] for result in (together, torch.stack(alone)))
    assert same_bits(*gradients)


def test_sums_over_everything_are_those_of_the_values() -> None:
    mu, log_var = torch.randn(2, ROWS, WIDTH)
    for how in HOW.values():
        if how.get("dim") is None and how.get("reduction") != "batchmean":
            result = kl_ext.gaussian_kl_div(jagged(mu), jagged(log_var), **how)
            assert same_bits(values_of(result), kl_ext.gaussian_kl_div(mu, log_var, **how))


@pytest.mark.parametrize(("name", "count"), [*ELEMENTWISE_COUNTS, *REDUCED_COUNTS])
def test_gradients_are_jagged_with_the_same_structure(name: str, count: int) -> None:
    inputs = as_given([x.detach() for x in inputs_of(name, ["jagged"] * count)], ["jagged"] * count)
    inputs = [x.detach().requires_grad_() for x in inputs]
    result = getattr(kl_ext, name)(*inputs)
    assert (result.layout, result.shape) == (torch.jagged, inputs[0].shape)
    result.sum().backward()
    for x in inputs:
        assert x.grad is not None
        assert (x.grad.layout, x.grad.shape, x.grad.dtype) == (torch.jagged, x.shape, x.dtype)
        assert x.grad.offsets() is x.offsets()


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4))[1:], ids=str)
def test_any_gradients_may_be_wanted(wanted: Sequence[bool]) -> None:
    shapes = ("jagged", "jagged", (BATCH, 1, WIDTH), (WIDTH,))
    for name, count in (*ELEMENTWISE_COUNTS, *REDUCED_COUNTS):
        if not any(wanted[:count]):
            continue
        drawn = inputs_of(name, shapes[:count])
        leaves = [x.detach().requires_grad_(is_wanted) for x, is_wanted in zip(drawn, wanted[:count])]
        differentiated = [x for x in leaves if x.requires_grad]
        result = getattr(kl_ext, name)(*as_given(leaves, shapes[:count]))
        found = torch.autograd.grad(result.sum(), differentiated)
        formula = expected(name, leaves, shapes[:count])
        for x, y in zip(found, torch.autograd.grad(formula.sum(), differentiated), strict=True):
            torch.testing.assert_close(x, y, **CLOSE)


@pytest.mark.parametrize("how", [{}, {"reduction": "sum"}, {"reduction": "mean", "dim": 1}], ids=str)
def test_the_ragged_dimension_may_be_another(how: dict[str, Any]) -> None:
    """[B, width, *], as it is in front of a convolution."""
    mu, log_var = torch.randn(2, WIDTH, ROWS).double()
    prior = torch.randn(BATCH, WIDTH, 1, dtype=torch.float64, requires_grad=True)
    like = jagged(mu, ragged_dim=2)
    result = kl_ext.gaussian_kl_div(like, jagged(log_var, like, ragged_dim=2), prior, prior, **how)
    turned = prior.transpose(1, 2)
    dim = {1: 2}.get(how.get("dim"))
    shapes = ("jagged", "jagged", (BATCH, 1, WIDTH), (BATCH, 1, WIDTH))
    wanted = expected("gaussian_kl_div", (mu.T, log_var.T, turned, turned), shapes, **{**how, **({"dim": dim} if dim else {})})
    torch.testing.assert_close(values_of(result).T if not how else values_of(result), wanted, **CLOSE)
    found, right = (torch.autograd.grad(x.sum(), prior)[0] for x in (values_of(result), wanted))
    torch.testing.assert_close(found, right, **CLOSE)


def test_sequences_of_one_dimension() -> None:
    mu, log_var = torch.randn(2, ROWS).double()
    per_sequence = torch.randn(BATCH, 1).double()
    terms = kl_ext.gaussian_kl_div(jagged(mu), jagged(log_var), per_sequence, 0.0)
    by_row = per_sequence.repeat_interleave(torch.tensor(LENGTHS), 0).squeeze(1)
    torch.testing.assert_close(terms.values(), GAUSSIAN.terms(mu, log_var, by_row, torch.zeros(())), **CLOSE)
    total = kl_ext.gaussian_kl_div(jagged(mu), jagged(log_var), per_sequence, 0.0, reduction="batchmean")
    torch.testing.assert_close(total, terms.values().sum() / BATCH, **CLOSE)


def test_halves_of_an_encoders_result() -> None:
    encoded = torch.randn(ROWS, 2 * WIDTH, dtype=torch.float64, requires_grad=True)
    mu, log_var = jagged(encoded).chunk(2, -1)
    kl_ext.gaussian_kl_div(mu, log_var, reduction="batchmean").backward()
    values = encoded.detach().requires_grad_()
    (GAUSSIAN.terms(*values.chunk(2, -1)).sum() / BATCH).backward()
    torch.testing.assert_close(encoded.grad, values.grad, **CLOSE)


@pytest.mark.parametrize("half", HALF_TYPES)
def test_dtypes_are_those_of_dense_tensors(half: torch.dtype) -> None:
    mu, log_var = torch.randn(2, ROWS, WIDTH).to(half)
    wide = torch.randn(BATCH, 1, WIDTH, requires_grad=True)
    scalar = torch.zeros((), dtype=torch.float64)
    call = kl_ext.gaussian_kl_div
    assert call(jagged(mu), jagged(log_var), reduction="batchmean").dtype == half
    assert call(jagged(mu), jagged(log_var), scalar, scalar, reduction="sum").dtype == half
    assert call(jagged(mu), jagged(log_var), wide, wide).dtype == torch.float32
    assert call(jagged(mu), jagged(log_var), dtype=torch.float64, reduction="batchmean").dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert call(jagged(mu), jagged(log_var), reduction="batchmean").dtype == torch.float32
    call(jagged(mu.requires_grad_()), jagged(log_var), wide, wide).sum().backward()
    assert (mu.grad.dtype, wide.grad.dtype) == (half, torch.float32)


def test_a_0_dim_weight_does_not_decide_the_dtype() -> None:
    mu, log_var = torch.randn(2, ROWS, WIDTH).to(torch.bfloat16)
    weight = torch.ones((), dtype=torch.float64)
    for how in (*HOW.values(), *BY_SEQUENCE.values()):
        result = kl_ext.gaussian_kl_div(jagged(mu), jagged(log_var), weight=weight, **how)
        assert result.dtype == torch.bfloat16


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]], ids=["no sequence", "no rows"])
def test_nothing_sums_to_zero(offsets: Sequence[int]) -> None:
    x = torch.nested.nested_tensor_from_jagged(torch.zeros(0, WIDTH), torch.tensor(offsets))
    assert kl_ext.gaussian_kl_div(x, x, reduction="sum") == 0
    assert same_bits(kl_ext.gaussian_kl_div(x, x, reduction="sum", dim=(1, 2)), torch.zeros(len(offsets) - 1))


@pytest.mark.parametrize(
    "how", [how for how in HOW.values() if how.get("reduction") != "mean" or how.get("dim") == (2,)], ids=str
)
def test_second_derivatives(how: dict[str, Any]) -> None:
    """Not of a mean over the ragged dimension, whose size torch cannot divide by."""
    dense = inputs_of("gaussian_kl_div", ["jagged", "jagged"])
    given = [x.detach().requires_grad_() for x in as_given([x.detach() for x in dense], ["jagged", "jagged"])]
    second = []
    for result, leaves in (
        (kl_ext.gaussian_kl_div(*given, **how), given),
        (expected("gaussian_kl_div", dense, ("jagged", "jagged"), **how), dense),
    ):
        first = torch.autograd.grad(result.sum(), leaves, create_graph=True)
        second.append(torch.autograd.grad(sum((gradient * gradient).sum() for gradient in first), leaves))
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a.values(), b, **CLOSE)


@pytest.mark.parametrize("name", ["kl_div_single_loss_backward", "gaussian_kl_div_backward"])
def test_gradients_into_given_tensors(name: str) -> None:
    mu, log_var, grad = (torch.randn(ROWS, WIDTH) for _ in range(3))
    rest = (-30.0, 20.0) if "single" in name else (None, None, -30.0, 20.0, "none", None)
    names = ["grad_mu", "grad_log_var"] if "single" in name else ["grad_mu_p", "grad_log_var_p", "grad_mu_q", "grad_log_var_q"]
    operator = getattr(torch.ops.kl_ext, name)
    places = [jagged(torch.empty(ROWS, WIDTH)) for _ in range(2)]
    operator.out(jagged(grad), jagged(mu), jagged(log_var), *rest, **dict(zip(names, [*places, None, None])))
    mask = [True, True, False, False][: len(names)]
    for place, gradient in zip(places, operator(grad, mu, log_var, *rest, mask)):
        assert same_bits(place.values(), gradient)


BY_COMPILE = {**HOW, **BY_SEQUENCE}


@pytest.mark.parametrize("how", BY_COMPILE.values(), ids=BY_COMPILE)
def test_compiled_whole(how: dict[str, Any]) -> None:
    prior = (BATCH, 1, WIDTH)
    leaves = inputs_of("gaussian_kl_div", ("jagged", "jagged", prior, (WIDTH,)), torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(kl_ext.gaussian_kl_div, backend="aot_eager", fullgraph=True)
    given = [*as_given(leaves[:2], ["jagged"] * 2), *leaves[2:]]
    results = []
    for function in (kl_ext.gaussian_kl_div, compiled):
        if torch.__version__.startswith("2.11."):
            # It cannot compile even x + y of jagged tensors once their longest sequence is known, as the first call needs it.
            given = [*as_given(leaves[:2], ["jagged"] * 2), *leaves[2:]]
        result = values_of(function(*given, **how))
        results.append((result, *torch.autograd.grad(result.nansum(), leaves)))
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)


def test_every_operator_is_tested_here() -> None:
    names = {name.removeprefix("kl_ext::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("kl_ext::")}
    assert {name for name in names if not name.endswith(("_backward", ".out"))} <= {operator.name for operator in OPERATORS}


# What is refused.


def refusals() -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    x = jagged(torch.randn(ROWS, WIDTH))
    other = jagged(torch.randn(ROWS, WIDTH), ragged_dim=1)
    again = torch.nested.nested_tensor_from_jagged(torch.randn(ROWS, WIDTH), OFFSETS.clone())
    gaps = torch.nested.narrow(
        torch.randn(3, 5, WIDTH), 1, torch.tensor([0, 1, 2]), torch.tensor([2, 1, 3]), layout=torch.jagged
    )
    kl = kl_ext.gaussian_kl_div
    backward = torch.ops.kl_ext.gaussian_kl_div_backward
    rest = (None, None, -30.0, 20.0)
    mask = [True, True, False, False]
    shape = r"\[4, j\d+, 4\]"
    return {
        "other offsets": (
            lambda: kl(x, again),
            RuntimeError,
            rf"gaussian_kl_div: expected log_var_p to have the ragged structure of mu_p, shape {shape}, got shape {shape}; "
            r"torch.nested.nested_tensor_from_jagged\(values, mu_p.offsets\(\)\) has it",
        ),
        "another rank": (lambda: kl(x, other.sum(-1)), RuntimeError, "expected log_var_p to have the ragged structure of mu_p"),
        "gaps": (
            lambda: kl(gaps, gaps),
            NotImplementedError,
            "gaussian_kl_div: expected mu_p to have no gaps between its sequences, got a nested tensor with lengths",
        ),
        "more dimensions": (
            lambda: kl_ext.kl_div_single_loss(x, torch.zeros(2, BATCH, 1, WIDTH)),
            RuntimeError,
            rf"kl_div_single_loss: expected log_var to broadcast with the shape {shape} of mu, with size 1 in the ragged "
            r"dimension, got shape \[2, 4, 1, 4\]",
        ),
        "padded": (
            lambda: kl(x, x, torch.zeros(BATCH, 5, WIDTH), 0.0),
            RuntimeError,
            "expected mu_q to broadcast with the shape",
        ),
        "another batch": (
            lambda: kl(x, x, 0.0, torch.zeros(3, 1, WIDTH)),
            RuntimeError,
            "expected log_var_q to broadcast with the shape",
        ),
        "the batch alone": (
            lambda: kl(x, x, reduction="sum", dim=(0, 2)),
            NotImplementedError,
            r"gaussian_kl_div: expected dim to have the ragged dimension 1 where it has dimension 0, got \[0, 2\]",
        ),
        "dim out of range": (
            lambda: kl(x, x, reduction="sum", dim=3),
            IndexError,
            "gaussian_kl_div: expected dim from -3 to 2, got 3",
        ),
        "a dense grad_output": (
            lambda: backward(torch.ones(BATCH, 1, WIDTH), x, x, *rest, "none", None, mask),
            RuntimeError,
            r"gaussian_kl_div_backward: expected grad_output to be jagged with the ragged size j\d+, got shape \[4, 1, 4\]",
        ),
        "a jagged grad_output": (
            lambda: backward(x, x, x, *rest, "sum", None, mask),
            RuntimeError,
            rf"gaussian_kl_div_backward: expected grad_output to be a strided tensor, got shape {shape}",
        ),
        "a grad_output of other offsets": (
            lambda: backward(again.sum(-1), x, x, *rest, "sum", [-1], mask),
            RuntimeError,
            r"gaussian_kl_div_backward: expected grad_output to be jagged with the ragged size j\d+, got shape \[4, j\d+\]",
        ),
        "one part of q": (
            lambda: backward(x, x, x, x, None, -30.0, 20.0, "none", None, mask),
            ValueError,
            "expected mu_q and log_var_q together or neither, got mu_q alone",
        ),
    }


@pytest.mark.parametrize("case", refusals())
def test_what_cannot_be_done_is_refused_by_name(case: str) -> None:
    call, error, message = refusals()[case]
    with pytest.raises(error, match=message):
        call()


def test_a_jagged_weight_does_not_enlarge_dense_tensors() -> None:
    x = torch.zeros(BATCH, 1, WIDTH)
    with pytest.raises(
        RuntimeError, match=r"gaussian_kl_div: expected weight to expand to the shape \[4, 1, 4\] of the terms, got"
    ):
        kl_ext.gaussian_kl_div(x, x, weight=jagged(torch.ones(ROWS, WIDTH)))
