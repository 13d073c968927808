"""Types of arguments that several modules name."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

# A bound of the clamp. Type checkers see that None, no bound, is taken too; help() shows the documented signature.
if TYPE_CHECKING:
    Bound = float | None
else:
    Bound = float

# Dimensions to reduce: one, several, or all of them.
Dims = int | Sequence[int] | None

Reduction = Literal["none", "sum", "mean", "batchmean"]
