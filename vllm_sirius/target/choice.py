"""Which kernels run the target's dense linear layers: decided by the processor.

Not by measurement: two kernels round differently, and an engine must give the same answers however busy the machine was when
it started.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from vllm_sirius.kernels.cpu.build import KernelBuildError
from vllm_sirius.kernels.cpu.panel_linear import has_panels
from vllm_sirius.kernels.native import SWITCH


@dataclass(frozen=True)
class TargetKernels:
    """What runs the target's linear layers.

    Attributes:
        panels: Whether the panel kernel does, in place of vLLM's own.
        reason: For the start-up line: why.
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


def choose_by_processor() -> TargetKernels:
    """The faster kernel for the tokens of a verification pass on a processor that has both.

    vLLM's kernels multiply on AMX tiles where there are any. Without them the panel kernel took 0.5 to 0.8 of their time for the
    16 tokens of a verification pass, in the large layers of a 1.5B model on three processors, and 0.6 to 1.0 for a single one. It
    is the slower one in a prompt on Zen 4 (1.3 times) and at 16 tokens in layers as small as a 135M model's (up to 1.3 times):
    the price of answers that do not depend on a measurement (``BENCHMARKS.md``).
    """
    if torch.cpu._is_amx_tile_supported():
        return TargetKernels(False, "the processor has AMX, which they use")
    return TargetKernels(True, "AVX-512 without AMX")
