"""Greedy drafting with the reduced target: one token per running request and step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_sirius.drafting.policy import LengthRule

DraftForward = Callable[[list[int], torch.Tensor, torch.Tensor], torch.Tensor]
"""Runs one draft step: (rows, token_ids ``int32 [n]``, positions ``int64 [n]``) -> logits ``[n, vocabulary]``.

`rows` are the batch rows that still draft, in ascending order; entry i of the tensors belongs to ``rows[i]``. The step
writes the K/V of each token into the slot of its position.
"""


@dataclass(frozen=True)
class DraftRequest:
    """What the loop must know of one request.

    Attributes:
        row: Its row in the batch.
        last_token_id: The last token of the text; it has no K/V yet.
        position: Position of that token.
        max_draft_tokens: Most tokens to draft, at least one.
        end_token_ids: Tokens that end the text. The draft never proposes one: only the target ends a text.
    """

    row: int
    last_token_id: int
    position: int
    max_draft_tokens: int
    end_token_ids: frozenset[int]


def draft_tokens(requests: Sequence[DraftRequest], forward: DraftForward, rule: LengthRule) -> dict[int, list[int]]:
    """Drafts for every request until its limit, its first end token or the end of what pays.

    Step i feeds the token at ``position + i`` and writes its K/V there, exactly where the next correction pass of the
    target rewrites it. A request that is done leaves the batch of the following steps.

    Args:
        requests: The requests to draft for, in ascending order of their rows.
        forward: One draft step.
        rule: Decides what pays.

    Returns:
        Row -> draft tokens, an empty list where the first token already was an end token or would not pay.
    """
    drafts: dict[int, list[int]] = {request.row: [] for request in requests}
    active = list(requests)
    token_ids = torch.tensor([request.last_token_id for request in active], dtype=torch.int32)
    positions = torch.tensor([request.position for request in active], dtype=torch.int64)
    while active:
        chosen = set(rule.choose([request.row for request in active]))
        active, (token_ids, positions) = _keep(active, [r.row in chosen for r in active], (token_ids, positions))
        if not active:
            break
        logits = forward([request.row for request in active], token_ids, positions)
        # `max` finds the same token as `argmax`, which PyTorch runs six times slower on bfloat16.
        token_ids = logits.max(dim=-1).indices.to(torch.int32)
        goes_on = [token_id not in r.end_token_ids for r, token_id in zip(active, token_ids.tolist(), strict=True)]
        active, (token_ids, positions, logits) = _keep(active, goes_on, (token_ids, positions, logits))
        accepted = rule.proposed([request.row for request in active], logits)
        active, (token_ids, positions) = _keep(active, accepted, (token_ids, positions))
        for request, token_id in zip(active, token_ids.tolist(), strict=True):
            drafts[request.row].append(token_id)
        below = [len(drafts[request.row]) < request.max_draft_tokens for request in active]
        active, (token_ids, positions) = _keep(active, below, (token_ids, positions + 1))
    return drafts


def _keep(
    requests: list[DraftRequest], kept: list[bool], tensors: tuple[torch.Tensor, ...]
) -> tuple[list[DraftRequest], tuple[torch.Tensor, ...]]:
    """The requests that stay, and their rows of the tensors."""
    if all(kept):
        return requests, tensors
    mask = torch.tensor(kept)
    stay = [request for request, keep in zip(requests, kept, strict=True) if keep]
    return stay, tuple(tensor[mask] for tensor in tensors)
