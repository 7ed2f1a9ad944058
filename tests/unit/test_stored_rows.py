"""Rows of an embedding that are looked up in a file."""

from __future__ import annotations

import random

import pytest
import torch

from vllm_sirius.offload.errors import OffloadError
from vllm_sirius.target.stored_rows import StoredRows

pytestmark = pytest.mark.usefixtures("fresh_input")
WIDTH, NUM_ROWS = 37, 101


@pytest.fixture
def stored(tmp_path):
    """An embedding and its rows in a file."""
    weight = torch.randn(NUM_ROWS, WIDTH).bfloat16()
    path = tmp_path / "rows"
    path.write_bytes(b"x" * 4096 + weight.view(torch.uint8).numpy().tobytes())
    return weight, StoredRows(path, 4096, NUM_ROWS, WIDTH, torch.bfloat16)


@pytest.mark.parametrize("shape", [(1,), (50,), (3, 7), (0,), ()])
def test_rows_are_those_of_the_embedding(stored, shape):
    weight, rows = stored
    indices = torch.randint(NUM_ROWS, shape, dtype=random.choice([torch.int32, torch.int64]))
    found = rows.rows(indices)
    assert found.shape == (*shape, WIDTH)
    assert torch.equal(found, torch.nn.functional.embedding(indices, weight))


@pytest.mark.parametrize("index", [-1, NUM_ROWS])
def test_a_row_that_is_none_is_an_error(stored, index):
    with pytest.raises(IndexError, match=f"token {index} has no row among {NUM_ROWS}"):
        stored[1].rows(torch.tensor([0, index]))


def test_a_file_that_ends_too_early_is_an_error(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(b"x" * 100)
    with pytest.raises(OffloadError, match=r"rows ends at byte \d+, too early"):
        StoredRows(path, 0, NUM_ROWS, WIDTH, torch.bfloat16).rows(torch.tensor([NUM_ROWS - 1]))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(OffloadError, match="cannot be opened"):
        StoredRows(tmp_path / "none", 0, 1, 1, torch.bfloat16)
