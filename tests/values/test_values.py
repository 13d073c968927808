"""The documented formulas, evaluated by plain torch in float64, are what the operators compute: special values included."""

import itertools
import math

import pytest
import torch

import kl_ext
from operators import CLOSE, PAIR, SINGLE, close, each_documented_loss, each_elementwise_operator
from oracle import same_bits

INF, NAN = math.inf, math.nan


def documented_single(mu, log_var, clamp_min=-30.0, clamp_max=20.0):
    log_var = log_var.clamp(clamp_min, clamp_max)
    return 0.5 * (mu**2 + log_var.exp() - log_var - 1)


def documented_pair(mu_p, log_var_p, mu_q, log_var_q, clamp_min=-30.0, clamp_max=20.0):
    log_var_p, log_var_q = log_var_p.clamp(clamp_min, clamp_max), log_var_q.clamp(clamp_min, clamp_max)
    return (log_var_q - log_var_p) + (log_var_p.exp() + (mu_p - mu_q) ** 2) / log_var_q.exp() - 0.5


DOCUMENTED = {SINGLE: documented_single, PAIR: documented_pair}


def kind(x):
    """What a special value can be: NaN, either infinity, or finite."""
    x = x.detach().cpu().double()
    return torch.where(x.isnan(), 2, torch.where(x.isinf(), x.sign(), 0))


def assert_same_kind_and_value(got, want, inputs):
    for index, (a, b) in enumerate(zip(kind(got).tolist(), kind(want).tolist(), strict=True)):
        assert a == b, (
            f"at {[x[index].item() for x in inputs]}: got {got[index].item()}, the formula gives {want[index].item()}"
        )
    finite = want.isfinite()
    rtol = 4.5 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.detach()[finite].cpu().double(), want.detach()[finite], rtol=rtol, atol=CLOSE["atol"])


def grid(values, count, dtype, device):
    """Every combination of the values, as `count` columns."""
    rows = torch.tensor(list(itertools.product(values, repeat=count)), dtype=dtype, device=device)
    return [column.clone().requires_grad_() for column in rows.unbind(1)]


@each_documented_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drop_in_for_the_documented_formula(operator, dtype, device):
    inputs = operator.inputs([40, 50], dtype=dtype, device=device, requires_grad=True)
    doubles = [x.detach().cpu().double().requires_grad_() for x in inputs]
    weight = torch.randn(40, 50, dtype=dtype, device=device)
    got, want = operator(*inputs), DOCUMENTED[operator](*doubles)
    unit = torch.finfo(dtype).eps  # at least an ulp of 1
    torch.testing.assert_close(got.cpu().double(), want, rtol=operator.bound * unit, atol=CLOSE["atol"])
    exact_weight = weight.cpu().double()
    gradients = torch.autograd.grad(got, inputs, weight), torch.autograd.grad(want, doubles, exact_weight)
    for place, (a, b) in enumerate(zip(*gradients, strict=True)):
        # 3 ulp, and half of one for the product with the weight. For the spread of q twice as many, of the larger of two terms:
        # these differ by the gradient, and one of them is the weight.
        ulps, size = (6.5, b.abs() + exact_weight.abs()) if place == 3 else (3.5, b.abs())
        error = (a.cpu().double() - b).abs()
        assert (error <= ulps * unit * size + CLOSE["atol"]).all(), error.max()


def test_the_pair_keeps_its_documented_constant(device):
    """One half at p = q, and twice the divergence that torch.distributions knows plus one half elsewhere."""
    mu_p, log_var_p, mu_q, log_var_q = PAIR.inputs([100], device=device)
    p, q = (torch.distributions.Normal(mu, (log_var / 2).exp()) for mu, log_var in ((mu_p, log_var_p), (mu_q, log_var_q)))
    got = kl_ext.kl_div_pair_loss(mu_p, log_var_p, mu_q, log_var_q)
    torch.testing.assert_close(got, 2 * torch.distributions.kl_divergence(p, q) + 0.5, **close(2))
    assert (kl_ext.kl_div_pair_loss(mu_p, log_var_p, mu_p, log_var_p) == 0.5).all()


def test_the_single_is_the_divergence_from_the_standard_normal(device):
    mu, log_var = SINGLE.inputs([100], device=device)
    p = torch.distributions.Normal(mu, (log_var / 2).exp())
    q = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    want = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(kl_ext.kl_div_single_loss(mu, log_var), want, **CLOSE)


def test_the_losses_are_elementwise_and_not_summed(device):
    mu, log_var = torch.randn(2, 3, 5, device=device)
    assert kl_ext.kl_div_single_loss(mu, log_var).shape == kl_ext.kl_div_pair_loss(mu, log_var, mu, log_var).shape == (3, 5)


