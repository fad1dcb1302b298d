#!/usr/bin/env python
"""Loads damaged files, each in a process of its own with limits of memory and time.

    python scripts/fuzz_loaders.py --count 3000 --loader save --loader registry

Reports crashes, hangs, memory beyond the limit and exceptions that are not the loader's own; exits
with 1 if there were any. File i of a loader and seed is always the same: --first i --count 1 makes
it again, --keep writes it into a folder. The loaders are in tests/python/fuzzing.py.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "python"))

from fuzzing import LOADERS, Loader, mutation  # noqa: E402

_LOADED, _REFUSED, _EXCEPTION, _MEMORY = range(4)
_VERDICTS = {_LOADED: "loaded", _REFUSED: "refused", _EXCEPTION: "exception", _MEMORY: "memory"}
GOOD = ("loaded", "refused")


def _is_about_memory(error: BaseException) -> bool:
    while error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def _child(loader: Loader, path: Path, seconds: float) -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (loader.megabytes << 20) + 4 * path.stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(int(seconds) + 600)  # should the parent be gone
    try:
        loader.load(path)
    except BaseException as error:
        if _is_about_memory(error):
            return _MEMORY
        if isinstance(error, loader.refusals):
            return _REFUSED
        traceback.print_exc()
        return _EXCEPTION
    return _LOADED


def check(loader: Loader, path: Path, *, seconds: float = 10) -> str:
    """What becomes of a file: loaded, refused, exception, memory, hang, or crash and its signal."""
    process = os.fork()
    if process == 0:
        verdict = _EXCEPTION
        try:
            verdict = _child(loader, path, seconds)
            sys.stderr.flush()
        finally:
            os._exit(verdict)
    # Rounds are counted, not time: the child does not hang while both are stopped.
    for _ in range(int(seconds * 1000)):
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            break
        time.sleep(0.001)
    else:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return "hang"
    if os.WIFSIGNALED(status):
        return f"crash ({signal.Signals(os.WTERMSIG(status)).name})"
    return _VERDICTS.get(os.WEXITSTATUS(status), f"crash (exit {os.WEXITSTATUS(status)})")


def fuzz(name: str, first: int, count: int, seed: int, keep: Path | None) -> Counter[str]:
    """Checks ``count`` files of a loader and counts what became of them."""
    loader = LOADERS[name]
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for module in loader.imports:
            importlib.import_module(module)
        # In a process of its own: the threads that runtimes start would not live on in a fork.
        with multiprocessing.get_context("fork").Pool(1) as pool:
            path = pool.apply(loader.make, (Path(folder),))
        good = path.read_bytes()
        if check(loader, path) != "loaded":
            raise SystemExit(f"{name}: the good file does not load")
        for index in range(first, first + count):
            path.write_bytes(mutation(loader, good, f"{seed}-{name}-{index}"))
            verdict = check(loader, path)
            counts[verdict] += 1
            if verdict not in GOOD:
                print(f"{name}: file {index} of seed {seed}: {verdict}", flush=True)
            if keep is not None and (verdict not in GOOD or count == 1):
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{name}-{seed}-{index}{path.suffix}").write_bytes(path.read_bytes())
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="files of each loader")
    parser.add_argument("--loader", action="append", choices=LOADERS, help="all, if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument(
        "--keep", type=Path, help="folder for the files that something is wrong with"
    )
    arguments = parser.parse_args()
    wrong = 0
    for name in arguments.loader or LOADERS:
        counts = fuzz(name, arguments.first, arguments.count, arguments.seed, arguments.keep)
        text = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
        print(f"{name}: {arguments.count} files: {text}", flush=True)
        wrong += sum(count for verdict, count in counts.items() if verdict not in GOOD)
    return 1 if wrong else 0


if __name__ == "__main__":
    # Threads do not live on in a fork.
    import torch

    torch.set_num_threads(1)
    sys.exit(main())
