"""The public functions: documented signatures over the operators."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import _bindings
from ._arguments import as_clamp, as_dims, as_dtype, as_flag, as_number, as_reduction, check_are_tensors
from ._checks import check_together
from ._fake import result_dtype
from ._types import Bound, Reduction

__all__ = ["gaussian_kl_div", "kl_div_pair_loss", "kl_div_single_loss", "normal_kl_div"]

# torch.compile knows that this is true, and so sees the operators and not the bindings.
_is_compiling = torch.compiler.is_compiling
_kl_div_single_loss = torch.ops.kl_ext.kl_div_single_loss.default
_kl_div_pair_loss = torch.ops.kl_ext.kl_div_pair_loss.default
_gaussian_kl_div = torch.ops.kl_ext.gaussian_kl_div.default
_normal_kl_div = torch.ops.kl_ext.normal_kl_div.default


def kl_div_single_loss(mu: Tensor, log_var: Tensor, *, clamp_min: Bound = -30.0, clamp_max: Bound = 20.0) -> Tensor:
    r"""The divergence of a Gaussian from the standard normal, per element, in nats.

    .. math::
        \tfrac12 \left( \mu^2 + \sigma^2 - \log \sigma^2 - 1 \right)
        = D_{KL}\left( \mathcal N(\mu, \sigma^2) \,\|\, \mathcal N(0, 1) \right)

    In plain text: (mu^2 + exp(log_var) - log_var - 1) / 2.

    For a Gaussian with independent components the divergence is the sum over them, which is left to the caller: sum over the
    latent dimensions, average over the batch. The result is within 2.5 units in the last place of the true value of the given
    numbers, never negative, and 0 where mu and log_var are.

    Args:
        mu: Means, of any shape.
        log_var: Logarithms of the variances, of any shape that broadcasts with that of ``mu``.
        clamp_min: Log-variances below it count as this number, and get no gradient. None: no bound.
        clamp_max: Log-variances above it count as this number, and get no gradient. None: no bound. At the bounds themselves
            the gradient passes, in every version of torch.

    Returns:
        The terms, in the broadcast shape and the promoted dtype (float32 under autocast; float64 stays float64).

    Raises:
        TypeError: A tensor is neither strided nor jagged, or not of dtype float16, bfloat16, float32 or float64; another
            argument is of a type that torch would not take.
        RuntimeError: The shapes do not broadcast, or the devices differ.
        ValueError: ``clamp_min`` is not at most ``clamp_max``.

    Source: appendix B of Kingma and Welling, `Auto-Encoding Variational Bayes <https://arxiv.org/abs/1312.6114>`_.

    Example:
        >>> mu, log_var = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0])
        >>> kl_ext.kl_div_single_loss(mu, log_var)
        tensor([0.0000, 0.5000])
    """
    if not _is_compiling():
        result = _bindings.kl_div_single_loss(mu, log_var, clamp_min, clamp_max)
        if result is not None:
            return result
        if has_torch_function((mu, log_var)):
            return handle_torch_function(
                kl_div_single_loss, (mu, log_var), mu, log_var, clamp_min=clamp_min, clamp_max=clamp_max
            )
    name, tensors = "kl_div_single_loss", {"mu": mu, "log_var": log_var}
    check_are_tensors(name, **tensors)
    return _call(_kl_div_single_loss, name, tensors, **as_clamp(name, clamp_min, clamp_max))


def kl_div_pair_loss(
    mu_p: Tensor,
    log_var_p: Tensor,
    mu_q: Tensor,
    log_var_q: Tensor,
    *,
    clamp_min: Bound = -30.0,
    clamp_max: Bound = 20.0,
) -> Tensor:
    r"""The documented loss between two Gaussians, per element, in nats.

    .. math::
        \log \frac{\sigma_q^2}{\sigma_p^2} + \frac{\sigma_p^2 + (\mu_p - \mu_q)^2}{\sigma_q^2} - \frac12
        = 2 \, D_{KL}(p \,\|\, q) + \frac12

    In plain text: log_var_q - log_var_p + (exp(log_var_p) + (mu_p - mu_q)^2) / exp(log_var_q) - 1/2.

    **This is not the divergence itself** but twice it and a half: 1/2, not 0, where p and q agree, with gradients twice those
    of the divergence. ``(kl_div_pair_loss(...) - 0.5) / 2`` is the divergence in nats. The sum over independent components is
    left to the caller. The result is within 4.5 units in the last place of the true value of the given numbers, never below
    1/2, and exactly 1/2 where p equals q.

    Args:
        mu_p: Means of p, of any shape. All four shapes must broadcast together.
        log_var_p: Logarithms of the variances of p.
        mu_q: Means of q.
        log_var_q: Logarithms of the variances of q.
        clamp_min: Log-variances below it count as this number, and get no gradient. None: no bound.
        clamp_max: Log-variances above it count as this number, and get no gradient. None: no bound. At the bounds themselves
            the gradient passes, in every version of torch.

    Returns:
        The terms, in the broadcast shape and the promoted dtype (float32 under autocast; float64 stays float64).

    Raises:
        TypeError: A tensor is neither strided nor jagged, or not of dtype float16, bfloat16, float32 or float64; another
            argument is of a type that torch would not take.
        RuntimeError: The shapes do not broadcast, or the devices differ.
        ValueError: ``clamp_min`` is not at most ``clamp_max``.

    Source: the divergence of two normal distributions, Kullback and Leibler (1951), scaled as documented for
    ``ml.tasks.losses.kl``.

    Example:
        >>> zero, one = torch.zeros(()), torch.ones(())
        >>> kl_ext.kl_div_pair_loss(zero, zero, torch.tensor([0.0, 1.0]), zero)
        tensor([0.5000, 1.5000])
    """
    if not _is_compiling():
        result = _bindings.kl_div_pair_loss(mu_p, log_var_p, mu_q, log_var_q, clamp_min, clamp_max)
        if result is not None:
            return result
        given = (mu_p, log_var_p, mu_q, log_var_q)
        if has_torch_function(given):
            return handle_torch_function(kl_div_pair_loss, given, *given, clamp_min=clamp_min, clamp_max=clamp_max)
    name, tensors = "kl_div_pair_loss", {"mu_p": mu_p, "log_var_p": log_var_p, "mu_q": mu_q, "log_var_q": log_var_q}
    check_are_tensors(name, **tensors)
    return _call(_kl_div_pair_loss, name, tensors, **as_clamp(name, clamp_min, clamp_max))


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
    r"""The Kullback-Leibler divergence of Gaussians, in nats, reduced in the pass that computes it.

    .. math::
        D_{KL}(p \,\|\, q) = \tfrac12 \left( \log \frac{\sigma_q^2}{\sigma_p^2}
        + \frac{\sigma_p^2 + (\mu_p - \mu_q)^2}{\sigma_q^2} - 1 \right)

    In plain text: (log_var_q - log_var_p + (exp(log_var_p) + (mu_p - mu_q)^2) / exp(log_var_q) - 1) / 2.

    Each term is within 4.5 units in the last place of the true value of the given numbers (2.5 against the standard normal),
    never negative, and exactly 0 where p equals q. The order of a sum depends on its shape alone: it has the same bits for
    any number of threads, instruction set, memory layout and device. Nothing of the size of the inputs is allocated, forward or
    backward, except for the gradients themselves.

    Args:
        mu_p: Means of p, of any shape. All shapes must broadcast together.
        log_var_p: Logarithms of the variances of p.
        mu_q: Means of q, a tensor or a number. Without q: against the standard normal.
        log_var_q: Logarithms of the variances of q, a tensor or a number.
        weight: A bool or floating tensor that broadcasts to the shape of the terms, which it may not enlarge. Terms are
            multiplied by it. Where it is 0 or False the term is left out, whatever stands there, NaN or memory never written:
            it adds nothing and its gradients are 0. Weights are not differentiated.
        clamp_min: Log-variances below it count as this number, and get no gradient. None: no bound.
        clamp_max: Log-variances above it count as this number, and get no gradient. None: no bound. At the bounds themselves
            the gradient passes, in every version of torch.
        reduction: ``"none"``; ``"sum"`` or ``"mean"`` over ``dim``; or ``"batchmean"``, the sum of everything divided by the
            size of the first dimension, which is the loss of a variational autoencoder. The mean of weighted terms is their sum
            divided by the sum of the weights, broadcast as the terms are.
        dim: The dimensions to reduce, all of them by default.
        keepdim: Whether reduced dimensions stay, with size 1.
        dtype: Of the result. Terms are computed and summed in float64 if an input or ``dtype`` is float64, else in float32, and
            the result is rounded once.

    Returns:
        The terms or their reduction, in the promoted dtype of the inputs (float32 under autocast) unless ``dtype`` is given.

    Raises:
        TypeError: A tensor is neither strided nor jagged, or not of dtype float16, bfloat16, float32 or float64; another
            argument is of a type that torch would not take.
        RuntimeError: The shapes do not broadcast, the devices differ, a dimension is named twice, or ``weight`` would enlarge
            the terms or requires grad.
        IndexError: A dimension is out of range.
        ValueError: ``clamp_min`` is not at most ``clamp_max``; ``reduction`` is not one of the four; ``dim`` is given with
            ``"none"`` or ``"batchmean"``; ``"batchmean"`` of 0-dim tensors; only one of ``mu_q`` and ``log_var_q`` is given.

    Source: Kullback and Leibler, `On Information and Sufficiency <https://doi.org/10.1214/aoms/1177729694>`_ (1951).

    Example:
        >>> mu, log_var = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.zeros(2, 2)
        >>> kl_ext.gaussian_kl_div(mu, log_var, reduction="batchmean")
        tensor(1.2500)
    """
    if not _is_compiling():
        result = _bindings.gaussian_kl_div(
            mu_p, log_var_p, mu_q, log_var_q, weight, clamp_min, clamp_max, reduction, dim, keepdim, dtype
        )
        if result is not None:
            return result
        given = (mu_p, log_var_p, mu_q, log_var_q, weight)
        if has_torch_function(given):
            return handle_torch_function(
                gaussian_kl_div,
                given,
                *given[:4],
                weight=weight,
                clamp_min=clamp_min,
                clamp_max=clamp_max,
                reduction=reduction,
                dim=dim,
                keepdim=keepdim,
                dtype=dtype,
            )
    p, q = {"mu_p": mu_p, "log_var_p": log_var_p}, {"mu_q": mu_q, "log_var_q": log_var_q}
    clamp = as_clamp("gaussian_kl_div", clamp_min, clamp_max)
    return _reduced(_gaussian_kl_div, "gaussian_kl_div", p, q, weight, clamp, reduction, dim, keepdim, dtype)


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
    r"""The Kullback-Leibler divergence of normal distributions from their standard deviations, in nats.

    .. math::
        D_{KL}(p \,\|\, q) = \log \frac{\sigma_q}{\sigma_p} + \frac{\sigma_p^2 + (\mu_p - \mu_q)^2}{2 \sigma_q^2} - \frac12

    In plain text: log(scale_q / scale_p) + (scale_p^2 + (loc_p - loc_q)^2) / (2 scale_q^2) - 1/2.

    The parameters are named as those of
    ``torch.distributions.Normal``. Nothing is clamped. Each term is within 4.5 units in the last place of the true value of the
    given numbers (3 against the standard normal) for all positive finite deviations, also where a variance or the ratio of two
    overflows and the result does not; it is never negative, and exactly 0 where p equals q. A deviation of p that is 0 gives
    inf, one that is negative NaN. Gradients of means and of ``scale_p`` are within 4.5 units, that of ``scale_q`` within 9 of
    the larger of its two terms. Sums have the same bits for any number of threads, instruction set, memory layout and device.

    Where you have logarithms of deviations, ``gaussian_kl_div(mu, 2 * log_std)`` is the divergence: doubling is exact.

    Args:
        loc_p: Means of p, of any shape. All shapes must broadcast together.
        scale_p: Standard deviations of p.
        loc_q: Means of q, a tensor or a number. Without q: against the standard normal.
        scale_q: Standard deviations of q, a tensor or a number.
        weight: A bool or floating tensor that broadcasts to the shape of the terms, which it may not enlarge. Terms are
            multiplied by it. Where it is 0 or False the term is left out, whatever stands there, NaN or memory never written:
            it adds nothing and its gradients are 0. Weights are not differentiated.
        reduction: ``"none"``; ``"sum"`` or ``"mean"`` over ``dim``; or ``"batchmean"``, the sum of everything divided by the
            size of the first dimension. The mean of weighted terms is their sum divided by the sum of the weights, broadcast as
            the terms are.
        dim: The dimensions to reduce, all of them by default.
        keepdim: Whether reduced dimensions stay, with size 1.
        dtype: Of the result. Terms are computed and summed in float64 if an input or ``dtype`` is float64, else in float32, and
            the result is rounded once.

    Returns:
        The terms or their reduction, in the promoted dtype of the inputs (float32 under autocast) unless ``dtype`` is given.

    Raises:
        TypeError: A tensor is neither strided nor jagged, or not of dtype float16, bfloat16, float32 or float64; another
            argument is of a type that torch would not take.
        RuntimeError: The shapes do not broadcast, the devices differ, a dimension is named twice, or ``weight`` would enlarge
            the terms or requires grad.
        IndexError: A dimension is out of range.
        ValueError: ``reduction`` is not one of the four; ``dim`` is given with ``"none"`` or ``"batchmean"``; ``"batchmean"``
            of 0-dim tensors; only one of ``loc_q`` and ``scale_q`` is given.

    Source: Kullback and Leibler, `On Information and Sufficiency <https://doi.org/10.1214/aoms/1177729694>`_ (1951).

    Example:
        >>> loc, scale = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])
        >>> kl_ext.normal_kl_div(loc, scale)
        tensor([0.0000, 0.5000])
    """
    if not _is_compiling():
        result = _bindings.normal_kl_div(loc_p, scale_p, loc_q, scale_q, weight, reduction, dim, keepdim, dtype)
        if result is not None:
            return result
        given = (loc_p, scale_p, loc_q, scale_q, weight)
        if has_torch_function(given):
            return handle_torch_function(
                normal_kl_div,
                given,
                *given[:4],
                weight=weight,
                reduction=reduction,
                dim=dim,
                keepdim=keepdim,
                dtype=dtype,
            )
    p, q = {"loc_p": loc_p, "scale_p": scale_p}, {"loc_q": loc_q, "scale_q": scale_q}
    return _reduced(_normal_kl_div, "normal_kl_div", p, q, weight, {}, reduction, dim, keepdim, dtype)


_Q = dict[str, Tensor | float | None]


def _reduced(
    operator: Callable[..., Tensor],
    name: str,
    p: dict[str, Tensor],
    q: _Q,
    weight: Tensor | None,
    clamp: dict[str, float],
    reduction: str,
    dim: int | Sequence[int] | None,
    keepdim: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    """An operator that reduces, with arguments of every kind that a public function takes."""
    check_are_tensors(name, **p)
    if weight is not None:
        check_are_tensors(name, weight=weight)
    dims, kind = as_dims(name, dim), as_dtype(name, dtype)
    how = {
        **clamp,
        "reduction": as_reduction(name, reduction, dims),
        "dim": dims,
        "keepdim": as_flag(name, "keepdim", keepdim),
    }
    tensors, kind = _as_q(name, p, q, weight, kind)
    return _call(operator, name, {**p, **tensors, "weight": weight}, **how, dtype=kind)


def _as_q(
    function: str, p: dict[str, Tensor], q: _Q, weight: Tensor | None, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor | None], torch.dtype | None]:
    """Tensors for q, and the dtype of the result. Numbers become 0-dim tensors, precise as the arithmetic and without weight in
    the promotion. They are filled on the device of p: nothing is copied to it, so that a CUDA graph can hold the call."""
    check_together(function, q)
    tensors = [x for x in (*p.values(), *q.values(), weight) if isinstance(x, Tensor)]
    of_q = {name: x for name, x in q.items() if x is None or isinstance(x, Tensor)}
    if len(of_q) == len(q):
        return of_q, dtype
    is_double = dtype == torch.float64 or any(tensor.dtype == torch.float64 for tensor in tensors)
    device = tensors[0].device
    if dtype is None and not any(tensor.dim() for tensor in tensors) and not torch.is_autocast_enabled(device.type):
        dtype = result_dtype(tensors)  # 0-dim tensors beside nothing else all have weight
    for name, x in q.items():
        if name not in of_q:
            number = as_number(function, name, x, "a Tensor or a number")
            of_q[name] = torch.full((), number, dtype=torch.float64 if is_double else torch.float32, device=device)
    return {name: of_q[name] for name in q}, dtype


def _call(operator: Callable[..., Tensor], function: str, tensors: dict[str, Any], **others: Any) -> Tensor:
    """Refuses a tensor by its name whose class does not know the operator, which torch answers with a list of classes."""
    if not _is_compiling() and "torch.distributed.tensor" in sys.modules:
        from . import sharding  # noqa: F401  # torch.distributed.tensor may have been loaded after kl_ext
    try:
        return operator(*tensors.values(), **others)
    except TypeError as error:
        if str(error).startswith("Multiple dispatch failed"):
            for name, tensor in tensors.items():
                if tensor is not None and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                    raise TypeError(
                        f"{function}: expected {name} to be of a class that knows the operator, got {type(tensor).__name__}"
                    ) from error
        raise
