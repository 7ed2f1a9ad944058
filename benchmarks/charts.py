"""The charts of a run. `palette` gives an arm the same colour in all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import Result
from benchmarks.summary import Row

ALONE_COLOURS = ("#8a8f98", "#5b616b")
COLOURS = ("#2a6fbb", "#c8642b", "#1d8a99", "#8e4b9e", "#5a8f3c", "#b8912a", "#c0436b", "#3d4fa1", "#7a5a44", "#2f9e77")
MARKERS = "osD^vPX<>"
"""Not as many as colours, so that arms which share a colour differ in their markers."""

SMALLEST_WIDTH = 8.6
"""Inches that the title needs."""

INK = "#2b2f36"
GRID = "#d9dce1"
ROOFLINE_SPEEDS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Tokens per second of the guide lines in the roofline chart."""


@dataclass(frozen=True)
class Point:
    """One arm in the roofline chart.

    Attributes:
        arm: The arm.
        task: The data set.
        gigabytes: Weights read per emitted token, GB.
        bandwidth: Achieved GB per second.
    """

    arm: str
    task: str
    gigabytes: float
    bandwidth: float


def palette(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Colours of the arms.

    Args:
        arms: The arms of a run, in its order.

    Returns:
        Greys for vLLM alone, a colour for each other arm; they begin again where there are more arms than colours.
    """
    alone = [name for name, arm in arms.items() if not arm["speculative_config"]]
    others = [name for name in arms if name not in alone]
    colours = {name: ALONE_COLOURS[i % len(ALONE_COLOURS)] for i, name in enumerate(alone)}
    return colours | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}


def roofline_points(result: Result, rows: Sequence[Row]) -> list[Point]:
    """Bytes of a token and bandwidth of each arm, for rows of batch 1.

    Args:
        result: The run.
        rows: Its rows.

    Returns:
        One point per row whose draft is known: passes of the target read all weights of a step, draft steps their part.
    """
    points = []
    for row in rows:
        arm = result.arms[row.arm]
        counted = row.counts.num_drafts > 0 or not arm["speculative_config"]
        density = arm["draft_density"]
        if not counted or density is None:
            continue
        steps = row.passes_per_token + row.drafted_per_token * density
        gigabytes = steps * result.provenance["step_bytes"] / 1e9
        points.append(Point(row.arm, row.task, gigabytes, gigabytes * row.speed[1]))
    return points


def speed_up(rows: Sequence[Row], colours: Mapping[str, str], subtitle: str, path: Path) -> None:
    """Bars of each arm's ratio to vLLM alone at its best, with the quartiles and each repeat.

    Args:
        rows: Rows of one batch size.
        colours: From `palette`.
        subtitle: Conditions.
        path: PNG file to write.
    """
    arms = list(dict.fromkeys(row.arm for row in rows))
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure, panels = _panels(len(tasks), width=5.2, height=1.7 + 0.48 * len(arms))
    for axes, task in zip(panels, tasks, strict=True):
        found = {row.arm: row for row in rows if row.task == task}
        for place, arm in enumerate(arms):
            if arm in found:
                _draw_ratio(axes, place, found[arm], colours[arm])
        axes.axvline(1.0, color=INK, linewidth=1, linestyle="--", zorder=3)
        # Room at the right for the figures.
        axes.set_xlim(0, max(1.25, *(max(row.ratios) for row in found.values())) * 1.42)
        best = next(iter(found.values())).best_alone
        axes.set_title(f"{task}, batch {rows[0].batch}", fontsize=11, color=INK, loc="left")
        axes.set_xlabel(f"speed / speed of {best}", color=INK)
        axes.grid(axis="x", color=GRID, linewidth=0.6, zorder=0)
    panels[0].set_yticks(range(len(arms)), arms, fontsize=10)
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    note = "Bars: median of the repeats. Line: quartiles. Dots: repeats."
    _finish(figure, f"Decoding speed against vLLM alone\n{subtitle}\n{note}", path)


def _draw_ratio(axes: Any, place: int, row: Row, colour: str) -> None:
    first, median, third = row.ratio
    axes.barh(place, median, color=colour, height=0.62, zorder=2)
    axes.errorbar(median, place, xerr=[[median - first], [third - median]], color=INK, capsize=4, zorder=5)
    offsets = [place + 0.08 * (i % 3 - 1) for i in range(len(row.ratios))]
    axes.scatter(row.ratios, offsets, s=12, color=INK, alpha=0.6, linewidths=0, zorder=4)
    end = max(median, *row.ratios)
    axes.annotate(
        f"{median:.2f}x, {row.speed[1]:.1f} tokens/s",
        (end, place),
        (7, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=INK,
        # The line of vLLM alone must not strike out the figures.
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        zorder=6,
    )


def acceptance(rows: Sequence[Row], colours: Mapping[str, str], subtitle: str, path: Path) -> None:
    """Lines of the share of drafts whose token at each position was accepted.

    Args:
        rows: Rows of one batch size.
        colours: From `palette`.
        subtitle: Conditions.
        path: PNG file to write.
    """
    drafted = [row for row in rows if row.counts.num_drafts and row.counts.accepted_by_position]
    tasks = list(dict.fromkeys(row.task for row in drafted))
    marks = _markers(colours)
    # The legends stand beneath, in two columns.
    height = 4.2 + 0.12 * len({row.arm for row in drafted})
    figure, panels = _panels(len(tasks), width=5.2, height=height)
    for axes, task in zip(panels, tasks, strict=True):
        for row in (row for row in drafted if row.task == task):
            shares = [count / row.counts.num_drafts for count in row.counts.accepted_by_position]
            label = f"{row.arm} ({row.counts.acceptance_length:.1f})"
            style = {"marker": marks[row.arm], "markersize": 4.5, "linewidth": 1.6}
            axes.plot(range(1, len(shares) + 1), shares, color=colours[row.arm], label=label, **style)
        axes.set_xlim(left=0.5)
        axes.set_ylim(0, 1.03)
        axes.set_title(f"{task}, batch {rows[0].batch}", fontsize=11, color=INK, loc="left")
        axes.set_xlabel("position in the draft", color=INK)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color=GRID, linewidth=0.6)
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": 2}
        axes.legend(fontsize=8.5, frameon=False, title="arm (acceptance length)", title_fontsize=8.5, **place)
    panels[0].set_ylabel("share of drafts accepted so far", color=INK)
    note = "A draft that ends before a position counts as not accepted there."
    _finish(figure, f"Acceptance by position\n{subtitle}\n{note}", path)


def batch_sizes(rows: Sequence[Row], colours: Mapping[str, str], subtitle: str, path: Path) -> None:
    """Lines of each arm's ratio against the batch size, with quartiles.

    Args:
        rows: Rows of all batch sizes.
        colours: From `palette`.
        subtitle: Conditions.
        path: PNG file to write.
    """
    tasks = list(dict.fromkeys(row.task for row in rows))
    sizes = sorted({row.batch for row in rows})
    top = 1.08 * max(1.0, *(row.ratio[2] for row in rows))
    marks = _markers(colours)
    figure, panels = _panels(len(tasks), width=5.2, height=4.6)
    for axes, task in zip(panels, tasks, strict=True):
        for arm in dict.fromkeys(row.arm for row in rows if row.task == task):
            found = [row for row in rows if (row.task, row.arm) == (task, arm)]
            medians = [row.ratio[1] for row in found]
            below = [row.ratio[1] - row.ratio[0] for row in found]
            above = [row.ratio[2] - row.ratio[1] for row in found]
            style = {"marker": marks[arm], "markersize": 5, "linewidth": 1.6, "capsize": 3}
            places = [row.batch for row in found]
            axes.errorbar(places, medians, [below, above], color=colours[arm], label=arm, **style)
        axes.axhline(1.0, color=INK, linewidth=1, linestyle="--", zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_ylim(0, top)
        axes.set_title(task, fontsize=11, color=INK, loc="left")
        axes.set_xlabel("batch size", color=INK)
        axes.grid(color=GRID, linewidth=0.6)
    panels[0].set_ylabel("speed / speed of vLLM alone at its best", color=INK)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=9, frameon=False, loc="outside right center")
    _finish(figure, f"Decoding speed against batch size\n{subtitle}\nMedians and quartiles of the repeats.", path)


def roofline(
    points: Sequence[Point], colours: Mapping[str, str], peak: float | None, subtitle: str, path: Path
) -> None:
    """Bytes of a token against achieved bandwidth; lines of equal speed run from left below to right above.

    Args:
        points: From `roofline_points`.
        colours: From `palette`.
        peak: Memory bandwidth of the machine, GB per second; ``None`` where it is not known.
        subtitle: Conditions.
        path: PNG file to write.
    """
    tasks = list(dict.fromkeys(point.task for point in points))
    right = max(point.gigabytes for point in points) * 1.25
    top = max(*(point.bandwidth for point in points), peak or 0) * 1.25
    marks = _markers(colours)
    figure, panels = _panels(len(tasks), width=5.2, height=4.8)
    for axes, task in zip(panels, tasks, strict=True):
        axes.set_xlim(0, right)
        axes.set_ylim(0, top)
        _draw_speed_lines(axes, right, top)
        for point in (point for point in points if point.task == task):
            style = {"marker": marks[point.arm], "s": 52, "zorder": 4}
            axes.scatter(point.gigabytes, point.bandwidth, color=colours[point.arm], label=point.arm, **style)
        if peak:
            axes.axhline(peak, color=INK, linewidth=1.2, zorder=3)
            axes.annotate(
                f"memory: {peak:g} GB/s", (0, peak), (4, 4), textcoords="offset points", fontsize=8.5, color=INK
            )
        axes.set_title(f"{task}, batch 1", fontsize=11, color=INK, loc="left")
        axes.set_xlabel("GB of weights read per token", color=INK)
    panels[0].set_ylabel("achieved GB/s", color=INK)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=9, frameon=False, loc="outside right center")
    note = "Grey lines: equal speed in tokens/s. To the left: fewer bytes. Upwards: better use of the memory."
    _finish(figure, f"Bytes of a token and bandwidth\n{subtitle}\n{note}", path)


def _draw_speed_lines(axes: Any, right: float, top: float) -> None:
    """Straight lines through zero: bandwidth is bytes of a token times tokens per second."""
    for speed in ROOFLINE_SPEEDS:
        if not 0.12 * top / right < speed < 12 * top / right:
            continue
        x = min(right, top / speed)
        axes.plot([0, x], [0, x * speed], color=GRID, linewidth=1, zorder=1)
        # Inside of the frame, on the line.
        axes.annotate(
            f"{speed:g}", (0.93 * x, 0.93 * x * speed), ha="center", va="center", fontsize=8, color="#8a8f98", zorder=2
        ).set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})


def _markers(arms: Iterable[str]) -> dict[str, str]:
    return {arm: MARKERS[i % len(MARKERS)] for i, arm in enumerate(arms)}


def _panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    size = (max(width * count + 1.4, SMALLEST_WIDTH), height + 0.9)
    figure, grid = plt.subplots(1, count, figsize=size, sharey=True, squeeze=False, layout="constrained")
    panels = list(grid[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    return figure, panels


def _finish(figure: Any, title: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.suptitle(title, fontsize=9.5, color=INK, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)
