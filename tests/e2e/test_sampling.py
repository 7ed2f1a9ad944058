"""Sampling parameters behave as in vLLM, on both model runners.

Building an engine costs more than its answers, so all requests of one engine are put together: those of the default engine
are compared with plain vLLM's in one mixed batch, those under the threshold rule bring their own threshold. What is drawn at
random comes from a tiny model: the interpreter pays for each word of the vocabulary (see `support.v2_on_cpu`).
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from support.lossless import generate_by_default
from support.real_models import SMOL, chat_prompt, chat_prompts, model_path
from support.runners import only_v1, v2_is_slow
from support.tiny_models import FIRST_CHARACTER
from transformers import AutoTokenizer

SIRIUS = {"method": "sirius", "sparsity": "coarse", "kernel_size": 8, "adaptive": False}
DEFAULT = {"method": "sirius"}
THRESHOLD_RULE = {**SIRIUS, "acceptance": "threshold"}
BAD_WORDS = ["the", " the", " to"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMAR = {"max_tokens": 60, "structured_outputs": {"json": SCHEMA}}
SEEDED = [
    {"max_tokens": 24, "temperature": 1.0, "seed": 7, "ignore_eos": True},
    {"max_tokens": 24, "temperature": 0.7, "top_p": 0.9, "seed": 8, "ignore_eos": True},
    {"max_tokens": 24, "temperature": 0.5, "top_k": 5, "seed": 7, "ignore_eos": True},
    {"max_tokens": 24, "ignore_eos": True},
]
TINY_PROMPTS = [[3 + i, 1, 4, 1, 5, 9, 2, 6] for i in range(len(SEEDED))]


def engine(options=None):
    base = {"model": model_path(SMOL), "max_model_len": 512, "max_num_seqs": 8}
    return base if options is None else {**base, "speculative_config": options}


@pytest.fixture(scope="module")
def tiny(tiny_model):
    """Engine options of a tiny model, which has few words."""

    def options(speculative=None):
        base = {"model": tiny_model("llama"), "max_model_len": 128, "max_num_seqs": 8}
        return base if speculative is None else {**base, "speculative_config": speculative}

    return options


def threshold(value, **sampling):
    return {**sampling, "extra_args": {"sirius_threshold": value}}


@pytest.fixture(scope="module")
def prompts():
    return chat_prompts(SMOL, "gsm8k", 4)


@pytest.fixture(scope="module")
def greedy(host, prompts):
    """What plain vLLM continues the prompts with."""
    return host.generate(engine(), prompts, {"max_tokens": 24, "ignore_eos": True}).token_ids


@pytest.fixture(scope="module")
def requests(prompts, greedy):
    """Greedy requests by kind: prompts and sampling parameters."""
    first, second = prompts[:2]
    short = [chat_prompt(SMOL, "Name a color.")]
    return {
        "end of text": (short, {"max_tokens": 80}),
        "stop strings": ([first, second], {"max_tokens": 60, "stop": [".", " the"]}),
        "stop token": ([first], {"max_tokens": 30, "stop_token_ids": [greedy[0][9]]}),
        "min tokens": ([first], {"max_tokens": 30, "min_tokens": 20, "stop_token_ids": [greedy[0][3]]}),
        "penalties": (
            [first, second],
            {"max_tokens": 24, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        ),
        "bad words": ([first, second], {"max_tokens": 30, "bad_words": BAD_WORDS}),
        "logprobs": ([first, second], {"max_tokens": 16, "logprobs": 2}),
        "grammar": ([first], GRAMMAR),
    }


@pytest.fixture(scope="module")
def plain(host, requests):
    return generate_all(host, engine(), requests)


@pytest.fixture(scope="module")
def lossless(host, requests, plain):
    """Comes after everything that plain vLLM answers."""
    host.probe(engine(DEFAULT), "support.probes:make_drafts_pay")
    return generate_all(host, engine(DEFAULT), requests)


def generate_all(host, options, requests):
    """Answers by kind, all of them from one batch."""
    kinds = [kind for kind, (prompts, _) in requests.items() for _ in prompts]
    prompts = [prompt for some, _ in requests.values() for prompt in some]
    sampling = [parameters for some, parameters in requests.values() for _ in some]
    found = host.generate(options, prompts, sampling)
    answers = {kind: [] for kind in requests}
    for kind, completion in zip(kinds, found.completions, strict=True):
        answers[kind].append(completion)
    answers["accepted"] = found.num_accepted_tokens
    return answers


def check_same(kind, plain, lossless):
    assert lossless["accepted"] > 0
    for one, other in zip(plain[kind], lossless[kind], strict=True):
        assert other.token_ids == one.token_ids
        assert other.text == one.text
        assert (other.finish_reason, other.stop_reason) == (one.finish_reason, one.stop_reason)


@v2_is_slow
def test_end_of_text(plain, lossless):
    check_same("end of text", plain, lossless)
    assert all(c.finish_reason == "stop" for c in plain["end of text"])


@v2_is_slow
def test_stop_strings(plain, lossless):
    check_same("stop strings", plain, lossless)
    assert all(c.finish_reason == "stop" for c in plain["stop strings"])


@v2_is_slow
def test_stop_token_ids(plain, lossless, greedy):
    check_same("stop token", plain, lossless)
    assert plain["stop token"][0].stop_reason == greedy[0][9]


@v2_is_slow
def test_min_tokens(plain, lossless):
    check_same("min tokens", plain, lossless)
    assert len(plain["min tokens"][0].token_ids) >= 20


@v2_is_slow
def test_penalties(plain, lossless, greedy):
    check_same("penalties", plain, lossless)
    assert all(c.token_ids != greedy[i] for i, c in enumerate(plain["penalties"]))


@v2_is_slow
def test_bad_words(plain, lossless):
    check_same("bad words", plain, lossless)
    assert all(" the " not in c.text for c in plain["bad words"])


@v2_is_slow
def test_logprobs(plain, lossless):
    check_same("logprobs", plain, lossless)
    for one, other in zip(plain["logprobs"], lossless["logprobs"], strict=True):
        assert one.logprobs is not None
        assert other.logprobs == pytest.approx(one.logprobs, abs=2e-3)


@v2_is_slow
def test_grammar(plain, lossless):
    check_same("grammar", plain, lossless)
    assert set(json.loads(lossless["grammar"][0].text)) == {"name", "age"}


@only_v1
def test_seeded_sampling_of_a_real_model_is_token_identical(host, prompts):
    reference = host.generate(engine(), prompts, SEEDED).token_ids
    found = generate_by_default(host, engine(), prompts, SEEDED)
    assert found.token_ids == reference


@dataclass(frozen=True)
class Lax:
    """An engine under the threshold rule, with a prompt and constraints that its greedy answer breaks."""

    engine: dict
    prompt: list[int]
    threshold: float
    grammar: dict
    keeps_grammar: Callable
    bad_words: list[str]
    breaks_bad_words: Callable
    stop: int


@pytest.fixture(scope="module")
def lax(host, request, tiny):
    """On SmolLM2; on Model Runner V2 on a tiny model."""
    if host.runner == "v1":
        prompts, greedy = map(request.getfixturevalue, ("prompts", "greedy"))
        # Words that the answer would have, each a token: a rule that forgot what is forbidden would say them.
        tokenizer = AutoTokenizer.from_pretrained(model_path(SMOL))
        texts = {token: tokenizer.decode([token]) for token in greedy[0]}
        # vLLM bans the token with the space only where the word without it is one token, too.
        words = {
            token: text
            for token, text in texts.items()
            if text.startswith(" ") and text[1:].isalpha() and len(tokenizer.encode(text[1:])) == 1
        }
        assert words
        return Lax(
            engine=engine(THRESHOLD_RULE),
            prompt=prompts[0],
            threshold=0.05,
            grammar=GRAMMAR,
            keeps_grammar=lambda text: set(json.loads(text)) == {"name", "age"},
            bad_words=list(words.values()),
            breaks_bad_words=lambda answer: not words.keys().isdisjoint(answer.token_ids),
            stop=greedy[0][3],
        )
    greedy = host.generate(tiny(), TINY_PROMPTS[:1], {"max_tokens": 24, "ignore_eos": True}).token_ids[0]
    banned = {token for token in greedy if FIRST_CHARACTER + token < 127}
    assert banned
    return Lax(
        engine=tiny(THRESHOLD_RULE),
        prompt=TINY_PROMPTS[0],
        threshold=0.3,
        grammar={"max_tokens": 20, "structured_outputs": {"regex": "[a-c]{3}[0-9]{4}"}},
        keeps_grammar=re.compile("[a-c]{3}[0-9]{4}").fullmatch,
        bad_words=[chr(FIRST_CHARACTER + token) for token in sorted(banned)],
        # By token: the texts of ids that stand for no byte have characters too.
        breaks_bad_words=lambda answer: not banned.isdisjoint(answer.token_ids),
        stop=greedy[3],
    )


def test_logprobs_of_threshold_tokens_are_the_targets(host, lax):
    found = host.generate(lax.engine, [lax.prompt], threshold(lax.threshold, max_tokens=16, logprobs=1))
    text, logprobs = found.token_ids[0], found.completions[0].logprobs
    assert logprobs is not None
    assert all(value <= 0 for value in logprobs)
    # The target's own continuations of the text's beginnings: a draft of nothing needs no plain engine.
    off = {"max_tokens": 1, "logprobs": 20, "extra_args": {"sirius": "off"}}
    scored = host.generate(lax.engine, [lax.prompt + text[:i] for i in range(8)], off)
    same = [i for i in range(8) if scored.token_ids[i][0] == text[i]]
    assert len(same) >= 4
    for i in same:
        assert logprobs[i] == pytest.approx(scored.completions[i].logprobs[0], abs=2e-3)


def test_accepting_everything_stays_within_what_a_request_allows(host, lax):
    """Threshold 0 accepts all that grammar, bad words and a least length leave."""
    sampling = [
        threshold(0.0, **lax.grammar),
        threshold(0.0, max_tokens=30, bad_words=lax.bad_words),
        threshold(0.0, max_tokens=30, min_tokens=20, stop_token_ids=[lax.stop]),
    ]
    found = host.generate(lax.engine, [lax.prompt] * 3, sampling)
    assert lax.keeps_grammar(found.completions[0].text)
    assert not lax.breaks_bad_words(found.completions[1])
    assert len(found.token_ids[2]) >= 20
    assert lax.stop not in found.token_ids[2][:20]


@pytest.mark.parametrize(
    "options",
    [DEFAULT, {**SIRIUS, "threshold": 2.0}, {**SIRIUS, "sparsity": "fine", "density": 0.9}],
    ids=["default", "threshold-above-one", "fine"],
)
def test_seeded_sampling_is_token_identical(host, tiny, options):
    """One draw per emitted token, whatever was drafted and rejected."""
    reference = host.generate(tiny(), TINY_PROMPTS, SEEDED).token_ids
    if options == DEFAULT:
        host.probe(tiny(options), "support.probes:make_drafts_pay")
    found = host.generate(tiny(options), TINY_PROMPTS, SEEDED)
    assert found.token_ids == reference
    assert 0 < found.num_accepted_tokens < found.num_draft_tokens


def test_unseeded_sampling_differs_from_request_to_request(host, tiny):
    sampling = {"max_tokens": 12, "temperature": 1.0, "ignore_eos": True}
    found = host.generate(tiny(DEFAULT), TINY_PROMPTS[:1] * 4, sampling).token_ids
    assert len({tuple(text) for text in found}) == 4


def test_a_seed_repeats_itself_under_the_threshold_rule(host, tiny):
    """In the same batch: its requests share one set of neurons, so the others have a say in what is drafted and accepted."""
    sampling = [{"max_tokens": 24, "temperature": 1.0, "seed": seed, "ignore_eos": True} for seed in (7, 8)]
    once = host.generate(tiny(THRESHOLD_RULE), TINY_PROMPTS[:1] * 2, sampling).token_ids
    again = host.generate(tiny(THRESHOLD_RULE), TINY_PROMPTS[:1] * 2, sampling).token_ids
    assert once == again
    assert once[0] != once[1]


def test_threshold_zero_takes_nothing_that_top_k_rules_out(host, tiny):
    """With top-k 1 only the target's own choice has any likelihood."""
    sampling = {"max_tokens": 24, "ignore_eos": True}
    greedy = host.generate(tiny(), TINY_PROMPTS, sampling).token_ids
    sampling |= {"temperature": 0.7, "top_k": 1, "seed": 1}
    found = host.generate(tiny({**SIRIUS, "threshold": 0}), TINY_PROMPTS, sampling)
    assert found.token_ids == greedy
