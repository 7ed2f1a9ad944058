"""Loading a target whose weights vLLM packs (CPU). Drives ``vllm.model_executor.model_loader``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.model_loader import get_model_loader

from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.ffn.backends import CPURowsBackend
from vllm_sirius.ffn.kernels.native import KernelChoice, choose_kernels
from vllm_sirius.ffn.locate import GatedFFN, locate_gated_ffns
from vllm_sirius.ffn.weights import neuron_norms, neuron_rows
from vllm_sirius.integration.model_shape import ModelShape, measure_shape
from vllm_sirius.integration.target import LoadedTarget, check_activations


class _ReadLinearMethod(UnquantizedLinearMethod):
    """Upstream's method for a projection of an FFN that lets `reader` see the plain weight once it is loaded.

    vLLM's CPU build then packs the weight and drops the plain one, so this is the last moment.
    """

    reader: Callable[[torch.Tensor], None]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weight: Any = layer.weight
        self.reader(weight.data)
        super().process_weights_after_loading(layer)


class _FFNReader:
    """Collects what the draft needs of one FFN's weights: the neurons' norms, and their rows if wanted."""

    def __init__(self, ffn: GatedFFN, want_rows: bool) -> None:
        self.norms: torch.Tensor | None = None
        self.rows: torch.Tensor | None = None
        self._ffn = ffn
        self._want_rows = want_rows
        self._plain: dict[str, torch.Tensor] = {}
        self._watch("gate_up", ffn.gate_up)
        self._watch("down", ffn.down)

    def _watch(self, part: str, layer: nn.Module) -> None:
        method: Any = getattr(layer, "quant_method", None)
        if type(method) is not UnquantizedLinearMethod:
            raise SiriusUnsupportedError(
                f"the FFN {self._ffn.name!r} stores its weights by {type(method).__name__}, whose rows cannot be read yet: "
                "serve the unquantised checkpoint."
            )
        method.__class__ = _ReadLinearMethod
        method.reader = lambda weight: self._read(part, weight)

    def _read(self, part: str, weight: torch.Tensor) -> None:
        if part == "down":
            self.norms = neuron_norms(weight)
        if not self._want_rows:
            return
        self._plain[part] = weight
        if len(self._plain) == 2:
            self.rows = neuron_rows(self._plain["gate_up"], self._plain["down"], self._ffn.gate_first)
            self._plain.clear()


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
    built: list[tuple[list[GatedFFN], ModelShape, list[_FFNReader], KernelChoice]] = []

    def create_and_check(*args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = create_model(*args, **kwargs)
        ffns = locate_gated_ffns(model)
        check_activations(vllm_config.speculative_config.sirius, ffns)
        kernels = _choose_kernels(vllm_config, ffns)
        built.append((ffns, measure_shape(model, ffns), [_FFNReader(ffn, kernels.native) for ffn in ffns], kernels))
        return model

    loader.create_model = create_and_check
    model = loader.load_model(vllm_config=vllm_config, model_config=vllm_config.model_config)
    ffns, shape, readers, kernels = built[0]
    norms = [reader.norms for reader in readers if reader.norms is not None]
    rows = [reader.rows for reader in readers if reader.rows is not None]
    assert len(norms) == len(ffns), "the loader did not process the weights of every FFN"
    backend = CPURowsBackend(ffns, rows) if kernels.native else None
    return LoadedTarget(model, ffns, shape, torch.cat(norms), backend, kernels)


def _choose_kernels(vllm_config: Any, ffns: list[GatedFFN]) -> KernelChoice:
    if vllm_config.parallel_config.tensor_parallel_size > 1:
        return KernelChoice(False, "tensor parallel")
    if any(ffn.activation is None for ffn in ffns):
        return KernelChoice(False, "activation without a kernel")
    if any(getattr(layer, "bias", None) is not None for ffn in ffns for layer in (ffn.gate_up, ffn.down)):
        return KernelChoice(False, "FFN with bias")
    return choose_kernels(vllm_config.model_config.dtype, vllm_config.device_config.device)
