"""Prints what runs measured: `python -m benchmarks.compare FOLDER_OR_FILE... [--markdown]`.

One table per task and batch size. Runs are never mixed: a ratio stands on measurements of the same run.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.errors import exit_status
from benchmarks.results import Result
from benchmarks.summary import Row, summarise

COLUMNS = (
    "arm",
    "tokens/s (quartiles)",
    "ratio (quartiles)",
    "acc. length",
    "drafted",
    "same answers",
    "accuracy",
    "extra memory",
)
NONE = "-"


def describe_run(result: Result) -> str:
    """One line about a run: model, conditions, machine.

    Args:
        result: The run.
    """
    facts = result.provenance
    engine, sampling = facts["engine"], facts["sampling"]
    how = {"run": "engines side by side", "server": "vllm bench serve", "latency": "vllm bench latency"}[facts["kind"]]
    temperature = "greedy" if sampling["temperature"] == 0 else f"temperature {sampling['temperature']:g}"
    cores, repeats = _count(facts["cores"], "core"), _count(facts["repeats"], "repeat")
    return (
        f"{facts['model']}, {engine['dtype']}, {temperature}, at most {sampling['max_tokens']} tokens an answer, "
        f"{repeats}, {how}; {cores} of {facts['cpu']}, {facts['vllm']}, "
        f"vllm-sirius {facts['commit'] or facts['vllm_sirius']}, {facts['date'][:10]}"
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def cells(row: Row, arm: dict[str, Any]) -> list[str]:
    """The columns of a row as text.

    Args:
        row: The row.
        arm: What the run says about its arm.

    Returns:
        One text per column of `COLUMNS`.
    """
    drafts = row.counts.num_drafts > 0
    size = arm.get("kernel_size")
    length = f"{row.counts.acceptance_length:.2f}" + (f"/{size}" if size else "")
    same = NONE if row.identical_share is None else f"{row.num_identical}/{row.num_compared}"
    right = NONE if row.accuracy is None else f"{row.accuracy:.0%} ({row.num_correct}/{row.num_scored})"
    extra = arm.get("extra_memory_bytes")
    return [
        row.arm,
        f"{row.speed[1]:.1f} ({row.speed[0]:.1f}-{row.speed[2]:.1f})",
        f"{row.ratio[1]:.2f}x ({row.ratio[0]:.2f}-{row.ratio[2]:.2f})",
        length if drafts else NONE,
        f"{row.mean_drafted:.1f}" if drafts else NONE,
        same,
        right,
        f"{extra / (1 << 20):.0f} MiB" if extra else NONE,
    ]


def table(lines: Sequence[Sequence[str]], markdown: bool) -> str:
    """Lays out a table.

    Args:
        lines: Columns of each line, the heading first.
        markdown: Whether to write Markdown; otherwise columns are filled with blanks.

    Returns:
        The table.
    """
    if markdown:
        marks = ["---", *["---:"] * (len(lines[0]) - 1)]
        return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], marks, *lines[1:]])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    texts = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def report(result: Result, markdown: bool) -> str:
    """Everything that is printed about a run.

    Args:
        result: The run.
        markdown: Whether to write Markdown.

    Returns:
        The text.
    """
    parts = [describe_run(result)]
    for (task, batch), group in groupby(summarise(result), key=lambda row: (row.task, row.batch)):
        rows = list(group)
        title = f"{task}, batch {batch}, ratio to {rows[0].best_alone}"
        lines = [list(COLUMNS), *(cells(row, result.arms[row.arm]) for row in rows)]
        parts.append((f"**{title}**\n\n" if markdown else f"{title}\n") + table(lines, markdown))
    missing = [f"{name}: {arm['status']}" for name, arm in result.arms.items() if arm["status"] != results.MEASURED]
    return "\n\n".join([*parts, *missing])


def run(given: argparse.Namespace) -> int:
    """Carries out a parsed command.

    Args:
        given: The command line.

    Returns:
        Exit status 0.

    Raises:
        BenchmarkError: If a file is not a run's.
    """
    found = [results.read(path) for path in given.paths]
    print("\n\n\n".join(report(result, given.markdown) for result in found))
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line.

    Args:
        arguments: Arguments without the program's name; None takes those of the process.

    Returns:
        The parsed arguments.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.compare", description="Prints what runs measured.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="FOLDER_OR_FILE", help="a run's folder or results.json")
    parser.add_argument("--markdown", action="store_true", help="write Markdown")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables.

    Args:
        arguments: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit status: 0, or 1 after a failure.
    """
    return exit_status(functools.partial(run, parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
