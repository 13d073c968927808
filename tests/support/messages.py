"""Every message of kl_ext with its cause and cure, and what provokes it. As a script, writes docs/errors.md from this."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.masked import masked_tensor

import kl_ext
from building import SOURCE, configure, hide_torch, make_nvcc, make_torch, tool
from kl_ext import _library

import build_requirements  # isort: skip  # of the folders that `building` puts on the path
import kl_ext_build  # isort: skip
import torch_info  # isort: skip
import wheels  # isort: skip

PAGE = SOURCE / "docs" / "errors.md"
# Says what is said to a user, in a folder of its own.
Provoke = Callable[[Path, pytest.MonkeyPatch], str]


@dataclass
class Message:
    """An ellipsis in the text stands for what differs. Without an ellipsis the text is exact."""

    text: str
    cause_and_cure: str
    provoke: Provoke
    call: str = ""

    def __str__(self) -> str:
        return self.call or self.text[:60]


def raised(call: Callable[[], object]) -> str:
    """The error or the warning that a call gives. What follows in an error of torch is its own backtrace."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            call()
        except (Exception, SystemExit) as error:
            text = str(error).partition("\nException raised from")[0]
            return text if isinstance(error, SystemExit) else f"{type(error).__name__}: {text}"
    return f"{warned[-1].category.__name__}: {warned[-1].message}" if warned else ""


# Building.


