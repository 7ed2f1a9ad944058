"""The progress bar over all engines and prompts."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm


class Progress:
    """A bar on standard error; standard output belongs to the result.

    Args:
        total: Steps: each start of an engine, each reading of costs, each batch of prompts under one rule.
    """

    def __init__(self, total: int) -> None:
        self._bar = tqdm(total=total, unit="step", file=sys.stderr, dynamic_ncols=True, smoothing=0.1)
        self._finish_at = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def doing(self, text: str) -> None:
        """Says what goes on now."""
        self._bar.set_description(text)

    def step(self) -> None:
        """Counts one step."""
        self._bar.update()

    def begin(self, num_steps: int) -> None:
        """Begins a part of known length; `finish` counts what is left of it."""
        self._finish_at = self._bar.n + num_steps

    def finish(self) -> None:
        """Ends the part, whole or not."""
        self._bar.update(self._finish_at - self._bar.n)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(text, file=sys.stderr)
