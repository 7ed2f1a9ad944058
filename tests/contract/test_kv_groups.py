"""KV caches that drafts can write, told by vLLM's own specs."""

import pytest
from hook_probes import error_of
from test_hooks import ask


def probe_kinds():
    """What is said about groups of each kind."""
    import torch
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        MambaSpec,
        SlidingWindowSpec,
        UniformTypeKVCacheSpecs,
    )

    from vllm_sirius.integration.kv_groups import require_attention

    def heads(count, kind=FullAttentionSpec, **more):
        return kind(block_size=16, num_kv_heads=count, head_size=8, dtype=torch.float32, **more)

    mamba = MambaSpec(block_size=16, shapes=((4, 4),), dtypes=(torch.float32,))
    groups = {
        "one spec": [
            KVCacheGroupSpec(["a", "b"], heads(2)),
            KVCacheGroupSpec(["c"], heads(2, SlidingWindowSpec, sliding_window=8)),
        ],
        "one spec a layer": [
            KVCacheGroupSpec(["a", "b"], UniformTypeKVCacheSpecs(16, kv_cache_specs={"a": heads(2), "b": heads(1)}))
        ],
        "a state": [KVCacheGroupSpec(["a"], heads(2)), KVCacheGroupSpec(["b"], mamba)],
        "a state among others": [
            KVCacheGroupSpec(["a", "b"], UniformTypeKVCacheSpecs(16, kv_cache_specs={"a": heads(2), "b": mamba}))
        ],
        "nothing": [],
    }
    return {
        name: error_of(require_attention, KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=some))
        for name, some in groups.items()
    }


@pytest.fixture(scope="module")
def verdicts():
    return ask(probe_kinds)


@pytest.mark.parametrize("name", ["one spec", "one spec a layer", "nothing"])
def test_attention_can_be_drafted(verdicts, name):
    assert verdicts[name] is None


@pytest.mark.parametrize("name", ["a state", "a state among others"])
def test_other_caches_are_refused_by_layer_and_kind(verdicts, name):
    assert verdicts[name].startswith("SiriusUnsupportedError: layer 'b' keeps a MambaSpec")
    assert "drop the speculative config" in verdicts[name]
