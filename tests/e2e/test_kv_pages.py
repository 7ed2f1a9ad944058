"""Correction and rollback, on the pages themselves: the K/V of accepted positions is what dense decoding writes."""

import pytest

SAMPLING = {"max_tokens": 40, "ignore_eos": True}
BLOCK = 32
"""Small blocks, so that most accepted positions lie in full ones, and every pass crosses a block end."""
TOLERANCE = 2e-4
"""Largest difference over the largest value: a pass over many rows rounds fp32 sums in another order than one row."""
BATCH = 4
KERNEL = 8


@pytest.fixture(scope="module")
def plain(subject):
    return {"model": subject.model, "max_model_len": 512, "max_num_seqs": BATCH, "block_size": BLOCK}


def sparse(plain, **options):
    fixed = {"method": "sirius", "sparsity": "coarse", "kernel_size": KERNEL, "adaptive": False}
    return {**plain, "speculative_config": {**fixed, **options}}


def record(host, engine, prompts, sampling=SAMPLING):
    return host.probe(engine, "support.page_probes:record_pages", prompts=prompts, sampling=sampling)


def compare(host, engine, first, second):
    return host.probe(engine, "support.page_probes:compare_recorded", first=first["index"], second=second["index"])


@pytest.fixture(scope="module")
def prompts(subject):
    return subject.mixed_prompts(BATCH)


@pytest.fixture(scope="module")
def dense(host, plain, prompts):
    """What dense decoding answers and writes."""
    return record(host, plain, prompts)


@pytest.mark.parametrize("sparsity", ["coarse", "fine"])
def test_accepted_positions_hold_dense_kv_in_a_ragged_batch(host, plain, prompts, dense, sparsity):
    engine = sparse(plain, sparsity=sparsity)
    found = record(host, engine, prompts)
    assert found["token_ids"] == dense["token_ids"]
    assert found["steps"] < dense["steps"]
    result = compare(host, engine, dense, found)
    # The last pass of a request may emit a whole kernel.
    known = [len(prompt) + SAMPLING["max_tokens"] - KERNEL for prompt in prompts]
    assert result["blocks"] >= sum(length // BLOCK for length in known) > len(prompts)
    assert result["worst"] <= TOLERANCE * result["size"]
    # Once accepted, a position is never written again but for rounding.
    assert found["changed"] <= TOLERANCE * result["size"]


def test_threshold_drafts_are_rewritten_by_the_target(host, plain, prompts):
    """With every draft token accepted, pages that kept the draft's own K/V would be far from dense ones."""
    found = record(host, sparse(plain, threshold=0), prompts)
    # The dense engine reads the same text as a prompt and writes its K/V in one pass.
    texts = [prompt + tokens for prompt, tokens in zip(prompts, found["token_ids"], strict=True)]
    dense = record(host, plain, texts, {"max_tokens": 2, "ignore_eos": True})
    result = compare(host, plain, dense, found)
    assert result["blocks"] * BLOCK >= sum(found["lengths"]) - len(prompts) * BLOCK
    assert result["worst"] <= TOLERANCE * result["size"]
