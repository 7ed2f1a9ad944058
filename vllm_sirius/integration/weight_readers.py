"""Reading plain weights at the moment when vLLM's CPU build packs them. Subclasses ``UnquantizedLinearMethod``.

The readers run again whenever a layer's weights are loaded again, and then overwrite their copies in place, where kernels and
compiled code already read them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_sirius.config import SiriusConfig
from vllm_sirius.draft.backends import Backend, CoarseRowsBackend, FineRowsBackend, LowBitPanelsBackend
from vllm_sirius.draft.locate import GatedFFN
from vllm_sirius.draft.low_bit_linears import LowBitLinears, LowBitWeight, quantise_linear
from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.integration.draft_plan import CopiedLinear, DraftPlan
from vllm_sirius.integration.finite_weights import FiniteWeights
from vllm_sirius.integration.target_linears import use_panels
from vllm_sirius.weights.low_bit import LowBitRows
from vllm_sirius.weights.low_bit_panels import LowBitPanels, interleave
from vllm_sirius.weights.rows import by_neuron, empty_rows, gate_up_rows, gates_first, neuron_norms

Reader = Callable[[torch.Tensor], None]


class ReadLinearMethod(UnquantizedLinearMethod):
    """Upstream's method for a linear layer that lets `readers` see the plain weight once it is loaded.

    vLLM's CPU build then packs the weight and drops the plain one, so this is the last moment. With `panels`, Sirius packs
    it for its own kernel instead.
    """

    readers: list[Reader]
    panels: bool

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As upstream, after the readers."""
        weight: Any = layer.weight
        for reader in self.readers:
            reader(weight.data)
        # Upstream leaves layers with this mark unpacked, because it reads their weight later.
        if self.panels and not getattr(layer, "_cpu_skip_gemm_dispatch", False):
            use_panels(layer)
        else:
            super().process_weights_after_loading(layer)


def method_of(layer: nn.Module) -> ReadLinearMethod | None:
    """The layer's own method, made to be read; ``None`` where its weights are not plain.

    Args:
        layer: A linear layer.
    """
    method: Any = getattr(layer, "quant_method", None)
    if type(method) is UnquantizedLinearMethod:
        method.__class__ = ReadLinearMethod
        method.readers, method.panels = [], False
    return method if type(method) is ReadLinearMethod else None


class _FFNReader:
    """Collects what the draft needs of one FFN's weights: the neurons' norms, and their rows if wanted."""

    def __init__(self, ffn: GatedFFN, norms: torch.Tensor, plan: DraftPlan) -> None:
        self.rows: torch.Tensor | LowBitRows | None = None
        self.panels: dict[str, torch.Tensor | LowBitPanels] = {}
        self.num_read = 0
        self._ffn = ffn
        self._norms = norms
        self._bits = plan.config.draft_bits
        self._want_rows = plan.kernels.native
        self._want_panels = self._bits == 4 and plan.config.sparsity == "none"
        layout = gates_first if plan.config.sparsity == "fine" else by_neuron
        self._place = layout(ffn.num_neurons, ffn.hidden_size)

    def read(self, part: str, weight: torch.Tensor) -> None:
        self.num_read += 1
        if part == "down":
            self._norms.copy_(neuron_norms(weight))
        if not self._want_rows:
            return
        if self._want_panels:
            self._read_panels(part, weight)
            return
        if self.rows is None:
            bits, place = self._bits, self._place
            self.rows = empty_rows(place, weight) if bits is None else LowBitRows.empty(bits, place.shape)
        down = [(self._place.down, weight.t())]
        found = down if part == "down" else gate_up_rows(self._place, weight, self._ffn.gate_first)
        for where, values in found:
            if isinstance(self.rows, LowBitRows):
                self.rows.fill(where, values)
            else:
                self.rows[where] = values

    def drop(self) -> None:
        self.rows = None
        self.panels.clear()
        self._want_rows = False

    def _read_panels(self, part: str, weight: torch.Tensor) -> None:
        known = self.panels.get(part)
        if part == "down":
            rounded = LowBitPanels.quantise(weight)
            if isinstance(known, LowBitPanels):
                known.take(rounded)
            else:
                self.panels[part] = rounded
            return
        first, second = (LowBitPanels.quantise(half) for half in weight.split(self._ffn.num_neurons))
        together = interleave(first, second) if self._ffn.gate_first else interleave(second, first)
        if isinstance(known, torch.Tensor):
            known.copy_(together)
        else:
            self.panels[part] = together