@each_documented_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_non_finite_inputs_give_what_the_formula_gives(operator, dtype, device):
    """Values and gradients, in every combination of arguments."""
    inputs = grid([NAN, INF, -INF, 0.0, -1.5, 2.0], operator.count, dtype, device)
    doubles = [x.detach().cpu().double().requires_grad_() for x in inputs]
    got, want = operator(*inputs), DOCUMENTED[operator](*doubles)
    if dtype in (torch.float32, torch.float64):
        assert_same_kind_and_value(got, want, inputs)
    assert torch.equal(kind(got), kind(want.to(dtype))), "what is finite for the formula may overflow in dtype, and no more"
    gradients = torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), doubles)
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(kind(a), kind(b.to(dtype))), f"gradients of non-finite inputs: {a.tolist()} against {b.tolist()}"


@each_documented_loss
@pytest.mark.parametrize("clamps", [(-INF, INF), (-INF, 20.0), (-30.0, INF), (-INF, -INF), (INF, INF), (0.0, 0.0)], ids=str)
def test_non_finite_inputs_and_clamps_give_what_the_formula_gives(operator, clamps, device):
    inputs = grid([NAN, INF, -INF, 0.0, -1.5, 2.0], operator.count, torch.float32, device)
    got = operator(*inputs, clamp_min=clamps[0], clamp_max=clamps[1])
    assert_same_kind_and_value(got, DOCUMENTED[operator](*(x.detach().cpu().double() for x in inputs), *clamps), inputs)


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_nan_in_one_argument_is_nan_in_the_loss(position, device):
    """In no element but its own."""
    inputs = [torch.randn(65, device=device) for _ in range(4)]
    inputs[position][33] = NAN
    only = torch.arange(65, device=device) == 33
    assert torch.equal(kl_ext.kl_div_pair_loss(*inputs).isnan(), only)
    if position < 2:
        assert torch.equal(kl_ext.kl_div_single_loss(*inputs[:2]).isnan(), only)


def below(x, dtype):
    return torch.nextafter(torch.tensor(x, dtype=dtype), torch.tensor(-INF, dtype=dtype)).item()


def above(x, dtype):
    return torch.nextafter(torch.tensor(x, dtype=dtype), torch.tensor(INF, dtype=dtype)).item()


@each_documented_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clamps", [(-30.0, 20.0), (0.05, 0.15), (-1.5, 2.0), (-60.0, 60.0), (0.1, 0.3)], ids=str)
def test_the_clamp_passes_gradients_at_its_bounds_and_stops_them_outside(operator, dtype, clamps, device):
    low, high = (torch.tensor(x, dtype=dtype).item() for x in clamps)
    log_var = [below(low, dtype), low, high, above(high, dtype), -INF, INF, NAN]
    passes = torch.tensor([False, True, True, False, False, False, False])
    for position in range(1, operator.count, 2):
        inputs = [torch.full((7,), x, dtype=dtype, device=device) for x in (3.0, 0.25, -2.0, 0.125)[: operator.count]]
        inputs[position] = torch.tensor(log_var, dtype=dtype, device=device)
        inputs = [x.requires_grad_() for x in inputs]
        value = operator(*inputs, clamp_min=clamps[0], clamp_max=clamps[1])
        (gradient,) = torch.autograd.grad(value.sum(), inputs[position])
        assert torch.equal(gradient.cpu() != 0, passes), gradient
        assert not gradient.isnan().any()


@each_documented_loss
@pytest.mark.parametrize("special", [INF, -INF, NAN])
def test_outside_the_clamp_the_gradient_is_zero_whatever_grad_output(operator, special, device):
    """torch.clamp selects, it does not multiply."""
    for position in range(1, operator.count, 2):
        inputs = [torch.randn(3, device=device) for _ in range(operator.count)]
        inputs[position] = torch.tensor([-40.0, 25.0, NAN], device=device)
        inputs = [x.requires_grad_() for x in inputs]
        grad_output = torch.full((3,), special, device=device)
        (gradient,) = torch.autograd.grad(operator(*inputs), inputs[position], grad_output)
        assert (gradient == 0).all(), gradient


@each_documented_loss
def test_a_clamp_of_equal_bounds_fixes_the_log_variance(operator, device):
    inputs = [torch.randn(50, device=device) for _ in range(operator.count)]
    fixed = [torch.full_like(x, 0.75) if i % 2 else x for i, x in enumerate(inputs)]
    assert same_bits(operator(*inputs, clamp_min=0.75, clamp_max=0.75), operator(*fixed))


