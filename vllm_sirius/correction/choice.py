"""Which kernels run the target's dense linear layers: decided by measurement, before the weights load."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_sirius.correction.panels import Panels
from vllm_sirius.ffn.kernels.cpu.build import KernelBuildError
from vllm_sirius.ffn.kernels.cpu.panel_linear import has_panels, panel_linear
from vllm_sirius.ffn.kernels.native import SWITCH

Linear = Callable[[torch.Tensor], torch.Tensor]

MOST_TOKENS = 16
REPEATS = 15
"""Timed runs, of which the fastest counts, after one that is not timed."""

CLEARLY_FASTER = 0.9
NOT_SLOWER = 1.2
"""Bars for the time of a correction pass and of a single token over vLLM's: a close call stays with vLLM, in every start."""


@dataclass(frozen=True)
class TargetKernels:
    """What runs the target's linear layers.

    Attributes:
        panels: Whether the panel kernel does, in place of vLLM's own.
        reason: For the start-up line: what was measured, or why it was not.
    """

    panels: bool
    reason: str


def why_no_panels(dtype: torch.dtype, device: torch.device) -> str:
    """Why the panel kernel cannot run here; empty where it can.

    Args:
        dtype: The model's dtype.
        device: Where the model runs.
    """
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if device.type != "cpu" or dtype != torch.bfloat16:
        return f"the kernel is for bfloat16 on CPU, not {dtype} on {device.type}"
    try:
        return "" if has_panels() else "the kernel needs AVX-512"
    except KernelBuildError as error:
        return str(error).splitlines()[0]


def choose_by_measurement(
    num_outputs: int, width: int, kernel_size: int, make_upstream: Callable[[torch.Tensor], Linear]
) -> TargetKernels:
    """Times both kernels on a random weight, for one token and for a correction pass.

    Args:
        num_outputs: Outputs of the model's largest linear layer.
        width: Its inputs.
        kernel_size: Most tokens of one request in a correction pass.
        make_upstream: Makes vLLM's linear layer of a ``bfloat16 [out, in]`` weight, which it may keep or pack.

    Returns:
        The choice.
    """
    weight = torch.randn(num_outputs, width, dtype=torch.float32).to(torch.bfloat16)
    panels = Panels.pack(weight)
    upstream = make_upstream(weight)
    most = min(kernel_size, MOST_TOKENS)
    ratios = []
    for tokens in (1, most):
        inputs = torch.randn(tokens, width, dtype=torch.float32).to(torch.bfloat16)
        ours, theirs = _seconds([lambda given: panel_linear(given, panels.weights, num_outputs), upstream], inputs)
        ratios.append(ours / theirs)
    single, correction = ratios
    faster = correction <= CLEARLY_FASTER and single <= NOT_SLOWER
    return TargetKernels(faster, f"{correction:.2f} of the time of vLLM's for {most} tokens, {single:.2f} for one")


def _seconds(linears: list[Linear], inputs: torch.Tensor) -> list[float]:
    """The fastest run of each, by turns, so that a busy moment of the machine meets all of them."""
    fastest = [float("inf")] * len(linears)
    for repeat in range(REPEATS + 1):
        for place, linear in enumerate(linears):
            started = time.perf_counter()
            linear(inputs)
            if repeat > 0:
                fastest[place] = min(fastest[place], time.perf_counter() - started)
    return fastest
