"""Loading the library: the names it gives, how long that takes, and what is said where it cannot be loaded."""

import inspect
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kl_ext
from kl_ext import __main__ as report
from kl_ext import _library, _self_check, reference
from kl_ext._operators import OPERATORS

SINGLE = "(mu: torch.Tensor, log_var: torch.Tensor, *, clamp_min: float = -30.0, clamp_max: float = 20.0) -> torch.Tensor"
PAIR = (
    "(mu_p: torch.Tensor, log_var_p: torch.Tensor, mu_q: torch.Tensor, log_var_q: torch.Tensor, *, "
    "clamp_min: float = -30.0, clamp_max: float = 20.0) -> torch.Tensor"
)


def run_python(*arguments: str, cwd: Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path or os.environ.get("PYTHONPATH", "")}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name, signature", [("kl_div_single_loss", SINGLE), ("kl_div_pair_loss", PAIR)])
def test_the_signatures_are_exactly_the_documented_ones(name, signature):
    assert str(inspect.signature(getattr(kl_ext, name), eval_str=True)) == signature


@pytest.mark.parametrize("name", ["kl_div_single_loss", "kl_div_pair_loss"])
def test_the_operators_have_the_functions_argument_names(name):
    schema = getattr(torch.ops.kl_ext, name).default._schema
    public = list(inspect.signature(getattr(kl_ext, name)).parameters.values())
    assert [a.name for a in schema.arguments] == [*(p.name for p in public), "dtype"]
    assert [a.kwarg_only for a in schema.arguments] == [*(p.kind is p.KEYWORD_ONLY for p in public), True]
    assert [a.default_value for a in schema.arguments if a.kwarg_only] == [-30.0, 20.0, None]


def test_import_adds_at_most_50_ms_to_torchs(tmp_path):
    script = "import torch, time; t = time.perf_counter(); import kl_ext; print(time.perf_counter() - t)"
    seconds = []
    for _ in range(20):  # the least: whatever else the machine does comes on top
        seconds.append(float(run_python("-c", script, cwd=tmp_path).stdout))
        if seconds[-1] <= 0.05:
            return
    pytest.fail(f"importing kl_ext after torch took {seconds} seconds")


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python always has a GIL")
def test_importing_leaves_the_gil_switched_off(tmp_path, monkeypatch):
    """A module that does not declare that it needs none switches it on, with a warning."""
    script = "import torch, sys; before = sys._is_gil_enabled(); import kl_ext; print(before, sys._is_gil_enabled())"
    monkeypatch.delenv("PYTHON_GIL", raising=False)  # 0 would keep it off in any case
    completed = run_python("-c", script, cwd=tmp_path)
    assert (completed.stdout, completed.stderr) == ("False False\n", "")


def test_the_report_names_versions_build_and_capability_and_checks_itself(tmp_path):
    completed = run_python("-m", "kl_ext", cwd=tmp_path)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    built = _library.build_facts()
    for fact in (
        kl_ext.__version__,
        torch.__version__,
        platform.python_version(),
        built.compiler,
        built.build_type,
        *built.cpu_capabilities,
        *built.cuda_architectures,
        torch.backends.cpu.get_cpu_capability(),
        f'-DCMAKE_PREFIX_PATH="{_library.PACKAGE};{torch.utils.cmake_prefix_path}"',
        "cpu: ok",
    ):
        assert fact in completed.stdout


