"""What the tuner says and writes: verdicts, the recommendation, files."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from vllm_sirius.config import SiriusConfig
from vllm_sirius.measuring.engine import Answers
from vllm_sirius.measuring.inspection import Inspection
from vllm_sirius.metrics import SpeculationCounts
from vllm_sirius.pacing.costs import StepCosts
from vllm_sirius.tuning.certainty import interval
from vllm_sirius.tuning.errors import TuningError
from vllm_sirius.tuning.grid import DEFAULT_DRAFTS, DRAFTS, RULES, Draft
from vllm_sirius.tuning.measure import Arm, MeasuredDraft
from vllm_sirius.tuning.options import TuningOptions
from vllm_sirius.tuning.predict import Prediction, choose, predict
from vllm_sirius.tuning.report import (
    Findings,
    Verdict,
    as_json,
    format_findings,
    format_verdict,
    judge,
    recommend,
    write_files,
)
from vllm_sirius.tuning.run import _write_files, choose_winners, what_is_lost
from vllm_sirius.tuning.setting import TuningSetting

COSTS = {
    "draft_seconds": {"1": 0.05, "2": 0.06},
    "target_seconds": {"1": 0.10, "2": 0.11, "4": 0.12, "8": 0.14, "16": 0.18},
}
"""What the worker's `sirius_costs` says."""


def answers(token_ids, seconds, counts=(0, 0, 0), by_position=()):
    return Answers(token_ids, seconds, *counts, list(by_position))


@pytest.fixture
def setting(tmp_path):
    options = TuningOptions("MODEL", prompts=tmp_path / "mine.txt", output=tmp_path / "out.json", max_kernel_size=4)
    inspection = Inspection("cpu", "bfloat16", "", 4096, 1000, 24, 4864, 10**9, 0.6, 0.3, 10**8)
    return TuningSetting(options, inspection, "mine.txt", [[[1, 2]], [[3]]], {"model": "MODEL", "max_num_seqs": 1}, 2)


def measured(draft: Draft, lossless_accepted, threshold_accepted) -> MeasuredDraft:
    costs = StepCosts.from_report(COSTS)
    counts = {
        rule: SpeculationCounts(10, 30, sum(accepted), accepted)
        for rule, accepted in zip(RULES, (lossless_accepted, threshold_accepted), strict=True)
    }
    predictions = {rule: predict(draft, rule, counts[rule], costs, 1, 4) for rule in RULES}
    return MeasuredDraft(draft, "24 gated FFNs", "", costs, counts, predictions)


@pytest.fixture
def findings(setting):
    """Two measured drafts and a refused one; the winner is 1.5 times as fast without a threshold, 0.75 times with one."""
    refused = MeasuredDraft(DRAFTS[1], refused="the engine stopped: no gate")
    drafts = [refused, measured(DRAFTS[0], (10, 9, 8), (10, 8, 8)), measured(DRAFTS[2], (9, 8, 7), (10, 10, 10))]
    found = Findings(setting, drafts)
    lossless, threshold = choose_winners(found)
    found.arms = [
        Arm("vLLM alone", None, [answers([[1, 2, 3]], 1.0), answers([[4, 5, 6]], 2.0)]),
        Arm("best lossless", lossless, [answers([[1, 2, 3]], 0.65), answers([[4, 5, 7]], 1.35)]),
        Arm("best threshold", threshold, [answers([[1, 2, 9]], 2.0), answers([[4, 5, 9]], 2.0)]),
    ]
    found.verdicts = judge(found.arms)
    return found


def test_each_rule_has_its_own_winner(findings):
    lossless, threshold = choose_winners(findings)
    assert (lossless.draft, lossless.acceptance, lossless.kernel_size) == (DRAFTS[0], "lossless", 4)
    assert (threshold.draft, threshold.acceptance, threshold.kernel_size) == (DRAFTS[2], "threshold", 4)


