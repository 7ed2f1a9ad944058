"""The benchmarks count, pair and refuse as their README says."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from benchmarks import (
    charts,
    commands,
    compare,
    latency,
    plot,
    results,
    run,
    schedule,
    server,
    setting,
)
from benchmarks.answers import final_number, gold_number, is_correct
from benchmarks.configurations import CATALOGUE, Configuration, choose
from benchmarks.errors import BenchmarkError, exit_status
from benchmarks.prompts import Prompt
from benchmarks.results import Record, Result
from benchmarks.summary import count_identical, paired_ratios, summarise
from vllm_sirius.config import SiriusConfig

FACTS = {
    "kind": "run",
    "model": "a-model",
    "engine": {"dtype": "bfloat16"},
    "sampling": {"temperature": 0.0, "max_tokens": 8},
    "repeats": 2,
    "step_bytes": 1_000_000_000,
    "cores": 2,
    "cpu": "a processor",
    "vllm": "vllm 0",
    "vllm_sirius": "vllm-sirius 0",
    "commit": "abc",
    "date": "2026-01-02T03:04:05+00:00",
}


def record(arm: str, repeat: int, seconds: float, tokens: int = 10, prompt: int = 0, **more: object) -> Record:
    values = {"task": "gsm8k", "batch": 1, "engine_group": 0, "token_ids": [[1] * tokens], **more}
    return Record(arm=arm, repeat=repeat, prompts=[prompt], tokens=tokens, seconds=seconds, **values)


def arm_report(options: dict[str, object], **more: object) -> dict[str, object]:
    return {"speculative_config": options, "kernel_size": 4, "draft_density": 0.25, "status": "measured", **more}


def example() -> Result:
    """Two rounds: vLLM compiled is the faster alone, the draft runs at 20 and 30 tokens a second."""
    drafts = {"num_drafts": 4, "num_draft_tokens": 12, "num_accepted_tokens": 6, "accepted_by_position": [3, 2, 1]}
    records = [
        record("vllm", 0, 1.0),
        record("vllm-compiled", 0, 0.5),
        record("sirius", 0, 0.5, **drafts, correct=[True]),
        record("vllm", 1, 1.0),
        record("vllm-compiled", 1, 0.8),
        record("sirius", 1, 0.4, tokens=12, **drafts, correct=[False]),
    ]
    arms = {
        "vllm": arm_report({}),
        "vllm-compiled": arm_report({}),
        "sirius": arm_report({"method": "sirius"}, extra_memory_bytes=3 << 20),
    }
    return Result(dict(FACTS), arms, records)


def test_arms_of_the_catalogue_and_their_suffixes():
    arms = choose(["draft-model", "int4-lossless@8+compiled", "ngram@3", "vllm-compiled"], [], "a/model")
    assert [arm.name for arm in arms] == ["vllm", "draft-model", "int4-lossless@8+compiled", "ngram@3", "vllm-compiled"]
    alone, drafter, low_bit, ngram, compiled = arms
    assert alone.alone
    assert not alone.compiled
    assert drafter.speculative_config == {"method": "draft_model", "num_speculative_tokens": 4, "model": "a/model"}
    assert low_bit.compiled
    assert low_bit.sirius == SiriusConfig(
        kernel_size=8, sparsity="none", draft_weights="int4", draft_weights_scope="all", acceptance="lossless"
    )
    assert (ngram.speculative_config["num_speculative_tokens"], ngram.kernel_size) == (2, 3)
    assert compiled.alone
    assert compiled.compiled
    assert CATALOGUE["ngram"]["num_speculative_tokens"] == 4, "the catalogue itself must not change"


def test_all_arms_can_be_compiled_at_once():
    names = ["int4-lossless", "vllm-compiled"]
    assert [arm.compiled for arm in choose(names, [], None)] == [False, False, True]
    assert [arm.compiled for arm in choose(names, [], None, compiled=True)] == [True, True, True]


def test_every_arm_of_the_catalogue_is_valid():
    assert len(choose(list(CATALOGUE), [], "a/model")) == len(CATALOGUE)


def test_the_best_settings_are_valid_and_of_their_rule():
    best = json.loads((Path(setting.__file__).parent / "best.json").read_text())
    assert "qwen2.5-coder-1.5b-instruct" in best
    for rules in best.values():
        for rule, options in rules.items():
            assert SiriusConfig.from_options(options).acceptance == rule


def test_an_arm_of_the_users_own():
    own = 'mine+compiled={"method": "sirius", "density": 0.3}'
    found = choose([], [own], None)[-1]
    assert (found.name, found.compiled, found.sirius.density) == ("mine+compiled", True, 0.3)


@pytest.mark.parametrize(
    ("names", "own", "words"),
    [
        (["int5"], [], "int5: there is no such arm; choose from vllm, "),
        (["vllm@4"], [], "has no kernel size; drop @4"),
        (["default@x"], [], "@x is not a kernel size"),
        (["default@1"], [], "@1 is not a kernel size"),
        (["default@500"], [], "kernel_size=500 is not a whole number from 2 to 128"),
        (["draft-model"], [], "give its path with --draft-model"),
        ([], ["mine"], "write NAME=JSON"),
        ([], ["../mine={}"], "write NAME=JSON"),
        ([], ["mine={"], "is not JSON"),
        ([], ["mine={}"], "names no method"),
        ([], ['default={"method": "sirius"}'], "there is an arm of this name"),
        ([], ['mine={"method": "sirius", "densty": 1}'], "did you mean 'density'?"),
    ],
)
def test_a_bad_arm_is_refused(names, own, words):
    with pytest.raises(BenchmarkError, match=re.escape(words)):
        choose(names, own, None)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so she has 18 dollars.", "18"),
        ("it costs $1,450,000.50!", "1450000.50"),
        ("10-3=7, and 7 - 10 is -3", "-3"),
        ("that leaves 10-3", "3"),
        ("**\\boxed{42}**", "42"),
        ("either 3, 4 or 5,", "5"),
        ("none", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_answers_are_scored_by_value():
    gold = str(gold_number("2 * 9 = <<2*9=18>>18\n#### 1,018"))
    assert is_correct("The answer is 1018.00.", gold)
    assert not is_correct("The answer is 1018, or 7 a day.", gold)
    assert not is_correct("I cannot say.", gold)
    with pytest.raises(ValueError, match="without a number"):
        gold_number("the answer is 3")


def test_only_whole_batches_are_answered():
    assert schedule.batches([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4]]
    assert schedule.batches([1, 2], 1) == [[1], [2]]


def test_each_arm_has_the_first_turn_as_often_as_any_other():
    turns = [schedule.rotated("abc", turn) for turn in range(6)]
    assert turns[:3] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    assert [turn[0] for turn in turns].count("a") == 2
    assert schedule.rotated([], 3) == []


def test_engines_are_divided_by_memory_with_vllm_alone_in_each_group():
    alone, others = {"vllm": 4}, {"a": 3, "b": 3, "c": 6, "d": 1}
    assert schedule.split_by_memory(alone, others, 10) == [["vllm", "a", "b"], ["vllm", "c"], ["vllm", "d"]]
    assert schedule.split_by_memory(alone, others, 17) == [["vllm", "a", "b", "c", "d"]]
    assert schedule.split_by_memory(alone, {}, 4) == [["vllm"]]
    with pytest.raises(BenchmarkError, match="arm c beside vllm: needs about"):
        schedule.split_by_memory(alone, others, 9)
    with pytest.raises(BenchmarkError, match="--arms vllm: needs about"):
        schedule.split_by_memory(alone, others, 3)


def test_ratios_are_taken_round_by_round_to_the_faster_of_vllm_alone():
    rows = {row.arm: row for row in summarise(example())}
    # vllm-compiled: 20 and 12.5 tokens/s; sirius: 20 and 30.
    assert rows["sirius"].best_alone == "vllm-compiled"
    assert rows["sirius"].ratios == pytest.approx((1.0, 2.4))
    assert rows["sirius"].ratio == pytest.approx((1.35, 1.7, 2.05))
    assert rows["sirius"].speed == pytest.approx((22.5, 25.0, 27.5))
    assert rows["vllm"].ratios == pytest.approx((0.5, 0.8))
    assert rows["vllm-compiled"].ratios == (1.0, 1.0)


def test_counts_identity_and_accuracy():
    rows = {row.arm: row for row in summarise(example())}
    row = rows["sirius"]
    assert row.counts.acceptance_length == 2.5
    assert row.counts.accepted_by_position == (6, 4, 2)
    assert row.mean_drafted == 3.0
    # The answer of the second repeat has two tokens more than that of vLLM alone.
    assert (row.num_identical, row.num_compared) == (1, 2)
    assert row.accuracy == 0.5
    # 22 tokens, of which 12 were accepted drafts: 10 passes of the target.
    assert row.passes_per_token == pytest.approx(10 / 22)
    assert row.drafted_per_token == pytest.approx(24 / 22)
    assert rows["vllm"].identical_share is None
    assert rows["vllm"].accuracy is None


def test_a_round_that_was_cut_off_counts_by_the_prompts_that_both_answered():
    one = [record("a", 0, 1.0, prompt=0)]
    other = [record("b", 0, 2.0, prompt=0), record("b", 0, 100.0, prompt=1)]
    assert paired_ratios(one, other) == [2.0]
    assert paired_ratios(one, [record("b", 1, 2.0)]) == []
    assert paired_ratios(one, [record("b", 0, 2.0, engine_group=1)]) == []
    assert count_identical(one, [record("b", 0, 2.0, engine_group=1)]) == (0, 0)


def test_the_file_keeps_every_record_and_shows_no_half(tmp_path):
    result = example()
    path = tmp_path / results.FILE
    result.write(path)
    assert results.read(path) == result
    assert results.read(tmp_path) == result
    assert [file.name for file in tmp_path.iterdir()] == [results.FILE]
    assert len(path.read_text().split('"records": [\n')[1].splitlines()) == len(result.records) + 2


@pytest.mark.parametrize("text", ["", "[]", '{"records": [{}], "provenance": {}, "arms": {}}'])
def test_a_file_that_is_not_a_runs_is_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(BenchmarkError, match="not the file of a run"):
        results.read(path)
    with pytest.raises(BenchmarkError, match="there is no such file"):
        results.read(tmp_path / "none.json")


def test_the_table_shows_medians_spread_and_what_is_unknown(tmp_path, capsys):
    result = example()
    result.arms["suffix"] = arm_report({"method": "suffix"}, status="not installed: arctic-inference")
    result.write(tmp_path / results.FILE)
    assert compare.main([str(tmp_path), "--markdown"]) == 0
    printed = capsys.readouterr().out
    cells = ["sirius", "25.0 (22.5-27.5)", "1.70x (1.35-2.05)", "2.50/4", "3.0", "1/2", "50% (1/2)", "3 MiB"]
    assert f"| {' | '.join(cells)} |" in printed
    assert "| vllm-compiled | 16.2 (14.4-18.1) | 1.00x (1.00-1.00) | - | - | 2/2 | - | - |" in printed
    assert "| vllm | 10.0 (10.0-10.0) | 0.65x (" in printed
    assert "gsm8k, batch 1, ratio to vllm-compiled" in printed
    assert "suffix: not installed: arctic-inference" in printed


def test_a_table_of_text_lines_up():
    lines = compare.table([["arm", "x"], ["long name", "10"]], markdown=False).splitlines()
    assert lines == ["arm         x", "-------------", "long name  10"]


def test_bytes_of_a_token():
    result = example()
    points = {point.arm: point for point in charts.roofline_points(result, summarise(result))}
    assert points["vllm"].gigabytes == pytest.approx(1.0)
    assert points["vllm"].bandwidth == pytest.approx(10.0)
    # 10 passes and 24 draft steps of a quarter for 22 tokens.
    assert points["sirius"].gigabytes == pytest.approx(16 / 22)
    assert points["sirius"].bandwidth == pytest.approx(16 / 22 * 25)


def test_charts_are_drawn_from_the_file(tmp_path, capsys):
    result = example()
    result.write(tmp_path / results.FILE)
    assert plot.main([str(tmp_path), "--bandwidth", "20"]) == 0
    assert "batch.png: not drawn, the run has one batch size" in capsys.readouterr().out
    wider = [*result.records, *(replace(each, batch=2) for each in result.records)]
    Result(result.provenance, result.arms, wider).write(tmp_path / results.FILE)
    assert plot.main([str(tmp_path)]) == 0
    charts_drawn = sorted(file.name for file in tmp_path.glob("*.png"))
    assert charts_drawn == ["acceptance.png", "batch.png", "roofline.png", "speed_up.png"]
    assert plot.main([str(tmp_path), "--batch", "3"]) == 1
    assert "error: --batch 3: not in this run, which has [1, 2]" in capsys.readouterr().err


def test_options_of_the_command_line():
    engine = {
        "model": "m",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "speculative_config": {"method": "x"},
    }
    assert commands.options({**engine, "max_num_seqs": 4, "disable_log_stats": False}) == [
        "--enforce-eager",
        "--no-enable-prefix-caching",
        "--speculative-config",
        '{"method": "x"}',
        "--max-num-seqs",
        "4",
    ]


def test_a_report_of_bench_serve_becomes_a_record():
    report = {
        "total_output_tokens": 40,
        "duration": 2.0,
        "generated_texts": ["a", "b"],
        "spec_decode_num_drafts": 8,
        "spec_decode_draft_tokens": 24,
        "spec_decode_accepted_tokens": 10,
        "spec_decode_per_position_acceptance_rates": [0.75, 0.5, 0.0],
        "mean_ttft_ms": 5.0,
        "median_itl_ms": 3.0,
        "mean_e2el_ms": 9.0,
    }
    found = server.as_record(report, "sirius", "gsm8k", 2, 1, [4, 5])
    assert (found.tokens, found.seconds, found.answers) == (40, 2.0, ["a", "b"])
    assert found.accepted_by_position == [6, 4, 0]
    assert found.details == {"mean_ttft_ms": 5.0, "median_itl_ms": 3.0}
    alone = server.as_record({k: v for k, v in report.items() if "spec" not in k}, "vllm", "gsm8k", 2, 1, [4, 5])
    assert (alone.num_drafts, alone.accepted_by_position) == (0, [])


def test_a_report_of_bench_latency_becomes_a_record(tmp_path):
    records = [
        latency.as_record({"latencies": [1.0, seconds]}, arm, 2, 0, 16) for arm, seconds in (("vllm", 3.0), ("a", 1.0))
    ]
    assert (records[0].tokens, records[0].seconds, records[0].details) == (64, 4.0, {"latencies": [1.0, 3.0]})
    arms = {"vllm": arm_report({}), "a": arm_report({"method": "sirius"})}
    Result(dict(FACTS), arms, records).write(tmp_path / results.FILE)
    rows = {row.arm: row for row in summarise(results.read(tmp_path))}
    assert rows["a"].ratios == (2.0,)
    assert rows["a"].identical_share is None


def test_prompts_that_bench_serve_would_leave_out_are_refused():
    server.check_lengths([Prompt("gsm8k", 0, "", [1] * 1024)], 1024)
    with pytest.raises(BenchmarkError, match="prompt 3 of gsm8k has 1025 tokens"):
        server.check_lengths([Prompt("gsm8k", 3, "", [1] * 1025)], 8)
    with pytest.raises(BenchmarkError, match="--max-tokens 1025"):
        server.check_lengths([Prompt("gsm8k", 3, "", [1] * 1024)], 1025)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arms", "vllm", "--batch", "4", "--num-prompts", "2"], "--batch 4 is more than --num-prompts 2"),
        (["--model", "./nowhere"], "--model ./nowhere: there is no model"),
        (["--draft-model", "./nowhere"], "--draft-model ./nowhere: there is no model"),
        (["--data", "nowhere"], "--tasks gsm8k: there is no file gsm8k/test.jsonl in the folder of --data, nowhere"),
        (["--output", "{folder}"], "there are results already; choose another folder or add --overwrite"),
    ],
)
def test_a_bad_command_line_ends_before_anything_slow(tmp_path, capsys, arguments, words):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / results.FILE).write_text("{}")
    given = [argument.replace("{folder}", str(tmp_path / "old")) for argument in arguments]
    if "--output" not in given:
        given += ["--output", str(tmp_path / "new")]
    assert run.main(["--model", str(tmp_path), *given]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_failure_of_an_arm_is_kept_without_the_path_of_its_log(tmp_path):
    result = Result({}, {"sirius": {"status": "measured"}})
    error = ValueError(f"the engine gave no answer in time; its log is {tmp_path / 'sirius.log'}\nmore")
    setting.fail(result, Configuration("sirius", {"method": "sirius"}), tmp_path, error)
    assert result.arms["sirius"]["status"] == "failed: the engine gave no answer in time; its log is ./sirius.log"
    assert setting.any_failed(result)
    with pytest.raises(BenchmarkError, match="vllm: no"):
        setting.fail(result, Configuration("vllm", {}), tmp_path, ValueError("no"))


def test_a_program_that_is_told_to_end_ends_what_it_started():
    ended = []

    def program() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            ended.append(True)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        exit_status(program)
    assert (caught.value.code, ended) == (143, [True])
    assert signal.getsignal(signal.SIGTERM) is before


def test_names_of_models_hold_no_path(tmp_path):
    assert setting.model_name(str(tmp_path)) == Path(tmp_path).name
    assert setting.model_name("owner/model") == "owner/model"
