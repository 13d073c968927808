"""Processes that are the ranks of a process group, for tests of what is distributed."""

import contextlib
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SECONDS = 120  # for one function; a rank that waits for one that has failed ends with the whole group


def _serve(rank: int, count: int, store: str, connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=timedelta(seconds=SECONDS))
    with contextlib.suppress(EOFError):
        while True:
            function, args = connection.recv()
            try:
                connection.send((function(*args), None))
            except BaseException:
                connection.send((None, f"rank {rank}: {traceback.format_exc()}"))


class Ranks:
    """A process group of its own processes, which start with the first function that is run."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.processes: list[Any] = []
        self.connections: list[Connection] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.tensor", "kl_ext"])  # imported once, before the ranks are forked
        self.folder = tempfile.TemporaryDirectory()
        store = (Path(self.folder.name) / "store").as_uri()
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.count, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for connection in self.connections:
            connection.close()
        self.processes, self.connections = [], []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function, which is of a module, returns on every rank."""
        if not self.processes:
            self._start()
        for connection in self.connections:
            connection.send((function, args))
        results, errors = [], []
        for rank, connection in enumerate(self.connections):
            try:
                if not connection.poll(1 if errors else SECONDS):
                    raise EOFError
                result, error = connection.recv()
            except (EOFError, ConnectionError):
                result, error = None, f"rank {rank}: no answer"
            results.append(result)
            errors += [error] if error else []
        if errors:
            self.stop()  # ranks that wait for others would not hear of the next function
            raise AssertionError("\n".join(errors))
        return results
