"""Correction and rollback, on the pages themselves: the K/V of accepted positions is what dense decoding writes (v1)."""

import pytest
from support.real_models import SMOL, mixed_prompts, model_path

SAMPLING = {"max_tokens": 100, "ignore_eos": True}
BLOCK = 32
"""Small blocks, so that most accepted positions lie in full ones, and every pass crosses a block end."""
TOLERANCE = 2e-4
"""Largest difference over the largest value: a pass over many rows rounds fp32 sums in another order than one row."""


@pytest.mark.parametrize("sparsity", ["coarse", "fine"])
def test_accepted_positions_hold_dense_kv_in_a_ragged_batch_v1(host, sparsity):
    prompts = mixed_prompts(SMOL, 6)
    plain = {"model": model_path(SMOL), "max_model_len": 512, "max_num_seqs": 6, "block_size": BLOCK}
    sparse = {
        **plain,
        "speculative_config": {"method": "sirius", "acceptance": "lossless", "kernel_size": 8, "sparsity": sparsity},
    }
    first = _record(host, plain, prompts)
    second = _record(host, sparse, prompts)
    assert second["token_ids"] == first["token_ids"]
    assert second["steps"] < first["steps"]
    result = host.probe(sparse, "support.probes:compare_recorded", first=-2, second=-1)
    assert result["blocks"] * BLOCK > 6 * 50
    assert result["worst"] <= TOLERANCE * result["size"]
    # Once accepted, a position is never written again but for rounding.
    assert second["changed"] <= TOLERANCE * result["size"]


def test_threshold_drafts_are_rewritten_by_the_target_v1(host):
    """With every draft token accepted, pages that kept the draft's own K/V would be far from dense ones."""
    prompts = mixed_prompts(SMOL, 4)
    plain = {"model": model_path(SMOL), "max_model_len": 512, "max_num_seqs": 4, "block_size": BLOCK}
    sparse = {**plain, "speculative_config": {"method": "sirius", "threshold": 0, "kernel_size": 8, "adaptive": False}}
    found = _record(host, sparse, prompts)
    # The dense engine reads the same text as a prompt and writes its K/V in one pass.
    texts = [prompt + tokens for prompt, tokens in zip(prompts, found["token_ids"], strict=True)]
    _record(host, plain, texts, {"max_tokens": 2, "ignore_eos": True})
    result = host.probe(plain, "support.probes:compare_recorded", first=-2, second=-1)
    assert result["blocks"] * BLOCK >= sum(found["lengths"]) - len(prompts) * BLOCK
    assert result["worst"] <= TOLERANCE * result["size"]


def _record(host, engine, prompts, sampling=SAMPLING):
    return host.probe(engine, "support.probes:record_pages", prompts=prompts, sampling=sampling)
