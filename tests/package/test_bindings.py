"""The two ways from a public function to its operator: straight to the dispatcher, or through torch.ops, with one outcome."""

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import kl_ext
from kl_ext import _bindings, functional
from operators import OPERATORS
from oracle import same_bits

CALLS = {
    "kl_div_single_loss": lambda x, y: kl_ext.kl_div_single_loss(x, y),
    "kl_div_pair_loss": lambda x, y: kl_ext.kl_div_pair_loss(x, y, y, x, clamp_min=-5.0),
    "gaussian_kl_div": lambda x, y: kl_ext.gaussian_kl_div(x, y),
    "gaussian_kl_div, q": lambda x, y: kl_ext.gaussian_kl_div(x, y, y, x, reduction="batchmean"),
    "gaussian_kl_div, a dim": lambda x, y: kl_ext.gaussian_kl_div(x, y, reduction="sum", dim=1),
    "gaussian_kl_div, a list of dims": lambda x, y: kl_ext.gaussian_kl_div(x, y, reduction="sum", dim=[0, 1], keepdim=True),
    "gaussian_kl_div, numbers": lambda x, y: kl_ext.gaussian_kl_div(x, y, 0, 0.5, clamp_min=-8, clamp_max=None),
    "gaussian_kl_div, a number": lambda x, y: kl_ext.gaussian_kl_div(x, y, y, -0.5, dtype=torch.float64),
    "normal_kl_div": lambda x, y: kl_ext.normal_kl_div(x, y),
    "normal_kl_div, q": lambda x, y: kl_ext.normal_kl_div(x, y, y, x, reduction="batchmean"),
    "normal_kl_div, dims": lambda x, y: kl_ext.normal_kl_div(x, y, reduction="mean", dim=(-1, 0), dtype=torch.float64),
    "normal_kl_div, numbers": lambda x, y: kl_ext.normal_kl_div(x, y, 0, 0.5, reduction="sum", dim=[1], keepdim=True),
    "gaussian_kl_div, dims": lambda x, y: kl_ext.gaussian_kl_div(x, y, reduction="mean", dim=(-1, 0), dtype=torch.float64),
}
NAMES = tuple(map(str, OPERATORS))
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


class Subclass(Tensor):
    pass


class Recorder(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def without_torch_ops(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the call went through torch.ops")

    for name in NAMES:
        monkeypatch.setattr(functional, f"_{name}", fail)


@pytest.fixture
def without_bindings(monkeypatch):
    for name in NAMES:
        monkeypatch.setattr(_bindings, name, lambda *arguments: None)


@each_call
@pytest.mark.parametrize("kind", [torch.Tensor.clone, torch.nn.Parameter, torch.nn.Buffer])
def test_tensors_parameters_and_buffers_go_straight_to_the_dispatcher(call, kind, device, without_torch_ops):
    x, y = (kind(torch.randn(2, 3, device=device)) for _ in range(2))
    assert type(call(x, y)) is Tensor


@each_call
@pytest.mark.parametrize("how", ["torch.device", "set_default_device"])
def test_a_default_device_does_not_change_the_way(call, how, device, without_torch_ops):
    x, y = torch.randn(2, 3, device=device), torch.randn(2, 3, device=device)
    if how == "torch.device":
        with torch.device(device):
            call(x, y)
        return
    try:
        torch.set_default_device(device)
        call(x, y)
    finally:
        torch.set_default_device(None)


@each_call
def test_both_ways_give_the_same_values_and_gradients(call, device, request):
    x, y = (torch.rand(2, 3, device=device, requires_grad=True) for _ in range(2))
    straight = call(x, y)
    gradients = torch.autograd.grad(straight.sum(), (x, y))
    request.getfixturevalue("without_bindings")
    other = call(x, y)
    assert same_bits(straight, other)
    assert straight.grad_fn.name() == other.grad_fn.name()
    for a, b in zip(gradients, torch.autograd.grad(other.sum(), (x, y)), strict=True):
        assert same_bits(a, b)


@each_call
def test_a_subclass_and_a_mode_see_the_public_function(call, device):
    x, y = torch.randn(2, 3, device=device), torch.randn(2, 3, device=device)
    assert type(call(x.as_subclass(Subclass), y)) is Subclass
    with Recorder() as recorder, torch.device(device):
        assert same_bits(call(x, y), call(x, y))
    assert {getattr(kl_ext, name) for name in NAMES} & set(recorder.seen)


@each_call
def test_errors_are_the_same_both_ways(call, request):
    cases = [
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64)),
        (torch.ones(2, 3), "text"),
    ]

    def errors():
        raised = []
        for x, y in cases:
            with pytest.raises(Exception) as caught:
                call(x, y)
            raised.append((caught.type, str(caught.value).splitlines()[0]))
        return raised

    straight = errors()
    request.getfixturevalue("without_bindings")
    assert straight == errors()


def test_numbers_of_any_kind_bound_the_clamp(device):
    x, y = torch.randn(5, device=device), torch.randn(5, device=device) * 3
    expected = kl_ext.kl_div_single_loss(x, y, clamp_min=-1.0, clamp_max=1.0)
    assert same_bits(kl_ext.kl_div_single_loss(x, y, clamp_min=-1, clamp_max=True), expected)


def test_anomaly_mode_finds_the_line_of_the_call(device):
    x = torch.randn(3, device=device, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        loss = kl_ext.kl_div_single_loss(x, x)
    assert "test_bindings.py" in "".join(loss.grad_fn.metadata["traceback_"])
