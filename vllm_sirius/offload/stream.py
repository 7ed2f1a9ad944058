"""Reads groups of bytes of a file one after the other, round and round, ahead of whoever uses them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_sirius.offload.errors import OffloadError
from vllm_sirius.offload.native import load_library
from vllm_sirius.weights.memory import empty_on_huge_pages

PAGE = 4096
"""Offsets, sizes and addresses are multiples of it, as reads past the page cache want them."""

PIECE_BYTES = 4 << 20
"""Most that one thread reads at once and that one checksum is for."""

NUM_THREADS = 4
ERROR_BYTES = 4096
REMEDY = (
    "The target's weights can no longer be read, and the engine ends: look after the disk and start again; where the file is "
    "damaged or was changed, `vllm-sirius offload rm` removes it, and the next start builds it anew."
)
PATIENCE_SECONDS = 60.0
"""A disk that gives nothing for so long counts as dead."""


class Piece(NamedTuple):
    """Bytes that are read at once.

    Attributes:
        num_bytes: How many, a multiple of `PAGE`.
        sum: Their CRC-32C.
    """

    num_bytes: int
    sum: int


@dataclass(frozen=True)
class Group:
    """Bytes that are used together, one after the other in the file.

    Attributes:
        offset: Where they begin, a multiple of `PAGE`.
        pieces: What they consist of.
    """

    offset: int
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """How many bytes they are."""
        return sum(piece.num_bytes for piece in self.pieces)


@dataclass(frozen=True)
class StreamStatistics:
    """What was read since the stream was opened.

    Attributes:
        num_bytes: Bytes read.
        reading_seconds: Time in which at least one thread was reading.
        waiting_seconds: Time for which somebody waited for bytes.
        num_rounds: Times that all groups were used.
    """

    num_bytes: int
    reading_seconds: float
    waiting_seconds: float
    num_rounds: int

    @property
    def bytes_per_second(self) -> float:
        """The rate while something was read; 0 before that."""
        return self.num_bytes / self.reading_seconds if self.reading_seconds > 0.0 else 0.0


class WeightStream:
    """Groups in the order in which they are used, read ahead into slots of memory.

    A group is used by one thread: waited for as far as it is needed, then released, which makes room for a later one. After the
    last group comes the first one again, so that a new round is being read before it is asked for. Whoever asks for another
    group than the next one begins a new round there.

    Args:
        path: The file.
        groups: What to read, at least one group.
        num_slots: Groups that memory is taken for, at least 1.
        num_threads: Threads that read.
        bytes_per_second: Not to be exceeded, for measurements on a fast disk; 0 for as fast as the disk is.
        patience_seconds: A disk that gives nothing for so long counts as dead.

    Attributes:
        direct: Whether reads go past the page cache.

    Raises:
        OffloadError: If the file cannot be opened.
        KernelBuildError: If the reader cannot be compiled.
    """

    def __init__(
        self,
        path: Path,
        groups: Sequence[Group],
        num_slots: int = 2,
        num_threads: int = NUM_THREADS,
        bytes_per_second: float = 0.0,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        pieces = [piece for group in groups for piece in group.pieces]
        if not all(group.pieces for group in groups) or not groups or num_slots < 1 or num_threads < 1:
            raise ValueError("a stream needs groups of pieces, a slot and a thread")
        if any(group.offset % PAGE for group in groups) or any(piece.num_bytes % PAGE for piece in pieces):
            raise ValueError(f"offsets and sizes of what is streamed must be multiples of {PAGE}")
        self._library = load_library()
        # Two fillings of one group would be checked at once.
        num_slots = min(num_slots, len(groups))
        self._slots = [_aligned(max(group.num_bytes for group in groups)) for _ in range(num_slots)]
        error = ctypes.create_string_buffer(ERROR_BYTES)
        self._handle: int | None = self._library.sirius_stream_open(
            os.fsencode(path),
            len(groups),
            (ctypes.c_int64 * len(groups))(*(group.offset for group in groups)),
            (ctypes.c_int64 * len(groups))(*(len(group.pieces) for group in groups)),
            (ctypes.c_int64 * len(pieces))(*(piece.num_bytes for piece in pieces)),
            (ctypes.c_uint32 * len(pieces))(*(piece.sum for piece in pieces)),
            (ctypes.c_void_p * num_slots)(*(slot.data_ptr() for slot in self._slots)),
            num_slots,
            num_threads,
            bytes_per_second,
            patience_seconds,
            error,
            len(error),
        )
        if self._handle is None:
            raise OffloadError(error.value.decode(errors="replace"))
        self._addresses = {slot.data_ptr(): slot for slot in self._slots}
        self.direct = bool(self._library.sirius_stream_direct(self._handle))

    @property
    def num_bytes(self) -> int:
        """Memory of the slots."""
        return sum(slot.nbytes for slot in self._slots)

    def wait(self, group: int, end: int) -> torch.Tensor:
        """Waits for a part of a group.

        Args:
            group: Its number.
            end: Bytes from its beginning on that are needed.

        Returns:
            ``uint8 [slot bytes]``: the slot, of which so many bytes are there. It is valid until the group is released.

        Raises:
            OffloadError: If the bytes cannot be had.
        """
        address = self._library.sirius_stream_wait(self._open_handle(), group, end)
        if address is None:
            error = ctypes.create_string_buffer(ERROR_BYTES)
            self._library.sirius_stream_error(self._handle, error, len(error))
            raise OffloadError(f"{error.value.decode(errors='replace')}. {REMEDY}")
        return self._addresses[address]

    def release(self, group: int) -> None:
        """The group that was waited for is not needed any more.

        Args:
            group: Its number.
        """
        self._library.sirius_stream_release(self._open_handle(), group)

    def statistics(self) -> StreamStatistics:
        """What was read so far."""
        found = (ctypes.c_double * 4)()
        self._library.sirius_stream_statistics(self._open_handle(), found)
        return StreamStatistics(int(found[0]), found[1], found[2], int(found[3]))

    def close(self) -> None:
        """Ends the threads and frees the slots. Repeating it is harmless."""
        if self._handle is None:
            return
        ended = self._library.sirius_stream_close(self._handle)
        self._handle = None
        if not ended:
            # A thread that the disk holds may still write to a slot.
            _KEPT.extend(self._slots)
        self._slots, self._addresses = [], {}

    def _open_handle(self) -> int:
        if self._handle is None:
            raise OffloadError("the stream of the target's weights was closed")
        return self._handle

    def __del__(self) -> None:
        """Ends the threads of a stream that nobody closed."""
        if getattr(self, "_handle", None) is not None:
            self.close()


_KEPT: list[torch.Tensor] = []


def _aligned(num_bytes: int) -> torch.Tensor:
    whole = empty_on_huge_pages((num_bytes + PAGE,), torch.uint8)
    start = -whole.data_ptr() % PAGE
    return whole[start : start + num_bytes]
