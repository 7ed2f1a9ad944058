"""Plain PyTorch twins of the kernels on low-bit rows: what every kernel must compute.

Rounding, the same in twins and kernels: weights are what `LowBitRows` stores. Inputs round to signed bytes, with one scale
for every 64 columns of a token. Products of bytes add up exactly; their sums, the activation and its product with ``up``
are fp32. Hidden values, each multiplied with its neuron's down scale, round to signed bytes too, with one scale for every
token and every 16 neurons in the order in which they are kept, at 4 bits also for every 64 columns; fine sparsity takes
the neurons that any of up to 32 tokens keeps. Outputs add in fp32 and are rounded once to the dtype of the inputs. Kernels
may add in another order, so a hidden value on a rounding boundary may come out one step apart, and fine selection may
differ where two magnitudes are equal but for such an error.
"""

from __future__ import annotations

import torch

from vllm_sirius.kernels.activation import Activation
from vllm_sirius.weights.low_bit import SPAN, LowBitRows

GROUP = 16
"""Neurons whose hidden values share a scale."""

MAX_TOKENS = 32
"""Tokens that pass through an FFN together: the neurons that any of them keeps form the groups of fine sparsity."""

LARGEST = 127.0
SMALLEST_MAGNITUDE = 1e-30


def coarse_ffn(
    inputs: torch.Tensor, rows: LowBitRows, indices: torch.Tensor | None, activation: Activation | str
) -> torch.Tensor:
    """Runs a gated FFN with some of its neurons, the same for all tokens.

    Args:
        inputs: ``[tokens, hidden]``.
        rows: ``[neurons, 3, hidden]``.
        indices: ``int32 [kept]``, the neurons to keep, sorted and unique; ``None`` for all.
        activation: Activation of the gate.

    Returns:
        ``[tokens, hidden]`` in the dtype of `inputs`; zeros if no neuron is kept.
    """
    kept = rows if indices is None else _select(rows, indices.long())
    weights = kept.dequantise()
    tokens = round_inputs(inputs)
    gate = Activation(activation).function(tokens @ weights[:, 0].T)
    return _project_down(gate * (tokens @ weights[:, 1].T), kept, inputs.dtype)


def fine_ffn(inputs: torch.Tensor, rows: LowBitRows, num_kept: int, activation: Activation | str) -> torch.Tensor:
    """Runs a gated FFN in which every token keeps the neurons whose ``|act(gate)|`` is largest.

    Magnitudes are compared in fp32, unrounded; of equal ones the neuron with the lower index is kept.

    Args:
        inputs: ``[tokens, hidden]``.
        rows: ``[neurons, 3, hidden]``.
        num_kept: Neurons each token keeps.
        activation: Activation of the gate.

    Returns:
        ``[tokens, hidden]`` in the dtype of `inputs`; zeros if no neuron is kept.
    """
    parts = [_fine_pass(part, rows, num_kept, activation) for part in inputs.split(MAX_TOKENS)]
    return torch.cat(parts)


def _fine_pass(inputs: torch.Tensor, rows: LowBitRows, num_kept: int, activation: Activation | str) -> torch.Tensor:
    weights = rows.dequantise()
    tokens = round_inputs(inputs)
    gate = Activation(activation).function(tokens @ weights[:, 0].T)
    order = gate.abs().sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(gate).scatter_(-1, order[:, :num_kept], 1.0)
    hidden = gate * (tokens @ weights[:, 1].T) * mask
    united = mask.any(dim=0).nonzero().squeeze(-1)
    return _project_down(hidden[:, united], _select(rows, united), inputs.dtype)


def linear(inputs: torch.Tensor, weights: LowBitRows, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Runs a linear layer.

    Args:
        inputs: ``[tokens, in]``.
        weights: ``[out, in]``.
        bias: ``[out]`` or ``None``.

    Returns:
        ``[tokens, out]`` in the dtype of `inputs`.
    """
    output = round_inputs(inputs) @ weights.dequantise().T
    return (output if bias is None else output + bias.float()).to(inputs.dtype)


def round_inputs(inputs: torch.Tensor) -> torch.Tensor:
    """Rounds ``[tokens, width]`` to signed bytes and back, ``float32``."""
    width = inputs.shape[-1]
    padded = torch.nn.functional.pad(inputs.float(), (0, -width % SPAN)).unflatten(-1, (-1, SPAN))
    values, scales = _to_bytes(padded, -1)
    return (values * scales).flatten(-2)[..., :width]


def _to_bytes(values: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed bytes, as fp32, and the scale that is common to `dim`."""
    magnitude = values.abs().amax(dim, keepdim=True).clamp_min(SMALLEST_MAGNITUDE)
    # `LARGEST / magnitude` would multiply with a reciprocal, which is not the same number.
    inverse = torch.full_like(magnitude, LARGEST).div_(magnitude)
    return (values * inverse).round(), magnitude / LARGEST


def _select(rows: LowBitRows, neurons: torch.Tensor) -> LowBitRows:
    return LowBitRows(rows.bits, rows.packed[neurons], rows.scales[neurons], rows.width)


def _project_down(hidden: torch.Tensor, rows: LowBitRows, dtype: torch.dtype) -> torch.Tensor:
    """Runs the down projection.

    Args:
        hidden: ``float32 [tokens, kept]``.
        rows: ``[kept, 3, hidden]``.
        dtype: Dtype of the output.
    """
    num_tokens, kept = hidden.shape
    scaled = hidden[:, :, None] * rows.scales[:, 2].float()
    grouped = torch.nn.functional.pad(scaled, (0, 0, 0, -kept % GROUP)).unflatten(1, (-1, GROUP))
    values, scales = _to_bytes(grouped, 2)
    rounded = (values * scales).flatten(1, 2)[:, :kept]
    down = rows.integers()[:, 2].unflatten(-1, (rounded.shape[-1], -1))
    output = torch.einsum("tns,nsc->tsc", rounded, down).reshape(num_tokens, -1)
    return output[:, : rows.width].to(dtype)
