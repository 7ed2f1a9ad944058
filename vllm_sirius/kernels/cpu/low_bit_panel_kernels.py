"""FFNs and linear layers on 4-bit panels on CPU. Their twins are in `vllm_sirius.kernels.low_bit_panels_reference`."""

from __future__ import annotations

import torch

from vllm_sirius.kernels.activation import Activation
from vllm_sirius.kernels.cpu.build import load_library
from vllm_sirius.kernels.cpu.kernels import DTYPE_CODES, activation_code, describe
from vllm_sirius.weights.low_bit_panels import LowBitPanels


def panels_linear(inputs: torch.Tensor, weights: LowBitPanels, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Runs a linear layer. A token's result does not depend on the other tokens or on the number of threads.

    Args:
        inputs: ``[tokens, in]``, fp32, bf16 or fp16.
        weights: ``[out, in]``.
        bias: ``[out]`` on CPU, or ``None``. fp32 saves a conversion.

    Returns:
        ``[tokens, out]`` in the dtype of `inputs`.

    Raises:
        ValueError: If a shape, dtype or device is not as above.
        KernelBuildError: If the kernels cannot be compiled.
    """
    _check(inputs, weights.width)
    if bias is not None:
        if bias.shape != (weights.num_outputs,) or not bias.is_floating_point() or not bias.is_cpu:
            raise ValueError(f"bias must be floating point [{weights.num_outputs}] on CPU, not {describe(bias)}")
        bias = bias.float().contiguous()
    inputs = inputs.contiguous()
    output = inputs.new_empty(inputs.shape[0], weights.num_outputs)
    if output.numel() == 0:
        return output
    load_library().sirius_low_bit_panel_linear(
        inputs.data_ptr(),
        weights.blocks.data_ptr(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        *inputs.shape,
        weights.num_outputs,
        DTYPE_CODES[inputs.dtype],
        torch.get_num_threads(),
    )
    return output


def panels_ffn(
    inputs: torch.Tensor, gate_up: torch.Tensor, down: LowBitPanels, activation: Activation | str
) -> torch.Tensor:
    """Runs a gated FFN with all its neurons.

    Args:
        inputs: ``[tokens, hidden]``, fp32, bf16 or fp16.
        gate_up: The panels of gate and up by turns, as `low_bit_panels.interleave` leaves them.
        down: ``[hidden, neurons]``.
        activation: Activation of the gate.

    Returns:
        ``[tokens, hidden]`` in the dtype of `inputs`.

    Raises:
        ValueError: If a shape, dtype or device is not as above.
        KernelBuildError: If the kernels cannot be compiled.
    """
    _check(inputs, down.num_outputs)
    num_panels, num_blocks = 2 * -(-down.width // 16), -(-down.num_outputs // 128)
    if gate_up.shape[:2] != (num_panels, num_blocks) or not gate_up.is_contiguous():
        raise ValueError(
            f"gate and up must be contiguous panels [{num_panels}, {num_blocks}, ...], not {describe(gate_up)}"
        )
    inputs = inputs.contiguous()
    output = torch.empty_like(inputs)
    if output.numel() == 0:
        return output
    load_library().sirius_low_bit_panel_ffn(
        inputs.data_ptr(),
        gate_up.data_ptr(),
        down.blocks.data_ptr(),
        output.data_ptr(),
        *inputs.shape,
        down.width,
        DTYPE_CODES[inputs.dtype],
        activation_code(activation),
        torch.get_num_threads(),
    )
    return output


def _check(inputs: torch.Tensor, width: int) -> None:
    if inputs.dim() != 2 or inputs.shape[1] != width or inputs.dtype not in DTYPE_CODES or not inputs.is_cpu:
        raise ValueError(f"inputs must be fp32, bf16 or fp16 [tokens, {width}] on CPU, not {describe(inputs)}")
