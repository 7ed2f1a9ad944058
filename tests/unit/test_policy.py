"""When drafting stops: costs, acceptance by confidence, and the rule that weighs them, worked out by hand."""

import math
from itertools import pairwise

import pytest
import torch

from vllm_sirius.pacing.confidence import AcceptanceModel, RequestAcceptance, confidence
from vllm_sirius.pacing.costs import CostCurve, StepCosts
from vllm_sirius.pacing.policy import (
    LAST_PROBE_STEPS,
    PLAIN_STEPS,
    PROBE_TOKENS,
    RARE_PLAIN_STEPS,
    Draft,
    DraftPolicy,
    FullLength,
)

SURE = 0.9999
"""Confidence in the highest range."""


def logits_of(*confidences):
    """Two-token logits in which the first token has the given probability."""
    return torch.tensor([[math.log(c), math.log(1 - c)] for c in confidences])


def run_drafts(policy, drafts, draft_confidence, limit=15, num_rows=None):
    """Drafts until the policy stops; the length of each draft. The clock of the test says nothing about the draft's cost."""
    policy.costs.draft.observe = lambda *_: None
    policy.begin(drafts, num_rows or len(drafts))
    rows = [draft.row for draft in drafts]
    for _ in range(limit):
        rows = policy.choose(rows)
        if not rows:
            break
        kept = policy.proposed(rows, logits_of(*[draft_confidence] * len(rows)))
        policy.stepped(len(rows), sum(kept))
        rows = [row for row, keep in zip(rows, kept, strict=True) if keep]
    return [draft.length for draft in drafts]


def trained(policy, draft_confidence, accepted, times=400):
    """A request of a policy that has seen tokens of one confidence always accepted, or always rejected."""
    request = policy.new_request()
    for _ in range(times):
        request.begin()
        request.drafted(draft_confidence)
        request.judged(int(accepted), 1)
    return request


def cheap_draft(cost=0.2, rows=8):
    return StepCosts(dict.fromkeys(range(1, rows + 1), cost), {1: 1.0, 16: 1.5, 64: 3.0})


def test_confidence_is_the_probability_of_the_likeliest_token():
    assert confidence(torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])).tolist() == pytest.approx([0.5, 0.75])


def test_acceptance_by_confidence_is_counted():
    model = AcceptanceModel()
    assert 0 < model.rate(0.1) < model.rate(0.6) < model.rate(0.97) < 1
    for _ in range(3000):
        model.observe(0.6, accepted=True)
        model.observe(0.97, accepted=False)
    assert model.rate(0.6) > 0.99
    assert 0 < model.rate(0.97) < 0.01


def test_a_request_harder_than_the_others_is_expected_to_stay_so():
    model = AcceptanceModel()
    hard, easy = RequestAcceptance(model, 0.9), RequestAcceptance(model, 0.9)
    for _ in range(30):
        for request, accepted in ((hard, 0), (easy, 1)):
            request.begin()
            request.drafted(0.97)
            request.judged(accepted, 1)
    for request in (hard, easy):
        request.begin()
    assert hard.drafted(0.97) < model.rate(0.97) < easy.drafted(0.97)


def test_tokens_that_were_never_judged_teach_nothing():
    model = AcceptanceModel()
    before = model.rate(0.97)
    request = RequestAcceptance(model, 0.9)
    request.drafted(0.97)
    request.drafted(0.97)
    request.judged(0, 0)
    assert model.rate(0.97) == before
    request.drafted(0.97)
    request.drafted(0.6)
    other = model.rate(0.6)
    request.judged(1, 1)
    assert model.rate(0.97) > before
    assert model.rate(0.6) == other


def test_a_cheap_sure_draft_goes_to_its_limit():
    policy = DraftPolicy(cheap_draft())
    request = trained(policy, SURE, accepted=True)
    assert run_drafts(policy, [Draft(0, request)], SURE) == [15]


def test_a_draft_stops_where_confidence_is_gone():
    policy = DraftPolicy(cheap_draft())
    request = trained(policy, SURE, accepted=True)
    trained(policy, 0.55, accepted=False)
    assert run_drafts(policy, [Draft(0, request)], 0.55)[0] <= 1


def test_a_dear_draft_is_not_begun_but_probed_now_and_then():
    policy = DraftPolicy(cheap_draft(cost=1.1))
    request = trained(policy, SURE, accepted=True)
    lengths = []
    for _ in range(8 * LAST_PROBE_STEPS):
        lengths.append(run_drafts(policy, [Draft(0, request)], SURE)[0])
        policy.observe_step(1, 1 + lengths[-1], 1, target=1.0 + lengths[-1] / 32, draft=1.1 * lengths[-1])
    assert sorted(set(lengths)) == [0, PROBE_TOKENS]
    probes = [step for step, length in enumerate(lengths) if length]
    # Each waits twice as long as the one before it, until they are rare.
    assert probes[:4] == [1, 5, 13, 29]
    assert {later - earlier for earlier, later in pairwise(probes[-4:])} == {LAST_PROBE_STEPS}


