"""The C++ part of the room, compiled like the kernels and called by ctypes, which lets other Python threads run meanwhile."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from vllm_sirius.kernels.cpu.build import KernelBuildError, Sources, build_library

SOURCES = Sources("the reader of offloaded weights", Path(__file__).parent, ("stream.cpp",))


@functools.cache
def load_library() -> ctypes.CDLL:
    """Loads the library, compiling it if the cache has none that fits.

    Raises:
        KernelBuildError: If there is no working compiler, or the library does not load.
    """
    path = build_library(SOURCES)
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        raise KernelBuildError(f"{SOURCES.what} in {path} does not load ({error}): delete its folder") from error
    return library


def crc32c(tensor: torch.Tensor) -> int:
    """CRC-32C of the bytes of a contiguous tensor on CPU.

    Args:
        tensor: The tensor.
    """
    assert tensor.is_cpu
    assert tensor.is_contiguous()
    found: int = load_library().sirius_crc32c(tensor.data_ptr(), tensor.nbytes)
    return found


def _declare(library: ctypes.CDLL) -> None:
    pointer, size, number, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_char_p
    library.sirius_crc32c.argtypes = [pointer, size]
    library.sirius_crc32c.restype = ctypes.c_uint32
    library.sirius_stream_open.argtypes = [
        *(text, size, pointer, pointer, pointer, pointer, pointer, number, number, ctypes.c_double, ctypes.c_double),
        *(pointer, size),
    ]
    library.sirius_stream_open.restype = pointer
    library.sirius_stream_wait.argtypes = [pointer, size, size]
    library.sirius_stream_wait.restype = pointer
    library.sirius_stream_release.argtypes = [pointer, size]
    library.sirius_stream_release.restype = None
    library.sirius_stream_direct.argtypes = [pointer]
    library.sirius_stream_direct.restype = number
    library.sirius_stream_error.argtypes = [pointer, pointer, size]
    library.sirius_stream_error.restype = None
    library.sirius_stream_statistics.argtypes = [pointer, pointer]
    library.sirius_stream_statistics.restype = None
    library.sirius_stream_close.argtypes = [pointer]
    library.sirius_stream_close.restype = number
