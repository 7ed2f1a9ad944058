"""The demo's prompts: GSM8K and HumanEval where the data sets are at hand, a few of our own otherwise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vllm_sirius.measuring.prompts import tokenize

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

OWN_QUESTIONS = (
    "A baker makes 12 trays of 8 rolls and sells 70 rolls. How many rolls are left? Explain each step.",
    "Write a Python function that returns the second largest number of a list.",
    "Tom has 3 times as many stamps as Ann. Together they have 48 stamps. How many has Tom? Explain each step.",
    "Write a Python function that checks whether a string is a palindrome, ignoring case and spaces.",
    "A train travels 60 km in 45 minutes. How far does it travel in 2 hours at the same speed?",
    "Write a Python function that merges two sorted lists into one sorted list.",
    "Five shirts cost 85 euros. How much do eight of them cost? Explain each step.",
    "Write a Python function that counts how often each word occurs in a text.",
)

WARM_UP_QUESTION = "Name three primary colours and say in one sentence what they are used for."


@dataclass(frozen=True)
class Prompt:
    """One question of a data set.

    Attributes:
        source: Name of the data set.
        text: The question.
        token_ids: The question in the model's chat template.
    """

    source: str
    text: str
    token_ids: list[int]


def collect_prompts(model: str, count: int) -> list[Prompt]:
    """Reads the questions and puts them into the model's chat template.

    Args:
        model: Path or hub name; its tokenizer is loaded.
        count: Number of prompts, half of them GSM8K and half HumanEval.

    Returns:
        The prompts, the two data sets by turns.
    """
    questions = _questions(count)
    texts = [text for _, text in questions]
    token_ids = tokenize(model, texts)
    return [Prompt(source, text, ids) for (source, text), ids in zip(questions, token_ids, strict=True)]


def _questions(count: int) -> list[tuple[str, str]]:
    """Source and text of each question."""
    word_problems = _read(DATA / "gsm8k" / "test.jsonl", "question", count)
    functions = _read(DATA / "humaneval" / "HumanEval.jsonl", "prompt", count)
    if not word_problems or not functions:
        return [("own", OWN_QUESTIONS[i % len(OWN_QUESTIONS)]) for i in range(count)]
    pairs = [
        (("GSM8K", problem), ("HumanEval", f"Complete this Python function.\n```python\n{function}```"))
        for problem, function in zip(word_problems, functions, strict=False)
    ]
    return [question for pair in pairs for question in pair][:count]


def _read(path: Path, field: str, count: int) -> list[str]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)[field] for line in lines]
