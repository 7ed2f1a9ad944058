"""Fixtures that unit tests of kernels share."""

from __future__ import annotations

import ctypes
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from vllm_sirius.kernels.cpu import build
from vllm_sirius.kernels.cpu.library_store import LibraryStoreError, prepare_root

ROOT = Path(__file__).resolve().parents[2]
MOST_KEPT = 30
"""Libraries of the last few states of the sources."""


@pytest.fixture
def fresh_input() -> None:
    """Fresh random input in every run; pytest shows the seed of a failing test."""
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")
    torch.manual_seed(value)
    random.seed(value)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Keeps tests fast on busy machines."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_or_two_threads(fresh_input: None) -> Iterator[None]:
    """A number of threads drawn at random, and afterwards the one from before."""
    before = torch.get_num_threads()
    torch.set_num_threads(random.choice((1, 2)))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def library_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ctypes.CDLL]:
    """Compiles the CPU kernels as for a processor that lacks some instructions: `library_without(option of the compiler)`.

    With less optimisation than for use, which takes a third of the time; the same instructions are chosen. Libraries are kept
    from run to run, each for its sources, options and compiler.
    """

    def compile_and_load(option: str) -> ctypes.CDLL:
        monkeypatch.setenv("SIRIUS_CACHE", str(_kept_kernels() or tmp_path))
        monkeypatch.setenv("CXX", " ".join([*build._compiler(), option]))
        monkeypatch.setattr(build, "FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in build.FLAGS))
        library: ctypes.CDLL = build.load_library.__wrapped__()
        return library

    return compile_and_load


def _kept_kernels() -> Path | None:
    """The checkout's folder for compiled kernels, less the oldest of many; ``None`` where others may write above it."""
    try:
        root = prepare_root(ROOT / "build" / "test-kernels")
    except LibraryStoreError:
        return None
    libraries = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for library in libraries[:-MOST_KEPT]:
        shutil.rmtree(library, ignore_errors=True)
    return root
