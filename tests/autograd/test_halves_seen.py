"""Halves where somebody could see that their gradients are written at once, or where they are no longer what h was cut into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import kl_ext
from halves import HALVES, apart, encoded, joins
from kl_ext import reference
from operators import CLOSE
from oracle import same_bits

# Of mu and log_var to terms or sums, and which inputs they are. The prior is as large as they are, whatever that is.
OPERATORS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "single": (lambda m, mu, log_var: m.kl_div_single_loss(mu, log_var), 0),
    "pair": (lambda m, mu, log_var: m.kl_div_pair_loss(mu, log_var, torch.ones_like(mu), torch.zeros_like(mu)), 0),
    "pair, as q": (lambda m, mu, log_var: m.kl_div_pair_loss(torch.ones_like(mu), torch.zeros_like(mu), mu, log_var), 2),
    "divergence": (lambda m, mu, log_var: m.gaussian_kl_div(mu, log_var, reduction="sum", dim=-1), 0),
    "divergence, as q": (lambda m, mu, log_var: m.gaussian_kl_div(torch.ones_like(mu), torch.ones_like(mu), mu, log_var), 2),
}
each_operator = pytest.mark.parametrize(("operator", "first"), OPERATORS.values(), ids=OPERATORS)
CUTS = ["chunk of dim 1", "chunk, log_var first", "split", "slices", "slices, log_var first"]
each_cut = pytest.mark.parametrize("halve", [HALVES[name] for name in CUTS], ids=CUTS)

Halve = Callable[[Tensor], Sequence[Tensor]]
Operator = Callable[..., Tensor]


def total(loss: Tensor) -> Tensor:
    """Of terms that do not all count alike."""
    return (loss * torch.arange(1, loss.numel() + 1).view(loss.shape).to(loss)).sum()


# Hooks on the node of a loss: each calls the function of a module, which calls the operator, and says what it saw.

Hooked = Callable[[Callable[[], Tensor], list[Any]], Tensor]
HOOKS: dict[str, Hooked] = {}


def hooked(function: Hooked) -> Hooked:
    HOOKS[function.__name__] = function
    return function


@hooked
def a_hook_on_the_node(call: Callable[[], Tensor], seen: list[Any]) -> Tensor:
    loss = call()
    loss.grad_fn.register_hook(lambda grad_inputs, grad_outputs: seen.append(grad_inputs))
    return loss


@hooked
def a_hook_that_changes_gradients(call: Callable[[], Tensor], seen: list[Any]) -> Tensor:
    def double(grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
        seen.append(grad_inputs)
        return tuple(None if gradient is None else 2 * gradient for gradient in grad_inputs)

    loss = call()
    loss.grad_fn.register_hook(double)
    return loss


@hooked
def a_hook_of_a_module(call: Callable[[], Tensor], seen: list[Any]) -> Tensor:
    class Module(torch.nn.Module):
        def forward(self) -> Tensor:
            return call()

    module = Module()
    module.register_backward_hook(lambda _, grad_inputs, grad_outputs: seen.append(grad_inputs))
    loss = module()
    loss.grad_fn.metadata["module"] = module  # which has to live as long
    return loss


@each_operator
@each_cut
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_on_the_node_of_a_loss_see_two_gradients(
    hook: Hooked, halve: Halve, operator: Operator, first: int, device: torch.device
) -> None:
    """And one that is None, beside as many edges: that much is visible, as halves.h says."""
    h = encoded(device)
    gradients, saw = [], []
    for separate in (apart, list):
        seen: list[Any] = []
        loss = hook(lambda separate=separate: operator(kl_ext, *separate(halve(h))), seen)
        gradients.append(torch.autograd.grad(total(loss), h)[0])
        assert len(seen) == 1
        assert len(seen[0]) == len(loss.grad_fn.next_functions)
        saw.append(seen[0])
    expected, actual = saw
    assert len(actual) == len(expected) + 1
    assert actual[-1] is None
    assert same_bits(*(torch.stack(x[first : first + 2]) for x in (actual, expected)))
    assert same_bits(*gradients)


def test_hooks_that_see_what_comes_to_a_loss_leave_halves_alone(device: torch.device) -> None:
    h = encoded(device)
    loss = kl_ext.kl_div_single_loss(*h.chunk(2, 1))
    seen: list[Any] = []
    loss.register_hook(seen.append)
    loss.retain_grad()
    loss.grad_fn.register_prehook(seen.extend)
    assert not joins(loss.sum().backward)
    assert len(seen) == 2


@each_operator
@each_cut
def test_anomaly_detection_names_the_gradient_that_is_not_a_number(
    halve: Halve, operator: Operator, first: int, device: torch.device
) -> None:
    """At mu = 1 and log_var = 0, where one of them is infinity times zero."""
    h = encoded(device)
    with torch.no_grad():
        halve(h)[0].fill_(1.0)
        halve(h)[1].zero_()
    said = []
    for separate in (apart, list):
        with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError) as caught:
            (float("inf") * operator(kl_ext, *separate(halve(h))).sum()).backward()
        said.append(str(caught.value))
    assert said[1] == said[0]
    assert any(f"returned nan values in its {first + i}th output" in said[0] for i in (0, 1))


# Nodes that are not what they are called.


@pytest.mark.parametrize("name", ["SliceBackward0", "SplitBackward0", "SplitWithSizesBackward0"])
@each_operator
def test_a_function_is_no_slice_because_it_is_called_one(
    name: str, operator: Operator, first: int, device: torch.device
) -> None:
    ran = []

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, h: Tensor, begin: int) -> Tensor:
            context.begin = begin
            return h[:, begin : begin + 3]

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
            ran.append(context.begin)
            whole = gradient.new_zeros(4, 6, 4, 4)
            whole[:, context.begin : context.begin + 3] = 3 * gradient
            return whole, None

    Half._backward_cls.__name__ = name
    h = encoded(device)
    mu, log_var = Half.apply(h, 0), Half.apply(h, 3)
    assert mu.grad_fn.name() == name
    actual = torch.autograd.grad(total(operator(kl_ext, mu, log_var)), h)[0]
    assert sorted(ran) == [0, 3]
    expected = torch.autograd.grad(total(operator(reference, *h.chunk(2, 1))), h)[0]
    torch.testing.assert_close(actual, 3 * expected, **CLOSE)


# Halves that are assigned other numbers by `.data`, of which autograd hears nothing.


def assign(mu: Tensor, log_var: Tensor, data: Sequence[Tensor]) -> None:
    mu.data, log_var.data = (x.detach().clone(memory_format=torch.preserve_format) for x in data)


def swap(mu: Tensor, log_var: Tensor) -> None:
    mu.data, log_var.data = log_var.data, mu.data


def cut_elsewhere(mu: Tensor, log_var: Tensor) -> None:
    """Into what are halves as well, with log_var first."""
    log_var.data, mu.data = (encoded(mu.device) / 2).detach().chunk(2, 1)


def numbers(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).view(shape)


CHANGES: dict[str, Callable[[Tensor, Tensor], None]] = {
    "the order": swap,
    "other memory": lambda mu, log_var: assign(mu, log_var, (log_var / 2, mu / 2)),
    "halves of another tensor": cut_elsewhere,
    "one half": lambda mu, log_var: setattr(mu, "data", mu.data * 2),
    "the layout of one half": lambda mu, log_var: setattr(mu, "data", mu.data.transpose(2, 3).contiguous().transpose(2, 3)),
    "float32": lambda mu, log_var: assign(mu, log_var, (mu.float(), log_var.float())),
    "float32 of one half": lambda mu, log_var: setattr(log_var, "data", log_var.data.float()),
    "a dimension more": lambda mu, log_var: assign(
        mu, log_var, (numbers(2, 4, 3, 4, 4).to(mu), -numbers(2, 4, 3, 4, 4).to(mu))
    ),
    "a dimension less": lambda mu, log_var: assign(mu, log_var, (mu[0], log_var[1])),
    "two dimensions": lambda mu, log_var: assign(mu, log_var, (mu[0, 0], log_var[0, 0])),
    "no dimension": lambda mu, log_var: assign(mu, log_var, (mu[0, 0, 0, 0], log_var[0, 0, 0, 0])),
    "another dimension": lambda mu, log_var: assign(mu, log_var, numbers(2, 2, 6, 4, 4).to(mu)),
    "another size": lambda mu, log_var: assign(mu, log_var, (mu[:, :2], log_var[:, :2])),
    "a size of one": lambda mu, log_var: assign(mu, log_var, (mu[:, :1], log_var[:, :1])),
}
each_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def outcome(backward: Callable[[], Tensor]) -> Tensor | None:
    """The gradient, or None where autograd refuses."""
    try:
        return backward()
    except RuntimeError:
        return None


def assert_same_outcome(actual: Tensor | None, expected: Tensor | None) -> None:
    assert (actual is None) == (expected is None)
    if actual is not None and expected is not None:
        assert same_bits(actual + 0.0, expected + 0.0)  # the backward of slices adds zeros
        assert actual.stride() == expected.stride()


@each_operator
@each_cut
@each_change
def test_halves_whose_data_is_assigned_give_what_plain_torch_gives(
    change: Callable[[Tensor, Tensor], None], halve: Halve, operator: Operator, first: int, device: torch.device
) -> None:
    h = encoded(device)
    seed = torch.initial_seed()

    def gradient(module: Any, separate: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> Tensor | None:
        mu, log_var = halve(h)
        torch.manual_seed(seed)
        change(mu, log_var)
        return outcome(lambda: torch.autograd.grad(total(operator(module, *separate((mu, log_var)))), h)[0])

    actual, plain = gradient(kl_ext, list), gradient(reference, list)
    assert_same_outcome(actual, gradient(kl_ext, apart))
    assert (actual is None) == (plain is None)
    if actual is not None:
        torch.testing.assert_close(actual, plain, rtol=1e-4, atol=1e-4)  # some of it is computed in float32


@each_operator
@each_cut
@each_change
def test_halves_whose_data_is_assigned_before_the_backward_give_what_they_give_while_somebody_looks(
    change: Callable[[Tensor, Tensor], None], halve: Halve, operator: Operator, first: int, device: torch.device
) -> None:
    h = encoded(device)
    seed = torch.initial_seed()

    def gradient(is_observed: bool) -> Tensor | None:
        mu, log_var = halve(h)
        loss = total(operator(kl_ext, mu, log_var))
        if is_observed:
            mu.grad_fn.register_hook(lambda *_: None)
        torch.manual_seed(seed)
        change(mu, log_var)
        return outcome(lambda: torch.autograd.grad(loss, h)[0])

    assert_same_outcome(gradient(is_observed=False), gradient(is_observed=True))


@each_cut
def test_a_whole_whose_data_is_assigned_gives_what_plain_torch_gives(halve: Halve, device: torch.device) -> None:
    """Its node, made for the shape of before, is kept alive by another graph."""
    for shape in ((4, 6, 4, 4), (4, 6), (2, 6, 4, 4), (4, 6, 4, 4, 2)):
        outcomes = []
        for separate in (list, apart):
            h = encoded(device)
            kept = h.exp()
            h.data = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64, device=device).view(shape)
            loss = kl_ext.kl_div_single_loss(*separate(halve(h)))
            outcomes.append(outcome(lambda h=h, loss=loss: torch.autograd.grad(total(loss), h)[0]))
            del kept
        assert_same_outcome(*outcomes)


# Saved tensors that come back as others.

UNPACKED: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "itself": lambda x: x,
    "a copy": lambda x: x.clone(memory_format=torch.contiguous_format),
    "another layout": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "a dimension more": lambda x: x[None],
    "less": lambda x: x[:, :1],
}


@contextmanager
def unpacked(chosen: Sequence[Tensor], convert: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Saved tensors are what they were, but for the chosen ones."""
    places = [x.data_ptr() for x in chosen]

    def unpack(x: Tensor) -> Tensor:
        return convert(x) if x.data_ptr() in places else x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), unpack):
        yield


