"""Runs the engines: every draft of the grid by itself, then the winners and vLLM alone side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_sirius.measuring.engine import Answers, Engine, EngineError
from vllm_sirius.measuring.side_by_side import PAUSE_SECONDS, WARM_UP_TOKENS
from vllm_sirius.metrics import SpeculationCounts
from vllm_sirius.pacing.costs import StepCosts
from vllm_sirius.request_rules import THRESHOLD_KEY
from vllm_sirius.tuning.errors import TuningError
from vllm_sirius.tuning.grid import ABOVE_EVERY_LIKELIHOOD, RULES, THRESHOLD, Draft
from vllm_sirius.tuning.predict import Prediction, predict
from vllm_sirius.tuning.progress import Progress
from vllm_sirius.tuning.setting import TuningSetting

THRESHOLDS = {"lossless": ABOVE_EVERY_LIKELIHOOD, "threshold": THRESHOLD}
"""Request threshold by rule: an engine has one rule, a request its own threshold, so one engine shows both."""


@dataclass
class MeasuredDraft:
    """What one draft of the grid showed.

    Attributes:
        draft: The draft.
        start_up_line: What Sirius said when its engine started.
        refused: Why there is nothing more; empty if there is.
        costs: What single steps cost.
        counts: By rule, over all prompts.
        predictions: By rule, at every kernel size.
    """

    draft: Draft
    start_up_line: str = ""
    refused: str = ""
    costs: StepCosts | None = None
    counts: dict[str, SpeculationCounts] = field(default_factory=dict)
    predictions: dict[str, list[Prediction]] = field(default_factory=dict)


@dataclass
class Arm:
    """One engine of the comparison.

    Attributes:
        title: Its name.
        prediction: What it was chosen for; ``None`` for vLLM alone.
        answers: One per batch of prompts.
        adaptive_kernel_size: Kernel size of drafts that adapt their length; ``None`` where the predicted one is fixed.
    """

    title: str
    prediction: Prediction | None = None
    answers: list[Answers] = field(default_factory=list)
    adaptive_kernel_size: int | None = None

    @property
    def speculative_config(self) -> dict[str, Any]:
        """Its settings; empty for vLLM alone."""
        if self.prediction is None:
            return {}
        adaptive = self.adaptive_kernel_size is not None
        kernel_size = self.adaptive_kernel_size or self.prediction.kernel_size
        return self.prediction.draft.speculative_config(kernel_size, self.prediction.acceptance, adaptive)


def steps_of_a_draft(setting: TuningSetting) -> int:
    """Steps of the progress bar for one draft: start, costs, and every batch under each rule."""
    return 2 + len(RULES) * len(setting.batches)


def steps_of_the_comparison(setting: TuningSetting) -> int:
    """Steps of the progress bar for the winners and vLLM alone: start and every batch."""
    return (1 + len(RULES)) * (1 + len(setting.batches))


def measure_draft(setting: TuningSetting, draft: Draft, log: Path, progress: Progress) -> MeasuredDraft:
    """Measures a draft with the longest kernel size under both rules.

    Args:
        setting: What all engines share.
        draft: The draft.
        log: Takes what its engine prints.
        progress: The bar.

    Returns:
        What it showed; an engine that does not start is an answer as well.
    """
    measured = MeasuredDraft(draft)
    longest = setting.options.max_kernel_size
    progress.begin(steps_of_a_draft(setting))
    progress.doing(f"{draft.title}: starting")
    try:
        config = draft.speculative_config(longest, "threshold")
        with closing(Engine({**setting.engine, "speculative_config": config}, log)) as engine:
            _warm_up(engine, setting)
            measured.start_up_line = engine.start_up_line()
            progress.step()
            progress.doing(f"{draft.title}: costs")
            measured.costs = StepCosts.from_report(engine.costs())
            progress.step()
            for rule in RULES:
                progress.doing(f"{draft.title}: {rule}")
                measured.counts[rule] = _count(engine, setting, THRESHOLDS[rule], progress)
    except EngineError as error:
        measured.refused = str(error)
        progress.say(f"{draft.title} is left out: {error}")
        progress.finish()
        return measured
    for rule, counts in measured.counts.items():
        measured.predictions[rule] = predict(draft, rule, counts, measured.costs, setting.options.batch, longest)
    return measured


def _warm_up(engine: Engine, setting: TuningSetting) -> None:
    engine.generate(setting.batches[0], min(WARM_UP_TOKENS, setting.options.max_tokens))


def _count(engine: Engine, setting: TuningSetting, threshold: float, progress: Progress) -> SpeculationCounts:
    """What vLLM counts over all prompts when requests ask for a threshold."""
    answers = []
    for batch in setting.batches:
        answers.append(
            engine.generate(batch, setting.options.max_tokens, extra_args={THRESHOLD_KEY: threshold}),
        )
        progress.step()
    return add_counts(answers)


def add_counts(answers: Sequence[Answers]) -> SpeculationCounts:
    """Adds up the counters of several batches.

    Args:
        answers: The batches.

    Returns:
        Their sum.
    """
    longest = max((len(answer.accepted_by_position) for answer in answers), default=0)
    by_position = [0] * longest
    for answer in answers:
        for position, number in enumerate(answer.accepted_by_position):
            by_position[position] += number
    return SpeculationCounts(
        sum(answer.num_drafts for answer in answers),
        sum(answer.num_draft_tokens for answer in answers),
        sum(answer.num_accepted_tokens for answer in answers),
        tuple(by_position),
    )


def compare(setting: TuningSetting, winners: Sequence[Prediction], folder: Path, progress: Progress) -> list[Arm]:
    """Lets vLLM alone and the winners answer every batch by turns, side by side.

    The order rotates, so that what else the machine does falls on all alike.

    Args:
        setting: What all engines share.
        winners: The predictions to put to the test.
        folder: Takes the engines' logs.
        progress: The bar.

    Returns:
        The arms with their answers, vLLM alone first.

    Raises:
        TuningError: If an engine does not start or stops.
    """
    longest = setting.options.max_kernel_size if setting.adaptive else None
    arms = [
        Arm("vLLM alone"),
        *(Arm(f"best {winner.acceptance}", winner, adaptive_kernel_size=longest) for winner in winners),
    ]
    progress.begin(steps_of_the_comparison(setting))
    with ExitStack() as stack:
        try:
            engines = [_start(setting, arm, folder, progress, stack) for arm in arms]
            for number, batch in enumerate(setting.batches):
                for turn in range(len(arms)):
                    index = (number + turn) % len(arms)
                    progress.doing(f"comparison: {arms[index].title}")
                    time.sleep(PAUSE_SECONDS)
                    arms[index].answers.append(engines[index].generate(batch, setting.options.max_tokens))
                    progress.step()
        except EngineError as error:
            raise TuningError(f"the comparison of the winners failed: {error}") from error
        progress.doing("ending the engines")
    progress.finish()
    return arms


def _start(setting: TuningSetting, arm: Arm, folder: Path, progress: Progress, stack: ExitStack) -> Engine:
    progress.doing(f"comparison: starting {arm.title}")
    config = {"speculative_config": arm.speculative_config} if arm.prediction is not None else {}
    engine = Engine({**setting.engine, **config}, folder / f"{arm.title.replace(' ', '-')}.log")
    stack.callback(engine.close)
    _warm_up(engine, setting)
    progress.step()
    return engine
