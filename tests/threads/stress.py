"""Eight threads that use everything the library shares: python tests/threads/stress.py [seconds]. Status 0: all was well.

Shared are the memory for results, the choice of kernels, leaves, graphs and their nodes, and the bindings. Meanwhile one thread
sets environment variables and how much memory is kept, the process forks, and another process ends while its threads compute.
`make test-tsan` runs this under ThreadSanitizer.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import kl_ext
from operators import OPERATORS, Operator
from oracle import same_bits

THREADS = 8
ROWS, COLUMNS = 320, 128  # a result takes 160 KiB, and its memory is kept
FORMS = ({}, {"reduction": "sum"}, {"reduction": "mean", "dim": 0}, {"reduction": "batchmean"})
# Until Python 3.14, a thread that outlives the interpreter is unwound, which no function of torch survives either.
ENDS = (0,) if sys.version_info >= (3, 14) else (0, -signal.SIGABRT)

Case = tuple[Operator, dict, list[Tensor]]  # the operator, how it is called, and its inputs


def new_cases() -> list[Case]:
    """Every operator in every form, of contiguous inputs, of halves, and with a q that rows share."""
    result = []
    for operator in OPERATORS:
        whole = operator.inputs((ROWS, COLUMNS), dtype=torch.float32)
        shared_q = operator.inputs(*[(ROWS, COLUMNS)] * 2, *[(COLUMNS,)] * 2, dtype=torch.bfloat16)[: operator.count]
        for inputs in (whole, whole[:2], [x.t() for x in whole], shared_q):
            if len(inputs) in operator.counts:
                result += [(operator, how, list(inputs)) for how in (FORMS if operator.reduces else FORMS[:1])]
    return [(operator, how, [x.detach().requires_grad_() for x in inputs]) for operator, how, inputs in result]


def loss_of(case: Case) -> Tensor:
    operator, how, inputs = case
    return operator(*inputs, **how)


def results_of(case: Case) -> list[Tensor]:
    """The loss and its gradients."""
    loss = loss_of(case)
    return [loss.detach(), *torch.autograd.grad(loss, case[2], torch.ones_like(loss))]


def copy_of(case: Case) -> Case:
    return (*case[:2], [x.detach().clone().requires_grad_() for x in case[2]])


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(same_bits, some, others))


class Stress:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.cases = new_cases()
        self.first: list[list[list[Tensor]]] = []  # of each thread's first calls
        self.expected: list[list[Tensor]] = []
        self.passed_on: deque[object] = deque(maxlen=3 * THREADS)  # results of one thread that another frees
        self.failures: list[str] = []
        self.barrier = threading.Barrier(THREADS + 1)
        self.is_over = threading.Event()
        self.graphs: list[tuple[int, Tensor, list[Tensor]]] = []

    def guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.failures.append(repr(error))
                self.barrier.abort()

        return run

    def check(self, what: str, got: list[Tensor], place: int) -> None:
        if not equal(got, self.expected[place]):
            self.failures.append(f"{what}: {self.cases[place][0]} {self.cases[place][1]}")

    def work(self) -> None:
        generator = random.Random(threading.get_ident())
        self.barrier.wait()
        self.first.append([results_of(case) for case in self.cases])
        self.barrier.wait()
        self.barrier.wait()  # now one thread has done the same
        while not self.is_over.is_set():
            place = generator.randrange(len(self.cases))
            case = self.cases[place]
            torch.set_num_threads(generator.randint(1, 3))
            shared = results_of(case)
            self.check("shared leaves", shared, place)
            self.passed_on.append(shared)
            own = copy_of(case)
            loss = loss_of(own)
            loss.backward(torch.ones_like(loss))
            self.check("own leaves", [loss.detach(), *(x.grad for x in own[2])], place)
            self.use_shared_graph(generator)

    def use_shared_graph(self, generator: random.Random) -> None:
        """Which a thread may find without its tensors: another has freed them."""
        place, loss, leaves = self.graphs[generator.randrange(len(self.graphs))]
        keep = generator.random() < 0.8
        try:
            gradients = torch.autograd.grad(loss, leaves, torch.ones_like(loss), retain_graph=keep)
            self.check("shared graph", [loss.detach(), *gradients], place)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
        if not keep:
            self.graphs[generator.randrange(len(self.graphs))] = self.new_graph(generator.randrange(len(self.cases)))

    def new_graph(self, place: int) -> tuple[int, Tensor, list[Tensor]]:
        case = self.cases[place]
        return place, loss_of(case), case[2]

    def disturb(self) -> None:
        keep = ctypes.CDLL(str(kl_ext._library.LIBRARY)).kl_ext_keep_memory
        keep.argtypes, keep.restype = [ctypes.c_uint64], ctypes.c_uint64
        turn = 0
        while not self.is_over.wait(1e-3):
            turn += 1
            os.environ[f"KL_EXT_STRESS_{turn % 5000}"] = "x" * (turn % 100)
            os.environ["KL_EXT_KEEP_MEMORY"] = str(turn)
            keep((0, 1, 64, 512)[turn // 50 % 4])

    def fork(self) -> None:
        """The child's leaves are its own: a lock of torch's in a shared one may have been held as it was made."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(120)
                torch.set_num_threads(1)
                status = 0 if all(equal(results_of(copy_of(c)), e) for c, e in zip(self.cases, self.expected)) else 2
            finally:
                os._exit(status)
        if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            self.failures.append(f"a forked process ended with status {status}")

    def run(self) -> None:
        threads = [threading.Thread(target=self.guarded(self.work)) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        self.guarded(self.direct)()
        self.is_over.set()
        for thread in threads:
            thread.join()

    def direct(self) -> None:
        self.barrier.wait()  # first calls of all threads at once
        self.barrier.wait()
        self.expected = [results_of(case) for case in self.cases]
        if not all(equal(*pair) for first in self.first for pair in zip(first, self.expected)):
            self.failures.append("first calls: other bits than those of one thread")
        self.graphs = [self.new_graph(place) for place in range(len(self.cases))]
        self.barrier.wait()
        disturber = threading.Thread(target=self.guarded(self.disturb))
        disturber.start()
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(self.seconds / 4)
            self.fork()
        self.is_over.set()
        disturber.join()


def end_while_threads_compute() -> None:
    cases = new_cases()

    def work() -> None:
        while True:
            sum(loss_of(case).sum() for case in cases).backward()

    for _ in range(THREADS):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(0.5)


def main() -> int:
    if sys.argv[1:] == ["end"]:
        end_while_threads_compute()
        return 0
    stress = Stress(float(sys.argv[1]) if sys.argv[1:] else 5)
    stress.run()
    ended = subprocess.run([sys.executable, __file__, "end"], stderr=subprocess.PIPE, text=True)
    if ended.returncode not in ENDS:
        stress.failures.append(f"a process whose threads computed ended with status {ended.returncode}: {ended.stderr}")
    print("\n".join(stress.failures[:20]) or "all was well", file=sys.stderr if stress.failures else sys.stdout)
    return 1 if stress.failures else 0


if __name__ == "__main__":
    sys.exit(main())
