"""Operators of Sirius in compiled graphs, and how they find the engine that runs. Attaches to ``vllm.forward_context``.

vLLM keeps compiled graphs on disk, and PyTorch keeps them in the process, so a graph runs in other engines than the one that it
was made for: it may name a layer, and never an engine. Whose switch is meant says the forward context of the running
pass, which refers to the registry of layers in the engine's own config, as attention layers are found.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from vllm.forward_context import get_forward_context

from vllm_sirius.draft.layer import ReducedFFNs

SWITCH = "vllm_sirius.switch"
"""Name of the switch in an engine's registry of layers; no module of a model is called so."""


def register_switch(vllm_config: Any, ffns: ReducedFFNs) -> None:
    """Lets compiled graphs find an engine's switch.

    Args:
        vllm_config: The engine's config.
        ffns: The switch. It is referred to weakly, so that a model and its copies of weights go with their engine.
    """
    vllm_config.compilation_config.static_forward_context[SWITCH] = weakref.ref(ffns)


def running_switch() -> ReducedFFNs:
    """The switch of the engine whose forward pass runs."""
    reference = get_forward_context().no_compile_layers.get(SWITCH)
    ffns: ReducedFFNs | None = reference() if reference is not None else None
    assert ffns is not None, "a compiled graph of Sirius runs in an engine without its switch"
    return ffns


@torch.library.custom_op("vllm_sirius::observe_ffn", mutates_args=("marker",))
def _observe_ffn(activation: torch.Tensor, marker: torch.Tensor, layer: int) -> None:
    """Shows activations to the statistics of the running engine.

    `marker` stands for what changes; naming it keeps the compiler from dropping or reordering the call. The tables
    themselves would bring their size into the graph.
    """
    statistics = running_switch().statistics
    assert statistics is not None, "a graph that observes activations runs in an engine without statistics"
    if statistics.observing:
        statistics.observe(layer, activation)


@_observe_ffn.register_fake
def _(activation: torch.Tensor, marker: torch.Tensor, layer: int) -> None:
    return None


@torch.library.custom_op("vllm_sirius::reduced_ffn", mutates_args=())
def _reduced_ffn(hidden_states: torch.Tensor, layer: int) -> torch.Tensor:
    """One reduced FFN by native kernels, opaque to the compiler."""
    ffns = running_switch()
    if not ffns.is_native(hidden_states.shape[0]):
        # The model's own FFN, which knows that a draft is running.
        masked: torch.Tensor = ffns.ffns[layer].module(hidden_states)
        return masked
    return ffns.run_native(layer, hidden_states)


@_reduced_ffn.register_fake
def _(hidden_states: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty_like(hidden_states)


@torch.library.custom_op("vllm_sirius::low_bit_linear", mutates_args=())
def _low_bit_linear(inputs: torch.Tensor, index: int, num_outputs: int) -> torch.Tensor:
    """One linear layer on its quantised copy, opaque to the compiler."""
    ffns = running_switch()
    linears = ffns.linears
    assert linears is not None, "a graph of copied linear layers runs in an engine that copies none"
    if not linears.takes(inputs, ffns):
        output: Any = linears.layers[index](inputs)
        dense: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return dense
    return linears.run(index, inputs)


@_low_bit_linear.register_fake
def _(inputs: torch.Tensor, index: int, num_outputs: int) -> torch.Tensor:
    return inputs.new_empty(*inputs.shape[:-1], num_outputs)
