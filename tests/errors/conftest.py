"""The modes of autograd, in each of which errors are the same."""

import contextlib

import pytest
import torch

MODES = {"default": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.fixture(params=MODES)
def autograd_mode(request):
    with MODES[request.param]():
        yield
