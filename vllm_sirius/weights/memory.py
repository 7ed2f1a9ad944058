"""Memory for weights, on huge pages where the system has them.

Weights are read once per pass, in long streams or, with fine sparsity, in scattered rows; with 4 KiB pages the kernels miss
the address cache once or twice per row.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch

_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)


def empty_on_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Allocates an uninitialised tensor that is read in scattered pieces or as a long stream.

    Args:
        shape: Its shape.
        dtype: Its dtype.

    Returns:
        The tensor, on CPU, contiguous.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    _prefer_huge_pages(tensor)
    return tensor


def give_free_memory_back() -> None:
    """Has the C library give freed memory back to the system, which it keeps for itself otherwise; glibc alone can.

    While a model loads, plain weights are freed in pieces that are too small for the library to give back by itself.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _prefer_huge_pages(tensor: torch.Tensor) -> None:
    """Asks for huge pages, which must happen before the memory is first written. A system without them says no."""
    if _ADVICE is None:
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _ADVICE)
