"""Prompt lookup for the draft: tokens that followed in the request's own text, so that one draft step verifies several.

Text repeats itself: a name, a number or a line of code that came before often comes again. A draft step that is fed the
last token and a few looked-up candidates reads the weights once, like a step of one token, and its outputs say how many of the
candidates are what the draft would have drafted. Those are kept, the first wrong one and all after it are forgotten: the draft
is the same token by token, only cheaper. This is prompt lookup decoding (n-gram drafting) one level down; the idea of drafts
for the draft is staged speculative decoding (arXiv 2308.04623).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vllm_sirius.pacing.costs import CostCurve

LONGEST_MATCH = 4
"""Tokens at the end of the text that are compared; a longer match says little more."""

MOST_STEP_TOKENS = 32
"""Most tokens of a draft step with candidates, the most that the draft's kernels take."""

FIRST_RATES = (0.35, 0.55, 0.7, 0.8)
"""Rates of right candidates by match length that are expected before anything is known."""

PRIOR_CANDIDATES = 8.0
"""Weight of `FIRST_RATES`, in candidates."""

FIRST_SHARE = 0.5
"""What `BatchSavings.share` is expected to be at first."""

PRIOR_STEPS = 4.0
"""Weight of `FIRST_SHARE`, in steps."""

MEMORY_STEPS = 200.0
"""Older drafts of batches fade once so many saved steps were hoped for."""

MEMORY_CANDIDATES = 500.0
"""Older verdicts fade once a rate has seen this many candidates."""

FIRST_TRIAL_STEPS = 4
LAST_TRIAL_STEPS = 512
"""Where candidates do not seem to pay, a step takes them all every so many: what such a step costs shows only if one runs."""


@dataclass(frozen=True)
class Candidates:
    """What may follow a text.

    Attributes:
        token_ids: The tokens, the nearest first.
        match_length: Tokens at the end of the text that stood before them; 0 where nothing was found.
        num_taken: How many of the tokens a draft step is to verify. The others are only compared with what it drafts.
    """

    token_ids: tuple[int, ...] = ()
    match_length: int = 0
    num_taken: int = 0

    @property
    def taken(self) -> tuple[int, ...]:
        """The tokens to verify."""
        return self.token_ids[: self.num_taken]


NO_CANDIDATES = Candidates()


def look_up(text: NDArray[np.int32], most: int) -> Candidates:
    """What followed the last place where the text read as it does at its end.

    Among the earlier places that share the most tokens with the end, up to `LONGEST_MATCH`, the latest counts. Where it is
    so near that the text ends before `most` tokens, the text is taken to go on repeating.

    Args:
        text: Token ids, ``int32 [length]``, at least one.
        most: Most tokens to look up.

    Returns:
        The candidates.
    """
    last = len(text) - 1
    if most < 1 or last < 1:
        return NO_CANDIDATES
    places = np.flatnonzero(text[:last] == text[last])
    if not len(places):
        return NO_CANDIDATES
    match_length = 1
    while match_length < LONGEST_MATCH:
        longer = places[places >= match_length]
        longer = longer[text[longer - match_length] == text[last - match_length]]
        if not len(longer):
            break
        places = longer
        match_length += 1
    following = text[places[-1] + 1 : places[-1] + 1 + most].tolist()
    period = len(following)
    while len(following) < most:
        following.append(following[-period])
    return Candidates(tuple(following), match_length)


class CandidateRates:
    """How often candidates are right, by match length and place among them, counted over all requests of an engine.

    Args:
        most: Most tokens looked up at a time.
    """

    def __init__(self, most: int) -> None:
        self._right = [[PRIOR_CANDIDATES * rate] * most for rate in FIRST_RATES]
        self._judged = [[PRIOR_CANDIDATES] * most for _ in FIRST_RATES]

    def survival(self, match_length: int, count: int) -> list[float]:
        """Probabilities that the first of the candidates is right, the first two are, and so on.

        Args:
            match_length: As in `Candidates`.
            count: How many candidates.
        """
        chances = []
        chance = 1.0
        for right, judged in zip(self._right[match_length - 1][:count], self._judged[match_length - 1], strict=False):
            chance *= right / judged
            chances.append(chance)
        return chances

    def observe(self, match_length: int, num_right: int, num_judged: int) -> None:
        """Takes in how candidates fared.

        Args:
            match_length: As in `Candidates`.
            num_right: Tokens at their start that the draft drafted too.
            num_judged: Tokens of them that can be judged: the right ones, and the first wrong one if there was one.
        """
        right, judged = self._right[match_length - 1], self._judged[match_length - 1]
        for place in range(num_judged):
            fade = min(1.0, MEMORY_CANDIDATES / (judged[place] + 1.0))
            right[place] = right[place] * fade + (place < num_right)
            judged[place] = judged[place] * fade + 1.0


