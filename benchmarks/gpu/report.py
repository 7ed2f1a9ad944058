"""Turns times into the figures that matter, and prints them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from benchmarks.gpu.shapes import PAPER_RESULTS, Shape

BAR = 1.1
"""What a coarse draft step may cost, in units of its share of the dense step's bytes."""


class Timed(Protocol):
    """What is read of an arm."""

    name: str
    num_bytes: int

    @property
    def median(self) -> float:
        """Seconds of one call."""

    @property
    def spread(self) -> float:
        """Distance of the quartiles, as part of the median."""


def speedup(acceptance_length: float, kernel_size: int, draft_cost: float, verify_cost: float) -> float:
    """Tokens per second over those of dense decoding.

    Args:
        acceptance_length: Tokens that one correction emits.
        kernel_size: Tokens that it verifies.
        draft_cost: A draft step over a dense step.
        verify_cost: Verification over a dense step.
    """
    return acceptance_length / ((kernel_size - 1) * draft_cost + verify_cost)


def full_seconds(measured: float, empty: float, num_layers: int, all_layers: int) -> float:
    """Seconds of a step of the whole model, from a stack with fewer layers and one with none.

    Args:
        measured: Seconds with `num_layers` layers.
        empty: Seconds without layers.
        num_layers: Layers that were measured.
        all_layers: Layers of the model.
    """
    return empty + (measured - empty) * all_layers / num_layers


def step_rows(
    steps: Mapping[str, Timed], empty: Mapping[str, Timed], shape: Shape, num_layers: int, bandwidth: float
) -> list[dict[str, Any]]:
    """Figures of every kind of step.

    Args:
        steps: Steps of the stack, by name, with ``dense`` among them.
        empty: The same of a stack without layers.
        shape: Sizes of the whole model.
        num_layers: Layers of the stack.
        bandwidth: Bytes per second of a copy.

    Returns:
        One row per step; see the README for the columns.
    """
    rows = []
    whole = {}
    for name, arm in steps.items():
        if num_layers == shape.num_layers:
            whole[name] = (arm.median, float(arm.num_bytes))
        else:
            bare = empty[name]
            sizes = (num_layers, shape.num_layers)
            whole[name] = (
                full_seconds(arm.median, bare.median, *sizes),
                full_seconds(arm.num_bytes, bare.num_bytes, *sizes),
            )
    dense_seconds, dense_bytes = whole["dense"]
    for name, arm in steps.items():
        seconds, num_bytes = whole[name]
        cost, share = seconds / dense_seconds, num_bytes / dense_bytes
        rows.append(
            {
                "step": name,
                "milliseconds": 1000 * seconds,
                "spread": arm.spread,
                "cost": cost,
                "gigabytes": num_bytes / 1e9,
                "gigabytes_per_second": num_bytes / seconds / 1e9,
                "part_of_copy_bandwidth": num_bytes / seconds / bandwidth,
                "byte_share": share,
                "cost_over_byte_share": cost / share,
            }
        )
    return rows


def speedup_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The speed-up that measured costs imply at the paper's acceptance lengths.

    Args:
        rows: From `step_rows`.

    Returns:
        One row per draft and setting of the paper whose number of tokens was verified.
    """
    costs = {row["step"]: row["cost"] for row in rows}
    drafts = [name for name in costs if name.startswith(("coarse", "fine"))]
    return [
        {
            "draft": draft,
            "kernel_size": paper.kernel_size,
            "acceptance_length": paper.acceptance_length,
            "c": costs[draft],
            "v": costs[f"verify {paper.kernel_size}"],
            "implied_speedup": speedup(
                paper.acceptance_length, paper.kernel_size, costs[draft], costs[f"verify {paper.kernel_size}"]
            ),
            "paper": paper.speedups,
        }
        for paper in PAPER_RESULTS
        if f"verify {paper.kernel_size}" in costs
        for draft in drafts
    ]


def ffn_rows(arms: Sequence[Timed], num_layers: int, num_tokens: int, bandwidth: float) -> list[dict[str, Any]]:
    """Figures of FFNs alone, per layer.

    Args:
        arms: From `measure.time_ffns`, ``dense`` first.
        num_layers: Layers that each arm ran.
        num_tokens: Batch.
        bandwidth: Bytes per second of a copy.
    """
    return [
        {
            "ffn": arm.name,
            "tokens": num_tokens,
            "microseconds": 1e6 * arm.median / num_layers,
            "spread": arm.spread,
            "cost": arm.median / arms[0].median,
            "byte_share": arm.num_bytes / arms[0].num_bytes,
            "part_of_copy_bandwidth": arm.num_bytes / arm.median / bandwidth,
        }
        for arm in arms
    ]


def print_model(result: Mapping[str, Any]) -> None:
    """Prints the tables of one model."""
    print(
        f"\n## {result['model']}: {result['layers']} of {result['all_layers']} layers, {result['length']} tokens of cache"
    )
    print(
        f"{'step':<12}{'ms':>8}{'spread':>8}{'cost':>7}{'GB':>7}{'GB/s':>7}{'of copy':>9}{'bytes':>7}{'cost/bytes':>12}"
    )
    for row in result["steps"]:
        mark = ""
        if row["step"].startswith("coarse"):
            mark = "  ok" if row["cost_over_byte_share"] <= BAR else f"  above {BAR}"
        print(
            f"{row['step']:<12}{row['milliseconds']:>8.3f}{row['spread']:>8.1%}{row['cost']:>7.3f}{row['gigabytes']:>7.2f}"
            f"{row['gigabytes_per_second']:>7.0f}{row['part_of_copy_bandwidth']:>9.1%}{row['byte_share']:>7.3f}"
            f"{row['cost_over_byte_share']:>12.3f}{mark}"
        )
    print(f"\n{'draft':<12}{'K':>4}{'A':>7}{'c':>7}{'v':>7}{'speed-up':>10}  the paper's own")
    for row in result["speedups"]:
        paper = ", ".join(f"{value:.2f} on {gpu}" for gpu, value in row["paper"].items())
        print(
            f"{row['draft']:<12}{row['kernel_size']:>4}{row['acceptance_length']:>7.2f}{row['c']:>7.3f}{row['v']:>7.3f}"
            f"{row['implied_speedup']:>10.2f}  {paper}"
        )
    print(f"\n{'FFN alone':<22}{'tokens':>7}{'us/layer':>10}{'spread':>8}{'cost':>7}{'bytes':>7}{'of copy':>9}")
    for row in result["ffns"]:
        print(
            f"{row['ffn']:<22}{row['tokens']:>7}{row['microseconds']:>10.1f}{row['spread']:>8.1%}{row['cost']:>7.3f}"
            f"{row['byte_share']:>7.3f}{row['part_of_copy_bandwidth']:>9.1%}"
        )
