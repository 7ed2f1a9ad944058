"""When to stop drafting: after the token whose expected gain no longer pays for its measured cost.

A draft token gains what it adds to the expected length of the text: the probability that it and all tokens before it are
accepted. It costs its part of a draft step and a longer verification pass. Time is worth what the engine makes of it at this
batch size, the *rate* in tokens per second, which is at least that of decoding without drafts. So a batch drafts on while,
for some number of further steps,

    gain of the steps >= rate * (seconds of the steps + seconds they add to the verification pass)

and does not draft at all where nothing pays: Sirius then costs what vLLM costs. Several steps are looked at because the
first further token may be dear and those after it cheap (a pass of two tokens runs other kernels than a pass of one).

Costs are learnt from what runs, so what is never run must be tried now and then: a short draft where drafting does not
seem to pay, a step without one where it does. Soon and often while a cost was only measured at start-up, when the machine
may have been busy, or was learnt on a machine that was slower than now; rarely once the engine itself has seen it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_sirius.pacing.confidence import AcceptanceModel, RequestAcceptance, confidence
from vllm_sirius.pacing.costs import ENOUGH, CostCurve, StepCosts

FIRST_RATE = 0.85
"""Acceptance rate that is expected before anything is known."""

MEAN_MEMORY = 0.01
"""Weight of one token in the acceptance rate that a new request is expected to have."""

PROBE_TOKENS = 2
FIRST_PROBE_STEPS = 2
RARE_PROBE_STEPS = 128
LAST_PROBE_STEPS = 1024
"""Where drafting does not pay, a short draft every so many steps notices when it does; ever rarer."""

CONFIRMATIONS = 32
"""Draft steps that must have been timed before probes are rare from the first one on."""

FASTER = 0.7
"""Where a step without drafts takes less than this part of what it took when a draft step was last timed, the machine was slow
then."""

PLAIN_STEPS = 4
RARE_PLAIN_STEPS = 256
"""Where drafting pays, a step without drafts every so many steps: while few were timed, and later."""

PACE_MEMORY = 0.05
"""Weight of one draft step in how much faster prompt lookup makes drafting."""

LOOKAHEAD = (1, 2, 4, 8)
"""Numbers of further draft steps that are weighed."""

RATE_MEMORY = 0.95
"""What remains of older steps in the rate at each new one."""

HELD_UP = 2.0
"""A pass counts in the rate as at most so many times what such passes take: the rest says nothing of the next ones."""


@dataclass
class Draft:
    """A request's draft in the making.

    Attributes:
        row: Its row in the batch.
        acceptance: What is known of the request.
        survival: Probability that all tokens drafted so far are accepted.
        length: Tokens drafted so far.
    """

    row: int
    acceptance: RequestAcceptance
    survival: float = 1.0
    length: int = 0


class LengthRule(Protocol):
    """Decides while a batch is drafted which rows go on."""

    def choose(self, rows: Sequence[int]) -> list[int]:
        """Rows that the next draft step is worth running for; none ends the drafts of the batch.

        Args:
            rows: Rows that may draft on.
        """

    def proposed(self, rows: Sequence[int], logits: torch.Tensor) -> list[bool]:
        """Whether the token that a draft step proposed for each row becomes part of its draft.

        Args:
            rows: Rows of the step.
            logits: Its logits, ``[len(rows), vocabulary]``.
        """

    def stepped(self, num_fed: int, num_drafted: int) -> None:
        """Takes in that a draft step is over.

        Args:
            num_fed: Tokens it was fed: the last one of each draft, and candidates of prompt lookup.
            num_drafted: Tokens that became part of drafts.
        """


class FullLength:
    """Every row drafts to its limit.

    Args:
        clock: Tells seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._timer = _StepTimer(None, clock)

    def begin(self, costs: CostCurve | None) -> None:
        """Starts the draft of a batch.

        Args:
            costs: Takes in what its steps take, where someone wants to know.
        """
        self._timer.begin_draft()
        self._timer.costs = costs

    def choose(self, rows: Sequence[int]) -> list[int]:
        """See `LengthRule.choose`."""
        self._timer.begin_step()
        return list(rows)

    def proposed(self, rows: Sequence[int], logits: torch.Tensor) -> list[bool]:
        """See `LengthRule.proposed`."""
        return [True] * len(rows)

    def stepped(self, num_fed: int, num_drafted: int) -> None:
        """See `LengthRule.stepped`."""
        self._timer.end_step(num_fed)


