"""Lossless and greedy: token-identical to vLLM without the plugin, fp32, mixed lengths, on both model runners."""

import pytest
from support.real_models import QWEN_SMALL, SMOL, mixed_prompts, model_path
from support.runners import only_v1

MAX_TOKENS = 24


def sirius(**options):
    return {
        "method": "sirius",
        "acceptance": "lossless",
        "kernel_size": 8,
        "adaptive": False,
        "draft_weights": "shared",
        **options,
    }


def check_identical(host, name, batch, options, num_prompts, **engine):
    prompts = mixed_prompts(name, num_prompts)
    sampling = {"max_tokens": MAX_TOKENS, "ignore_eos": True}
    base = {"model": model_path(name), "max_model_len": 1024, "max_num_seqs": batch, **engine}
    key = (host.runner, name, num_prompts, tuple(sorted(engine.items())))
    if key not in check_identical.references:
        check_identical.references[key] = host.generate({**base, "max_num_seqs": 8}, prompts, sampling).token_ids
    found = host.generate({**base, "speculative_config": sirius(**options)}, prompts, sampling)
    assert found.token_ids == check_identical.references[key]
    assert found.num_drafts > 0
    assert 0 < found.num_accepted_tokens < found.num_draft_tokens


check_identical.references = {}

GRID = [
    pytest.param(sparsity, density, batch, id=f"{sparsity}-{density}-batch{batch}")
    for sparsity in ("coarse", "fine")
    for density in (0.3, 0.5)
    for batch in (1, 8)
]


@only_v1
@pytest.mark.parametrize(("sparsity", "density", "batch"), GRID)
def test_smollm2_is_token_identical(host, sparsity, density, batch):
    check_identical(host, SMOL, batch, {"sparsity": sparsity, "density": density}, num_prompts=24)


@pytest.mark.parametrize("sparsity", ["coarse", "fine"])
def test_smollm2_is_token_identical_in_batches_of_four(host, sparsity):
    check_identical(host, SMOL, 4, {"sparsity": sparsity}, num_prompts=6)


@only_v1
@pytest.mark.slow
@pytest.mark.parametrize(("sparsity", "density", "batch"), GRID)
def test_qwen_is_token_identical(host, sparsity, density, batch):
    check_identical(host, QWEN_SMALL, batch, {"sparsity": sparsity, "density": density}, num_prompts=24)


@only_v1
def test_qwen_is_token_identical_in_short(host):
    check_identical(host, QWEN_SMALL, 8, {}, num_prompts=8)


@pytest.mark.parametrize("kernel_size", [2, 3, 16, 40])
def test_any_kernel_size_is_token_identical(host, kernel_size):
    check_identical(host, SMOL, 8, {"kernel_size": kernel_size}, num_prompts=3)


@only_v1
@pytest.mark.slow
def test_compiled_target_is_token_identical(host):
    check_identical(host, SMOL, 8, {}, num_prompts=8, enforce_eager=False)


def test_chunked_prefill_is_token_identical(host):
    check_identical(host, SMOL, 4, {}, num_prompts=4, max_num_batched_tokens=48)


def test_prefix_cache_hits_are_token_identical(host):
    prompts = mixed_prompts(SMOL, 6)
    long = max(prompts, key=len)
    prompts = [long + tail for tail in ([], prompts[0], prompts[1])]
    sampling = {"max_tokens": 24, "ignore_eos": True}
    base = {"model": model_path(SMOL), "max_model_len": 1024, "max_num_seqs": 4, "enable_prefix_caching": True}
    reference = host.generate(base, prompts, sampling).token_ids
    engine = {**base, "speculative_config": sirius()}
    cold = host.generate(engine, prompts, sampling)
    warm = host.generate(engine, prompts, sampling)
    assert cold.token_ids == warm.token_ids == reference
    assert host.probe(engine, "support.probes:prefix_cache_hits") > 0
    assert warm.num_accepted_tokens > 0


def test_preemption_is_token_identical(host):
    prompts = mixed_prompts(SMOL, 4)
    sampling = {"max_tokens": 48, "ignore_eos": True}
    base = {"model": model_path(SMOL), "max_model_len": 384, "max_num_seqs": 4, "block_size": 32}
    reference = host.generate(base, prompts, sampling).token_ids
    tight = {**base, "num_gpu_blocks_override": 13, "speculative_config": sirius()}
    found = host.generate(tight, prompts, sampling)
    assert found.token_ids == reference
    assert found.num_accepted_tokens > 0
    assert host.probe(tight, "support.probes:num_preemptions") > 0
    # Requests that finish in a step are forgotten at the next one.
    host.generate(tight, prompts[:1], {"max_tokens": 2})
    assert host.probe(tight, "support.probes:draft_report")["requests"] <= 1
