"""The adaptive length against engines that are made up: whatever was measured at the start, it finds what pays, and soon."""

from __future__ import annotations

import itertools
import random

import pytest

from vllm_sirius.pacing import policy
from vllm_sirius.pacing.costs import StepCosts
from vllm_sirius.pacing.policy import Draft, DraftPolicy

LONGEST = 15
SIZES = (1, 2, 4, 8, 16, 32, 64)
FACTORS = (0.1, 0.4, 1.0, 2.5, 10.0)
"""Measured at the start over true."""


class Confidences:
    """Stands for logits and for the draft's confidence in them alike: a tensor takes longer than the whole rest of a step."""

    def __init__(self, values):
        self.values = values

    def tolist(self):
        return self.values


@pytest.fixture(autouse=True)
def _no_logits(monkeypatch):
    monkeypatch.setattr(policy, "confidence", lambda logits: logits)


class Engine:
    """Some requests at a time, all alike.

    Args:
        draft: Seconds of a draft step of one row, where a step of the target takes 1.
        token: Seconds that each further token adds to the target's pass.
        rate: Probability that a draft token is accepted if those before it are.
        rows: Requests.
        wrong: What was measured at the start over what is true, of draft steps and of the target's passes: numbers, or
            functions of the size.
        seed: Of the noise: a twentieth, and one step in fifty that seems to take twenty times as long.
    """

    def __init__(self, draft, token=0.03, rate=0.9, rows=1, wrong=(1.0, 1.0), seed=0):
        self.draft, self.token, self.rate, self.rows = draft, token, rate, rows
        self.random = random.Random(seed)
        self.now = self.held_up = 0.0
        self.slow = 1.0
        of_draft, of_target = (factor if callable(factor) else lambda _, factor=factor: factor for factor in wrong)
        costs = StepCosts(
            {size: of_draft(size) * self.draft_step(size) for size in SIZES},
            {size: of_target(size) * self.target(size) for size in SIZES},
        )
        self.policy = DraftPolicy(costs, clock=lambda: self.now + self.held_up)
        self.requests = [self.policy.new_request() for _ in range(rows)]
        self.lengths, self.draft_seconds = [0] * rows, 0.0

    def leave_one(self):
        """Ends all requests but one."""
        self.rows, self.requests, self.lengths = 1, self.requests[:1], self.lengths[:1]

    def draft_step(self, rows):
        return self.draft * (0.95 + 0.05 * rows)

    def target(self, size):
        return 1.0 + self.token * (size - 1) + (0.1 if size > 1 else 0.0)

    def expected(self, length):
        """Tokens that a request gets on average in a step with so many draft tokens."""
        return sum(self.rate**place for place in range(length + 1))

    def spend(self, seconds):
        """Lets a pass take as long, and seem to take longer now and then. Returns what it seems to take."""
        seconds *= self.slow
        self.now += seconds
        spike = 19.0 * seconds if self.random.random() < 0.02 else 0.0
        self.held_up += spike
        return seconds * self.random.uniform(0.95, 1.05) + spike

    def step(self):
        """Verifies the last drafts and makes the next ones. Returns the tokens that such a step gives on average."""
        size = self.rows + sum(self.lengths)
        expected = sum(map(self.expected, self.lengths))
        took, given = self.spend(self.target(size)), 0
        for request, length in zip(self.requests, self.lengths, strict=True):
            accepted = 0
            while accepted < length and self.random.random() < self.rate:
                accepted += 1
            request.judged(accepted, length)
            given += accepted + 1
        self.policy.observe_step(self.rows, size, given, took, self.draft_seconds)
        self.draw_up()
        return expected

    def draw_up(self):
        """Makes drafts."""
        self.policy.begin([Draft(row, request) for row, request in enumerate(self.requests)], self.rows)
        self.lengths, self.draft_seconds = [0] * self.rows, 0.0
        rows = list(range(self.rows))
        for _ in range(LONGEST):
            rows = self.policy.choose(rows)
            if not rows:
                break
            self.draft_seconds += self.spend(self.draft_step(len(rows)))
            kept = self.policy.proposed(rows, Confidences([self.rate] * len(rows)))
            self.policy.stepped(len(rows), sum(kept))
            rows = [row for row, keep in zip(rows, kept, strict=True) if keep]
            for row in rows:
                self.lengths[row] += 1

    def run(self, tokens):
        """Tokens per second over so many tokens of each request."""
        started, given = self.now, 0.0
        while given < tokens * self.rows:
            given += self.step()
        return given / (self.now - started)

    def best_rate(self):
        """Tokens per second of the best fixed length."""
        return max(
            self.rows
            * self.expected(length)
            / (self.slow * (self.target(self.rows * (1 + length)) + length * self.draft_step(self.rows)))
            for length in range(LONGEST + 1)
        )


