"""Whether the compiled CPU kernels can be used, and if not, why."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

from vllm_sirius.kernels.cpu.build import KernelBuildError, load_library
from vllm_sirius.kernels.cpu.kernels import SUPPORTED_DTYPES, instruction_set
from vllm_sirius.kernels.triton.arguments import SUPPORTED_DTYPES as TRITON_DTYPES
from vllm_sirius.kernels.triton.runtime import TritonUnavailableError, require_triton

logger = logging.getLogger("vllm.sirius")

SWITCH = "SIRIUS_NATIVE_KERNELS"
"""Environment variable: ``0`` keeps to PyTorch, which saves the memory of the neuron rows and makes no draft cheaper."""


@dataclass(frozen=True)
class KernelChoice:
    """What computes the reduced FFNs.

    Attributes:
        native: Whether the compiled kernels do.
        reason: For the start-up line: their instruction set, or why they are not used.
    """

    native: bool
    reason: str


def choose_kernels(dtype: torch.dtype, device: torch.device) -> KernelChoice:
    """Builds the kernels if they are wanted and can be built.

    Args:
        dtype: The model's dtype.
        device: Where the model runs.

    Returns:
        The choice.
    """
    if os.environ.get(SWITCH) == "0":
        return KernelChoice(False, f"{SWITCH}=0")
    if device.type != "cpu" or dtype not in SUPPORTED_DTYPES:
        return KernelChoice(False, f"no kernels for {dtype} on {device.type}")
    try:
        load_library()
    except KernelBuildError as error:
        reason = str(error).splitlines()[0]
        logger.warning("Sirius: no compiled CPU kernels, and drafts without them gain nothing: %s", reason)
        return KernelChoice(False, reason)
    return KernelChoice(True, instruction_set())


def choose_triton(weight: torch.Tensor) -> KernelChoice:
    """Whether the Triton kernels can run on a model's own weights.

    Args:
        weight: One of them.

    Returns:
        The choice.
    """
    if os.environ.get(SWITCH) == "0":
        return KernelChoice(False, f"{SWITCH}=0")
    if weight.dtype not in TRITON_DTYPES:
        return KernelChoice(False, f"no kernels for {weight.dtype} on {weight.device.type}")
    try:
        require_triton(weight)
    except TritonUnavailableError as error:
        return KernelChoice(False, str(error))
    return KernelChoice(True, "triton" if weight.is_cuda else "triton, interpreted")
