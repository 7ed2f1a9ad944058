"""Dense linear layers on the target's own weights for a few tokens. Computes what `panels.panel_linear_reference` does."""

from __future__ import annotations

import functools
from enum import IntEnum

import torch

from vllm_sirius.kernels.cpu.build import load_library, prefers_pairs
from vllm_sirius.kernels.cpu.kernels import describe


class Products(IntEnum):
    """How the kernel multiplies; the values are those of ``panels.h``."""

    FLOATS = 0
    """fp32 multiply-adds on widened inputs and weights: AVX-512."""
    PAIRS = 1
    """Dot products of bf16 pairs: AVX512-BF16."""


def available_products() -> list[Products]:
    """The ways to multiply that this processor has; none without AVX-512.

    Raises:
        KernelBuildError: If the kernels cannot be compiled.
    """
    return list(Products)[: load_library().sirius_panel_products()]


def has_panels() -> bool:
    """Whether this processor has the kernel, which needs AVX-512.

    Raises:
        KernelBuildError: If the kernels cannot be compiled.
    """
    return bool(available_products())


@functools.cache
def default_products() -> Products:
    """The faster way on this processor, by its maker: the two round differently, so that no measurement may decide.

    Pairs take twice as long as floats on the Intel processors that were measured, and half as long on AMD's (Zen 4, Zen 5).

    Raises:
        KernelBuildError: If the kernels cannot be compiled.
    """
    fast_pairs = Products.PAIRS in available_products() and prefers_pairs()
    return Products.PAIRS if fast_pairs else Products.FLOATS


def panel_linear(
    inputs: torch.Tensor,
    weights: torch.Tensor,
    num_outputs: int,
    bias: torch.Tensor | None = None,
    products: Products | None = None,
) -> torch.Tensor:
    """Runs a linear layer. A token's result does not depend on the other tokens or on the number of threads.

    Args:
        inputs: ``bfloat16 [..., in]`` on CPU.
        weights: `Panels.weights` of the layer.
        num_outputs: Outputs of the layer.
        bias: ``[out]`` on CPU, or ``None``.
        products: How to multiply, one of `available_products`; `default_products` if ``None``.

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
    if output.numel() > 0:
        chosen = default_products() if products is None else products
        _call(inputs, weights, bias, output, chosen, torch.get_num_threads())
    return output


def _call(
    inputs: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    products: Products,
    num_threads: int,
) -> None:
    width = inputs.shape[-1]
    load_library().sirius_panel_linear(
        inputs.data_ptr(),
        weights.data_ptr(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        inputs.numel() // width,
        width,
        output.shape[-1],
        int(products),
        num_threads,
    )
