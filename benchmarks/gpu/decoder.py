"""A decoder with random weights whose FFNs run dense or reduced, on one copy of the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.gpu.glue import add_rms_norm, attend, rotate_and_store, silu_and_mul
from benchmarks.gpu.shapes import Shape
from vllm_sirius.kernels.triton.kernels import coarse_ffn, fine_ffn


@dataclass(frozen=True)
class Layer:
    """Weights and cache of one layer.

    Attributes:
        qkv: ``[(heads + 2 * kv_heads) * head_size, hidden]``.
        output: ``[hidden, heads * head_size]``.
        gate_up: ``[2 * neurons, hidden]``.
        down_rows: ``[neurons, hidden]``; the dense FFN reads the transposed view.
        attention_norm: ``[hidden]``.
        ffn_norm: ``[hidden]``.
        keys: ``[kv_heads, length, head_size]``.
        values: As `keys`.
        order: A random order of the neurons, from which coarse sets are cut, ``int32 [neurons]``.
    """

    qkv: torch.Tensor
    output: torch.Tensor
    gate_up: torch.Tensor
    down_rows: torch.Tensor
    attention_norm: torch.Tensor
    ffn_norm: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    order: torch.Tensor


FFN = Callable[[int, Layer, torch.Tensor], torch.Tensor]
"""Runs the FFN of a layer: its index, the layer, inputs ``[tokens, hidden]``."""


def dense_ffn(index: int, layer: Layer, inputs: torch.Tensor) -> torch.Tensor:
    """The target's FFN."""
    return silu_and_mul(F.linear(inputs, layer.gate_up)) @ layer.down_rows


def coarse(layers: list[Layer], num_kept: int) -> FFN:
    """An FFN that keeps a fixed random set of neurons per layer."""
    kept = [layer.order[:num_kept].sort().values for layer in layers]

    def run(index: int, layer: Layer, inputs: torch.Tensor) -> torch.Tensor:
        return coarse_ffn(inputs, layer.gate_up, layer.down_rows, kept[index], "silu")

    return run


def fine(num_kept: int) -> FFN:
    """An FFN in which each token keeps its largest gates."""

    def run(index: int, layer: Layer, inputs: torch.Tensor) -> torch.Tensor:
        return fine_ffn(inputs, layer.gate_up, layer.down_rows, num_kept, "silu")

    return run


class Decoder:
    """A stack of layers with embedding and output head, for one sequence.

    Args:
        shape: Its sizes.
        num_layers: Layers to build.
        length: Slots of the KV cache.
        device: Where it lives.
        dtype: Dtype of weights and cache.
    """

    def __init__(
        self, shape: Shape, num_layers: int, length: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.shape = shape
        self.length = length
        self.device = device
        self.dtype = dtype
        self.head = self._random(shape.vocab_size, shape.hidden_size)
        self.final_norm = self._ones()
        self.layers = [self._layer() for _ in range(num_layers)]

    def _random(self, *sizes: int) -> torch.Tensor:
        weight = torch.empty(*sizes, dtype=self.dtype, device=self.device)
        return weight.normal_(std=sizes[-1] ** -0.5)

    def _ones(self) -> torch.Tensor:
        return torch.ones(self.shape.hidden_size, dtype=self.dtype, device=self.device)

    def _layer(self) -> Layer:
        shape = self.shape
        heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_size
        cache = (shape.num_kv_heads, self.length, shape.head_size)
        return Layer(
            self._random(heads, shape.hidden_size),
            self._random(shape.hidden_size, shape.num_heads * shape.head_size),
            self._random(2 * shape.num_neurons, shape.hidden_size),
            self._random(shape.num_neurons, shape.hidden_size),
            self._ones(),
            self._ones(),
            self._random(*cache),
            self._random(*cache),
            torch.randperm(shape.num_neurons, device=self.device).to(torch.int32),
        )

    def step(self, token_ids: torch.Tensor, positions: torch.Tensor, ffn: FFN) -> torch.Tensor:
        """Runs the tokens that end the sequence.

        Args:
            token_ids: ``int64 [tokens]``.
            positions: ``int64 [tokens]``.
            ffn: How FFNs run.

        Returns:
            Logits, ``[tokens, vocabulary]``.
        """
        residual = self.head[token_ids]
        delta = None
        for index, layer in enumerate(self.layers):
            hidden = add_rms_norm(residual, delta, layer.attention_norm)
            delta = self._attend(layer, hidden, positions)
            hidden = add_rms_norm(residual, delta, layer.ffn_norm)
            delta = ffn(index, layer, hidden)
        return F.linear(add_rms_norm(residual, delta, self.final_norm), self.head)

    def _attend(self, layer: Layer, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        qkv = F.linear(hidden, layer.qkv)
        queries = rotate_and_store(qkv, positions, layer.keys, layer.values, self.shape.num_heads)
        return F.linear(attend(queries, positions, layer.keys, layer.values), layer.output)
