"""What holds for one run of the tests: its seed, and whether there is a GPU."""

import functools
import os
import secrets

import torch

# One seed per run, also where several processes share the tests. Each test derives its own from it and from its name, so that a
# test alone repeats what it did in the suite.
SEED = int(os.environ.setdefault("KL_EXT_TEST_SEED", str(secrets.randbits(32))))


@functools.cache
def why_no_cuda() -> str:
    """Why the CUDA kernels cannot run here, or nothing where they can."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    import kl_ext  # noqa: F401

    if not torch._C._dispatch_has_kernel_for_dispatch_key("kl_ext::kl_div_single_loss", "CUDA"):
        return "kl_ext is built without CUDA kernels"
    return ""
