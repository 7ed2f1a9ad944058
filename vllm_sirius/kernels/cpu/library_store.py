"""Keeps compiled libraries on disk, and hands out none that somebody else or a full disk may have written.

A library is a folder of its own, ``ROOT/KEY/``, with the library and its checksum. It is written under another name, flushed
to the disk and renamed as a whole, so no process ever sees half of it. Code of a library runs with the rights of whoever loads
it, so root and library must belong to the user (or to the administrator), and nobody else may write them or swap one of the
folders above.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import hashlib
import logging
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LIBRARY = "gated_ffn.so"
CHECKSUM = "gated_ffn.so.sha256"
LOCK = ".lock"

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
UNCLEAN = stat.S_ISVTX
"""Mark of a root that was closed to others and may still hold what they put there."""

logger = logging.getLogger("vllm.sirius")


class LibraryStoreError(Exception):
    """A folder cannot be used, or a file in it must not be loaded; the text names it and the reason."""


def find_library(folder: Path) -> Path | None:
    """Looks for a library whose owner, mode and checksum are right.

    Args:
        folder: Its folder, in a root that `prepare_root` has judged.

    Returns:
        Its path, or ``None`` if there is no such folder.

    Raises:
        LibraryStoreError: If what is there must not be loaded.
    """
    if not os.path.lexists(folder):
        return None
    library, checksum = folder / LIBRARY, folder / CHECKSUM
    _check_entry(folder, stat.S_IFDIR)
    _check_entry(library, stat.S_IFREG)
    _check_entry(checksum, stat.S_IFREG)
    try:
        expected, found = checksum.read_text(errors="replace").strip(), _checksum(library)
    except OSError as error:
        raise LibraryStoreError(f"{error.filename} cannot be read: {error.strerror}") from error
    if found != expected:
        raise LibraryStoreError(f"{library} is damaged: it does not have the checksum in {CHECKSUM}")
    return library


def find_or_make_library(root: Path, key: str, compile_to: Callable[[Path], None]) -> Path:
    """Returns a library, making it if there is none that may be loaded.

    Processes that need the same library at once wait for the first one.

    Args:
        root: Folder of all libraries, made if it is missing.
        key: What determines the library; the name of its folder.
        compile_to: Writes the library to a path.

    Returns:
        The path of the library.

    Raises:
        LibraryStoreError: If the root cannot be trusted or written to, or the new library is not as it was written.
    """
    root = prepare_root(root)
    folder, fault = root / key, ""
    try:
        library = find_library(folder)
        if library is not None:
            return library
    except LibraryStoreError as error:
        fault = f"{error}; "
    try:
        with _lock(root):
            library = _find_or_discard(folder)
            if library is None:
                _make(root, folder, compile_to)
                library = find_library(folder)
    except OSError as error:
        raise LibraryStoreError(f"{fault}{root} is not writable: {error}") from error
    if library is None:
        raise LibraryStoreError(f"{folder} was removed while it was made")
    return library


def prepare_root(root: Path) -> Path:
    """Makes the folder of all libraries for this user alone, or judges the one that is there.

    A folder of this user that others may write is closed to them, and all that is in it is thrown away.

    Args:
        root: The folder. Folders above it may be links.

    Returns:
        The folder by a path without links.

    Raises:
        LibraryStoreError: If it cannot be made, or others may write or swap it.
    """
    try:
        # From here on without links: whoever changes one later changes nothing for this process.
        root = root.parent.resolve() / root.name
        _make_folders(root)
    except (OSError, RuntimeError) as error:
        raise LibraryStoreError(f"{root} is not writable: {error}") from error
    for parent in root.parents:
        _check_parent(parent)
    if _is_to_be_cleaned(root):
        try:
            _close_and_clean(root)
        except OSError as error:
            raise LibraryStoreError(f"{root} may be written by others and cannot be closed to them: {error}") from error
    _check_entry(root, stat.S_IFDIR)
    return root


def _make_folders(root: Path) -> None:
    missing = [folder for folder in (root, *root.parents) if not os.path.lexists(folder)]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)


def _check_parent(folder: Path) -> None:
    """Refuses a folder in which somebody else may rename what is in it. In a sticky one only the owner of an entry may."""
    found, user = folder.lstat(), os.geteuid()
    if found.st_uid not in (user, 0):
        raise LibraryStoreError(f"{folder} above it belongs to user {found.st_uid}, and this is user {user}")
    others = OTHERS_WRITE if not _is_private_group(found) else stat.S_IWOTH
    if found.st_mode & others and not found.st_mode & stat.S_ISVTX:
        raise LibraryStoreError(f"{folder} above it may be written by others (mode {stat.S_IMODE(found.st_mode):04o})")


def _is_private_group(found: os.stat_result) -> bool:
    """Whether a file's group is its owner's alone, as where each user has a group of the same name and umask 002."""
    try:
        owner, group = pwd.getpwuid(found.st_uid), grp.getgrgid(found.st_gid)
    except KeyError:
        return False
    named_alike = group.gr_gid == owner.pw_gid and group.gr_name == owner.pw_name
    return named_alike and set(group.gr_mem) <= {owner.pw_name}


def _is_to_be_cleaned(root: Path) -> bool:
    found = root.lstat()
    return (
        stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and bool(found.st_mode & (OTHERS_WRITE | UNCLEAN))
    )


def _close_and_clean(root: Path) -> None:
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _wait_for_lock(handle, root)
        if not _is_to_be_cleaned(root):
            return  # another process of this user did it
        mode = stat.S_IMODE(root.lstat().st_mode)
        os.fchmod(handle, 0o700 | UNCLEAN)
        logger.warning(
            "Sirius: others could write the folder of compiled CPU kernels %s (mode %04o): it is the user's alone now, and all "
            "kernels in it are thrown away and made anew",
            root,
            mode,
        )
        for entry in root.iterdir():
            _remove(entry)
        os.fchmod(handle, 0o700)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _check_entry(path: Path, kind: int) -> None:
    try:
        found = path.lstat()
    except OSError as error:
        raise LibraryStoreError(f"{path} cannot be read: {error.strerror}") from error
    user = os.geteuid()
    if stat.S_ISLNK(found.st_mode):
        raise LibraryStoreError(f"{path} is a symbolic link")
    if stat.S_IFMT(found.st_mode) != kind:
        raise LibraryStoreError(f"{path} is not a {'folder' if kind == stat.S_IFDIR else 'file'}")
    if found.st_uid not in (user, 0):
        raise LibraryStoreError(f"{path} belongs to user {found.st_uid}, and this is user {user}")
    if found.st_mode & OTHERS_WRITE:
        raise LibraryStoreError(f"{path} may be written by others (mode {stat.S_IMODE(found.st_mode):04o})")


def _find_or_discard(folder: Path) -> Path | None:
    try:
        return find_library(folder)
    except LibraryStoreError as error:
        logger.warning("Sirius: compiled CPU kernels are thrown away and made anew: %s", error)
    # By a name of its own first: others who wait for this lock or look without one see it whole or not at all.
    away = folder.with_name(f".thrown-away-{os.getpid()}-{folder.name}")
    folder.rename(away)
    with suppress(OSError):
        _remove(away)
    return None


def _make(root: Path, folder: Path, compile_to: Callable[[Path], None]) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=root))
    try:
        library, checksum = unfinished / LIBRARY, unfinished / CHECKSUM
        compile_to(library)
        checksum.write_text(_checksum(library) + "\n")
        for path, mode in ((library, 0o700), (checksum, 0o600), (unfinished, 0o700)):
            path.chmod(mode)
            _flush(path)
        try:
            unfinished.rename(folder)
        except OSError:
            # Where there are no locks another process may have been faster; its library is as good.
            if not folder.is_dir():
                raise
        _flush(root)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems know no such thing for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """Lets one process of this user make libraries at a time; without effect where the file system has no locks."""
    handle = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _wait_for_lock(handle, root)
        yield
    finally:
        os.close(handle)


def _wait_for_lock(handle: int, root: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("Sirius: another process is compiling CPU kernels, waiting for it")
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        logger.debug("no lock on %s: %s", root, error)
