"""Lossless and greedy: token-identical to vLLM without the plugin, fp32, mixed lengths, on both model runners."""

import pytest
from support.lossless import check_identical, sirius
from support.real_models import SMOL, mixed_prompts, model_path
from support.runners import only_v1, v2_is_slow


@pytest.mark.parametrize("sparsity", ["coarse", "fine"])
def test_smollm2_is_token_identical_in_batches_of_four(host, sparsity):
    check_identical(host, SMOL, 4, {"sparsity": sparsity}, num_prompts=6)


@v2_is_slow
@pytest.mark.parametrize("kernel_size", [2, pytest.param(3, marks=pytest.mark.slow), 16, 40])
def test_any_kernel_size_is_token_identical(host, kernel_size):
    check_identical(host, SMOL, 8, {"kernel_size": kernel_size}, num_prompts=3)


@only_v1
@pytest.mark.slow
def test_compiled_target_is_token_identical(host):
    check_identical(host, SMOL, 8, {}, num_prompts=8, enforce_eager=False)


@v2_is_slow
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
