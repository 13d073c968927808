"""The public functions: documented signatures over the operators."""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from . import _bindings
from ._fake import result_dtype

# torch.compile knows that this is true, and so sees the operators and not the bindings.
_is_compiling = torch.compiler.is_compiling
_kl_div_single_loss = torch.ops.kl_ext.kl_div_single_loss.default
_kl_div_pair_loss = torch.ops.kl_ext.kl_div_pair_loss.default
_gaussian_kl_div = torch.ops.kl_ext.gaussian_kl_div.default


def kl_div_single_loss(mu: Tensor, log_var: Tensor, *, clamp_min: float = -30.0, clamp_max: float = 20.0) -> Tensor:
    r"""The divergence of a Gaussian from the standard normal, per element, in nats.

    .. math::
        \tfrac12 \left( \mu^2 + \sigma^2 - \log \sigma^2 - 1 \right)
        = D_{KL}\left( \mathcal N(\mu, \sigma^2) \,\|\, \mathcal N(0, 1) \right)

    For a Gaussian with independent components the divergence is the sum over them, which is left to the caller: sum over the
    latent dimensions, average over the batch. The result is within 2.5 units in the last place of the true value of the given
    numbers, never negative, and 0 where mu and log_var are.

    Args:
        mu: Means, of any shape.
        log_var: Logarithms of the variances, of any shape that broadcasts with that of ``mu``.
        clamp_min: Log-variances below it count as this number, and get no gradient.
        clamp_max: Log-variances above it count as this number, and get no gradient.

    Returns:
        The terms, in the broadcast shape and the promoted dtype (float32 under autocast; float64 stays float64).

    Raises:
        TypeError: An argument is not a strided tensor of dtype float16, bfloat16, float32 or float64.
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
    try:
        return _kl_div_single_loss(mu, log_var, clamp_min=clamp_min, clamp_max=clamp_max)  # type: ignore[no-any-return]
    except RuntimeError as error:
        _explain(error, "kl_div_single_loss", mu=mu, log_var=log_var)
        raise


def kl_div_pair_loss(
    mu_p: Tensor,
    log_var_p: Tensor,
    mu_q: Tensor,
    log_var_q: Tensor,
    *,
    clamp_min: float = -30.0,
    clamp_max: float = 20.0,
) -> Tensor:
    r"""The documented loss between two Gaussians, per element, in nats.

    .. math::
        \log \frac{\sigma_q^2}{\sigma_p^2} + \frac{\sigma_p^2 + (\mu_p - \mu_q)^2}{\sigma_q^2} - \frac12
        = 2 \, D_{KL}(p \,\|\, q) + \frac12

    **This is not the divergence itself** but twice it and a half: 1/2, not 0, where p and q agree, with gradients twice those
    of the divergence. ``(kl_div_pair_loss(...) - 0.5) / 2`` is the divergence in nats. The sum over independent components is
    left to the caller. The result is within 4.5 units in the last place of the true value of the given numbers, never below
    1/2, and exactly 1/2 where p equals q.

    Args:
        mu_p: Means of p, of any shape. All four shapes must broadcast together.
        log_var_p: Logarithms of the variances of p.
        mu_q: Means of q.
        log_var_q: Logarithms of the variances of q.
        clamp_min: Log-variances below it count as this number, and get no gradient.
        clamp_max: Log-variances above it count as this number, and get no gradient.

    Returns:
        The terms, in the broadcast shape and the promoted dtype (float32 under autocast; float64 stays float64).

    Raises:
        TypeError: An argument is not a strided tensor of dtype float16, bfloat16, float32 or float64.
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
    try:
        return _kl_div_pair_loss(  # type: ignore[no-any-return]
            mu_p, log_var_p, mu_q, log_var_q, clamp_min=clamp_min, clamp_max=clamp_max
        )
    except RuntimeError as error:
        _explain(error, "kl_div_pair_loss", mu_p=mu_p, log_var_p=log_var_p, mu_q=mu_q, log_var_q=log_var_q)
        raise


