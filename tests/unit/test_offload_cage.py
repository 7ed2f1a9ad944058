"""The comparison on a throttled disk, as far as it needs no engine: cages, files, tables."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.errors import BenchmarkError
from benchmarks.offload import arms, cage, groups, llama, page_cache, pin, random_model, report, run, setting
from benchmarks.offload.answering import AnsweringError
from benchmarks.offload.cage import Cage, Limits
from benchmarks.results import MEASURED, Record, Result

DISK = "254:0"


def system(tmp_path: Path, mounts: list[str], paths: list[str]) -> Path:
    """What the kernel tells about processes."""
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "mounts").write_text("".join(f"{line}\n" for line in mounts))
    (proc / "self" / "cgroup").write_text("".join(f"{line}\n" for line in paths))
    return proc


@pytest.fixture
def version_1(tmp_path):
    root = tmp_path / "cgroup"
    (root / "memory" / "mine").mkdir(parents=True)
    (root / "blkio").mkdir()
    mounts = [f"cgroup {root}/{name} cgroup rw,relatime,{name} 0 0" for name in ("memory", "blkio")]
    mounts.append(f"cgroup2 {root}/unified cgroup2 rw 0 0")
    return system(tmp_path, mounts, ["7:blkio:/", "4:memory:/mine", "0::/"]), root


@pytest.fixture
def version_2(tmp_path):
    root = tmp_path / "cgroup"
    (root / "user" / "mine").mkdir(parents=True)
    for folder in (root, root / "user"):
        (folder / "cgroup.controllers").write_text("cpu io memory\n")
    (root / "cgroup.subtree_control").write_text("cpu io memory\n")
    return system(tmp_path, [f"cgroup2 {root} cgroup2 rw 0 0"], ["0::/user/mine"]), root


class Layout:
    """Files that the kernel would put into a new group."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
        make, remove = Path.mkdir, Path.rmdir

        def mkdir(folder: Path, *arguments, **options) -> None:
            make(folder, *arguments, **options)
            if folder.name.startswith(cage.NAME):
                for name in names:
                    (folder / name).write_text("0\n")

        def rmdir(folder: Path) -> None:
            for file in folder.iterdir():
                file.unlink()
            remove(folder)

        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(Path, "rmdir", rmdir)


V1_FILES = [
    "cgroup.procs",
    "memory.limit_in_bytes",
    "memory.memsw.limit_in_bytes",
    "memory.max_usage_in_bytes",
    "memory.oom_control",
    "blkio.throttle.read_bps_device",
    "blkio.throttle.io_service_bytes",
]
V2_FILES = ["cgroup.procs", "memory.max", "memory.swap.max", "memory.peak", "memory.events", "io.max", "io.stat"]


def own(parent: Path) -> Path:
    return parent / f"{cage.NAME}-{os.getpid()}"


def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cage, "_processes", lambda folder: [])