def test_no_winner_without_a_measured_draft(setting):
    with pytest.raises(TuningError, match=r"no draft could be measured:\n  fine 0.5: the engine stopped: no gate"):
        choose_winners(Findings(setting, [MeasuredDraft(DRAFTS[1], refused="the engine stopped: no gate")]))


def test_verdicts(findings):
    lossless, threshold = findings.verdicts
    assert lossless.ratio == pytest.approx(1.5)
    assert lossless.batch_ratios == pytest.approx((1 / 0.65, 2 / 1.35))
    assert (lossless.num_identical, lossless.num_answers, lossless.pays) == (1, 2, True)
    assert threshold.ratio == pytest.approx(0.75)
    assert (threshold.num_identical, threshold.pays) == (0, False)


def test_adaptive_winners_draft_up_to_the_longest_kernel_size(findings):
    arm = Arm("best lossless", choose_winners(findings)[0], adaptive_kernel_size=16)
    config = SiriusConfig.from_options(arm.speculative_config)
    assert (config.kernel_size, config.adaptive, config.acceptance) == (16, True, "lossless")


def test_only_settings_that_pay_are_written(findings, tmp_path):
    write_files(findings)
    written = json.loads((tmp_path / "out-lossless.json").read_text())
    config = SiriusConfig.from_options(written)
    assert written["method"] == "sirius"
    assert (config.sparsity, config.kernel_size, config.acceptance) == ("coarse", 4, "lossless")
    assert not (tmp_path / "out-threshold.json").exists()


def test_what_the_user_reads(findings, tmp_path):
    (tmp_path / "out-threshold.json").write_text("{}")
    text = format_findings(findings)
    assert "1.37x at 4 (accepts 3.7)" in text
    assert "fine 0.5 is left out: the engine stopped: no gate" in text
    assert (
        "Predicted 1.37x at a fixed kernel size of 4, measured 1.50x with it (1.48 to 1.54 over the prompts; " in text
    )
    assert re.search(r"with 95 % certainty 1\.[1-4]\dx to 1\.\d\dx", text)
    assert "1 of 2 answers are those" in text
    assert "Predicted 1.48x at a fixed kernel size of 4, measured 0.75x with it" in text
    slow = format_verdict(findings.verdicts[1], findings.setting.options)
    assert "slower than vLLM alone, so no file is written: do not use Sirius" in slow
    assert "out-threshold.json is from an earlier run" in slow


def verdict(findings, rule, *batch_ratios):
    """A verdict on one of the winners, with measured ratios of its own."""
    arm = next(arm for arm in findings.arms[1:] if arm.prediction.acceptance == rule)
    return Verdict(arm, sum(batch_ratios) / len(batch_ratios), batch_ratios, 1, len(batch_ratios))


def test_what_a_sample_proves():
    # Logarithms 0.1 and 0.3: mean 0.2, standard error 0.1, 12.71 of them.
    assert interval((math.exp(0.1), math.exp(0.3))) == pytest.approx((math.exp(-1.071), math.exp(1.471)))
    assert interval((2.0, 2.0, 2.0)) == pytest.approx((2.0, 2.0))
    assert interval((2.0,)) == (0.0, math.inf)
    low, high = interval([1.9, 2.1] * 20)
    assert 1.9 < low < 2.0 < high < 2.1


def test_gains_within_noise_are_no_gains(findings, tmp_path):
    """The run that was seen: 1.04x over prompts from 0.59x to 1.93x."""
    noisy = verdict(findings, "lossless", 0.59, 0.8, 0.84, 1.93)
    assert noisy.ratio == pytest.approx(1.04)
    assert not noisy.pays
    assert "may be chance, so no file is written: measure with more prompts" in format_verdict(
        noisy, findings.setting.options
    )
    findings.verdicts = [noisy, verdict(findings, "threshold", 0.9, 0.8)]
    text = recommend(findings.verdicts)
    assert text.startswith(
        "No clear winner: no setting is faster than vLLM alone beyond chance. Recommended: vLLM alone"
    )
    assert "lossless" in text
    assert text in format_findings(findings)
    write_files(findings)
    assert not list(tmp_path.glob("out-*.json"))


