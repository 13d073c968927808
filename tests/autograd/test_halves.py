"""mu and log_var as the halves of one tensor: its gradient is written at once, and nobody can tell but by the time it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import kl_ext
from halves import HALVES, Halve, apart, encoded, joins
from kl_ext import reference
from operators import CLOSE, DTYPES, Operator, each_operator
from oracle import same_bits

# Likewise, to two slices of one shape that are no halves of it.
OTHERS: dict[str, Halve] = {
    "the same slice twice": lambda h: (h[:, :3], h[:, :3]),
    "slices that overlap": lambda h: (h[:, :3], h[:, 2:5]),
    "every second slice": lambda h: (h[:, ::2], h[:, 1::2]),
    "two of three chunks": lambda h: h.chunk(3, 1)[:2],
    "halves of an expanded dimension": lambda h: h[:, :1].expand(-1, 6, -1, -1).chunk(2, 1),
    "halves of different tensors": lambda h: (h.chunk(2, 1)[0], (h + 0).chunk(2, 1)[1]),
    "halves of half a tensor": lambda h: h[:, :4].chunk(2, 1),
    "slices that leave out the middle": lambda h: (h[:, :2], h[:, 4:]),
    "slices of halves": lambda h: (h[:, :3][:, :2], h[:, 3:][:, :2]),
    "two dimensions of two": lambda h: (h.chunk(2, 0)[0][:, :3], h.chunk(2, 0)[1][:, :3]),
    "slices along two dimensions": lambda h: (h[:2, :3], h[2:, 3:]),
    "a half changed in place": lambda h: (h[:, :3].clone().mul_(2), h[:, 3:]),
}

# Of mu and log_var, to a scalar; each with the module whose functions to use.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "single": lambda m, mu, log_var: (m.kl_div_single_loss(mu, log_var) * torch.arange(mu.numel()).view(mu.shape).to(mu)).sum(),
    "single, mean": lambda m, mu, log_var: m.kl_div_single_loss(mu, log_var).mean(),
    "pair": lambda m, mu, log_var: m.kl_div_pair_loss(mu, log_var, torch.ones_like(mu), torch.zeros_like(mu)).sum(),
    "pair, mirrored": lambda m, mu, log_var: m.kl_div_pair_loss(torch.ones_like(mu), torch.zeros_like(mu), mu, log_var).sum(),
    "divergence": lambda m, mu, log_var: m.gaussian_kl_div(mu, log_var, torch.ones_like(mu), torch.zeros_like(mu)).sum(),
    "batchmean": lambda m, mu, log_var: m.gaussian_kl_div(mu, log_var, reduction="batchmean"),
    "mean of rows": lambda m, mu, log_var: m.gaussian_kl_div(mu, log_var, reduction="mean", dim=(1, 2, 3)).square().sum(),
    "sum of columns": lambda m, mu, log_var: m.gaussian_kl_div(mu, log_var, reduction="sum", dim=0).square().sum(),
}

each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def gradient(loss: Callable[..., Tensor], h: Tensor, halves: Sequence[Tensor]) -> Tensor:
    return torch.autograd.grad(loss(kl_ext, *halves), h)[0]


@each_loss
@pytest.mark.parametrize("halve", (HALVES | OTHERS).values(), ids=HALVES | OTHERS)
def test_gradients_of_halves_are_those_of_the_formula(loss: Callable[..., Tensor], halve: Halve, device: torch.device) -> None:
    h = encoded(device)
    expected = torch.autograd.grad(loss(reference, *halve(h)), h)[0]
    torch.testing.assert_close(gradient(loss, h, halve(h)), expected, **CLOSE)


@each_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("halve", HALVES.values(), ids=HALVES)
def test_gradients_of_halves_have_the_bits_and_strides_of_gradients_that_autograd_joins(
    loss: Callable[..., Tensor], dtype: torch.dtype, halve: Halve, device: torch.device
) -> None:
    h = encoded(device, dtype)
    expected = gradient(loss, h, apart(halve(h)))
    actual = gradient(loss, h, halve(h))
    # The backward of slices adds zeros: -0 becomes +0.
    assert same_bits(actual, expected) or same_bits(actual + 0.0, expected)
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("shape", [(5, 2), (1, 2), (3, 34), (7, 200), (2, 3 * 2048), (2050, 64), (40, 2 * 1031)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_loss
def test_halves_of_every_width_have_the_bits_of_tensors_of_their_own(
    loss: Callable[..., Tensor], dtype: torch.dtype, shape: tuple[int, int], device: torch.device
) -> None:
    h = encoded(device, dtype, shape)

    def of_rank_4(halves: Sequence[Tensor]) -> list[Tensor]:
        return [half[:, :, None, None] for half in halves]

    halves, own = h.chunk(2, 1), apart(h.chunk(2, 1))
    assert same_bits(loss(kl_ext, *of_rank_4(halves)), loss(kl_ext, *of_rank_4(own)))
    assert same_bits(kl_ext.kl_div_single_loss(*halves), kl_ext.kl_div_single_loss(*own))
    assert same_bits(kl_ext.gaussian_kl_div(*halves, reduction="sum"), kl_ext.gaussian_kl_div(*own, reduction="sum"))

    def total(mu: Tensor, log_var: Tensor) -> Tensor:
        return kl_ext.gaussian_kl_div(mu, log_var, reduction="sum", dim=1).square().sum()

    assert same_bits(*(torch.autograd.grad(total(*x), h)[0] for x in (halves, own)))


@each_loss
@pytest.mark.parametrize("halve", HALVES.values(), ids=HALVES)
def test_nothing_is_joined_where_halves_are_written_at_once(
    loss: Callable[..., Tensor], halve: Halve, device: torch.device
) -> None:
    h = encoded(device)
    result = loss(kl_ext, *halve(h))
    assert not joins(result.backward)
    assert joins(loss(kl_ext, *apart(halve(h))).backward)


def test_two_pairs_of_halves_are_written_at_once(device: torch.device) -> None:
    p, q = encoded(device), encoded(device)

    def loss(halves_of_p: Sequence[Tensor], halves_of_q: Sequence[Tensor]) -> Tensor:
        return kl_ext.gaussian_kl_div(*halves_of_p, *halves_of_q, reduction="batchmean")

    assert not joins(loss(p.chunk(2, 1), q.chunk(2, 1)).backward)
    expected = torch.autograd.grad(loss(apart(p.chunk(2, 1)), apart(q.chunk(2, 1))), (p, q))
    assert same_bits(p.grad, expected[0])
    assert same_bits(q.grad, expected[1])


@pytest.mark.parametrize("prior", [(6, 4, 4), (4, 6, 4, 4)], ids=str)
def test_halves_beside_a_prior_that_is_none(prior: tuple[int, ...], device: torch.device) -> None:
    h, mu_q, log_var_q = encoded(device, shape=(4, 12, 4, 4)), encoded(device, shape=prior), encoded(device, shape=prior)

    def gradients(halves: Sequence[Tensor]) -> Sequence[Tensor]:
        result = kl_ext.gaussian_kl_div(*halves, mu_q, log_var_q, reduction="batchmean")
        return torch.autograd.grad(result, (h, mu_q, log_var_q))

    for actual, expected in zip(gradients(h.chunk(2, 1)), gradients(apart(h.chunk(2, 1))), strict=True):
        assert same_bits(actual, expected)


# Whatever looks at the gradients of mu and log_var themselves: given them and the loss, returns what it saw.
OBSERVERS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Sequence[Tensor]]] = {}


def observer(function: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
    OBSERVERS[function.__name__] = function
    return function


@observer
def tensor_hooks(h: Tensor, mu: Tensor, log_var: Tensor, loss: Tensor) -> Sequence[Tensor]:
    seen: list[Tensor] = []
    mu.register_hook(seen.append)
    log_var.register_hook(seen.append)
    loss.backward()
    return sorted(seen, key=lambda gradient: not torch.equal(gradient, seen[0])) if seen else seen


@observer
def retained_gradients(h: Tensor, mu: Tensor, log_var: Tensor, loss: Tensor) -> Sequence[Tensor]:
    mu.retain_grad()
    log_var.retain_grad()
    loss.backward()
    return [mu.grad, log_var.grad]


@observer
def one_retained_gradient(h: Tensor, mu: Tensor, log_var: Tensor, loss: Tensor) -> Sequence[Tensor]:
    log_var.retain_grad()
    loss.backward()
    return [log_var.grad]


@observer
def gradients_with_respect_to_them(h: Tensor, mu: Tensor, log_var: Tensor, loss: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(loss, (mu, log_var))


@observer
def gradients_with_respect_to_all(h: Tensor, mu: Tensor, log_var: Tensor, loss: Tensor) -> Sequence[Tensor]:
    of_mu, of_log_var, h.grad = torch.autograd.grad(loss, (mu, log_var, h))
    return [of_mu, of_log_var]


@observer
def a_hook_on_both(h: Tensor, mu: Tensor, log_var: Tensor, loss: Tensor) -> Sequence[Tensor]:
    seen: list[Tensor] = []
    torch.autograd.graph.register_multi_grad_hook((mu, log_var), seen.extend)
    loss.backward()
    return seen


@observer
def a_hook_before_their_node(h: Tensor, mu: Tensor, log_var: Tensor, loss: Tensor) -> Sequence[Tensor]:
    seen: list[Tensor] = []
    mu.grad_fn.register_prehook(seen.extend)
    loss.backward()
    return seen


@observer
def a_hook_behind_their_node(h: Tensor, mu: Tensor, log_var: Tensor, loss: Tensor) -> Sequence[Tensor]:
    seen: list[Tensor] = []
    mu.grad_fn.register_hook(lambda grad_inputs, grad_outputs: seen.extend(grad_outputs))
    loss.backward()
    return seen


@pytest.mark.parametrize("observe", OBSERVERS.values(), ids=OBSERVERS)
def test_who_asks_for_the_gradients_of_halves_gets_them(observe: Callable[..., Sequence[Tensor]], device: torch.device) -> None:
    h = encoded(device)
    seen = []
    for separate in (apart, list):
        h.grad = None
        mu, log_var = h.chunk(2, 1)
        halves = separate((mu, log_var))
        weights = torch.arange(1, mu.numel() + 1, device=device).view(mu.shape)
        loss = (weights * kl_ext.kl_div_single_loss(*halves)).sum()
        seen.append([*observe(h, mu, log_var, loss), *([h.grad] if h.grad is not None else [])])
    assert len(seen[0]) == len(seen[1]) > 0
    for expected, actual in zip(*seen, strict=True):
        assert same_bits(actual, expected)


def test_halves_with_other_uses_get_the_sum_of_their_gradients(device: torch.device) -> None:
    h, noise = encoded(device), torch.randn(4, 3, 4, 4, dtype=torch.float64, device=device)

    def objective(module: Any) -> Tensor:
        mu, log_var = h.chunk(2, 1)
        latent = mu + (0.5 * log_var).exp() * noise
        return latent.square().sum() + 0.1 * module.gaussian_kl_div(mu, log_var, reduction="batchmean")

    actual, expected = (torch.autograd.grad(objective(module), h)[0] for module in (kl_ext, reference))
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_the_graph_of_halves_serves_several_passes(device: torch.device) -> None:
    h = encoded(device)
    mu, log_var = h.chunk(2, 1)
    loss = kl_ext.gaussian_kl_div(mu, log_var, reduction="sum")
    loss.backward(retain_graph=True)
    first = h.grad.clone()
    loss.backward(retain_graph=True)
    assert same_bits(h.grad, 2 * first)
    mu.retain_grad()  # from now on somebody looks
    loss.backward()
    assert same_bits(h.grad, 3 * first)
    assert same_bits(mu.grad, first.chunk(2, 1)[0])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_half_that_was_changed_is_caught(device: torch.device) -> None:
    h = encoded(device)
    inner = 2 * h
    loss = kl_ext.kl_div_single_loss(*inner.split([3, 3], 1)).sum()
    with torch.no_grad():
        inner.zero_()
    with pytest.raises(RuntimeError, match="modified inplace"):
        loss.backward()


@each_loss
@pytest.mark.parametrize("name", ["chunk of dim 1", "slices"])
def test_halves_have_derivatives_of_every_kind(loss: Callable[..., Tensor], name: str, device: torch.device) -> None:
    halve = HALVES[name]
    h = encoded(device, shape=(2, 4, 2, 2))

    def function(h: Tensor) -> Tensor:
        return loss(kl_ext, *halve(h))

    def formula(h: Tensor) -> Tensor:
        return loss(reference, *halve(h))

    direction = torch.randn_like(h)
    assert torch.autograd.gradcheck(function, h, check_forward_ad=True, check_batched_grad=True)
    for of_both in (
        lambda f: torch.func.grad(f)(h),
        lambda f: torch.func.hessian(f)(h),
        lambda f: torch.func.jvp(torch.func.grad(f), (h,), (direction,))[1],
        lambda f: torch.autograd.functional.hvp(f, h, direction)[1],
        lambda f: torch.autograd.functional.hessian(f, h, vectorize=True),
        lambda f: torch.func.vmap(torch.func.grad(f))(torch.stack([h, 2 * h])),
        lambda f: torch.autograd.grad(torch.utils.checkpoint.checkpoint(f, h, use_reentrant=False), h)[0],
    ):
        torch.testing.assert_close(of_both(function), of_both(formula), **CLOSE)


def test_compiled_halves_have_the_bits_of_eager_ones(device: torch.device) -> None:
    h = encoded(device, torch.float32)

    def function(h: Tensor) -> Tensor:
        return kl_ext.gaussian_kl_div(*h.chunk(2, 1), reduction="batchmean")

    expected = torch.autograd.grad(function(h), h)[0]
    for backend in ("aot_eager", "inductor"):
        assert same_bits(torch.autograd.grad(torch.compile(function, backend=backend, fullgraph=True)(h), h)[0], expected)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        function(h).backward()
    assert same_bits(h.grad, expected)


def test_only_the_wanted_gradient_of_halves_is_computed(device: torch.device) -> None:
    h, other = encoded(device), encoded(device, shape=(4, 3, 4, 4))
    mu, log_var = h.chunk(2, 1)
    loss = kl_ext.gaussian_kl_div(mu, log_var, other, other, reduction="sum")
    [alone] = torch.autograd.grad(loss, other, retain_graph=True)
    of_h, of_other = torch.autograd.grad(loss, (h, other))
    assert same_bits(alone, of_other)
    assert of_h.shape == h.shape


# The operators that write gradients where they are told.


def into(operator: Operator, arguments: Sequence[Any], gradients: Sequence[Tensor | None]) -> None:
    assert operator.backward_out(*arguments, **dict(zip(given_names(operator), gradients, strict=True))) is None


def given_names(operator: Operator) -> list[str]:
    """The arguments that take gradients."""
    return [f"grad_{name}" for name in operator.arguments]


def arguments_of(operator: Operator, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Any]:
    tensors = [torch.randn(5, 24, device=device), *operator.inputs(*[(5, 24)] * operator.count, device=device)]
    return [*(x.to(dtype) for x in tensors), *operator.bounds, *(["none", None] if operator.reduces else [])]


@each_operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "rows", "columns", "transposed"])
def test_gradients_go_where_they_are_told(operator: Operator, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    arguments = arguments_of(operator, device, dtype)
    expected = operator.backward_operator(*arguments, [True] * operator.count)
    room = {
        "contiguous": lambda: torch.full((5, 24), float("nan")),
        "rows": lambda: torch.full((5, 48), float("nan"))[:, 24:],
        "columns": lambda: torch.full((5, 48), float("nan"))[:, ::2],
        "transposed": lambda: torch.full((24, 5), float("nan")).t(),
    }[layout]
    for left_out in (None, *range(operator.count)):
        gradients = [None if i == left_out else room().to(device, dtype) for i in range(operator.count)]
        into(operator, arguments, gradients)
        for i, gradient in enumerate(gradients):
            assert gradient is None if i == left_out else same_bits(gradient, expected[i])


@each_operator
def test_gradients_of_broadcast_inputs_go_where_they_are_told(operator: Operator, device: torch.device) -> None:
    arguments = arguments_of(operator, device)
    arguments[1] = arguments[1][0].clone()
    expected = operator.backward_operator(*arguments, [True] * operator.count)
    gradients = [torch.full_like(expected[0], float("nan")).repeat(2)[::2], *(torch.empty_like(e) for e in expected[1:])]
    into(operator, arguments, gradients)
    assert all(same_bits(*pair) for pair in zip(gradients, expected, strict=True))


@each_operator
def test_gradients_that_do_not_fit_are_refused(operator: Operator, device: torch.device) -> None:
    arguments = arguments_of(operator, device)
    first = operator.arguments[0]
    rest = [None] * (operator.count - 1)
    function = rf"^{operator}_backward: expected grad_{first}"
    with pytest.raises(TypeError, match=rf"{function} to be float32 like {first}, got float64"):
        into(operator, arguments, [torch.empty(5, 24, device=device, dtype=torch.float64), *rest])
    with pytest.raises(RuntimeError, match=rf"{function} of shape \[5, 24\] like {first}, got shape \[24\]"):
        into(operator, arguments, [torch.empty(24, device=device), *rest])
    if device.type == "cuda":
        with pytest.raises(RuntimeError, match=rf"{function} on cuda:0 like {first}, got cpu"):
            into(operator, arguments, [torch.empty(5, 24), *rest])
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor refers to a single memory location"):
        into(operator, arguments, [torch.empty(24, device=device).expand(5, 24), *rest])
    with pytest.raises(
        RuntimeError, match=rf"^{operator}_backward: expected no tensor to require grad where gradients are given"
    ):
        into(operator, [arguments[0].requires_grad_(), *arguments[1:]], [torch.empty(5, 24, device=device), *rest])


@each_operator
def test_the_operators_with_given_gradients_pass_opcheck(operator: Operator, device: torch.device) -> None:
    gradients = {argument: torch.empty(5, 24, device=device) for argument in given_names(operator)}
    torch.library.opcheck(
        operator.backward_out, arguments_of(operator, device), gradients, test_utils=("test_schema", "test_faketensor")
    )
