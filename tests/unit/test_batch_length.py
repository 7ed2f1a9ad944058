"""The draft length of a batch: against engines that are made up, whose best length is known."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from vllm_sirius.pacing.batch_length import TRIAL_STEPS, USUAL_INTERVAL, BatchLength, draft_lengths

LENGTHS = draft_lengths(15)


class Engine:
    """Steps of a made-up engine.

    Args:
        base: Seconds of a step without drafts.
        draft: Seconds that each draft token adds.
        rate: Probability that a draft token is accepted if those before it are.
        seed: Of the noise.
    """

    def __init__(self, base: float, draft: float, rate: float, seed: int = 0) -> None:
        self.base, self.draft, self.rate = base, draft, rate
        self.random = random.Random(seed)
        self.policy = BatchLength(LENGTHS)
        self.verified = 0

    def seconds(self, drafted: int, verified: int, rows: int) -> float:
        return self.base * (1 + 0.01 * rows) + self.draft * drafted + 0.002 * rows * verified

    def expected(self, length: int) -> float:
        return sum(self.rate**place for place in range(length + 1))

    def best_rate(self, rows: int) -> float:
        return max(rows * self.expected(length) / self.seconds(length, length, rows) for length in LENGTHS)

    def run(self, steps: int, rows: int) -> tuple[float, Counter[int]]:
        """Tokens per second, and how often each length was chosen."""
        tokens, seconds, chosen = 0, 0.0, Counter[int]()
        for _ in range(steps):
            length = self.policy.choose(rows)
            assert length in LENGTHS
            chosen[length] += 1
            verdicts = []
            for _ in range(rows):
                accepted = 0
                while accepted < self.verified and self.random.random() < self.rate:
                    accepted += 1
                tokens += accepted + 1
                if self.verified:
                    verdicts.append((self.verified, accepted))
            took = self.seconds(length, self.verified, rows)
            seconds += took
            self.policy.observe_verdicts(verdicts)
            if length == self.verified:
                measured = took * self.random.uniform(0.95, 1.05) * (20.0 if self.random.random() < 0.01 else 1.0)
                self.policy.observe_step(rows, length, measured)
            self.verified = length
        return tokens / seconds, chosen


def test_lengths_are_few_and_reach_both_ends() -> None:
    assert draft_lengths(15) == (0, 1, 3, 7, 15)
    assert draft_lengths(4) == (0, 1, 4)
    assert draft_lengths(1) == (0, 1)
    for longest in range(1, 64):
        lengths = draft_lengths(longest)
        assert lengths[0] == 0
        assert lengths[-1] == longest
        assert list(lengths) == sorted(set(lengths))
        assert len(lengths) <= 7


@pytest.mark.parametrize("rows", [1, 6, 64])
@pytest.mark.parametrize("rate", [0.1, 0.7, 0.95])
@pytest.mark.parametrize("draft", [0.05, 0.3, 0.8, 1.5])
def test_it_comes_close_to_the_best_length_and_never_loses(draft: float, rate: float, rows: int) -> None:
    engine = Engine(1.0, draft, rate, seed=random.randrange(2**31))
    engine.run(100, rows)
    found, chosen = engine.run(3000, rows)
    plain = rows / engine.seconds(0, 0, rows)
    assert found >= 0.94 * engine.best_rate(rows), chosen
    assert found >= 0.97 * plain, chosen


def test_it_follows_when_acceptance_changes() -> None:
    engine = Engine(1.0, 0.05, 0.97)
    _, chosen = engine.run(600, 4)
    assert chosen.most_common(1)[0][0] == 15
    engine.rate = 0.01
    engine.run(300, 4)
    _, chosen = engine.run(600, 4)
    assert chosen.most_common(1)[0][0] == 0
    engine.rate = 0.97
    # Probes become rare where drafting did not pay.
    engine.run(8000, 4)
    _, chosen = engine.run(600, 4)
    assert chosen.most_common(1)[0][0] == 15


def test_it_follows_when_costs_change() -> None:
    engine = Engine(1.0, 0.1, 0.9)
    engine.run(600, 1)
    engine.draft = 2.0
    engine.run(200, 1)
    _, chosen = engine.run(600, 1)
    assert chosen.most_common(1)[0][0] == 0


def test_a_number_of_requests_is_judged_by_its_own_steps() -> None:
    engine = Engine(1.0, 0.02, 0.9)
    # Verifying a token takes 0.002 seconds: nothing beside one request's step, most of a step of 800.
    for _ in range(4):
        engine.run(150, 1)
        engine.run(150, 800)
    _, alone = engine.run(100, 1)
    _, many = engine.run(100, 800)
    assert alone.most_common(1)[0][0] == 15
    assert many.most_common(1)[0][0] < 15


def test_trials_are_short_and_rare() -> None:
    engine = Engine(1.0, 0.02, 0.97)
    _, first = engine.run(3 * TRIAL_STEPS, 2)
    assert first == {0: TRIAL_STEPS, 3: TRIAL_STEPS, 15: TRIAL_STEPS}
    _, chosen = engine.run(10 * USUAL_INTERVAL, 2)
    usual = chosen.most_common(1)[0][1]
    # Three more of them at first.
    assert usual >= 10 * USUAL_INTERVAL - 14 * TRIAL_STEPS
    assert len(chosen) > 1


def test_a_step_that_was_held_up_hardly_counts() -> None:
    policy = BatchLength(LENGTHS)
    for length in LENGTHS:
        for _ in range(3):
            policy.observe_step(1, length, 1.0 + 0.01 * length)
    for _ in range(50):
        policy.observe_verdicts([(15, 15)])
    policy.observe_step(1, 15, 1e6)
    assert [policy.choose(1) for _ in range(3 * TRIAL_STEPS + 1)][-1] == 15


@pytest.mark.parametrize("slow", [0, 3, 15])
@pytest.mark.parametrize(("draft", "rate"), [(0.05, 0.95), (0.3, 0.7), (1.5, 0.9)])
def test_a_length_that_was_slow_at_the_start_is_found_out(draft: float, rate: float, slow: int) -> None:
    """Another program takes the machine just while that length is tried for the first time."""
    engine = Engine(1.0, draft, rate)
    true = engine.seconds

    def seconds(drafted: int, verified: int, rows: int) -> float:
        return true(drafted, verified, rows) * (10.0 if drafted == slow else 1.0)

    engine.seconds = seconds  # type: ignore[method-assign]
    engine.run(3 * TRIAL_STEPS, 1)
    engine.seconds = true  # type: ignore[method-assign]
    engine.run(400, 1)
    found, chosen = engine.run(2000, 1)
    assert found >= 0.93 * engine.best_rate(1), chosen
