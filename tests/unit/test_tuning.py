"""The tuner without engines: options, prompts, grid, predictions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from vllm_sirius.cli import main
from vllm_sirius.config import SiriusConfig
from vllm_sirius.measuring.engine import Answers
from vllm_sirius.metrics import SpeculationCounts
from vllm_sirius.pacing.costs import StepCosts
from vllm_sirius.request_rules import THRESHOLD_KEY, parse_request_options
from vllm_sirius.tuning.errors import TuningError
from vllm_sirius.tuning.grid import DRAFTS, RULES, choose_drafts
from vllm_sirius.tuning.measure import THRESHOLDS, add_counts
from vllm_sirius.tuning.options import TuningOptions, add_arguments, from_arguments
from vllm_sirius.tuning.predict import Prediction, acceptance_lengths, best, predict
from vllm_sirius.tuning.prompts_file import read_prompts
from vllm_sirius.tuning.setting import choose_max_model_len, whole_batches

COARSE = DRAFTS[0]
COSTS = {
    "draft_seconds": {"1": 0.05, "2": 0.06},
    "target_seconds": {"1": 0.10, "2": 0.11, "4": 0.12, "8": 0.14, "16": 0.18},
}
"""What the worker's `sirius_costs` says."""


def answers(token_ids, seconds, counts=(0, 0, 0), by_position=()):
    return Answers(token_ids, seconds, *counts, list(by_position))


# --- costs and predictions ---------------------------------------------------------------------------------------


def test_costs_of_a_batch():
    costs = StepCosts.from_report(COSTS)
    assert costs.draft_cost(1) == pytest.approx(0.5)
    assert costs.verify_cost(1, 16) == pytest.approx(1.8)
    assert costs.draft_cost(2) == pytest.approx(0.06 / 0.11)
    # 2 requests of 4 tokens are 8 tokens, against a step of 2.
    assert costs.verify_cost(2, 4) == pytest.approx(0.14 / 0.11)


def test_acceptance_length_of_whole_drafts():
    # 10 drafts of 3 tokens: 9 pass the first, 6 the second, 3 the third.
    lengths = acceptance_lengths(SpeculationCounts(10, 30, 18, (9, 6, 3)), 4)
    assert lengths == pytest.approx({2: 1.9, 3: 2.5, 4: 2.8})


def test_cut_drafts_do_not_count_as_rejected():
    # 10 drafts of 3 tokens lack 3: none of them the first, 1 the second, 2 the third token.
    lengths = acceptance_lengths(SpeculationCounts(10, 27, 20, (9, 7, 4)), 4)
    assert lengths[2] == pytest.approx(1.9)
    assert lengths[3] == pytest.approx(1.9 + 7 / 9)
    assert lengths[4] == pytest.approx(1.9 + 7 / 9 + 4 / 8)


def test_a_later_token_never_passes_more_often_than_an_earlier_one():
    # By the cuts alone the second would count 7 of 8.3 and the third 6 of 6.7, more than the 8 of 10 of the first.
    lengths = acceptance_lengths(SpeculationCounts(10, 25, 21, (8, 7, 6)), 4)
    assert lengths == pytest.approx({2: 1.8, 3: 2.6, 4: 3.4})


@pytest.mark.parametrize("counts", [SpeculationCounts(0, 0, 0), SpeculationCounts(5, 15, 0, (0, 0, 0))])
def test_nothing_accepted_is_a_length_of_one(counts):
    assert acceptance_lengths(counts, 4) == {2: 1.0, 3: 1.0, 4: 1.0}


def test_smallest_kernel_size():
    assert acceptance_lengths(SpeculationCounts(4, 4, 3, (3,)), 2) == {2: 1.75}


def test_prediction_at_every_kernel_size():
    counts = SpeculationCounts(10, 30, 27, (10, 9, 8))
    found = predict(COARSE, "lossless", counts, StepCosts.from_report(COSTS), 1, 4)
    assert [p.kernel_size for p in found] == [2, 3, 4]
    assert [p.acceptance_length for p in found] == pytest.approx([2.0, 2.9, 3.7])
    # 2 / (1 * .5 + 1.1); 2.9 / (2 * .5 + 1.15); 3.7 / (3 * .5 + 1.2)
    assert [p.speedup for p in found] == pytest.approx([1.25, 1.3488, 1.3704], abs=1e-4)
    assert best(found).kernel_size == 4


def test_of_equal_predictions_the_smaller_kernel_size_is_best():
    equal = [Prediction(COARSE, "lossless", size, 2.0, 0.5, 1.0, 1.1) for size in (8, 4, 16)]
    assert best(equal).kernel_size == 4


def test_counts_of_batches_add_up():
    first = answers([[1]], 1.0, (2, 6, 4), (2, 1, 1))
    second = answers([[1]], 1.0, (1, 2, 1), (1, 0))
    assert add_counts([first, second]) == SpeculationCounts(3, 8, 5, (3, 1, 1))


# --- grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", DRAFTS, ids=lambda draft: draft.title)
@pytest.mark.parametrize("rule", RULES)
def test_settings_are_what_the_engine_accepts(draft, rule):
    config = SiriusConfig.from_options(json.loads(json.dumps(draft.speculative_config(8, rule))))
    assert (config.kernel_size, config.acceptance, config.adaptive) == (8, rule, False)
    assert (config.draft_weights != "shared") == draft.low_bit


