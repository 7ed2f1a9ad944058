"""Tile sizes of the Triton kernels, and the choice among them by measurement.

Kernels never tune by themselves: outside of `Tuner.tuning` a kernel runs with what was measured before, or with the first
candidate of its list. So no measurement can fall into the capture of a CUDA graph or into serving.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vllm_sirius.kernels.triton.runtime import INTERPRETED, triton

LAUNCHES, REPLAYS = 8, 5
"""Launches in a graph, and replays of it, that measure a candidate."""


@dataclass(frozen=True)
class Tiles:
    """Sizes with which a kernel runs; see `projection` for their meaning.

    Attributes:
        rows: Rows of the weight's tile.
        columns: Columns of the weight's tile.
        warps: Warps per program.
        stages: Depth of the pipeline of loads.
        tensor_cores: Whether tiles are multiplied on tensor cores.
        parts: Parts of the neurons that the down projection adds up; of a stream, programs per multiprocessor; nothing
            elsewhere.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 1
    tensor_cores: bool = False
    parts: int = 1

    def shared_memory(self, block_tokens: int, element_size: int) -> int:
        """Bytes of shared memory that the pipeline of loads takes, about."""
        tile = self.rows * self.columns
        if not self.tensor_cores:
            return tile * element_size * (self.stages if self.stages > 1 else 0)
        return (tile + block_tokens * max(self.rows, self.columns)) * element_size * self.stages


_ROWS_BY_ONE = (
    Tiles(8, 512),
    Tiles(4, 512),
    Tiles(2, 1024),
    Tiles(2, 2048, warps=8),
    Tiles(8, 256, warps=2),
    Tiles(16, 256, warps=2),
    Tiles(64, 64, stages=6, tensor_cores=True),
    Tiles(64, 128, stages=4, tensor_cores=True),
    Tiles(32, 128, stages=4, tensor_cores=True),
)
_ROWS_BY_MANY = (
    Tiles(32, 128, stages=4, tensor_cores=True),
    Tiles(64, 128, stages=4, tensor_cores=True),
    Tiles(64, 64, stages=6, tensor_cores=True),
    Tiles(32, 64, stages=6, tensor_cores=True),
    Tiles(64, 128, stages=3, tensor_cores=True),
    Tiles(128, 64, warps=8, stages=6, tensor_cores=True),
    Tiles(32, 256, stages=3, tensor_cores=True),
)
_DOWN_BY_ONE = (
    Tiles(16, 256, warps=2, parts=32),
    Tiles(32, 256, parts=16),
    Tiles(16, 512, parts=64),
    Tiles(64, 64, stages=6, tensor_cores=True, parts=8),
    Tiles(32, 128, stages=6, tensor_cores=True, parts=16),
)
_DOWN_BY_MANY = (
    Tiles(32, 128, stages=4, tensor_cores=True, parts=16),
    Tiles(64, 64, stages=6, tensor_cores=True, parts=8),
    Tiles(64, 128, stages=6, tensor_cores=True, parts=8),
    Tiles(32, 128, stages=6, tensor_cores=True, parts=16),
    Tiles(32, 64, stages=6, tensor_cores=True, parts=8),
    Tiles(64, 128, stages=4, tensor_cores=True, parts=16),
    Tiles(32, 256, stages=6, tensor_cores=True, parts=16),
)
_STREAM = (
    Tiles(2, 4096, warps=8, parts=3),
    Tiles(4, 4096, warps=8, parts=2),
    Tiles(4, 4096, warps=8, parts=1),
    Tiles(2, 4096, warps=8, parts=2),
    Tiles(2, 4096, warps=4, parts=3),
    Tiles(2, 4096, warps=8, stages=3),
    Tiles(2, 4096, warps=16, stages=3),
    Tiles(1, 4096, warps=8, stages=4),
    Tiles(1, 4096, warps=8, stages=5),
)
"""For a width of 4096; others get warps in proportion."""

WIDEST_STREAM = 16384
"""A program holds a sum for every column in its registers."""


def token_block(num_tokens: int) -> int:
    """Tokens per tile: 1, 16 or 32. Tiles are tuned once for each."""
    return 1 if num_tokens <= 1 else 16 if num_tokens <= 16 else 32


def row_candidates(num_tokens: int, dtype: torch.dtype, device: torch.device) -> list[Tiles]:
    """Tiles for products with rows of gate and up, the default first.

    Args:
        num_tokens: Tokens of the call.
        dtype: Dtype of the weights.
        device: Where the kernel runs.
    """
    return _fitting(_ROWS_BY_ONE if num_tokens == 1 else _ROWS_BY_MANY, num_tokens, dtype, device)


