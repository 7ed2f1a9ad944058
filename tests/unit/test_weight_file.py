"""The file of a target's weights: what is written is what is read, and nothing but a whole file is ever read."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from support.real_models import ROOT

from vllm_sirius.offload import weight_file
from vllm_sirius.offload.errors import OffloadError
from vllm_sirius.offload.folder import building
from vllm_sirius.offload.stream import PAGE, WeightStream
from vllm_sirius.offload.weight_file import HEAD, WeightFile, WeightFileWriter

pytestmark = pytest.mark.usefixtures("fresh_input")

MADE_OF = {"checkpoint": [["model.safetensors", 7, 8, "9"]]}


@pytest.fixture
def small_pieces(monkeypatch):
    """Tensors of many pieces."""
    monkeypatch.setattr(weight_file, "PIECE_BYTES", 2 * PAGE)


def files_in(folder):
    return sorted(file.name for file in folder.iterdir())


def matrices():
    """Groups of matrices of odd sizes."""
    shapes = [[(random.randint(1, 90), random.randint(1, 90)) for _ in range(3)] for _ in range(4)]
    return [
        {f"{i}.{j}": torch.randn(shape).bfloat16() for j, shape in enumerate(group)} for i, group in enumerate(shapes)
    ]


OTHERS = {
    "norm": torch.randn(33),
    "bytes": torch.randint(256, (3, 5, 7), dtype=torch.uint8),
    "scalar": torch.tensor(4, dtype=torch.int64),
    "empty": torch.empty(0, 4),
}


def write(path, groups, others=OTHERS):
    writer = WeightFileWriter(path, [{n: t.nbytes for n, t in group.items()} for group in groups], 1 << 20)
    tensors = [*(pair for group in groups for pair in group.items()), *others.items()]
    random.shuffle(tensors)
    for name, tensor in tensors:
        writer.write(name, tensor)
    assert not path.exists()
    writer.finish(MADE_OF)


@pytest.mark.usefixtures("small_pieces")
def test_tensors_come_back_one_by_one_and_as_a_stream(tmp_path):
    groups = matrices()
    path = tmp_path / "model.weights"
    write(path, groups)
    assert files_in(tmp_path) == ["model.weights"]
    assert path.stat().st_mode & 0o777 == 0o600
    file = WeightFile(path)
    assert file.made_of == MADE_OF
    assert file.groups == [list(group) for group in groups]
    assert file.num_bytes == path.stat().st_size
    for name, tensor in [*(pair for group in groups for pair in group.items()), *OTHERS.items()]:
        into = torch.empty_like(tensor)
        file.read(name, into)
        assert torch.equal(into, tensor), name
    stream = WeightStream(path, [file.group(number) for number in range(len(groups))])
    for number, group in enumerate(groups):
        start = 0
        for name, tensor in group.items():
            slot = stream.wait(number, start + tensor.nbytes)
            found = slot[start : start + tensor.nbytes].view(torch.bfloat16).view(tensor.shape)
            assert torch.equal(found, tensor)
            start += file.entries[name].num_bytes
        stream.release(number)


def test_a_file_without_its_first_page_is_none(tmp_path):
    path = tmp_path / "model.weights"
    write(path, matrices())
    with path.open("r+b") as file:
        file.write(b"\0" * HEAD.size)
    with pytest.raises(OffloadError, match="is no whole file"):
        WeightFile(path)


def test_another_format_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "model.weights"
    monkeypatch.setattr(weight_file, "VERSION", 2)
    write(path, matrices())
    monkeypatch.undo()
    with pytest.raises(OffloadError, match="has format 2, and this release reads format 1"):
        WeightFile(path)


def test_a_damaged_table_of_contents_is_refused(tmp_path):
    path = tmp_path / "model.weights"
    write(path, matrices())
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(OffloadError, match="table of contents is not what was written"):
        WeightFile(path)


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (1 << 62, 8), (PAGE, 1 << 62), (PAGE, 0)])
def test_a_damaged_head_is_refused(tmp_path, offset, size):
    """Whatever it says of the place of the table of contents."""
    path = tmp_path / "model.weights"
    write(path, matrices())
    with path.open("r+b") as file:
        file.write(HEAD.pack(weight_file.MAGIC, weight_file.VERSION, offset, size, 0))
    with pytest.raises(OffloadError, match="is damaged: its table of contents"):
        WeightFile(path)


def test_a_flipped_bit_of_a_tensor_is_found(tmp_path):
    path = tmp_path / "model.weights"
    write(path, matrices())
    file = WeightFile(path)
    with path.open("r+b") as opened:
        opened.seek(file.entries["norm"].offset + 5)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 4]))
    with pytest.raises(OffloadError, match=r"is damaged at byte \d+ \(checksum\)"):
        file.read("norm", torch.empty(33))


@pytest.mark.parametrize(
    ("name", "into", "words"),
    [
        ("norm", torch.empty(32), r"holds float32 \[33\]"),
        ("norm", torch.empty(33).bfloat16(), r"holds float32 \[33\]"),
        ("other", torch.empty(33), "holds none"),
    ],
)
def test_only_what_was_asked_for_is_read(tmp_path, name, into, words):
    path = tmp_path / "model.weights"
    write(path, matrices())
    with pytest.raises(OffloadError, match=words):
        WeightFile(path).read(name, into)


def test_a_writer_that_is_closed_leaves_nothing(tmp_path):
    writer = WeightFileWriter(tmp_path / "model.weights", [{"a": 12}], 0)
    writer.write("a", torch.ones(3))
    assert files_in(tmp_path)
    writer.close()
    writer.close()
    assert files_in(tmp_path) == []


def test_what_a_killed_writer_left_is_written_over(tmp_path):
    path = tmp_path / "model.weights"
    (tmp_path / ".model.weights.partial").write_bytes(b"half")
    write(path, matrices())
    assert files_in(tmp_path) == ["model.weights"]


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(
        OffloadError, match=r"takes 1000000\.00 GB, and .* has \d+\.\d\d GB free: free some, or set offload_path"
    ):
        WeightFileWriter(tmp_path / "model.weights", [{"a": 12}], 10**15)
    assert files_in(tmp_path) == []


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    with pytest.raises(OffloadError, match=r"cannot be written .*: set offload_path to a folder of yours"):
        WeightFileWriter(tmp_path / "missing" / "model.weights", [{"a": 12}], 0)


def test_an_engine_that_is_killed_while_it_builds_leaves_no_file_and_no_lock(tmp_path):
    path = tmp_path / "model.weights"
    script = (
        "import os, pathlib, signal, sys, torch\n"
        "from vllm_sirius.offload.folder import building\n"
        "from vllm_sirius.offload.weight_file import WeightFileWriter\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "with building(path):\n"
        "    writer = WeightFileWriter(path, [{'a': 12}], 0)\n"
        "    writer.write('a', torch.ones(3))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert ".model.weights.partial" in files_in(tmp_path)
    assert not path.exists()
    with building(path):
        write(path, matrices())
    assert [name for name in files_in(tmp_path) if not name.endswith(".lock")] == ["model.weights"]
