"""The table of a run on a throttled disk: `python -m benchmarks.offload.report FOLDER [--markdown]`."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.compare import table
from benchmarks.errors import BenchmarkError, exit_status
from benchmarks.offload.arms import LLAMA_DRAFT, OFF, OURS
from benchmarks.results import Record, Result
from benchmarks.summary import quartiles

GB = 1e9
NONE = "-"
COLUMNS = (
    "arm",
    "tokens/s",
    "ratio",
    "tokens/pass",
    "GB/token",
    "GB/s read",
    "bound GB",
    "peak GB",
    "without cache",
    "same answers",
)


@dataclass(frozen=True)
class Line:
    """One arm at one rate.

    Attributes:
        arm: The arm.
        speed: Tokens per second: quartiles over repeats.
        ratio: Median speed over that of the same engine without drafts; ``None`` where nothing can be compared.
        tokens_per_pass: Mean tokens of a verification pass; ``None`` without drafts.
        read_per_token: Bytes read from the disk for a token; ``None`` where nobody counted.
        read_rate: Bytes read from the disk per second.
        same: Answers that agree with those without drafts as far as both go.
        compared: Answers that were compared.
        state: What the kernel said of the cage.
    """

    arm: str
    speed: tuple[float, float, float]
    ratio: float | None
    tokens_per_pass: float | None
    read_per_token: float | None
    read_rate: float | None
    same: int
    compared: int
    state: dict[str, Any]


def lines(result: Result, rate: float) -> list[Line]:
    """Sums up a rate.

    Args:
        result: The run.
        rate: In GB/s.

    Returns:
        A line for each arm that answered, in the order of the run.
    """
    here = [record for record in result.records if record.details["gb_per_second"] == rate]
    reference = [record for record in here if record.arm == OFF]
    base = _speed(reference)[1] if reference else None
    if result.provenance.get("random_weights"):
        base = None
    found = []
    for arm, facts in result.arms.items():
        records = [record for record in here if record.arm == arm]
        if records:
            found.append(_line(arm, records, reference, base, facts["rates"][f"{rate:g}"]))
    return found


def _line(
    arm: str, records: Sequence[Record], reference: Sequence[Record], base: float | None, state: dict[str, Any]
) -> Line:
    speed = _speed(records)
    drafts, accepted = (sum(getattr(r, name) for r in records) for name in ("num_drafts", "num_accepted_tokens"))
    counted = [record.details["read_bytes"] for record in records if record.details.get("read_bytes") is not None]
    read = sum(counted) if len(counted) == len(records) else None
    answers = {(r.task, *r.prompts): r.token_ids[0] for r in reference}
    pairs = [(r.token_ids[0], answers[key]) for r in records if (key := (r.task, *r.prompts)) in answers]
    return Line(
        arm=arm,
        speed=speed,
        ratio=speed[1] / base if base else None,
        tokens_per_pass=1 + accepted / drafts if drafts else None,
        read_per_token=None if read is None else read / sum(r.tokens for r in records),
        read_rate=None if read is None else read / sum(r.seconds for r in records),
        same=sum(agree(one, other) for one, other in pairs),
        compared=len(pairs),
        state=state,
    )


def _speed(records: Iterable[Record]) -> tuple[float, float, float]:
    """Tokens over seconds of each repeat, all tasks together."""
    sums: dict[int, list[float]] = {}
    for record in records:
        each = sums.setdefault(record.repeat, [0.0, 0.0])
        each[0] += record.tokens
        each[1] += record.seconds
    return quartiles([tokens / seconds for tokens, seconds in sums.values()])


def agree(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two answers have the same tokens as far as both go, which they must for the shorter bound of slow arms."""
    length = min(len(one), len(other))
    return list(one[:length]) == list(other[:length])


def formula(result: Result, rate: float) -> tuple[float, float] | None:
    """Tokens per second of Sirius by the speed model, and as measured.

    The model: what a pass reads takes as long as plain reads do, and each draft token as long as a draft step of one token.

    Args:
        result: The run.
        rate: In GB/s.

    Returns:
        Both, over all answers; ``None`` where something was not measured.
    """
    records = [r for r in result.records if r.arm == OURS and r.details["gb_per_second"] == rate]
    state = result.arms[OURS]["rates"].get(f"{rate:g}", {}) if OURS in result.arms else {}
    disk, step = result.provenance["disk_bytes_per_second"].get(f"{rate:g}"), state.get("draft_seconds")
    read = [r.details["read_bytes"] for r in records if r.details.get("read_bytes") is not None]
    if not records or not disk or not step or len(read) < len(records):
        return None
    tokens = sum(r.tokens for r in records)
    predicted = sum(read) / disk + step * sum(r.num_draft_tokens for r in records)
    return tokens / predicted, tokens / sum(r.seconds for r in records)


