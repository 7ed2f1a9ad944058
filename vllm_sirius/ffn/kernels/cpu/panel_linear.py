"""Dense linear layers on the target's own weights for a few tokens. Computes what `panels.panel_linear_reference` does."""

from __future__ import annotations

import torch

from vllm_sirius.ffn.kernels.cpu.build import load_library
from vllm_sirius.ffn.kernels.cpu.kernels import describe


def has_panels() -> bool:
    """Whether this processor has the kernel, which needs AVX-512.

    Raises:
        KernelBuildError: If the kernels cannot be compiled.
    """
    return bool(load_library().sirius_has_panels())


def panel_linear(
    inputs: torch.Tensor, weights: torch.Tensor, num_outputs: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Runs a linear layer. A token's result does not depend on the other tokens or on the number of threads.

    Args:
        inputs: ``bfloat16 [..., in]`` on CPU.
        weights: `Panels.weights` of the layer.
        num_outputs: Outputs of the layer.
        bias: ``[out]`` on CPU, or ``None``.

    Returns:
        ``bfloat16 [..., out]``.

    Raises:
        ValueError: If a shape, dtype or device is not as above.
        KernelBuildError: If the kernels cannot be compiled.
    """
    width = inputs.shape[-1]
    if inputs.dtype != torch.bfloat16 or not inputs.is_cpu or (width + 1) // 2 != weights.shape[1]:
        raise ValueError(
            f"inputs must be bfloat16 [..., {2 * weights.shape[1]}] on CPU (or one less), not {describe(inputs)}"
        )
    if bias is not None:
        if bias.shape != (num_outputs,) or not bias.is_cpu:
            raise ValueError(f"bias must be [{num_outputs}] on CPU, not {describe(bias)}")
        bias = bias.float().contiguous()
    inputs = inputs.contiguous()
    output = inputs.new_empty(*inputs.shape[:-1], num_outputs)
    if output.numel() == 0:
        return output
    load_library().sirius_panel_linear(
        inputs.data_ptr(),
        weights.data_ptr(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        inputs.numel() // width,
        width,
        num_outputs,
        torch.get_num_threads(),
    )
    return output
