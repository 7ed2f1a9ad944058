"""The native RMSNorm of drafts against vLLM's own, in a process of its own (vLLM's layers need a config)."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from test_hooks import ask


def probe_norms():
    """By data type: whether passes of the target, and of drafts of many rows, are upstream's."""
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
            same = torch.equal(layer(x.clone()), plain)
            mode.drafting = True
            drafted = layer(x.clone())
            drafted_added = layer(x.clone(), residual.clone())
            tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(drafted, plain, rtol=tolerance, atol=tolerance)
            for one, other in zip(drafted_added, added, strict=True):
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
            many = torch.randn(100, 96).to(dtype)
            upstream = type(layer).__mro__[1].forward(layer, many)
            found[str(dtype)] = {
                "target unchanged": same,
                "large batches are upstream's": torch.equal(layer(many), upstream),
            }
    return found


def test_draft_norms_equal_vllms():
    found = ask(probe_norms)
    assert sorted(found) == ["torch.bfloat16", "torch.float32"]
    assert all(all(answers.values()) for answers in found.values()), found
