"""What streaming will come to on this machine, before an engine starts: measured rates and the speed model."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_sirius.offload.plan import MemoryPlan
from vllm_sirius.offload.stream import NUM_THREADS, PAGE, PIECE_BYTES

MOST_SECONDS = 2.0
MEMORY_BYTES = 256 << 20
ACCEPTANCE_RATES = (0.9, 0.95, 0.97)
"""Parts of the draft tokens that are the target's own, for which a speed is told: poor, usual and good for int4 drafts."""


def disk_rate(files: Sequence[Path]) -> float:
    """Bytes per second at which files are read past the page cache, by as many threads as a stream has.

    Args:
        files: Files on the disk in question.

    Returns:
        The rate; 0 where nothing can be read that way.
    """
    file = max(files, key=lambda path: path.stat().st_size, default=None)
    if file is None or file.stat().st_size < NUM_THREADS * PIECE_BYTES:
        return 0.0
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return 0.0
    try:
        return _rate_of(handle, file.stat().st_size // PIECE_BYTES)
    finally:
        os.close(handle)


def _rate_of(handle: int, num_pieces: int) -> float:
    started = time.perf_counter()

    def read(first: int) -> int:
        whole = bytearray(PIECE_BYTES + PAGE)
        place = -torch.frombuffer(whole, dtype=torch.uint8).data_ptr() % PAGE
        target, total = memoryview(whole)[place : place + PIECE_BYTES], 0
        for number in range(first, num_pieces, NUM_THREADS):
            total += os.preadv(handle, [target], number * PIECE_BYTES)
            if time.perf_counter() - started > MOST_SECONDS:
                break
        return total

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        total = sum(threads.map(read, range(NUM_THREADS)))
    return total / (time.perf_counter() - started)


def memory_rate() -> float:
    """Bytes per second at which this process reads memory, about."""
    data = torch.ones(MEMORY_BYTES // 4, dtype=torch.int32)
    fastest = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        data.max()
        fastest = min(fastest, time.perf_counter() - started)
    return MEMORY_BYTES / fastest


@dataclass(frozen=True)
class Forecast:
    """What a pass and a token will take, about, for one request at a time.

    Attributes:
        disk_rate: Bytes per second of the disk.
        pass_seconds: A pass of the target.
        draft_seconds: A draft step.
        kernel_size: Most tokens of a pass.
    """

    disk_rate: float
    pass_seconds: float
    draft_seconds: float
    kernel_size: int

    def tokens_per_second(self, rate: float) -> float:
        """The speed at the best draft length.

        Args:
            rate: Acceptance rate of a draft token; 0 for decoding without drafts.
        """
        return max(
            sum(rate**i for i in range(length + 1)) / (length * self.draft_seconds + self.pass_seconds)
            for length in range(self.kernel_size)
        )


def forecast(plan: MemoryPlan, disk: float, memory: float, kernel_size: int) -> Forecast:
    """Seconds by bytes: arithmetic is not in it, and adds to passes of many tokens.

    Args:
        plan: Where the weights lie.
        disk: Bytes per second of the disk.
        memory: Bytes per second of the memory.
        kernel_size: Most tokens of a pass.
    """
    computing = (sum(plan.sizes.groups) + sum(plan.sizes.head)) / memory
    return Forecast(disk, max(plan.streamed_bytes / disk, computing), plan.sizes.copies / memory, kernel_size)
