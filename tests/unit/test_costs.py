"""What passes cost by their size: order, locality, learning and forgetting, on random engines and random observations."""

from __future__ import annotations

import random

import pytest

from vllm_sirius.pacing.costs import ENOUGH, WINDOW, CostCurve, StepCosts

SIZES = (1, 2, 3, 4, 5, 8, 9, 12, 16, 17, 32, 33, 64, 65, 100, 128, 200, 256, 512, 1000)


def random_cost(generator):
    """Seconds by size of a made-up machine, whose kernels take blocks of tokens."""
    base, token, block, jump = (
        10 ** generator.uniform(-3, -0.5),
        10 ** generator.uniform(-5, -3),
        generator.choice((1, 4, 16)),
        10 ** generator.uniform(-4, -1.5),
    )
    return lambda size: base + token * size + jump * (-(-size // block) - 1)


def assert_sound(curve):
    """Rising and positive, at every size."""
    seconds = [curve.seconds(size) for size in (*range(1, 140), 150, 200, 256, 300, 511, 512, 513, 1000, 5000)]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_a_curve_is_straight_between_its_points_and_grows_in_proportion_beyond():
    curve = CostCurve({1: 1.0, 4: 4.0, 8: 6.0})
    assert [curve.seconds(size) for size in (1, 2, 4, 6, 8, 12)] == pytest.approx([1, 2, 4, 5, 6, 9])
    assert CostCurve({4: 2.0, 8: 3.0}).seconds(1) == 2.0
    measured = {1: 0.10, 2: 0.11, 4: 0.12, 8: 0.14, 16: 0.18}
    curve = CostCurve(measured)
    found = [curve.seconds(size) for size in (1, 3, 4, 12, 16, 32)]
    assert found == pytest.approx([0.10, 0.115, 0.12, 0.16, 0.18, 0.36])


def test_a_measurement_above_that_of_a_larger_size_was_held_up():
    curve = CostCurve({1: 1.0, 2: 9.0, 4: 1.2, 8: 7.0, 16: 2.0})
    assert [curve.seconds(size) for size in (1, 2, 4, 8, 16)] == [1.0, 1.2, 1.2, 2.0, 2.0]


@pytest.mark.parametrize("seed", range(40))
def test_no_observations_make_a_larger_pass_cheaper_or_anything_free(seed):
    generator = random.Random(seed)
    sizes = generator.sample(SIZES, generator.randint(0, 8))
    curve = CostCurve({size: 10 ** generator.uniform(-4, 1) for size in sizes})
    curve.observe(generator.choice(SIZES), 0.1)
    for _ in range(60):
        for _ in range(generator.choice((1, 1, 1, 40))):
            curve.observe(generator.choice(SIZES), 10 ** generator.uniform(-6, 2))
        assert_sound(curve)


def test_two_long_requests_and_sixteen_short_ones_by_turns():
    """Observations beyond the last measured size used to bend all others: negative seconds, then a division by zero."""

    def true(size, context):
        return 0.010 + 0.0004 * size + context

    curve = CostCurve({size: true(size, 0) for size in (1, 2, 4, 8, 16, 32, 64)})
    for _ in range(60):
        curve.observe(32, true(32, 0.025))
    assert_sound(curve)
    assert curve.seconds(32) == true(32, 0.025)
    for _ in range(20_000):
        curve.observe(256, true(256, 0))
    assert_sound(curve)
    assert curve.seconds(256) == true(256, 0)
    assert curve.seconds(32) == true(32, 0.025)
    assert curve.seconds(16) == true(16, 0)


def test_what_is_far_bends_nothing():
    curve = CostCurve({1: 0.1, 16: 0.2, 64: 0.3})
    before = {size: curve.seconds(size) for size in (1, 2, 8, 16, 40, 64)}
    for _ in range(100):
        curve.observe(512, 0.8)
    assert {size: curve.seconds(size) for size in before} == before
    assert curve.seconds(512) == 0.8


@pytest.mark.parametrize("seed", range(20))
def test_sizes_that_ran_are_left_alone_by_others(seed):
    """As long as order does not demand more."""
    generator = random.Random(seed)
    cost = random_cost(generator)
    curve = CostCurve({size: cost(size) * generator.uniform(0.5, 3.0) for size in (1, 2, 4, 8, 16, 32, 64)})
    known = generator.sample((1, 3, 4, 5, 9, 16, 17, 64, 256), 4)
    for size in known:
        for _ in range(ENOUGH):
            curve.observe(size, cost(size))
    for _ in range(500):
        size = generator.choice(SIZES)
        if size not in known:
            curve.observe(size, cost(size))
    for size in known:
        assert curve.seconds(size) == pytest.approx(cost(size))


@pytest.mark.parametrize("seed", range(20))
def test_a_changed_cost_is_learnt_within_a_few_passes_whatever_was_measured(seed):
    generator = random.Random(seed)
    before, now = random_cost(generator), random_cost(generator)
    curve = CostCurve({size: before(size) * 10 ** generator.uniform(-1, 1) for size in (1, 2, 4, 8, 16, 32, 64)})
    sizes = generator.sample((1, 2, 3, 4, 5, 16, 17, 33, 64, 128, 300), 4)
    for _ in range(200):
        curve.observe(generator.choice(sizes), before(generator.choice(sizes)))
    for _ in range(WINDOW // 2 + 1):
        for size in sizes:
            curve.observe(size, now(size))
    for size in sizes:
        assert curve.seconds(size) == pytest.approx(now(size), rel=0.1)


@pytest.mark.parametrize("factor", [0.1, 0.3, 3.0, 10.0])
def test_a_wrong_start_measurement_yields_at_once(factor):
    curve = CostCurve({size: factor * (1.0 + 0.1 * size) for size in (1, 2, 4, 8, 16)})
    for _ in range(1 if factor > 1 else 2):
        curve.observe(4, 1.4)
    assert curve.seconds(4) == 1.4
    # What was too dear along with it is not believed either: it might never run to say so itself.
    expected = max(0.1 * 2.6 if factor < 1 else 2.6, 1.4) if factor != 0.3 else 1.4
    assert curve.seconds(16) == pytest.approx(expected)
    curve.observe(16, 50.0)
    curve.observe(16, 50.0)
    curve.observe(16, 50.0)
    assert curve.seconds(16) == 50.0


@pytest.mark.parametrize("seed", range(5))
def test_passes_that_were_held_up_do_not_matter(seed):
    """One in ten takes twenty times as long, the others vary by a twentieth."""
    generator = random.Random(seed)
    cost = random_cost(generator)
    curve = CostCurve({size: cost(size) for size in (1, 4, 16, 64)})
    sizes = (1, 2, 5, 16, 40, 64)
    far, worst = 0, 0.0
    for step in range(3000):
        size = generator.choice(sizes)
        spike = 20.0 if generator.random() < 0.1 else 1.0
        curve.observe(size, cost(size) * generator.uniform(0.95, 1.05) * spike)
        if step >= 200:
            off = max(abs(curve.seconds(size) / cost(size) - 1.0) for size in sizes)
            far += off > 0.06
            worst = max(worst, off)
    assert far <= 30, worst


def test_the_first_token_beyond_a_block_is_told_from_the_last_of_it():
    def cost(size):
        return 1.0 + (size > 4) + 2.0 * (size > 16) + 4.0 * (size > 64)

    curve = CostCurve({1: 1.0, 64: 5.0})
    for size in (3, 4, 5, 6, 15, 16, 17, 18, 63, 64, 65, 66) * ENOUGH:
        curve.observe(size, cost(size))
    for size in (3, 4, 5, 6, 15, 16, 17, 18, 63, 64, 65, 66):
        assert curve.seconds(size) == cost(size)


def test_where_order_makes_one_yield_it_is_the_one_that_has_not_run_for_long():
    curve = CostCurve()
    for _ in range(WINDOW):
        curve.observe(16, 1.0)
    for _ in range(3000):
        curve.observe(1, 2.0)
    assert curve.seconds(1) == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_what_is_no_duration_says_nothing(seconds):
    curve = CostCurve({1: 1.0})
    curve.observe(1, seconds)
    assert curve.num_observations(1) == 0
    assert curve.seconds(1) == 1.0


def test_a_curve_without_measurements_learns_from_what_runs():
    curve = CostCurve()
    assert not curve
    curve.observe(8, 2.0)
    assert curve
    assert [curve.seconds(size) for size in (1, 8, 16)] == [2.0, 2.0, 4.0]


def test_costs_go_into_a_report_and_come_out_of_it():
    costs = StepCosts({1: 0.05, 2: 0.06}, {1: 0.1, 2: 0.11, 16: 0.18})
    costs.target.observe(5, 0.14)
    costs.target.observe(5, 0.14)
    report = costs.as_dict()
    assert report["target_seconds"] == {"1": 0.1, "2": 0.11, "5": 0.14, "16": 0.18}
    assert StepCosts.from_report(report).as_dict() == report


def test_a_machine_that_turns_out_to_have_been_busy_makes_doubtful_what_it_took_then():
    """What has not run since might be thought too dear to run ever again."""
    curve = CostCurve()
    for size in (1, 4, 16) * WINDOW:
        curve.observe(size, 4.0 * (1.0 + 0.1 * size))
    curve.observe(4, 1.4)
    assert curve.seconds(16) == 4.0 * 2.6
    curve.observe(4, 1.4)
    assert [curve.seconds(size) for size in (1, 4, 16)] == pytest.approx([1.1, 1.4, 2.6])
    # A size that is the same as before says so soon.
    for _ in range(4):
        curve.observe(16, 4.0 * 2.6)
    assert curve.seconds(16) == 4.0 * 2.6


def test_a_size_that_gets_slower_says_nothing_of_others():
    curve = CostCurve()
    for size in (1, 4, 16) * WINDOW:
        curve.observe(size, 1.0 + 0.1 * size)
    for _ in range(WINDOW):
        curve.observe(1, 1.3)
    assert [curve.seconds(size) for size in (1, 4, 16)] == pytest.approx([1.3, 1.4, 2.6])


def test_a_size_that_gets_slow_and_fast_by_turns_leaves_others_alone():
    """Each turn once halved what a size took that did not run meanwhile: zero seconds at last, and a division by them."""
    curve = CostCurve({1: 0.03, 8: 0.04})
    for _ in range(WINDOW):
        curve.observe(1, 0.03)
    for _ in range(2000):
        for seconds in (0.08, 0.08, 0.08, 0.08, 0.04, 0.04):
            curve.observe(8, seconds)
            assert curve.seconds(1) >= 0.02
    assert curve.seconds(1) == 0.03


def test_what_is_doubted_is_not_doubted_again_before_it_ran():
    """Several sizes find out that the machine is free, one after the other."""
    curve = CostCurve()
    for size in (1, 4, 16, 64) * WINDOW:
        curve.observe(size, 4.0 * (1.0 + 0.1 * size))
    for size in (4, 16, 64):
        for _ in range(2):
            curve.observe(size, 1.0 + 0.1 * size)
    assert curve.seconds(1) == pytest.approx(1.1)


def test_no_doubt_makes_a_size_faster_than_it_ever_was():
    """A batch has long texts by turns, a single request between them has none."""
    curve = CostCurve({1: 1.0, 8: 1.2})
    for _ in range(WINDOW):
        for size, seconds in ((8, 1.2), (1, 1.0)):
            curve.observe(size, seconds)
    for _ in range(50):
        for size, seconds in ((8, 4.0), (1, 1.0)) * WINDOW:
            curve.observe(size, seconds)
        for _ in range(2):
            curve.observe(8, 1.2)
        assert curve.seconds(1) == 1.0


def test_a_doubt_takes_away_no_knowledge_of_how_often_a_size_ran():
    """Else steps without drafts would be tried as often as on the first day."""
    curve = CostCurve()
    for size in (1, 16) * WINDOW:
        curve.observe(size, 4.0)
    for _ in range(2):
        curve.observe(16, 1.0)
    assert curve.seconds(1) == 1.0
    assert curve.num_observations(1) == WINDOW
    for _ in range(2):
        curve.observe(1, 4.0)
    assert curve.num_observations(1) == WINDOW


def test_no_clock_makes_a_pass_free():
    """Some tell no time that is shorter than their tick."""
    curve = CostCurve({1: 0.0, 8: 5e-324})
    for seconds in (5e-324, 1e-300) * WINDOW:
        curve.observe(4, seconds)
    assert all(1.0 / curve.seconds(size) < 1e9 for size in (1, 2, 4, 8, 100))
