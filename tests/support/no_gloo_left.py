"""Run a program as `python FILE ARGUMENTS` would, and fail where it leaves threads of gloo behind.

    torchrun --nproc-per-node=2 tests/support/no_gloo_left.py FILE ARGUMENTS

A thread of gloo that still holds a tensor when Python ends waits for the interpreter's lock and aborts the process
(github.com/pytorch/pytorch/pull/179291): about one run in twenty on a busy machine.
"""

import contextlib
import runpy
import sys
import time
from pathlib import Path

sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
status: object = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    status = end.code


def gloo_threads() -> list[str]:
    names = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended by now
            names.append((thread / "comm").read_text().strip())
    return sorted(name for name in names if "gloo" in name)


# The system lists a thread that has been joined for a moment longer.
end = time.monotonic() + 10
while (left := gloo_threads()) and time.monotonic() < end:
    time.sleep(0.1)
sys.exit(f"threads of gloo are left: {left}" if left else status)
