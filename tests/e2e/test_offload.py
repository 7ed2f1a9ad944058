"""A target whose weights are on a disk: the same answers, and nothing else where the file cannot be trusted (runner v1)."""

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.engine_host import EngineError, EngineHost
from support.real_models import SMOL, mixed_prompts, model_path

from vllm_sirius.kernels.cpu.panel_linear import has_panels
from vllm_sirius.offload.weight_file import WeightFile

pytestmark = pytest.mark.skipif(
    not has_panels(), reason="weights are streamed in the form of a kernel that needs AVX-512"
)

GREEDY = {"max_tokens": 24, "ignore_eos": True}
SEEDED = {**GREEDY, "temperature": 0.8, "seed": 7}
SAMPLING = [GREEDY, SEEDED, {**GREEDY, "max_tokens": 3}, SEEDED, GREEDY]
BUDGET = 0.18
"""GB: the copies of SmolLM2, its head, two layers to read into and a few to keep."""
LEAST = 0.1
"""GB: everything is streamed, the head included."""


@pytest.fixture(scope="module")
def host():
    with EngineHost() as made:
        yield made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """SmolLM2 in a folder of its own, whose files tests may touch."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    shutil.copytree(model_path(SMOL), folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(scope="module")
def engine(checkpoint, files):
    def made(**options):
        sirius = {"method": "sirius", "offload": "disk", "offload_budget_gb": BUDGET, "offload_path": str(files)}
        base = {"model": str(checkpoint), "max_model_len": 512, "max_num_seqs": 4, "dtype": "bfloat16"}
        return {**base, "speculative_config": {**sirius, **options}}

    return made


@pytest.fixture(scope="module")
def prompts():
    return mixed_prompts(SMOL, len(SAMPLING))


@pytest.fixture(scope="module")
def reference(host, checkpoint, prompts):
    """Answers with all weights in memory, on the same kernel."""
    engine = {"model": str(checkpoint), "max_model_len": 512, "max_num_seqs": 4, "dtype": "bfloat16"}
    engine["speculative_config"] = {"method": "sirius", "target_kernels": "sirius"}
    return host.generate(engine, prompts, SAMPLING).token_ids


def test_answers_are_those_of_weights_in_memory(host, engine, reference, prompts, files):
    """The start that builds the file; its draft lengths are the default ones."""
    found = host.generate(engine(), prompts, SAMPLING)
    assert found.token_ids == reference
    assert found.num_accepted_tokens > 0
    report = host.probe(engine(), "support.probes:streamed_report")
    assert 20 < len(report["streamed"]) < report["groups"] == 30
    assert report["memory"] <= BUDGET * 1e9
    assert report["said"]["passes"] == report["rounds"]
    # A prompt's first token is not drafted for, and counts as well.
    assert report["said"]["tokens"] == sum(map(len, found.token_ids))
    assert report["rounds"] >= found.num_drafts / len(prompts)
    assert report["weights"] + report["buffers"] < BUDGET * 1e9 - 7e7  # the draft's copies
    assert [path.suffix for path in files.iterdir() if not path.name.startswith(".")] == [".weights"]


def test_a_second_start_reads_no_checkpoint(host, engine, reference, prompts, checkpoint):
    """Nor does another budget, here so small that the head is streamed as well: weights that nobody reads may be anything."""
    weights = checkpoint / "model.safetensors"
    kept = weights.with_name("kept")
    shutil.copy2(weights, kept)
    times = weights.stat()
    with weights.open("r+b") as file:
        file.seek(1 << 20)
        file.write(os.urandom(1 << 20))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    more = engine(offload_budget_gb=LEAST, kernel_size=8, offload_buffers=3)
    try:
        assert host.generate(more, prompts, SAMPLING).token_ids == reference
    finally:
        shutil.move(kept, weights)
    report = host.probe(more, "support.probes:streamed_report")
    assert len(report["streamed"]) > report["groups"]


def test_a_refused_checkpoint_leaves_nothing_behind(engine, checkpoint, tmp_path):
    """Its weights are judged after all of them were written."""
    folder, files = tmp_path / "model", tmp_path / "files"
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with EngineHost() as host, pytest.raises(EngineError, match="not finite"):
        host.generate({**engine(offload_path=str(files)), "model": str(folder)}, [[1, 2, 3]], GREEDY)
    assert [path.name for path in files.iterdir() if not path.name.endswith(".lock")] == []


def test_drafts_of_eight_bits_are_restored_too(host, engine, reference, prompts, tmp_path):
    """The second start reads the copies that the first one made, and accepts as many."""
    accepted = []
    for budget in (0.3, 0.28):
        options = {"draft_weights": "int8", "offload_budget_gb": budget, "offload_path": str(tmp_path)}
        found = host.generate(engine(kernel_size=16, adaptive=False, **options), prompts, SAMPLING)
        assert found.token_ids == reference
        accepted.append(found.num_accepted_tokens / found.num_draft_tokens)
    assert accepted[0] == accepted[1] > 0
    report = host.probe(engine(kernel_size=16, adaptive=False, **options), "support.probes:streamed_report")
    assert 0 < len(report["streamed"]) < report["groups"]


def test_new_weights_are_refused_while_the_old_ones_are_read(host, engine, checkpoint):
    with pytest.raises(EngineError, match="reload_weights with offload='disk'"):
        host.probe(engine(), "support.copies:reload", path=str(checkpoint))


def test_a_changed_checkpoint_is_read_anew(host, engine, reference, prompts, checkpoint, files):
    (path,) = files.glob("*.weights")
    built = path.stat().st_mtime_ns
    os.utime(checkpoint / "model.safetensors")
    assert host.generate(engine(kernel_size=9), prompts, SAMPLING).token_ids == reference
    assert path.stat().st_mtime_ns > built


@pytest.mark.parametrize("part", ["streamed", "kept"])
def test_a_flipped_bit_is_an_error_and_never_a_token(engine, prompts, files, part):
    """Found when the weights are read first: those that are streamed in the self-test, those that are kept before it."""
    (path,) = files.glob("*.weights")
    file = WeightFile(path)
    name = file.groups[-1][-1] if part == "streamed" else "draft.head"
    offset = file.entries[name].offset + 12345
    with EngineHost() as host, Path(path).open("r+b") as opened:
        before = os.pread(opened.fileno(), 1, offset)
        os.pwrite(opened.fileno(), bytes([before[0] ^ 64]), offset)
        try:
            with pytest.raises(EngineError, match=r"is damaged at byte \d+ \(checksum\).*vllm-sirius offload rm"):
                host.generate(engine(), prompts, SAMPLING)
        finally:
            os.pwrite(opened.fileno(), before, offset)


def test_a_file_that_is_written_to_under_an_engine_ends_it(engine, reference, prompts, files):
    (path,) = files.glob("*.weights")
    with EngineHost() as host:
        assert host.generate(engine(), prompts, SAMPLING).token_ids == reference
        path.touch()
        with pytest.raises(EngineError, match="was changed while it was being read"):
            host.generate(engine(), prompts, SAMPLING)


@pytest.mark.parametrize(
    ("options", "engine_options", "words"),
    [
        (
            {"offload_budget_gb": 0.05},
            {},
            r"offload_budget_gb=0\.05 is too little for this model: .* give at least 0\.1",
        ),
        (
            {},
            {"dtype": "float32"},
            "offload='disk' streams weights in the form of Sirius's kernel, which cannot be used",
        ),
        ({"offload_path": "/proc/nowhere"}, {}, "offload_path='/proc/nowhere' cannot be made"),
        ({}, {"load_format": "dummy"}, "load_format='dummy' with offload='disk'"),
    ],
    ids=["budget", "float32", "folder", "dummy"],
)
def test_what_cannot_be_is_refused(host, engine, options, engine_options, words):
    with pytest.raises(EngineError, match=words):
        host.generate({**engine(**options), **engine_options}, [[1, 2]], GREEDY)


def test_compiled_engines_stream_too(host, tiny_model, tmp_path):
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8] * 9]
    base = {"model": tiny_model("llama"), "max_model_len": 128, "max_num_seqs": 2, "dtype": "bfloat16"}
    base["speculative_config"] = {"method": "sirius", "target_kernels": "sirius"}
    expected = host.generate({**base, "enforce_eager": False}, prompts, GREEDY).token_ids
    offload = {"method": "sirius", "offload": "disk", "offload_path": str(tmp_path), "offload_budget_gb": 0.0006}
    compiled = {**base, "enforce_eager": False, "speculative_config": offload}
    assert host.generate(compiled, prompts, GREEDY).token_ids == expected
    report = host.probe(compiled, "support.probes:streamed_report")
    assert report["streamed"]
    assert report["rounds"] > 0


@pytest.mark.slow
def test_model_runner_v2_streams_too(tiny_model, tmp_path):
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8] * 9]
    base = {"model": tiny_model("llama"), "max_model_len": 128, "max_num_seqs": 2, "dtype": "bfloat16"}
    memory = {**base, "speculative_config": {"method": "sirius", "target_kernels": "sirius"}}
    offload = {"method": "sirius", "offload": "disk", "offload_path": str(tmp_path), "offload_budget_gb": 0.0006}
    with EngineHost(runner="v2") as host:
        expected = host.generate(memory, prompts, GREEDY).token_ids
        streaming = {**base, "speculative_config": offload}
        assert host.generate(streaming, prompts, GREEDY).token_ids == expected
        assert host.probe(streaming, "support.probes:streamed_report")["rounds"] > 0
