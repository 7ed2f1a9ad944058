"""The ways in which vLLM's linear layers store a weight. Reads ``vllm.model_executor.layers.linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.integration.target_linears import use_panels
from vllm_sirius.weights.reader import Seen, WeightReader


class ReadLinearMethod(UnquantizedLinearMethod):
    """Upstream's method for a linear layer that shows the plain weight to `watchers` once it is loaded.

    vLLM's CPU build then packs the weight and drops the plain one, so this is the last moment. With `panels`, Sirius packs
    it for its own kernel instead.
    """

    watchers: list[Seen]
    panels: bool

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As upstream, after the watchers."""
        weight: Any = layer.weight
        for seen in self.watchers:
            seen(weight.data)
        # Upstream leaves layers with this mark unpacked, because it reads their weight later.
        if self.panels and not getattr(layer, "_cpu_skip_gemm_dispatch", False):
            use_panels(layer)
        else:
            super().process_weights_after_loading(layer)


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

    def want_panels(self, layer: nn.Module) -> None:
        """Has a layer packed for Sirius's kernel, not for vLLM's."""
        self._method(layer).panels = True

    def _method(self, layer: Any) -> ReadLinearMethod:
        method: Any = layer.quant_method
        if type(method) is UnquantizedLinearMethod:
            method.__class__ = ReadLinearMethod
            method.watchers, method.panels = [], False
        found: ReadLinearMethod = method
        return found


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
