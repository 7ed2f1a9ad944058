"""Plain PyTorch twins of the kernels on 4-bit panels.

As on rows (`low_bit_reference`), but for the hidden values of an FFN: they round to signed bytes with one scale for every 64
neurons of a token, as inputs do.
"""

from __future__ import annotations

import torch

from vllm_sirius.kernels import low_bit_reference
from vllm_sirius.kernels.activation import Activation
from vllm_sirius.weights.low_bit_panels import LowBitPanels


def linear(inputs: torch.Tensor, weights: LowBitPanels, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `low_bit_panel_kernels.panels_linear`."""
    return low_bit_reference.linear(inputs, weights.rows(), bias)


def ffn(
    inputs: torch.Tensor, gate: LowBitPanels, up: LowBitPanels, down: LowBitPanels, activation: Activation | str
) -> torch.Tensor:
    """See `low_bit_panel_kernels.panels_ffn`, which has gate and up by turns."""
    tokens = low_bit_reference.round_inputs(inputs)
    gates = Activation(activation).function(tokens @ gate.rows().dequantise().T)
    hidden = gates * (tokens @ up.rows().dequantise().T)
    return (low_bit_reference.round_inputs(hidden) @ down.rows().dequantise().T).to(inputs.dtype)
