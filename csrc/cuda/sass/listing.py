"""The machine code (SASS) of every kernel in a library, as cuobjdump lists it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@(!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*);")
RESOURCES = re.compile(r"(REG|STACK|LOCAL):(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One line: `@!P0 LDG.E.128 R4, desc[UR4][R2.64]`."""

    address: int
    predicate: str  # "" or as in "!P0"
    opcode: str  # with its modifiers
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def is_vector_load(self) -> bool:
        return self.name == "LDG" and ".128" in self.opcode

    @property
    def is_vector_store(self) -> bool:
        return self.name == "STG" and ".128" in self.opcode


@dataclass
class Kernel:
    """A kernel for one architecture."""

    symbol: str
    instructions: list[Instruction] = field(default_factory=list)
    registers: int = -1  # until they are known
    stack: int = 0  # bytes, as is local
    local: int = 0

    @property
    def vector_loads(self) -> int:
        return sum(instruction.is_vector_load for instruction in self.instructions)

    @property
    def vector_stores(self) -> int:
        return sum(instruction.is_vector_store for instruction in self.instructions)


class MissingToolError(Exception):
    """A program that has to be installed first."""


class UnreadableError(Exception):
    """A library that cuobjdump refuses."""


def find_tools() -> tuple[str, dict[str, str]]:
    """cuobjdump, and an environment in which it finds nvdisasm: of a CUDA toolkit, or of the triton in this environment."""
    folders = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders += [Path(folder) for folder in os.get_exec_path()]
    folders.append(Path("/usr/local/cuda/bin"))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for folder in folders:
        if all(os.access(folder / tool, os.X_OK) for tool in ("cuobjdump", "nvdisasm")):
            return str(folder / "cuobjdump"), {**os.environ, "PATH": os.pathsep.join([str(folder), *os.get_exec_path()])}
    raise MissingToolError(
        "no cuobjdump and nvdisasm beside each other in CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda or the triton of this "
        "Python: install a CUDA build of torch, which brings triton, or the toolkit's own (cuda-cuobjdump and cuda-nvdisasm)."
    )


def demangled(symbols: list[str]) -> list[str]:
    """The names in C++, without parameters."""
    program = shutil.which("c++filt") or shutil.which("llvm-cxxfilt")
    if program is None:
        raise MissingToolError("no c++filt: install binutils (Debian and Ubuntu: apt install binutils).")
    command = [program, "--no-params"]
    completed = subprocess.run(command, input="\n".join(symbols), capture_output=True, text=True, check=True)
    return completed.stdout.splitlines()


def parse_sass(lines: Iterable[str]) -> dict[str, Kernel]:
    """What `cuobjdump -sass` prints, by symbol."""
    kernels: dict[str, Kernel] = {}
    instructions: list[Instruction] = []
    for line in lines:
        match = INSTRUCTION.match(line)
        if match is not None:
            address, predicate, opcode, operands = match.groups()
            instructions.append(Instruction(int(address, 16), predicate or "", opcode, operands.rstrip()))
        elif "Function : " in line:
            symbol = line.partition(" : ")[2].strip()
            instructions = kernels.setdefault(symbol, Kernel(symbol)).instructions
        elif re.match(r"\s+/\*[0-9a-f]+\*/", line):
            raise ValueError(f"cuobjdump printed an instruction that is not understood: {line.strip()}")
    return kernels


def parse_resources(text: str, kernels: dict[str, Kernel]) -> None:
    """Adds what `cuobjdump -res-usage` prints."""
    symbol = ""
    for line in text.splitlines():
        if " Function " in line:
            symbol = line.partition(" Function ")[2].strip().rstrip(":")
        elif "REG:" in line:
            resources = {name: int(number) for name, number in RESOURCES.findall(line)}
            kernel = kernels[symbol]
            kernel.registers, kernel.stack, kernel.local = (resources[name] for name in ("REG", "STACK", "LOCAL"))


def architectures_in(library: Path) -> list[str]:
    """Those that the library holds machine code for: sm_75, ..."""
    cuobjdump, environment = find_tools()
    completed = subprocess.run([cuobjdump, "--list-elf", str(library)], capture_output=True, text=True, env=environment)
    if completed.returncode and "does not contain device code" not in completed.stdout + completed.stderr:
        raise UnreadableError(f"cuobjdump cannot read {library}: {completed.stderr.strip()}")
    found = set(re.findall(r"\b(sm_\d+\w?)\.cubin", completed.stdout))
    return sorted(found, key=lambda name: int(re.sub(r"\D", "", name)))


def kernels_in(library: Path, architecture: str) -> list[Kernel]:
    """The kernels for an architecture."""
    cuobjdump, environment = find_tools()
    command = [cuobjdump, "-arch", architecture]
    with subprocess.Popen([*command, "-sass", str(library)], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        kernels = parse_sass(process.stdout)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    usage = subprocess.run([*command, "-res-usage", str(library)], capture_output=True, text=True, check=True, env=environment)
    parse_resources(usage.stdout + usage.stderr, kernels)
    return list(kernels.values())