@each_operator
@each_cut
@pytest.mark.parametrize("convert", UNPACKED.values(), ids=UNPACKED)
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["mu", "log_var", "both"])
def test_halves_that_are_unpacked_to_others_give_what_tensors_of_their_own_give(
    which: Sequence[int],
    convert: Callable[[Tensor], Tensor],
    halve: Halve,
    operator: Operator,
    first: int,
    device: torch.device,
) -> None:
    h = encoded(device, torch.float32)
    outcomes = []
    for separate in (list, apart):
        halves = separate(halve(h))
        with unpacked([halves[i] for i in which], convert):
            loss = total(operator(kl_ext, *halves))
        outcomes.append(outcome(lambda loss=loss: torch.autograd.grad(loss, h)[0]))
    assert_same_outcome(*outcomes)


def test_one_pair_of_halves_that_is_unpacked_to_others_goes_its_usual_way_alone(device: torch.device) -> None:
    p, q = encoded(device, torch.float32), encoded(device, torch.float32)

    def loss(halves_of_p: Sequence[Tensor], halves_of_q: Sequence[Tensor]) -> Tensor:
        with unpacked(halves_of_q[:1], Tensor.double):
            return kl_ext.gaussian_kl_div(*halves_of_p, *halves_of_q, reduction="batchmean")

    expected = torch.autograd.grad(loss(apart(p.chunk(2, 1)), apart(q.chunk(2, 1))), (p, q))
    result = loss(p.chunk(2, 1), q.chunk(2, 1))
    assert all(same_bits(*pair) for pair in zip(torch.autograd.grad(result, (p, q), retain_graph=True), expected, strict=True))
    assert not joins(lambda: torch.autograd.grad(result, p, retain_graph=True))
    assert joins(lambda: torch.autograd.grad(result, q))


def test_halves_of_nothing(device: torch.device) -> None:
    for shape in ((0, 6), (4, 0), (0, 0)):
        h = torch.zeros(shape, device=device, requires_grad=True)
        half = shape[1] // 2
        kl_ext.kl_div_single_loss(*h.split([half, half], 1)).sum().backward()
        assert h.grad is not None
        assert h.grad.shape == shape
