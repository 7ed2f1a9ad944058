"""Prompts for models whose words mean nothing."""

from __future__ import annotations

import random

VOCABULARY = 256
"""Of the tiny models (`tiny_models.py`)."""


def random_prompts(*lengths: int) -> list[list[int]]:
    """Token ids drawn at random, the same in every run: one prompt of each length."""
    return [random.Random(seed).choices(range(VOCABULARY), k=length) for seed, length in enumerate(lengths)]
