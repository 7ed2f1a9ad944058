"""RMSNorm of uncompiled drafts by one native call. Subclasses ``vllm.model_executor.layers.layernorm.RMSNorm``.

vLLM's CPU build runs RMSNorm as a handful of PyTorch operators, which a compiler fuses. An uncompiled draft step of a small
model spends a seventh of its time on starting them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm

from vllm_sirius.draft.low_bit_linears import DraftMode

MAX_TOKENS = 32
"""Rows of a draft step for which native kernels are the faster way."""

VECTOR = 32
"""The native kernels want whole vectors, of 16 or 32 elements."""


def switch_norms(model: nn.Module, mode: DraftMode) -> int:
    """Lets the plain RMSNorm layers of a model on CPU run natively in draft passes; the target's passes stay as they are.

    Args:
        model: The model.
        mode: Asked at each forward pass.

    Returns:
        The number of layers.
    """
    if not hasattr(torch.ops._C, "fused_add_rms_norm"):
        return 0
    layers = [module for module in model.modules() if type(module) is RMSNorm and _is_plain(module)]
    for layer in layers:
        _switch(layer, mode)
    return len(layers)


def _is_plain(layer: Any) -> bool:
    whole = layer.hidden_size % VECTOR == 0
    return (
        whole and bool(layer.has_weight) and layer.variance_size_override is None and layer.weight.device.type == "cpu"
    )


def _switch(layer: nn.Module, mode: DraftMode) -> None:
    upstream = type(layer)

    def forward(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        few = x.numel() <= MAX_TOKENS * self.hidden_size
        if not (self.sirius_mode.drafting and few and x.is_contiguous() and x.dtype == self.weight.dtype):
            return upstream.forward(self, x, residual)
        if residual is None:
            output = torch.empty_like(x)
            torch.ops._C.rms_norm(output, x, self.weight, self.variance_epsilon)
            return output
        # In place, as on a GPU: the models of vLLM do not use a norm's inputs again.
        torch.ops._C.fused_add_rms_norm(x, residual, self.weight, self.variance_epsilon)
        return x, residual

    # On the layer, not on its class: graphs that PyTorch keeps after an engine is gone name the classes of modules.
    vars(layer)["sirius_mode"] = mode
    layer.__class__ = type(f"Sirius{upstream.__name__}", (upstream,), {"forward": forward})
