"""Plain PyTorch twins of the kernels in this package: what every kernel must compute.

Selection, rounding and ties are those of `vllm_sirius.kernels.reference`; here the weights lie as the target keeps
them.
"""

from __future__ import annotations

import torch

from vllm_sirius.kernels import reference
from vllm_sirius.kernels.activation import Activation
from vllm_sirius.weights.rows import neuron_rows


def coarse_ffn(
    inputs: torch.Tensor,
    gate_up: torch.Tensor,
    down_rows: torch.Tensor,
    indices: torch.Tensor,
    activation: Activation | str,
    gate_first: bool = True,
) -> torch.Tensor:
    """Twin of `kernels.coarse_ffn`; arguments as there."""
    rows = neuron_rows(gate_up, down_rows.t(), gate_first)
    return reference.coarse_ffn(inputs, rows, indices, activation)


def fine_ffn(
    inputs: torch.Tensor,
    gate_up: torch.Tensor,
    down_rows: torch.Tensor,
    num_kept: int,
    activation: Activation | str,
    gate_first: bool = True,
) -> torch.Tensor:
    """Twin of `kernels.fine_ffn`; arguments as there."""
    rows = neuron_rows(gate_up, down_rows.t(), gate_first)
    return reference.fine_ffn(inputs, rows, num_kept, activation)


def observe_ffn(
    activation: torch.Tensor,
    token_slot: torch.Tensor,
    token_weight: torch.Tensor,
    pending_row: torch.Tensor,
    energy: torch.Tensor,
    pending: torch.Tensor,
    offset: int,
) -> None:
    """Twin of `statistics.observe_ffn`; arguments as there. Never waits for the device."""
    square = activation.float().square()
    share = square / square.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    neurons = slice(offset, offset + activation.shape[1])
    added = torch.where((token_slot >= 0).unsqueeze(1), share * token_weight.unsqueeze(1), 0.0)
    energy[:, neurons].index_add_(0, token_slot.clamp_min(0).long(), added)
    # Tokens without a row go to one more row, which is dropped.
    row = torch.where(pending_row >= 0, pending_row, pending.shape[0]).long()
    view = pending[:, neurons]
    extended = torch.cat([view, view.new_zeros(1, view.shape[1])])
    view.copy_(extended.index_copy_(0, row, share.to(pending.dtype))[:-1])
