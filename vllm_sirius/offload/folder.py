"""The folder of the files: their names, who may build or remove one, and what is said of them."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_sirius.kernels.cpu.build import cache_folder
from vllm_sirius.offload.errors import OffloadError

logger = logging.getLogger("vllm.sirius")

SUFFIX = ".weights"
HEADER_BYTES = 1 << 16
"""Bytes of a checkpoint file that are hashed: of safetensors they have the names and places of the tensors, or most of them."""


def offload_folder(configured: str | None) -> Path:
    """Where files are kept.

    Args:
        configured: What the user gave, or ``None`` for the default.
    """
    return Path(configured).expanduser().absolute() if configured else cache_folder() / "offload"


def prepare(folder: Path) -> None:
    """Makes the folder if there is none.

    Args:
        folder: The folder.

    Raises:
        OffloadError: If files cannot be made in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OffloadError(
            f"offload_path={str(folder)!r} cannot be made ({error.strerror}): give a folder of yours."
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OffloadError(f"offload_path={str(folder)!r} cannot be written to: give a folder of yours.")


def file_of(folder: Path, model: str, variant: str) -> Path:
    """The file of a model: always the same one, so that a changed checkpoint takes the place of the old one.

    Args:
        folder: The folder.
        model: Where its checkpoint lies.
        variant: What else the weights depend on.
    """
    name = Path(model).name or "model"
    digest = hashlib.sha256(
        f"{Path(model).absolute() if Path(model).exists() else model}\0{variant}".encode()
    ).hexdigest()
    return folder / f"{name}-{digest[:12]}{SUFFIX}"


def identify(files: Sequence[Path]) -> list[list[Any]]:
    """What tells checkpoint files from others of their names: name, size, time of change and a hash of the first bytes.

    Args:
        files: The files.
    """
    found: list[list[Any]] = []
    for file in sorted(files):
        stat = file.stat()
        with file.open("rb") as opened:
            digest = hashlib.sha256(opened.read(HEADER_BYTES)).hexdigest()
        found.append([file.name, stat.st_size, stat.st_mtime_ns, digest])
    return found


@contextmanager
def building(path: Path) -> Iterator[None]:
    """Around finding or building a file: one engine at a time does.

    Args:
        path: The file.

    Raises:
        OffloadError: If the lock cannot be had.
    """
    lock = lock_of(path)
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise OffloadError(
            f"{lock} cannot be opened ({error.strerror}): set offload_path to a folder of yours."
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Sirius: another engine builds %s; waiting until it is done", path)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def hold(path: Path) -> int:
    """Marks a file as used by this process until the returned descriptor is closed.

    Args:
        path: The file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


def lock_of(path: Path) -> Path:
    """The file that is locked while another one is found or built.

    Args:
        path: The other one.
    """
    return path.with_name(f".{path.name}.lock")


def is_used(path: Path) -> bool:
    """Whether an engine reads a file, or is starting with it or building it.

    Args:
        path: The file; while it is built there need not be one.
    """
    return _is_locked(path) or _is_locked(lock_of(path))


def _is_locked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
