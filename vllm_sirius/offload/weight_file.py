"""The file of a target's weights: matrices in the order of a pass, then all else that a start needs.

    page 0    magic, version, place, size and checksum of the table of contents
    groups    panels of the target, one group after the other, in the order in which a pass reads them
    tensors   the draft's copies, norms, biases, embeddings: whatever else a start needs, so that it reads no checkpoint
    contents  JSON: what the file was made of, every tensor and the checksums of its pieces

Every tensor begins on a page of 4 KiB and is followed by zeros up to the next one. The first page is written last: a file
without it is not whole. It gets its name when it is.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_sirius.offload.errors import OffloadError
from vllm_sirius.offload.native import crc32c
from vllm_sirius.offload.stream import PAGE, PIECE_BYTES, REMEDY, Group, Piece

MAGIC = b"SIRIUSOF"
VERSION = 1
HEAD = struct.Struct("<8sIQQI")
"""Magic, version, offset and size of the contents, their CRC-32C."""

FLUSH_BYTES = 256 << 20
"""Written bytes that may wait in memory for the disk."""

MARGIN_BYTES = 64 << 20
"""What must remain free on the disk."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        name: Its name.
        dtype: Its dtype, without ``torch.``.
        shape: Its shape.
        offset: Where it begins.
        pieces: What it consists of, zeros behind it included.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """Its place in the file, a multiple of `PAGE`."""
        return sum(piece.num_bytes for piece in self.pieces)


