"""Fixtures that unit tests of kernels share."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def fresh_input() -> None:
    """Fresh random input in every run; pytest shows the seed of a failing test."""
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")
    torch.manual_seed(value)
    random.seed(value)


@pytest.fixture
def one_or_two_threads(fresh_input: None) -> Iterator[None]:
    """A number of threads drawn at random, and afterwards the one from before."""
    before = torch.get_num_threads()
    torch.set_num_threads(random.choice((1, 2)))
    yield
    torch.set_num_threads(before)
