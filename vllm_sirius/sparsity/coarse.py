"""Coarse sparsity (the paper's CSparse): one set of neurons per layer for the whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def num_kept_neurons(density: float, num_neurons: int) -> int:
    """Neurons that a density keeps of a layer, at least one."""
    return max(1, round(density * num_neurons))


class CoarseSelection:
    """The kept neurons of every layer, in buffers whose addresses never change.

    Attributes:
        mask: 1 where a neuron is kept and 0 elsewhere, one tensor ``[neurons]`` per layer, in the model's dtype.
        indices: The kept neurons in ascending order, one tensor ``int32 [kept]`` per layer.

    Args:
        layer_sizes: Neurons per FFN layer on this rank.
        density: Part of the neurons to keep.
        dtype: Dtype of the activations the mask multiplies.
        device: Where the buffers live.
    """

    def __init__(self, layer_sizes: Sequence[int], density: float, dtype: torch.dtype, device: torch.device) -> None:
        self.layer_sizes = tuple(layer_sizes)
        self.density = density
        self._flat_mask = torch.ones(sum(self.layer_sizes), dtype=dtype, device=device)
        self.mask = list(self._flat_mask.split(self.layer_sizes))
        kept = [num_kept_neurons(density, size) for size in self.layer_sizes]
        self._flat_indices = torch.cat([torch.arange(count, dtype=torch.int32, device=device) for count in kept])
        self.indices = list(self._flat_indices.split(kept))

    def select(self, scores: torch.Tensor) -> None:
        """Keeps the highest scores of each layer.

        Args:
            scores: ``float32 [neurons of all layers]``.
        """
        if len(set(self.layer_sizes)) == 1:
            size = self.layer_sizes[0]
            layered = scores.view(-1, size)
            kept = layered.topk(num_kept_neurons(self.density, size), dim=1, sorted=False).indices.sort(dim=1).values
            self._flat_mask.view(-1, size).zero_().scatter_(1, kept, 1.0)
            self._flat_indices.view(layered.shape[0], -1).copy_(kept)
            return
        for mask, indices, layer_scores in zip(self.mask, self.indices, scores.split(self.layer_sizes), strict=True):
            kept = layer_scores.topk(indices.shape[0], sorted=False).indices.sort().values
            mask.zero_().scatter_(0, kept, 1.0)
            indices.copy_(kept)
