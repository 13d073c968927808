"""How the loaded library was compiled, and what the build says where it cannot go on. test_install.py installs."""

import filecmp
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kl_ext
from building import SOURCE, configure, hide_torch, make_smi, make_torch, tool
from kl_ext import _library, _operators

import kl_ext_build  # isort: skip  # of the folders that `building` puts on the path
import torch_info  # isort: skip

OPERATORS = [f"{operator.name}{end}" for operator in _operators.OPERATORS for end in ("", "_backward")]


@pytest.fixture(scope="module")
def commands() -> list[dict[str, str]]:
    """The compiler calls of the loaded library."""
    for file in SOURCE.glob("build/*/compile_commands.json"):
        library = file.parent / "libkl_ext.so"
        if library.exists() and filecmp.cmp(library, _library.LIBRARY, shallow=False):
            commands: list[dict[str, str]] = json.loads(file.read_text())
            return commands
    pytest.skip("the library was not built in this source folder")


def object_of(command: dict[str, str]) -> Path:
    target = re.search(r" -o (\S+)", command["command"])
    assert target is not None
    return Path(command["directory"], target[1])


def test_no_flag_may_change_a_result(commands):
    for entry in commands:
        flags = entry["command"].split()
        if "csrc/python.cpp" in entry["file"]:
            continue
        assert "-fmad=false" in flags if entry["file"].endswith(".cu") else "-ffp-contract=off" in flags, entry
        for flag in flags:
            assert not re.search(
                "fast.?math|Ofast|unsafe-math|reciprocal-math|associative-math|finite-math|signed-zeros|march=native|ftz=true",
                flag,
            )


def test_the_cpu_kernels_are_optimised_and_compiled_for_each_capability(commands):
    kernels = [entry["command"] for entry in commands if "KL_EXT_CPU_CAPABILITY=" in entry["command"]]
    capabilities = {re.findall(r"-DKL_EXT_CPU_CAPABILITY=(\w+)", command)[0] for command in kernels}
    assert capabilities == set(_library.build_facts().cpu_capabilities)
    assert all(re.findall(r" -O\S+", command)[-1] == " -O3" for command in kernels)


def test_the_kernels_of_one_capability_share_no_symbol_with_anothers(commands):
    """Of a weak symbol the linker keeps one copy for all: it would run AVX-512 code on a processor that has none."""
    objects = [object_of(entry) for entry in commands if "KL_EXT_CPU_CAPABILITY=" in entry["command"]]
    defined: dict[str, Path] = {}
    for file in objects:
        for line in subprocess.check_output(["nm", "--defined-only", str(file)], text=True).splitlines():
            _, kind, symbol = line.split(maxsplit=2)
            assert kind not in "WwVvu", f"{symbol} is weak in {file}"
            if kind.isupper():
                assert defined.setdefault(symbol, file) == file, f"{symbol} is in {defined[symbol]} and in {file}"
    assert len(defined) >= len(objects) > 0


def test_each_file_links_only_what_it_needs():
    def needed(file: Path) -> set[str]:
        return set(re.findall(r"NEEDED.*\[(\w+)", subprocess.check_output(["readelf", "-d", str(file)], text=True)))

    compiled_facts = next(_library.PACKAGE.glob("_C.*.so"))
    assert not {name for name in needed(compiled_facts) if re.match("libtorch|libc10|libkl_ext|libcuda", name)}
    libraries = needed(_library.LIBRARY)
    assert {"libtorch_cpu", "libc10"} <= libraries
    assert not {name for name in libraries if re.match("libpython|libtorch_python", name)}
    assert ("libcudart" in libraries) == bool(_library.build_facts().cuda_architectures)


@pytest.fixture
def cuda_build() -> None:
    # CI asks for the kernels with KL_EXT_CUDA=1 and then takes no excuse.
    if not _library.build_facts().cuda_architectures and os.environ.get("KL_EXT_CUDA") != "1":
        pytest.skip("kl_ext is built without CUDA kernels")


@pytest.mark.usefixtures("cuda_build")
def test_the_cuda_kernels_are_registered():
    for name in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kl_ext::{name}", "CUDA"), name


