"""First estimates of what passes cost: measured by turns when an engine starts, and what they promise.

A start is short, and the machine may be busy. So passes of the draft and of the target take turns in several rounds, of which
the fastest counts; a result that the bytes rule out is measured again; and what remains wrong is for the engine to correct.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_sirius.config import SiriusConfig
from vllm_sirius.metrics import predicted_speedup
from vllm_sirius.pacing.costs import StepCosts

FEW_ROWS = (1, 2, 4, 5, 8, 9, 16, 17, 32, 33)
"""The draft's kernels take tokens in blocks, so that the first one beyond a power of two costs more than those after it."""

MOST_TOKENS = 512
LONG_PASS = 0.5
"""Larger passes, and those beyond the first that takes so many seconds, are learnt when they run: a start must be short."""

VERY_LONG_PASS = 2.0
"""Passes that are longer even at their smallest size are run once, as where the target's weights come from a disk."""

USUAL_TOKENS = 16
MOST_WARM_UP_SECONDS = 6.0
"""Up to so many tokens all passes are measured, unless they have taken so long already."""

ROUNDS = 3
FURTHER_ROUNDS = 3
"""Rounds in which every pass has its turn, after one that warms up: always, and while what they gave is not plausible."""

MOST_SECONDS = 3.0
"""No further round begins after so long."""

PAUSE = 0.3
"""Seconds before a round that is made because another program seemed to disturb those before it."""

LEAST_PART = 0.5
"""A draft step cannot cost less than this part of what its bytes say: they may be off by that much."""


@dataclass(frozen=True)
class Pass:
    """A kind of pass and its size.

    Attributes:
        size: Tokens, or rows of a draft step.
        draft: Whether it is a draft step; otherwise a pass of the target.
    """

    size: int
    draft: bool

    def positions(self, max_model_len: int) -> list[int]:
        """Positions of its tokens, as those of several requests where none may be so long. A model knows no further ones.

        Args:
            max_model_len: Longest text of the engine.
        """
        return [place % max_model_len for place in range(self.size)]


def passes_to_measure(most_target_tokens: int, most_draft_rows: int) -> list[Pass]:
    """The passes whose costs are measured, smaller ones first.

    Args:
        most_target_tokens: Tokens of the largest pass that judges drafts.
        most_draft_rows: Tokens of the largest draft step, candidates of prompt lookup included.
    """
    target = {Pass(size, False) for size in _up_to(most_target_tokens)}
    draft = {Pass(size, True) for size in (*_up_to(most_draft_rows), *FEW_ROWS) if size <= most_draft_rows}
    return sorted(target | draft, key=lambda one: (one.size, one.draft))


def _up_to(most: int) -> list[int]:
    """Powers of two, and the largest size."""
    most = min(most, MOST_TOKENS)
    return [*(1 << exponent for exponent in range(most.bit_length())), most]


