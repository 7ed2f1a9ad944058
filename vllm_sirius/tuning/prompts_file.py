"""Reads the user's prompts: lines of text, or JSON lines. Leaf module."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_sirius.tuning.errors import TuningOptionError

FIELDS = ("prompt", "question", "text")
"""Fields of a JSON line that may hold the prompt; the first one that is there counts."""

JSON_SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file.

    Attributes:
        texts: The prompts.
        source: What was found, for the user: name of the file, kind and fields.
        num_in_file: Prompts of the file, those included that were not wanted.
    """

    texts: tuple[str, ...]
    source: str
    num_in_file: int


def read_prompts(path: Path, count: int) -> PromptFile:
    """Reads the first prompts of a file; blank lines do not count.

    A file is JSON lines if its name ends in one of `JSON_SUFFIXES` or its first line is a JSON object.

    Args:
        path: The file.
        count: Most prompts to read.

    Returns:
        The prompts, at least one.

    Raises:
        TuningOptionError: If the file is missing, unreadable or empty, or a line of JSON has no prompt.
    """
    lines, num_in_file = _read_lines(path, count)
    if path.suffix not in JSON_SUFFIXES and _parse_object(lines[0][1]) is None:
        return PromptFile(tuple(text for _, text in lines), f"{path.name}, one prompt per line", num_in_file)
    found = [_find_prompt(path, number, text) for number, text in lines]
    fields = Counter(field for field, _ in found)
    names = ", ".join(
        f"field {name!r}" if len(fields) == 1 else f"{times} of field {name!r}" for name, times in fields.items()
    )
    return PromptFile(tuple(text for _, text in found), f"{path.name}, JSON lines, {names}", num_in_file)


def _read_lines(path: Path, count: int) -> tuple[list[tuple[int, str]], int]:
    """Number and text of the first lines that are not blank, and how many such lines there are."""
    try:
        with path.open(encoding="utf-8") as file:
            filled = ((number, line.strip()) for number, line in enumerate(file, start=1) if line.strip())
            lines = list(islice(filled, count))
            num_in_file = len(lines) + sum(1 for _ in filled)
    except FileNotFoundError as error:
        raise TuningOptionError(f"--prompts={path} does not exist: give a file with one prompt per line.") from error
    except OSError as error:
        raise TuningOptionError(
            f"--prompts={path} cannot be read ({error.strerror}): give a file with one prompt per line."
        ) from error
    except UnicodeDecodeError as error:
        raise TuningOptionError(f"--prompts={path} is not UTF-8 text: give a file with one prompt per line.") from error
    if not lines:
        raise TuningOptionError(f"--prompts={path} is empty: give a file with one prompt per line.")
    return lines, num_in_file


def _parse_object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # also a number of thousands of digits, and brackets in brackets
        return None
    return value if isinstance(value, dict) else None


def _find_prompt(path: Path, number: int, line: str) -> tuple[str, str]:
    """Name of the field and the prompt of one JSON line."""
    value = _parse_object(line)
    if value is None:
        raise TuningOptionError(
            f"--prompts={path}: line {number} is not a JSON object: write one object per line, for example "
            '{"prompt": "..."}, or plain lines in a file that ends in .txt.'
        )
    field = next((name for name in FIELDS if name in value), None)
    if field is None:
        raise TuningOptionError(
            f"--prompts={path}: line {number} has none of the fields {', '.join(FIELDS)}, only "
            f"{', '.join(value) or 'an empty object'}: rename the field that holds the prompt."
        )
    if not isinstance(value[field], str) or not value[field].strip():
        raise TuningOptionError(f"--prompts={path}: {field!r} in line {number} is not a text: give one.")
    return field, value[field]
