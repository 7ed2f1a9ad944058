"""From what one engine showed to the speed-up at every kernel size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_sirius.config import MIN_KERNEL_SIZE
from vllm_sirius.metrics import SpeculationCounts, predicted_speedup
from vllm_sirius.pacing.costs import StepCosts
from vllm_sirius.tuning.grid import Draft


def acceptance_lengths(counts: SpeculationCounts, longest: int) -> dict[int, float]:
    """Mean tokens per verification pass at every kernel size, from drafts of one length.

    A shorter draft would have been accepted as far as its tokens go, so position i counts the same at every kernel
    size. This is approximate: with another kernel size drafts start elsewhere, and coarse sets are refreshed more often.

    The last drafts of an answer are cut short. vLLM counts the tokens that they lack, not where: a cut comes at any
    length alike, so position i lacks a part of them that grows with i. Judging position i by the drafts that reach it
    keeps short answers from looking like rejections.

    Args:
        counts: What was counted with ``adaptive: false``.
        longest: The kernel size it was counted with.

    Returns:
        Kernel size -> acceptance length, from `MIN_KERNEL_SIZE` to `longest`.
    """
    num_tokens = longest - 1
    missing = max(0, counts.num_drafts * num_tokens - counts.num_draft_tokens)
    lacked_per_position = 2 * missing / (num_tokens * (num_tokens - 1)) if num_tokens > 1 else 0.0
    accepted = [*counts.accepted_by_position[:num_tokens], *[0] * (num_tokens - len(counts.accepted_by_position))]
    lengths = {}
    length, share = 1.0, 1.0
    for position, number in enumerate(accepted):
        long_enough = max(counts.num_drafts - lacked_per_position * position, number)
        share = min(share, number / long_enough) if long_enough > 0 else 0.0
        length += share
        lengths[position + 2] = length
    assert min(lengths) == MIN_KERNEL_SIZE
    return lengths


@dataclass(frozen=True)
class Prediction:
    """What a draft should gain at one kernel size under one rule.

    Attributes:
        draft: The draft.
        acceptance: The rule.
        kernel_size: Most tokens per verification pass.
        acceptance_length: Mean tokens per verification pass.
        draft_cost: Draft step over dense step.
        verify_cost: Verification pass over dense step.
        speedup: Speed over that of vLLM alone.
    """

    draft: Draft
    acceptance: str
    kernel_size: int
    acceptance_length: float
    draft_cost: float
    verify_cost: float
    speedup: float

    def as_json(self) -> dict[str, Any]:
        """JSON values; the draft by its title."""
        return {**asdict(self), "draft": self.draft.title}


def predict(
    draft: Draft, acceptance: str, counts: SpeculationCounts, costs: StepCosts, batch: int, longest: int
) -> list[Prediction]:
    """Predicts the speed-up of a draft at every kernel size.

    Args:
        draft: The draft.
        acceptance: The rule.
        counts: What was counted under this rule with ``adaptive: false``.
        costs: What the steps of its engine cost.
        batch: Requests that are answered together.
        longest: The kernel size of its engine.

    Returns:
        One prediction for each kernel size up to `longest`.
    """
    cost = costs.draft_cost(batch)
    predictions = []
    for kernel_size, length in acceptance_lengths(counts, longest).items():
        verify = costs.verify_cost(batch, kernel_size)
        speedup = predicted_speedup(length, kernel_size - 1, cost, verify)
        predictions.append(Prediction(draft, acceptance, kernel_size, length, cost, verify, speedup))
    return predictions


PREDICTION_ERROR = 0.05
"""Speed-ups closer than this are the same: predictions stand on steps that were timed a few times."""


def choose(predictions: Sequence[Prediction], default: str) -> Prediction:
    """The prediction to put to the test: the best, or the default draft's where it is as good.

    Args:
        predictions: Those of one rule.
        default: Title of the draft that is used unless told otherwise.

    Returns:
        One of them.
    """
    found = best(predictions)
    usual = [prediction for prediction in predictions if prediction.draft.title == default]
    if usual and best(usual).speedup >= found.speedup * (1.0 - PREDICTION_ERROR):
        return best(usual)
    return found


def best(predictions: Sequence[Prediction]) -> Prediction:
    """The prediction with the largest speed-up; of equal ones that with the smaller kernel size."""
    return max(predictions, key=lambda prediction: (prediction.speedup, -prediction.kernel_size))
