"""What a run's records say: speed and ratio of each arm with their spread, acceptance, memory, answers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from benchmarks.configurations import BASELINE
from benchmarks.results import Record, Result
from vllm_sirius.metrics import SpeculationCounts

Quartiles = tuple[float, float, float]
"""First quartile, median and third quartile."""

Round = tuple[int, int]
"""Repeat and engine group: the records of one are compared with one another and with no others."""


@dataclass(frozen=True)
class Row:
    """One arm on one task at one batch size.

    Attributes:
        arm: The arm.
        task: The data set.
        batch: Prompts answered together.
        speed: Tokens per second: quartiles over repeats.
        ratio: Speed over that of vLLM alone at its best: quartiles over repeats.
        ratios: The ratio of each repeat.
        best_alone: The arm of vLLM alone that is the faster.
        counts: vLLM's counters of speculative decoding over all repeats.
        num_tokens: Generated tokens over all repeats.
        num_identical: Answers that are the same as those of `BASELINE` in the same round.
        num_compared: Answers that could be compared with those.
        num_correct: Right answers.
        num_scored: Answers that were scored.
    """

    arm: str
    task: str
    batch: int
    speed: Quartiles
    ratio: Quartiles
    ratios: tuple[float, ...]
    best_alone: str
    counts: SpeculationCounts
    num_tokens: int
    num_identical: int
    num_compared: int
    num_correct: int
    num_scored: int

    @property
    def mean_drafted(self) -> float:
        """Mean draft tokens per pass of the target that had a draft; 0 without drafts."""
        return self.counts.num_draft_tokens / self.counts.num_drafts if self.counts.num_drafts else 0.0

    @property
    def identical_share(self) -> float | None:
        """Share of the answers that are the same as those of vLLM alone; ``None`` where nothing was compared."""
        return self.num_identical / self.num_compared if self.num_compared else None

    @property
    def accuracy(self) -> float | None:
        """Share of right answers; ``None`` where nothing was scored."""
        return self.num_correct / self.num_scored if self.num_scored else None

    @property
    def passes_per_token(self) -> float:
        """Passes of the target per generated token of one sequence: each gives what it accepts and one more token."""
        return 1.0 - self.counts.num_accepted_tokens / self.num_tokens

    @property
    def drafted_per_token(self) -> float:
        """Draft tokens per generated token."""
        return self.counts.num_draft_tokens / self.num_tokens


def quartiles(values: Sequence[float]) -> Quartiles:
    """First quartile, median and third quartile; a single value stands for all three.

    Args:
        values: At least one number.
    """
    if len(values) < 2:
        return (values[0],) * 3
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def summarise(result: Result) -> list[Row]:
    """Judges every arm on every task at every batch size.

    Args:
        result: A run.

    Returns:
        The rows by task, then batch size, then arm in the order of the run; arms without records have none.
    """
    rows = []
    for task in dict.fromkeys(record.task for record in result.records):
        of_task = [record for record in result.records if record.task == task]
        for batch in sorted({record.batch for record in of_task}):
            rows += _rows_of_cell(result, [record for record in of_task if record.batch == batch])
    return rows


def _rows_of_cell(result: Result, records: Sequence[Record]) -> list[Row]:
    by_arm = {name: [r for r in records if r.arm == name] for name in result.arms}
    by_arm = {name: found for name, found in by_arm.items() if found}
    alone = {name: found for name, found in by_arm.items() if not result.arms[name]["speculative_config"]}
    if not alone:
        return []
    best = max(alone, key=lambda name: quartiles(speeds(alone[name]))[1])
    rows = [_row(found, alone[best], by_arm.get(BASELINE, [])) for found in by_arm.values()]
    return [row for row in rows if row is not None]


def _row(records: Sequence[Record], best: Sequence[Record], baseline: Sequence[Record]) -> Row | None:
    """The row of one arm; ``None`` where no round has both it and vLLM alone."""
    ratios = paired_ratios(records, best)
    if not ratios:
        return None
    first = records[0]
    identical, compared = count_identical(records, baseline)
    scored = [right for record in records for right in record.correct]
    return Row(
        arm=first.arm,
        task=first.task,
        batch=first.batch,
        speed=quartiles(speeds(records)),
        ratio=quartiles(ratios),
        ratios=tuple(ratios),
        best_alone=best[0].arm,
        counts=add_counts(records),
        num_tokens=sum(record.tokens for record in records),
        num_identical=identical,
        num_compared=0 if first.arm == BASELINE else compared,
        num_correct=sum(scored),
        num_scored=len(scored),
    )


def by_round(records: Iterable[Record]) -> dict[Round, dict[tuple[int, ...], Record]]:
    """Sorts the records of one arm.

    Args:
        records: The records.

    Returns:
        Those of each round, by their prompts.
    """
    found: dict[Round, dict[tuple[int, ...], Record]] = {}
    for record in records:
        found.setdefault((record.repeat, record.engine_group), {})[tuple(record.prompts)] = record
    return found


def speeds(records: Iterable[Record]) -> list[float]:
    """Tokens per second of each round: all its tokens over all its seconds.

    Args:
        records: Of one arm.
    """
    return [_speed(found.values()) for found in by_round(records).values()]


def paired_ratios(one: Iterable[Record], other: Iterable[Record]) -> list[float]:
    """Speed of one arm over that of another, round by round, on the prompts that both answered.

    Args:
        one: Records of the arm.
        other: Records of the arm it is compared with.

    Returns:
        One ratio for each round that has records of both.
    """
    others = by_round(other)
    ratios = []
    for key, records in by_round(one).items():
        common = [prompts for prompts in records if prompts in others.get(key, {})]
        if common:
            ratios.append(_speed(records[p] for p in common) / _speed(others[key][p] for p in common))
    return ratios


def count_identical(one: Iterable[Record], other: Iterable[Record]) -> tuple[int, int]:
    """Counts answers that two arms have in common.

    Args:
        one: Records of an arm.
        other: Records of another.

    Returns:
        Number of answers that are the same, and of those that both gave.
    """
    others = by_round(other)
    same = compared = 0
    for key, records in by_round(one).items():
        for prompts, record in records.items():
            twin = others.get(key, {}).get(prompts)
            if twin is None:
                continue
            pairs = list(zip(record.answers, twin.answers, strict=True))
            same += sum(left == right for left, right in pairs)
            compared += len(pairs)
    return same, compared


def add_counts(records: Iterable[Record]) -> SpeculationCounts:
    """Adds up vLLM's counters of speculative decoding.

    Args:
        records: Of one arm.
    """
    found = list(records)
    positions = zip_longest(*(record.accepted_by_position for record in found), fillvalue=0)
    return SpeculationCounts(
        sum(record.num_drafts for record in found),
        sum(record.num_draft_tokens for record in found),
        sum(record.num_accepted_tokens for record in found),
        tuple(sum(position) for position in positions),
    )


def _speed(records: Iterable[Record]) -> float:
    found = list(records)
    return sum(record.tokens for record in found) / sum(record.seconds for record in found)
