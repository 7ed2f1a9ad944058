"""Compiled libraries on disk: whole, the user's own and as they were written, or made anew, or refused."""

from __future__ import annotations

import errno
import grp
import logging
import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vllm_sirius.kernels.cpu import build
from vllm_sirius.kernels.cpu.library_store import (
    CHECKSUM,
    LIBRARY,
    LOCK,
    LibraryStoreError,
    find_library,
    find_or_make_library,
)
from vllm_sirius.kernels.native import choose_kernels

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


@pytest.mark.parametrize(("spoil", "reason"), UNTRUSTED[1:])
def test_a_root_that_cannot_be_trusted_is_refused(
    root: Path, folder: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(root)
    compiler = Compiler()
    with pytest.raises(LibraryStoreError, match=f"{root} {reason}"):
        find_or_make_library(root, KEY, compiler)
    assert compiler.runs == 0


@pytest.mark.parametrize("mode", [0o775, 0o1777])
def test_a_root_of_the_users_that_others_could_write_is_closed_and_made_anew(
    root: Path, folder: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    """As an earlier release left it under umask 002."""
    (root / "of-another-key").mkdir()
    (root / "link").symlink_to(folder)
    root.chmod(mode)
    compiler = Compiler(CONTENT.lower())
    with caplog.at_level(logging.WARNING, "vllm.sirius"):
        library = find_or_make_library(root, KEY, compiler)
        assert find_or_make_library(root, KEY, compiler) == library
    assert compiler.runs == 1
    assert library.read_bytes() == CONTENT.lower()
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert sorted(path.name for path in root.iterdir()) == [LOCK, KEY]
    (record,) = caplog.records
    assert f"{root} (mode {mode:04o})" in record.getMessage()
    assert "thrown away" in record.getMessage()


def test_a_root_whose_cleaning_was_cut_off_is_cleaned(root: Path, folder: Path) -> None:
    root.chmod(0o1700)
    compiler = Compiler()
    find_or_make_library(root, KEY, compiler)
    assert compiler.runs == 1
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


SWAPPABLE = [
    pytest.param(lambda path: path.chmod(0o777), r"may be written by others \(mode 0777\)", id="writable"),
    pytest.param(give_away, "belongs to user 12345", id="owner", marks=needs_root),
    pytest.param(
        lambda path: (os.chown(path, -1, 12345), path.chmod(0o770)),
        r"may be written by others \(mode 0770\)",
        id="group",
        marks=needs_root,
    ),
]


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("above", [1, 2])
@pytest.mark.parametrize(("spoil", "reason"), SWAPPABLE)
def test_a_root_that_others_may_swap_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], reason: str, above: int, linked: bool
) -> None:
    root = tmp_path / "a" / "b" / "root"
    find_or_make_library(root, KEY, Compiler())
    parent = root.parents[above - 1]
    spoil(parent)
    if linked:
        (tmp_path / "link").symlink_to(root.parent)
        root = tmp_path / "link" / "root"
    compiler = Compiler()
    with pytest.raises(LibraryStoreError, match=f"{parent} above it {reason}"):
        find_or_make_library(root, KEY, compiler)
    assert compiler.runs == 0


def test_folders_above_may_be_sticky_links_or_writable_by_the_users_own_group(
    tmp_path: Path,
) -> None:
    """The folder for temporary files, a home on another disk, and a home under umask 002."""
    user = pwd.getpwuid(os.geteuid())
    shared, own = tmp_path / "shared", tmp_path / "shared" / "own"
    own.mkdir(parents=True)
    shared.chmod(0o1777)
    (tmp_path / "link").symlink_to(own)
    if grp.getgrgid(user.pw_gid).gr_name == user.pw_name:
        os.chown(own, -1, user.pw_gid)
        own.chmod(0o775)
    library = find_or_make_library(tmp_path / "link" / "root", KEY, Compiler())
    assert library == own / "root" / KEY / LIBRARY


def test_folders_that_are_made_on_the_way_are_the_users_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        find_or_make_library(tmp_path / "a" / "b" / "root", KEY, Compiler())
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b", "a/b/root")} == {0o700}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_file_system_need_not_flush_folders(root: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Some network file systems answer EINVAL; a disk that fails is another thing."""
    fsync = os.fsync

    def fsync_files(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync_files)
    if number == errno.EINVAL:
        assert find_or_make_library(root, KEY, Compiler()).read_bytes() == CONTENT
        return
    with pytest.raises(LibraryStoreError, match="is not writable"):
        find_or_make_library(root, KEY, Compiler())


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
        "from vllm_sirius.kernels.cpu.library_store import find_or_make_library\n"
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
    root.parent.chmod(0o777)
    monkeypatch.setenv("SIRIUS_CACHE", str(root))
    build.load_library.cache_clear()
    with caplog.at_level(logging.WARNING, "vllm.sirius"):
        choice = choose_kernels(torch.float32, torch.device("cpu"))
    assert not choice.native
    (record,) = caplog.records
    for text in (choice.reason, record.getMessage()):
        assert f"{root.parent} above it may be written by others (mode 0777)" in text
        assert "set SIRIUS_CACHE to" in text


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SIRIUS_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(build.KernelBuildError, match="set SIRIUS_CACHE"):
        build.cache_folder()
