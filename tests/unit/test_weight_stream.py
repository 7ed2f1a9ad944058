"""Groups of a file, read ahead: what comes, in which order, and what is said where nothing can come."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch

from vllm_sirius.offload.errors import OffloadError
from vllm_sirius.offload.native import crc32c
from vllm_sirius.offload.stream import PAGE, Group, Piece, WeightStream

pytestmark = pytest.mark.usefixtures("fresh_input")


def write_groups(path: Path, count: int) -> tuple[list[Group], list[torch.Tensor]]:
    """A file of groups of random sizes, not in the order of the file, and what is in them."""
    groups, contents = [], []
    offset = PAGE
    order = random.sample(range(count), count)
    placed: dict[int, tuple[Group, torch.Tensor]] = {}
    with path.open("wb") as file:
        for number in order:
            parts = [torch.randint(256, (PAGE * random.randint(1, 9),), dtype=torch.uint8) for _ in range(3)]
            group = Group(offset, tuple(Piece(part.numel(), crc32c(part)) for part in parts))
            placed[number] = group, torch.cat(parts)
            file.seek(offset)
            file.write(placed[number][1].numpy().tobytes())
            offset += group.num_bytes + PAGE * random.randint(0, 2)
    for number in range(count):
        group, content = placed[number]
        groups.append(group)
        contents.append(content)
    return groups, contents


def read_round(stream: WeightStream, groups: list[Group], contents: list[torch.Tensor]) -> None:
    for number, (group, content) in enumerate(zip(groups, contents, strict=True)):
        some = random.randint(1, group.num_bytes)
        assert torch.equal(stream.wait(number, some)[:some], content[:some])
        assert torch.equal(stream.wait(number, group.num_bytes)[: group.num_bytes], content)
        stream.release(number)


def read_rounds(stream: WeightStream, groups: list[Group], contents: list[torch.Tensor], count: int) -> None:
    for _ in range(count):
        read_round(stream, groups, contents)


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_rounds_bring_what_is_in_the_file(tmp_path, count, num_slots):
    path = tmp_path / "weights"
    groups, contents = write_groups(path, count)
    stream = WeightStream(path, groups, num_slots, num_threads=random.randint(1, 5))
    for _ in range(3):
        read_round(stream, groups, contents)
    found = stream.statistics()
    assert found.num_rounds == 3
    assert found.num_bytes >= 3 * sum(group.num_bytes for group in groups)
    assert found.bytes_per_second > 0
    stream.close()
    stream.close()
    with pytest.raises(OffloadError, match="was closed"):
        stream.wait(0, 1)


def test_a_round_that_was_left_begins_anew_anywhere(tmp_path):
    path = tmp_path / "weights"
    groups, contents = write_groups(path, 6)
    stream = WeightStream(path, groups, 2)
    for number in [0, 1, 4, 5, 0, 3, 3, 2, 2, 0, 1, 2, 5]:
        size = groups[number].num_bytes
        assert torch.equal(stream.wait(number, size)[:size], contents[number])
        if random.random() < 0.5:
            stream.release(number)
    read_round(stream, groups, contents)


def test_what_was_not_released_is_not_overwritten(tmp_path):
    path = tmp_path / "weights"
    groups, contents = write_groups(path, 5)
    stream = WeightStream(path, groups, 2)
    size = groups[0].num_bytes
    slot = stream.wait(0, size)
    deadline = time.monotonic() + 5
    ahead = groups[0].num_bytes + groups[1].num_bytes
    while stream.statistics().num_bytes < ahead and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    # Two slots are full, and no more is read until one of them is free.
    assert stream.statistics().num_bytes == ahead
    assert torch.equal(slot[:size], contents[0])


def test_what_comes_too_late_is_not_taken_for_the_next_group(tmp_path):
    """A group is left before all of it has come. The bound of the rate holds its pieces back while others want its slot."""
    path = tmp_path / "weights"
    groups, contents = write_groups(path, 5)
    total = sum(group.num_bytes for group in groups)
    stream = WeightStream(path, groups, 2, num_threads=8, bytes_per_second=total / 0.05)
    for step in range(150):
        number = step % len(groups)
        size = random.choice([1, groups[number].num_bytes])
        assert torch.equal(stream.wait(number, size)[:size], contents[number][:size])
        stream.release(number)


def test_memory_is_that_of_the_slots(tmp_path):
    path = tmp_path / "weights"
    groups, _ = write_groups(path, 4)
    assert WeightStream(path, groups, 3).num_bytes == 3 * max(group.num_bytes for group in groups)


def test_a_rate_can_be_kept_to(tmp_path):
    path = tmp_path / "weights"
    groups, contents = write_groups(path, 4)
    total = sum(group.num_bytes for group in groups)
    stream = WeightStream(path, groups, 2, bytes_per_second=total / 0.2)
    started = time.monotonic()
    for _ in range(2):
        read_round(stream, groups, contents)
    assert time.monotonic() - started > 0.2
    assert stream.statistics().waiting_seconds > 0.1


def damage(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << random.randrange(8)]))


def test_a_flipped_bit_is_found_in_the_first_round(tmp_path):
    path = tmp_path / "weights"
    groups, contents = write_groups(path, 4)
    damaged = random.randrange(4)
    damage(path, groups[damaged].offset + random.randrange(groups[damaged].num_bytes))
    stream = WeightStream(path, groups)
    with pytest.raises(OffloadError, match=r"weights is damaged at byte \d+ \(checksum\)"):
        read_round(stream, groups, contents)
    with pytest.raises(OffloadError, match="damaged"):
        stream.wait(0, 1)


def test_a_file_that_ends_too_early_is_an_error(tmp_path):
    path = tmp_path / "weights"
    groups, _ = write_groups(path, 3)
    last = max(groups, key=lambda group: group.offset)
    os.truncate(path, last.offset + PAGE // 2)
    stream = WeightStream(path, groups)
    number = groups.index(last)
    with pytest.raises(OffloadError, match=r"ends at byte \d+, too early"):
        stream.wait(number, last.num_bytes)


def test_a_file_that_is_written_to_ends_the_stream_at_the_next_round(tmp_path):
    path = tmp_path / "weights"
    groups, contents = write_groups(path, 4)
    stream = WeightStream(path, groups, 2)
    read_round(stream, groups[:2], contents[:2])
    path.touch()
    with pytest.raises(OffloadError, match="was changed while it was being read"):
        read_rounds(stream, groups, contents, 2)


def test_a_disk_that_stops_is_an_error_and_not_a_wait_for_ever(tmp_path):
    path = tmp_path / "weights"
    groups, _ = write_groups(path, 2)
    stream = WeightStream(path, groups, bytes_per_second=1.0, patience_seconds=0.2)
    with pytest.raises(OffloadError, match="the disk gave nothing for 0 s"):
        stream.wait(0, groups[0].num_bytes)  # of three pieces the first may come at once
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 4


def test_an_error_of_the_disk_says_what_the_system_says():
    group = Group(0, (Piece(PAGE, 0),))
    stream = WeightStream(Path("/proc/self/mem"), [group])
    assert not stream.direct
    with pytest.raises(OffloadError, match="/proc/self/mem cannot be read at byte 0: Input/output error"):
        stream.wait(0, 1)


def test_a_missing_file_is_refused_at_once(tmp_path):
    with pytest.raises(OffloadError, match="nothing cannot be opened: No such file"):
        WeightStream(tmp_path / "nothing", [Group(0, (Piece(PAGE, 0),))])


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([], "needs groups of pieces"),
        ([Group(0, ())], "needs groups of pieces"),
        ([Group(5, (Piece(PAGE, 0),))], "multiples of 4096"),
        ([Group(0, (Piece(100, 0),))], "multiples of 4096"),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path, groups, words):
    with pytest.raises(ValueError, match=words):
        WeightStream(tmp_path / "weights", groups)


def test_checksums_are_those_of_the_standard():
    text = torch.frombuffer(bytearray(b"123456789"), dtype=torch.uint8)
    assert crc32c(text) == 0xE3069283