def gaussian_kl_div(
    mu_p: Tensor,
    log_var_p: Tensor,
    mu_q: Tensor | float | None = None,
    log_var_q: Tensor | float | None = None,
    *,
    clamp_min: float = -30.0,
    clamp_max: float = 20.0,
    reduction: str = "none",
    dim: int | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""The Kullback-Leibler divergence of Gaussians, in nats, reduced in the pass that computes it.

    .. math::
        D_{KL}(p \,\|\, q) = \tfrac12 \left( \log \frac{\sigma_q^2}{\sigma_p^2}
        + \frac{\sigma_p^2 + (\mu_p - \mu_q)^2}{\sigma_q^2} - 1 \right)

    Each term is within 4.5 units in the last place of the true value of the given numbers (2.5 against the standard normal),
    never negative, and exactly 0 where p equals q. The order of a sum depends on its shape alone: it has the same bits for
    any number of threads, instruction set, memory layout and device. Nothing of the size of the inputs is allocated, forward or
    backward, except for the gradients themselves.

    Args:
        mu_p: Means of p, of any shape. All shapes must broadcast together.
        log_var_p: Logarithms of the variances of p.
        mu_q: Means of q, a tensor or a number. Without q: against the standard normal.
        log_var_q: Logarithms of the variances of q, a tensor or a number.
        clamp_min: Log-variances below it count as this number, and get no gradient.
        clamp_max: Log-variances above it count as this number, and get no gradient.
        reduction: ``"none"``; ``"sum"`` or ``"mean"`` over ``dim``; or ``"batchmean"``, the sum of everything divided by the
            size of the first dimension, which is the loss of a variational autoencoder.
        dim: The dimensions to reduce, all of them by default.
        dtype: Of the result. Terms are computed and summed in float64 if an input or ``dtype`` is float64, else in float32, and
            the result is rounded once.

    Returns:
        The terms or their reduction, in the promoted dtype of the inputs (float32 under autocast) unless ``dtype`` is given.

    Raises:
        TypeError: An argument is not a strided tensor of dtype float16, bfloat16, float32 or float64.
        RuntimeError: The shapes do not broadcast, the devices differ, or a dimension is named twice.
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
        result = _bindings.gaussian_kl_div(mu_p, log_var_p, mu_q, log_var_q, clamp_min, clamp_max, reduction, dim, dtype)
        if result is not None:
            return result
    if isinstance(dim, int):
        dim = (dim,)
    if isinstance(mu_q, Real) or isinstance(log_var_q, Real):
        mu_q, log_var_q, dtype = _with_tensors_for_numbers(mu_p, log_var_p, mu_q, log_var_q, dtype)
    try:
        return _gaussian_kl_div(  # type: ignore[no-any-return]
            mu_p,
            log_var_p,
            mu_q,
            log_var_q,
            clamp_min=clamp_min,
            clamp_max=clamp_max,
            reduction=reduction,
            dim=dim,
            dtype=dtype,
        )
    except RuntimeError as error:
        _explain(error, "gaussian_kl_div", mu_p=mu_p, log_var_p=log_var_p)
        for name, argument in (("mu_q", mu_q), ("log_var_q", log_var_q)):
            if not (argument is None or isinstance(argument, Tensor)):
                raise TypeError(
                    f"gaussian_kl_div: expected {name} to be a Tensor or a number, got {type(argument).__name__}"
                ) from error
        raise


_Q = Tensor | float | None


def _with_tensors_for_numbers(
    mu_p: Tensor, log_var_p: Tensor, mu_q: _Q, log_var_q: _Q, dtype: torch.dtype | None
) -> tuple[_Q, _Q, torch.dtype | None]:
    """Numbers as 0-dim tensors, precise as the arithmetic and without weight in the promotion. They are filled on the device of
    the first tensor: nothing is copied to it, so that a CUDA graph can hold the call."""
    tensors = [x for x in (mu_p, log_var_p, mu_q, log_var_q) if isinstance(x, Tensor)]
    if not tensors:
        return mu_q, log_var_q, dtype
    is_double = dtype == torch.float64 or any(tensor.dtype == torch.float64 for tensor in tensors)
    if dtype is None and not any(tensor.dim() for tensor in tensors) and not torch.is_autocast_enabled(tensors[0].device.type):
        dtype = result_dtype(tensors)  # of 0-dim tensors all have weight
    kind = {"dtype": torch.float64 if is_double else torch.float32, "device": tensors[0].device}
    mu_q, log_var_q = (torch.full((), float(x), **kind) if isinstance(x, Real) else x for x in (mu_q, log_var_q))
    return mu_q, log_var_q, dtype


def _explain(error: RuntimeError, function: str, **arguments: object) -> None:
    """The dispatcher refuses what is not a tensor before any check of ours sees it."""
    for name, argument in arguments.items():
        if not isinstance(argument, Tensor):
            raise TypeError(f"{function}: expected {name} to be a Tensor, got {type(argument).__name__}") from error
