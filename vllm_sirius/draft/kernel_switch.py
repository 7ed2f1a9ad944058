"""Whether a draft step runs on the draft's kernels or on the model's own layers: learnt from the steps themselves.

Kernels read a part of the bytes, so that a step of few rows is faster on them; with many rows the arithmetic decides, and
there the model's own layers can be faster. A step starts on the kernels. Now and then one runs the other way and is compared
with those just before it of the same size: whatever else the machine does then holds up both. Nothing is decided by fewer
than `ENOUGH` such trials, and none is ever final.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

MOST_TOKENS = 32
"""Largest step of any of the kernels; beyond it there is nothing to choose."""

SLOWER = 1.1
"""Part of the time on the model's own layers beyond which the kernels count as slower."""

ENOUGH = 3
TRIALS = 5
"""Fewest trials that decide, and the newest that count."""

RECENT = 5
"""Newest steps of a size that a trial is compared with, by their median."""

FEW_ROWS = 8
"""Up to here bytes decide, and the kernels read fewer: there is little to find out."""

FIRST_INTERVAL = 4
FIRST_INTERVAL_OF_FEW = 64
LAST_INTERVAL = 1024
"""Steps between trials: twice as many after each."""


class KernelSwitch:
    """Chooses the way of every draft step.

    Args:
        learns: Whether steps run the other way now and then. Otherwise all of them run on the kernels.
        clock: Tells seconds.

    Attributes:
        kernels: Whether the running step is on the kernels.
    """

    def __init__(self, learns: bool = False, clock: Callable[[], float] = time.perf_counter) -> None:
        self.kernels = True
        self._learns = learns
        self._held = False
        self._clock = clock
        self._blocks: dict[int, _Block] = {}
        self._running: tuple[_Block, int, bool, float] | None = None

    def begin(self, num_tokens: int) -> None:
        """Starts a draft step and chooses its way.

        Args:
            num_tokens: Tokens that it is fed.
        """
        self.kernels, self._running = True, None
        # One row is what the user has chosen kernels for.
        if not self._learns or not 1 < num_tokens <= MOST_TOKENS:
            return
        size = (num_tokens - 1).bit_length()
        if size not in self._blocks:
            self._blocks[size] = _Block(few=num_tokens <= FEW_ROWS)
        block = self._blocks[size]
        self.kernels = block.kernels
        if self._held:
            return
        trial = block.due(num_tokens)
        self.kernels = block.kernels != trial
        self._running = (block, num_tokens, trial, self._clock())

    def end(self) -> None:
        """Takes in that the step is over."""
        if self._running is not None:
            block, num_tokens, trial, started = self._running
            self._running = None
            block.observe(num_tokens, trial, self._clock() - started)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Steps inside run as they usually do and teach nothing."""
        self._held = True
        try:
            yield
        finally:
            self._held = False


class _Block:
    """Steps of about the same number of tokens, which kernels take in blocks.

    Args:
        few: Whether the steps have few rows.

    Attributes:
        kernels: Whether the kernels are the usual way.
    """

    def __init__(self, few: bool) -> None:
        self.kernels = True
        self._recent: dict[int, deque[float]] = {}
        self._ratios: deque[float] = deque(maxlen=TRIALS)
        self._num_steps = 0
        self._interval = FIRST_INTERVAL_OF_FEW if few else FIRST_INTERVAL

    def due(self, num_tokens: int) -> bool:
        """Counts a step; whether it should run the other way."""
        self._num_steps += 1
        if self._num_steps < self._interval or len(self._recent.get(num_tokens, ())) < ENOUGH:
            return False
        self._num_steps = 0
        self._interval = min(2 * self._interval, LAST_INTERVAL)
        return True

    def observe(self, num_tokens: int, trial: bool, seconds: float) -> None:
        """Takes in what a step took."""
        if not trial:
            self._recent.setdefault(num_tokens, deque(maxlen=RECENT)).append(seconds)
            return
        usual = max(median(self._recent[num_tokens]), 1e-9)
        seconds = max(seconds, 1e-9)
        ratio = usual / seconds if self.kernels else seconds / usual
        self._ratios.append(ratio)
        if self._for_kernels(ratio) != self.kernels:
            # A trial that says otherwise costs nothing, or is soon seen to be wrong.
            self._interval = FIRST_INTERVAL
        if len(self._ratios) >= ENOUGH and self._for_kernels(median(self._ratios)) != self.kernels:
            self.kernels = not self.kernels
            self._recent.clear()
            self._num_steps, self._interval = 0, FIRST_INTERVAL

    def _for_kernels(self, ratio: float) -> bool:
        return ratio <= (SLOWER if self.kernels else 1.0)
