"""Who answers what, when, beside whom: batches of prompts, rotating turns, and engines that fit into memory together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from benchmarks.errors import BenchmarkError

Item = TypeVar("Item")


def batches(prompts: Sequence[Item], size: int) -> list[list[Item]]:
    """Cuts prompts into batches, whole ones only: a smaller one would count as a batch size that it is not.

    Args:
        prompts: The prompts.
        size: Prompts of a batch.

    Returns:
        The batches; what is left over is not answered.
    """
    return [list(prompts[start : start + size]) for start in range(0, len(prompts) - size + 1, size)]


def rotated(items: Sequence[Item], turn: int) -> list[Item]:
    """The order of a turn: each item is first as often as any other.

    Args:
        items: The items.
        turn: Number of the turn, from 0.

    Returns:
        The items, beginning with another one each turn.
    """
    start = turn % len(items) if items else 0
    return [*items[start:], *items[:start]]


def split_by_memory(alone: Mapping[str, int], others: Mapping[str, int], available: int) -> list[list[str]]:
    """Divides engines into groups that fit into memory, each with all engines of vLLM alone in it.

    Args:
        alone: Bytes of each engine of vLLM alone, by arm.
        others: Bytes of each other engine, by arm.
        available: Bytes that a group may take.

    Returns:
        Arms of each group, in the order given; one group of vLLM alone where there is nothing else.

    Raises:
        BenchmarkError: If vLLM alone, or one arm beside it, does not fit.
    """
    base = sum(alone.values())
    if base > available:
        raise BenchmarkError(_too_large("--arms " + " ".join(alone), base, available))
    groups: list[list[str]] = [list(alone)]
    used = base
    for name, size in others.items():
        if base + size > available:
            raise BenchmarkError(_too_large(f"arm {name} beside {' and '.join(alone)}", base + size, available))
        if used + size > available:
            groups.append(list(alone))
            used = base
        groups[-1].append(name)
        used += size
    return groups


def _too_large(what: str, needed: int, available: int) -> str:
    return (
        f"{what}: needs about {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are available; end other "
        "programs, or choose a smaller --model, fewer arms or a smaller --kv-cache-memory-bytes"
    )
