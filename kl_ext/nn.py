"""The functions as modules: the constructor takes the options, the call takes the tensors.

The modules have neither parameters nor buffers. They can be pickled, compiled whole and exported, and scripted where torch
still scripts; in a scripted module q is tensors, not numbers.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module

from . import functional
from ._arguments import as_clamp, as_dims, as_dtype, as_flag, as_reduction
from ._types import Bound, Dims, Reduction

__all__ = ["GaussianKLDivLoss", "KLDivPairLoss", "KLDivSingleLoss", "NormalKLDivLoss"]

_is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined]  # public, but not in torch.jit.__all__

# Of each forward, torch.jit.script compiles the branch for it alone: the functions are more than it understands. It has no
# arguments that are given by name only and have a default, so weight is the last of the others.


class _Loss(Module):
    """Checks the options when they are given, and shows them."""

    clamp_min: float  # -inf where there is no bound
    clamp_max: float
    if TYPE_CHECKING:
        reduction: Reduction
    else:
        reduction: str  # TorchScript knows no Literal
    dim: list[int] | None
    keepdim: bool
    dtype: torch.dtype | None

    def _set_clamp(self, clamp_min: Bound, clamp_max: Bound) -> None:
        clamp = as_clamp(type(self).__name__, clamp_min, clamp_max)
        self.clamp_min, self.clamp_max = clamp["clamp_min"], clamp["clamp_max"]

    def _set_reduction(self, reduction: Reduction, dim: Dims, keepdim: bool, dtype: torch.dtype | None) -> None:
        name = type(self).__name__
        self.dim = as_dims(name, dim)
        self.reduction = as_reduction(name, reduction, self.dim)
        self.keepdim = as_flag(name, "keepdim", keepdim)
        self.dtype = as_dtype(name, dtype)

    def extra_repr(self) -> str:
        options = ("clamp_min", "clamp_max", "reduction", "dim", "keepdim", "dtype")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in options if hasattr(self, name))


class KLDivSingleLoss(_Loss):
    r"""The divergence of a Gaussian from the standard normal, per element, in nats: :func:`kl_ext.kl_div_single_loss`.

    .. math::
        \tfrac12 \left( \mu^2 + \sigma^2 - \log \sigma^2 - 1 \right)

    In plain text: 1/2 (mu^2 + exp(log_var) - log_var - 1). The call takes ``mu`` and ``log_var``, of any shapes that broadcast
    and of dtype float16, bfloat16, float32 or float64, and raises what the function raises.

    Args:
        clamp_min: Log-variances below it count as this number, and get no gradient. None: no bound.
        clamp_max: Log-variances above it count as this number, and get no gradient. None: no bound.

    Raises:
        TypeError: A bound is not a number.
        ValueError: ``clamp_min`` is not at most ``clamp_max``.

    Source: appendix B of Kingma and Welling, `Auto-Encoding Variational Bayes <https://arxiv.org/abs/1312.6114>`_.

    Example:
        >>> loss = kl_ext.nn.KLDivSingleLoss()
        >>> loss(torch.tensor([0.0, 1.0]), torch.zeros(2))
        tensor([0.0000, 0.5000])
    """

    def __init__(self, *, clamp_min: Bound = -30.0, clamp_max: Bound = 20.0) -> None:
        super().__init__()
        self._set_clamp(clamp_min, clamp_max)

    def forward(self, mu: Tensor, log_var: Tensor) -> Tensor:
        """The terms, in the broadcast shape."""
        if _is_scripting():
            result: Tensor = torch.ops.kl_ext.kl_div_single_loss(
                mu, log_var, clamp_min=self.clamp_min, clamp_max=self.clamp_max
            )
        else:
            result = functional.kl_div_single_loss(mu, log_var, clamp_min=self.clamp_min, clamp_max=self.clamp_max)
        return result


class KLDivPairLoss(_Loss):
    r"""The documented loss between two Gaussians, per element, in nats: :func:`kl_ext.kl_div_pair_loss`.

    .. math::
        \log \frac{\sigma_q^2}{\sigma_p^2} + \frac{\sigma_p^2 + (\mu_p - \mu_q)^2}{\sigma_q^2} - \frac12
        = 2 \, D_{KL}(p \,\|\, q) + \frac12

    In plain text: log_var_q - log_var_p + (exp(log_var_p) + (mu_p - mu_q)^2) / exp(log_var_q) - 1/2. **This is not the
    divergence itself** but twice it and a half; that is :class:`GaussianKLDivLoss`. The call takes ``mu_p``, ``log_var_p``,
    ``mu_q`` and ``log_var_q``, of any shapes that broadcast and of dtype float16, bfloat16, float32 or float64, and raises what
    the function raises.

    Args:
        clamp_min: Log-variances below it count as this number, and get no gradient. None: no bound.
        clamp_max: Log-variances above it count as this number, and get no gradient. None: no bound.

    Raises:
        TypeError: A bound is not a number.
        ValueError: ``clamp_min`` is not at most ``clamp_max``.

    Source: the divergence of two normal distributions, Kullback and Leibler (1951), scaled as documented for
    ``ml.tasks.losses.kl``.

    Example:
        >>> loss, zero = kl_ext.nn.KLDivPairLoss(), torch.zeros(())
        >>> loss(zero, zero, torch.tensor([0.0, 1.0]), zero)
        tensor([0.5000, 1.5000])
    """

    def __init__(self, *, clamp_min: Bound = -30.0, clamp_max: Bound = 20.0) -> None:
        super().__init__()
        self._set_clamp(clamp_min, clamp_max)

    def forward(self, mu_p: Tensor, log_var_p: Tensor, mu_q: Tensor, log_var_q: Tensor) -> Tensor:
        """The terms, in the broadcast shape."""
        if _is_scripting():
            result: Tensor = torch.ops.kl_ext.kl_div_pair_loss(
                mu_p, log_var_p, mu_q, log_var_q, clamp_min=self.clamp_min, clamp_max=self.clamp_max
            )
        else:
            result = functional.kl_div_pair_loss(
                mu_p, log_var_p, mu_q, log_var_q, clamp_min=self.clamp_min, clamp_max=self.clamp_max
            )
        return result


class GaussianKLDivLoss(_Loss):
    r"""The divergence of Gaussians, in nats, reduced in the pass that computes it: :func:`kl_ext.gaussian_kl_div`.

    .. math::
        D_{KL}(p \,\|\, q) = \tfrac12 \left( \log \frac{\sigma_q^2}{\sigma_p^2}
        + \frac{\sigma_p^2 + (\mu_p - \mu_q)^2}{\sigma_q^2} - 1 \right)

    In plain text: 1/2 (log_var_q - log_var_p + (exp(log_var_p) + (mu_p - mu_q)^2) / exp(log_var_q) - 1). The call takes
    ``mu_p`` and ``log_var_p``, then as far as they are given ``mu_q``, ``log_var_q`` and ``weight``, of any shapes that
    broadcast and of dtype float16, bfloat16, float32 or float64, and raises what the function raises. Without q: against the
    standard normal.

    Args:
        clamp_min: Log-variances below it count as this number, and get no gradient. None: no bound.
        clamp_max: Log-variances above it count as this number, and get no gradient. None: no bound.
        reduction: ``"none"``; ``"sum"`` or ``"mean"`` over ``dim``; or ``"batchmean"``, the sum of everything divided by the
            size of the first dimension, which is the loss of a variational autoencoder.
        dim: The dimensions to reduce, all of them by default.
        keepdim: Whether reduced dimensions stay, with size 1.
        dtype: Of the result; by default the promoted one.

    Raises:
        TypeError: An option is of a type that torch would not take, or ``dtype`` is not one of the four.
        ValueError: ``clamp_min`` is not at most ``clamp_max``; ``reduction`` is not one of the four; ``dim`` is given with
            ``"none"`` or ``"batchmean"``.

    Source: Kullback and Leibler, `On Information and Sufficiency <https://doi.org/10.1214/aoms/1177729694>`_ (1951).

    Example:
        >>> loss = kl_ext.nn.GaussianKLDivLoss(reduction="batchmean")
        >>> loss(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.zeros(2, 2))
        tensor(1.2500)
    """

    def __init__(
        self,
        *,
        clamp_min: float | None = -30.0,
        clamp_max: float | None = 20.0,
        reduction: Reduction = "none",
        dim: Dims = None,
        keepdim: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_clamp(clamp_min, clamp_max)
        self._set_reduction(reduction, dim, keepdim, dtype)

    def forward(
        self,
        mu_p: Tensor,
        log_var_p: Tensor,
        mu_q: Tensor | float | None = None,
        log_var_q: Tensor | float | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The terms or their reduction."""
        if _is_scripting():
            assert not isinstance(mu_q, float), "GaussianKLDivLoss: expected mu_q to be a Tensor where it is scripted"
            assert not isinstance(log_var_q, float), "GaussianKLDivLoss: expected log_var_q to be a Tensor where it is scripted"
            result: Tensor = torch.ops.kl_ext.gaussian_kl_div(
                mu_p,
                log_var_p,
                mu_q,
                log_var_q,
                weight=weight,
                clamp_min=self.clamp_min,
                clamp_max=self.clamp_max,
                reduction=self.reduction,
                dim=self.dim,
                keepdim=self.keepdim,
                dtype=self.dtype,
            )
        else:
            result = functional.gaussian_kl_div(
                mu_p,
                log_var_p,
                mu_q,
                log_var_q,
                weight=weight,
                clamp_min=self.clamp_min,
                clamp_max=self.clamp_max,
                reduction=self.reduction,
                dim=self.dim,
                keepdim=self.keepdim,
                dtype=self.dtype,
            )
        return result