def down_candidates(num_tokens: int, dtype: torch.dtype, device: torch.device) -> list[Tiles]:
    """Tiles for the down projection, the default first. Arguments as in `row_candidates`."""
    return _fitting(_DOWN_BY_ONE if num_tokens == 1 else _DOWN_BY_MANY, num_tokens, dtype, device)


def stream_candidates(hidden_size: int, dtype: torch.dtype, device: torch.device) -> list[Tiles]:
    """Tiles for an FFN of one token that runs as a stream of neurons, the default first.

    Args:
        hidden_size: Width, at most `WIDEST_STREAM`.
        dtype: Dtype of the weights.
        device: Where the kernel runs.
    """
    columns = max(1 << (hidden_size - 1).bit_length(), 16)
    limit = _shared_memory_limit(device)
    found = []
    for base in _STREAM:
        warps = min(max(base.warps * columns // 4096, 1), 32)
        # Narrow programs are small ones, of which a multiprocessor holds more.
        parts = base.parts * min(max(4096 // columns, 1), 4)
        tiles = Tiles(base.rows, columns, warps, base.stages, parts=parts)
        # Three tiles, each read ahead by half the depth of the pipeline: the index comes first.
        depth = (tiles.stages - 1) // 2 + 1 if tiles.stages > 1 else 0
        if depth == 0 or 3 * depth * tiles.rows * columns * dtype.itemsize + 4 * columns <= limit:
            found.append(tiles)
    return found


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 where kernels are interpreted, so that work is divided there too."""
    if device.type != "cuda":
        return 4
    number: int = torch.cuda.get_device_properties(device).multi_processor_count
    return number


def _fitting(candidates: Sequence[Tiles], num_tokens: int, dtype: torch.dtype, device: torch.device) -> list[Tiles]:
    """Leaves out what does not fit in shared memory: 99 KiB per program on sm89, 163 on sm80, 227 on sm90."""
    limit = _shared_memory_limit(device)
    block, size = token_block(num_tokens), dtype.itemsize
    fitting = [tiles for tiles in candidates if tiles.shared_memory(_rounded(tiles, block), size) <= limit]
    return fitting or [min(candidates, key=lambda tiles: tiles.shared_memory(_rounded(tiles, block), size))]


def _rounded(tiles: Tiles, block: int) -> int:
    return max(block, 16) if tiles.tensor_cores else block


def _shared_memory_limit(device: torch.device) -> int:
    if device.type != "cuda":
        return 99 << 10
    limit: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return limit


class Tuner:
    """Remembers the fastest tiles of each kernel and shape."""

    def __init__(self) -> None:
        self._chosen: dict[tuple[Any, ...], Tiles] = {}
        self._tuning = False

    @contextmanager
    def tuning(self) -> Iterator[None]:
        """Calls inside measure every kernel and shape that was not measured before."""
        self._tuning = True
        try:
            yield
        finally:
            self._tuning = False

    def run(
        self,
        kernel: str,
        shape: tuple[Any, ...],
        candidates: Callable[[], list[Tiles]],
        launch: Callable[[Tiles], torch.Tensor],
    ) -> torch.Tensor:
        """Runs a kernel with the tiles that were measured to be fastest, or the default.

        Args:
            kernel: Its name.
            shape: What the choice depends on.
            candidates: The tiles to choose from, the default first.
            launch: Runs the kernel; may be called many times.

        Returns:
            What `launch` returns.
        """
        key = (kernel, *shape)
        tiles = self._chosen.get(key)
        if tiles is None:
            tiles = candidates()[0]
            if self._tuning and not INTERPRETED and not torch.cuda.is_current_stream_capturing():
                tiles = self._chosen[key] = _fastest(candidates(), launch)
        return launch(tiles)

    def chosen(self) -> dict[tuple[Any, ...], Tiles]:
        """What was measured so far: tiles by kernel and shape."""
        return dict(self._chosen)


def _fastest(candidates: list[Tiles], launch: Callable[[Tiles], torch.Tensor]) -> Tiles:
    # Twice what the cache holds; reading it, unlike writing it, leaves nothing behind that must be written back.
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    others = torch.zeros(max(2 * cache, 1 << 20) // 4, device="cuda")
    return min(candidates, key=lambda tiles: _milliseconds(lambda: launch(tiles), others))


def _milliseconds(launch: Callable[[], torch.Tensor], others: torch.Tensor) -> float:
    """Time of launches in a CUDA graph, as they are served, each on weights that are in no cache."""
    try:
        launch()
    except triton.runtime.errors.OutOfResources:
        return float("inf")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(LAUNCHES):
            others.sum()
            launch()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)
