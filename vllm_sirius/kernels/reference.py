"""Plain PyTorch twins of the reduced-FFN kernels: what every kernel must compute.

Weights are neuron-major here, ``rows [neurons, 3, hidden]``: the gate, up and down row of a neuron next to each other.
Kernels may want them in another order.

Rounding, the same in twins and kernels: inputs and weights are used as stored; dot products, the activation and its
product with ``up`` are fp32; the hidden value is rounded once to the dtype of the weights; the down projection adds in
fp32 and its sum is rounded once to the output's dtype, which is the dtype of inputs and weights. Kernels may add in any
order, so a hidden value or an output that lies on a rounding boundary may come out one unit in the last place apart, and
fine selection may differ where two magnitudes are equal but for such an error.
"""

from __future__ import annotations

import torch

from vllm_sirius.kernels.activation import Activation


def coarse_ffn(
    inputs: torch.Tensor, rows: torch.Tensor, indices: torch.Tensor, activation: Activation | str
) -> torch.Tensor:
    """Runs a gated FFN with some of its neurons, the same for all tokens.

    Args:
        inputs: ``[tokens, hidden]``.
        rows: ``[neurons, 3, hidden]``, same dtype as `inputs`.
        indices: ``int32 [kept]``, the neurons to keep, sorted and unique.
        activation: Activation of the gate.

    Returns:
        ``[tokens, hidden]`` in the dtype of `inputs`; zeros if no neuron is kept.
    """
    kept = rows[indices.long()].float()
    tokens = inputs.float()
    gate = Activation(activation).function(tokens @ kept[:, 0].T)
    return _project_down(gate * (tokens @ kept[:, 1].T), kept[:, 2], inputs.dtype)


def fine_ffn(inputs: torch.Tensor, rows: torch.Tensor, num_kept: int, activation: Activation | str) -> torch.Tensor:
    """Runs a gated FFN in which every token keeps the neurons whose ``|act(gate)|`` is largest.

    Magnitudes are compared in fp32, unrounded; of equal ones the neuron with the lower index is kept.

    Args:
        inputs: ``[tokens, hidden]``.
        rows: ``[neurons, 3, hidden]``, same dtype as `inputs`.
        num_kept: Neurons each token keeps.
        activation: Activation of the gate.

    Returns:
        ``[tokens, hidden]`` in the dtype of `inputs`; zeros if no neuron is kept.
    """
    weights = rows.float()
    tokens = inputs.float()
    gate = Activation(activation).function(tokens @ weights[:, 0].T)
    order = gate.abs().sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(gate).scatter_(-1, order[:, :num_kept], 1.0)
    return _project_down(gate * (tokens @ weights[:, 1].T) * mask, weights[:, 2], inputs.dtype)


def _project_down(hidden: torch.Tensor, down: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (hidden.to(dtype).float() @ down).to(dtype)
