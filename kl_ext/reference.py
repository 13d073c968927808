"""The losses and the divergences written out in plain torch, the way a training script would write them.

This is the baseline: the benchmarks and the demo run it beside the operators. It has the same names, signatures, shapes,
result types and gradients (torch's own autograd differentiates it), and it needs nothing that is compiled but torch. What it
does not have is the accuracy: ``exp(x) - 1 - x`` cancels where a distribution approaches its prior, so that in float32 the
smallest losses come out as zero or negative. It also checks nothing that torch does not check, and at the very bounds of a
clamp its gradients are those of ``torch.clamp``, which pass there up to torch 2.13 and are 0 from torch 2.14 on; those of the
operators pass in every version. A weight that requires grad gets its gradient here; the operators refuse it.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._types import Bound, Reduction

__all__ = ["gaussian_kl_div", "kl_div_pair_loss", "kl_div_single_loss", "normal_kl_div"]

_Q = Tensor | float | None


def _clamp(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """torch.clamp, which asks for at least one bound."""
    return x if low is None and high is None else x.clamp(low, high)


def _keep(weight: Tensor, inputs: Sequence[_Q], fills: Sequence[float]) -> list[_Q]:
    """The inputs with harmless numbers where the weight is 0: 0 * NaN is NaN, in the terms and in their gradients."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    kept = weight.expand(torch.broadcast_shapes(*(x.shape for x in tensors))) != 0
    dtypes = [x.dtype for x in tensors if x.dim() > 0] or [x.dtype for x in tensors]
    dtype = functools.reduce(torch.promote_types, dtypes)  # before 0-dim tensors get dimensions
    return [torch.where(kept, x.to(dtype), fill) if isinstance(x, Tensor) else x for x, fill in zip(inputs, fills, strict=True)]


