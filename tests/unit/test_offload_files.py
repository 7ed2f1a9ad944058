"""The folder of the files: names, locks, what the command lists and removes."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from vllm_sirius.cli import main
from vllm_sirius.offload import folder as offload_folder
from vllm_sirius.offload.errors import OffloadError


def test_a_model_has_one_file_whatever_its_checkpoint_holds(tmp_path):
    model = tmp_path / "some-model"
    model.mkdir()
    first = offload_folder.file_of(tmp_path, str(model), "None")
    assert first.name.startswith("some-model-")
    (model / "model.safetensors").write_bytes(b"other")
    assert offload_folder.file_of(tmp_path, str(model), "None") == first
    assert offload_folder.file_of(tmp_path, f"{model}/", "None") == first
    assert offload_folder.file_of(tmp_path, str(model), "main") != first
    assert offload_folder.file_of(tmp_path, "some/some-model", "None") != first


@pytest.mark.parametrize("change", ["size", "time", "header"])
def test_a_changed_checkpoint_is_another_one(tmp_path, change):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"header" + bytes(100))
    before = offload_folder.identify([file])
    assert offload_folder.identify([file]) == before
    times = file.stat()
    if change == "size":
        file.write_bytes(b"header" + bytes(101))
    elif change == "header":
        file.write_bytes(b"hEader" + bytes(100))
    if change != "time":
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    else:
        os.utime(file)
    assert offload_folder.identify([file]) != before


def test_the_default_folder_lies_beside_the_kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path))
    assert offload_folder.offload_folder(None) == tmp_path / "offload"
    assert offload_folder.offload_folder("/elsewhere/x") == Path("/elsewhere/x")


def test_two_engines_do_not_build_at_once(tmp_path):
    path, order = tmp_path / "model.weights", []

    def build():
        with offload_folder.building(path):
            order.append("second")

    with offload_folder.building(path):
        waiting = threading.Thread(target=build)
        waiting.start()
        waiting.join(0.2)
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OffloadError, match=r"offload_path='.*file/folder' cannot be made"):
        offload_folder.prepare(tmp_path / "file" / "folder")


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a-1.weights").write_bytes(bytes(1000))
    (tmp_path / "b-2.weights").write_bytes(bytes(2000))
    (tmp_path / ".c-3.weights.partial").write_bytes(bytes(3000))
    (tmp_path / "other.txt").touch()
    return tmp_path


def run(capsys, *arguments):
    status = main(["offload", *arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_files_are_listed(files, capsys):
    held = offload_folder.hold(files / "a-1.weights")
    status, printed, _ = run(capsys, "ls", "--offload-path", str(files), "--json")
    assert status == 0
    assert [(Path(f["path"]).name, f["bytes"], f["state"]) for f in json.loads(printed)] == [
        ("a-1.weights", 1000, "used"),
        ("b-2.weights", 2000, "free"),
        (".c-3.weights.partial", 3000, "unfinished"),
    ]
    os.close(held)
    assert "free        " in run(capsys, "ls", "--offload-path", str(files))[1]


def test_an_empty_or_missing_folder_says_so(tmp_path, capsys):
    assert run(capsys, "ls", "--offload-path", str(tmp_path / "none")) == (0, f"no files in {tmp_path / 'none'}\n", "")


def test_what_an_engine_uses_stays(files, capsys):
    held = offload_folder.hold(files / "a-1.weights")
    status, _, said = run(capsys, "rm", "a-1.weights", "b-2.weights", "--offload-path", str(files))
    assert status == 1
    assert "a-1.weights is used by an engine: stop the engine first" in said
    assert (files / "b-2.weights").exists()
    assert run(capsys, "rm", "all", "--offload-path", str(files))[0] == 0
    os.close(held)
    assert sorted(path.name for path in files.iterdir()) == ["a-1.weights", "other.txt"]


def test_what_an_engine_builds_or_starts_with_stays(files, capsys):
    """`ls` and `rm` come while another process holds the lock of a build."""
    partial = files / ".c-3.weights.partial"
    partial.write_bytes(b"half")
    with offload_folder.building(files / "c-3.weights"), offload_folder.building(files / "a-1.weights"):
        assert run(capsys, "rm", "all", "--offload-path", str(files))[0] == 0
        assert partial.exists()
        assert (files / "a-1.weights").exists()
        assert offload_folder.lock_of(files / "c-3.weights").exists()
        status, _, said = run(capsys, "rm", "a-1.weights", "--offload-path", str(files))
        assert status == 1
        assert "is used by an engine" in said
    assert run(capsys, "rm", "all", "--offload-path", str(files))[0] == 0
    assert [path.name for path in files.iterdir()] == ["other.txt"]


def test_a_path_elsewhere_is_not_taken_for_the_same_name_here(files, capsys, tmp_path):
    status, _, said = run(capsys, "rm", str(tmp_path / "elsewhere" / "b-2.weights"), "--offload-path", str(files))
    assert status == 1
    assert f"is not in {files}: give its folder with --offload-path" in said
    assert (files / "b-2.weights").exists()


def test_files_are_removed_by_name(files, capsys):
    assert run(capsys, "rm", str(files / "b-2.weights"), "--offload-path", str(files))[0] == 0
    assert not (files / "b-2.weights").exists()
    status, _, said = run(capsys, "rm", "b-2.weights", "--offload-path", str(files))
    assert status == 1
    assert "there is no file 'b-2.weights' in" in said
    assert "which has a-1.weights" in said
