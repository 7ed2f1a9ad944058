"""Draws what runs measured: `python -m benchmarks.plot FOLDER_OR_FILE [--output FOLDER]`.

Charts: speed-up by arm; acceptance by position in the draft; speed-up against batch size; bytes of a token against
achieved bandwidth.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import charts, results
from benchmarks.compare import describe_run
from benchmarks.errors import BenchmarkError, exit_status
from benchmarks.summary import Row, summarise


def run(given: argparse.Namespace) -> int:
    """Carries out a parsed command.

    Args:
        given: The command line.

    Returns:
        Exit status 0.

    Raises:
        BenchmarkError: If the file is not a run's or has nothing to draw.
    """
    result = results.read(given.path)
    rows = summarise(result)
    if not rows:
        raise BenchmarkError(f"{given.path}: the run has no finished round; there is nothing to draw")
    folder = given.output or (given.path if given.path.is_dir() else given.path.parent)
    folder.mkdir(parents=True, exist_ok=True)
    batch = given.batch or min(row.batch for row in rows)
    chosen = [row for row in rows if row.batch == batch]
    if not chosen:
        raise BenchmarkError(f"--batch {batch}: not in this run, which has {sorted({row.batch for row in rows})}")
    subtitle = describe_run(result).replace("; ", "\n", 1)
    colours = charts.palette(result.arms)
    points = charts.roofline_points(result, chosen)
    drawings: dict[str, tuple[Callable[[Path], None], str]] = {
        "speed_up.png": (functools.partial(charts.speed_up, chosen, colours, subtitle), ""),
        "acceptance.png": (
            functools.partial(charts.acceptance, chosen, colours, subtitle),
            "" if _drafted(chosen) else "no arm has counted drafts",
        ),
        "batch.png": (
            functools.partial(charts.batch_sizes, rows, colours, subtitle),
            "" if len({row.batch for row in rows}) > 1 else "the run has one batch size",
        ),
        "roofline.png": (
            functools.partial(charts.roofline, points, colours, given.bandwidth, subtitle),
            "" if batch == 1 and points else "it needs batch 1 and counted drafts",
        ),
    }
    for name, (draw, reason) in drawings.items():
        if reason:
            print(f"{name}: not drawn, {reason}")
            continue
        draw(folder / name)
        print(folder / name)
    return 0


def _drafted(rows: Sequence[Row]) -> bool:
    return any(row.counts.accepted_by_position for row in rows)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line.

    Args:
        arguments: Arguments without the program's name; None takes those of the process.

    Returns:
        The parsed arguments.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.plot", description="Draws what a run measured.")
    parser.add_argument("path", type=Path, metavar="FOLDER_OR_FILE", help="a run's folder or results.json")
    parser.add_argument("--output", type=Path, help="folder for the charts (default: the run's)")
    parser.add_argument("--batch", type=int, help="batch size of the charts that show one (default: the smallest)")
    parser.add_argument("--bandwidth", type=float, help="memory bandwidth of the machine in GB/s, for the roof line")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the charts.

    Args:
        arguments: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit status: 0, or 1 after a failure.
    """
    return exit_status(functools.partial(run, parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