def _reduce(
    function: str,
    terms: Tensor,
    weight: Tensor | None,
    reduction: str,
    dim: int | Sequence[int] | None,
    keepdim: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    weighted = terms if weight is None else weight * terms
    dims = dim if dim is None or isinstance(dim, int) else tuple(dim)
    if reduction == "none":
        return weighted if dtype is None else weighted.to(dtype)
    if reduction == "sum":
        return weighted.sum(dims, keepdim, dtype=dtype)
    if reduction == "mean":
        if weight is None:
            return terms.mean(dims, keepdim, dtype=dtype)
        weights = weight.to(weighted.dtype).expand_as(weighted).sum(dims, keepdim, dtype=dtype)
        return weighted.sum(dims, keepdim, dtype=dtype) / weights.masked_fill(weights == 0, math.nan)
    if reduction == "batchmean":
        return weighted.sum(None, keepdim, dtype=dtype) / terms.shape[0]
    raise ValueError(f"{function}: expected reduction to be none, sum, mean or batchmean, got {reduction!r}")


def kl_div_single_loss(mu: Tensor, log_var: Tensor, *, clamp_min: Bound = -30.0, clamp_max: Bound = 20.0) -> Tensor:
    r"""The KL divergence of N(mu, exp(log_var)) from the standard normal, in nats, one term per element.

    .. math:: \frac{1}{2} \left( \mu^2 + \sigma^2 - \log \sigma^2 - 1 \right)

    In plain text: (mu^2 + exp(log_var) - log_var - 1) / 2.

    Args:
        mu: The means, of any shape and floating dtype.
        log_var: The logarithms of the variances; its shape broadcasts with that of ``mu``.
        clamp_min: The smallest log-variance used; smaller ones count as this and receive no gradient. None: no bound.
        clamp_max: The largest log-variance used; larger ones count as this and receive no gradient. None: no bound.

    Returns:
        The terms, in the broadcast shape and the promoted dtype. Their sum over the dimensions of the distribution, which is
        the divergence, is left to the caller.

    Example:
        >>> import torch
        >>> kl_div_single_loss(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]))
        tensor([0.0000, 0.5000])
    """
    log_var = _clamp(log_var, clamp_min, clamp_max)
    return 0.5 * (mu.square() + log_var.exp() - log_var - 1.0)


def kl_div_pair_loss(
    mu_p: Tensor,
    log_var_p: Tensor,
    mu_q: Tensor,
    log_var_q: Tensor,
    *,
    clamp_min: Bound = -30.0,
    clamp_max: Bound = 20.0,
) -> Tensor:
    r"""The documented loss of p = N(mu_p, exp(log_var_p)) against q = N(mu_q, exp(log_var_q)), one term per element.

    .. math:: \log \frac{\sigma_q^2}{\sigma_p^2} + \frac{\sigma_p^2 + (\mu_p - \mu_q)^2}{\sigma_q^2} - \frac{1}{2}

    In plain text: log_var_q - log_var_p + (exp(log_var_p) + (mu_p - mu_q)^2) / exp(log_var_q) - 1/2.

    This is not the KL divergence but twice it and a half: 1/2 where p = q. With D the divergence in nats, the loss is
    ``2 * D + 0.5`` and ``D = 0.5 * (loss - 0.5)``, element by element; the gradients are twice those of D.

    Args:
        mu_p: The means of p, of any shape and floating dtype.
        log_var_p: The logarithms of the variances of p.
        mu_q: The means of q.
        log_var_q: The logarithms of the variances of q. All four shapes broadcast together.
        clamp_min: The smallest log-variance used, for p and q; smaller ones count as this and receive no gradient.
            None: no bound.
        clamp_max: The largest log-variance used, for p and q; larger ones count as this and receive no gradient.
            None: no bound.

    Returns:
        The terms, in the broadcast shape and the promoted dtype; their sum is left to the caller.

    Example:
        >>> import torch
        >>> zero, one = torch.tensor(0.0), torch.tensor(1.0)
        >>> kl_div_pair_loss(one, zero, zero, zero), kl_div_pair_loss(zero, zero, zero, zero)
        (tensor(1.5000), tensor(0.5000))
    """
    log_var_p = _clamp(log_var_p, clamp_min, clamp_max)
    log_var_q = _clamp(log_var_q, clamp_min, clamp_max)
    return log_var_q - log_var_p + (log_var_p.exp() + (mu_p - mu_q).square()) / log_var_q.exp() - 0.5


def gaussian_kl_div(
    mu_p: Tensor,
    log_var_p: Tensor,
    mu_q: Tensor | float | None = None,
    log_var_q: Tensor | float | None = None,
    *,
    weight: Tensor | None = None,
    clamp_min: float | None = -30.0,
    clamp_max: float | None = 20.0,
    reduction: Reduction = "none",
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""The KL divergence of p = N(mu_p, exp(log_var_p)) from q = N(mu_q, exp(log_var_q)), in nats, and its reduction after it.

    .. math::
        \frac{1}{2} \left( \log \frac{\sigma_q^2}{\sigma_p^2} + \frac{\sigma_p^2 + (\mu_p - \mu_q)^2}{\sigma_q^2} - 1 \right)

    In plain text: (log_var_q - log_var_p + (exp(log_var_p) + (mu_p - mu_q)^2) / exp(log_var_q) - 1) / 2.

    Every step writes a tensor of the broadcast shape and autograd keeps several of them; the sum is torch's, whose order
    depends on the number of threads.

    Args:
        mu_p: The means of p, of any shape and floating dtype.
        log_var_p: The logarithms of the variances of p.
        mu_q: The means of q, a tensor or a number; without q, q is the standard normal. All shapes broadcast together.
        log_var_q: The logarithms of the variances of q, a tensor or a number.
        weight: What the terms are multiplied by, of bool or a floating dtype; its shape expands to that of the terms. Where it
            is 0 or False, a term is left out: it counts as 0 and gives no gradient, whatever stands there.
        clamp_min: The smallest log-variance used, for p and q; smaller ones count as this and receive no gradient.
            None: no bound.
        clamp_max: The largest log-variance used, for p and q; larger ones count as this and receive no gradient.
            None: no bound.
        reduction: ``"none"``; ``"sum"``; ``"mean"``, with a weight the sum over the sum of the weights; or ``"batchmean"``, the
            sum over the size of the first dimension.
        dim: What ``"sum"`` and ``"mean"`` reduce, everything by default.
        keepdim: Whether reduced dimensions stay, with size 1.
        dtype: Of the result. The terms are computed in the promoted dtype all the same; only torch's sum is in this one.

    Returns:
        The terms or their reduction.

    Example:
        >>> import torch
        >>> mu, log_var = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.zeros(2, 2)
        >>> gaussian_kl_div(mu, log_var, reduction="batchmean")
        tensor(1.2500)
    """
    if (mu_q is None) != (log_var_q is None):
        raise ValueError("gaussian_kl_div: expected mu_q and log_var_q together")
    if weight is not None:
        inputs = _keep(weight, (mu_p, log_var_p, mu_q, log_var_q), (0.0, 0.0, 0.0, 0.0))
        mu_p, log_var_p, mu_q, log_var_q = inputs  # type: ignore[assignment]  # tensors stay tensors
    log_var_p = _clamp(log_var_p, clamp_min, clamp_max)
    if mu_q is None or log_var_q is None:
        terms = 0.5 * (mu_p.square() + log_var_p.exp() - log_var_p - 1.0)
    else:
        if isinstance(log_var_q, Tensor):
            log_var_q = _clamp(log_var_q, clamp_min, clamp_max)
            var_q: Tensor | float = log_var_q.exp()
        else:
            log_var_q = max(log_var_q, -math.inf if clamp_min is None else clamp_min)
            log_var_q = min(log_var_q, math.inf if clamp_max is None else clamp_max)
            var_q = math.exp(log_var_q)
        terms = 0.5 * (log_var_q - log_var_p + (log_var_p.exp() + (mu_p - mu_q).square()) / var_q - 1.0)
    return _reduce("gaussian_kl_div", terms, weight, reduction, dim, keepdim, dtype)


def normal_kl_div(
    loc_p: Tensor,
    scale_p: Tensor,
    loc_q: Tensor | float | None = None,
    scale_q: Tensor | float | None = None,
    *,
    weight: Tensor | None = None,
    reduction: Reduction = "none",
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""The KL divergence of p = N(loc_p, scale_p^2) from q = N(loc_q, scale_q^2), in nats, and its reduction after it.

    .. math::
        \log \frac{\sigma_q}{\sigma_p} + \frac{\sigma_p^2 + (\mu_p - \mu_q)^2}{2 \sigma_q^2} - \frac{1}{2}

    In plain text: log(scale_q / scale_p) + (scale_p^2 + (loc_p - loc_q)^2) / (2 scale_q^2) - 1/2. Nothing is clamped. A
    deviation of p that is 0 gives inf; one that is negative gives NaN.

    Args:
        loc_p: The means of p, of any shape and floating dtype.
        scale_p: The standard deviations of p.
        loc_q: The means of q, a tensor or a number; without q, q is the standard normal. All shapes broadcast together.
        scale_q: The standard deviations of q, a tensor or a positive number.
        weight: As in :func:`gaussian_kl_div`.
        reduction: As in :func:`gaussian_kl_div`.
        dim: What ``"sum"`` and ``"mean"`` reduce, everything by default.
        keepdim: Whether reduced dimensions stay, with size 1.
        dtype: Of the result. The terms are computed in the promoted dtype all the same; only torch's sum is in this one.

    Returns:
        The terms or their reduction.

    Example:
        >>> import torch
        >>> normal_kl_div(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
        tensor([0.0000, 1.3069])
    """
    if (loc_q is None) != (scale_q is None):
        raise ValueError("normal_kl_div: expected loc_q and scale_q together")
    if weight is not None:
        inputs = _keep(weight, (loc_p, scale_p, loc_q, scale_q), (0.0, 1.0, 0.0, 1.0))
        loc_p, scale_p, loc_q, scale_q = inputs  # type: ignore[assignment]  # tensors stay tensors
    if loc_q is None or scale_q is None:
        terms = 0.5 * (scale_p.square() + loc_p.square() - 1.0) - scale_p.log()
    else:
        log_scale_q = scale_q.log() if isinstance(scale_q, Tensor) else math.log(scale_q)
        terms = log_scale_q - scale_p.log() + 0.5 * ((scale_p.square() + (loc_p - loc_q).square()) / (scale_q * scale_q) - 1.0)
    return _reduce("normal_kl_div", terms, weight, reduction, dim, keepdim, dtype)
