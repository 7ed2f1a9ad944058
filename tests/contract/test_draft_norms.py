"""The native RMSNorm of drafts against vLLM's own, in a process of its own (vLLM's layers need a config)."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json
from types import SimpleNamespace

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from vllm_sirius.integration.draft_norms import switch_norms

torch.manual_seed(0)
found = {}
with set_current_vllm_config(VllmConfig()), torch.inference_mode():
    for dtype in (torch.float32, torch.bfloat16):
        layer = RMSNorm(96, eps=1e-5, dtype=dtype)
        layer.weight.data = torch.randn(96).to(dtype)
        x, residual = torch.randn(5, 96).to(dtype), torch.randn(5, 96).to(dtype)
        plain = layer(x.clone())
        added = layer(x.clone(), residual.clone())
        mode = SimpleNamespace(drafting=False)
        assert switch_norms(torch.nn.Sequential(layer, GemmaRMSNorm(96), RMSNorm(70)), mode) == 1
        assert isinstance(layer, RMSNorm)
        same = bool(torch.equal(layer(x.clone()), plain))
        mode.drafting = True
        drafted = layer(x.clone())
        drafted_added = layer(x.clone(), residual.clone())
        close = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(drafted, plain, **close)
        for one, other in zip(drafted_added, added):
            torch.testing.assert_close(one, other, **close)
        many = torch.randn(100, 96).to(dtype)
        found[str(dtype)] = {
            "target unchanged": same,
            "large batches are upstream's": bool(torch.equal(layer(many), type(layer).__mro__[1].forward(layer, many))),
        }
print("FOUND " + json.dumps(found))
"""


def test_draft_norms_equal_vllms():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("FOUND "))[6:])
    assert sorted(found) == ["torch.bfloat16", "torch.float32"]
    assert all(all(answers.values()) for answers in found.values()), found
