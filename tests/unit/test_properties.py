"""Rules that hold for whatever comes: acceptance, prompt lookup, slots, lengths, options, costs. `hypothesis` draws the input."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vllm_sirius.acceptance import (
    PLACEHOLDER_TOKEN_ID,
    accept_by_threshold,
    accept_drawn,
    accept_own_choice,
    emit_tokens,
    uniform_noise,
)
from vllm_sirius.config import ENGINE_OPTIONS, SiriusConfig
from vllm_sirius.drafting.prompt_lookup import LONGEST_MATCH, MOST_STEP_TOKENS, PromptLookup, look_up
from vllm_sirius.errors import SiriusConfigError
from vllm_sirius.pacing.costs import EXACT_SIZES, CostCurve, StepCosts
from vllm_sirius.request_rules import RequestRules
from vllm_sirius.sparsity.statistics import NeuronStatistics

# No deadline: other programs may run beside the tests. What fails is shown with a line that repeats it.
settings.register_profile("suite", deadline=None, print_blob=True)
settings.load_profile("suite")

VOCABULARY = 6
SIZES = st.integers(1, 1100)
SECONDS = st.floats(1e-9, 1e4)


# Acceptance


@st.composite
def verdicts(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draft tokens, what the target would say, and its logits, some of them forbidden."""
    rows = draw(st.integers(1, 5))
    logits = torch.tensor(
        draw(st.lists(st.floats(-30, 30, width=32), min_size=rows * VOCABULARY, max_size=rows * VOCABULARY))
    ).view(rows, VOCABULARY)
    forbidden = draw(arrays.arrays(bool, (rows, VOCABULARY)))
    forbidden[:, draw(st.integers(0, VOCABULARY - 1))] = False
    logits[torch.from_numpy(forbidden)] = -math.inf
    draft = torch.tensor(draw(st.lists(st.integers(-1, VOCABULARY - 1), min_size=rows, max_size=rows)))
    own = torch.tensor([draw(st.sampled_from(np.flatnonzero(~row).tolist())) for row in forbidden])
    return draft, own, logits


def by_threshold(
    draft: torch.Tensor, own: torch.Tensor, logits: torch.Tensor, threshold: float, temperature: float
) -> torch.Tensor:
    rows = len(draft)
    return accept_by_threshold(
        draft, own, logits, torch.full((rows,), threshold), torch.full((rows,), temperature, dtype=torch.float32)
    )


@given(verdicts(), st.floats(-2, 2, width=32), st.floats(0, 2, width=32), st.floats(0.125, 4, width=32))
def test_a_lower_threshold_accepts_what_a_higher_one_accepts(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor], threshold: float, more: float, temperature: float
) -> None:
    draft, own, logits = case
    strict = by_threshold(*case, threshold + more, temperature)
    lax = by_threshold(*case, threshold, temperature)
    assert bool((lax | ~strict).all())
    own_choice = accept_own_choice(draft, own)
    assert bool((strict | ~own_choice).all())
    possible = (draft >= 0) & (logits.gather(1, draft.clamp_min(0).unsqueeze(1)).squeeze(1) > -math.inf)
    assert bool((possible | ~lax).all())
    assert torch.equal(by_threshold(*case, 1.5, temperature), own_choice)
    assert torch.equal(by_threshold(*case, 0.0, temperature), possible)


@given(st.lists(st.floats(-20, 20, width=32), min_size=2 * VOCABULARY, max_size=2 * VOCABULARY))
def test_accepted_and_replaced_tokens_together_follow_the_target(values: list[float]) -> None:
    """By the sums themselves: what is said and passes, and what replaces the rest, are the target's probabilities."""
    target, draft = torch.tensor(values).view(2, VOCABULARY)
    p, q = target.softmax(-1), draft.softmax(-1)
    tokens = torch.arange(VOCABULARY)
    rows = (tokens, target.expand(VOCABULARY, -1), draft.expand(VOCABULARY, -1))
    chance = torch.minimum(torch.ones(VOCABULARY), p / q)
    for share in (0.5, 0.99, 1.01):
        # A number under the probability passes, one above does not.
        uniform = (chance * share).clamp_max(1 - 2.0**-24)
        sure = (uniform - chance).abs() > 1e-5 * chance
        passes, _ = accept_drawn(*rows, uniform)
        assert torch.equal(passes[sure], (uniform < chance)[sure])
    _, residual = accept_drawn(*rows, torch.zeros(VOCABULARY))
    replaced = residual[0].softmax(-1)
    left = 1 - torch.minimum(p, q).sum()
    torch.testing.assert_close(torch.minimum(p, q) + left * replaced, p, atol=2e-5, rtol=0)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31))
