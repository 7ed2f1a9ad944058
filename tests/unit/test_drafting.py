"""The draft loop and its lengths, with a forward pass that is worked out by hand."""

import torch

from vllm_sirius.drafting.loop import DraftRequest, draft_tokens
from vllm_sirius.pacing.policy import FullLength
from vllm_sirius.request_rules import RequestRules

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


def rules(**given):
    return RequestRules(
        **{
            "enabled": True,
            "threshold": 0.1,
            "end_token_ids": frozenset(),
            "num_prompt_tokens": 5,
            "max_tokens": None,
            "min_tokens": 0,
            **given,
        }
    )


def test_useful_length_stops_at_the_last_token_that_can_be_emitted():
    # Eleven tokens of text, five of them the prompt: six are emitted.
    assert rules(max_tokens=106).most_draft_tokens(11, 15, 1000) == 15
    # One token may still be emitted: the target emits it, no draft can be used.
    assert rules(max_tokens=7).most_draft_tokens(11, 15, 1000) == 0
    assert rules(max_tokens=10).most_draft_tokens(11, 15, 1000) == 3


def test_useful_length_stops_before_the_longest_text():
    # A text of 98 of 100 tokens: two more fit, of which the target emits the last one.
    assert rules(max_tokens=200).most_draft_tokens(98, 15, 100) == 1
    assert rules().most_draft_tokens(98, 15, 100) == 1
    assert rules().most_draft_tokens(99, 15, 100) == 0
    assert rules().most_draft_tokens(100, 15, 100) == 0


def test_nothing_is_drafted_across_the_fewest_tokens_of_a_request():
    assert rules(min_tokens=10).most_draft_tokens(11, 15, 1000) == 3
    assert rules(min_tokens=7).most_draft_tokens(11, 15, 1000) == 0
    assert rules(min_tokens=6).most_draft_tokens(11, 15, 1000) == 15


def test_a_request_that_is_switched_off_drafts_nothing():
    assert rules(enabled=False).most_draft_tokens(11, 15, 1000) == 0
    assert rules(enabled=False).last_position(1000) == -1


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
        DraftRequest(4, 5, 0, 8, frozenset()),
    ]
    # The first step is chosen before: two more for row 0 and row 1, none for row 4.
    drafts = draft_tokens(requests, model, UpTo({0: 2, 1: 2, 4: 0}, last=12))
    # Row 0 may take 3 steps, the third token is 13 and not kept; row 1 proposes above `last` at once.
    assert drafts == {0: [11, 12], 1: [], 4: [6]}
    assert [rows for rows, _, _ in model.steps] == [[0, 1, 4], [0], [0]]
    assert model.steps[1] == ([0], [11], [1])