@pytest.mark.parametrize("options", [("--version",), ("--help",)], ids=" ".join)
def test_the_report_has_options(options, tmp_path):
    completed = run_python("-m", "kl_ext", *options, cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert "self-check" not in completed.stdout
    if options == ("--version",):
        assert completed.stdout.split() == ["kl_ext", kl_ext.__version__, "in", str(_library.PACKAGE)]
    else:
        assert completed.stdout.startswith("usage: python -m kl_ext")
        assert "--version" in completed.stdout


def test_the_report_refuses_other_options(tmp_path):
    completed = run_python("-m", "kl_ext", "--verison", cwd=tmp_path)
    assert completed.returncode == 2
    assert "unrecognized arguments: --verison" in completed.stderr


NUMBERS = [
    (operator.name, arity, number)
    for operator in OPERATORS
    for arity in sorted({len(operator.inputs) - len(operator.optional), len(operator.inputs)})
    for number in range(arity + 1)
]


@pytest.mark.parametrize("name, arity, number", NUMBERS)
def test_the_self_check_fails_where_a_number_is_wrong(name, arity, number, monkeypatch, capsys):
    """The loss or any gradient, at one point of all."""
    right = getattr(reference, name)

    def wrong(*inputs: Tensor, **options: Any) -> Tensor:
        result = right(*inputs, **options)
        if len(inputs) != arity or options:
            return result
        place = torch.zeros_like(result)
        place[-1, -1] = 1e-3
        return result + place * (inputs[number - 1] - inputs[number - 1].detach() if number else 1)

    monkeypatch.setattr(reference, name, wrong)
    assert report.main() == 1
    what = f"gradient {number - 1}" if number else "the result"
    assert f"cpu: failed: {name} torch.float32 {{}} with separate tensors: {what} is " in capsys.readouterr().out


def test_the_self_check_calls_every_operator_that_is_registered(monkeypatch):
    """Under a dispatch mode halves are not written at once. A profiler tells overloads by their numbers of arguments."""
    reductions = {options.get("reduction", "none") for options in _self_check.REDUCTIONS}
    assert reductions == {"none", "sum", "mean", "batchmean"}
    monkeypatch.setattr(_self_check, "REDUCTIONS", [{}])  # the profiler takes its time
    monkeypatch.setattr(_self_check, "TOLERANCES", {torch.float32: 1e-5})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        assert list(_self_check.errors("cpu")) == []
    called = {(event.name, len(event.input_shapes)) for event in profile.events() if event.name.startswith("kl_ext::")}
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("kl_ext::")]
    assert called == {(schema.name, len(schema.arguments)) for schema in schemas}
    assert len(called) == len(schemas)


def test_the_self_check_fails_where_it_does_not_cover_an_operator(capsys):
    library = torch.library.Library("kl_ext", "FRAGMENT")
    library.define("another_loss(Tensor mu) -> Tensor")
    try:
        assert report.main() == 1
    finally:
        library._destroy()
    assert "cpu: failed: kl_ext::another_loss: the self-check does not cover it" in capsys.readouterr().out


def build_facts(monkeypatch, torch_version: str, torch_cuda_version: str | None) -> None:
    facts = SimpleNamespace(torch_version=torch_version, torch_cuda_version=torch_cuda_version)
    monkeypatch.setattr(_library, "build_facts", lambda: facts)


@pytest.mark.parametrize(
    "built, running",
    [
        (("2.11.0", None), ("2.12.0", None)),
        (("2.13.1+cpu", None), ("2.14.0+cu130", "13.0")),
        (("2.13.0+cpu", None), ("2.13.0+cu130", "13.0")),
        (("2.13.0+cu130", "13.0"), ("2.13.0+cpu", None)),
        (("2.13.0+cu126", "12.6"), ("2.13.0+cu130", "13.0")),
    ],
    ids=["minor version", "both", "CUDA torch", "CPU torch", "CUDA major"],
)
def test_another_torch_is_refused_before_the_library_is_loaded(built, running, monkeypatch):
    build_facts(monkeypatch, *built)
    monkeypatch.setattr(torch, "__version__", running[0])
    monkeypatch.setattr(torch.version, "cuda", running[1])
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded"))
    with pytest.raises(ImportError) as raised:
        _library.load()
    for version, cuda in (built, running):
        assert f"torch {version} ({f'CUDA {cuda}' if cuda else 'CPU'})" in str(raised.value)
    assert f"{sys.executable} -m pip install --no-deps ." in str(raised.value)


