"""Whether torch runs an operator example by example where it batches it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def batching_fallbacks(shown: bool) -> Iterator[None]:
    """Whether torch warns where it runs an operator example by example. The warning goes to file descriptor 2."""
    before = torch._C._debug_only_are_vmap_fallback_warnings_enabled()
    torch._C._debug_only_display_vmap_fallback_warnings(shown)
    try:
        yield
    finally:
        torch._C._debug_only_display_vmap_fallback_warnings(before)


# Torch's own operators that have no rule in its older batching system: the plain formulas run into them, too, where they are
# permuted or differentiated twice.
_WITHOUT_OLD_RULES = {"aten::copy_", "aten::sum", "aten::where"}


@pytest.fixture
def no_fallback(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Fails a test in which torch ran an operator example by example, outside of `batching_fallbacks(shown=False)`."""
    capfd.readouterr()
    with batching_fallbacks(shown=True), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    told = capfd.readouterr().err + "".join(f"{w.message}\n" for w in caught)
    fallbacks = set(re.findall(r"batching rule for (\w+::\w+)", told))
    assert not fallbacks - _WITHOUT_OLD_RULES, fallbacks
