"""Runs functions in several processes that know each other through torch.distributed (gloo)."""

from __future__ import annotations

import atexit
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2


class _Workers:
    """Two processes that wait for functions to run: to start them anew takes seconds."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self.tasks = [context.Queue() for _ in range(RANKS)]
        self.done = context.Queue()
        arguments = [(rank, self.folder.name, self.tasks[rank], self.done) for rank in range(RANKS)]
        self.processes = [context.Process(target=_work, args=a, daemon=True) for a in arguments]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], limit: float) -> list[Any]:
        for tasks in self.tasks:
            tasks.put((function, args))
        finished: set[int] = set()
        while len(finished) < RANKS:
            try:
                finished.add(self.done.get(timeout=limit))
            except queue.Empty:
                late = sorted(set(range(RANKS)) - finished)
                raise TimeoutError(f"ranks {late} did not end within {limit} s") from None
        # Through files, as tensors in a queue share memory that ends with its process.
        files = [Path(self.folder.name, f"{rank}.pt") for rank in range(RANKS)]
        return [torch.load(file, weights_only=False) for file in files]

    def stop(self) -> None:
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(5)
            process.kill()  # one that hangs
            process.join()
        self.folder.cleanup()


_workers: _Workers | None = None


def on_ranks(function: Callable[..., Any], *args: Any, limit: float = 240) -> list[Any]:
    """What `function(rank, *args)` returned on each rank, or the exception that it raised.

    Raises:
        TimeoutError: a rank took longer than `limit` seconds; all are ended.
    """
    global _workers
    if _workers is None:
        _workers = _Workers()
        atexit.register(stop)
    try:
        return _workers.run(function, args, limit)
    except BaseException:
        stop()
        raise


def stop() -> None:
    """Ends the processes; the next call of `on_ranks` starts new ones."""
    global _workers
    if _workers is not None:
        _workers.stop()
        _workers = None


def _work(rank: int, folder: str, tasks: Any, done: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = Path(folder, "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            result = function(rank, *args)
        except Exception as error:
            traceback.print_exc()
            result = type(error)(str(error))
        torch.save(result, Path(folder, f"{rank}.pt"))
        dist.barrier()  # nobody begins the next one before all are done
        done.put(rank)
    dist.destroy_process_group()
