"""Where a draft writes its K/V on Model Runner V1, for whatever block tables come: `hypothesis` draws them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_sirius.errors import SiriusIntegrationError
from vllm_sirius.integration.runner_v1.draft_forward import draft_slot_mapping

WIDTH = 6
"""Blocks that a row of the table holds."""


@settings(deadline=None, print_blob=True)
@given(st.integers(1, 5), st.lists(st.integers(0, WIDTH - 1), min_size=1, max_size=4), st.data())
def test_a_draft_writes_into_the_blocks_of_its_request_alone(
    block_size: int, counts: list[int], data: st.DataObject
) -> None:
    """Blocks are handed out in any order; 0 is the null block, which fills the rows of the table up."""
    ids = data.draw(st.permutations(range(1, sum(counts) + 1)))
    table = torch.zeros(len(counts), WIDTH, dtype=torch.int32)
    for row, count in enumerate(counts):
        table[row, :count] = torch.tensor(ids[sum(counts[:row]) : sum(counts[:row]) + count], dtype=torch.int32)
    everywhere = [(row, position) for row, count in enumerate(counts) for position in range(count * block_size)]
    assume(everywhere)
    chosen = data.draw(st.lists(st.sampled_from(everywhere), min_size=1, unique=True))
    rows, positions = (torch.tensor(values) for values in zip(*chosen, strict=True))
    num_blocks = np.array(counts, dtype=np.int32)[rows.numpy()]
    slots = draft_slot_mapping(table[rows], num_blocks, positions, block_size).tolist()
    assert len(set(slots)) == len(slots)
    for slot, (row, position) in zip(slots, chosen, strict=True):
        assert slot % block_size == position % block_size
        assert table[row, position // block_size] == slot // block_size
    row = data.draw(st.integers(0, len(counts) - 1))
    behind = torch.tensor([data.draw(st.integers(counts[row] * block_size, WIDTH * block_size - 1))])
    with pytest.raises(SiriusIntegrationError, match=f"position {behind.item()}"):
        draft_slot_mapping(table[[row]], np.array([counts[row]]), behind, block_size)


def test_a_block_that_was_given_back_is_not_written() -> None:
    table = torch.tensor([[3, 0, 5]])
    with pytest.raises(SiriusIntegrationError, match="no longer has"):
        draft_slot_mapping(table, np.array([3]), torch.tensor([5]), 4)
