"""Linear layers outside of the FFNs that drafts run on quantised copies: attention projections and the lm_head."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from vllm_sirius.draft.kernel_switch import KernelSwitch
from vllm_sirius.kernels.cpu.low_bit_kernels import low_bit_linear
from vllm_sirius.kernels.cpu.low_bit_panel_kernels import panels_linear
from vllm_sirius.weights.low_bit import LowBitRows
from vllm_sirius.weights.low_bit_panels import LowBitPanels

LowBitWeight = LowBitRows | LowBitPanels
"""The copy of a layer's weight, ``[out, in]``: rows of 8 or panels of 4 bits."""


def quantise_linear(weight: torch.Tensor, bits: int) -> LowBitWeight:
    """Quantises a copy of the weight of a linear layer.

    Args:
        weight: ``[out, in]``, floating point.
        bits: 8 or 4.
    """
    return LowBitPanels.quantise(weight) if bits == 4 else LowBitRows.quantise(weight, bits)


def empty_copy(shape: Sequence[int], bits: int) -> LowBitWeight:
    """Memory for a copy of the weight of a linear layer.

    Args:
        shape: ``[out, in]``.
        bits: 8 or 4.
    """
    return LowBitPanels.empty(*shape) if bits == 4 else LowBitRows.empty(bits, shape)


def run_linear(inputs: torch.Tensor, weight: LowBitWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Runs a linear layer on its copy.

    Args:
        inputs: ``[tokens, in]``.
        weight: The copy.
        bias: ``[out]`` or ``None``.

    Returns:
        ``[tokens, out]``.
    """
    if isinstance(weight, LowBitPanels):
        return panels_linear(inputs, weight, bias)
    return low_bit_linear(inputs, weight, bias)


class DraftMode(Protocol):
    """Whoever knows whether a forward pass is a draft, and on what it runs."""

    drafting: bool
    switch: KernelSwitch


class LowBitLinears:
    """The copies, and the switch in the layers.

    Args:
        layers: Copy of each layer's weight, ``[out, in]``, by the layer. A layer's forward takes one input and returns the
            output, with its bias beside it where ``return_bias`` is set, as vLLM's parallel linear layers do.
        head: The lm_head and its copy, or ``None``; it is called through its ``quant_method``.
        max_tokens: Largest draft step that runs on the copies.

    Attributes:
        num_calls: Times that each layer was run on its copy so far.
        num_head_calls: Times that the lm_head was.
    """

    def __init__(
        self,
        layers: Mapping[nn.Module, LowBitWeight],
        head: tuple[nn.Module, LowBitWeight] | None,
        max_tokens: int = 32,
    ) -> None:
        self.max_tokens = max_tokens
        self.layers = list(layers)
        self._rows = list(layers.values())
        self.head = head
        self.num_calls = [0] * len(self.layers)
        self.num_head_calls = 0

    @property
    def num_bytes(self) -> int:
        """Memory of the copies."""
        head = self.head[1].num_bytes if self.head is not None else 0
        return head + sum(rows.num_bytes for rows in self._rows)

    def install(self, mode: DraftMode) -> None:
        """Puts the switch into every layer.

        Args:
            mode: Asked at each forward pass.
        """
        for index, layer in enumerate(self.layers):
            self._switch_layer(layer, index, mode)
        if self.head is not None:
            _switch_head(*self.head, mode, self)

    def run(self, index: int, inputs: torch.Tensor) -> torch.Tensor:
        """Runs one layer on its copy, bias included unless the layer leaves it to its caller.

        Args:
            index: Its place in `layers`.
            inputs: ``[..., in]``.

        Returns:
            ``[..., out]``.
        """
        self.num_calls[index] += 1
        layer: Any = self.layers[index]
        bias = None if layer.skip_bias_add else layer.bias
        output = run_linear(inputs.reshape(-1, inputs.shape[-1]), self._rows[index], bias)
        return output.view(*inputs.shape[:-1], output.shape[-1])

    def takes(self, inputs: torch.Tensor, mode: DraftMode) -> bool:
        """Whether a draft runs a layer on its copy; otherwise on the model's own weight.

        Args:
            inputs: ``[..., in]``.
            mode: Knows the way of the running step.
        """
        return mode.switch.kernels and inputs.numel() <= self.max_tokens * inputs.shape[-1]

    def width(self, index: int) -> int:
        """Width of a layer's input."""
        return self._rows[index].width

    def num_outputs(self, index: int) -> int:
        """Width of a layer's output."""
        weight = self._rows[index]
        return weight.num_outputs if isinstance(weight, LowBitPanels) else weight.packed.shape[0]

    def _switch_layer(self, layer: nn.Module, index: int, mode: DraftMode) -> None:
        upstream = type(layer)

        def forward(self: Any, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            mode, owner = self.sirius_mode, self.sirius_owner
            if mode.drafting and owner.takes(inputs, mode):
                return with_bias(self, owner.run(index, inputs))
            return upstream.forward(self, inputs, *args, **kwargs)

        # On the layer, not on its class: graphs that PyTorch keeps after an engine is gone name the classes of modules.
        vars(layer).update(sirius_mode=mode, sirius_owner=self)
        layer.__class__ = type(f"Sirius{upstream.__name__}", (upstream,), {"forward": forward})


def with_bias(layer: Any, output: torch.Tensor) -> Any:
    """An output in the form that the layer's caller expects.

    Args:
        layer: The layer.
        output: Its output, without the bias if the layer leaves it to its caller.

    Returns:
        The output alone, or with the bias or ``None`` beside it.
    """
    return (output, layer.bias if layer.skip_bias_add else None) if layer.return_bias else output


def _switch_head(head: Any, weight: LowBitWeight, mode: DraftMode, owner: LowBitLinears) -> None:
    upstream = type(head.quant_method)

    def apply(self: Any, layer: nn.Module, inputs: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        mode, owner = self.sirius_mode, self.sirius_owner
        if mode.drafting and owner.takes(inputs, mode):
            owner.num_head_calls += 1
            return run_linear(inputs, self.sirius_weight, bias)
        output: torch.Tensor = upstream.apply(self, layer, inputs, bias)
        return output

    # A method object may serve several layers; the head gets one of its own.
    method = copy.copy(head.quant_method)
    method.__class__ = type(f"Sirius{upstream.__name__}", (upstream,), {"apply": apply})
    method.sirius_mode, method.sirius_owner, method.sirius_weight = mode, owner, weight
    head.quant_method = method