class BatchSavings:
    """How much of what right candidates save single requests a batch saves, which drafts as long as its slowest request."""

    def __init__(self) -> None:
        self._saved = PRIOR_STEPS * FIRST_SHARE
        self._hoped = PRIOR_STEPS

    @property
    def share(self) -> float:
        """Steps saved over those that right candidates would save if they were spread evenly over the batch, at most 1."""
        return min(1.0, self._saved / self._hoped)

    def observe(self, saved: float, hoped: float) -> None:
        """Takes in the draft of one batch.

        Args:
            saved: Draft steps that were saved.
            hoped: Right candidates, each divided by the requests of its step.
        """
        fade = min(1.0, MEMORY_STEPS / (self._hoped + hoped))
        self._saved = (self._saved + saved) * fade
        self._hoped = (self._hoped + hoped) * fade


class PromptLookup:
    """The prompt lookup of one engine: as many candidates as pay.

    A candidate that is right saves its request a draft step; right or wrong it makes the step longer. So a step takes the
    number of candidates, the likeliest first, that saves the most time. In a batch others go on where one is done, so that only a
    part of it is saved (`BatchSavings`).

    Args:
        costs: Seconds of a draft step by its tokens.
        most: Most candidates of a request in one step.
    """

    def __init__(self, costs: CostCurve, most: int) -> None:
        self._costs = costs
        self._most = most
        self._rates = CandidateRates(most)
        self._batches = BatchSavings()
        self._num_idle = 0
        self._trial_interval = FIRST_TRIAL_STEPS

    @property
    def costs(self) -> CostCurve:
        """What it judges steps by."""
        return self._costs

    def propose(self, texts: Sequence[NDArray[np.int32]], limits: Sequence[int]) -> list[Candidates]:
        """Candidates for the requests of a draft step.

        Args:
            texts: Text of each request, its draft so far included; empty for no candidates.
            limits: Most tokens that are of use to each.

        Returns:
            Candidates of each, perhaps none.
        """
        room = MOST_STEP_TOKENS - len(texts)
        found = [look_up(text, min(limit, self._most, room)) for text, limit in zip(texts, limits, strict=True)]
        chances = [
            (chance, request)
            for request, candidates in enumerate(found)
            if candidates.match_length
            for chance in self._rates.survival(candidates.match_length, len(candidates.token_ids))
        ]
        # From one candidate to the next chances only fall, so the likeliest are always the first ones of each request.
        chances.sort(key=lambda entry: -entry[0])
        counts = [0] * len(texts)
        for _, request in chances[: self._num_worth([chance for chance, _ in chances[:room]], len(texts))]:
            counts[request] += 1
        return [replace(candidates, num_taken=count) for candidates, count in zip(found, counts, strict=True)]

    def judged(self, candidates: Candidates, drafted: Sequence[int]) -> None:
        """Takes in how candidates fared, taken or not.

        Args:
            candidates: The candidates.
            drafted: What the draft said instead, as far as it is known.
        """
        num_known = min(len(drafted), len(candidates.token_ids))
        num_right = 0
        while num_right < num_known and drafted[num_right] == candidates.token_ids[num_right]:
            num_right += 1
        if num_known:
            self._rates.observe(candidates.match_length, num_right, min(num_right + 1, num_known))

    def drafted(self, saved: float, hoped: float) -> None:
        """Takes in the draft of a batch of several requests; see `BatchSavings.observe`."""
        self._batches.observe(saved, hoped)

    def _num_worth(self, chances: Sequence[float], num_requests: int) -> int:
        """How many of the likeliest candidates to take."""
        alone = self._costs.seconds(num_requests)
        worth_of_step = alone if num_requests == 1 else alone * self._batches.share / num_requests
        best, best_saved, saved = 0, 0.0, 0.0
        for count, chance in enumerate(chances, start=1):
            saved += chance * worth_of_step
            worth = saved - (self._costs.seconds(num_requests + count) - alone)
            if worth > best_saved:
                best, best_saved = count, worth
        if not chances:
            return 0
        if best == 0:
            return self._trial(len(chances))
        self._num_idle = 0
        return best

    def _trial(self, most: int) -> int:
        """Counts a step whose candidates do not seem to pay; how many it takes all the same."""
        self._num_idle += 1
        if self._num_idle < self._trial_interval:
            return 0
        self._num_idle = 0
        self._trial_interval = min(2 * self._trial_interval, LAST_TRIAL_STEPS)
        return most
