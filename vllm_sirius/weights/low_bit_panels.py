"""4-bit weights in the order in which a draft that reads all of them does: panels of 16 outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vllm_sirius.weights.low_bit import LINE_BYTES, LowBitRows
from vllm_sirius.weights.memory import empty_on_huge_pages

OUTPUTS = 16
WEIGHT_LINES = LINE_BYTES // 4
"""Lines of a block of 128 inputs: four bytes of each of the 16 outputs."""

PACKED_OUTPUTS = 1 << 12
"""Outputs quantised at once, which bounds the memory of their rows."""


@dataclass(frozen=True)
class LowBitPanels:
    """The weight of a linear layer, rounded as `LowBitRows` of 4 bits.

    Attributes:
        blocks: ``uint8 [panels, blocks, 17, 64]``, contiguous, on CPU. Lines 0 to 15 of a block have the weights of 128
            inputs, line 16 the bf16 scales of its two spans. What fills the last panel is zero with scale zero.
        num_outputs: Outputs of the layer.
        width: Inputs of the layer.
    """

    blocks: torch.Tensor
    num_outputs: int
    width: int

    @classmethod
    def quantise(cls, weight: torch.Tensor) -> LowBitPanels:
        """Rounds a weight.

        Args:
            weight: ``[out, in]``, any floating dtype, strided as may be.

        Raises:
            ValueError: As `LowBitRows.quantise`.
        """
        num_outputs, width = weight.shape
        blocks = empty_on_huge_pages(_shape(num_outputs, width), torch.uint8)
        for start in range(0, num_outputs, PACKED_OUTPUTS):
            rows = LowBitRows.quantise(weight[start : start + PACKED_OUTPUTS], 4)
            first = start // OUTPUTS
            _fill(blocks[first : first - (-rows.packed.shape[0] // OUTPUTS)], rows)
        return cls(blocks, num_outputs, width)

    @classmethod
    def empty(cls, num_outputs: int, width: int) -> LowBitPanels:
        """Allocates panels whose values are to be read from elsewhere.

        Args:
            num_outputs: Outputs of the layer.
            width: Inputs of the layer.
        """
        return cls(empty_on_huge_pages(_shape(num_outputs, width), torch.uint8), num_outputs, width)

    @staticmethod
    def bytes_of(num_outputs: int, width: int) -> int:
        """Bytes that a layer's copy will take, scales included.

        Args:
            num_outputs: Outputs of the layer.
            width: Inputs of the layer.
        """
        return math.prod(_shape(num_outputs, width))

    @property
    def num_bytes(self) -> int:
        """Memory of weights and scales."""
        return self.blocks.nbytes

    def take(self, other: LowBitPanels) -> None:
        """Overwrites these panels in place, where kernels already read them.

        Args:
            other: Panels of the same shape.
        """
        self.blocks.copy_(other.blocks)

    def rows(self) -> LowBitRows:
        """The same weights and scales row by row, as the twin of the kernels reads them."""
        num_panels, num_blocks = self.blocks.shape[:2]
        lines = self.blocks[:, :, :WEIGHT_LINES].unflatten(-1, (OUTPUTS, 4))
        packed = lines.permute(0, 3, 1, 2, 4).reshape(num_panels * OUTPUTS, num_blocks * LINE_BYTES)
        pairs = self.blocks[:, :, WEIGHT_LINES].contiguous().view(torch.bfloat16).unflatten(-1, (OUTPUTS, 2))
        scales = pairs.permute(0, 2, 1, 3).reshape(num_panels * OUTPUTS, 2 * num_blocks)
        count = self.num_outputs
        return LowBitRows(4, packed[:count].contiguous(), scales[:count].contiguous(), self.width)


def interleave(gate: LowBitPanels, up: LowBitPanels) -> torch.Tensor:
    """Gate and up panels of an FFN by turns, ``uint8 [2 * panels, blocks, 17, 64]``: 16 neurons, then their other half.

    Args:
        gate: Gate projection, ``[neurons, hidden]``.
        up: Up projection, of the same shape.
    """
    num_panels, *block = gate.blocks.shape
    together = empty_on_huge_pages((num_panels, 2, *block), torch.uint8)
    together[:, 0], together[:, 1] = gate.blocks, up.blocks
    return together.flatten(0, 1)


def _shape(num_outputs: int, width: int) -> tuple[int, int, int, int]:
    return -(-num_outputs // OUTPUTS), -(-width // (2 * LINE_BYTES)), WEIGHT_LINES + 1, LINE_BYTES


def _fill(blocks: torch.Tensor, rows: LowBitRows) -> None:
    count = rows.packed.shape[0]
    padding = -count % OUTPUTS
    packed = torch.nn.functional.pad(rows.packed, (0, 0, 0, padding), value=0x88)
    scales = torch.nn.functional.pad(rows.scales, (0, 0, 0, padding))
    # Four bytes of a row are moved as one 32-bit number.
    quads = packed.view(torch.int32).view(-1, OUTPUTS, blocks.shape[1], WEIGHT_LINES)
    blocks[:, :, :WEIGHT_LINES].view(torch.int32).copy_(quads.permute(0, 2, 3, 1))
    pairs = scales.view(torch.int32).view(-1, OUTPUTS, blocks.shape[1])
    blocks[:, :, WEIGHT_LINES].view(torch.int32).copy_(pairs.permute(0, 2, 1))
