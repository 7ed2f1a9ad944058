"""Candidates looked up in a request's own text: what they are, how many pay, and that the draft stays the same."""

import random

import numpy as np
import pytest
import torch

from vllm_sirius.drafting.loop import DraftRequest, draft_tokens
from vllm_sirius.drafting.prompt_lookup import (
    FIRST_TRIAL_STEPS,
    LONGEST_MATCH,
    MOST_STEP_TOKENS,
    NO_CANDIDATES,
    BatchSavings,
    CandidateRates,
    Candidates,
    PromptLookup,
    look_up,
)
from vllm_sirius.pacing.costs import CostCurve
from vllm_sirius.pacing.policy import FullLength

VOCABULARY = 9
FLAT = CostCurve({1: 1.0, 64: 1.0})


def text_of(*token_ids):
    return np.array(token_ids, dtype=np.int32)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ((1, 2, 3), NO_CANDIDATES),
        ((5,), NO_CANDIDATES),
        ((7, 8, 9, 4, 7), Candidates((8, 9, 4), 1)),
        # The latest of the places that match best, not the latest of all.
        ((1, 2, 3, 4, 9, 2, 6, 1, 2), Candidates((3, 4, 9), 2)),
        ((1, 2, 3, 1, 2, 4, 1, 2), Candidates((4, 1, 2), 2)),
        # More than the longest match is not compared: the second place is the later one.
        ((0, 1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 6, 0, 1, 2, 3, 4), Candidates((6, 0, 1), 4)),
        # What repeats goes on repeating.
        ((1, 2, 1, 2), Candidates((1, 2, 1), 2)),
        ((3, 3), Candidates((3, 3, 3), 1)),
    ],
)
def test_what_followed_the_last_place_that_matches_best(text, expected):
    assert look_up(text_of(*text), 3) == expected


def test_nothing_is_looked_up_where_nothing_is_of_use():
    assert look_up(text_of(1, 2, 1, 2), 0) == NO_CANDIDATES
    assert look_up(text_of(), 3) == NO_CANDIDATES


@pytest.mark.usefixtures("fresh_input")
def test_lookup_agrees_with_a_search_by_hand():
    for _ in range(300):
        text = [random.randrange(3) for _ in range(random.randrange(1, 40))]
        best = (0, -1)
        for place in range(len(text) - 1):
            length = 0
            while length < min(LONGEST_MATCH, place + 1) and text[place - length] == text[-1 - length]:
                length += 1
            if length:
                best = max(best, (length, place))
        found = look_up(text_of(*text), 5)
        assert found.match_length == best[0]
        if best[0]:
            endless = text[best[1] + 1 :] * 5
            assert list(found.token_ids) == endless[:5]


def test_rates_are_counted_by_match_length_and_place():
    rates = CandidateRates(3)
    before = rates.survival(1, 3)
    for _ in range(1000):
        rates.observe(2, num_right=1, num_judged=2)
    first, second, third = rates.survival(2, 3)
    assert first > 0.98
    assert second < 0.01
    assert third < second
    assert rates.survival(1, 3) == before
    assert rates.survival(2, 1) == [first]


def taken(lookup, texts, limits):
    return [candidates.taken for candidates in lookup.propose(texts, limits)]


def test_as_many_candidates_as_save_time():
    text = text_of(*[1, 2, 3, 4, 5, 6, 7, 8] * 2)
    assert taken(PromptLookup(FLAT, 7), [text], [100]) == [(1, 2, 3, 4, 5, 6, 7)]
    assert taken(PromptLookup(FLAT, 7), [text], [2]) == [(1, 2)]
    assert taken(PromptLookup(FLAT, 7), [text], [0]) == [()]
    # Each token costs as much as a whole step: nothing can be saved.
    assert taken(PromptLookup(CostCurve({1: 1.0, 32: 32.0}), 7), [text], [100]) == [()]
    # Four tokens cost no more than one, the fifth does.
    assert taken(PromptLookup(CostCurve({1: 1.0, 4: 1.0, 5: 2.0, 32: 32.0}), 7), [text], [100]) == [(1, 2, 3)]
    # The first candidate alone does not pay, all together do.
    assert len(taken(PromptLookup(CostCurve({1: 1.0, 2: 1.9, 8: 2.0}), 7), [text], [100])[0]) == 7


