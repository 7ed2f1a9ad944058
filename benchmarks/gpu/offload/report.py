"""From measured times to tokens per second, and what of that is measured and what implied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.gpu.report import Timed
from benchmarks.gpu.shapes import PAPER_OFFLOAD

ACCEPTANCES = (0.95, 0.967, 0.98)
"""Parts of the drafted tokens that the target accepts: assumed, because random weights say nothing about them."""

MOST_DRAFTED = 63
"""Tokens that a pass verifies beside the one that is certain."""


def accepted_tokens(acceptance: float, num_drafted: int) -> float:
    """Tokens that a pass emits on average, the target's own behind the accepted ones included.

    Args:
        acceptance: Probability that a drafted token is accepted where all before it were.
        num_drafted: Tokens that are drafted.
    """
    return sum(acceptance**accepted for accepted in range(num_drafted + 1))


def summary(arms: Mapping[str, Timed], token_counts: Sequence[int]) -> dict[str, Any]:
    """Figures of all arms.

    Args:
        arms: ``copy``, ``draft``, and ``compute N`` and ``pass N`` for every number of tokens.
        token_counts: These numbers, ascending.

    Returns:
        ``measured``: times, rates and overlaps of this run. ``implied``: what a model would do whose tokens are accepted
        with certain probabilities. ``paper``: what the paper reports.
    """
    copy, draft = arms["copy"], arms["draft"]
    measured = {
        "copy_seconds": copy.median,
        "copy_spread": copy.spread,
        "streamed_gigabytes": copy.num_bytes / 1e9,
        "copy_gigabytes_per_second": copy.num_bytes / copy.median / 1e9,
        "draft_milliseconds": 1000 * draft.median,
        "draft_spread": draft.spread,
        "draft_gigabytes": draft.num_bytes / 1e9,
        "draft_gigabytes_per_second": draft.num_bytes / draft.median / 1e9,
        "passes": [pass_row(arms, count) for count in token_counts],
    }
    implied = [best_row(measured, acceptance) for acceptance in ACCEPTANCES]
    return {"measured": measured, "implied": [streaming_row(measured), *implied], "paper": asdict(PAPER_OFFLOAD)}


def pass_row(arms: Mapping[str, Timed], num_tokens: int) -> dict[str, Any]:
    """Figures of passes over a number of tokens; see the README for the columns."""
    copy, compute, streamed = arms["copy"], arms[f"compute {num_tokens}"], arms[f"pass {num_tokens}"]
    hidden = copy.median + compute.median - streamed.median
    shorter = min(copy.median, compute.median)
    # What is hidden is a small difference of long times; how far they spread says what it is worth.
    spread = sum(arm.spread * arm.median for arm in (copy, compute, streamed))
    return {
        "tokens": num_tokens,
        "compute_seconds": compute.median,
        "pass_seconds": streamed.median,
        "pass_spread": streamed.spread,
        "overlap": hidden / shorter,
        "overlap_spread": spread / shorter,
        "gigabytes_per_second": streamed.num_bytes / streamed.median / 1e9,
    }


def streaming_row(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens per second without drafts: one stream for every token."""
    first = measured["passes"][0]
    return {
        "acceptance": None,
        "drafted": 0,
        "tokens_per_pass": 1.0,
        "tokens_per_second": 1 / measured["copy_seconds"],
        "tokens_per_second_of_measured_pass": 1 / first["pass_seconds"],
        "speedup": 1.0,
    }


def best_row(measured: Mapping[str, Any], acceptance: float) -> dict[str, Any]:
    """The draft length with most tokens per second, and these.

    Args:
        measured: From `summary`.
        acceptance: Probability that a drafted token is accepted.
    """
    longest = min(MOST_DRAFTED, measured["passes"][-1]["tokens"] - 1)
    rows = [implied_row(measured, acceptance, num_drafted) for num_drafted in range(longest + 1)]
    return max(rows, key=lambda row: row["tokens_per_second"])


def implied_row(measured: Mapping[str, Any], acceptance: float, num_drafted: int) -> dict[str, Any]:
    """Tokens per second of one draft length: ``A / (n t_draft + max(T_stream, T_compute))``.

    The times of a pass are those of the next larger number of tokens that was measured. Beside it stands the same with the
    measured pass, whose first copy and last layer nothing hides.

    Args:
        measured: From `summary`.
        acceptance: Probability that a drafted token is accepted.
        num_drafted: Tokens that are drafted.
    """
    tokens = accepted_tokens(acceptance, num_drafted)
    timed = next(row for row in measured["passes"] if row["tokens"] > num_drafted)
    drafting = num_drafted * measured["draft_milliseconds"] / 1000
    rate = tokens / (drafting + max(measured["copy_seconds"], timed["compute_seconds"]))
    return {
        "acceptance": acceptance,
        "drafted": num_drafted,
        "tokens_per_pass": tokens,
        "tokens_per_second": rate,
        "tokens_per_second_of_measured_pass": tokens / (drafting + timed["pass_seconds"]),
        "speedup": rate * measured["copy_seconds"],
    }


def print_model(result: Mapping[str, Any]) -> None:
    """Prints what `measure.measure` returned."""
    measured, paper, kind = result["measured"], result["paper"], result["draft_weights"]
    layers = result["shape"]["num_layers"]
    print(
        f"\n## {result['model']}: {layers} layers, {measured['streamed_gigabytes']:.1f} GB through {result['buffers']} buffers"
    )
    print(f"{result['distinct_layers']} distinct layers lie in pinned host memory and are streamed again and again.")
    print("\nMeasured:")
    print(
        f"copies alone  {measured['copy_seconds']:.3f} s, {measured['copy_gigabytes_per_second']:.1f} GB/s,"
        f" spread {measured['copy_spread']:.1%}"
    )
    print(
        f"draft step    {measured['draft_milliseconds']:.2f} ms, {measured['draft_gigabytes']:.1f} GB,"
        f" {measured['draft_gigabytes_per_second']:.0f} GB/s, {kind['name']}"
    )
    if kind["reason"]:
        print(f"              bf16 matrices with as many bytes as int4 stand in. {kind['reason'].rstrip('.')}.")
    print(f"{'tokens':>6}{'compute, s':>12}{'pass, s':>9}{'spread':>8}{'overlap':>9}{'+-':>7}{'GB/s':>7}")
    for row in measured["passes"]:
        print(
            f"{row['tokens']:>6}{row['compute_seconds']:>12.4f}{row['pass_seconds']:>9.3f}{row['pass_spread']:>8.1%}"
            f"{row['overlap']:>9.1%}{row['overlap_spread']:>7.1%}{row['gigabytes_per_second']:>7.1f}"
        )
    print("\nImplied, if drafted tokens were accepted like this; no model has run:")
    print(f"{'accepted':>10}{'n':>4}{'A':>7}{'tokens/s':>10}{'by pass':>9}{'speed-up':>10}")
    for row in result["implied"]:
        name = "no draft" if row["acceptance"] is None else f"{row['acceptance']:.3f}"
        print(
            f"{name:>10}{row['drafted']:>4}{row['tokens_per_pass']:>7.2f}{row['tokens_per_second']:>10.3f}"
            f"{row['tokens_per_second_of_measured_pass']:>9.3f}{row['speedup']:>10.2f}"
        )
    print(
        f"The paper, measured, 70B on an L40, lossy: {paper['seconds_per_token']} s a token against"
        f" {paper['dense_seconds_per_token']}, speed-up {paper['speedup']}."
    )
