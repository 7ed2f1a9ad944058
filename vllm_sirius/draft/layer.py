"""The switch between target and draft in every gated FFN of a model.

In target mode an FFN runs as the model wrote it, and its activations are shown to the statistics. In draft mode it runs
reduced, in one of two ways:

* *native*: compiled kernels read the rows of the kept neurons only;
* *masked*: the model's own projections run whole and the activations of the other neurons are set to zero. Same result,
  no extra memory, nothing saved; it works wherever the model works.

The mode is a Python flag, so draft forwards must run outside of compiled graphs; target forwards may be compiled.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from vllm_sirius.draft.backends import Backend, CoarseBackend, FineBackend
from vllm_sirius.draft.kernel_switch import KernelSwitch
from vllm_sirius.draft.locate import GatedFFN
from vllm_sirius.draft.low_bit_linears import LowBitLinears
from vllm_sirius.sparsity.coarse import CoarseSelection, num_kept_neurons
from vllm_sirius.sparsity.fine import fine_mask
from vllm_sirius.sparsity.statistics import NeuronStatistics


class ReducedFFNs:
    """All gated FFNs of one model and the choice of neurons they share.

    Args:
        ffns: The FFNs, in layer order.
        density: Part of the neurons the draft keeps.
        selection: The coarse selection, or ``None`` for other sparsities.
        statistics: What coarse selection learns from, or ``None`` for other sparsities.
        backend: Kernels for the native way, such as the sparsity needs, or ``None`` for the masked one.
        linears: Further layers that drafts run on quantised copies.
        switch: Chooses between the native and the masked way; without it drafts are native wherever they can be.

    Attributes:
        drafting: The mode.
        num_draft_calls: FFNs run reduced so far.
        num_native_calls: Those of them that ran the native way.
    """

    def __init__(
        self,
        ffns: Sequence[GatedFFN],
        density: float,
        selection: CoarseSelection | None,
        statistics: NeuronStatistics | None,
        backend: Backend | None = None,
        linears: LowBitLinears | None = None,
        switch: KernelSwitch | None = None,
    ) -> None:
        self.ffns = tuple(ffns)
        self.density = density
        self.selection = selection
        self.statistics = statistics
        self.backend = backend
        self.linears = linears
        self.switch = switch or KernelSwitch()
        self.drafting = False
        self.num_draft_calls = self.num_native_calls = 0

    @property
    def whole(self) -> bool:
        """Whether drafts keep all neurons, so that only the bits of the weights differ."""
        return self.selection is None and self.density == 1.0

    @property
    def num_bytes(self) -> int:
        """Memory that drafting adds to the model: copies of weights and the tables of the statistics."""
        copies = self.backend.num_bytes if self.backend is not None else 0
        copies += self.linears.num_bytes if self.linears is not None else 0
        return copies + (self.statistics.num_bytes if self.statistics is not None else 0)

    def install(self) -> None:
        """Puts the switch into every FFN of the model."""
        for layer, ffn in enumerate(self.ffns):
            original = getattr(ffn.module, ffn.activation_name)
            setattr(ffn.module, ffn.activation_name, SwitchedActivation(original, self, ffn, layer))
            if self.backend is not None:
                _switch_forward(ffn.module, self, layer)
        if self.linears is not None:
            self.linears.install(self)

    @contextmanager
    def draft_mode(self) -> Iterator[None]:
        """Forward passes inside run the reduced FFNs."""
        assert not self.drafting
        self.drafting = True
        try:
            yield
        finally:
            self.drafting = False

    def is_native(self, num_tokens: int) -> bool:
        """Whether the running draft step goes the native way.

        Args:
            num_tokens: Tokens that an FFN is given.
        """
        return self.backend is not None and self.switch.kernels and num_tokens <= self.backend.max_tokens

    def run_native(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Runs one reduced FFN by the compiled kernels.

        Args:
            layer: Index of the FFN.
            hidden_states: ``[num_tokens, hidden_size]``.

        Returns:
            ``[num_tokens, hidden_size]``.
        """
        assert self.backend is not None
        self.num_draft_calls += 1
        self.num_native_calls += 1
        if self.selection is not None:
            return cast("CoarseBackend", self.backend).coarse(layer, hidden_states, self.selection.indices[layer])
        if self.whole:
            return self.backend.whole(layer, hidden_states)
        num_kept = num_kept_neurons(self.density, self.ffns[layer].num_neurons)
        return cast("FineBackend", self.backend).fine(layer, hidden_states, num_kept)


class SwitchedActivation(nn.Module):
    """An FFN's activation that can drop neurons: the masked way.

    Args:
        original: The activation of the model, ``[num_tokens, 2 * neurons] -> [num_tokens, neurons]``.
        owner: Holds the mode and the selection.
        ffn: The FFN it belongs to.
        layer: Its index among the FFNs.
    """

    def __init__(self, original: nn.Module, owner: ReducedFFNs, ffn: GatedFFN, layer: int) -> None:
        super().__init__()
        self.original = original
        self._owner = owner
        self._layer = layer
        self._num_neurons = ffn.num_neurons
        self._gate_function = ffn.activation.function if ffn.activation is not None else None
        self._gate_first = ffn.gate_first
        statistics = owner.statistics
        self._marker = statistics.tables.new_zeros(1) if statistics is not None else None

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Runs the activation in the mode of the owner."""
        activation: torch.Tensor = self.original(gate_up)
        if self._owner.drafting:
            self._owner.num_draft_calls += 1
            return activation if self._owner.whole else activation * self._mask(gate_up)
        if self._marker is not None:
            self._observe(activation, self._marker)
        return activation

    def _observe(self, activation: torch.Tensor, marker: torch.Tensor) -> None:
        if torch.compiler.is_compiling():
            # vLLM keeps graphs for other engines: the operator finds the statistics of the engine that runs.
            torch.ops.vllm_sirius.observe_ffn(activation, marker, self._layer)
            return
        statistics = self._owner.statistics
        assert statistics is not None
        if statistics.observing:
            statistics.observe(self._layer, activation)

    def _mask(self, gate_up: torch.Tensor) -> torch.Tensor:
        selection = self._owner.selection
        if selection is not None:
            return selection.mask[self._layer]
        start = 0 if self._gate_first else self._num_neurons
        gate = gate_up[..., start : start + self._num_neurons]
        assert self._gate_function is not None
        return fine_mask(self._gate_function(gate), self._owner.density)


def _switch_forward(module: nn.Module, owner: ReducedFFNs, layer: int) -> None:
    """Gives one FFN a class of its own whose forward can go the native way.

    What belongs to the engine hangs on the module, not on the class: graphs that PyTorch keeps after an engine is gone name
    the classes of modules.
    """
    upstream = type(module)
    run = _take_own_forward(module) or upstream.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        owner: ReducedFFNs = self.sirius_owner
        if owner.drafting:
            flat = hidden_states.reshape(-1, hidden_states.shape[-1])
            if owner.is_native(flat.shape[0]):
                return owner.run_native(layer, flat).view(hidden_states.shape)
        output: torch.Tensor = run(self, hidden_states, *args, **kwargs)
        return output

    vars(module)["sirius_owner"] = owner
    module.__class__ = type(f"Sirius{upstream.__name__}", (upstream,), {"forward": forward})


def _take_own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Takes the forward away that is bound to a module alone, which would go before that of its class.

    vLLM's Transformers backend rewrites forwards and binds them in this way.
    """
    own = vars(module).get("forward")
    if not isinstance(own, types.MethodType) or own.__self__ is not module:
        return None
    del vars(module)["forward"]
    return own.__func__
