"""Layers are packed as soon as their weights are loaded. Wraps the ``weight_loader`` of their parameters.

Upstream loads a whole model in its plain form and packs it then. Here the plain weight of a layer is gone before that of the
next one comes, and with it the pages of the checkpoint that it was read from, so that a load takes the memory of what it
makes. Layers that are not loaded by ``weight_loader``, or not whole, are packed when upstream packs them.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.model_loader.reload.meta import get_numel_loaded
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from vllm_sirius.integration.weight_readers import ShowsWeight
from vllm_sirius.weights.mapped_pages import give_back
from vllm_sirius.weights.memory import give_free_memory_back

logger = init_logger("vllm.sirius")


def pack_while_loading(model: nn.Module, only: Collection[nn.Module] | None = None) -> None:
    """Has every layer that a `PackedReader` reads packed once its parameters are loaded, for the coming load alone.

    Args:
        model: The model, before its weights are loaded.
        only: The layers that are, if not all of them.
    """
    chosen = None if only is None else set(map(id, only))
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, layer in model.named_modules():
        parameters = dict(layer.named_parameters(recurse=False))
        # A weight that two layers share is needed by the other one still.
        alone = all(places[id(parameter)] == 1 for parameter in parameters.values())
        if chosen is not None and id(layer) not in chosen:
            continue
        if isinstance(getattr(layer, "quant_method", None), ShowsWeight) and alone:
            _LayerLoading(name, layer, parameters)


class _LayerLoading:
    """Counts what was loaded into a layer, and packs it when that is all.

    Args:
        name: The layer's path.
        layer: The layer, whose method is a `ShowsWeight`.
        parameters: Its parameters by name.
    """

    def __init__(self, name: str, layer: Any, parameters: dict[str, nn.Parameter]) -> None:
        self._name = name
        self._layer = layer
        self._parameters = list(parameters.values())
        self._missing = sum(parameter.numel() for parameter in self._parameters)
        for parameter in self._parameters:
            self._wrap(parameter)

    def _wrap(self, parameter: Any) -> None:
        load: Callable[..., Any] = getattr(parameter, "weight_loader", default_weight_loader)
        signature = inspect.signature(load)

        @functools.wraps(load, assigned=("__doc__", "__annotations__"))
        def load_and_count(*args: Any, **kwargs: Any) -> Any:
            if self._missing <= 0:
                logger.warning_once(
                    "Sirius: the checkpoint holds weights of %s more than once; the first ones were taken", self._name
                )
                return None
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            count, result = get_numel_loaded(load, bound)
            for argument in bound.arguments.values():
                if isinstance(argument, torch.Tensor) and argument is not parameter:
                    give_back(argument)
            self._missing -= count
            if self._missing <= 0:
                self._pack()
            return result

        parameter.weight_loader = load_and_count

    def _pack(self) -> None:
        method: ShowsWeight = self._layer.quant_method
        method.pack_early(self._layer)
        kept = {id(parameter) for parameter in self._layer.parameters(recurse=False)}
        for parameter in self._parameters:
            # The loop that loads the checkpoint refers to every parameter until it ends.
            if id(parameter) not in kept:
                parameter.data = parameter.data.new_empty(0)
        give_free_memory_back()
