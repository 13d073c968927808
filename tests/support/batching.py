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
    """Whether torch warns where it runs an operator example by example."""
    before = torch._C._debug_only_are_vmap_fallback_warnings_enabled()
    torch._C._debug_only_display_vmap_fallback_warnings(shown)
    try:
        yield
    finally:
        torch._C._debug_only_display_vmap_fallback_warnings(before)


# Torch's own operators that have no rule in its older batching system: the plain formulas run into them, too, where they are
# permuted or differentiated twice.
_WITHOUT_OLD_RULES = {"aten::copy_", "aten::sum", "aten::where"}


@contextmanager
def seen_fallbacks(capfd: pytest.CaptureFixture[str]) -> Iterator[set[str]]:
    """Has, in the end, the operators that torch said it ran example by example: as a warning of Python's from torch 2.15 on, on
    file descriptor 2 before."""
    seen: set[str] = set()
    capfd.readouterr()
    with batching_fallbacks(shown=True), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield seen
    told = capfd.readouterr().err + "".join(f"{w.message}\n" for w in caught)
    seen.update(re.findall(r"batching rule for (\w+::\w+)", told))


@pytest.fixture
def no_fallback(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Fails a test in which torch ran an operator example by example, outside of `batching_fallbacks(shown=False)`."""
    with seen_fallbacks(capfd) as seen:
        yield
    assert not seen - _WITHOUT_OLD_RULES, seen
