"""The documented losses written out in plain torch, the way a training script would write them.

This is the baseline: the benchmarks and the demo run it beside the operators. It has the same names, signatures, shapes,
result types and gradients (torch's own autograd differentiates it), and it needs nothing of this package but torch. What it
does not have is the accuracy: ``exp(x) - 1 - x`` cancels where a distribution approaches its prior, so that in float32 the
smallest losses come out as zero or negative. It also checks nothing that torch does not check.
"""

from torch import Tensor

__all__ = ["kl_div_pair_loss", "kl_div_single_loss"]


def kl_div_single_loss(mu: Tensor, log_var: Tensor, *, clamp_min: float = -30.0, clamp_max: float = 20.0) -> Tensor:
    r"""The KL divergence of N(mu, exp(log_var)) from the standard normal, in nats, one term per element.

    .. math:: \frac{1}{2} \left( \mu^2 + \sigma^2 - \log \sigma^2 - 1 \right)

    Args:
        mu: The means, of any shape and floating dtype.
        log_var: The logarithms of the variances; its shape broadcasts with that of ``mu``.
        clamp_min: The smallest log-variance used; smaller ones count as this and receive no gradient.
        clamp_max: The largest log-variance used; larger ones count as this and receive no gradient.

    Returns:
        The terms, in the broadcast shape and the promoted dtype. Their sum over the dimensions of the distribution, which is
        the divergence, is left to the caller.

    Example:
        >>> import torch
        >>> kl_div_single_loss(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]))
        tensor([0.0000, 0.5000])
    """
    log_var = log_var.clamp(clamp_min, clamp_max)
    return 0.5 * (mu.square() + log_var.exp() - log_var - 1.0)


def kl_div_pair_loss(
    mu_p: Tensor,
    log_var_p: Tensor,
    mu_q: Tensor,
    log_var_q: Tensor,
    *,
    clamp_min: float = -30.0,
    clamp_max: float = 20.0,
) -> Tensor:
    r"""The documented loss of p = N(mu_p, exp(log_var_p)) against q = N(mu_q, exp(log_var_q)), one term per element.

    .. math:: \log \frac{\sigma_q^2}{\sigma_p^2} + \frac{\sigma_p^2 + (\mu_p - \mu_q)^2}{\sigma_q^2} - \frac{1}{2}

    This is not the KL divergence but twice it and a half: 1/2 where p = q. With D the divergence in nats, the loss is
    ``2 * D + 0.5`` and ``D = 0.5 * (loss - 0.5)``, element by element; the gradients are twice those of D.

    Args:
        mu_p: The means of p, of any shape and floating dtype.
        log_var_p: The logarithms of the variances of p.
        mu_q: The means of q.
        log_var_q: The logarithms of the variances of q. All four shapes broadcast together.
        clamp_min: The smallest log-variance used, for p and q; smaller ones count as this and receive no gradient.
        clamp_max: The largest log-variance used, for p and q; larger ones count as this and receive no gradient.

    Returns:
        The terms, in the broadcast shape and the promoted dtype; their sum is left to the caller.

    Example:
        >>> import torch
        >>> zero, one = torch.tensor(0.0), torch.tensor(1.0)
        >>> kl_div_pair_loss(one, zero, zero, zero), kl_div_pair_loss(zero, zero, zero, zero)
        (tensor(1.5000), tensor(0.5000))
    """
    log_var_p = log_var_p.clamp(clamp_min, clamp_max)
    log_var_q = log_var_q.clamp(clamp_min, clamp_max)
    return log_var_q - log_var_p + (log_var_p.exp() + (mu_p - mu_q).square()) / log_var_q.exp() - 0.5
