"""What lies in the folder of the files, and removing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sirius.offload.errors import OffloadError
from vllm_sirius.offload.folder import SUFFIX, is_used, lock_of


@dataclass(frozen=True)
class Listed:
    """A file.

    Attributes:
        path: The file.
        num_bytes: Its size.
        state: ``used`` by an engine, which may be building it; ``free``, or ``unfinished``: left by an engine that was killed.
    """

    path: Path
    num_bytes: int
    state: str

    def as_json(self) -> dict[str, Any]:
        """As a mapping."""
        return {"path": str(self.path), "bytes": self.num_bytes, "state": self.state}


def list_files(folder: Path) -> list[Listed]:
    """All files of a folder, whole ones first.

    Args:
        folder: The folder; there may be none.
    """
    if not folder.is_dir():
        return []
    whole = [
        Listed(path, path.stat().st_size, "used" if is_used(path) else "free")
        for path in sorted(folder.glob(f"*{SUFFIX}"))
        if not path.name.startswith(".")
    ]
    partial = [
        Listed(path, path.stat().st_size, "used" if is_used(_whole(path)) else "unfinished")
        for path in sorted(folder.glob(f".*{SUFFIX}.partial"))
    ]
    return [*whole, *partial]


def remove(folder: Path, names: Sequence[str]) -> list[Listed]:
    """Removes files.

    Args:
        folder: The folder.
        names: Their names or paths; ``all`` for every file that no engine uses.

    Returns:
        What was removed.

    Raises:
        OffloadError: If there is no such file, or an engine uses it; nothing is removed then.
    """
    known = {listed.path.name: listed for listed in list_files(folder)}
    if list(names) == ["all"]:
        wanted = [listed for listed in known.values() if listed.state != "used"]
    else:
        wanted = []
        for name in names:
            if Path(name).parent != Path() and Path(name).parent.resolve() != folder.resolve():
                raise OffloadError(f"{name} is not in {folder}: give its folder with --offload-path.")
            listed = known.get(Path(name).name)
            if listed is None:
                have = ", ".join(known) or "none"
                raise OffloadError(f"there is no file {Path(name).name!r} in {folder}, which has {have}.")
            if listed.state == "used":
                raise OffloadError(f"{listed.path} is used by an engine: stop the engine first.")
            wanted.append(listed)
    for listed in wanted:
        listed.path.unlink(missing_ok=True)
        lock_of(_whole(listed.path)).unlink(missing_ok=True)
    return wanted


def _whole(path: Path) -> Path:
    """The file that an unfinished one is to become; a whole one is its own."""
    name = path.name
    return path.with_name(name[1:].removesuffix(".partial")) if name.endswith(".partial") else path