def test_noise_lies_in_its_interval_and_depends_on_seed_and_position(seed: int, position: int) -> None:
    seeds = torch.tensor([seed, seed, seed ^ 1])
    positions = torch.tensor([position, position + 1, position])
    noise = uniform_noise(seeds, positions)
    assert bool(((noise >= 0) & (noise < 1)).all())
    assert torch.equal(noise, uniform_noise(seeds, positions))
    assert noise[0] != noise[1] or noise[0] != noise[2]


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), max_size=4), min_size=1))
def test_a_request_emits_its_accepted_prefix_and_one_token_of_the_targets(
    requests: list[list[tuple[int, int, bool]]],
) -> None:
    flat = [entry for request in requests for entry in request]
    draft, own = (torch.tensor([entry[i] for entry in flat], dtype=torch.int64) for i in (0, 1))
    accepted = torch.tensor([entry[2] for entry in flat], dtype=torch.bool)
    bonus = torch.arange(100, 100 + len(requests))
    counts = torch.tensor([len(request) for request in requests])
    found = emit_tokens(draft, own, accepted, counts, bonus, 4).tolist()
    for request, row, last in zip(requests, found, bonus.tolist(), strict=True):
        expected = []
        for token, instead, passes in request:
            expected.append(token if passes else instead)
            if not passes:
                break
        else:
            expected.append(last)
        assert row == expected + [PLACEHOLDER_TOKEN_ID] * (5 - len(expected))


# Prompt lookup

TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=60)


@given(TEXTS, st.integers(0, 9))
def test_lookup_finds_the_latest_of_the_longest_matches(text: list[int], most: int) -> None:
    best = (0, -1)
    for place in range(len(text) - 1):
        length = 0
        while length < min(LONGEST_MATCH, place + 1) and text[place - length] == text[-1 - length]:
            length += 1
        best = max(best, (length, place)) if length else best
    found = look_up(np.array(text, dtype=np.int32), most)
    if most == 0:
        assert found.token_ids == ()
    else:
        assert found.match_length == best[0]
        assert list(found.token_ids) == ((text[best[1] + 1 :] * most)[:most] if best[0] else [])


@given(st.lists(st.tuples(TEXTS, st.integers(0, 40)), min_size=1, max_size=12), st.integers(1, 31), st.data())
def test_candidates_are_never_more_than_asked_for_and_than_a_step_holds(
    requests: list[tuple[list[int], int]], most: int, data: st.DataObject
) -> None:
    curve = CostCurve(data.draw(st.dictionaries(st.integers(1, 32), SECONDS, min_size=1, max_size=4)))
    lookup = PromptLookup(curve, most)
    texts = [np.array(text, dtype=np.int32) for text, _ in requests]
    for _ in range(3):
        found = lookup.propose(texts, [limit for _, limit in requests])
        assert sum(candidates.num_taken for candidates in found) + len(requests) <= MOST_STEP_TOKENS
        for candidates, (_, limit) in zip(found, requests, strict=True):
            assert candidates.num_taken <= len(candidates.token_ids) <= min(limit, most)
            lookup.judged(candidates, data.draw(st.lists(st.integers(0, 2), max_size=5)))


# Slots


@given(st.integers(1, 4), st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=30))
def test_a_slot_belongs_to_one_request_and_keeps_nothing_of_the_last(num_slots: int, turns: list[int | None]) -> None:
    """`None` stands for a request that comes, a number for the one that goes."""
    statistics = NeuronStatistics((3, 2), num_slots, 4, torch.device("cpu"))
    taken: list[int] = []
    for turn in turns:
        if turn is not None:
            if taken:
                statistics.release(taken.pop(turn % len(taken)))
            continue
        slot = statistics.acquire()
        assert (slot is None) == (len(taken) == num_slots)
        if slot is not None:
            assert slot not in taken
            assert 0 <= slot < num_slots
            assert not statistics.energy[slot].any()
            statistics.energy[slot] = 1.0
            taken.append(slot)


# Lengths


@given(
    st.builds(
        RequestRules,
        enabled=st.booleans(),
        threshold=st.just(0.1),
        end_token_ids=st.just(frozenset()),
        num_prompt_tokens=st.integers(1, 50),
        max_tokens=st.one_of(st.none(), st.integers(1, 60)),
        min_tokens=st.integers(0, 60),
    ),
    st.integers(0, 60),
    st.integers(0, 127),
    st.integers(1, 120),
)
def test_a_draft_is_as_long_as_is_of_use(rules: RequestRules, emitted: int, most: int, longest: int) -> None:
    num_tokens = rules.num_prompt_tokens + emitted
    found = rules.most_draft_tokens(num_tokens, most, longest)
    assert 0 <= found <= most

    def is_of_use(count: int) -> bool:
        """One token of the target's own may follow, at a position that the scheduler verifies, and it is judged rightly."""
        fits = num_tokens + count + 1 <= longest
        allowed = rules.max_tokens is None or emitted + count + 1 <= rules.max_tokens
        judged = emitted >= rules.min_tokens or emitted + count + 1 <= rules.min_tokens
        return rules.enabled and fits and allowed and judged

    assert found == 0 or is_of_use(found)
    assert found == most or not is_of_use(found + 1)


