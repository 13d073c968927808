"""No test here finds what another compiled or captured."""

import pytest
import torch
from torch._dynamo import compiled_autograd


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    compiled_autograd.reset()
    yield
    torch.compiler.reset()
    compiled_autograd.reset()
