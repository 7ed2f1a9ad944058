"""The benchmark measures real engines and its tables and charts stand on what it wrote."""

from __future__ import annotations

import json
import os

import pytest
from support.real_models import DATA, ROOT, SMOL, model_path

from benchmarks import compare, plot, results, run

FIXED = 'fixed={"method": "sirius", "kernel_size": 4, "adaptive": false}'

pytestmark = pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason="the data sets are not at hand")


@pytest.mark.slow
def test_a_run_with_table_and_charts(tmp_path, capfd):
    sizes = ["--tasks", "gsm8k", "--num-prompts", "2", "--most-batches", "1", "--max-tokens", "12", "--repeats", "2"]
    options = ["--model", model_path(SMOL), "--arms", "vllm", "--config", FIXED, *sizes, "--answers"]
    assert run.main([*options, "--output", str(tmp_path)]) == 0
    result = results.read(tmp_path)
    # Two rounds: vLLM alone begins the first, Sirius the second.
    assert [record.arm for record in result.records] == ["vllm", "fixed", "fixed", "vllm"]
    for record in result.records:
        assert record.tokens == len(record.token_ids[0])
        assert 0 < record.tokens <= 12
        assert record.seconds > 0
        assert record.prompts == [0]
        assert len(record.correct) == 1
        assert (record.num_drafts > 0) == (record.arm != "vllm")
        assert record.num_accepted_tokens == sum(record.accepted_by_position)
    arm = result.arms["fixed"]
    assert (arm["kernel_size"], arm["status"]) == (4, "measured")
    assert arm["extra_memory_bytes"] > 0
    assert 0 < arm["draft_density"] < 1
    assert os.fspath(ROOT) not in json.dumps([result.provenance, result.arms])
    assert compare.main([str(tmp_path)]) == 0
    assert "gsm8k, batch 1, ratio to vllm" in capfd.readouterr().out
    assert plot.main([str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.glob("*.png")} == {"speed_up.png", "acceptance.png", "roofline.png"}
