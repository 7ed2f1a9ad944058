"""The reduced FFNs on CPU. They compute what `vllm_sirius.kernels.reference` does and run on PyTorch's threads.

Coarse drafts read weights by neuron, ``rows [neurons, 3, hidden]``, so that the gate, up and down row of a neuron are one
stretch of memory. Fine drafts read the gates of all neurons first, so that these come first, ``rows [3 * neurons, hidden]``
(`vllm_sirius.weights.rows.gates_first`). Rows are read once for up to 32 tokens. Results are the same in every run with the
same number of threads.

bf16 as avx512_bf16 computes with it treats subnormal values as zero. Otherwise see `reference` for the rounding.
"""

from __future__ import annotations

import torch

from vllm_sirius.kernels.activation import Activation
from vllm_sirius.kernels.cpu.build import load_library

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATION_CODES: dict[str, int] = {Activation.SILU: 0, Activation.GELU_TANH: 1, Activation.GELU: 2}
"""Numbers of the dtypes and activations in the C interface."""

SUPPORTED_DTYPES = tuple(DTYPE_CODES)


def instruction_set() -> str:
    """Names the instructions that the kernels were compiled for: avx512_bf16, avx512_vnni, avx512, avx2 or scalar."""
    name: bytes = load_library().sirius_instruction_set()
    return name.decode()


def coarse_ffn(
    inputs: torch.Tensor, rows: torch.Tensor, indices: torch.Tensor, activation: Activation | str
) -> torch.Tensor:
    """Runs a gated FFN with some of its neurons, the same for all tokens.

    Args:
        inputs: ``[tokens, hidden]``, fp32, bf16 or fp16.
        rows: ``[neurons, 3, hidden]``, contiguous, same dtype as `inputs`.
        indices: ``int32 [kept]``, contiguous, the neurons to keep, sorted and unique.
        activation: Activation of the gate.

    Returns:
        ``[tokens, hidden]`` in the dtype of `inputs`; zeros if no neuron is kept.

    Raises:
        ValueError: If a shape, dtype, device or layout is not as above.
        IndexError: If an index is not one of a neuron.
        KernelBuildError: If the kernels cannot be compiled.
    """
    if rows.dim() != 3 or rows.shape[1] != 3:
        raise ValueError(f"rows must be [neurons, 3, hidden], not {describe(rows)}")
    _check(inputs, rows)
    check_indices(indices)
    inputs = inputs.contiguous()
    output = torch.empty_like(inputs)
    if indices.numel() == 0 or output.numel() == 0:
        return output.zero_()
    failed = load_library().sirius_coarse_ffn(
        inputs.data_ptr(),
        rows.data_ptr(),
        indices.data_ptr(),
        output.data_ptr(),
        *inputs.shape,
        rows.shape[0],
        indices.shape[0],
        DTYPE_CODES[rows.dtype],
        activation_code(activation),
        torch.get_num_threads(),
    )
    if failed:
        raise IndexError(f"indices must lie in [0, {rows.shape[0]})")
    return output


def fine_ffn(inputs: torch.Tensor, rows: torch.Tensor, num_kept: int, activation: Activation | str) -> torch.Tensor:
    """Runs a gated FFN in which every token keeps the neurons whose ``|act(gate)|`` is largest.

    Gate rows are read for all neurons, up and down rows for those that at least one token keeps. Of neurons of equal
    magnitude, compared in fp32, the one with the lower index is kept.

    Args:
        inputs: ``[tokens, hidden]``, fp32, bf16 or fp16.
        rows: ``[3 * neurons, hidden]``, contiguous, same dtype as `inputs`: the gate rows, then up and down row of each neuron.
        num_kept: Neurons each token keeps, at most all.
        activation: Activation of the gate.

    Returns:
        ``[tokens, hidden]`` in the dtype of `inputs`; zeros if no neuron is kept.

    Raises:
        ValueError: If a shape, dtype, device or layout is not as above, or `num_kept` is out of range.
        KernelBuildError: If the kernels cannot be compiled.
    """
    if rows.dim() != 2 or rows.shape[0] % 3:
        raise ValueError(f"rows must be [3 * neurons, hidden], not {describe(rows)}")
    _check(inputs, rows)
    num_neurons = rows.shape[0] // 3
    if not 0 <= num_kept <= num_neurons:
        raise ValueError(f"num_kept must lie in [0, {num_neurons}], not {num_kept}")
    inputs = inputs.contiguous()
    output = torch.empty_like(inputs)
    if num_kept == 0 or output.numel() == 0:
        return output.zero_()
    load_library().sirius_fine_ffn(
        inputs.data_ptr(),
        rows.data_ptr(),
        output.data_ptr(),
        *inputs.shape,
        num_neurons,
        num_kept,
        DTYPE_CODES[rows.dtype],
        activation_code(activation),
        torch.get_num_threads(),
    )
    return output


def activation_code(activation: Activation | str) -> int:
    """Number of an activation in the C interface; raises `ValueError` if there is none of this name."""
    code = ACTIVATION_CODES.get(activation)  # a member of the enumeration equals its name
    if code is None:
        raise ValueError(f"{activation!r} is not one of the activations {', '.join(Activation)}")
    return code


def check_indices(indices: torch.Tensor) -> None:
    """Raises `ValueError` unless `indices` are contiguous ``int32 [kept]`` on CPU."""
    if indices.dtype != torch.int32 or indices.dim() != 1 or not indices.is_contiguous() or not indices.is_cpu:
        raise ValueError(f"indices must be contiguous int32 [kept] on CPU, not {describe(indices)}")


def _check(inputs: torch.Tensor, rows: torch.Tensor) -> None:
    if rows.dtype not in DTYPE_CODES or not rows.is_contiguous():
        raise ValueError(f"rows must be contiguous fp32, bf16 or fp16, not {describe(rows)}")
    if not rows.is_cpu or not inputs.is_cpu:
        raise ValueError("inputs and rows must be on CPU")
    if inputs.dim() != 2 or inputs.shape[1] != rows.shape[-1] or inputs.dtype != rows.dtype:
        raise ValueError(f"inputs must be {rows.dtype} [tokens, {rows.shape[-1]}], not {describe(inputs)}")


def describe(tensor: torch.Tensor) -> str:
    """Layout, dtype, shape and device of a tensor, for error texts."""
    layout = "contiguous" if tensor.is_contiguous() else "strided"
    return f"{layout} {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
