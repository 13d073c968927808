"""DiagonalGaussianDistribution beside that of diffusers: the numbers it had, and what is better about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.profiler import ProfilerActivity, profile

from kl_ext.distributions import DiagonalGaussianDistribution
from operators import CLOSE

pytest.importorskip("diffusers", reason="the extra `test` has it; it needs a GIL")

from diffusers.models.autoencoders import autoencoder_kl, vae

# Of sums of up to a thousand terms, none of them negative: 2.5 ulp for each against N(0, 1), then 21 roundings.
SUM_OF_FLOATS = {"rtol": (2 * 2.5 + 21) * 2.0**-24, "atol": 0.0}


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