def best_draft(found: Sequence[Line]) -> str:
    """The fastest of the arms that are llama.cpp with a draft; empty where there is none."""
    drafts = [line for line in found if line.arm.startswith(f"{LLAMA_DRAFT}@")]
    return max(drafts, key=lambda line: line.speed[1]).arm if drafts else ""


def cells(line: Line, best: str) -> list[str]:
    """The columns as text.

    Args:
        line: The line.
        best: Arm that is marked as the best of its kind.
    """
    state = line.state

    def number(value: float | None, unit: float = 1.0, digits: int = 2) -> str:
        return NONE if value is None else f"{value / unit:.{digits}f}"

    low, median, high = line.speed
    return [
        line.arm + (" (best)" if line.arm == best else ""),
        f"{median:.3g} ({low:.3g}-{high:.3g})",
        NONE if line.ratio is None else f"{line.ratio:.2f}x",
        number(line.tokens_per_pass),
        number(line.read_per_token, GB, 3),
        number(line.read_rate, GB),
        number(state.get("memory_bytes"), GB),
        number(state.get("peak_bytes"), GB),
        number(state.get("peak_anonymous_bytes"), GB),
        f"{line.same}/{line.compared}" if line.compared and line.arm != OFF else NONE,
    ]


def report(result: Result, markdown: bool = False) -> str:
    """Everything that is printed about a run.

    Args:
        result: The run.
        markdown: Whether to write Markdown.
    """
    facts = result.provenance
    parts = [_heading(result)]
    if facts.get("random_weights"):
        parts.append("Random weights: memory and rate mean something, what drafts gain does not, and is left out.")
    for rate in facts["rates"]:
        found = lines(result, rate)
        best = best_draft(found)
        title = f"{rate:g} GB/s" if rate else "no bound of the rate"
        measured = facts["disk_bytes_per_second"].get(f"{rate:g}")
        if measured:
            title += f" (plain reads there: {measured / GB:.2f})"
        text = table([list(COLUMNS), *(cells(line, best) for line in found)], markdown)
        parts.append((f"**{title}**\n\n" if markdown else f"{title}\n") + text)
        parts += _others(result, rate)
        speeds = formula(result, rate)
        if speeds:
            parts.append(
                f"{OURS} by the speed model (bytes read / plain reads + draft tokens x draft step): {speeds[0]:.3g} tokens/s, "
                f"measured {speeds[1]:.3g}"
            )
    if any(arm == OURS for arm in result.arms):
        parts.append(f"ratio: to {OFF}, the same engine without drafts; GB are 10**9 bytes")
    return "\n\n".join(parts)


def _heading(result: Result) -> str:
    facts = result.provenance
    cage, sampling = facts["cage"], facts["sampling"]
    bound = f"{cage['memory_bytes'] / GB:.2f} GB of memory for vLLM" if cage["memory_bytes"] else "memory not bounded"
    return (
        f"{facts['model']}, bf16, greedy, batch 1, at most {sampling['max_tokens']} tokens an answer "
        f"({sampling['slow_max_tokens']} without drafts), {facts['repeats']} repeats; {bound}, of it "
        f"{cage['weight_bytes'] / GB:.2f} for weights ({cage['bound']}); disk: {cage['throttle']}; "
        f"{facts['cores']} cores of {facts['cpu']}, {facts['vllm']}, vllm-sirius {facts['commit']}, {facts['date'][:10]}"
    )


def _others(result: Result, rate: float) -> list[str]:
    states = {name: arm["rates"].get(f"{rate:g}", {}).get("status", arm["status"]) for name, arm in result.arms.items()}
    found = [f"{name}: {status}" for name, status in states.items() if status != results.MEASURED]
    return ["\n".join(found)] if found else []


def run(given: argparse.Namespace) -> int:
    """Carries out a parsed command.

    Args:
        given: The command line.

    Returns:
        Exit status 0.

    Raises:
        BenchmarkError: If a file is not that of such a run.
    """
    result = results.read(given.path)
    if result.provenance.get("kind") != "offload":
        raise BenchmarkError(f"{given.path}: not a run on a throttled disk; `make bench-compare` reads it")
    print(report(result, given.markdown))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table.

    Args:
        arguments: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit status: 0, or 1 after a failure.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.offload.report", description="Prints a run on a throttled disk.")
    parser.add_argument("path", type=Path, metavar="FOLDER_OR_FILE")
    parser.add_argument("--markdown", action="store_true", help="write Markdown")
    return exit_status(functools.partial(run, parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
