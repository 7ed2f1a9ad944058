"""What the demo measured: the numbers of each arm, their table, and where they come from."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_sirius.measuring.engine import Answers
from vllm_sirius.metrics import SpeculationCounts, effective_density


@dataclass
class Arm:
    """One way of serving the model.

    Attributes:
        key: Short name for options and files.
        title: Name in table and chart.
        options: Its ``speculative_config``; empty for vLLM alone.
        draft_density: Part of the weights a draft step reads; 1 for vLLM alone.
        start_up_line: What Sirius said when its engine started.
        answers: One per prompt.
    """

    key: str
    title: str
    options: dict[str, Any]
    draft_density: float
    start_up_line: str = ""
    answers: list[Answers] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(answer.num_tokens for answer in self.answers)

    @property
    def seconds(self) -> float:
        """Wall time of all answers."""
        return sum(answer.seconds for answer in self.answers)

    @property
    def speed(self) -> float:
        """Tokens per second over all answers."""
        return self.num_tokens / self.seconds

    @property
    def counts(self) -> SpeculationCounts:
        """VLLM's counters of speculative decoding over all answers."""
        return SpeculationCounts(
            sum(answer.num_drafts for answer in self.answers),
            sum(answer.num_draft_tokens for answer in self.answers),
            sum(answer.num_accepted_tokens for answer in self.answers),
        )


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        key: The arm.
        title: Its name.
        tokens_per_second: All tokens over all seconds.
        ratio: Speed over that of vLLM alone.
        ratio_quartiles: Quartiles of the ratio over prompts: first, median, third.
        prompt_ratios: The ratio of each prompt.
        acceptance_length: Mean tokens per verification pass.
        mean_drafted: Mean draft tokens per verification pass.
        draft_density: Part of the weights a draft step reads.
        effective_density: Weights read per token against vLLM alone.
        num_identical: Answers with the same tokens as vLLM alone.
        num_answers: Answers.
    """

    key: str
    title: str
    tokens_per_second: float
    ratio: float
    ratio_quartiles: tuple[float, float, float]
    prompt_ratios: tuple[float, ...]
    acceptance_length: float
    mean_drafted: float
    draft_density: float
    effective_density: float
    num_identical: int
    num_answers: int

    @property
    def identical_share(self) -> float:
        """Share of the answers that are the same as those of vLLM alone."""
        return self.num_identical / self.num_answers


def compare(arm: Arm, alone: Arm) -> Row:
    """Judges an arm against vLLM alone.

    Args:
        arm: The arm, with as many answers as `alone`.
        alone: vLLM alone.

    Returns:
        Its line of the table.
    """
    ratios = tuple(prompt_ratio(one, other) for one, other in zip(arm.answers, alone.answers, strict=True))
    counts = arm.counts
    drafted = counts.num_draft_tokens / counts.num_drafts if counts.num_drafts else 0.0
    pairs = zip(arm.answers, alone.answers, strict=True)
    return Row(
        key=arm.key,
        title=arm.title,
        tokens_per_second=arm.speed,
        ratio=arm.speed / alone.speed,
        ratio_quartiles=quartiles(ratios),
        prompt_ratios=ratios,
        acceptance_length=counts.acceptance_length,
        mean_drafted=drafted,
        draft_density=arm.draft_density,
        effective_density=effective_density(arm.draft_density, drafted, counts.acceptance_length),
        num_identical=sum(one.token_ids == other.token_ids for one, other in pairs),
        num_answers=len(arm.answers),
    )


def prompt_ratio(one: Answers, other: Answers) -> float:
    """Speed of one answer over that of another, each by its own number of tokens."""
    return (one.num_tokens / one.seconds) / (other.num_tokens / other.seconds)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile; a single value stands for all three."""
    if len(values) < 2:
        return (values[0],) * 3
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def format_table(rows: Sequence[Row], kernel_size: int) -> str:
    """The table as text.

    Args:
        rows: The arms.
        kernel_size: Most tokens per verification pass.

    Returns:
        Lines for a terminal of 110 columns.
    """
    header = f"{'':28}{'tokens/s':>9}{'ratio':>8}{'median (quartiles)':>21}"
    header += f"{'acc. length':>14}{'eff. density':>14}{'same answers':>15}"
    lines = [header, "-" * len(header)]
    for row in rows:
        first, median, third = row.ratio_quartiles
        drafts = row.mean_drafted > 0
        spread = f"{median:.2f} ({first:.2f}-{third:.2f})" if drafts else "-"
        length = f"{row.acceptance_length:.2f}/{kernel_size}" if drafts else "-"
        same = f"{row.num_identical}/{row.num_answers} ({row.identical_share:.0%})" if drafts else "-"
        lines.append(
            f"{row.title:28}{row.tokens_per_second:>9.1f}{row.ratio:>7.2f}x{spread:>21}{length:>14}"
            f"{row.effective_density:>14.2f}{same:>15}"
        )
    return "\n".join(lines)


def as_json(arms: Sequence[Arm], rows: Sequence[Row], provenance: dict[str, Any]) -> dict[str, Any]:
    """Everything the demo knows, for a file.

    Args:
        arms: The arms.
        rows: Their lines of the table.
        provenance: Where the numbers come from.

    Returns:
        JSON values.
    """
    reports = []
    for arm, row in zip(arms, rows, strict=True):
        answers = [
            {"tokens": answer.num_tokens, **{k: v for k, v in asdict(answer).items() if k != "token_ids"}}
            for answer in arm.answers
        ]
        report = {**asdict(row), "speculative_config": arm.options, "start_up_line": arm.start_up_line}
        reports.append({**report, "answers": answers})
    return {"provenance": provenance, "arms": reports}
