"""Compiles the C++ kernels for this machine and loads them.

The library is plain C behind ctypes, so building needs a C++ compiler and takes up to a minute. It is kept in a cache folder
of the user (`library_store`), named after everything that determines it: sources, flags, compiler and the instructions of the
processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_sirius.kernels.cpu.library_store import LibraryStoreError, find_or_make_library

logger = logging.getLogger("vllm.sirius")

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno")
SOURCES = ("gated_ffn.cpp", "low_bit.cpp", "low_bit_panels.cpp", "panels.cpp")


@dataclass(frozen=True)
class Sources:
    """What a library is compiled from.

    Attributes:
        what: What it is, for the log.
        folder: Where the sources are; headers beside them count as sources.
        files: Those that are compiled.
    """

    what: str
    folder: Path
    files: tuple[str, ...]


KERNELS = Sources("CPU kernels", Path(__file__).parent, SOURCES)

BUILD_SECONDS = 300
CACHE = "SIRIUS_CACHE"
"""Environment variable: folder of the compiled kernels."""


class KernelBuildError(RuntimeError):
    """The CPU kernels cannot be compiled or loaded; the message has the compiler's words."""


@functools.cache
def load_library() -> ctypes.CDLL:
    """Loads the kernels, compiling them if the cache has none that fit.

    Returns:
        The library, bound to the OpenMP runtime that PyTorch uses.

    Raises:
        KernelBuildError: If there is no working compiler, the cache cannot be trusted or the library does not load.
    """
    path = build_library()
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        raise KernelBuildError(
            f"the CPU kernels in {path} do not load ({error}): delete its folder, and if the file system does not allow to run "
            f"code, set {CACHE} to a folder that does"
        ) from error
    library.sirius_use_openmp(*_openmp_entry_points())
    return library


def build_library(sources: Sources = KERNELS) -> Path:
    """Returns the path of the compiled library, compiling it unless the cache has one that may be loaded.

    Args:
        sources: What to compile.

    Raises:
        KernelBuildError: If compiling fails, or the cache cannot be trusted or written to.
    """
    compiler = _compiler()
    try:
        return find_or_make_library(
            cache_folder(), _fingerprint(compiler, sources), lambda path: _compile(compiler, sources, path)
        )
    except LibraryStoreError as error:
        raise KernelBuildError(
            f"the cache of compiled {sources.what} cannot be used, {error}: set {CACHE} to a folder that belongs to you and that "
            "no one else may write or rename, or repair this one"
        ) from error


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$SIRIUS_CACHE`` or a folder in the user's home.

    Raises:
        KernelBuildError: If there is neither.
    """
    configured = os.environ.get(CACHE)
    if configured:
        return Path(configured).absolute()
    try:
        return Path.home() / ".cache" / "vllm_sirius"
    except RuntimeError as error:
        raise KernelBuildError(f"this user has no home folder to keep compiled CPU kernels in: set {CACHE}") from error


def _compile(compiler: list[str], sources: Sources, path: Path) -> None:
    files = [str(sources.folder / file) for file in sources.files]
    logger.info("Sirius: compiling %s (once for this machine and release)", sources.what)
    started = time.monotonic()
    _run([*compiler, *FLAGS, *_preferences(), *files, "-o", str(path)])
    logger.info("Sirius: %s compiled in %.0f s", sources.what, time.monotonic() - started)


def _compiler() -> list[str]:
    configured = os.environ.get("CXX")
    if configured:
        return shlex.split(configured)
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise KernelBuildError("no C++ compiler found (tried g++, clang++, c++): install one or set CXX")


def _fingerprint(compiler: list[str], sources: Sources) -> str:
    digest = hashlib.sha256()
    folder = sources.folder
    for source in sorted([*folder.glob("*.h"), *folder.glob("*.cpp")]):
        digest.update(source.name.encode() + source.read_bytes())
    for part in (*compiler, *FLAGS, *_preferences(), _run([*compiler, "--version"]), _processor()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


def prefers_pairs() -> bool:
    """Whether this processor multiplies pairs of bf16 faster than floats, which no flag of the compiler says, see ``simd.h``."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _preferences() -> list[str]:
    return ["-DSIRIUS_PREFER_BF16"] if prefers_pairs() else []


def _processor() -> str:
    """Describes the processor as far as ``-march=native`` can depend on it."""
    description = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return description
    keys = ("flags", "Features", "model", "model name", "cpu family", "CPU part")
    return description + "".join(sorted({line for line in lines if line.split(":")[0].strip() in keys}))


def _run(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelBuildError(f"{shlex.join(command)} did not run: {error}") from error
    if result.returncode != 0:
        raise KernelBuildError(
            f"{shlex.join(command)} failed with exit code {result.returncode}:\n{result.stderr.strip()[-4000:]}"
        )
    return result.stdout


def _openmp_entry_points() -> list[ctypes.c_void_p]:
    """Looks the OpenMP runtime up as the dynamic linker did for PyTorch: global scope first, then its own libraries.

    Global scope holds a preloaded libiomp5, which replaces the libgomp that PyTorch brings; both have these functions.
    """
    names = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for path in (None, torch_library):
        try:
            runtime = ctypes.CDLL(None if path is None else str(path))
            return [ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in names]
        except (OSError, AttributeError):
            continue
    raise KernelBuildError("PyTorch uses no OpenMP runtime that the CPU kernels know (libgomp, libiomp5 or libomp)")


def _declare(library: ctypes.CDLL) -> None:
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.sirius_use_openmp.argtypes = [pointer] * 4
    library.sirius_use_openmp.restype = None
    library.sirius_instruction_set.argtypes = []
    library.sirius_instruction_set.restype = ctypes.c_char_p
    library.sirius_coarse_ffn.argtypes = [pointer] * 4 + [size] * 4 + [number] * 3
    library.sirius_coarse_ffn.restype = number
    library.sirius_fine_ffn.argtypes = [pointer] * 3 + [size] * 4 + [number] * 3
    library.sirius_fine_ffn.restype = None
    library.sirius_low_bit_coarse_ffn.argtypes = [pointer] * 5 + [size] * 4 + [number] * 4
    library.sirius_low_bit_coarse_ffn.restype = number
    library.sirius_low_bit_fine_ffn.argtypes = [pointer] * 4 + [size] * 4 + [number] * 4
    library.sirius_low_bit_fine_ffn.restype = None
    library.sirius_low_bit_linear.argtypes = [pointer] * 5 + [size] * 3 + [number] * 3
    library.sirius_low_bit_linear.restype = None
    library.sirius_panel_products.argtypes = []
    library.sirius_panel_products.restype = number
    library.sirius_panel_linear.argtypes = [pointer] * 4 + [size] * 3 + [number] * 2
    library.sirius_panel_linear.restype = None
    library.sirius_low_bit_panel_linear.argtypes = [pointer] * 4 + [size] * 3 + [number] * 2
    library.sirius_low_bit_panel_linear.restype = None
    library.sirius_low_bit_panel_ffn.argtypes = [pointer] * 4 + [size] * 3 + [number] * 3
    library.sirius_low_bit_panel_ffn.restype = None
