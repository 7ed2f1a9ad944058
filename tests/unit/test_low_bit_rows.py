"""Quantised rows: layout, accuracy, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from vllm_sirius.weights.low_bit import CHUNK_WEIGHTS, SPAN, LowBitRows

pytestmark = pytest.mark.usefixtures("fresh_input")

BITS = (8, 4)
WIDTHS = (1, 7, 64, 65, 128, 129, 896, 1537)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_within_half_a_step(bits: int, width: int, dtype: torch.dtype) -> None:
    rows = torch.randn(11, 3, width).to(dtype)
    low = LowBitRows.quantise(rows, bits)
    assert low.shape == rows.shape
    scales = low.column_scales()[..., :width].abs()
    error = (low.dequantise() - rows.float()).abs()
    rounded = low.integers()[..., :width]
    clipped = rounded.eq(7) | rounded.eq(-8) if bits == 4 else torch.zeros_like(rounded, dtype=torch.bool)
    assert (error <= scales * (0.5 + 1e-4))[~clipped].all()
    assert low.integers()[..., width:].eq(0).all(), "padding must be zero"


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.012), (4, 0.095)])
def test_error_on_normal_weights(bits: int, bound: float) -> None:
    """4 bits: a scale that maps the largest magnitude to 7 has 0.108, the best of a few less."""
    rows = torch.randn(200, 1536)
    error = (LowBitRows.quantise(rows, bits).dequantise() - rows).norm() / rows.norm()
    assert error < bound


@pytest.mark.parametrize("bits", BITS)
def test_representable_rows_are_kept(bits: int) -> None:
    largest = 127 if bits == 8 else 8
    rows = torch.randint(-largest, largest, (50, 2 * SPAN)).float()
    rows[:, ::SPAN] = -largest
    rows = rows * 2.0 ** torch.randint(-20, 20, (50, 1))
    assert torch.equal(LowBitRows.quantise(rows, bits).dequantise(), rows)


def test_layout_of_bytes() -> None:
    rows = torch.randint(-8, 8, (1, 200)).float()
    rows[0, ::SPAN] = -8.0
    low = LowBitRows.quantise(rows, 4)
    assert low.packed.shape == (1, 128)
    assert low.scales.shape == (1, 4)
    for column in range(200):
        byte = int(low.packed[0, column // 128 * 64 + column % 64])
        stored = byte >> 4 if column % 128 >= 64 else byte & 15
        assert stored - 8 == rows[0, column], column
    rows[0, 0] = -127.0
    low = LowBitRows.quantise(rows, 8)
    assert low.packed.shape == (1, 256)
    assert torch.equal(low.packed[0, :200].float() - 128.0, rows[0])


@pytest.mark.parametrize(("bits", "expected"), [(8, 8.03), (4, 4.25)])
def test_bytes_are_counted(bits: int, expected: float) -> None:
    low = LowBitRows.quantise(torch.randn(40, 3, 1536), bits)
    assert low.num_bytes == low.packed.numel() + low.scales.numel() * low.scales.element_size()
    assert low.num_bytes * 8 / (40 * 3 * 1536) <= expected
    assert low.row_bytes * 120 == low.num_bytes


@pytest.mark.parametrize("bits", BITS)
def test_parts_and_chunks_change_nothing(bits: int) -> None:
    down = torch.randn(200, 90)
    gate_up = torch.randn(180, 200)
    whole = torch.stack((gate_up[:90], gate_up[90:], down.T), dim=1)
    expected = LowBitRows.quantise(whole, bits)
    parts = LowBitRows.empty(bits, whole.shape)
    parts.fill((slice(None), 0), gate_up[:90])
    parts.fill((slice(None), 1), gate_up[90:])
    parts.fill((slice(None), 2), down.T)
    assert torch.equal(parts.packed, expected.packed)
    assert torch.equal(parts.scales, expected.scales)
    tall = torch.randn(3 * CHUNK_WEIGHTS // 512 + 5, 512)
    low = LowBitRows.quantise(tall, bits)
    one = LowBitRows.quantise(tall[-3:], bits)
    assert torch.equal(low.packed[-3:], one.packed)
    assert torch.equal(low.scales[-3:], one.scales)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e30])
def test_extreme_magnitudes(bits: int, size: float) -> None:
    rows = torch.randn(5, 100) * size
    rows[2] = 0.0
    result = LowBitRows.quantise(rows, bits).dequantise()
    assert result.isfinite().all()
    assert not result[2].any()
    if size >= 1e-30:
        assert (result - rows).double().norm() < 0.12 * rows.double().norm()


@pytest.mark.parametrize("bits", BITS)
def test_no_rows(bits: int) -> None:
    low = LowBitRows.quantise(torch.empty(0, 3, 70), bits)
    assert low.shape == (0, 3, 70)
    assert low.dequantise().shape == (0, 3, 70)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="8 or 4 bits, not 3"):
        LowBitRows.quantise(torch.randn(4, 8), 3)
    with pytest.raises(ValueError, match="floating point"):
        LowBitRows.quantise(torch.ones(4, 8, dtype=torch.int32), 8)
    with pytest.raises(ValueError, match="need a shape"):
        LowBitRows.quantise(torch.randn(8), 4)
    with pytest.raises(ValueError, match="need a shape"):
        LowBitRows.empty(4, (8, 0))
    with pytest.raises(ValueError, match=r"rows must be \[4, 8\], not \[4, 7\]"):
        LowBitRows.empty(4, (4, 3, 8)).fill((slice(None), 1), torch.randn(4, 7))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 65, 300])
def test_sizes_are_known_before_rows_exist_and_rows_are_overwritten_in_place(bits, width):
    first, second = torch.randn(2, 5, width)
    rows, other = LowBitRows.quantise(first, bits), LowBitRows.quantise(second, bits)
    assert rows.num_bytes == 5 * LowBitRows.bytes_of_row(bits, width)
    places = rows.packed.data_ptr(), rows.scales.data_ptr()
    rows.take(other)
    assert (rows.packed.data_ptr(), rows.scales.data_ptr()) == places
    assert torch.equal(rows.dequantise(), other.dequantise())
