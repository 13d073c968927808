"""Calls of every kind, while LeakSanitizer looks on: python tests/layouts/leak_sanitizer.py [LIBRARY].

For test_leaks.py, which preloads the sanitizer and reads what it reports: blocks that nothing points to any more. LIBRARY has a
function that leaks.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

sanitizer = ctypes.CDLL(None)
sanitizer.__lsan_disable()  # what is allocated once is no leak

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import torch  # noqa: E402

import failing_allocations  # noqa: E402
import leaks  # noqa: E402
from operators import OPERATORS  # noqa: E402

TIMES = 3


def main() -> None:
    torch.set_num_threads(1)
    calls = [call for of in OPERATORS for _, call in (*failing_allocations.calls(of, "small"), *leaks.other_calls(of))]
    for call in calls:
        call()
    planted = [ctypes.CDLL(library).leak for library in sys.argv[1:]]
    sanitizer.__lsan_enable()
    for _ in range(TIMES):
        for call in calls:
            call()
    for leak in planted:
        for _ in range(10):  # the stack may still point to some
            leak()
    gc.collect()
    sanitizer.__lsan_do_recoverable_leak_check()
    sanitizer.__lsan_disable()
    print(len(calls))


main()
