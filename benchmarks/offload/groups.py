"""Control groups of the kernel, of version 1 and of version 2: where they are mounted, and which files say what.

Reads ``/proc/self/cgroup`` and ``/proc/mounts``, so that hybrid set-ups (memory on version 1, the rest on version 2) are
found as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MEMORY = "memory"
DISK = {1: "blkio", 2: "io"}
"""What the controller of disks is called in each version."""


class GroupError(Exception):
    """A control group cannot be had; the text names what is missing."""


@dataclass(frozen=True)
class Parent:
    """A control group that children can be made in.

    Attributes:
        controller: What its children are limited in: ``memory``, ``blkio`` or ``io``.
        version: 1 or 2.
        folder: Where it is mounted.
    """

    controller: str
    version: int
    folder: Path


def find_parent(controller: str, proc: Path = Path("/proc")) -> Parent:
    """The control group of this process, or the nearest one around it that may have limited children.

    Args:
        controller: ``memory`` or ``disk``.
        proc: Where the kernel tells about processes.

    Raises:
        GroupError: If the kernel has none, or it may not be used.
    """
    mounts = _mounts(proc)
    paths = _paths(proc)
    first = MEMORY if controller == MEMORY else DISK[1]
    if first in mounts and first in paths:
        return Parent(first, 1, _below(mounts[first], paths[first]))
    second = MEMORY if controller == MEMORY else DISK[2]
    if "" not in mounts or "" not in paths:
        raise GroupError(f"the kernel has no control groups for {controller}: none are mounted")
    return Parent(second, 2, _delegating(mounts[""], paths[""], second))


def _mounts(proc: Path) -> dict[str, Path]:
    """Mount points by controller; that of version 2 by the empty name."""
    found: dict[str, Path] = {}
    for line in _lines(proc / "mounts"):
        _, place, kind, options = line.split()[:4]
        if kind == "cgroup2":
            found[""] = Path(place)
        elif kind == "cgroup":
            found.update({name: Path(place) for name in options.split(",") if name in (MEMORY, DISK[1])})
    return found


def _paths(proc: Path) -> dict[str, str]:
    """Groups of this process by controller."""
    found: dict[str, str] = {}
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        found.update(dict.fromkeys(controllers.split(","), path))
    return found


def _below(mount: Path, path: str) -> Path:
    """In a container the path may be the host's, which the mount does not show."""
    folder = mount / path.lstrip("/")
    return folder if folder.is_dir() else mount


def _delegating(mount: Path, path: str, controller: str) -> Path:
    """Version 2 wants a group without processes of its own, or its root, that hands the controller on to children."""
    folder = _below(mount, path)
    while True:
        if controller in _words(folder / "cgroup.subtree_control") or _hand_on(folder, controller):
            return folder
        if folder == mount:
            break
        folder = folder.parent
    available = " ".join(_words(mount / "cgroup.controllers")) or "none"
    raise GroupError(
        f"no control group from {_below(mount, path)} up to {mount} hands the controller '{controller}' on to children (the "
        f"kernel offers: {available}): run as root, or under `systemd-run --scope --property=Delegate=yes`"
    )


def _hand_on(folder: Path, controller: str) -> bool:
    if controller not in _words(folder / "cgroup.controllers"):
        return False
    try:
        (folder / "cgroup.subtree_control").write_text(f"+{controller}")
    except OSError:
        return False
    return controller in _words(folder / "cgroup.subtree_control")


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError as error:
        raise GroupError(f"{file} cannot be read ({error.strerror}): control groups are a matter of Linux") from error


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def write(file: Path, text: str) -> None:
    """Writes a setting of a group.

    Args:
        file: The setting.
        text: Its value.

    Raises:
        GroupError: Naming the file, if the kernel refuses.
    """
    try:
        file.write_text(text)
    except OSError as error:
        raise GroupError(
            f"{file} does not take {text!r} ({error.strerror}): run as root on a kernel that has it"
        ) from error


def number(file: Path) -> int | None:
    """The number in a file.

    Args:
        file: The file.

    Returns:
        ``None`` where there is no such file, or no number in it.
    """
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def entry(file: Path, names: Iterable[str]) -> int | None:
    """The number after one of several names in a file of lines ``NAME NUMBER``.

    Args:
        file: The file.
        names: The names, the preferred one first.
    """
    try:
        found = dict(line.split(maxsplit=1) for line in file.read_text().splitlines() if " " in line)
    except OSError:
        return None
    for name in names:
        if name in found and found[name].strip().isdecimal():
            return int(found[name])
    return None