def measure_by_turns(
    passes: Sequence[Pass],
    seconds_of: Callable[[Pass], float],
    predicted_cost: float,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> StepCosts:
    """Measures passes, each several times, one kind after the other.

    Args:
        passes: Of each kind at least one, smaller ones first.
        seconds_of: Runs a pass and tells its seconds.
        predicted_cost: Part of a target step's bytes that a draft step reads.
        clock: Tells seconds.
        sleep: Lets seconds pass.

    Returns:
        The costs.
    """
    fastest, short = _warm_up(passes, seconds_of)
    started = clock()
    for number in range(ROUNDS + FURTHER_ROUNDS):
        if number >= ROUNDS:
            if is_plausible(_costs(fastest), predicted_cost):
                break
            sleep(PAUSE)
        for one in short:
            fastest[one] = min(fastest[one] if number else math.inf, seconds_of(one))
        if clock() - started > MOST_SECONDS:
            break
    return _costs(fastest)


def _warm_up(passes: Sequence[Pass], seconds_of: Callable[[Pass], float]) -> tuple[dict[Pass, float], list[Pass]]:
    """Runs every pass once, of each kind none that is larger than a long one. Returns their seconds, and the short ones."""
    found: dict[Pass, float] = {}
    long: set[bool] = set()
    for one in passes:
        if one.draft not in long:
            found[one] = seconds_of(one)
            late = sum(found.values()) > MOST_WARM_UP_SECONDS
            if found[one] > LONG_PASS and (one.size >= USUAL_TOKENS or late):
                long.add(one.draft)
    # A pass that is long even at the smallest size is worth a second look all the same, unless that takes too long.
    smallest = {next(one for one in passes if one.draft is kind) for kind in (True, False)}
    smallest = {one for one in smallest if found[one] <= VERY_LONG_PASS}
    return found, [one for one, seconds in found.items() if seconds <= LONG_PASS or one in smallest]


def _costs(fastest: dict[Pass, float]) -> StepCosts:
    draft, target = (
        {one.size: seconds for one, seconds in fastest.items() if one.draft is kind} for kind in (True, False)
    )
    return StepCosts(draft, target)


def is_plausible(costs: StepCosts, predicted_cost: float) -> bool:
    """Whether a measured draft cost can be true; otherwise something held up one side more than the other.

    Args:
        costs: What was measured.
        predicted_cost: Part of a target step's bytes that a draft step reads.
    """
    draft_cost = costs.draft_cost(1)
    return draft_cost >= LEAST_PART * predicted_cost and (draft_cost < 1.0 or predicted_cost >= 1.0)


def what_costs_promise(
    costs: StepCosts, config: SiriusConfig, predicted_cost: float, seconds: float
) -> tuple[str, str | None]:
    """What a user should know of measured costs.

    Args:
        costs: The costs.
        config: The options, as they were resolved.
        predicted_cost: Part of a target step's bytes that a draft step reads; 1 where drafts are masked.
        seconds: What measuring took.

    Returns:
        A sentence on what was measured, and a warning where no acceptance could make adaptive drafts pay.
    """
    draft_cost = costs.draft_cost(1)
    plausible = is_plausible(costs, predicted_cost)
    # Bytes bound what can be gained: where a draft step seems cheaper, the target was held up.
    bounded = max(draft_cost, predicted_cost) if plausible else predicted_cost
    largest = max(map(int, costs.target.as_dict()))
    ceiling = max(
        # What a pass costs that was not measured is not known: then the bound is that it costs no more.
        predicted_speedup(
            length, length - 1, bounded, max(costs.verify_cost(1, length), 1.0) if length <= largest else 1.0
        )
        for length in range(2, config.kernel_size + 1)
    )
    doubt = (
        ""
        if plausible
        else f" (its bytes say {predicted_cost:.2f}: the machine is busy, or overheads decide; the engine goes on measuring)"
    )
    sentence = (
        f"measured draft cost {draft_cost:.2f} of a target step ({1000 * costs.target.seconds(1):.1f} ms){doubt}; correcting "
        f"{config.kernel_size} tokens costs {costs.verify_cost(1, config.kernel_size):.2f} steps | speed-up of one "
        f"request at most {ceiling:.2f}x{'' if plausible else ' by its bytes'}"
        f"{', more where prompt lookup is right' if config.prompt_lookup_tokens else ''} | measured in {seconds:.1f} s"
    )
    # With a fixed length the engine drafts all the same.
    if ceiling >= 1.0 or not plausible or not config.adaptive:
        return sentence, None
    return sentence, (
        "Sirius will hardly draft for single requests: at these costs drafts could only slow them down. "
        f"{_remedy(config, predicted_cost)} `vllm-sirius tune` finds the best options on your prompts."
    )


def _remedy(config: SiriusConfig, predicted_cost: float) -> str:
    if predicted_cost >= 1.0:
        return (
            "They run masked, so that a draft step reads all that the target reads: the start-up line has the reason."
        )
    if config.draft_weights != "int4":
        return "On CPU draft_weights='int4' with sparsity='none' reads the fewest bytes."
    return "No option makes a draft read less than draft_weights='int4' does: serve this model without Sirius if that stays so."