def test_candidates_that_only_seemed_dear_are_found_out():
    text = text_of(*[1, 2, 3, 4, 5, 6, 7, 8] * 2)
    costs = CostCurve({1: 1.0, 2: 5.0, 8: 6.0, 32: 7.0})
    costs.observe(1, 1.0)
    lookup = PromptLookup(costs, 7)
    lengths = []
    while len(lengths) < 400:
        lengths.append(len(taken(lookup, [text], [100])[0]))
        if lengths[-1]:
            costs.observe(1 + lengths[-1], 1.2)
    assert lengths.index(7) == FIRST_TRIAL_STEPS - 1
    assert lengths[FIRST_TRIAL_STEPS:].count(0) == 0


def test_candidates_that_are_dear_are_tried_ever_more_rarely():
    text = text_of(*[1, 2, 3, 4, 5, 6, 7, 8] * 2)
    lookup = PromptLookup(CostCurve({1: 1.0, 32: 32.0}), 7)
    lengths = [len(taken(lookup, [text], [100])[0]) for _ in range(1000)]
    assert sum(length > 0 for length in lengths) <= 8


def test_the_likeliest_candidates_of_a_batch_come_first():
    sure, unsure = text_of(1, 2, 3, 4, 5, 1, 2, 3, 4), text_of(1, 5, 6, 7, 8, 9, 1)
    lookup = PromptLookup(CostCurve({1: 1.0, 2: 1.0, 4: 1.0, 5: 9.0}), 2)
    assert taken(lookup, [unsure, sure], [9, 9]) == [(), (5, 1)]


def test_a_batch_that_saves_nothing_looks_less_up():
    text = text_of(*[1, 2, 3, 4, 5] * 3)
    costs = CostCurve({1: 1.0, 32: 3.0})
    lookup = PromptLookup(costs, 7)
    before = sum(map(len, taken(lookup, [text] * 4, [9] * 4)))
    for _ in range(100):
        lookup.drafted(saved=0, hoped=3.0)
    assert sum(map(len, taken(lookup, [text] * 4, [9] * 4))) < before
    # A single request is not concerned.
    assert taken(lookup, [text], [9]) == taken(PromptLookup(costs, 7), [text], [9]) != [()]


def test_the_share_of_a_batch_is_counted():
    savings = BatchSavings()
    for _ in range(500):
        savings.observe(1.0, 4.0)
    assert savings.share == pytest.approx(0.25, abs=0.01)
    for _ in range(500):
        savings.observe(5.0, 4.0)
    assert savings.share == 1.0


def test_the_loop_counts_what_a_batch_saved():
    class Recorder(PromptLookup):
        seen = ()

        def drafted(self, saved, hoped):
            self.seen += ((saved, hoped),)

    lookup = Recorder(FLAT, 3)
    # Row 0 (1 -> 5 -> 3 -> 4 -> 8) has two right candidates of three in its first step; nothing is known of row 1.
    known, unknown = text_of(1, 5, 3, 0, 0, 0, 1), text_of(2)
    requests = [DraftRequest(0, 1, 7, 4, frozenset(), known), DraftRequest(1, 2, 7, 2, frozenset(), unknown)]
    assert list(map(len, draft_tokens(requests, Model(), FullLength(), lookup).values())) == [4, 2]
    assert lookup.seen == ((2, 1.0),)


def test_a_step_never_exceeds_what_the_kernels_take():
    texts = [text_of(*[1, 2, 3, 4] * 3) for _ in range(20)]
    assert len(texts) + sum(map(len, taken(PromptLookup(FLAT, 7), texts, [50] * 20))) == MOST_STEP_TOKENS
    assert taken(PromptLookup(FLAT, 7), texts * 2, [50] * 40) == [()] * 40


