"""Sharded tensors: every operator and its backward on the ranks of a real process group, against plain torch in float64 on the
whole tensors."""

from __future__ import annotations

import doctest
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import kl_ext
from operators import DERIVATIVES_CLOSE, GAUSSIAN
from ranks import Ranks
from reduction_cases import REDUCTIONS
from sharding_cases import (
    COUNT,
    PAIR,
    SINGLE,
    TERMS,
    WEIGHTS,
    Layout,
    check,
    each_kind,
    each_reducing_name,
    mesh_of,
    placed,
    random_inputs,
    random_weight,
    reduced,
    sharded,
)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    group = Ranks(COUNT)
    yield group
    group.stop()


@pytest.fixture
def seed() -> int:
    return int(torch.randint(2**31, ()))


@pytest.mark.parametrize("layout", SINGLE.values(), ids=SINGLE.keys())
def test_single_loss(layout: Layout, ranks: Ranks, seed: int) -> None:
    ranks.run(check, "kl_div_single_loss", layout, {}, seed)


@pytest.mark.parametrize("layout", PAIR.values(), ids=PAIR.keys())
def test_pair_loss(layout: Layout, ranks: Ranks, seed: int) -> None:
    ranks.run(check, "kl_div_pair_loss", layout, {}, seed)


@each_kind
@pytest.mark.parametrize("layout", [*SINGLE.values(), *PAIR.values()], ids=[*SINGLE, *PAIR])
@each_reducing_name
def test_reductions(name: str, layout: Layout, how: dict[str, Any], ranks: Ranks, seed: int) -> None:
    ranks.run(check, name, layout, how, seed)


@each_kind
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("layout", [SINGLE["sharded along 2"], PAIR["prior [D] replicated"]], ids=["2", "prior"])
@each_reducing_name
def test_weights(
    name: str, layout: Layout, weight: tuple[tuple[int, ...], str], how: dict[str, Any], ranks: Ranks, seed: int
) -> None:
    ranks.run(check, name, layout, how, seed, weight)


@each_kind
@each_reducing_name
def test_weights_on_a_mesh_of_two_dimensions(name: str, how: dict[str, Any], ranks: Ranks, seed: int) -> None:
    ranks.run(check, name, PAIR["prior on a mesh of two"], how, seed, ((5, 1, 8), "R S0"))


