"""The page cache of files: what of them lies in memory, and getting it out.

Pages that another process read are nobody's in the cage: a caged program would find its model in memory for nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path


def drop(files: Iterable[Path]) -> int:
    """Drops files from the page cache.

    Args:
        files: The files; what was written to them is put on the disk first.

    Returns:
        Bytes that stayed, because a process has them mapped.
    """
    left = 0
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            left += cached_bytes(handle)
        finally:
            os.close(handle)
    return left


def cached_bytes(handle: int) -> int:
    """Bytes of a file that lie in the page cache.

    Args:
        handle: The open file.
    """
    size = os.fstat(handle).st_size
    if not size:
        return 0
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    pages = -(-size // mmap.PAGESIZE)
    # Python's own mapping does not tell its address unless it can be written to.
    address = library.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        return 0
    try:
        found = (ctypes.c_ubyte * pages)()
        if library.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found):
            return 0
        return sum(page & 1 for page in bytes(found)) * mmap.PAGESIZE
    finally:
        library.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))


def files_of(folder: Path, pattern: str = "*.safetensors") -> list[Path]:
    """The weight files in a folder, or the file itself.

    Args:
        folder: The folder or file.
        pattern: Of their names.
    """
    return [folder] if folder.is_file() else sorted(folder.glob(pattern))
