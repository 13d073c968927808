"""The public functions: documented signatures over the operators."""

import torch
from torch import Tensor

_kl_div_single_loss = torch.ops.kl_ext.kl_div_single_loss.default
_kl_div_pair_loss = torch.ops.kl_ext.kl_div_pair_loss.default


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
    try:
        return _kl_div_pair_loss(  # type: ignore[no-any-return]
            mu_p, log_var_p, mu_q, log_var_q, clamp_min=clamp_min, clamp_max=clamp_max
        )
    except RuntimeError as error:
        _explain(error, "kl_div_pair_loss", mu_p=mu_p, log_var_p=log_var_p, mu_q=mu_q, log_var_q=log_var_q)
        raise


def _explain(error: RuntimeError, function: str, **arguments: object) -> None:
    """The dispatcher refuses what is not a tensor before any check of ours sees it."""
    for name, argument in arguments.items():
        if not isinstance(argument, Tensor):
            raise TypeError(f"{function}: expected {name} to be a Tensor, got {type(argument).__name__}") from error