ENGINES = {
    "cheap and sure": {"draft": 0.25, "rate": 0.95},
    "cheap and often wrong": {"draft": 0.25, "rate": 0.6},
    "dear and sure": {"draft": 0.6, "rate": 0.9},
    "dear verification": {"draft": 0.2, "rate": 0.85, "token": 0.15},
    "does not pay": {"draft": 1.1, "rate": 0.9},
    "pays by no means": {"draft": 2.5, "rate": 0.3},
}


QUICK = (0.1, 1.0, 10.0)
"""Factors that `make test` runs."""
WRONG = [
    pytest.param(wrong, id=f"{wrong[0]:g}-{wrong[1]:g}", marks=() if set(wrong) <= set(QUICK) else pytest.mark.slow)
    for wrong in itertools.product(FACTORS, FACTORS)
]


@pytest.mark.parametrize("seed", [7, 8, 9])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ENGINES)
def test_a_wrong_start_is_unlearnt_within_two_hundred_tokens(name, wrong, seed):
    engine = Engine(**ENGINES[name], wrong=wrong, seed=seed)
    engine.run(200)
    assert engine.run(1000 if seed > 7 else 3000) >= 0.95 * engine.best_rate()


@pytest.mark.parametrize("wrong", [(0.1, 1.0), (1.0, 10.0), (10.0, 0.1), (10.0, 10.0)], ids=str)
@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("name", ENGINES)
def test_so_it_is_in_batches(name, rows, wrong):
    engine = Engine(**ENGINES[name], rows=rows, wrong=wrong, seed=5)
    engine.run(200)
    assert engine.run(1000) >= 0.95 * engine.best_rate()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ENGINES)
def test_single_sizes_that_were_held_up_at_the_start_do_no_harm(name, seed):
    def spike(_):
        return 20.0 if noise.random() < 0.3 else 1.0

    noise = random.Random(seed)
    engine = Engine(**ENGINES[name], wrong=(spike, spike), seed=seed)
    engine.run(200)
    assert engine.run(3000) >= 0.95 * engine.best_rate()


@pytest.mark.parametrize("name", ENGINES)
def test_a_machine_that_was_busy_while_it_ran_is_free_again(name):
    """Also where nothing is drafted at that time, so that only plain steps can tell."""
    engine = Engine(**ENGINES[name], seed=3)
    engine.run(300)
    engine.slow = 4.0
    engine.run(600)
    engine.slow = 1.0
    engine.run(200)
    assert engine.run(3000) >= 0.95 * engine.best_rate()


@pytest.mark.parametrize("seed", [3, 4, 5])
@pytest.mark.parametrize("name", ENGINES)
def test_a_machine_that_is_busy_by_turns_is_free_again(name, seed):
    engine = Engine(**ENGINES[name], seed=seed)
    engine.run(300)
    for slow in (4.0, 1.0, 2.0, 1.0, 3.0, 1.5, 1.0):
        engine.slow = slow
        engine.run(200)
    assert engine.run(1000) >= 0.95 * engine.best_rate()


LOADS = (1.3, 1.6, 2.2, 2.0)


@pytest.mark.parametrize("steps", [3000, pytest.param(30_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("turn", [6, 60])
def test_a_load_that_changes_for_ever_wears_no_estimate_out(turn, steps):
    """A batch of four, then one of them alone. Estimates once went down with every turn, to zero in the end."""
    engine = Engine(0.25, rate=0.95, rows=4, seed=1)
    engine.run(300)
    plain = 0
    for step in range(steps):
        engine.slow = LOADS[step // turn % len(LOADS)]
        if step == steps - steps // 10:
            engine.leave_one()
        engine.step()
        plain += not any(engine.lengths)
        if step % 7 == 0:
            for size in (1, 2, 4, 8, 16, 32, 64):
                true = engine.slow * engine.target(size)
                assert true / 2.5 <= engine.policy.costs.target.seconds(size) <= 2.5 * true, (step, size)
    assert plain < 0.02 * steps


@pytest.mark.parametrize("name", ["cheap and sure", "dear and sure"])
def test_drafts_that_were_slow_for_a_time_are_found_out_when_they_are_fast_again(name):
    """As with a program beside it that takes the cores just while the engine drafts."""
    engine = Engine(**ENGINES[name], seed=3)
    draft, engine.draft = engine.draft, 5.0
    engine.run(600)
    engine.draft = draft
    # Probes are rare by then.
    engine.run(2500)
    assert engine.run(3000) >= 0.95 * engine.best_rate()


@pytest.mark.parametrize("name", ["does not pay", "pays by no means"])
def test_trying_costs_little_where_drafting_does_not_pay(name):
    engine = Engine(**ENGINES[name], seed=1)
    engine.run(200)
    assert engine.run(10_000) >= 0.98
