"""The target's dense linear layers on Sirius's kernel. Attaches to ``vllm.model_executor.layers.utils.cpu_unquantized_gemm``.

vLLM's CPU build calls each unquantised layer by the attribute ``cpu_linear`` that it sets once the weight is loaded. Here
another function is set there, on the same weights in another order; no vLLM function is replaced.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from vllm_sirius.config import SiriusConfig
from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.kernels.cpu.panel_linear import panel_linear
from vllm_sirius.target.choice import TargetKernels, choose_by_processor, why_no_panels
from vllm_sirius.target.streamed import StreamedTarget
from vllm_sirius.weights.panels import Panels


@torch.library.custom_op("vllm_sirius::panel_linear", mutates_args=())
def _panel_linear(
    inputs: torch.Tensor, weights: torch.Tensor, num_outputs: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """One linear layer of the target, opaque to the compiler."""
    return panel_linear(inputs, weights, num_outputs, bias)


@_panel_linear.register_fake
def _(inputs: torch.Tensor, weights: torch.Tensor, num_outputs: int, bias: torch.Tensor | None) -> torch.Tensor:
    return inputs.new_empty(*inputs.shape[:-1], num_outputs)


_STREAMED: list[weakref.ref[StreamedTarget]] = []
"""Streamed targets of this process: compiled code knows them by their number."""


def _handle_of(target: StreamedTarget) -> int:
    known = [reference() for reference in _STREAMED]
    if target not in known:
        _STREAMED.append(weakref.ref(target))
        return len(known)
    return known.index(target)


@torch.library.custom_op("vllm_sirius::streamed_linear", mutates_args=())
def _streamed_linear(
    inputs: torch.Tensor, handle: int, number: int, num_outputs: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """One linear layer of a streamed target, opaque to the compiler."""
    target = _STREAMED[handle]()
    assert target is not None, "the engine of these weights is gone"
    return target.run(number, inputs, bias)


@_streamed_linear.register_fake
def _(inputs: torch.Tensor, handle: int, number: int, num_outputs: int, bias: torch.Tensor | None) -> torch.Tensor:
    return inputs.new_empty(*inputs.shape[:-1], num_outputs)


def choose_target_kernels(vllm_config: Any, config: SiriusConfig) -> TargetKernels:
    """Decides what runs the target's linear layers.

    Args:
        vllm_config: The engine's config.
        config: The options.

    Returns:
        The choice.

    Raises:
        SiriusUnsupportedError: If ``target_kernels='sirius'`` cannot be had.
    """
    if config.target_kernels == "vllm":
        return TargetKernels(False, "target_kernels='vllm'")
    reason = why_no_panels(vllm_config.model_config.dtype, vllm_config.device_config.device)
    if config.offload == "disk":
        if reason:
            raise SiriusUnsupportedError(
                f"offload='disk' streams weights in the form of Sirius's kernel, which cannot be used here ({reason}): use "
                "offload='none'."
            )
        return TargetKernels(True, "offload='disk'")
    if reason and config.target_kernels == "sirius":
        raise SiriusUnsupportedError(f"target_kernels='sirius' cannot be used here ({reason}): use 'auto' or 'vllm'.")
    if reason:
        return TargetKernels(False, reason)
    if config.target_kernels == "sirius":
        return TargetKernels(True, "target_kernels='sirius'")
    return choose_by_processor()


def use_panels(layer: Any, keep_weight: bool = False, packed: Panels | None = None) -> None:
    """Gives a loaded layer the panel kernel, as upstream's `dispatch_cpu_unquantized_gemm` gives it oneDNN.

    Args:
        layer: A layer that is called by its ``cpu_linear``, with its plain weight.
        keep_weight: Whether something else reads the plain weight, as an embedding does; otherwise the panels take its place.
        packed: The panels of the weight, if there are any already.
    """
    panels = packed or Panels.pack(layer.weight.data)
    num_outputs = panels.num_outputs
    if keep_weight:
        layer.cpu_linear = lambda inputs, _, bias: panel_linear(inputs, panels.weights, num_outputs, bias)
        return
    # As a parameter the panels reach compiled code as an input; a tensor in a closure would be a constant of its graph.
    layer.weight = nn.Parameter(panels.weights, requires_grad=False)

    def linear(inputs: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if torch.compiler.is_compiling():
            compiled: torch.Tensor = torch.ops.vllm_sirius.panel_linear(inputs, weights, num_outputs, bias)
            return compiled
        return panel_linear(inputs, weights, num_outputs, bias)

    layer.cpu_linear = linear


def use_streamed(layer: Any, target: StreamedTarget, number: int) -> None:
    """Gives a layer the panel kernel on weights that are streamed; its own weight is gone.

    Args:
        layer: A layer that is called by its ``cpu_linear``.
        target: The streamed layers of the model.
        number: The layer's place among them.
    """
    handle, num_outputs = _handle_of(target), layer.weight.shape[0]
    layer.weight = nn.Parameter(layer.weight.data.new_empty(0), requires_grad=False)

    def linear(inputs: torch.Tensor, _: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if torch.compiler.is_compiling():
            compiled: torch.Tensor = torch.ops.vllm_sirius.streamed_linear(inputs, handle, number, num_outputs, bias)
            return compiled
        return target.run(number, inputs, bias)

    layer.cpu_linear = linear


def use_streamed_head(head: Any, target: StreamedTarget, numbers: Sequence[int]) -> None:
    """Gives an lm_head the panel kernel on weights that are streamed in pieces.

    Args:
        head: The lm_head. Its plain weight is of no use to it any more.
        target: The streamed layers of the model.
        numbers: Places of its pieces among them.
    """
    head.cpu_linear = lambda inputs, _, bias: target.run_pieces(numbers, inputs, bias)


def use_head_panels(head: Any, panels: bool) -> None:
    """Gives an lm_head the panel kernel. It keeps its plain weight, as upstream has it: the embedding may read it too.

    Args:
        head: What the logits are computed from, or ``None``.
        panels: Whether the target runs on panels.
    """
    if panels and _is_plain_head(head):
        use_panels(head, keep_weight=True)


def refresh_head(head: Any, panels: bool) -> None:
    """Packs an lm_head anew. Upstream forgets one that is tied to an embedding: no weight is loaded into it itself.

    Args:
        head: As in `use_head_panels`.
        panels: As in `use_head_panels`.
    """
    if panels:
        use_head_panels(head, panels)
    elif _is_plain_head(head):
        head.quant_method.process_weights_after_loading(head)


def _is_plain_head(head: Any) -> bool:
    """Whether it keeps its plain weight, which an embedding may read too."""
    is_plain = isinstance(head, VocabParallelEmbedding) and isinstance(head.quant_method, UnquantizedEmbeddingMethod)
    return is_plain and not getattr(head.quant_method, "panels", False)
