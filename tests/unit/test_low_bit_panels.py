"""The CPU kernels on 4-bit panels compute what their PyTorch twins compute, whatever the batch."""

from __future__ import annotations

import os
import random
import shutil

import pytest
import torch

from vllm_sirius.kernels import low_bit_panels_reference as reference
from vllm_sirius.kernels.activation import Activation
from vllm_sirius.kernels.cpu.low_bit_panel_kernels import panels_ffn, panels_linear
from vllm_sirius.weights.low_bit import LowBitRows
from vllm_sirius.weights.low_bit_panels import LowBitPanels, interleave

HAS_COMPILER = bool(os.environ.get("CXX")) or any(shutil.which(name) for name in ("g++", "clang++", "c++"))
pytestmark = [
    pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("fresh_input", "one_or_two_threads"),
]

SHAPES = [(1, 1), (17, 33), (40, 300), (300, 256), (33, 641)]
NUM_TOKENS = (1, 2, 3, 4, 5, 8, 9, 17, 33)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(num_outputs: int, width: int) -> LowBitPanels:
    return LowBitPanels.quantise(torch.randn(num_outputs, width) / width**0.5)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """One unit in the last place of the output, and fp32 sums in another order."""
    return {"rtol": {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype], "atol": 1e-4}


@pytest.mark.parametrize(("num_outputs", "width"), [*SHAPES, (5000, 130)])
def test_panels_round_as_rows_do(num_outputs, width):
    weight = torch.randn(num_outputs, width)
    panels, rows = LowBitPanels.quantise(weight), LowBitRows.quantise(weight, 4)
    assert torch.equal(panels.rows().packed, rows.packed)
    assert torch.equal(panels.rows().scales, rows.scales)
    assert panels.rows().width == width
    assert panels.num_bytes == panels.blocks.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_outputs", "width"), SHAPES)
def test_linear_matches_its_twin(num_outputs, width, dtype):
    panels = draw(num_outputs, width)
    for tokens in NUM_TOKENS:
        inputs = torch.randn(tokens, width).to(dtype)
        for bias in (None, torch.randn(num_outputs)):
            actual, expected = panels_linear(inputs, panels, bias), reference.linear(inputs, panels, bias)
            assert actual.dtype == dtype
            torch.testing.assert_close(actual, expected, **tolerance(dtype))


@pytest.mark.parametrize("activation", tuple(Activation))
@pytest.mark.parametrize(("num_neurons", "width"), SHAPES)
def test_ffn_matches_its_twin(num_neurons, width, activation):
    gate, up, down = draw(num_neurons, width), draw(num_neurons, width), draw(width, num_neurons)
    dtype = random.choice(DTYPES)
    for tokens in NUM_TOKENS:
        inputs = torch.randn(tokens, width).to(dtype)
        actual = panels_ffn(inputs, interleave(gate, up), down, activation).float()
        expected = reference.ffn(inputs, gate, up, down, activation).float()
        # A hidden value on a rounding boundary may come out one step apart: 1 / 127 of the largest of its 64 neurons, in a
        # few places; a wrong scale, neuron or sign is wrong everywhere. Where GELU's tail cancels to next to nothing (1e-6 of
        # its input), no digit of it is certain, and a single neuron may have nothing else.
        largest = expected.abs().amax(-1, keepdim=True)
        wrong = (actual - expected).abs() > 0.02 * expected.abs() + 0.02 * largest + 1e-5
        assert wrong.float().mean() < 0.01
        assert (actual - expected).norm() <= 0.01 * expected.norm() + 1e-6


def test_a_token_does_not_depend_on_its_company():
    gate, up, down = draw(150, 200), draw(150, 200), draw(200, 150)
    gate_up = interleave(gate, up)
    inputs = torch.randn(40, 200)
    together, together_linear = panels_ffn(inputs, gate_up, down, "silu"), panels_linear(inputs, gate)
    for tokens in (1, 2, 3, 7, 20, 33):
        torch.set_num_threads(random.choice((1, 2)))
        assert torch.equal(panels_ffn(inputs[:tokens], gate_up, down, "silu"), together[:tokens])
        assert torch.equal(panels_linear(inputs[:tokens], gate), together_linear[:tokens])


def test_what_does_not_fit_is_refused():
    gate, down = draw(32, 200), draw(200, 32)
    with pytest.raises(ValueError, match=r"inputs must be .* \[tokens, 200\]"):
        panels_linear(torch.zeros(2, 199), gate)
    with pytest.raises(ValueError, match="bias must be"):
        panels_linear(torch.zeros(2, 200), gate, torch.zeros(31))
    with pytest.raises(ValueError, match="gate and up must be contiguous panels"):
        panels_ffn(torch.zeros(2, 200), gate.blocks, down, "silu")
    assert panels_linear(torch.zeros(0, 200), gate).shape == (0, 32)


@pytest.mark.parametrize("shape", [(16, 128), (17, 129), (40, 300)])
def test_sizes_are_known_before_panels_exist_and_panels_are_overwritten_in_place(shape):
    panels, other = (LowBitPanels.quantise(torch.randn(shape)) for _ in range(2))
    assert panels.num_bytes == LowBitPanels.bytes_of(*shape)
    place = panels.blocks.data_ptr()
    panels.take(other)
    assert panels.blocks.data_ptr() == place
    assert torch.equal(panels.blocks, other.blocks)