@pytest.mark.usefixtures("cuda_build")
def test_the_library_holds_code_for_each_cuda_architecture():
    built = list(_library.build_facts().cuda_architectures)
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        assert built == ["75-real", "80-real", "86-real", "90-real", "100-real", "120"]
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton")
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    def held(option: str) -> set[str]:
        return set(re.findall(r"sm_(\w+)\.", subprocess.check_output([cuobjdump, option, _library.LIBRARY], text=True)))

    assert held("--list-elf") == {architecture.removesuffix("-real") for architecture in built}
    with_ptx = [int(architecture) for architecture in built if architecture.isdecimal()]
    assert held("--list-ptx") == {str(max(older for older in (75, 80, 120) if older <= number)) for number in with_ptx}


@pytest.mark.usefixtures("cuda_build")
def test_fake_cuda_tensors_give_fake_cuda_results():
    from torch._subclasses.fake_tensor import FakeTensorMode

    ops, bounds = torch.ops.kl_ext, (-30.0, 20.0)
    with FakeTensorMode():
        mu = torch.empty(4, 1, device="cuda", dtype=torch.float16)
        log_var = torch.empty(3, device="cuda")
        for inputs, loss, backward in (
            ((mu, log_var), ops.kl_div_single_loss, ops.kl_div_single_loss_backward),
            ((mu, log_var, mu, log_var), ops.kl_div_pair_loss, ops.kl_div_pair_loss_backward),
        ):
            result = loss(*inputs)
            assert (result.device.type, result.dtype, result.shape) == ("cuda", torch.float32, (4, 3))
            for gradient, x in zip(backward(result, *inputs, *bounds, [True] * len(inputs)), inputs):
                assert (gradient.device.type, gradient.dtype, gradient.shape) == ("cuda", x.dtype, x.shape)


def test_torch_info_describes_the_torch_that_runs():
    found = json.loads(subprocess.check_output([sys.executable, SOURCE / "cmake" / "torch_info.py"], cwd="/"))
    assert (found["version"], found["cuda"]) == (torch.__version__, torch.version.cuda)
    assert torch.__version__.startswith(found["minor"] + ".")
    assert Path(found["include"][0], "torch/library.h").exists()
    assert Path(found["lib"], "libtorch_cpu.so").exists()


