"""Where autograd, or anybody who looks at it, could tell that the gradients of two halves are written at once: nobody can."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from kl_ext import gaussian_kl_div, kl_div_pair_loss, kl_div_single_loss
from oracle import same_bits

Loss = Callable[[Tensor, Tensor], Tensor]

# Of halves [4, 3]. The first two gradients of a node are those of the halves, but where they are q.
LOSSES: dict[str, Loss] = {
    "single": kl_div_single_loss,
    "pair": lambda mu, log_var: kl_div_pair_loss(mu, log_var, torch.ones_like(mu), torch.zeros_like(mu)),
    "pair, q": lambda mu, log_var: kl_div_pair_loss(torch.ones_like(mu), torch.zeros_like(mu), mu, log_var),
    "divergence": lambda mu, log_var: gaussian_kl_div(mu, log_var, torch.ones_like(mu), torch.zeros_like(mu)),
    "sum": lambda mu, log_var: gaussian_kl_div(mu, log_var, reduction="sum"),
    "mean of rows": lambda mu, log_var: gaussian_kl_div(mu, log_var, reduction="mean", dim=1, keepdim=True),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)

CUTS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "chunk": lambda h: h.chunk(2, 1),
    "chunk, the other way": lambda h: h.chunk(2, 1)[::-1],
    "split with sizes": lambda h: h.split([3, 3], -1),
    "slices": lambda h: (h[:, :3], h[:, 3:]),
    "slices from the end": lambda h: (h[:, -3:], h[:, :-3]),
}
each_cut = pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)


def encoded(device: torch.device) -> Tensor:
    return torch.randn(4, 6, device=device, requires_grad=True)


def apart(halves: tuple[Tensor, ...]) -> list[Tensor]:
    """The same numbers in tensors of their own."""
    return [half.clone() for half in halves]


def seen_by(loss: Loss, halves: Any, watch: Callable[[Any, list[Any]], None]) -> list[Any]:
    seen: list[Any] = []
    value = loss(*halves)
    watch(value.grad_fn, seen)
    value.sum().backward()
    return seen


# The node of the loss.


@each_loss
@each_cut
def test_a_hook_on_the_node_sees_the_gradients_of_both_halves(loss: Loss, cut: Any, device: torch.device) -> None:
    def watch(node: Any, seen: list[Any]) -> None:
        node.register_hook(lambda grad_inputs, grad_outputs: seen.extend(grad_inputs))

    h = encoded(device)
    actual, expected = seen_by(loss, cut(h), watch), seen_by(loss, apart(cut(h)), watch)
    assert len(actual) == len(expected) + 1 and actual[-1] is None  # the entry for h, which is documented
    for a, e in zip(actual, expected, strict=False):
        assert (a is None) == (e is None) and (a is None or same_bits(a, e))


@each_loss
@each_cut
def test_a_hook_on_the_node_may_change_what_goes_on(loss: Loss, cut: Any, device: torch.device) -> None:
    def gradient(halves: Any) -> Tensor:
        value = loss(*halves)
        value.grad_fn.register_hook(lambda grads, _: tuple(None if g is None else 3 * g for g in grads))
        return torch.autograd.grad(value.sum(), h)[0]

    h = encoded(device)
    assert torch.equal(gradient(cut(h)), gradient(apart(cut(h))))


@pytest.mark.parametrize("full", [False, True])
def test_a_backward_hook_of_a_module_sees_both_gradients(full: bool, device: torch.device) -> None:
    class Module(torch.nn.Module):
        def forward(self, mu: Tensor, log_var: Tensor) -> Tensor:
            return kl_div_single_loss(mu, log_var)

    def gradients(halves: Any) -> list[Any]:
        seen: list[Any] = []
        module = Module()
        register = module.register_full_backward_hook if full else module.register_backward_hook
        register(lambda _, grad_inputs, grad_outputs: seen.extend(grad_inputs[:2]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module(*halves).sum().backward()
        return seen

    h = encoded(device)
    actual, expected = gradients(h.chunk(2, 1)), gradients(apart(h.chunk(2, 1)))
    assert len(actual) == 2 and all(same_bits(a, e) for a, e in zip(actual, expected, strict=True))


@each_loss
def test_a_hook_before_the_node_changes_both_gradients(loss: Loss, device: torch.device) -> None:
    def gradient(halves: Any) -> Tensor:
        value = loss(*halves)
        value.grad_fn.register_prehook(lambda grads: (2 * grads[0],))
        return torch.autograd.grad(value.sum(), h)[0]

    h = encoded(device)
    assert torch.equal(gradient(h.chunk(2, 1)), gradient(apart(h.chunk(2, 1))))


@each_loss
def test_anomaly_mode_names_the_gradient_that_is_not_a_number(loss: Loss, device: torch.device) -> None:
    def message(halves: Any) -> str:
        with warnings.catch_warnings(), torch.autograd.detect_anomaly(check_nan=True):
            warnings.simplefilter("ignore")
            value = loss(*halves)
            with pytest.raises(RuntimeError, match="returned nan values") as raised:
                value.sum().backward()
        return str(raised.value)

    h = encoded(device)
    with torch.no_grad():
        h[0, 0] = float("nan")
    assert message(h.chunk(2, 1)) == message(apart(h.chunk(2, 1)))


# The nodes of the halves.


def pretender(name: str, factor: float) -> Any:
    """A function of one's own that cuts a half out, under a name of torch's; its backward counts, whatever it does."""

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor, start: int) -> Tensor:
            ctx.start, ctx.shape = start, h.shape
            return h.detach()[:, start : start + 3]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            whole = grad.new_zeros(ctx.shape)
            whole[:, ctx.start : ctx.start + 3] = factor * grad
            return whole, None

    Cut.__name__ = Cut.__qualname__ = name.removesuffix("Backward")
    return Cut


@each_loss
@pytest.mark.parametrize("name", ["SliceBackward0", "SplitBackward0", "SplitWithSizesBackward0"])
def test_a_function_of_ones_own_by_the_name_of_a_slice_runs_its_backward(loss: Loss, name: str, device: torch.device) -> None:
    h = encoded(device)
    cut = pretender(name, 5.0)
    halves = [cut.apply(h, start) for start in (0, 3)]
    for half in halves:
        type(half.grad_fn).__name__ = name
    [actual] = torch.autograd.grad(loss(*halves).sum(), h)
    [expected] = torch.autograd.grad(loss(*apart(h.chunk(2, 1))).sum(), h)
    torch.testing.assert_close(actual, 5 * expected)


# Tensors whose `.data` was assigned.


def outcome(loss: Loss, halves: Any, h: Tensor) -> Any:
    """The gradient of h, or the error of which torch says that the gradient is invalid."""
    try:
        return torch.autograd.grad(loss(*halves).sum(), h)[0]
    except RuntimeError as error:
        assert "invalid gradient" in str(error), error
        return "invalid gradient"
    except IndexError:  # the reduction has no such dimension
        return "no such dimension"


DATA: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    # mu, log_var and another tensor of the size of h
    "of another rank": lambda mu, log_var, g: (
        set_data(mu, g.reshape(2, 2, 6)[..., :3]),
        set_data(log_var, g.reshape(2, 2, 6)[..., 3:]),
    ),
    "of no dimension": lambda mu, log_var, g: (set_data(mu, g[0, 0]), set_data(log_var, g[0, 1])),
    "of more dimensions": lambda mu, log_var, g: (set_data(mu, g[None, None, :, :3]), set_data(log_var, g[None, None, :, 3:])),
    "along another dimension": lambda mu, log_var, g: (set_data(mu, g[:2]), set_data(log_var, g[2:])),
    "swapped": lambda mu, log_var, g: (set_data(mu, g[:, 3:]), set_data(log_var, g[:, :3])),
    "elsewhere": lambda mu, log_var, g: (set_data(mu, g[:, :3]), set_data(log_var, g[:, 3:])),
    "apart": lambda mu, log_var, g: (set_data(mu, g[:, :3].clone()), set_data(log_var, g[:, 3:].t().clone().t())),
    "one in float64": lambda mu, log_var, g: set_data(log_var, g[:, 3:].double()),
    "both in bfloat16": lambda mu, log_var, g: (set_data(mu, g[:, :3].bfloat16()), set_data(log_var, g[:, 3:].bfloat16())),
}


def set_data(tensor: Tensor, data: Tensor) -> None:
    tensor.data = data


@each_loss
@each_cut
@pytest.mark.parametrize("assign", DATA.values(), ids=DATA)
def test_assigned_data_have_the_gradients_that_torch_gives_them_or_its_error(
    loss: Loss, cut: Any, assign: Any, device: torch.device
) -> None:
    """Against tensors that have the same data, cut by a function that kl_ext does not know."""
    h, g = encoded(device), torch.randn(4, 6, device=device)
    halves = cut(h)
    assign(*halves, g)
    starts = (
        [0, 3] if halves[0] is not None and cut not in (CUTS["chunk, the other way"], CUTS["slices from the end"]) else [3, 0]
    )
    others = [pretender("Cut", 1.0).apply(h, start) for start in starts]
    for other, half in zip(others, halves, strict=True):
        other.data = half.data
    actual, expected = outcome(loss, halves, h), outcome(loss, others, h)
    if isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected)
    else:
        assert actual == expected


# Saved-tensor hooks.

UNPACKED: dict[str, tuple[Any, Any]] = {
    "mu in float64": (torch.float64, None),
    "log_var in float64": (None, torch.float64),
    "mu in float16": (torch.float16, None),
    "both in float64": (torch.float64, torch.float64),
    "both in bfloat16": (torch.bfloat16, torch.bfloat16),
    "mu in float64, log_var in bfloat16": (torch.float64, torch.bfloat16),
}


@contextmanager
def unpacked_as(mu: Tensor, log_var: Tensor, dtypes: tuple[Any, Any]) -> Iterator[None]:
    kinds = {mu.data_ptr(): dtypes[0], log_var.data_ptr(): dtypes[1]}

    def pack(x: Tensor) -> tuple[Tensor, Any]:
        return x, kinds.get(x.data_ptr())

    def unpack(packed: tuple[Tensor, Any]) -> Tensor:
        return packed[0].detach().to(packed[1] or packed[0].dtype)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


@each_loss
@each_cut
@pytest.mark.parametrize("dtypes", UNPACKED.values(), ids=UNPACKED)
def test_halves_may_be_unpacked_to_other_dtypes(loss: Loss, cut: Any, dtypes: Any, device: torch.device) -> None:
    def gradient(halves: Any) -> Tensor:
        with unpacked_as(*halves, dtypes):
            value = loss(*halves)
        return torch.autograd.grad(value.sum(), h)[0]

    h = encoded(device)
    actual, expected = gradient(cut(h)), gradient(apart(cut(h)))
    assert actual.dtype == expected.dtype == torch.float32
    assert torch.equal(actual, expected)


@each_loss
@each_cut
def test_halves_may_be_kept_elsewhere_and_in_another_layout(loss: Loss, cut: Any, device: torch.device) -> None:
    h = encoded(device)
    expected = torch.autograd.grad(loss(*apart(cut(h))).sum(), h)[0]
    with torch.autograd.graph.save_on_cpu():
        value = loss(*cut(h))
    assert torch.equal(torch.autograd.grad(value.sum(), h)[0], expected)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.t().contiguous(), lambda x: x.t()):
        value = loss(*cut(h))
    assert torch.equal(torch.autograd.grad(value.sum(), h)[0], expected)


# What can be seen, as csrc/autograd/halves.h has it.


def test_the_node_has_an_entry_more_in_next_functions(device: torch.device) -> None:
    h = encoded(device)
    node = kl_div_single_loss(*h.chunk(2, 1)).grad_fn
    assert [type(f).__name__ for f, _ in node.next_functions] == ["SplitBackward0", "SplitBackward0", "AccumulateGrad"]
    assert len(kl_div_single_loss(*apart(h.chunk(2, 1))).grad_fn.next_functions) == 2
