"""Pages of a checkpoint that were read and are not needed again. Knows the memory of this process, not what lies in it.

A checkpoint is read through a memory mapping, and every page that was read stays in the process until the file is closed: as
many bytes again as the weights take.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from pathlib import Path

import numpy as np
import torch

LEAST_BYTES = 1 << 20
"""Smaller tensors are not worth the calls."""

PAGEMAP = Path("/proc/self/pagemap")

_ADVICE = getattr(mmap, "MADV_DONTNEED", None)
_PRESENT, _SWAPPED, _OF_FILE = 1 << 63, 1 << 62, 1 << 61
"""Marks of a page in ``/proc/self/pagemap``."""


def give_back(tensor: torch.Tensor) -> int:
    """Unmaps the whole pages of a tensor if they can be read again from where they came.

    A page that belongs to no file, or that was written to since it was read, would be lost; then nothing is done. The tensor
    stays readable.

    Args:
        tensor: A tensor, on any device.

    Returns:
        Bytes given back; 0 where they are not the pages of a file or the system does not tell.
    """
    if _ADVICE is None or not tensor.is_cpu or tensor.nbytes < LEAST_BYTES or not tensor.is_contiguous():
        return 0
    start = -(-tensor.data_ptr() // mmap.PAGESIZE)
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE
    if not _are_of_file(start, end - start):
        return 0
    address, size = start * mmap.PAGESIZE, (end - start) * mmap.PAGESIZE
    failed = _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _ADVICE)
    return 0 if failed else size


def _are_of_file(first_page: int, num_pages: int) -> bool:
    try:
        with PAGEMAP.open("rb", buffering=0) as pagemap:
            known = os.pread(pagemap.fileno(), 8 * num_pages, 8 * first_page)
    except OSError:
        return False
    pages = np.frombuffer(known, dtype=np.uint64)
    if len(pages) != num_pages or not (pages & np.uint64(_PRESENT)).any():
        return False
    mine = ((pages & np.uint64(_PRESENT)) != 0) & ((pages & np.uint64(_OF_FILE)) == 0)
    return not (mine | ((pages & np.uint64(_SWAPPED)) != 0)).any()


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
