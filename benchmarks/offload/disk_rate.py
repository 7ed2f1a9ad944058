"""The rate at which a file can be read past the page cache: `python -m benchmarks.offload.disk_rate FILE`, also in a cage.

What a bound is worth shows only where the disk could do more.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.offload.answering import AnsweringError

THREADS = 4
PIECE_BYTES = 4 << 20
SECONDS = 2.0
ROOT = Path(__file__).resolve().parents[2]


def read_rate(file: Path, seconds: float = SECONDS) -> float:
    """Bytes per second with several threads.

    Args:
        file: A file of at least a few pieces; it is read round and round.
        seconds: For how long.
    """
    flags = os.O_RDONLY | getattr(os, "O_DIRECT", 0)
    handle = os.open(file, flags)
    pieces = max(1, os.fstat(handle).st_size // PIECE_BYTES)
    started = time.perf_counter()

    def work(first: int) -> int:
        buffer = mmap.mmap(-1, PIECE_BYTES)  # aligned to a page, as O_DIRECT wants it
        read, piece = 0, first
        while time.perf_counter() - started < seconds:
            read += os.preadv(handle, [buffer], piece % pieces * PIECE_BYTES)
            piece += THREADS
        return read

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            total = sum(pool.map(work, range(THREADS)))
        return total / (time.perf_counter() - started)
    finally:
        os.close(handle)


def measure(file: Path, prefix: Sequence[str]) -> float:
    """The same in a process of its own.

    Args:
        file: The file.
        prefix: Words before its command.

    Raises:
        AnsweringError: If it cannot be read so.
    """
    command = [*prefix, sys.executable, "-P", "-m", "benchmarks.offload.disk_rate", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()
        raise AnsweringError(f"{file} cannot be read past the page cache: {last[-1] if last else 'no message'}")
    return float(json.loads(done.stdout))


if __name__ == "__main__":
    print(json.dumps(read_rate(Path(sys.argv[1]))))
