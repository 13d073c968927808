"""csrc/bindings.cpp: for each operator a function of its name, which returns None for a call that it does not serve."""

from collections.abc import Callable

from torch import Tensor

def __getattr__(operator: str) -> Callable[..., Tensor | None]: ...

# Of two tensors in one storage, each by its shape, strides, offset and bytes an element: csrc/overlap.h.
def overlap(*placements: object) -> int: ...
