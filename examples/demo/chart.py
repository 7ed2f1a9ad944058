"""The demo's chart: speed against vLLM alone, and the acceptance length beneath."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import Row

ALONE_COLOUR = "#8a8f98"
SIRIUS_COLOURS = ("#2a6fbb", "#1d8a99", "#c8642b")
INK = "#2b2f36"


def draw(rows: Sequence[Row], kernel_size: int, subtitle: str, path: Path) -> None:
    """Draws the chart.

    Args:
        rows: The arms, vLLM alone first.
        kernel_size: Most tokens per verification pass.
        subtitle: Conditions, one line.
        path: PNG file to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=(3, 2), layout="constrained")
    colours = [ALONE_COLOUR, *SIRIUS_COLOURS][: len(rows)]
    _draw_ratios(upper, rows, colours)
    _draw_lengths(lower, rows, colours, kernel_size)
    lower.set_xticks(range(len(rows)), [row.title.replace(", ", "\n") for row in rows], fontsize=11)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", length=0)
        axes.margins(x=0.06)
    figure.suptitle(f"Decoding speed of Sirius against vLLM alone\n{subtitle}", fontsize=11, color=INK)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_ratios(axes: Any, rows: Sequence[Row], colours: Sequence[str]) -> None:
    """Bars: ratio over all prompts; dots: single prompts; line: quartiles."""
    axes.bar(range(len(rows)), [row.ratio for row in rows], color=colours, width=0.55, zorder=2)
    axes.axhline(1.0, color=INK, linewidth=1, linestyle="--", zorder=3)
    top = max(max(row.ratio, *row.prompt_ratios) for row in rows) * 1.22
    axes.set_ylim(0, max(top, 1.25))
    for x, row in enumerate(rows):
        peak = row.ratio
        if row.mean_drafted > 0:
            first, median, third = row.ratio_quartiles
            spread = [x + 0.19 + 0.05 * (i % 3 - 1) for i in range(len(row.prompt_ratios))]
            axes.scatter(spread, row.prompt_ratios, s=16, color=INK, alpha=0.6, linewidths=0, zorder=4)
            axes.errorbar(
                x, median, [[median - first], [third - median]], color=INK, fmt="_", capsize=5, markersize=12, zorder=5
            )
            peak = max(peak, *row.prompt_ratios)
        label = f"{row.ratio:.2f}x\n{row.tokens_per_second:.1f} tokens/s"
        axes.annotate(label, (x, peak), (0, 6), textcoords="offset points", ha="center", fontsize=10, color=INK)
    axes.set_ylabel("speed / speed of vLLM alone")
    axes.set_title(
        "Bars: all tokens over all seconds. Dots: single prompts, with median and quartiles.",
        fontsize=9,
        color=INK,
        loc="left",
    )


def _draw_lengths(axes: Any, rows: Sequence[Row], colours: Sequence[str], kernel_size: int) -> None:
    lengths = [row.acceptance_length for row in rows]
    axes.bar(range(len(rows)), lengths, color=colours, width=0.55, zorder=2)
    axes.axhline(kernel_size, color=INK, linewidth=1, linestyle=":", zorder=1)
    axes.annotate(
        f"kernel size {kernel_size}",
        (1.0, kernel_size),
        (-4, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=INK,
    )
    axes.set_ylim(0, kernel_size * 1.2)
    axes.set_ylabel("acceptance length\n(tokens per verification pass)")
    for x, row in enumerate(rows):
        label = "1 (no drafts)"
        if row.mean_drafted > 0:
            label = f"{row.acceptance_length:.1f} of {kernel_size}\n{row.identical_share:.0%} same\nanswers"
        inside = row.acceptance_length > kernel_size * 0.4
        axes.annotate(
            label,
            (x, row.acceptance_length),
            (0, -5 if inside else 5),
            textcoords="offset points",
            ha="center",
            va="top" if inside else "bottom",
            fontsize=10,
            color="white" if inside else INK,
            zorder=4,
        )
