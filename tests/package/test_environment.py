"""The environment is read while the library is loaded and never again: a thread that sets a variable moves it, and another that
reads it then reads freed memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Says which variables are asked for by libkl_ext.so, or by what it calls.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <execinfo.h>
#include <stdio.h>
#include <string.h>

enum { most = 64 };
static __thread int is_within; // what is called here may ask too

static char* ask(const char* function, const char* name) {
  char* (*next)(const char*);
  *(void**)&next = dlsym(RTLD_NEXT, function);
  if (!is_within) {
    is_within = 1;
    void* callers[most];
    const int count = backtrace(callers, most);
    Dl_info found;
    for (int i = 0; i < count; ++i) {
      if (dladdr(callers[i], &found) && found.dli_fname && strstr(found.dli_fname, "libkl_ext.so")) {
        fprintf(stderr, "asked for %s\n", name);
        break;
      }
    }
    is_within = 0;
  }
  return next(name);
}

char* getenv(const char* name) { return ask("getenv", name); }
char* secure_getenv(const char* name) { return ask("secure_getenv", name); }
"""

# The functions and operators in every form, small, large and larger, in the first thread and in others.
CALLS = """
import os, threading, torch, kl_ext
os.write(2, b"loaded\\n")

WAYS = [("sum", None), ("mean", 0), ("sum", 1), ("batchmean", None), ("none", None)]
FORMS = [{"reduction": reduction, "dim": dim} for reduction, dim in WAYS]

def work():
    for numel in (2**6, 2**16, 2**19):
        for dtype in (torch.float32, torch.bfloat16, torch.float64)[: 3 if numel == 2**16 else 1]:
            h = torch.zeros(numel // 32, 64, dtype=dtype, requires_grad=True)
            q = torch.zeros(32, dtype=dtype, requires_grad=True)
            p, p_strided = h.chunk(2, 1), h.view(64, -1).t().chunk(2, 0)
            losses = [kl_ext.kl_div_single_loss(*p), kl_ext.kl_div_single_loss(*p_strided), kl_ext.kl_div_pair_loss(*p, q, q)]
            losses += [kl_ext.gaussian_kl_div(*p, *prior, **form) for form in FORMS for prior in ((), (q, q), (0.5, 0.5))]
            for loss in losses:
                [gradient] = torch.autograd.grad(loss.sum(), h, create_graph=True)
                gradient.sum().backward()
            detached = [x.detach() for x in p]
            gradients = torch.ops.kl_ext.kl_div_single_loss_backward(detached[0], *detached, -30.0, 20.0, [True, True])
            names = {"grad_mu": gradients[0], "grad_log_var": gradients[1]}
            torch.ops.kl_ext.kl_div_single_loss_backward.out(detached[0], *detached, -30.0, 20.0, **names)
            with torch.autocast("cpu", torch.bfloat16):
                kl_ext.gaussian_kl_div(*p, reduction="sum").backward()

work()
torch.func.jvp(kl_ext.kl_div_single_loss, (torch.zeros(9),) * 2, (torch.zeros(9),) * 2)  # which one thread at a time may call
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
os.write(2, b"done\\n")
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "shim.so", "shim.c", "-ldl"], cwd=folder, check=True)
    return folder / "shim.so"


def test_no_call_asks_the_environment(shim: Path) -> None:
    environment = {**os.environ, "LD_PRELOAD": str(shim)}
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CALLS], env=environment, check=True, capture_output=True, text=True
    ).stderr
    at_load, after_it = said.split("loaded\n")
    assert "asked for KL_EXT_KEEP_MEMORY" in at_load
    assert "asked for KL_EXT_HUGE_PAGES" in at_load
    assert after_it == "done\n"


# Three threads compute, and one sets variables. The computing ones spend their time outside Python, in backward passes of many
# losses with results that are large enough to be kept. An environment that grows has to move: nothing is left free behind it.
LOOP = """
import mmap, os, threading, time, torch, kl_ext

torch.set_num_threads(1)
held = []
end = time.monotonic() + 8

def compute():
    x = torch.zeros(40_000)
    while time.monotonic() < end:
        h = torch.zeros(40_000, requires_grad=True)
        sum(kl_ext.kl_div_single_loss(h, x).sum() for _ in range(50)).backward()

def fill_holes():
    for power in range(26, 11, -1):
        held.append(mmap.mmap(-1, 2**power, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ))

def set_variables():
    turn = 0
    while time.monotonic() < end:
        if turn % 256 == 0:
            fill_holes()
        os.environ[f"NEW_{turn}"] = ""
        turn += 1
        if turn % 20_000 == 0:
            for i in range(turn - 20_000, turn):
                del os.environ[f"NEW_{i}"]

threads = [threading.Thread(target=target) for target in (compute, compute, compute, set_variables)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_threads_compute_while_another_sets_variables() -> None:
    """Of 20,000 variables to begin with, which take memory that is given back to the system as they move."""
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16), **{f"OLD_{i}": "" for i in range(20_000)}}
    completed = subprocess.run([sys.executable, "-c", LOOP], env=variables, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
