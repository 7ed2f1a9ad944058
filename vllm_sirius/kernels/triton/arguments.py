"""Checks of what the Triton kernels are called with."""

from __future__ import annotations

import torch

from vllm_sirius.kernels.triton.runtime import require_triton

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_arguments(
    inputs: torch.Tensor, gate_up: torch.Tensor, down_rows: torch.Tensor, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks the arguments that all FFNs have in common.

    Args:
        inputs: ``[tokens, hidden]``.
        gate_up: ``[2 * neurons, hidden]``.
        down_rows: ``[neurons, hidden]``.
        out: ``[tokens, hidden]`` or ``None``.

    Returns:
        Contiguous inputs and the output, which is made if there is none.

    Raises:
        ValueError: If a shape, dtype, device or layout is not as the kernels need it.
        TritonUnavailableError: If Triton cannot run here.
    """
    if down_rows.dtype not in SUPPORTED_DTYPES or down_rows.dim() != 2 or not down_rows.is_contiguous():
        raise ValueError(
            f"down_rows must be contiguous bf16, fp16 or fp32 [neurons, hidden], not {describe(down_rows)}"
        )
    num_neurons, hidden_size = down_rows.shape
    if (
        gate_up.shape != (2 * num_neurons, hidden_size)
        or gate_up.dtype != down_rows.dtype
        or not gate_up.is_contiguous()
    ):
        raise ValueError(
            f"gate_up must be contiguous {down_rows.dtype} [{2 * num_neurons}, {hidden_size}], not {describe(gate_up)}"
        )
    if inputs.dim() != 2 or inputs.shape[1] != hidden_size or inputs.dtype != down_rows.dtype:
        raise ValueError(f"inputs must be {down_rows.dtype} [tokens, {hidden_size}], not {describe(inputs)}")
    if not inputs.device == gate_up.device == down_rows.device:
        raise ValueError("inputs, gate_up and down_rows must be on one device")
    if out is not None and (out.shape != inputs.shape or out.dtype != inputs.dtype or not out.is_contiguous()):
        raise ValueError(f"out must be contiguous {inputs.dtype} {list(inputs.shape)}, not {describe(out)}")
    require_triton(inputs)
    inputs = inputs.contiguous()
    return inputs, torch.empty_like(inputs) if out is None else out


def describe(tensor: torch.Tensor) -> str:
    """Layout, dtype, shape and device of a tensor, in words."""
    layout = "contiguous" if tensor.is_contiguous() else "strided"
    return f"{layout} {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
