"""How many tokens of a draft can be of use: the hard limits of its length."""

from __future__ import annotations


def max_useful_draft_tokens(
    num_speculative_tokens: int, position: int, remaining_tokens: int, max_model_len: int
) -> int:
    """Draft tokens that can still become part of the text.

    A verification pass emits one token of the target's own after the accepted ones, so the last token that a request may
    still emit is never worth drafting. The scheduler verifies positions up to ``max_model_len - 2``.

    Args:
        num_speculative_tokens: ``kernel_size - 1``.
        position: Position of the last token of the text.
        remaining_tokens: Tokens the request may still emit.
        max_model_len: Longest text of the engine.

    Returns:
        The limit, zero or more.
    """
    return max(0, min(num_speculative_tokens, remaining_tokens - 1, max_model_len - 2 - position))