def check_left_out(name: str, how: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    whole = random_inputs(name, SINGLE["sharded along 0"])
    whole["p"][1::2], whole["log p"][1::2] = math.nan, math.inf
    tensors = sharded(name, SINGLE["sharded along 0"], whole)
    mask = (torch.arange(TERMS[0]) % 2 == 0).view(-1, 1, 1)
    result = getattr(kl_ext, name)(**tensors, weight=placed(mask, mesh_of((COUNT,)), "S0"), **how)
    assert bool(result.full_tensor().isfinite().all())
    for gradient in torch.autograd.grad(result.full_tensor().sum(), list(tensors.values())):
        assert bool(gradient.full_tensor().isfinite().all()) and not bool(gradient.full_tensor()[1::2].any())


@pytest.mark.parametrize("how", [{}, {"reduction": "mean"}, {"reduction": "sum", "dim": -1}], ids=["none", "mean", "rows"])
@each_reducing_name
def test_padding_that_a_weight_leaves_out_is_seen_on_no_rank(name: str, how: Any, ranks: Ranks, seed: int) -> None:
    ranks.run(check_left_out, name, how, seed)


def check_nothing_left(name: str) -> None:
    ones = placed(torch.ones(TERMS), mesh_of((COUNT,)), "S0").requires_grad_()
    mean = getattr(kl_ext, name)(ones, ones, weight=placed(torch.zeros(()), mesh_of((COUNT,)), "R"), reduction="mean")
    assert bool(mean.full_tensor().isnan())
    (gradient,) = torch.autograd.grad(mean.full_tensor(), ones)
    assert not bool(gradient.full_tensor().any())


@each_reducing_name
def test_a_mean_of_nothing_is_nan_and_has_no_gradient(name: str, ranks: Ranks) -> None:
    ranks.run(check_nothing_left, name)


# torch's own registration of a sharding reuses the placements that it has found for another reduction.
def check_in_turn(name: str, layout: Layout, seed: int) -> list[tuple[str, list[str]]]:
    return [check(name, layout, how, seed) for how in (*REDUCTIONS.values(), *reversed(REDUCTIONS.values()))]


@each_reducing_name
def test_each_reduction_has_its_own_placements_whatever_came_before(name: str, ranks: Ranks, seed: int) -> None:
    split, rows = "(Partial(sum),)", "(Shard(dim=0),)"
    expected = {
        "none": rows,
        "sum": split,
        "sum of 0": split,
        "sum of -1": rows,
        "sum of 0 and 2": split,
        "mean": split,
        "mean of 1": rows,
        "mean of -1 and 0": split,
        "mean of 0 and 1, kept": split,
        "batchmean": split,
    }
    for placements in ranks.run(check_in_turn, name, PAIR["prior [D] replicated"], seed):
        of_results = [of_result for of_result, _ in placements]
        assert of_results == [*expected.values(), *reversed(expected.values())]
        assert all(of_gradients == [rows, rows, split, split] for _, of_gradients in placements)


@pytest.mark.parametrize(
    ("layout", "how", "of_result", "of_gradients"),
    [
        ("prior [D] sharded as p", {"reduction": "sum", "dim": 0}, "(Shard(dim=1),)", ["(Shard(dim=2),)", "(Shard(dim=0),)"]),
        (
            "prior sharded twice",
            {"reduction": "sum", "dim": 1},
            "(Shard(dim=0), Shard(dim=0))",
            ["(Shard(dim=0), Shard(dim=0))"] * 2,
        ),
        (
            "prior on a mesh of two",
            {"reduction": "mean", "dim": 0},
            "(Partial(sum), Shard(dim=1))",
            ["(Shard(dim=0), Shard(dim=2))", "(Partial(sum), Shard(dim=0))"],
        ),
    ],
)
def test_results_and_gradients_are_sharded_as_the_terms(
    layout: str, how: dict[str, Any], of_result: str, of_gradients: list[str], ranks: Ranks, seed: int
) -> None:
    for result, gradients in ranks.run(check, "gaussian_kl_div", PAIR[layout], how, seed):
        assert result == of_result
        assert [gradients[0], gradients[2]] == of_gradients


def communicated(name: str, layout: Layout, how: dict[str, Any], weight: tuple[tuple[int, ...], str] | None) -> dict[str, int]:
    """How often each collective runs for value and gradients."""
    from torch.distributed.tensor.debug import CommDebugMode

    tensors = sharded(name, layout, random_inputs(name, layout))
    given = {} if weight is None else {"weight": placed(random_weight(weight[0], is_mask=True), mesh_of(layout[0]), weight[1])}
    with CommDebugMode() as mode:
        result = getattr(kl_ext, name)(**tensors, **given, **how)
        grad_output = placed(torch.ones(result.shape), result.device_mesh, "R")
        torch.autograd.grad(result, list(tensors.values()), grad_output)
    return {str(collective).rpartition(".")[2]: count for collective, count in mode.get_comm_counts().items()}


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("layout", ["prior as p", "prior [D] replicated", "prior [D] sharded as p"])
def test_nothing_is_communicated_for_tensors_that_lie_together(layout: str, reduction: str, ranks: Ranks) -> None:
    assert ranks.run(communicated, "gaussian_kl_div", PAIR[layout], {"reduction": reduction}, None) == [{}] * COUNT


def test_only_the_smaller_tensors_are_moved(ranks: Ranks) -> None:
    how = {"reduction": "sum"}
    counts = ranks.run(communicated, "gaussian_kl_div", PAIR["prior [D] sharded otherwise"], how, None)
    assert counts == [{"all_gather_into_tensor": 4}] * COUNT  # two of q, forward and backward


@each_reducing_name
def test_a_weighted_mean_communicates_one_sum(name: str, ranks: Ranks) -> None:
    layout, weight = SINGLE["sharded along 0"], WEIGHTS["of each row"]
    counts = ranks.run(communicated, name, layout, {"reduction": "mean"}, weight)
    assert counts == [{"all_reduce": 2}] * COUNT  # forward and backward


def check_bits(layout: Layout, how: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    whole = random_inputs("gaussian_kl_div", layout)
    tensors = sharded("gaussian_kl_div", layout, whole)
    result = kl_ext.gaussian_kl_div(**tensors, **how)
    leaves = [x.clone().requires_grad_() for x in whole.values()]
    expected = kl_ext.gaussian_kl_div(*leaves, **how)
    assert torch.equal(result.full_tensor(), expected)
    grad_output = torch.rand(expected.shape)
    gradients = torch.autograd.grad(result, list(tensors.values()), placed(grad_output, result.device_mesh, "R"))
    for gradient, exact in zip(gradients, torch.autograd.grad(expected, leaves, grad_output), strict=True):
        assert torch.equal(gradient.full_tensor(), exact)


@pytest.mark.parametrize(
    ("layout", "how"),
    [
        ("replicated", {"reduction": "mean"}),
        ("replicated", {"reduction": "batchmean"}),
        ("sharded along 0", {}),
        ("sharded along 0", {"reduction": "mean", "dim": (1, 2)}),
        ("sharded along 2", {"reduction": "sum", "dim": 0}),
    ],
)
def test_what_no_sum_over_ranks_is_in_has_the_bits_of_plain_tensors(
    layout: str, how: dict[str, Any], ranks: Ranks, seed: int
) -> None:
    ranks.run(check_bits, SINGLE[layout], how, seed)


def check_half() -> None:
    mu = placed(torch.full((1000,), 30.0, dtype=torch.float16), mesh_of((COUNT,)), "S0").requires_grad_()
    mean = kl_ext.gaussian_kl_div(mu, mu * 0, reduction="mean")
    assert mean.dtype == torch.float16
    assert mean.full_tensor().item() == 450
    (gradient,) = torch.autograd.grad(mean, mu, torch.ones((), dtype=torch.float16))
    assert gradient.full_tensor().unique().item() == pytest.approx(0.03, rel=2**-11)


def test_the_mean_of_halves_is_finite_where_their_sum_is_not(ranks: Ranks) -> None:
    ranks.run(check_half)


def check_plain() -> None:
    from torch.distributed.tensor.experimental import implicit_replication

    mu = placed(torch.zeros(8, 3), mesh_of((COUNT,)), "S0")
    one, row = torch.ones((), requires_grad=True), torch.ones(3)
    result = kl_ext.gaussian_kl_div(mu, mu, one, 0.0, reduction="sum")
    result.backward()
    assert result.full_tensor().item() == 12
    assert type(one.grad) is Tensor and one.grad.item() == 24
    with pytest.raises(TypeError, match="gaussian_kl_div: expected mu_q to be a DTensor like others, or a single number"):
        kl_ext.gaussian_kl_div(mu, mu, row, row)
    with implicit_replication():
        assert kl_ext.gaussian_kl_div(mu, mu, row, row * 0, reduction="sum").full_tensor().item() == 12


def test_plain_tensors_beside_sharded_ones(ranks: Ranks) -> None:
    ranks.run(check_plain)


def check_refusals() -> None:
    flat, square = mesh_of((COUNT,)), mesh_of((2, 2))
    mu = placed(torch.zeros(8, 3), flat, "S0")
    with pytest.raises(RuntimeError, match=r"gaussian_kl_div: expected log_var_p on .* like mu_p, got"):
        kl_ext.gaussian_kl_div(mu, placed(torch.zeros(8, 3), square, "S0 R"))
    with pytest.raises(RuntimeError, match="to broadcast with the shape"):  # though two rows are on each rank
        kl_ext.gaussian_kl_div(mu, placed(torch.zeros(2, 3), flat, "R"))
    with pytest.raises(IndexError, match="expected dim from -2 to 1, got 2"):
        kl_ext.gaussian_kl_div(mu, mu, reduction="sum", dim=2)


def test_what_does_not_go_together_is_refused(ranks: Ranks) -> None:
    ranks.run(check_refusals)


def check_enlarging(name: str) -> None:
    mu = placed(torch.ones(1, 3), mesh_of((COUNT,)), "R")
    with pytest.raises((RuntimeError, ValueError), match=f"{name}: expected weight"):  # though it has one row on each rank
        getattr(kl_ext, name)(mu, mu, weight=placed(torch.ones(COUNT, 3), mesh_of((COUNT,)), "S0"))


@each_reducing_name
def test_a_weight_that_would_enlarge_is_refused(name: str, ranks: Ranks) -> None:
    ranks.run(check_enlarging, name)


def check_second(how: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    layout = PAIR["prior [D] replicated"]
    whole = random_inputs("gaussian_kl_div", layout, torch.float64)
    tensors = list(sharded("gaussian_kl_div", layout, whole).values())
    leaves = [x.clone().requires_grad_() for x in whole.values()]
    value = kl_ext.gaussian_kl_div(*tensors, **how).square().sum()
    exact = reduced(GAUSSIAN.terms(*leaves), None, **how).square().sum()
    first = torch.autograd.grad(value, tensors, create_graph=True)
    expected = torch.autograd.grad(exact, leaves, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), tensors)
    for got, x in zip(second, torch.autograd.grad(sum(x.square().sum() for x in expected), leaves), strict=True):
        torch.testing.assert_close(got.full_tensor(), x, rtol=DERIVATIVES_CLOSE["rtol"], atol=1e-12)


@each_kind
def test_second_derivatives(how: dict[str, Any], ranks: Ranks, seed: int) -> None:
    ranks.run(check_second, how, seed)


def check_given() -> None:
    mesh = mesh_of((COUNT,))
    mu, log_var, q = (torch.rand(5, 3), torch.rand(5, 3), torch.rand(3))
    into, of_q = placed(torch.zeros(5, 3), mesh, "S1"), placed(torch.zeros(3), mesh, "R")
    operator = torch.ops.kl_ext.kl_div_pair_loss_backward
    inputs = [torch.ones(5, 3), mu, log_var, q, q]
    tensors = [placed(x, mesh, placements) for x, placements in zip(inputs, ["S0", "S0", "S0", "R", "R"], strict=True)]
    of_mu, _, of_mu_q, _ = operator.default(*inputs, -30.0, 20.0, [True, False, True, False])
    given = {"grad_mu_p": into, "grad_log_var_p": None, "grad_mu_q": of_q, "grad_log_var_q": None}
    operator.out(*tensors, -30.0, 20.0, **given)
    assert torch.equal(into.full_tensor(), of_mu)
    torch.testing.assert_close(of_q.full_tensor(), of_mu_q)
    with pytest.raises(RuntimeError, match="expected grad_mu_q of shape"):
        operator.out(*tensors, -30.0, 20.0, **{**given, "grad_mu_q": into})


def test_gradients_are_written_into_sharded_tensors_that_are_given(ranks: Ranks) -> None:
    ranks.run(check_given)


def check_example() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(kl_ext.sharding, globs={"torch": torch, "kl_ext": kl_ext})
    assert example.examples
    report: list[str] = []
    assert doctest.DocTestRunner().run(example, out=report.append).failed == 0, "".join(report)


def test_the_example_of_the_module_runs(ranks: Ranks) -> None:
    ranks.run(check_example)


def check_compiled(seed: int) -> None:
    def loss(*tensors: Tensor) -> Tensor:
        return kl_ext.gaussian_kl_div(*tensors, reduction="mean")

    torch.manual_seed(seed)
    layout = PAIR["prior [D] replicated"]
    tensors = list(sharded("gaussian_kl_div", layout, random_inputs("gaussian_kl_div", layout)).values())
    results = [function(*tensors) for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True))]
    assert torch.equal(*(result.full_tensor() for result in results))
    for eager, compiled in zip(*(torch.autograd.grad(result.full_tensor(), tensors) for result in results), strict=True):
        assert eager.placements == compiled.placements
        assert torch.equal(eager.full_tensor(), compiled.full_tensor())


def test_compiled_whole(ranks: Ranks, seed: int) -> None:
    ranks.run(check_compiled, seed)


LATER = """
import sys
import torch
import kl_ext
assert "torch.distributed.tensor" not in sys.modules
import torch.distributed as dist
from torch.distributed.tensor import init_device_mesh, ones
from torch.testing._internal.distributed.fake_pg import FakeStore
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
mu = ones(2, 3, device_mesh=init_device_mesh("cpu", (1,)))
assert kl_ext.gaussian_kl_div(mu, mu * 0, reduction="batchmean").full_tensor().item() == 1.5
"""
BEFORE = """
import torch.distributed.tensor
import sys
import kl_ext
assert "kl_ext.sharding" in sys.modules
"""


@pytest.mark.parametrize("program", [LATER, BEFORE], ids=["after kl_ext", "before kl_ext"])
def test_only_what_loads_torch_distributed_tensor_pays_for_it(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
