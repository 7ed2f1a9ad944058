"""Times work where it runs: on the host, or on a GPU by events on its stream. Drives ``torch``."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds_of(run: Callable[[], None], device: torch.device) -> float:
    """Times one call.

    Args:
        run: The work; on a GPU it may return before the work is done.
        device: Where the work runs.

    Returns:
        Seconds. On a GPU those between two events around the work, launches included where they are what takes long.
    """
    if device.type == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1000.0
