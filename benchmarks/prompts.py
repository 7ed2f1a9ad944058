"""The benchmarks' prompts: test questions of GSM8K and tasks of HumanEval in the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.answers import gold_number
from benchmarks.errors import BenchmarkError
from vllm_sirius.measuring.prompts import tokenize

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Folder of the data sets; another with ``--data``."""

FILES = {"gsm8k": Path("gsm8k", "test.jsonl"), "humaneval": Path("humaneval", "HumanEval.jsonl")}
"""File of each task below the folder of the data sets."""

TASKS = tuple(FILES)

WARM_UP_QUESTION = "Name three primary colours and say in one sentence what they are used for."


@dataclass(frozen=True)
class Prompt:
    """One question of a data set.

    Attributes:
        task: Name of the data set.
        index: Line of its file, from 0.
        text: What the user says.
        token_ids: The text in the model's chat template.
        gold: The right answer as a number, where answers of the task can be scored by one; otherwise empty.
    """

    task: str
    index: int
    text: str
    token_ids: list[int]
    gold: str = ""


def collect(model: str, data: Path, tasks: Sequence[str], count: int, offset: int) -> dict[str, list[Prompt]]:
    """Reads questions and puts them into the model's chat template.

    Args:
        model: Path or hub name; its tokenizer is loaded.
        data: Folder of the data sets.
        tasks: Names of data sets.
        count: Questions of each.
        offset: Questions of each to leave out at the start.

    Returns:
        The prompts of each task.

    Raises:
        BenchmarkError: If a data set is missing or too short.
    """
    lines = {task: _read(data, task, count, offset) for task in tasks}
    texts = [_text(task, line) for task in tasks for line in lines[task]]
    token_ids = iter(zip(texts, tokenize(model, texts), strict=True))
    found: dict[str, list[Prompt]] = {}
    for task in tasks:
        found[task] = []
        for index, line in enumerate(lines[task], start=offset):
            text, ids = next(token_ids)
            gold = str(gold_number(line["answer"])) if task == "gsm8k" else ""
            found[task].append(Prompt(task, index, text, ids, gold))
    return found


def _read(data: Path, task: str, count: int, offset: int) -> list[dict[str, Any]]:
    path = data / FILES[task]
    if not path.is_file():
        raise BenchmarkError(f"--tasks {task}: there is no file {FILES[task]} in the folder of --data, {data}")
    lines = path.read_text(encoding="utf-8").splitlines()
    if offset + count > len(lines):
        raise BenchmarkError(
            f"--num-prompts {count} from --offset {offset}: {task} has {len(lines)} prompts; lower one of the two"
        )
    return [json.loads(line) for line in lines[offset : offset + count]]


def _text(task: str, line: dict[str, Any]) -> str:
    if task == "gsm8k":
        return str(line["question"])
    return f"Complete this Python function.\n```python\n{line['prompt']}```"
