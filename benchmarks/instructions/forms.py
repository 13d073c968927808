"""Calls in the forms that people write, each beside a form that is known to be fast: neither may cost much more.

python benchmarks/instructions/forms.py LIBRARY    (under callgrind, for count.py: LIBRARY is callgrind.c, compiled)
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import kl_ext

ELEMENTS = 4096
FAST = "fast form"
Call = Callable[[list[Tensor]], Tensor]


class Form(NamedTuple):
    """Two ways to write one call, of two tensors of four dimensions and two of none."""

    written: Call
    fast: Call
    default_device: bool = False  # whether torch.set_default_device is on around the first


FORMS = {
    "dims in a list": Form(
        lambda t: kl_ext.gaussian_kl_div(t[0], t[1], reduction="sum", dim=[1, 2, 3]),
        lambda t: kl_ext.gaussian_kl_div(t[0], t[1], reduction="sum", dim=(1, 2, 3)),
    ),
    "keepdim": Form(
        lambda t: kl_ext.gaussian_kl_div(t[0], t[1], reduction="sum", dim=(1, 2, 3), keepdim=True),
        lambda t: kl_ext.gaussian_kl_div(t[0], t[1], reduction="sum", dim=(1, 2, 3)),
    ),
    "integers for bounds": Form(
        lambda t: kl_ext.kl_div_single_loss(t[0], t[1], clamp_min=-30, clamp_max=20),
        lambda t: kl_ext.kl_div_single_loss(t[0], t[1], clamp_min=-30.0, clamp_max=20.0),
    ),
    "numbers for q": Form(
        lambda t: kl_ext.gaussian_kl_div(t[0], t[1], 0.0, 1.0, reduction="sum"),
        lambda t: kl_ext.gaussian_kl_div(*t, reduction="sum"),
    ),
    "integers for q": Form(
        lambda t: kl_ext.gaussian_kl_div(t[0], t[1], 0, 1, reduction="sum"),
        lambda t: kl_ext.gaussian_kl_div(*t, reduction="sum"),
    ),
    "a default device": Form(
        lambda t: kl_ext.kl_div_single_loss(t[0], t[1]),
        lambda t: kl_ext.kl_div_single_loss(t[0], t[1]),
        default_device=True,
    ),
}


def form_tensors(device: str) -> list[Tensor]:
    """For all of them."""
    latents = [torch.randn(ELEMENTS // 64, 4, 4, 4, device=device) for _ in range(2)]
    return [*latents, torch.zeros((), device=device), torch.ones((), device=device)]


def main() -> None:
    """Twenty calls of each form, after some that set things up, with a dump of callgrind's counts after each twenty."""
    callgrind = ctypes.CDLL(sys.argv[1])
    given = form_tensors("cpu")
    callgrind.start()
    for name, form in FORMS.items():
        for kind, call in (("written", form.written), ("fast", form.fast)):
            torch.set_default_device("cpu" if form.default_device and kind == "written" else None)
            for _ in range(3):
                call(given)
            callgrind.zero()
            for _ in range(20):
                call(given)
            callgrind.dump(f"form {kind}: {name}".encode())
    os._exit(0)  # taking Python down under valgrind takes longer than all of this


if __name__ == "__main__":
    main()
