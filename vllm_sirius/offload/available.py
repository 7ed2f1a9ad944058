"""How much memory this process may still take: of the machine, and of every control group that it is in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2 = ("memory.max", "memory.current")


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = CGROUPS) -> int:
    """Memory that can still be taken, page cache that can be dropped included.

    Args:
        proc: Where the kernel tells about processes.
        cgroups: Where control groups are mounted.
    """
    found = [_of_machine(proc)]
    for folder, (limit_name, usage_name) in _groups(proc, cgroups):
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is not None and usage is not None:
            found.append(limit - usage + _page_cache(folder))
    return max(0, min(found))


def _of_machine(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise OSError(f"{proc / 'meminfo'} does not say how much memory is available")


def _groups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, tuple[str, str]]]:
    """The groups of this process and those around them; inside of a container paths may be those of its host."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, V2
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", V1
        else:
            continue
        folder = root / path.lstrip("/")
        while folder != root:
            yield folder, names
            folder = folder.parent
        yield root, names


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max" where there is no limit
        return None


def _page_cache(folder: Path) -> int:
    names = ("inactive_file", "active_file", "total_inactive_file", "total_active_file")
    try:
        values = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    # A group of version 1 counts its children only in the totals.
    wanted = names[2:] if names[2] in values else names[:2]
    return sum(int(values.get(name, 0)) for name in wanted)
