"""The switch between target and draft in every gated FFN of a model.

`ReducedFFNs.install` puts a `SwitchedActivation` in the place of each FFN's activation. In target mode it runs the
original activation and shows the result to the statistics; in draft mode it drops the activations of the neurons that are
not kept, which removes their gate, up and down weights from the result. Everything around it (projections, tensor
parallelism, multipliers of the model) stays the model's own.

The mode is a Python flag, so draft forwards must run outside of compiled graphs; target forwards may be compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from vllm_sirius.ffn.locate import GatedFFN
from vllm_sirius.sparsity.coarse import CoarseSelection
from vllm_sirius.sparsity.fine import fine_mask
from vllm_sirius.sparsity.statistics import NeuronStatistics

_OBSERVERS: list[NeuronStatistics] = []


@torch.library.custom_op("vllm_sirius::observe_ffn", mutates_args=("energy",))
def _observe_ffn(activation: torch.Tensor, energy: torch.Tensor, observer: int, layer: int) -> None:
    """Shows activations to a `NeuronStatistics` from inside a compiled graph.

    `energy` is the table that changes; naming it keeps the compiler from dropping or reordering the call.
    """
    statistics = _OBSERVERS[observer]
    if statistics.observing:
        statistics.observe(layer, activation)


@_observe_ffn.register_fake
def _(activation: torch.Tensor, energy: torch.Tensor, observer: int, layer: int) -> None:
    return None


class ReducedFFNs:
    """All gated FFNs of one model and the choice of neurons they share.

    Args:
        ffns: The FFNs, in layer order.
        density: Part of the neurons the draft keeps.
        selection: The coarse selection, or ``None`` for fine sparsity.
        statistics: What coarse selection learns from, or ``None`` for fine sparsity.

    Attributes:
        num_draft_calls: FFNs run reduced so far.
    """

    def __init__(
        self,
        ffns: Sequence[GatedFFN],
        density: float,
        selection: CoarseSelection | None,
        statistics: NeuronStatistics | None,
    ) -> None:
        self.ffns = tuple(ffns)
        self.density = density
        self.selection = selection
        self.statistics = statistics
        self.drafting = False
        self.num_draft_calls = 0

    def install(self) -> None:
        """Puts the switch into every FFN of the model."""
        observer = -1
        if self.statistics is not None:
            observer = len(_OBSERVERS)
            _OBSERVERS.append(self.statistics)
        for layer, ffn in enumerate(self.ffns):
            original = getattr(ffn.module, ffn.activation_name)
            switch = SwitchedActivation(original, self, ffn, layer, observer)
            setattr(ffn.module, ffn.activation_name, switch)

    @property
    def kernel_name(self) -> str:
        """What computes the reduced FFN."""
        return "masked dense FFN"

    def predicted_draft_cost(self, draft_density: float) -> float:
        """Cost of a draft step in target steps, from the weights it reads.

        Args:
            draft_density: Part of the target's weights that the draft needs.
        """
        return 1.0

    @contextmanager
    def draft_mode(self) -> Iterator[None]:
        """Forward passes inside run the reduced FFNs."""
        assert not self.drafting
        self.drafting = True
        try:
            yield
        finally:
            self.drafting = False


class SwitchedActivation(nn.Module):
    """An FFN's activation that can drop neurons.

    Args:
        original: The activation of the model, ``[num_tokens, 2 * neurons] -> [num_tokens, neurons]``.
        owner: Holds the mode and the selection.
        ffn: The FFN it belongs to.
        layer: Its index among the FFNs.
        observer: Index of the statistics to feed, or -1.
    """

    def __init__(self, original: nn.Module, owner: ReducedFFNs, ffn: GatedFFN, layer: int, observer: int) -> None:
        super().__init__()
        self.original = original
        self._owner = owner
        self._layer = layer
        self._observer = observer
        self._num_neurons = ffn.num_neurons
        self._gate_function = ffn.gate_function
        self._gate_first = ffn.gate_first
        self._energy = owner.statistics.energy if owner.statistics is not None else None

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Runs the activation in the mode of the owner."""
        activation: torch.Tensor = self.original(gate_up)
        if self._owner.drafting:
            self._owner.num_draft_calls += 1
            return activation * self._mask(gate_up)
        if self._energy is not None:
            torch.ops.vllm_sirius.observe_ffn(activation, self._energy, self._observer, self._layer)
        return activation

    def _mask(self, gate_up: torch.Tensor) -> torch.Tensor:
        selection = self._owner.selection
        if selection is not None:
            return selection.mask[self._layer]
        start = 0 if self._gate_first else self._num_neurons
        gate = gate_up[..., start : start + self._num_neurons]
        return fine_mask(self._gate_function(gate), self._owner.density)
