"""No draft leaves the KV blocks of its request. Knows block tables as numbers alone, for both model runners.

A draft that did would overwrite the K/V of other requests in silence. The scheduler reserves what drafts need
(`lookahead`), so an error here means that Sirius and vLLM disagree about a limit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_sirius.errors import SiriusIntegrationError

REMEDY = (
    "The engine stops instead: start it with an explicit --max-model-len, or without --speculative-model sirius, and report "
    "this."
)


def check_room(positions: NDArray[np.integer[Any]], num_blocks: NDArray[np.integer[Any]], block_size: int) -> None:
    """Refuses to draft past the blocks of a request.

    Args:
        positions: Positions whose K/V the draft writes.
        num_blocks: Blocks of the request of each position.
        block_size: Tokens per block.

    Raises:
        SiriusIntegrationError: If a position lies behind the last block.
    """
    outside = positions >= num_blocks * block_size
    if outside.any():
        first = int(outside.argmax())
        raise SiriusIntegrationError(
            f"a draft would write K/V at position {int(positions[first])}, but its request has blocks for "
            f"{int(num_blocks[first]) * block_size} tokens: what other requests or the prefix cache keep there would be "
            f"overwritten. {REMEDY}"
        )