@pytest.mark.parametrize(
    "built, running", [(("2.13.0+cpu", None), ("2.13.1", None)), (("2.13.0+cu128", "12.8"), ("2.13.1+cu126", "12.6"))], ids=str
)
def test_another_patch_version_is_accepted(built, running, monkeypatch):
    build_facts(monkeypatch, *built)
    monkeypatch.setattr(torch, "__version__", running[0])
    monkeypatch.setattr(torch.version, "cuda", running[1])
    _library.check()


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "LIBRARY", tmp_path / "libkl_ext.so")
    with pytest.raises(ImportError, match=r"libkl_ext\.so is missing\.\n.*pip install --no-deps \."):
        _library.load()


@pytest.fixture
def copied_package(tmp_path) -> Path:
    """The package without what is compiled, in a folder that Python prefers when it is started there."""
    target = tmp_path / "kl_ext"
    target.mkdir()
    for file in _library.PACKAGE.glob("*.py"):
        shutil.copy(file, target)
    return target


def assert_explained(package: Path, message: str) -> None:
    """Both by the import and by the report, which says what it can."""
    imported = run_python("-c", "import kl_ext", cwd=package.parent)
    assert imported.returncode == 1
    assert "ImportError: " + message in imported.stderr
    reported = run_python("-m", "kl_ext", cwd=package.parent)
    assert reported.returncode == 1
    assert reported.stderr == ""
    for fact in (torch.__version__, platform.python_version(), "The library cannot be loaded.\n" + message):
        assert fact in reported.stdout
    for option, said in (("--version", f" in {package}"), ("--help", "usage: python -m kl_ext")):
        asked = run_python("-m", "kl_ext", option, cwd=package.parent)
        assert (asked.returncode, asked.stderr) == (0, "")
        assert said in asked.stdout


def test_a_folder_that_python_took_for_the_installed_package_is_explained(copied_package):
    assert_explained(
        copied_package,
        f"kl_ext: {copied_package} has no compiled part for this Python (there is no _C module in it).\n"
        f"Python took it for the package, which is installed in {_library.PACKAGE}: start Python elsewhere.",
    )


def test_a_package_without_its_compiled_part_is_explained(copied_package):
    """Where no other is installed: without the site module, nothing is that does not come with Python."""
    imported = run_python("-S", "-c", "import kl_ext", cwd=copied_package.parent, path=str(copied_package.parent))
    advice = f"Install the package from its source folder: {sys.executable} -m pip install .\n"
    assert f"{copied_package} has no compiled part for this Python (there is no _C module in it).\n{advice}" in imported.stderr


HOOK = """
import sys
from importlib.machinery import PathFinder
class Hook:
    def find_spec(name, path=None, target=None):
        if name.startswith("kl_ext."):
            return PathFinder.find_spec(name, [{package!r}])
sys.meta_path.append(Hook)
import kl_ext
"""


def test_the_import_hook_of_another_checkout_is_not_asked_for_the_compiled_part(copied_package):
    """As setuptools writes them for editable installs that are no path entries."""
    imported = run_python("-c", HOOK.format(package=str(_library.PACKAGE)), cwd=copied_package.parent)
    assert f"kl_ext: {copied_package} has no compiled part for this Python" in imported.stderr


def test_a_library_that_does_not_load_is_explained(copied_package):
    for file in _library.PACKAGE.glob("_C.*.so"):
        shutil.copy(file, copied_package)
    library = copied_package / "lib" / "libkl_ext.so"
    library.parent.mkdir()
    library.write_text("not a library")
    assert_explained(copied_package, f"kl_ext: {library} does not load: ")


def test_the_compiled_facts_come_without_torch_and_without_the_library(tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {str(_library.PACKAGE)!r}); import _C; "
        "print('torch' in sys.modules, 'libkl_ext' in open('/proc/self/maps').read(), _C.version)"
    )
    assert run_python("-c", script, cwd=tmp_path).stdout.split() == ["False", "False", kl_ext.__version__]
