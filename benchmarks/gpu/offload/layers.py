"""Layers whose matrices lie in one stretch of memory, so that a layer is one copy."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.gpu.shapes import Shape

EPSILON = 1e-5
"""Of the norms."""

ALIGNMENT = 128
"""Matrices begin at multiples of so many elements: 256 bytes in bf16, what matrix kernels like best."""

Linear = Callable[[torch.Tensor], torch.Tensor]
"""A linear layer: inputs ``[tokens, columns]`` to outputs ``[tokens, rows]``."""


class Matrices(NamedTuple):
    """The linear layers of a decoder layer, however they store their weights.

    Attributes:
        qkv: ``[(heads + 2 * kv_heads) * head_size, hidden]``.
        output: ``[hidden, heads * head_size]``.
        gate_up: ``[2 * neurons, hidden]``.
        down: ``[hidden, neurons]``.
    """

    qkv: Linear
    output: Linear
    gate_up: Linear
    down: Linear


def matrix_sizes(shape: Shape) -> tuple[tuple[int, int], ...]:
    """Rows and columns of a layer's matrices, in the order of `Matrices`."""
    query_size = shape.num_heads * shape.head_size
    return (
        (query_size + 2 * shape.num_kv_heads * shape.head_size, shape.hidden_size),
        (shape.hidden_size, query_size),
        (2 * shape.num_neurons, shape.hidden_size),
        (shape.hidden_size, shape.num_neurons),
    )


def layer_elements(shape: Shape) -> int:
    """Elements of the stretch of memory that holds a layer."""
    return sum(_aligned(rows * columns) for rows, columns in matrix_sizes(shape))


def weights_in(shape: Shape, memory: torch.Tensor) -> list[torch.Tensor]:
    """A layer's matrices, ``[rows, columns]`` each, as views.

    Args:
        shape: Sizes.
        memory: ``[layer_elements(shape)]``.
    """
    views, begin = [], 0
    for rows, columns in matrix_sizes(shape):
        views.append(memory[begin : begin + rows * columns].view(rows, columns))
        begin += _aligned(rows * columns)
    return views


def dense(shape: Shape, memory: torch.Tensor) -> Matrices:
    """Linear layers that read their weights from a stretch of memory, whatever is in it when they run."""
    return Matrices(*(partial(F.linear, weight=weight) for weight in weights_in(shape, memory)))


def fill(shape: Shape, memory: torch.Tensor) -> None:
    """Writes random weights that keep the variance of their inputs."""
    for weight in weights_in(shape, memory):
        weight.normal_(std=1 / math.sqrt(weight.shape[1]))


def run_layer(shape: Shape, matrices: Matrices, hidden: torch.Tensor) -> torch.Tensor:
    """Norms, the four linear layers and the FFN's activation.

    Attention is left out, because a stream of weights has nothing to do with it: the output projection reads the queries.

    Args:
        shape: Sizes.
        matrices: Weights.
        hidden: ``[tokens, hidden]``.

    Returns:
        As `hidden`.
    """
    queries = matrices.qkv(_normed(hidden))[:, : shape.num_heads * shape.head_size]
    hidden = hidden + matrices.output(queries)
    gate, up = matrices.gate_up(_normed(hidden)).chunk(2, dim=-1)
    return hidden + matrices.down(F.silu(gate) * up)


def _normed(hidden: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden, hidden.shape[-1:], eps=EPSILON)


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT
