"""The real models and prompts that end-to-end tests use."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(os.environ.get("SIRIUS_MODELS", ROOT / ".models"))
DATA = ROOT.parent / "shared" / "data"

SMOL = "smollm2-135m-instruct"
QWEN_SMALL = "qwen2.5-coder-0.5b-instruct"
QWEN_LARGE = "qwen2.5-coder-1.5b-instruct"
GEMMA = "gemma-3-270m"

OWN_QUESTIONS = (
    "A baker makes 12 trays of 8 rolls and sells 70 rolls. How many rolls are left?",
    "Write a Python function that returns the second largest number of a list.",
    "Tom has 3 times as many stamps as Ann. Together they have 48 stamps. How many has Tom?",
    "Explain in two sentences why the sky is blue.",
    "A train travels 60 km in 45 minutes. How far does it travel in 2 hours at the same speed?",
    "Write a Python function that checks whether a string is a palindrome, ignoring case and spaces.",
)
"""Stand in where the data sets are not at hand."""


def model_path(name: str) -> str:
    """Folder of a downloaded model; fails with the command that makes it."""
    path = MODELS / name
    if not (path / "config.json").is_file():
        pytest.fail(f"the model {name} is missing: run `make model NAME={name}`")
    return str(path)


def questions(task: str, count: int) -> list[str]:
    """First questions of a task, ``gsm8k`` or ``humaneval``, or our own where the data is not at hand."""
    files = {"gsm8k": ("gsm8k/test.jsonl", "question"), "humaneval": ("humaneval/HumanEval.jsonl", "prompt")}
    file, field = files[task]
    path = DATA / file
    if not path.is_file():
        return [_own_question(i, parts=3 if task == "gsm8k" else 8) for i in range(count)]
    lines = path.read_text(encoding="utf-8").splitlines()[:count]
    found = [json.loads(line)[field] for line in lines]
    if task == "humaneval":
        found = [f"Complete this Python function.\n```python\n{prompt}```" for prompt in found]
    return found


def _own_question(number: int, parts: int) -> str:
    """As long as a question of a task, which several of ours together are."""
    chosen = (OWN_QUESTIONS[(number + i) % len(OWN_QUESTIONS)] for i in range(parts))
    return f"Number {number + 1}. " + " ".join(chosen)


@functools.cache
def _tokenizer(path: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def chat_prompt(name: str, question: str) -> list[int]:
    """Token ids of a question in the model's chat template."""
    tokenizer = _tokenizer(model_path(name))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def chat_prompts(name: str, task: str, count: int) -> list[list[int]]:
    """A task's first questions in the model's chat template."""
    return [chat_prompt(name, question) for question in questions(task, count)]


def mixed_prompts(name: str, count: int) -> list[list[int]]:
    """Prompts of mixed task and length, from a few tokens to several hundred."""
    tokenizer = _tokenizer(model_path(name))
    texts = [
        question
        for pair in zip(questions("gsm8k", count), questions("humaneval", count), strict=True)
        for question in pair
    ]
    prompts = []
    for i, text in enumerate(texts[:count]):
        ids = tokenizer(text)["input_ids"]
        prompts.append((ids[: 3 + 2 * i], ids, ids + ids[: 40 * (i % 5)])[i % 3])
    return prompts
