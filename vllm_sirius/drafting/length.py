"""How many tokens to draft for a request: the hard limits, and the length that follows recent acceptance."""

from __future__ import annotations

MIN_ADAPTIVE_LENGTH = 2
"""An adaptive draft never gets shorter, so that it notices when drafting starts to pay again."""


def max_useful_draft_tokens(
    num_speculative_tokens: int, position: int, remaining_tokens: int, max_model_len: int
) -> int:
    """Draft tokens that can still become part of the text.

    A correction pass emits one token of the target's own after the accepted ones, so the last token that a request may
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


class AdaptiveLength:
    """Draft length that follows one request's acceptance: doubles after a whole draft, shrinks to what was accepted.

    Args:
        num_speculative_tokens: The longest draft, ``kernel_size - 1``; also the first one.
    """

    def __init__(self, num_speculative_tokens: int) -> None:
        self._longest = num_speculative_tokens
        self.length = num_speculative_tokens

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Takes in the verdict on one draft.

        Args:
            num_drafted: Tokens drafted.
            num_accepted: Tokens accepted of them.
        """
        if num_drafted == 0:
            return
        if num_accepted == num_drafted:
            self.length = min(self._longest, max(self.length, 2 * num_drafted))
        else:
            shrunk = (self.length + num_accepted + 1) // 2
            self.length = min(self._longest, max(MIN_ADAPTIVE_LENGTH, num_accepted + 1, shrunk))
