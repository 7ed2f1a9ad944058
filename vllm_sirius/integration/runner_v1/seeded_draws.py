"""Random numbers of seeded requests: each token's comes from (seed, position). Reads ``GPUModelRunner``.

vLLM's sampler draws one number of a request's generator for every token it samples, so that what a request draws depends on
what was drawn before: on samples that are thrown away (a chunk of its prompt, a rejected draft) and on preemptions. Put in
place before each step, a generator gives the token at a position the number that undisturbed decoding would give it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def place_generators(
    generators: Mapping[int, torch.Generator], req_ids: Sequence[str], states: Mapping[str, Any]
) -> None:
    """Moves each seeded request's generator to the draw of its next token.

    Args:
        generators: Generators of the seeded requests, by row.
        req_ids: Requests in batch order.
        states: Upstream's request states by id.
    """
    for row, generator in generators.items():
        generator.manual_seed(generator.initial_seed())
        draw_seeds(generator, len(states[req_ids[row]].output_token_ids))


def draw_seeds(generator: torch.Generator | None, count: int) -> torch.Tensor:
    """The next seeds, as upstream's CPU sampler draws one for one token.

    Args:
        generator: The request's generator; without it they are random.
        count: How many.

    Returns:
        ``int64 [count]``.
    """
    return torch.randint(0, 2**31, (count,), generator=generator, dtype=torch.long)
