"""Every field of `SamplingParams` means what it means in vLLM alone, with drafts and without, on both model runners.

All requests of one engine run in one batch, so that each stands beside every other.
"""

import pytest
from support.engine_host import EngineError
from support.runners import only_v1, v2_is_slow
from support.tiny_models import build

LENGTH = 20
DRAFT_LENGTH = 7
THINK, END = 32, 57
"""Tokens "A" and "Z" of the tiny tokenizer."""
REASONING = {"reasoning_start_str": "A", "reasoning_end_str": "ZZ"}
SIRIUS = {
    "method": "sirius",
    "kernel_size": DRAFT_LENGTH + 1,
    "acceptance": "lossless",
    "adaptive": False,
    "sparsity": "coarse",
    "density": 1.0,
    "draft_weights": "shared",
}
"""Drafts what the target itself would say next: greedy requests accept all of it, those that sample or forbid tokens reject."""
OFF = {"extra_args": {"sirius": "off"}}


def prompt(number):
    return [3 + number, 1, 4, 1, 5, 9, 2, 6]


def cases(greedy):
    """Prompt and sampling parameters by name of the field, made from what vLLM answers to `prompt(0)` without any."""
    text = greedy[0]
    first = {token: text.index(token) for token in set(text)}
    # As long as the first draft, so that the target's own token after it is the one to judge.
    late = max((token for token in text if first[token] <= DRAFT_LENGTH + 1), key=lambda token: first[token])
    return {
        "plain": (prompt(0), {}),
        "n": (prompt(1), {"n": 3, "temperature": 0.8, "seed": 11}),
        "presence_penalty": (prompt(0), {"presence_penalty": 1.5}),
        "frequency_penalty": (prompt(0), {"frequency_penalty": 1.5}),
        "repetition_penalty": (prompt(0), {"repetition_penalty": 1.8}),
        "temperature": (prompt(2), {"temperature": 0.9, "seed": 3}),
        "top_p": (prompt(3), {"temperature": 0.9, "top_p": 0.8, "seed": 4}),
        "top_k": (prompt(4), {"temperature": 0.9, "top_k": 4, "seed": 5}),
        "seed": (prompt(5), {"temperature": 1.0, "seed": 6}),
        "stop": (prompt(0), {"stop": [" "], "detokenize": True}),
        "stop_token_ids": (prompt(0), {"stop_token_ids": [late]}),
        "ignore_eos": (prompt(6), {"ignore_eos": False}),
        "max_tokens": (prompt(7), {"max_tokens": 5}),
        "min_tokens": (prompt(0), {"min_tokens": first[late] - 2, "stop_token_ids": [late]}),
        "min_tokens of the stop": (prompt(0), {"min_tokens": first[late] + 3, "stop_token_ids": [late]}),
        "logprobs": (prompt(8), {"logprobs": 3}),
        "all logprobs": (prompt(8), {"logprobs": 0, "temperature": 0.7, "seed": 9}),
        "prompt_logprobs": (prompt(9), {"prompt_logprobs": 2}),
        "flat_logprobs": (prompt(10), {"logprobs": 2, "flat_logprobs": True}),
        "detokenize": (prompt(11), {"detokenize": False}),
        "skip_special_tokens": (prompt(12), {"skip_special_tokens": False}),
        "spaces_between_special_tokens": (prompt(12), {"spaces_between_special_tokens": False}),
        "include_stop_str_in_output": (prompt(0), {"stop": [" "], "include_stop_str_in_output": True}),
        "structured_outputs": (prompt(13), {"structured_outputs": {"regex": "[a-c]{3}[0-9]{4}"}, "ignore_eos": False}),
        "allowed_token_ids": (prompt(0), {"allowed_token_ids": [*text[::2], 7, 8, 9, 10]}),
        "bad_words": (prompt(0), {"bad_words": ["a", "b", "AB", "q"]}),
        "skip_reading_prefix_cache": (prompt(14), {"skip_reading_prefix_cache": True}),
        "thinking_token_budget": ([9, 8, THINK], {"thinking_token_budget": 1}),
        "thinking_token_budget, later": ([THINK, 12, 90, 91, 30], {"thinking_token_budget": 9}),
        "thinking_token_budget, none": ([3] * 7, {"thinking_token_budget": 1}),
        "repetition_detection": (
            [3] * 7,
            {"repetition_detection": {"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 3}},
        ),
    }


NO_MATTER_OF_DRAFTS = {
    "watermarking": "an engine with a watermark is refused",
    "prompt_logprob_token_ids": "scores the prompt alone, on Model Runner V2",
    "prompt_logprob_start": "belongs to prompt_logprob_token_ids",
    "output_kind": "of the stream",
    "stream_interval": "of the stream",
    "skip_clone": "of the caller",
    "output_text_buffer_length": "computed from stop",
    "extra_args": "what stands there for Sirius is tested elsewhere",
    "routed_experts_prompt_start": "experts of the prompt",
}
REFUSED = {
    "min_p": ({"temperature": 1.0, "min_p": 0.1}, "min_p and logit_bias"),
    "logit_bias": ({"logit_bias": {5: 1.0}}, "min_p and logit_bias"),
    "trace_decode_token_ids": ({"trace_decode_token_ids": [1, 2]}, "trace_decode_token_ids"),
    "logprob_token_ids": ({"logprob_token_ids": [1, 2, 3]}, "logprob_token_ids.*Drop the option"),
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    path = str(build("llama", tmp_path_factory.getbasetemp().parent / "tiny-models"))

    def options(speculative=None):
        base = {"model": path, "max_model_len": 128, "max_num_seqs": 64, "reasoning_config": REASONING}
        return base if speculative is None else {**base, "speculative_config": speculative}

    return options


@pytest.fixture(scope="module")
def requests(host, engine):
    greedy = host.generate(engine(), [prompt(0)], {"max_tokens": LENGTH, "ignore_eos": True}).token_ids
    common = {"max_tokens": LENGTH, "ignore_eos": True}
    return {name: (tokens, {**common, **sampling}) for name, (tokens, sampling) in cases(greedy).items()}


def answer(host, options, requests, **more):
    batch = [(tokens, {**sampling, **more}) for tokens, sampling in requests.values()]
    return host.probe(options, "support.request_fields:answers_in_full", requests=batch)


@pytest.fixture(scope="module")
def plain(host, engine, requests):
    return answer(host, engine(), requests)["answers"]


def check_same(requests, found, expected):
    different = []
    for name, one, other in zip(requests, found, expected, strict=True):
        try:
            assert_same_rows(one["prompt_logprobs"], other["prompt_logprobs"])
            for output, reference in zip(one["outputs"], other["outputs"], strict=True):
                assert_same_rows(output["logprobs"], reference["logprobs"])
                assert {**output, "logprobs": None} == {**reference, "logprobs": None}
        except AssertionError as error:
            different.append(f"{name}: {error}")
    assert different == []


def assert_same_rows(found, expected):
    assert (found is None) == (expected is None)
    for one, other in zip(found or [], expected or [], strict=True):
        assert (one or {}).keys() == (other or {}).keys()
        for token, (logprob, rank) in (other or {}).items():
            assert one[token] == [pytest.approx(logprob, abs=2e-3), rank]


@v2_is_slow
def test_fields_mean_what_they_mean_to_vllm_with_drafts(host, engine, requests, plain):
    found = answer(host, engine(SIRIUS), requests)
    assert 0 < found["accepted"] < found["drafted"]
    check_same(requests, found["answers"], plain)


@v2_is_slow
def test_fields_mean_what_they_mean_to_vllm_without_drafts(host, engine, requests, plain):
    """No request of the batch drafts, but the engine could; half of them draft in the second batch."""
    found = answer(host, engine(SIRIUS), requests, **OFF)
    assert found["accepted"] == 0
    check_same(requests, found["answers"], plain)
    mixed = {
        name: (tokens, {**sampling, **OFF} if number % 2 else sampling)
        for number, (name, (tokens, sampling)) in enumerate(requests.items())
    }
    check_same(requests, answer(host, engine(SIRIUS), mixed)["answers"], plain)


@v2_is_slow
@pytest.mark.parametrize("name", REFUSED)
def test_other_fields_are_refused_and_the_engine_lives_on(host, engine, name):
    sampling, words = REFUSED[name]
    for extra in ({}, OFF):
        with pytest.raises(EngineError, match=words):
            answer(host, engine(SIRIUS), {name: (prompt(0), {**sampling, **extra})})
    assert len(answer(host, engine(SIRIUS), {"plain": (prompt(0), {"max_tokens": 2})})["answers"]) == 1


@only_v1
def test_every_field_is_judged(host, engine):
    fields = set(host.probe(engine(SIRIUS), "support.request_fields:field_names"))
    assert fields == {*cases([[*range(LENGTH)]]), *REFUSED, *NO_MATTER_OF_DRAFTS} & fields
