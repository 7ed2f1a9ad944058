"""vLLM's schedule of draft lengths by batch size works with Sirius, a length of 0 included; so does a drawn draft."""

from collections import Counter

import pytest
from support.engine_host import EngineHost
from support.real_models import SMOL, model_path

SAMPLING = {"max_tokens": 16, "ignore_eos": True}
BASE = {"model": model_path(SMOL), "max_model_len": 512, "max_num_seqs": 4}
SCHEDULE = "num_speculative_tokens_per_batch_size"
SIRIUS = {"method": "sirius", "sparsity": "coarse", "kernel_size": 8, "adaptive": False}


def test_draft_length_follows_the_batch_size(host, subject):
    prompts, plain = subject.mixed_prompts(3), {**BASE, "model": subject.model}
    reference = host.generate(plain, prompts, SAMPLING).token_ids
    engine = {**plain, "speculative_config": {**SIRIUS, SCHEDULE: [[1, 1, 5], [2, 8, 0]]}}
    together = host.generate(engine, prompts, SAMPLING)
    assert together.token_ids == reference
    assert together.num_drafts == together.num_accepted_tokens == 0
    alone = host.generate(engine, prompts[:1], SAMPLING)
    assert alone.token_ids == reference[:1]
    assert 0 < alone.num_accepted_tokens <= alone.num_draft_tokens <= 5 * alone.num_drafts


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ([[2, 3, 1]], ["[[2, 3, 1]]", "must start at 1"]),
        ([[1, 4, 9]], ["drafts 9 tokens", "kernel_size=8", "kernel_size=10"]),
        ("all", ["'all'", "non-empty list"]),
        ([[1, 2]], ["[[1, 2]]", "3-item sequence"]),
    ],
)
def test_a_bad_schedule_is_refused(host_v1, schedule, words):
    answer = host_v1.probe_config({**BASE, "speculative_config": {**SIRIUS, SCHEDULE: schedule}})
    assert answer is not None
    assert all(word in answer for word in (SCHEDULE, *words)), answer


def test_drawn_drafts_are_refused_where_they_cannot_be_drawn(host_v1):
    answer = host_v1.probe_config({**BASE, "speculative_config": {**SIRIUS, "draft_sampling": "probabilistic"}})
    assert answer is not None
    assert "draft_sampling='probabilistic' on Model Runner V1" in answer


DRAWN = {**SIRIUS, "kernel_size": 3, "draft_sampling": "probabilistic"}


def test_greedy_requests_are_drafted_greedily_among_drawn_ones_v2(tiny_model):
    engine = {"model": tiny_model("llama"), "max_model_len": 64, "max_num_seqs": 4}
    prompts = [[5, 9, 17], [4, 8], [30, 31, 32]]
    sampling = [SAMPLING, {**SAMPLING, "temperature": 0.6, "seed": 1}, SAMPLING]
    with EngineHost(runner="v2") as host:
        reference = host.generate(engine, prompts, sampling)
        found = host.generate({**engine, "speculative_config": DRAWN}, prompts, sampling)
        again = host.generate({**engine, "speculative_config": DRAWN}, prompts, sampling)
    assert found.token_ids[::2] == reference.token_ids[::2]
    assert found.token_ids[1] != reference.token_ids[1]
    assert again.token_ids == found.token_ids
    assert 0 < found.num_accepted_tokens < found.num_draft_tokens


@pytest.mark.slow
def test_drawn_drafts_keep_the_targets_distribution_v2(tiny_model):
    """Frequencies of tokens that went through drafts are as close to plain decoding as another plain sample is."""
    engine = {"model": tiny_model("llama"), "max_model_len": 64, "max_num_seqs": 64}
    prompts = [[5, 9, 17]] * NUM_SAMPLES
    seeded = [
        [{"max_tokens": 3, "temperature": 0.6, "seed": first + i, "ignore_eos": True} for i in range(NUM_SAMPLES)]
        for first in (0, 5000, 10000)
    ]
    with EngineHost(runner="v2") as host:
        plain = [host.generate(engine, prompts, sampling).token_ids for sampling in seeded[:2]]
        drawn = host.generate({**engine, "speculative_config": DRAWN}, prompts, seeded[2])
    assert 0 < drawn.num_accepted_tokens < drawn.num_draft_tokens
    for place in range(3):
        assert distance(plain[0], drawn.token_ids, place) <= distance(*plain, place) + 0.08


NUM_SAMPLES = 256


def distance(one, other, place):
    """Total variation between the frequencies of the tokens at a place."""
    counts = [Counter(text[place] for text in texts) for texts in (one, other)]
    return sum(abs(counts[0][key] - counts[1][key]) for key in set(counts[0]) | set(counts[1])) / (2 * NUM_SAMPLES)
