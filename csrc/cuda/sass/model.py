"""A model of the kernels on an H100: instructions and bytes per element, and how busy the processors are at its bandwidth.

Instructions are those of paths.py, divided by the elements that a thread works on: from entry to exit, or in sums a turn of the
loop, without what comes before and after it. Bytes are those of all operands, each moved once; a sum's results are not counted.
A share above 100 % says that the kernel waits for its instructions and not for memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from listing import Instruction
from names import BYTES, INPUTS, Name

ARCHITECTURE = "sm_90"

# NVIDIA H100 Tensor Core GPU datasheet, SXM; the clock: of the two boost clocks (PCIe 1.755 GHz, SXM 1.98 GHz) the lower one.
BANDWIDTH = 3.35e12  # bytes per second
PROCESSORS = 132
CLOCK = 1.755e9
SCHEDULERS = 4  # per processor, each of which issues an instruction of a warp, 32 threads, per cycle
FLOAT64_LANES = 64  # per processor: half as many as for float32

FLOAT64 = {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"}
MARKERS = re.compile(r"(<!-- model -->\n)(.*?)(<!-- end of model -->)", re.DOTALL)


@dataclass
class Cost:
    """What a kernel costs per element."""

    name: Name
    instructions: float
    float64: float  # instructions among them
    bytes: int

    @property
    def issue_share(self) -> float:
        """Of the issue slots, where memory is the only thing that is waited for."""
        return self.elements_per_second * self.instructions / (32 * SCHEDULERS * PROCESSORS * CLOCK)

    @property
    def float64_share(self) -> float:
        """Likewise, of the units for float64."""
        return self.elements_per_second * self.float64 / (FLOAT64_LANES * PROCESSORS * CLOCK)

    @property
    def elements_per_second(self) -> float:
        return BANDWIDTH / self.bytes


def cost_of(name: Name, path: Sequence[Instruction]) -> Cost | None:
    """The cost of the path that all 128-bit accesses are on; nothing for a kernel that is not known. Where threads share lanes
    they wait for their loads and barriers."""
    inputs, _, result = name.dtype.partition("->")
    if name.formula not in INPUTS or not path or "_shared_" in name.kernel:
        return None
    read = INPUTS[name.formula] * BYTES[inputs]
    written = BYTES[result or inputs]  # by forward
    if name.kernel.startswith("backward"):
        read, written = read + written, read
    elements = 16 * sum(instruction.is_vector_load for instruction in path) / read
    float64 = sum(instruction.name in FLOAT64 for instruction in path)
    moved = read if name.kernel in ("forward_rows", "forward_columns") else read + written
    return Cost(name, len(path) / elements, float64 / elements, moved)


def printed(costs: Sequence[Cost]) -> list[str]:
    """A line for each kernel and dtype."""
    width = max((len(str(cost.name)) for cost in costs), default=0)
    lines = [f"{'per element, ' + ARCHITECTURE:{width}}  instructions  bytes  issue slots at 3.35 TB/s  float64 units"]
    for cost in costs:
        float64 = f"{cost.float64_share:>13.0%}" if cost.float64 else ""
        lines.append(
            f"{cost.name!s:{width}}  {cost.instructions:>12.1f}  {cost.bytes:>5}  {cost.issue_share:>24.0%}  {float64}".rstrip()
        )
    return lines


def markdown(costs: Sequence[Cost]) -> str:
    """Instructions, bytes, share of the issue slots: a row for each kernel, that for operands in rows where there is one, and a
    column for each dtype."""
    shown = [cost for cost in costs if cost.name.range == "narrow" and (cost.name.access == "rows" or cost.name.sums)]
    shown.sort(key=lambda cost: cost.name.access == "rows")
    cells = {(cost.name.kernel, cost.name.formula, cost.name.dtype): cost for cost in shown}
    dtypes = sorted({dtype for _, _, dtype in cells}, key=lambda dtype: (-BYTES[dtype.partition("->")[0]], dtype))
    lines = [["kernel", "formula", *dtypes], ["---", "---", *("---:" for _ in dtypes)]]
    for kernel, formula in sorted({(kernel, formula) for kernel, formula, _ in cells}):
        row = [cells.get((kernel, formula, dtype)) for dtype in dtypes]
        texts = [f"{cost.instructions:.0f} / {cost.bytes} / {cost.issue_share:.0%}" if cost else "" for cost in row]
        lines.append([kernel, formula, *texts])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(page: Path, costs: Sequence[Cost]) -> None:
    """Put the table where the page marks its place."""
    page.write_text(MARKERS.sub(lambda match: f"{match[1]}{markdown(costs)}{match[3]}", page.read_text()))
