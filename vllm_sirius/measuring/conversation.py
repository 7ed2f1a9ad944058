"""Commands for a process and its answers, as JSON lines: both ends."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from contextlib import suppress
from typing import IO, Any


class Conversation:
    """The asking end.

    Args:
        commands: The other process's standard input.
        answers: Its standard output, which is read past its buffer.
    """

    def __init__(self, commands: IO[bytes], answers: IO[bytes]) -> None:
        self._commands = commands
        self._answers = answers

    def ask(self, command: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """Sends a command and waits for its answer.

        Args:
            command: JSON values.
            seconds: Longest wait.

        Returns:
            The answer; ``None`` if the other process has ended.

        Raises:
            TimeoutError: If there was none in time.
        """
        with suppress(BrokenPipeError):  # of a process that has ended, which may have answered before
            self._commands.write(json.dumps(command).encode() + b"\n")
            self._commands.flush()
        line = self._read_line(time.monotonic() + seconds)
        answer: dict[str, Any] | None = json.loads(line) if line else None
        return answer

    def _read_line(self, deadline: float) -> bytes:
        """One line; empty at the end of the answers."""
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise TimeoutError("no answer in time")
            part = os.read(self._answers.fileno(), 1 << 16)
            if not part:
                return b""
            line += part
        return line

    def hang_up(self) -> None:
        """Ends the commands, upon which the other process ends."""
        with suppress(BrokenPipeError):  # what an ended process did not read
            self._commands.close()

    def close(self) -> None:
        """Closes both streams, the other process having ended."""
        self.hang_up()
        self._answers.close()


def answering_stream() -> IO[str]:
    """The answering end: takes standard output for itself, a line for each command of standard input.

    Returns:
        The stream of answers. Whatever else is printed goes to standard error.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers
