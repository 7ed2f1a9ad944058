"""The draft loop and its lengths, with a forward pass that is worked out by hand."""

import torch

from vllm_sirius.drafting.length import MIN_ADAPTIVE_LENGTH, AdaptiveLength, max_useful_draft_tokens
from vllm_sirius.drafting.loop import DraftRequest, draft_tokens

VOCABULARY = 50


class NextNumber:
    """A model that always continues n with n + 1, and records what it was fed."""

    def __init__(self):
        self.steps = []

    def __call__(self, rows, token_ids, positions):
        self.steps.append((list(rows), token_ids.tolist(), positions.tolist()))
        return torch.nn.functional.one_hot((token_ids.long() + 1) % VOCABULARY, VOCABULARY).float()


def test_every_request_drafts_to_its_own_limit_and_position():
    model = NextNumber()
    drafts = draft_tokens(
        [
            DraftRequest(0, last_token_id=10, position=5, max_draft_tokens=3, end_token_ids=frozenset()),
            DraftRequest(2, last_token_id=20, position=90, max_draft_tokens=1, end_token_ids=frozenset()),
        ],
        model,
    )
    assert drafts == {0: [11, 12, 13], 2: [21]}
    assert model.steps == [([0, 2], [10, 20], [5, 90]), ([0], [11], [6]), ([0], [12], [7])]


def test_the_draft_never_proposes_the_end_of_text():
    model = NextNumber()
    ends = frozenset({12})
    drafts = draft_tokens([DraftRequest(0, 10, 0, 8, ends), DraftRequest(1, 11, 0, 8, ends)], model)
    assert drafts == {0: [11], 1: []}
    assert len(model.steps) == 2


def test_nothing_to_draft_runs_nothing():
    model = NextNumber()
    assert draft_tokens([], model) == {}
    assert model.steps == []


def test_useful_length_stops_at_the_last_token_that_can_be_emitted():
    assert max_useful_draft_tokens(15, position=10, remaining_tokens=100, max_model_len=1000) == 15
    # One token may still be emitted: the target emits it, no draft can be used.
    assert max_useful_draft_tokens(15, position=10, remaining_tokens=1, max_model_len=1000) == 0
    assert max_useful_draft_tokens(15, position=10, remaining_tokens=4, max_model_len=1000) == 3


def test_useful_length_stops_before_the_longest_text():
    # position 97 of 100: the text has 98 tokens; two more fit, of which the target emits the last one.
    assert max_useful_draft_tokens(15, position=97, remaining_tokens=50, max_model_len=100) == 1
    assert max_useful_draft_tokens(15, position=98, remaining_tokens=50, max_model_len=100) == 0
    assert max_useful_draft_tokens(15, position=99, remaining_tokens=50, max_model_len=100) == 0


def test_adaptive_length_shrinks_on_rejection_and_recovers():
    length = AdaptiveLength(15)
    assert length.length == 15
    seen = []
    for _ in range(4):
        length.observe(length.length, 0)
        seen.append(length.length)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == MIN_ADAPTIVE_LENGTH
    length.observe(2, 2)
    assert length.length == 4
    for _ in range(3):
        length.observe(length.length, length.length)
    assert length.length == 15


def test_a_pass_without_drafts_teaches_nothing():
    length = AdaptiveLength(7)
    length.observe(0, 0)
    assert length.length == 7


def test_a_whole_draft_never_shortens_the_next_one():
    length = AdaptiveLength(15)
    length.observe(3, 3)  # short only because the text was about to end
    assert length.length == 15