def configured(
    fails: bool = True, torch_build: tuple[str, str | None] | None = None, nvcc: str = "", **environment: str
) -> Provoke:
    """What CMake says with a torch of this version and CUDA version, and an nvcc of this one, or with what there is."""

    def provoke(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        path = {"PYTHONPATH": make_torch(folder, *torch_build)} if torch_build else {}
        if nvcc:
            path["CUDACXX"] = make_nvcc(folder, nvcc)
        return configure(folder, fails=fails, **path, **environment)

    return provoke


def on_another_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    return raised(torch_info.find)


def without_torch(call: Callable[[], object]) -> Provoke:
    def provoke(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        hide_torch(monkeypatch)
        for name in ("PIP_BUILD_TRACKER", "KL_EXT_TORCH_VERSION", "UV"):
            monkeypatch.delenv(name, raising=False)
        return raised(call)

    return provoke


def with_another_torch_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KL_EXT_TORCH_VERSION", "2.99.1")
    return raised(torch_info.require)


def without_tools(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PATH", str(folder))
    return raised(build_requirements.check_tools)


def where_cmake_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """In a copy, since a build replaces what CMake remembers."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(SOURCE / name, folder)
    shutil.copytree(SOURCE / "cmake", folder / "cmake")
    (folder / "kl_ext").mkdir()
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    environment = {**os.environ, "KL_EXT_CUDA": "yes", "PATH": f"{Path(tool('cmake')).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stderr


CUDA_TORCH, CPU_TORCH = ("2.14.1+cu130", "13.0"), ("2.14.1+cpu", None)
BUILD = [
    Message(
        "kl_ext supports Linux on x86_64 and aarch64; this is … on ….",
        "There is no build for this system.",
        on_another_machine,
    ),
    Message(
        "kl_ext needs torch >= 2.11 and found torch … in …. Upgrade it first: … --upgrade 'torch>=2.11'",
        "Upgrade torch.",
        configured(torch_build=("2.10.1+cpu", None)),
    ),
    Message(
        "kl_ext is built against torch, and … has none. Install it first: … -m pip install 'torch>=2.11'",
        "The build is not isolated, and the environment has no torch. Install torch first.",
        without_torch(torch_info.require),
    ),
    Message(
        "kl_ext: KL_EXT_TORCH_VERSION asks for torch …, and … has torch …. Unset it to build against that one.",
        "The variable and the installed torch disagree. Unset it, or install the torch that it names.",
        with_another_torch_asked_for,
    ),
    Message(
        "kl_ext: this build is isolated in an environment that does not see your torch, and the torch fetched for it would "
        "replace yours. To build against the torch you have, in kl_ext's source folder or with its path in place of the dot: … "
        "To build a wheel for another environment, set KL_EXT_TORCH_VERSION to the version of torch that it has.",
        "uv and `python -m build` isolate a build from your torch. Use the command that the message has.",
        without_torch(kl_ext_build.get_requires_for_build_wheel),
    ),
    Message(
        "kl_ext: without build isolation, the build requirements come from your environment, which lacks …. Install them "
        "first: … 'setuptools>=77' 'cmake>=3.25' 'ninja'",
        "Install what is named.",
        without_tools,
    ),
    Message(
        "kl_ext found no C++ compiler (CXX is '…', PATH is '…'). Install one (Debian and Ubuntu: apt install g++; Fedora: dnf "
        "install gcc-c++), or set CXX to the one you have.",
        "There is none, or `CXX` names one that is not there.",
        configured(CXX="/nowhere/g++"),
    ),
    Message(
        "kl_ext: torch … was built with CUDA …, and … is CUDA …: the major versions must agree. Set CUDACXX to a CUDA … nvcc; "
        "or install a torch built with CUDA …; or set KL_EXT_CUDA=0 to mean a CPU-only build.",
        "torch and `nvcc` are of different CUDA major versions. Do one of the three.",
        configured(torch_build=CUDA_TORCH, nvcc="12.8"),
    ),
    Message(
        "kl_ext: KL_EXT_CUDA=… asks for CUDA kernels, and torch … is not a CUDA build. Install a CUDA build of torch, or unset "
        "KL_EXT_CUDA.",
        "The kernels need a CUDA build of torch.",
        configured(torch_build=CPU_TORCH, KL_EXT_CUDA="1"),
    ),
    Message(
        "kl_ext: expected KL_EXT_CUDA to be 0, 1, all or auto, got '…'.",
        "Set one of these, or unset it.",
        configured(KL_EXT_CUDA="yes"),
    ),
    Message(
        "kl_ext: expected TORCH_CUDA_ARCH_LIST like '8.0 9.0 12.0+PTX', got '…' in it.",
        "Write the list as the message shows it.",
        configured(torch_build=CUDA_TORCH, nvcc="13.0", TORCH_CUDA_ARCH_LIST="Volta"),
    ),
    Message(
        "kl_ext: torch … is a CUDA build, and no nvcc was found to build the CUDA kernels with (looked at CUDACXX, CUDA_HOME, "
        "PATH and /usr/local/cuda): CUDA tensors will be refused. Install the CUDA … toolkit's nvcc or set CUDACXX to it; "
        "KL_EXT_CUDA=0 means a CPU-only build, and KL_EXT_CUDA=1 makes this an error.",
        "A warning: there are CPU kernels only. For CUDA kernels install the CUDA toolkit, or point `CUDACXX` to its `nvcc`, "
        "and install kl_ext again.",
        configured(fails=False, torch_build=CUDA_TORCH, CUDACXX="/nowhere/nvcc"),
    ),
    Message(
        "kl_ext: CMake stopped with status …; what is wrong stands above.",
        "The cause is in the lines above the message; `pip install -v .` shows all of them.",
        where_cmake_fails,
    ),
]

# `make wheels`.


def of_wheels(call: Callable[[Path], object], cuda: str | None = None) -> Provoke:
    """With a torch 2.14.1, and commands that print it, or the version of the package."""

    def provoke(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        found = {"version": "2.14.1", "minor": "2.14", "cuda": cuda, "include": [], "lib": ""}
        monkeypatch.delenv("KL_EXT_CUDA", raising=False)
        monkeypatch.setattr(wheels, "run", lambda *command, **how: json.dumps(found) if cuda else "0.1.0")
        monkeypatch.setattr(wheels.venv, "create", lambda *where, **how: None)
        return raised(lambda: call(folder))

    return provoke


def without_a_torch_to_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    hide_torch(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["wheels.py"])
    said: list[str] = []
    monkeypatch.setattr(wheels.argparse.ArgumentParser, "error", lambda self, text: said.append(text) or sys.exit())
    raised(wheels.main)
    return said[0]


WHEELS = [
    Message(
        "wheels: for torch … pip found …, a CUDA build. Its wheel takes nvcc and KL_EXT_CUDA=all. For a CPU wheel, set "
        "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu, which has the CPU builds.",
        "Do what the message says, as it suits you.",
        of_wheels(lambda folder: wheels.environment_with("2.14"), cuda="13.0"),
    ),
    Message(
        "wheels: expected kl_ext.__version__ to be …, as in the wheel's name, got ….",
        "Another kl_ext is in the environment where the wheel is tested, or the wheel holds files of another build. Remove "
        "`build` and try again.",
        of_wheels(lambda folder: wheels.test(folder / "bin" / "python", folder / "kl_ext-0.2.0+pt214cpu-py3-none-any.whl")),
    ),
    Message(
        "wheels: that ended with status ….",
        "The command that is printed above the message failed. The cause is in the lines between.",
        lambda folder, monkeypatch: raised(lambda: wheels.run("false")),
    ),
    Message(
        "--torch: expected versions of torch, since … has none",
        'Name the versions to build for, as in `make wheels TORCH="2.13 2.14"`.',
        without_a_torch_to_name,
    ),
]

# Importing.


def loaded(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> str:
    for name, value in changed.items():
        monkeypatch.setattr(_library, name, value)
    return raised(_library._load)


def what_is_no_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    library = folder / "libkl_ext.so"
    library.write_text("not a library")
    return loaded(monkeypatch, LIBRARY=library)


REBUILD = "Rebuild it against the torch you have, in kl_ext's source folder: … -m pip install --no-deps ."
IMPORT = [
    Message(
        "ImportError: kl_ext: built against torch …, and this is torch …: the minor version and the CUDA major version must "
        f"agree. {REBUILD}",
        "torch was updated after kl_ext was installed, or replaced by a build for another CUDA version. Install kl_ext again.",
        lambda folder, monkeypatch: loaded(
            monkeypatch, build_facts=lambda: SimpleNamespace(torch_version="2.10.0+cpu", torch_cuda_version=None)
        ),
    ),
    Message(
        "ImportError: kl_ext: … has no compiled part for this Python (there is no _C module in it). …",
        "Python was started in a source folder and took its `kl_ext` for the package: start it elsewhere, or install that "
        "folder with `pip install -e .`. Or the package was built by another Python: install it for this one.",
        lambda folder, monkeypatch: loaded(monkeypatch, PACKAGE=folder),
    ),
    Message(
        f"ImportError: kl_ext: … is missing. {REBUILD}",
        "The installation is incomplete. Install again.",
        lambda folder, monkeypatch: loaded(monkeypatch, LIBRARY=folder / "libkl_ext.so"),
    ),
    Message(
        f"ImportError: kl_ext: … does not load: … {REBUILD}",
        "A library that it needs is not there, or is another one. The message names it. Install again.",
        what_is_no_library,
    ),
]

# Calling. The examples are run as they stand, with these names.


def jagged(lengths: list[int]) -> Tensor:
    """Sequences of these lengths, with two numbers in each row."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(torch.zeros(sum(lengths), 2), offsets)


def names() -> dict[str, Any]:
    ragged = jagged([2, 3])
    return {
        "torch": torch,
        "kl_ext": kl_ext,
        **{name: getattr(kl_ext, name) for name in kl_ext.__all__},
        "ops": torch.ops.kl_ext,
        "inf": math.inf,
        "masked_tensor": masked_tensor,
        "mu": torch.zeros(4, 3),
        "log_var": torch.zeros(4, 3),
        "mask": torch.ones(4, dtype=torch.bool),
        "x": torch.zeros(()),
        "seqs": ragged,
        "others": jagged([2, 3]),
        "gaps": torch.nested.narrow(torch.zeros(2, 3, 2), 1, torch.tensor([0, 1]), torch.tensor([2, 1]), layout=torch.jagged),
    }


def called(call: str) -> Provoke:
    def provoke(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        given = names()
        return raised(lambda: eval(call, given))

    return provoke


def call(call: str, text: str, cause_and_cure: str) -> Message:
    return Message(text, cause_and_cure, called(call), call)


SHARDED = """
import torch, kl_ext
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
mesh, other_mesh = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
mu, log_var = torch.zeros(4, 3), torch.zeros(4, 3)
"""


def sharded(call: str, text: str, cause_and_cure: str) -> Message:
    """In a process of its own, which thinks that it is one of two."""

    def provoke(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        completed = subprocess.run([sys.executable, "-c", f"{SHARDED}{call}"], capture_output=True, text=True)
        return completed.stderr[completed.stderr.rfind(text[: text.index(":")]) :]

    return Message(text, cause_and_cure, provoke, call)


def on_a_device_without_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    import torch._lazy.ts_backend

    torch._lazy.ts_backend.init()
    tensor = torch.zeros(2, device="cpu").to("lazy")
    return raised(lambda: kl_ext.kl_div_single_loss(tensor, tensor))


FLOATS = "float16, bfloat16, float32 or float64"
LIKE_TORCH = "Convert it first, as with `.float()`."
ELSEWHERE = "Move it there. Only a 0-dim tensor on the CPU goes with tensors on another device."
GRAD_OUTPUT = "Only who calls a backward operator by hand meets this: autograd gives what fits."
GIVEN = "Only who calls a backward operator by hand, with tensors for the gradients, meets this."
CALLS = [
    call(
        "gaussian_kl_div(mu, log_var.int())",
        f"TypeError: gaussian_kl_div: expected log_var_p to be a {FLOATS} tensor, got int32",
        f"There are no kernels for this dtype. {LIKE_TORCH}",
    ),
    call(
        "gaussian_kl_div(mu, 0.0)",
        "TypeError: gaussian_kl_div: expected log_var_p to be a Tensor, got float",
        "Only the parameters of q may be numbers. `torch.zeros(())` is a tensor.",
    ),
    call(
        "gaussian_kl_div(mu, log_var.to_sparse())",
        "TypeError: gaussian_kl_div: expected log_var_p to be a strided tensor, got torch.sparse_coo",
        "Make it dense, as with `.to_dense()`.",
    ),
    call(
        "gaussian_kl_div(mu, masked_tensor(log_var, log_var == 0))",
        "TypeError: gaussian_kl_div: expected log_var_p to be of a class that knows the operator, got MaskedTensor",
        "A subclass of Tensor that handles each operator itself does not know this one. Pass the tensor that it wraps, and a "
        "mask as the weight.",
    ),
    call(
        "gaussian_kl_div(mu, log_var[:, :2])",
        "RuntimeError: gaussian_kl_div: expected log_var_p to broadcast with the shape [4, 3] of the arguments before it, got "
        "shape [4, 2]",
        "Broadcasting is torch's: sizes agree from the last on, or are 1.",
    ),
    call(
        'gaussian_kl_div(mu, log_var.to("meta"))',
        "RuntimeError: gaussian_kl_div: expected log_var_p on cpu like mu_p, got meta",
        ELSEWHERE,
    ),
    Message(
        "RuntimeError: kl_div_single_loss: expected mu on cpu…, got lazy:0",
        "There are no kernels for the tensor's device. Where the message says *(this build has no CUDA kernels)*, the build "
        "found no `nvcc` or a CPU build of torch: install again with `KL_EXT_CUDA=1`, which says what is missing.",
        on_a_device_without_kernels,
    ),
    call(
        'ops.kl_div_single_loss.default.redispatch(torch._C.DispatchKeySet("Lazy"), mu, log_var)',
        "RuntimeError: kl_div_single_loss: expected tensors that hold their numbers, on cpu…",
        "A transform or a class of tensors has sent the call to a backend that its tensors are not of. Please report it.",
    ),
    call(
        'kl_ext._other_devices._warn.__wrapped__("mps")',
        "UserWarning: kl_ext has no kernels for mps and uses plain torch formulas there: near the prior they lose digits of "
        "values and gradients, and they do not give the bits of kl_ext's kernels",
        "Said once, on the first call with tensors on this device: [other devices](start.md#other-devices).",
    ),
    call(
        "gaussian_kl_div(mu, log_var, 0.0)",
        "ValueError: gaussian_kl_div: expected mu_q and log_var_q together or neither, got mu_q alone",
        "Give both, or neither for N(0, 1).",
    ),
    call(
        'gaussian_kl_div(mu, log_var, 0.0, "1")',
        "TypeError: gaussian_kl_div: expected log_var_q to be a Tensor or a number, got str",
        "Pass what the message expects.",
    ),
    call(
        'kl_div_single_loss(mu, log_var, clamp_min="-30")',
        "TypeError: kl_div_single_loss: expected clamp_min to be a number or None, got str",
        "`None` is no bound.",
    ),
    call(
        "kl_div_single_loss(mu, log_var, clamp_max=10**400)",
        "ValueError: kl_div_single_loss: expected clamp_max to be a number that a float can hold, got 1000000…",
        "`None` is no bound.",
    ),
    call(
        "gaussian_kl_div(mu, log_var, clamp_min=1.0, clamp_max=0.0)",
        "ValueError: gaussian_kl_div: expected clamp_min <= clamp_max, got 1 and 0",
        "The lower bound is above the upper one, or a bound is NaN.",
    ),
    call(
        "gaussian_kl_div(mu, log_var, dtype=torch.int32)",
        f"TypeError: gaussian_kl_div: expected dtype to be {FLOATS}, got int32",
        "Leave the dtype out for the promoted one.",
    ),
    call(
        'gaussian_kl_div(mu, log_var, dtype="float32")',
        "TypeError: gaussian_kl_div: expected dtype to be a torch.dtype, got str",
        "Write `torch.float32`.",
    ),
    call(
        "gaussian_kl_div(mu, log_var, reduction=None)",
        "TypeError: gaussian_kl_div: expected reduction to be a string, got NoneType",
        'Without a reduction it is `"none"`.',
    ),
    call(
        'gaussian_kl_div(mu, log_var, reduction="avg")',
        'ValueError: gaussian_kl_div: expected reduction to be "none", "sum", "mean" or "batchmean", got "avg"',
        "[Which reduction](functions.md) has what each of them gives.",
    ),
    call(
        "gaussian_kl_div(mu, log_var, dim=1)",
        'ValueError: gaussian_kl_div: expected no dim with reduction "none", got [1]',
        'Name a reduction; `"none"` and `"batchmean"` take no dim.',
    ),
    call(
        'gaussian_kl_div(mu, log_var, reduction="sum", dim=0.5)',
        "TypeError: gaussian_kl_div: expected dim to be an integer, or a tuple or list of them, got float",
        "Pass dimensions as to torch.sum.",
    ),
    call(
        'gaussian_kl_div(mu, log_var, reduction="sum", dim=2)',
        "IndexError: gaussian_kl_div: expected dim from -2 to 1, got 2",
        "The terms have no such dimension.",
    ),
    call(
        'gaussian_kl_div(mu, log_var, reduction="sum", dim=(1, -1))',
        "RuntimeError: gaussian_kl_div: expected each dim once, got [1, -1]",
        "Two of them name one dimension.",
    ),
    call(
        'gaussian_kl_div(mu, log_var, reduction="sum", keepdim=1)',
        "TypeError: gaussian_kl_div: expected keepdim to be a bool, got int",
        "Pass True or False.",
    ),
    call(
        'gaussian_kl_div(x, x, reduction="batchmean")',
        'ValueError: gaussian_kl_div: expected at least one dimension for reduction "batchmean", got 0-dim tensors',
        "There is no batch to divide by.",
    ),
    call(
        "gaussian_kl_div(mu, log_var, weight=mask)",
        "RuntimeError: gaussian_kl_div: expected weight to expand to the shape [4, 3] of the terms, got shape [4]",
        "A weight never enlarges the terms. One of shape [B] needs ones behind it, as in `mask[:, None]`.",
    ),
    call(
        "gaussian_kl_div(mu, log_var, weight=mask[:, None].int())",
        f"TypeError: gaussian_kl_div: expected weight to be a bool, {FLOATS} tensor, got int32",
        "Convert it, as with `.bool()` or `.float()`.",
    ),
    call(
        "gaussian_kl_div(mu, log_var, weight=mu.to_sparse())",
        "TypeError: gaussian_kl_div: expected weight to be a strided tensor, got torch.sparse_coo",
        "Make it dense, as with `.to_dense()`.",
    ),
    call(
        "gaussian_kl_div(mu, log_var, weight=torch.ones(4, 1, requires_grad=True))",
        "RuntimeError: gaussian_kl_div: expected weight not to require grad, for weights are not differentiated. Pass "
        'weight.detach(), or multiply the terms of reduction="none" with the weight',
        "Do one of the two.",
    ),
    call(
        'kl_ext.reference.gaussian_kl_div(mu, log_var, reduction="avg")',
        "ValueError: gaussian_kl_div: expected reduction to be none, sum, mean or batchmean, got 'avg'",
        "As for `kl_ext.gaussian_kl_div`.",
    ),
    call(
        "kl_ext.reference.gaussian_kl_div(mu, log_var, 0.0)",
        "ValueError: gaussian_kl_div: expected mu_q and log_var_q together",
        "As for `kl_ext.gaussian_kl_div`.",
    ),
    call(
        "kl_ext.reference.normal_kl_div(mu, log_var + 1, 0.0)",
        "ValueError: normal_kl_div: expected loc_q and scale_q together",
        "As for `kl_ext.normal_kl_div`.",
    ),
    call(
        "kl_ext.distributions.DiagonalGaussianDistribution(mu)",
        "ValueError: DiagonalGaussianDistribution: expected parameters to have means and log-variances, an even size, along "
        "dim 1, got shape [4, 3]",
        "`dim` is the dimension along which means and log-variances follow each other.",
    ),
    call(
        'gaussian_kl_div(torch.zeros((), device="cuda").expand(2**36), torch.zeros((), device="cuda"), reduction="sum")',
        "RuntimeError: kl_ext: expected at most 34359738368 terms to a sum on CUDA devices, got 68719476736",
        "Only broadcasting makes so many. Sum in parts.",
    ),
    call(
        'gaussian_kl_div(*[torch.zeros(21, device="cuda").as_strided([2] * 40, [0, 1] * 20)] * 2, reduction="sum")',
        "RuntimeError: kl_ext: expected at most 36 dimensions that do not merge, in sums on CUDA devices, got [2, 2, …",
        "Only broadcasting makes so many. Sum in parts.",
    ),
]
JAGGED = [
    call(
        "gaussian_kl_div(seqs, others)",
        "RuntimeError: gaussian_kl_div: expected log_var_p to have the ragged structure of mu_p, shape [2, j…, 2], got shape "
        "[2, j…, 2]; torch.nested.nested_tensor_from_jagged(values, mu_p.offsets()) has it",
        "To torch, tensors have one structure only where they share their offsets. The message has the call that makes one so.",
    ),
    call(
        "gaussian_kl_div(gaps, gaps)",
        "NotImplementedError: gaussian_kl_div: expected mu_p to have no gaps between its sequences, got a nested tensor with "
        "lengths; mu_p.contiguous() has none",
        "Call `.contiguous()` first.",
    ),
    call(
        "gaussian_kl_div(seqs, torch.zeros(2, 3, 2))",
        "RuntimeError: gaussian_kl_div: expected log_var_p to broadcast with the shape [2, j…, 2] of mu_p, with size 1 in the "
        "ragged dimension, got shape [2, 3, 2]",
        "A padded tensor does not go with a jagged one. Make it jagged, or give it size 1 there.",
    ),
    call(
        'gaussian_kl_div(seqs, seqs, reduction="sum", dim=(0, 2))',
        "NotImplementedError: gaussian_kl_div: expected dim to have the ragged dimension 1 where it has dimension 0, got "
        "[0, 2]",
        "Reduce the ragged dimension too, or not the batch.",
    ),
    call(
        "gaussian_kl_div(torch.zeros(2, 1, 2), torch.zeros(2, 1, 2), weight=seqs)",
        "RuntimeError: gaussian_kl_div: expected weight to expand to the shape [2, 1, 2] of the terms, got shape [2, j…, 2]",
        "A jagged weight goes with jagged terms.",
    ),
    call(
        'ops.gaussian_kl_div_backward(seqs, seqs, seqs, None, None, -30.0, 20.0, "sum", None, [True] * 4)',
        "RuntimeError: gaussian_kl_div_backward: expected grad_output to be a strided tensor, got shape [2, j…, 2]",
        GRAD_OUTPUT,
    ),
]
DTENSOR = [
    sharded(
        "kl_ext.gaussian_kl_div(distribute_tensor(mu, mesh), distribute_tensor(log_var, other_mesh))",
        "RuntimeError: gaussian_kl_div: expected log_var_p on … like mu_p, got …",
        "Redistribute one of them: all tensors of a call are on one mesh.",
    ),
    sharded(
        "kl_ext.gaussian_kl_div(distribute_tensor(mu, mesh), log_var)",
        "TypeError: gaussian_kl_div: expected log_var_p to be a DTensor like others, or a single number, got a plain tensor",
        "Distribute it, as with `distribute_tensor(log_var, mesh)`, or call within `implicit_replication()`.",
    ),
]
BACKWARD = [
    call(
        "ops.kl_div_single_loss_backward(mu[0], mu, log_var, -30.0, 20.0, [True, True])",
        "RuntimeError: kl_div_single_loss_backward: expected mu to expand to the shape [3] of grad_output, got shape [4, 3]",
        GRAD_OUTPUT,
    ),
    call(
        'ops.gaussian_kl_div_backward(mu, mu, log_var, None, None, -30.0, 20.0, "sum", None, [True] * 4)',
        "RuntimeError: gaussian_kl_div_backward: expected grad_output of shape [], got shape [4, 3]",
        GRAD_OUTPUT,
    ),
    call(
        "ops.kl_div_single_loss_backward.out(mu, mu.requires_grad_(), log_var, -30.0, 20.0, grad_mu=mu, grad_log_var=None)",
        "RuntimeError: kl_div_single_loss_backward: expected no tensor to require grad where gradients are given, which are "
        "not differentiated",
        f"{GIVEN} Call it within `torch.no_grad()`.",
    ),
    call(
        "ops.kl_div_single_loss_backward.out(mu, mu, log_var, -30.0, 20.0, grad_mu=mu.double(), grad_log_var=None)",
        "TypeError: kl_div_single_loss_backward: expected grad_mu to be float32 like mu, got float64",
        GIVEN,
    ),
    call(
        'ops.kl_div_single_loss_backward.out(mu, mu, log_var, -30.0, 20.0, grad_mu=mu.to("meta"), grad_log_var=None)',
        "RuntimeError: kl_div_single_loss_backward: expected grad_mu on cpu like mu, got meta",
        GIVEN,
    ),
    call(
        "ops.kl_div_single_loss_backward.out(mu, mu, log_var, -30.0, 20.0, grad_mu=mu[:2], grad_log_var=None)",
        "RuntimeError: kl_div_single_loss_backward: expected grad_mu of shape [4, 3] like mu, got shape [2, 3]",
        GIVEN,
    ),
    call(
        "ops.kl_div_single_loss_backward.out(mu, mu, log_var, -30.0, 20.0, grad_mu=x.expand(4, 3), grad_log_var=None)",
        "RuntimeError: unsupported operation: more than one element of the written-to tensor refers to a single memory "
        "location. Please clone() the tensor before performing the operation.",
        GIVEN,
    ),
    call(
        "ops.kl_div_single_loss_backward.out(mu[:2], mu[:2], mu[1:3], -30.0, 20.0, grad_mu=mu[2:], grad_log_var=None)",
        "RuntimeError: kl_div_single_loss_backward: expected grad_mu to be log_var itself or to share no memory with it, got a "
        "partial overlap",
        GIVEN,
    ),
    call(
        "ops.kl_div_single_loss_backward.out(mu + 1, mu[0], log_var, -30.0, 20.0, grad_mu=mu[0], grad_log_var=None)",
        "RuntimeError: kl_div_single_loss_backward: expected grad_mu, which is a sum, to share no memory with mu, got the same "
        "memory",
        GIVEN,
    ),
    call(
        "ops.kl_div_single_loss_backward.out(mu, mu, log_var, -30.0, 20.0, grad_mu=log_var, grad_log_var=log_var)",
        "RuntimeError: kl_div_single_loss_backward: expected grad_log_var to share no memory with grad_mu, got tensors that "
        "overlap",
        GIVEN,
    ),
    call(
        "kl_ext._bindings.overlap()",
        "TypeError: overlap: expected sizes, strides, an offset and bytes an element, twice",
        "Only kl_ext itself calls this.",
    ),
]
SECTIONS = {
    "The build stops or warns": (
        BUILD,
        "Where the build is killed with no message of ours, memory ran out: set `MAX_JOBS=1`.",
    ),
    "`make wheels` stops": (WHEELS, ""),
    "`import kl_ext` raises an error": (IMPORT, "`python -m kl_ext` says the same, and what is installed where."),
    "A call raises an error, or warns": (
        CALLS,
        "Every message names the function, the argument, what was expected and what came. Here `mu` and `log_var` have shape "
        "[4, 3], `mask` has shape [4], `x` has none, and `ops` is `torch.ops.kl_ext`. The numbers in the tensors are not "
        "checked: [Numbers](numbers.md#special-values) has what they give.",
    ),
    "Jagged tensors": (
        JAGGED,
        "`seqs` has the shape [2, j, 2], two sequences of two and three rows; `others` has offsets of its own; `gaps` is a "
        "narrowed tensor with rows between its sequences.",
    ),
    "Sharded tensors": (DTENSOR, "`mesh` and `other_mesh` are meshes of two processes, in one and in two dimensions."),
    "The backward operators": (
        BACKWARD,
        "Autograd calls these. They are public for those who write gradients into memory of their own.",
    ),
}


def page() -> str:
    """The text of docs/errors.md."""
    text = (
        "# Errors\n\nEvery message, its cause and its cure. An ellipsis stands for what differs from case to case. This "
        "page is written by\n`python tests/support/messages.py`, from a list whose messages a test provokes, one by one.\n"
    )
    for title, (messages, introduction) in SECTIONS.items():
        has_calls = any(message.call for message in messages)
        text += f"\n## {title}\n\n" + (f"{introduction}\n\n" if introduction else "")
        text += (
            "| message | given by | cause and cure |\n| --- | --- | --- |\n"
            if has_calls
            else "| message | cause and cure |\n| --- | --- |\n"
        )
        for message in messages:
            example = [f"`{message.call}`" if message.call else ""] if has_calls else []
            text += f"| {' | '.join([f'`{message.text}`', *example, message.cause_and_cure])} |\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
