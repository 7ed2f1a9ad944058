"""The default path is lossless: token-identical to vLLM without the plugin, fp32, on both model runners.

What users get who only name the method: int4 copies, adaptive lengths and, on Model Runner V1, prompt lookup. On SmolLM2
there, on a tiny model on V2.
"""

import pytest
from support.lossless import check_identical, generate_by_default
from support.real_models import SMOL
from support.runners import only_v1, v2_is_slow

SAMPLING = {"max_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(subject):
    return {
        "model": subject.model,
        "max_model_len": subject.max_model_len,
        "max_num_seqs": 4,
        "enable_prefix_caching": True,
    }


@pytest.fixture(scope="module")
def ragged(subject):
    """More prompts than an engine takes at a time, of different lengths, each with its own sampling parameters."""
    seeded = {**SAMPLING, "temperature": 0.8, "top_p": 0.95, "seed": 11}
    sampling = [SAMPLING, seeded, SAMPLING, {**SAMPLING, "max_tokens": 9}, {**seeded, "seed": 12}, SAMPLING, SAMPLING]
    return subject.mixed_prompts(len(sampling)), sampling


@pytest.fixture(scope="module")
def sharing(subject):
    """Prompts with a beginning in common."""
    prompts = subject.mixed_prompts(6)
    long = max(prompts, key=len)
    return [long + tail for tail in ([], prompts[0], prompts[1])]


@pytest.fixture(scope="module")
def reference(host, engine, ragged, sharing):
    """What vLLM alone answers, all of it before the engine with Sirius is built."""
    return [host.generate(engine, *ragged).token_ids, host.generate(engine, sharing, SAMPLING).token_ids]


def test_a_ragged_queue_is_token_identical(host, engine, reference, ragged):
    """Greedy and seeded requests side by side."""
    found = generate_by_default(host, engine, *ragged)
    assert found.token_ids == reference[0]
    assert found.num_accepted_tokens < found.num_draft_tokens


def test_prefix_cache_hits_are_token_identical(host, engine, reference, sharing):
    runs = [generate_by_default(host, engine, sharing, SAMPLING) for _ in range(2)]
    assert runs[0].token_ids == runs[1].token_ids == reference[1]
    engine = {**engine, "speculative_config": {"method": "sirius"}}
    assert host.probe(engine, "support.probes:prefix_cache_hits") > 0


@v2_is_slow
@pytest.mark.parametrize("kernel_size", [2, pytest.param(3, marks=pytest.mark.slow), 40])
def test_any_kernel_size_is_token_identical(host, kernel_size):
    check_identical(host, SMOL, 8, {"kernel_size": kernel_size}, num_prompts=3)


@v2_is_slow
def test_chunked_prefill_is_token_identical(host):
    """Also chunks smaller than what four whole drafts need."""
    check_identical(host, SMOL, 4, None, num_prompts=4, max_num_batched_tokens=48)


@only_v1
def test_compiled_engines_are_token_identical(host, tiny_model):
    """With eager vLLM, so that compiling is part of what is checked; a tiny model, which compiles in seconds."""
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8] * 9, [1, 6, 1, 8, 0, 3, 3, 9, 8]]
    sampling = [SAMPLING, SAMPLING, {**SAMPLING, "temperature": 0.8, "seed": 5}]
    base = {"model": tiny_model("llama"), "max_model_len": 128, "max_num_seqs": 2}
    expected = host.generate(base, prompts, sampling).token_ids
    compiled = {**base, "enforce_eager": False}
    assert generate_by_default(host, compiled, prompts, sampling).token_ids == expected
    report = host.probe(
        {**compiled, "speculative_config": {"method": "sirius"}}, "support.probes:compiled_draft_report"
    )
    assert report["compiled"]


def test_preemption_is_token_identical(host, subject):
    prompts = subject.mixed_prompts(4)
    sampling = {"max_tokens": 48, "ignore_eos": True}
    base = {"model": subject.model, "max_model_len": 384, "max_num_seqs": 4, "block_size": 32}
    expected = host.generate(base, prompts, sampling).token_ids
    tight = {**base, "num_gpu_blocks_override": 13}
    assert generate_by_default(host, tight, prompts, sampling).token_ids == expected
    engine = {**tight, "speculative_config": {"method": "sirius"}}
    assert host.probe(engine, "support.probes:num_preemptions") > 0
    # Requests that finish in a step are forgotten at the next one.
    host.generate(engine, prompts[:1], {"max_tokens": 2})
    assert host.probe(engine, "support.probes:draft_report")["requests"] <= 1