class WeightReaders:
    """All readers of one model, and what they have copied.

    Args:
        plan: What to copy.

    Attributes:
        neuron_norms: ``||down_j||**2`` of every neuron of every layer, ``float32``.
        finite: Which weights are not.
        seconds: What reading has taken since `begin`.

    Raises:
        SiriusUnsupportedError: If a weight cannot be read.
    """

    def __init__(self, plan: DraftPlan) -> None:
        sizes = [ffn.num_neurons for ffn in plan.ffns]
        self.neuron_norms = torch.zeros(sum(sizes))
        self.finite = FiniteWeights()
        self.seconds = 0.0
        self._config: SiriusConfig = plan.config
        self._head = plan.head
        self._head_copy: LowBitWeight | None = None
        self._dropped = False
        self._copies: dict[nn.Module, LowBitWeight] = {}
        self._ffns = plan.ffns
        norms = self.neuron_norms.split(sizes)
        self._readers = [_FFNReader(ffn, part, plan) for ffn, part in zip(plan.ffns, norms, strict=True)]
        for ffn, reader in zip(plan.ffns, self._readers, strict=True):
            self._watch(ffn.gate_up, ffn.name, functools.partial(reader.read, "gate_up"))
            self._watch(ffn.down, ffn.name, functools.partial(reader.read, "down"))
        for linear in plan.linears:
            self._watch(linear.module, linear.name, functools.partial(self._read_linear, linear))

    def begin(self) -> None:
        """Before weights are loaded."""
        self.finite = FiniteWeights()
        self.seconds = 0.0

    def finish(self, model: nn.Module) -> None:
        """After weights were loaded: copies the lm_head, which keeps its plain weight.

        Args:
            model: The model.

        Raises:
            SiriusUnsupportedError: If a weight has NaN or infinite values.
        """
        started = time.perf_counter()
        if self._head is not None:
            weight: Any = self._head.module.weight
            self.finite.check(self._head.name, weight.data)
            self._head_copy = self._kept(self._head_copy, quantise_linear(weight.data, self._bits))
        self.finite.check_small(model)
        self.seconds += time.perf_counter() - started
        self.finite.raise_if_not()
        assert all(reader.num_read >= 2 for reader in self._readers), "the loader did not process every FFN's weights"

    def drop(self) -> None:
        """Frees the copies; norms are measured all the same."""
        self._copies.clear()
        self._head = self._head_copy = None
        self._dropped = True
        for reader in self._readers:
            reader.drop()

    def backend(self) -> Backend:
        """Kernels bound to the copies of the FFNs."""
        if self._readers[0].panels:
            pairs: Any = [(reader.panels["gate_up"], reader.panels["down"]) for reader in self._readers]
            return LowBitPanelsBackend(self._ffns, pairs)
        rows = [reader.rows for reader in self._readers if reader.rows is not None]
        fine = self._config.sparsity == "fine"
        return FineRowsBackend(self._ffns, rows) if fine else CoarseRowsBackend(self._ffns, rows)

    def linears(self) -> LowBitLinears | None:
        """The copies of further layers, if there are any."""
        head = None
        if self._head is not None and self._head_copy is not None:
            head = (self._head.module, self._head_copy)
        return LowBitLinears(self._copies, head) if self._copies or head is not None else None

    @property
    def num_copied(self) -> int:
        """Layers of which copies are made."""
        ffns = 2 * sum(reader.rows is not None or bool(reader.panels) for reader in self._readers)
        return ffns + len(self._copies) + (self._head_copy is not None)

    @property
    def _bits(self) -> int:
        bits = self._config.draft_bits
        assert bits is not None
        return bits

    def _watch(self, layer: Any, name: str, reader: Reader) -> None:
        method = method_of(layer)
        if method is None:
            found = type(getattr(layer, "quant_method", None)).__name__
            raise SiriusUnsupportedError(
                f"{name!r} stores its weights by {found}, whose rows cannot be read yet: serve the unquantised checkpoint."
            )

        def timed(weight: torch.Tensor) -> None:
            started = time.perf_counter()
            self.finite.check(getattr(layer, "prefix", "") or name, weight)
            reader(weight)
            self.seconds += time.perf_counter() - started

        method.readers.append(timed)

    def _read_linear(self, linear: CopiedLinear, weight: torch.Tensor) -> None:
        if self._dropped:
            return
        rounded = quantise_linear(weight, self._bits)
        self._copies[linear.module] = self._kept(self._copies.get(linear.module), rounded)

    @staticmethod
    def _kept(known: Any, rounded: LowBitWeight) -> LowBitWeight:
        """The copy that kernels already read, overwritten, or the first one."""
        if known is None:
            return rounded
        known.take(rounded)
        kept: LowBitWeight = known
        return kept