def test_candidates_that_are_never_right_stop_until_they_would_have_been():
    lookup = PromptLookup(CostCurve({1: 1.0, 32: 4.0}), 7)
    text = text_of(*[1, 2, 3, 4, 5] * 3)
    (first,) = lookup.propose([text], [9])
    assert first.taken
    for _ in range(200):
        lookup.judged(first, [0])
    (last,) = lookup.propose([text], [9])
    assert not last.taken
    for _ in range(200):
        lookup.judged(last, last.token_ids[:1])
    assert taken(lookup, [text], [9])[0][:1] == (1,)


class Model:
    """Continues a token mostly by itself, now and then by its place, and holds what was fed like a KV cache."""

    def __init__(self):
        self.cache = {}
        self.num_steps = 0

    def __call__(self, rows, counts, token_ids, positions):
        self.num_steps += 1
        owners = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
        logits = torch.zeros(len(owners), VOCABULARY)
        fed = zip(owners, token_ids.tolist(), positions.tolist(), strict=True)
        for entry, (row, token_id, position) in enumerate(fed):
            self.cache[row, position] = token_id
            logits[entry, (4 * token_id + 1 + (position % 6 == 0)) % VOCABULARY] = 1.0
        return logits


class Capricious(FullLength):
    """Refuses some rows and some tokens, always the same ones however they are found."""

    def __init__(self):
        super().__init__()
        self.lengths = {}

    def proposed(self, rows, logits):
        kept = []
        for row in rows:
            self.lengths[row] = self.lengths.get(row, 0) + 1
            kept.append(self.lengths[row] < 3 + 4 * row)
        return kept


@pytest.mark.usefixtures("fresh_input")
@pytest.mark.parametrize("make_rule", [FullLength, Capricious])
def test_the_draft_is_the_same_with_prompt_lookup_and_takes_fewer_steps(make_rule):
    saved = 0
    for _ in range(60):
        requests = []
        for row in sorted(random.sample(range(9), random.randrange(1, 5))):
            text = text_of(*[random.randrange(VOCABULARY) for _ in range(random.randrange(1, 60))])
            ends = frozenset(random.sample(range(VOCABULARY), random.randrange(2)))
            requests.append(DraftRequest(row, int(text[-1]), len(text) - 1, random.randrange(1, 20), ends, text))
        plain, looking_up = Model(), Model()
        expected = draft_tokens(requests, plain, make_rule())
        assert draft_tokens(requests, looking_up, make_rule(), PromptLookup(FLAT, 7)) == expected
        assert looking_up.num_steps <= plain.num_steps
        saved += plain.num_steps - looking_up.num_steps
        for request in requests:
            # No position beyond those of the longest draft, and the cache holds the draft, not a wrong candidate.
            fed = [position for row, position in looking_up.cache if row == request.row]
            assert max(fed) <= request.position + request.max_draft_tokens - 1
            text = [request.last_token_id, *expected[request.row]]
            known = [looking_up.cache.get((request.row, request.position + i)) for i in range(len(text))]
            assert known[:-1] == text[:-1]
    assert saved > 50


def test_a_step_is_reported_with_what_it_was_fed_and_gave():
    class Recorder(FullLength):
        steps = ()

        def stepped(self, num_fed, num_drafted):
            self.steps += ((num_fed, num_drafted),)

    # 1 -> 5 -> 3 -> 4 -> 8 by the model, away from positions that are multiples of six.
    text = text_of(1, 5, 3, 0, 0, 0, 1)
    rule = Recorder()
    drafts = draft_tokens([DraftRequest(0, 1, 7, 4, frozenset(), text)], Model(), rule, PromptLookup(FLAT, 3))
    assert drafts == {0: [5, 3, 4, 8]}
    assert rule.steps == ((4, 3), (1, 1))
