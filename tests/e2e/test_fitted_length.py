"""`max_model_len=-1`: vLLM fits the longest text to the KV cache after the runners are built; on both runners."""

import random

import pytest
from support.engine_host import EngineError
from support.tiny_models import build

BLOCK = 128
LONGEST = 2 * BLOCK
KV_BYTES_OF_A_BLOCK = 3 * 2 * 2 * 32 * 4 * BLOCK
SIRIUS = {
    "method": "sirius",
    "kernel_size": 16,
    "adaptive": False,
    "sparsity": "coarse",
    "draft_weights": "shared",
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """An engine whose cache has three blocks, one of them vLLM's null block, of a model that could read four of them."""
    path = str(build("llama", tmp_path_factory.getbasetemp().parent / "tiny-models"))

    def options(speculative=None):
        base = {
            "model": path,
            "max_model_len": -1,
            "kv_cache_memory_bytes": 3 * KV_BYTES_OF_A_BLOCK,
            "max_num_seqs": 4,
            "enable_prefix_caching": True,
        }
        return base if speculative is None else {**base, "speculative_config": speculative}

    return options


@pytest.fixture(scope="module")
def prompts():
    """Two short ones, which leave blocks behind in the rows they had, and one that ends 24 tokens before the longest text."""
    draw = random.Random(1)
    return [[draw.randrange(256) for _ in range(length)] for length in (20, 25, LONGEST - 24)]


def answers(host, options, prompts):
    """The long prompt's answers, the second one on what the prefix cache kept of the first."""
    host.generate(options, prompts[:2], {"max_tokens": 6, "ignore_eos": True})
    return [host.generate(options, prompts[2:], {"max_tokens": 400, "ignore_eos": True}) for _ in range(2)]


def test_texts_that_end_at_the_fitted_length_are_vllms(host, engine, prompts):
    reference = answers(host, engine(), prompts)
    found = answers(host, engine(SIRIUS), prompts)
    assert [len(one.token_ids[0]) for one in reference] == [24, 24]
    assert [one.token_ids for one in found] == [one.token_ids for one in reference]
    assert [one.completions[0].finish_reason for one in found] == ["length"] * 2
    assert all(one.num_accepted_tokens > 0 for one in found)


def test_a_draft_that_would_leave_its_blocks_is_an_error(host, engine, prompts):
    """A limit that is too long, as a stale copy would be; comes last, for the engine is of no use afterwards."""
    host.probe(engine(SIRIUS), "support.probes:pretend_longest_text", length=2 * LONGEST)
    with pytest.raises(EngineError, match=rf"K/V at position 2\d\d.*blocks for {LONGEST} tokens.*--max-model-len"):
        host.generate(engine(SIRIUS), prompts[2:], {"max_tokens": 400, "ignore_eos": True})
