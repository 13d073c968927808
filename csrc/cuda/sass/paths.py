"""The instructions that a thread executes where everything is as usual.

Of a kernel's paths (of a turn of its loop) that is the one with most 128-bit accesses, of those the one with most arithmetic,
and of those the one with fewest instructions. So a thread has whole vectors and as many as it can take at once, every result is
wanted, and the operands have one dimension.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from listing import Instruction

ARITHMETIC = frozenset(kind + operation for kind in "FDH" for operation in ("ADD", "MUL", "FMA", "ADD2", "MUL2", "FMA2"))
REGISTER = re.compile(r"\bR(\d+)\b")


def successors(instructions: Sequence[Instruction]) -> list[list[int]]:
    """Where each instruction may go on, by index; after EXIT is the number of instructions."""
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    end = len(instructions)
    meeting: dict[str, str] = {}  # where the threads that wait at a barrier go on together
    following = []
    for i, instruction in enumerate(instructions):
        target = re.search(r"0x[0-9a-f]+$", instruction.operands)
        barrier = instruction.operands.partition(",")[0]
        onward = [i + 1] if i + 1 < end else []
        jumps: list[int] = []
        if instruction.name == "BSSY" and target is not None:
            meeting[barrier] = target[0]
        elif instruction.name == "BSYNC" and barrier in meeting:
            jumps = [index[int(meeting[barrier], 16)]]
        elif instruction.name == "BRA" and target is not None:
            jumps = [index[int(target[0], 16)]]
        elif instruction.name == "EXIT":
            jumps = [end]
        # RET ends what CALL has begun: the callee is a detour.
        is_branch = bool(jumps) or instruction.name in ("RET", "BRX", "JMX", "KILL", "BPT")
        may_fall_through = bool(instruction.predicate) or "," in instruction.operands or instruction.opcode.startswith("BRA.")
        following.append(jumps + (onward if not is_branch or may_fall_through else []))
    return following


def back_edges(following: Sequence[Sequence[int]]) -> tuple[list[int], set[tuple[int, int]]]:
    """The instructions that can be reached, each after all that it leads to; and the jumps that close a loop."""
    finished: list[int] = []
    closing: set[tuple[int, int]] = set()
    state = [0] * (len(following) + 1)  # 1: on the way, 2: done
    stack = [(0, iter(following[0]))]
    state[0] = 1
    while stack:
        node, rest = stack[-1]
        for child in rest:
            if child == len(following):
                continue
            if state[child] == 0:
                state[child] = 1
                stack.append((child, iter(following[child])))
                break
            if state[child] == 1:
                closing.add((node, child))
        else:
            state[node] = 2
            finished.append(node)
            stack.pop()
    return finished, closing


def best_path(
    instructions: Sequence[Instruction],
    following: Sequence[Sequence[int]],
    order: Sequence[int],
    closing: set[tuple[int, int]],
    first: int,
    last: int,
) -> list[Instruction]:
    """From the first to the last, without going round; nothing where there is no such path."""
    # 128-bit accesses and arithmetic (both negative), instructions, the next one
    best: dict[int, tuple[int, int, int, int]] = {last: (0, 0, 0, last)}
    for node in order:
        if node == last:
            continue
        choices = [(*best[child][:3], child) for child in following[node] if child in best and (node, child) not in closing]
        if choices:
            accesses, arithmetic, count, child = min(choices)
            instruction = instructions[node]
            accesses -= instruction.is_vector_load or instruction.is_vector_store
            best[node] = (accesses, arithmetic - (instruction.name in ARITHMETIC), count + 1, child)
    if first not in best:
        return []
    path = []
    node = first
    while node != last:
        path.append(instructions[node])
        node = best[node][3]
    return path


def vector_accesses(path: Sequence[Instruction]) -> int:
    """The 128-bit loads and stores among the instructions."""
    return sum(instruction.is_vector_load or instruction.is_vector_store for instruction in path)


def main_path(instructions: Sequence[Instruction], in_loop: bool) -> list[Instruction]:
    """From entry to exit, or a turn of the loop with most 128-bit accesses."""
    following = successors(instructions)
    order, closing = back_edges(following)
    if not in_loop:
        return best_path(instructions, following, order, closing, 0, len(instructions))
    turns = []
    for source, header in closing:
        path = best_path(instructions, following, order, closing, header, source)
        if path or source == header:
            turns.append([*path, instructions[source]])
    return max(turns, key=lambda path: (vector_accesses(path), len(path)), default=[])


def loads_before_use(path: Sequence[Instruction]) -> int:
    """The 128-bit loads before the first instruction that takes a loaded number, and so has to wait."""
    loaded: set[int] = set()
    loads = 0
    for instruction in path:
        destination, _, sources = instruction.operands.partition(",")
        if loaded.intersection(map(int, REGISTER.findall(sources))):
            break
        if instruction.is_vector_load:
            loads += 1
            register = REGISTER.search(destination)
            if register is not None:
                loaded.update(range(int(register[1]), int(register[1]) + 4))
    return loads
