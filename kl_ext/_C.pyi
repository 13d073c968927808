version: str
torch_version: str
torch_cuda_version: str | None
cuda_compiler_version: str | None
cuda_architectures: tuple[str, ...]
cpu_capabilities: tuple[str, ...]
compiler: str
build_type: str
