"""The edges: everything accepted, block ends, the longest text, the last token, per-request switches; on both runners.

What a real model adds, real sizes and texts that a threshold changes, is shown on Model Runner V1; counting, switching and
ending are shown on a tiny model.
"""

import pytest
from support import subjects
from support.engine_host import EngineError
from support.real_models import GEMMA, QWEN_SMALL, SMOL, chat_prompts, mixed_prompts, model_path
from support.runners import only_v1, v2_is_slow

KERNEL = 8


def engine(model, options=None, **given):
    base = {"model": model, "max_model_len": 512, "max_num_seqs": 8, **given}
    if options is not None:
        fixed = {"method": "sirius", "sparsity": "coarse", "kernel_size": KERNEL, "adaptive": False}
        base["speculative_config"] = {**fixed, **options}
    return base


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return subjects.tiny(tiny_model("llama"))


def accepted_when_all_are(max_tokens):
    """Draft tokens accepted of one request: all but one of each pass; the first token is the prompt's own pass."""
    return max_tokens - 1 - -(-(max_tokens - 1) // KERNEL)


def check_all_accepted(host, model, prompts, options):
    sampling = {"max_tokens": 1 + 2 * KERNEL, "ignore_eos": True}
    found = host.generate(engine(model, options), prompts, sampling)
    assert found.acceptance_length == KERNEL
    assert found.num_drafts == 2 * len(prompts)


@pytest.mark.parametrize("threshold", [0, pytest.param(-1.0, marks=pytest.mark.slow)])
def test_threshold_of_zero_accepts_every_draft(host, subject, threshold):
    check_all_accepted(host, subject.model, subject.mixed_prompts(3), {"threshold": threshold})


@only_v1
@pytest.mark.slow
@pytest.mark.parametrize("name", [QWEN_SMALL, GEMMA])
def test_threshold_of_zero_accepts_every_draft_of_other_models(host, name):
    check_all_accepted(host, model_path(name), mixed_prompts(name, 2), {"threshold": 0})


@pytest.mark.parametrize("sparsity", ["coarse", "fine"])
def test_density_of_one_accepts_every_draft(host, subject, sparsity):
    options = {"density": 1.0, "sparsity": sparsity, "draft_weights": "shared"}
    check_all_accepted(host, subject.model, subject.mixed_prompts(3), options)


@v2_is_slow
def test_threshold_above_one_equals_lossless(host):
    prompts, sampling = mixed_prompts(SMOL, 4), {"max_tokens": 24, "ignore_eos": True}
    reference = host.generate(engine(model_path(SMOL)), prompts, sampling).token_ids
    found = host.generate(engine(model_path(SMOL), {"threshold": 1.5}), prompts, sampling)
    assert found.token_ids == reference


@pytest.mark.slow
def test_threshold_changes_the_text_and_lengthens_acceptance(host):
    prompts, sampling = chat_prompts(SMOL, "gsm8k", 3), {"max_tokens": 33, "ignore_eos": True}
    model = model_path(SMOL)
    reference = host.generate(engine(model), prompts, sampling).token_ids
    strict = host.generate(engine(model, {}), prompts, sampling)
    loose = host.generate(engine(model, {"threshold": 0.05}), prompts, sampling)
    assert strict.token_ids == reference
    assert loose.token_ids != reference
    assert loose.acceptance_length > strict.acceptance_length


@v2_is_slow
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_texts_that_end_around_the_longest_one(host, tiny, offset):
    """A text may reach `max_model_len` in the middle of a draft; one below, at and one above a whole number of passes."""
    prompt = tiny.mixed_prompts(3)[1][:40]
    longest = len(prompt) + 1 + 2 * KERNEL + offset
    sampling = {"max_tokens": 200, "ignore_eos": True}
    plain, sparse = (engine(tiny.model, options, max_model_len=longest) for options in (None, {}))
    reference = host.generate(plain, [prompt, prompt[:30]], sampling)
    found = host.generate(sparse, [prompt, prompt[:30]], sampling)
    assert found.token_ids == reference.token_ids
    assert found.num_accepted_tokens > 0
    assert [len(tokens) for tokens in found.token_ids] == [longest - len(prompt), longest - 30]
    assert all(completion.finish_reason == "length" for completion in found.completions)


def test_passes_that_straddle_block_ends(host, tiny):
    """Prompts of every length around a block end, so that drafts cross it at each of their positions."""
    text = max(tiny.mixed_prompts(6), key=len)
    size = 64
    plain = engine(tiny.model, block_size=size)
    assert host.probe(plain, "support.page_probes:block_sizes") == [size]
    prompts = [text[: size + shift] for shift in range(-KERNEL - 1, 2)]
    assert len(prompts[-1]) == size + 1
    sampling = {"max_tokens": 2 * KERNEL, "ignore_eos": True}
    reference = host.generate(plain, prompts, sampling).token_ids
    found = host.generate(engine(tiny.model, {}, block_size=size), prompts, sampling)
    assert found.token_ids == reference
    assert 0 < found.num_accepted_tokens < found.num_draft_tokens


@pytest.mark.parametrize("max_tokens", [1, 2, KERNEL, KERNEL + 1, KERNEL + 2])
def test_max_tokens_is_exact(host, tiny, max_tokens):
    sampling = {"max_tokens": max_tokens, "ignore_eos": True}
    found = host.generate(engine(tiny.model, {"threshold": 0}), tiny.mixed_prompts(3), sampling)
    assert [len(tokens) for tokens in found.token_ids] == [max_tokens] * 3
    assert found.num_accepted_tokens == 3 * accepted_when_all_are(max_tokens)
    # Nothing is drafted that could not be emitted. On V2 the scheduler counts a whole draft for every step.
    if host.runner == "v1":
        assert found.num_draft_tokens == found.num_accepted_tokens


def test_a_request_can_switch_sirius_off_and_set_its_threshold(host, tiny):
    prompts = tiny.mixed_prompts(3)
    common = {"max_tokens": 33, "ignore_eos": True}
    reference = host.generate(engine(tiny.model), prompts, common).token_ids
    sampling = [
        {**common, "extra_args": {"sirius": "off"}},
        {**common, "extra_args": {"sirius_threshold": 2}},
        {**common, "extra_args": {"sirius_threshold": "0"}},
    ]
    rule = engine(tiny.model, {"acceptance": "threshold"})
    found = host.generate(rule, prompts, sampling)
    assert found.token_ids[:2] == reference[:2]
    assert found.token_ids[2] != reference[2]
    assert found.num_accepted_tokens >= accepted_when_all_are(33)
    alone = host.generate(rule, prompts[:1], sampling[:1])
    assert alone.num_accepted_tokens == 0
    assert alone.token_ids == reference[:1]
    if host.runner == "v1":
        assert alone.num_drafts == 0


@pytest.mark.parametrize(
    ("options", "extra_args", "words"),
    [
        ({"acceptance": "threshold"}, {"sirius_threshold": "low"}, "sirius_threshold='low'"),
        ({}, {"sirius_temperature": 1}, "'sirius_temperature'"),
        ({}, {"sirius_threshold": 0.1}, "acceptance='lossless'"),
    ],
    ids=["value", "name", "rule"],
)
def test_a_bad_request_option_fails_that_request_alone(host, tiny, options, extra_args, words):
    prompts, sparse = tiny.mixed_prompts(2), engine(tiny.model, options)
    with pytest.raises(EngineError, match=words):
        host.generate(sparse, prompts[:1], {"max_tokens": 4, "extra_args": extra_args})
    assert len(host.generate(sparse, prompts, {"max_tokens": 4}).token_ids) == 2


def test_a_slot_keeps_nothing_of_its_last_request(host, tiny):
    """With one slot, a request drafts as it did before another one had the slot. Without refresh nothing fades by itself."""
    sparse = engine(tiny.model, {"refresh": False}, max_num_seqs=1)
    one, other = ([prompt] for prompt in tiny.mixed_prompts(3)[1:])
    sampling = {"max_tokens": 24, "ignore_eos": True}
    drafted = [host.generate(sparse, prompts, sampling) for prompts in (one, other, one)]
    assert 0 < drafted[0].num_accepted_tokens < drafted[0].num_draft_tokens
    assert drafted[2] == drafted[0]


def test_statistics_are_freed_with_their_requests(host, tiny):
    sparse = engine(tiny.model, {}, max_num_seqs=4)
    for _ in range(2):  # more requests than slots, one batch after the other
        host.generate(sparse, tiny.mixed_prompts(6), {"max_tokens": 9})
    report = host.probe(sparse, "support.probes:draft_report")
    assert report["runner"] == host.runner
    assert report["requests"] <= 4
    if host.runner == "v1":
        slots = host.probe(sparse, "support.page_probes:free_slots")
        assert slots["all"] == 4
        assert slots["all"] - slots["free"] == report["requests"]
