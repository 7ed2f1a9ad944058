"""The ways in which vLLM's linear layers store a weight. Reads ``vllm.model_executor.layers.linear``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.integration.target_linears import use_panels
from vllm_sirius.weights.reader import Seen, WeightReader

Pack = Callable[[Any], None]
"""Packs a layer that has its plain weight."""


class ShowsWeight:
    """Shows the plain weight of a layer to `watchers` once it is loaded; mixed into upstream's method for the layer.

    vLLM's CPU build then packs the weight, so this is the last moment. With `panels`, Sirius packs it for its own kernel
    instead.

    Attributes:
        watchers: Are shown the weight.
        panels: Whether Sirius packs the weight, by `pack_panels`, in the place of vLLM.
        pack_panels: Packs a loaded layer.
        packed_early: Whether the layer is packed already when upstream comes to it.
    """

    watchers: list[Seen]
    panels: bool
    pack_panels: Pack
    packed_early: bool

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As upstream, after the watchers; does nothing where `pack_early` has done it."""
        if self.packed_early:
            self.packed_early = False
            return
        self._pack(layer)

    def pack_early(self, layer: nn.Module) -> None:
        """Packs a layer before upstream comes to it.

        Args:
            layer: The layer, loaded.
        """
        self._pack(layer)
        self.packed_early = True

    def _pack(self, layer: nn.Module) -> None:
        weight: Any = layer.weight
        for seen in self.watchers:
            seen(weight.data)
        # Upstream leaves layers with this mark unpacked, because it reads their weight later.
        if self.panels and not getattr(layer, "_cpu_skip_gemm_dispatch", False):
            self.pack_panels(layer)
        else:
            upstream: Any = super()
            upstream.process_weights_after_loading(layer)


class ReadLinearMethod(ShowsWeight, UnquantizedLinearMethod):
    """Upstream's method for a linear layer that shows its weight. On CPU upstream drops the plain weight."""


class ReadHeadMethod(ShowsWeight, UnquantizedEmbeddingMethod):
    """Upstream's method for an lm_head that shows its weight. Upstream keeps the plain weight beside the packed one."""


class ReadLookupMethod(ShowsWeight, UnquantizedEmbeddingMethod):
    """Upstream's method for an embedding that nothing is multiplied by, and that is stored when it is loaded."""


class LookedUpMethod(UnquantizedEmbeddingMethod):
    """Upstream's method for an embedding that nothing is multiplied by: it is not packed, which upstream does all the same."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Leaves the weight alone."""


class PackedReader(WeightReader):
    """Plain weights that vLLM packs once they are loaded (CPU), and packs again whenever they are loaded anew."""

    packs = True

    def holds(self, layer: nn.Module) -> bool:
        """See `WeightReader.holds`."""
        return type(getattr(layer, "quant_method", None)) in (UnquantizedLinearMethod, ReadLinearMethod)

    def watch(self, layer: nn.Module, seen: Seen) -> None:
        """See `WeightReader.watch`. To be called before weights load: the last moment to see them is their packing."""
        self._method(layer).watchers.append(seen)

    def show_again(self) -> None:
        """See `WeightReader.show_again`: each is shown while it is loaded."""

    def want_panels(self, layer: nn.Module, pack: Pack = use_panels) -> None:
        """Has a layer packed for Sirius's kernel, not for vLLM's.

        Args:
            layer: The layer.
            pack: Packs it.
        """
        method = self._method(layer)
        method.panels, method.pack_panels = True, pack

    def wants_panels(self, layer: nn.Module) -> bool:
        """Whether a layer is packed for Sirius's kernel."""
        return bool(getattr(getattr(layer, "quant_method", None), "panels", False))

    def _method(self, layer: Any) -> ShowsWeight:
        method: Any = layer.quant_method
        kinds: dict[type, Any] = {
            UnquantizedLinearMethod: ReadLinearMethod,
            UnquantizedEmbeddingMethod: ReadHeadMethod,
            LookedUpMethod: ReadLookupMethod,
        }
        kind = kinds.get(type(method))
        if kind is None:
            known: ShowsWeight = method
            return known
        made: Any = kind.__new__(kind)
        vars(made).update(vars(method), watchers=[], panels=False, pack_panels=use_panels, packed_early=False)
        layer.quant_method = made
        return made


class PlainReader(WeightReader):
    """Plain weights that stay as they were loaded (GPU). Layers are watched once they are loaded."""

    packs = False

    def __init__(self) -> None:
        self._watched: list[tuple[Any, Seen]] = []

    def holds(self, layer: nn.Module) -> bool:
        """See `WeightReader.holds`."""
        return type(getattr(layer, "quant_method", None)) is UnquantizedLinearMethod

    def watch(self, layer: nn.Module, seen: Seen) -> None:
        """See `WeightReader.watch`; shows the weight at once."""
        self._watched.append((layer, seen))
        seen(plain_weight(layer))

    def show_again(self) -> None:
        """See `WeightReader.show_again`."""
        for layer, seen in self._watched:
            seen(plain_weight(layer))


def want_panels(model: nn.Module, head: Any, reader: PackedReader) -> bool:
    """Has all plain linear layers of a model packed for Sirius's kernel, and the lm_head if it can be.

    Args:
        model: The model, before its weights are loaded.
        head: What its logits are computed from, or ``None``.
        reader: Reads its weights.

    Returns:
        Whether the head is among them.
    """
    own_head = has_own_head(model, head)
    if own_head:
        reader.want_panels(head)
    for layer in model.modules():
        weight: Any = getattr(layer, "weight", None)
        if isinstance(layer, LinearBase) and reader.holds(layer) and weight is not None and weight.dim() == 2:
            reader.want_panels(layer)
    return own_head


def has_own_head(model: nn.Module, head: Any) -> bool:
    """Whether an lm_head has a plain weight that nothing else reads, so that it can be packed like a linear layer.

    Args:
        model: The model.
        head: What its logits are computed from, or ``None``.
    """
    if not isinstance(head, ParallelLMHead) or type(head.quant_method) is not UnquantizedEmbeddingMethod:
        return False
    return not any(module is not head and getattr(module, "weight", None) is head.weight for module in model.modules())


def leave_lookups_alone(model: nn.Module, head: Any, panels: bool) -> None:
    """Keeps upstream from packing embeddings whose packed form nothing reads.

    Args:
        model: The model, before its weights are loaded.
        head: What its logits are computed from; with ``None`` it may be any embedding, and all are left as they are.
        panels: Whether Sirius packs the head.
    """
    if head is None:
        return
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        is_unread = isinstance(module, VocabParallelEmbedding) and (panels or module is not head)
        if is_unread and type(method) is UnquantizedEmbeddingMethod:
            method.__class__ = LookedUpMethod


def check_readable(reader: WeightReader, layer: nn.Module, name: str) -> None:
    """Refuses a linear layer whose weight a reader cannot read.

    Args:
        reader: The reader of this platform.
        layer: The layer.
        name: Its path, or that of the FFN around it.

    Raises:
        SiriusUnsupportedError: If its rows cannot be read.
    """
    if not reader.holds(layer):
        raise SiriusUnsupportedError(
            f"{name!r} stores its weights by {type(getattr(layer, 'quant_method', None)).__name__}, whose rows cannot be read "
            "yet: serve the unquantised checkpoint."
        )


def plain_weight(layer: Any) -> torch.Tensor:
    """The weight of a layer as it lies in memory.

    Args:
        layer: A layer whose weight is a plain matrix.
    """
    weight: torch.Tensor = layer.weight.data
    return weight
