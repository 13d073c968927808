"""No call leaves anything behind, however it ends: what kl_ext holds is counted, and the objects of Python."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest

import leaks
from failing_allocations import SHAPES, FailingProcess
from operators import Operator, each_operator

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="replaces functions of the GNU C library")


@pytest.fixture(scope="module")
def process() -> Iterator[FailingProcess]:
    counting = FailingProcess()
    yield counting
    counting.stop()


# What a single call with a shape leaves is counted by test_failing_allocation.py.
@each_operator
@pytest.mark.parametrize("shape", [None, *SHAPES])
def test_calls_leave_nothing_behind(operator: Operator, shape: str | None, process: FailingProcess) -> None:
    assert process.run(leaks.check_all, operator.name, shape) > 1


@pytest.mark.parametrize("what", leaks.PLANTED)
def test_a_planted_leak_is_found(what: str, process: FailingProcess) -> None:
    with pytest.raises(AssertionError, match=f"growth of .*{what}"):
        process.run(leaks.check_planted, what)
