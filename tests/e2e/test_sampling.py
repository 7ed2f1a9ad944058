"""Sampling parameters behave as in vLLM (runner v1)."""

import json

import pytest
from support.real_models import QWEN_SMALL, SMOL, chat_prompts, model_path

LOSSLESS = {"method": "sirius", "acceptance": "lossless", "kernel_size": 8}
THRESHOLD = {"method": "sirius", "kernel_size": 8}


def engine(options=None, name=SMOL):
    base = {"model": model_path(name), "max_model_len": 1024, "max_num_seqs": 8}
    return base if options is None else {**base, "speculative_config": options}


@pytest.fixture(scope="module")
def prompts():
    return chat_prompts(SMOL, "gsm8k", 4)


def compare_greedy(host, prompts, sampling):
    reference = host.generate(engine(), prompts, sampling)
    found = host.generate(engine(LOSSLESS), prompts, sampling)
    assert found.token_ids == reference.token_ids
    assert [c.text for c in found.completions] == [c.text for c in reference.completions]
    assert [c.finish_reason for c in found.completions] == [c.finish_reason for c in reference.completions]
    assert [c.stop_reason for c in found.completions] == [c.stop_reason for c in reference.completions]
    return reference, found


def test_end_of_text_v1(host, prompts):
    reference, _ = compare_greedy(host, prompts, {"max_tokens": 300})
    assert any(c.finish_reason == "stop" for c in reference.completions)


def test_stop_strings_v1(host, prompts):
    reference, _ = compare_greedy(host, prompts, {"max_tokens": 80, "stop": [".", " the"]})
    assert all(c.finish_reason == "stop" for c in reference.completions)


def test_stop_token_ids_v1(host, prompts):
    text = host.generate(engine(), prompts[:1], {"max_tokens": 20}).token_ids[0]
    reference, _ = compare_greedy(host, prompts[:1], {"max_tokens": 40, "stop_token_ids": [text[9]]})
    assert reference.completions[0].stop_reason == text[9]


def test_min_tokens_v1(host, prompts):
    stop = host.generate(engine(), prompts[:1], {"max_tokens": 20}).token_ids[0][3]
    sampling = {"max_tokens": 40, "min_tokens": 25, "stop_token_ids": [stop]}
    reference, _ = compare_greedy(host, prompts[:1], sampling)
    assert len(reference.token_ids[0]) >= 25
    loose = host.generate(engine({**THRESHOLD, "threshold": 0}), prompts[:1], sampling)
    assert len(loose.token_ids[0]) >= 25
    assert stop not in loose.token_ids[0][:25]


def test_penalties_v1(host, prompts):
    sampling = {"max_tokens": 40, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    reference, _ = compare_greedy(host, prompts, sampling)
    plain = host.generate(engine(), prompts, {"max_tokens": 40})
    assert plain.token_ids != reference.token_ids


def test_bad_words_v1(host, prompts):
    sampling = {"max_tokens": 40, "bad_words": ["the", " the", " to"]}
    reference, _ = compare_greedy(host, prompts, sampling)
    assert all(" the " not in c.text for c in reference.completions)
    loose = host.generate(engine({**THRESHOLD, "threshold": 0}), prompts, sampling)
    assert all(" the " not in c.text for c in loose.completions)


def test_logprobs_v1(host, prompts):
    sampling = {"max_tokens": 24, "logprobs": 2}
    reference, found = compare_greedy(host, prompts, sampling)
    for one, other in zip(reference.completions, found.completions, strict=True):
        assert one.logprobs is not None
        assert other.logprobs is not None
        assert other.logprobs == pytest.approx(one.logprobs, abs=2e-3)


def test_logprobs_of_threshold_tokens_are_the_targets_v1(host, prompts):
    loose = host.generate(engine({**THRESHOLD, "threshold": 0.05}), prompts[:1], {"max_tokens": 32, "logprobs": 1})
    text, logprobs = loose.token_ids[0], loose.completions[0].logprobs
    scored = host.generate(engine(), [prompts[0] + text[:i] for i in range(8)], {"max_tokens": 1, "logprobs": 20})
    assert len(scored.token_ids) == 8
    assert logprobs is not None
    assert all(value <= 0 for value in logprobs)
    for i in range(8):
        if scored.token_ids[i][0] == text[i]:
            assert logprobs[i] == pytest.approx(scored.completions[i].logprobs[0], abs=2e-3)


@pytest.mark.parametrize(
    "options", [LOSSLESS, {**THRESHOLD, "threshold": 2.0}], ids=["v1-lossless", "v1-threshold-above-one"]
)
def test_seeded_sampling_is_token_identical(host, prompts, options):
    """One draw of the request's generator per emitted token, whatever was drafted and rejected."""
    sampling = [
        {"max_tokens": 40, "temperature": 1.0, "seed": 7},
        {"max_tokens": 40, "temperature": 0.7, "top_p": 0.9, "seed": 8},
        {"max_tokens": 40, "temperature": 0.5, "top_k": 5, "seed": 7},
        {"max_tokens": 40},
    ]
    reference = host.generate(engine(), prompts, sampling).token_ids
    found = host.generate(engine(options), prompts, sampling)
    assert found.token_ids == reference
    assert found.num_accepted_tokens > 0


def test_a_seed_repeats_itself_under_the_threshold_rule_v1(host, prompts):
    sampling = {"max_tokens": 24, "temperature": 1.0, "seed": 7}
    once = host.generate(engine(THRESHOLD), prompts, sampling).token_ids
    again = host.generate(engine(THRESHOLD), prompts, sampling).token_ids
    other = host.generate(engine(THRESHOLD), prompts, {**sampling, "seed": 8}).token_ids
    assert once == again
    assert once != other


def test_unseeded_sampling_differs_from_request_to_request_v1(host, prompts):
    sampling = {"max_tokens": 12, "temperature": 1.0, "ignore_eos": True}
    found = host.generate(engine(LOSSLESS), [prompts[0]] * 4, sampling).token_ids
    assert len({tuple(text) for text in found}) == 4


def test_threshold_respects_top_k_of_sampling_requests_v1(host, prompts):
    """Threshold 0 accepts all that the request allows: with top_k 1 only the target's own choice is allowed."""
    greedy = host.generate(engine(), prompts, {"max_tokens": 24, "ignore_eos": True})
    sampling = {"max_tokens": 24, "temperature": 0.7, "top_k": 1, "seed": 1, "ignore_eos": True}
    found = host.generate(engine({**THRESHOLD, "threshold": 0}), prompts, sampling)
    assert found.token_ids == greedy.token_ids


def test_grammar_v1(host):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    prompt = chat_prompts(QWEN_SMALL, "gsm8k", 1)
    sampling = {"max_tokens": 60, "structured_outputs": {"json": schema}}
    reference = host.generate(engine(name=QWEN_SMALL), prompt, sampling)
    strict = host.generate(engine(LOSSLESS, QWEN_SMALL), prompt, sampling)
    loose = host.generate(engine({**THRESHOLD, "threshold": 0}, QWEN_SMALL), prompt, sampling)
    assert strict.token_ids == reference.token_ids
    assert set(json.loads(strict.completions[0].text)) == {"name", "age"}
    assert set(json.loads(loose.completions[0].text)) == {"name", "age"}
