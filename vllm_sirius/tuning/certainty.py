"""What a few measured ratios prove. Leaf module."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

STUDENT_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
"""Two-sided 95 % quantiles of Student's distribution for 1, 2, ... degrees of freedom."""
NORMAL_95 = 1.96


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Where the mean ratio of all prompts lies with 95 % certainty, seen from a sample of them.

    Args:
        ratios: One for each batch of prompts, above 0. Ratios multiply, so their logarithms are averaged.

    Returns:
        Lower and upper end; 0 and infinity where one batch alone says nothing about others.
    """
    count = len(ratios)
    if count < 2:
        return 0.0, math.inf
    logarithms = [math.log(ratio) for ratio in ratios]
    quantile = STUDENT_95[count - 2] if count - 2 < len(STUDENT_95) else NORMAL_95
    mean = statistics.fmean(logarithms)
    reach = quantile * statistics.stdev(logarithms) / math.sqrt(count)
    return math.exp(mean - reach), math.exp(mean + reach)


def format_interval(ends: tuple[float, float]) -> str:
    """An interval for the user.

    Args:
        ends: Lower and upper end.

    Returns:
        For example ``0.91x to 1.20x``.
    """
    low, high = ends
    return "unknown, one batch of prompts shows no spread" if math.isinf(high) else f"{low:.2f}x to {high:.2f}x"
