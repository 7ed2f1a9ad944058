"""Kernels hand over to the model's own layers at the batch from which these are measured to be faster."""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vllm_sirius.ffn import kernel_switch


class Layer(nn.Module):
    """Takes a millisecond for each row with kernels, and `dense` milliseconds without, whatever the rows."""

    def __init__(self, owner: SimpleNamespace, dense: float) -> None:
        super().__init__()
        self.owner, self.dense, self.input_size = owner, dense, 8

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.shape[0]
        time.sleep((rows if rows <= self.owner.max_tokens else self.dense) / 1000)
        return inputs


def measured(dense: float, most: int, most_rows: int, num_parameters: int = 1 << 24) -> tuple[int, int]:
    """Largest batches of FFNs and linear layers after the measurement."""
    backend, linears = SimpleNamespace(max_tokens=most), SimpleNamespace(max_tokens=most)
    linears.layers = [Layer(linears, dense)]
    ffn = SimpleNamespace(module=Layer(backend, dense), hidden_size=8, num_parameters=num_parameters)
    ffns = SimpleNamespace(backend=backend, linears=linears, ffns=[ffn], draft_mode=nullcontext)
    kernel_switch.measure_switch(ffns, most_rows, torch.float32)
    return backend.max_tokens, linears.max_tokens


@pytest.mark.parametrize(
    ("dense", "most", "most_rows", "expected"),
    [(5.5, 32, 64, 4), (11.0, 32, 64, 8), (45.0, 32, 64, 32), (0.1, 32, 64, 1), (5.5, 32, 4, 32), (5.5, 4, 64, 4)],
)
def test_the_last_faster_batch_is_found(dense, most, most_rows, expected):
    assert measured(dense, most, most_rows) == (expected, expected)


def test_small_models_are_not_measured():
    assert measured(0.1, 32, 64, num_parameters=1 << 20) == (32, 32)
