"""FFNs and linear layers on low-bit rows on CPU. They compute what `vllm_sirius.kernels.low_bit_reference` does.

Weights are read once for up to 32 tokens, on PyTorch's threads. Products of bytes use VNNI instructions where the processor
has them. Results are the same in every run with the same number of threads.
"""

from __future__ import annotations

import torch

from vllm_sirius.kernels.activation import Activation
from vllm_sirius.kernels.cpu.build import load_library
from vllm_sirius.kernels.cpu.kernels import DTYPE_CODES, activation_code, check_indices, describe
from vllm_sirius.weights.low_bit import LowBitRows


def low_bit_coarse_ffn(
    inputs: torch.Tensor, rows: LowBitRows, indices: torch.Tensor | None, activation: Activation | str
) -> torch.Tensor:
    """Runs a gated FFN with some of its neurons, the same for all tokens.

    Args:
        inputs: ``[tokens, hidden]``, fp32, bf16 or fp16.
        rows: ``[neurons, 3, hidden]``: gate, up and down row of each neuron.
        indices: ``int32 [kept]``, contiguous, the neurons to keep, sorted and unique; ``None`` for all.
        activation: Activation of the gate.

    Returns:
        ``[tokens, hidden]`` in the dtype of `inputs`; zeros if no neuron is kept.

    Raises:
        ValueError: If a shape, dtype, device or layout is not as above.
        IndexError: If an index is not one of a neuron.
        KernelBuildError: If the kernels cannot be compiled.
    """
    _check(inputs, rows, num_dims=3)
    if rows.packed.shape[1] != 3:
        raise ValueError(f"rows of an FFN must be [neurons, 3, hidden], not {list(rows.shape)}")
    if indices is not None:
        check_indices(indices)
    inputs = inputs.contiguous()
    output = torch.empty_like(inputs)
    num_neurons = rows.packed.shape[0]
    num_kept = num_neurons if indices is None else indices.numel()
    if num_kept == 0 or output.numel() == 0:
        return output.zero_()
    failed = load_library().sirius_low_bit_coarse_ffn(
        inputs.data_ptr(),
        rows.packed.data_ptr(),
        rows.scales.data_ptr(),
        None if indices is None else indices.data_ptr(),
        output.data_ptr(),
        *inputs.shape,
        num_neurons,
        num_kept,
        rows.bits,
        DTYPE_CODES[inputs.dtype],
        activation_code(activation),
        torch.get_num_threads(),
    )
    if failed:
        raise IndexError(f"indices must lie in [0, {num_neurons})")
    return output


def low_bit_fine_ffn(
    inputs: torch.Tensor, rows: LowBitRows, num_kept: int, activation: Activation | str
) -> torch.Tensor:
    """Runs a gated FFN in which every token keeps the neurons whose ``|act(gate)|`` is largest.

    Gate rows are read for all neurons, up and down rows for those that at least one token keeps. Of neurons of equal
    magnitude, compared in fp32, the one with the lower index is kept.

    Args:
        inputs: ``[tokens, hidden]``, fp32, bf16 or fp16.
        rows: ``[3 * neurons, hidden]``: the gate rows, then up and down row of each neuron.
        num_kept: Neurons each token keeps, at most all.
        activation: Activation of the gate.

    Returns:
        ``[tokens, hidden]`` in the dtype of `inputs`; zeros if no neuron is kept.

    Raises:
        ValueError: If a shape, dtype, device or layout is not as above, or `num_kept` is out of range.
        KernelBuildError: If the kernels cannot be compiled.
    """
    _check(inputs, rows, num_dims=2)
    num_neurons, rest = divmod(rows.packed.shape[0], 3)
    if rest:
        raise ValueError(f"rows of an FFN must be [3 * neurons, hidden], not {list(rows.shape)}")
    if not 0 <= num_kept <= num_neurons:
        raise ValueError(f"num_kept must lie in [0, {num_neurons}], not {num_kept}")
    inputs = inputs.contiguous()
    output = torch.empty_like(inputs)
    if num_kept == 0 or output.numel() == 0:
        return output.zero_()
    load_library().sirius_low_bit_fine_ffn(
        inputs.data_ptr(),
        rows.packed.data_ptr(),
        rows.scales.data_ptr(),
        output.data_ptr(),
        *inputs.shape,
        num_neurons,
        num_kept,
        rows.bits,
        DTYPE_CODES[inputs.dtype],
        activation_code(activation),
        torch.get_num_threads(),
    )
    return output


def low_bit_linear(inputs: torch.Tensor, weights: LowBitRows, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Runs a linear layer.

    Args:
        inputs: ``[tokens, in]``, fp32, bf16 or fp16.
        weights: ``[out, in]``.
        bias: ``[out]``, contiguous on CPU, or ``None``. fp32 saves a conversion.

    Returns:
        ``[tokens, out]`` in the dtype of `inputs`.

    Raises:
        ValueError: If a shape, dtype, device or layout is not as above.
        KernelBuildError: If the kernels cannot be compiled.
    """
    _check(inputs, weights, num_dims=2)
    num_rows = weights.packed.shape[0]
    if bias is not None:
        if bias.shape != (num_rows,) or not bias.is_floating_point() or not bias.is_cpu:
            raise ValueError(f"bias must be floating point [{num_rows}] on CPU, not {describe(bias)}")
        bias = bias.float().contiguous()
    inputs = inputs.contiguous()
    output = inputs.new_empty(inputs.shape[0], num_rows)
    if output.numel() == 0:
        return output
    load_library().sirius_low_bit_linear(
        inputs.data_ptr(),
        weights.packed.data_ptr(),
        weights.scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        *inputs.shape,
        num_rows,
        weights.bits,
        DTYPE_CODES[inputs.dtype],
        torch.get_num_threads(),
    )
    return output


def _check(inputs: torch.Tensor, rows: LowBitRows, num_dims: int) -> None:
    if rows.packed.dim() != num_dims or not rows.packed.is_contiguous() or not rows.scales.is_contiguous():
        raise ValueError(f"low-bit rows must be contiguous with {num_dims} dimensions, not {list(rows.shape)}")
    if not rows.packed.is_cpu or not rows.scales.is_cpu or not inputs.is_cpu:
        raise ValueError("inputs and low-bit rows must be on CPU")
    if inputs.dim() != 2 or inputs.shape[1] != rows.width or inputs.dtype not in DTYPE_CODES:
        raise ValueError(f"inputs must be fp32, bf16 or fp16 [tokens, {rows.width}], not {describe(inputs)}")
