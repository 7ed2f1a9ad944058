"""The model that a test runs on, by model runner.

On Model Runner V1 it is SmolLM2. On V2 it is a tiny one: Triton's interpreter pays for each word of the vocabulary, and what a
test says of requests, pages and lengths is the same. That both runners draft alike on SmolLM2 is shown once
(`test_acceptance_length`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from support.engine_host import Runner
from support.prompts import random_prompts
from support.real_models import SMOL, mixed_prompts, model_path

LENGTHS = (3, 90, 150, 9, 60, 200, 15)
"""From a few tokens to several hundred, as `mixed_prompts` has them."""


@dataclass(frozen=True)
class Subject:
    """A model and its prompts.

    Attributes:
        model: Folder of the model.
        max_model_len: Longest text of its engines.
        mixed_prompts: Gives so many prompts of mixed length, the same in every run.
    """

    model: str
    max_model_len: int
    mixed_prompts: Callable[[int], list[list[int]]]


def smollm2() -> Subject:
    """The real one."""
    return Subject(model_path(SMOL), 1024, lambda count: mixed_prompts(SMOL, count))


def tiny(model: str) -> Subject:
    """A model of `tiny_models`."""
    return Subject(model, 512, lambda count: random_prompts(*LENGTHS[:count]))


def of_runner(runner: Runner, tiny_model: str) -> Subject:
    """SmolLM2 on Model Runner V1, the tiny model on V2."""
    return smollm2() if runner == "v1" else tiny(tiny_model)