class _StepTimer:
    """Times the steps of one draft after another.

    Attributes:
        costs: Takes them in, where someone wants to know.

    Args:
        costs: See above.
        clock: Tells seconds.
    """

    def __init__(self, costs: CostCurve | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.costs = costs
        self._clock = clock
        self._num_steps = 0
        self._started = 0.0
        self._first: tuple[int, float] = (0, 0.0)

    def begin_draft(self) -> None:
        """Starts a draft. Of the one before it the first step counts only if it was all, because it also chose the neurons."""
        if self._num_steps == 1 and self.costs is not None:
            self.costs.observe(*self._first)
        self._num_steps = 0

    def begin_step(self) -> None:
        self._started = self._clock()

    def end_step(self, num_fed: int) -> None:
        """Takes in a step."""
        self._num_steps += 1
        seconds = self._clock() - self._started
        if self._num_steps == 1:
            self._first = num_fed, seconds
        elif self.costs is not None:
            self.costs.observe(num_fed, seconds)


class DraftPolicy:
    """The adaptive length of one engine.

    Args:
        costs: Measured costs.
        clock: Tells seconds.
    """

    def __init__(self, costs: StepCosts, clock: Callable[[], float] = time.perf_counter) -> None:
        self.costs = costs
        self._timer = _StepTimer(costs.draft, clock)
        self._model = AcceptanceModel()
        self._rates: dict[int, _Rate] = {}
        self._drafts: dict[int, Draft] = {}
        self._num_rows = 0
        self._num_drafted = 0
        self._num_chosen = 0
        self._plain = False
        self._draft_estimate = 0.0
        self._pace = 1.0
        self._probe = _Probe()
        self._confirmed: tuple[int, float] | None = None
        self._mean_rate = FIRST_RATE

    def new_request(self) -> RequestAcceptance:
        """Starts to follow a request, which is first expected to be like those before it."""
        return RequestAcceptance(self._model, self._mean_rate)

    def begin(self, drafts: Sequence[Draft], num_rows: int) -> None:
        """Sets up the drafts of a batch.

        Args:
            drafts: The rows that may draft.
            num_rows: Rows of the batch; those that may not draft decode one token in the next pass.
        """
        self._drafts = {draft.row: draft for draft in drafts}
        self._num_rows = max(num_rows, 1)
        self._num_drafted = 0
        self._draft_estimate = 0.0
        self._timer.begin_draft()
        self._probe.begin_step()
        self._plain = self._rate().plain_due(self.costs.target.num_observations(self._num_rows))
        for draft in drafts:
            draft.acceptance.begin()

    def choose(self, rows: Sequence[int]) -> list[int]:
        """See `LengthRule.choose`."""
        drafts = [self._drafts[row] for row in rows]
        if self._plain:
            return []
        if self._probe.active:
            return self._go(drafts) if max(draft.length for draft in drafts) < PROBE_TOKENS else []
        worth = self._rate().value
        longer = worth * self._seconds_per_token()
        paying = [draft for draft in drafts if draft.survival * draft.acceptance.next_rate > longer]
        if paying and any(self._pays(paying, steps, worth) for steps in LOOKAHEAD):
            self._probe.rest()
            return self._go(paying)
        if self._num_drafted > 0:
            return []
        if self._confirmed is not None and self.costs.target.seconds(self._confirmed[0]) < FASTER * self._confirmed[1]:
            self._confirmed = None
            self._probe.doubt()
        return self._go(drafts) if self._probe.due() else []

    def _go(self, drafts: Sequence[Draft]) -> list[int]:
        self._timer.begin_step()
        self._num_chosen = len(drafts)
        return [draft.row for draft in drafts]

    def _pays(self, drafts: Sequence[Draft], steps: int, worth: float) -> bool:
        gain = sum(_expected(draft, steps) for draft in drafts)
        drafting = steps * self.costs.draft.seconds(len(drafts)) / self._pace
        seconds = drafting + self._seconds_longer(steps * len(drafts))
        return gain >= worth * seconds

    def proposed(self, rows: Sequence[int], logits: torch.Tensor) -> list[bool]:
        """See `LengthRule.proposed`."""
        kept = []
        longer = self._rate().value * self._seconds_per_token()
        for row, draft_confidence in zip(rows, confidence(logits).tolist(), strict=True):
            draft = self._drafts[row]
            draft.survival *= draft.acceptance.drafted(draft_confidence)
            keep = self._probe.active or draft.survival > longer
            if keep:
                draft.length += 1
                self._num_drafted += 1
            self._mean_rate += MEAN_MEMORY * (draft.acceptance.next_rate - self._mean_rate)
            kept.append(keep)
        return kept

    def stepped(self, num_fed: int, num_drafted: int) -> None:
        """See `LengthRule.stepped`."""
        self._timer.end_step(num_fed)
        self._probe.confirm()
        self._confirmed = self._num_rows, self.costs.target.seconds(self._num_rows)
        self._draft_estimate += self.costs.draft.seconds(num_fed)
        # Right candidates make a step worth several; wrong ones only make it longer.
        worth = max(num_drafted / self._num_chosen, 1.0)
        pace = worth * self.costs.draft.seconds(self._num_chosen) / self.costs.draft.seconds(num_fed)
        self._pace += PACE_MEMORY * (max(pace, 0.5) - self._pace)

    def observe_step(self, num_rows: int, num_tokens: int, num_emitted: int, target: float, draft: float) -> None:
        """Takes in what one whole step gave and took.

        Args:
            num_rows: Requests that decoded in it.
            num_tokens: Tokens of the target's pass.
            num_emitted: Tokens it gave.
            target: Seconds of the pass and of all around it but drafting.
            draft: Seconds of drafting the tokens that it judged.
        """
        self.costs.target.observe(num_tokens, target)
        if num_tokens == num_rows:
            self._rate(num_rows).was_plain()
        target = min(target, HELD_UP * self.costs.target.seconds(num_tokens))
        if self._draft_estimate > 0.0:
            draft = min(draft, HELD_UP * self._draft_estimate)
        self._rate(num_rows).observe(num_emitted, target + draft)

    def _seconds_longer(self, num_more: int) -> float:
        """Seconds by which more draft tokens lengthen the verification pass."""
        tokens = self._num_rows + self._num_drafted
        return max(0.0, self.costs.target.seconds(tokens + num_more) - self.costs.target.seconds(tokens))

    def _seconds_per_token(self) -> float:
        """What one further token adds to the pass at least, when more of them share a first jump."""
        return min(self._seconds_longer(count) / count for count in LOOKAHEAD)

    def _rate(self, num_rows: int | None = None) -> _Rate:
        num_rows = num_rows or self._num_rows
        if num_rows not in self._rates:
            self._rates[num_rows] = _Rate()
        rate = self._rates[num_rows]
        rate.floor = num_rows / self.costs.target.seconds(num_rows)
        return rate


class _Rate:
    """Tokens per second of an engine at one batch size."""

    def __init__(self) -> None:
        self.floor = 0.0
        self._tokens = self._seconds = 0.0
        self._num_steps = 0

    @property
    def value(self) -> float:
        """The rate, at least `floor`, that of decoding without drafts."""
        return max(self.floor, self._tokens / self._seconds if self._seconds else 0.0)

    def plain_due(self, num_timed: int) -> bool:
        """Counts a step; whether it should go without drafts, because few or no such steps were timed of late.

        Args:
            num_timed: Steps without drafts that the floor stands on.
        """
        self._num_steps += 1
        if self._num_steps < (PLAIN_STEPS if num_timed < ENOUGH else RARE_PLAIN_STEPS):
            return False
        self._num_steps = 0
        return True

    def was_plain(self) -> None:
        """A step went without drafts."""
        self._num_steps = 0

    def observe(self, num_tokens: int, seconds: float) -> None:
        self._tokens = RATE_MEMORY * self._tokens + num_tokens
        self._seconds = RATE_MEMORY * self._seconds + seconds


class _Probe:
    """When to draft although it does not pay."""

    def __init__(self) -> None:
        self.active = False
        self._idle_steps = 0
        self._num_confirmed = 0
        self._interval = FIRST_PROBE_STEPS

    def begin_step(self) -> None:
        self.active = False

    def confirm(self) -> None:
        """A draft step was timed."""
        self._num_confirmed += 1

    def doubt(self) -> None:
        """What was timed says nothing any more."""
        self._num_confirmed, self._interval = 0, FIRST_PROBE_STEPS

    def rest(self) -> None:
        """Drafting pays: the next step without drafts is the first one."""
        self._idle_steps = 0
        self._interval = RARE_PROBE_STEPS if self._num_confirmed >= CONFIRMATIONS else FIRST_PROBE_STEPS

    def due(self) -> bool:
        """Counts a step without drafts; whether it should draft all the same."""
        self._idle_steps += 1
        if self._idle_steps < self._interval:
            return False
        self._idle_steps = 0
        self._interval = min(2 * self._interval, LAST_PROBE_STEPS)
        self.active = True
        return True


def _expected(draft: Draft, steps: int) -> float:
    """What further tokens of a draft add to the expected length of the text."""
    rate = min(draft.acceptance.next_rate, 0.999)
    return draft.survival * rate * (1.0 - rate**steps) / (1.0 - rate)
