"""The end-to-end tests of `make test-patched` run on the patched copy of vLLM, and nothing is hooked there."""

import os
from pathlib import Path

import pytest
from support.real_models import SMOL, mixed_prompts, model_path

FOLDER = os.environ.get("SIRIUS_PATCHED_COPY")

pytestmark = pytest.mark.skipif(FOLDER is None, reason="`make test-patched` makes the copy and names its folder")


def test_engines_of_this_run_are_patched_and_unhooked(host):
    engine = {
        "model": model_path(SMOL),
        "max_num_seqs": 2,
        "speculative_config": {"method": "sirius", "kernel_size": 4, "adaptive": False},
    }
    found = host.generate(engine, mixed_prompts(SMOL, 1), {"max_tokens": 6, "ignore_eos": True})
    assert found.num_accepted_tokens > 0
    attachment = host.probe(engine, "support.patched_copy:describe_attachment")
    assert Path(attachment["package"]) == Path(FOLDER) / "vllm"
    assert attachment["modules"] == []
    assert attachment["runner_module"].startswith("vllm.v1.worker.cpu")
    assert attachment["hooks"] == []
    assert attachment["registered"]
