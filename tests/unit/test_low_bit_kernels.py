"""The CPU kernels on quantised rows compute what their PyTorch twins compute."""

from __future__ import annotations

import ctypes
import os
import platform
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from vllm_sirius.kernels import low_bit_panels_reference
from vllm_sirius.kernels import low_bit_reference as reference
from vllm_sirius.kernels.activation import Activation
from vllm_sirius.kernels.cpu import low_bit_kernels, low_bit_panel_kernels
from vllm_sirius.kernels.cpu.low_bit_kernels import low_bit_coarse_ffn, low_bit_fine_ffn, low_bit_linear
from vllm_sirius.weights.low_bit import LowBitRows
from vllm_sirius.weights.low_bit_panels import LowBitPanels
from vllm_sirius.weights.rows import gates_first

BITS = (8, 4)
WIDTHS = (1, 130, 897)
NUM_NEURONS = (5, 90)
NUM_TOKENS = (1, 3, 8, 33)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = tuple(Activation)

HAS_COMPILER = bool(os.environ.get("CXX")) or any(shutil.which(name) for name in ("g++", "clang++", "c++"))
pytestmark = [
    pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("fresh_input", "one_thread"),
]


@dataclass(frozen=True)
class Case:
    """One random quantised FFN and its input."""

    inputs: torch.Tensor
    rows: LowBitRows
    activation: Activation

    @classmethod
    def draw(cls, bits: int, tokens: int, width: int, neurons: int, dtype: torch.dtype, activation: Activation) -> Case:
        rows = LowBitRows.quantise(torch.randn(neurons, 3, width) / width**0.5, bits)
        return cls(torch.randn(tokens, width).to(dtype), rows, activation)

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate before its activation, up, and down rows, fp32."""
        weights, inputs = self.rows.dequantise(), reference.round_inputs(self.inputs)
        return inputs @ weights[:, 0].T, inputs @ weights[:, 1].T, weights[:, 2]


def with_gates_first(rows: LowBitRows) -> LowBitRows:
    """The rows as the kernel for fine sparsity reads them."""
    place = gates_first(rows.shape[0], rows.width)
    result = LowBitRows.empty(rows.bits, place.shape)
    for to, part in ((result.packed, rows.packed), (result.scales, rows.scales)):
        to[place.gate], to[place.up], to[place.down] = part.unbind(1)
    return result


def random_subset(neurons: int, kept: int) -> torch.Tensor:
    return torch.randperm(neurons)[:kept].sort().values.to(torch.int32)


def assert_close(case: Case, actual: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> None:
    """Kernel and twin may differ by what `low_bit_reference` states.

    That is: fp32 sums in another order, two hidden values that rounded to the next byte, one unit in the last place of
    the output.

    Args:
        case: The FFN.
        actual: ``[tokens, hidden]`` of the kernel.
        expected: The same of the twin.
        mask: ``[tokens, neurons]``, 1 where a neuron is kept.
    """
    assert actual.dtype == case.inputs.dtype
    assert actual.shape == case.inputs.shape
    gate, up, down = case.parts()
    hidden = (case.activation.function(gate) * up * mask).abs()
    summation = 1e-5 * ((1 + gate.abs()) * (1 + up.abs()) * mask) @ down.abs()
    scales = case.rows.column_scales()[:, 2].abs()
    scales = scales.expand(-1, case.rows.integers().shape[-1])[:, : case.rows.width]
    # A hidden value is off by one byte of its group: a 127th of the group's largest.
    step = torch.stack([(token[:, None] * scales).amax(0) / 127 for token in hidden])
    largest = case.rows.integers()[:, 2, : case.rows.width].abs().amax(0)
    unit = torch.finfo(case.inputs.dtype)
    last_place = unit.eps * torch.maximum(expected.float().abs(), actual.float().abs())
    allowed = summation + 2 * step * largest + last_place + unit.smallest_normal
    error = (actual.float() - expected.float()).abs()
    sizes = f"{case.rows.bits} bits, {tuple(case.inputs.shape)} of {down.shape[0]} neurons"
    assert (error <= allowed).all(), f"{sizes}: off by {error.max():.3g}"


def assert_coarse(case: Case, indices: torch.Tensor | None) -> None:
    actual = low_bit_coarse_ffn(case.inputs, case.rows, indices, case.activation)
    expected = reference.coarse_ffn(case.inputs, case.rows, indices, case.activation)
    mask = torch.zeros(case.inputs.shape[0], case.rows.shape[0])
    mask[:, slice(None) if indices is None else indices.long()] = 1.0
    assert_close(case, actual, expected, mask)


def assert_fine(case: Case, num_kept: int) -> None:
    gate, _, _ = case.parts()
    magnitude = case.activation.function(gate).abs()
    order = magnitude.sort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(gate).scatter_(-1, order.indices[:, :num_kept], 1.0)
    # Where the cut runs between nearly equal magnitudes, the order of summation decides. Another neuron in the union
    # shifts the groups of all tokens, so such a case says nothing.
    if 0 < num_kept < gate.shape[1] and (order.values[:, num_kept - 1] - order.values[:, num_kept]).min() < 1e-5:
        return
    actual = low_bit_fine_ffn(case.inputs, with_gates_first(case.rows), num_kept, case.activation)
    expected = reference.fine_ffn(case.inputs, case.rows, num_kept, case.activation)
    assert_close(case, actual, expected, mask)


def assert_both(
    bits: int, tokens: int, width: int, neurons: int, dtype: torch.dtype, activation: Activation = Activation.SILU
) -> None:
    case = Case.draw(bits, tokens, width, neurons, dtype, activation)
    assert_coarse(case, None)
    for kept in sorted({0, 1, random.randint(0, neurons), neurons}):
        assert_coarse(case, random_subset(neurons, kept))
        assert_fine(case, kept)


def assert_linear(bits: int, tokens: int, width: int, num_rows: int, dtype: torch.dtype) -> None:
    inputs = torch.randn(tokens, width).to(dtype)
    weights = LowBitRows.quantise(torch.randn(num_rows, width) / width**0.5, bits)
    for bias in (None, torch.randn(num_rows), torch.randn(num_rows).to(dtype)):
        actual = low_bit_linear(inputs, weights, bias)
        expected = reference.linear(inputs, weights, bias)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ffns_equal_their_twins(bits: int, dtype: torch.dtype, activation: Activation) -> None:
    for width in WIDTHS:
        for neurons in NUM_NEURONS:
            for tokens in NUM_TOKENS:
                assert_both(bits, tokens, width, neurons, dtype, activation)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_equals_its_twin(bits: int, dtype: torch.dtype) -> None:
    for width in (*WIDTHS, 5000):
        for num_rows in (1, 3, 16, 77):
            for tokens in (*NUM_TOKENS, 71):
                assert_linear(bits, tokens, width, num_rows, dtype)


@pytest.mark.parametrize("bits", BITS)
def test_many_neurons_and_wide_rows(bits: int) -> None:
    assert_both(bits, 3, 256, 1500, torch.bfloat16)
    assert_both(bits, 5, 6000, 40, torch.float32)


@pytest.mark.parametrize("bits", BITS)
def test_keeping_all_is_near_the_dense_ffn(bits: int) -> None:
    """Rounding of inputs and hidden values to bytes costs about 1 % of the output, a wrong column far more."""
    case = Case.draw(bits, 6, 300, 200, torch.float32, Activation.SILU)
    weights = case.rows.dequantise()
    gate, up = (case.inputs @ weights[:, which].T for which in (0, 1))
    dense = (torch.nn.functional.silu(gate) * up) @ weights[:, 2]
    for output in (
        low_bit_coarse_ffn(case.inputs, case.rows, None, "silu"),
        low_bit_fine_ffn(case.inputs, with_gates_first(case.rows), 200, "silu"),
    ):
        assert (output - dense).norm() < 0.02 * dense.norm()


@pytest.mark.parametrize("bits", BITS)
def test_no_tokens_no_neurons_and_zero_inputs(bits: int) -> None:
    rows = LowBitRows.quantise(torch.randn(8, 3, 64), bits)
    linear = LowBitRows.quantise(torch.randn(8, 64), bits)
    fine_rows = with_gates_first(rows)
    nothing = torch.randn(0, 64)
    assert low_bit_coarse_ffn(nothing, rows, random_subset(8, 4), "silu").shape == (0, 64)
    assert low_bit_fine_ffn(nothing, fine_rows, 4, "silu").shape == (0, 64)
    assert low_bit_linear(nothing, linear).shape == (0, 8)
    inputs = torch.randn(3, 64)
    assert not low_bit_coarse_ffn(inputs, rows, random_subset(8, 0), "silu").any()
    assert not low_bit_fine_ffn(inputs, fine_rows, 0, "silu").any()
    zeros = torch.zeros(3, 64)
    assert not low_bit_coarse_ffn(zeros, rows, None, "silu").any()
    assert not low_bit_fine_ffn(zeros, fine_rows, 3, "silu").any()
    bias = torch.randn(8)
    assert torch.equal(low_bit_linear(zeros, linear, bias), bias.expand(3, -1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing_but_rounding(bits: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for tokens in (1, 3, 32):
        for neurons in (3, 176):
            assert_both(bits, tokens, 200, neurons, torch.bfloat16)
            assert_linear(bits, tokens, 200, neurons, torch.bfloat16)
    case = Case.draw(bits, 4, 200, 176, torch.bfloat16, Activation.SILU)
    indices = random_subset(176, 88)
    coarse = [low_bit_coarse_ffn(case.inputs, case.rows, indices, "silu") for _ in range(5)]
    fine = [low_bit_fine_ffn(case.inputs, with_gates_first(case.rows), 88, "silu") for _ in range(5)]
    assert all(torch.equal(output, coarse[0]) for output in coarse)
    assert all(torch.equal(output, fine[0]) for output in fine)


def test_strided_inputs_are_accepted() -> None:
    inputs = torch.randn(3, 128)[:, ::2]
    rows = LowBitRows.quantise(torch.randn(20, 64), 4)
    assert torch.equal(low_bit_linear(inputs, rows), low_bit_linear(inputs.contiguous(), rows))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
@pytest.mark.parametrize("option", ["-mno-avx512vnni", "-mno-avx512f", "-mno-avx512f -mno-avxvnni", "-mno-avx2"])
def test_older_processors(
    option: str, library_without: Callable[[str], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = library_without(option)
    monkeypatch.setattr(low_bit_kernels, "load_library", lambda: library)
    for bits in BITS:
        for dtype in DTYPES:
            for tokens, width, neurons in ((1, 1, 1), (3, 33, 5), (17, 200, 50)):
                assert_both(bits, tokens, width, neurons, dtype)
                assert_linear(bits, tokens, width, neurons, dtype)
    monkeypatch.setattr(low_bit_panel_kernels, "load_library", lambda: library)
    for tokens, width, outputs in ((1, 1, 1), (3, 300, 17), (17, 200, 50)):
        inputs, panels = torch.randn(tokens, width), LowBitPanels.quantise(torch.randn(outputs, width))
        actual = low_bit_panel_kernels.panels_linear(inputs, panels)
        torch.testing.assert_close(actual, low_bit_panels_reference.linear(inputs, panels), rtol=1e-4, atol=1e-4)
    assert bool(library.sirius_panel_products()) == (option == "-mno-avx512vnni")


def test_wrong_arguments_are_refused() -> None:
    inputs = torch.randn(2, 16)
    rows = LowBitRows.quantise(torch.randn(4, 3, 16), 4)
    fine_rows = with_gates_first(rows)
    linear = LowBitRows.quantise(torch.randn(4, 16), 4)
    indices = torch.arange(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="indices must be contiguous int32"):
        low_bit_coarse_ffn(inputs, rows, indices.long(), "silu")
    with pytest.raises(ValueError, match="inputs must be"):
        low_bit_coarse_ffn(inputs.double(), rows, indices, "silu")
    with pytest.raises(ValueError, match="inputs must be"):
        low_bit_fine_ffn(inputs[:, :8], fine_rows, 2, "silu")
    with pytest.raises(ValueError, match="3 dimensions"):
        low_bit_coarse_ffn(inputs, linear, indices, "silu")
    with pytest.raises(ValueError, match="2 dimensions"):
        low_bit_linear(inputs, rows)
    with pytest.raises(ValueError, match=r"\[neurons, 3, hidden\]"):
        low_bit_coarse_ffn(inputs, LowBitRows.quantise(torch.randn(4, 2, 16), 4), indices, "silu")
    with pytest.raises(ValueError, match="2 dimensions"):
        low_bit_fine_ffn(inputs, rows, 2, "silu")
    with pytest.raises(ValueError, match=r"\[3 \* neurons, hidden\]"):
        low_bit_fine_ffn(inputs, linear, 1, "silu")
    with pytest.raises(ValueError, match="num_kept must lie"):
        low_bit_fine_ffn(inputs, fine_rows, 5, "silu")
    with pytest.raises(ValueError, match="relu"):
        low_bit_fine_ffn(inputs, fine_rows, 2, "relu")
    with pytest.raises(ValueError, match="bias must be"):
        low_bit_linear(inputs, linear, torch.randn(5))
    for outside in (4, -1):
        with pytest.raises(IndexError, match=r"\[0, 4\)"):
            low_bit_coarse_ffn(inputs, rows, torch.tensor([0, outside], dtype=torch.int32), "silu")
