"""A cage for one process and its children: a bound of its memory and one of its disk's rate, kept by the kernel.

Programs are caged from outside: `Cage.prefix` goes before their command. The page cache of what they read counts into
their memory, so that a file larger than the bound cannot stay in it, whether it is read or mapped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.offload import groups
from benchmarks.offload.groups import GroupError, Parent

NAME = "sirius-offload"
POLL_SECONDS = 0.1
LEAVING_SECONDS = 10.0
NO_LIMIT = 1 << 60
"""Version 1 says that there is no limit by a number above this."""

JOIN = (
    "import os, sys; count = int(sys.argv[1]); "
    "[open(file, 'w').write(str(os.getpid())) for file in sys.argv[2:2 + count]]; "
    "os.execvp(sys.argv[2 + count], sys.argv[2 + count:])"
)
"""A program that joins groups and becomes another one, so that no byte of that one is counted elsewhere."""


@dataclass(frozen=True)
class Limits:
    """What a cage allows.

    Attributes:
        memory_bytes: Memory, page cache included; there is no swap beside it. ``None`` for no bound.
        read_bytes_per_second: What may be read from `device`; ``None`` for no bound.
        device: ``MAJOR:MINOR`` of the disk.
    """

    memory_bytes: int | None
    read_bytes_per_second: int | None = None
    device: str = ""


@dataclass(frozen=True)
class Report:
    """What the kernel says of a cage.

    Attributes:
        peak_bytes: Most memory, page cache included.
        peak_anonymous_bytes: Most memory that is no page cache, looked at every `POLL_SECONDS`.
        read_bytes: Bytes read from the disk; ``None`` where nobody counted.
        oom_kills: Processes that were ended for want of memory.
    """

    peak_bytes: int | None
    peak_anonymous_bytes: int | None
    read_bytes: int | None
    oom_kills: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


class Cage:
    """Groups that are made when a block begins and removed, with whoever is left in them, when it ends.

    Args:
        limits: What is allowed.
        proc: Where the kernel tells about processes.

    Raises:
        GroupError: Naming what is missing; nothing is left behind.
    """

    def __init__(self, limits: Limits, proc: Path = Path("/proc")) -> None:
        self._limits = limits
        self._name = f"{NAME}-{os.getpid()}"
        self._memory = groups.find_parent(groups.MEMORY, proc) if limits.memory_bytes is not None else None
        self._disk = groups.find_parent("disk", proc) if limits.device else None
        self._peak_anonymous: int | None = None
        self._done = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Makes the groups."""
        try:
            for folder in self._folders():
                self._make(folder)
            if self._memory is not None:
                self._bound_memory(self._memory)
            if self._disk is not None and self._limits.read_bytes_per_second:
                file, text = throttle_setting(
                    self._disk.version, self._limits.device, self._limits.read_bytes_per_second
                )
                groups.write(self._folder(self._disk) / file, text)
        except BaseException:
            self._remove()
            raise
        if self._memory is not None:
            self._watcher = threading.Thread(target=self._watch, args=(self._memory,), daemon=True)
            self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends whoever is left, and removes the groups."""
        self._done.set()
        if self._watcher is not None:
            self._watcher.join()
        self._remove()

    @property
    def prefix(self) -> list[str]:
        """Words before a command that is to run in the cage."""
        files = [str(folder / "cgroup.procs") for folder in self._folders()]
        return [sys.executable, "-P", "-I", "-S", "-c", JOIN, str(len(files)), *files] if files else []

    def read_bytes(self) -> int | None:
        """Bytes read from the disk so far; ``None`` where nobody counts."""
        if self._disk is None:
            return None
        folder = self._folder(self._disk)
        names = ("io.stat",) if self._disk.version == 2 else _COUNTS_V1
        for name in names:
            with contextlib.suppress(OSError):
                return parse_read_bytes((folder / name).read_text(), self._limits.device)
        return None

    def report(self) -> Report:
        """What the kernel says so far."""
        peak, kills = None, None
        if self._memory is not None:
            folder = self._folder(self._memory)
            if self._memory.version == 1:
                peak = groups.number(folder / "memory.max_usage_in_bytes")
                kills = groups.entry(folder / "memory.oom_control", ["oom_kill"])
            else:
                peak = groups.number(folder / "memory.peak")
                kills = groups.entry(folder / "memory.events", ["oom_kill"])
        return Report(peak, self._peak_anonymous, self.read_bytes(), kills or 0)

    def _folder(self, parent: Parent) -> Path:
        return parent.folder / self._name

    def _folders(self) -> list[Path]:
        """Once each: with version 2 memory and disk are bounded by one group."""
        return list(dict.fromkeys(self._folder(parent) for parent in (self._memory, self._disk) if parent is not None))

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise GroupError(f"{folder} cannot be made ({error.strerror}): making control groups takes root") from error

    def _bound_memory(self, parent: Parent) -> None:
        folder, limit = self._folder(parent), str(self._limits.memory_bytes)
        if parent.version == 2:
            groups.write(folder / "memory.max", limit)
            if (folder / "memory.swap.max").exists():
                groups.write(folder / "memory.swap.max", "0")
            return
        groups.write(folder / "memory.limit_in_bytes", limit)
        if (folder / "memory.memsw.limit_in_bytes").exists():
            groups.write(folder / "memory.memsw.limit_in_bytes", limit)
        elif (folder / "memory.swappiness").exists():
            groups.write(folder / "memory.swappiness", "0")

    def _watch(self, parent: Parent) -> None:
        file = self._folder(parent) / "memory.stat"
        while not self._done.wait(POLL_SECONDS):
            now = groups.entry(file, ["total_rss", "anon"])
            if now is not None:
                self._peak_anonymous = max(now, self._peak_anonymous or 0)

    def _remove(self) -> None:
        for folder in self._folders():
            deadline = time.monotonic() + LEAVING_SECONDS
            while folder.exists():
                for process in _processes(folder):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                try:
                    folder.rmdir()
                except OSError:  # busy until the last process is gone
                    if time.monotonic() > deadline:
                        print(f"warning: the control group {folder} is in use and stays behind", file=sys.stderr)
                        break
                    time.sleep(0.05)


_COUNTS_V1 = ("blkio.throttle.io_service_bytes_recursive", "blkio.throttle.io_service_bytes")


def throttle_setting(version: int, device: str, bytes_per_second: int) -> tuple[str, str]:
    """The setting that bounds reading.

    Args:
        version: Of control groups.
        device: ``MAJOR:MINOR`` of the disk.
        bytes_per_second: The bound.

    Returns:
        Name of the file, and what is written into it.
    """
    if version == 1:
        return "blkio.throttle.read_bps_device", f"{device} {bytes_per_second}"
    return "io.max", f"{device} rbps={bytes_per_second}"


def parse_read_bytes(text: str, device: str) -> int:
    """Bytes that were read from a disk.

    Args:
        text: Of ``blkio.throttle.io_service_bytes`` (``8:0 Read 4096``) or ``io.stat`` (``8:0 rbytes=4096 wbytes=0``).
        device: ``MAJOR:MINOR`` of the disk.

    Returns:
        0 where the disk is not mentioned: nothing was read from it.
    """
    for line in text.splitlines():
        name, *values = line.split()
        if name != device or not values:
            continue
        if values[0] == "Read":
            return int(values[1])
        for value in values:
            if value.startswith("rbytes="):
                return int(value.partition("=")[2])
    return 0


def disk_of(path: Path, system: Path = Path("/sys/dev/block")) -> str:
    """The disk that a file lies on.

    Args:
        path: A file or folder.
        system: Where the kernel lists block devices.

    Returns:
        ``MAJOR:MINOR`` of the whole disk, because partitions cannot be bounded.

    Raises:
        GroupError: If its file system is not on one disk, such as overlays and network shares.
    """
    number = path.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    place = system / device
    if not place.exists():
        raise GroupError(
            f"{path} is on no block device ({device}): the kernel cannot bound reads of it; put the files on a local disk"
        )
    if (place / "partition").exists():
        return (place.resolve().parent / "dev").read_text().strip()
    return device


def _processes(folder: Path) -> list[int]:
    try:
        return [int(line) for line in (folder / "cgroup.procs").read_text().split()]
    except OSError:
        return []
