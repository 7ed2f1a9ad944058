"""The numbers by which Sirius is judged, and how to read them out of vLLM. Leaf module.

vLLM counts speculative decoding itself (``vllm:spec_decode_*``); nothing is counted twice here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any


@dataclass(frozen=True)
class SpeculationCounts:
    """vLLM's counters of speculative decoding.

    Attributes:
        num_drafts: Verification passes that had draft tokens to judge.
        num_draft_tokens: Draft tokens judged.
        num_accepted_tokens: Draft tokens accepted.
        accepted_by_position: Drafts whose token at each position was accepted.
    """

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_by_position: tuple[int, ...] = ()

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per verification pass, the paper's AAL (section 2): accepted tokens and the target's own one."""
        return 1.0 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    def since(self, earlier: SpeculationCounts) -> SpeculationCounts:
        """What was counted after `earlier`."""
        return SpeculationCounts(
            self.num_drafts - earlier.num_drafts,
            self.num_draft_tokens - earlier.num_draft_tokens,
            self.num_accepted_tokens - earlier.num_accepted_tokens,
            tuple(
                now - then
                for now, then in zip_longest(self.accepted_by_position, earlier.accepted_by_position, fillvalue=0)
            ),
        )


def read_counts(metrics: Iterable[Any]) -> SpeculationCounts:
    """Reads the counters out of ``LLM.get_metrics()``.

    Args:
        metrics: vLLM's metrics, objects with ``name`` and ``value``; needs ``disable_log_stats=False``.

    Returns:
        The counts since the engine started; zeros where nothing was drafted.
    """
    found: dict[str, Any] = {m.name: getattr(m, "value", getattr(m, "values", None)) for m in metrics}
    by_position = found.get("vllm:spec_decode_num_accepted_tokens_per_pos", ())
    drafts, drafted, accepted = (
        int(found.get(f"vllm:spec_decode_{name}", 0))
        for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    )
    return SpeculationCounts(drafts, drafted, accepted, tuple(by_position))


def effective_density(draft_step_density: float, mean_drafted: float, acceptance_length: float) -> float:
    """Weights read per emitted token against dense decoding (paper section 2, with a verification pass counted as one step).

    Args:
        draft_step_density: Part of the bytes of a dense step that a draft step reads.
        mean_drafted: Mean draft tokens per verification pass; ``kernel_size - 1`` without adaptive length.
        acceptance_length: Mean tokens per verification pass.

    Returns:
        The density; below 1 decoding reads less than without Sirius.
    """
    return (mean_drafted * draft_step_density + 1.0) / acceptance_length


def predicted_speedup(acceptance_length: float, mean_drafted: float, draft_cost: float, verify_cost: float) -> float:
    """The speed model: tokens per verification pass over its cost in dense one-token steps.

    Args:
        acceptance_length: Mean tokens per verification pass.
        mean_drafted: Mean draft tokens per verification pass.
        draft_cost: Draft step over dense step.
        verify_cost: Verification pass over dense step.

    Returns:
        Speed against decoding without Sirius.
    """
    return acceptance_length / (mean_drafted * draft_cost + verify_cost)
