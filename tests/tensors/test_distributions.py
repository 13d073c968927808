"""torch.distributions through kl_ext, and the posterior of diffusers: the numbers they had, and what is better about them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import mpmath
import pytest
import torch
from diffusers.models.autoencoders import autoencoder_kl, vae
from mpmath import mpf
from torch import Tensor
from torch.distributions import Independent, LogNormal, Normal, kl, kl_divergence, register_kl
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from kl_ext.distributions import DiagonalGaussianDistribution, register, unregister
from operators import CLOSE

# Of sums of up to a thousand terms, none of them negative: 2.5 ulp for each against N(0, 1), then 21 roundings.
SUM_OF_FLOATS = {"rtol": (2 * 2.5 + 21) * 2.0**-24, "atol": 0.0}


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    yield
    unregister()


@pytest.fixture
def registered() -> None:
    register()


def formula(loc_p: Tensor, scale_p: Tensor, loc_q: Tensor, scale_q: Tensor) -> Tensor:
    return torch.log(scale_q / scale_p) + (scale_p**2 + (loc_p - loc_q) ** 2) / (2 * scale_q**2) - 0.5


def normal(
    *shape: int, kind: type[Normal] = Normal, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Normal:
    loc, scale = torch.randn(shape, dtype=dtype, device=device), torch.rand(shape, dtype=dtype, device=device) + 0.5
    return kind(loc.requires_grad_(), scale.requires_grad_())


def parameters_of(*distributions: Normal) -> list[Tensor]:
    return [x for distribution in distributions for x in (distribution.loc, distribution.scale)]


# torch.distributions


def test_importing_changes_nothing() -> None:
    code = (
        "import torch; from torch.distributions import kl; before = dict(kl._KL_REGISTRY), dict(kl._KL_MEMOIZE); "
        "import kl_ext.distributions; assert before == (kl._KL_REGISTRY, kl._KL_MEMOIZE)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("registered")
def test_the_divergence_is_accurate_where_p_comes_close_to_q() -> None:
    q = normal(100, dtype=torch.float32)
    p = Normal(q.loc + 1e-3 * torch.randn(100), q.scale * (1 + 1e-3 * torch.randn(100)))
    got = kl_divergence(p, q)
    with mpmath.workdps(60):
        for value, *numbers in zip(got.tolist(), *(x.tolist() for x in parameters_of(p, q)), strict=True):
            loc_p, scale_p, loc_q, scale_q = map(mpf, numbers)
            exact = mpmath.log(scale_q / scale_p) + (scale_p**2 + (loc_p - loc_q) ** 2) / (2 * scale_q**2) - mpf(1) / 2
            assert abs(value - exact) <= 4.5 * 2.0**-23 * exact  # 4.5 ulp at most
    unregister()
    assert (kl_divergence(p, q) - got).abs().max() > 1e-3 * got.max()  # torch's own is far from it


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("shapes", [((3, 4), (3, 4)), ((3, 4), (4,)), ((3, 1), (1, 4)), ((), (5,)), ((0, 2), (2,))], ids=str)
def test_values_and_gradients_are_those_of_the_formula(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], device: torch.device
) -> None:
    p, q = (normal(*shape, device=device) for shape in shapes)
    given = parameters_of(p, q)
    value, expected = kl_divergence(p, q), formula(*given)
    assert value.shape == expected.shape
    torch.testing.assert_close(value, expected, **CLOSE)
    weights = torch.rand_like(value)
    for gradient, wanted in zip(*(torch.autograd.grad(x, given, weights) for x in (value, expected)), strict=True):
        torch.testing.assert_close(gradient, wanted, **CLOSE)


@pytest.mark.usefixtures("registered")
def test_expanded_independent_and_transformed_distributions() -> None:
    p, q = normal(3, 4), normal(4)
    given = parameters_of(p, q)
    expected = formula(*given)
    expanded = q.expand((3, 4))
    torch.testing.assert_close(kl_divergence(p, expanded), expected, **CLOSE)
    torch.testing.assert_close(kl_divergence(Independent(p, 1), Independent(expanded, 1)), expected.sum(1), **CLOSE)
    torch.testing.assert_close(kl_divergence(LogNormal(*given[:2]), LogNormal(*given[2:])), expected, **CLOSE)
    wanted = torch.autograd.grad(expected.sum(), given)
    for gradient, other in zip(torch.autograd.grad(kl_divergence(p, expanded).sum(), given), wanted, strict=True):
        torch.testing.assert_close(gradient, other, **CLOSE)


class _Mixin:
    """As the distributions of pyro have one."""


class _Inherited(Normal, _Mixin):
    pass


class _InheritedIndependent(Independent, _Mixin):
    pass


class _OwnDivergence(Normal):
    pass


@register_kl(_OwnDivergence, _OwnDivergence)
def _own_divergence(p: Normal, q: Normal) -> Tensor:
    return torch.full_like(p.loc, 7.0)


def goes_through_kl_ext(p: Normal | Independent, q: Normal | Independent) -> bool:
    """Whether their divergence is computed by the operator."""
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        kl_divergence(p, q)
    return "kl_ext::normal_kl_div" in called


@pytest.mark.usefixtures("registered")
def test_subclasses_of_normal_are_treated_as_torch_dispatches_them() -> None:
    p, q, prior = normal(3, kind=_Inherited), normal(3, kind=_Inherited), normal(3)
    for one, other in ((p, q), (p, prior), (prior, p)):
        torch.testing.assert_close(kl_divergence(one, other), formula(*parameters_of(one, other)), **CLOSE)
        assert goes_through_kl_ext(one, other)
    both = _InheritedIndependent(p, 1), _InheritedIndependent(q, 1)
    torch.testing.assert_close(kl_divergence(*both), formula(*parameters_of(p, q)).sum(), **CLOSE)
    own = normal(3, kind=_OwnDivergence)
    assert kl_divergence(own, own).tolist() == [7.0] * 3
    torch.testing.assert_close(kl_divergence(own, prior), formula(*parameters_of(own, prior)), **CLOSE)


class _Unknown(Tensor):
    """A tensor whose class computes what it knows, which kl_ext is not."""

    wrapped: Tensor

    @staticmethod
    def refuse() -> Any:
        return NotImplemented

    @staticmethod
    def __new__(cls, inner: Tensor) -> _Unknown:
        self = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        self.wrapped = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "kl_ext":
            return cls.refuse()
        result = func(*(x.wrapped if isinstance(x, _Unknown) else x for x in args), **(kwargs or {}))
        return [cls(x) for x in result] if isinstance(result, list) else cls(result)


class _WithoutStrategy(_Unknown):
    """It refuses as a DTensor does what it has no sharding strategy for."""

    @staticmethod
    def refuse() -> Any:
        raise NotImplementedError("no sharding strategy registered")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    "make",
    [lambda x: x.to(torch.int64), lambda x: x.to(torch.complex64), _Unknown, _WithoutStrategy],
    ids=["int64", "complex64", "a class that does not know the operator", "a class that refuses it"],
)
def test_normals_of_other_tensors_are_treated_as_before(make: Callable[[Tensor], Tensor]) -> None:
    p, q = (Normal(make(torch.ones(3)), make(torch.full((3,), scale)), validate_args=False) for scale in (2.0, 4.0))
    got = kl_divergence(p, q)
    unregister()
    before = kl_divergence(p, q)
    assert type(got) is type(before)
    got, before = (getattr(x, "wrapped", x) for x in (got, before))
    assert got.dtype == before.dtype
    assert torch.equal(got, before)


def test_undone_it_leaves_what_was_there() -> None:
    p, q = normal(3), normal(3, kind=_Inherited)
    pairs = [(p, p), (p, q), (q, q), (Independent(p, 1), Independent(p, 1))]
    before = [kl_divergence(*pair) for pair in pairs]
    registry, memoized = list(kl._KL_REGISTRY.items()), dict(kl._KL_MEMOIZE)
    register()
    register()  # twice is once
    assert all(goes_through_kl_ext(*pair) for pair in pairs)
    unregister()
    assert list(kl._KL_REGISTRY.items()) == registry
    assert memoized == kl._KL_MEMOIZE
    assert all(torch.equal(kl_divergence(*pair), value) for pair, value in zip(pairs, before, strict=True))
    assert not any(goes_through_kl_ext(*pair) for pair in pairs)
    unregister()  # and so is this
    assert list(kl._KL_REGISTRY.items()) == registry


def test_what_was_looked_up_in_between_is_undone_too() -> None:
    class Fresh(Normal):
        pass

    p = normal(3, kind=Fresh)
    register()
    assert goes_through_kl_ext(p, p)
    unregister()
    assert not goes_through_kl_ext(p, p)


def test_what_others_register_afterwards_stays_theirs() -> None:
    before = kl._KL_REGISTRY[Normal, Normal]
    try:
        register()
        through = kl._KL_REGISTRY[Normal, Normal]
        register_kl(Normal, Normal)(lambda p, q: through(p, q) + 1)
        unregister()
        p, q = normal(3), normal(3)
        torch.testing.assert_close(kl_divergence(p, q), formula(*parameters_of(p, q)) + 1, **CLOSE)
        register()  # over theirs, which serves as what was before
        unregister()
        torch.testing.assert_close(kl_divergence(p, q), formula(*parameters_of(p, q)) + 1, **CLOSE)
    finally:
        register_kl(Normal, Normal)(before)


def test_it_is_compiled_whole_and_what_was_compiled_before_notices() -> None:
    p, q = normal(3, 4), normal(4)
    kl_divergence(Independent(p, 1), Independent(q.expand((3, 4)), 1))  # torch.compile cannot trace the first look-up

    def expanded(q: Normal) -> Normal:
        return q if torch.__version__.startswith(("2.11.", "2.12.")) else q.expand((3, 4))  # they cannot trace it

    def divergence(loc_p: Tensor, scale_p: Tensor, loc_q: Tensor, scale_q: Tensor) -> Tensor:
        return kl_divergence(Independent(Normal(loc_p, scale_p), 1), Independent(expanded(Normal(loc_q, scale_q)), 1))

    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(str(graph.code))
        return graph.forward

    compiled = torch.compile(divergence, backend=backend, fullgraph=True)
    given = parameters_of(p, q)
    torch.testing.assert_close(compiled(*given), formula(*given).sum(1), **CLOSE)
    register()
    torch.testing.assert_close(compiled(*given), formula(*given).sum(1), **CLOSE)
    assert ["normal_kl_div" in graph for graph in graphs] == [False, True]


# The posterior of diffusers

LATENT = (2, 6, 4, 4)  # of two samples: three channels of means, three of log-variances


def encoded(*shape: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """Some log-variances are beyond both bounds of the clamp."""
    return (torch.randn(shape, dtype=torch.float64) * 12).to(device, dtype).requires_grad_()


# Methods that both have, to be called on a distribution and another one of its kind.
METHODS: dict[str, Callable[[Any, Any], Tensor]] = {
    "mean": lambda p, _: p.mean,
    "logvar": lambda p, _: p.logvar,
    "std": lambda p, _: p.std,
    "var": lambda p, _: p.var,
    "mode": lambda p, _: p.mode(),
    "sample": lambda p, _: p.sample(torch.Generator().manual_seed(5)),
    "kl": lambda p, _: p.kl(),
    "kl of another": lambda p, q: p.kl(q),
    "nll": lambda p, _: p.nll(torch.ones_like(p.mean)),
    "nll, dims": lambda p, _: p.nll(torch.ones_like(p.mean), dims=[1, 3]),
}


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_values_and_gradients_are_those_of_diffusers(
    method: Callable[[Any, Any], Tensor], deterministic: bool, device: torch.device
) -> None:
    h, other = encoded(*LATENT, device=device), encoded(*LATENT, device=device)
    got, expected = (
        method(kind(h, deterministic=deterministic), kind(other))
        for kind in (DiagonalGaussianDistribution, vae.DiagonalGaussianDistribution)
    )
    assert got.shape == expected.shape
    # The zeros of diffusers that are deterministic are of torch's default dtype and on the CPU.
    torch.testing.assert_close(got, expected, check_dtype=not deterministic, check_device=not deterministic, **CLOSE)
    if expected.requires_grad:
        weights = torch.rand_like(expected)
        gradients = (torch.autograd.grad(x, (h, other), weights, allow_unused=True) for x in (got, expected))
        for gradient, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, wanted, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_samples_have_the_bits_of_diffusers(dtype: torch.dtype) -> None:
    h = encoded(*LATENT, dtype=dtype)
    for generator in (None, torch.Generator()):
        drawn = []
        for kind in (DiagonalGaussianDistribution, vae.DiagonalGaussianDistribution):
            torch.manual_seed(3) if generator is None else generator.manual_seed(3)
            drawn.append(kind(h).sample(generator))
        assert torch.equal(*drawn)
        assert drawn[0].dtype == dtype


@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 8), 1), ((3, 5, 8), -1), ((3, 8, 5), 1), ((2, 3, 4, 5, 6), 2), ((6,), 0)], ids=str
)
def test_parameters_of_any_rank(shape: tuple[int, ...], dim: int) -> None:
    h, other = encoded(*shape), encoded(*shape)
    (mean, log_var), (mean_q, log_var_q) = (x.chunk(2, dim) for x in (h, other))
    log_var, log_var_q = log_var.clamp(-30, 20), log_var_q.clamp(-30, 20)
    posterior, prior = DiagonalGaussianDistribution(h, dim), DiagonalGaussianDistribution(other, dim)
    torch.testing.assert_close(posterior.std, (log_var / 2).exp(), **CLOSE)
    assert posterior.sample().shape == mean.shape

    def total(terms: Tensor) -> Tensor:
        return terms.reshape(terms.shape[0], -1).sum(1)

    expected = {
        "kl": total(mean**2 + log_var.exp() - log_var - 1) / 2,
        "kl of another": total((log_var.exp() + (mean - mean_q) ** 2) / log_var_q.exp() + log_var_q - log_var - 1) / 2,
        "nll": -total(Normal(mean, (log_var / 2).exp()).log_prob(torch.ones_like(mean))),
    }
    for name, value in expected.items():
        torch.testing.assert_close(METHODS[name](posterior, prior), value, **CLOSE)


@pytest.mark.parametrize(
    "kind", [DiagonalGaussianDistribution, vae.DiagonalGaussianDistribution], ids=lambda kind: kind.__module__
)
def test_the_other_distribution_may_be_that_of_diffusers(kind: type) -> None:
    h, other = encoded(*LATENT), encoded(*LATENT)
    expected = vae.DiagonalGaussianDistribution(h).kl(vae.DiagonalGaussianDistribution(other))
    torch.testing.assert_close(DiagonalGaussianDistribution(h).kl(kind(other)), expected, **CLOSE)
    assert DiagonalGaussianDistribution(h).kl(kind(other, deterministic=True)).tolist() == [float("inf")] * 2


def test_the_divergence_is_accurate_near_the_standard_normal() -> None:
    h = torch.randn(8, 64, 2, 4) * 1e-4  # 256 terms a sample
    exact = vae.DiagonalGaussianDistribution(h.double()).kl()  # of terms near 1e-8, 1e-16 away from exact ones
    torch.testing.assert_close(DiagonalGaussianDistribution(h).kl().double(), exact, **SUM_OF_FLOATS)
    assert (vae.DiagonalGaussianDistribution(h).kl() / exact - 1).abs().max() > 1e-2


def test_the_gradient_passes_at_the_bounds_of_the_clamp() -> None:
    h = torch.tensor([[0.0, 0.0, 0.0, 0.0, -30.0, 20.0, -31.0, 21.0]], dtype=torch.float64, requires_grad=True)
    DiagonalGaussianDistribution(h).kl().sum().backward()
    of_log_var = torch.tensor([-30.0, 20.0], dtype=torch.float64).exp() / 2 - 0.5
    torch.testing.assert_close(h.grad[0, 4:6], of_log_var, **CLOSE)
    assert h.grad[0, 6:].tolist() == [0.0, 0.0]


def joins(backward: Callable[[], Any]) -> bool:
    """Whether a backward pass joins the gradients of two halves."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        backward()
    return any(event.name in ("aten::cat", "aten::slice_backward") for event in profiled.events())


