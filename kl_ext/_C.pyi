"""What this build is: csrc/python.cpp."""

version: str
torch_version: str
torch_cuda_version: str | None
cuda_compiler_version: str | None
cuda_architectures: tuple[str, ...]
cpu_capabilities: tuple[str, ...]
compiler: str
cxx_flags: str
build_type: str