def test_drafts_by_machine_and_haste():
    titles = [draft.title for draft in choose_drafts(DRAFTS, quick=False, low_bit=False)]
    assert titles == ["coarse 0.5", "fine 0.5"]
    assert [draft.title for draft in choose_drafts(DRAFTS, quick=True, low_bit=True)] == [
        "coarse 0.5",
        "int8 all",
        "int4 all",
    ]
    assert choose_drafts(DRAFTS, quick=False, low_bit=True) == list(DRAFTS)


def test_requests_can_ask_a_threshold_engine_for_both_rules():
    engine = SiriusConfig.from_options(COARSE.speculative_config(16, "threshold"))
    found = {rule: parse_request_options({THRESHOLD_KEY: THRESHOLDS[rule]}, engine).threshold for rule in RULES}
    assert found["lossless"] > 1.0
    assert found["threshold"] == engine.threshold


# --- prompts -----------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_lines_of_text(tmp_path):
    found = read_prompts(write(tmp_path, "mine.txt", "one\n\n  two  \nthree\nfour\n"), 3)
    assert found.texts == ("one", "two", "three")
    assert found.num_in_file == 4
    assert found.source == "mine.txt, one prompt per line"


def test_text_that_starts_like_json_is_text(tmp_path):
    assert read_prompts(write(tmp_path, "mine.txt", "{x} is a set\n[1]\n"), 4).texts == ("{x} is a set", "[1]")


def test_json_lines(tmp_path):
    lines = '{"text": "t", "question": "q"}\n{"id": 1, "prompt": "p", "text": "t"}\n{"text": "only"}\n'
    found = read_prompts(write(tmp_path, "mine.jsonl", lines), 2)
    assert found.texts == ("q", "p")
    assert found.source == "mine.jsonl, JSON lines, 1 of field 'question', 1 of field 'prompt'"
    assert read_prompts(write(tmp_path, "mine", lines), 1).source == "mine, JSON lines, field 'question'"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("empty.txt", "\n \n", "is empty"),
        ("list.json", '["a"]', "line 1 is not a JSON object"),
        ("broken.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', "line 3 is not a JSON object"),
        (
            "other.jsonl",
            '{"instruction": "a"}\n',
            "line 1 has none of the fields prompt, question, text, only instruction",
        ),
        ("number.jsonl", '{"prompt": 5}\n', "'prompt' in line 1 is not a text"),
    ],
)
def test_bad_prompt_files(tmp_path, name, text, words):
    with pytest.raises(TuningError, match="--prompts=") as caught:
        read_prompts(write(tmp_path, name, text), 4)
    assert words in str(caught.value)


def test_prompt_files_that_cannot_be_read(tmp_path):
    with pytest.raises(TuningError, match="does not exist"):
        read_prompts(tmp_path / "missing.txt", 4)
    with pytest.raises(TuningError, match="cannot be read"):
        read_prompts(tmp_path, 4)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TuningError, match="not UTF-8"):
        read_prompts(binary, 4)


# --- options -----------------------------------------------------------------------------------------------------


def parse(*arguments: str) -> TuningOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_arguments(parser.parse_args(["MODEL", *arguments]))


def test_defaults_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = parse("--prompts", "mine.txt")
    assert options == TuningOptions("MODEL", prompts=Path("mine.txt"))
    assert options.enforce_eager
    assert not parse("--prompts", "mine.txt", "--no-enforce-eager").enforce_eager
    assert options.output_file("lossless") == Path("sirius-lossless.json")
    assert options.output_file("threshold") == Path("sirius-threshold.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-prompts", "0"], "--num-prompts=0 is not a whole number of at least 1"),
        (["--batch", "-1"], "--batch=-1 is not a whole number of at least 1"),
        (["--max-model-len", "0"], "--max-model-len=0 is not"),
        (["--max-kernel-size", "1"], "--max-kernel-size=1 is not from 2 to 128"),
        (["--max-tokens", "16"], "--max-tokens=16 leaves no room for a whole draft at --max-kernel-size=16"),
        (["--batch", "8"], "--num-prompts=4 does not fill one batch of --batch=8"),
        (["--output", "mine.txt"], "--output=mine.txt is not the name of a JSON file: use mine.json"),
        (
            ["--report", "nowhere/report.json"],
            "--report=nowhere/report.json cannot be written: make the folder nowhere",
        ),
    ],
)
def test_bad_options(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TuningError) as caught:
        parse("--prompts", "mine.txt", *arguments)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "--prompts is missing: give a file"), (["--prompts", "missing.txt"], "--prompts=missing.txt does not exist")],
)
def test_the_command_says_what_is_wrong_at_once(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "MODEL", *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert words in output.err
    assert output.out == ""


def test_longest_text():
    assert choose_max_model_len(200, None, 4096) == 256
    assert choose_max_model_len(250, None, 252) == 252
    assert choose_max_model_len(200, 300, 4096) == 300
    with pytest.raises(TuningError, match="take 200 tokens, --max-model-len is 199"):
        choose_max_model_len(200, 199, 4096)
    with pytest.raises(TuningError, match="the model's longest text is 128"):
        choose_max_model_len(200, None, 128)


def test_a_rest_fills_no_batch():
    assert whole_batches([[1], [2], [3], [4], [5]], 2) == [[[1], [2]], [[3], [4]]]
    assert whole_batches([[1], [2]], 1) == [[[1]], [[2]]]