# Configuration

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "kernel_size": st.integers(0, 130),
    "num_speculative_tokens": st.integers(-1, 130),
    "sparsity": st.sampled_from(["auto", "coarse", "fine", "none", "medium"]),
    "density": st.floats(-0.5, 1.5),
    "refresh": st.booleans(),
    "draft_weights": st.sampled_from(["auto", "shared", "int8", "int4", "int2"]),
    "draft_weights_scope": st.sampled_from(["ffn", "all"]),
    "target_kernels": st.sampled_from(["auto", "vllm", "sirius"]),
    "acceptance": st.sampled_from(["lossless", "threshold"]),
    "draft_sampling": st.sampled_from(["greedy", "probabilistic"]),
    "threshold": st.floats(-1, 2),
    "threshold_temperature": st.floats(-1, 2),
    "adaptive": st.booleans(),
    "prompt_lookup_tokens": st.integers(-1, 33),
    "tree_width": st.integers(0, 2),
    "preset": st.just("paper"),
}
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2)
)


def config_or_refusal(options: dict[str, Any]) -> SiriusConfig | str:
    try:
        return SiriusConfig.from_options(options)
    except SiriusConfigError as error:
        return str(error)


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_options_are_taken_as_given_or_refused_by_name(options: dict[str, Any]) -> None:
    found = config_or_refusal(options)
    assert found == config_or_refusal({key.replace("_", "-"): value for key, value in options.items()})
    if isinstance(found, str):
        assert any(key in found for key in options), found
        return
    # What is automatic may be decided by another option.
    left_open = {key for key in ("sparsity", "draft_weights") if options.get(key) == "auto"}
    for key in options.keys() - left_open:
        assert getattr(found, key) == options[key]
    for copies in (False, True):
        if found.sparsity == "none" and found.draft_weights == "auto" and not copies:
            with pytest.raises(SiriusConfigError, match="sparsity='none'"):
                found.resolved(copies)
            continue
        resolved = found.resolved(copies)
        assert "auto" not in (resolved.sparsity, resolved.draft_weights)
        assert resolved.resolved(copies) == resolved
        assert resolved.draft_bits in (None, 4, 8)


@given(st.dictionaries(st.one_of(st.sampled_from([*VALUES, *ENGINE_OPTIONS]), st.text(max_size=9)), ODD, max_size=4))
def test_whatever_is_given_the_answer_is_a_config_or_one_line(options: dict[str, Any]) -> None:
    found = config_or_refusal(options)
    if isinstance(found, str):
        assert found.endswith((".", "?"))
        assert "\n" not in found
        assert any(repr(key.replace("-", "_")) in found or key.replace("-", "_") in found for key in options)


# Costs


def assert_sound(curve: CostCurve) -> None:
    seconds = [curve.seconds(size) for size in (*range(1, 70), 100, 128, 129, 500, 512, 1100, 4000)]
    assert all(larger >= smaller for smaller, larger in itertools.pairwise(seconds))
    assert seconds[0] > 0
    assert math.isfinite(seconds[-1])


@given(st.dictionaries(SIZES, SECONDS), st.lists(st.tuples(SIZES, st.one_of(SECONDS, st.floats())), min_size=1))
def test_costs_rise_with_the_size_whatever_was_observed(
    measured: dict[int, float], observed: list[tuple[int, float]]
) -> None:
    curve = CostCurve(measured)
    for size, seconds in observed:
        curve.observe(size, min(seconds, 1e9) if math.isfinite(seconds) else seconds)
    if curve:
        assert_sound(curve)


CURVES = st.dictionaries(st.integers(1, EXACT_SIZES), SECONDS, min_size=1)


@given(CURVES, CURVES, SIZES)
def test_a_report_of_costs_can_be_read_back(draft: dict[int, float], target: dict[int, float], size: int) -> None:
    costs = StepCosts(draft, target)
    again = StepCosts.from_report(costs.as_dict())
    for curve, seconds in costs.as_dict().items():
        assert again.as_dict()[curve] == pytest.approx(seconds)
    assert again.draft_cost(size) == pytest.approx(costs.draft_cost(size))


@given(SIZES, SECONDS)
def test_what_is_observed_again_and_again_is_believed(size: int, seconds: float) -> None:
    curve = CostCurve({1: 1e-3, 64: 2e-3})
    for _ in range(20):
        curve.observe(size, seconds)
    assert curve.seconds(size) == pytest.approx(max(seconds, 1e-6))
