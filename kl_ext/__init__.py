"""Gaussian KL-divergence losses as compiled PyTorch operators, in nats, differentiable by every means torch has.

`gaussian_kl_div` is the divergence from log-variances and `normal_kl_div` that from standard deviations, each with weights and
its sum or mean in one pass; `kl_div_single_loss` and `kl_div_pair_loss` are the documented elementwise losses. The operators
behind them are `torch.ops.kl_ext.gaussian_kl_div` and so on; `kl_ext.reference` holds the same formulas in plain torch.
`kl_ext.nn` has them as modules, `kl_ext.distributions` for torch.distributions; `kl_ext.sharding` and `kl_ext.onnx` are
imported where they are needed.
"""

from sys import modules as _modules

from . import _library

_library.load()

from . import _fake, _jagged, _other_devices, _vmap, distributions, functional, nn, reference  # noqa: E402, F401
from .functional import *  # noqa: E402, F403

if "torch.distributed.tensor" in _modules:
    from . import sharding  # noqa: F401

__all__ = functional.__all__
__version__ = _library.build_facts().version
