"""What is measured at the start: by turns, again where it cannot be true, briefly, and never promised beyond the bytes."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace

import pytest

from vllm_sirius.config import SiriusConfig
from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.pacing.costs import StepCosts
from vllm_sirius.pacing.start_costs import (
    LONG_PASS,
    MOST_SECONDS,
    MOST_TOKENS,
    MOST_WARM_UP_SECONDS,
    Pass,
    is_plausible,
    measure_by_turns,
    passes_to_measure,
    what_costs_promise,
)

PREDICTED = 0.3
CONFIG = SiriusConfig(draft_weights="int4", sparsity="none")


class Machine:
    """Runs passes by a clock of its own: a target step takes `step` seconds, a draft step three tenths of it.

    Args:
        step: Seconds.
        slow: Factor of a pass that starts at a time; 1 on a quiet machine.
    """

    def __init__(self, step=0.05, slow=lambda one, now: 1.0):
        self.step, self.slow = step, slow
        self.now = 0.0
        self.ran = []

    def true(self, one):
        return self.step * (PREDICTED if one.draft else 1.0) * (1.0 + 0.02 * one.size)

    def run(self, one):
        seconds = self.true(one) * self.slow(one, self.now)
        self.now += seconds
        self.ran.append(one)
        return seconds

    def sleep(self, seconds):
        self.now += seconds

    def measure(self, most_tokens=64, most_rows=32):
        passes = passes_to_measure(most_tokens, most_rows)
        return measure_by_turns(passes, self.run, PREDICTED, lambda: self.now, self.sleep)


def test_sizes_reach_as_far_as_the_engine_s_passes_do():
    def sizes(most_tokens, most_rows):
        passes = passes_to_measure(most_tokens, most_rows)
        return [one.size for one in passes if not one.draft], [one.size for one in passes if one.draft]

    assert sizes(64, 32) == ([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 5, 8, 9, 16, 17, 32])
    assert sizes(24, 3) == ([1, 2, 4, 8, 16, 24], [1, 2, 3])
    assert sizes(1, 1) == ([1], [1])
    assert sizes(100_000, 100_000)[0][-1] == MOST_TOKENS
    assert sizes(100_000, 100_000)[1][-4:] == [64, 128, 256, MOST_TOKENS]


def test_no_token_is_measured_where_no_text_of_the_engine_reaches():
    """Positions once went up to 511; a model that knows 32 reads beyond its table then. Larger passes still count."""
    assert Pass(5, True).positions(32) == [0, 1, 2, 3, 4]
    for one in passes_to_measure(4096, 4096):
        positions = one.positions(32)
        assert len(positions) == one.size
        assert max(positions) == min(one.size, 32) - 1


def test_a_quiet_machine_is_measured_as_it_is():
    machine = Machine()
    costs = machine.measure()
    for one in passes_to_measure(64, 32):
        curve = costs.draft if one.draft else costs.target
        assert curve.seconds(one.size) == pytest.approx(machine.true(one))


def test_passes_of_draft_and_target_take_turns():
    machine = Machine()
    machine.measure()
    kinds = [one.draft for one in machine.ran if one.size <= 32]
    assert max(map(len, re.findall("0+|1+", "".join(str(int(kind)) for kind in kinds)))) <= 3


@pytest.mark.parametrize("seed", range(10))
def test_spikes_in_two_of_five_passes_hardly_matter(seed):
    noise = random.Random(seed)
    costs = Machine(0.005, lambda *_: noise.choice((1.0, 1.0, 1.0, 5.0, 20.0))).measure()
    assert costs.draft_cost(1) == pytest.approx(PREDICTED, rel=0.2)


@pytest.mark.parametrize("held_up", [True, False])
def test_what_the_bytes_rule_out_is_measured_again(held_up):
    """One side is held up by a factor of ten for as long as three rounds take."""
    quiet = Machine()
    quiet.measure()
    machine = Machine(slow=lambda one, now: 10.0 if one.draft is held_up and len(machine.ran) < len(quiet.ran) else 1.0)
    machine.step = 0.002
    costs = machine.measure()
    assert is_plausible(costs, PREDICTED)
    assert costs.draft_cost(1) == pytest.approx(PREDICTED, rel=0.01)


@pytest.mark.parametrize("step", [0.01, 0.05, 0.2, 2.0])
@pytest.mark.parametrize("slow", [1.0, 3.0])
def test_a_start_stays_short(step, slow):
    machine = Machine(step, lambda *_: slow)
    machine.measure(4096, 2048)
    # A warm-up and rounds, each of which may end with a long pass of either kind.
    longest = max(machine.true(one) * slow for one in machine.ran)
    assert machine.now < MOST_WARM_UP_SECONDS + 8 * LONG_PASS + 4 * longest + 2 * MOST_SECONDS


def costs(draft, token=0.05):
    return StepCosts({1: draft, 32: draft}, {1: 1.0, 16: 1.0 + 15 * token, 64: 4.0})


def test_what_is_said_of_plausible_costs():
    said, warning = what_costs_promise(costs(0.36), CONFIG, PREDICTED, 2.5)
    assert said.startswith(
        "measured draft cost 0.36 of a target step (1000.0 ms); correcting 16 tokens costs 1.75 steps | "
    )
    assert said.endswith("speed-up of one request at most 2.24x, more where prompt lookup is right | measured in 2.5 s")
    assert warning is None


@pytest.mark.parametrize("draft", [0.02, 0.2])
def test_no_more_is_promised_than_the_bytes_allow(draft):
    """A busy start once promised 8.16x."""
    said, warning = what_costs_promise(costs(draft, token=0.0), CONFIG, PREDICTED, 1.0)
    found = re.search(r"at most ([\d.]+)x", said)
    assert float(found[1]) <= 16 / (15 * PREDICTED + 1.0) + 0.01
    assert ("its bytes say 0.30" in said) == (draft < 0.5 * PREDICTED)
    assert warning is None


def test_passes_of_one_request_are_measured_on_a_slow_machine_too():
    """A target step of half a second once was the only one; a verification pass then seemed to cost sixteen."""
    machine = Machine(0.5)
    found = machine.measure()
    assert {1, 2, 4, 8, 16} <= {int(size) for size in found.target.as_dict()}
    assert found.verify_cost(1, 16) == pytest.approx(1.32 / 1.02)
    assert what_costs_promise(found, CONFIG, PREDICTED, 1.0)[1] is None


def test_what_was_not_measured_is_no_reason_to_warn():
    said, warning = what_costs_promise(StepCosts({1: 2.0}, {1: 6.0}), CONFIG, PREDICTED, 1.0)
    assert warning is None
    assert "at most 2.67x" in said


def test_a_measurement_that_cannot_be_true_is_no_reason_to_warn():
    said, warning = what_costs_promise(costs(2.2), CONFIG, PREDICTED, 1.0)
    assert "2.20 of a target step" in said
    assert "its bytes say 0.30: the machine is busy" in said
    assert "by its bytes" in said
    assert warning is None


@pytest.mark.parametrize(
    ("config", "draft", "predicted", "advice"),
    [
        (SiriusConfig(draft_weights="int8", sparsity="coarse"), 0.95, 0.7, "draft_weights='int4' with sparsity='none'"),
        (CONFIG, 0.95, 0.7, "serve this model without Sirius"),
        (SiriusConfig(draft_weights="shared", sparsity="coarse"), 1.1, 1.0, "masked"),
    ],
)
def test_a_warning_advises_what_helps(config, draft, predicted, advice):
    _, warning = what_costs_promise(costs(draft, token=0.15), config, predicted, 1.0)
    assert "hardly draft for single requests" in warning
    assert advice in warning
    # It reads more than int4 does.
    assert "int8" not in warning


def test_passes_that_several_ranks_share_are_not_measured():
    """Rounds end by a rank's own clock; a rank that runs one pass more than another waits for it for ever."""
    from vllm_sirius.integration.measure_costs import costs_of_worker, measure_costs

    ranks = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=2))
    measured = SimpleNamespace(measure_costs=lambda: measure_costs(None, None, ranks, None))
    for runner in (measured, SimpleNamespace(speculator=measured)):
        with pytest.raises(SiriusUnsupportedError, match=r"tensor_parallel_size=2: .* clock .* tensor_parallel_size=1"):
            costs_of_worker(SimpleNamespace(model_runner=runner))
