"""Which draft tokens of a verification pass are kept: pure tensor functions.

Names, as in vLLM's rejection sampler: the *recovered* token replaces the first rejected draft token, the *bonus*
token follows a draft that was accepted whole. Leaf module: torch only.

Shapes use B requests, N draft tokens of all requests one after the other, V vocabulary entries.
"""

from __future__ import annotations

import torch

PLACEHOLDER_TOKEN_ID = -1
"""Fills the output after a request's last token, as in vLLM's rejection sampler."""


def accept_by_threshold(
    draft_token_ids: torch.Tensor,
    own_token_ids: torch.Tensor,
    target_logits: torch.Tensor,
    threshold: torch.Tensor,
    temperature: torch.Tensor,
) -> torch.Tensor:
    """The likelihood rule of Sirius (paper section 4.2, Algorithm 1; the temperature is in the authors' code).

    A draft token passes when the target gives it at least `threshold` at `temperature`, or when it is the target's own
    choice. A token that the request's constraints exclude (logit of minus infinity: grammar, bad words, minimum length,
    top-k, top-p) never passes, whatever the threshold.

    Args:
        draft_token_ids: Draft tokens, ``int [N]``; a negative id is a placeholder and is rejected.
        own_token_ids: What the target itself would emit at each position, ``int [N]``.
        target_logits: Processed logits of the target, ``float [N, V]``.
        threshold: Likelihood threshold of each row, ``float [N]``.
        temperature: Temperature of the likelihood of each row, ``float [N]``.

    Returns:
        ``bool [N]``: whether each draft token passes, seen on its own.
    """
    rows = draft_token_ids.clamp_min(0).long().unsqueeze(1)
    likelihood = (target_logits.float() / temperature.unsqueeze(1)).softmax(dim=-1).gather(1, rows).squeeze(1)
    possible = target_logits.gather(1, rows).squeeze(1) > float("-inf")
    passes = (likelihood >= threshold) & possible
    return (passes | (own_token_ids == draft_token_ids)) & (draft_token_ids >= 0)


def accept_own_choice(draft_token_ids: torch.Tensor, own_token_ids: torch.Tensor) -> torch.Tensor:
    """Lossless acceptance of one-hot drafts: a token passes if the target would have emitted it.

    With `own_token_ids` sampled from the target, a draft token is accepted with the probability the target gives it,
    which is standard rejection sampling for a draft that puts all its mass on one token.

    Args:
        draft_token_ids: ``int [N]``.
        own_token_ids: ``int [N]``.

    Returns:
        ``bool [N]``.
    """
    return (own_token_ids == draft_token_ids) & (draft_token_ids >= 0)


def accept_drawn(
    draft_token_ids: torch.Tensor, target_logits: torch.Tensor, draft_logits: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard rejection sampling of drafts that were drawn from a distribution (arXiv 2211.17192, Algorithm 1).

    A draft token passes with probability ``min(1, p / q)``; the token that replaces a rejected one is to be drawn from the
    part of the target's distribution that the draft's does not cover. Together they are distributed as the target's own.

    Args:
        draft_token_ids: ``int64 [N]``; a negative id is a placeholder and is rejected.
        target_logits: Processed logits of the target, ``float [N, V]``.
        draft_logits: Logits the tokens were drawn from, temperature applied, ``float [N, V]``.
        uniform: One number in [0, 1) for each row, independent of what drew the draft, ``float [N]``.

    Returns:
        ``bool [N]``: whether each draft token passes; and ``float32 [N, V]``: logits of the token to emit where it does
        not, the target's own where there is no draft.
    """
    target = target_logits.float().softmax(dim=-1)
    draft = draft_logits.float().softmax(dim=-1)
    rows = draft_token_ids.clamp_min(0).unsqueeze(1)
    exists = draft_token_ids >= 0
    passes = (uniform * draft.gather(1, rows).squeeze(1) < target.gather(1, rows).squeeze(1)) & exists
    residual = (target - draft).clamp_min(0.0)
    # Without a draft, or where rounding leaves nothing of the difference, the target's whole distribution.
    residual = torch.where((exists & (residual.sum(dim=-1) > 0)).unsqueeze(1), residual, target)
    return passes, residual.log()


def uniform_noise(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A number in [0, 1) for each row that depends on seed and position alone (the mixing function of SplitMix64).

    Args:
        seeds: ``int64 [N]``.
        positions: ``int64 [N]``.

    Returns:
        ``float32 [N]``, in steps of ``2**-24``.
    """
    mixed = seeds * -7046029254386353131 + positions * -4658895280553007687 + 8458152304286742287
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        # The shift of a signed number drags its sign along; the mask takes it off again.
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((mixed >> 40) & 0xFFFFFF).float() * 2.0**-24


def emit_tokens(
    draft_token_ids: torch.Tensor,
    own_token_ids: torch.Tensor,
    accepted: torch.Tensor,
    num_draft_tokens: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    max_num_draft_tokens: int,
) -> torch.Tensor:
    """Turns per-position acceptance into the tokens each request emits: accepted prefix, then one of the target's own.

    Args:
        draft_token_ids: ``int [N]``.
        own_token_ids: The target's own choice per position, ``int [N]``; the recovered token is taken from it.
        accepted: ``bool [N]``.
        num_draft_tokens: Drafts of each request, ``int [B]``; zeros are allowed; sums to N.
        bonus_token_ids: The target's own token after the last draft of each request, ``int [B]``.
        max_num_draft_tokens: Width of the output less one.

    Returns:
        ``int32 [B, max_num_draft_tokens + 1]``, filled up with `PLACEHOLDER_TOKEN_ID`.
    """
    num_requests = num_draft_tokens.shape[0]
    device = draft_token_ids.device
    column = torch.arange(max_num_draft_tokens + 1, device=device)
    drafted = column < num_draft_tokens.unsqueeze(1)
    shape = (num_requests, max_num_draft_tokens + 1)
    draft = torch.full(shape, PLACEHOLDER_TOKEN_ID, dtype=torch.int32, device=device)
    own = torch.full_like(draft, PLACEHOLDER_TOKEN_ID)
    passed = torch.zeros(shape, dtype=torch.bool, device=device)
    draft[drafted] = draft_token_ids.to(torch.int32)
    own[drafted] = own_token_ids.to(torch.int32)
    own.scatter_(1, num_draft_tokens.long().unsqueeze(1), bonus_token_ids.to(torch.int32).view(-1, 1))
    passed[drafted] = accepted
    num_accepted = passed.int().cumprod(dim=1).sum(dim=1, keepdim=True)
    output = torch.where(column < num_accepted, draft, own)
    return output.masked_fill(column > num_accepted, PLACEHOLDER_TOKEN_ID)
