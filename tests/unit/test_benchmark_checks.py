"""The benchmarks that check one thing: a busy start, and two checkouts side by side."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support.real_models import ROOT

from benchmarks import busy_start, checkouts
from vllm_sirius.measuring.engine import Answers


def test_the_first_seconds_after_a_busy_start_count_apart():
    turns = [
        busy_start.Turn(busy_start.QUIET, 0, 0.0, 10, 1.0),
        busy_start.Turn(busy_start.BUSY, 0, 1.0, 10, 4.0),
        # A round belongs where it began, for both engines.
        busy_start.Turn(busy_start.BUSY, 1, 29.0, 10, 2.0),
        busy_start.Turn(busy_start.QUIET, 1, 31.0, 10, 1.0),
        busy_start.Turn(busy_start.QUIET, 2, 32.0, 20, 1.0),
        busy_start.Turn(busy_start.BUSY, 2, 33.0, 20, 2.0),
        busy_start.Turn(busy_start.BUSY, 3, 36.0, 40, 2.0),
    ]
    found = busy_start.rates(turns, 30.0)
    assert found[False] == {busy_start.QUIET: 10.0, busy_start.BUSY: pytest.approx(20 / 6)}
    assert found[True] == {busy_start.QUIET: 20.0, busy_start.BUSY: 15.0}


def test_busy_loops_end_with_their_block():
    with busy_start.busy_loops(2) as loops:
        assert [loop.poll() for loop in loops] == [None, None]
    assert all(loop.poll() == -signal.SIGKILL for loop in loops)


def answers(seconds: float, tokens: int = 8, passes: int = 2, drafted: int = 6, accepted: int = 3) -> Answers:
    return Answers([[1] * tokens], seconds, passes, drafted, accepted, [])


def test_the_ratio_of_two_checkouts_is_before_over_after_round_by_round():
    rounds = [(answers(2.0), answers(1.0)), (answers(3.0), answers(3.0)), (answers(1.0), answers(2.0))]
    assert checkouts.ratios(rounds) == "1.000 (0.750-1.500, 3 turns)"
    assert checkouts.ratios([(answers(3.0), answers(2.0))]) == "1.500 (1.500-1.500, 1 turns)"


def test_what_a_checkout_drafted_is_told_for_each_pass():
    assert (
        checkouts.drafting([answers(1.0), answers(1.0, passes=1, drafted=3)]) == "3 passes, 3.00 drafted, 2.00 accepted"
    )
    assert (
        checkouts.drafting([answers(1.0, passes=0, drafted=0, accepted=0)]) == "0 passes, 0.00 drafted, 0.00 accepted"
    )


def test_each_checkout_begins_as_often_as_the_other(monkeypatch):
    asked = []

    class Engine:
        def __init__(self, name: str, seconds: float) -> None:
            self.name, self.seconds = name, seconds

        def generate(self, prompts, max_tokens, **sampling):
            asked.append(self.name)
            return answers(self.seconds)

    monkeypatch.setattr(checkouts, "PAUSE_SECONDS", 0.0)
    engines = {"before": Engine("before", 2.0), "after": Engine("after", 1.0)}
    taken = [checkouts._by_turns(engines, [1, 2], 8, number) for number in range(2)]
    assert asked == ["before", "after", "after", "before"]
    assert taken == [(answers(2.0), answers(1.0))] * 2


def test_a_folder_without_the_project_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert checkouts.main(["--before", str(tmp_path), "--model", str(ROOT)]) == 1
    assert f"--before {tmp_path}: this is no checkout" in capsys.readouterr().err
