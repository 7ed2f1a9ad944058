"""The draft loop and its lengths, with a forward pass that is worked out by hand."""

import torch

from vllm_sirius.drafting.length import max_useful_draft_tokens
from vllm_sirius.drafting.loop import DraftRequest, draft_tokens
from vllm_sirius.pacing.policy import FullLength

VOCABULARY = 50


class NextNumber:
    """A model that always continues n with n + 1, and records what it was fed."""

    def __init__(self):
        self.steps = []

    def __call__(self, rows, counts, token_ids, positions):
        assert counts == [1] * len(rows)
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
        FullLength(),
    )
    assert drafts == {0: [11, 12, 13], 2: [21]}
    assert model.steps == [([0, 2], [10, 20], [5, 90]), ([0], [11], [6]), ([0], [12], [7])]


def test_the_draft_never_proposes_the_end_of_text():
    model = NextNumber()
    ends = frozenset({12})
    drafts = draft_tokens([DraftRequest(0, 10, 0, 8, ends), DraftRequest(1, 11, 0, 8, ends)], model, FullLength())
    assert drafts == {0: [11], 1: []}
    assert len(model.steps) == 2


def test_nothing_to_draft_runs_nothing():
    model = NextNumber()
    assert draft_tokens([], model, FullLength()) == {}
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


class UpTo:
    """A rule that gives every row a budget of draft steps and keeps no token above `last`."""

    def __init__(self, budgets, last):
        self.budgets = dict(budgets)
        self.last = last

    def choose(self, rows):
        chosen = [row for row in rows if self.budgets[row] > 0]
        for row in chosen:
            self.budgets[row] -= 1
        return chosen

    def proposed(self, rows, logits):
        return [token <= self.last for token in logits.argmax(dim=-1).tolist()]

    def stepped(self, num_fed, num_drafted):
        pass


def test_a_rule_ends_single_rows_and_whole_drafts():
    model = NextNumber()
    requests = [
        DraftRequest(0, 10, 0, 8, frozenset()),
        DraftRequest(1, 20, 0, 8, frozenset({22})),
        DraftRequest(3, 30, 0, 8, frozenset()),
        DraftRequest(4, 5, 0, 8, frozenset()),
    ]
    drafts = draft_tokens(requests, model, UpTo({0: 3, 1: 3, 3: 0, 4: 1}, last=12))
    # Row 0 may take 3 steps, the third token is 13 and not kept; row 1 proposes above `last` at once; row 3 never starts.
    assert drafts == {0: [11, 12], 1: [], 3: [], 4: [6]}
    assert [rows for rows, _, _ in model.steps] == [[0, 1, 4], [0], [0]]
    assert model.steps[1] == ([0], [11], [1])
