"""How likely the target accepts a draft token: the draft's own confidence, corrected by what was accepted so far."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise

import torch

EDGES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
"""Bounds of the ranges of confidence whose acceptance is counted apart."""

PRIOR_TOKENS = 4.0
"""Weight of the first estimate of a range, in tokens: that a token is accepted as often as the draft is confident of it."""

MEMORY_TOKENS = 2000.0
"""Older verdicts of a range fade once it has seen this many tokens."""

REQUEST_MEMORY = 0.98
"""What remains of a request's older verdicts at each new one."""

PRIOR_REJECTIONS = 2.0
"""Weight of the first estimate that a request is as hard as the others, in rejections."""


def confidence(logits: torch.Tensor) -> torch.Tensor:
    """Probability the draft gives its likeliest token.

    Args:
        logits: ``[n, vocabulary]``.

    Returns:
        ``float32 [n]``.
    """
    logits = logits.float()
    return torch.exp(logits.amax(dim=-1) - logits.logsumexp(dim=-1))


class AcceptanceModel:
    """Acceptance rate by the draft's confidence, counted over all requests of an engine."""

    def __init__(self) -> None:
        bounds = (0.0, *EDGES, 1.0)
        middles = [(low + high) / 2 for low, high in pairwise(bounds)]
        self._accepted = [PRIOR_TOKENS * middle for middle in middles]
        self._judged = [PRIOR_TOKENS] * len(middles)

    def rate(self, draft_confidence: float) -> float:
        """Acceptance rate of tokens of which the draft is as confident as that.

        Args:
            draft_confidence: From 0 to 1.

        Returns:
            A number above 0 and at most 1.
        """
        index = bisect_right(EDGES, draft_confidence)
        return self._accepted[index] / self._judged[index]

    def observe(self, draft_confidence: float, accepted: bool) -> None:
        """Takes in the verdict on one token.

        Args:
            draft_confidence: The draft's confidence in it.
            accepted: Whether the target accepted it.
        """
        index = bisect_right(EDGES, draft_confidence)
        fade = min(1.0, MEMORY_TOKENS / (self._judged[index] + 1.0))
        # The estimate must never become impossible to leave: a range that was always rejected keeps a little hope.
        self._accepted[index] = max(self._accepted[index] * fade + float(accepted), 0.01)
        self._judged[index] = self._judged[index] * fade + 1.0


class RequestAcceptance:
    """Acceptance of one request: the engine's rates, scaled by how much harder than they say the request has been.

    Attributes:
        next_rate: Expected acceptance rate of the token that would be drafted next, before its confidence is known.

    Args:
        model: The engine's rates.
        first_rate: First estimate of `next_rate`.
    """

    def __init__(self, model: AcceptanceModel, first_rate: float) -> None:
        self._model = model
        self._expected = self._rejected = PRIOR_REJECTIONS
        self._drafted: list[float] = []
        self.next_rate = first_rate

    def begin(self) -> None:
        """Starts a draft."""
        self._drafted.clear()

    def drafted(self, draft_confidence: float) -> float:
        """Notes a proposed token; one that does not become part of the draft is the last, and is never judged.

        Args:
            draft_confidence: The draft's confidence in it.

        Returns:
            The rate at which such a token of this request is accepted, given that those before it are.
        """
        self._drafted.append(draft_confidence)
        rate = math.exp(math.log(self._model.rate(draft_confidence)) * self._rejected / self._expected)
        self.next_rate += 0.1 * (rate - self.next_rate)
        return rate

    def judged(self, num_accepted: int, num_judged: int) -> None:
        """Takes in the verdict on the draft.

        Args:
            num_accepted: Tokens of it that the target accepted.
            num_judged: Tokens of it that the target saw. The first of them that was not accepted was rejected; what was
                not scheduled teaches nothing.
        """
        for position, draft_confidence in enumerate(self._drafted[: min(num_accepted + 1, num_judged)]):
            accepted = position < num_accepted
            expected = -math.log(self._model.rate(draft_confidence))
            self._expected = REQUEST_MEMORY * self._expected + (1 - REQUEST_MEMORY) * PRIOR_REJECTIONS + expected
            self._rejected = REQUEST_MEMORY * self._rejected + (1 - REQUEST_MEMORY) * PRIOR_REJECTIONS + (not accepted)
            self._model.observe(draft_confidence, accepted)
        self._drafted.clear()
