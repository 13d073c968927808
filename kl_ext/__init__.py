"""Gaussian KL-divergence losses as compiled PyTorch operators, in nats, differentiable by every means torch has.

`gaussian_kl_div` is the divergence with its sum or mean in one pass; `kl_div_single_loss` and `kl_div_pair_loss` are the
documented elementwise losses. The operators behind them are `torch.ops.kl_ext.gaussian_kl_div` and so on; `kl_ext.reference`
holds the same formulas in plain torch.
"""

from . import _library

_library.load()

from . import _fake, _jagged, _vmap, reference  # noqa: E402, F401
from .functional import gaussian_kl_div, kl_div_pair_loss, kl_div_single_loss  # noqa: E402

__all__ = ["gaussian_kl_div", "kl_div_pair_loss", "kl_div_single_loss"]
__version__ = _library.build_facts().version
