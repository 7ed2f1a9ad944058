"""Rows of an embedding that are looked up in a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from vllm_sirius.offload.errors import OffloadError


class StoredRows:
    """An embedding whose rows lie one after the other in a file.

    Reads go through the page cache, which keeps the rows of common tokens for as long as memory is left.

    Args:
        path: The file.
        offset: Where the first row begins.
        num_rows: Rows of the embedding.
        width: Columns of a row.
        dtype: Its dtype.

    Raises:
        OffloadError: If the file cannot be opened.
    """

    def __init__(self, path: Path, offset: int, num_rows: int, width: int, dtype: torch.dtype) -> None:
        self._path, self._offset = path, offset
        self._num_rows, self.width, self.dtype = num_rows, width, dtype
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise OffloadError(f"{path} cannot be opened ({error.strerror})") from error
        os.posix_fadvise(self._file, offset, num_rows * self._row_bytes, os.POSIX_FADV_RANDOM)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Looks rows up.

        Args:
            indices: Integers of any shape, on CPU, each the number of a row.

        Returns:
            ``[*shape, width]``.

        Raises:
            OffloadError: If a row cannot be read.
            IndexError: If there is no such row.
        """
        wanted, places = torch.unique(indices.reshape(-1), return_inverse=True)
        found = torch.empty(len(wanted), self.width, dtype=self.dtype)
        array: Any = found.view(torch.uint8).reshape(-1).numpy()
        memory, size = memoryview(array), self._row_bytes
        for place, row in enumerate(wanted.tolist()):
            if not 0 <= row < self._num_rows:
                raise IndexError(f"token {row} has no row among {self._num_rows}")
            self._read(memory[place * size : (place + 1) * size], self._offset + row * size)
        return found[places].view(*indices.shape, self.width)

    @property
    def _row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def _read(self, target: memoryview, offset: int) -> None:
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._file, [target[done:]], offset + done)
            except OSError as error:
                raise OffloadError(f"{self._path} cannot be read at byte {offset + done}: {error.strerror}") from error
            if count == 0:
                raise OffloadError(f"{self._path} ends at byte {offset + done}, too early")
            done += count

    def __del__(self) -> None:
        """Closes the file."""
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)
            self._file = -1
