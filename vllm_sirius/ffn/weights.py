"""Neuron-major copies of FFN weights, for kernels that read only the kept neurons.

vLLM's CPU build packs the weights once they are loaded and drops the plain ones, so there the draft needs rows of its own:
the one place where Sirius makes the model larger.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def neuron_rows(gate_up: torch.Tensor, down: torch.Tensor, gate_first: bool = True) -> torch.Tensor:
    """Lays the three weight rows of each neuron next to each other.

    Args:
        gate_up: Merged projection, ``[2 * neurons, hidden]``.
        down: Down projection, ``[hidden, neurons]``.
        gate_first: Whether the gate is the first half of `gate_up`.

    Returns:
        ``[neurons, 3, hidden]``, contiguous: gate, up and down row of each neuron.
    """
    num_neurons = down.shape[1]
    halves = gate_up.split(num_neurons)
    gate, up = halves if gate_first else halves[::-1]
    rows = torch.empty(num_neurons, 3, down.shape[0], dtype=down.dtype, device=down.device)
    rows[:, 0], rows[:, 1], rows[:, 2] = gate, up, down.t()
    return rows


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