def test_a_cage_of_version_1_has_a_group_for_each_controller(version_1, monkeypatch):
    proc, root = version_1
    Layout(monkeypatch, V1_FILES)
    without_processes(monkeypatch)
    memory, disk = own(root / "memory" / "mine"), own(root / "blkio")
    with Cage(Limits(3000, 500, DISK), proc) as made:
        assert (memory / "memory.limit_in_bytes").read_text() == "3000"
        assert (memory / "memory.memsw.limit_in_bytes").read_text() == "3000"
        assert (disk / "blkio.throttle.read_bps_device").read_text() == f"{DISK} 500"
        assert [f"{memory}/cgroup.procs", f"{disk}/cgroup.procs"] == made.prefix[-2:]
        (memory / "memory.max_usage_in_bytes").write_text("2900\n")
        (memory / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
        (disk / "blkio.throttle.io_service_bytes").write_text(f"{DISK} Read 77\n{DISK} Write 1\nTotal 78\n")
        found = made.report()
        assert (found.peak_bytes, found.read_bytes, found.oom_kills) == (2900, 77, 2)
    assert not memory.exists()
    assert not disk.exists()


def test_a_cage_of_version_2_is_one_group_beside_the_own_one(version_2, monkeypatch):
    proc, root = version_2
    Layout(monkeypatch, V2_FILES)
    without_processes(monkeypatch)
    folder = own(root)
    with Cage(Limits(3000, 500, DISK), proc) as made:
        assert (folder / "memory.max").read_text() == "3000"
        assert (folder / "memory.swap.max").read_text() == "0"
        assert (folder / "io.max").read_text() == f"{DISK} rbps=500"
        assert made.prefix[-2:] == ["1", f"{folder}/cgroup.procs"]
        (folder / "memory.peak").write_text("2900\n")
        (folder / "memory.events").write_text("max 4\noom 1\noom_kill 1\n")
        (folder / "io.stat").write_text(f"8:0 rbytes=5 wbytes=1\n{DISK} rbytes=77 wbytes=1\n")
        found = made.report()
        assert (found.peak_bytes, found.read_bytes, found.oom_kills) == (2900, 77, 1)
    assert not folder.exists()


def test_counting_reads_needs_no_bound(version_2, monkeypatch):
    proc, root = version_2
    Layout(monkeypatch, V2_FILES)
    without_processes(monkeypatch)
    with Cage(Limits(None, None, DISK), proc) as made:
        assert (own(root) / "io.max").read_text() == "0\n"
        assert made.read_bytes() == 0
        assert made.report().peak_bytes is None


def test_without_rights_the_message_names_what_is_missing(version_2, monkeypatch):
    proc, root = version_2
    (root / "cgroup.subtree_control").write_text("cpu\n")
    refused = Path.write_text

    def write_text(file: Path, text: str) -> int:
        if file.name == "cgroup.subtree_control":
            raise PermissionError(1, "Operation not permitted")
        return refused(file, text)

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(groups.GroupError, match=r"'memory'.*cpu io memory.*run as root"):
        Cage(Limits(3000), proc)


def test_a_group_that_cannot_be_made_leaves_nothing(version_1, monkeypatch):
    proc, root = version_1
    without_processes(monkeypatch)

    def mkdir(folder: Path, *arguments, **options) -> None:
        raise PermissionError(1, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(groups.GroupError, match="making control groups takes root"), Cage(Limits(3000), proc):
        pass
    assert not list((root / "memory" / "mine").iterdir())


def test_a_kernel_without_control_groups_is_said(tmp_path):
    with pytest.raises(groups.GroupError, match="none are mounted"):
        Cage(Limits(1), system(tmp_path, [], []))


def test_without_a_cage_only_the_user_goes_on(tmp_path, monkeypatch):
    given = argparse.Namespace(without_cage=False, throttle=setting.READER, gb_per_second=[1.0])

    def none(*_):
        raise groups.GroupError("no rights")

    monkeypatch.setattr(groups, "find_parent", none)
    with pytest.raises(BenchmarkError, match=r"no rights.*--without-cage"):
        setting._caged(given, 1000, tmp_path)
    given.without_cage = True
    assert setting._caged(given, 1000, tmp_path) == (None, "")
    given.throttle = setting.BLKIO
    with pytest.raises(BenchmarkError, match=r"--throttle reader"):
        setting._caged(given, 1000, tmp_path)


def test_partitions_stand_for_their_disk(tmp_path):
    number = tmp_path.stat().st_dev
    place = tmp_path / f"{os.major(number)}:{os.minor(number)}"
    with pytest.raises(groups.GroupError, match="on no block device"):
        cage.disk_of(tmp_path, tmp_path)
    disk = tmp_path / "disk"
    (disk / "part").mkdir(parents=True)
    (disk / "dev").write_text("8:0\n")
    place.symlink_to(disk / "part")
    assert cage.disk_of(tmp_path, tmp_path) == place.name
    (disk / "part" / "partition").write_text("1\n")
    assert cage.disk_of(tmp_path, tmp_path) == "8:0"


def test_what_is_not_mentioned_was_not_read():
    assert cage.parse_read_bytes("8:0 Read 5\nTotal 5\n", DISK) == 0
    assert cage.parse_read_bytes("254:0\n", DISK) == 0


def test_pages_of_a_file_are_dropped(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    with file.open("rb") as opened:
        assert page_cache.cached_bytes(opened.fileno()) in (0, 1 << 20)
    assert page_cache.drop([file]) in (0, 1 << 20)  # a file system in memory keeps them


def test_a_file_is_kept_in_memory(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(4096))
    with pin.pinned(file, []):
        pass
    with pytest.raises(AnsweringError, match="cannot be kept in memory"), pin.pinned(tmp_path / "none", []):
        pass


def test_answers_of_llama_cpp_count_passes():
    timings = {"draft_n": 12, "draft_n_accepted": 6}
    found = llama.as_answers({"tokens": list(range(10)), "timings": timings}, 2.0)
    assert (found.num_tokens, found.num_drafts, found.num_draft_tokens, found.num_accepted_tokens) == (10, 3, 12, 6)
    assert llama.as_answers({"tokens": [1, 2]}, 1.0).num_drafts == 0


def test_a_missing_peer_is_named(tmp_path):
    assert "--llama-cpp" in llama.LlamaFiles(None, tmp_path).missing()
    assert "llama-server" in llama.LlamaFiles(tmp_path, tmp_path).missing()


def test_a_random_model_is_written_tensor_by_tensor(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    sizes = random_model.Sizes(hidden=32, ffn=48, layers=2, heads=4, kv_heads=2, vocabulary=96)
    folder = tmp_path / "model"
    random_model.write_model(folder, tokenizer, sizes, shard_bytes=8000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {name for name, _ in sizes.tensors()}
    assert len(set(index["weight_map"].values())) > 1
    for name, shape in sizes.tensors():
        with safe_open(folder / index["weight_map"][name], "pt") as opened:
            tensor = opened.get_tensor(name)
        assert (tuple(tensor.shape), tensor.dtype) == (shape, torch.bfloat16)
        assert ("norm" in name) == bool((tensor == 1).all())
    assert random_model.has_random_weights(str(folder))
    with pytest.raises(BenchmarkError, match="there is a model already"):
        random_model.write_model(folder, tokenizer, sizes)


def record(arm: str, repeat: int, tokens: list[int], seconds: float, drafts: int = 0, accepted: int = 0) -> Record:
    details = {"gb_per_second": 1.0, "read_bytes": 10**9}
    return Record(
        arm, "gsm8k", 1, repeat, 0, len(tokens), seconds, [0], drafts, 0, accepted, token_ids=[tokens], details=details
    )


@pytest.fixture
def measured():
    sampling = {"max_tokens": 4, "slow_max_tokens": 2}
    facts = {
        "kind": "offload",
        "model": "m",
        "sampling": sampling,
        "repeats": 2,
        "rates": [1.0],
        "cores": 2,
        "cpu": "c",
    }
    cage_ = {"memory_bytes": 3 * 10**9, "weight_bytes": 10**9, "bound": "b", "throttle": "bounded"}
    facts |= {"cage": cage_, "disk_bytes_per_second": {"1": 1e9}, "vllm": "v", "commit": "k", "date": "2026-01-01"}
    names = (arms.OURS, arms.OFF, "llama-draft@4", "llama-draft@8", arms.ALONE)
    states = {
        name: {"rates": {"1": {"status": MEASURED, "peak_bytes": 2 * 10**9}}, "status": MEASURED} for name in names
    }
    states[arms.ALONE]["rates"]["1"]["status"] = "out of memory: the kernel ended it"
    records = [record(arms.OFF, repeat, [1, 2], 4.0) for repeat in (0, 1)]
    records += [record(arms.OURS, repeat, [1, 2, 3, 4], 1.0, 1, 3) for repeat in (0, 1)]
    records += [record("llama-draft@4", 0, [1, 9, 3], 2.0, 1, 1), record("llama-draft@8", 0, [1, 2, 3], 1.5, 1, 1)]
    return Result(facts, states, records)


def test_the_table_compares_with_the_same_engine_without_drafts(measured):
    found = {line.arm: line for line in report.lines(measured, 1.0)}
    assert found[arms.OURS].speed[1] == 4.0
    assert found[arms.OURS].ratio == 8.0
    assert found[arms.OURS].tokens_per_pass == 4.0
    assert found[arms.OURS].read_per_token == 0.25e9
    assert (found[arms.OURS].same, found[arms.OURS].compared) == (2, 2)
    assert (found["llama-draft@4"].same, found["llama-draft@4"].compared) == (0, 1)
    text = report.report(measured)
    assert "llama-draft@8 (best)" in text
    assert "vllm: out of memory" in text
    assert "8.00x" in text


def test_the_speed_model_stands_beside_what_was_measured(measured):
    """1 GB at 1 GB/s and 6 draft tokens of .1 s for 4 tokens that took a second, twice."""
    assert report.formula(measured, 1.0) is None
    measured.arms[arms.OURS]["rates"]["1"]["draft_seconds"] = 0.1
    measured.records = [replace(r, num_draft_tokens=6) if r.arm == arms.OURS else r for r in measured.records]
    assert report.formula(measured, 1.0) == pytest.approx((2.5, 4.0))
    assert "2.5 tokens/s, measured 4" in report.report(measured)


def test_an_arm_that_is_to_draft_must_have_drafted(measured):
    drafting = arms.Arm("llama-draft@4", "", lambda prefix, log: None, [], drafts=True)
    assert not run.has_drafted(drafting, 1.0, measured)
    measured.records = [replace(r, num_draft_tokens=4) for r in measured.records]
    assert run.has_drafted(drafting, 1.0, measured)
    assert not run.has_drafted(drafting, 2.0, measured)


def test_llama_is_told_to_draft(tmp_path):
    """Its release drafts nothing with a draft model alone."""
    files = llama.LlamaFiles(tmp_path, tmp_path)
    command = files.command(512, 2, 16)
    assert command[command.index("--spec-type") + 1] == "draft-simple"
    assert command[command.index("--spec-draft-n-max") + 1] == "16"
    assert "--spec-type" not in files.command(512, 2, 0)


def test_random_weights_have_no_speed_up(measured):
    measured.provenance["random_weights"] = True
    assert {line.ratio for line in report.lines(measured, 1.0)} == {None}


def test_unknown_arms_are_refused(tmp_path):
    sizes = arms.Sizes("m", 512, 1, 1, 1, 1.0)
    files = llama.LlamaFiles(None, tmp_path)
    with pytest.raises(BenchmarkError, match="no such arm"):
        arms.choose(["nothing"], sizes, {}, tmp_path, files, [4])
    chosen = arms.choose(arms.NAMES, sizes, {"method": "sirius"}, tmp_path, files, [4, 8])
    assert [arm.name for arm in chosen if arm.drafts] == [arms.OURS, "llama-draft@4", "llama-draft@8"]
