"""Up to which batch the draft's kernels are the faster way: measured at start-up, on the model's own layers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vllm_sirius.ffn.layer import ReducedFFNs

ROWS = (1, 2, 4, 8, 16, 32)
MOST_LAYERS = 4
LEAST_WEIGHTS = 1 << 23
"""Smaller FFNs are not measured: the difference is a few microseconds, less than what time measures differ by."""

SLOWER = 1.1
"""Part of the dense time beyond which the kernels count as slower, so that the choice is the same in every start."""

REPEATS = 3
"""Timed runs, of which the fastest counts, after one that is not timed."""


def measure_switch(ffns: ReducedFFNs, most_rows: int, dtype: torch.dtype) -> None:
    """Lowers the largest batch of the kernels to the last at which they beat the model's own dense layers.

    One row keeps the kernels whatever is measured: that is what the user has chosen, and what the adaptive length judges.

    Args:
        ffns: The switch, with kernels that run on CPU.
        most_rows: Most requests of a batch.
        dtype: The model's dtype.
    """
    backend, linears = ffns.backend, ffns.linears
    assert backend is not None
    if ffns.ffns[0].num_parameters < LEAST_WEIGHTS:
        return
    modules = [ffn.module for ffn in ffns.ffns[:MOST_LAYERS]]
    backend.max_tokens = _last_faster(ffns, backend, modules, most_rows, ffns.ffns[0].hidden_size, dtype)
    if linears is not None and linears.layers:
        first: Any = linears.layers[0]
        layers = [layer for layer in linears.layers if layer.input_size == first.input_size][:MOST_LAYERS]
        linears.max_tokens = _last_faster(ffns, linears, layers, most_rows, first.input_size, dtype)


def _last_faster(
    ffns: ReducedFFNs, kernels: Any, modules: list[nn.Module], most_rows: int, width: int, dtype: torch.dtype
) -> int:
    """The largest batch up to which `modules` are faster with `kernels` than without, at least 1."""
    most = kernels.max_tokens

    def seconds(inputs: torch.Tensor, max_tokens: int) -> float:
        kernels.max_tokens = max_tokens
        return _seconds(lambda: [module(inputs) for module in modules])

    last = 1
    with torch.inference_mode(), ffns.draft_mode():
        for rows in (size for size in ROWS if size <= min(most, most_rows)):
            inputs = torch.randn(rows, width, dtype=torch.float32).to(dtype)
            if seconds(inputs, most) > SLOWER * seconds(inputs, 0):
                return last
            last = rows
    return most


def _seconds(run: Callable[[], object]) -> float:
    run()
    fastest = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - started)
    return fastest
