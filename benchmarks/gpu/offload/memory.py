"""What the scenario needs of both memories, and refusals where that is too much."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.gpu.offload.draft import draft_bytes
from benchmarks.gpu.offload.layers import layer_elements
from benchmarks.gpu.shapes import Shape

WEIGHT_BYTES = 2
"""Of a bf16 weight."""

GPU_RESERVE = 1 << 30
"""For activations, the graph and what packing four bits takes for a moment."""

HOST_RESERVE = 1 << 30
"""For the process itself."""


class MemoryTooSmallError(Exception):
    """The scenario does not fit; the message says what it needs and what is free."""


def gpu_needs(shape: Shape, num_buffers: int) -> dict[str, int]:
    """Bytes on the GPU, by what they are for.

    Args:
        shape: Sizes.
        num_buffers: Layers that are on the GPU at a time.
    """
    return {
        "the int4 draft": draft_bytes(shape),
        "the head": WEIGHT_BYTES * shape.head_parameters,
        f"{num_buffers} buffers": num_buffers * WEIGHT_BYTES * layer_elements(shape),
        "reserve": GPU_RESERVE,
    }


def host_needs(shape: Shape, num_distinct: int) -> dict[str, int]:
    """Bytes in the host's memory, by what they are for.

    Args:
        shape: Sizes.
        num_distinct: Layers that are really there.
    """
    # PyTorch rounds pinned memory up to a power of two.
    pinned = 1 << (WEIGHT_BYTES * layer_elements(shape) - 1).bit_length()
    return {f"{num_distinct} pinned layers": num_distinct * pinned, "reserve": HOST_RESERVE}


def require(shape: Shape, memory: str, needs: Mapping[str, int], free_bytes: int) -> None:
    """Refuses what does not fit.

    Args:
        shape: Whose layers.
        memory: ``GPU`` or ``host``.
        needs: Bytes, by what they are for.
        free_bytes: Of that memory.

    Raises:
        MemoryTooSmallError: If more is needed than is free.
    """
    total = sum(needs.values())
    if total > free_bytes:
        parts = ", ".join(f"{name} {num_bytes / 1e9:.1f}" for name, num_bytes in needs.items())
        raise MemoryTooSmallError(
            f"{shape.name} needs {total / 1e9:.1f} GB of {memory} memory ({parts}); {free_bytes / 1e9:.1f} GB are free."
        )
