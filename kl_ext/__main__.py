"""`python -m kl_ext`: what was built, what is running, and a self-check; what it can where the library does not load."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from types import ModuleType

from . import _library


def _self_check(devices: Sequence[str]) -> bool:
    passed = True
    for device in devices:
        try:
            from ._self_check import errors

            problem = next(errors(device), None)
        except Exception as error:  # whatever is wrong, say so and go on
            problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        _print_line("self-check", f"{device}: {f'failed: {problem}' if problem else 'ok'}")
        passed &= problem is None
    return passed


def _print_line(title: str, text: str) -> None:
    print(f"{title:<12}{text}")


def _built() -> ModuleType | None:
    try:
        return _library.build_facts()
    except ImportError:
        return None


def _version(built: ModuleType | None) -> str:
    return f"{built.version if built else 'no compiled part'} in {_library.PACKAGE}"


def _print_build(built: ModuleType | None) -> None:
    _print_line("kl_ext", _version(built))
    if built is None:
        return
    nvcc = f" and nvcc {built.cuda_compiler_version}" if built.cuda_compiler_version else ""
    _print_line("built", f"against {_library.described(built.torch_version, built.torch_cuda_version)}")
    _print_line("", f"with {built.compiler}{nvcc}, {built.build_type} ({built.cxx_flags.strip()})")
    _print_line("", f"for the CPU capabilities {' '.join(built.cpu_capabilities)}")
    _print_line("", f"for the CUDA architectures {' '.join(built.cuda_architectures) or 'none: without CUDA kernels'}")


def _print_running(built: ModuleType | None) -> list[str]:
    """Returns the devices to check."""
    _print_line("Python", f"{platform.python_version()} ({sys.executable})")
    try:
        import torch
    except Exception as error:
        _print_line("torch", f"cannot be imported: {error}")
        return []
    _print_line("torch", f"{_library.described(torch.__version__, torch.version.cuda)} in {torch.__path__[0]}")
    if built:
        _print_line("C++", f'-DCMAKE_PREFIX_PATH="{_library.PACKAGE};{torch.utils.cmake_prefix_path}"')
    capability = torch.backends.cpu.get_cpu_capability()
    used = [name for name in built.cpu_capabilities if capability.startswith(name)] if built else []
    _print_line("CPU", f"{capability}; kl_ext uses {(used or ['DEFAULT'])[0]}, {torch.get_num_threads()} threads")
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.version.cuda else []
    for gpu in gpus:
        properties = torch.cuda.get_device_properties(gpu)
        _print_line(str(gpu), f"{properties.name}, compute capability {properties.major}.{properties.minor}")
    if not gpus:
        _print_line("GPU", "none")
    return ["cpu", *map(str, gpus)] if built and built.cuda_architectures else ["cpu"]


def parse(arguments: Sequence[str]) -> None:
    """Ends the program where the arguments ask for less than the report."""
    parser = argparse.ArgumentParser(
        prog="python -m kl_ext",
        description="Prints what was built and what is running, and checks every operator on every device against its formula.",
        epilog="The exit status is 1 where the library cannot be loaded or a check fails.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and where it is installed, and exit")
    if parser.parse_args(arguments).version:
        _print_line("kl_ext", _version(_built()))
        sys.exit()


def main(problem: ImportError | None = None) -> int:
    """Prints the report, with the problem where there is one; returns the exit status."""
    built = _built()
    _print_build(built)
    devices = _print_running(built)
    if problem is not None:
        print(f"\nThe library cannot be loaded.\n{problem}")
        return 1
    return 0 if _self_check(devices) else 1


if __name__ == "__main__":
    sys.exit(main())