def padded(num_bytes: int) -> int:
    """Bytes of a tensor with the zeros behind it.

    Args:
        num_bytes: Bytes of the tensor.
    """
    return -(-num_bytes // PAGE) * PAGE


class WeightFileWriter:
    """Writes a file under a temporary name.

    Args:
        path: Its name once it is whole. The folder exists; whoever calls has locked it for building.
        groups: Names and bytes of the tensors of each group, in the order of a pass. Each is to be written once, in any order.
        other_bytes: About how many bytes the other tensors take.

    Raises:
        OffloadError: If the disk has too little room, or the file cannot be made.
    """

    def __init__(self, path: Path, groups: Sequence[Mapping[str, int]], other_bytes: int) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._groups = [list(group) for group in groups]
        self._places: dict[str, int] = {}
        self._entries: dict[str, Entry] = {}
        place = PAGE
        for group in groups:
            for name, num_bytes in group.items():
                self._places[name] = place
                place += padded(num_bytes)
        self._end = place
        self._unwritten = 0
        self._file = self._create(place + other_bytes)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a tensor.

        Args:
            name: Its name: one of a group, or a new one.
            tensor: Any dtype and shape, on CPU.

        Raises:
            OffloadError: If the disk refuses.
        """
        assert name not in self._entries, f"{name} is written twice"
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        offset = self._places.get(name, self._end)
        pieces: list[Piece] = []
        for start in range(0, max(1, data.numel()), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            if piece.numel() % PAGE or piece.numel() == 0:
                piece = torch.nn.functional.pad(piece, (0, padded(max(1, piece.numel())) - piece.numel()))
            self._write(piece, offset + start)
            pieces.append(Piece(piece.numel(), crc32c(piece)))
        dtype = str(tensor.dtype).removeprefix("torch.")
        entry = Entry(name, dtype, tuple(tensor.shape), offset, tuple(pieces))
        if name not in self._places:
            self._end += entry.num_bytes
        self._entries[name] = entry

    def finish(self, made_of: Mapping[str, Any]) -> None:
        """Writes the contents and gives the file its name.

        Args:
            made_of: What the weights came from, as JSON can hold it.

        Raises:
            OffloadError: If the disk refuses.
        """
        missing = [name for group in self._groups for name in group if name not in self._entries]
        assert not missing, f"{missing} were not written"
        entries = [[e.name, e.dtype, e.shape, e.offset, e.pieces] for e in self._entries.values()]
        contents = json.dumps({"made_of": made_of, "groups": self._groups, "tensors": entries}).encode()
        sum_of_contents = crc32c(torch.frombuffer(bytearray(contents), dtype=torch.uint8))
        try:
            written = 0
            while written < len(contents):
                written += os.pwrite(self._file, contents[written:], self._end + written)
            os.ftruncate(self._file, self._end + len(contents))
            os.fsync(self._file)
            os.pwrite(self._file, HEAD.pack(MAGIC, VERSION, self._end, len(contents), sum_of_contents), 0)
            os.fsync(self._file)
            self._partial.rename(self._path)
            _sync_folder(self._path.parent)
        except OSError as error:
            raise self._refused(error) from error
        finally:
            self.close()

    def close(self) -> None:
        """Ends writing; a file that is not whole is removed. Repeating it is harmless."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._partial.unlink(missing_ok=True)

    def _create(self, num_bytes: int) -> int:
        folder = self._path.parent
        try:
            self._partial.unlink(missing_ok=True)
            free = os.statvfs(folder)
            room = free.f_bavail * free.f_frsize
            if num_bytes + MARGIN_BYTES > room:
                raise OffloadError(
                    f"the file of the target's weights takes {num_bytes / 1e9:.2f} GB, and {folder} has {room / 1e9:.2f} GB "
                    "free: free some, or set offload_path to a folder on another disk."
                )
            file = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._refused(error) from error
        try:
            os.posix_fallocate(file, 0, num_bytes)
        except OSError as error:
            os.close(file)
            self._partial.unlink(missing_ok=True)
            raise self._refused(error) from error
        return file

    def _write(self, piece: torch.Tensor, offset: int) -> None:
        view = _bytes_of(piece)
        try:
            done = 0
            while done < len(view):
                done += os.pwrite(self._file, view[done:], offset + done)
            self._unwritten += done
            if self._unwritten >= FLUSH_BYTES:
                self._unwritten = 0
                os.fdatasync(self._file)
                # What was written is not read again from the page cache, which takes room from the weights.
                os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> OffloadError:
        return OffloadError(
            f"the file of the target's weights {self._path} cannot be written ({error.strerror or error}): set offload_path to a "
            "folder of yours with enough room."
        )


class WeightFile:
    """A whole file.

    Args:
        path: The file.

    Attributes:
        path: The file.
        made_of: What `WeightFileWriter.finish` was told.
        groups: Names of the tensors of each group.
        entries: All tensors by name.

    Raises:
        OffloadError: If it is none, is not whole or was damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                head = file.read(HEAD.size)
                magic, version, offset, size, expected = HEAD.unpack(head.ljust(HEAD.size, b"\0"))
                if magic != MAGIC:
                    raise OffloadError(f"{path} is no whole file of a target's weights")
                if version != VERSION:
                    raise OffloadError(f"{path} has format {version}, and this release reads format {VERSION}")
                if not 0 < size <= os.fstat(file.fileno()).st_size - offset:
                    raise OffloadError(f"{path} is damaged: its table of contents is not what was written")
                file.seek(offset)
                contents = file.read(size)
        except OSError as error:
            raise OffloadError(f"{path} cannot be read ({error.strerror or error})") from error
        if len(contents) != size or crc32c(torch.frombuffer(bytearray(contents), dtype=torch.uint8)) != expected:
            raise OffloadError(f"{path} is damaged: its table of contents is not what was written")
        known = json.loads(contents)
        self.made_of: dict[str, Any] = known["made_of"]
        self.groups: list[list[str]] = known["groups"]
        self.entries = {
            name: Entry(name, dtype, tuple(shape), place, tuple(Piece(*piece) for piece in pieces))
            for name, dtype, shape, place, pieces in known["tensors"]
        }

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    def group(self, number: int) -> Group:
        """A group as a stream reads it.

        Args:
            number: Its place in `groups`.
        """
        entries = [self.entries[name] for name in self.groups[number]]
        return Group(entries[0].offset, tuple(piece for entry in entries for piece in entry.pieces))

    def read(self, name: str, into: torch.Tensor) -> None:
        """Reads a tensor and checks its bytes.

        Args:
            name: Its name.
            into: Receives it: contiguous, on CPU, of its dtype and shape.

        Raises:
            OffloadError: If there is none of that name, dtype and shape, or its bytes are not what was written.
        """
        entry = self.entries.get(name)
        if entry is None or entry.shape != tuple(into.shape) or entry.dtype != str(into.dtype).removeprefix("torch."):
            found = "none" if entry is None else f"{entry.dtype} {list(entry.shape)}"
            raise OffloadError(f"{self.path} should hold {name} as {into.dtype} {list(into.shape)}, and holds {found}")
        target = into.view(-1).view(torch.uint8) if into.numel() else into.new_empty(0, dtype=torch.uint8)
        self._read_pieces(entry, target)

    def check(self, name: str) -> None:
        """Checks the bytes of a tensor.

        Args:
            name: Its name.

        Raises:
            OffloadError: If its bytes are not what was written.
        """
        self._read_pieces(self.entries[name], torch.empty(0, dtype=torch.uint8))

    def _read_pieces(self, entry: Entry, target: torch.Tensor) -> None:
        """Reads into as many bytes as there are, and checks them all."""
        start = 0
        with self.path.open("rb", buffering=0) as file:
            for piece in entry.pieces:
                whole = target[start : start + piece.num_bytes]
                data = whole
                if data.numel() < piece.num_bytes:
                    data = torch.empty(piece.num_bytes, dtype=torch.uint8)
                self._read(file.fileno(), data, entry.offset + start)
                if crc32c(data) != piece.sum:
                    raise OffloadError(f"{self.path} is damaged at byte {entry.offset + start} (checksum). {REMEDY}")
                if data is not whole:
                    whole.copy_(data[: whole.numel()])
                start += piece.num_bytes
            os.posix_fadvise(file.fileno(), entry.offset, entry.num_bytes, os.POSIX_FADV_DONTNEED)

    def _read(self, file: int, data: torch.Tensor, offset: int) -> None:
        view, done = _bytes_of(data), 0
        while done < len(view):
            try:
                count = os.preadv(file, [view[done:]], offset + done)
            except OSError as error:
                raise OffloadError(f"{self.path} cannot be read at byte {offset + done} ({error.strerror})") from error
            if count == 0:
                raise OffloadError(f"{self.path} ends at byte {offset + done}, too early")
            done += count


def _bytes_of(data: torch.Tensor) -> memoryview:
    """The memory of a tensor of bytes."""
    array: Any = data.numpy()
    return memoryview(array)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
