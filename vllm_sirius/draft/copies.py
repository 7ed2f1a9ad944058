"""What a draft derives from the target's weights: norms of neurons, and quantised or plain copies where it reads its own.

Weights are shown one by one, in any order. When they are loaded again, copies are overwritten in place, where kernels and
compiled code already read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vllm_sirius.config import SiriusConfig
from vllm_sirius.draft.backends import Backend, CoarseRowsBackend, FineRowsBackend, LowBitPanelsBackend
from vllm_sirius.draft.locate import GatedFFN
from vllm_sirius.draft.low_bit_linears import LowBitLinears, LowBitWeight, empty_copy, quantise_linear
from vllm_sirius.weights.low_bit import LowBitRows
from vllm_sirius.weights.low_bit_panels import LowBitPanels, interleave
from vllm_sirius.weights.rows import by_neuron, empty_rows, gate_up_rows, gates_first, neuron_norms

MOST_TOKENS = 32
ANY_NUMBER = 1 << 30
"""Tokens of a draft step."""


class FFNCopy:
    """What the draft needs of one FFN: the neurons' norms, and their rows or panels if it reads its own.

    Args:
        ffn: The FFN.
        norms: Receives ``||down_j||**2`` of its neurons, ``float32 [neurons]``.
        config: The options, with ``auto`` decided.
        wanted: Whether rows or panels are copied.

    Attributes:
        rows: The copy by neuron, where that is what the kernels read.
        panels: The copies of the two projections, where the kernels read those.
        num_read: Weights shown so far.
    """

    def __init__(self, ffn: GatedFFN, norms: torch.Tensor, config: SiriusConfig, wanted: bool) -> None:
        self.rows: torch.Tensor | LowBitRows | None = None
        self.panels: dict[str, torch.Tensor | LowBitPanels] = {}
        self.num_read = 0
        self._ffn = ffn
        self._norms = norms
        self._bits = config.draft_bits
        self._wanted = wanted
        self._in_panels = self._bits == 4 and config.sparsity == "none"
        layout = gates_first if config.sparsity == "fine" else by_neuron
        self._place = layout(ffn.num_neurons, ffn.hidden_size)

    def read_gate_up(self, weight: torch.Tensor) -> None:
        """Is shown the merged projection, ``[2 * neurons, hidden]``."""
        self.num_read += 1
        if self._wanted and self._in_panels:
            self._read_gate_up_panels(weight)
        elif self._wanted:
            self._fill(gate_up_rows(self._place, weight, self._ffn.gate_first), weight)

    def read_down(self, weight: torch.Tensor) -> None:
        """Is shown the down projection, ``[hidden, neurons]``."""
        self.num_read += 1
        self._norms.copy_(neuron_norms(weight))
        if self._wanted and self._in_panels:
            known, rounded = self.panels.get("down"), LowBitPanels.quantise(weight)
            if isinstance(known, LowBitPanels):
                known.take(rounded)
            else:
                self.panels["down"] = rounded
        elif self._wanted:
            self._fill([(self._place.down, weight.t())], weight)

    def restore(self) -> None:
        """Takes memory for rows or panels, whose values are read from where they were stored."""
        ffn, bits = self._ffn, self._bits
        self.num_read = 2
        if not self._in_panels:
            assert bits is not None, "what is stored is rounded"
            self.rows = LowBitRows.empty(bits, self._place.shape)
            return
        half = LowBitPanels.empty(ffn.num_neurons, ffn.hidden_size)
        self.panels["gate_up"] = interleave(half, half)
        self.panels["down"] = LowBitPanels.empty(ffn.hidden_size, ffn.num_neurons)

    def stored(self) -> dict[str, torch.Tensor]:
        """All tensors of the rounded copies, by name."""
        found = {} if self.rows is None else {"rows": self.rows}
        return _stored({**found, **self.panels})

    def drop(self) -> None:
        """Frees the copies; norms are measured all the same."""
        self.rows = None
        self.panels.clear()
        self._wanted = False

    def _fill(self, found: Sequence[tuple[Any, torch.Tensor]], weight: torch.Tensor) -> None:
        if self.rows is None:
            bits, place = self._bits, self._place
            self.rows = empty_rows(place, weight) if bits is None else LowBitRows.empty(bits, place.shape)
        for where, values in found:
            if isinstance(self.rows, LowBitRows):
                self.rows.fill(where, values)
            else:
                self.rows[where] = values

    def _read_gate_up_panels(self, weight: torch.Tensor) -> None:
        first, second = (LowBitPanels.quantise(half) for half in weight.split(self._ffn.num_neurons))
        together = interleave(first, second) if self._ffn.gate_first else interleave(second, first)
        known = self.panels.get("gate_up")
        if isinstance(known, torch.Tensor):
            known.copy_(together)
        else:
            self.panels["gate_up"] = together


class DraftCopies:
    """What drafts of one model derive from its weights.

    Args:
        ffns: Its gated FFNs.
        config: The options, with ``auto`` decided.
        wanted: Whether drafts read copies; otherwise only norms are measured.
        head: The lm_head, if it is copied as well.

    Attributes:
        ffns: What is kept of each FFN.
        neuron_norms: ``||down_j||**2`` of every neuron of every layer, ``float32``.
        seconds: What reading has taken since `begin`.
    """

    def __init__(self, ffns: Sequence[GatedFFN], config: SiriusConfig, wanted: bool, head: nn.Module | None) -> None:
        sizes = [ffn.num_neurons for ffn in ffns]
        weight: Any = ffns[0].down.weight
        # By name, because models are built with their own dtype as the default one.
        self.neuron_norms = torch.zeros(sum(sizes), dtype=torch.float32, device=weight.device)
        self.seconds = 0.0
        self._gated_ffns = ffns
        self._config = config
        self._wanted = wanted
        self._head = head
        self._head_copy: LowBitWeight | None = None
        self._linears: dict[nn.Module, LowBitWeight] = {}
        norms = self.neuron_norms.split(sizes)
        self.ffns = [FFNCopy(ffn, part, config, wanted) for ffn, part in zip(ffns, norms, strict=True)]

    def begin(self) -> None:
        """Before weights are loaded."""
        self.seconds = 0.0

    def read_linear(self, layer: nn.Module, weight: torch.Tensor) -> None:
        """Is shown the weight of a further linear layer, which drafts run on a quantised copy.

        Args:
            layer: The layer.
            weight: ``[outputs, inputs]``.
        """
        if self._wanted:
            self._linears[layer] = self._kept(self._linears.get(layer), weight)

    def read_head(self, weight: torch.Tensor) -> None:
        """Is shown the weight of the lm_head, ``[outputs, inputs]``."""
        if self._wanted and self._head is not None:
            self._head_copy = self._kept(self._head_copy, weight)

    def restore(self, linears: Sequence[nn.Module]) -> None:
        """Takes memory for rounded copies, whose values are to be put into `stored`.

        Args:
            linears: Further layers, with their plain weights' shapes.
        """
        for ffn in self.ffns:
            ffn.restore()
        bits = self._config.draft_bits
        assert bits is not None, "what is stored is rounded"
        layer: Any
        for layer in linears:
            self._linears[layer] = empty_copy(layer.weight.shape, bits)
        if self._head is not None:
            head: Any = self._head
            self._head_copy = empty_copy(head.weight.shape, bits)

    def stored(self, linears: Sequence[nn.Module]) -> dict[str, torch.Tensor]:
        """All that was derived from the weights, by names that are the same for the same model.

        Args:
            linears: The further layers that are copied, in an order that is the same for the same model.
        """
        found = {"draft.norms": self.neuron_norms}
        for number, ffn in enumerate(self.ffns):
            found |= {f"draft.{number}.{name}": tensor for name, tensor in ffn.stored().items()}
        copies: dict[str, Any] = {f"linear.{i}": self._linears[layer] for i, layer in enumerate(linears)}
        if self._head_copy is not None:
            copies["head"] = self._head_copy
        return found | {f"draft.{name}": tensor for name, tensor in _stored(copies).items()}

    def drop(self) -> None:
        """Frees the copies; norms are measured all the same."""
        self._linears.clear()
        self._head = self._head_copy = None
        self._wanted = False
        for ffn in self.ffns:
            ffn.drop()

    def backend(self) -> Backend:
        """Kernels bound to the copies of the FFNs."""
        if self.ffns[0].panels:
            pairs: Any = [(ffn.panels["gate_up"], ffn.panels["down"]) for ffn in self.ffns]
            return LowBitPanelsBackend(self._gated_ffns, pairs, self._most_tokens)
        rows = [ffn.rows for ffn in self.ffns if ffn.rows is not None]
        fine = self._config.sparsity == "fine"
        if fine:
            return FineRowsBackend(self._gated_ffns, rows)
        backend = CoarseRowsBackend(self._gated_ffns, rows)
        if self._config.offload == "disk":
            backend.max_tokens = self._most_tokens
        return backend

    def linears(self) -> LowBitLinears | None:
        """The copies of further layers, if there are any."""
        head = None
        if self._head is not None and self._head_copy is not None:
            head = (self._head, self._head_copy)
        if not self._linears and head is None:
            return None
        return LowBitLinears(self._linears, head, self._most_tokens)

    @property
    def _most_tokens(self) -> int:
        """Largest draft step on the copies; beyond it the target's weights are as good, unless they are on a disk."""
        return ANY_NUMBER if self._config.offload == "disk" else MOST_TOKENS

    @property
    def num_copied(self) -> int:
        """Layers of which copies are made."""
        ffns = 2 * sum(ffn.rows is not None or bool(ffn.panels) for ffn in self.ffns)
        return ffns + len(self._linears) + (self._head_copy is not None)

    def _kept(self, known: Any, weight: torch.Tensor) -> LowBitWeight:
        """The copy that kernels already read, overwritten, or the first one."""
        bits = self._config.draft_bits
        assert bits is not None
        rounded = quantise_linear(weight, bits)
        if known is None:
            return rounded
        known.take(rounded)
        kept: LowBitWeight = known
        return kept


def _stored(copies: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that copies consist of: of rows the values and the scales."""
    found: dict[str, torch.Tensor] = {}
    for name, copy in copies.items():
        if isinstance(copy, LowBitRows):
            found |= {name: copy.packed, f"{name}.scales": copy.scales}
        else:
            found[name] = copy.blocks if isinstance(copy, LowBitPanels) else copy
    return found
