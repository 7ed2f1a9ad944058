"""Compiled libraries on disk: whole, the user's own and as they were written, or made anew, or refused."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vllm_sirius.ffn.kernels.cpu import build
from vllm_sirius.ffn.kernels.cpu.library_store import (
    CHECKSUM,
    LIBRARY,
    LOCK,
    LibraryStoreError,
    find_library,
    find_or_make_library,
)
from vllm_sirius.ffn.kernels.native import choose_kernels

CONTENT = b"\x7fELF and what follows"
KEY = "key"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


class Compiler:
    """Writes a library, as a compiler under a permissive umask does, and counts."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.runs = 0
        self._content = content

    def __call__(self, path: Path) -> None:
        self.runs += 1
        path.write_bytes(self._content)
        path.chmod(0o777)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "root"


@pytest.fixture
def folder(root: Path) -> Path:
    """A library that is all right."""
    find_or_make_library(root, KEY, Compiler())
    return root / KEY


def make_others_write(path: Path) -> None:
    path.chmod(path.stat().st_mode | stat.S_IWGRP)


def put_behind_a_link(path: Path) -> None:
    elsewhere = path.with_name(path.name + ".real")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def give_away(path: Path) -> None:
    os.chown(path, 12345, -1)


def truncate(path: Path) -> None:
    os.truncate(path, 5)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def change(path: Path) -> None:
    path.write_bytes(CONTENT.upper())


def put_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


UNTRUSTED = [
    pytest.param(make_others_write, "may be written by others", id="writable"),
    pytest.param(put_behind_a_link, "is a symbolic link", id="link"),
    pytest.param(give_away, "belongs to user 12345", id="owner", marks=needs_root),
]
DAMAGED = [
    pytest.param(truncate, "is damaged", id="truncated"),
    pytest.param(empty, "is damaged", id="empty"),
    pytest.param(change, "is damaged", id="changed"),
    pytest.param(Path.unlink, "cannot be read", id="missing"),
    pytest.param(put_a_folder, "is not a file", id="folder"),
]


def test_what_is_made_is_the_users_alone(root: Path) -> None:
    compiler = Compiler()
    library = find_or_make_library(root, KEY, compiler)
    assert find_or_make_library(root, KEY, compiler) == find_library(root / KEY) == library == root / KEY / LIBRARY
    assert compiler.runs == 1
    assert library.read_bytes() == CONTENT
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == [
        LOCK,
        KEY,
        f"{KEY}/{LIBRARY}",
        f"{KEY}/{CHECKSUM}",
    ]
    for path in (root, *root.rglob("*")):
        assert not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO), path


@pytest.mark.parametrize(("spoil", "reason"), [*UNTRUSTED, *DAMAGED])
@pytest.mark.parametrize("name", [LIBRARY, CHECKSUM])
def test_a_spoilt_library_is_never_found_and_made_anew_once(
    root: Path, folder: Path, name: str, spoil: Callable[[Path], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(folder / name)
    with pytest.raises(LibraryStoreError, match=reason) as caught:
        find_library(folder)
    assert str(folder) in str(caught.value)
    compiler = Compiler()
    with caplog.at_level(logging.WARNING, "vllm.sirius"):
        library = find_or_make_library(root, KEY, compiler)
        assert find_or_make_library(root, KEY, compiler) == library
    assert compiler.runs == 1
    assert library.read_bytes() == CONTENT
    assert not library.is_symlink()
    (record,) = caplog.records
    assert str(caught.value) in record.getMessage()
    assert sorted(path.name for path in root.iterdir()) == [LOCK, KEY], "nothing of the old one is left"


@pytest.mark.parametrize(("spoil", "reason"), UNTRUSTED)
def test_a_library_in_a_spoilt_folder_is_made_anew(
    root: Path, folder: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(folder)
    with pytest.raises(LibraryStoreError, match=reason):
        find_library(folder)
    compiler = Compiler()
    find_or_make_library(root, KEY, compiler)
    assert compiler.runs == 1
    assert find_library(folder) is not None


@pytest.mark.parametrize(("spoil", "reason"), UNTRUSTED)
def test_a_root_that_cannot_be_trusted_is_refused(
    root: Path, folder: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(root)
    compiler = Compiler()
    with pytest.raises(LibraryStoreError, match=f"{root} {reason}"):
        find_or_make_library(root, KEY, compiler)
    assert compiler.runs == 0


def test_a_failed_compilation_leaves_nothing(root: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(CONTENT[:3])
        raise build.KernelBuildError("no such instruction")

    with pytest.raises(build.KernelBuildError, match="no such instruction"):
        find_or_make_library(root, KEY, fail)
    assert [path.name for path in root.iterdir()] == [LOCK]


def test_a_library_that_another_process_makes_meanwhile_is_waited_for(root: Path) -> None:
    program = (
        "import sys, time, pathlib\n"
        "from vllm_sirius.ffn.kernels.cpu.library_store import find_or_make_library\n"
        "def compile_to(path):\n"
        "    print('compiling', flush=True); time.sleep(1); path.write_bytes(b'library')\n"
        f"find_or_make_library(pathlib.Path(sys.argv[1]), {KEY!r}, compile_to)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    other = subprocess.Popen([sys.executable, "-c", program, str(root)], env=environment, stdout=subprocess.PIPE)
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"compiling\n"
        compiler = Compiler()
        assert find_or_make_library(root, KEY, compiler).read_bytes() == b"library"
    assert other.returncode == 0
    assert compiler.runs == 0


def test_refused_kernels_are_told_loudly_with_a_remedy(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root.mkdir(parents=True)
    root.chmod(0o777)
    monkeypatch.setenv("SIRIUS_CACHE", str(root))
    build.load_library.cache_clear()
    with caplog.at_level(logging.WARNING, "vllm.sirius"):
        choice = choose_kernels(torch.float32, torch.device("cpu"))
    assert not choice.native
    (record,) = caplog.records
    for text in (choice.reason, record.getMessage()):
        assert f"{root} may be written by others (mode 0777)" in text
        assert "set SIRIUS_CACHE to" in text


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SIRIUS_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(build.KernelBuildError, match="set SIRIUS_CACHE"):
        build.cache_folder()
