"""One draft length for a whole batch, chosen before every step from what steps took and what they gave.

Where drafting must not wait for the host (Model Runner V2), nobody can stop a single draft halfway. But the scheduler says
before every step how many tokens the batch drafts, and it sees, a step late, what was accepted and how long steps took. So
the length is chosen that gives most tokens per second,

    rows * (expected tokens of a row with this length) / (seconds of a step with this length)

where 0 is a length like any other: where drafting does not pay, Sirius costs what vLLM costs. Seconds are measured by number
of rows and length. A few steps at some lengths are spent on measuring when a number of rows is new, and now and then later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_sirius.pacing.costs import CostCurve
from vllm_sirius.pacing.policy import FIRST_RATE

TRIAL_STEPS = 4
"""Steps of a trial. The first one verifies drafts of another length, so it says nothing."""

FIRST_INTERVAL = 32
USUAL_INTERVAL = 256
LAST_INTERVAL = 2048
"""Steps between later trials: soon after the first ones, which may have met a busy machine, and more and more where drafting
does not pay."""

HYSTERESIS = 1.02
"""Another length must promise this much more to be taken."""

MEMORY = 0.998
"""What remains of older drafts in the acceptance at each new one."""

DOUBT = 8.0
"""Drafts that the mean over all positions counts for at each position."""


def draft_lengths(longest: int) -> tuple[int, ...]:
    """Lengths to choose from, ascending: few, because each of them gets CUDA graphs of its own.

    Args:
        longest: The longest one, at least 1.

    Returns:
        0, the longest, and between them about half of the next longer one.
    """
    lengths = [longest]
    while lengths[-1] > 1:
        lengths.append((lengths[-1] - 1) // 2 or 1)
    return tuple(reversed([*lengths, 0]))


class BatchLength:
    """Chooses the draft length of every step.

    Args:
        lengths: Lengths to choose from, `draft_lengths`.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = sorted(lengths)
        self._acceptance = _Acceptance(self._lengths[-1])
        self._loads: dict[int, _Load] = {}

    def choose(self, num_rows: int) -> int:
        """The draft length of the next step.

        Args:
            num_rows: Requests in it, at least 1.
        """
        return self._load(num_rows).choose(self._acceptance.expected_tokens)

    def observe_step(self, num_rows: int, length: int, seconds: float) -> None:
        """Takes in how long a step took that verified and drafted the same number of tokens for every request.

        Args:
            num_rows: Requests in it.
            length: Tokens that each of them verified and drafted.
            seconds: Its duration, above 0.
        """
        self._load(num_rows).observe(length, seconds)

    def observe_verdicts(self, verdicts: Iterable[tuple[int, int]]) -> None:
        """Takes in what a step accepted.

        Args:
            verdicts: Tokens drafted and tokens accepted, for each request that had a draft.
        """
        self._acceptance.observe(verdicts)

    def _load(self, num_rows: int) -> _Load:
        """Steps of 5 to 8 requests, say, are alike."""
        size = (num_rows - 1).bit_length()
        if size not in self._loads:
            nearest = min(self._loads, key=lambda known: abs(known - size), default=None)
            expected = self._loads[nearest].chosen if nearest is not None else self._lengths[-1]
            self._loads[size] = _Load(self._lengths, expected)
        return self._loads[size]


class _Load:
    """Steps of about the same number of requests."""

    def __init__(self, lengths: Sequence[int], expected: int) -> None:
        self.chosen = expected
        self._lengths = lengths
        self._costs = CostCurve()
        middle = lengths[len(lengths) // 2]
        self._trials = sorted({0, middle, expected}, reverse=True)
        self._trial_length, self._trial_steps = self._trials.pop(), TRIAL_STEPS
        self._idle_steps = self._num_trials = 0
        self._interval = FIRST_INTERVAL

    def choose(self, expected_tokens: list[float]) -> int:
        if self._trial_steps == 0 and self._trials:
            self._trial_length, self._trial_steps = self._trials.pop(), TRIAL_STEPS
        if self._trial_steps > 0:
            self._trial_steps -= 1
            return self._trial_length
        self._decide(expected_tokens)
        self._idle_steps += 1
        if self._idle_steps >= self._interval:
            self._idle_steps = 0
            self._interval = min(2 * self._interval, LAST_INTERVAL)
            self._trials.append(self._next_trial())
        return self.chosen

    def observe(self, length: int, seconds: float) -> None:
        self._costs.observe(1 + length, seconds)

    @property
    def seconds(self) -> dict[int, float]:
        """Seconds of a step by the lengths that ran."""
        return {length: self._estimate(length) for length in self._lengths if self._costs.num_observations(1 + length)}

    def _decide(self, expected_tokens: list[float]) -> None:
        if not self._costs:
            return
        rates = {length: expected_tokens[length] / self._estimate(length) for length in self._lengths}
        best = max(rates, key=rates.__getitem__)
        if rates[best] > HYSTERESIS * rates[self.chosen]:
            self.chosen = best
        if self.chosen > 0:
            self._interval = min(self._interval, USUAL_INTERVAL)

    def _estimate(self, length: int) -> float:
        return self._costs.seconds(1 + length)

    def _next_trial(self) -> int:
        """The neighbours of the chosen length and no draft at all, in turn; where nothing is drafted, a short draft."""
        self._num_trials += 1
        place = self._lengths.index(self.chosen)
        if place == 0:
            return self._lengths[1]
        longer = self._lengths[min(place + 1, len(self._lengths) - 1)]
        return (self._lengths[place - 1], longer, 0)[self._num_trials % 3]


class _Acceptance:
    """How often a draft token is accepted, by its place in the draft, if all before it are."""

    def __init__(self, longest: int) -> None:
        self._tried = [0.0] * longest
        self._accepted = [0.0] * longest

    @property
    def expected_tokens(self) -> list[float]:
        """Tokens that a step gives a request, by draft length from 0 on."""
        tried, accepted = sum(self._tried), sum(self._accepted)
        mean = (accepted + FIRST_RATE * DOUBT) / (tried + DOUBT)
        expected, survival = [1.0], 1.0
        for tries, successes in zip(self._tried, self._accepted, strict=True):
            survival *= (successes + mean * DOUBT) / (tries + DOUBT)
            expected.append(expected[-1] + survival)
        return expected

    def observe(self, verdicts: Iterable[tuple[int, int]]) -> None:
        remains = 1.0
        for num_drafted, num_accepted in verdicts:
            remains *= MEMORY
            for place in range(min(num_accepted, num_drafted)):
                self._tried[place] += 1.0
                self._accepted[place] += 1.0
            if num_accepted < num_drafted:
                self._tried[num_accepted] += 1.0
        if remains < 1.0:
            self._tried = [remains * count for count in self._tried]
            self._accepted = [remains * count for count in self._accepted]