def test_a_draft_that_pays_is_left_out_now_and_then_to_see_what_a_step_without_it_costs():
    policy = DraftPolicy(cheap_draft())
    request = trained(policy, SURE, accepted=True)
    lengths = []
    for _ in range(2 * RARE_PLAIN_STEPS):
        lengths.append(run_drafts(policy, [Draft(0, request)], SURE)[0])
        policy.observe_step(1, 1 + lengths[-1], 1, target=1.0 + lengths[-1] / 32, draft=0.2 * lengths[-1])
    assert sorted(set(lengths)) == [0, 15]
    plain = [step for step, length in enumerate(lengths) if not length]
    # Soon while few were timed, then rarely.
    assert plain[:3] == [PLAIN_STEPS - 1, 2 * PLAIN_STEPS - 1, 3 * PLAIN_STEPS - 1]
    assert len(plain) == 4


def test_a_batch_stops_where_verification_gets_dear():
    """A pass that costs as much per token as decoding them one by one leaves nothing to gain."""
    costs = StepCosts({1: 0.2, 16: 0.4}, {1: 1.0, 16: 1.5, 32: 16.0, 64: 48.0})
    policy = DraftPolicy(costs)
    request = trained(policy, SURE, accepted=True)
    assert run_drafts(policy, [Draft(0, request)], SURE)[0] == 15
    many = [Draft(row, trained(policy, SURE, accepted=True)) for row in range(16)]
    assert max(run_drafts(policy, many, SURE)) == 0


def test_a_jump_of_the_first_further_token_is_paid_by_those_after_it():
    costs = StepCosts({1: 0.1}, {1: 1.0, 2: 1.95, 16: 2.0})
    policy = DraftPolicy(costs)
    request = trained(policy, SURE, accepted=True)
    request.next_rate = 0.95
    assert run_drafts(policy, [Draft(0, request)], SURE)[0] == 15


def test_a_faster_engine_stops_sooner():
    """Time that brings many tokens elsewhere is too dear for unlikely ones."""
    lengths = {}
    for tokens_per_step in (1, 12):
        policy = DraftPolicy(cheap_draft())
        request = trained(policy, 0.97, accepted=True, times=20)
        for _ in range(100):
            policy.observe_step(1, 16, tokens_per_step, target=1.5, draft=1.0)
        lengths[tokens_per_step] = run_drafts(policy, [Draft(0, request)], 0.7)[0]
    assert lengths[12] < lengths[1]


def test_a_new_request_is_expected_to_be_like_those_before_it():
    policy = DraftPolicy(cheap_draft())
    first = policy.new_request().next_rate
    for _ in range(100):
        run_drafts(policy, [Draft(0, trained(policy, SURE, accepted=True, times=20))], SURE)
    assert policy.new_request().next_rate > first


def test_right_candidates_make_longer_drafts_pay():
    """A step that gives four tokens for the price of one is worth four times its cost."""
    costs = {name: StepCosts({1: 0.6, 8: 0.6}, {1: 1.0, 16: 1.0}) for name in ("alone", "looked up")}
    lengths = {}
    for name, num_drafted in (("alone", 1), ("looked up", 4)):
        policy = DraftPolicy(costs[name])
        policy.costs.draft.observe = lambda *_: None
        request = trained(policy, 0.85, accepted=True, times=8)
        policy.begin([Draft(0, request)], 1)
        for _ in range(200):
            policy.choose([0])
            policy.stepped(4, num_drafted)
        request.next_rate = 0.6
        lengths[name] = run_drafts(policy, [Draft(0, request)], 0.85)[0]
    assert lengths["alone"] < lengths["looked up"]


@pytest.mark.parametrize("num_steps", [1, 3])
def test_drafts_of_full_length_are_timed_step_by_step(num_steps):
    """Not the first step of several, which also chooses the neurons; the only one all the same, or costs were never learnt."""
    now = [0.0]
    rule, costs = FullLength(lambda: now[0]), CostCurve({1: 1.0})
    for _ in range(4):
        rule.begin(costs)
        for step in range(num_steps):
            rule.choose([0])
            now[0] += 2.0 if step else 8.0
            rule.stepped(1, 1)
    rule.begin(None)
    assert costs.num_observations(1) == 4 if num_steps == 1 else 8
    assert costs.seconds(1) == (8.0 if num_steps == 1 else 2.0)
    rule.choose([0])
    rule.stepped(1, 1)
