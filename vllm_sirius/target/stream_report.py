"""What streaming the target costs while an engine runs: bytes a token, rate, and the part of the time that waits for the disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from vllm_sirius.offload.stream import StreamStatistics
from vllm_sirius.target.streamed import StreamedTarget

logger = logging.getLogger("vllm.sirius")

INTERVAL_SECONDS = 60.0
GB = 10**9
SLOW, RECOVERED = 0.5, 0.75
"""Parts of the best rate so far: below the one a disk is called slow, above the other no longer."""


class StreamReport:
    """Follows the stream of one engine and says in the log, once in a while, what it came to.

    Args:
        target: The streamed layers.
        clock: Tells seconds.
    """

    def __init__(self, target: StreamedTarget, clock: Callable[[], float] = time.monotonic) -> None:
        self._target, self._clock = target, clock
        self._num_tokens = self._tokens_then = 0
        self._then, self._since = target.statistics(), clock()
        self._best_rate, self._slow = 0.0, False

    def emitted(self, num_tokens: int) -> None:
        """A step has given tokens.

        Args:
            num_tokens: How many, of all requests.
        """
        self._num_tokens += num_tokens
        now = self._clock()
        if now - self._since < INTERVAL_SECONDS:
            return
        found, tokens = self._target.statistics(), self._num_tokens - self._tokens_then
        if found.num_rounds > self._then.num_rounds:
            logger.info("Sirius: %s", _sentence(self._then, found, tokens, now - self._since))
            self._judge(_rate(self._then, found))
        self._then, self._since, self._tokens_then = found, now, self._num_tokens

    def _judge(self, rate: float) -> None:
        """Warns, once until it recovers, of a disk that has become slow: answers then take as many times longer."""
        if rate < SLOW * self._best_rate and not self._slow:
            self._slow = True
            logger.warning(
                "Sirius: the disk gave %.2f GB/s in the last %.0f s, after %.2f GB/s before: answers take that much longer. See "
                "whether something else reads from it, or whether it slows down when it is hot or has used up its credit.",
                rate / GB,
                INTERVAL_SECONDS,
                self._best_rate / GB,
            )
        elif rate > RECOVERED * self._best_rate:
            self._slow = False
        self._best_rate = max(rate, self._best_rate)

    def as_dict(self) -> dict[str, float]:
        """Counters since the start, in which the self-test and the measurements are included.

        Returns:
            ``bytes_streamed``, ``passes``, ``gigabytes_per_second`` while something was read, ``waiting_seconds``, and
            ``tokens`` of the answers.
        """
        found = self._target.statistics()
        return {
            "bytes_streamed": found.num_bytes,
            "passes": found.num_rounds,
            "gigabytes_per_second": found.bytes_per_second / GB,
            "waiting_seconds": found.waiting_seconds,
            "tokens": self._num_tokens,
        }


def _sentence(then: StreamStatistics, now: StreamStatistics, num_tokens: int, seconds: float) -> str:
    num_bytes = now.num_bytes - then.num_bytes
    waited = (now.waiting_seconds - then.waiting_seconds) / seconds
    a_token = f"{num_bytes / num_tokens / 1e6:.0f} MB a token" if num_tokens else "no token"
    rate = _rate(then, now) / GB
    return (
        f"{num_tokens} tokens in {seconds:.0f} s by {now.num_rounds - then.num_rounds} passes, which streamed "
        f"{num_bytes / GB:.2f} GB at {rate:.2f} GB/s, {a_token}; {waited:.0%} of the time was spent waiting for the disk"
    )


def _rate(then: StreamStatistics, now: StreamStatistics) -> float:
    """Bytes per second while something was read."""
    reading = now.reading_seconds - then.reading_seconds
    return (now.num_bytes - then.num_bytes) / reading if reading > 0.0 else 0.0
