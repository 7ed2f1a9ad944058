"""Which way draft steps run: the faster one, whatever the machine did when the engine was young."""

from __future__ import annotations

import random

import pytest

from vllm_sirius.draft.kernel_switch import LAST_INTERVAL, MOST_TOKENS, KernelSwitch


class Machine:
    """Runs draft steps by a clock of its own.

    Args:
        kernels: Seconds of a step by its tokens on the kernels.
        dense: The same on the model's own layers.
        seed: Of the noise: a twentieth, and one step in twenty that takes ten times as long.
    """

    def __init__(self, kernels, dense, seed=0):
        self.kernels, self.dense = kernels, dense
        self.random = random.Random(seed)
        self.now = 0.0
        self.slow_kernels = self.slow_dense = 1.0
        self.switch = KernelSwitch(learns=True, clock=lambda: self.now)

    def run(self, num_tokens, steps):
        """How many of the steps ran on the kernels."""
        num_kernels = 0
        for _ in range(steps):
            self.switch.begin(num_tokens)
            kernels = self.switch.kernels
            seconds = (
                self.kernels(num_tokens) * self.slow_kernels if kernels else self.dense(num_tokens) * self.slow_dense
            )
            self.now += seconds * self.random.uniform(0.95, 1.05) * (10.0 if self.random.random() < 0.05 else 1.0)
            self.switch.end()
            num_kernels += kernels
        return num_kernels


def many_rows_are_dear(num_tokens):
    """Faster than a dense layer of one second up to ten rows."""
    return 0.1 * num_tokens


def one_second(num_tokens):
    return 1.0


def test_steps_run_on_the_kernels_until_more_is_known():
    switch = KernelSwitch(learns=True)
    for num_tokens in range(1, 64):
        switch.begin(num_tokens)
        assert switch.kernels


def test_without_learning_steps_run_on_the_kernels_whatever_they_take():
    """As promised for fixed lengths: nothing that is drafted hangs on time."""
    machine = Machine(many_rows_are_dear, one_second)
    machine.switch = KernelSwitch(clock=lambda: machine.now)
    assert machine.run(32, 3000) == 3000


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("num_tokens", "kernels"), [(2, True), (5, True), (8, True), (14, False), (32, False)])
def test_the_faster_way_is_found(num_tokens, kernels, seed):
    machine = Machine(many_rows_are_dear, one_second, seed)
    machine.run(num_tokens, 100)
    share = machine.run(num_tokens, 1000) / 1000
    assert share >= 0.98 if kernels else share <= 0.03


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("steps", [10, 100, 500])
@pytest.mark.parametrize("slow", ["kernels", "dense", "both"])
@pytest.mark.parametrize(("num_tokens", "kernels"), [(4, True), (9, True), (13, False), (32, False)])
def test_noise_at_the_start_is_corrected(num_tokens, kernels, slow, steps, seed):
    """One way, or all, ten times as slow for the whole start."""
    machine = Machine(many_rows_are_dear, one_second, seed)
    if slow != "dense":
        machine.slow_kernels = 10.0
    if slow != "kernels":
        machine.slow_dense = 10.0
    machine.run(num_tokens, steps)
    machine.slow_kernels = machine.slow_dense = 1.0
    # No later than the next three trials, which come the later the longer the noise lasted.
    machine.run(num_tokens, 100 + 2 * steps)
    share = machine.run(num_tokens, 400) / 400
    assert share >= 0.95 if kernels else share <= 0.06


def test_a_machine_that_changes_is_followed():
    machine = Machine(many_rows_are_dear, one_second)
    machine.run(16, 2000)
    machine.kernels = lambda num_tokens: 0.01 * num_tokens
    machine.run(16, 2 * LAST_INTERVAL + 200)
    assert machine.run(16, 500) >= 490
    machine.kernels = many_rows_are_dear
    machine.run(16, 2 * LAST_INTERVAL + 200)
    assert machine.run(16, 500) <= 10


def test_a_close_call_stays_with_the_kernels():
    machine = Machine(lambda _: 1.0, lambda _: 0.97)
    assert machine.run(16, 4000) >= 3900


def test_trials_are_rare_and_rarest_where_few_bytes_decide():
    few, many = (Machine(lambda _: 0.3, one_second) for _ in range(2))
    assert 2000 - few.run(6, 2000) <= 5
    assert 2000 - many.run(12, 2000) <= 10
    assert Machine(lambda _: 0.3, one_second).run(1, 2000) == 2000
    assert Machine(lambda _: 0.3, one_second).run(MOST_TOKENS + 1, 2000) == 2000


def test_sizes_are_judged_apart():
    machine = Machine(many_rows_are_dear, one_second)
    for _ in range(100):
        for num_tokens in (1, 3, 20, 7):
            machine.run(num_tokens, 1)
    assert [machine.run(num_tokens, 100) >= 95 for num_tokens in (1, 3, 7, 20)] == [True, True, True, False]


def test_a_held_switch_teaches_and_tries_nothing():
    machine = Machine(many_rows_are_dear, one_second)
    with machine.switch.held():
        assert machine.run(32, 500) == 500
    machine.run(32, 100)
    with machine.switch.held():
        assert machine.run(32, 500) == 0


def test_a_step_that_never_ended_teaches_nothing():
    machine = Machine(many_rows_are_dear, one_second)
    for _ in range(50):
        machine.switch.begin(32)
        machine.now += 100.0
    machine.run(32, 100)
    assert machine.run(32, 100) <= 5
