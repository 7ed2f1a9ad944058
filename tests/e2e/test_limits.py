"""The edges: everything accepted, block ends, the longest text, the last token, per-request switches (runner v1)."""

import pytest
from support.engine_host import EngineError
from support.real_models import GEMMA, QWEN_SMALL, SMOL, chat_prompts, mixed_prompts, model_path

KERNEL = 8


def engine(name=SMOL, options=None, **given):
    base = {"model": model_path(name), "max_model_len": 1024, "max_num_seqs": 8, **given}
    if options is not None:
        base["speculative_config"] = {"method": "sirius", "kernel_size": KERNEL, "adaptive": False, **options}
    return base


@pytest.mark.parametrize("name", [SMOL, QWEN_SMALL, GEMMA], ids=lambda name: f"v1-{name}")
@pytest.mark.parametrize("threshold", [0, -1.0])
def test_threshold_of_zero_accepts_every_draft(host, name, threshold):
    sampling = {"max_tokens": 1 + 4 * KERNEL, "ignore_eos": True}
    found = host.generate(engine(name, {"threshold": threshold}), mixed_prompts(name, 4), sampling)
    assert found.acceptance_length == KERNEL
    assert found.num_drafts == 4 * 4


@pytest.mark.parametrize("sparsity", ["coarse", "fine"])
def test_density_of_one_accepts_every_draft_v1(host, sparsity):
    sampling = {"max_tokens": 1 + 4 * KERNEL, "ignore_eos": True}
    options = {"density": 1.0, "sparsity": sparsity, "acceptance": "lossless"}
    found = host.generate(engine(options=options), mixed_prompts(SMOL, 4), sampling)
    assert found.acceptance_length == KERNEL


def test_threshold_above_one_equals_lossless_v1(host):
    prompts, sampling = mixed_prompts(SMOL, 8), {"max_tokens": 32, "ignore_eos": True}
    reference = host.generate(engine(), prompts, sampling).token_ids
    assert host.generate(engine(options={"threshold": 1.5}), prompts, sampling).token_ids == reference


def test_threshold_changes_the_text_and_lengthens_acceptance_v1(host):
    prompts, sampling = chat_prompts(SMOL, "gsm8k", 6), {"max_tokens": 64, "ignore_eos": True}
    reference = host.generate(engine(), prompts, sampling).token_ids
    strict = host.generate(engine(options={"acceptance": "lossless"}), prompts, sampling)
    loose = host.generate(engine(options={"threshold": 0.05}), prompts, sampling)
    assert strict.token_ids == reference
    assert loose.token_ids != reference
    assert loose.acceptance_length > strict.acceptance_length


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_texts_that_end_around_the_longest_one_v1(host, offset):
    """A text may reach `max_model_len` in the middle of a draft; one below, at and one above a whole number of passes."""
    prompt = mixed_prompts(SMOL, 3)[1][:40]
    longest = len(prompt) + 1 + 2 * KERNEL + offset
    sampling = {"max_tokens": 200, "ignore_eos": True}
    reference = host.generate(engine(max_model_len=longest), [prompt, prompt[:30]], sampling)
    found = host.generate(
        engine(options={"acceptance": "lossless"}, max_model_len=longest), [prompt, prompt[:30]], sampling
    )
    assert found.token_ids == reference.token_ids
    assert [len(tokens) for tokens in found.token_ids] == [longest - len(prompt), longest - 30]
    assert all(completion.finish_reason == "length" for completion in found.completions)


def test_passes_that_straddle_block_ends_v1(host):
    """Prompts of every length around a block end, so that drafts cross it at each of their positions."""
    text = max(mixed_prompts(SMOL, 6), key=len)
    blocks = host.probe(engine(), "support.probes:block_sizes")
    prompts = [text[: blocks[0] + shift] for shift in range(-KERNEL - 1, 2)]
    assert len(prompts[-1]) == blocks[0] + 1
    sampling = {"max_tokens": 2 * KERNEL, "ignore_eos": True}
    reference = host.generate(engine(), prompts, sampling).token_ids
    assert host.generate(engine(options={"acceptance": "lossless"}), prompts, sampling).token_ids == reference


@pytest.mark.parametrize("max_tokens", [1, 2, KERNEL, KERNEL + 1])
def test_max_tokens_is_exact_v1(host, max_tokens):
    sampling = {"max_tokens": max_tokens, "ignore_eos": True}
    found = host.generate(engine(options={"threshold": 0}), mixed_prompts(SMOL, 3), sampling)
    assert [len(tokens) for tokens in found.token_ids] == [max_tokens] * 3
    # Nothing is drafted that could not be emitted.
    assert found.num_draft_tokens == found.num_accepted_tokens


def test_a_request_can_switch_sirius_off_and_set_its_threshold_v1(host):
    prompts = chat_prompts(SMOL, "gsm8k", 3)
    common = {"max_tokens": 33, "ignore_eos": True}
    reference = host.generate(engine(), prompts, common).token_ids
    sampling = [
        {**common, "extra_args": {"sirius": "off"}},
        {**common, "extra_args": {"sirius_threshold": 2}},
        {**common, "extra_args": {"sirius_threshold": "0"}},
    ]
    found = host.generate(engine(options={}), prompts, sampling)
    assert found.token_ids[:2] == reference[:2]
    assert found.token_ids[2] != reference[2]
    alone = host.generate(engine(options={}), prompts[:1], sampling[:1])
    assert alone.num_drafts == 0
    assert alone.token_ids == reference[:1]


@pytest.mark.parametrize(
    ("options", "extra_args", "words"),
    [
        ({}, {"sirius_threshold": "low"}, "sirius_threshold='low'"),
        ({}, {"sirius_temperature": 1}, "'sirius_temperature'"),
        ({"acceptance": "lossless"}, {"sirius_threshold": 0.1}, "acceptance='lossless'"),
    ],
)
def test_a_bad_request_option_fails_that_request_alone_v1(host, options, extra_args, words):
    prompts = mixed_prompts(SMOL, 2)
    with pytest.raises(EngineError, match=words):
        host.generate(engine(options=options), prompts[:1], {"max_tokens": 4, "extra_args": extra_args})
    assert len(host.generate(engine(options=options), prompts, {"max_tokens": 4}).token_ids) == 2


def test_statistics_are_freed_with_their_requests_v1(host):
    options = {"acceptance": "lossless"}
    for _ in range(3):  # more requests than slots, one batch after the other
        host.generate(engine(options=options, max_num_seqs=4), mixed_prompts(SMOL, 6), {"max_tokens": 9})
    report = host.probe(engine(options=options, max_num_seqs=4), "support.probes:draft_report")
    assert report["num_slots"] == 4
    assert report["num_slots"] - report["free_slots"] == report["requests"] <= 4
