"""``vllm-sirius tune`` on SmolLM2: what it measures, writes and leaves behind."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from support.engine_host import runner_environment
from support.prompts import random_prompts
from support.real_models import OWN_QUESTIONS, SMOL, model_path
from support.snippets import readme_command
from support.tiny_models import build

from vllm_sirius.config import SiriusConfig
from vllm_sirius.measuring.engine import Engine, EngineError
from vllm_sirius.measuring.inspection import Inspection
from vllm_sirius.tuning.grid import DRAFTS, RULES
from vllm_sirius.tuning.measure import measure_draft, steps_of_a_draft
from vllm_sirius.tuning.options import TuningOptions
from vllm_sirius.tuning.progress import Progress
from vllm_sirius.tuning.run import tune
from vllm_sirius.tuning.setting import TuningSetting

COMMAND = str(Path(sys.executable).with_name("vllm-sirius"))
MAX_KERNEL_SIZE = 8
STOP_SECONDS = 120


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": question}) + "\n" for question in OWN_QUESTIONS))
    return path


@pytest.mark.slow
def test_one_draft(prompts, tmp_path, capfd):
    """The grid is one draft: four engines in all."""
    options = TuningOptions(
        model_path(SMOL),
        prompts=prompts,
        num_prompts=2,
        max_tokens=24,
        max_kernel_size=MAX_KERNEL_SIZE,
        output=tmp_path / "sirius.json",
        report=tmp_path / "report.json",
    )
    options.check()
    text = tune(options, DRAFTS[:1])
    report = json.loads(options.report.read_text())
    (draft,) = report["drafts"]
    assert draft["refused"] == ""
    assert draft["start_up_line"]
    for rule in RULES:
        assert draft["counts"][rule]["num_drafts"] > 0
        assert len(draft["counts"][rule]["accepted_by_position"]) == MAX_KERNEL_SIZE - 1
        for prediction in draft["predictions"][rule]:
            assert 1.0 <= prediction["acceptance_length"] <= prediction["kernel_size"]
            assert prediction["draft_cost"] > 0.0
            assert prediction["verify_cost"] > 0.0
    # The laxer rule accepts whatever the stricter one does.
    longest = {rule: draft["predictions"][rule][-1]["acceptance_length"] for rule in RULES}
    assert longest["threshold"] >= longest["lossless"]
    assert [arm["title"] for arm in report["comparison"]] == ["vLLM alone", "best lossless", "best threshold"]
    assert all(answer["tokens"] == 24 for arm in report["comparison"] for answer in arm["answers"])
    assert [winner["acceptance"] for winner in report["winners"]] == list(RULES)
    for winner in report["winners"]:
        check_settings(winner, options.output_file(winner["acceptance"]), text)
    assert f"2 of {len(OWN_QUESTIONS)} prompts (questions.jsonl, JSON lines, field 'question')" in text
    assert f"--num-prompts=2 takes the first 2 of {len(OWN_QUESTIONS)} prompts" in text
    assert "Recommended: " in text
    bar = capfd.readouterr().err
    assert re.search(r"100%.*\d+/\d+", bar)


def check_settings(winner, file, text):
    config = SiriusConfig.from_options(winner["speculative_config"])
    assert config.acceptance == winner["acceptance"]
    assert 2 <= config.kernel_size <= MAX_KERNEL_SIZE
    assert winner["pays"] == (winner["interval"][0] > 1.0) == file.exists()
    if file.exists():
        assert json.loads(file.read_text()) == winner["speculative_config"]
    assert f"measured {winner['measured_ratio']:.2f}x" in text


def test_a_draft_is_measured_on_model_runner_v2(tmp_path, monkeypatch):
    """Costs, counts and predictions of one draft, and no reason against it."""
    for name, value in runner_environment("v2").items():
        monkeypatch.setenv(name, value)
    options = TuningOptions("tiny", prompts=tmp_path / "none.txt", max_tokens=8, max_kernel_size=3)
    engine = {
        "model": str(build("llama", tmp_path)),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 64,
        "max_num_seqs": 1,
        "kv_cache_memory_bytes": 256 << 20,
        "disable_log_stats": False,
        "enable_prefix_caching": False,
    }
    setting = TuningSetting(
        options, Inspection("cpu", "float32", "", 64, 1, 2, 96, 1, 0.5, 0.3, 1), "none", [random_prompts(9)], engine, 1
    )
    with Progress(steps_of_a_draft(setting)) as progress:
        found = measure_draft(setting, DRAFTS[0], tmp_path / "log", progress)
    assert found.refused == ""
    assert found.costs is not None
    assert found.costs.draft_cost(1) > 0.0
    for rule in RULES:
        assert found.counts[rule].num_drafts > 0
        assert [prediction.kernel_size for prediction in found.predictions[rule]] == [2, 3]


@pytest.mark.slow
def test_an_engine_without_sirius_says_why_it_has_no_costs(tmp_path):
    """The engine goes on, for its arm can be measured all the same; the reason is told."""
    options = {"model": str(build("llama", tmp_path)), "enforce_eager": True, "max_model_len": 64}
    with closing(
        Engine({**options, "kv_cache_memory_bytes": 64 << 20, "disable_log_stats": False}, tmp_path / "log")
    ) as engine:
        with pytest.raises(EngineError, match="its steps cannot be timed: the engine runs without Sirius"):
            engine.costs()
        assert engine.generate(random_prompts(5), 2).num_tokens == 2
    with pytest.raises(EngineError, match=r"max_model_len|maximum") as caught:
        Engine({**options, "max_model_len": 1 << 20}, tmp_path / "second-log")
    assert "validation error" not in str(caught.value)  # the reason, not pydantic's heading


def test_a_model_that_cannot_be_served(prompts, tmp_path):
    """The words are those of ``vllm serve``; no engine starts, and what lies in the current folder does not run."""
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')\n")
    model = build("opt", tmp_path)
    command = [COMMAND, "tune", str(model), "--prompts", str(prompts)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=STOP_SECONDS, cwd=tmp_path, check=False)
    assert run.returncode == 1, run.stderr[-3000:]
    assert "gated" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


def children_of(process_id):
    """Process ids of the living children of a process."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == process_id:
                found.append(int(folder.name))
    return found


def test_an_interruption_ends_the_engine_and_says_what_is_lost(prompts, tmp_path):
    """The command of the README, as far as its first engine; `test_one_draft` goes on to the end."""
    log = tmp_path / "stderr"
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')\n")
    places = {"vllm-sirius": COMMAND, "MODEL": model_path(SMOL), "FILE": str(prompts)}
    command = readme_command("vllm-sirius tune", **places)
    with log.open("wb") as stderr:
        # A test run in the background may ignore SIGINT, which children inherit.
        process = subprocess.Popen(
            command, stderr=stderr, cwd=tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        )
    try:
        deadline = time.monotonic() + STOP_SECONDS
        while "coarse 0.5: starting" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        engines = children_of(process.pid)
        assert engines
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP_SECONDS) == 130
    finally:
        process.kill()
        process.wait()
    assert "interrupted: the measurements of 0 of 7 drafts are lost, and no file was written" in log.read_text()
    assert not any(Path(f"/proc/{engine}").exists() for engine in engines)
    assert not list(tmp_path.glob("sirius-*.json"))
