"""The draft: the same layers in four bits, all of them on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.gpu.offload.layers import Linear, Matrices, matrix_sizes, run_layer
from benchmarks.gpu.shapes import Shape

GROUP_SIZE = 64
"""Weights that share a scale and an offset of 16 bits each: 4.5 bits a weight, like Sirius' own copies."""

INNER_TILES = 8
"""How PyTorch interleaves columns on a GPU."""

STAND_IN_PART = 9 / 32
"""Rows of a bf16 matrix that are as many bytes as all of it in 4.5 bits."""

LEVELS = 16


@dataclass(frozen=True)
class DraftKind:
    """How draft weights are read.

    Attributes:
        name: ``int4`` is PyTorch's kernel; ``stand-in`` a bf16 matrix with as many bytes and fewer rows.
        reason: Why not ``int4``, empty where it is.
    """

    name: str
    reason: str = ""


class Int4Linear:
    """A linear layer with weights of four bits, ``(code - 8) * scale + offset``.

    Args:
        codes: ``int32 [rows, columns]`` on the CPU; on a GPU ``uint8 [rows, columns / 2]``, the left column in the upper bits.
        scales: ``[columns / GROUP_SIZE, rows, 2]``: scale and offset, in the type of the inputs.
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        operators = torch.ops.aten
        if codes.device.type == "cpu":
            self._packed = operators._convert_weight_to_int4pack_for_cpu(codes, INNER_TILES)
            self._multiply = operators._weight_int4pack_mm_for_cpu
        else:
            self._packed = operators._convert_weight_to_int4pack(codes, INNER_TILES)
            self._multiply = operators._weight_int4pack_mm
        self._scales = scales

    @property
    def num_bytes(self) -> int:
        """Bytes that it reads."""
        return self._packed.nbytes + self._scales.nbytes

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs ``[tokens, rows]`` of inputs ``[tokens, columns]``."""
        return self._multiply(inputs.contiguous(), self._packed, GROUP_SIZE, self._scales)


class StandInLinear:
    """Reads as many bytes as `Int4Linear` does, in bf16: of its rows only a part is stored, the others give zero.

    Args:
        rows: Outputs.
        columns: Inputs.
        device: Where.
        dtype: 16 bits, or 32 where nothing is timed.
    """

    def __init__(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> None:
        stored = max(1, round(STAND_IN_PART * rows))
        self._missing = rows - stored
        self._weight = torch.empty(stored, columns, device=device, dtype=dtype).normal_(std=1 / math.sqrt(columns))

    @property
    def num_bytes(self) -> int:
        """Bytes that it reads."""
        return self._weight.nbytes

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs ``[tokens, rows]`` of inputs ``[tokens, columns]``."""
        return F.pad(F.linear(inputs, self._weight), (0, self._missing))


class Draft:
    """All layers and the head, resident.

    Args:
        shape: Sizes.
        kind: How weights are read.
        device: Where.
        dtype: Of inputs and outputs.
    """

    def __init__(self, shape: Shape, kind: DraftKind, device: torch.device, dtype: torch.dtype) -> None:
        self._shape = shape
        self.num_bytes = 0

        def make(rows: int, columns: int) -> Linear:
            if kind.name == "int4":
                linear: Int4Linear | StandInLinear = Int4Linear(*random_int4(rows, columns, device, dtype))
            else:
                linear = StandInLinear(rows, columns, device, dtype)
            self.num_bytes += linear.num_bytes
            return linear

        self._layers = [Matrices(*(make(*size) for size in matrix_sizes(shape))) for _ in range(shape.num_layers)]
        self._head = make(shape.vocab_size, shape.hidden_size)

    def step(self, hidden: torch.Tensor) -> torch.Tensor:
        """A draft step.

        Args:
            hidden: The embedded token, ``[1, hidden]``.

        Returns:
            The next token, ``int64 [1]``.
        """
        for matrices in self._layers:
            hidden = run_layer(self._shape, matrices, hidden)
        return self._head(hidden).argmax(dim=-1)


def draft_bytes(shape: Shape) -> int:
    """Bytes of `Draft` with weights of 16 bits beside codes of four: 4.5 bits for every weight of layers and head."""
    weights = shape.num_layers * shape.layer_parameters + shape.head_parameters
    return weights // 2 + 4 * weights // GROUP_SIZE


def random_int4(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes and scales for `Int4Linear` that keep the variance of their inputs."""
    if device.type == "cpu":
        codes = torch.randint(0, LEVELS, (rows, columns), dtype=torch.int32)
    else:
        codes = torch.randint(0, LEVELS**2, (rows, columns // 2), dtype=torch.uint8, device=device)
    scales = torch.zeros(columns // GROUP_SIZE, rows, 2, dtype=dtype, device=device)
    # Codes are uniform around 8, with a deviation of 16 / sqrt(12).
    scales[..., 0] = math.sqrt(12 / columns) / LEVELS
    return codes, scales


def choose_kind(device: torch.device, dtype: torch.dtype) -> DraftKind:
    """``int4`` where PyTorch's kernel runs on this device and multiplies rightly, else the stand-in.

    Args:
        device: Where the draft will be.
        dtype: Of its inputs.
    """
    try:
        error = int4_error(device, dtype)
    except (RuntimeError, AttributeError) as problem:
        first_line, _, _ = str(problem).partition("\n")
        return DraftKind("stand-in", f"PyTorch's int4 kernel does not run here: {first_line}")
    if error > 0.02:
        return DraftKind("stand-in", f"PyTorch's int4 kernel is off by {error:.1%} here")
    return DraftKind("int4")


def int4_error(device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference of `Int4Linear` from the same product in 32 bits, over the largest output."""
    rows, columns = 64, 256
    codes, scales = random_int4(rows, columns, device, dtype)
    scales *= torch.rand_like(scales) + 0.5
    scales[..., 1] = torch.randn_like(scales[..., 1]) / math.sqrt(columns)
    inputs = torch.randn(2, columns, device=device).to(dtype)
    plain = codes if device.type == "cpu" else torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1)
    scale, offset = (part.float().t().repeat_interleave(GROUP_SIZE, dim=1) for part in scales.unbind(dim=-1))
    expected = inputs.float() @ ((plain.float() - LEVELS // 2) * scale + offset).t()
    actual = Int4Linear(codes, scales)(inputs).float()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def graph_or_plain(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The step as a CUDA graph on a GPU: its small kernels take less time than launching them does."""
    if device.type == "cpu":
        return step
    from benchmarks.gpu.measure import capture

    return capture(step)
