"""For C++ programs: CMake finds the package, kl_ext/ops.h has every function, and the examples run without Python."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kl_ext import _library, reference

SOURCE = Path(__file__).resolve().parents[2]
EXAMPLES = SOURCE / "examples" / "cpp"
CALLS = Path(__file__).with_name("cpp_calls.cpp")
PAGE = (SOURCE / "docs" / "start.md").read_text()
HEADER = (_library.PACKAGE / "include" / "kl_ext" / "ops.h").read_text()
FUNCTIONS = set(re.findall(r"^inline at::Tensor (\w+)\(", HEADER, re.MULTILINE))
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
# Some linkers drop what a program takes no symbol of, as here all do.
PROJECT = f"""
cmake_minimum_required(VERSION 3.25)
project(tests LANGUAGES CXX)
add_compile_options(-Wall -Wextra -Werror)
add_link_options(LINKER:--as-needed)
add_subdirectory({EXAMPLES} examples)
find_package(kl_ext REQUIRED)
foreach(source {CALLS} page.cpp)
  cmake_path(GET source STEM program)
  add_executable(${{program}} ${{source}})
  target_link_libraries(${{program}} PRIVATE kl_ext::kl_ext)
endforeach()
"""

# Whether CMake finds all that torch itself wants.
PLAIN_PROJECT = """
cmake_minimum_required(VERSION 3.25)
project(plain LANGUAGES CXX)
find_package(Torch REQUIRED)
file(WRITE "${CMAKE_BINARY_DIR}/main.cpp" "int main() {}")
add_executable(main "${CMAKE_BINARY_DIR}/main.cpp")
target_link_libraries(main PRIVATE ${TORCH_LIBRARIES})
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """With no other environment than this one."""
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs, built once for all processes that share the tests."""
    for tool in ("cmake", "ninja", os.environ.get("CXX", "c++")):
        if shutil.which(tool, path=PATH) is None:
            pytest.skip(f"there is no {tool}")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cpp"
    folder.mkdir(exist_ok=True)
    (program,) = re.findall(r"^```cpp\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "page.cpp").exists():
            (folder / "page.cpp").write_text(program)
        (folder / "CMakeLists.txt").write_text(PROJECT)
        prefix = f"-DCMAKE_PREFIX_PATH={_library.PACKAGE};{torch.utils.cmake_prefix_path}"
        environment = {**os.environ, "PATH": PATH}
        configured = run("cmake", "-G", "Ninja", "-B", "build", "-S", ".", prefix, cwd=folder, **environment)
        if configured.returncode and torch.version.cuda:
            (folder / "torch").mkdir(exist_ok=True)
            (folder / "torch" / "CMakeLists.txt").write_text(PLAIN_PROJECT)
            alone = run("cmake", "-G", "Ninja", "-B", "build_torch", "-S", "torch", prefix, cwd=folder, **environment)
            if alone.returncode:
                pytest.skip("the CMake files of a CUDA build of torch need a CUDA toolkit")
        assert configured.returncode == 0, configured.stdout + configured.stderr
        built = run("cmake", "--build", "build", cwd=folder, **environment)
        assert built.returncode == 0, built.stdout + built.stderr
    return folder / "build"


def gradient(function: Any, x: Tensor, *inputs: Tensor, **options: Any) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x, *inputs, **options), x)[0]


def numbers(first: float, last: float) -> Tensor:
    return torch.linspace(first, last, 6, dtype=torch.float64).view(2, 3)


INPUTS = {
    **{"mu": numbers(-2, 3), "log_var": numbers(-40, 30), "scale": numbers(0.5, 2), "mask": numbers(-2, 3) > -1},
    **{"mu_q": numbers(1, -1)[0], "log_var_q": numbers(-1, 1)[1], "scale_q": numbers(3, 1)[0]},
}
DTYPES = {"Double": torch.float64, "Float": torch.float32}


def test_every_call_returns_what_the_formula_in_plain_torch_does(programs: Path) -> None:
    """A function of the header throws where its operator has another signature."""
    ran = run(programs / "cpp_calls", cwd=programs)
    assert ran.returncode == 0, ran.stderr
    names = {**{name: getattr(reference, name) for name in reference.__all__}, **INPUTS, "torch": torch, "gradient": gradient}
    called = set()
    for line in ran.stdout.splitlines():
        call, dtype, shape, values = line.split("|")
        result = torch.tensor([float(value) for value in values.split()], dtype=DTYPES[dtype])
        torch.testing.assert_close(result.view([int(size) for size in shape.split()]), eval(call, names), msg=line)
        called.add(call.partition("(")[0])
    assert called == {*FUNCTIONS, "gradient"}


@pytest.mark.parametrize("name", ["gaussian_kl_div", "kl_div_pair_loss", "kl_div_single_loss", "normal_kl_div"])
def test_the_header_has_the_function(name: str) -> None:
    assert name in FUNCTIONS


def test_the_program_of_the_page_runs(programs: Path) -> None:
    ran = run(programs / "page", cwd=programs)
    assert (ran.returncode, ran.stdout) == (0, "[32]\n[32, 32]\n"), ran.stderr


def test_the_training_lowers_its_loss_without_python(programs: Path) -> None:
    program = programs / "examples" / "train"
    loaded = run(program, cwd=programs, LD_TRACE_LOADED_OBJECTS="1").stdout
    assert str(_library.LIBRARY) in loaded
    assert not re.search(r"lib(torch_)?python", loaded)
    ran = run(program, cwd=programs, OMP_NUM_THREADS="1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    losses = [float(loss) for loss in re.findall(r"^step +\d+: (\S+) nats per example$", ran.stdout, re.MULTILINE)]
    assert 0 < losses[-1] < losses[0] / 2


def test_a_compiled_model_returns_without_python_what_it_does_with_it(programs: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    exported = run(sys.executable, EXAMPLES / "export.py", "model.pt2", cwd=tmp_path, **environment)
    assert exported.returncode == 0, exported.stderr
    program = programs / "examples" / "run_aoti"
    expected = float(exported.stdout)
    ran = run(program, "model.pt2", exported.stdout.strip(), cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert run(program, "model.pt2", str(1.001 * expected), cwd=tmp_path).returncode == 1
    assert run(program, cwd=tmp_path).returncode == 2