def test_one_batch_proves_nothing(findings):
    once = verdict(findings, "lossless", 2.0)
    assert not once.pays
    assert "one batch of prompts shows no spread" in format_verdict(once, findings.setting.options)


@pytest.mark.parametrize(
    ("lossless", "threshold", "words"),
    [
        ((2.0, 2.1, 2.2), (2.1, 2.0, 2.3), "No clear winner (threshold 0.1 over lossless"),
        ((2.0, 2.1, 2.2), (2.1, 2.0, 2.3), "Recommended: lossless, because it keeps the model's own output"),
        ((2.0, 2.1, 2.2), (1.5, 1.6, 1.7), "Recommended: lossless, which is faster"),
        ((2.0, 2.1, 2.2), (3.0, 3.1, 3.3), "threshold 0.1 is faster (threshold 0.1 over lossless"),
        ((0.9, 1.1, 0.8), (1.5, 1.6, 1.7), "Recommended: threshold 0.1, the only rule that is faster"),
        ((0.9, 0.9, 0.8), (0.5, 0.6, 0.7), "Recommended: vLLM alone. Every setting was slower"),
    ],
)
def test_of_two_that_cannot_be_told_apart_the_safer_one_is_recommended(findings, lossless, threshold, words):
    verdicts = [verdict(findings, "lossless", *lossless), verdict(findings, "threshold", *threshold)]
    assert words in recommend(verdicts)


def test_the_default_draft_is_tested_where_it_is_as_good():
    int4, other = (Draft(title, {}) for title in (DEFAULT_DRAFTS[0], "int8 all"))

    def prediction(draft, speedup):
        return Prediction(draft, "lossless", 8, 2.0, 0.5, 1.0, speedup)

    near = [prediction(other, 1.50), prediction(int4, 1.45), prediction(int4, 1.20)]
    assert choose(near, int4.title) == near[1]
    far = [prediction(other, 1.50), prediction(int4, 1.40)]
    assert choose(far, int4.title) == choose(far, "") == far[0]


def test_the_user_learns_which_prompts_are_used_and_why(setting):
    assert setting.why_these_prompts == ""
    assert "2 of 2 prompts (mine.txt)" in setting.conditions
    more = replace(setting, num_in_file=6, options=replace(setting.options, num_prompts=3, batch=2))
    assert "2 of 6 prompts (mine.txt)" in more.conditions
    assert "--num-prompts=3 takes the first 3 of 6 prompts" in more.why_these_prompts
    assert "--batch=2 leaves out the last 1 of 3, which fill no batch" in more.why_these_prompts


def test_a_file_that_cannot_be_written_takes_no_result_with_it(findings, tmp_path):
    (tmp_path / "out-lossless.json").mkdir()
    with pytest.raises(TuningError, match=r"a file cannot be written .*out-lossless") as caught:
        _write_files(findings)
    assert format_findings(findings) in str(caught.value)


def test_report_holds_everything(findings, tmp_path):
    report = json.loads(json.dumps(as_json(findings)))
    assert [draft["refused"] for draft in report["drafts"]] == ["the engine stopped: no gate", "", ""]
    assert report["drafts"][1]["costs"]["target_seconds"]["16"] == 0.18
    assert [p["kernel_size"] for p in report["drafts"][1]["predictions"]["lossless"]] == [2, 3, 4]
    assert [arm["title"] for arm in report["comparison"]] == ["vLLM alone", "best lossless", "best threshold"]
    assert [winner["pays"] for winner in report["winners"]] == [True, False]
    assert report["winners"][1]["measured_ratio"] == pytest.approx(0.75)


def test_what_an_interruption_costs(findings):
    assert "of 3 of 7 drafts are lost" in what_is_lost(findings, 7)
    assert "all drafts and the comparison" in what_is_lost(findings, 3)
