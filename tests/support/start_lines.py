"""What Sirius logs in the child of `engine_host`, whatever the level of vLLM's logger."""

from __future__ import annotations

import logging
from typing import Any

LINES: list[str] = []


def listen() -> None:
    """Hears Sirius's lines of level INFO from now on, those of later engines included.

    Not by a handler: every engine configures vLLM's loggers anew, which takes handlers away.
    """
    logger: Any = logging.getLogger("vllm.sirius")
    say = logger.info

    def info(message: str, *values: Any, **more: Any) -> None:
        LINES.append(message % values)
        say(message, *values, **more)

    logger.info = info


def heard() -> list[str]:
    """The lines since the last call."""
    lines = list(LINES)
    LINES.clear()
    return lines
