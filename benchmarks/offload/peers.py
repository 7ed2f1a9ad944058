"""Fetches and builds llama.cpp: `python -m benchmarks.offload.peers FOLDER`.

Its sources come with a package of the registry; its server and its quantiser are compiled for this very processor.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.errors import BenchmarkError, exit_status

PACKAGE = "llama-cpp-python==0.3.36"
SOURCES = "vendor/llama.cpp"
TARGETS = ("llama-server", "llama-quantize")
SETTINGS = (
    "CMAKE_BUILD_TYPE=Release",
    "GGML_NATIVE=ON",
    "BUILD_SHARED_LIBS=OFF",
    "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_CURL=OFF",
    "LLAMA_OPENSSL=OFF",
)


def fetch(folder: Path) -> None:
    """Puts the sources into ``FOLDER/source``.

    Args:
        folder: The folder.

    Raises:
        BenchmarkError: If the package cannot be had or has no sources in it.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        package = ["--no-deps", "--no-binary", PACKAGE.partition("==")[0], PACKAGE, "--dest", scratch]
        _run([sys.executable, "-P", "-m", "pip", "download", "--quiet", *package])
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as opened:
            opened.extractall(scratch, filter="data")
        found = list(Path(scratch).glob(f"*/{SOURCES}/CMakeLists.txt"))
        if not found:
            raise BenchmarkError(f"{PACKAGE} has no {SOURCES}; choose another version")
        shutil.move(found[0].parent, folder / "source")


def build(folder: Path, jobs: int) -> None:
    """Compiles into ``FOLDER/build``.

    Args:
        folder: The folder.
        jobs: Compilers that run side by side.

    Raises:
        BenchmarkError: If a tool is missing or fails.
    """
    settings = [f"-D{setting}" for setting in SETTINGS]
    _run(["cmake", "-S", str(folder / "source"), "-B", str(folder / "build"), *settings])
    _run(["cmake", "--build", str(folder / "build"), "--parallel", str(jobs), "--target", *TARGETS])


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError as error:
        raise BenchmarkError(f"there is no {command[0]} here: install it, and a compiler of C++") from error
    except subprocess.CalledProcessError as error:
        raise BenchmarkError(f"{' '.join(command[:4])} ... ended with exit status {error.returncode}") from error


def run(given: argparse.Namespace) -> int:
    """Carries out a parsed command.

    Args:
        given: The command line.

    Returns:
        Exit status.
    """
    given.folder.mkdir(parents=True, exist_ok=True)
    if not (given.folder / "source").exists():
        fetch(given.folder)
    build(given.folder, given.jobs)
    print(f"{given.folder}: llama.cpp is ready; give it with --llama-cpp", flush=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetches and builds llama.cpp.

    Args:
        arguments: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit status: 0, 1 after a failure, 130 after an interruption.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.offload.peers", description="Fetches and builds llama.cpp.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s")
    return exit_status(functools.partial(run, parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
