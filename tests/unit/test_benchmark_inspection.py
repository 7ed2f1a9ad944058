"""What the benchmarks know of an arm: the memory that it takes, and which arms share a look at the model."""

from __future__ import annotations

import json
from dataclasses import replace

from benchmarks import inspection
from benchmarks.configurations import Configuration, choose
from vllm_sirius.config import SiriusConfig


def test_memory_of_copies_and_of_a_draft_model(tmp_path):
    shared, int4 = (
        SiriusConfig(draft_weights="shared"),
        SiriusConfig(sparsity="none", draft_weights="int4", draft_weights_scope="all"),
    )
    assert inspection.copied_bytes(shared, 1000, 0.6) == 600
    assert inspection.copied_bytes(int4, 1000, 0.6) == 281
    assert inspection.copied_bytes(replace(int4, draft_weights_scope="ffn"), 1000, 0.5) == 140
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    drafter = Configuration("draft-model", {"method": "draft_model", "model": str(tmp_path)})
    assert inspection.extra_memory_bytes(drafter, "") == 5
    sirius = Configuration("default", {"method": "sirius"})
    assert inspection.extra_memory_bytes(sirius, "24 FFNs | extra memory 1.5 MiB | more") == 3 << 19
    assert inspection.extra_memory_bytes(sirius, "") is None
    assert inspection.extra_memory_bytes(Configuration("vllm", {}), "") == 0


def test_arms_with_the_same_draft_share_an_inspection():
    drafts = {
        inspection.draft_options(arm.sirius) for arm in choose(["coarse-shared", "coarse-shared@8"], [], None)[1:]
    }
    assert len(drafts) == 1
    assert json.loads(drafts.pop()) == {"sparsity": "coarse", "draft_weights": "shared", "density": 0.5}
