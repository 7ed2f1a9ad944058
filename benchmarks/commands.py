"""The command `vllm` with the options of an arm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from vllm_sirius.measuring.child import child_environment

VLLM = str(Path(sys.executable).with_name("vllm"))
SECONDS = 3600
"""Longest that one command may take."""

NOT_ON_COMMAND_LINES = ("model", "disable_log_stats")
"""The model is an argument of its own; statistics are on by default there."""


class CommandError(Exception):
    """A command of vLLM failed; the text has its last line and the path of its log."""


def options(engine: dict[str, Any]) -> list[str]:
    """Turns arguments of `vllm.LLM` into options of the command line.

    Args:
        engine: The arguments.

    Returns:
        The options; a false one is written ``--no-NAME``, a mapping as JSON.
    """
    found = []
    for name, value in engine.items():
        flag = name.replace("_", "-")
        if name in NOT_ON_COMMAND_LINES:
            continue
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return found


def environment() -> dict[str, str]:
    """Variables for commands of vLLM: those of this process, and engines in processes of their own."""
    return child_environment(VLLM_ENABLE_V1_MULTIPROCESSING="1", TOKENIZERS_PARALLELISM="false")


def require_vllm() -> None:
    """Refuses to start where the command is missing.

    Raises:
        BenchmarkError: If it is.
    """
    if not Path(VLLM).is_file():
        raise BenchmarkError("the command vllm is not installed beside this Python; run `make setup`")


def run(arguments: Sequence[str], log: Path) -> None:
    """Runs a command of vLLM to its end.

    Args:
        arguments: Its arguments.
        log: File that takes what it prints, after what is there.

    Raises:
        CommandError: If it fails or takes too long.
    """
    with log.open("ab") as output:
        try:
            command = [VLLM, *arguments]
            done = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment(), timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise CommandError(
                f"vllm {' '.join(arguments[:2])} took more than {SECONDS} s; its log is {log}"
            ) from error
    if done.returncode != 0:
        raise CommandError(f"vllm {' '.join(arguments[:2])} failed: {last_line(log)}; its log is {log}")


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def start_up_line(log: Path) -> str:
    """What Sirius said in a log when its engine started; empty without Sirius."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if "Sirius: " in line]
    return lines[-1].partition("Sirius: ")[2].strip() if lines else ""
