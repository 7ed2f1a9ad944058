"""Fine sparsity (the paper's FSparse, after CATS): each token keeps the neurons whose gate is largest."""

from __future__ import annotations

import torch

from vllm_sirius.sparsity.coarse import num_kept_neurons


def fine_mask(gate_activation: torch.Tensor, density: float) -> torch.Tensor:
    """Marks the largest ``|act(gate)|`` of every token.

    Args:
        gate_activation: ``act(gate)``, ``[num_tokens, neurons]``.
        density: Part of the neurons to keep.

    Returns:
        1 where kept, 0 elsewhere, in the dtype and shape of the input.
    """
    kept = num_kept_neurons(density, gate_activation.shape[-1])
    indices = gate_activation.abs().topk(kept, dim=-1, sorted=False).indices
    return torch.zeros_like(gate_activation).scatter_(-1, indices, 1.0)
