"""Coarse sparsity as a whole: from the statistics of the running requests to the kept neurons."""

from __future__ import annotations

import torch

from vllm_sirius.sparsity.coarse import CoarseSelection
from vllm_sirius.sparsity.statistics import NeuronStatistics


class NeuronSelector:
    """Chooses the neurons that the batch shares.

    Args:
        statistics: What the requests' activations taught.
        selection: Receives the choice.
        neuron_norms: ``||down_j||**2`` of every neuron, ``float32 [neurons of all layers]``, which weighs its energy; or
            ``None`` for GRIFFIN's unweighted statistic.
    """

    def __init__(
        self, statistics: NeuronStatistics, selection: CoarseSelection, neuron_norms: torch.Tensor | None
    ) -> None:
        self.statistics = statistics
        self.selection = selection
        self._neuron_norms = neuron_norms

    def select(self, slots: torch.Tensor) -> None:
        """Keeps the neurons that matter most to some requests together.

        Args:
            slots: The requests that draft, as in `NeuronStatistics.scores`.
        """
        scores = self.statistics.scores(slots)
        self.selection.select(scores if self._neuron_norms is None else scores * self._neuron_norms)

    def forget(self) -> None:
        """Starts over, because the weights are others now."""
        self.statistics.forget()
        nobody = torch.full((1,), self.statistics.nobody, dtype=torch.int64, device=self.statistics.weight.device)
        self.select(nobody)
