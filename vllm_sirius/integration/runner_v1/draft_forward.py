"""One draft step on Model Runner V1: the target's modules on the target's KV pages. Reads ``GPUModelRunner``."""

from __future__ import annotations

import copy
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_sirius.errors import SiriusIntegrationError
from vllm_sirius.integration.draft_model import DraftModel
from vllm_sirius.integration.draft_room import REMEDY, check_room


def draft_slot_mapping(
    block_table: torch.Tensor, num_blocks: NDArray[np.int32], positions: torch.Tensor, block_size: int
) -> torch.Tensor:
    """KV slots of positions.

    Args:
        block_table: Blocks of the request of each position, ``int [n, blocks]``; what lies behind its last block is not its own.
        num_blocks: How many the request of each position has, ``int32 [n]``.
        positions: ``int64 [n]``.
        block_size: Tokens per block.

    Returns:
        ``int64 [n]``: ``block_id * block_size + offset``.

    Raises:
        SiriusIntegrationError: If a position has no block.
    """
    check_room(positions.numpy(), num_blocks, block_size)
    block_ids = block_table.gather(1, (positions // block_size).unsqueeze(1)).squeeze(1).long()
    if bool((block_ids <= 0).any()):  # vLLM's null block, which stands for blocks that were given back
        raise SiriusIntegrationError(f"a draft would write K/V into a block that its request no longer has. {REMEDY}")
    return block_ids * block_size + positions % block_size


class DraftForward:
    """Callable of `drafting.loop.DraftForward` for one engine step.

    Args:
        runner: The V1 model runner, after the target's forward pass of this step.
        common_attn_metadata: Attention metadata of that pass, for what does not change from pass to pass.
        draft: The draft.
    """

    def __init__(self, runner: Any, common_attn_metadata: Any, draft: DraftModel) -> None:
        self._runner = runner
        self._common = common_attn_metadata
        self._draft = draft

    def __call__(
        self, rows: list[int], counts: list[int], token_ids: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Runs the step; see `drafting.loop.DraftForward`."""
        attn_metadata, slot_mapping = self._attention(rows, counts, positions)
        hidden_states = self._draft.forward(token_ids, positions, attn_metadata, slot_mapping=slot_mapping)
        return self._draft.compute_logits(hidden_states)

    def _attention(
        self, rows: list[int], counts: list[int], positions: torch.Tensor
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        runner = self._runner
        attn_metadata: dict[str, Any] = {}
        slot_mapping: dict[str, torch.Tensor] = {}
        common = self._common_for(counts, positions)
        owners = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
        for group_id, groups in enumerate(runner.attn_groups):
            table = runner.input_batch.block_table[group_id]
            blocks = table.block_table.gpu
            group_common = copy.copy(common)
            group_common.block_table_tensor = blocks[rows]
            group_common.slot_mapping = draft_slot_mapping(
                blocks[owners], table.num_blocks_per_row[owners], positions, table.block_size
            )
            for group in groups:
                metadata = group.build_metadata(group_common)
                for layer_name in group.layer_names:
                    attn_metadata[layer_name] = metadata
                    slot_mapping[layer_name] = group_common.slot_mapping
        return attn_metadata, slot_mapping

    def _common_for(self, counts: list[int], positions: torch.Tensor) -> Any:
        """The metadata of a pass with so many successive tokens of each row."""
        common = copy.copy(self._common)
        starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
        common.num_reqs = len(counts)
        common.num_actual_tokens = len(positions)
        common.max_query_len = max(counts)
        common.query_start_loc = common.query_start_loc_cpu = starts
        common.seq_lens = (positions[starts[1:].long() - 1] + 1).to(torch.int32)
        common.seq_lens_cpu_upper_bound = common.seq_lens
        common.max_seq_len = int(common.seq_lens.max())
        common.positions = positions
        common.is_prefilling = torch.zeros(len(counts), dtype=torch.bool)
        common._num_computed_tokens_cache = common._token_to_req_indices_cache = None
        return common
