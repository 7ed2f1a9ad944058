"""Loading the target with Sirius in it. Drives ``vllm.model_executor.model_loader``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.model_loader import get_model_loader

from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.ffn.locate import GatedFFN, locate_gated_ffns
from vllm_sirius.integration.model_shape import ModelShape, measure_shape


class _MeasuredLinearMethod(UnquantizedLinearMethod):
    """Upstream's method for one down projection, which also keeps the norms of its neurons.

    vLLM's CPU build packs the weights once they are loaded and drops the plain ones, so this is the last moment.
    """

    neuron_norms: torch.Tensor

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.neuron_norms = layer.weight.data.float().square().sum(dim=0)
        super().process_weights_after_loading(layer)


class LoadedTarget:
    """The target and its FFNs.

    Attributes:
        model: The loaded model.
        ffns: Its gated FFNs.
        shape: Its sizes.
        neuron_norms: ``||down_j||**2`` of every neuron of every layer, one after the other, ``float32``.
    """

    def __init__(self, model: nn.Module, ffns: list[GatedFFN], shape: ModelShape) -> None:
        self.model = model
        self.ffns = ffns
        self.shape = shape
        self.neuron_norms = torch.cat([ffn.down.quant_method.neuron_norms for ffn in ffns])  # type: ignore[union-attr]


def load_target(vllm_config: Any) -> LoadedTarget:
    """Loads the target as upstream does, and refuses it before its weights load if it cannot be drafted with.

    Args:
        vllm_config: The engine's config.

    Returns:
        The target.

    Raises:
        SiriusUnsupportedError: If the model has no gated FFN, or one whose weights cannot be read.
    """
    loader = get_model_loader(vllm_config.load_config)
    create_model = loader.create_model
    ffns: list[GatedFFN] = []
    shapes: list[ModelShape] = []

    def create_and_check(*args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = create_model(*args, **kwargs)
        ffns.extend(locate_gated_ffns(model))
        for ffn in ffns:
            _measure(ffn)
        shapes.append(measure_shape(model, ffns))
        return model

    loader.create_model = create_and_check  # type: ignore[method-assign]
    model = loader.load_model(vllm_config=vllm_config, model_config=vllm_config.model_config)
    return LoadedTarget(model, ffns, shapes[0])


def _measure(ffn: GatedFFN) -> None:
    method = getattr(ffn.down, "quant_method", None)
    if type(method) is not UnquantizedLinearMethod:
        raise SiriusUnsupportedError(
            f"the FFN {ffn.name!r} stores its weights by {type(method).__name__}, whose rows cannot be read yet: serve the "
            "unquantised checkpoint."
        )
    method.__class__ = _MeasuredLinearMethod
