"""Greedy drafting with the reduced target: at least one token per running request and step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_sirius.drafting.prompt_lookup import NO_CANDIDATES, Candidates, PromptLookup
from vllm_sirius.pacing.policy import LengthRule

DraftForward = Callable[[list[int], list[int], torch.Tensor, torch.Tensor], torch.Tensor]
"""Runs one draft step: (rows, counts, token_ids ``int32 [n]``, positions ``int64 [n]``) -> logits ``[n, vocabulary]``.

`rows` are the batch rows that still draft, in ascending order; the tensors hold ``counts[i]`` successive tokens of
``rows[i]``, one row after the other. The step writes the K/V of each token into the slot of its position.
"""

NO_TEXT: NDArray[np.int32] = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class DraftRequest:
    """What the loop must know of one request.

    Attributes:
        row: Its row in the batch.
        last_token_id: The last token of the text; it has no K/V yet.
        position: Position of that token.
        max_draft_tokens: Most tokens to draft, at least one.
        end_token_ids: Tokens that end the text. The draft never proposes one: only the target ends a text.
        text: Its token ids up to the last one, ``int32 [position + 1]``, to look candidates up in; empty for none.
    """

    row: int
    last_token_id: int
    position: int
    max_draft_tokens: int
    end_token_ids: frozenset[int]
    text: NDArray[np.int32] = field(default_factory=lambda: NO_TEXT, compare=False)


@dataclass(eq=False)
class _Draft:
    """A draft in the making, and its part of the running step.

    Attributes:
        request: Whose it is.
        token_ids: The draft so far.
        candidates: What the running step verifies along.
        start: Where its tokens are in the running step.
        num_right: Candidates that turned out right so far.
        num_plain_steps: Steps that the draft would have taken so far without prompt lookup.
    """

    request: DraftRequest
    token_ids: list[int] = field(default_factory=list)
    candidates: Candidates = NO_CANDIDATES
    start: int = 0
    num_right: int = 0
    num_plain_steps: int = 0

    @property
    def fed(self) -> list[int]:
        """Tokens that a step reads for it."""
        return [self.token_ids[-1] if self.token_ids else self.request.last_token_id, *self.candidates.taken]

    @property
    def room(self) -> int:
        """Tokens that it may still grow by."""
        return self.request.max_draft_tokens - len(self.token_ids)

    @property
    def output(self) -> int:
        """Where in the running step's output its next token is."""
        return self.start + self.num_right

    def text(self) -> NDArray[np.int32]:
        """The request's text with the draft."""
        text = self.request.text
        return np.concatenate([text, np.array(self.token_ids, dtype=np.int32)]) if len(text) else text

    def grow(self, token_id: int) -> bool:
        """Takes one more token over; whether it was a candidate, so that the running step also knows the one after it."""
        self.token_ids.append(token_id)
        looked_up = self.candidates.taken[self.num_right : self.num_right + 1] == (token_id,)
        self.num_right += looked_up
        return looked_up


def draft_tokens(
    requests: Sequence[DraftRequest], forward: DraftForward, rule: LengthRule, lookup: PromptLookup | None = None
) -> dict[int, list[int]]:
    """Drafts for every request until its limit, its first end token or the end of what pays.

    A step feeds the last token of a draft, at its position, and the candidates of what follows; K/V go exactly where the next
    verification pass of the target rewrites them, or a later step where a candidate was wrong. Candidates never go beyond the
    slots of the longest draft. A request that is done leaves the batch of the following steps.

    Args:
        requests: The requests for which `rule` has chosen a first step, in ascending order of their rows.
        forward: One draft step.
        rule: Decides what further steps pay.
        lookup: Finds candidates that a step verifies along; without it each step drafts one.

    Returns:
        Row -> draft tokens, an empty list where the first token already was an end token or would not pay.
    """
    drafts = [_Draft(request) for request in requests]
    active = drafts
    num_steps, hoped = 0, 0.0
    while active:
        _look_up(active, lookup)
        going = _step(active, forward, rule, lookup)
        num_steps += 1
        hoped += sum(draft.num_right for draft in active) / len(active)
        chosen = set(rule.choose([draft.request.row for draft in going])) if going else set()
        active = [draft for draft in going if draft.request.row in chosen]
    if lookup is not None and len(drafts) > 1:
        lookup.drafted(max(draft.num_plain_steps for draft in drafts) - num_steps, hoped)
    return {draft.request.row: draft.token_ids for draft in drafts}


def _look_up(drafts: Sequence[_Draft], lookup: PromptLookup | None) -> None:
    if lookup is None:
        return
    # The last token of a full draft is never fed, so it is no use to look it up.
    found = lookup.propose([draft.text() for draft in drafts], [draft.room - 1 for draft in drafts])
    for draft, candidates in zip(drafts, found, strict=True):
        draft.candidates = candidates


def _step(
    drafts: Sequence[_Draft], forward: DraftForward, rule: LengthRule, lookup: PromptLookup | None
) -> list[_Draft]:
    """Runs one step and takes its tokens over. Returns the drafts that go on, in their order."""
    fed: list[int] = []
    positions: list[int] = []
    for draft in drafts:
        draft.start, draft.num_right = len(fed), 0
        first = draft.request.position + len(draft.token_ids)
        positions += range(first, first + len(draft.fed))
        fed += draft.fed
    logits = forward(
        [draft.request.row for draft in drafts],
        [len(draft.fed) for draft in drafts],
        torch.tensor(fed, dtype=torch.int32),
        torch.tensor(positions, dtype=torch.int64),
    )
    before = [len(draft.token_ids) for draft in drafts]
    going = _take_over(drafts, logits, rule)
    rule.stepped(len(fed), sum(len(draft.token_ids) for draft in drafts) - sum(before))
    for draft, length in zip(drafts, before, strict=True):
        draft.num_plain_steps += 1 + draft.num_right
        if lookup is not None:
            lookup.judged(draft.candidates, draft.token_ids[length:])
    return [draft for draft in drafts if draft in going]


def _take_over(drafts: Sequence[_Draft], logits: torch.Tensor, rule: LengthRule) -> set[_Draft]:
    """Grows the drafts by what a step found, token by token while candidates were right. Returns those that go on."""
    # `max` finds the same token as `argmax`, which PyTorch runs six times slower on bfloat16.
    picks = logits.max(dim=-1).indices.tolist()
    going: set[_Draft] = set()
    known = list(drafts)
    while known:
        known = [draft for draft in known if picks[draft.output] not in draft.request.end_token_ids]
        outputs = [draft.output for draft in known]
        kept = rule.proposed([draft.request.row for draft in known], _rows(logits, outputs))
        known = [draft for draft, keep in zip(known, kept, strict=True) if keep]
        looked_up = [draft.grow(picks[draft.output]) for draft in known]
        going.update(draft for draft, more in zip(known, looked_up, strict=True) if not more and draft.room)
        known = [draft for draft, more in zip(known, looked_up, strict=True) if more]
    return going


def _rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some rows of the logits, without a copy where it is all of them or one run."""
    if rows and rows[-1] - rows[0] == len(rows) - 1:
        return logits[rows[0] : rows[-1] + 1]
    return logits[rows]
