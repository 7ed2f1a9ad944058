"""Scores answers to word problems by their final number. Generated code is never run."""

from __future__ import annotations

import re
from decimal import Decimal

NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
"""A number with or without thousands separators. A minus after a letter, digit or bracket is a subtraction."""

GOLD_MARK = "####"
"""Stands before the final number of a GSM8K solution."""


def final_number(text: str) -> Decimal | None:
    """The last number of a text.

    Args:
        text: An answer.

    Returns:
        The number, or ``None`` where there is none.
    """
    numbers = NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def gold_number(solution: str) -> Decimal:
    """The final number of a GSM8K solution.

    Args:
        solution: The field ``answer`` of the data set.

    Returns:
        The number.

    Raises:
        ValueError: If the solution has none, so that it is not of this data set.
    """
    number = final_number(solution.rpartition(GOLD_MARK)[2]) if GOLD_MARK in solution else None
    if number is None:
        raise ValueError(f"a solution without a number after {GOLD_MARK}: {solution!r}")
    return number


def is_correct(text: str, gold: str) -> bool:
    """Whether an answer ends in the right number.

    Args:
        text: The answer.
        gold: The right number.

    Returns:
        True if the last number of the text has the same value.
    """
    return final_number(text) == Decimal(gold)
