"""Adapters for code that has its Gaussians as distributions: those of torch.distributions, and the posterior of diffusers.

Importing this changes nothing. :func:`register` is called once, by the program and not by a library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributions import Normal, kl

from . import functional
from ._checks import DTYPES, LAYOUTS
from ._library import build_facts

__all__ = ["DiagonalGaussianDistribution", "register", "unregister"]

# On which there are kernels; on meta the shapes are known.
_DEVICES = {"cpu", "meta", *(["cuda"] if build_facts().cuda_architectures else [])}


class _ThroughOperator:
    """What torch.distributions calls for two Normals; it keeps what was called before."""

    def __init__(self, before: Callable[[Normal, Normal], Tensor]) -> None:
        self.before = before

    def __call__(self, p: Normal, q: Normal) -> Tensor:
        tensors = (p.loc, p.scale, q.loc, q.scale)
        if all(x.dtype in DTYPES and x.layout in LAYOUTS and x.device.type in _DEVICES for x in tensors):
            try:
                return functional.normal_kl_div(*tensors)
            except (NotImplementedError, TypeError):
                pass  # of a class that does not know the operator
        return self.before(p, q)


def _replace(before: Callable[..., Tensor], after: Callable[..., Tensor]) -> None:
    """For two Normals, and wherever torch has remembered that they are meant. torch's own register_kl forgets all that has been
    looked up, and torch.compile cannot trace the looking up."""
    kl._KL_REGISTRY[Normal, Normal] = after
    for types, function in list(kl._KL_MEMOIZE.items()):
        if function is before:
            kl._KL_MEMOIZE[types] = kl._dispatch_kl(*types)


def register() -> None:
    r"""Makes :func:`torch.distributions.kl_divergence` of two Normals go through :func:`kl_ext.normal_kl_div`, in nats.

    .. math::
        \log \frac{\sigma_q}{\sigma_p} + \frac{\sigma_p^2 + (\mu_p - \mu_q)^2}{2 \sigma_q^2} - \frac12

    In plain text: log(scale_q / scale_p) + (scale_p^2 + (loc_p - loc_q)^2) / (2 scale_q^2) - 1/2, one term for each element of
    the broadcast shape, in the promoted dtype (float32 under autocast). Whatever torch derives from that follows: Independent,
    transformed distributions, subclasses of Normal that have no divergence of their own. So do libraries that call torch's
    function.

    Normals of other tensors are treated as before: of other dtypes than float16, bfloat16, float32 and float64, on devices for
    which this build has no kernels, of classes of tensors that do not know the operator. It holds for the whole process, until
    :func:`unregister`. Calling it twice is calling it once. It raises nothing.

    Source: Kullback and Leibler, `On Information and Sufficiency <https://doi.org/10.1214/aoms/1177729694>`_ (1951).

    Example:
        >>> kl_ext.distributions.register()
        >>> p, q = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.0, 1 + 2**-12)
        >>> torch.distributions.kl_divergence(p, q)  # where torch's formula gives 5.9576e-08
        tensor(5.9580e-08)
        >>> kl_ext.distributions.unregister()
    """
    before = kl._KL_REGISTRY[Normal, Normal]
    if not isinstance(before, _ThroughOperator):
        _replace(before, _ThroughOperator(before))


def unregister() -> None:
    """Undoes :func:`register`: torch.distributions has for two Normals what it had before.

    Without :func:`register`, or where somebody has registered something else for two Normals since, nothing happens.

    Example:
        >>> kl_ext.distributions.unregister()
    """
    now = kl._KL_REGISTRY[Normal, Normal]
    if isinstance(now, _ThroughOperator):
        _replace(now, now.before)


class DiagonalGaussianDistribution:
    r"""The posterior of an autoencoder from its encoder's output, as diffusers and latent diffusion have it.

    It takes the place of ``diffusers.models.autoencoders.vae.DiagonalGaussianDistribution`` and gives its numbers, except that
    its divergence, in nats, is accurate, is computed in one pass, and writes the gradient of ``parameters`` at once:

    .. math::
        \tfrac12 \sum_i \left( \log \frac{\sigma_{q,i}^2}{\sigma_{p,i}^2}
        + \frac{\sigma_{p,i}^2 + (\mu_{p,i} - \mu_{q,i})^2}{\sigma_{q,i}^2} - 1 \right)

    In plain text: 1/2 sum(logvar_q - logvar_p + (var_p + (mean_p - mean_q)^2) / var_q - 1), against the standard normal
    1/2 sum(mean^2 + var - logvar - 1). Sums are over all dimensions but the first, which is the batch.

    Log-variances are clamped to -30 ... 20, and those outside get no gradient. At the bounds themselves the gradient of
    :meth:`kl` passes, in every version of torch; that of the other methods, and of diffusers, is 0 there from torch 2.14 on.

    Args:
        parameters: Means and log-variances, one half each along ``dim``, as in ``[B, 2 * C, H, W]``; of any rank, and of
            dtype float16, bfloat16, float32 or float64.
        dim: The dimension that holds both.
        deterministic: Whether the distribution is only its mean: deviations, :meth:`kl` and :meth:`nll` are 0.

    Attributes:
        parameters: As given; ``deterministic`` likewise.
        mean: The means, ``[B, C, H, W]``.
        logvar: The clamped log-variances, computed when asked for, as ``std`` and ``var`` are.
        std: The standard deviations.
        var: The variances.

    Raises:
        ValueError: ``parameters`` has an odd size along ``dim``.
        IndexError: ``parameters`` has no such dimension.

    Source: Kingma and Welling, `Auto-Encoding Variational Bayes <https://arxiv.org/abs/1312.6114>`_; the interface of
    Rombach et al., `High-Resolution Image Synthesis with Latent Diffusion Models <https://arxiv.org/abs/2112.10752>`_.

    Example:
        >>> parameters = torch.tensor([[1.0, 2.0, 0.0, 0.0]])  # of one sample: two means, two log-variances
        >>> kl_ext.distributions.DiagonalGaussianDistribution(parameters).kl()
        tensor([2.5000])
    """

    def __init__(self, parameters: Tensor, dim: int = 1, deterministic: bool = False) -> None:
        if parameters.size(dim) % 2:
            raise ValueError(
                "DiagonalGaussianDistribution: expected parameters to have means and log-variances, an even size, along dim "
                f"{dim}, got shape {list(parameters.shape)}"
            )
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, self._log_var = parameters.chunk(2, dim)

    @property
    def logvar(self) -> Tensor:
        """The clamped log-variances."""
        return self._log_var.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """The standard deviations."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """The variances."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise, differentiable, with the noise that diffusers draws from the generator.

        Args:
            generator: Of the noise, on the device of ``parameters`` or on the CPU. None: torch's own.
        """
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """The divergence in nats, ``[B]``: from ``other``, or from the standard normal.

        Args:
            other: Another one, diffusers' own too, of a shape that broadcasts. From one that is deterministic the
                divergence is inf. Of this one, if it is deterministic, it is 0, of shape ``[1]``, as in diffusers.
        """
        if self.deterministic:
            return self.mean.new_zeros(1)
        if other is None:
            q: tuple[Tensor, ...] = ()
        elif other.deterministic:
            return self.mean.new_full(torch.broadcast_shapes(self.mean.shape, other.mean.shape)[:1], math.inf)
        else:  # the half itself, whose gradient is then written with the other half's
            q = (other.mean, other._log_var if isinstance(other, DiagonalGaussianDistribution) else other.logvar)
        rank = max(x.dim() for x in (self.mean, *q))
        if rank == 1:
            return functional.gaussian_kl_div(self.mean, self._log_var, *q)
        return functional.gaussian_kl_div(self.mean, self._log_var, *q, reduction="sum", dim=tuple(range(1, rank)))

    def nll(self, sample: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """The negative log-likelihood of ``sample`` in nats: 1/2 sum(log(2 pi) + logvar + (sample - mean)^2 / var).

        Args:
            sample: Of a shape that broadcasts with that of the mean.
            dims: The dimensions to sum over; by default all but the first. If the distribution is deterministic, the result is
                0, of shape ``[1]``, as in diffusers.
        """
        if self.deterministic:
            return self.mean.new_zeros(1)
        log_var = self.logvar
        terms = 0.5 * (math.log(2.0 * math.pi) + log_var + (sample - self.mean).square() / log_var.exp())
        dims = range(1, terms.dim()) if dims is None else dims
        return terms.sum(tuple(dims)) if len(dims) else terms
