"""Pages of a checkpoint are given back where they can be read again, and nowhere else."""

from __future__ import annotations

import mmap

import pytest
import torch

from vllm_sirius.weights.mapped_pages import LEAST_BYTES, PAGEMAP, give_back

pytestmark = pytest.mark.usefixtures("fresh_input")
BYTES = 2 * LEAST_BYTES + 12345


@pytest.fixture
def mapped(tmp_path):
    """A tensor in the pages of a file, mapped as checkpoints are, and what is in it."""
    content = torch.randint(256, (BYTES,), dtype=torch.uint8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(content.numpy().tobytes())
    tensor = torch.from_file(str(path), shared=False, size=BYTES, dtype=torch.uint8)
    return tensor, content


def resident_bytes(tensor):
    """Bytes of a tensor whose pages are mapped."""
    start = tensor.data_ptr() // mmap.PAGESIZE
    count = -(-(tensor.data_ptr() % mmap.PAGESIZE + tensor.nbytes) // mmap.PAGESIZE)
    with PAGEMAP.open("rb", buffering=0) as pagemap:
        pagemap.seek(8 * start)
        pages = memoryview(pagemap.read(8 * count)).cast("Q")
    return mmap.PAGESIZE * sum(page >> 63 for page in pages)


def test_pages_that_were_read_are_given_back_and_come_again(mapped):
    tensor, content = mapped
    assert torch.equal(tensor, content)
    before = resident_bytes(tensor)
    assert before >= BYTES
    assert BYTES - 2 * mmap.PAGESIZE <= give_back(tensor) <= BYTES
    assert resident_bytes(tensor) <= 3 * mmap.PAGESIZE
    assert torch.equal(tensor, content)


def test_pages_that_were_written_to_are_kept(mapped):
    tensor, content = mapped
    assert torch.equal(tensor, content)
    tensor[BYTES // 2] ^= 255
    assert give_back(tensor) == 0
    content[BYTES // 2] ^= 255
    assert torch.equal(tensor, content)


def test_a_part_of_a_mapping_can_be_given_back(mapped):
    tensor, content = mapped
    assert torch.equal(tensor, content)
    part = tensor[5 : 5 + LEAST_BYTES]
    assert 0 < give_back(part) <= LEAST_BYTES
    assert torch.equal(tensor, content)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(BYTES, dtype=torch.uint8), torch.ones(2000, 2000).t(), torch.empty(0), torch.ones(8, device="meta")],
    ids=["own memory", "strided", "empty", "meta"],
)
def test_other_memory_is_left_alone(tensor):
    content = tensor.clone()
    assert give_back(tensor) == 0
    assert tensor.is_meta or torch.equal(tensor, content)


def test_a_system_that_does_not_tell_loses_nothing(mapped, monkeypatch, tmp_path):
    tensor, content = mapped
    assert torch.equal(tensor, content)
    monkeypatch.setattr("vllm_sirius.weights.mapped_pages.PAGEMAP", tmp_path / "none")
    assert give_back(tensor) == 0
    assert torch.equal(tensor, content)