def test_the_gradient_of_the_parameters_is_written_at_once() -> None:
    def backward_of(kind: Any, method: str) -> Callable[[], Any]:
        return METHODS[method](kind(encoded(*LATENT)), kind(encoded(*LATENT))).sum().backward

    for method in ("kl", "kl of another"):
        assert not joins(backward_of(DiagonalGaussianDistribution, method))
        assert joins(backward_of(vae.DiagonalGaussianDistribution, method))


def test_an_autoencoder_of_diffusers_trains_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model = autoencoder_kl.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=2,
        norm_num_groups=2,
        sample_size=8,
    ).double()
    images = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    steps = []
    for kind in (vae.DiagonalGaussianDistribution, DiagonalGaussianDistribution):
        monkeypatch.setattr(autoencoder_kl, "DiagonalGaussianDistribution", kind)
        model.zero_grad()
        posterior = model.encode(images).latent_dist
        assert type(posterior) is kind
        latents = posterior.sample(torch.Generator().manual_seed(1))
        reconstruction = (model.decode(latents).sample - images).square().sum() / len(images)
        loss = reconstruction + 0.1 * posterior.kl().mean()
        loss.backward()
        steps.append([loss.detach(), *(x.grad.clone() for x in model.parameters())])
    largest = max(x.abs().max().item() for x in steps[0])  # what is 0 but for rounding is compared with it
    for expected, got in zip(*steps, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 * largest)


def test_it_is_compiled_whole() -> None:
    def step(h: Tensor) -> tuple[Tensor, ...]:
        posterior = DiagonalGaussianDistribution(h)
        return posterior.kl(), posterior.std, posterior.nll(posterior.mode())

    h = encoded(*LATENT)
    for got, expected in zip(torch.compile(step, backend="aot_eager", fullgraph=True)(h), step(h), strict=True):
        assert torch.equal(got, expected)


def test_parameters_that_have_no_halves_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^DiagonalGaussianDistribution: expected .* even size, along dim 1, got shape \[2, 3\]"
    ):
        DiagonalGaussianDistribution(torch.zeros(2, 3))
    with pytest.raises(IndexError, match="Dimension out of range"):
        DiagonalGaussianDistribution(torch.zeros(2))
    with pytest.raises(
        TypeError, match=r"^gaussian_kl_div: expected mu_p to be a float16, bfloat16, float32 or float64 tensor"
    ):
        DiagonalGaussianDistribution(torch.zeros(2, 2, dtype=torch.complex64)).kl()
