"""Keeps a file in memory: `python -m benchmarks.offload.pin FILE`, until its input ends.

llama.cpp maps both of its models, and the kernel, which drops what was used least recently, drops the draft while the target is
read. Locked pages stay, and count into the cage of whoever locks them.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.offload.answering import AnsweringError
from vllm_sirius.measuring.child import child_environment

READY = "pinned"
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def pinned(file: Path, prefix: Sequence[str]) -> Iterator[None]:
    """Keeps a file in memory while the block lasts.

    Args:
        file: The file.
        prefix: Words before the command of the process that does so.

    Raises:
        AnsweringError: If the memory does not allow it.
    """
    command = [*prefix, sys.executable, "-P", "-S", "-m", "benchmarks.offload.pin", str(file)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=child_environment(PYTHONPATH=str(ROOT)),
        text=True,
    )
    assert process.stdout is not None
    try:
        if process.stdout.readline().strip() != READY:
            _, errors = process.communicate()
            last = errors.strip().splitlines()
            raise AnsweringError(f"{file} cannot be kept in memory: {last[-1] if last else 'its process was ended'}")
        yield
    finally:
        process.kill()
        process.communicate()


def lock(file: Path) -> None:
    """Locks a file's pages into the memory of this process.

    Args:
        file: The file.

    Raises:
        OSError: If the system refuses.
    """
    size = file.stat().st_size
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    read, shared = 1, 1
    handle = os.open(file, os.O_RDONLY)
    address = library.mmap(None, size, read, shared, handle, 0)
    os.close(handle)
    if address in (None, ctypes.c_void_p(-1).value) or library.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)):
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)}: locking {size} bytes takes root, or a higher `ulimit -l`")


if __name__ == "__main__":
    lock(Path(sys.argv[1]))
    print(READY, flush=True)
    sys.stdin.read()
