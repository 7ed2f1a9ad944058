"""Tests that run side by side each get a core of their own.

Two engines whose threads share cores wait for each other at every parallel loop, ten times longer than they compute.
"""

from __future__ import annotations

import os


def pytest_configure() -> None:
    """Binds what this worker of pytest-xdist starts to one core; without workers everything stays as it is."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if not worker.startswith("gw") or not hasattr(os, "sched_getaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    core = cores[int(worker.removeprefix("gw")) % len(cores)]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
    os.environ["OMP_NUM_THREADS"] = "1"