@each_elementwise_operator
def test_the_same_tensor_given_twice(operator, device):
    """Its gradient is the sum over its places."""
    x = torch.randn(100, dtype=torch.float64, device=device, requires_grad=True)
    value = operator(*[x] * operator.count)
    copies = [x.detach().clone().requires_grad_() for _ in range(operator.count)]
    apart = operator(*copies)
    assert same_bits(value, apart)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert same_bits(gradient, sum(torch.autograd.grad(apart.sum(), copies)))


@each_elementwise_operator
def test_a_zero_dim_cpu_tensor_goes_with_tensors_of_any_device(operator, device):
    """In every place but all; its gradient is where it is."""
    for position in range(operator.count):
        inputs = [torch.randn(50, device=device) for _ in range(operator.count)]
        same = [x.clone() for x in inputs]
        inputs[position] = torch.tensor(0.375)
        same[position] = torch.full((50,), 0.375, device=device)
        for group in (inputs, same):
            for x in group:
                x.requires_grad_()
        value, want = operator(*inputs), operator(*same)
        assert value.device == same[0].device and same_bits(value, want)
        got = torch.autograd.grad(value.sum(), inputs)
        for x, gradient, full in zip(inputs, got, torch.autograd.grad(want.sum(), same), strict=True):
            assert gradient.device == x.device and gradient.shape == x.shape
            if x.dim():
                assert same_bits(gradient, full)
            else:  # a sum of up to a thousand terms: at most 21 roundings
                error = (gradient - full.cpu().double().sum()).abs()
                assert error <= 21 * 2.0**-24 * full.cpu().double().abs().sum()


@each_elementwise_operator
def test_inputs_are_left_as_they_were(operator, device):
    inputs = [torch.randn(100, device=device).requires_grad_() for _ in range(operator.count)]
    before = [x.detach().clone() for x in inputs]
    value = operator(*inputs)
    torch.autograd.grad(value, inputs, grad_output := torch.ones_like(value))
    assert all(same_bits(x, y) for x, y in zip(inputs, before, strict=True)) and (grad_output == 1).all()


def negated(x):
    """x, as a view that keeps -x in memory and a bit that says so."""
    view = torch._neg_view(x.neg())
    assert view.is_neg()
    return view


@each_elementwise_operator
def test_views_with_the_negative_bit(operator, device):
    """What `.imag` of a conjugated tensor is."""
    plain = [torch.randn(6, 7, device=device) for _ in range(operator.count)]
    negative = [negated(plain[0]), *plain[1:-1], torch.complex(plain[0], -plain[-1]).conj().imag]
    assert negative[-1].is_neg()
    assert same_bits(operator(*negative), operator(*plain))
    grad_output = torch.randn(6, 7, device=device)
    leaves = [[x.requires_grad_() for x in group] for group in (plain, [x.detach() for x in negative])]
    want = torch.autograd.grad(operator(*leaves[0]), leaves[0], grad_output)
    got = torch.autograd.grad(operator(*leaves[1]), leaves[1], negated(grad_output))
    assert all(same_bits(a.resolve_neg(), b) for a, b in zip(got, want, strict=True))


@each_elementwise_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_tensors(operator, dtype, device):
    """The ones that forward-mode AD uses, which have no memory."""
    plain = [torch.randn(6, 7, dtype=dtype, device=device) for _ in range(operator.count)]
    for position in range(operator.count):
        zero, lazy = list(plain), list(plain)
        zero[position] = torch.zeros(6, 7, dtype=dtype, device=device)
        lazy[position] = torch._efficientzerotensor((6, 7), dtype=dtype, device=device)
        assert same_bits(operator(*lazy), operator(*zero))
    nothing = torch._efficientzerotensor((6, 7), dtype=dtype, device=device)
    for gradient in operator.backward_operator(nothing, *plain, *operator.bounds, [True] * operator.count):
        assert gradient.shape == (6, 7) and gradient.dtype == dtype and (gradient == 0).all()


@each_elementwise_operator
def test_a_grad_output_of_zeros_gives_zeros(operator, device):
    inputs = [torch.randn(100, device=device).requires_grad_() for _ in range(operator.count)]
    value = operator(*inputs)
    for gradient in torch.autograd.grad(value, inputs, torch.zeros_like(value)):
        assert (gradient == 0).all()


@each_elementwise_operator
def test_unwanted_gradients_are_none(operator, device):
    inputs = [torch.randn(5, device=device) for _ in range(operator.count)]
    grad_output = torch.randn(5, device=device)
    every = operator.backward_operator(grad_output, *inputs, *operator.bounds, [True] * operator.count)
    for mask in itertools.product([False, True], repeat=operator.count):
        some = operator.backward_operator(grad_output, *inputs, *operator.bounds, list(mask))
        for wanted, gradient, full in zip(mask, some, every, strict=True):
            assert same_bits(gradient, full) if wanted else gradient is None
