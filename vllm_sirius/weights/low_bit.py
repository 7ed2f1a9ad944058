"""Copies of weight rows in 8 or 4 bits per weight, for a draft that reads few bytes. No calibration data is needed.

* 8 bits: one fp32 scale per row, values round to nearest in -127 ... 127, stored as unsigned bytes with 128 added.
* 4 bits: one bf16 scale per 64 columns, values -8 ... 7, stored with 8 added. Column ``i`` of each 128 lies in the low and
  column ``64 + i`` in the high half of byte ``i``. Of a few scales the one with the least squared error is taken.

Rows are padded with zeros to whole lines of 64 bytes: 64 columns of 8 bits or 128 of 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_sirius.weights.memory import empty_on_huge_pages

SPAN = 64
"""Columns that share a scale at 4 bits, and columns whose inputs share a scale in the kernels."""

LINE_BYTES = 64
CHUNK_WEIGHTS = 1 << 18
"""Weights quantised at once: their fp32 copies stay in the processor's cache."""

SCALE_TYPES = {8: torch.float32, 4: torch.bfloat16}

LEAST_SCALES = (1.0, 0.92, 0.84)
"""Scales tried at 4 bits, as part of the one that maps the largest magnitude of the span to -8."""


@dataclass(frozen=True)
class LowBitRows:
    """Weight quantised rows.

    Attributes:
        bits: 8 or 4.
        packed: ``uint8 [*leading, row_bytes]``, contiguous, on CPU.
        scales: ``float32 [*leading, 1]`` at 8 bits, ``bfloat16 [*leading, spans]`` at 4, contiguous.
        width: Columns of a row without padding.
    """

    bits: int
    packed: torch.Tensor
    scales: torch.Tensor
    width: int

    @classmethod
    def empty(cls, bits: int, shape: Sequence[int]) -> LowBitRows:
        """Allocates rows whose values are to be set by `fill`.

        Args:
            bits: 8 or 4.
            shape: ``[*leading, width]``, of an FFN as a `vllm_sirius.weights.rows.RowLayout` has it, ``[out, in]`` of a
                linear layer.

        Raises:
            ValueError: If `bits` is neither 8 nor 4, or a row would have no columns.
        """
        if bits not in (4, 8):
            raise ValueError(f"low-bit rows have 8 or 4 bits, not {bits}")
        if len(shape) < 2 or shape[-1] < 1:
            raise ValueError(f"low-bit rows need a shape [..., rows, width >= 1], not {list(shape)}")
        *leading, width = shape
        num_bytes, num_scales = _row_sizes(bits, width)
        packed = empty_on_huge_pages((*leading, num_bytes), torch.uint8)
        scales = empty_on_huge_pages((*leading, num_scales), SCALE_TYPES[bits])
        return cls(bits, packed, scales, width)

    @staticmethod
    def bytes_of_row(bits: int, width: int) -> int:
        """Bytes that one row will take, scales included.

        Args:
            bits: 8 or 4.
            width: Columns of the row.
        """
        num_bytes, num_scales = _row_sizes(bits, width)
        return num_bytes + num_scales * SCALE_TYPES[bits].itemsize

    @classmethod
    def quantise(cls, rows: torch.Tensor, bits: int) -> LowBitRows:
        """Quantises rows.

        Args:
            rows: ``[*leading, width]``, any floating dtype, strided as may be.
            bits: 8 or 4.

        Raises:
            ValueError: As `empty`.
        """
        if not rows.is_floating_point():
            raise ValueError(f"rows to quantise must be floating point, not {rows.dtype}")
        result = cls.empty(bits, rows.shape)
        result.fill(slice(None), rows)
        return result

    @property
    def shape(self) -> torch.Size:
        """``[*leading, width]``, the shape of the rows that these stand for."""
        return torch.Size((*self.packed.shape[:-1], self.width))

    @property
    def num_bytes(self) -> int:
        """Memory of weights and scales."""
        return self.packed.nbytes + self.scales.nbytes

    @property
    def row_bytes(self) -> int:
        """Bytes that reading one row takes, scales included."""
        return self.packed.shape[-1] + self.scales.shape[-1] * self.scales.element_size()

    def take(self, other: LowBitRows) -> None:
        """Overwrites these rows in place, where kernels already read them.

        Args:
            other: Rows of the same shape and bits.
        """
        self.packed.copy_(other.packed)
        self.scales.copy_(other.scales)

    def fill(self, where: slice | tuple[slice | int, ...], rows: torch.Tensor) -> None:
        """Quantises rows into a part of these: ``fill((slice(None), 2), down.T)`` sets the down rows of an FFN.

        Args:
            where: Index of the leading dimensions.
            rows: ``[*part, width]``, floating point.

        Raises:
            ValueError: If `rows` does not fit the part.
        """
        packed, scales = self.packed[where], self.scales[where]
        if rows.shape != (*packed.shape[:-1], self.width):
            raise ValueError(f"rows must be {[*packed.shape[:-1], self.width]}, not {list(rows.shape)}")
        step = max(1, CHUNK_WEIGHTS * rows.shape[0] // max(1, rows.numel()))
        for start in range(0, rows.shape[0], step):
            part = slice(start, start + step)
            values, part_scales = _round(rows[part].float(), self.bits, packed.shape[-1])
            packed[part] = values
            scales[part] = part_scales

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns the rows ``[*leading, width]`` that these stand for."""
        return (self.integers() * self.column_scales())[..., : self.width].to(dtype)

    def integers(self) -> torch.Tensor:
        """Returns the stored values without their offset, ``float32 [*leading, padded width]``."""
        if self.bits == 8:
            return self.packed.float() - 128.0
        lines = self.packed.unflatten(-1, (-1, LINE_BYTES))
        return torch.stack((lines & 15, lines >> 4), dim=-2).flatten(-3).float() - 8.0

    def column_scales(self) -> torch.Tensor:
        """Returns the scale of every column, ``float32 [*leading, padded width]`` or ``[*leading, 1]``."""
        scales = self.scales.float()
        return scales if self.bits == 8 else scales.repeat_interleave(SPAN, dim=-1)


def _row_sizes(bits: int, width: int) -> tuple[int, int]:
    """Packed bytes and number of scales of a row."""
    columns_of_line = LINE_BYTES * 8 // bits
    num_lines = -(-width // columns_of_line)
    return num_lines * LINE_BYTES, 1 if bits == 8 else num_lines * columns_of_line // SPAN


def _round(rows: torch.Tensor, bits: int, num_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed bytes ``uint8 [..., num_bytes]`` and scales of fp32 rows."""
    padding = num_bytes * 8 // bits - rows.shape[-1]
    if padding:
        rows = torch.nn.functional.pad(rows, (0, padding))
    if bits == 8:
        scales = rows.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny) / 127.0
        return (rows / scales).round_().add_(128.0).to(torch.uint8), scales
    spans = rows.unflatten(-1, (-1, SPAN))
    scales = _best_scales(spans)
    values = _nearest(spans, scales).add_(8.0).to(torch.uint8).unflatten(-2, (-1, 2))
    return (values[..., 0, :] | values[..., 1, :] << 4).flatten(-2), scales.squeeze(-1)


def _best_scales(spans: torch.Tensor) -> torch.Tensor:
    """Scales ``bfloat16 [..., spans, 1]`` of ``[..., spans, 64]``: of those tried the ones with the least squared error."""
    largest, smallest = spans.amax(-1, keepdim=True), spans.amin(-1, keepdim=True)
    extreme = torch.where(largest > -smallest, largest, smallest) / -8.0
    best, least = None, None
    for part in LEAST_SCALES:
        scales = (extreme * part).bfloat16()
        scales = torch.where(scales == 0, 1.0, scales)
        errors = (_nearest(spans, scales).mul_(scales).sub_(spans)).square_().sum(-1, keepdim=True)
        if best is None or least is None:
            best, least = scales, errors
        else:
            better = errors < least
            best, least = torch.where(better, scales, best), torch.where(better, errors, least)
    assert best is not None
    return best


def _nearest(spans: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (spans * scales.float().reciprocal()).round_().clamp_(-8.0, 7.0)