def test_torch_info_sees_through_pips_isolation(tmp_path):
    """As pip does it: a sitecustomize.py on PYTHONPATH takes the environment's own packages away."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.path = [p for p in sys.path if not p.endswith('-packages')]")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONNOUSERSITE": "1"}
    blind = [sys.executable, "-c", "import torch"]
    assert subprocess.run(blind, env=environment, cwd="/", capture_output=True).returncode == 1
    found = subprocess.check_output([sys.executable, SOURCE / "cmake" / "torch_info.py"], env=environment, cwd="/")
    assert json.loads(found)["version"] == torch.__version__


def test_torch_becomes_a_build_requirement_only_where_none_is_visible(monkeypatch, capsys):
    monkeypatch.delenv("KL_EXT_TORCH_VERSION", raising=False)
    assert kl_ext_build.get_requires_for_build_wheel() == []
    assert f"building against torch {torch.__version__} in " in capsys.readouterr().out
    assert kl_ext_build.get_requires_for_build_sdist() == []
    hide_torch(monkeypatch)
    monkeypatch.setenv("PIP_BUILD_TRACKER", "a folder")
    assert kl_ext_build.get_requires_for_build_editable() == [f"torch>={torch_info.MINIMUM}"]
    assert "--no-build-isolation" in capsys.readouterr().out


@pytest.mark.parametrize("uv", [False, True])
def test_only_pip_may_fetch_torch_unasked(uv, monkeypatch):
    """test_packaging.py asks uv and pip themselves."""
    hide_torch(monkeypatch)
    for name in ("PIP_BUILD_TRACKER", "KL_EXT_TORCH_VERSION", "UV"):
        monkeypatch.delenv(name, raising=False)
    if uv:
        monkeypatch.setenv("UV", "/somewhere/uv")
    with pytest.raises(SystemExit, match="does not see your torch") as raised:
        kl_ext_build.get_requires_for_build_wheel()
    command = "uv pip install --no-build-isolation ." if uv else "python -m pip wheel --no-deps ."
    assert f"{command}\n" in str(raised.value)
    monkeypatch.setenv("KL_EXT_TORCH_VERSION", "2.14.1")
    assert kl_ext_build.get_requires_for_build_wheel() == ["torch==2.14.1"]


def test_kl_ext_torch_version_fixes_which(monkeypatch):
    monkeypatch.setenv("KL_EXT_TORCH_VERSION", torch.__version__.split("+")[0])
    assert kl_ext_build.get_requires_for_build_wheel() == []
    monkeypatch.setenv("KL_EXT_TORCH_VERSION", "2.11.99")  # that no one has
    assert kl_ext_build.get_requires_for_build_wheel() == ["torch==2.11.99"]
    hide_torch(monkeypatch)
    assert kl_ext_build.get_requires_for_build_wheel() == ["torch==2.11.99"]


@pytest.mark.parametrize("uv", [False, True])
def test_no_torch_is_said(uv, monkeypatch):
    hide_torch(monkeypatch)
    monkeypatch.delenv("PIP_BUILD_TRACKER", raising=False)
    monkeypatch.delenv("UV", raising=False)
    if uv:
        monkeypatch.setenv("UV", "/somewhere/uv")
    installer = "uv pip install" if uv else f"{sys.executable} -m pip install"
    with pytest.raises(SystemExit) as raised:
        torch_info.require()
    assert f"has none.\nInstall it first: {installer} 'torch>=2.11'" in str(raised.value)


def test_another_torch_than_the_one_asked_for_is_said(monkeypatch):
    """Where the build is not isolated, nothing fetches the one that is asked for."""
    monkeypatch.setenv("KL_EXT_TORCH_VERSION", "2.99.1")
    expected = f"KL_EXT_TORCH_VERSION asks for torch 2.99.1, and {sys.executable} has torch {torch.__version__}"
    with pytest.raises(SystemExit, match=re.escape(expected)):
        torch_info.require()
    monkeypatch.setenv("KL_EXT_TORCH_VERSION", ".".join(torch.__version__.split(".")[:2]) + ".*")
    assert torch_info.require()["version"] == torch.__version__


@pytest.mark.parametrize("system, machine", [("darwin", "arm64"), ("win32", "AMD64"), ("linux", "armv7l")])
def test_another_platform_is_refused(system, machine, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(SystemExit, match=f"supports Linux on x86_64 and aarch64; this is {system} on {machine}"):
        torch_info.find()


# What CMake says. tests/support/messages.py has all that ends a build.


@pytest.mark.parametrize("environment", [{"CXX": "/nowhere/g++"}, {"PATH": "/nowhere"}], ids=["CXX", "PATH"])
def test_no_compiler_is_said(environment, tmp_path):
    said = configure(tmp_path, **environment)
    value = next(iter(environment.values()))
    assert "kl_ext found no C++ compiler (CXX is '" in said
    assert f"'{value}'" in said
    assert "apt install g++" in said


@pytest.mark.parametrize("asked", ["", "1", "all"])
def test_a_cuda_torch_without_nvcc_is_said(asked, tmp_path):
    """A warning, unless the kernels are asked for."""
    environment = {"PYTHONPATH": make_torch(tmp_path, "2.14.1+cu130", "13.0"), "CUDACXX": "/nowhere/nvcc", "KL_EXT_CUDA": asked}
    said = configure(tmp_path, fails=bool(asked), **environment)
    assert ("CMake Error" if asked else "CMake Warning") in said
    assert "torch 2.14.1+cu130 is a CUDA build, and no nvcc was found" in said
    assert "CUDA tensors will be refused" in said and "KL_EXT_CUDA=1 makes this an error" in said


def test_without_a_gpu_kl_ext_cuda_auto_builds_no_kernels(tmp_path):
    environment = {"PYTHONPATH": make_torch(tmp_path, "2.14.1+cu130", "13.0"), "KL_EXT_CUDA": "auto"}
    assert "No CUDA kernels: no GPU is visible" in configure(
        tmp_path, fails=False, PATH=make_smi(tmp_path, "", 9), **environment
    )


@pytest.mark.parametrize(
    "said, status, environment, expected",
    [
        ("9.0\\n8.6\\n9.0\\n", 0, {}, "8.6 9.0+PTX"),
        ("8.0\\n12.0\\n", 0, {}, "8.0 12.0+PTX"),
        ("9.0\\n", 0, {"CUDA_VISIBLE_DEVICES": ""}, ""),
        ("9.0\\n", 0, {"CUDA_VISIBLE_DEVICES": "-1"}, ""),
        ("NVIDIA-SMI has failed because it couldn't communicate 1.2", 9, {}, ""),
        ("No devices were found\\n", 0, {}, ""),
    ],
)
def test_the_gpus_that_are_visible(said, status, environment, expected, tmp_path):
    path = make_smi(tmp_path, said.replace("'", ""), status)
    assert run_script("kl_ext_visible_gpus(result)", tmp_path, PATH=path, **environment) == f"-- [{expected}]"


def test_without_nvidia_smi_no_gpu_is_visible(tmp_path):
    assert run_script("kl_ext_visible_gpus(result)", tmp_path, PATH=str(tmp_path)) == "-- []"


@pytest.mark.parametrize(
    "written, expected",
    [
        ("8.0", "80-real"),
        ("7.5;8.6 9.0a,12.0+PTX", "75-real;86-real;90a-real;120"),
        ("Hopper Blackwell", "90-real;100-real;103-real;120-real;121-real"),
    ],
)
def test_torch_cuda_arch_list_is_understood(written, expected, tmp_path):
    assert run_script(f'kl_ext_cuda_architectures("{written}" result)', tmp_path) == f"-- [{expected}]"


@pytest.mark.parametrize(
    "named, expected",
    [
        (
            "75-real;80-real;90-real;120",
            ["compute_75,code=[sm_75]", "compute_80,code=[sm_80,sm_90]", "compute_120,code=[sm_120,compute_120]"],
        ),
        ("75;86", ["compute_75,code=[sm_75,compute_75]", "compute_80,code=[sm_86,compute_80]"]),
        ("90a-real;100f", ["compute_90a,code=[sm_90a]", "compute_100f,code=[sm_100f,compute_100f]"]),
    ],
)
def test_ptx_is_made_once_for_gpus_that_have_the_same(named, expected, tmp_path):
    options = ";".join(f"--generate-code=arch={option}" for option in expected)
    assert run_script(f'kl_ext_generate_code("{named}" result)', tmp_path) == f"-- [{options}]"


@pytest.mark.parametrize("item", ["sm_90", "8", "Volta", "9.0+ptx"])
def test_another_cuda_architecture_is_refused(item, tmp_path):
    assert f"got '{item}' in it" in run_script(f'kl_ext_cuda_architectures("8.0 {item}" result)', tmp_path)


def run_script(line: str, folder: Path, **environment: str) -> str:
    """What a line of CMake that sets `result` makes of it."""
    script = folder / "script.cmake"
    file = SOURCE / "cmake" / "cuda_architectures.cmake"
    script.write_text(f'include("{file}")\n{line}\nmessage(STATUS "[${{result}}]")\n')
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    completed = subprocess.run([tool("cmake"), "-P", script], env=environment, text=True, **streams)
    return " ".join(completed.stdout.split())


MODULES = [_library.LIBRARY, *sorted(Path(kl_ext.__file__).parent.glob("*.so"))]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: Path(file).name.partition(".")[0])
def test_nothing_but_its_entry_point_is_seen_from_outside(file):
    seen = subprocess.check_output(["nm", "-D", "--defined-only", str(file)], text=True).split()[2::3]
    name = Path(file).name.partition(".")[0]
    assert seen == (["kl_ext_keep_memory"] if name == "libkl_ext" else [f"PyInit_{name}"])


@pytest.mark.parametrize("file", MODULES, ids=lambda file: Path(file).name.partition(".")[0])
def test_what_is_loaded_cannot_be_written_over(file):
    """No executable stack, and every address of another library is found at load time and read-only from then on."""
    said = subprocess.check_output(["readelf", "-dlW", str(file)], text=True)
    assert re.search(r"GNU_STACK .* RW ", said)
    assert "GNU_RELRO" in said
    assert "BIND_NOW" in said
