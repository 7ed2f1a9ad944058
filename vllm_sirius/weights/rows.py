"""Copies of FFN weights by row, for kernels that read only the kept neurons.

vLLM's CPU build packs the weights once they are loaded and drops the plain ones, so there the draft needs rows of its own:
the one place where Sirius makes the model larger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_sirius.sparsity.coarse import num_kept_neurons
from vllm_sirius.weights.memory import empty_on_huge_pages

Index = slice | tuple[slice | int, ...]


@dataclass(frozen=True)
class RowLayout:
    """Which of an FFN's rows is where: what a kernel reads together lies together.

    Attributes:
        shape: Shape of all rows, ``[..., hidden]``.
        gate: Index of the gate rows, by neuron, as those of `up` and `down`.
        up: Index of the up rows.
        down: Index of the down projection's rows.
    """

    shape: tuple[int, ...]
    gate: Index
    up: Index
    down: Index


def by_neuron(num_neurons: int, hidden_size: int) -> RowLayout:
    """The gate, up and down row of a neuron next to each other: ``[neurons, 3, hidden]``."""
    every = slice(None)
    return RowLayout((num_neurons, 3, hidden_size), (every, 0), (every, 1), (every, 2))


def gates_first(num_neurons: int, hidden_size: int) -> RowLayout:
    """The gate rows, of which fine sparsity reads all, then the up and down row of each neuron: ``[3 * neurons, hidden]``."""
    gate, up, down = slice(num_neurons), slice(num_neurons, None, 2), slice(num_neurons + 1, None, 2)
    return RowLayout((3 * num_neurons, hidden_size), gate, up, down)


def neuron_rows(
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_first: bool = True,
    layout: Callable[[int, int], RowLayout] = by_neuron,
) -> torch.Tensor:
    """Lays out the three weight rows of each neuron.

    Args:
        gate_up: Merged projection, ``[2 * neurons, hidden]``.
        down: Down projection, ``[hidden, neurons]``.
        gate_first: Whether the gate is the first half of `gate_up`.
        layout: `by_neuron` or `gates_first`.

    Returns:
        The rows, contiguous.
    """
    hidden_size, num_neurons = down.shape
    place = layout(num_neurons, hidden_size)
    rows = empty_rows(place, down)
    for where, values in (*gate_up_rows(place, gate_up, gate_first), (place.down, down.t())):
        rows[where] = values
    return rows


def empty_rows(place: RowLayout, like: torch.Tensor) -> torch.Tensor:
    """Allocates the rows of an FFN.

    Args:
        place: Their layout.
        like: A weight with their dtype and device.
    """
    if like.is_cpu:
        return empty_on_huge_pages(place.shape, like.dtype)
    return torch.empty(place.shape, dtype=like.dtype, device=like.device)


def gate_up_rows(place: RowLayout, gate_up: torch.Tensor, gate_first: bool) -> list[tuple[Index, torch.Tensor]]:
    """Where the two halves of a merged projection go.

    Args:
        place: The layout of the rows.
        gate_up: Merged projection, ``[2 * neurons, hidden]``.
        gate_first: Whether the gate is its first half.

    Returns:
        Index in the rows and ``[neurons, hidden]``, of the gate and of up.
    """
    first, second = gate_up.split(gate_up.shape[0] // 2)
    gate, up = (first, second) if gate_first else (second, first)
    return [(place.gate, gate), (place.up, up)]


def rows_read(num_neurons: int, density: float, sparsity: str) -> int:
    """Weight rows of an FFN that a draft step of one token reads, of the three that each neuron has.

    Args:
        num_neurons: Neurons of the FFN.
        density: Part of them that the draft keeps.
        sparsity: ``coarse``; ``fine``, which reads all gates; or ``none``, which reads everything.
    """
    if sparsity == "none":
        return 3 * num_neurons
    kept = num_kept_neurons(density, num_neurons)
    return 3 * kept if sparsity == "coarse" else num_neurons + 2 * kept


def store_as_rows(down: nn.Module) -> torch.Tensor:
    """Stores a down projection by neuron; its own weight becomes the transposed view of the same memory.

    Args:
        down: A linear layer with the plain parameter ``weight [hidden, neurons]``. What is later copied into that parameter
            in place reaches the rows as well.

    Returns:
        ``[neurons, hidden]``, contiguous.
    """
    weight: Any = down.weight
    rows: torch.Tensor = weight.data.t().contiguous()
    weight.data = rows.t()
    return rows


def neuron_norms(down: torch.Tensor) -> torch.Tensor:
    """What each neuron's activation is worth in the output: ``||down_j||**2``.

    Args:
        down: Down projection, ``[hidden, neurons]``.

    Returns:
        ``float32 [neurons]``.
    """
    return down.float().square().sum(dim=0)