class NormalKLDivLoss(_Loss):
    r"""The divergence of Gaussians given by standard deviations, in nats: :func:`kl_ext.normal_kl_div`.

    .. math::
        D_{KL}(p \,\|\, q) = \log \frac{\sigma_q}{\sigma_p} + \frac{\sigma_p^2 + (\mu_p - \mu_q)^2}{2 \sigma_q^2} - \frac12

    In plain text: log(scale_q / scale_p) + (scale_p^2 + (loc_p - loc_q)^2) / (2 scale_q^2) - 1/2. The call takes ``loc_p`` and
    ``scale_p``, then as far as they are given ``loc_q``, ``scale_q`` and ``weight``, of any shapes that broadcast and of dtype
    float16, bfloat16, float32 or float64, and raises what the function raises. Without q: against the standard normal.

    Args:
        reduction: ``"none"``; ``"sum"`` or ``"mean"`` over ``dim``; or ``"batchmean"``, the sum of everything divided by the
            size of the first dimension, which is the loss of a variational autoencoder.
        dim: The dimensions to reduce, all of them by default.
        keepdim: Whether reduced dimensions stay, with size 1.
        dtype: Of the result; by default the promoted one.

    Raises:
        TypeError: An option is of a type that torch would not take, or ``dtype`` is not one of the four.
        ValueError: ``reduction`` is not one of the four; ``dim`` is given with ``"none"`` or ``"batchmean"``.

    Source: Kullback and Leibler, `On Information and Sufficiency <https://doi.org/10.1214/aoms/1177729694>`_ (1951).

    Example:
        >>> loss = kl_ext.nn.NormalKLDivLoss(reduction="sum")
        >>> loss(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
        tensor(1.3069)
    """

    def __init__(
        self,
        *,
        reduction: Reduction = "none",
        dim: Dims = None,
        keepdim: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_reduction(reduction, dim, keepdim, dtype)

    def forward(
        self,
        loc_p: Tensor,
        scale_p: Tensor,
        loc_q: Tensor | float | None = None,
        scale_q: Tensor | float | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The terms or their reduction."""
        if _is_scripting():
            assert not isinstance(loc_q, float), "NormalKLDivLoss: expected loc_q to be a Tensor where it is scripted"
            assert not isinstance(scale_q, float), "NormalKLDivLoss: expected scale_q to be a Tensor where it is scripted"
            result: Tensor = torch.ops.kl_ext.normal_kl_div(
                loc_p,
                scale_p,
                loc_q,
                scale_q,
                weight=weight,
                reduction=self.reduction,
                dim=self.dim,
                keepdim=self.keepdim,
                dtype=self.dtype,
            )
        else:
            result = functional.normal_kl_div(
                loc_p,
                scale_p,
                loc_q,
                scale_q,
                weight=weight,
                reduction=self.reduction,
                dim=self.dim,
                keepdim=self.keepdim,
                dtype=self.dtype,
            )
        return result
